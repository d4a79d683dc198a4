"""What a real cluster showed of jobs in trouble (recorded/, see record.py) is told as it should be."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlflow_remote_backend.compute.kubernetes import diagnosis, names, objects
from mlflow_remote_backend.compute.kubernetes.compute import _needs_events
from mlflow_remote_backend.compute.kubernetes.objects import Observation
from mlflow_remote_backend.job import JobStatus, Phase, Reason

RECORDED = {path.stem: json.loads(path.read_text()) for path in Path(__file__).parent.glob("recorded/*.json")}
Document = dict[str, Any]


def seen(name: str, later_s: float = 0, change: Callable[[Document], object] = lambda document: None) -> Observation:
    document = copy.deepcopy(RECORDED[name])
    change(document)
    job = document["job"]
    return Observation(
        job, document["pods"], document["events"], document["now"] + later_s, objects.uid(job) if job else "uid"
    )


def told(name: str, later_s: float = 0, change: Callable[[Document], object] = lambda document: None) -> JobStatus:
    return diagnosis.assess(seen(name, later_s, change))


# ------------------------------------------------------------------------------------------- the job cannot start

WAITING = [
    # recording, seconds later, phase, reason, fatal, in Kubernetes' words, in our hint
    ("image-not-found", -40, Phase.PREPARING, Reason.IMAGE_PULL, False, "not found", "image_pull_secrets"),
    ("image-not-found", 30, Phase.PREPARING, Reason.IMAGE_PULL, True, "not found", "image_pull_secrets"),
    ("image-registry-down", 30, Phase.PREPARING, Reason.IMAGE_PULL, False, "connection refused", "still trying"),
    ("image-registry-down", 660, Phase.PREPARING, Reason.IMAGE_PULL, True, "connection refused", ""),
    (
        "image-never",
        0,
        Phase.PREPARING,
        Reason.IMAGE_PULL,
        True,
        "not present with pull policy of Never",
        "on the node",
    ),
    ("image-invalid-name", 0, Phase.PREPARING, Reason.IMAGE_PULL, True, "must be lowercase", "Check its name"),
    ("config-missing-key", 0, Phase.PREPARING, Reason.CONTAINER_CONFIG, False, 'secret "absent" not found', "exist"),
    ("config-missing-key", 61, Phase.PREPARING, Reason.CONTAINER_CONFIG, True, 'secret "absent" not found', "exist"),
    ("config-root-image", 0, Phase.STARTING, Reason.CONTAINER_CONFIG, True, "will run as root", "run_as_user"),
    ("unschedulable-cpu", 0, Phase.QUEUED, Reason.UNSCHEDULABLE, False, "1 Insufficient cpu", "`resources`"),
    ("unschedulable-cpu", 1801, Phase.QUEUED, Reason.UNSCHEDULABLE, True, "1 Insufficient cpu", "`resources`"),
    ("unschedulable-selector", 0, Phase.QUEUED, Reason.UNSCHEDULABLE, False, "node affinity/selector", "node_selector"),
    ("unschedulable-claim", 0, Phase.QUEUED, Reason.UNSCHEDULABLE, False, '"absent" not found', "get pvc"),
    ("quota-used-up", 0, Phase.QUEUED, Reason.QUOTA, False, "exceeded quota: quota", "when others end"),
    ("quota-used-up", 1801, Phase.QUEUED, Reason.QUOTA, True, "exceeded quota: quota", ""),
    ("quota-unstated", 0, Phase.QUEUED, Reason.QUOTA, True, "must specify requests.memory", "State cpu and memory"),
    ("limit-range", 0, Phase.QUEUED, Reason.REFUSED, True, "maximum memory usage per Container", "LimitRange"),
    ("pod-security", 0, Phase.QUEUED, Reason.REFUSED, True, 'violates PodSecurity "restricted', "pod_template"),
    ("service-account", 0, Phase.QUEUED, Reason.REFUSED, True, '"absent" not found', "service_account"),
    ("volume-missing-secret", 61, Phase.STARTING, Reason.VOLUME, False, 'secret "absent" not found', "volumes"),
    ("volume-missing-secret", 125, Phase.STARTING, Reason.VOLUME, True, 'secret "absent" not found', "volumes"),
]


@pytest.mark.parametrize(("name", "later_s", "phase", "reason", "fatal", "words", "hint"), WAITING)
def test_a_job_that_cannot_start_is_explained(
    name: str, later_s: float, phase: Phase, reason: Reason, fatal: bool, words: str, hint: str
) -> None:
    status = told(name, later_s)
    assert status.diagnosis is not None
    assert (status.phase, status.diagnosis.reason, status.diagnosis.fatal) == (phase, reason, fatal)
    assert words in status.diagnosis.words
    assert hint in status.diagnosis.hint
    assert status.diagnosis.message
    assert not status.gone


def test_waiting_is_not_a_diagnosis_while_it_is_short() -> None:
    assert told("volume-missing-secret").diagnosis is None
    assert told("running").diagnosis is None


def test_what_waits_on_purpose_is_queued_without_blame() -> None:
    status = told("scheduling-gated", later_s=20)
    assert (status.phase, status.diagnosis) == (Phase.QUEUED, None)
    assert "gate" in status.detail


def test_a_wish_to_fail_at_once_where_nothing_fits_is_kept() -> None:
    def fail_fast(document: Document) -> None:
        limits = json.loads(document["job"]["metadata"]["annotations"][names.LIMITS])
        document["job"]["metadata"]["annotations"][names.LIMITS] = json.dumps(
            {**limits, "fail_fast_unschedulable": True}
        )

    found = told("unschedulable-cpu", change=fail_fast).diagnosis
    assert found is not None
    assert found.fatal


def test_patience_is_the_jobs_own() -> None:
    def impatient(document: Document) -> None:
        document["job"]["metadata"]["annotations"][names.LIMITS] = json.dumps({"start_timeout_s": 1})

    found = told("unschedulable-cpu", 30, impatient).diagnosis
    assert found is not None
    assert found.fatal


def test_a_suspended_job_is_queued_for_as_long_as_it_takes() -> None:
    def suspended(document: Document) -> None:
        document.update(pods=[], events=[])
        document["job"]["spec"]["suspend"] = True
        document["job"]["metadata"]["labels"][names.QUEUE] = "team"
        document["job"]["metadata"]["annotations"][names.RELEASED] = "true"

    status = told("running", 1_000_000, suspended)
    assert (status.phase, status.diagnosis) == (Phase.QUEUED, None)
    assert "queue team" in status.detail


def test_a_job_that_was_never_let_go_is_still_being_created() -> None:
    def suspended(document: Document) -> None:
        document.update(pods=[], events=[])
        document["job"]["spec"]["suspend"] = True
        document["job"]["metadata"]["annotations"].pop(names.RELEASED, None)

    status = told("running", 1_000_000, suspended)
    assert (status.phase, status.gone, status.diagnosis) == (Phase.CREATING, False, None)


def test_a_job_that_its_queue_has_taken_back_waits_though_its_pod_has_ended() -> None:
    def taken_back(document: Document) -> None:
        document["job"]["spec"]["suspend"] = True
        document["job"]["metadata"].setdefault("annotations", {})[names.RELEASED] = "true"
        document["pods"][0]["status"]["phase"] = "Failed"

    status = told("suspended-running", change=taken_back)
    assert (status.phase, status.gone, status.diagnosis) == (Phase.QUEUED, False, None)


def test_a_job_suspended_while_it_runs_says_so() -> None:
    status = told("suspended-running")
    assert "suspended" in status.detail
    assert not status.gone


def test_messages_that_differ_in_counts_are_the_same() -> None:
    one, other = "0/5 nodes are available: 3 Insufficient cpu.", "0/6 nodes are available: 4 Insufficient cpu."
    assert objects.same_words(one, other)
    assert not objects.same_words(one, "0/5 nodes are available: 3 Insufficient memory.")


# --------------------------------------------------------------------------------------------------- the job ended

ENDED = [
    # recording, reason, exit code, in the message, in Kubernetes' words
    ("exit-3", Reason.USER_ERROR, 3, "exit code 3", "said before"),
    ("exit-127", Reason.USER_ERROR, 127, "command not found", "absent"),
    ("segfault", Reason.USER_ERROR, 139, "SIGSEGV", ""),
    ("killed", Reason.KILLED_BY_SYSTEM, 137, "not by its container's memory limit", ""),
    ("oom-killed", Reason.OOM, 137, "memory limit", "OOMKilled"),
    ("exit-0", Reason.FINALIZE_INCOMPLETE, 0, "not finalised", ""),
    ("start-no-such-program", Reason.CONTAINER_CONFIG, None, "could not be started", "/absent"),
    ("prepare-failed", Reason.BOOTSTRAP, None, "exit code 3", "no such snapshot"),
    ("observe-reported", Reason.TRACKING_UNREACHABLE, 0, "does not answer", "x"),
    ("evicted-disk", Reason.EVICTED, 137, "evicted", 'EmptyDir volume "tmp" exceeds'),
    ("pod-deadline", Reason.TIMEOUT, 137, "limit of time", "DeadlineExceeded"),
    ("job-deadline", Reason.TIMEOUT, None, "limit of time", "DeadlineExceeded"),
    ("node-rejected", Reason.NODE_REJECTED, None, "never started", "OutOfcpu"),
    ("pod-deleted", Reason.TERMINATED, None, "deleted", "MaxFailedIndexesExceeded"),
    ("evicted-api", Reason.TERMINATED, None, "deleted", "MaxFailedIndexesExceeded"),
]


@pytest.mark.parametrize(("name", "reason", "exit_code", "message", "words"), ENDED)
def test_an_ended_job_is_gone_and_explained(
    name: str, reason: Reason, exit_code: int | None, message: str, words: str
) -> None:
    status = told(name)
    assert status.gone
    assert status.phase is Phase.DONE
    assert status.diagnosis is not None
    assert (status.diagnosis.reason, status.exit_code) == (reason, exit_code)
    assert message in status.diagnosis.message
    assert words in status.diagnosis.words


def test_a_pod_that_ended_is_proof_before_its_job_says_so() -> None:
    def condition_still_missing(document: Document) -> None:
        document["job"]["status"] = {"active": 1}

    assert told("exit-3", change=condition_still_missing).gone


def test_a_pod_that_ended_is_no_proof_while_another_attempt_may_follow() -> None:
    def one_more(document: Document) -> None:
        document["job"]["status"] = {"active": 1}
        document["job"]["metadata"]["annotations"][names.ATTEMPTS] = "2"

    status = told("exit-3", change=one_more)
    assert not status.gone
    assert status.attempt == 1


def test_the_last_attempt_is_the_one_that_is_told() -> None:
    def second_attempt(document: Document) -> None:
        later = copy.deepcopy(document["pods"][0])
        later["metadata"].update(uid="later", creationTimestamp="2099-01-01T00:00:00Z")
        later["metadata"]["annotations"][names.ATTEMPT] = "1"
        later.update(status={"phase": "Pending"}, spec={})
        document["pods"].append(later)
        document["job"]["status"] = {"active": 1}
        document["job"]["metadata"]["annotations"][names.ATTEMPTS] = "2"

    status = told("exit-3", change=second_attempt)
    assert (status.attempt, status.phase, status.gone) == (1, Phase.QUEUED, False)


# ------------------------------------------------------------------------------------------------- somebody's hands


def without_job(document: Document) -> None:
    document["job"] = None


def no_pods(document: Document) -> None:
    document["pods"] = []


def test_a_deleted_job_without_pods_is_gone() -> None:
    seen_now = Observation(None, [], now=1.0, uid="the-uid")
    status = diagnosis.assess(seen_now)
    assert status.gone
    assert status.diagnosis is not None
    assert status.diagnosis.reason is Reason.JOB_DELETED


def test_a_deleted_job_whose_pod_still_runs_is_not_gone() -> None:
    document = RECORDED["running"]
    status = diagnosis.assess(
        Observation(None, document["pods"], now=document["now"], uid=objects.uid(document["job"]))
    )
    assert not status.gone
    assert status.phase is Phase.RUNNING
    assert status.diagnosis is not None
    assert (status.diagnosis.reason, status.diagnosis.fatal) == (Reason.JOB_DELETED, False)


def test_a_namesake_of_the_job_is_not_the_job() -> None:
    document = RECORDED["running"]
    status = diagnosis.assess(Observation(document["job"], document["pods"], now=document["now"], uid="another-uid"))
    assert status.gone
    assert status.diagnosis is not None
    assert status.diagnosis.reason is Reason.JOB_DELETED


def test_a_job_that_is_only_being_created_is_not_gone() -> None:
    status = diagnosis.assess(Observation(None, [], now=1.0))
    assert (status.phase, status.gone) == (Phase.CREATING, False)


def test_a_deleted_namespace_is_told() -> None:
    status = diagnosis.assess(Observation(None, [], now=1.0, uid="u", namespace_terminating=True))
    assert status.diagnosis is not None
    assert status.diagnosis.reason is Reason.NAMESPACE_TERMINATING


def test_a_sidecar_that_crashes_is_told_and_does_not_end_the_program() -> None:
    status = told("observe-crashing")
    assert status.phase is Phase.RUNNING
    assert status.diagnosis is not None
    assert (status.diagnosis.reason, status.diagnosis.fatal) == (Reason.BOOTSTRAP, False)
    assert "no module named observe" in status.diagnosis.words


def test_an_eviction_is_told_before_the_pod_has_ended() -> None:
    def evicted(document: Document) -> None:
        told_by = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "EvictionByEvictionAPI",
            "message": "evicting",
        }
        document["pods"][0]["status"]["conditions"].append(told_by)

    status = told("running", change=evicted)
    assert not status.gone
    assert status.diagnosis is not None
    assert (status.diagnosis.reason, status.diagnosis.fatal) == (Reason.EVICTED, False)


def second_attempt(document: Document) -> None:
    """Of three, after one that ran for ten hours."""
    job = document["job"]
    job["metadata"]["annotations"][names.ATTEMPTS] = "3"
    started = datetime.fromtimestamp(document["now"] - 36_000, timezone.utc)
    job["status"].update(startTime=started.isoformat(), failed=1, active=0)
    for pod in document["pods"]:
        pod["metadata"]["annotations"][names.ATTEMPT] = "1"


def test_why_an_image_cannot_be_pulled_is_asked_for_as_long_as_the_program_does_not_run() -> None:
    """Before Kubernetes 1.32 a container that waits for its image says only that it does."""
    for name, wanted in {"image-not-found": True, "unschedulable-cpu": True, "running": False, "exit-3": False}.items():
        assert _needs_events(told(name), seen(name)) == wanted


@pytest.mark.parametrize(
    "words",
    [
        "etcdserver: request timed out",
        "etcdserver: leader changed",
        "Timeout: request did not complete within requested timeout - context deadline exceeded",
        "the server is currently unable to handle the request",
        "Post https://10.0.0.1:443/api/v1/pods: dial tcp 10.0.0.1:443: connect: connection refused",
        'Internal error occurred: admission plugin "LimitRanger" failed to complete validation in 13s',
        'pods "mlr-1-0-x" is forbidden: status unknown for quota: team, resources: limits.cpu',
    ],
)
def test_a_cluster_that_cannot_make_a_pod_now_is_waited_for(words: str) -> None:
    """The Job controller tries again by itself, whatever it was."""

    def said(document: Document) -> None:
        for event in document["events"]:
            event["message"] = f"Error creating: {words}"

    for later_s, fatal in ((0, False), (1801, True)):
        found = told("quota-used-up", later_s, said).diagnosis
        assert found is not None
        assert (found.reason, found.fatal, words in found.words) == (Reason.REFUSED, fatal, True)


@pytest.mark.parametrize(
    ("reason", "words", "patience_s"),
    [
        ("CreateContainerConfigError", "failed to sync secret cache: timed out waiting for the condition", 60),
        ("CreateContainerError", "failed to reserve container name main_1: name main_1 is reserved for 5aa1", 300),
        ("CreateContainerError", 'dial unix /run/containerd.sock: connect: connection refused"', 60),
        ("CreateContainerError", "rpc error: code = Unavailable desc = error reading from server: EOF", 60),
        ("ImageInspectError", 'Failed to inspect image "": rpc error: code = Unavailable', 600),
    ],
)
def test_a_busy_or_restarting_node_is_waited_for(reason: str, words: str, patience_s: float) -> None:
    def stuck(document: Document) -> None:
        for each in document["pods"][0]["status"]["containerStatuses"]:
            each["state"] = {"waiting": {"reason": reason, "message": words}}

    began = seen("config-missing-key", change=stuck)
    since = max(each.finished_at for each in objects.containers(began.pods[0]))
    first = min([since, *(objects.event_first_time(each) for each in began.events)])
    for after_s, fatal in ((1, False), (patience_s + 60, True)):
        at = first if fatal else began.now
        found = told("config-missing-key", at + after_s - began.now, stuck).diagnosis
        assert found is not None
        assert (found.fatal, found.patience_s) == (fatal, patience_s)


def test_an_image_name_that_a_node_does_not_take_is_not_waited_for() -> None:
    words = 'Failed to inspect image "": short name mode is enforcing, but image name app:1 returns ambiguous list'

    def stuck(document: Document) -> None:
        for each in document["pods"][0]["status"]["containerStatuses"]:
            each["state"] = {"waiting": {"reason": "ImageInspectError", "message": words}}

    found = told("config-missing-key", 60, stuck).diagnosis
    assert found is not None
    assert (found.reason, found.fatal, "with its registry" in found.hint) == (Reason.IMAGE_PULL, True, True)


def test_a_deadline_that_comes_before_its_pod_has_ended_waits_for_it() -> None:
    """Before Kubernetes 1.31 the Job is Failed at once, and its sidecar still uploads."""

    def over(document: Document) -> None:
        failed = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "longer than specified"}
        document["job"]["status"]["conditions"] = [failed]

    ongoing = told("running", change=over)
    assert (ongoing.phase, ongoing.gone) == (Phase.RUNNING, False)
    ended = told("killed", change=over)
    assert ended.diagnosis is not None
    assert (ended.gone, ended.diagnosis.reason) == (True, Reason.TIMEOUT)


def test_another_attempt_has_a_patience_of_its_own() -> None:
    starting = told("volume-missing-secret", change=second_attempt)
    assert (starting.phase, starting.attempt, starting.diagnosis) == (Phase.STARTING, 1, None)
    late = told("volume-missing-secret", 1900, lambda document: (second_attempt(document), document["events"].clear()))
    assert late.diagnosis is not None
    assert (late.diagnosis.reason, late.diagnosis.fatal) == (Reason.START_TIMEOUT, True)
    refused = told("quota-used-up", change=second_attempt)
    assert refused.diagnosis is not None
    assert (refused.diagnosis.reason, refused.diagnosis.fatal) == (Reason.QUOTA, False)

    def between(document: Document) -> None:
        second_attempt(document)
        document["pods"][0]["metadata"]["annotations"][names.ATTEMPT] = "0"
        document["job"]["status"]["conditions"] = []

        refused_before = {
            "reason": "FailedCreate",
            "message": "no",
            "firstTimestamp": document["job"]["status"]["startTime"],
        }
        document["events"].append({**refused_before, "involvedObject": {"uid": objects.uid(document["job"])}})

    status = told("exit-3", change=between)
    assert (status.phase, status.detail, status.diagnosis) == (Phase.QUEUED, "waiting for the next attempt", None)
    assert (
        told("quota-used-up", change=lambda document: (second_attempt(document), document["events"].clear())).diagnosis
        is None
    )


def test_an_init_container_of_the_template_that_failed_is_named() -> None:
    def failed(document: Document) -> None:
        status = document["pods"][0]["status"]
        status["phase"] = "Failed"
        state = {"terminated": {"exitCode": 7, "reason": "Error", "message": "no such bucket\n"}}
        status["initContainerStatuses"].append({"name": "fetch-data", "state": state})
        for each in status["containerStatuses"]:
            each["state"] = {"waiting": {"reason": "PodInitializing"}}

    status = told("running", change=failed)
    assert status.diagnosis is not None
    assert (status.gone, status.diagnosis.reason) == (True, Reason.CONTAINER_CONFIG)
    assert "fetch-data" in status.diagnosis.message
    assert status.diagnosis.words == "no such bucket"


def node_silent(document: Document) -> None:
    pod = document["pods"][0]
    since = "2026-01-01T00:00:00Z"
    document["now"] = objects.seconds(since) + 60
    for condition in pod["status"]["conditions"]:
        if condition["type"] == "Ready":
            condition.update(status="False", lastTransitionTime=since)
    event = {"reason": "NodeNotReady", "message": "Node is not ready", "firstTimestamp": since, "lastTimestamp": since}
    document["events"].append({**event, "involvedObject": {"uid": objects.uid(pod)}})


def test_a_silent_node_is_lost_contact_until_patience_ends() -> None:
    early, late = told("running", 0, node_silent), told("running", 900, node_silent)
    assert early.diagnosis is not None
    assert late.diagnosis is not None
    assert (early.diagnosis.reason, early.diagnosis.fatal, early.gone) == (Reason.NODE_LOST, False, False)
    assert late.diagnosis.fatal
    assert early.phase is Phase.RUNNING


def deleted_long_ago(document: Document) -> None:
    document["pods"][0]["metadata"].update(deletionTimestamp="2026-01-01T00:30:30Z", deletionGracePeriodSeconds=1830)
    document["now"] = objects.seconds("2026-01-01T00:30:30Z") + 60


@pytest.mark.parametrize("sign", [node_silent, deleted_long_ago])
def test_a_silent_node_is_given_up_by_who_looks_days_later_too(sign: Callable[[Document], None]) -> None:
    """Events are kept for an hour."""
    found = told("running", 2 * 86_400, lambda document: (sign(document), document["events"].clear())).diagnosis
    assert found is not None
    assert (found.reason, found.fatal) == (Reason.NODE_LOST, True)


# ------------------------------------------------------------------------------------------------------- in general


@pytest.mark.parametrize("name", RECORDED)
def test_gone_is_never_said_while_a_pod_lives(name: str) -> None:
    status = told(name)
    living = [pod for pod in RECORDED[name]["pods"] if not objects.ended(pod)]
    assert not (status.gone and living)
    if living:
        assert not diagnosis.assess(Observation(None, living, now=1.0, uid="")).gone


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [prefix] if prefix else []
    for key, each in pairs:
        found += paths(each, (*prefix, key))
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_is_missing_an_answer_is_given(data: st.DataObject) -> None:
    """Fields that another Kubernetes does not set, or sets to null, never end in an exception."""
    document = copy.deepcopy(RECORDED[data.draw(st.sampled_from(sorted(RECORDED)))])
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.sampled_from(paths({k: document[k] for k in ("job", "pods", "events")})))
        parent = document
        for key in place[:-1]:
            parent = parent[key]
        if isinstance(parent, dict) and len(place) > 2:
            if data.draw(st.booleans()):
                parent[place[-1]] = None
            else:
                del parent[place[-1]]
    status = diagnosis.assess(Observation(document["job"], document["pods"], document["events"], document["now"]))
    assert isinstance(status, JobStatus)
