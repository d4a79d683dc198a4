"""Submitting from Windows, as far as another system can stand in for it: without the modules, functions, constants and
signals that Windows lacks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from commands import LIKE_WINDOWS, MLFLOW, OURS, Command


@pytest.fixture
def mlflow_there(workdir: Path) -> Command:
    return Command((sys.executable, "-c", LIKE_WINDOWS + MLFLOW), workdir)


@pytest.fixture
def ours_there(workdir: Path) -> Command:
    return Command((sys.executable, "-c", LIKE_WINDOWS + OURS), workdir)


@pytest.mark.parametrize("compute", ["local", "docker"])
@pytest.mark.usefixtures("tracking")
def test_a_compute_that_needs_a_supervisor_says_what_it_needs(mlflow_there, make_project, compute) -> None:
    import mlflow

    project = make_project("echo hello")
    config = json.dumps({"compute": compute, "env_manager": "local"})
    done = mlflow_there("run", project, "--backend", "remote", "--backend-config", config)
    assert done.returncode != 0
    assert f"compute: {compute} needs Linux or macOS" in done.stderr
    assert "Traceback" not in done.stderr
    assert mlflow.search_runs([os.environ["MLFLOW_EXPERIMENT_ID"]], output_format="list") == []


@pytest.mark.usefixtures("tracking")
def test_runs_are_listed_and_shown(mlflow_there, ours_there, mlflow_run, make_project) -> None:
    assert mlflow_run(make_project("echo hello"), "--backend", "remote").returncode == 0
    listed = next(each for each in json.loads(ours_there("ls", "--json", check=True).stdout) if "status" in each)
    assert listed["status"] == "FINISHED"
    assert ours_there("logs", listed["run_id"], check=True).stdout == "hello\n"
