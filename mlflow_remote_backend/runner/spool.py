"""The spool: the folder through which prepare, execute and observe speak to each other. One per attempt of a job.

    log/000000, log/000001, …  the program's output, byte for byte, in segments of 8 MiB; only the last may be shorter,
                               and only where ``execute.sh`` wrote it (one segment for all) longer
    command.json               prepare -> execute: :class:`Command`
    command.sh                 the same for ``execute.sh``
    prepare.json               prepare -> observe: :class:`Prepared`; written when prepare has ended, well or not
    lock                       held (flock) by ``execute.py`` as long as it lives: its death is seen however it came;
                               ``.lock`` until it is held, so that nobody takes a starting one for dead
    started.json               execute: :class:`Started`
    vitals.json                execute, each second: :class:`Vitals`
    exit.json                  execute, last: :class:`ExitRecord`
    cancel                     empty; whoever wants the program stopped makes it, execute acts within a quarter second
    uploaded.json              observe: which log parts are stored (``parts.py``)
    final.json                 observe: the verdict, and what is still pending (``observe.py``)

Every file but the log's segments is replaced atomically (written beside, then renamed): a reader sees an old or a new
one, never half of one. Readers take a missing or damaged file as absent and ignore fields that they do not know, since
execute may be of another release. The spool of a running job lives on one machine, which is what ``lock`` rests on.

Standard library only. ``execute.py`` imports nothing, so it repeats ``SEGMENT_BYTES``; a test compares them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .. import file_lock

SEGMENT_BYTES = 8 * 1024 * 1024

T = TypeVar("T")


# ----------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Command:
    """What execute shall run. ``argv`` is tried first, ``fallback_argv`` where its program does not exist (an image
    without bash). The environment is execute's own, without ``env_remove`` and with ``env`` over it; with
    ``inherit_env`` false it is ``env`` alone. ``log_limit_bytes``: beyond it only the last 64 KiB are kept.
    ``memory_limit_hint``: bytes, used where no memory cgroup tells a limit. ``tee``: log to execute's stdout as well.
    """

    argv: tuple[str, ...]
    cwd: str = ""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    env_remove: tuple[str, ...] = ()
    inherit_env: bool = True
    fallback_argv: tuple[str, ...] = ()
    grace_period_s: float = 30.0
    timeout_s: float | None = None
    log_limit_bytes: int | None = None
    memory_limit_hint: int | None = None
    tee: bool = False


@dataclass(frozen=True)
class Started:
    """The running command. ``pid`` is its process group and session too. ``token``: unique, the value of
    MLFLOW_REMOTE_EXECUTION in its environment. ``started_at``: wall clock, seconds since 1970."""

    pid: int = 0
    token: str = ""
    execute_pid: int = 0
    started_at: float = 0.0


@dataclass(frozen=True)
class Vitals:
    """The last look at the running command. ``oom_kills``: processes of its cgroup killed for want of memory since its
    start. ``memory_bytes`` is without file cache. ``signals``: each ``{"signal": n, "at": wall clock}`` that execute
    got. ``log_blocked``: why the disk does not take the log right now."""

    at: float = 0.0
    memory_bytes: int | None = None
    memory_peak_bytes: int | None = None
    memory_limit_bytes: int | None = None
    oom_kills: int | None = None
    signals: tuple[Mapping[str, Any], ...] = ()
    stopped_by: str | None = None
    log_bytes: int = 0
    log_cut_bytes: int = 0
    log_blocked: str | None = None


@dataclass(frozen=True)
class ExitRecord:
    """How the command ended. ``exit_code``: as a shell gives it, 128 + n after ``signal`` n. ``stopped_by``:
    ``cancel``, ``timeout`` or ``signal`` (SIGTERM from outside) where execute had sent SIGTERM before the command
    ended; ``killed``: and then SIGKILL. ``seconds``: from start to end. ``error``: ``{"code", "message"}`` where it
    could not be started.
    """

    exit_code: int
    signal: int | None = None
    stopped_by: str | None = None
    timed_out: bool = False
    killed: bool = False
    signals: tuple[Mapping[str, Any], ...] = ()
    memory_peak_bytes: int | None = None
    memory_limit_bytes: int | None = None
    oom_kills: int | None = None
    log_bytes: int | None = None
    log_cut_bytes: int = 0
    started_at: float = 0.0
    ended_at: float = 0.0
    seconds: float = 0.0
    error: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Prepared:
    """How prepare ended. ``failed``: ``{"reason", "message", "words", "hint"}`` or None. ``seconds``: by stage, for the
    metrics ``remote/seconds_<stage>``. ``image``: what the program runs in, where only preparing it told."""

    failed: Mapping[str, str] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    image: str = ""


# ------------------------------------------------------------------------------------------------------------- files


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Replace the file atomically; ``durable``: it survives a crash of the machine. Raises OSError."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")  # other threads may write it too
    with open(temporary, "w", encoding="ascii") as file:
        json.dump(value, file)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in the file; None where it is missing, damaged or something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _record(cls: type[T], raw: Mapping[str, Any] | None) -> T | None:
    """The dataclass from its JSON object; None where it does not fit."""
    if raw is None:
        return None
    known = {each.name for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items() if key in known}
    try:
        return cls(**values)
    except TypeError:
        return None


class Spool:
    """The folder ``path``, seen from any of the three steps. Holds no open file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = SpoolReader(path)

    @classmethod
    def create(cls, path: Path, *, mode: int = 0o700) -> Spool:
        """The spool with its folders made. ``mode`` 0o2770 where execute and observe are different users of a group."""
        for folder in (path, path / "log"):
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(PermissionError):  # a volume's own root folder may belong to somebody else
                folder.chmod(mode)
        return cls(path)

    def write_command(self, command: Command) -> None:
        """The command for execute, in both forms. Secret values in it are as private as the spool is."""
        write_json(self.path / "command.json", command)
        script = self.path / ".command.sh.tmp"
        script.write_bytes(command_script(command).encode("utf-8", "surrogateescape"))
        os.replace(script, self.path / "command.sh")

    def command(self) -> Command | None:
        return _record(Command, read_json(self.path / "command.json"))

    def write_prepared(self, prepared: Prepared) -> None:
        write_json(self.path / "prepare.json", prepared)

    def prepared(self) -> Prepared | None:
        return _record(Prepared, read_json(self.path / "prepare.json"))

    def started(self) -> Started | None:
        return _record(Started, read_json(self.path / "started.json"))

    def vitals(self) -> Vitals | None:
        return _record(Vitals, read_json(self.path / "vitals.json"))

    def exit(self) -> ExitRecord | None:
        return _record(ExitRecord, read_json(self.path / "exit.json"))

    def request_cancel(self) -> None:
        """Ask execute to stop the program: SIGTERM, the grace period, SIGKILL. Idempotent."""
        (self.path / "cancel").touch()

    def cancel_requested(self) -> bool:
        return (self.path / "cancel").exists()

    def execute_lives(self) -> bool | None:
        """Whether ``execute.py`` holds its lock. None: it has not started, or runs where no lock is possible."""
        try:
            return file_lock.is_held(self.path / "lock")
        except OSError:
            return None


# --------------------------------------------------------------------------------------------------------------- log


def _no_link(path: str, flags: int) -> int:
    """The program can write here: what it links to, another container's files perhaps, is not its output."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


class SpoolReader:
    """Reads the log while it grows. Safe for any number of readers; only one of them should drop."""

    def __init__(self, path: Path) -> None:
        self._folder = path / "log"

    def _segments(self) -> list[int]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if name.isdigit())

    def _path(self, segment: int) -> Path:
        return self._folder / f"{segment:06d}"

    def size(self) -> int:
        """How many bytes the program has written so far, dropped ones included."""
        segments = self._segments()
        if not segments:
            return 0
        return segments[-1] * SEGMENT_BYTES + self._path(segments[-1]).stat().st_size

    def start(self) -> int:
        """Offset of the first byte that is still here."""
        segments = self._segments()
        return segments[0] * SEGMENT_BYTES if segments else 0

    def read(self, offset: int, max_bytes: int) -> bytes:
        """At most ``max_bytes`` from ``offset``; empty at the end of the log and where the bytes were dropped."""
        return b"".join(self.chunks(offset, offset + max_bytes))

    def chunks(self, offset: int, end: int, chunk_bytes: int = 1024 * 1024) -> Iterator[bytes]:
        """The bytes from ``offset`` to ``end``, in pieces, as far as they are here."""
        while offset < end:
            data = self._piece(offset, min(chunk_bytes, end - offset))
            if not data:
                return
            yield data
            offset += len(data)

    def _piece(self, offset: int, size: int) -> bytes:
        """Bytes of one segment. A segment that is not there may stand in a longer one before it (execute.sh)."""
        wanted = offset // SEGMENT_BYTES
        for segment in (wanted, 0) if wanted else (0,):
            try:
                with open(self._path(segment), "rb", buffering=0, opener=_no_link) as file:
                    file.seek(offset - segment * SEGMENT_BYTES)
                    return file.read(size) or b""
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
        return b""

    def drop_before(self, offset: int) -> None:
        """Delete the segments that lie wholly before ``offset``; never the last one, whose name tells the size."""
        for segment in self._segments()[:-1]:
            if (segment + 1) * SEGMENT_BYTES > offset:
                return
            self._path(segment).unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- shell twin

_SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def command_script(command: Command) -> str:
    """The command as text that ``execute.sh`` sources: settings, and a function that becomes the program."""
    settings = {
        "grace_period_s": f"{command.grace_period_s:.0f}",
        "timeout_s": "" if command.timeout_s is None else f"{command.timeout_s:.0f}",
        "log_limit_bytes": "" if command.log_limit_bytes is None else str(command.log_limit_bytes),
        "tee": "1" if command.tee else "",
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    lines.append("become_program() {")
    lines += [f"    {line}" for line in _program(command)]
    lines.append("}")
    return "\n".join(lines) + "\n"


def _program(command: Command) -> Iterator[str]:
    if command.cwd:
        yield f"cd {shlex.quote(command.cwd)} || exit 126"
    removed = [name for name in command.env_remove if _SHELL_NAME.fullmatch(name)]
    if removed:
        yield f"unset {' '.join(removed)}"
    odd = []
    for name, value in command.env.items():
        if _SHELL_NAME.fullmatch(name):
            yield f"export {name}={shlex.quote(value)}"
        else:
            odd.append(shlex.quote(f"{name}={value}"))
    before = " ".join((["env"] if odd or not command.inherit_env else []) + odd)
    if command.fallback_argv:
        exists = f"command -v {shlex.quote(command.argv[0])} >/dev/null 2>&1"
        yield f"{exists} || exec {before} {shlex.join(command.fallback_argv)}"
    yield f"exec {before} {shlex.join(command.argv)}"


def secrets_script(values: Mapping[str, str]) -> str:
    """Secret variables as text for ``execute.sh --env-stdin``; names that no shell can hold are left out."""
    return "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in values.items() if _SHELL_NAME.fullmatch(name)
    )


# ------------------------------------------------------------------------------------------------------- after death


def kill_orphans(started: Started) -> None:
    """Kill what is left of a program whose execute was killed. Does nothing where the program ran in another place.

    Processes are known by the token in their environment, also those that made themselves sessions of their own. A job
    that the program submitted has it too, but outlives it: the sessions of its supervisor and execute are spared, and
    those that these have started.
    """
    from .execute import is_execute, is_supervisor  # which Windows cannot import

    token = f"MLFLOW_REMOTE_EXECUTION={started.token}".encode()
    sessions: dict[int, int] = {}
    parents: dict[int, int] = {}
    spared: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if token in (folder / "environ").read_bytes().split(b"\0"):
                pid, status = int(folder.name), (folder / "stat").read_text().rpartition(")")[2].split()
                parents[pid], session = int(status[1]), int(status[3])
                sessions[pid] = session
                if session != started.pid and (is_supervisor(pid) or is_execute(pid)):
                    spared.add(session)
    while more := {sessions[pid] for pid in sessions if sessions.get(parents[pid]) in spared} - spared:
        spared |= more
    for pid, session in sessions.items():
        if session not in spared:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
