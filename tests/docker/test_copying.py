"""Folders in and out of containers: what a hostile archive may not do, and bytes that must come through."""

from __future__ import annotations

import io
import os
import tarfile

import pytest

from mlflow_remote_backend.compute.docker import copying
from mlflow_remote_backend.compute.docker.copying import Item


def archive_of(*members: tuple[str, bytes | None, dict]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content, fields in members:
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content or b""))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[str, bytes | None, dict]:
    return name, b"", {"type": kind, "linkname": target}


def in_pieces(data: bytes, size: int = 700):
    return (data[start : start + size] for start in range(0, len(data), size))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    (tmp_path / "canary").write_text("untouched")
    yield folder
    assert (tmp_path / "canary").read_text() == "untouched"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["canary", "root"]


@pytest.mark.parametrize(
    "members",
    [
        [("outputs/../../canary", b"x", {})],
        [("/canary", b"x", {}), ("..", None, {})],
        [link("outputs/up", "../.."), ("outputs/up/canary", b"x", {})],
        [link("outputs/up", "/tmp"), ("outputs/up/canary", b"x", {})],
        [link("outputs/file", "../../canary"), ("outputs/file", b"x", {})],
        [link("outputs/hard", "outputs/../../canary", tarfile.LNKTYPE)],
        [("outputs/device", b"", {"type": tarfile.CHRTYPE})],
        [("outputs/fifo", b"", {"type": tarfile.FIFOTYPE})],
    ],
)
def test_nothing_is_written_outside(root, members) -> None:
    copying.unpack(in_pieces(archive_of(("outputs", None, {}), *members)), root, "outputs")
    for path in root.rglob("*"):
        assert not path.is_symlink() or not os.readlink(path).startswith(("/", "../.."))
        assert path.is_symlink() or path.is_dir() or path.is_file()


def test_setuid_bits_stay_behind(root) -> None:
    copying.unpack(in_pieces(archive_of(("outputs", None, {}), ("outputs/x", b"x", {"mode": 0o6755}))), root, "outputs")
    assert (root / "outputs/x").stat().st_mode & 0o7777 == 0o755


def test_what_was_there_before_is_replaced(root) -> None:
    (root / "outputs").mkdir()
    (root / "outputs/old").write_text("old")
    copying.unpack(in_pieces(archive_of(("outputs", None, {}), ("outputs/new", b"new", {}))), root, "outputs")
    assert [each.name for each in (root / "outputs").iterdir()] == ["new"]


def test_what_is_as_it_came_with_the_project_is_left_out(tmp_path) -> None:
    root, came = tmp_path / "root", tmp_path / "came"
    files = {"same": b"1", "changed": b"1", "deep/same": b"1", "gone": b"1"}
    for name, content in files.items():
        (root / "outputs" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "outputs" / name).write_bytes(content)
    untouched = [("same", b"1", {}), ("deep/same", b"1", {}), ("moved", b"1", {})]
    touched = [("changed", b"2", {"mtime": 1}), ("rewritten", b"1", {"mtime": 1})]
    links = [link("outputs/latest", "deep/same"), link("outputs/new", "changed")]
    links += [link("outputs/chain", "latest"), link("outputs/folder", "deep"), link("outputs/by-it", "folder/same")]
    links.append(link("outputs/hard", "outputs/same", tarfile.LNKTYPE))
    members = [("outputs", None, {}), *((f"outputs/{name}", *rest) for name, *rest in (*untouched, *touched)), *links]
    for _ in range(2):  # as after a connection that broke
        copying.set_aside(root / "outputs", came)
        copying.unpack(in_pieces(archive_of(*members)), root, "outputs", came)
        found = {each.name: each.read_bytes() for each in (root / "outputs").rglob("*") if each.is_file()}
        assert found == {"moved": b"1", "changed": b"2", "rewritten": b"1", "new": b"2", "hard": b"1"}
        assert [each.name for each in (root / "outputs").iterdir() if each.is_symlink() and not each.exists()] == []


def test_a_nested_output_folder_keeps_its_place(root) -> None:
    copying.unpack(in_pieces(archive_of(("b", None, {}), ("b/file", b"1", {}))), root, "a/b")
    assert (root / "a/b/file").read_bytes() == b"1"


def test_an_archive_that_breaks_off_is_an_error(root) -> None:
    whole = archive_of(("outputs", None, {}), ("outputs/x", b"x" * 5000, {}))
    with pytest.raises(OSError, match="cut off"):
        copying.unpack(in_pieces(whole[:3000]), root, "outputs")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, (1 << 20) + 7])
def test_a_folder_comes_through_byte_for_byte(tmp_path, size) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    names = ["plain", "with space", "new\nline", "é", os.fsdecode(b"\xff\xfe"), "long" * 50, "deep/" * 30 + "file"]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(os.urandom(size))
    (source / "link").symlink_to("plain")
    (source / "program").write_bytes(b"#!")
    (source / "program").chmod(0o755)
    packed = copying.pack([Item("outputs", source)], (1234, 4321))
    data = b"".join(packed)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert {(member.uid, member.gid) for member in archive} == {(1234, 4321)}
    copying.unpack(in_pieces(data, 100_000), root, "outputs")
    for name in names:
        assert (root / "outputs" / name).read_bytes() == (source / name).read_bytes()
    assert os.readlink(root / "outputs/link") == "plain"
    assert (root / "outputs/program").stat().st_mode & 0o777 == 0o755
