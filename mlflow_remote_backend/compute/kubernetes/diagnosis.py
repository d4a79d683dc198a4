"""What the API shows of a job -> :class:`~mlflow_remote_backend.job.JobStatus`. Pure: the table that decides.

``gone`` is proof, never a guess: the Job has its terminal condition, or its pod has ended and there will be no other,
or neither exists any more. A suspended Job is queued, a Job without a pod is explained by its events, a pod by its
conditions and containers (``waiting``), a pod that has ended by what ended it (``ending``).
"""

from __future__ import annotations

import dataclasses

from ...job import Diagnosis, JobStatus, Phase, Reason
from . import ending, names, objects, waiting
from .manifest import MAIN, OBSERVE, PREPARE
from .objects import Observation, Patience, Raw

NODE_SILENT = ("NodeNotReady", "TaintManagerEviction")
FINISHED = ("Complete", "Failed")
DELETION_MARGIN_S = 60.0  # beyond a deleted pod's grace, until its kubelet counts as silent


def assess(seen: Observation) -> JobStatus:
    """The job's status. Its attempt and exit code are those of its newest pod."""
    job = seen.job
    pods = own_pods(seen)
    if job is None or (seen.uid and objects.uid(job) != seen.uid):
        return _without_job(seen, pods)
    status = _with_job(dataclasses.replace(seen, pods=pods), job)
    return dataclasses.replace(status, job_uid=objects.uid(job))


def own_pods(seen: Observation) -> list[Raw]:
    """The pods of the very Job we mean, newest first; a namesake's are not ours."""
    wanted = seen.uid or (objects.uid(seen.job) if seen.job else "")
    own = [pod for pod in seen.pods if not wanted or objects.label(pod, names.JOB_UID) in (wanted, "")]
    return sorted(own, key=lambda pod: (not objects.ended(pod), objects.created_at(pod)), reverse=True)


# ---------------------------------------------------------------------------------------------------------- no Job


def _without_job(seen: Observation, pods: list[Raw]) -> JobStatus:
    if not seen.uid and not pods:
        return JobStatus(Phase.CREATING, detail="the Job does not exist yet")
    reason = Reason.NAMESPACE_TERMINATING if seen.namespace_terminating else Reason.JOB_DELETED
    message = (
        "The job's namespace was deleted."
        if seen.namespace_terminating
        else "The Job was deleted, by somebody or by its time to live."
    )
    found = Diagnosis(reason, message, hint="What was uploaded until then is in the run.")
    living = [pod for pod in pods if not objects.ended(pod)]
    if living:
        ongoing = _of_pod(dataclasses.replace(seen, pods=living), living[0], Patience())
        told = dataclasses.replace(found, fatal=False, message="The Job was deleted; its pod has not ended yet.")
        return dataclasses.replace(ongoing, diagnosis=told, gone=False, job_uid=seen.uid)
    if pods:
        ended = _ended(pods[0])
        return dataclasses.replace(ended, diagnosis=_better(ended.diagnosis, found), job_uid=seen.uid)
    return JobStatus(Phase.DONE, found, gone=True, job_uid=seen.uid)


def _better(told: Diagnosis | None, otherwise: Diagnosis) -> Diagnosis:
    """What the pod itself tells, unless that is no more than that it was stopped."""
    vague = (Reason.TERMINATED, Reason.KILLED_BY_SYSTEM)
    return otherwise if told is None or told.reason in vague else told


# ------------------------------------------------------------------------------------------------------- with a Job


def _with_job(seen: Observation, job: Raw) -> JobStatus:
    patience = Patience.of(job)
    finished = next((kind for kind in FINISHED if objects.holds(job, kind)), "")
    if finished:
        return _finished(seen, job)
    living = [pod for pod in seen.pods if not objects.ended(pod)]
    if living:
        status = _of_pod(seen, living[0], patience)
        if (job.get("spec") or {}).get("suspend"):
            status = dataclasses.replace(status, detail="suspended by somebody; its pod is being stopped")
        return _noting_deletion(status, job)
    if (job.get("spec") or {}).get("suspend") and not objects.annotation(job, names.RELEASED):
        return JobStatus(Phase.CREATING, detail="the Job exists, and its submitter has not let it go yet")
    if (job.get("spec") or {}).get("suspend"):
        return JobStatus(Phase.QUEUED, detail=_suspension(job), attempt=_next_attempt(seen))
    if seen.pods and _no_other_pod_follows(job, seen.pods[0]):
        return _ended(seen.pods[0])
    if objects.deleted_at(job):
        found = Diagnosis(Reason.JOB_DELETED, "The Job is being deleted.", fatal=False)
        return JobStatus(Phase.STARTING, found, attempt=_next_attempt(seen))
    found_or_none = waiting.refused_pod(seen, patience) or waiting.not_started(seen, patience)
    detail = "waiting for the next attempt" if seen.pods else "waiting for a pod"
    return JobStatus(Phase.QUEUED, found_or_none, attempt=_next_attempt(seen), detail=detail)


def _suspension(job: Raw) -> str:
    queue = objects.label(job, names.QUEUE)
    return f"suspended, in queue {queue}" if queue else "suspended"


def _next_attempt(seen: Observation) -> int:
    return max((objects.attempt(pod) + 1 for pod in seen.pods), default=0)


def _no_other_pod_follows(job: Raw, pod: Raw) -> bool:
    """The controller has decided so, or every attempt was used: its terminal condition comes seconds later."""
    if objects.holds(job, "FailureTarget") or objects.holds(job, "SuccessCriteriaMet"):
        return True
    if objects.pod_phase(pod) == "Succeeded":
        return True
    allowed = objects.annotation(job, names.ATTEMPTS)
    return objects.attempt(pod) + 1 >= (int(allowed) if allowed.isdigit() else 1)


def _noting_deletion(status: JobStatus, job: Raw) -> JobStatus:
    if not objects.deleted_at(job) or status.diagnosis is not None:
        return status
    found = Diagnosis(Reason.JOB_DELETED, "The Job is being deleted.", fatal=False)
    return dataclasses.replace(status, diagnosis=found)


def _finished(seen: Observation, job: Raw) -> JobStatus:
    """The Job's terminal condition: since Kubernetes 1.31 set only after all pods have ended."""
    failed = objects.condition(job, "Failed") if objects.holds(job, "Failed") else None
    if seen.pods and not objects.ended(seen.pods[0]):
        return _of_pod(seen, seen.pods[0], Patience.of(job))
    if seen.pods:
        ended = dataclasses.replace(_ended(seen.pods[0]), gone=True)
        if failed is None or failed.get("reason") != "DeadlineExceeded":
            return ended
        return dataclasses.replace(ended, diagnosis=_better(ended.diagnosis, _job_failure(failed)))
    if failed is None:
        found = Diagnosis(Reason.FINALIZE_INCOMPLETE, "The program ended well, but its run was not finalised.")
        return JobStatus(Phase.DONE, found, exit_code=0, gone=True)
    return JobStatus(Phase.DONE, _job_failure(failed), gone=True)


def _job_failure(failed: Raw) -> Diagnosis:
    """Only the Job is left to tell. Its condition names the rule that ended it, which is not the cause."""
    words = f"{failed.get('reason')}: {failed.get('message')}"
    if failed.get("reason") == "DeadlineExceeded":
        return Diagnosis(Reason.TIMEOUT, "The Job ran into its last limit of time, which deletes its pod.", words)
    # A failed Job keeps its pods: one that is missing was deleted, by a person, a drain or with its node.
    return Diagnosis(Reason.TERMINATED, "The job's pod was deleted, and with it what it could tell.", words)


def _ended(pod: Raw) -> JobStatus:
    """A pod after which none follows: its sidecar has ended too."""
    found, code = ending.cause(pod), ending.exit_code(pod)
    if found.reason is Reason.OK:
        found = Diagnosis(
            Reason.FINALIZE_INCOMPLETE,
            "The program ended well, but not everything could be uploaded, and its run was not finalised.",
            "; ".join(map(str, ending.runner_record(pod).get("pending") or ())),
            hint="The tracking server may have been out of reach for longer than `finalize_timeout`.",
        )
    return JobStatus(Phase.DONE, found, exit_code=code, gone=True, attempt=objects.attempt(pod))


# ----------------------------------------------------------------------------------------------------- a living pod


def _of_pod(seen: Observation, pod: Raw, patience: Patience) -> JobStatus:
    phase, detail = _progress(pod)
    status = JobStatus(phase, detail=detail, attempt=objects.attempt(pod), exit_code=ending.exit_code(pod))
    found = _node_lost(seen, pod, patience) or ending.disruption(pod)
    if found is not None and found.fatal and found.reason is not Reason.NODE_LOST:
        found = dataclasses.replace(found, fatal=False)  # it has not ended yet, and may be repeated
    if found is None and phase is Phase.QUEUED:
        found = waiting.unscheduled(pod, seen, patience)
    if found is None and phase in (Phase.STARTING, Phase.PREPARING):
        found = waiting.stuck_container(pod, seen, patience)
    if found is None and phase is Phase.RUNNING:
        found = waiting.crashing_sidecar(pod)
    if found is None and phase in (Phase.QUEUED, Phase.STARTING):
        found = waiting.not_started(seen, patience)
    return dataclasses.replace(status, diagnosis=found)


def _progress(pod: Raw) -> tuple[Phase, str]:
    """How far it is, with a line for a person who waits."""
    main, prepare, observe = (objects.container(pod, each) for each in (MAIN, PREPARE, OBSERVE))
    if main.state == "running":
        return Phase.RUNNING, ""
    if main.state == "terminated" or (prepare.state == "terminated" and prepare.exit_code != 0):
        return Phase.FINALIZING, ""
    if prepare.state == "running":
        return Phase.PREPARING, ""
    if not (pod.get("spec") or {}).get("nodeName"):
        gated = (objects.condition(pod, "PodScheduled") or {}).get("reason") == "SchedulingGated"
        return Phase.QUEUED, "held back by a scheduling gate" if gated else "waiting for a node"
    if prepare.state == "terminated":  # a job only moves forward
        return Phase.PREPARING, "starting the program's container"
    pulling = next((each.image for each in (observe, prepare) if each.state == "waiting" and each.image), "")
    return Phase.STARTING, f"starting the pod, image {pulling}" if pulling else "starting the pod"


def _node_lost(seen: Observation, pod: Raw, patience: Patience) -> Diagnosis | None:
    """Signs that the kubelet is silent, which last as long as the pod. The program may well be running on."""
    since = _silent_since(pod, seen.now)
    claims_to_run = any(each.state == "running" for each in objects.containers(pod))
    if not since or not claims_to_run:
        return None
    waited_s = seen.now - since
    node = (pod.get("spec") or {}).get("nodeName")
    event = objects.latest_event(seen.events, pod, *NODE_SILENT) or {}
    return Diagnosis(
        Reason.NODE_LOST,
        f"Node {node} does not answer; the program may still be running there.",
        str(event.get("message") or ""),
        "The run ends by itself when the node is back, or is given up after `node_lost_timeout`.",
        fatal=waited_s > patience.node_lost_timeout_s,
        patience_s=patience.node_lost_timeout_s,
    )


def _silent_since(pod: Raw, now: float) -> float:
    """0: it is not. The node controller turns Ready alone, without a reason, as no kubelet does; and a kubelet ends a
    deleted pod when its grace is over.
    """
    ready, containers_ready = (objects.condition(pod, each) or {} for each in ("Ready", "ContainersReady"))
    if ready.get("status") == "False" and not ready.get("reason") and containers_ready.get("status") == "True":
        return objects.seconds(ready.get("lastTransitionTime"))
    grace_over_at = objects.seconds(objects.metadata(pod).get("deletionTimestamp"))
    return grace_over_at if grace_over_at and now > grace_over_at + DELETION_MARGIN_S else 0.0
