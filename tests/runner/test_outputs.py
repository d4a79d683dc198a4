"""Which files of the program's output folders are uploaded, and what is said of the others."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mlflow_remote_backend.job import RunRef
from mlflow_remote_backend.runner.outputs import (
    OWN_FAULT_TRIES,
    OutputFile,
    Problem,
    Uploads,
    artifact_folder,
    find,
    storable,
)
from mlflow_remote_backend.runner.record import RecordError, RunRecord, Trouble


def found(work: Path, outputs: Sequence[str] = ("outputs",)) -> tuple[list[str], dict[str, str]]:
    """Artifact names of the files, and the problems by name."""
    all_found = list(find(work, outputs))
    files = [each.name for each in all_found if isinstance(each, OutputFile)]
    return files, {each.name: each.why for each in all_found if isinstance(each, Problem)}


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_files_keep_their_places(tmp_path: Path) -> None:
    for name in ("outputs/b", "outputs/a/deep/er", "outputs/a/ünï 🦀", "outputs/.hidden", "elsewhere/x"):
        write(tmp_path / name)
    files, problems = found(tmp_path)
    assert sorted(files) == ["outputs/.hidden", "outputs/a/deep/er", "outputs/a/ünï 🦀", "outputs/b"]
    assert problems == {}


def test_a_program_need_not_write_any(tmp_path: Path) -> None:
    assert found(tmp_path, ("outputs", "missing/deep")) == ([], {})


def test_other_folders_and_single_files(tmp_path: Path) -> None:
    for name in ("results/r", "a/b/c/x", "summary.txt", "logs/own.log"):
        write(tmp_path / name)
    files, problems = found(tmp_path, ("results", "a/b", "summary.txt", "logs"))
    assert files == ["results/r", "a/b/c/x", "summary.txt", "outputs/logs/own.log"]
    assert problems == {}


@pytest.mark.parametrize(
    ("output", "folder"),
    [
        ("outputs", "outputs"),
        ("./outputs/", "outputs"),
        ("results/x", "results/x"),
        (".", "outputs"),
        ("logs", "outputs/logs"),
        ("remote/x", "outputs/remote/x"),
    ],
)
def test_where_a_folder_lands(output: str, folder: str) -> None:
    assert artifact_folder(output) == folder


def test_links_are_not_followed_out_of_their_folder(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret", "secret")
    folder = tmp_path / "work" / "outputs"
    write(folder / "real/file")
    (folder / "inside").symlink_to("real/file")
    (folder / "to-secret").symlink_to(secret)
    (folder / "to-etc").symlink_to("/etc")
    (folder / "to-folder").symlink_to("real")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    files, problems = found(tmp_path / "work")
    assert sorted(files) == ["outputs/inside", "outputs/real/file"]
    assert set(problems) == {
        "outputs/to-secret",
        "outputs/to-etc",
        "outputs/to-folder",
        "outputs/dangling",
        "outputs/loop",
    }
    assert "out of" in problems["outputs/to-secret"]


def test_an_output_folder_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/secret")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/outputs").symlink_to(tmp_path / "elsewhere")
    files, problems = found(tmp_path / "work", ("outputs", "../elsewhere"))
    assert files == []
    assert len(problems) == 2


def test_what_could_block_is_never_opened(tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    write(folder / "file")
    os.mkfifo(folder / "pipe")
    (folder / "to-pipe").symlink_to("pipe")
    here = os.getcwd()
    os.chdir(folder)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
    finally:
        os.chdir(here)
    files, problems = found(tmp_path)
    assert files == ["outputs/file"]
    assert set(problems) == {"outputs/pipe", "outputs/socket", "outputs/to-pipe"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_an_unreadable_folder_is_told(tmp_path: Path) -> None:
    write(tmp_path / "outputs/closed/file")
    (tmp_path / "outputs/closed").chmod(0)
    try:
        _, problems = found(tmp_path)
    finally:
        (tmp_path / "outputs/closed").chmod(0o700)
    assert len(problems) == 1


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("plain.txt", "plain.txt"),
        ("ünï 🦀 50%.csv", "ünï 🦀 50%.csv"),
        ("a#b?c", "a~23b~3Fc"),
        ("a%20b", "a~2520b"),
        ("new\nline\ttab", "new~0Aline~09tab"),
        ("bad\udcff", "bad~FF"),
    ],
)
def test_names_that_no_artifact_can_have_are_changed(name: str, stored: str) -> None:
    assert storable(name) == stored


def test_a_file_that_alone_fails_is_given_up_and_an_outage_is_waited_for(tmp_path: Path, server_run: RunRef) -> None:
    """One name is never taken by the server; and for a while none is."""
    files = [OutputFile(write(tmp_path / name), "outputs") for name in ("first", "poison", "last")]
    tried: list[str] = []

    class Record(RunRecord):
        outage = 15

        def upload_file(self, path: Path, folder: str, name: str = "") -> None:
            tried.append(path.name)
            Record.outage -= 1
            if path.name == "poison" or Record.outage > 0:
                raise RecordError("it failed", Trouble.AWAY, "504 Gateway Time-out")
            super().upload_file(path, folder, name)

    record = Record(server_run)
    uploads = Uploads(record, time.monotonic() + 3600, lambda: record.upload(b"x", "logs/probe"), sleep=lambda s: None)
    (problem,) = uploads.run(iter(files))
    assert problem.name == "outputs/poison"
    assert not problem.temporary
    assert "504" in problem.why
    assert RunRecord(server_run).download("outputs/first") == b"x"
    assert RunRecord(server_run).download("outputs/last") == b"x"
    assert tried.count("poison") >= OWN_FAULT_TRIES
