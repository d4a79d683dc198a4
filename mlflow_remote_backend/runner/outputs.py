"""The program's output folders -> files to upload. Never leaves the project's folder, never opens what may block."""

from __future__ import annotations

import itertools
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .record import Backoff, RecordError, RunRecord, Trouble

DEFAULT_FOLDER = "outputs"
#: Artifact folders that are the runner's own: an output folder of that name is stored under ``outputs/``.
RESERVED = frozenset({"logs", "snapshot", "environment", "remote"})
CLOCK_TICK_S = 0.02  # file times are taken from a clock that lags behind the one that programs read
PARALLEL = 4
MAX_PROBLEMS = 1000
OWN_FAULT_TRIES = 10  # with the pauses between them about three minutes


@dataclass(frozen=True)
class OutputFile:
    """A file to upload; ``folder``: the artifact folder that receives it, under the file's own name."""

    path: Path
    folder: str

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.path.name}" if self.folder else self.path.name


@dataclass(frozen=True)
class Problem:
    """A file that is not in the run. ``temporary``: it may still be, once the server is back."""

    name: str
    why: str
    temporary: bool = False


def artifact_folder(output: str) -> str:
    """Where a configured output folder lies among the run's artifacts: under its own name, where that is free."""
    parts = PurePosixPath(output).parts
    if not parts or parts == (".",):
        return DEFAULT_FOLDER
    return "/".join((DEFAULT_FOLDER, *parts) if parts[0] in RESERVED else parts)


def find(work_dir: Path, outputs: Sequence[str], since: float = 0.0) -> Iterator[OutputFile | Problem]:
    """Regular files below the output folders, in a fixed order; and what lies there that is not uploaded, and why.

    ``since``: seconds since 1970; a file that was not touched after it came with the project: no output of this run.
    """
    root = Path(os.path.realpath(work_dir))
    for each in _find(root, outputs):
        if isinstance(each, Problem) or _changed(each.path) >= since - CLOCK_TICK_S:
            yield each


def _changed(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except OSError:
        return float("inf")  # vanished: whoever uploads it says so


def _find(root: Path, outputs: Sequence[str]) -> Iterator[OutputFile | Problem]:
    for output in outputs:
        top = root / output
        if not os.path.lexists(top):
            continue  # a program need not write any
        if not _within(top, root):
            yield Problem(output, "it is a link that leads out of the project's folder")
        elif top.is_dir():
            yield from _walk(top, artifact_folder(output))
        else:
            yield from _look(top, artifact_folder(output).rpartition("/")[0], Path(os.path.realpath(top.parent)))


def _walk(top: Path, folder: str) -> Iterator[OutputFile | Problem]:
    root = Path(os.path.realpath(top))
    unreadable: list[OSError] = []
    for current, folders, files in os.walk(root, onerror=unreadable.append, followlinks=False):
        folders.sort()
        relative = Path(current).relative_to(root).as_posix()
        inside = folder if relative == "." else f"{folder}/{relative}"
        for name in sorted([*files, *(each for each in folders if os.path.islink(os.path.join(current, each)))]):
            yield from _look(Path(current, name), inside, root)
    for error in unreadable:
        yield Problem(_printable(str(error.filename)), error.strerror or str(error))


def _look(path: Path, folder: str, root: Path) -> Iterator[OutputFile | Problem]:
    file = OutputFile(path, folder)
    try:
        status = path.stat()
    except OSError as error:
        yield Problem(_printable(file.name), f"it cannot be read: {error.strerror}")
        return
    if path.is_symlink() and not _within(path, root):
        yield Problem(_printable(file.name), "it is a link that leads out of its folder")
    elif stat.S_ISREG(status.st_mode):
        yield file
    elif path.is_symlink():
        yield Problem(_printable(file.name), "it is a link to a folder")
    elif not stat.S_ISDIR(status.st_mode):
        yield Problem(_printable(file.name), "it is no regular file")


def _within(path: Path, root: Path) -> bool:
    real = os.path.realpath(path)
    return real == str(root) or real.startswith(os.path.join(root, ""))


class Uploads:
    """Uploads output files, some at a time, each with patience up to ``until`` (of the monotonic clock).

    ``probe`` stores something small that is stored already: a file that fails right after that worked, and has failed
    OWN_FAULT_TRIES times, is itself the trouble, and nobody waits for it any longer.
    """

    def __init__(
        self,
        record: RunRecord,
        until: float,
        probe: Callable[[], None],
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.renamed: list[tuple[str, str]] = []  # a file's name, and what it is stored as
        self._record = record
        self._until = until
        self._probe = probe
        self._sleep = sleep

    def run(self, found: Iterator[OutputFile | Problem]) -> list[Problem]:
        """Upload all; return what is not in the run, at most MAX_PROBLEMS of it."""
        problems: list[Problem] = []
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="outputs") as pool:
            for batch in _batches(found):
                problems += [each for each in pool.map(self._take, batch) if each is not None]
                del problems[MAX_PROBLEMS:]
        return problems

    def _take(self, each: OutputFile | Problem) -> Problem | None:
        if isinstance(each, Problem):
            return each
        try:
            before = each.path.stat()
            problem = self._upload(each)
            after = each.path.stat()
        except OSError as error:
            return Problem(_printable(each.name), f"it cannot be read: {error.strerror}")
        if problem is None and (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            return Problem(_printable(each.name), "it changed while it was uploaded; what is stored may be torn")
        return problem

    def _upload(self, file: OutputFile) -> Problem | None:
        name, folder, base = _printable(file.name), storable(file.folder), storable(file.path.name)
        backoff, others_work = Backoff(), False
        for tries in itertools.count(1):
            try:
                self._record.upload_file(file.path, folder, base)
                break
            except RecordError as error:
                left = self._until - time.monotonic()
                if not error.transient:
                    return Problem(name, self._refusal(file, error))
                if others_work:
                    return Problem(name, f"it failed {tries} times, and now while others do not: {error.words}")
                if left <= 0:
                    return Problem(name, error.words, temporary=True)
                others_work = tries >= OWN_FAULT_TRIES and self._others_work()
                if not others_work:
                    self._sleep(min(backoff.pause_s(), left))
        if (folder, base) != (file.folder, file.path.name):
            self.renamed.append((name, f"{folder}/{base}" if folder else base))
        return None

    @staticmethod
    def _refusal(file: OutputFile, error: RecordError) -> str:
        if error.trouble is Trouble.TOO_LARGE:
            return f"the server takes no file of {file.path.stat().st_size} bytes: {error.words}"
        return error.words

    def _others_work(self) -> bool:
        try:
            self._probe()
        except (RecordError, OSError):
            return False
        return True


#: What MLflow's HTTP artifact store would cut off, drop or decode (its client does not quote names), and bytes that
#: are no UTF-8.
_NOT_STORABLE = re.compile(r"[#?\x00-\x1f\x7f\ud800-\udfff]|%(?=[0-9A-Fa-f]{2})")


def storable(name: str) -> str:
    """The name with each character that an artifact's cannot have as ``~`` and its hexadecimal code."""
    return _NOT_STORABLE.sub(lambda found: f"~{ord(found.group()) & 0xFF:02X}", name)


def _batches(found: Iterator[OutputFile | Problem], size: int = 256) -> Iterator[list[OutputFile | Problem]]:
    """Lists of bounded length: an output folder may hold a million files."""
    batch = []
    for each in found:
        batch.append(each)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
