"""A registry that wants a password: a proxy before the one that runs."""

from __future__ import annotations

import base64
import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER, PASSWORD = "reader", "".join(("let", "me", "in"))
_DROPPED = {"authorization", "connection", "transfer-encoding", "content-length"}


@contextlib.contextmanager
def private_registry(target: str, port: int = 0) -> Iterator[str]:
    """The address of the proxy; it passes everything to ``target`` that comes with the right credentials."""
    server = ThreadingHTTPServer(("127.0.0.1", port), _handler(target))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(target: str) -> type[BaseHTTPRequestHandler]:
    expected = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self._body()
            if self.headers.get("Authorization") != expected:
                self._answer(401, {"WWW-Authenticate": 'Basic realm="private"'}, b"unauthorized")
                return
            names = {name.lower() for name in self.headers} - _DROPPED
            headers = {name: ", ".join(self.headers.get_all(name) or ()) for name in names}
            upstream = http.client.HTTPConnection(target, timeout=60)
            upstream.request(self.command, self.path, body=body, headers=headers)
            response = upstream.getresponse()
            kept = {name: value for name, value in response.getheaders() if name.lower() not in _DROPPED}
            length = response.getheader("Content-Length")
            self._answer(response.status, kept, response.read(), length if self.command == "HEAD" else None)
            upstream.close()

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = forward

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def _answer(self, status: int, headers: dict[str, str], body: bytes, length: str | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": length or str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Silent."""

    return Handler
