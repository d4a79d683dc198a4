"""The project's locked environment in a container: made once for each lock, offline, shared, or an image of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "environment"))

import channel as channels
from bench import Bench
from engine_proxy import engine_proxy
from wheels import Index, serving, wheel

from mlflow_remote_backend.compute.docker import request
from mlflow_remote_backend.compute.docker.engine import Endpoint, Engine, Refused
from mlflow_remote_backend.job import EnvironmentRef

pytestmark = pytest.mark.docker

SHOW = """
import json, sys, os
import toylib, needed
print(json.dumps([sys.prefix, toylib.__version__, needed.__version__, os.environ.get("CONDA_PREFIX")]), flush=True)
open(os.path.join(sys.prefix, "may-i-write"), "w")
"""


@pytest.fixture(scope="module")
def image_python(python_image) -> tuple[str, str]:
    """The path and version of the interpreter in the image."""
    program = "import os, sys; print(os.path.realpath(sys.executable), '.'.join(map(str, sys.version_info[:3])))"
    command = ["docker", "run", "--rm", "--network", "none", python_image, "python3", "-c", program]
    path, version = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return path, version


def python_of_the_image(path: str, version: str) -> channels.CondaPackage:
    """A conda package ``python`` that stands on the image's interpreter: a whole one would need the same C library."""
    minor = version.rpartition(".")[0]
    config = f"home = {os.path.dirname(path)}\ninclude-system-site-packages = false\nversion = {version}\n"
    files = {
        "bin/python": channels.Entry(link=path),
        "bin/python3": channels.Entry(link="python"),
        f"bin/python{minor}": channels.Entry(link="python"),
        "pyvenv.cfg": channels.Entry(config.encode()),
        f"lib/python{minor}/site-packages/README.txt": channels.Entry(b"site-packages\n"),
        "etc/conda/env_vars.d/python.json": channels.Entry(json.dumps({"FROM_PACKAGE": "yes"}).encode()),
    }
    return channels.CondaPackage("python", version, files)


@pytest.fixture
def bench(tmp_path, monkeypatch, image_python):
    """A project, and a channel and an index on this machine's loopback, which no container reaches."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_", "CONDA_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("MLFLOW_REMOTE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "channel"
    for package in (python_of_the_image(*image_python), channels.toy("toylib", "1.1")):
        channels.write_package(folder, package)
    pip = channels.bundled_wheel_package("pip")
    assert pip is not None
    channels.write_package(folder, pip)
    channels.index(folder)
    project = tmp_path / "declared"
    project.mkdir()
    known = {"needed": "2.0", "toylib": "1.1", "pip": "24.0", "setuptools": "70.0", "wheel": "0.43"}
    index = Index().add(*(wheel(name, version) for name, version in known.items()))
    with serving(index) as running:
        yield Bench(project, tmp_path / "cache", folder, running)


@pytest.fixture
def volume(engine: Engine):
    name = f"mlflow-remote-test-{uuid.uuid4().hex[:8]}"
    yield name
    engine.remove_volume(name)


def test_a_conda_environment_is_made_once_and_shared(make_job, bench, volume) -> None:
    ref = bench.conda(f"python={channels.PYTHON_MINOR}", "toylib", pip=("needed",)).lock()
    options = {"env_cache": volume}
    first = make_job("python main.py", files={"main.py": SHOW}, environment=ref, options=options)
    assert first.run().exit_code == 1, first.log()
    prefix = f"/mlflow-remote/envs/{ref.lock_key}"
    assert json.loads(first.log().splitlines()[0]) == [prefix, "1.1", "2.0", prefix]
    assert b"Read-only file system" in first.log()
    fetched = len(bench.index.requests)
    second = make_job("toylib; echo $FROM_PACKAGE", environment=ref, options=options)
    assert second.run().exit_code == 0, second.log()
    assert second.log() == b"toylib 1.1\nyes\n"
    assert len(bench.index.requests) == fetched
    assert not any("making" in detail for detail in second.details)


def test_a_virtual_environment_stands_on_the_images_python(make_job, bench, volume) -> None:
    ref = bench.python_env("needed", "toylib").lock()
    job = make_job("python main.py", files={"main.py": SHOW}, environment=ref, options={"env_cache": volume})
    assert job.run().exit_code == 1, job.log()
    prefix = f"/mlflow-remote/envs/{ref.lock_key}"
    assert json.loads(job.log().splitlines()[0])[:3] == [prefix, "1.1", "2.0"]


def test_an_environment_that_cannot_be_made_says_why_and_leaves_nothing(make_job, bench, volume, shell_image) -> None:
    ref = bench.python_env("needed").lock()
    job = make_job("true", environment=ref, image=shell_image, options={"env_cache": volume})
    failed = job.prepare_failed()
    assert failed["reason"] == "ENVIRONMENT"
    assert "no Python 3.10" in failed["words"]


def test_a_package_that_was_changed_is_refused(make_job, bench, volume) -> None:
    ref = bench.python_env("needed").lock()
    name = next(name for name in bench.index.files if name.startswith("needed-2.0"))
    bench.index.files[name] = b"something else"
    job = make_job("true", environment=ref, options={"env_cache": volume})
    failed = job.prepare_failed()
    assert failed["reason"] == "ENVIRONMENT"
    assert "sha256" in failed["words"]


@pytest.fixture
def built_images(engine, client):
    """``built_images(ref)``: the images of an environment; all are gone after the test."""
    asked: list[EnvironmentRef] = []

    def of(ref: EnvironmentRef) -> list[Any]:
        asked.append(ref)
        return engine.images(f"{request.ENVIRONMENT_LABEL}={ref.lock_key}")

    yield of
    for ref in tuple(asked):
        for each in of(ref):
            client.remove_image(each["Id"], force=True)


def test_build_makes_an_image_by_lock_key_and_nothing_for_a_code_change(
    make_job, bench, engine, client, built_images
) -> None:
    ref = bench.python_env("needed", "toylib").lock()
    assert built_images(ref) == []
    options = {"build": True, "user": "1000:1000"}
    job = make_job("python main.py", files={"main.py": SHOW}, environment=ref, options=options)
    assert job.run().exit_code == 1, job.log()
    assert json.loads(job.log().splitlines()[0])[1:3] == ["1.1", "2.0"]
    assert b"Permission denied" in job.log()
    (made,) = built_images(ref)
    command = "python -c 'import needed'; cat new"
    changed = make_job(command, files={"new": "code"}, environment=ref, options=options)
    assert changed.run().exit_code == 0, changed.log()
    assert changed.log() == b"code"
    assert built_images(ref) == [made]
    size_bytes = client.inspect_image(made["Id"])["Size"] - client.inspect_image(job.spec.options["image"])["Size"]
    assert size_bytes < 20_000_000, "neither our tools nor package caches are baked in"


def test_a_built_image_is_pushed_and_found_again(make_job, bench, client, registry, built_images) -> None:
    ref = bench.python_env("needed").lock()
    options = {"build": True, "repository": f"{registry}/team/{uuid.uuid4().hex[:8]}"}
    assert make_job("python -c 'import needed'", environment=ref, options=options).run().exit_code == 0
    (made,) = built_images(ref)
    assert made["RepoDigests"][0].startswith(f"{options['repository']}@sha256:")
    client.remove_image(made["Id"], force=True)
    again = make_job("python -c 'import needed'", environment=ref, options=options)
    assert again.run().exit_code == 0, again.log()
    assert not any("making" in detail for detail in again.details)
    assert [each["Id"] for each in built_images(ref)] == [made["Id"]]


def test_an_image_whose_push_failed_is_pushed_by_the_next_run(
    make_job, bench, registry, built_images, monkeypatch
) -> None:
    ref = bench.python_env("needed").lock()
    options = {"build": True, "repository": f"{registry}/team/{uuid.uuid4().hex[:8]}"}
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "push", _denied)
        assert "denied" in make_job("true", environment=ref, options=options).prepare_failed()["words"]
    assert make_job("true", environment=ref, options=options).run().exit_code == 0
    (made,) = built_images(ref)
    assert made["RepoDigests"][0].startswith(f"{options['repository']}@sha256:")


def test_an_engine_that_is_silent_while_it_makes_an_image_is_waited_for(engine, shell_image) -> None:
    name = f"mlflow-remote-test-{uuid.uuid4().hex[:8]}"
    container = engine.create(name, {"Image": shell_image})
    try:
        with engine_proxy() as proxy:
            impatient = Engine.connect(Endpoint(proxy.url), timeout_s=1)
            proxy.freeze()
            threading.Timer(2.5, proxy.thaw).start()
            made = impatient.commit(container, name, "1", {}, "")
        assert engine.image(f"{name}:1")["Id"] == made
    finally:
        engine.remove(container)
        engine.remove_image(f"{name}:1")


def _denied(*args: Any) -> None:
    raise Refused("The Docker engine could not push.", words="denied: requested access to the resource is denied")


def finished(project: Path, docker: dict[str, Any], environment: dict[str, Any]) -> Any:
    """A run of the project that has ended well."""
    import mlflow

    config = {"compute": "docker", "stream_output": False, "docker": {"network": "host", **docker}}
    run = mlflow.projects.run(
        str(project), backend="remote", synchronous=False, backend_config={**config, "environment": environment}
    )
    assert run.wait(), run.view().tag("message")
    return run


@pytest.mark.usefixtures("tracking", "no_leftovers")
def test_the_run_knows_the_image_built_for_it(bench, make_project, python_image, registry, built_images) -> None:
    bench.python_env("needed")
    files = {"python_env.yaml": (bench.project / "python_env.yaml").read_bytes()}
    project = make_project("python -c 'import needed'", files=files, python_env="python_env.yaml")
    options = {"image": python_image, "build": True, "repository": f"{registry}/team/{uuid.uuid4().hex[:8]}"}
    run = finished(project, options, {"index_url": bench.index.url})
    (made,) = built_images(bench.python_env("needed").lock())
    assert made["RepoDigests"][0].rpartition("@")[2] == run.view().tag("image")


@pytest.mark.usefixtures("tracking", "no_leftovers")
@pytest.mark.parametrize("declared", ["conda", "python_env"])
def test_a_project_runs_in_its_environment_from_one_call(bench, make_project, python_image, volume, declared) -> None:
    if declared == "conda":
        bench.conda(f"python={channels.PYTHON_MINOR}", "toylib", pip=("needed",))
    else:
        bench.python_env("needed", "toylib")
    name = f"{declared}.yaml"
    files = {name: (bench.project / name).read_bytes(), "main.py": SHOW}
    project = make_project("python main.py || true", files=files, **{f"{declared.removesuffix('_env')}_env": name})
    places = {"channel_map": {"conda-forge": bench.channel.as_uri()}, "index_url": bench.index.url}
    run = finished(project, {"image": python_image, "env_cache": volume}, places)
    view = run.view()
    prefix, toylib, needed, _ = json.loads(next(run.logs()))
    assert (prefix, toylib, needed) == (f"/mlflow-remote/envs/{view.tag('environment')}", "1.1", "2.0")
    assert view.metrics["remote/seconds_environment"] > 0
