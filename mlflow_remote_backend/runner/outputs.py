"""The program's output folders -> files to upload. Never leaves the project's folder, never opens what may block."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .record import RecordError, RunRecord, Trouble

DEFAULT_FOLDER = "outputs"
#: Artifact folders that are the runner's own: an output folder of that name is stored under ``outputs/``.
RESERVED = frozenset({"logs", "snapshot", "environment", "remote"})
CLOCK_TICK_S = 0.02  # file times are taken from a clock that lags behind the one that programs read
PARALLEL = 4
MAX_PROBLEMS = 1000


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


def upload_all(
    record: RunRecord, found: Iterator[OutputFile | Problem], patiently: Callable[..., None]
) -> list[Problem]:
    """Upload the files, some at a time; return what is not in the run, and why.

    ``patiently(action)`` runs one upload, again and again while that may help, and raises RecordError in the end.
    """
    problems: list[Problem] = []

    def upload(each: OutputFile | Problem) -> None:
        problem = each if isinstance(each, Problem) else _upload(record, each, patiently)
        if problem is not None and len(problems) < MAX_PROBLEMS:
            problems.append(problem)

    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="outputs") as pool:
        for batch in _batches(found):
            list(pool.map(upload, batch))
    return problems


def _batches(found: Iterator[OutputFile | Problem], size: int = 256) -> Iterator[list[OutputFile | Problem]]:
    """Lists of bounded length: an output folder may hold a million files."""
    batch = []
    for each in found:
        batch.append(each)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch


def _upload(record: RunRecord, file: OutputFile, patiently: Callable[..., None]) -> Problem | None:
    name = _printable(file.name)
    try:
        file.name.encode()
        before = file.path.stat()
        patiently(lambda: record.upload_file(file.path, file.folder))
        after = file.path.stat()
    except UnicodeError:
        return Problem(name, "its name is not UTF-8, which no artifact's can be")
    except OSError as error:
        return Problem(name, f"it cannot be read: {error.strerror}")
    except RecordError as error:
        if error.trouble is Trouble.TOO_LARGE:
            return Problem(name, f"the server takes no file of {before.st_size} bytes: {error.words}")
        return Problem(name, error.words, temporary=error.transient)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        return Problem(name, "it changed while it was uploaded")
    return None


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
