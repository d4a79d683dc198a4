"""Project folder -> snapshot: a listing with a digest, and an archive that holds exactly what the listing says.

In two steps, since the second is not needed where the digest is stored already:

:func:`scan` walks the folder (:mod:`tree` says what belongs in it), reads each file once, for its hash and for
credentials (:mod:`secret_scan`), and refuses what must not be sent. :func:`build` writes the archive.

The digest is that of the listing (kind, content and path of each entry; ``runner.unpack.digest_of``), so the same tree
has the same digest on any machine. The archive's bytes are as good as deterministic too: entries sorted by their
paths' bytes, no times, no owners, modes 0644 and 0755 only. But zlib builds differ, so they are not what is compared.

Files may change meanwhile. Whatever happens, an archive and its digest agree: ``build`` packs exactly the bytes that
``scan`` read, and where it finds others it looks at those anew, credentials included, before it takes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import io
import os
import stat
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from . import secret_scan, snapshot_cache, tree
from .config import SnapshotOptions
from .errors import SnapshotError
from .job import SnapshotRef
from .runner.unpack import ENCODING, ERRORS, Entry, Kind, digest_of, raw
from .secret_scan import Finding
from .tree import Found, LeftOut, Tree, counted, shown, some_of

COMPRESSION = 4  # of gzip: half the time of the usual 6, for a few per cent more bytes
MEMORY_BYTES = 8 << 20  # a file up to this size is held in memory while it is packed

_CHUNK_BYTES = 1 << 20
_GONE = (FileNotFoundError, NotADirectoryError)


@dataclass(frozen=True)
class Listing:
    """What a snapshot holds. ``entries`` are sorted; ``left_out`` says what it does not hold, and by which rule.

    ``warnings``: sentences for the person who submits.
    """

    root: Path
    entries: tuple[Entry, ...]
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()
    allow_secrets: bool = False
    required: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """``sha256:…`` over the entries."""
        return digest_of(self.entries)

    @property
    def size_bytes(self) -> int:
        """Of all files, unpacked."""
        return sum(entry.size_bytes for entry in self.entries)

    def to_text(self) -> str:
        """The listing for people and programs: SHA-256, size in bytes and path of each file, a line each."""
        lines = [f"{each.sha256}  {each.size_bytes:>12}  {_listed(each)}" for each in self.entries if each.sha256]
        return "\n".join([f"# snapshot {self.digest}", *lines, ""])


@dataclass(frozen=True)
class Snapshot:
    """A packed project. ``path``: the archive, of ``size_bytes``. ``listing``: what it holds, which may differ from the
    listing that it was built from where files changed in between; ``digest`` is always the archive's."""

    listing: Listing
    path: Path
    size_bytes: int

    @property
    def digest(self) -> str:
        return self.listing.digest

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.listing.warnings

    @property
    def ref(self) -> SnapshotRef:
        """What a job needs to know of it, not yet stored anywhere."""
        return SnapshotRef(
            self.digest,
            self.size_bytes,
            unpacked_bytes=self.listing.size_bytes,
            entries=len(self.listing.entries),
        )


def archive_name(digest: str) -> str:
    """The file name of a snapshot's archive. Content-addressed: equal names hold equal projects. Pure."""
    return digest.partition(":")[2][:32] + ".tar.gz"


# -- scan: what would be packed ---------------------------------------------------------------------------------------


def scan(
    project_dir: Path,
    options: SnapshotOptions,
    excluded_paths: Sequence[Path] = (),
    *,
    required: Sequence[str] = (),
    cache: Path | None = None,
) -> Listing:
    """What a snapshot of ``project_dir`` holds. Blocks while it reads; writes nothing but the cache.

    ``excluded_paths``: where tracking data lies, never packed. ``required``: paths in the project that the job cannot
    do without, besides MLproject itself. ``cache``: default: the user's (:mod:`snapshot_cache`).

    Raises SnapshotError: over the size limit, credentials in a file, a file that cannot be read, a link that leads
    out, a required file that a rule leaves out, a folder too large or too deep to send.
    """
    root = _root(project_dir)
    found = tree.walk(root, options.include, options.exclude, excluded_paths)
    needed = (*_mlproject(found), *required)
    _check_required(found, needed)
    _check_size(found, options.max_size_bytes)
    entries, gone = _read_entries(found, options, cache or snapshot_cache.default_root())
    warnings = _warnings(found, entries, (*found.vanished, *gone))
    return Listing(root, entries, found.left_out, warnings, options.allow_secrets, needed)


def _root(project_dir: Path) -> Path:
    root = Path(project_dir).absolute()
    if not root.is_dir():
        raise SnapshotError(f"The project folder {shown(str(root))} does not exist, or is no folder.")
    return root


def _mlproject(found: Tree) -> tuple[str, ...]:
    """The MLproject file, which MLflow finds whatever the case of its name; none in a project without one."""
    paths = [*(each.path for each in found.found), *(each.path for each in found.left_out)]
    return tuple(path for path in paths if path.lower() == "mlproject")


def _check_required(found: Tree, required: Sequence[str]) -> None:
    packed = {each.path for each in found.found}
    left_out = {each.path: each.rule for each in found.left_out}
    for path in required:
        plain = os.path.normpath(path).replace(os.sep, "/")
        if plain in packed:
            continue
        rule = next((left_out[way] for way in _ways(plain) if way in left_out), None)
        if rule is None:
            raise SnapshotError(f"The job needs {shown(plain)}, but the project folder has no such file.")
        raise SnapshotError(
            f"The job needs {shown(plain)}, but it would not be in the snapshot: {rule}.",
            hint=f"Take that rule back, for example by a line !/{shown(plain)} in .mlflowignore, "
            "or name the file in snapshot.include.",
        )


def _check_size(found: Tree, max_size_bytes: int) -> None:
    """Before anything is read: refuses what is too large, and says what makes it so."""
    files = [each for each in found.found if stat.S_ISREG(each.status.st_mode)]
    total_bytes = sum(each.status.st_size for each in files)
    if total_bytes <= max_size_bytes:
        return
    largest = sorted(files, key=lambda each: (-each.status.st_size, each.path))[:10]
    raise SnapshotError(
        f"The project has {_size(total_bytes)} in {counted(len(files), 'file')}; a snapshot may have "
        f"{_size(max_size_bytes)}. The largest files:",
        words=some_of([f"{_size(each.status.st_size)}  {shown(each.path)}" for each in largest]),
        hint="Name what the job does not need in .mlflowignore, one pattern a line as in .gitignore, "
        "or raise snapshot.max_size. Data is better given as a parameter of type path or uri.",
    )


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _read_entries(found: Tree, options: SnapshotOptions, cache: Path) -> tuple[tuple[Entry, ...], list[str]]:
    """The entries of all that was found, and the files that were gone when their turn came."""
    hashes = snapshot_cache.FileHashes(cache, found.root)
    entries: list[Entry] = []
    gone: list[str] = []
    unreadable: list[str] = []
    secrets: dict[str, tuple[Finding, ...]] = {}
    for each in found.found:
        try:
            entry, findings = _entry_of(found.root, each, hashes)
        except _GONE:
            gone.append(each.path)
            continue
        except _Unreadable as error:
            unreadable.append(str(error))
            continue
        entries.append(entry)
        if findings:
            secrets[each.path] = findings
    if unreadable:
        raise tree.cannot_read(unreadable)
    if secrets and not options.allow_secrets:
        raise _holds_secrets(secrets)
    hashes.save()
    return tuple(entries), gone


def _entry_of(root: Path, found: Found, hashes: snapshot_cache.FileHashes) -> tuple[Entry, tuple[Finding, ...]]:
    if stat.S_ISDIR(found.status.st_mode):
        return Entry(found.path, Kind.FOLDER), ()
    if stat.S_ISLNK(found.status.st_mode):
        sha256 = hashlib.sha256(raw(found.target)).hexdigest()
        return Entry(found.path, Kind.LINK, sha256=sha256, target=found.target), ()
    known = hashes.find(found.path, found.status)
    if known is not None:
        return Entry(found.path, _kind(found.status), found.status.st_size, known), ()
    read_at_ns = time.time_ns()
    content = _read(root, found.path)
    if content.at_rest and not content.findings:
        hashes.keep(found.path, content.status, content.entry.sha256, read_at_ns)
    return content.entry, content.findings


def _kind(status: os.stat_result) -> Kind:
    return Kind.EXECUTABLE if status.st_mode & stat.S_IXUSR else Kind.FILE


@dataclass(frozen=True)
class _Content:
    """A file as it was read, once. ``at_rest``: it did not change meanwhile. ``data``: all of it, or the beginning."""

    entry: Entry
    findings: tuple[Finding, ...]
    status: os.stat_result
    at_rest: bool
    data: bytes


def _read(root: Path, path: str, copy: BinaryIO | None = None) -> _Content:
    """Read a file once: as many bytes as it has when it is opened, so that one that grows comes to an end.

    ``copy``: where to write what is read.
    """
    with _open(_place(root, path), path) as source:
        before = source.status()
        data = source.read(min(before.st_size, secret_scan.SCAN_BYTES))
        size_bytes = len(data)
        if copy is not None:
            copy.write(data)
        while size_bytes < before.st_size and (chunk := source.read(min(_CHUNK_BYTES, before.st_size - size_bytes))):
            size_bytes += len(chunk)
            if copy is not None:
                copy.write(chunk)
        after = source.status()
    at_rest = _change_of(before) == _change_of(after) and size_bytes == after.st_size
    entry = Entry(path, _kind(before), size_bytes, source.digest.hexdigest())
    return _Content(entry, secret_scan.find(data), after, at_rest, data)


def _change_of(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class _Unreadable(Exception):
    """A file of the project cannot be read. The message is its line in the list of those."""


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Tells what reading raises from what writing raises. A file that is gone is no failure, and passes."""
    try:
        yield
    except _GONE:
        raise
    except OSError as error:
        raise _Unreadable(f"{shown(path)}: {error.strerror}") from error


class _Source:
    """A regular file of the project while it is read; hashes what was read of it. Raises _Unreadable, or _GONE."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.digest = hashlib.sha256()
        self.path = path
        self._file = file

    def status(self) -> os.stat_result:
        with _reading(self.path):
            return os.fstat(self._file.fileno())

    def read(self, size_bytes: int) -> bytes:
        """So many bytes, fewer only at the file's end."""
        with _reading(self.path):
            data = self._file.read(size_bytes)
        self.digest.update(data)
        return data


def _place(root: Path, path: str) -> bytes:
    return os.path.join(os.fsencode(root), raw(path))


@contextlib.contextmanager
def _open(place: bytes, path: str) -> Iterator[_Source]:
    """The file at ``place``: never through a link at its end, never blocking on a pipe that took the file's place."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with _reading(path):
        try:
            handle = os.open(place, flags)
        except OSError as error:
            if error.errno == errno.ELOOP:  # O_NOFOLLOW: a link took the file's place
                raise FileNotFoundError(path) from error
            raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileNotFoundError(path)
    with open(handle, "rb") as file:
        yield _Source(file, path)


def _holds_secrets(secrets: dict[str, tuple[Finding, ...]]) -> SnapshotError:
    lines = [f"{shown(path)}:{each.line}: {each.rule}" for path, findings in secrets.items() for each in findings]
    return SnapshotError(
        f"{counted(len(secrets), 'file')} of the project would carry credentials to where the job runs:",
        words=some_of(lines),
        hint="Take them out, or name the files in .mlflowignore; a job gets credentials by pass_env or secrets. "
        "A line that is meant can say 'pragma: allowlist secret'; snapshot.allow_secrets switches this check off.",
    )


def _warnings(found: Tree, entries: Sequence[Entry], gone: Sequence[str]) -> tuple[str, ...]:
    by_rule: dict[str, list[str]] = defaultdict(list)
    for each in found.left_out:
        if each.notable:
            by_rule[each.rule].append(each.path)
    return (
        *(f"Not in the snapshot, {rule}: {_names(paths)}" for rule, paths in by_rule.items()),
        *([f"Not in the snapshot, gone while it was taken: {_names(gone)}"] if gone else []),
        *_about_links(entries),
        *_about_case(entries),
    )


def _about_links(entries: Sequence[Entry]) -> Iterator[str]:
    packed = {entry.path for entry in entries}
    links = {entry.path: entry.target for entry in entries if entry.kind is Kind.LINK}
    for path, target in links.items():
        leads_to = os.path.normpath(os.path.join(os.path.dirname(path), target)).replace(os.sep, "/")
        if leads_to != "." and leads_to not in packed and not any(way in links for way in _ways(leads_to)):
            yield f"The link {shown(path)} leads to {shown(leads_to)}, which is not in the snapshot."


def _ways(path: str) -> list[str]:
    """The path and the folders above it, from the top down."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _about_case(entries: Sequence[Entry]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for entry in entries:
        other = seen.setdefault(entry.path.casefold(), entry.path)
        if other != entry.path:
            yield (
                f"{shown(other)} and {shown(entry.path)} differ in case only: "
                "where file names ignore case (macOS), the snapshot cannot be unpacked."
            )


def _names(paths: Sequence[str]) -> str:
    names = [shown(path) for path in paths[: tree.SHOWN]]
    more = [f"and {len(paths) - tree.SHOWN} more"] if len(paths) > tree.SHOWN else []
    return ", ".join([*names, *more])


def _listed(entry: Entry) -> str:
    return f"{shown(entry.path)} -> {shown(entry.target)}" if entry.kind is Kind.LINK else shown(entry.path)


# -- build: the archive -----------------------------------------------------------------------------------------------


class _Rewritten(Exception):
    """A file that is too large for memory turned out not to be what the listing says. ``path``: which."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


def build(listing: Listing, folder: Path, *, cache: Path | None = None) -> Snapshot:
    """Write the archive of ``listing`` into ``folder``, named by its digest, readable by the user only. Blocks.

    A file that is gone by now is left out with a warning, one that was rewritten is taken as it is now; the digest is
    that of what was packed. On failure nothing is left in ``folder``.

    Raises SnapshotError: no room, a file that cannot be read, credentials that were written meanwhile.
    """
    cache = cache or snapshot_cache.default_root()
    path = folder / archive_name(listing.digest)
    if snapshot_cache.fetch_archive(cache, listing.digest, path):
        return Snapshot(listing, path, path.stat().st_size)
    try:
        packed = _pack_restless(listing, path)
        path = path.rename(folder / archive_name(packed.digest))
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, _Unreadable):
            raise tree.cannot_read([str(error)]) from error
        if isinstance(error, OSError):
            raise _cannot_write(folder, error) from error
        raise
    snapshot_cache.keep_archive(cache, packed.digest, path)
    return Snapshot(packed, path, path.stat().st_size)


def _pack_restless(listing: Listing, path: Path) -> Listing:
    """The listing of what was packed. A large file that does not keep still is copied, and all is packed again."""
    copies: dict[str, Path] = {}
    try:
        while True:
            try:
                return _pack(listing, path, copies)
            except _Rewritten as rewritten:
                path.unlink()
                restless = rewritten.path
            copy = path.with_name(f"{path.name}.copy{len(copies)}")
            with _created(copy) as file:
                content = _read_anew(listing, restless, file)
            listing = _with(listing, restless, content.entry if content else None)
            copies[restless] = copy
    finally:
        for copy in path.parent.glob(f"{path.name}.copy*"):
            copy.unlink()


def _created(path: Path) -> BinaryIO:
    """A new file, for the user's eyes only."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600), "wb")


def _pack(listing: Listing, path: Path, copies: Mapping[str, Path]) -> Listing:
    with (
        _created(path) as out,
        gzip.GzipFile("", "wb", COMPRESSION, out, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT, encoding=ENCODING, errors=ERRORS) as archive,
    ):
        for entry in listing.entries:
            packed = _add(archive, listing, entry, copies)
            if packed != entry:
                listing = _with(listing, entry.path, packed)
    return listing


def _add(archive: tarfile.TarFile, listing: Listing, entry: Entry, copies: Mapping[str, Path]) -> Entry | None:
    """Add an entry. The entry as it was added, None where it is gone. Raises _Rewritten, SnapshotError."""
    if entry.kind in (Kind.FOLDER, Kind.LINK):
        archive.addfile(_member(entry))
        return entry
    if entry.size_bytes > MEMORY_BYTES:
        copy = copies.get(entry.path)
        return _add_large(archive, os.fsencode(copy) if copy else _place(listing.root, entry.path), entry)
    content = _content(listing, entry)
    if content is None:
        return None
    if content.entry.size_bytes > MEMORY_BYTES:
        raise _Rewritten(entry.path)
    archive.addfile(_member(content.entry), io.BytesIO(content.data))
    return content.entry


def _content(listing: Listing, entry: Entry) -> _Content | None:
    """A small file's content: that of the listing where the file still has or begins with it, else what it is now."""
    try:
        with _open(_place(listing.root, entry.path), entry.path) as source:
            data = source.read(entry.size_bytes)
            status = source.status()
    except _GONE:
        return None
    if source.digest.hexdigest() == entry.sha256:
        return _Content(entry, (), status, True, data)
    return _read_anew(listing, entry.path)


def _add_large(archive: tarfile.TarFile, place: bytes, entry: Entry) -> Entry | None:
    """Stream a file, as long as the listing says: one that has only grown since is packed as it was."""
    try:
        with _open(place, entry.path) as source:
            archive.addfile(_member(entry), _Whole(source))
    except _GONE:
        return None
    if source.digest.hexdigest() != entry.sha256:
        raise _Rewritten(entry.path)
    return entry


class _Whole(io.RawIOBase):
    """A source that must not end early: tar has written its size already."""

    def __init__(self, source: _Source) -> None:
        self._source = source

    def read(self, size_bytes: int = -1) -> bytes:
        data = self._source.read(size_bytes)
        if len(data) < size_bytes:
            raise _Rewritten(self._source.path)
        return data


def _read_anew(listing: Listing, path: str, copy: BinaryIO | None = None) -> _Content | None:
    """A file that is not what the listing says, as it is now; None where it is gone. Raises SnapshotError: secrets."""
    try:
        content = _read(listing.root, path, copy)
    except _GONE:
        return None
    if content.findings and not listing.allow_secrets:
        raise _holds_secrets({path: content.findings})
    return content


def _with(listing: Listing, path: str, entry: Entry | None) -> Listing:
    """The listing with another entry at ``path``, or none. Raises SnapshotError where the job needs one."""
    if entry is None and path in listing.required:
        raise SnapshotError(f"{shown(path)}, which the job needs, went away while the snapshot was taken.")
    entries = ((entry if each.path == path else each) for each in listing.entries)
    gone = [] if entry else [f"Not in the snapshot, gone while it was packed: {shown(path)}"]
    return dataclasses.replace(
        listing,
        entries=tuple(each for each in entries if each is not None),
        warnings=(*listing.warnings, *gone),
    )


def _member(entry: Entry) -> tarfile.TarInfo:
    """The tar header of an entry: nothing of this machine or of today is in it."""
    member = tarfile.TarInfo(entry.path)
    member.mode = 0o644 if entry.kind is Kind.FILE else 0o755
    member.size = entry.size_bytes
    if entry.kind is Kind.FOLDER:
        member.type = tarfile.DIRTYPE
    elif entry.kind is Kind.LINK:
        member.type = tarfile.SYMTYPE
        member.linkname = entry.target
    return member


def _cannot_write(folder: Path, error: OSError) -> SnapshotError:
    return SnapshotError(
        f"The snapshot's archive cannot be written to {shown(str(folder))}.",
        words=str(error.strerror or error),
        hint="Make room there, or let TMPDIR name a folder on a larger file system.",
    )
