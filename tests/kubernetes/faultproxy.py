"""A reverse proxy in front of the real API server that fails on request: for faults no healthy server produces.

    proxy.fail("POST", r"/jobs$", status(503), times=2)
    proxy.fail("GET", r"/log", cut(after_bytes=10_000), times=300)

It speaks plain HTTP to the client and uses the credentials of the cluster's own kubeconfig upstream, so that whoever
reaches it has their rights. Rules are tried in order; one whose ``times`` are used up is dropped.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
import struct
import tempfile
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

Fault = Callable[["_Handler", bytes], None]
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length", "host"}


@dataclass
class Rule:
    """``matches``: method and a pattern searched in path and query."""

    method: str
    pattern: re.Pattern[str]
    fault: Fault
    times: int | None = None


def status(code: int, *, reason: str = "", message: str = "injected", retry_after_s: int | None = None) -> Fault:
    """An answer as Kubernetes gives it, instead of the server's."""

    def act(handler: _Handler, body: bytes) -> None:
        document = {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message}
        extra = {"Retry-After": str(retry_after_s)} if retry_after_s is not None else {}
        handler.answer(code, json.dumps(document).encode(), extra)

    return act


def malformed(handler: _Handler, body: bytes) -> None:
    handler.answer(200, b'{"kind": "Job", "metad')


def reset(handler: _Handler, body: bytes) -> None:
    """The connection is reset, and the server never hears of the request."""
    handler.reset()


def lose_the_reply(handler: _Handler, body: bytes) -> None:
    """The server does what was asked; the client never learns of it."""
    response = handler.forward(body)
    response.read()
    handler.reset()


def cut(after_bytes: int) -> Fault:
    """The answer breaks off after so many bytes."""

    def act(handler: _Handler, body: bytes) -> None:
        handler.pass_on(body, limit=after_bytes)
        handler.reset()

    return act


def cut_after_s(seconds: float) -> Fault:
    """The answer breaks off after so long."""

    def act(handler: _Handler, body: bytes) -> None:
        timer = threading.Timer(seconds, handler.hang_up)
        timer.daemon = True
        timer.start()
        handler.pass_on(body)
        timer.cancel()

    return act


def end(after_bytes: int) -> Fault:
    """The answer ends cleanly, but early, as every middlebox and the kubelet's four hours do."""
    return lambda handler, body: handler.pass_on(body, limit=after_bytes)


def stall(after_bytes: int) -> Fault:
    """Half-open: after so many bytes nothing comes any more, and the connection stays."""

    def act(handler: _Handler, body: bytes) -> None:
        handler.pass_on(body, limit=after_bytes, then=lambda: handler.proxy.released.wait(600))

    return act


def said_by_the_kubelet(text: str) -> Fault:
    """The kubelet's own error text in a log that it serves with status 200."""
    return lambda handler, body: handler.answer(200, text.encode(), {"Content-Type": "text/plain"})


def watch_error(handler: _Handler, body: bytes) -> None:
    """A watch that says 410 in an event."""
    gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
    handler.answer(200, json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")


@dataclass
class FaultProxy:
    """``requests``: method and path of each request so far."""

    kubeconfig: Path
    requests: list[tuple[str, str]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    _rules: list[Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, method: str, pattern: str, fault: Fault, times: int | None = 1) -> Rule:
        rule = Rule(method, re.compile(pattern), fault, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def heal(self) -> None:
        with self._lock:
            self._rules.clear()
        self.released.set()
        self.released = threading.Event()

    def count(self, method: str, pattern: str) -> int:
        return sum(1 for each, path in list(self.requests) if each == method and re.search(pattern, path))

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            for rule in self._rules:
                if rule.method in (method, "*") and rule.pattern.search(path):
                    if rule.times is not None:
                        rule.times -= 1
                        if rule.times <= 0:
                            self._rules.remove(rule)
                    return rule.fault
        return None

    def client_config(self, folder: Path, *, token: str = "") -> Path:
        """A kubeconfig that leads through the proxy."""
        user = {"token": token} if token else {}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "proxied",
            "clusters": [{"name": "proxied", "cluster": {"server": self.url}}],
            "users": [{"name": "proxied", "user": user}],
            "contexts": [{"name": "proxied", "context": {"cluster": "proxied", "user": "proxied"}}],
        }
        path = folder / "proxied.kubeconfig"
        path.write_text(yaml.safe_dump(document))
        return path

    @contextlib.contextmanager
    def running(self) -> Iterator[FaultProxy]:
        with tempfile.TemporaryDirectory() as folder:
            self._upstream, self._tls = _upstream(self.kubeconfig, Path(folder))
            server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
            server.daemon_threads = True
            self.url = f"http://127.0.0.1:{server.server_port}"
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            try:
                yield self
            finally:
                self.heal()
                server.shutdown()
                server.server_close()

    def connect(self) -> http.client.HTTPSConnection:
        parts = urllib.parse.urlsplit(self._upstream)
        assert parts.hostname
        return http.client.HTTPSConnection(parts.hostname, parts.port or 443, context=self._tls, timeout=600)


def _upstream(kubeconfig: Path, folder: Path) -> tuple[str, ssl.SSLContext]:
    """Address and TLS of the cluster of a kubeconfig with a client certificate."""
    import base64

    document = yaml.safe_load(kubeconfig.read_text())
    context = next(c["context"] for c in document["contexts"] if c["name"] == document["current-context"])
    cluster = next(c["cluster"] for c in document["clusters"] if c["name"] == context["cluster"])
    user = next(c["user"] for c in document["users"] if c["name"] == context["user"])
    for name, data in (
        ("ca", cluster["certificate-authority-data"]),
        ("crt", user["client-certificate-data"]),
        ("key", user["client-key-data"]),
    ):
        (folder / name).write_bytes(base64.b64decode(data))
    tls = ssl.create_default_context(cafile=str(folder / "ca"))
    tls.load_cert_chain(folder / "crt", folder / "key")
    return cluster["server"], tls


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def _serve(self) -> None:
        self.close_connection = True
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.fault_for(self.command, self.path)
        with contextlib.suppress(OSError, http.client.HTTPException):
            (fault or _Handler.pass_on)(self, body)

    do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _serve

    def forward(self, body: bytes) -> http.client.HTTPResponse:
        connection = self.proxy.connect()
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        connection.request(self.command, self.path, body or None, headers)
        return connection.getresponse()

    def pass_on(self, body: bytes, limit: int | None = None, then: Callable[[], Any] = lambda: None) -> None:
        response = self.forward(body)
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.flush()
        left = limit if limit is not None else 1 << 62
        while left and (block := response.read1(min(left, 1 << 16))):
            self.wfile.write(block)
            self.wfile.flush()
            left -= len(block)
        if not left:
            then()
        response.close()

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def reset(self) -> None:
        """RST instead of FIN: the client sees a connection that was reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def hang_up(self) -> None:
        """At once, whatever another thread is writing."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments: object) -> None:
        pass
