"""Cancelled at any moment of its life, a job is gone within seconds, and its run is KILLED."""

from __future__ import annotations

import time

import pytest
from namespaces import Namespace

from mlflow_remote_backend.compute.kubernetes import objects
from mlflow_remote_backend.testing import Projects, ended, until

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]


@pytest.mark.parametrize("after_s", [0, 0.6, 1.2, 2.0, 4.0])
def test_a_job_that_starts_is_cancelled_as_fast_as_one_that_runs(
    projects: Projects, namespace: Namespace, after_s: float
) -> None:
    run = projects.submit(projects.make("sleep 600"))
    time.sleep(after_s)
    asked = time.monotonic()
    run.cancel()
    assert time.monotonic() - asked < 20  # a lost signal would cost the pod's whole grace, half an hour
    view = ended(run)
    assert (view.status, view.tag("reason")) == ("KILLED", "CANCELLED")
    kinds = ("pods", "jobs", "secrets")
    until(lambda: not any(namespace.ours(kind) for kind in kinds), 20, "Job, pod and Secret are gone")


def test_a_pod_deleted_while_it_starts_does_not_wait_for_its_whole_grace(
    projects: Projects, namespace: Namespace
) -> None:
    """Kubernetes sends one SIGTERM, and a container's first process without a handler never sees it."""
    run = projects.submit(projects.make("sleep 600"))
    pod = until(lambda: next(iter(namespace.ours("pods")), None), 60, "there is a pod")
    until(lambda: objects.container(namespace.pod(run.run_id), "observe").state == "running", 60, "its sidecar starts")
    namespace.delete("pods", objects.name(pod))
    view = ended(run, 30)
    assert (view.status, view.tag("reason")) in [("FAILED", "KILLED_BY_SYSTEM"), ("FAILED", "TERMINATED")]
