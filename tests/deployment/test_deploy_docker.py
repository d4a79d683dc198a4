"""Models served in containers of a real engine; the environment of the sample's model comes from the package index."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from deployment_contract import NAME, ONE, TargetContract
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException

from mlflow_remote_backend.compute.docker.engine import Endpoint, Engine
from mlflow_remote_backend.deployment import calling
from mlflow_remote_backend.deployment.docker import DockerKeep, DockerTarget, container, container_name
from mlflow_remote_backend.deployment.spec import NAME_LABEL, DeploymentSpec, ModelRef, Service
from mlflow_remote_backend.job import Resources

PYTHON_IMAGE = os.environ.get("MLFLOW_REMOTE_TEST_IMAGE", "local/python:3.11")
CACHE_VOLUME = "mlflow-remote-test-deployments"


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine.connect(Endpoint.from_options({}, os.environ))


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def cache_volume(engine):
    """Environments of this session, so that each is made once."""
    yield CACHE_VOLUME
    engine.remove_volume(CACHE_VOLUME)


@pytest.fixture
def config(cache_volume) -> dict:
    return {"docker": {"image": PYTHON_IMAGE, "env_cache": cache_volume}, "start_timeout": "120s"}


@pytest.fixture
def client(engine, monkeypatch, cache_folder):
    """Whatever a test deploys is deleted after it, and nothing may be left."""
    monkeypatch.setenv("MLFLOW_REMOTE_CACHE", str(cache_folder))
    made = get_deploy_client("remote:/docker")
    before = {each["Id"] for each in engine.containers(NAME_LABEL)}
    yield made
    for each in engine.containers(NAME_LABEL):
        if each["Id"] not in before:
            made.delete_deployment(each["Labels"][NAME_LABEL])
    assert {each["Id"] for each in engine.containers(NAME_LABEL)} == before


@pytest.fixture
def left(engine):
    return lambda: [each["Names"] for each in engine.containers(NAME_LABEL) if each["Labels"][NAME_LABEL] == NAME]


def spec(**fields) -> DeploymentSpec:
    options = {"image": PYTHON_IMAGE, "env_cache": CACHE_VOLUME, **fields.pop("options", {})}
    return DeploymentSpec("toy", ModelRef("models:/toy/1"), compute="docker", options=options, **fields)


def test_the_container_has_no_rights_and_no_secrets():
    from mlflow_remote_backend.compute.docker.request import Image

    document = container(spec(secret_names=("PASSED",), env_vars={"A": "visible-nowhere"}), Image(id="sha256:1"), 20001)
    host = document["HostConfig"]
    assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges"])
    assert document["User"] == "65532:65532"
    assert host["PortBindings"] == {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": "20001"}]}
    assert not host.get("Binds")
    assert "Env" not in document
    assert "visible-nowhere" not in json.dumps(document)


def test_a_user_of_the_image_is_kept_unless_it_is_root():
    from mlflow_remote_backend.compute.docker.request import Image

    assert container(spec(), Image(user="1000:1000"), 1)["User"] == "1000:1000"
    assert container(spec(), Image(user="root"), 1)["User"] == "65532:65532"
    assert container(spec(options={"user": "7"}), Image(user="1000"), 1)["User"] == "7"


def test_limits_are_the_containers():
    from mlflow_remote_backend.compute.docker.request import Image

    made = container(spec(resources=Resources(cpu=1.5, memory_bytes=2**30)), Image(), 1)["HostConfig"]
    assert (made["CpuPeriod"], made["CpuQuota"], made["Memory"], made["MemorySwap"]) == (100_000, 150_000, 2**30, 2**30)
    assert "NanoCpus" not in made


def test_what_a_running_container_cannot_become_is_refused():
    target = DockerTarget({})
    target.refuse_change(None, spec(), spec(workers=3, description="other"))
    with pytest.raises(Exception, match="cannot change service"):
        target.refuse_change(None, spec(), spec(service=Service(port=20002)))
    with pytest.raises(Exception, match=r"cannot change docker\.user"):
        target.refuse_change(None, spec(), spec(options={"user": "7"}))


def test_a_file_that_is_replaced_while_it_is_read_is_read_again():
    """The engine packs a file by its name twice: first its size, then its content."""
    import io
    import tarfile

    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        member = tarfile.TarInfo("state.json")
        member.size = 2000
        archive.addfile(member, io.BytesIO(b"x" * 2000))

    answers = [whole.getvalue()[:1000], whole.getvalue()]

    class Torn:
        def copy_out(self, container: str, path: str):
            yield answers.pop(0)

    assert DockerKeep(Torn(), "c", NAME, (0, 0)).read("state.json") == b"x" * 2000


@pytest.mark.docker
@pytest.mark.registry
class TestDocker(TargetContract):
    pass


@pytest.mark.docker
@pytest.mark.registry
def test_limits_follow_an_update_and_are_whole_again_after_a_failed_one(client, config, make_model, engine):
    def limit() -> int:
        return engine.inspect(container_name(NAME))["HostConfig"]["Memory"]

    client.create_deployment(NAME, make_model("first"), config={**config, "memory_gb": 1})
    assert limit() == 2**30
    with pytest.raises(MlflowException, match="exit code 7"):
        client.update_deployment(NAME, make_model("broken", loads="os._exit(7)"), config={"memory_gb": 2})
    assert limit() == 2**30
    client.update_deployment(NAME, config={"memory_gb": 1.5})
    assert limit() == int(1.5 * 2**30)


@pytest.mark.docker
@pytest.mark.registry
def test_a_model_that_is_too_large_is_said_to_be_and_leaves_nothing(client, config, make_model, engine):
    greedy = make_model("greedy", loads="kept = [bytearray(os.urandom(1)) * (64 << 20) for _ in range(100)]")
    with pytest.raises(MlflowException, match="memory limit") as failed:
        client.create_deployment(NAME, greedy, config={**config, "resources": {"memory": "400Mi"}})
    assert failed.value.code == "OOM"
    assert engine.inspect(container_name(NAME)) is None


@pytest.mark.docker
@pytest.mark.registry
def test_an_environment_that_cannot_be_solved_is_said_before_anything_exists(client, config, make_model, engine):
    odd = make_model("odd", requirements=("numpy>=1000",))
    with pytest.raises(MlflowException, match="numpy"):
        client.create_deployment(NAME, odd, config=config)
    assert engine.inspect(container_name(NAME)) is None


def asked_inside(engine, name: str, token: str) -> tuple[int, dict]:
    """The request as it reaches an engine whose ports are out of reach."""
    keep = DockerKeep(engine, container_name(name), name, (0, 0))
    answer = keep._ask_inside("/invocations", calling.body_of(ONE), calling.JSON, token, 30)
    return answer.status, json.loads(answer.body)


@pytest.mark.docker
@pytest.mark.registry
def test_the_token_is_in_no_inspect_and_a_restart_of_the_container_serves_again(
    client, config, make_model, engine, monkeypatch, until
):
    monkeypatch.setenv("THE_TOKEN", "s3cret-token")
    made = client.create_deployment(NAME, make_model("guarded"), config={**config, "token_env": "THE_TOKEN"})
    assert calling.ask(made["url"], "/invocations", body=calling.body_of(ONE)).status == 401
    assert client.predict(NAME, ONE)["predictions"] == [1]
    assert asked_inside(engine, NAME, "s3cret-token") == (200, {"predictions": [1]})
    assert asked_inside(engine, NAME, "")[0] == 401
    assert "s3cret" not in json.dumps(engine.inspect(container_name(NAME)))
    engine.stop(container_name(NAME), 20)
    assert client.get_deployment(NAME)["state"] == "stopped"
    engine.start(container_name(NAME))
    until(lambda: client.get_deployment(NAME)["state"] == "ready", 60)
    assert client.predict(NAME, ONE)["predictions"] == [1]
