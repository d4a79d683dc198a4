"""Models served in containers of a real engine; the environment of the sample's model comes from the package index."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest
from deployment_contract import NAME, ONE, Load, TargetContract
from engine_proxy import engine_proxy
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException

from mlflow_remote_backend import cli
from mlflow_remote_backend.compute.docker import request
from mlflow_remote_backend.compute.docker.engine import Endpoint, Engine
from mlflow_remote_backend.deployment import calling, looking
from mlflow_remote_backend.deployment.docker import DockerKeep, DockerTarget, as_job, container, container_name, fixed
from mlflow_remote_backend.deployment.spec import NAME_LABEL, DeploymentSpec, ModelRef, Service
from mlflow_remote_backend.errors import ComputeError
from mlflow_remote_backend.job import Resources

PYTHON_IMAGE = os.environ.get("MLFLOW_REMOTE_TEST_IMAGE", "local/python:3.11")
CACHE_VOLUME = f"mlflow-remote-test-deployments-{os.getpid()}"


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
    yield made
    made.delete_deployment(NAME)
    assert not ours(engine)


def ours(engine: Engine) -> list[str]:
    """The containers of this test: others may deploy to this engine at the same time."""
    return [each["Names"][0] for each in engine.containers(NAME_LABEL) if each["Labels"][NAME_LABEL] == NAME]


@pytest.fixture
def left(engine):
    return lambda: ours(engine)


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
    assert host["ReadonlyRootfs"] is True
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


def test_what_only_another_container_can_have():
    def changed(**fields) -> set[str]:
        now, then = fixed(spec()), fixed(spec(**fields))
        return {key for key in now if now[key] != then[key]}

    assert not changed(workers=3, description="other", env_vars={"A": "1"}, timeout_s=3)
    assert changed(service=Service(port=20002)) == {"service.port"}
    assert changed(options={"user": "7"}) == {"docker.user"}
    assert changed(labels={"team": "a"}) == {"labels"}
    assert changed(resources=Resources(memory_bytes=1)) == {"resources.memory (a limit or none)"}


def test_a_file_that_is_replaced_while_it_is_read_is_read_again():
    """The engine packs a file by its name twice: first its size, then its content."""
    import io
    import tarfile

    def packed(content: bytes) -> bytes:
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as archive:
            member = tarfile.TarInfo("state.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return made.getvalue()

    content = json.dumps({"host": "x" * 2000}).encode()
    answers = [packed(content)[:1000], packed(content[:-1]), packed(content)]

    class Torn:
        def copy_out(self, container: str, path: str):
            yield answers.pop(0)

    assert DockerKeep(Torn(), "c", NAME, (0, 0)).read("state.json") == content


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
    before = inspected(engine)["Id"]
    client.update_deployment(NAME, config={"memory_gb": 1.25})
    assert limit() == int(1.25 * 2**30)
    assert inspected(engine)["Id"] != before  # it was seen to load within less
    with pytest.raises(MlflowException, match="memory limit"):
        client.update_deployment(NAME, config={"memory_gb": 0.05})
    assert limit() == int(1.25 * 2**30)
    assert client.predict(NAME, ONE)["predictions"] == [1]


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


@pytest.mark.docker
@pytest.mark.registry
def test_a_model_of_mlflow_2_is_refused_before_anything_exists(client, config, make_model, engine):
    """It has a scoring server of another kind, which would come up and not be found by the keeper."""
    old = Path(make_model("old"))
    declared = old / "requirements.txt"
    declared.write_text(declared.read_text().replace(mlflow.__version__, "2.22.0"))
    with pytest.raises(MlflowException, match=r"has mlflow-skinny 2\.22\.0.*MLflow 3 is needed") as refused:
        client.create_deployment(NAME, str(old), config=config)
    assert "Log the model anew" in str(refused.value)
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


def inspected(engine) -> dict:
    return engine.inspect(container_name(NAME))


@pytest.mark.docker
@pytest.mark.registry
def test_a_change_of_the_container_closes_its_port_for_two_seconds_at_most(client, config, make_model, engine, capfd):
    made = client.create_deployment(NAME, make_model("first", predicts="1"), config=config)
    first = inspected(engine)["Id"]
    with Load(made["url"]) as load:
        broken = make_model("broken", loads="raise RuntimeError('no such luck')")
        with pytest.raises(MlflowException, match=r"no such luck[^$]*") as failed:
            client.update_deployment(NAME, broken, config={"labels": {"team": "a"}})
        assert "Revision 1 still serves" in str(failed.value)
        assert {status for status, _ in load.answers} == {200}, load.answers
        assert inspected(engine)["Id"] == first
        later = client.update_deployment(
            NAME, make_model("second", predicts="2"), config={"labels": {"team": "a"}, "docker": {"user": "7:7"}}
        )
        load.until_more(5)
    shown = capfd.readouterr().err
    assert "another container is needed for docker.user, labels" in shown
    assert "2 s at most" in shown
    assert (later["url"], later["revision"]) == (made["url"], 2)
    assert load.answers[-1] == (200, [2])
    assert load.longest_gap_s() < 2
    now = inspected(engine)
    assert (now["Config"]["Labels"]["team"], now["Config"]["User"]) == ("a", "7:7")
    assert now["Id"] != first
    engine.stop(container_name(NAME), 20)
    client.update_deployment(NAME, config={"description": "started again, on the same port"})
    assert calling.ask(made["url"], "/ping").status == 200


@pytest.mark.docker
@pytest.mark.registry
def test_another_port_is_open_before_the_old_one_is_closed(client, config, make_model, engine):
    made = client.create_deployment(NAME, make_model("first", predicts="1"), config=config)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MlflowException, match="is taken on the engine"):
            client.update_deployment(NAME, config={"service": {"port": port}})
    assert calling.ask(made["url"], "/ping").status == 200
    later = client.update_deployment(NAME, config={"service": {"port": port}})
    assert later["url"] == f"http://127.0.0.1:{port}"
    assert client.predict(NAME, ONE)["predictions"] == [1]
    with pytest.raises(ComputeError, match="did not answer"):
        calling.ask(made["url"], "/ping")


@pytest.mark.docker
@pytest.mark.registry
def test_a_change_that_is_killed_is_taken_back_by_gc(client, config, make_model, engine, monkeypatch, capfd):
    """Killed at the worst moment: the old container is in no network any more, the new one has not its name."""
    made = client.create_deployment(NAME, make_model("first", predicts="1"), config=config)

    def dies(*args: object, **kwargs: object) -> None:
        raise Killed

    class Killed(BaseException):
        pass

    mend = DockerTarget.mend
    monkeypatch.setattr(DockerTarget, "_commit", dies)
    calls = []
    monkeypatch.setattr(
        DockerTarget, "mend", lambda self, name: calls.append(name) or (len(calls) == 1 and mend(self, name))
    )
    with pytest.raises(Killed):
        client.update_deployment(NAME, make_model("second", predicts="2"), config={"labels": {"team": "a"}})
    assert calls == [NAME, NAME]
    monkeypatch.setattr(DockerTarget, "mend", mend)
    assert engine.inspect(container_name(NAME) + ".next") is not None
    target = DockerTarget({})
    assert list(target.sweep(3600, dry_run=False)) == []
    assert f"half an update of {NAME}" in list(target.sweep(0, dry_run=True))
    assert f"half an update of {NAME}" in list(target.sweep(0, dry_run=False))
    assert calling.ask(made["url"], "/invocations", body=calling.body_of(ONE)).body == b'{"predictions": [1]}'
    assert engine.inspect(container_name(NAME) + ".next") is None


@pytest.mark.docker
@pytest.mark.registry
def test_two_changes_at_once_exclude_each_other_and_no_lock_outlives_its_holder(client, config, make_model, engine):
    client.create_deployment(NAME, make_model("first"), config=config)
    keep = DockerTarget({}).find(NAME)
    with keep.held(), pytest.raises(MlflowException, match="is being changed by another process"):
        client.update_deployment(NAME, config={"workers": 2})
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, keep.container], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(MlflowException, match="is being changed by another process"):
        client.update_deployment(NAME, config={"workers": 2})
    holder.kill()
    holder.communicate()
    assert client.update_deployment(NAME, config={"workers": 2})["workers"] == 2


STATES = """
import glob
input()
print([open(path).read().rsplit(")", 1)[1].split()[0] for path in glob.glob("/proc/[0-9]*/stat")])
"""
HOLDER = """
import os, sys
from mlflow_remote_backend.compute.docker.engine import Endpoint, Engine
from mlflow_remote_backend.deployment.docker import DockerKeep
keep = DockerKeep(Engine.connect(Endpoint.from_options({}, os.environ)), sys.argv[1], "x", (0, 0))
with keep.held():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.docker
@pytest.mark.registry
def test_whoever_changes_what_somebody_removes_is_told_so(client, config, make_model, capfd):
    first, slow = make_model("first"), make_model("slow", loads="time.sleep(60)")
    said = {}

    def change(verb, *arguments, **named) -> None:
        with pytest.raises(MlflowException) as failed:
            verb(NAME, *arguments, **named)
        said[verb.__name__] = str(failed.value)

    for verb, named in ((client.create_deployment, {"config": config}), (client.update_deployment, {})):
        if not named:
            client.create_deployment(NAME, first, config=config)
        changing = threading.Thread(target=change, args=(verb, slow), kwargs=named)
        capfd.readouterr()
        changing.start()
        shown = ""
        while "loading the model" not in shown and changing.is_alive():
            shown += capfd.readouterr().err
            time.sleep(0.05)
        get_deploy_client("remote:/docker").delete_deployment(NAME)
        changing.join(30)
    assert set(said.values()) == {f"Deployment {NAME} was removed by somebody while it was rolled out."}
    assert set(said) == {"create_deployment", "update_deployment"}
    assert "goes on" not in capfd.readouterr().err


@pytest.mark.docker
def test_what_a_killed_creator_left_of_an_environment_is_swept_once_it_does_not_run(engine, until):
    name = f"{request.container_name(as_job(spec()).run.run_id)}{request.BUILDER}"
    document = {"Image": PYTHON_IMAGE, "Entrypoint": ["sleep", "300"], "Labels": request.labels(as_job(spec()))}
    engine.create(name, document)
    try:
        target = DockerTarget({})
        assert f"container {name}" not in list(target.sweep(0, dry_run=False))  # somebody may be filling it
        engine.start(name)
        assert f"container {name}" not in list(target.sweep(0, dry_run=False))
        engine.kill(name)
        until(lambda: not engine.inspect(name)["State"]["Running"])
        assert f"container {name}" not in list(target.sweep(3600, dry_run=False))
        assert f"container {name}" in list(target.sweep(0, dry_run=False))
        assert engine.inspect(name) is None
    finally:
        engine.remove(name)


@pytest.mark.docker
@pytest.mark.registry
def test_only_its_own_folders_can_be_written_to_and_they_go_with_it(client, config, make_model, engine):
    loads = "import tempfile; tempfile.mkdtemp(); open('/tmp/x', 'w'); open(os.path.expanduser('~/x'), 'w')"
    client.create_deployment(NAME, make_model("writes", loads=loads), config=config)
    volumes = [each["Name"] for each in inspected(engine)["Mounts"] if each["Destination"] == "/mlflow"]
    assert engine.volume(volumes[0]) is not None
    with pytest.raises(MlflowException, match="Read-only file system"):
        client.update_deployment(NAME, make_model("spoils", loads="open('/var/tmp/x', 'w')"))
    client.delete_deployment(NAME)
    assert engine.volume(volumes[0]) is None


@pytest.mark.docker
@pytest.mark.registry
def test_orphans_of_a_server_do_not_stay_zombies(client, config, make_model, engine, until):
    client.create_deployment(NAME, make_model("first", loads="os.system('(sleep 0.1 &)')"), config=config)

    def states() -> list[str]:
        connection = engine.exec(container_name(NAME), ["python3", "-I", "-S", "-c", STATES])
        connection.send(b"speak\n")
        frames = connection.frames(20)
        return ast.literal_eval(b"".join(data for _, data in frames).decode())

    until(lambda: "Z" not in states())
    assert len(states()) == 3  # the keeper, its server, and who asks
    assert client.predict(NAME, ONE)["predictions"] == [1]


@pytest.mark.docker
@pytest.mark.registry
def test_an_engine_of_another_machine(config, make_model, monkeypatch, cache_folder, engine):
    """Reached over TCP at an address that is not this machine's own: the request goes through the engine."""
    monkeypatch.setenv("MLFLOW_REMOTE_CACHE", str(cache_folder))
    monkeypatch.setenv("THE_TOKEN", "s3cret-token")
    with engine_proxy("127.0.0.2") as elsewhere:
        monkeypatch.setenv("DOCKER_HOST", elsewhere.url)
        far = get_deploy_client("remote:/docker")
        try:
            far.create_deployment(NAME, make_model("first"), config={**config, "token_env": "THE_TOKEN"})
            assert far.predict(NAME, ONE)["predictions"] == [1]
            assert far.predict(NAME, ONE.loc[[0] * 5000])["predictions"] == [1] * 5000
            far.update_deployment(NAME, make_model("second", predicts="2"), config={"labels": {"team": "a"}})
            assert far.predict(NAME, ONE)["predictions"] == [2]
            elsewhere.freeze()
            began = time.monotonic()
            assert cli.main(["ls"]) == 0
            assert time.monotonic() - began < looking.PATIENCE_S + 10
            elsewhere.thaw()
        finally:
            elsewhere.thaw()
            far.delete_deployment(NAME)
    assert inspected(engine) is None
