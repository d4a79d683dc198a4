"""Folders into a container and out of it, as tar archives that are never held whole, neither in memory nor on disk.

What comes out was written by the user's program. Files are written below the target folder only, links are made last
and only such as stay inside the project, devices and the like are left out.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ... import removal
from ...runner.unpack import is_safe_target

_BLOCK_BYTES = 512
_CHUNK_BYTES = 1 << 20
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_END = b"\0" * (2 * _BLOCK_BYTES)


@dataclass(frozen=True)
class Item:
    """Something to copy in. ``source``: a file, link or folder of this machine, or content, or None for a folder."""

    path: str
    source: Path | bytes | None = None
    mode: int = 0o755


def pack(items: Iterable[Item], owner: tuple[int, int]) -> Iterator[bytes]:
    """A tar archive of the items, folders with all that is in them. ``owner``: uid and gid of everything.

    Comes in pieces of some size: each is a call to the network.
    """
    pieces: list[bytes] = []
    size = 0
    for piece in _pack(items, owner):
        pieces.append(piece)
        size += len(piece)
        if size >= _CHUNK_BYTES:
            yield b"".join(pieces)
            pieces, size = [], 0
    yield b"".join([*pieces, _END])


def _pack(items: Iterable[Item], owner: tuple[int, int]) -> Iterator[bytes]:
    for item in items:
        if isinstance(item.source, Path):
            yield from _pack_tree(item.path, item.source, owner)
        else:
            yield from _member(item.path, item.source, item.mode, owner)


def _pack_tree(path: str, source: Path, owner: tuple[int, int]) -> Iterator[bytes]:
    yield from _pack_one(path, source, owner)
    if source.is_symlink() or not source.is_dir():
        return
    for folder, folders, files in os.walk(source):
        inside = os.path.relpath(folder, source)
        for name in sorted((*folders, *files)):
            target = os.path.normpath(os.path.join(path, inside, name))
            yield from _pack_one(target, Path(folder, name), owner)


def _pack_one(path: str, source: Path, owner: tuple[int, int]) -> Iterator[bytes]:
    header = _header(path, owner)
    status = source.lstat()
    header.mode = status.st_mode & 0o777
    if source.is_symlink():
        header.type, header.linkname = tarfile.SYMTYPE, os.readlink(source)
        yield _bytes_of(header)
    elif source.is_dir():
        header.type = tarfile.DIRTYPE
        yield _bytes_of(header)
    else:
        header.size = status.st_size
        yield _bytes_of(header)
        yield from _content(source, status.st_size)


def _member(path: str, content: bytes | None, mode: int, owner: tuple[int, int]) -> Iterator[bytes]:
    header = _header(path, owner)
    header.mode = mode
    if content is None:
        header.type = tarfile.DIRTYPE
        yield _bytes_of(header)
        return
    header.size = len(content)
    yield _bytes_of(header) + content + _padding(len(content))


def _header(path: str, owner: tuple[int, int]) -> tarfile.TarInfo:
    header = tarfile.TarInfo(path)
    header.uid, header.gid = owner
    return header


def _bytes_of(header: tarfile.TarInfo) -> bytes:
    return header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return b"\0" * (-size % _BLOCK_BYTES)


def _content(source: Path, size: int) -> Iterator[bytes]:
    left = size
    with source.open("rb") as file:
        while left and (data := file.read(min(left, _CHUNK_BYTES))):
            left -= len(data)
            yield data
    if left:
        raise OSError(f"{source} became shorter while it was copied")
    yield _padding(size)


# -- out ---------------------------------------------------------------------------------------------------------------


class Content:
    """What is left of a file in a tar stream. An archive that breaks off is an OSError."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        with _cut_off_is_oserror():
            return self._stream.read(size)


@contextlib.contextmanager
def _cut_off_is_oserror() -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise OSError(f"the engine's archive was cut off: {error}") from error


def files(archive: Iterator[bytes]) -> Iterator[tuple[tarfile.TarInfo, Content]]:
    """The regular files of a tar archive with their content, to be read before the next one is asked for."""
    for member, content in _members(archive):
        if content is not None:
            yield member, content


def _members(archive: Iterator[bytes]) -> Iterator[tuple[tarfile.TarInfo, Content | None]]:
    reader: Any = _Reader(archive)  # tarfile needs no more of a file than its ``read``
    with _cut_off_is_oserror(), tarfile.open(fileobj=reader, mode="r|", bufsize=_CHUNK_BYTES) as members:
        for member in members:
            stream = members.extractfile(member) if member.isreg() else None
            yield member, Content(stream) if stream is not None else None


def set_aside(folder: Path, place: Path) -> None:
    """Move a folder, as it came with the project, to ``place``; only the first time. There is a folder then."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir() and not folder.is_symlink():
        folder.rename(place)
    else:
        place.mkdir()


def unpack(archive: Iterator[bytes], root: Path, folder: str, came: Path | None = None) -> list[str]:
    """Write an engine's archive of the folder ``root/folder`` (as it is in the container) to that place.

    What was there is removed first. ``came``: the folder as it came with the project; files that are still as
    :func:`pack` sent them are left out. Returns a line for each file that this machine cannot hold (its name is too
    long, say). Raises OSError where the disk is full or the archive breaks off.
    """
    target = root / folder
    removal.delete(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    links: list[tuple[str, str]] = []
    left_out: dict[str, Path] = {}
    problems: list[str] = []
    for member, content in _members(archive):
        path = _inside(folder, member.name)
        if path is None:
            continue
        if member.issym():
            links.append((path, member.linkname))
            continue
        try:
            _make(root, folder, path, member, content, left_out)
            original = came / os.path.relpath(path, folder) if came is not None else None
            if original is not None and _as_it_came(root / path, member, original):
                (root / path).unlink()
                left_out[path] = original
        except OSError as error:
            if error.errno is None or error.errno in _DISK_TROUBLE:
                raise
            problems.append(f"{path}: {error.strerror}")
    _link(root, links, left_out)
    return problems


def _as_it_came(path: Path, member: tarfile.TarInfo, original: Path) -> bool:
    """Nobody wrote to the file, whose time in the container is then the one that :func:`pack` gives."""
    if not member.isreg() or member.mtime or original.is_symlink() or not original.is_file():
        return False
    return filecmp.cmp(path, original, shallow=False)


def _make(
    root: Path,
    folder: str,
    path: str,
    member: tarfile.TarInfo,
    content: Content | None,
    left_out: Mapping[str, Path],
) -> None:
    if member.isdir():
        (root / path).mkdir(parents=True, exist_ok=True)
    elif content is not None:
        _write(root / path, content, member.mode)
    elif member.islnk():
        original = _inside(folder, member.linkname)
        if original is not None:
            _copy_again(root / path, left_out.get(original, root / original))


def _link(root: Path, links: Sequence[tuple[str, str]], left_out: Mapping[str, Path]) -> None:
    for path, target in links:
        if is_safe_target(path, target):
            with contextlib.suppress(OSError):
                (root / path).symlink_to(target)
    ends = {path: os.path.relpath(os.path.realpath(root / path), os.path.realpath(root)) for path, _ in links}
    for path in (path for path, end in ends.items() if end in left_out):
        with contextlib.suppress(OSError):
            (root / path).unlink()


def _inside(folder: str, name: str) -> str | None:
    """A member's path below the root: its own first part is the folder's name. None: it leads elsewhere."""
    parts = [each for each in name.split("/") if each not in ("", ".")]
    if ".." in parts or not parts:
        return None
    return "/".join([folder, *parts[1:]])


def _write(path: Path, content: Content, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, flags, (mode & 0o777) | 0o600), "wb") as file:
        while data := content.read(_CHUNK_BYTES):
            file.write(data)


def _copy_again(path: Path, original: Path) -> None:
    """A further name of a file that the archive had before."""
    if original.is_file():
        shutil.copyfile(original, path)


class _Reader:
    """An iterator of bytes as tarfile reads it."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int) -> bytes:
        gathered = [self._rest]
        length = len(self._rest)
        while length < size and (piece := next(self._pieces, b"")):
            gathered.append(piece)
            length += len(piece)
        data = b"".join(gathered)
        self._rest = data[size:]
        return data[:size]
