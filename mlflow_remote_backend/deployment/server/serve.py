"""MLflow's own scoring server for one model, on sockets that are open already. Runs in the model's environment.

    python serve.py --model FOLDER [--token-file FILE] [--timeout SECONDS] [--grace SECONDS] [--behind-proxies] --fd N …

It needs what MLflow's scoring server needs (MLflow 3 with FastAPI and uvicorn, which it brings) and nothing of ours.
Requests are accepted once the model is loaded, not before. With a token, whatever is not a health check needs the
header ``Authorization: Bearer TOKEN``; without it the answer is 401. Kubernetes' API server keeps that header for
itself, so ``X-MLflow-Remote-Token: TOKEN`` does as well. The token is read from a file and never written.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import logging
import os
import signal
import socket
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

WATCH_S = 0.5
BACKLOG = 1024
OPEN_PATHS = ("/ping", "/health", "/version")
LINGER_S = 1.0  # how long a connection that was accepted may take to send its request when this server ends
LINGER_TICK_S = 0.1  # also the least, since what was accepted is no connection yet for some turns of the loop
#: How long a connection may be idle: longer than proxies keep theirs (Go's and the API server's 90 s, nginx and load
#: balancers 60 s), or a request may be sent into one that is being closed here.
KEEP_ALIVE_S = {False: 5, True: 120}
UNAUTHORIZED = b'{"error_code": "UNAUTHENTICATED", "message": "This deployment wants a token (Authorization: Bearer)."}'


class Guard:
    """An ASGI application that lets requests through to another one if they carry the token."""

    def __init__(self, application: Any, token: str) -> None:
        self._application = application
        self._expected = {b"authorization": b"Bearer " + token.encode(), b"x-mlflow-remote-token": token.encode()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._allowed(scope):
            await self._application(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": UNAUTHORIZED})

    def _allowed(self, scope: Any) -> bool:
        given = [(name, value) for name, value in scope["headers"] if name in self._expected]
        return len(given) == 1 and hmac.compare_digest(given[0][1], self._expected[given[0][0]])


class WithoutProbes(logging.Filter):
    """Leaves out of the access log that a health check was answered: there is one every few seconds."""

    def filter(self, record: logging.LogRecord) -> bool:
        _, method, path, _, status = record.args if isinstance(record.args, tuple) else ("",) * 5
        return not (method == "GET" and path in OPEN_PATHS and status == 200)


def application(model: str, token: str) -> Any:
    """The server's application with the model loaded, which may take minutes."""
    from mlflow.pyfunc import scoring_server

    made = scoring_server.init(scoring_server.load_model_with_mlflow_config(model))
    return Guard(made, token) if token else made


def patient_server(config: Any) -> Any:
    """uvicorn's server, but for its end: that would close each connection on which no request has come yet, also those
    that were accepted a moment ago and whose request is on its way. Here nothing more is accepted, and whoever is
    connected has LINGER_S to send a request, and learns from the answer that the connection ends.
    """
    import uvicorn

    class PatientServer(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()
            for each in sockets or []:
                each.close()
            logging.getLogger("uvicorn.error").info("No more connections are accepted")
            self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
            deadline = time.monotonic() + LINGER_S
            await asyncio.sleep(LINGER_TICK_S)
            while self.server_state.connections and time.monotonic() < deadline:
                await asyncio.sleep(LINGER_TICK_S)
            await super().shutdown()

    return PatientServer(config)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--token-file", default="")
    parser.add_argument("--timeout", default="")
    parser.add_argument("--grace", type=int, default=30)
    parser.add_argument("--behind-proxies", action="store_true")
    parser.add_argument("--fd", type=int, action="append", required=True)
    return parser.parse_args(argv)


def end_with(parent: int) -> None:
    """End this process, in order, soon after its parent has died: nobody else would ever tell it to."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def main(argv: list[str]) -> int:
    asked = arguments(argv)
    end_with(os.getppid())
    if asked.timeout:
        os.environ["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"] = asked.timeout
    token = ""
    if asked.token_file:
        with open(asked.token_file, encoding="utf-8") as file:
            token = file.read().strip()
    try:
        import uvicorn
    except ImportError:
        from mlflow.version import VERSION

        sys.exit(
            f"MLflow {VERSION} in the model's environment has another scoring server; MLflow 3 is needed: log anew."
        )
    app = application(asked.model, token)
    config = uvicorn.Config(
        app,
        log_level="info",
        timeout_graceful_shutdown=asked.grace,
        timeout_keep_alive=KEEP_ALIVE_S[asked.behind_proxies],
        backlog=BACKLOG,
    )
    if asked.behind_proxies:
        logging.getLogger("uvicorn.access").addFilter(WithoutProbes())
    patient_server(config).run(sockets=[socket.socket(fileno=fd) for fd in asked.fd])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
