"""Hold a deployment's port; keep its servers running on it; replace them by new ones without closing it.

    python -I -S keeper.py FOLDER

One file, standard library only, Python 3.7 or newer: it runs in the user's image as well. In FOLDER:

    listen.json   {"host", "port"}: what to listen on at the start; port 0 takes a free one
    wanted.json   what shall run; replaced by whoever wants something else:
                  {"revision", "attempt", "argv", "env", "workers", "patience_s", "grace_s"} and "listen", another
                  {"host", "port"} for it; port 0 is the one that there is
    state.json    what is: {"pid", "host", "port", "serving", "attempt", "served", "failed", "restarts", "exit", "at"};
                  "serving", "attempt": of what was wanted and serves; "served": whether anything ever did, under this
                  keeper or one before
    stop          somebody asked to end it all
    lock          held (flock) as long as we live

- A server is ``argv --fd PUBLIC --fd OWN``: it accepts on both sockets once its model is loaded. OWN is a loopback port
  of its own, on which we ask ``/ping`` and ``/version`` until it answers. Only when all workers of a revision answer,
  the servers of the one before are told to end (SIGTERM; SIGKILL after ``grace_s``): the port is never closed.
- A new revision that dies, or does not answer within ``patience_s``, is ended and reported in ``failed``; the servers
  before it go on, and are what is wanted again: whoever asked for the new one may be gone.
- A server that dies while it serves is started again, after 1, 2, 4 … 30 s. Requests wait in the port's queue.
- A revision that listens elsewhere has the new port before the old one is closed, which is when the old servers end.
- As a container's first process, we collect whatever orphan ends there.
- SIGTERM, or the file ``stop``, ends the servers in order, then us.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TICK_S = 0.05
LOOK_S = 1.0  # somebody who looks whether a keeper lives is done by then
PROBE_S = 2.0  # for one answer of a server that is about to serve
BACKLOG = 1024
LOG_BYTES = 16 * 1024 * 1024  # at which a log file of ours is put aside, once
GRACE_MARGIN_S = 5.0
LONGEST_PAUSE_S = 30.0
CALM_S = 60.0  # a server that lived that long was well: the next pause is short again


def read_json(path: str) -> Any:
    """The file's content, None where there is none (yet)."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def write_json(path: str, value: object) -> None:
    """Replace the file whole or not at all."""
    beside = f"{path}.{os.getpid()}.tmp"
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(beside, path)


def listen(host: str, port: int, beside: socket.socket | None = None) -> socket.socket:
    """A socket that listens, for servers to accept on. ``beside``: one of ours that may hold the same port at another
    address. Raises OSError: the port is taken, or not ours to take."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sharing = [made, beside] if beside is not None and beside.getsockname()[1] == port else []
    try:
        for each in sharing:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind((host, port))
        made.listen(BACKLOG)
    except OSError:
        made.close()
        raise
    finally:
        for each in sharing:
            if each.fileno() >= 0:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    made.setblocking(False)
    return made


def has_served(folder: str) -> bool:
    return bool((read_json(os.path.join(folder, "state.json")) or {}).get("served"))


def oom_kills() -> int:
    """How many processes the kernel killed for this container's memory limit (cgroup 2, cgroup 1); 0 where that cannot
    be known."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        try:
            with open(path, encoding="ascii") as file:
                return int(dict(line.split() for line in file).get("oom_kill", 0))
        except (OSError, ValueError):
            continue
    return 0


class Server:
    """One process that serves a revision, or is about to."""

    def __init__(self, wanted: Any, public: socket.socket) -> None:
        self.began = time.monotonic()
        self.answers = False
        with listen("127.0.0.1", 0) as own:
            self.port = own.getsockname()[1]
            descriptors = (public.fileno(), own.fileno())
            argv = [*wanted["argv"], *(each for fd in descriptors for each in ("--fd", str(fd)))]
            self.process = subprocess.Popen(
                argv, env=wanted["env"], pass_fds=descriptors, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def ended(self) -> int | None:
        return self.process.poll()

    def probe(self) -> bool:
        """Whether it answers; once it did, it counts as answering. Blocks for PROBE_S at most."""
        self.answers = self.answers or (self._answer("/ping") and self._answer("/version"))
        return self.answers

    def _answer(self, path: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PROBE_S)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def signal(self, number: int) -> None:
        """To the server and whatever it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


class Revision:
    """The servers of one ``wanted.json``: all are started, or none. Raises OSError."""

    def __init__(self, wanted: Any, public: socket.socket) -> None:
        self.wanted = wanted
        self.number = wanted["revision"]
        self.public = public
        self.deadline = time.monotonic() + wanted["patience_s"]
        self.restarts = 0
        self.exit = 0
        self._pause_s, self._next_start = 1.0, 0.0
        self.servers: list[Server] = []
        try:
            for _ in range(wanted["workers"]):
                self.servers.append(Server(wanted, public))
        except OSError:
            self.end(0)
            raise

    def ready(self) -> bool:
        return all(each.probe() for each in self.servers)

    def first_exit(self) -> int | None:
        return next((code for code in (each.ended() for each in self.servers) if code is not None), None)

    def revive(self) -> bool:
        """Start again what has died, unless it is too early for that. True if anything changed."""
        changed = False
        for place, server in enumerate(self.servers):
            code = server.ended()
            if code is None:
                continue
            if self._next_start <= server.began:
                calm = time.monotonic() - server.began > CALM_S
                self._pause_s = 1.0 if calm else min(self._pause_s * 2, LONGEST_PAUSE_S)
                self._next_start = time.monotonic() + (0.0 if calm else self._pause_s / 2)
                self.exit, changed = code, True
                say(f"a server ended with exit code {code}; it is started again")
            if time.monotonic() >= self._next_start:
                try:
                    self.servers[place] = Server(self.wanted, self.public)
                except OSError as error:  # no memory for it just now
                    say(f"the server cannot be started: {error}")
                    self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
                    self._next_start = time.monotonic() + self._pause_s
                    continue
                self.restarts += 1
                changed = True
        return changed

    def end(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL for what still lives after the grace period. Blocks until all have ended."""
        for each in self.servers:
            each.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self._alive() and time.monotonic() < deadline:
            time.sleep(TICK_S)
        for each in self.servers:
            each.signal(signal.SIGKILL)
            each.process.wait()

    def _alive(self) -> bool:
        return any(each.ended() is None for each in self.servers)


class Keeper:
    """All of it. ``run`` returns when it is told to stop."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.stopping = False
        self.untold = True
        self.serving: Revision | None = None
        self.coming: Revision | None = None
        self.failed: dict[str, Any] | None = None
        self._kills = 0
        self._seen: Any = None
        self.served = has_served(folder)
        asked = read_json(self._path("listen.json"))
        self.public = listen(asked["host"], asked["port"])
        self.public.set_inheritable(False)
        self.host, self.port = asked["host"], self.public.getsockname()[1]
        self.first_process = os.getpid() == 1

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def tell(self) -> None:
        """Tried again until it works: a full disk must not end what serves."""
        serving = self.serving
        state = {
            "pid": os.getpid(),
            "host": self.host,
            "port": self.port,
            "serving": serving.number if serving else None,
            "attempt": serving.wanted["attempt"] if serving else None,
            "served": self.served,
            "failed": self.failed,
            "restarts": serving.restarts if serving else 0,
            "exit": serving.exit if serving else 0,
            "at": time.time(),
        }
        self.untold = True
        with suppress(OSError):
            write_json(self._path("state.json"), state)
            self.untold = False

    def run(self) -> None:
        while not self.stopping and not os.path.exists(self._path("stop")):
            if self.untold:
                self.tell()
            self.look_at_wanted()
            if self.coming is not None:
                self.judge(self.coming)
            if self.serving is not None and self.serving.revive():
                self.tell()
            if self.first_process:
                reap([server.process for each in (self.coming, self.serving) if each for server in each.servers])
            limit_log()
            time.sleep(TICK_S)
        for each in (self.coming, self.serving):
            if each is not None:
                each.end(each.wanted["grace_s"] + GRACE_MARGIN_S)

    def look_at_wanted(self) -> None:
        wanted = read_json(self._path("wanted.json"))  # None as well while somebody's copy of it is not whole
        if wanted is None or wanted == self._seen:
            return
        self._seen = wanted
        if self.coming is not None:
            self.end_coming(self.coming)
        if self.serving is not None and wanted["attempt"] == self.serving.wanted["attempt"]:
            return  # taken back: what serves goes on
        self.failed, self._kills = None, oom_kills()
        try:
            public = self.socket_for(wanted.get("listen") or {})
        except OSError as error:
            say(f"the port cannot be taken: {error}")
            self.fail(wanted, 1, "port", str(error))
            self.tell()
            return
        try:
            self.coming = Revision(wanted, public)
        except OSError as error:
            self.give_up(public)
            say(f"the server cannot be started: {error}")
            self.fail(wanted, 127, "start")
        self.tell()

    def end_coming(self, coming: Revision) -> None:
        coming.end(0)
        self.give_up(coming.public)
        self.coming = None

    def socket_for(self, asked: Any) -> socket.socket:
        """The one there is, or one for another address, which a revision asks for. Raises OSError."""
        host, port = asked.get("host", self.host), asked.get("port") or self.port
        if (host, port) == (self.host, self.port):
            return self.public
        made = listen(host, port, beside=self.public)
        made.set_inheritable(False)
        return made

    def give_up(self, public: socket.socket) -> None:
        if public is not self.public:
            public.close()

    def move_to(self, revision: Revision) -> socket.socket:
        """Where the revision listens is where we do from now on, also after a restart. The socket before."""
        before = self.public
        if revision.public is not before:
            self.public = revision.public
            self.host, self.port = revision.wanted["listen"]["host"], self.public.getsockname()[1]
            with suppress(OSError):  # the next keeper comes here all the same, by what is wanted
                write_json(self._path("listen.json"), {"host": self.host, "port": self.port})
        return before

    def fail(self, wanted: Any, code: int | None, why: str, words: str = "") -> None:
        if self.serving is not None and read_json(self._path("wanted.json")) == wanted:
            with suppress(OSError):
                write_json(self._path("wanted.json"), self.serving.wanted)
        self.failed = {
            "revision": wanted["revision"], "attempt": wanted["attempt"], "exit": code, "why": why, "words": words
        }  # fmt: skip

    def judge(self, coming: Revision) -> None:
        """Whether the new revision takes over, is given up, or needs more time."""
        code = coming.first_exit()
        if code is None and coming.ready():
            before, self.serving, self.coming, self.served = self.serving, coming, None, True
            self.give_up(self.move_to(coming))  # its servers have it too: it is closed when they stop accepting
            self.tell()
            if before is not None:
                before.end(before.wanted["grace_s"] + GRACE_MARGIN_S)
            return
        if code is None and time.monotonic() < coming.deadline:
            return
        why = "timeout" if code is None else ""
        if code == -signal.SIGKILL and oom_kills() > self._kills:
            why = "oom"
        self.end_coming(coming)
        self.fail(coming.wanted, code, why)
        self.tell()


def say(text: str) -> None:
    with suppress(OSError):  # the disk is full
        print("mlflow-remote: " + text, flush=True)


def reap(ours: list[subprocess.Popen[bytes]]) -> None:
    """Collect what has ended. An orphan's exit code nobody asks for; those of ``ours`` stay theirs."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None:
            return
        own = next((each for each in ours if each.pid == found.si_pid), None)
        if own is not None:
            own.poll()
        else:
            os.waitpid(found.si_pid, os.WNOHANG)


def limit_log() -> None:
    """Where our output is a file, keep two of LOG_BYTES: somebody else's disk is not for access logs."""
    try:
        if os.fstat(1).st_size < LOG_BYTES:
            return
        path = os.readlink("/proc/self/fd/1")
        with open(path, "rb") as now, open(path + ".1", "wb") as before:
            for data in iter(now.read, b""):  # until nothing more has come: the servers write meanwhile
                before.write(data)
                before.flush()
            os.ftruncate(1, 0)
    except OSError:
        pass


def take_lock(path: str) -> bool:
    """Hold the lock as long as we live. False: another keeper does; somebody who only looks holds it for an instant."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOOK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline:
                os.close(lock)
                return False
            time.sleep(TICK_S)


def main(folder: str) -> int:
    if not take_lock(os.path.join(folder, "lock")):
        say("another keeper holds this deployment")
        return 1
    try:
        keeper = Keeper(folder)
    except OSError as error:
        attempt = (read_json(os.path.join(folder, "wanted.json")) or {}).get("attempt")
        failed = {"attempt": attempt, "exit": 1, "why": "port", "words": str(error)}
        state = {"pid": os.getpid(), "served": has_served(folder), "failed": failed}
        write_json(os.path.join(folder, "state.json"), state)
        say(f"the port cannot be taken: {error}")
        return 1

    def stop(number: int, frame: object) -> None:
        keeper.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    keeper.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
