"""Unpacking a snapshot: what ``snapshot`` writes comes back byte for byte; all else is refused and leaves nothing."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlflow_remote_backend.errors import JobError
from mlflow_remote_backend.job import SnapshotRef
from mlflow_remote_backend.runner.unpack import (
    Entry,
    Kind,
    UnpackLimits,
    digest_of,
    is_safe_target,
    raw,
    unpack,
)

SMALL = UnpackLimits(max_bytes=10_000, max_entries=50, max_path_bytes=400, max_depth=20)


# ------------------------------------------------------------------------------------------------ making archives


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644, **fields: object
) -> bytes:
    """The bytes of one tar member as a pax tar has them, whatever they say."""
    header = tarfile.TarInfo(name)
    header.type, header.linkname, header.mode, header.size = kind, link, mode, len(data)
    for field, value in fields.items():
        setattr(header, field, value)
    return header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def folder(name: str) -> bytes:
    return member(name + "/", kind=tarfile.DIRTYPE, mode=0o755)


def link(name: str, target: str) -> bytes:
    return member(name, kind=tarfile.SYMTYPE, link=target, mode=0o777)


def pax(*records: bytes) -> bytes:
    """A pax header with these ``key=value`` records, for the member after it."""
    data = b""
    for record in records:
        length = len(record) + 2
        while len(str(length)) + len(record) + 2 != length:
            length = len(str(length)) + len(record) + 2
        data += b"%d %s\n" % (length, record)
    return member("pax", data, kind=tarfile.XHDTYPE)


def packed(*members: bytes, end: bytes = bytes(1024)) -> bytes:
    return gzip.compress(b"".join(members) + end, 1, mtime=0)


def file_entry(path: str, data: bytes, kind: Kind = Kind.FILE) -> Entry:
    return Entry(path, kind, len(data), hashlib.sha256(data).hexdigest())


def link_entry(path: str, target: str) -> Entry:
    return Entry(path, Kind.LINK, sha256=hashlib.sha256(raw(target)).hexdigest(), target=target)


PROJECT = (
    (Entry("conf", Kind.FOLDER), folder("conf")),
    (file_entry("conf/a.yaml", b"a: 1\n"), member("conf/a.yaml", b"a: 1\n")),
    (link_entry("latest", "conf/a.yaml"), link("latest", "conf/a.yaml")),
    (file_entry("run.sh", b"#!/bin/sh\n", Kind.EXECUTABLE), member("run.sh", b"#!/bin/sh\n", mode=0o755)),
)
PROJECT_DIGEST = digest_of(entry for entry, _ in PROJECT)
PROJECT_ARCHIVE = packed(*(data for _, data in PROJECT))


@dataclass(frozen=True)
class Place:
    """``target``: where to unpack. ``canary``: a file outside of it that nothing may touch."""

    target: Path
    canary: Path

    def unpack(self, archive: bytes, digest: str, limits: UnpackLimits | None = None) -> tuple[Entry, ...]:
        return unpack(io.BytesIO(archive), self.target, digest, limits)

    def outside(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.canary.parent.iterdir() if path != self.target}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    canary = tmp_path / "canary"
    canary.write_bytes(b"untouched")
    return Place(tmp_path / "work", canary)


def test_a_project_comes_back_as_it_was(place: Place) -> None:
    entries = place.unpack(PROJECT_ARCHIVE, PROJECT_DIGEST)
    assert entries == tuple(entry for entry, _ in PROJECT)
    assert (place.target / "conf/a.yaml").read_bytes() == b"a: 1\n"
    assert os.readlink(place.target / "latest") == "conf/a.yaml"
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in place.target.iterdir() if not path.is_symlink()}
    assert modes == {"conf": 0o755, "run.sh": 0o755}


def test_the_digest_is_the_one_of_format_1() -> None:
    """A change of format needs a new number in it: jobs of an earlier version compare digests of theirs."""
    assert PROJECT_DIGEST == "sha256:d6869e5dbf6857b899341f2020af16e26b14f5ae428f1b6a9f20fae9aa6c1a2a"


def test_modes_are_normal_whatever_the_umask_and_the_archive_say(place: Place) -> None:
    data = b"#!/bin/sh\n"
    archive = packed(
        member("a", data, mode=0o7777, uid=12345, gid=54321, uname="root", mtime=2**31),
        member("b", data, mode=0o4600),
        member("c/", kind=tarfile.DIRTYPE, mode=0o1777),
    )
    entries = [file_entry("a", data, Kind.EXECUTABLE), file_entry("b", data), Entry("c", Kind.FOLDER)]
    old = os.umask(0o077)
    try:
        place.unpack(archive, digest_of(entries))
    finally:
        os.umask(old)
    assert [stat.S_IMODE((place.target / name).stat().st_mode) for name in "abc"] == [0o755, 0o644, 0o755]
    assert (place.target / "a").stat().st_uid == os.getuid()
    assert (place.target / "a").stat().st_mtime != 2**31


HOSTILE_NAMES = [
    "new\nline",
    "tab\there",
    "\udcff\udcfe",
    "-rf",
    "ü" * 60,
    "x" * 200,
    "a b",
    "'\"$(touch p)`",
    "\x1b[31m",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_come_back_byte_for_byte(place: Place, name: str) -> None:
    inner = [
        (file_entry(f"{name}/{name}", b"x"), member(f"{name}/{name}", b"x")),
        (link_entry(f"{name}/l", f"../{name}"), link(f"{name}/l", f"../{name}")),
    ]
    inner.sort(key=lambda pair: raw(pair[0].path))
    entries = (Entry(name, Kind.FOLDER), *(entry for entry, _ in inner))
    assert place.unpack(packed(folder(name), *(data for _, data in inner)), digest_of(entries)) == entries
    below = os.path.join(os.fsencode(place.target), raw(name))
    assert os.listdir(os.fsencode(place.target)) == [raw(name)]
    assert sorted(os.listdir(below)) == sorted([b"l", raw(name)])
    assert os.readlink(os.path.join(below, b"l")) == b"../" + raw(name)


def test_an_archive_by_any_gzip_level_is_the_same_snapshot(place: Place, tmp_path: Path) -> None:
    for level in (0, 1, 9):
        archive = gzip.compress(gzip.decompress(PROJECT_ARCHIVE), level)
        unpack(io.BytesIO(archive), tmp_path / f"level{level}", PROJECT_DIGEST)


def test_a_file_larger_than_any_buffer_arrives_whole(place: Place) -> None:
    data = random.Random(1).randbytes(3_000_001)
    place.unpack(packed(member("big", data)), digest_of([file_entry("big", data)]))
    assert (place.target / "big").read_bytes() == data


# ------------------------------------------------------------------------------------------------ refused


def sparse(name: str) -> bytes:
    return member(name, kind=tarfile.GNUTYPE_SPARSE)


def negative_size() -> bytes:
    """A header whose size field is -512 in base 256, with the right checksum."""
    header = bytearray(member("a"))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def damaged_checksum() -> bytes:
    header = bytearray(member("a"))
    header[0:1] = b"b"
    return bytes(header)


# what it is called: the members, and a part of the sentence that refuses it
HOSTILE: dict[str, tuple[list[bytes], str]] = {
    "an absolute path": ([member("/tmp/evil", b"x")], "not a plain relative path"),
    "a path out": ([member("../evil", b"x")], "not a plain relative path"),
    "a path out by a folder": ([folder("a"), member("a/../../evil", b"x")], "not a plain relative path"),
    "a path that ends in dots": ([folder("a"), member("a/..", kind=tarfile.DIRTYPE)], "not a plain relative path"),
    "a dot in front": ([member("./a", b"x")], "not a plain relative path"),
    "an empty name": ([member("", b"x")], "not a plain relative path"),
    "the root itself": ([member("/", kind=tarfile.DIRTYPE)], "not a plain relative path"),
    "an empty part": ([folder("a"), member("a//b", b"x")], "not a plain relative path"),
    "a file named like a folder": ([pax(b"path=a/") + member("x", b"x")], "not a plain relative path"),
    "a NUL in a path": ([pax(b"path=a\0b") + member("x", b"x")], "not a plain relative path"),
    "a path out by a pax header": ([pax(b"path=../evil") + member("x", b"x")], "not a plain relative path"),
    "a hard link out": ([member("a", kind=tarfile.LNKTYPE, link="../canary")], "is of type"),
    "a hard link inside": ([member("a", b"x"), member("b", kind=tarfile.LNKTYPE, link="a")], "is of type"),
    "a character device": ([member("a", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)], "is of type"),
    "a block device": ([member("a", kind=tarfile.BLKTYPE, devmajor=8, devminor=0)], "is of type"),
    "a pipe": ([member("a", kind=tarfile.FIFOTYPE)], "is of type"),
    "a contiguous file": ([member("a", b"x", kind=tarfile.CONTTYPE)], "is of type"),
    "a type nobody knows": ([member("a", kind=b"s")], "is of type"),
    "a sparse file": ([sparse("a")], "is of type"),
    "a GNU long name": ([member("././@LongLink", b"a" * 200, kind=tarfile.GNUTYPE_LONGNAME)], "is of type"),
    "a global pax header": ([member("pax", b"11 path=a\n", kind=tarfile.XGLTYPE)], "is of type"),
    "two pax headers": ([pax(b"path=a") + pax(b"path=b") + member("x")], "is of type"),
    "a sparse file by pax": ([pax(b"GNU.sparse.major=1") + member("a", b"x")], "not one of ours"),
    "a pax record without length": ([member("pax", b"path=a\n", kind=tarfile.XHDTYPE) + member("a")], "no length"),
    "a pax record of length 0": ([member("pax", b"0 path=a\n", kind=tarfile.XHDTYPE) + member("a")], "not one of ours"),
    "a pax record too long": ([member("pax", b"99 path=a\n", kind=tarfile.XHDTYPE) + member("a")], "a wrong one"),
    "a pax header too large": ([pax(b"path=" + b"a" * 70_000) + member("a")], "pax header has 70012 bytes"),
    "a pax header at the end": ([pax(b"path=a")], "ends after a pax header"),
    "a size that is no number": ([pax(b"size=-1") + member("a")], "has no size"),
    "a size of 5,000 digits": ([pax(b"size=" + b"9" * 5000) + member("a")], "has no size"),
    "a negative size": ([negative_size()], "negative size"),
    "a header that was altered": ([damaged_checksum()], "a header cannot be read"),
    "a folder with content": ([member("a/", b"x", kind=tarfile.DIRTYPE)], "has content"),
    "a link with content": ([member("a", b"x", kind=tarfile.SYMTYPE, link="b")], "has content"),
    "an absolute link": ([link("a", "/etc/passwd")], "leads out"),
    "a link out": ([link("a", "../canary")], "leads out"),
    "a link out from below": ([folder("a"), link("a/b", "../../canary")], "leads out"),
    "a link that climbs after a name": ([folder("a"), link("b", "a/../../canary")], "leads out"),
    "links that climb through each other": (
        [folder("a"), link("a/x", "."), link("a/y", "x/x/x/../../../../canary")],
        "leads out",
    ),
    "an empty link": ([pax(b"linkpath=") + link("a", "b")], "leads out"),
    "a link out by a pax header": ([pax(b"linkpath=../canary") + link("a", "b")], "leads out"),
    "a link of 5,000 bytes": ([link("a", "b" * 5000)], "leads out"),
    "a write through a link out": ([link("a", "../"), member("a/evil", b"x")], "leads out"),
    "a write through a link": ([folder("b"), link("c", "b"), member("c/evil", b"x")], "not below a folder"),
    "a file below a file": ([member("a", b"x"), member("a/b", b"x")], "not below a folder"),
    "a file without its folder": ([member("a/b", b"x")], "not below a folder"),
    "a file twice": ([member("a", b"x"), member("a", b"y")], "twice or out of order"),
    "a link over a file": ([member("a", b"x"), link("a", "b")], "twice or out of order"),
    "a folder over a file": ([member("a", b"x"), folder("a")], "twice or out of order"),
    "members out of order": ([member("b", b"x"), member("a", b"x")], "twice or out of order"),
    "a file over the size limit": ([member("a", bytes(10_001))], "more than 10000 bytes"),
    "files over the size limit": ([member(f"a{n}", bytes(2_001)) for n in range(5)], "more than 10000 bytes"),
    "a file said to be huge": ([pax(b"size=4294967296000") + member("a")], "more than 10000 bytes"),
    "too many entries": ([member(f"{n:03}") for n in range(51)], "more than 50 entries"),
    "a path too long": ([pax(b"path=" + b"a" * 401) + member("a")], "more than 400 bytes"),
    "a path too deep": ([folder("/".join("a" * n)) for n in range(1, 22)], "more than 20 levels"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses(place: Place, case: str) -> None:
    members, why = HOSTILE[case]
    with pytest.raises(JobError) as refusal:
        place.unpack(packed(*members), "sha256:" + "0" * 64, SMALL)
    assert why in refusal.value.words.lower()
    assert refusal.value.code == "SNAPSHOT_CORRUPT"
    assert not place.target.exists()
    assert place.outside() == {"canary": b"untouched"}


ZEROS = gzip.compress(bytes(1 << 20), 9) * 4096  # 4 GiB, in 4 MB


@pytest.mark.parametrize(
    ("bomb", "why"),
    [
        (gzip.compress(pax(b"size=%d" % (4 << 30)) + member("a")) + ZEROS, "more than 314572800 bytes"),
        (gzip.compress(member("a")) + ZEROS, "something follows"),
        (packed(*(member(f"{number:04}") for number in range(1_001))), "more than 1000 entries"),
    ],
)
def test_refuses_a_bomb_before_it_is_written(place: Place, bomb: bytes, why: str) -> None:
    with pytest.raises(JobError) as refusal:
        place.unpack(bomb, PROJECT_DIGEST, UnpackLimits(max_bytes=300 << 20, max_entries=1_000))
    assert why in refusal.value.words.lower()
    assert not place.target.exists()


@pytest.mark.parametrize(
    ("archive", "why"),
    [
        (b"", "ends too early"),
        (b"no gzip at all" * 100, "cannot be decompressed"),
        (PROJECT_ARCHIVE[:-20], "cannot be decompressed"),
        (PROJECT_ARCHIVE[:-4], "cannot be decompressed"),
        (PROJECT_ARCHIVE + b"garbage", "cannot be decompressed"),
        (packed(member("a", b"x"), end=b""), "ends too early"),
        (packed(member("a", b"x"), end=bytes(1024) + member("b", b"y")), "something follows"),
        (packed(member("a", b"x"), end=bytes(1024)) + packed(member("b", b"y")), "something follows"),
        (packed(member("a", b"x"), end=bytes(20_000)), "something follows"),
        (PROJECT_ARCHIVE[:-8] + bytes(4) + PROJECT_ARCHIVE[-4:], "cannot be decompressed"),
    ],
)
def test_refuses_a_torn_or_padded_stream(place: Place, archive: bytes, why: str) -> None:
    with pytest.raises(JobError) as refusal:
        place.unpack(archive, digest_of([file_entry("a", b"x")]))
    assert why in refusal.value.words.lower()
    assert refusal.value.code == "SNAPSHOT_CORRUPT"
    assert not place.target.exists()


def test_refuses_another_snapshot_than_the_submitted_one(place: Place) -> None:
    swapped = packed(member("train.py", b"steal()"))
    with pytest.raises(JobError) as refusal:
        place.unpack(swapped, PROJECT_DIGEST)
    assert refusal.value.code == "SNAPSHOT_CORRUPT"
    assert PROJECT_DIGEST in refusal.value.words
    assert not place.target.exists()


@pytest.mark.parametrize(
    "other",
    [
        [member("a", b"x", mode=0o755)],
        [member("a", b"y")],
        [member("b", b"x")],
        [folder("a")],
        [link("a", "x")],
        [member("a", b"x"), folder("b")],
        [],
    ],
)
def test_the_digest_tells_content_kind_name_and_number_apart(place: Place, other: list[bytes]) -> None:
    digest = digest_of([file_entry("a", b"x")])
    with pytest.raises(JobError, match="Its digest is"):
        place.unpack(packed(*other), digest)
    place.unpack(packed(member("a", b"x")), digest)


def test_no_altered_byte_is_ever_accepted_as_another_project(place: Place, tmp_path: Path) -> None:
    """Each byte of the tar in turn: refused, or without effect on what is written (a time, an owner, padding)."""
    tar = gzip.decompress(PROJECT_ARCHIVE)
    chance = random.Random(7)
    accepted, refused = 0, set()
    for position in range(0, len(tar), 3):
        altered = bytearray(tar)
        altered[position] ^= chance.randrange(1, 256)
        target = tmp_path / "altered"
        try:
            entries = unpack(io.BytesIO(gzip.compress(bytes(altered), 0)), target, PROJECT_DIGEST)
        except JobError as error:
            refused.add((error.code, target.exists()))
        else:
            accepted += 1
            assert entries == tuple(entry for entry, _ in PROJECT)
            shutil.rmtree(target)
    assert refused == {("SNAPSHOT_CORRUPT", False)}
    assert accepted < len(tar) / 3 / 2  # padding and nothing else
    assert place.outside() == {"canary": b"untouched"}


def test_a_stream_cut_anywhere_leaves_nothing(place: Place) -> None:
    for length in range(0, len(PROJECT_ARCHIVE), 5):
        with pytest.raises(JobError) as refusal:
            place.unpack(PROJECT_ARCHIVE[:length], PROJECT_DIGEST)
        assert refusal.value.code == "SNAPSHOT_CORRUPT"
        assert not place.target.exists()


# ------------------------------------------------------------------------------------------------ where it is written


def test_an_empty_folder_that_was_there_is_used_and_stays(place: Place) -> None:
    """It may be a mount point, which cannot be removed."""
    place.target.mkdir()
    with pytest.raises(JobError):
        place.unpack(PROJECT_ARCHIVE, "sha256:" + "0" * 64)
    assert list(place.target.iterdir()) == []
    place.unpack(PROJECT_ARCHIVE, PROJECT_DIGEST)
    assert (place.target / "run.sh").exists()


def test_never_writes_into_a_folder_that_holds_something(place: Place) -> None:
    place.target.mkdir()
    (place.target / "theirs").write_text("keep")
    with pytest.raises(JobError, match="not an empty folder"):
        place.unpack(PROJECT_ARCHIVE, PROJECT_DIGEST)
    assert [path.name for path in place.target.iterdir()] == ["theirs"]


def test_never_writes_through_a_link_in_the_folder_s_place(place: Place, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place.target.symlink_to(elsewhere)
    with pytest.raises(JobError, match="not an empty folder"):
        place.unpack(PROJECT_ARCHIVE, PROJECT_DIGEST)
    assert list(elsewhere.iterdir()) == []


def test_a_place_that_cannot_be_written_is_not_a_corrupt_snapshot(place: Place) -> None:
    name = "n" * 300  # no file system takes a name of more than 255 bytes
    with pytest.raises(JobError) as failure:
        place.unpack(packed(member(name, b"x")), digest_of([file_entry(name, b"x")]))
    assert failure.value.code == "BOOTSTRAP"
    assert "too long" in failure.value.words
    assert not place.target.exists()
    with pytest.raises(JobError, match="cannot be unpacked to") as failure:
        unpack(io.BytesIO(PROJECT_ARCHIVE), place.target / "no" / "parent", PROJECT_DIGEST)
    assert failure.value.code == "BOOTSTRAP"


class _Breaking(io.BytesIO):
    """A stream that fails after its first bytes, as a download does."""

    def __init__(self, data: bytes, error: BaseException) -> None:
        super().__init__(data)
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= 60:
            raise self.error
        return super().read(60 if size is None or size < 0 else min(size, 60))


@pytest.mark.parametrize("error", [RuntimeError("the connection broke"), KeyboardInterrupt()])
def test_what_the_stream_raises_passes_and_nothing_is_left(place: Place, error: BaseException) -> None:
    with pytest.raises(type(error)):
        unpack(_Breaking(PROJECT_ARCHIVE, error), place.target, PROJECT_DIGEST)
    assert not place.target.exists()


# ------------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("path", "target", "safe"),
    [
        ("a", "b", True),
        ("a", ".", True),
        ("a", "a", True),
        ("d/a", "..", True),
        ("d/a", "../b/c", True),
        ("d/e/a", "../../b", True),
        ("a", "..", False),
        ("d/a", "../..", False),
        ("a", "", False),
        ("a", "/b", False),
        ("a", "b/..", False),
        ("d/a", "../b/../c", False),
        ("a", "./b", False),
        ("a", "b/", False),
        ("a", "b\0c", False),
    ],
)
def test_which_link_targets_are_safe(path: str, target: str, safe: bool) -> None:
    assert is_safe_target(path, target) is safe


def test_links_of_the_safe_form_never_resolve_to_outside(tmp_path: Path) -> None:
    """Random trees of folders and links, each link of a form that is accepted: the system resolves none to outside."""
    chance = random.Random(3)
    for number in range(60):
        root = tmp_path / str(number)
        folders = [""]
        links: list[tuple[str, str]] = []
        for step in range(25):
            parent = chance.choice(folders)
            path = f"{parent}/{step}".lstrip("/")
            if chance.random() < 0.4:
                folders.append(path)
                continue
            names = [str(chance.randrange(25)) for _ in range(chance.randrange(4))]
            target = "/".join([".."] * chance.randrange(4) + names) or "."
            if is_safe_target(path, target):
                links.append((path, target))
        for path in folders:
            (root / path).mkdir(parents=True, exist_ok=True)
        for path, target in links:
            (root / path).symlink_to(target)
        for path, _ in links:
            assert os.path.realpath(root / path).startswith(str(root))


def test_limits_are_exact_where_the_submitter_s_totals_are_known(place: Place) -> None:
    entries = [entry for entry, _ in PROJECT]
    size_bytes = sum(entry.size_bytes for entry in entries)
    ref = SnapshotRef(PROJECT_DIGEST, len(PROJECT_ARCHIVE), unpacked_bytes=size_bytes, entries=len(entries))
    assert place.unpack(PROJECT_ARCHIVE, PROJECT_DIGEST, UnpackLimits.of(ref)) == tuple(entries)
    for less in (UnpackLimits(max_bytes=size_bytes - 1), UnpackLimits(max_entries=len(entries) - 1)):
        with pytest.raises(JobError, match="more than"):
            unpack(io.BytesIO(PROJECT_ARCHIVE), place.target.with_name("less"), PROJECT_DIGEST, less)
    assert UnpackLimits.of(SnapshotRef(PROJECT_DIGEST, 1)) == UnpackLimits()


def test_needs_the_standard_library_and_two_modules_of_ours() -> None:
    code = (
        "import sys; before = set(sys.modules); import mlflow_remote_backend.runner.unpack\n"
        "new = {name for name in set(sys.modules) - before if name.split('.')[0] not in sys.stdlib_module_names}\n"
        "print(*sorted(new))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    package = "mlflow_remote_backend"
    assert set(loaded) <= {
        package,
        *(f"{package}.{name}" for name in ("errors", "job", "version", "runner", "runner.unpack")),
    }


def test_unpacks_from_a_stream_that_cannot_seek(place: Place) -> None:
    read: Callable[[int], bytes] = io.BytesIO(PROJECT_ARCHIVE).read

    class Stream:
        def read(self, size: int = -1) -> bytes:
            return read(min(size, 7) if size >= 0 else 7)

    unpack(Stream(), place.target, PROJECT_DIGEST)  # type: ignore[arg-type]
    assert (place.target / "run.sh").read_bytes() == b"#!/bin/sh\n"
