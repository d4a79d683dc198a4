"""``mlflow run --backend remote`` on this machine, from the outside: what it prints, where things are, how it exits."""

from __future__ import annotations

import mlflow
import pytest

pytestmark = pytest.mark.usefixtures("no_leftovers")


def only_run():
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return run


def test_it_streams_the_log_prints_where_the_run_is_and_exits_0(sqlite_tracking, make_project, mlflow_run):
    done = mlflow_run(make_project("echo hello; echo oops >&2"), "--backend", "remote")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hello\noops\n"
    run = only_run()
    assert run.info.run_id in done.stderr
    assert run.info.status == "FINISHED"


def test_it_exits_1_with_the_reason_and_the_last_lines_unless_they_were_shown(
    sqlite_tracking, make_project, mlflow_run
):
    project = make_project("echo last words; exit 7")
    silent = mlflow_run(project, "--backend", "remote", "--backend-config", '{"stream_output": false}')
    assert (silent.returncode, silent.stdout) == (1, "")
    assert "last words" in silent.stderr
    done = mlflow_run(project, "--backend", "remote")
    assert done.returncode == 1
    assert "exited with code 7" in done.stderr
    assert "last words" not in done.stderr
    assert "Traceback" not in done.stderr
    assert {run.info.status for run in mlflow.search_runs(search_all_experiments=True, output_format="list")} == {
        "FAILED"
    }


@pytest.mark.parametrize("how", [(), ("--tail", "5")])
def test_a_terminal_without_the_programs_characters_shows_the_rest(
    how, sqlite_tracking, make_project, mlflow_run, mlflow_remote
):
    screen = {"PYTHONIOENCODING": "cp1252"}
    done = mlflow_run(make_project("echo first; echo ✓; echo last"), "--backend", "remote", env=screen)
    assert done.stdout == "first\n?\nlast\n"
    shown = mlflow_remote("logs", *how, only_run().info.run_id, env=screen)
    assert (shown.returncode, shown.stdout) == (0, "first\n?\nlast\n"), shown.stderr


def test_run_name_and_run_id_of_the_command_line_are_honoured(sqlite_tracking, make_project, mlflow_run):
    given = mlflow.MlflowClient().create_run("0").info.run_id
    project = make_project("echo x")
    assert mlflow_run(project, "--backend", "remote", "--run-id", given, "--run-name", "mine").returncode == 0
    run = only_run()
    assert (run.info.run_id, run.info.run_name) == (given, "mine")


def test_without_any_configuration_the_default_store_is_used(make_project, mlflow_run, workdir):
    done = mlflow_run(make_project("echo x"), "--backend", "remote")
    assert done.returncode == 0, done.stderr
    assert (workdir / "mlflow.db").exists() or (workdir / "mlruns").exists()  # MLflow's default changed within 3.x


def test_outputs_that_came_with_the_project_are_no_outputs_of_the_run(sqlite_tracking, make_project, mlflow_run):
    project = make_project(
        "cat outputs/old.csv && echo new > outputs/new.csv && echo changed > outputs/both.csv",
        files={"outputs/old.csv": "old\n", "outputs/both.csv": "old\n"},
    )
    done = mlflow_run(project, "--backend", "remote")
    assert done.stdout == "old\n"
    stored = mlflow.MlflowClient().list_artifacts(only_run().info.run_id, "outputs")
    assert {each.path for each in stored} == {"outputs/new.csv", "outputs/both.csv"}


def test_where_the_time_went_is_in_the_metrics(sqlite_tracking, make_project, mlflow_run):
    mlflow_run(make_project("sleep 0.3"), "--backend", "remote", check=True)
    metrics = only_run().data.metrics
    names = {"snapshot", "environment", "start", "run", "upload"}
    assert {f"remote/seconds_{name}" for name in names} <= set(metrics)
    assert 0.3 <= metrics["remote/seconds_run"] < 30
    assert metrics["remote/seconds_start"] > 0
