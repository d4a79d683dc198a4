"""An engine behind ssh. The ssh of the tests runs here what it is to run there."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from mlflow_remote_backend.compute.base import Secrets
from mlflow_remote_backend.compute.docker import DockerCompute, request
from mlflow_remote_backend.compute.docker.engine import Endpoint, Engine
from mlflow_remote_backend.errors import ComputeError, ConfigError

pytestmark = pytest.mark.docker


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch):
    """``ssh("shell lines")``: a program of that name; its calls stand in the returned file, one a line."""
    folder, called = tmp_path / "bin", tmp_path / "called"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def make(script: str) -> Path:
        (folder / "ssh").write_text(f'#!/bin/sh\necho "$*" >> {called}\nfor last; do :; done\n{script}\n')
        (folder / "ssh").chmod(0o755)
        return called

    return make


def test_a_job_runs_on_an_engine_behind_ssh(make_job, ssh) -> None:
    called = ssh('exec sh -c "$last"')
    job = make_job(
        "echo $TOKEN; echo r > outputs/f; exit 3",
        options={"base_url": "ssh://me@far:2222"},
        secrets={"TOKEN": "s3cret"},
    )
    assert job.run().exit_code == 3
    assert job.log() == b"s3cret\n"
    assert job.output("f") == b"r\n"
    assert "-l me -p 2222 -- far docker system dial-stdio" in called.read_text()
    assert "s3cret" not in called.read_text()


def test_a_connection_that_ssh_loses_is_made_anew(make_job, engine, ssh, until, tmp_path) -> None:
    ssh(f'echo $$ >> {tmp_path}/pids; exec sh -c "$last"')
    job = make_job("echo before; until [ -e stop ]; do sleep 0.1; done; echo after", options={"base_url": "ssh://far"})
    running = job.start()
    until(lambda: job.log() == b"before\n")
    assert {mount["Type"] for mount in engine.inspect(job.name)["Mounts"]} == {"volume"}
    for pid in (tmp_path / "pids").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    connection = engine.exec(job.name, ["touch", f"{request.WORK}/stop"])
    list(connection.frames(10))
    connection.close()
    assert job.end(running).exit_code == 0
    assert job.log() == b"before\nafter\n"


@pytest.mark.parametrize("uri", ["sqlite:////data/mlflow.db", "/data/mlruns", "http://localhost:5000"])
def test_what_a_container_elsewhere_cannot_reach_is_refused(make_job, ssh, uri, tmp_path) -> None:
    ssh('exec sh -c "$last"')
    job = make_job("true", options={"base_url": "ssh://far"}, tracking_uri=uri)
    compute = DockerCompute(job.spec.options, tmp_path)
    with pytest.raises(ConfigError, match="on another machine") as refused:
        compute.check(compute.render(job.spec), Secrets())
    assert refused.value.key == "tracking_uri"
    assert "both machines reach" in refused.value.hint or "the engine's machine reaches" in refused.value.hint


def test_what_ssh_says_is_said(ssh) -> None:
    ssh("echo 'ssh: Could not resolve hostname far' >&2; exit 255")
    with pytest.raises(ComputeError, match="ssh://far does not answer") as failed:
        Engine.connect(Endpoint("ssh://far"))
    assert failed.value.transient
    assert "Could not resolve hostname" in failed.value.words


def test_a_socket_of_another_name_is_told(ssh) -> None:
    called = ssh("exit 1")
    with pytest.raises(ComputeError):
        Engine.connect(Endpoint("ssh://far/run/user/1000/docker.sock"))
    assert "docker --host unix:///run/user/1000/docker.sock system dial-stdio" in called.read_text()


@pytest.mark.parametrize("url", ["ssh://", "ssh://me@", "ssh://far:port", "ssh://-oProxyCommand=touch"])
def test_an_address_that_is_none_is_refused(ssh, url) -> None:
    called = ssh("exit 1")
    with pytest.raises(ConfigError, match="no address"):
        Engine.connect(Endpoint(url))
    assert not called.exists()
