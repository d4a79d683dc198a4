"""Snapshot archive -> project folder, where the job runs. Trusts nothing in the archive; standard library only.

What a snapshot *is* is defined here, by the side that must not believe it: a list of :class:`Entry`, and the digest
over that list (:func:`digest_of`). The digest names content, not archive bytes: zlib builds compress differently, so
bytes would differ from machine to machine, and an archive that is stored already need not be made again to learn its
digest. Here it is recomputed from what was really written, and compared before a link exists or anything can run.

The archive is one gzip stream of a POSIX tar with pax headers, of which only what ``snapshot`` writes is understood:
files, folders and symbolic links, sorted, each below a folder that came before it. Everything else is refused, not
skipped. The members are walked by this module, header by header, instead of by ``tarfile.extractall``: the filters
of ``tarfile`` were bypassed again and again (CVE-2024-12718, CVE-2025-4138, -4330, -4517), they differ between the
Python versions that jobs run on, and its reader holds pax headers of any size in memory.
"""

from __future__ import annotations

import contextlib
import enum
import gzip
import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import JobError
from ..job import SnapshotRef

ENCODING = "utf-8"
ERRORS = "surrogateescape"  # file names are bytes; those that are not UTF-8 survive the way through str

_FORMAT = b"mlflow-remote snapshot 1\0"
_BLOCK_BYTES = 512
_CHUNK_BYTES = 1 << 20
_PAX_BYTES = 64 << 10  # a pax header holds a path and a link target; both are far shorter
_PAX_KEYS = frozenset({"path", "linkpath", "size", "hdrcharset"})
_FOLDER_MODE = 0o755  # whatever the umask is: the program may run as another user than this step
_PADDING_BYTES = 20 * _BLOCK_BYTES  # tar pads an archive to a whole record


class Kind(str, enum.Enum):
    """What an entry is; the value stands for it in the digest. All that is kept of a mode is the executable bit."""

    FILE = "f"
    EXECUTABLE = "x"
    LINK = "l"
    FOLDER = "d"


@dataclass(frozen=True)
class Entry:
    """One member of a snapshot. ``path``: relative, ``/``-separated, undecodable bytes as surrogates.

    ``sha256``: hex, of a file's content or of a link's target; empty for a folder. ``target``: of a link, relative to
    the link's folder, in the form that :func:`is_safe_target` accepts.
    """

    path: str
    kind: Kind
    size_bytes: int = 0
    sha256: str = ""
    target: str = ""


@dataclass(frozen=True)
class UnpackLimits:
    """What an archive may unpack to. Checked while it streams, before the bytes in question are written.

    There is no limit on the compression ratio: deflate cannot exceed 1032:1, an honest file of zeros comes close to
    it, and ``max_bytes`` bounds what a bomb can do. Where the submitter's totals are known (:meth:`of`) the bound is
    exact.
    """

    max_bytes: int = 10 << 30
    max_entries: int = 250_000
    max_path_bytes: int = 3000  # PATH_MAX is 4096, of which the job's folder needs some
    max_depth: int = 200

    @classmethod
    def of(cls, snapshot: SnapshotRef) -> UnpackLimits:
        """The limits that exactly this snapshot needs; the defaults where its totals are not known."""
        if not snapshot.entries:
            return cls()
        return cls(max_bytes=snapshot.unpacked_bytes, max_entries=snapshot.entries)


class _Refused(Exception):
    """The archive is not what was submitted. The message says why, without a final full stop."""


def raw(path: str) -> bytes:
    """The bytes of a path as they stand on disk and in the archive."""
    return path.encode(ENCODING, ERRORS)


def digest_of(entries: Iterable[Entry]) -> str:
    """``sha256:…`` over kind, content and path of all entries, in the order of their paths' bytes. Pure.

    A record is ``KIND SHA256 PATH NUL``; a path holds no NUL and the other two hold no space, so no two lists of
    entries share their records.
    """
    digest = hashlib.sha256(_FORMAT)
    for entry in sorted(entries, key=lambda each: raw(each.path)):
        digest.update(f"{entry.kind.value} {entry.sha256 or '-'} ".encode() + raw(entry.path) + b"\0")
    return f"sha256:{digest.hexdigest()}"


def is_safe_target(path: str, target: str) -> bool:
    """Whether the link ``path`` to ``target`` stays inside the project, wherever the project lies. Pure.

    Allowed are as many leading ``..`` as the link has parent folders, then names only. A ``..`` after a name is
    refused even where it seems to stay inside, because the name may be a link itself and ``..`` then climbs from
    where that one leads. With every link of this form, resolving any chain of them can't leave the project: it climbs
    from a real folder, and afterwards only descends.
    """
    parts = [] if target == "." else target.split("/")
    climbs = 0
    while climbs < len(parts) and parts[climbs] == "..":
        climbs += 1
    names = parts[climbs:]
    return climbs <= path.count("/") and not any(name in ("", ".", "..") or "\0" in name for name in names)


def unpack(archive: BinaryIO, folder: Path, digest: str, limits: UnpackLimits | None = None) -> tuple[Entry, ...]:
    """Write the project in ``archive`` to ``folder``, which is made, or must be empty. Blocks while it reads.

    On any failure whatever was written is removed again. Modes become 0644 or 0755; owner, times, setuid, setgid and
    sticky bits of the archive are never read. Returns the entries written, sorted.

    Raises JobError: SNAPSHOT_CORRUPT where the archive is torn, hostile or not the one that ``digest`` names;
    BOOTSTRAP where ``folder`` cannot be written. What ``archive.read`` itself raises (other than OSError) passes.
    """
    made = _make_empty(folder)
    try:
        return _unpack_verified(_Archive(archive), folder, digest, limits or UnpackLimits())
    except BaseException as error:
        _clear(folder, made)
        if isinstance(error, _Refused):
            raise _corrupt(str(error)) from error
        if isinstance(error, OSError):
            raise _unwritable(folder, error) from error
        raise


def _unpack_verified(archive: _Archive, folder: Path, digest: str, limits: UnpackLimits) -> tuple[Entry, ...]:
    entries = tuple(_write_members(archive, os.fsencode(folder), limits))
    found = digest_of(entries)
    if found != digest:
        raise _Refused(f"its digest is {found}, the submitted one is {digest}")
    # Links come last, on verified entries: until now there was none that a write could have gone through.
    for entry in entries:
        if entry.kind is Kind.LINK:
            os.symlink(raw(entry.target), os.path.join(os.fsencode(folder), raw(entry.path)))
    return entries


def _write_members(archive: _Archive, root: bytes, limits: UnpackLimits) -> Iterator[Entry]:
    folders = {""}
    last = b""
    total_bytes = 0
    for count, header in enumerate(archive.headers(), start=1):
        if count > limits.max_entries:
            raise _Refused(f"it has more than {limits.max_entries} entries")
        total_bytes += header.size
        if total_bytes > limits.max_bytes:
            raise _Refused(f"it unpacks to more than {limits.max_bytes} bytes")
        path = _checked_path(header, limits)
        if raw(path) <= last:
            raise _Refused(f"entry {path!r} comes twice or out of order")
        if path.rpartition("/")[0] not in folders:
            raise _Refused(f"entry {path!r} is not below a folder of the archive")
        last = raw(path)
        entry = _write_member(archive, header, path, os.path.join(root, last), limits)
        if entry.kind is Kind.FOLDER:
            folders.add(path)
        yield entry


def _checked_path(header: tarfile.TarInfo, limits: UnpackLimits) -> str:
    """The entry's path. Raises _Refused unless it is relative, of plain names, and within the limits."""
    path = header.name
    if header.isdir() and path.endswith("/"):
        path = path[:-1]
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise _Refused(f"entry {path[:200]!r} is not a plain relative path")
    if len(raw(path)) > limits.max_path_bytes:
        raise _Refused(f"the path {path[:200]!r}… has more than {limits.max_path_bytes} bytes")
    if len(parts) > limits.max_depth:
        raise _Refused(f"the path {path[:200]!r}… is more than {limits.max_depth} levels deep")
    return path


def _write_member(archive: _Archive, header: tarfile.TarInfo, path: str, place: bytes, limits: UnpackLimits) -> Entry:
    if header.isreg():
        return _write_file(archive, header, path, place)
    if header.size:
        raise _Refused(f"entry {path!r} has content, but is not a file")
    if header.isdir():
        os.mkdir(place)
        os.chmod(place, _FOLDER_MODE)
        return Entry(path, Kind.FOLDER)
    target = header.linkname
    if len(raw(target)) > limits.max_path_bytes or not is_safe_target(path, target):
        raise _Refused(f"the link {path!r} leads out of the project, to {target[:200]!r}")
    return Entry(path, Kind.LINK, sha256=hashlib.sha256(raw(target)).hexdigest(), target=target)


def _write_file(archive: _Archive, header: tarfile.TarInfo, path: str, place: bytes) -> Entry:
    executable = bool(header.mode & 0o100)
    digest = hashlib.sha256()
    # O_EXCL: never through anything that exists, which includes a name that differs in case only where the file
    # system holds the two for one.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(place, flags, 0o600), "wb", buffering=0) as file:
        for chunk in archive.content(header.size):
            digest.update(chunk)
            _write_all(file, chunk)
        os.chmod(place, 0o755 if executable else 0o644)
    return Entry(path, Kind.EXECUTABLE if executable else Kind.FILE, header.size, digest.hexdigest())


def _write_all(file: BinaryIO, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]


class _Archive:
    """The tar stream inside ``stream``: headers one by one; a file's content must be read before the next header."""

    def __init__(self, stream: BinaryIO) -> None:
        self._tar = gzip.GzipFile(fileobj=stream, mode="rb")

    def headers(self) -> Iterator[tarfile.TarInfo]:
        """Each member's header, pax records applied, until the archive's end. Regular, folder and link only."""
        while (header := self._header()) is not None:
            records: dict[str, str] = {}
            if header.type == tarfile.XHDTYPE:
                records = _pax_records(self._pax(header))
                header = self._header()
            if header is None:
                raise _Refused("it ends after a pax header")
            yield _checked_header(header, records)
        self._check_end()

    def content(self, size_bytes: int) -> Iterator[bytes]:
        """The next ``size_bytes`` bytes, in chunks, and past their padding."""
        left = size_bytes
        while left:
            chunk = self._read(min(left, _CHUNK_BYTES))
            left -= len(chunk)
            yield chunk
        self._read(-size_bytes % _BLOCK_BYTES)

    def _header(self) -> tarfile.TarInfo | None:
        block = self._read(_BLOCK_BYTES)
        if block == bytes(_BLOCK_BYTES):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, ENCODING, ERRORS)
        except (tarfile.HeaderError, ValueError) as error:
            raise _Refused(f"a header cannot be read ({error})") from error
        if header.size < 0:
            raise _Refused("an entry has a negative size")
        return header

    def _pax(self, header: tarfile.TarInfo) -> bytes:
        if header.size > _PAX_BYTES:
            raise _Refused(f"a pax header has {header.size} bytes")
        return b"".join(self.content(header.size))

    def _read(self, size_bytes: int) -> bytes:
        try:
            data = self._tar.read(size_bytes)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _Refused(f"it cannot be decompressed ({error})") from error
        if len(data) < size_bytes:
            raise _Refused("it ends too early")
        return data

    def _check_end(self) -> None:
        """Nothing but tar's padding follows; reading to the end also checks gzip's own checksum."""
        try:
            rest = self._tar.read(_PADDING_BYTES + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _Refused(f"it cannot be decompressed ({error})") from error
        if len(rest) > _PADDING_BYTES or rest.strip(b"\0"):
            raise _Refused("something follows after its end")


def _pax_records(data: bytes) -> dict[str, str]:
    """The records ``LENGTH KEY=VALUE NEWLINE`` of a pax header (POSIX.1-2017, pax, "pax Extended Header")."""
    records: dict[str, str] = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or len(length) > 6 or int(length) > len(data):
            raise _Refused("a pax record has no length, or a wrong one")
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        key, equals, value = record.partition(b"=")
        name = key.decode(ENCODING, ERRORS)
        if not equals or not value.endswith(b"\n") or name not in _PAX_KEYS:
            raise _Refused(f"a pax record is not one of ours: {name[:100]!r}")
        records[name] = value[:-1].decode(ENCODING, ERRORS)
    return records


def _checked_header(header: tarfile.TarInfo, records: dict[str, str]) -> tarfile.TarInfo:
    if not (header.type in (tarfile.REGTYPE, tarfile.AREGTYPE) or header.isdir() or header.issym()):
        raise _Refused(f"entry {header.name!r} is of type {header.type!r}: no file, folder or symbolic link")
    header.name = records.get("path", header.name)
    header.linkname = records.get("linkpath", header.linkname)
    if "size" in records:
        size = records["size"]
        if not (size.isascii() and size.isdigit() and len(size) < 20):
            raise _Refused(f"entry {header.name!r} has no size")
        header.size = int(size)
    return header


def _make_empty(folder: Path) -> bool:
    """Whether ``folder`` was made here. Raises JobError where it is not an empty folder afterwards."""
    try:
        folder.mkdir()
        folder.chmod(_FOLDER_MODE)
        return True
    except FileExistsError:
        pass
    except OSError as error:
        raise _unwritable(folder, error) from error
    if folder.is_symlink() or not folder.is_dir() or any(folder.iterdir()):
        raise JobError(f"The project cannot be unpacked to {folder}: it is not an empty folder.")
    return False


def _clear(folder: Path, made: bool) -> None:
    """Remove what was unpacked. The folder itself stays where it was there before: it may be a mount point."""
    if made:
        shutil.rmtree(os.fsencode(folder), ignore_errors=True)
        return
    for entry in list(os.scandir(os.fsencode(folder))):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)


def _corrupt(why: str) -> JobError:
    return JobError(
        "The snapshot that arrived here is not the one that was submitted, and nothing of it was run.",
        words=f"{why[:1].upper()}{why[1:]}.",
        hint="Submit again. If it happens again, something alters what the artifact store holds, or how it is sent.",
        code="SNAPSHOT_CORRUPT",
    )


def _unwritable(folder: Path, error: OSError) -> JobError:
    return JobError(
        f"The project cannot be unpacked to {folder}.",
        words=str(error),
        hint="Check the room and the rights there (resources.ephemeral_storage), and the project's file names.",
    )
