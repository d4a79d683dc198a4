"""Records what a real cluster shows of jobs in trouble, for the tests of diagnoses: run it against a new Kubernetes.

    KUBECONFIG=… MLFLOW_REMOTE_TEST_IMAGE=… python tests/compute_kubernetes/record.py [SCENARIO…]

Each scenario is a namespace of its own, removed afterwards. The pods are ours, but their runner does nothing: what is
recorded is Kubernetes. The image needs a POSIX shell and must not need root.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlflow_remote_backend.compute.kubernetes import manifest, objects
from mlflow_remote_backend.compute.kubernetes.api import Api, ApiError
from mlflow_remote_backend.job import EntryPoint as Entry
from mlflow_remote_backend.job import EnvironmentRef, JobSpec, Limits, Resources, RunRef, SnapshotRef

FOLDER = Path(__file__).parent / "recorded"
IMAGE = os.environ.get("MLFLOW_REMOTE_TEST_IMAGE", "python:3.11-slim")
#: Imitates observe: lives until its SIGTERM.
WAITING = "trap 'exit 0' TERM; while :; do sleep 0.1; done"

Document = dict[str, Any]
Change = Callable[[Document], None]


@dataclass(frozen=True)
class Scenario:
    """``until``: what to wait for. ``change``: made to the Job. ``after``: done once it was released."""

    name: str
    until: Callable[[Cluster], bool]
    command: str = "sleep 600"
    change: Change = lambda job: None
    prepare: Callable[[Cluster], None] = lambda cluster: None
    after: Callable[[Cluster], None] = lambda cluster: None
    resources: Resources = field(default_factory=Resources)
    limits: Limits = field(default_factory=lambda: Limits(grace_period_s=2, finalize_timeout_s=3))
    options: Document = field(default_factory=dict)
    secret: bool = True


class Cluster:
    """One scenario's namespace, with its Job."""

    def __init__(self, api: Api, name: str) -> None:
        self.api = api
        self.namespace = f"record-{name}-{uuid.uuid4().hex[:6]}"
        self.job_name = ""
        self.api.create("/api/v1/namespaces", {"kind": "Namespace", "metadata": {"name": self.namespace}})

    def path(self, resource: str, group: str = "") -> str:
        base = f"/apis/{group}" if group else "/api/v1"
        return f"{base}/namespaces/{self.namespace}/{resource}"

    def job(self) -> Document | None:
        try:
            return self.api.get(self.path(f"jobs/{self.job_name}", "batch/v1")).body
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    def pods(self) -> list[Document]:
        return self.api.items(self.path("pods"), labelSelector="app.kubernetes.io/managed-by=mlflow-remote")[0]

    def events(self) -> list[Document]:
        return self.api.items(self.path("events"))[0]

    def remove(self) -> None:
        self.api.delete(f"/api/v1/namespaces/{self.namespace}", {})


# ------------------------------------------------------------------------------------------------------- conditions


def waiting_with(*reasons: str) -> Callable[[Cluster], bool]:
    return lambda cluster: any(
        c.state == "waiting" and c.reason in reasons for p in cluster.pods() for c in objects.containers(p)
    )


def running(cluster: Cluster) -> bool:
    return any(objects.container(pod, manifest.MAIN).state == "running" for pod in cluster.pods())


def ended(cluster: Cluster) -> bool:
    job = cluster.job()
    return job is not None and (objects.holds(job, "Failed") or objects.holds(job, "Complete"))


def event(reason: str, text: str = "") -> Callable[[Cluster], bool]:
    return lambda cluster: any(e["reason"] == reason and text in e.get("message", "") for e in cluster.events())


def unschedulable(cluster: Cluster) -> bool:
    return any(
        (objects.condition(pod, "PodScheduled") or {}).get("reason") == "Unschedulable" for pod in cluster.pods()
    )


def gated(cluster: Cluster) -> bool:
    return any(
        (objects.condition(pod, "PodScheduled") or {}).get("reason") == "SchedulingGated" for pod in cluster.pods()
    )


def suspended(cluster: Cluster) -> bool:
    job = cluster.job()
    return job is not None and objects.holds(job, "Suspended")


def gone(cluster: Cluster) -> bool:
    return cluster.job() is None


def _wait(condition: Callable[[Cluster], bool], cluster: Cluster, timeout_s: float = 150.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition(cluster):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True


# ---------------------------------------------------------------------------------------------------------- changes


def pod_spec(job: Document) -> Document:
    found: Document = job["spec"]["template"]["spec"]
    return found


def main(job: Document) -> Document:
    found: Document = pod_spec(job)["containers"][0]
    return found


def with_image(image: str, policy: str = "") -> Change:
    def change(job: Document) -> None:
        main(job)["image"] = image
        main(job).update({"imagePullPolicy": policy} if policy else {})

    return change


def with_command(*argv: str) -> Change:
    return lambda job: main(job).update(command=list(argv), args=[])


def with_missing_key(job: Document) -> None:
    reference = {"secretKeyRef": {"name": "absent", "key": "token"}}
    main(job)["env"].append({"name": "TOKEN", "valueFrom": reference})


def with_volume(source: Document) -> Change:
    def change(job: Document) -> None:
        pod_spec(job)["volumes"].append({"name": "extra", **source})
        main(job)["volumeMounts"].append({"name": "extra", "mountPath": "/extra"})

    return change


def with_pod(**fields: Any) -> Change:
    return lambda job: pod_spec(job).update(fields)


def as_root_image(job: Document) -> None:
    for key in ("runAsUser", "runAsGroup"):
        pod_spec(job)["securityContext"].pop(key, None)


def small_temporary(job: Document) -> None:
    for volume in pod_spec(job)["volumes"]:
        if volume["name"] == "tmp":
            volume["emptyDir"] = {"sizeLimit": "1Mi"}


def failing_prepare(job: Document) -> None:
    prepare = pod_spec(job)["initContainers"][1]
    prepare["command"] = ["sh", "-c", "echo 'no such snapshot' >&2; exit 3"]
    prepare["args"] = []


def crashing_observe(job: Document) -> None:
    observe = pod_spec(job)["initContainers"][0]
    observe["command"] = ["sh", "-c", "echo 'ImportError: no module named observe' >&2; exit 1"]


def reporting_observe(job: Document) -> None:
    """Leaves its verdict in the termination message when it is told to go."""
    said = json.dumps(
        {"reason": "TRACKING_UNREACHABLE", "message": "The tracking server does not answer.", "words": "x"}
    )
    script = f"trap 'printf %s '\"'\"'{said}'\"'\"' > /dev/termination-log; exit 0' TERM; while :; do sleep 0.1; done"
    pod_spec(job)["initContainers"][0]["command"] = ["sh", "-c", script]


# ------------------------------------------------------------------------------------------------------------ extras


def quota(**hard: str) -> Callable[[Cluster], None]:
    body = {"kind": "ResourceQuota", "metadata": {"name": "quota"}, "spec": {"hard": hard}}
    return lambda cluster: cluster.api.create(cluster.path("resourcequotas"), body) and None


def limit_range(cluster: Cluster) -> None:
    limits = [{"type": "Container", "max": {"memory": "1Mi"}}]
    body = {"kind": "LimitRange", "metadata": {"name": "limits"}, "spec": {"limits": limits}}
    cluster.api.create(cluster.path("limitranges"), body)


def restricted(cluster: Cluster) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.api.patch(f"/api/v1/namespaces/{cluster.namespace}", {"metadata": {"labels": labels}})


def first_pod(cluster: Cluster) -> str:
    return objects.name(cluster.pods()[0])


def delete_pod(cluster: Cluster) -> None:
    cluster.api.delete(cluster.path(f"pods/{first_pod(cluster)}"), {})


def force_delete_job(cluster: Cluster) -> None:
    cluster.api.delete(cluster.path(f"jobs/{cluster.job_name}", "batch/v1"), {"propagationPolicy": "Background"})


def evict(cluster: Cluster) -> None:
    pod = first_pod(cluster)
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": cluster.namespace}}
    cluster.api.create(cluster.path(f"pods/{pod}/eviction"), body)


def suspend(cluster: Cluster) -> None:
    cluster.api.patch(cluster.path(f"jobs/{cluster.job_name}", "batch/v1"), {"spec": {"suspend": True}})


def when_running(act: Callable[[Cluster], None]) -> Callable[[Cluster], None]:
    return lambda cluster: act(cluster) if _wait(running, cluster) else None


SCENARIOS = (
    Scenario("image-not-found", waiting_with("ImagePullBackOff"), change=with_image("127.0.0.1:5000/absent:1")),
    Scenario("image-registry-down", waiting_with("ImagePullBackOff"), change=with_image("127.0.0.1:5998/absent:1")),
    Scenario("image-never", waiting_with("ErrImageNeverPull"), change=with_image("absent:1", "Never")),
    Scenario("image-invalid-name", waiting_with("InvalidImageName"), change=with_image("127.0.0.1:5000/UPPER:1")),
    Scenario("config-missing-key", waiting_with("CreateContainerConfigError"), change=with_missing_key),
    Scenario("config-root-image", waiting_with("CreateContainerConfigError"), change=as_root_image),
    Scenario("start-no-such-program", ended, change=with_command("/absent")),
    Scenario("unschedulable-cpu", unschedulable, resources=Resources(cpu=1000.0)),
    Scenario("unschedulable-selector", unschedulable, options={"node_selector": {"absent": "true"}}),
    Scenario(
        "unschedulable-claim", unschedulable, change=with_volume({"persistentVolumeClaim": {"claimName": "absent"}})
    ),
    Scenario("scheduling-gated", gated, change=with_pod(schedulingGates=[{"name": "example.com/gate"}])),
    Scenario("quota-used-up", event("FailedCreate"), prepare=quota(pods="0")),
    Scenario("quota-unstated", event("FailedCreate"), prepare=quota(**{"requests.memory": "1Gi"})),
    Scenario("limit-range", event("FailedCreate"), prepare=limit_range),
    Scenario("pod-security", event("FailedCreate"), prepare=restricted, change=with_pod(hostNetwork=True)),
    Scenario("service-account", event("FailedCreate"), options={"service_account": "absent"}),
    Scenario("volume-missing-secret", event("FailedMount"), change=with_volume({"secret": {"secretName": "absent"}})),
    Scenario("oom-killed", ended, "exec tail /dev/zero", resources=Resources(memory_bytes=24 << 20)),
    Scenario("exit-3", ended, "echo said before; exit 3"),
    Scenario("exit-127", ended, "exec absent"),
    Scenario("exit-0", ended, "exit 0"),
    Scenario("killed", ended, "kill -9 $$; exit 137"),
    Scenario("segfault", ended, "exit 139"),
    Scenario("prepare-failed", ended, change=failing_prepare),
    Scenario("observe-crashing", waiting_with("CrashLoopBackOff"), change=crashing_observe),
    Scenario("observe-reported", ended, "exit 0", change=reporting_observe),
    Scenario("evicted-disk", ended, "sleep 1; head -c 20000000 /dev/zero > /tmp/f; sleep 600", change=small_temporary),
    Scenario("evicted-api", ended, after=when_running(evict)),
    Scenario("pod-deleted", ended, after=when_running(delete_pod)),
    Scenario("pod-deadline", ended, change=with_pod(activeDeadlineSeconds=4)),
    Scenario("job-deadline", ended, change=lambda job: job["spec"].update(activeDeadlineSeconds=4)),
    Scenario("suspended-running", suspended, after=when_running(suspend)),
    Scenario("running", running),
    Scenario("node-rejected", ended, change=with_pod(nodeName="NODE"), resources=Resources(cpu=1000.0)),
)


# --------------------------------------------------------------------------------------------------------- recording


def spec_of(scenario: Scenario) -> JobSpec:
    return JobSpec(
        run=RunRef(uuid.uuid4().hex, "0", "mlflow-artifacts:/0", "http://tracking.example.com"),
        submission_id=uuid.uuid4().hex,
        project_name="project",
        entry_point=Entry("main", scenario.command),
        parameters={},
        snapshot=SnapshotRef("sha256:" + "0" * 64, 1),
        environment=EnvironmentRef(),
        compute="kubernetes",
        resources=scenario.resources,
        limits=scenario.limits,
        options={"runner_image": IMAGE, "image_pull_policy": "IfNotPresent", **scenario.options},
    )


def build(scenario: Scenario) -> manifest.Manifest:
    """Our manifest with a runner that does nothing."""
    built = manifest.build(spec_of(scenario), manifest.SecretNames(), "{}")
    job = copy.deepcopy(built.job)
    observe, prepare = pod_spec(job)["initContainers"]
    observe.update(command=["sh", "-c", WAITING], args=[])
    prepare.update(command=["sh", "-c", "true"], args=[])
    main(job)["command"] = ["sh", "-c", scenario.command]
    scenario.change(job)
    return replace(built, job=job)


def record(api: Api, scenario: Scenario) -> bool:
    cluster = Cluster(api, scenario.name)
    try:
        _wait(lambda c: bool(c.api.items(c.path("serviceaccounts"))[0]), cluster)
        scenario.prepare(cluster)
        built = build(scenario)
        if pod_spec(built.job).get("nodeName") == "NODE":
            pod_spec(built.job)["nodeName"] = objects.name(api.items("/api/v1/nodes")[0][0])
        cluster.job_name = built.name
        job = api.create(cluster.path("jobs", "batch/v1"), built.job).body
        if scenario.secret:
            api.create(cluster.path("secrets"), manifest.secret(built, objects.uid(job), "{}", {}, {}))
        api.patch(cluster.path(f"jobs/{built.name}", "batch/v1"), built.release)
        scenario.after(cluster)
        if not _wait(scenario.until, cluster):
            print(f"{scenario.name}: did not get there", file=sys.stderr)
            return False
        save(scenario.name, cluster, api)
        return True
    finally:
        cluster.remove()


def save(name: str, cluster: Cluster, api: Api) -> None:
    job, pods, events = cluster.job(), cluster.pods(), cluster.events()
    document = {
        "server": api.get("/version").body["gitVersion"],
        "now": time.time(),
        "job": job and objects.trimmed(job),
        "pods": [objects.trimmed(pod) for pod in pods],
        "events": [_trimmed_event(each) for each in events],
    }
    text = scrub(json.dumps(document, indent=1, sort_keys=True), cluster.namespace)
    (FOLDER / f"{name}.json").write_text(text + "\n")
    print(f"{name}: recorded")


def _trimmed_event(each: Document) -> Document:
    kept = ("involvedObject", "reason", "message", "type", "count", "firstTimestamp", "lastTimestamp", "eventTime")
    return {key: each[key] for key in kept if each.get(key) is not None}


def scrub(text: str, namespace: str) -> str:
    """Without what tells of this cluster: names of namespace, addresses, the node."""
    text = text.replace(namespace, "jobs")
    text = re.sub(r"\b10\.\d+\.\d+\.\d+\b", "10.0.0.1", text)
    text = text.replace(IMAGE, "registry.example.com/image:1")
    return re.sub(r"127\.0\.0\.1:\d+", "registry.example.com", text)


def chosen(names: list[str]) -> Iterator[Scenario]:
    return (each for each in SCENARIOS if not names or each.name in names)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    shared = Api.open()
    with ThreadPoolExecutor(max_workers=4) as pool:
        results = list(pool.map(lambda scenario: record(shared, scenario), chosen(sys.argv[1:])))
    sys.exit(0 if all(results) else 1)
