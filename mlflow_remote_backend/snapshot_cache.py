"""What earlier snapshots learned, so that an unchanged project costs a walk instead of a read and a compression.

Two things lie in ``$XDG_CACHE_HOME/mlflow-remote/snapshots`` (by default below ``~/.cache``), for the user's eyes only:

- ``files/``: per project folder, the hash of each file that was read whole, was at rest and held no credential;
- ``archives/``: the last archives by digest, each verified by a hash of its own before it is used again.

A cache never fails a submission: what cannot be read or written is as if it were not there. It is bounded, and may be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import secret_scan

MAX_PROJECTS = 64
MAX_HASHES_BYTES = 64 << 20
MAX_ARCHIVE_BYTES = 512 << 20  # one that is larger is not kept
MAX_ARCHIVES_BYTES = 1 << 30

# A file that is changed twice within one tick of its file system's clock keeps its times. So a hash is kept only of a
# file whose last change was at least this long past when it was read; clocks that tick in whole seconds (FAT, HFS+,
# some network file systems) show it by times without a fraction.
_TICK_NS = 100_000_000
_COARSE_TICK_NS = 2_000_000_000
_SECOND_NS = 1_000_000_000


def default_root(environ: Mapping[str, str] = os.environ) -> Path:
    base = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "mlflow-remote" / "snapshots"


class FileHashes:
    """The hashes of one project's files, found again as long as size, times and inode stay the same."""

    def __init__(self, cache: Path, project: Path) -> None:
        """Loads what is known of ``project``: nothing, if it is not there or not readable as expected."""
        name = hashlib.sha256(os.fsencode(project)).hexdigest()[:32]
        self._path = cache / "files" / f"{name}.json"
        self._known = _load(self._path)
        self._seen: dict[str, list[Any]] = {}

    def find(self, path: str, status: os.stat_result) -> str | None:
        """The SHA-256 of the file's content, if it was kept and the file has not changed since."""
        record = self._known.get(path)
        if record is None or record[:-1] != _identity(status):
            return None
        self._seen[path] = record
        return str(record[-1])

    def keep(self, path: str, status: os.stat_result, sha256: str, read_at_ns: int) -> None:
        """Remember a file that was read from ``read_at_ns`` on, unless it may since have changed unnoticed."""
        coarse = status.st_mtime_ns % _SECOND_NS == 0 and status.st_ctime_ns % _SECOND_NS == 0
        tick_ns = _COARSE_TICK_NS if coarse else _TICK_NS
        if max(status.st_mtime_ns, status.st_ctime_ns) <= read_at_ns - tick_ns:
            self._seen[path] = [*_identity(status), sha256]

    def save(self) -> None:
        """Write what this scan saw, if it is not what was known. Files that are gone are forgotten."""
        if self._seen == self._known:
            return
        with contextlib.suppress(OSError):
            text = json.dumps({"scan": secret_scan.VERSION, "files": self._seen}, separators=(",", ":"))
            with _replacing(self._path) as target:
                target.write_text(text)
            _keep_newest(self._path.parent, MAX_PROJECTS, MAX_PROJECTS * MAX_HASHES_BYTES)


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        if path.stat().st_size > MAX_HASHES_BYTES:
            return {}
        content = json.loads(path.read_bytes())
        if content["scan"] == secret_scan.VERSION:
            return {key: record for key, record in content["files"].items() if _is_record(record)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return {}


def _is_record(record: Any) -> bool:
    return isinstance(record, list) and len(record) == 5 and isinstance(record[4], str) and len(record[4]) == 64


def fetch_archive(cache: Path, digest: str, target: Path) -> bool:
    """Put the archive of the snapshot ``digest`` at ``target``, which must not exist. Whether it was there, intact."""
    kept = _archive(cache, digest)
    try:
        with kept.open("rb") as source, _created(target) as copy:
            expected = _checksum_file(kept).read_text().strip()
            copied = _copy(source, copy)
        if copied == expected:
            os.utime(kept)
            os.utime(_checksum_file(kept))
            return True
    except OSError:
        pass
    target.unlink(missing_ok=True)
    return False


def keep_archive(cache: Path, digest: str, archive: Path) -> None:
    """Keep a copy of ``archive``, and of all that are kept the newest ones."""
    with contextlib.suppress(OSError):
        if archive.stat().st_size > MAX_ARCHIVE_BYTES:
            return
        kept = _archive(cache, digest)
        with _replacing(kept) as target, archive.open("rb") as source, target.open("wb") as copy:
            checksum = _copy(source, copy)
        with _replacing(_checksum_file(kept)) as target:
            target.write_text(checksum)
        _keep_newest(kept.parent, 2 * MAX_PROJECTS, MAX_ARCHIVES_BYTES)


def _archive(cache: Path, digest: str) -> Path:
    return cache / "archives" / f"{digest.partition(':')[2]}.tar.gz"


def _checksum_file(archive: Path) -> Path:
    return archive.with_suffix(".sha256")


def _created(target: Path) -> Any:
    return open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _copy(source: Any, target: Any) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new file, readable by the user only, that takes the place of ``path`` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _keep_newest(folder: Path, count: int, size_bytes: int) -> None:
    """Delete those files of ``folder`` that were used longest ago, beyond a count of them or a size of all together."""
    files = sorted(((each.stat(), each) for each in folder.iterdir()), key=lambda pair: -pair[0].st_mtime_ns)
    total_bytes = 0
    for position, (status, path) in enumerate(files):
        total_bytes += status.st_size
        if position >= count or total_bytes > size_bytes:
            path.unlink(missing_ok=True)
