"""Prepare as a container's own program: what it leaves in the spool, and how it stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlflow_remote_backend import removal
from mlflow_remote_backend.job import EntryPoint, EnvironmentRef, JobSpec, RunRef, SnapshotRef
from mlflow_remote_backend.runner import envelope, prepare
from mlflow_remote_backend.runner.spool import Spool

Preparing = Callable[..., "subprocess.Popen[bytes]"]


def job(uri: str, environment: EnvironmentRef) -> JobSpec:
    run = RunRef("run", "0", "mlflow-artifacts:/0/run/artifacts", uri)
    snapshot = replace(SnapshotRef("sha256:" + "0" * 64, 1), uri="mlflow-artifacts:/0/run/artifacts/snapshot.tar.gz")
    return JobSpec(run, "submission", "project", EntryPoint("main", "true"), {}, snapshot, environment)


@pytest.fixture
def silent_server() -> Iterator[socket.socket]:
    """Takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def preparing(tmp_path: Path, silent_server: socket.socket) -> Iterator[Preparing]:
    """``preparing(**environ)``: prepare, at work on a snapshot that a server does not hand out."""
    uri = f"http://127.0.0.1:{silent_server.getsockname()[1]}"
    (tmp_path / "envelope.json").write_text(envelope.dump(job(uri, EnvironmentRef("local"))))
    started: list[subprocess.Popen[bytes]] = []

    def start(**environ: str) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-m", "mlflow_remote_backend.runner.prepare"]
        for name in ("spool", "work", "tools"):
            arguments += [f"--{name}", str(tmp_path / name)]
        arguments += ["--envelope", str(tmp_path / "envelope.json")]
        started.append(subprocess.Popen(arguments, env={**os.environ, **environ}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def failed(tmp_path: Path) -> dict[str, str]:
    prepared = Spool(tmp_path / "spool").prepared()
    assert prepared is not None
    assert prepared.failed is not None
    return dict(prepared.failed)


@pytest.mark.parametrize("how", ["SIGTERM", "cancel"])
def test_preparing_stops_when_it_is_told_to(
    preparing: Preparing, tmp_path: Path, silent_server: socket.socket, how: str, until: Any
) -> None:
    process = preparing()
    silent_server.settimeout(60)
    connection, _ = silent_server.accept()  # now it waits for the answer
    if how == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        Spool(tmp_path / "spool").request_cancel()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert failed(tmp_path)["reason"] == "TERMINATED"
    connection.close()


def test_a_submitter_of_another_release_is_told_what_to_do(preparing: Preparing, tmp_path: Path) -> None:
    assert preparing(MLFLOW_REMOTE_CLIENT_VERSION="0.0.7").wait(60) == 1
    told = failed(tmp_path)
    assert told["reason"] == "BOOTSTRAP"
    assert "the submitter 0.0.7" in told["message"]
    assert "mlflow-remote image build" in told["hint"]


@pytest.mark.parametrize("step", ["before", "environment"])
def test_what_a_cancelled_preparation_does_late_does_not_make_the_removed_folder_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder = tmp_path / "job"
    archive = tmp_path / "archive"
    archive.touch()

    def remove(*_: object) -> dict[str, str]:
        removal.delete(folder)
        return {}

    monkeypatch.setattr(prepare, "_unpack", lambda spec, place, archive: place.work)
    Spool.create(folder / "spool")
    if step == "before":
        remove()
    spec = job("http://127.0.0.1:9", EnvironmentRef("uv", lock_key="abc"))
    place = prepare.Place(folder / "spool", folder / "work", tmp_path / "cache", {}, archive, make_environment=remove)
    prepare.prepare(spec, place)
    assert not folder.exists()
