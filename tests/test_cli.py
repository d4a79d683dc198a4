"""The ``mlflow-remote`` command: what each verb prints for people and for programs, and how it exits."""

from __future__ import annotations

import json
import sys

import mlflow
import pytest

from mlflow_remote_backend import cli
from mlflow_remote_backend.errors import RequestError
from mlflow_remote_backend.submitted_run import attach

pytestmark = pytest.mark.usefixtures("no_leftovers", "no_cluster")


@pytest.fixture
def no_cluster(monkeypatch):
    """Its client would keep certificate files until this process ends."""
    monkeypatch.delenv("KUBECONFIG", raising=False)


@pytest.fixture
def run(sqlite_tracking, make_project):
    """``run(command, …)`` submits a project and waits; its run id."""

    def submit(command: str, wait: bool = True, **options):
        config = {"stream_output": False, **options}
        project = make_project(command, name=f"p{abs(hash((command, wait)))}")
        submitted = mlflow.projects.run(
            str(project), backend="remote", env_manager="local", synchronous=False, backend_config=config
        )
        if wait:
            submitted.wait()
        return submitted.run_id

    return submit


@pytest.fixture
def remote(capsys):
    """``remote("status", run_id)`` -> exit status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_finished_run(run, remote):
    run_id = run("printf 'one\\ntwo\\n'; mkdir -p outputs; echo x > outputs/o.txt")
    assert remote("status", run_id)[0] == 0
    assert "FINISHED" in remote("status", run_id[:10])[1]
    assert remote("logs", run_id) == (0, "one\ntwo\n", "")
    assert remote("logs", "-f", run_id) == (0, "one\ntwo\n", "")
    for tail, shown in (("0", ""), ("1", "two\n"), ("3", "one\ntwo\n")):
        assert remote("logs", "--tail", tail, run_id) == (0, shown, "")
        assert remote("logs", "-f", "--tail", tail, run_id) == (0, shown, "")
    code, out, _ = remote("attach", run_id)
    assert (code, out) == (0, "one\ntwo\n")
    assert remote("cancel", run_id)[0] == 0
    assert json.loads(remote("status", "--json", run_id)[1])["status"] == "FINISHED"


def test_a_failed_run_exits_1_and_says_why(run, remote):
    run_id = run("echo oops; exit 3")
    code, out, _ = remote("status", run_id)
    assert code == 1
    assert "FAILED" in out
    assert "USER_ERROR" in out
    assert remote("attach", run_id)[0] == 1
    described = json.loads(remote("describe", "--json", run_id)[1])
    assert (described["exit_code"], described["reason"], described["phase"]) == ("3", "USER_ERROR", "done")
    assert "exit_code" in remote("describe", run_id)[1]


def test_a_running_run_is_cancelled(run, remote, until):
    run_id = run("echo started; sleep 3600", wait=False)
    until(lambda: "started" in remote("logs", run_id)[1])
    code, out, _ = remote("cancel", run_id)
    assert code == 0
    assert "KILLED" in out
    assert remote("attach", run_id)[0] == 1  # 130 is for who cancels it by Ctrl-C


def test_ls_lists_runs_newest_first(run, remote):
    first, second = run("true"), run("exit 1")
    listed = json.loads(remote("ls", "--json")[1])  # deployments of others on this engine, too
    assert [each["run_id"] for each in listed if each["run_id"]] == [second, first]
    for options, shown in (((), [second, first]), (("-n", "1"), [second]), (("--running",), [])):
        lines = remote("ls", *options)[1].splitlines()
        assert [each for line in lines for each in (first, second) if line.startswith(each[:12])] == shown


def test_register_makes_a_model_version(run, remote):
    script = (
        f'{sys.executable} -c "import mlflow, mlflow.pyfunc; '
        "mlflow.start_run(); "
        "mlflow.pyfunc.log_model(name='model', python_model=lambda model_input: model_input, pip_requirements=[])\""
    )
    run_id = run(script)
    assert remote("status", run_id)[0] == 0, remote("logs", run_id)[1]
    code, out, err = remote("register", run_id, "diabetes")
    assert (code, out) == (0, "diabetes version 1\n"), err
    version = mlflow.MlflowClient().get_model_version("diabetes", "1")
    assert version.run_id == run_id
    assert version.tags["mlflow_remote.snapshot"].startswith("sha256:")


def test_what_is_no_model_is_not_registered(run, remote):
    run_id = run("mkdir -p results; echo 1 > results/a", outputs=["results"])
    code, _, err = remote("register", run_id, "diabetes")
    assert (code, f"Run {run_id} has no model 'model'" in err) == (2, True), err
    assert list(mlflow.MlflowClient().search_registered_models()) == []
    with pytest.raises(RequestError, match=r"no folder outputs/\. It has: .*results"):
        attach(run_id).download_outputs()


def test_a_model_that_could_not_be_registered_is_told_of(run, remote):
    run_id = run("true", register_model={"name": "wished"})
    told = json.loads(remote("describe", run_id, "--json")[1])["register_error"]
    assert told.strip() == "The run has no model 'model'.", "nothing was away, and nothing was tried again"
    assert "has no model 'model'" in remote("describe", run_id)[1]
    assert list(mlflow.MlflowClient().search_registered_models()) == []


def test_gc_has_nothing_to_do_after_runs_that_ended(run, remote):
    run("true")
    assert remote("gc") == (0, "nothing to do\n", "")
    assert remote("gc", "--json")[1] == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "0123456789abcdef0123456789abcdef"], "0123456789abcdef"),
        (["status", "0123"], "the start of no run at sqlite"),
        (["status", "0123"], "Check the id"),
        (["status", "'; drop table runs; --"], "not a run id"),
        (["plan", "/no/such/project"], "no/such/project"),
        (["plan", ".", "-P", "alpha"], "NAME=VALUE"),
        (["plan", ".", "-c", "{"], "not a JSON object"),
    ],
)
def test_a_wrong_request_exits_2_with_a_sentence(sqlite_tracking, remote, arguments, words):
    code, out, err = remote(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_a_run_of_something_else_is_refused(sqlite_tracking, remote):
    other = mlflow.MlflowClient().create_run("0").info.run_id
    code, _, err = remote("status", other)
    assert code == 2
    assert "not submitted" in err


def test_a_tracking_server_that_is_away_exits_3(remote, monkeypatch):
    code, _, err = remote("status", "--tracking-uri", "http://127.0.0.1:9", "0123456789abcdef0123456789abcdef")
    assert code == 3
    assert "did not answer" in err


def test_plan_says_what_would_happen_and_does_nothing(sqlite_tracking, make_project, remote, home):
    project = make_project("echo {alpha}", parameters={"alpha": {"type": "float", "default": 0.5}})
    code, out, err = remote("plan", str(project), "--env-manager", "local")
    assert code == 0, err
    assert "echo {alpha}" in out
    assert "sha256:" in out
    planned = json.loads(remote("plan", "--json", str(project), "--env-manager", "local", "-P", "alpha=1")[1])
    assert planned["parameters"] == {"alpha": "1"}
    assert mlflow.search_runs(search_all_experiments=True, output_format="list") == []
    assert not list(home.state.rglob("envelope.json"))


@pytest.mark.parametrize(
    ("command", "words"),
    [('echo "{p}"', "double quotes"), ("echo {p} {q}", "KeyError: 'q'"), ("echo {p}" + "x" * 131072, "bytes long")],
)
def test_plan_refuses_what_a_run_would_refuse(sqlite_tracking, make_project, remote, command, words):
    project = make_project(command, parameters={"p": "string"})
    code, _, err = remote("plan", str(project), "--env-manager", "local", "-P", "p=$(touch /tmp/x)")
    assert code == 2
    assert words in err


def test_plan_shows_names_of_any_bytes_and_none_obeys(sqlite_tracking, make_project, remote):
    project = make_project(files={"caf\udce9": "", "\x1b]0;title\x07": "", "b.key\udce9": "", ".mlflowignore": "b*"})
    code, out, err = remote("plan", str(project), "--env-manager", "local")
    assert code == 0, err
    assert out.encode()
    assert "\x1b" not in out


def test_doctor_names_what_works(sqlite_tracking, remote):
    findings = {each["name"]: each for each in json.loads(remote("doctor", "--json")[1])}
    assert findings["mlflow"]["state"] == "ok"
    assert findings["tracking server"]["state"] == "ok"
    assert findings["docker"]["state"] in ("ok", "missing")
    assert "mlflow-remote" in remote("doctor")[1]


def test_schema_is_a_json_schema(remote):
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(json.loads(remote("schema")[1]))


def test_env_ls_and_prune_with_an_empty_cache(remote):
    assert remote("env", "ls", "--json") == (0, "[]\n", "")
    assert "0 environments" in remote("env", "prune", "--dry-run")[1]


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for verb in (
        "plan",
        "status",
        "logs",
        "attach",
        "cancel",
        "describe",
        "ls",
        "gc",
        "doctor",
        "schema",
        "lock",
        "env",
    ):
        assert verb in out
