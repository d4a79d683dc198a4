"""The end of a server: whoever is connected by then gets an answer. uvicorn is real, the application a small one."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

from mlflow_remote_backend.deployment.server import serve

SERVER = """
import socket, sys, uvicorn
sys.path.insert(0, sys.argv[1])
import serve

async def application(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

serve.patient_server(uvicorn.Config(application, lifespan="off")).run(sockets=[socket.socket(fileno=int(sys.argv[2]))])
"""
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def server():
    """A server that runs, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = [sys.executable, "-c", SERVER, serve.__file__.rpartition("/")[0], str(listening.fileno())]
        process = subprocess.Popen(command, pass_fds=[listening.fileno()], stderr=subprocess.PIPE, text=True)
        address = listening.getsockname()
    with process:
        yield process, address
        process.kill()


def answer(connection: socket.socket) -> bytes:
    connection.sendall(REQUEST)
    received = b""
    while not received.endswith(b"ok"):
        block = connection.recv(4096)
        assert block, received
        received += block
    return received


def end(process: subprocess.Popen[str]) -> None:
    """Tell it to end, and wait until it is at it."""
    process.send_signal(signal.SIGTERM)
    for line in process.stderr:
        if "No more connections" in line or "Shutting down" in line:
            return
    raise AssertionError("it has ended")


@pytest.mark.parametrize("used_before", [False, True], ids=["a new connection", "one that was used before"])
def test_a_connection_that_was_there_before_the_end_still_gets_its_answer(server, used_before):
    process, address = server
    with socket.create_connection(address, timeout=20) as connection, socket.create_connection(address, 20) as other:
        answer(other)  # the first one was accepted before it
        if used_before:
            assert b"connection: close" not in answer(connection)
        end(process)
        assert b"connection: close" in answer(connection)
        assert connection.recv(1) == b""
    assert process.wait(20) in (0, -signal.SIGTERM)


def test_a_connection_on_which_nothing_comes_does_not_hold_the_end_up(server):
    process, address = server
    with socket.create_connection(address, timeout=20) as connection:
        answer(connection)
        end(process)
        assert process.wait(serve.LINGER_S + 10) in (0, -signal.SIGTERM)
