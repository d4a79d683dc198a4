"""The docker compute's verbs against a real engine: what is refused before anything exists, who may do what later."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from mlflow_remote_backend import cli
from mlflow_remote_backend.compute.base import JobHandle, Secrets
from mlflow_remote_backend.compute.docker import DockerCompute, request
from mlflow_remote_backend.compute.docker import engine as engines
from mlflow_remote_backend.compute.docker.engine import Endpoint
from mlflow_remote_backend.errors import ComputeError, ConfigError, ProjectError
from mlflow_remote_backend.job import EnvironmentRef, Limits, Phase, Resources, Retry
from mlflow_remote_backend.runner.run_folder import RunFolder

pytestmark = pytest.mark.docker


@pytest.fixture
def run_project(make_project, python_image):
    """``run_project(command, docker={...}, **config)`` -> the submitted run, not waited for."""
    import mlflow

    def run(command: str, *, files=None, docker=None, **config):
        image, quiet = {"image": python_image, "network": "host"}, {"stream_output": False}
        return mlflow.projects.run(
            str(make_project(command, files=files or {})),
            backend="remote",
            backend_config={"compute": "docker", "docker": {**image, **(docker or {})}, **quiet, **config},
            env_manager="local",
            synchronous=False,
        )

    return run


def folder_of(run) -> RunFolder:
    return RunFolder(run.run_id)


def found_again(run) -> tuple[DockerCompute, JobHandle]:
    """As another process finds the job."""
    handle = JobHandle(run.view().tag("handle"), run.view().tag("job_uid"))
    return DockerCompute.from_handle(handle), handle


# -- refused before anything exists


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"resources": Resources(cpu=4096)}, ConfigError, "resources.cpu"),
        ({"resources": Resources(memory_bytes=1 << 50)}, ConfigError, "resources.memory"),
        ({"resources": Resources(memory_bytes=1 << 20)}, ConfigError, "6 MiB"),
        ({"options": {"network": "no-such-network"}}, ConfigError, "no-such-network"),
        ({"options": {"runtime": "no-such-runtime"}}, ConfigError, "no-such-runtime"),
        ({"options": {"image": "mlflow-remote-test/no-such-image:1", "pull": "never"}}, ComputeError, "no-such-image"),
        ({"options": {"args": {"no-such-argument": True}}}, ConfigError, "no-such-argument"),
        ({"tracking_uri": "http://localhost:5000"}, ConfigError, "docker.network"),
        ({"retry": Retry(3, ("disruption",))}, ConfigError, "retry"),
        ({"secret_refs": {"TOKEN": {"name": "a", "key": "b"}}}, ConfigError, "pass_env"),
        ({"docker_env": {"image": "i", "environment": ["NOT_SET_ANYWHERE"]}}, ProjectError, "NOT_SET_ANYWHERE"),
        ({"environment": EnvironmentRef("conda", "conda-lock", "f" * 64, "", "osx-arm64")}, ConfigError, "osx-arm64"),
    ],
)
def test_what_could_never_run_is_refused_before_anything_exists(make_job, tmp_path, fields, error, words) -> None:
    job = make_job("true", **fields)
    compute = DockerCompute(job.spec.options, tmp_path / "elsewhere")
    with pytest.raises(error) as refused:
        compute.check(compute.render(job.spec), Secrets())
    assert words in str(refused.value)
    assert not (tmp_path / "elsewhere" / "runs").exists()


def test_an_engine_that_is_not_there_is_named(make_job, tmp_path) -> None:
    job = make_job("true", options={"base_url": f"unix://{tmp_path}/no.sock"})
    compute = DockerCompute(job.spec.options, tmp_path)
    with pytest.raises(ComputeError, match=r"no\.sock does not answer") as refused:
        compute.check(compute.render(job.spec), Secrets())
    assert refused.value.transient


def test_what_changes_nothing_is_said(make_job, tmp_path) -> None:
    job = make_job("true", options={"args": {"t": True}, "build": True}, resources=Resources(ephemeral_storage_bytes=1))
    compute = DockerCompute(job.spec.options, tmp_path)
    notices = compute.check(compute.render(job.spec), Secrets({"HTTPS_PROXY": "http://localhost:1"}))
    assert len(notices) == 4


def test_a_context_names_the_engine(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")  # without it the SDK looks for contexts in the current folder
    address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    create = ["docker", "context", "create", "there", "--docker", f"host={address}"]
    subprocess.run(create, check=True, capture_output=True)
    assert address in DockerCompute({"context": "there"}).describe()
    with pytest.raises(ConfigError, match="nowhere"):
        DockerCompute({"context": "nowhere"}).describe()


def test_an_engines_own_ca_holds_whatever_others_use(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/ssl/certs/others.pem")
    for name in ("cert.pem", "key.pem", "ca.pem"):
        (tmp_path / name).touch()
    endpoint = Endpoint("tcp://127.0.0.1:2376", cert_path=str(tmp_path))
    client = engines._client(version="1.41", **endpoint.arguments())
    merged = client.merge_environment_settings(client.base_url, {}, None, None, None)
    assert merged["verify"] == str(tmp_path / "ca.pem")


def test_an_engine_stays_the_same_whatever_becomes_of_its_context(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    context = ["docker", "context"]
    subprocess.run([*context, "create", "there", "--docker", "host=tcp://127.0.0.1:1"], check=True, capture_output=True)
    recorded = {"endpoint": dataclasses.asdict(Endpoint.from_options({"context": "there"}, {}))}
    for change in (["update", "there", "--docker", "host=tcp://127.0.0.1:2"], ["rm", "there"]):
        subprocess.run([*context, *change], check=True, capture_output=True)
        assert Endpoint.from_options(recorded, {}).arguments()["base_url"] == "tcp://127.0.0.1:1"


# -- runs


@pytest.mark.usefixtures("no_leftovers")
def test_a_server_that_only_the_container_reaches_at_that_address(
    make_tracking_server, run_project, monkeypatch, until
) -> None:
    import mlflow

    server = make_tracking_server(host="0.0.0.0", options=("--allowed-hosts", "*"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    mlflow.set_tracking_uri(server.url)
    uri = f"http://host.docker.internal:{server.port}"
    try:
        run = run_project("echo $MLFLOW_TRACKING_URI", docker={"network": None}, tracking_uri=uri)
        until(lambda: run.view().ended)
        assert run.get_status() == "FINISHED"
        assert list(run.logs()) == [uri]
    finally:
        mlflow.set_tracking_uri("")


@pytest.mark.usefixtures("no_leftovers")
def test_a_docker_env_project_runs_from_the_command(
    tracking, mlflow_command, make_project, python_image, tmp_path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_text("from a volume\n")
    project = make_project(
        'cat /data/file; echo "$LITERAL $COPIED"',
        docker_env={
            "image": python_image,
            "volumes": [f"{data}:/data:ro"],
            "environment": [["LITERAL", "1"], "COPIED"],
        },
    )
    config = json.dumps({"compute": "docker"})
    options = ("run", project, "--backend", "remote", "--backend-config", config, "-A", "network=host", "-A", "t")
    done = mlflow_command(*options, env={"COPIED": "2"})
    assert done.returncode == 0, done.stderr
    assert "from a volume\n1 2\n" in done.stdout + done.stderr


@pytest.mark.usefixtures("no_leftovers")
def test_the_run_knows_its_image_and_its_container(tracking, run_project, python_image, client) -> None:
    run = run_project("echo hello")
    assert run.wait()
    view = run.view()
    assert view.tag("image") == client.inspect_image(python_image)["Id"]
    assert view.tag("handle").startswith("docker://")
    assert view.tag("handle").endswith(f"/mlr-{run.run_id}")


@pytest.mark.usefixtures("no_leftovers")
def test_a_sqlite_store_is_open_to_the_program(sqlite_tracking, run_project) -> None:
    script = """
import os, sqlite3
path = os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")
with sqlite3.connect(path) as database:
    insert = "insert into tags (key, value, run_uuid) values ('by', 'program', ?)"
    database.execute(insert, [os.environ["MLFLOW_RUN_ID"]])
"""
    run = run_project("python3 main.py", files={"main.py": script}, docker={"network": None})
    assert run.wait(), run.view().tag("message")
    with sqlite3.connect(sqlite_tracking.removeprefix("sqlite:///")) as database:
        found = database.execute("select value from tags where key = 'by' and run_uuid = ?", [run.run_id]).fetchall()
    assert found == [("program",)]


def test_submitting_twice_gives_one_job(make_job, engine, until) -> None:
    job = make_job("echo once; sleep 60", limits=Limits(finalize_timeout_s=0.1))
    archive = job.folder.root / "archive"
    job.folder.archive.rename(archive)
    job.folder.remove()
    compute = DockerCompute(job.spec.options, job.folder.root)
    bound = dataclasses.replace(compute.render(job.spec), archive=archive)
    first = compute.submit(bound, Secrets())
    second = DockerCompute(job.spec.options, job.folder.root).submit(bound, Secrets())
    assert first == second
    until(lambda: job.log() == b"once\n")
    mine = [each for each in engine.containers(request.RUN_LABEL) if job.name in each["Names"][0]]
    assert len(mine) == 1
    compute.cancel(first, grace_period_s=0)
    until(lambda: not job.folder.supervised())
    compute.collect(first)
    assert not job.folder.exists()


# -- after the supervisor


@pytest.mark.usefixtures("no_leftovers")
def test_a_killed_supervisor_is_replaced_and_nothing_is_lost(tracking, run_project, engine, until) -> None:
    run = run_project("echo before; while [ ! -e go ]; do sleep 0.1; done; echo after; echo r > outputs/f; exit 7")
    folder = folder_of(run)
    until(lambda: folder.said().get("phase") == "running")
    compute, handle = found_again(run)
    until(lambda: b"before\n" in b"".join(each.data for each in compute.logs(handle)))
    os.kill(int(folder.said()["pid"]), signal.SIGKILL)
    until(lambda: not folder.supervised())
    assert compute.status(handle).gone
    connection = engine.exec(request.container_name(run.run_id), ["touch", f"{request.WORK}/go"])
    list(connection.frames(10))
    connection.close()
    assert not run.wait()
    view = run.view()
    assert (view.status, view.tag("exit_code"), view.tag("reason")) == ("FAILED", "7", "USER_ERROR")
    from mlflow_remote_backend.testing import artifact, stored_log

    assert stored_log(run.run_id) == b"before\nafter\n"
    assert artifact(run.run_id, "outputs/f") == b"r\n"


@pytest.fixture
def abandoned(tracking, run_project, until):
    """A run whose container goes on without supervisor and run folder, as if its submitter's machine were gone."""
    run = run_project("echo here; sleep 600")
    folder = folder_of(run)
    until(lambda: folder.said().get("phase") == "running")
    _, handle = found_again(run)
    os.kill(int(folder.said()["pid"]), signal.SIGKILL)
    until(lambda: not folder.supervised())
    folder.remove()
    return run, JobHandle(handle.url, "another-machine/submission")


def test_another_machine_sees_the_container_and_guesses_nothing(abandoned, engine, client) -> None:
    run, handle = abandoned
    name = request.container_name(run.run_id)
    compute = DockerCompute.from_handle(handle)
    status = compute.status(handle)
    assert (status.phase, status.gone) == (Phase.RUNNING, False)
    client.pause(name)
    assert "paused" in compute.status(handle).detail
    elsewhere = dataclasses.replace(handle, url=handle.url.replace("docker://", "docker://other-"))
    with pytest.raises(ComputeError) as unknown:
        compute.status(elsewhere)
    assert unknown.value.transient
    compute.cancel(handle, grace_period_s=1)
    assert not engine.inspect(name)["State"]["Running"]
    assert not compute.status(handle).gone
    engine.remove(name)
    with pytest.raises(ComputeError) as gone:
        compute.status(handle)
    assert gone.value.transient
    engine.remove_volume(name)


def test_gc_removes_what_an_ended_run_left_and_nothing_else(abandoned, engine, capsys) -> None:
    run, _ = abandoned
    name = request.container_name(run.run_id)
    assert cli.main(["gc"]) == 0
    assert engine.inspect(name) is not None, "its run has not ended"
    import mlflow

    client = mlflow.MlflowClient()
    client.set_terminated(run.run_id, "FAILED")
    client.set_tag(run.run_id, "mlflow_remote.finalized", "somebody")
    capsys.readouterr()
    assert cli.main(["gc", "--dry-run"]) == 0
    assert name in capsys.readouterr().out
    assert engine.inspect(name) is not None
    assert cli.main(["gc"]) == 0
    assert name in capsys.readouterr().out
    assert engine.inspect(name) is None
    assert engine.volume(name) is None


@pytest.mark.usefixtures("sqlite_tracking")
def test_gc_does_without_an_engine_whose_context_is_gone(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("DOCKER_CONTEXT", "gone")
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    assert cli.main(["gc"]) == 0
    assert "gone" not in capsys.readouterr().out


@pytest.mark.usefixtures("tracking")
def test_gc_removes_kept_environments_only_when_asked(engine, monkeypatch) -> None:
    name = f"mlflow-remote-test-{os.getpid()}"
    kept = DockerCompute.caches  # others on this engine want to keep theirs
    monkeypatch.setattr(DockerCompute, "caches", lambda self: (each for each in kept(self) if each.name == name))
    engine.create_volume(name, {request.CACHE_LABEL: "environments"})
    try:
        assert cli.main(["gc"]) == 0
        assert engine.volume(name) is not None
        assert cli.main(["gc", "--cache"]) == 0
        assert engine.volume(name) is None
    finally:
        engine.remove_volume(name)


def test_importing_the_compute_loads_no_sdk() -> None:
    program = (
        "import sys, mlflow_remote_backend.compute.docker; "
        "print([name for name in ('docker', 'mlflow', 'requests') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
