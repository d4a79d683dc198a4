"""Models served by this machine, through MLflow's own interface: from Python, and from its command line."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import mlflow
import pandas
import pytest
from click.testing import CliRunner
from mlflow.deployments import get_deploy_client
from mlflow.deployments.cli import commands
from mlflow.exceptions import MlflowException

from mlflow_remote_backend import cli
from mlflow_remote_backend.deployment import calling
from mlflow_remote_backend.deployment.kept import KeptTarget
from mlflow_remote_backend.deployment.server import keeper

pytestmark = pytest.mark.usefixtures("no_leftovers")
HERE = {"env_manager": "local"}


@pytest.fixture
def client(home):
    """Whatever a test deploys is deleted after it."""
    made = get_deploy_client("remote:/local")
    yield made
    for each in made.list_deployments():
        made.delete_deployment(each["name"])


def state_folder(home) -> Path:
    return home.state / "mlflow-remote" / "deployments"


ONE = pandas.DataFrame({"x": [0.0]})


def test_a_registered_model_says_where_it_came_from(trained):
    version = mlflow.MlflowClient().get_model_version("diabetes", "1")
    run = mlflow.get_run(trained.run_id)
    assert version.tags["who"] == "test"
    assert version.tags["mlflow_remote.run_id"] == trained.run_id
    assert version.tags["mlflow_remote.snapshot"] == run.data.tags["mlflow_remote.snapshot"]
    assert "mlflow_remote.environment" in version.tags
    assert mlflow.MlflowClient().get_model_version_by_alias("diabetes", "champion").version == version.version


def test_train_register_deploy_predict_update_delete(trained, client, home, capfd):
    made = client.create_deployment("diabetes", trained.model, config={**HERE, "tags": {"owner": "ada"}})
    assert (made["state"], made["model_version"], made["run_id"]) == ("ready", "diabetes/1", trained.run_id)
    assert made["flavor"] == "python_function"
    assert made["url"].startswith("http://127.0.0.1:")
    assert made["origin"]["mlflow_remote.run_id"] == trained.run_id
    shown = capfd.readouterr().err
    assert "loading the model" in shown
    assert "Application startup complete" in shown

    answer = client.predict("diabetes", trained.data)
    assert list(answer["predictions"]) == pytest.approx(trained.predicted, rel=1e-12)
    split = trained.data.to_dict(orient="split")
    as_dict = client.predict("diabetes", {"dataframe_split": {"columns": split["columns"], "data": split["data"]}})
    assert as_dict == answer == client.predict("diabetes", json.dumps({"dataframe_split": split}))
    with pytest.raises(MlflowException, match="missing inputs"):
        client.predict("diabetes", trained.data.drop(columns=["bmi"]))

    later = client.update_deployment("diabetes", "models:/diabetes@champion", config={"workers": 2})
    assert (later["revision"], later["workers"], later["url"]) == (2, 2, made["url"])
    assert (later["tags"], later["model_uri"]) == ({"owner": "ada"}, "models:/diabetes@champion")
    assert client.predict("diabetes", trained.data) == answer
    assert client.get_deployment("diabetes")["revision"] == 2
    assert [each["name"] for each in client.list_deployments()] == ["diabetes"]

    client.delete_deployment("diabetes")
    client.delete_deployment("diabetes")
    assert client.list_deployments() == []
    assert not list(state_folder(home).iterdir())


def test_an_update_under_load_fails_not_one_request_and_a_broken_one_changes_nothing(client, make_model):
    made = client.create_deployment("toy", make_model("first", predicts="1"), config=HERE)
    answers, stop = [], threading.Event()

    def load() -> None:
        while not stop.is_set():
            try:
                answer = calling.ask(made["url"], "/invocations", body=calling.body_of(ONE), timeout_s=30)
                answers.append((answer.status, json.loads(answer.body)["predictions"]))
            except Exception as error:  # noqa: BLE001  whatever it is, it is a request that failed
                answers.append((0, repr(error)))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        with pytest.raises(MlflowException, match="no such luck") as broken:
            client.update_deployment("toy", make_model("broken", loads="raise RuntimeError('no such luck')"))
        client.update_deployment("toy", make_model("second", predicts="2"))
        count = len(answers)
        while len(answers) < count + 5:
            pass
    finally:
        stop.set()
        thread.join()
    assert "Revision 1 still serves" in str(broken.value)
    assert {status for status, _ in answers} == {200}, answers
    assert [said for _, said in answers][-1] == [2]
    assert client.get_deployment("toy")["revision"] == 2


BROKEN = {
    "a file is missing": ("open(path + '/nothing-here')", "lacks a file", "USER_ERROR"),
    "an import fails": ("import no_such_module", "no_such_module", "ENVIRONMENT"),
    "it takes too long": ("time.sleep(600)", "start_timeout", "START_TIMEOUT"),
    "it ends the process": ("os._exit(7)", "exit code 7", "USER_ERROR"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_model_is_diagnosed_and_leaves_nothing(client, make_model, home, how):
    loads, words, code = BROKEN[how]
    patience = "20s" if how != "it takes too long" else "3s"
    with pytest.raises(MlflowException, match=words) as failed:
        client.create_deployment("toy", make_model("broken", loads=loads), config={**HERE, "start_timeout": patience})
    assert failed.value.code == code
    assert "Nothing is left of it" in str(failed.value)
    assert not list(state_folder(home).iterdir())


def test_what_cannot_be_deployed_is_refused_before_anything_exists(client, make_model, home, tmp_path):
    with pytest.raises(MlflowException, match=r"cannot be fetched|refused"):
        client.create_deployment("toy", "models:/nobody-registered-this/1", config=HERE)
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


def test_a_slow_model_is_waited_for_and_a_taken_name_is_refused(client, make_model):
    slow = make_model("slow", loads="time.sleep(5)")
    client.create_deployment("toy", slow, config=HERE)
    with pytest.raises(MlflowException, match="There is a deployment toy on local already"):
        client.create_deployment("toy", slow, config=HERE)
    assert client.predict("toy", ONE)["predictions"] == [1]


def test_the_token_is_wanted_and_shown_nowhere(client, make_model, monkeypatch, home):
    monkeypatch.setenv("THE_TOKEN", "s3cret-token")
    monkeypatch.setenv("PASSED", "s3cret-value")
    predicts = "len(os.environ['PASSED'])"
    config = {**HERE, "token_env": "THE_TOKEN", "pass_env": ["PASSED"]}
    made = client.create_deployment("toy", make_model("guarded", predicts=predicts), config=config)
    assert made["guarded"] is True
    body = calling.body_of(ONE)
    for token in ("", "wrong", "s3cret-toke"):
        assert calling.ask(made["url"], "/invocations", body=body, token=token).status == 401
    assert calling.ask(made["url"], "/openapi.json").status == 401
    assert calling.ask(made["url"], "/ping").status == 200
    assert client.predict("toy", ONE)["predictions"] == [12]
    monkeypatch.delenv("THE_TOKEN")
    monkeypatch.delenv("PASSED")
    client.update_deployment("toy", config={"description": "the secrets stay"})
    assert client.predict("toy", ONE)["predictions"] == [12]
    assert calling.ask(made["url"], "/invocations", body=body).status == 401
    folder = state_folder(home) / "toy"
    secret = [path for path in folder.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert secret
    assert all(path.stat().st_mode & 0o077 == 0 for path in secret)
    assert "s3cret" not in (folder / "log").read_text()
    assert "s3cret" not in json.dumps(client.get_deployment("toy"))


def test_a_killed_keeper_takes_its_servers_along_and_an_update_starts_anew(client, make_model, home, until):
    client.create_deployment("toy", make_model("first"), config=HERE)
    state = json.loads((state_folder(home) / "toy" / "state.json").read_text())
    os.kill(state["pid"], signal.SIGKILL)
    until(lambda: not [pid for pid, line in home.processes().items() if "serve.py" in line])
    assert client.get_deployment("toy")["state"] == "stopped"
    assert client.update_deployment("toy")["state"] == "ready"
    assert client.predict("toy", ONE)["predictions"] == [1]


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
    monkeypatch.setattr(KeptTarget, "_roll", lambda *args: os._exit(9))
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


def test_importing_the_plugin_is_cheap():
    import subprocess

    program = "import sys, mlflow_remote_backend.deployment as d; print('mlflow' in sys.modules, dir(d))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False ['RemoteDeploymentClient', 'run_local', 'target_help']")
