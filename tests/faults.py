"""A proxy in front of a real server that fails as servers and networks do, on demand and back again."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

HOP_HEADERS = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "host"})


@dataclass(frozen=True)
class Seen:
    """One request and what the proxy answered; 0: it hung up."""

    method: str
    path: str
    body_bytes: int
    status: int


@dataclass
class Fault:
    """What happens to the requests for which ``when(method, path)`` holds. ``status`` 0: hang up without an answer.
    ``reaches``: the server gets the request before (a lost answer). ``over_bytes``: only larger bodies. ``times``: how
    often it happens, None: until it is lifted."""

    status: int
    when: Callable[[str, str], bool] = lambda method, path: True
    reaches: bool = False
    over_bytes: int = -1
    times: int | None = None
    body: bytes = b"<html><body>fault</body></html>"

    def hits(self, method: str, path: str, size: int) -> bool:
        if size <= self.over_bytes or not self.when(method, path) or self.times == 0:
            return False
        if self.times is not None:
            self.times -= 1
        return True


class FaultProxy:
    """``url`` stands for ``upstream``. Faults are tried in order; requests that none hits pass through."""

    def __init__(self, upstream: str, host: str = "127.0.0.1") -> None:
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.hold = threading.Event()  # cleared: every request waits
        self.hold.set()
        self._upstream = urlsplit(upstream)
        self._host = host
        self._server = ThreadingHTTPServer((host, 0), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._serve()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self) -> None:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def fail(self, status: int, when: Callable[[str, str], bool] = lambda method, path: True, **fault: Any) -> Fault:
        self.faults.append(Fault(status, when, **fault))
        return self.faults[-1]

    def mend(self) -> None:
        """No faults any more, and whoever was kept waiting goes on."""
        self.faults.clear()
        self.hold.set()

    def refuse(self) -> None:
        """Nobody listens: connections are refused, and open ones are hung up."""
        self.fail(0)
        self._server.shutdown()
        self._server.server_close()

    def listen(self) -> None:
        """Listen again, on the same port, without faults."""
        self._server = ThreadingHTTPServer((self._host, self.port), self._handler())
        self._server.daemon_threads = True
        self.mend()
        self._serve()

    def close(self) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.hold.wait()
                fault = next((f for f in proxy.faults if f.hits(self.command, self.path, len(body))), None)
                if fault is None or fault.reaches:
                    status, headers, answer = proxy._forward(self.command, self.path, dict(self.headers), body)
                if fault is not None:
                    status, headers, answer = fault.status, {"Content-Type": "text/html"}, fault.body
                proxy.seen.append(Seen(self.command, self.path, len(body), status))
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in HOP_HEADERS:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(answer)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_any

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: ``seen`` has it."""

        return Handler

    def _forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self._upstream.hostname or "", self._upstream.port, timeout=60)
        try:
            own = {k: v for k, v in headers.items() if k.lower() not in HOP_HEADERS}
            connection.request(method, path, body, own)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()


@contextlib.contextmanager
def fault_proxy(upstream: str, host: str = "127.0.0.1") -> Iterator[FaultProxy]:
    """``host``: where it listens; ``0.0.0.0``: also for pods and containers."""
    proxy = FaultProxy(upstream, host)
    try:
        yield proxy
    finally:
        proxy.close()


def is_artifact(method: str, path: str) -> bool:
    """For ``fail``: requests to the artifact store."""
    return "/mlflow-artifacts/" in path


def is_api(method: str, path: str) -> bool:
    """For ``fail``: requests to the tracking API."""
    return "/api/2.0/mlflow/" in path
