"""A job outlives whoever dies: its submitter at any line, its supervisor, its program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from mlflow_remote_backend import gc
from mlflow_remote_backend.compute.local import LocalCompute
from mlflow_remote_backend.runner.run_folder import RunFolder, all_folders
from mlflow_remote_backend.runner.spool import Spool
from mlflow_remote_backend.submitted_run import attach
from mlflow_remote_backend.testing import ended, stored_log
from mlflow_remote_backend.tracking import Tracking

pytestmark = pytest.mark.usefixtures("no_leftovers")

SUBMITTER = Path(__file__).with_name("submitter.py")


@pytest.fixture(params=["fork", "spawn"])
def supervisor(request, monkeypatch):
    """Both ways in which a supervisor comes into being."""
    monkeypatch.setenv("MLFLOW_REMOTE_SUPERVISOR", request.param)
    return request.param


def submit(project, **config):
    return mlflow.projects.run(
        str(project),
        backend="remote",
        env_manager="local",
        synchronous=False,
        backend_config={"stream_output": False, **config},
    )


def all_runs():
    return mlflow.search_runs(search_all_experiments=True, output_format="list")


def folder_of(run):
    return RunFolder(run.run_id)


def supervisor_pid(run):
    return folder_of(run).said()["pid"]


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# -- the submitter dies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "points"), [("fork", 20), ("spawn", 4)])
def test_a_submitter_killed_at_any_line_leaves_a_run_that_ends_right_or_none(
    how, points, sqlite_tracking, make_project, home, tmp_path, monkeypatch
):
    """Each run either ran its program once and is FINISHED, or is closed, never ran it and says why."""
    monkeypatch.setenv("MLFLOW_REMOTE_SUPERVISOR", how)
    ran = tmp_path / "ran"
    ran.mkdir()
    project = make_project(f'echo once >> "{ran}/$MLFLOW_RUN_ID"')
    done = subprocess.run(
        [sys.executable, SUBMITTER, project, str(points)], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert report.count("killed") >= points - 1, report

    runs = [ended(attach(run.info.run_id)) for run in all_runs()]
    assert len(runs) > points // 3, report
    for view in runs:
        runs_of_program = (ran / view.run_id).read_text().count("once") if (ran / view.run_id).exists() else 0
        if view.status == "FINISHED":
            assert runs_of_program == 1
        else:
            assert (runs_of_program, view.tag("reason")) == (0, "BOOTSTRAP"), view
            assert "submitting process ended" in view.tag("message")
    assert {view.status for view in runs} == {"FINISHED", "FAILED"}, report
    list(gc.collect(Tracking(sqlite_tracking)))
    assert not list(all_folders())
    assert not list(home.temporary.iterdir())
