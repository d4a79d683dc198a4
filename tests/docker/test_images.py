"""The image of a job: found, pulled, or refused in the registry's own words."""

from __future__ import annotations

import base64
import json
import os
import socket
import time
import uuid

import pytest
from private_registry import PASSWORD, USER, private_registry

from mlflow_remote_backend.compute.docker import images
from mlflow_remote_backend.compute.docker.engine import Endpoint, Engine
from mlflow_remote_backend.errors import ComputeError, JobError

pytestmark = pytest.mark.docker


@pytest.fixture
def pushed(client, engine, registry, shell_image):
    """An image that is in the registry and not on the engine."""
    repository = f"{registry}/tests/{uuid.uuid4().hex[:8]}"
    client.tag(shell_image, repository, "1")
    client.push(repository, "1")
    client.remove_image(f"{repository}:1")
    yield f"{repository}:1"
    for each in client.images(name=repository):
        for name in (*(each.get("RepoTags") or ()), *(each.get("RepoDigests") or ())):
            if repository in name:
                engine.remove_image(name)


def test_an_image_on_the_engine_is_taken_as_it_is(engine, shell_image) -> None:
    found = images.obtain(engine, shell_image, say=lambda detail: pytest.fail(detail))
    assert found.id.startswith("sha256:")


def test_a_missing_image_is_pulled_and_known_by_its_digest(engine, pushed) -> None:
    said: list[str] = []
    known = images.look_up(engine, pushed, pull="missing", platform="linux/amd64", auth=None)
    assert engine.image(pushed) is None
    assert known.pinned == f"{pushed.rpartition(':')[0]}@{known.digest}"
    found = images.obtain(engine, known.pinned, say=said.append)
    assert found.digest == known.digest
    assert said[0] == f"pulling image {known.pinned}"
    again = images.look_up(engine, known.pinned, pull="missing", platform="", auth=None)
    assert (again.pinned, again.digest) == (found.id, known.digest)


def test_an_image_that_does_not_exist_is_refused_before_and_after(engine, registry) -> None:
    name = f"{registry}/tests/never:1"
    with pytest.raises(ComputeError) as before:
        images.look_up(engine, name, pull="missing", platform="", auth=None)
    with pytest.raises(JobError) as after:
        images.obtain(engine, name)
    assert before.value.code == after.value.code == "IMAGE_PULL"
    assert "manifest unknown" in after.value.words or "not found" in after.value.words


def test_an_image_that_must_not_be_pulled_is_not(engine, pushed) -> None:
    with pytest.raises(JobError, match="never"):
        images.obtain(engine, pushed, pull="never")


def test_an_image_for_another_platform_is_refused(engine, pushed) -> None:
    with pytest.raises(ComputeError, match="linux/s390x"):
        images.look_up(engine, pushed, pull="missing", platform="linux/s390x", auth=None)


def test_a_private_registry_opens_to_credentials_only(engine, client, registry, pushed) -> None:
    with private_registry(registry) as address:
        name = pushed.replace(registry, address)
        auth = {"username": USER, "password": PASSWORD, "registry": f"http://{address}"}
        with pytest.raises(JobError) as refused:
            images.obtain(engine, name)
        assert refused.value.code == "IMAGE_PULL"
        assert "docker login" in refused.value.hint
        assert images.look_up(engine, name, pull="missing", platform="", auth=auth).digest
        assert images.obtain(engine, name, auth=auth).id
        client.remove_image(name)


def test_credentials_go_to_their_own_registry_only(engine, registry, pushed) -> None:
    with private_registry(registry) as address:
        name = pushed.replace(registry, address)
        for elsewhere in ({}, {"registry": "other.example.com"}):
            auth = {"username": USER, "password": PASSWORD, **elsewhere}
            with pytest.raises(ComputeError, match="cannot be pulled"):
                images.look_up(engine, name, pull="missing", platform="", auth=auth)


def test_what_docker_login_left_opens_a_private_registry(registry, pushed, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with private_registry(registry) as address:
        credentials = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        (tmp_path / "config.json").write_text(json.dumps({"auths": {address: {"auth": credentials}}}))
        logged_in = Engine.connect(Endpoint.from_options({}, os.environ))
        name = pushed.replace(registry, address)
        assert images.look_up(logged_in, name, pull="missing", platform="", auth=None).digest
        assert images.obtain(logged_in, name).id
        logged_in.remove_image(name)


@pytest.mark.filterwarnings("ignore:docker-credential")
def test_a_credential_helper_that_is_not_there_has_no_credentials(pushed, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"credsStore": "no-such-helper"}))
    engine = Engine.connect(Endpoint.from_options({}, os.environ))
    assert images.look_up(engine, pushed, pull="missing", platform="", auth=None).digest
    assert images.obtain(engine, pushed).id
    engine.remove_image(pushed)


@pytest.mark.usefixtures("no_leftovers")
def test_a_run_pulls_its_image_with_docker_auth(tracking, engine, registry, pushed, make_project) -> None:
    import mlflow

    with private_registry(registry) as address:
        name = pushed.replace(registry, address)
        run = mlflow.projects.run(
            str(make_project("echo from a private registry", docker_env={"image": name})),
            backend="remote",
            backend_config={"compute": "docker", "docker": {"network": "host"}, "stream_output": False},
            docker_auth={"username": USER, "password": PASSWORD, "registry": f"http://{address}"},
            synchronous=False,
        )
        assert run.wait(), run.view().tag("message")
        assert list(run.logs()) == ["from a private registry"]
        assert run.view().tag("image").startswith("sha256:")
        engine.remove_image(f"{name.rpartition(':')[0]}@{run.view().tag('image')}")


def test_a_registry_that_is_down_is_tried_again_for_a_while(engine, monkeypatch) -> None:
    monkeypatch.setattr(images, "FIRST_PAUSE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    said: list[str] = []
    began = time.monotonic()
    with pytest.raises(JobError) as failed:
        images.obtain(engine, f"{address}/tests/x:1", patience_s=1.0, say=said.append)
    assert failed.value.code == "IMAGE_PULL"
    assert "connection refused" in failed.value.words
    assert any("trying again" in each for each in said)
    assert time.monotonic() - began < 60
    known = images.look_up(engine, f"{address}/tests/x:1", pull="missing", platform="", auth=None)
    assert "could not be asked" in known.notice
