"""The one door to other programs: uv, conda-lock and our own rattler helpers, run to their end in a private folder.

A program gets an environment of known variables, no terminal and no standard input beyond what is passed; it and all
its children are gone when :func:`run` returns or raises, whatever the reason. Another thread makes it return by
:class:`Work`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import JobError

#: Variables of uv that may shape a lock or an installation; all others are left out, so that a developer's settings
#: (``UV_CONSTRAINT``, ``UV_NO_VERIFY_HASHES``, …) change neither.
_UV_PASSED = re.compile(
    r"UV_(HTTP_.*|KEYRING_PROVIDER|INSECURE_HOST|NATIVE_TLS|SYSTEM_CERTS|CONFIG_FILE|NO_CONFIG|OFFLINE|INDEX_STRATEGY"
    r"|PYTHON_INSTALL_MIRROR|PYTHON_DOWNLOADS_JSON_URL|PYTHON_DOWNLOADS|EXCLUDE_NEWER|CONCURRENT_.*|CREDENTIALS_DIR"
    r"|INDEX_.+_(USERNAME|PASSWORD)|GITHUB_TOKEN|AUTH_TOKEN|LINK_MODE)"
)
_DROPPED = re.compile(
    r"(UV_|CONDA_|PIP_|PYTHONHOME$|PYTHONSTARTUP$|PYTHONINSPECT$|PYTHONWARNINGS$|VIRTUAL_ENV|_CE_|MLFLOW_TRACKING_)"
)


@dataclass(frozen=True)
class Result:
    """How a program ended. Output is text with undecodable bytes replaced."""

    code: int
    stdout: str
    stderr: str


class TimedOut(Exception):
    """A program did not end in its time and was killed. ``stderr``: what it had said."""

    def __init__(self, timeout_s: float, stderr: str) -> None:
        super().__init__(f"did not end within {timeout_s:g} s")
        self.stderr = stderr


class Ended(JobError):
    """The work that a program was run for has been ended."""

    def __init__(self) -> None:
        super().__init__("The environment is not made any further: the job was stopped.", code="TERMINATED")


class Work:
    """The programs that a thread runs within :meth:`here`, for another thread to end."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        token = _work.set(self)
        try:
            yield
        finally:
            _work.reset(token)

    def end(self) -> None:
        """Kill what runs and let nothing more be started: :func:`run` raises Ended. Does not wait for the thread."""
        with self._guard:
            self._ended = True
            for process in self._running:
                if process.returncode is None:
                    _kill(process)

    @contextlib.contextmanager
    def _program(self, argv: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
        with self._guard:
            if self._ended:
                raise Ended
            process = subprocess.Popen(argv, **options)
            self._running.add(process)
        try:
            yield process
        finally:
            with self._guard:
                self._running.remove(process)
        if self._ended:
            raise Ended


_work: ContextVar[Work | None] = ContextVar("work", default=None)
_held: ContextVar[tuple[int, ...]] = ContextVar("held", default=())


@contextlib.contextmanager
def holding(*descriptors: int) -> Iterator[None]:
    """The programs that this thread runs in the block hold these files open too, and with them the locks on them, even
    if we are killed (not on Windows)."""
    token = _held.set(descriptors if os.name == "posix" else ())
    try:
        yield
    finally:
        _held.reset(token)


def run(argv: Sequence[str], *, cwd: Path, environ: Mapping[str, str], timeout_s: float, stdin: str = "") -> Result:
    """Runs a program to its end; blocks at most ``timeout_s`` seconds and a moment. Raises TimedOut, Ended or OSError.

    Any exception, KeyboardInterrupt included, kills the program's whole process group first.
    """
    program = (_work.get() or Work())._program(
        list(argv),
        cwd=cwd,
        env=dict(environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=os.name == "posix",
        pass_fds=_held.get(),
    )
    with program as process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            raise TimedOut(timeout_s, _rest(process)) from None
        except BaseException:
            _kill(process)
            process.wait()
            raise
    return Result(process.returncode, stdout, stderr)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _rest(process: subprocess.Popen[str]) -> str:
    """What a killed program had written to stderr; waits a second, for a grandchild may hold the pipe."""
    try:
        return process.communicate(timeout=1)[1] or ""
    except (subprocess.TimeoutExpired, ValueError):
        return ""


def environment(folder: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The caller's variables without those that steer a tool behind our back, and with ``folder`` as TMPDIR."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not _DROPPED.match(name) or _UV_PASSED.fullmatch(name) or name in ("PIP_CERT", "PIP_PROXY")
    }
    return {**kept, "TMPDIR": str(folder), "NO_COLOR": "1", **(extra or {})}


def own_module(name: str) -> list[str]:
    """The command that runs a module of this package with this interpreter; with :func:`module_path` it is found."""
    return [sys.executable, "-m", f"{__package__}.{name}"]


def module_path() -> str:
    """PYTHONPATH under which this very copy of the package is found, first."""
    here = str(Path(__file__).resolve().parent.parent.parent)
    rest = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([here, rest]) if rest else here


@contextlib.contextmanager
def private_folder(root: Path) -> Iterator[Path]:
    """A folder of ours alone under ``<root>/tmp``, gone afterwards. ``cache.prune`` takes what a SIGKILL leaves."""
    parent = root / "tmp"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tool-", dir=parent, ignore_cleanup_errors=True) as name:
        yield Path(name)
