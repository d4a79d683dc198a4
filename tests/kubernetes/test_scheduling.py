"""Where and when a pod runs: what the options ask for reaches it, a queue may hold it back and take it back."""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from namespaces import Document, Namespace, until

from mlflow_remote_backend.compute.kubernetes import names, objects
from mlflow_remote_backend.compute.kubernetes.api import Api
from mlflow_remote_backend.submitted_run import RemoteSubmittedRun
from mlflow_remote_backend.testing import Projects, ended, stored_log

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

GPU = "mlflow-remote.example/gpu"


# ----------------------------------------------------------------------------------------------------------- options


@pytest.fixture
def priority_class(cluster: Api) -> Iterator[str]:
    name = f"mlr-test-{uuid.uuid4().hex[:8]}"
    path = "/apis/scheduling.k8s.io/v1/priorityclasses"
    cluster.create(path, {"kind": "PriorityClass", "metadata": {"name": name}, "value": 7})
    yield name
    cluster.delete(f"{path}/{name}", {})


@pytest.fixture
def node_with_gpus(cluster: Api) -> Iterator[str]:
    """A node that says it has two of an extended resource, as a device plugin would make it say."""
    name = objects.name(cluster.items("/api/v1/nodes")[0][0])
    path = f"/api/v1/nodes/{name}"
    cluster.patch(f"{path}/status", {"status": {"capacity": {GPU: "2"}}})
    until(lambda: cluster.get(path).body["status"]["allocatable"].get(GPU) == "2", 60, "the node offers it")
    yield name
    cluster.patch(f"{path}/status", {"status": {"capacity": {GPU: None}, "allocatable": {GPU: None}}})


def test_all_that_the_options_ask_for_reaches_a_pod_that_runs(
    projects: Projects, namespace: Namespace, priority_class: str, node_with_gpus: str
) -> None:
    namespace.make("serviceaccounts", {"kind": "ServiceAccount", "metadata": {"name": "trainer"}})
    namespace.make("configmaps", {"kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"depth": "12"}})
    namespace.make("secrets", {"kind": "Secret", "metadata": {"name": "key"}, "stringData": {"token": "let me in"}})
    here = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node_with_gpus]}]}
    options = {
        **projects.backend_config["kubernetes"],
        "service_account": "trainer",
        "node_selector": {"kubernetes.io/hostname": node_with_gpus},
        "tolerations": [{"key": "only-training", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [here]}}},
        "priority_class": priority_class,
        "volumes": [
            {"mount_path": "/settings", "config_map": "settings"},
            {"mount_path": "/key", "secret": "key", "read_only": True},
            {"mount_path": "/scratch", "source": {"emptyDir": {"sizeLimit": "10Mi"}}},
        ],
    }
    script = (
        "cat /settings/depth; echo; cat /key/token; echo; echo $TOKEN; touch /scratch/x && df -k /dev/shm | tail -1"
    )
    resources = {"cpu": 0.1, "memory": "128Mi", "gpu": 1, "gpu_resource": GPU, "shm_size": "8Mi"}
    run = projects.submit(
        projects.make(script),
        kubernetes=options,
        resources=resources,
        secrets={"TOKEN": "key/token"},
        labels={"team": "vision"},
        annotations={"note": "ünï"},
    )
    view = ended(run)
    assert view.status == "FINISHED", view.tag("message")
    depth, token, variable, shm = stored_log(view.run_id).decode().splitlines()
    assert (depth, token, variable, shm.split()[1]) == ("12", "let me in", "let me in", "8192")
    pod = namespace.pod(view.run_id)
    spec, (main,) = pod["spec"], pod["spec"]["containers"]
    assert (spec["serviceAccountName"], spec["priority"], spec["nodeName"]) == ("trainer", 7, node_with_gpus)
    assert {"key": "only-training", "operator": "Exists"} in spec["tolerations"]
    assert spec["affinity"] == options["affinity"]
    assert main["resources"]["limits"] == {"cpu": "100m", "memory": "134217728", GPU: "1"}
    assert (objects.label(pod, "team"), objects.annotation(pod, "note")) == ("vision", "ünï")


def test_a_pod_that_makes_room_for_a_more_important_one_is_told_so(
    projects: Projects, namespace: Namespace, priority_class: str, node_with_gpus: str, shell_image: str
) -> None:
    script = "trap 'echo saved; exit 9' TERM; echo started; while :; do sleep 0.1; done"
    run = projects.submit(projects.make(script), resources={"gpu": 2, "gpu_resource": GPU})
    until(lambda: "started" in list(run.logs()), what="the program runs")
    container = {"name": "main", "image": shell_image, "command": ["true"], "resources": {"limits": {GPU: "2"}}}
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    security = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"priorityClassName": priority_class, "securityContext": security, "containers": [container]}
    namespace.make("pods", {"kind": "Pod", "metadata": {"name": "important"}, "spec": spec})
    assert run.wait() is False
    view = run.view()
    assert (view.status, view.tag("reason")) == ("FAILED", "PREEMPTED")
    assert "room for one of higher priority" in view.tag("message")
    assert stored_log(run.run_id).endswith(b"saved\n")


# ------------------------------------------------------------------------------------------------------------- queue


def admit(namespace: Namespace, run: RemoteSubmittedRun, *, suspend: bool = False) -> None:
    """What Kueue does with a Job that carries its label: let it start, or take it back."""
    namespace.patch("jobs", names.job_name(run.run_id), {"spec": {"suspend": suspend}})


def queued(projects: Projects, script: str) -> RemoteSubmittedRun:
    options = {**projects.backend_config["kubernetes"], "queue": "team-a"}
    return projects.submit(projects.make(script), kubernetes=options)


def phase(run: RemoteSubmittedRun) -> str:
    return str(run.view().tag("phase"))


def test_a_job_in_a_queue_waits_is_shown_as_queued_and_runs_when_it_is_admitted(
    projects: Projects, namespace: Namespace, mlflow_remote: Any
) -> None:
    run = queued(projects, "echo my turn")
    job = namespace.job(run.run_id)
    assert (objects.label(job, names.QUEUE), job["spec"]["suspend"]) == ("team-a", True)
    assert not namespace.ours("pods")
    assert phase(run) == "queued"
    told = json.loads(mlflow_remote("status", run.run_id, "--json").stdout)
    assert (told["status"], told["phase"]) == ("RUNNING", "queued")
    admit(namespace, run)
    assert ended(run).status == "FINISHED"
    assert stored_log(run.run_id) == b"my turn\n"


def test_a_job_that_waits_in_a_queue_can_be_cancelled(projects: Projects, namespace: Namespace) -> None:
    run = queued(projects, "echo never")
    run.cancel()
    view = ended(run, 20)
    assert (view.status, view.tag("reason")) == ("KILLED", "CANCELLED")
    until(lambda: not namespace.ours("jobs") and not namespace.ours("secrets"), 20, "nothing is left")


def test_a_job_that_its_queue_takes_back_goes_on_when_it_is_admitted_again(
    projects: Projects, namespace: Namespace, capfd: pytest.CaptureFixture[str]
) -> None:
    """Kueue preempts by suspending: the pod is deleted. That is no failure, and one run has both attempts."""
    namespace.make("configmaps", {"kind": "ConfigMap", "metadata": {"name": "pace"}, "data": {"seconds": "600"}})
    volumes = [{"mount_path": "/pace", "config_map": "pace"}]
    options = {**projects.backend_config["kubernetes"], "queue": "team-a", "volumes": volumes}
    script = "echo begun; sleep $(cat /pace/seconds) & wait $! && echo done"
    run = projects.submit(projects.make(script), kubernetes=options, stream_output=True)
    with following(run) as followed:
        admit(namespace, run)
        until(lambda: phase(run) == "running", 60, "it runs")
        admit(namespace, run, suspend=True)
        until(lambda: phase(run) == "queued", 60, "the run waits again")
        until(lambda: not namespace.ours("pods"), 60, "its pod is gone")
        assert mlflow.get_run(run.run_id).info.status == "RUNNING"
        namespace.patch("configmaps", "pace", {"data": {"seconds": "0"}})
        admit(namespace, run)
    assert followed == [True]
    shown = capfd.readouterr()
    assert shown.out == "begun\n\n--- attempt 2 ---\nbegun\ndone\n"
    assert shown.err.rindex("queued: suspended, in queue team-a") > shown.err.index("preparing")
    assert stored_log(run.run_id) == b"begun\nbegun\ndone\n"
    assert run.view().tag("attempt") == "1"


@contextlib.contextmanager
def following(run: RemoteSubmittedRun) -> Iterator[list[bool]]:
    """Somebody waits for the run, in a thread; the list has the answer once the block was left."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(run.wait()), daemon=True)
    thread.start()
    yield answers
    thread.join(120)


# ---------------------------------------------------------------------------------------------------------- template

TEMPLATE: Document = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "{replaced with MLflow Project name}", "labels": {"cost-centre": "42"}},
    "spec": {
        "ttlSecondsAfterFinished": 77,
        "backoffLimit": 0,
        "template": {
            "metadata": {"labels": {"app": "training"}, "annotations": {"note": "theirs"}},
            "spec": {
                "restartPolicy": "Never",
                "volumes": [{"name": "shared", "emptyDir": {}}],
                "containers": [
                    {
                        "name": "{replaced with MLflow Project name}",
                        "image": "{replaced with URI of Docker image created during Project execution}",
                        "command": ["{replaced with MLflow Project entry point command}"],
                        "env": [{"name": "FROM_TEMPLATE", "value": "yes"}],
                        "resources": {"requests": {"cpu": "50m"}},
                        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}],
                    },
                    {
                        "name": "helper",
                        "image": "IMAGE",
                        "command": ["sh", "-c", "echo from the helper > /shared/x; exec sleep 2"],
                        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}],
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "capabilities": {"drop": ["ALL"]},
                        },
                    },
                ],
            },
        },
    },
}


def test_a_template_of_mlflows_own_backend_keeps_containers_volumes_and_labels(
    projects: Projects, namespace: Namespace, shell_image: str, tmp_path: Path
) -> None:
    template = json.loads(json.dumps(TEMPLATE).replace("IMAGE", shell_image))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(template))
    script = "until [ -s /shared/x ]; do sleep 0.1; done; cat /shared/x; echo $FROM_TEMPLATE"
    options = {**projects.backend_config["kubernetes"], "image": shell_image}
    view = projects.run(script, kubernetes=options, **{"kube-job-template-path": str(tmp_path / "job.yaml")})
    assert view.status == "FINISHED", view.tag("message")
    assert stored_log(view.run_id) == b"from the helper\nyes\n"
    job, pod = namespace.job(view.run_id), namespace.pod(view.run_id)
    assert (objects.label(job, "cost-centre"), job["spec"]["ttlSecondsAfterFinished"]) == ("42", 77)
    assert (objects.label(pod, "app"), objects.annotation(pod, "note")) == ("training", "theirs")
    assert {each["name"] for each in pod["spec"]["containers"]} == {"main", "helper"}
    assert pod["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "50m"
