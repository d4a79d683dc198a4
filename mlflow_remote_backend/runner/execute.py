"""Run one command; keep every byte it writes, every signal it got and how it ended. See ``spool.py`` for the files.

    python -I -S execute.py [--tee] [--env-stdin] SPOOL

One file, standard library only, Python 3.7 or newer: it runs in the user's image, whose environment needs nothing of
ours. It imports little, because its start is part of every job's.

- The command (``SPOOL/command.json``) runs in a session of its own, stdin ``/dev/null``, stdout and stderr one pipe,
  so that their order is exact. The bytes go to ``SPOOL/log/``, unchanged.
- ``--tee`` copies the log to our own stdout as well, as fast as that takes it; the log never waits for it.
- ``--env-stdin`` reads secret environment variables, a JSON object, from our stdin before the command starts.
- SIGTERM, a file ``SPOOL/cancel`` or the timeout sends SIGTERM to the process group; after the grace period follows
  SIGKILL. SIGINT, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on.
- When the command has ended, what it left behind may write for 5 s more (or for the rest of a grace period), then it
  is killed, also where it made itself a session of its own.
- A full disk stops the reading, so the program waits in its write; nothing is lost. ``vitals.json`` says so.
- SIGKILL to this process loses nothing that the program had handed over; the last second's vitals are there.

The exit code is the command's, 128 + n after signal n, 126 and 127 as a shell gives them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import sys
import time
from contextlib import suppress

TYPE_CHECKING = False  # importing typing costs more than all else here
if TYPE_CHECKING:
    from typing import Any

SEGMENT_BYTES = 8 * 1024 * 1024  # every segment but the last has exactly this size (spool.py says the same)
READ_BYTES = 1024 * 1024  # one read; also what the pipe is enlarged to
TAIL_BYTES = 64 * 1024  # kept from the end of a log that is cut by a limit

TICK_S = 0.25  # how late a cancel file or a deadline may be noticed
VITALS_S = 1.0
VITALS_NEAR_LIMIT_S = 0.1  # memory can grow by gigabytes a second: look more often where it matters
GATHER_S = 0.005  # pause after a small read: a program that writes line by line then pays for no switch per line
DRAIN_S = 5.0  # for those who still hold the pipe when the command has ended
TEE_PATIENCE_S = 5.0  # for a stdout that takes nothing any more, at the end
RETRY_FULL_DISK_S = 0.25

FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")

PR_SET_CHILD_SUBREAPER = 36
TOKEN_VARIABLE = "MLFLOW_REMOTE_EXECUTION"  # in the program's environment: by it what we leave behind is known as ours
SUPERVISOR_NAMES = (b"mlflow-remote\n", b"mlflow_remote_backend.runner.supervise")


# ---------------------------------------------------------------------------------------------------- small files


def read_bytes(path: str) -> bytes:
    """The file's content, empty where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def read_text(path: str) -> str:
    return read_bytes(path).decode("utf-8", "replace")


def write_json(folder: str, name: str, value: object, durable: bool = False) -> bool:
    """Replace ``folder/name`` atomically. False where the disk does not allow it."""
    temporary = os.path.join(folder, "." + name + ".tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            data = json.dumps(value).encode("ascii")
            while data:
                data = data[os.write(descriptor, data) :]
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, os.path.join(folder, name))
    except OSError:
        return False
    return True


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------------------------------------- the log


class Log:
    """The program's bytes in segments. ``write`` raises OSError where the disk takes no more; call it again later."""

    def __init__(self, folder: str, limit: int | None) -> None:
        self.folder = folder
        self.size = 0
        self.limit = limit
        self.cut = 0  # bytes left out because of the limit
        self._tail = bytearray()
        self._segment = -1
        self._descriptor = -1
        os.makedirs(folder, exist_ok=True)
        self._open(0)

    def _path(self, segment: int) -> str:
        return os.path.join(self.folder, f"{segment:06d}")

    def _open(self, segment: int) -> None:
        path = self._path(segment)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        if self._segment >= 0:
            os.close(self._descriptor)
        self._descriptor, self._segment = descriptor, segment

    def write(self, data: memoryview) -> int:
        """Write some of ``data``; return how much was taken, stored or (beyond the limit) put aside."""
        if self.limit is not None:
            if self.size >= self.limit:
                return self._put_aside(data)
            data = data[: self.limit - self.size]
        if self.size // SEGMENT_BYTES != self._segment:
            self._open(self.size // SEGMENT_BYTES)
        room = (self._segment + 1) * SEGMENT_BYTES - self.size
        written = os.write(self._descriptor, data[:room])
        self.size += written
        return written

    def _put_aside(self, data: memoryview) -> int:
        self._tail += data[-TAIL_BYTES:]
        self.cut += len(data)
        del self._tail[:-TAIL_BYTES]
        return len(data)

    def ending(self) -> bytes:
        """What a cut log still gets: a line that says so, and its last bytes."""
        self.limit = None
        lost = self.cut - len(self._tail)
        if lost <= 0:
            return bytes(self._tail)
        return b"\n[... %d bytes left out here: log_limit ...]\n" % lost + bytes(self._tail)

    def read(self, offset: int, size: int) -> bytes:
        """Stored bytes from ``offset``, at most up to the end of their segment; empty where they are gone."""
        try:
            descriptor = os.open(self._path(offset // SEGMENT_BYTES), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            return os.pread(descriptor, size, offset % SEGMENT_BYTES)
        finally:
            os.close(descriptor)


class Tee:
    """Copies the log to a descriptor as fast as that takes it. ``skipped``: bytes whose segment was gone before."""

    def __init__(self, log: Log, descriptor: int) -> None:
        self.log = log
        self.position = 0
        self.skipped = 0
        self.broken = False
        self.descriptor = self._own(descriptor)

    @staticmethod
    def _own(descriptor: int) -> int:
        """A non-blocking description of our own, so that whoever shares this stdout keeps a blocking one."""
        try:
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND | os.O_CLOEXEC)
        except OSError:
            os.set_blocking(descriptor, False)
            return descriptor

    def behind(self) -> bool:
        return not self.broken and self.position < self.log.size

    def offer(self, data: memoryview, offset: int) -> None:
        """Bytes that the log has just taken: the fast way, without reading them again."""
        if not self.broken and self.position == offset:
            self._write(data)

    def catch_up(self) -> None:
        data = self.log.read(self.position, 64 * 1024)
        if data:
            self._write(data)
        else:
            next_segment = min((self.position // SEGMENT_BYTES + 1) * SEGMENT_BYTES, self.log.size)
            self.skipped += next_segment - self.position
            self.position = next_segment

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self.position += os.write(self.descriptor, data)
        except BlockingIOError:
            pass
        except OSError:
            self.broken = True

    def finish(self) -> None:
        """Bring the rest out, for as long as the other side takes something at least every few seconds."""
        while self.behind():
            poller = select.poll()
            poller.register(self.descriptor, select.POLLOUT)
            if not poller.poll(TEE_PATIENCE_S * 1000):
                return
            self.catch_up()


# ------------------------------------------------------------------------------------------------------------ memory


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdigit() else None


def _field(text: str, name: str) -> int | None:
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return _number(value)
    return None


class Memory:
    """This process's memory cgroup, version 1 or 2. Every figure is None where the system does not tell.

    ``use`` leaves out file cache that the kernel would give back: only what cannot be given back ends in a kill.
    """

    def __init__(self, limit_hint: int | None) -> None:
        self.folder, self.version = self._find()
        self.limit = self._limit()
        if self.limit is None:
            self.limit = limit_hint
        self.peak = 0
        self._kills_before = self._kills() or 0

    @staticmethod
    def _find() -> tuple[str, int]:
        for line in read_text("/proc/self/cgroup").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if "memory" in controllers.split(","):
                found = Memory._first("memory.usage_in_bytes", "/sys/fs/cgroup/memory" + path, "/sys/fs/cgroup/memory")
                if found:
                    return found, 1
            elif not controllers:
                found = Memory._first("memory.current", "/sys/fs/cgroup" + path, "/sys/fs/cgroup")
                if found:
                    return found, 2
        return "", 0

    @staticmethod
    def _first(name: str, *folders: str) -> str:
        for folder in folders:
            if os.path.exists(os.path.join(folder, name)):
                return folder
        return ""

    def _read(self, name: str) -> str:
        return read_text(os.path.join(self.folder, name)) if self.folder else ""

    def _limit(self) -> int | None:
        if self.version == 1:
            limit = _field(self._read("memory.stat"), "hierarchical_memory_limit")
            return limit if limit is not None and limit < 1 << 60 else None
        limits, folder = [], self.folder
        while self.version == 2 and folder.startswith("/sys/fs/cgroup"):
            limits.append(_number(read_text(os.path.join(folder, "memory.max"))))
            folder = os.path.dirname(folder)
        return min((each for each in limits if each is not None), default=None)

    def use(self) -> int | None:
        stat = self._read("memory.stat")
        if self.version == 2:
            used = _number(self._read("memory.current"))
            cache = (_field(stat, "inactive_file") or 0) + (_field(stat, "active_file") or 0)
        else:
            used = _number(self._read("memory.usage_in_bytes"))
            cache = (_field(stat, "total_inactive_file") or 0) + (_field(stat, "total_active_file") or 0)
        if used is None:
            return None
        used = max(0, used - cache)
        self.peak = max(self.peak, used)
        return used

    def _kills(self) -> int | None:
        return _field(self._read("memory.events" if self.version == 2 else "memory.oom_control"), "oom_kill")

    def kills(self) -> int | None:
        """Processes of this cgroup that were killed for want of memory since the start."""
        kills = self._kills()
        return None if kills is None else max(0, kills - self._kills_before)


# ------------------------------------------------------------------------------------------------------ the program


class CannotStart(Exception):
    """The command could not be started. ``exit_code``: 126 or 127, as a shell would give."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def environment(command: dict[str, Any], secrets: dict[str, str]) -> dict[bytes, bytes]:
    """The program's environment: ours, without ``env_remove``, with ``env`` and the secrets over it."""
    inherited = {} if command.get("inherit_env") is False else dict(os.environb)
    for name in command.get("env_remove") or ():
        inherited.pop(to_bytes(name), None)
    for overlay in (command.get("env") or {}, secrets):
        for name, value in overlay.items():
            inherited[to_bytes(name)] = to_bytes(value)
    return inherited


def start(command: dict[str, Any], env: dict[bytes, bytes], output: int) -> int:
    """Start the command in a session of its own and return its pid. Raises CannotStart."""
    told_read, told_write = os.pipe()  # both are closed by exec: end of file means that the command runs
    pid = os.fork()
    if pid == 0:
        _become(command, env, output, told_write)
    os.close(told_write)
    told = b""
    while True:
        data = os.read(told_read, 4096)
        if not data:
            break
        told += data
    os.close(told_read)
    if told:
        os.waitpid(pid, 0)
        stage, _, code = told.decode().partition(":")
        raise _cannot_start(command, stage, int(code))
    return pid


def _become(command: dict[str, Any], env: dict[bytes, bytes], output: int, told: int) -> None:
    stage = "exec"
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for name in (*FORWARDED, "SIGCHLD", "SIGPIPE", "SIGXFSZ"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        if command.get("cwd"):
            stage = "cwd"
            os.chdir(to_bytes(command["cwd"]))
            stage = "exec"
        argv = [to_bytes(word) for word in command["argv"]]
        try:
            os.execvpe(argv[0], argv, env)
        except FileNotFoundError:
            fallback = [to_bytes(word) for word in command.get("fallback_argv") or ()]
            if not fallback:
                raise
            os.execvpe(fallback[0], fallback, env)
    except OSError as error:
        os.write(told, f"{stage}:{error.errno or 0}".encode())
    except (ValueError, TypeError, KeyError):  # a NUL byte, or no command at all
        os.write(told, f"{stage}:0".encode())
    finally:
        os._exit(127)


def _cannot_start(command: dict[str, Any], stage: str, code: int) -> CannotStart:
    words = os.strerror(code) if code else "not a valid command"
    if stage == "cwd":
        return CannotStart(f"The working folder {command['cwd']} cannot be entered: {words}.", 126)
    exit_code = 127 if code == errno.ENOENT else 126
    return CannotStart(f"The program {command['argv'][0]} cannot be started: {words}.", exit_code)


def become_subreaper() -> None:
    """Let processes that the program puts into the background come back to us, so that they can be ended with it."""
    if os.getpid() == 1 or not sys.platform.startswith("linux"):
        return
    with suppress(ImportError, OSError, AttributeError):  # an image may lack ctypes: then such processes are not found
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> list[int]:
    """Pids of our children, by /proc; empty where there is none."""
    me = str(os.getpid())
    found = []
    names = os.listdir("/proc") if os.path.isdir("/proc") else []
    for name in filter(str.isdigit, names):
        fields = read_text(f"/proc/{name}/stat").rpartition(")")[2].split()
        if len(fields) > 1 and fields[1] == me:
            found.append(int(name))
    return found


def is_supervisor(pid: int) -> bool:
    """Whether it supervises a job of its own, submitted by the program: that one outlives its submitter."""
    said = read_bytes(f"/proc/{pid}/comm") + read_bytes(f"/proc/{pid}/cmdline")
    return any(name in said for name in SUPERVISOR_NAMES)


def is_execute(pid: int) -> bool:
    """Whether it runs the program of such a job."""
    return b"/runner/execute.py\0" in read_bytes(f"/proc/{pid}/cmdline")


# -------------------------------------------------------------------------------------------------------- execution


class Execution:
    """One command from its start to its exit record. All waiting is in ``_wait``; nothing else blocks."""

    def __init__(self, folder: str, command: dict[str, Any], secrets: dict[str, str], tee: bool) -> None:
        self.folder = folder
        self.command = command
        self.secrets = secrets
        self.log = Log(os.path.join(folder, "log"), command.get("log_limit_bytes"))
        self.tee = Tee(self.log, 1) if tee else None
        self.memory = Memory(command.get("memory_limit_hint"))
        self.grace_s = float(command.get("grace_period_s") or 0)
        self.pid = 0
        self.status: int | None = None  # wait status of the command, once it has ended
        self.stopped_by: str | None = None  # cancel, timeout or signal
        self.killed = False  # we sent SIGKILL, because the grace period was over
        self.signals: list[dict[str, float]] = []
        self.error: dict[str, str] | None = None
        self.started_at = time.time()
        self.started = time.monotonic()
        self.ended, self.ended_at = self.started, self.started_at
        self.deadline = None if command.get("timeout_s") is None else self.started + float(command["timeout_s"])
        self.grace_ends: float | None = None
        self.output = -1  # the pipe's reading end, -1 once it is at its end
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._pending = self._buffer[:0]  # read, but not yet taken by the disk
        self._blocked: str | None = None  # why the disk does not take it: the program then waits in its write
        self._resume_reading = 0.0
        self._next_tick = 0.0
        self._next_vitals = 0.0
        self._wake = self._catch_signals()

    @staticmethod
    def _catch_signals() -> int:
        """Each signal becomes a byte in a pipe, so that waiting for output and for signals is one wait."""
        wake, write = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for name in (*FORWARDED, "SIGCHLD"):
            signal.signal(getattr(signal, name), lambda *_: None)
        return wake

    # -- the whole

    def run(self) -> int:
        """Run the command to its end; write the exit record; return the exit code."""
        if os.path.exists(os.path.join(self.folder, "cancel")):
            self.stopped_by = "cancel"
            self.error = {"code": "CANCELLED", "message": "The run was cancelled before its program started."}
            return self._record(128 + signal.SIGTERM)
        try:
            self._start()
        except CannotStart as error:
            self.error = {"code": "BOOTSTRAP", "message": str(error)}
            return self._record(error.exit_code)
        while self.status is None:
            self._turn()
        self._drain()
        self._end_all()
        self._close_log()
        return self._record(exit_code(self.status))

    def _start(self) -> None:
        read, write = os.pipe()
        os.set_blocking(read, False)
        with suppress(OSError):  # the system's limit for pipes may be lower; only speed depends on it
            fcntl.fcntl(write, getattr(fcntl, "F_SETPIPE_SZ", 1031), READ_BYTES)
        become_subreaper()
        token = os.urandom(16).hex()
        try:
            self.pid = start(self.command, environment(self.command, {**self.secrets, TOKEN_VARIABLE: token}), write)
        finally:
            os.close(write)
        self.output = read
        started = {"pid": self.pid, "token": token, "execute_pid": os.getpid(), "started_at": self.started_at}
        write_json(self.folder, "started.json", started)

    def _drain(self) -> None:
        """After the command: its last bytes, and those of processes that it left behind, within their time."""
        self.ended, self.ended_at = time.monotonic(), time.time()
        until, self.deadline = self.ended + DRAIN_S, None
        if self.grace_ends is not None:
            until = max(until, self.grace_ends)
        while time.monotonic() < until and (self.output >= 0 or (self.stopped_by and self._group_lives())):
            self._turn()

    def _end_all(self) -> None:
        """Kill what is left of the process group and whatever else came back to us; take what the pipe still holds."""
        self._kill_group(signal.SIGKILL)
        for _ in range(200):
            left = [pid for pid in children() if not is_supervisor(pid)]
            if not left:
                break
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self._turn(0.01)
        until = time.monotonic() + 1.0
        while self._pending or (self.output >= 0 and time.monotonic() < until):
            self._turn(0.01)
            if self._blocked:
                until = time.monotonic() + 1.0

    def _close_log(self) -> None:
        rest = memoryview(self.log.ending())
        while rest:
            self._pending = rest[: len(self._buffer)]
            rest = rest[len(self._pending) :]
            while self._pending:
                self._turn(RETRY_FULL_DISK_S if self._blocked else 0)

    # -- one turn of the loop

    def _turn(self, longest_s: float = TICK_S) -> None:
        self._wait(longest_s)
        self._handle_signals()
        self._reap()
        self._store()
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + TICK_S
            self._check_cancel()
        if now >= self._next_vitals:
            self._next_vitals = now + self._write_vitals()
        if self.deadline is not None and now >= self.deadline:
            self._stop("timeout")
        if self.grace_ends is not None and now >= self.grace_ends:
            self.killed = self._kill_group(signal.SIGKILL)
            self.grace_ends = None

    def _wait(self, longest_s: float) -> None:
        """Sleep until there is output, a signal, room on our stdout, or something is due."""
        now = time.monotonic()
        due = [now + longest_s, self._next_tick, self._next_vitals]
        due += [each for each in (self.deadline, self.grace_ends) if each is not None]
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        if self._pending:
            due.append(now + (RETRY_FULL_DISK_S if self._blocked else 0))
        elif self.output >= 0:
            if now >= self._resume_reading:
                poller.register(self.output, select.POLLIN)
            else:
                due.append(self._resume_reading)
        if self.tee is not None and self.tee.behind():
            poller.register(self.tee.descriptor, select.POLLOUT)
        ready = dict(poller.poll(max(0.0, min(due) - now) * 1000))
        if self.tee is not None and self.tee.descriptor in ready:
            self.tee.catch_up()

    def _store(self) -> None:
        """Move what the pipe holds to the log, without waiting for either."""
        if not self._pending and not (self.output >= 0 and time.monotonic() >= self._resume_reading and self._read()):
            return
        while self._pending:
            offset = self.log.size
            try:
                taken = self.log.write(self._pending)
            except OSError as error:
                self._blocked = error.strerror
                return
            self._blocked = None
            if self.tee is not None and self.log.size > offset:
                self.tee.offer(self._pending[:taken], offset)
            self._pending = self._pending[taken:]

    def _read(self) -> bool:
        try:
            size = os.readv(self.output, [self._buffer])
        except BlockingIOError:
            return False
        if size == 0:
            os.close(self.output)
            self.output = -1
            return False
        self._pending = self._buffer[:size]
        self._resume_reading = time.monotonic() + GATHER_S if size < READ_BYTES // 8 else 0.0
        return True

    def _handle_signals(self) -> None:
        try:
            received = os.read(self._wake, 256)
        except BlockingIOError:
            return
        for number in received:
            if number == signal.SIGCHLD:
                continue
            self.signals.append({"signal": number, "at": time.time()})
            self._next_vitals = 0.0
            if number == signal.SIGTERM:
                self._stop("signal")
            else:
                self._kill_group(number)

    def _reap(self) -> None:
        """Collect every child that has ended: as PID 1, and as subreaper, there are more than the command."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                self.status = status
                self._resume_reading = 0.0

    def _check_cancel(self) -> None:
        if self.stopped_by is None and self.status is None and os.path.exists(os.path.join(self.folder, "cancel")):
            self._stop("cancel")

    # -- ending

    def _stop(self, why: str) -> None:
        """SIGTERM to the group, once; the grace period starts."""
        if self.stopped_by is None and self.status is None:
            self.stopped_by = why
            self.deadline = None
            self.grace_ends = time.monotonic() + self.grace_s
            self._kill_group(signal.SIGTERM)

    def _kill_group(self, number: int) -> bool:
        if not self.pid:
            return False  # 0 would mean our own group
        try:
            os.killpg(self.pid, number)
        except OSError:
            return False
        return True

    def _group_lives(self) -> bool:
        return self._kill_group(0)

    # -- records

    def _write_vitals(self) -> float:
        """Write the vitals; return in how many seconds they are due again."""
        use, limit = self.memory.use(), self.memory.limit
        vitals = {
            "at": time.time(),
            "memory_bytes": use,
            "memory_peak_bytes": self.memory.peak,
            "memory_limit_bytes": limit,
            "oom_kills": self.memory.kills(),
            "signals": self.signals,
            "stopped_by": self.stopped_by,
            "log_bytes": self.log.size,
            "log_cut_bytes": self.log.cut,
            "log_blocked": self._blocked,
        }
        write_json(self.folder, "vitals.json", vitals)
        near = use is not None and limit is not None and use > limit * 0.6
        return VITALS_NEAR_LIMIT_S if near else VITALS_S

    def _record(self, code: int) -> int:
        """Write the exit record, whatever it takes: without it the run has no verdict. Then let stdout catch up."""
        self.memory.use()
        status = self.status or 0
        record = {
            "exit_code": code,
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            "stopped_by": self.stopped_by,
            "timed_out": self.stopped_by == "timeout",
            "killed": self.killed,
            "signals": self.signals,
            "memory_peak_bytes": self.memory.peak,
            "memory_limit_bytes": self.memory.limit,
            "oom_kills": self.memory.kills(),
            "log_bytes": self.log.size,
            "log_cut_bytes": self.log.cut,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "seconds": max(0.0, self.ended - self.started),
            "error": self.error,
        }
        while not write_json(self.folder, "exit.json", record, durable=True) and not is_gone(self.folder):
            time.sleep(RETRY_FULL_DISK_S)
        if self.tee is not None:
            self.tee.finish()
        return code


def is_gone(folder: str) -> bool:
    """Whether somebody removed it: then nobody wants to know how the program ended."""
    try:
        os.stat(folder)
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def exit_code(status: int) -> int:
    """A shell's exit code for a wait status."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def hold_lock(folder: str) -> int:
    """Hold ``folder/lock`` as long as this process lives: its release tells of our death, however that came.

    It has that name only once it is held: whoever looks in between would take us for dead.
    """
    beside = os.path.join(folder, ".lock")
    descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with suppress(OSError):  # a file system without locks: others must learn it in another way
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(beside, os.path.join(folder, "lock"))
    return descriptor


def main(arguments: list[str]) -> int:
    options = [each for each in arguments if each.startswith("--")]
    (folder,) = [each for each in arguments if not each.startswith("--")]
    lock = hold_lock(folder)
    secrets = json.loads(sys.stdin.buffer.read() or b"{}") if "--env-stdin" in options else {}
    with open(os.path.join(folder, "command.json"), "rb") as file:
        command = json.loads(file.read())
    code = Execution(folder, command, secrets, tee="--tee" in options or bool(command.get("tee"))).run()
    os.close(lock)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
