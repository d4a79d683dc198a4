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


def test_it_exits_1_with_the_reason_and_the_last_lines(sqlite_tracking, make_project, mlflow_run):
    done = mlflow_run(make_project("echo last words; exit 7"), "--backend", "remote")
    assert done.returncode == 1
    assert "exit code 7" in done.stderr.replace("exited with code 7", "exit code 7")
    assert "last words" in done.stderr
    assert "Traceback" not in done.stderr
    assert only_run().info.status == "FAILED"


def test_run_name_and_run_id_of_the_command_line_are_honoured(sqlite_tracking, make_project, mlflow_run):
    given = mlflow.MlflowClient().create_run("0").info.run_id
    project = make_project("echo x")
    assert mlflow_run(project, "--backend", "remote", "--run-id", given, "--run-name", "mine").returncode == 0
    run = only_run()
    assert (run.info.run_id, run.info.run_name) == (given, "mine")


def test_without_any_configuration_the_default_store_is_used(make_project, mlflow_run, workdir):
    done = mlflow_run(make_project("echo x"), "--backend", "remote")
    assert done.returncode == 0, done.stderr
    assert (workdir / "mlflow.db").exists()
