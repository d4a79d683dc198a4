"""Jobs that cannot run: said before anything exists where that can be known, else soon, in Kubernetes' own words."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from namespaces import REGISTRY, Namespace, until

from mlflow_remote_backend.compute.kubernetes import names, objects, watch
from mlflow_remote_backend.job import Diagnosis, Reason
from mlflow_remote_backend.submitted_run import RemoteExecutionException, RemoteSubmittedRun, attach
from mlflow_remote_backend.testing import Projects, artifact, ended, stored_log
from mlflow_remote_backend.tracking import RunView

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

Document = dict[str, Any]


def with_options(projects: Projects, **options: Any) -> Projects:
    config = {**projects.backend_config, "kubernetes": {**projects.backend_config["kubernetes"], **options}}
    return Projects(projects.folder, config)


def runs() -> int:
    import os

    return len(mlflow.MlflowClient().search_runs([os.environ["MLFLOW_EXPERIMENT_ID"]]))


# ---------------------------------------------------------------------------------- refused before anything exists


def quota(**hard: str) -> Callable[[Namespace], Document]:
    body = {"kind": "ResourceQuota", "metadata": {"name": "quota"}, "spec": {"hard": hard}}
    return lambda namespace: namespace.make("resourcequotas", body)


def limit_range(namespace: Namespace) -> None:
    limits = [{"type": "Container", "max": {"memory": "10Mi"}}]
    namespace.make("limitranges", {"kind": "LimitRange", "metadata": {"name": "l"}, "spec": {"limits": limits}})


NEVER = [
    # what is done to the namespace, options, in the message
    (quota(pods="0"), {}, "exceeded quota"),
    (quota(**{"requests.cpu": "1"}), {}, "must specify requests.cpu"),
    (limit_range, {}, "maximum memory usage per Container"),
    (lambda namespace: None, {"service_account": "absent"}, 'serviceaccount "absent" not found'),
    (lambda namespace: None, {"security": "image"}, "violates PodSecurity"),
    (lambda namespace: None, {"env_cache": {"host_path": "/var/cache"}, "pod_template": {"hostNetwork": True}}, ""),
    (lambda namespace: None, {"priority_class": "absent"}, "absent"),
    (lambda namespace: None, {"image": "UPPER/case:1:2"}, "expected an image reference"),
    (lambda namespace: None, {"namespace": "absent-namespace"}, "absent-namespace"),
    (lambda namespace: None, {"context": "absent-context"}, "absent-context"),
]


@pytest.mark.parametrize(("change", "options", "words"), NEVER, ids=[words or "host path" for *_, words in NEVER])
def test_what_can_never_run_is_refused_before_anything_exists(
    projects: Projects, namespace: Namespace, change: Callable[[Namespace], Any], options: Document, words: str
) -> None:
    change(namespace)
    until(
        lambda: all(q.get("status", {}).get("hard") for q in namespace.list("resourcequotas")),
        what="the quota is counted",
    )
    refused = with_options(projects, **options)
    with pytest.raises(RemoteExecutionException) as caught:
        refused.submit(refused.make("exit 0"))
    assert words in str(caught.value)
    assert runs() == 0
    assert not namespace.ours("jobs")
    assert not namespace.ours("secrets")


def test_a_limit_range_that_wants_more_for_each_container_can_be_given_it(
    projects: Projects, namespace: Namespace
) -> None:
    limits = [{"type": "Container", "min": {"cpu": "50m", "memory": "100Mi"}}]
    namespace.make("limitranges", {"kind": "LimitRange", "metadata": {"name": "l"}, "spec": {"limits": limits}})
    project = projects.make("echo hello")
    with pytest.raises(RemoteExecutionException, match=r"minimum (.|\n)*kubernetes\.sidecar_cpu"):
        projects.submit(project)
    enough = with_options(projects, sidecar_cpu="50m", sidecar_memory="128MiB")
    assert ended(enough.submit(project)).status == "FINISHED"


@pytest.mark.parametrize(
    "uri",
    [
        "http://localhost:5000",
        "http://127.0.0.1:5000",
        "http://[::1]:5000",
        "sqlite:///mlflow.db",
        "file:///tmp/mlruns",
    ],
)
def test_a_tracking_server_that_no_pod_reaches_is_refused(projects: Projects, namespace: Namespace, uri: str) -> None:
    with pytest.raises(RemoteExecutionException, match="tracking_uri"):
        projects.submit(projects.make("exit 0"), tracking_uri=uri)
    assert runs() == 0
    assert not namespace.ours("jobs")


def test_a_quota_that_is_used_up_only_now_is_waited_for(projects: Projects, namespace: Namespace) -> None:
    quota(pods="1")(namespace)
    first = projects.submit(projects.make("sleep 6"))
    until(lambda: namespace.ours("pods"), what="the first pod")
    second = projects.submit(projects.make("echo at last"))
    status = until(lambda: (s := second._compute.status(second._handle)).diagnosis and s, what="a diagnosis")
    assert status.diagnosis.reason.value == "QUOTA"
    assert "exceeded quota" in status.diagnosis.words
    assert ended(first).status == "FINISHED"
    namespace.delete("jobs", first._handle.url.split("/")[3].partition("?")[0], propagationPolicy="Background")
    assert ended(second).status == "FINISHED"


# ------------------------------------------------------------------------------------------- only known afterwards


def submitted(projects: Projects, options: Document, config: Document) -> RemoteSubmittedRun:
    kubernetes = {**projects.backend_config["kubernetes"], **options}
    return projects.submit(projects.make("echo never"), kubernetes=kubernetes, **config)


def check_failure(view: RunView, reason: str, words: str) -> None:
    assert (view.status, view.tag("reason")) == ("FAILED", reason), view.tag("message")
    assert view.tag("finalized")
    assert words in view.tag("message")
    assert words in artifact(view.run_id, "logs/error.txt").decode()


NEVER_PULLED = {"image": "absent:1", "image_pull_policy": "Never"}  # our runner's image is there already
BAD_NAME = {"containers": [{"name": "main", "image": f"{REGISTRY}/UPPER:1"}]}  # as an option it is refused at once
PATIENCE = {
    # what waits: options of the compute, of the run, reason, in Kubernetes' words, at least so many seconds
    "an image that does not exist": ({"image": f"{REGISTRY}/absent:1"}, {}, "IMAGE_PULL", "not found", 25),
    "an image that must be there and is not": (NEVER_PULLED, {}, "IMAGE_PULL", "Never", 0),
    "an image name that is none": ({"pod_template": BAD_NAME}, {}, "IMAGE_PULL", "must be lowercase", 0),
    "a registry that is away": (
        {"image": "127.0.0.1:1/image:1"},
        {"image_pull_timeout": "40s"},
        "IMAGE_PULL",
        "connection refused",
        35,
    ),
    "a secret that does not exist": (
        {},
        {"secrets": {"TOKEN": {"name": "absent", "key": "k"}}},
        "CONTAINER_CONFIG",
        'secret "absent" not found',
        55,
    ),
    "a node that does not exist": (
        {"node_selector": {"absent": "true"}},
        {"start_timeout": "8s"},
        "UNSCHEDULABLE",
        "node affinity/selector",
        7,
    ),
    "more than any node has": (
        {},
        {"start_timeout": "8s", "resources": {"cpu": 1000}},
        "UNSCHEDULABLE",
        "Insufficient cpu",
        7,
    ),
    "a claim that does not exist": (
        {"volumes": [{"pvc": "absent", "mount_path": "/data"}]},
        {"start_timeout": "8s"},
        "UNSCHEDULABLE",
        '"absent" not found',
        7,
    ),
}


def test_each_trouble_is_given_its_own_patience_and_then_told(projects: Projects, namespace: Namespace) -> None:
    """All at once: nothing here computes, all of it waits."""
    with ThreadPoolExecutor(max_workers=len(PATIENCE)) as pool:
        waiting = {}
        for name, (options, config, *_) in PATIENCE.items():
            run, began = submitted(projects, options, config), time.monotonic()
            waiting[name] = pool.submit(lambda run=run, began=began: (ended(run), time.monotonic() - began))
        for name, (_, _, reason, words, at_least_s) in PATIENCE.items():
            view, took_s = waiting[name].result()
            check_failure(view, reason, words)
            assert took_s > at_least_s, f"{name} took {took_s:.0f} s"
    until(lambda: not namespace.ours("jobs") and not namespace.ours("secrets"), what="nothing is left")


@pytest.fixture(scope="session")
def shell_less_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with one file that is no program."""
    docker = pytest.importorskip("docker")
    folder = tmp_path_factory.mktemp("shell-less")
    (folder / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    name = f"{REGISTRY}/shell-less:1"
    try:
        client = docker.from_env()
        client.images.build(path=str(folder), tag=name, rm=True)
        client.images.push(name)
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine to make the image: {error}")
    return name


def test_an_image_without_a_shell_is_told_as_such(projects: Projects, shell_less_image: str) -> None:
    run = submitted(projects, {"image": shell_less_image}, {})
    assert run.wait() is False
    check_failure(run.view(), "CONTAINER_CONFIG", "/bin/sh")


def test_a_pod_refused_after_submission_is_told(projects: Projects, namespace: Namespace) -> None:
    """The Job is accepted and nothing happens: admission changed between the dry run and the pod."""
    queued = with_options(projects, queue="team")
    run = queued.submit(queued.make("exit 0"))
    limit_range(namespace)
    namespace.patch("jobs", objects.name(namespace.job(run.run_id)), {"spec": {"suspend": False}})
    assert run.wait() is False
    view = run.view()
    assert (view.status, view.tag("reason")) == ("FAILED", "REFUSED")
    assert "maximum memory usage per Container" in artifact(run.run_id, "logs/error.txt").decode()


def test_a_clock_that_jumps_ends_no_job_that_waits(
    projects: Projects, namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a night's sleep of the laptop: what is known is of yesterday, and the clock is of today."""
    nowhere = with_options(projects, node_selector={"there-is": "none"})
    run = nowhere.submit(nowhere.make("exit 0"))
    compute, handle = run._compute, run._handle

    def diagnosis() -> Diagnosis | None:
        return compute.status(handle).diagnosis

    until(lambda: (found := diagnosis()) and found.reason is Reason.UNSCHEDULABLE, 30, "it has no node")
    until(lambda: watch.VIEWS.view(compute._api, namespace.name, names.job_name(run.run_id)).look("") is not None)
    tomorrow = SimpleNamespace(time=lambda: time.time() + 86_400, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(watch, "time", tomorrow)
    for _ in range(10):
        found = diagnosis()
        assert found is not None
        assert (found.reason, found.fatal) == (Reason.UNSCHEDULABLE, False)
    run.cancel()


def test_a_queued_job_waits_without_complaint(projects: Projects, namespace: Namespace) -> None:
    queued = with_options(projects, queue="team")
    run = queued.submit(queued.make("echo admitted"))
    status = run._compute.status(run._handle)
    assert (status.phase.value, status.diagnosis) == ("queued", None)
    assert "team" in status.detail
    assert not namespace.ours("pods")
    namespace.patch("jobs", objects.name(namespace.job(run.run_id)), {"spec": {"suspend": False}})
    assert ended(run).status == "FINISHED"


# ------------------------------------------------------------------------------------------------- while it runs


def running(projects: Projects, namespace: Namespace, script: str, **config: Any) -> Any:
    run = projects.submit(projects.make(f"echo started; {script}"), **config)
    until(lambda: "started" in list(run.logs()), what="the program runs")
    return run


def test_a_program_that_overdoes_its_memory_is_told_so(projects: Projects) -> None:
    view = projects.run("echo before; exec tail /dev/zero", resources={"memory": "64Mi"})
    assert (view.status, view.tag("reason")) == ("FAILED", "OOM")
    assert stored_log(view.run_id).startswith(b"before\n")


def test_a_main_container_that_is_killed_as_a_whole_is_finalised_by_the_sidecar(
    projects: Projects, shell_image: str
) -> None:
    """As an out-of-memory kill does on cgroup v2: every process at once, execute included, and nobody watches."""
    killer = """
    victims() { grep -l -e 'execute[.]py' /proc/[0-9]*/cmdline; grep -l MLFLOW_REMOTE_OUTPUT_DIR /proc/[0-9]*/environ; }
    until victims 2>/dev/null | grep -q environ; do sleep 0.2; done
    sleep 2
    kill -9 $(victims 2>/dev/null | cut -d/ -f3 | sort -u)
    """
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {"name": "killer", "image": shell_image, "command": ["sh", "-c", killer], "securityContext": security}
    sharing = with_options(projects, pod_template={"spec": {"shareProcessNamespace": True, "containers": [container]}})
    run = sharing.submit(sharing.make("echo before; sleep 600"))
    view = until(lambda: (v := run._tracking.view(run.run_id)).ended and v, 60, "finalised with nobody watching")
    assert (view.status, view.tag("reason")) == ("FAILED", "KILLED_BY_SYSTEM")
    assert view.tag("finalized").startswith("runner")
    assert stored_log(run.run_id) == b"before\n"


@pytest.mark.parametrize("how", ["pod", "job", "orphan"])
def test_somebody_who_deletes_it_is_told_of(projects: Projects, namespace: Namespace, how: str) -> None:
    run = running(projects, namespace, "trap 'echo saving; exit 9' TERM; while :; do sleep 0.1; done")
    job = objects.name(namespace.job(run.run_id))
    if how == "pod":
        namespace.delete("pods", objects.name(namespace.pod(run.run_id)))
    else:
        namespace.delete("jobs", job, propagationPolicy="Orphan" if how == "orphan" else "Background")
    if how == "orphan":
        assert not run._compute.status(run._handle).gone
        namespace.delete("pods", objects.name(namespace.pod(run.run_id)))
    view = ended(run)
    assert (view.status, view.tag("reason")) == ("FAILED", "TERMINATED")
    log = stored_log(run.run_id)
    assert log.startswith(b"started\n")
    assert log.endswith(b"saving\n")


def test_a_pod_deleted_by_force_is_found_out(projects: Projects, namespace: Namespace) -> None:
    run = running(projects, namespace, "while :; do sleep 0.1; done")
    namespace.delete("pods", objects.name(namespace.pod(run.run_id)), gracePeriodSeconds=0)
    view = ended(run)
    assert view.status == "FAILED"
    assert "started" in list(run.logs())


def test_an_evicted_pod_is_not_blamed_on_the_program(projects: Projects, namespace: Namespace) -> None:
    run = running(projects, namespace, "while :; do sleep 0.1; done")
    pod = objects.name(namespace.pod(run.run_id))
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace.name}}
    namespace.api.create(f"{namespace.path('pods', pod)}/eviction", body)
    view = ended(run)
    assert view.status == "FAILED"
    assert view.tag("reason") in ("TERMINATED", "EVICTED")


def test_a_namespace_deleted_under_a_run_ends_it(projects: Projects, namespace: Namespace) -> None:
    run = running(projects, namespace, "trap 'echo saving; exit 9' TERM; while :; do sleep 0.1; done")
    namespace.api.delete(f"/api/v1/namespaces/{namespace.name}", {})
    assert run.wait() is False
    view = run.view()
    assert view.status == "FAILED"
    assert view.tag("reason") in ("NAMESPACE_TERMINATING", "TERMINATED", "JOB_DELETED")
    assert stored_log(run.run_id).startswith(b"started\n")


def test_a_run_is_whole_after_kubernetes_removed_its_job(projects: Projects, namespace: Namespace) -> None:
    template = {"apiVersion": "batch/v1", "kind": "Job", "spec": {"ttlSecondsAfterFinished": 0, "template": {}}}
    brief = with_options(projects, pod_template=template)
    run = brief.submit(brief.make("echo said; exit 3"))
    until(lambda: not namespace.ours("jobs") and not namespace.ours("pods"), what="Kubernetes removes the Job")
    view = ended(run)
    assert (view.status, view.tag("reason"), view.tag("exit_code")) == ("FAILED", "USER_ERROR", "3")
    assert stored_log(run.run_id) == b"said\n"
    assert list(attach(run.run_id).logs(follow=True)) == ["said"]
