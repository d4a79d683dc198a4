"""The tracking server is away when the program ends: for a while, and for longer than anybody waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from faults import FaultProxy, fault_proxy
from namespaces import Namespace, Tracking, until

from mlflow_remote_backend.compute.kubernetes import objects
from mlflow_remote_backend.compute.kubernetes.manifest import MAIN
from mlflow_remote_backend.testing import Projects, artifact, ended, stored_log

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

SCRIPT = "echo started; sleep 2; mkdir -p outputs; echo result > outputs/result; echo end; exit 0"


@pytest.fixture
def server(pods_tracking: Tracking) -> Iterator[FaultProxy]:
    """The tracking server as pods reach it; this process has a way of its own."""
    with fault_proxy(pods_tracking.server.url, "0.0.0.0") as proxy:
        yield proxy


def submit(projects: Projects, server: FaultProxy, pods_tracking: Tracking, **config: Any) -> Any:
    """A run whose pod has lost its tracking server by the time its program ends."""
    host = pods_tracking.from_pods.rpartition(":")[0]
    run = projects.submit(projects.make(SCRIPT), tracking_uri=f"{host}:{server.port}", **config)
    until(lambda: "started" in list(run.logs()), what="the program runs")
    server.fail(503)
    return run


def test_a_tracking_server_that_comes_back_gets_everything(
    projects: Projects, namespace: Namespace, server: FaultProxy, pods_tracking: Tracking
) -> None:
    run = submit(projects, server, pods_tracking)
    until(lambda: objects.container(namespace.pod(run.run_id), MAIN).state == "terminated", what="the program's end")
    failed = len(server.seen)
    until(lambda: len(server.seen) > failed + 3, what="more tries")
    assert not run.view().tag("finalized")
    server.mend()
    view = ended(run)
    assert (view.status, view.tag("reason"), view.tag("exit_code")) == ("FINISHED", "OK", "0")
    assert stored_log(run.run_id) == b"started\nend\n"
    assert artifact(run.run_id, "outputs/result") == b"result\n"


def test_one_that_stays_away_is_told_apart_from_a_program_that_failed(
    projects: Projects, namespace: Namespace, server: FaultProxy, pods_tracking: Tracking
) -> None:
    run = submit(projects, server, pods_tracking, finalize_timeout="4s")
    until(lambda: objects.ended(namespace.pod(run.run_id)), 90, what="the pod's end")
    view = ended(run)
    assert (view.status, view.tag("reason"), view.tag("exit_code")) == ("FAILED", "FINALIZE_INCOMPLETE", "0")
    assert "The program ended well" in view.tag("message")
    assert "outputs/result" in view.tag("message"), "what is missing has a name"
