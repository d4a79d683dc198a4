"""The keeper: a port that is never closed, whatever becomes of the servers on it. The servers here are small ones that
keep its protocol (``--fd`` sockets); the real one is in the other files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from mlflow_remote_backend.deployment.server import keeper

#: Accepts on the sockets it is given, after ``DELAY`` seconds, and answers every request with ``SAYS``.
SERVER = """
import http.server, os, socket, sys, threading, time
fds = [int(sys.argv[i + 1]) for i, a in enumerate(sys.argv) if a == "--fd"]
time.sleep(float(os.environ.get("DELAY", "0")))
if os.environ.get("EXIT"):
    print("no good", flush=True); sys.exit(int(os.environ["EXIT"]))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(9)
        body = os.environ["SAYS"].encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *a): pass

import signal
servers = []
for fd in fds:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=fd)
    server.daemon_threads = False
    servers.append(server)
signal.signal(signal.SIGTERM, lambda *a: [threading.Thread(target=s.shutdown).start() for s in servers])
threads = [threading.Thread(target=s.serve_forever, args=(0.05,)) for s in servers]
[t.start() for t in threads]; [t.join() for t in threads]
[s.server_close() for s in servers]
"""


class Bench:
    """A keeper's folder, and the keeper."""

    def __init__(self, folder: Path, until) -> None:
        self.folder = folder
        self.until = until
        self.script = folder / "server.py"
        self.script.write_text(SERVER)
        self.process: subprocess.Popen[bytes] | None = None
        self.attempts = 0

    def start(self, port: int = 0) -> None:
        (self.folder / "listen.json").write_text(json.dumps({"host": "127.0.0.1", "port": port}))
        command = [sys.executable, "-I", "-S", keeper.__file__, str(self.folder)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def want(
        self, revision: int, *, workers: int = 1, patience_s: float = 60, listen: dict | None = None, **env: str
    ) -> None:
        self.attempts += 1
        wanted = {
            "revision": revision,
            "attempt": str(self.attempts),
            "argv": [sys.executable, "-S", str(self.script)],
            "env": {**os.environ, "SAYS": f"revision {revision}", **env},
            "workers": workers,
            "patience_s": patience_s,
            "grace_s": 5,
            "listen": listen or {},
        }
        (self.folder / "wanted.new").write_text(json.dumps(wanted))
        os.replace(self.folder / "wanted.new", self.folder / "wanted.json")

    def state(self) -> dict:
        return keeper.read_json(str(self.folder / "state.json")) or {}

    def serving(self, revision: int) -> None:
        self.until(lambda: self.state().get("serving") == revision, what=f"revision {revision} serves: {self.state()}")

    def get(self, path: str = "/") -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.state()['port']}{path}", timeout=20) as answer:
            return answer.read().decode()


@pytest.fixture
def bench(tmp_path, until):
    made = Bench(tmp_path, until)
    yield made
    if made.process is not None:
        made.process.terminate()
        made.process.wait(30)


def test_an_update_fails_not_one_request(bench):
    bench.start()
    bench.want(1)
    bench.serving(1)
    answers, stop = [], threading.Event()

    def load() -> None:
        while not stop.is_set():
            try:
                answers.append(bench.get())
            except OSError as error:
                answers.append(f"failed: {error}")

    threads = [threading.Thread(target=load) for _ in range(3)]
    for each in threads:
        each.start()
    bench.until(lambda: len(answers) > 20)
    bench.want(2, DELAY="0.5")
    bench.serving(2)
    bench.until(lambda: answers[-20:] == ["revision 2"] * 20)
    stop.set()
    for each in threads:
        each.join()
    assert set(answers) == {"revision 1", "revision 2"}


def test_a_revision_that_dies_leaves_the_one_before(bench):
    bench.start()
    bench.want(1)
    bench.serving(1)
    bench.want(2, EXIT="3")
    failed = bench.until(lambda: bench.state().get("failed"))
    assert (failed["revision"], failed["exit"], failed["attempt"]) == (2, 3, "2")
    assert bench.get() == "revision 1"
    assert "no good" in (bench.folder / "log").read_text()


def test_a_revision_that_does_not_answer_in_time_is_ended(bench):
    bench.start()
    bench.want(1, DELAY="60", patience_s=0.5)
    failed = bench.until(lambda: bench.state().get("failed"))
    assert failed["why"] == "timeout"


def test_a_server_that_dies_is_started_again_and_requests_wait_for_it(bench):
    bench.start()
    bench.want(1)
    bench.serving(1)
    with pytest.raises(ConnectionError):
        bench.get("/die")
    assert bench.get() == "revision 1"
    assert bench.state()["restarts"] == 1


def test_an_update_that_is_taken_back_is_ended(bench):
    bench.start()
    bench.want(1)
    bench.serving(1)
    before = (bench.folder / "wanted.json").read_bytes()
    bench.want(2, DELAY="60")
    bench.until(lambda: len(children(bench.process.pid)) == 2)
    (bench.folder / "wanted.json").write_bytes(before)
    bench.until(lambda: len(children(bench.process.pid)) == 1)
    assert bench.get() == "revision 1"


def test_another_attempt_at_the_revision_that_serves_is_not_taken_for_taken_back(bench):
    bench.start()
    bench.want(1)
    bench.serving(1)
    bench.want(1, SAYS="another attempt")
    bench.until(lambda: bench.get() == "another attempt")
    assert bench.state()["attempt"] == "2"


def test_several_workers_serve_one_port(bench):
    bench.start()
    bench.want(1, workers=3)
    bench.serving(1)
    assert len(children(bench.process.pid)) == 3
    assert bench.get() == "revision 1"


def test_a_revision_that_listens_elsewhere_has_its_port_before_the_old_one_is_closed(bench):
    bench.start()
    bench.want(1)
    bench.serving(1)
    before = bench.state()["port"]
    with keeper.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        bench.want(2, listen={"host": "127.0.0.1", "port": port})
        failed = bench.until(lambda: bench.state().get("failed"))
    assert (failed["why"], failed["revision"]) == ("port", 2)
    assert bench.get() == "revision 1"
    bench.want(2, listen={"host": "127.0.0.1", "port": port})
    bench.serving(2)
    assert (bench.state()["port"], bench.get()) == (port, "revision 2")
    bench.until(lambda: refused(before))
    bench.want(3, listen={"host": "0.0.0.0", "port": 0})
    bench.serving(3)
    assert (bench.state()["host"], bench.state()["port"]) == ("0.0.0.0", port)
    bench.until(lambda: len(children(bench.process.pid)) == 1)
    assert bench.get() == "revision 3"
    assert json.loads((bench.folder / "listen.json").read_text()) == {"host": "0.0.0.0", "port": port}


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # it is being closed at this very moment
    return False


def test_what_ends_as_an_orphan_is_collected_and_the_exit_codes_of_servers_are_kept():
    own = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    other = os.spawnlp(os.P_NOWAIT, "true", "true")
    while own.returncode is None or Path(f"/proc/{other}").exists():
        keeper.reap([own])
    assert own.returncode == 7


def test_a_keeper_waits_for_somebody_who_only_looks_whether_one_lives(bench):
    with (bench.folder / "lock").open("w") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        bench.start()
        with pytest.raises(subprocess.TimeoutExpired):
            bench.process.wait(0.5)
    bench.want(1)
    bench.serving(1)


#: A server writes after the log has been read.
ROTATION = """
import io, os, sys
import keeper

log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1)
os.write(log, b"before\\n")

class Read(io.BufferedReader):
    def read(self, *size):
        data = super().read(*size)
        if b"before" in data:
            os.write(log, b"meanwhile\\n")
        return data

keeper.LOG_BYTES = 1
keeper.open = lambda path, mode: Read(io.FileIO(path)) if mode == "rb" else open(path, mode)
keeper.limit_log()
os.write(log, b"after\\n")
"""


def test_what_servers_write_while_the_log_is_put_aside_is_kept(tmp_path):
    command = [sys.executable, "-c", ROTATION, str(tmp_path / "log")]
    subprocess.run(command, cwd=Path(keeper.__file__).parent, check=True)
    kept = [(tmp_path / name).read_text() for name in ("log.1", "log")]
    assert kept == ["before\nmeanwhile\n", "after\n"]


def test_a_taken_port_is_said(bench, tmp_path):
    taken = keeper.listen("127.0.0.1", 0)
    with taken:
        bench.start(taken.getsockname()[1])
        assert bench.process.wait(20) == 1
    assert bench.state()["failed"]["why"] == "port"


@pytest.mark.parametrize("how", ["file", "signal"])
def test_stopping_ends_the_servers_too(bench, how):
    bench.start()
    bench.want(1)
    bench.serving(1)
    pids = children(bench.process.pid)
    if how == "file":
        (bench.folder / "stop").touch()
    else:
        bench.process.send_signal(signal.SIGTERM)
    assert bench.process.wait(20) == 0
    bench.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_server_that_cannot_be_started_again_is_tried_until_it_can(bench, monkeypatch):
    python = bench.folder / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    bench.want(1, workers=2)
    monkeypatch.undo()
    bench.start()
    bench.serving(1)
    python.unlink()
    with contextlib.suppress(OSError):
        bench.get("/die")
    log = bench.folder / "log"
    bench.until(lambda: "cannot be started" in log.read_text())
    assert bench.get() == "revision 1"
    python.symlink_to(sys.executable)
    bench.until(lambda: bench.state()["restarts"] == 1)
    assert bench.get() == "revision 1"


def test_what_failed_is_not_tried_again_by_the_next_keeper(bench):
    bench.start()
    bench.want(1)
    bench.serving(1)
    bench.want(2, EXIT="3")
    bench.until(lambda: bench.state().get("failed"))
    bench.process.kill()  # and whoever wanted revision 2 has died before
    bench.process.wait()
    (bench.folder / "state.json").unlink()
    bench.start()
    bench.serving(1)
    assert bench.get() == "revision 1"


def test_a_disk_without_room_does_not_end_what_serves(bench):
    bench.start()
    bench.want(1, workers=2)
    bench.serving(1)
    in_the_way = bench.folder / f"state.json.{bench.process.pid}.tmp"
    in_the_way.mkdir()
    with contextlib.suppress(OSError):
        bench.get("/die")
    bench.until(lambda: "started again" in (bench.folder / "log").read_text())
    assert bench.get() == "revision 1"
    in_the_way.rmdir()
    bench.until(lambda: bench.state()["restarts"] == 1)
    (bench.folder / f"listen.json.{bench.process.pid}.tmp").mkdir()
    bench.want(2, listen={"host": "0.0.0.0", "port": 0})
    bench.serving(2)
    assert bench.state()["host"] == "0.0.0.0"
