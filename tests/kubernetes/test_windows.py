"""Submitting to a cluster from Windows, as far as another system can stand in for it (``like_windows.py``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import LIKE_WINDOWS, MLFLOW, OURS, Command

from mlflow_remote_backend.testing import Projects

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]


@pytest.fixture
def there(workdir: Path):
    return lambda program: Command((sys.executable, "-c", LIKE_WINDOWS + program), workdir)


def run(there, projects: Projects, script: str, *options: str, **config):
    project = projects.make(script)
    told = json.dumps({**projects.backend_config, **config})
    started = ("run", project, "--env-manager", "local", "--backend", "remote", "--backend-config", told, *options)
    return there(MLFLOW).start(*started)


def newest_run(there) -> dict:
    return next(each for each in json.loads(there(OURS)("ls", "--json", check=True).stdout) if "status" in each)


def test_a_run_is_submitted_followed_and_found_again(there, projects, pods_tracking) -> None:
    out, err = run(there, projects, "echo hello; exit 7", submission_id="once").communicate(timeout=120)
    assert "hello\n" in out, err
    assert "Traceback" not in err
    listed = newest_run(there)
    assert (listed["status"], listed["exit_code"]) == ("FAILED", "7")
    assert there(OURS)("logs", listed["run_id"], check=True).stdout == "hello\n"


def test_a_run_is_cancelled(there, projects, pods_tracking) -> None:
    running = run(there, projects, "echo hello; sleep 300")
    assert running.stdout is not None
    assert "hello" in running.stdout.readline()
    listed = newest_run(there)
    there(OURS)("cancel", listed["run_id"], check=True)
    running.communicate(timeout=60)
    assert newest_run(there)["status"] == "KILLED"
