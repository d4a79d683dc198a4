"""Fetching an artifact over a connection that fails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mlflow_remote_backend.runner.fetch import fetch

CONTENT = b"x" * 1000


class Chunked(BaseHTTPRequestHandler):
    """Sends the artifact in chunks, as a proxy or an older MLflow may; the first answer is cut in the middle of one."""

    protocol_version = "HTTP/1.1"
    answers = 0

    def do_GET(self) -> None:
        Chunked.answers += 1
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        whole = b"%x\r\n%b\r\n0\r\n\r\n" % (len(CONTENT), CONTENT)
        self.wfile.write(whole if Chunked.answers > 1 else whole[:500])
        self.close_connection = True

    def log_message(self, format: str, *words: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def served() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Chunked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_answer_that_is_cut_is_asked_for_again(tmp_path: Path) -> None:
    with served() as uri:
        fetch("mlflow-artifacts:/0/snapshot", tmp_path / "target", uri, {})
    assert (tmp_path / "target").read_bytes() == CONTENT
    assert Chunked.answers == 2
