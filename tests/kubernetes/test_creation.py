"""However the submitter dies or a reply is lost: one job at most, no secret without an owner, nothing that stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faultproxy
import mlflow
import pytest
from faultproxy import FaultProxy
from namespaces import Namespace, until

from mlflow_remote_backend.compute.kubernetes import names, objects
from mlflow_remote_backend.errors import TrackingError
from mlflow_remote_backend.submitted_run import RemoteExecutionException, attach
from mlflow_remote_backend.testing import Projects, ended, stored_log
from mlflow_remote_backend.tracking import Tracking

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

Document = dict[str, Any]


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with FaultProxy(Path(os.environ["KUBECONFIG"])).running() as proxy:
        monkeypatch.setenv("KUBECONFIG", str(proxy.client_config(tmp_path)))
        yield proxy


def owners(thing: Document) -> list[str]:
    return [each["uid"] for each in objects.metadata(thing).get("ownerReferences") or ()]


def all_owned(namespace: Namespace) -> bool:
    jobs = {objects.uid(job) for job in namespace.ours("jobs")}
    return all(set(owners(secret)) & jobs for secret in namespace.ours("secrets"))


# ---------------------------------------------------------------------------------------------------- lost replies


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", r"/jobs$"), ("POST", r"/secrets$"), ("PATCH", r"/jobs/")],
    ids=["the Job", "the Secret", "the release"],
)
@pytest.mark.parametrize(
    "fault",
    [faultproxy.lose_the_reply, faultproxy.reset, faultproxy.status(500), faultproxy.status(503), faultproxy.malformed],
    ids=["reply lost", "request lost", "500", "503", "malformed"],
)
def test_a_lost_reply_makes_one_job(
    projects: Projects, namespace: Namespace, proxy: FaultProxy, method: str, path: str, fault: faultproxy.Fault
) -> None:
    proxy.fail(method, path, fault, times=1)
    run = projects.submit(projects.make("echo once"))
    assert ended(run).status == "FINISHED"
    assert stored_log(run.run_id) == b"once\n"
    assert len(namespace.ours("jobs")) == len(namespace.ours("secrets")) == len(namespace.ours("pods")) == 1
    assert all_owned(namespace)


def test_a_quota_conflict_is_tried_again(projects: Projects, proxy: FaultProxy) -> None:
    words = 'Operation cannot be fulfilled on resourcequotas "q": the object has been modified'
    proxy.fail("POST", r"/jobs$", faultproxy.status(409, reason="Conflict", message=words), times=2)
    assert projects.run("exit 0").status == "FINISHED"


# --------------------------------------------------------------------------------------------------------- namesakes


def foreign_job(namespace: Namespace, name: str, **metadata: Any) -> Document:
    container = {"name": "main", "image": "absent", "command": ["true"]}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    spec = {"suspend": True, "template": template}
    return namespace.make("jobs", {"kind": "Job", "metadata": {"name": name, **metadata}, "spec": spec})


@pytest.mark.parametrize(
    "labels", [{}, {names.MANAGED_BY: names.MANAGER}], ids=["somebody's", "of another submission of ours"]
)
def test_a_job_of_that_name_that_is_not_ours_is_left_alone(
    projects: Projects, namespace: Namespace, labels: dict[str, str]
) -> None:
    given = mlflow.MlflowClient().create_run(os.environ["MLFLOW_EXPERIMENT_ID"]).info.run_id
    there = foreign_job(namespace, names.job_name(given), labels=labels)
    with pytest.raises(RemoteExecutionException, match="belongs to another submission"):
        projects.submit(projects.make("exit 0"), run_id=given)
    (still,) = namespace.list("jobs")
    assert objects.uid(still) == objects.uid(there)
    assert still["spec"]["suspend"] is True
    assert mlflow.MlflowClient().get_run(given).info.status == "FAILED"


def test_cancel_and_collect_do_not_touch_a_namesake(projects: Projects, namespace: Namespace) -> None:
    run = projects.submit(projects.make("exit 0"))
    ended(run)
    job = objects.name(namespace.job(run.run_id))
    namespace.delete("jobs", job, propagationPolicy="Foreground")
    until(lambda: not namespace.list("jobs"), what="the Job is gone")
    foreign_job(namespace, job)
    run._compute.cancel(run._handle, grace_period_s=1)
    run._compute.collect(run._handle)
    assert [objects.name(each) for each in namespace.list("jobs")] == [job]


# ---------------------------------------------------------------------------------------------------- crash points

CRASHING = """
import json, os, signal, sys
step, project, config = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
done = 0
def then_die(function):
    def call(*arguments, **named):
        global done
        result = function(*arguments, **named)
        asks = "dryRun" in named or "selfsubjectaccessreviews" in str(arguments)
        if not asks:
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
import mlflow
from mlflow_remote_backend.compute.kubernetes.api import Api
from mlflow_remote_backend.tracking import Tracking
for place, verbs in ((Api, ("create", "patch")), (Tracking, ("open_run", "set_tags", "store_text", "store_file"))):
    for verb in verbs:
        setattr(place, verb, then_die(getattr(place, verb)))
run = mlflow.projects.run(project, backend="remote", env_manager="local", synchronous=False, backend_config=config)
print(done, run.run_id, flush=True)
"""


def submit_until(step: int, projects: Projects, project: Path) -> subprocess.CompletedProcess[str]:
    """Submit in a process of its own that is killed after its step-th effect; 0: never."""
    config = json.dumps({**projects.backend_config, "stream_output": False, "submission_id": f"crash-{step}"})
    arguments = [sys.executable, "-c", CRASHING, str(step), str(project), config]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120)


def test_a_submitter_killed_after_any_step_leaves_nothing_that_stays(
    projects: Projects, namespace: Namespace, mlflow_remote: Any
) -> None:
    whole = submit_until(0, projects, projects.make("echo ran"))
    steps = int(whole.stdout.split()[0])
    assert steps >= 8, whole.stderr
    ended(attach(whole.stdout.split()[1]))
    for step in range(1, steps + 1):  # each with a snapshot of its own, which is stored
        killed = submit_until(step, projects, projects.make(f"echo ran {step}"))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert all_owned(namespace), f"after step {step}"
    collected = mlflow_remote("gc")
    assert collected.returncode == 0, collected.stderr
    runs = mlflow.MlflowClient().search_runs([os.environ["MLFLOW_EXPERIMENT_ID"]])
    assert runs
    for run in runs:
        assert ended(attach(run.info.run_id)).status in ("FINISHED", "FAILED")
    until(lambda: not [job for job in namespace.ours("jobs") if job["spec"].get("suspend")], what="no suspended Job")
    assert all_owned(namespace)


def test_a_submission_that_died_half_way_is_continued_by_the_next_of_its_id(
    projects: Projects, namespace: Namespace
) -> None:
    project = projects.make("echo ran once")
    steps = int(submit_until(0, projects, project).stdout.split()[0])
    runs = {}
    for step in range(1, steps):
        killed = submit_until(step, projects, project)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        runs[step] = projects.submit(project, submission_id=f"crash-{step}")
    for step, run in runs.items():
        assert ended(run).status == "FINISHED", f"after step {step}"
        assert stored_log(run.run_id) == b"ran once\n"
    ids = [objects.annotation(job, names.SUBMISSION_ID) for job in namespace.ours("jobs")]
    assert sorted(ids) == sorted({f"crash-{step}" for step in range(steps)})


def test_a_run_whose_submitter_could_not_write_the_jobs_uid_gets_it_from_its_runner(
    projects: Projects, namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it nobody could tell later that the Job is gone."""
    original = Tracking.set_tags

    def away(tracking: Tracking, run_id: str, tags: Mapping[str, str]) -> None:
        if "mlflow_remote.job_uid" in tags:
            raise TrackingError("The server is away.", transient=True)
        original(tracking, run_id, tags)

    monkeypatch.setattr(Tracking, "set_tags", away)
    run = projects.submit(projects.make("sleep 600"))
    until(lambda: run.view().tag("phase") == "running", what="it runs")
    assert run.view().tag("job_uid") == objects.uid(namespace.job(run.run_id))
    namespace.delete("jobs", names.job_name(run.run_id), propagationPolicy="Background")
    for pod in namespace.ours("pods"):
        namespace.delete("pods", objects.name(pod), gracePeriodSeconds=0)
    view = ended(attach(run.run_id))
    assert view.status == "FAILED"
