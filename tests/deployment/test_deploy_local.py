"""Models served by this machine, through MLflow's own interface: from Python, and from its command line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from deployment_contract import ONE, Load, TargetContract
from mlflow.deployments import get_deploy_client
from mlflow.deployments.cli import commands
from mlflow.exceptions import MlflowException

from mlflow_remote_backend import cli, file_lock
from mlflow_remote_backend.deployment import calling, looking
from mlflow_remote_backend.deployment.kept import KeptTarget
from mlflow_remote_backend.deployment.local import FileTail, LocalTarget
from mlflow_remote_backend.deployment.server import keeper
from mlflow_remote_backend.errors import ComputeError, DeploymentFailed, RequestError

pytestmark = pytest.mark.usefixtures("no_leftovers")
HERE = {"env_manager": "local"}


@pytest.fixture
def client(home, monkeypatch):
    """Whatever a test deploys is deleted after it. No engine and no cluster: others may deploy there meanwhile."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{home.folder}/no-engine.sock")
    monkeypatch.setenv("KUBECONFIG", f"{home.folder}/no-cluster")
    made = get_deploy_client("remote:/local")
    yield made
    for each in made.list_deployments():
        made.delete_deployment(each["name"])


def state_folder(home) -> Path:
    return home.state / "mlflow-remote" / "deployments"


@pytest.fixture
def config():
    return HERE


@pytest.fixture
def left(home):
    return lambda: sorted(path.name for path in state_folder(home).iterdir())


class TestLocal(TargetContract):
    pass


def test_a_registered_model_says_where_it_came_from(trained):
    version = mlflow.MlflowClient().get_model_version("diabetes", "1")
    run = mlflow.get_run(trained.run_id)
    assert version.tags["who"] == "test"
    assert version.tags["mlflow_remote.run_id"] == trained.run_id
    assert version.tags["mlflow_remote.snapshot"] == run.data.tags["mlflow_remote.snapshot"]
    assert "mlflow_remote.environment" in version.tags
    assert mlflow.MlflowClient().get_model_version_by_alias("diabetes", "champion").version == version.version


def test_what_cannot_be_deployed_is_refused_before_anything_exists(client, make_model, home, tmp_path):
    with pytest.raises(MlflowException, match=r"cannot be fetched|refused"):
        client.create_deployment("toy", "models:/nobody-registered-this/1", config=HERE)
    with pytest.raises(MlflowException, match=r"Model \S*/no-folder cannot be fetched(.|\n)*or a folder"):
        client.create_deployment("toy", str(tmp_path / "no-folder"), config=HERE)
    (tmp_path / "no-model").mkdir()
    with pytest.raises(MlflowException, match="is no MLflow model"):
        client.create_deployment("toy", str(tmp_path / "no-model"), config=HERE)
    with pytest.raises(MlflowException, match="has no flavor onnx"):
        client.create_deployment("toy", make_model("first"), flavor="onnx", config=HERE)
    with keeper.listen("127.0.0.1", 0) as taken:
        config = {**HERE, "service": {"port": taken.getsockname()[1]}}
        with pytest.raises(MlflowException, match="cannot be taken"):
            client.create_deployment("toy", make_model("second"), config=config)
    assert not list(state_folder(home).iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "../elsewhere", "../../.."])
def test_what_is_no_name_deletes_nothing(client, home, name):
    kept = [state_folder(home) / "toy" / "spec.json", state_folder(home).parent / "elsewhere" / "file"]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.touch()
    with pytest.raises(MlflowException, match="cannot be a deployment's name"):
        client.delete_deployment(name)
    assert LocalTarget().find(name) is None
    assert all(path.exists() for path in kept)
    shutil.rmtree(state_folder(home) / "toy")


@pytest.mark.parametrize("host", ["::1", "::"])
def test_an_address_of_ipv6_is_served(client, make_model, host):
    made = client.create_deployment("toy", make_model("first"), config={**HERE, "service": {"host": host}})
    assert made["url"].startswith("http://[::1]:")
    assert client.predict("toy", ONE)["predictions"] == [1]


def test_the_old_token_is_used_until_the_new_version_serves_and_after_its_maker_died(
    client, make_model, monkeypatch, home, until
):
    monkeypatch.setenv("THE_TOKEN", "first-token")
    client.create_deployment("toy", make_model("first"), config={**HERE, "token_env": "THE_TOKEN"})
    broken = make_model("broken", loads="time.sleep(2); raise RuntimeError('no such luck')")
    monkeypatch.setattr(KeptTarget, "_await", lambda *args: os._exit(9))
    monkeypatch.setenv("THE_TOKEN", "second-token")
    child = os.fork()
    if child == 0:
        try:
            client.update_deployment("toy", broken, config={"token_env": "THE_TOKEN"})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert client.get_deployment("toy")["state"] == "updating"
    assert client.predict("toy", ONE)["predictions"] == [1]
    until(lambda: client.get_deployment("toy")["state"] == "ready")
    assert client.predict("toy", ONE)["predictions"] == [1]


def killed(monkeypatch, change) -> None:
    """A create or an update whose process dies while its model is loaded: the keeper goes on with it."""
    with monkeypatch.context() as patch:
        patch.setattr(KeptTarget, "_await", lambda *args: os._exit(9))
        child = os.fork()
        if child == 0:
            try:
                change()
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def loads_after(path: Path) -> str:
    return f'exec("while not os.path.exists({str(path)!r}): time.sleep(0.02)")'


@pytest.mark.parametrize("when", ["software", "_exchange"])
def test_a_killed_update_that_serves_after_all_is_not_taken_for_the_next_one(
    client, make_model, monkeypatch, tmp_path, until, when
):
    client.create_deployment("toy", make_model("first"), config=HERE)
    goes_on = tmp_path / "goes-on"
    second = make_model("second", predicts="2", loads=loads_after(goes_on))
    killed(monkeypatch, lambda: client.update_deployment("toy", second))

    def serves() -> None:
        goes_on.touch()
        until(lambda: client.get_deployment("toy")["revision"] == 2)
        until(lambda: client.predict("toy", ONE)["predictions"] == [2])

    following = make_model("following", predicts="3")
    with monkeypatch.context() as patch:
        does = getattr(LocalTarget, when)
        patch.setattr(LocalTarget, when, lambda *args: (serves(), does(*args))[1])
        if when == "software":
            with pytest.raises(MlflowException, match="was changed by somebody since it was looked at"):
                client.update_deployment("toy", following)
        else:
            client.update_deployment("toy", following)
    made = client.get_deployment("toy") if when == "_exchange" else client.update_deployment("toy", following)
    assert (made["revision"], made["state"], made["model_uri"]) == (3, "ready", following)
    until(lambda: client.predict("toy", ONE)["predictions"] == [3])


def test_an_update_after_a_killed_one_builds_on_what_serves(client, make_model, monkeypatch, home, tmp_path, until):
    monkeypatch.setenv("THE_TOKEN", "first-token")
    client.create_deployment("toy", make_model("first"), config={**HERE, "token_env": "THE_TOKEN"})
    monkeypatch.setenv("THE_TOKEN", "second-token")
    hangs = make_model("hangs", predicts="2", loads=loads_after(tmp_path / "never"))
    killed(monkeypatch, lambda: client.update_deployment("toy", hangs, config={"token_env": "THE_TOKEN"}))
    with pytest.raises(MlflowException, match=r"no such luck(.|\n)*Revision 1 still serves"):
        client.update_deployment("toy", make_model("broken", loads="raise RuntimeError('no such luck')"))
    until(lambda: client.get_deployment("toy")["state"] == "ready")
    until(lambda: len([line for line in home.processes().values() if "serve.py" in line]) == 1)
    killed(monkeypatch, lambda: client.update_deployment("toy", hangs, config={"token_env": "THE_TOKEN"}))
    made = client.update_deployment("toy", make_model("following", predicts="3"))
    assert made["state"] == "ready"
    asked = {"body": calling.body_of(ONE), "timeout_s": 60}
    assert calling.ask(made["url"], "/invocations", token="second-token", **asked).status == 401
    until(lambda: b"[3]" in calling.ask(made["url"], "/invocations", token="first-token", **asked).body)
    client.update_deployment("toy", config={"description": "one more"})
    kept = [path.name for path in (state_folder(home) / "toy" / "revisions").iterdir()]
    assert len(kept) == 2  # what serves, and what may still have requests to answer


def test_an_update_that_serves_and_cannot_be_reached_is_taken_back(client, make_model, monkeypatch, until):
    client.create_deployment("toy", make_model("first"), config=HERE)

    def not_reached(*args: object) -> None:
        raise DeploymentFailed("it serves, but does not answer from here")

    with monkeypatch.context() as patch:
        patch.setattr(LocalTarget, "_ask_once", not_reached)
        with pytest.raises(MlflowException, match="does not answer from here"):
            client.update_deployment("toy", make_model("second", predicts="2"))
    until(lambda: client.get_deployment("toy")["revision"] == 1)
    until(lambda: client.predict("toy", ONE)["predictions"] == [1])


def test_an_update_that_names_no_model_serves_the_same_one(client, sqlite_tracking, make_model, tmp_path, monkeypatch):
    registry = mlflow.MlflowClient()
    registry.create_registered_model("toy")
    for predicts in ("1", "2"):
        registry.create_model_version("toy", make_model(f"version-{predicts}", predicts=predicts))
    registry.set_registered_model_alias("toy", "champion", "1")
    client.create_deployment("toy", "models:/toy@champion", config=HERE)
    registry.set_registered_model_alias("toy", "champion", "2")
    made = client.update_deployment("toy", config={"description": "only words"})
    assert (made["model_uri"], made["model_version"]) == ("models:/toy@champion", "toy/1")
    assert client.predict("toy", ONE)["predictions"] == [1]
    assert client.update_deployment("toy", "models:/toy/latest")["model_version"] == "toy/2"

    make_model("third", predicts="3")
    monkeypatch.chdir(tmp_path)
    client.update_deployment("toy", "third-model")
    monkeypatch.chdir("/")
    client.update_deployment("toy", config={"description": "from elsewhere"})
    assert client.predict("toy", ONE)["predictions"] == [3]


def test_secrets_are_in_files_that_only_their_user_reads(client, make_model, monkeypatch, home):
    monkeypatch.setenv("THE_TOKEN", "s3cret-token")
    monkeypatch.setenv("PASSED", "s3cret-value")
    config = {**HERE, "token_env": "THE_TOKEN", "pass_env": ["PASSED"]}
    client.create_deployment("toy", make_model("guarded"), config=config)
    client.predict("toy", ONE)
    folder = state_folder(home) / "toy"
    secret = [path for path in folder.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert secret
    assert all(path.stat().st_mode & 0o077 == 0 for path in secret)
    assert "s3cret" not in (folder / "log").read_text()


def test_a_killed_keeper_takes_its_servers_along_and_an_update_starts_anew(client, make_model, home, until):
    client.create_deployment("toy", make_model("first"), config=HERE)
    state = json.loads((state_folder(home) / "toy" / "state.json").read_text())
    os.kill(state["pid"], signal.SIGKILL)
    until(lambda: not [pid for pid, line in home.processes().items() if "serve.py" in line])
    assert client.get_deployment("toy")["state"] == "stopped"
    with pytest.raises(MlflowException, match=r"toy is stopped.\n.*update starts it again"):
        client.predict("toy", ONE)
    assert client.update_deployment("toy")["state"] == "ready"
    assert client.predict("toy", ONE)["predictions"] == [1]


def test_another_address_is_served_before_the_old_one_is_closed(client, make_model, until):
    made = client.create_deployment("toy", make_model("first"), config=HERE)
    with keeper.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MlflowException, match="cannot be taken"):
            client.update_deployment("toy", config={"service": {"port": port}})
    assert calling.ask(made["url"], "/ping").status == 200
    moved = client.update_deployment("toy", config={"service": {"port": port}})
    assert moved["url"] == f"http://127.0.0.1:{port}"
    until(lambda: silent(made["url"]))
    with Load(moved["url"]) as load:
        client.update_deployment("toy", config={"service": {"host": "0.0.0.0"}})
        load.until_more(3)
    failed = [said for status, said in load.answers if status != 200]
    assert len(failed) <= 1, failed  # who comes at the very moment at which the old address is closed
    assert client.predict("toy", ONE)["predictions"] == [1]


def silent(url: str) -> bool:
    try:
        calling.ask(url, "/ping")
    except ComputeError:
        return True
    return False


def test_what_makes_no_sense_is_refused_in_words(client):
    for refuse in (
        lambda: client.explain("toy", ONE),
        lambda: list(client.predict_stream("toy", {})),
        lambda: client.create_endpoint("toy"),
        lambda: client.update_endpoint("toy"),
        lambda: client.delete_endpoint("toy"),
        lambda: client.create_deployment("toy", "m", endpoint="other"),
    ):
        with pytest.raises(MlflowException, match=r"MLflow's scoring server|own endpoint"):
            refuse()
    with pytest.raises(MlflowException, match="There is no deployment toy"):
        client.get_deployment("toy")
    with pytest.raises(MlflowException, match="There is no deployment toy"):
        client.update_deployment("toy")
    assert client.list_endpoints() == []


def test_the_command_line(make_model, mlflow_command, client, tmp_path, capsys):
    model = make_model("first", predicts="3")
    options = ("-t", "remote", "--name", "toy")

    def deployments(*arguments: str) -> str:
        done = CliRunner().invoke(commands, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    created = deployments("create", *options, "-m", model, "-C", "env_manager=local")
    assert "python_function deployment toy is created" in created
    again = mlflow_command("deployments", "create", *options, "-m", model, "-C", "env_manager=local")
    assert again.returncode == 1
    assert "There is a deployment toy on local already" in again.stderr
    assert "Traceback" not in again.stderr
    (tmp_path / "input.json").write_text('[{"x": 1.0}]')
    assert json.loads(deployments("predict", *options, "-I", str(tmp_path / "input.json"))) == {"predictions": [3]}
    for same in ('{"dataframe_split": {"columns": ["x"], "data": [[1.0]]}}', '{"dataframe_records": [{"x": 1.0}]}'):
        (tmp_path / "input.json").write_text(same)  # as the scoring server has it: MLflow's command makes a table of it
        assert json.loads(deployments("predict", *options, "-I", str(tmp_path / "input.json"))) == {"predictions": [3]}
    assert "toy" in deployments("list", "-t", "remote")
    assert "state: ready" in deployments("get", *options)
    assert "resources.memory=2Gi" in deployments("help", "-t", "remote")

    def remote(*arguments: str) -> str:
        capsys.readouterr()
        assert cli.main(list(arguments)) == 0
        return capsys.readouterr().out

    assert "toy" in remote("ls")
    listed = [each for each in json.loads(remote("ls", "--json")) if each.get("kind") == "deployment"]
    assert [(each["name"], each["state"]) for each in listed] == [("toy", "ready")]
    assert "model_uri" in remote("describe", "toy")
    assert json.loads(remote("describe", "--json", "deployment/toy"))["revision"] == 1
    assert "Application startup complete" in remote("logs", "toy")
    assert "is updated (with flavor python_function)" in deployments("update", *options, "-C", "description=new")
    assert "toy is deleted" in deployments("delete", *options)
    assert remote("ls").strip() == ""


def test_gc_removes_what_never_served_and_nothing_else(client, make_model, home, monkeypatch, capsys):
    client.create_deployment("toy", make_model("first"), config=HERE)
    monkeypatch.setattr(KeptTarget, "_roll", lambda *args, **kwargs: os._exit(9))
    child = os.fork()
    if child == 0:
        try:
            get_deploy_client("remote:/local").create_deployment("dead", make_model("second"), config=HERE)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert sorted(path.name for path in state_folder(home).iterdir() if path.is_dir()) == ["dead", "toy"]
    os.utime(state_folder(home) / "dead", (0, 0))
    assert cli.main(["gc", "--dry-run"]) == 0
    assert "dead on local: would be removed" in capsys.readouterr().out
    assert cli.main(["gc"]) == 0
    assert sorted(path.name for path in state_folder(home).iterdir() if path.is_dir()) == ["toy"]
    assert client.get_deployment("toy")["state"] == "ready"


def test_gc_removes_what_cannot_be_loaded_and_whose_creator_died(
    client, make_model, home, monkeypatch, tmp_path, capsys, until
):
    goes_on = tmp_path / "goes-on"
    broken = make_model("broken", loads=loads_after(goes_on) + "; raise RuntimeError('no such luck')")
    killed(monkeypatch, lambda: client.create_deployment("dead", broken, config=HERE))
    folder = state_folder(home) / "dead"
    os.utime(folder, (0, 0))
    assert cli.main(["gc"]) == 0  # it may serve yet
    assert folder.is_dir()
    goes_on.touch()
    until(lambda: json.loads((folder / "state.json").read_text())["failed"])
    assert cli.main(["gc"]) == 0
    assert folder.is_dir()  # whoever created it has that long to look at it
    os.utime(folder, (0, 0))
    capsys.readouterr()
    assert cli.main(["gc"]) == 0
    assert "dead on local" in capsys.readouterr().out
    assert not folder.exists()


def test_gc_leaves_what_has_served_and_cannot_be_started_again(client, make_model, home, until):
    with keeper.listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    made = client.create_deployment("toy", make_model("first"), config={**HERE, "service": {"port": port}})
    os.kill(json.loads((state_folder(home) / "toy" / "state.json").read_text())["pid"], signal.SIGKILL)
    until(lambda: silent(made["url"]))
    with keeper.listen("127.0.0.1", port):
        with pytest.raises(MlflowException, match="cannot be taken"):
            client.update_deployment("toy")
        until(lambda: client.get_deployment("toy")["state"] == "stopped")
        os.utime(state_folder(home) / "toy", (0, 0))
        assert cli.main(["gc"]) == 0
    assert client.update_deployment("toy")["state"] == "ready"


def test_places_that_do_not_answer_are_named_and_keep_nobody_waiting(client, make_model, tmp_path, monkeypatch, capsys):
    client.create_deployment("toy", make_model("first"), config=HERE)
    with socket.create_server(("127.0.0.1", 0)) as swallows, socket.create_server(("127.0.0.1", 0)) as refuses:
        silent, away = (each.getsockname()[1] for each in (swallows, refuses))
        refuses.close()
        named = "computes:\n  same: {compute: local}\n"
        for name, port in (("silent", silent), ("away", away)):
            named += f"  {name}: {{compute: docker, docker: {{base_url: 'tcp://127.0.0.1:{port}'}}}}\n"
        (tmp_path / "computes.yaml").write_text(named)
        monkeypatch.setenv("MLFLOW_REMOTE_CONFIG", str(tmp_path / "computes.yaml"))
        monkeypatch.setattr(looking, "PATIENCE_S", 2.0)
        capsys.readouterr()
        began = time.monotonic()
        assert cli.main(["ls", "--json"]) == 0
        assert time.monotonic() - began < 30  # an engine's own patience is 60 s
        shown = capsys.readouterr()
        assert [each["name"] for each in json.loads(shown.out)] == ["toy"]  # once, by whatever name of its place
        assert "silent did not answer within 2 s" in shown.err
        assert "away: The Docker engine" in shown.err
        with pytest.raises(MlflowException, match=r"no deployment other(.|\n)*silent did not answer"):
            get_deploy_client("remote").get_deployment("other")
        with pytest.raises(MlflowException, match="is not known"):
            get_deploy_client("remote").delete_deployment("other")


def test_importing_the_plugin_is_cheap():
    import subprocess

    program = "import sys, mlflow_remote_backend.deployment as d; print('mlflow' in sys.modules, dir(d))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False ['RemoteDeploymentClient', 'run_local', 'target_help']")


def test_a_lock_that_was_removed_when_it_was_let_go_holds_nobody(tmp_path, monkeypatch):
    one, other, third = (LocalTarget(tmp_path) for _ in range(3))
    try_lock = file_lock.try_lock
    with contextlib.ExitStack() as first:
        first.enter_context(one.changing("toy"))
        opened = []

        def lock_when_let_go(descriptor: int) -> bool:
            opened.append(descriptor)
            first.close()  # the first one removes the file that the other has open
            return try_lock(descriptor)

        monkeypatch.setattr(file_lock, "try_lock", lock_when_let_go)
        with other.changing("toy"), pytest.raises(RequestError, match="is being changed"), third.changing("toy"):
            pass
    assert len(opened) == 3  # the other one has opened it anew
    with one.changing("toy"):
        pass
    assert not list((tmp_path / "deployments").iterdir())


def test_what_a_server_wrote_before_its_log_is_closed_is_still_shown(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"loading\n")
    tail = FileTail(None, log, follow=True, tail=None)
    shown = iter(tail)
    assert next(shown) == b"loading\n"
    log.write_bytes(b"loading\nstarted\n")
    tail.close()
    assert list(shown) == [b"started\n"]
