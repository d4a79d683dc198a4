"""Many jobs from one process: one snapshot, few requests, one watch for each kind of object."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from namespaces import Namespace, Tracking, until

from mlflow_remote_backend.submitted_run import RemoteSubmittedRun
from mlflow_remote_backend.testing import Projects, ended
from mlflow_remote_backend.tracking import RunView

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

COUNT = 25


def watches() -> int:
    return sum(each.name.startswith("watch ") and each.is_alive() for each in threading.enumerate())


def test_many_jobs_share_a_snapshot_and_two_watches(
    projects: Projects, namespace: Namespace, pods_tracking: Tracking
) -> None:
    before = watches()
    options = {**projects.backend_config["kubernetes"], "queue": "held"}
    project = projects.make("echo hello")
    first = projects.submit(project, kubernetes=options)
    api = first._compute._connected()
    sent = api.requests
    runs = [first, *(projects.submit(project, kubernetes=options) for _ in range(COUNT - 1))]
    assert (api.requests - sent) / (COUNT - 1) <= 5  # Job, Secret, release; the questions of the preflight are shared
    assert len(namespace.ours("jobs")) == len(namespace.ours("secrets")) == COUNT
    assert len(archives(pods_tracking, first.view())) == 1
    look_at(runs, times=2)
    until(lambda: look_at(runs) and watches() - before <= 2, 60, "one watch for Jobs, one for pods")
    followed = api.requests
    look_at(runs, times=10)
    assert api.requests - followed <= 10  # 250 answers, from memory
    for run in runs[:2]:
        run.cancel()
        assert ended(run).status == "KILLED"


def look_at(runs: list[RemoteSubmittedRun], *, times: int = 1) -> bool:
    for run in times * runs:
        assert run._compute.status(run._handle).phase.value == "queued"
    return True


def archives(tracking: Tracking, view: RunView) -> list[Path]:
    """Of the run's snapshot in its experiment: other tests of this server may have stored it in theirs."""
    name = view.tag("snapshot").removeprefix("sha256:")[:32]
    return list((tracking.server.artifacts / view.experiment_id).rglob(f"snapshot/{name}*"))
