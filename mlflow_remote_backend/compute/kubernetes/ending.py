"""Why a job ended: raw Kubernetes objects -> Diagnosis. Pure.

Looked at in this order, since each explains what follows it: what befell the pod as a whole (deadline, eviction,
preemption, a lost node), what our runner recorded, then the containers from first to last. Exit codes come last: a
program that was killed with its node did not fail by itself.
"""

from __future__ import annotations

import json
import signal
from typing import Any

from ...job import VAGUE_REASONS, Diagnosis, Reason
from . import objects
from .manifest import MAIN, OBSERVE, PREPARE
from .objects import Container, Raw
from .waiting import container_hint

#: Reasons in a pod's own status (kubelet: eviction, lifecycle/predicate.go, nodeshutdown; controllers: nodelifecycle).
_POD_REASONS = {
    "Evicted": Reason.EVICTED,
    "DeadlineExceeded": Reason.TIMEOUT,
    "Preempting": Reason.PREEMPTED,
    "NodeLost": Reason.NODE_LOST,
    "NodeShutdown": Reason.NODE_LOST,
    "Shutdown": Reason.NODE_LOST,
    "Terminated": Reason.NODE_LOST,
    "NodeAffinity": Reason.NODE_REJECTED,
    "UnexpectedAdmissionError": Reason.NODE_REJECTED,
    "TopologyAffinityError": Reason.NODE_REJECTED,
    "InvalidNodeInfo": Reason.NODE_REJECTED,
    "SupplementalGroupsPolicyNotSupported": Reason.NODE_REJECTED,
    "PodOSNotSupported": Reason.NODE_REJECTED,
    "AppArmor": Reason.NODE_REJECTED,
    "SysctlForbidden": Reason.NODE_REJECTED,
}
#: Reasons of the condition DisruptionTarget.
_DISRUPTIONS = {
    "PreemptionByScheduler": Reason.PREEMPTED,
    "PreemptionByKubeScheduler": Reason.PREEMPTED,
    "DeletionByTaintManager": Reason.EVICTED,
    "EvictionByEvictionAPI": Reason.EVICTED,
    "DeletionByPodGC": Reason.NODE_LOST,
    "TerminationByKubelet": Reason.EVICTED,
}
_NEVER_STARTED = ("StartError", "ContainerCannotRun", "RunContainerError")
_SENTENCES = {
    Reason.EVICTED: "The job's pod was evicted from its node.",
    Reason.TIMEOUT: "The job ran into its last limit of time; Kubernetes ended it.",
    Reason.PREEMPTED: "The job's pod had to make room for one of higher priority.",
    Reason.NODE_LOST: "The job's node was lost or shut down.",
    Reason.NODE_REJECTED: "The node did not accept the job's pod; the program never started.",
}
_HINTS = {
    Reason.EVICTED: "Where it used too much disk, set `resources.ephemeral_storage`. See also `retry`.",
    Reason.TIMEOUT: "Our own `timeout` should have acted before; the node may have hung.",
    Reason.PREEMPTED: "Set `kubernetes.priority_class`, or `retry` with `on: disruption`.",
    Reason.NODE_LOST: "`retry` with `on: disruption` starts it again on another node.",
    Reason.NODE_REJECTED: "Submit it again; `retry` does so by itself.",
}


def cause(pod: Raw) -> Diagnosis:
    """Why a pod that has ended did so. Reason OK: its program ended well and our runner had nothing to say."""
    recorded = _recorded(pod)
    vague = recorded is not None and recorded.reason in VAGUE_REASONS
    return (
        _whole_pod(pod)
        or (_unseen_from_inside(pod) if vague else None)
        or recorded
        or _prepare(objects.container(pod, PREPARE))
        or _other_init_container(pod)
        or _program(objects.container(pod, MAIN), pod)
    )


def exit_code(pod: Raw) -> int | None:
    """The program's exit code, where its container ended by itself."""
    main = objects.container(pod, MAIN)
    if main.state != "terminated" or main.reason in ("ContainerStatusUnknown", *_NEVER_STARTED):
        return None
    return main.exit_code


def disruption(pod: Raw) -> Diagnosis | None:
    """What befalls a pod from outside, known before it has ended."""
    if not objects.holds(pod, "DisruptionTarget"):
        return None
    found = objects.condition(pod, "DisruptionTarget") or {}
    reason = _DISRUPTIONS.get(str(found.get("reason")), Reason.EVICTED)
    own = objects.status(pod)
    words = f"{found.get('reason')}: {own.get('message') or found.get('message') or ''}"
    return _told(reason, words)


def _whole_pod(pod: Raw) -> Diagnosis | None:
    own = objects.status(pod)
    reason, words = str(own.get("reason") or ""), str(own.get("message") or "")
    if reason in _POD_REASONS or reason.startswith("OutOf"):
        return _told(_POD_REASONS.get(reason, Reason.NODE_REJECTED), f"{reason}: {words}" if words else reason)
    return disruption(pod)


def _told(reason: Reason, words: str) -> Diagnosis:
    return Diagnosis(reason, _SENTENCES[reason], words, _HINTS[reason])


def _recorded(pod: Raw) -> Diagnosis | None:
    """What observe left in its termination message, which outlives logs and tracking server."""
    said = runner_record(pod)
    reason = str(said.get("reason") or "")
    if reason not in Reason.__members__ or reason == Reason.OK.value:
        return None
    return Diagnosis(Reason[reason], str(said.get("message") or reason), str(said.get("words") or ""))


def _unseen_from_inside(pod: Raw) -> Diagnosis | None:
    """A container that never started, or that the kernel took as a whole: our runner only sees that it is not there."""
    prepare, main = objects.container(pod, PREPARE), objects.container(pod, MAIN)
    if prepare.reason in ("OOMKilled", *_NEVER_STARTED):
        return _prepare(prepare)
    return _program(main, pod) if main.reason in ("OOMKilled", *_NEVER_STARTED) else _other_init_container(pod)


def runner_record(pod: Raw) -> dict[str, Any]:
    """The JSON object that observe wrote as its last word; empty where there is none."""
    try:
        said = json.loads(objects.container(pod, OBSERVE).message)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _prepare(ended: Container) -> Diagnosis | None:
    if ended.state != "terminated" or ended.exit_code == 0:
        return None
    if ended.reason == "OOMKilled":
        hint = "Give it more with `resources.memory`."
        return Diagnosis(Reason.OOM, "Preparing the job needed more memory than its container may have.", "", hint)
    if ended.reason in _NEVER_STARTED:
        message = f"The runner image {ended.image} cannot be started."
        return Diagnosis(Reason.BOOTSTRAP, message, ended.message, container_hint(ended.message))
    message = f"Preparing the job failed with exit code {ended.exit_code}."
    return Diagnosis(Reason.BOOTSTRAP, message, ended.message.strip(), "kubectl logs -c prepare may tell more.")


def _other_init_container(pod: Raw) -> Diagnosis | None:
    """One of a pod template's that failed, after which the program is not started. The last one that was."""
    if objects.container(pod, MAIN).state != "waiting" or objects.deleted_at(pod):
        return None
    others = [each for each in objects.containers(pod) if each.name not in (OBSERVE, PREPARE) and each.exit_code]
    if not others:
        return None
    failed = others[-1]
    message = f"Init container {failed.name} of the pod template failed with exit code {failed.exit_code}."
    hint = f"kubectl logs -c {failed.name} may tell more."
    return Diagnosis(Reason.CONTAINER_CONFIG, message, failed.message.strip() or failed.reason, hint)


def _program(ended: Container, pod: Raw) -> Diagnosis:
    if ended.state != "terminated":
        words = " ".join(filter(None, (ended.reason, ended.message)))
        return Diagnosis(Reason.KILLED_BY_SYSTEM, "The job's pod ended before its program did.", words)
    if ended.reason == "OOMKilled":
        return _out_of_memory()
    if ended.reason in _NEVER_STARTED:
        message = f"The program's container ({ended.image}) could not be started."
        return Diagnosis(Reason.CONTAINER_CONFIG, message, ended.message, container_hint(ended.message))
    if ended.reason == "ContainerStatusUnknown":
        message = "The node was restarted, and what became of the program is not known."
        return Diagnosis(Reason.NODE_LOST, message, ended.message)
    if ended.exit_code == 0:
        return Diagnosis(Reason.OK, "The program ended well.")
    if objects.deleted_at(pod) and ended.exit_code in (128 + signal.SIGTERM, 128 + signal.SIGKILL):
        return Diagnosis(Reason.TERMINATED, "The job's pod was deleted while its program ran.", ended.message.strip())
    return _by_exit_code(ended)


def _out_of_memory() -> Diagnosis:
    return Diagnosis(
        Reason.OOM,
        "The program was killed by its container's memory limit.",
        "OOMKilled",
        "Raise `resources.memory`, or let the program use less.",
    )


def _by_exit_code(ended: Container) -> Diagnosis:
    code, words = ended.exit_code or 0, ended.message.strip()
    if code == 128 + signal.SIGKILL:
        message = "The program was killed (SIGKILL), and not by its container's memory limit."
        return Diagnosis(Reason.KILLED_BY_SYSTEM, message, words)
    if code == 128 + signal.SIGTERM:
        return Diagnosis(Reason.TERMINATED, "The program was stopped from outside (SIGTERM).", words)
    return Diagnosis(Reason.USER_ERROR, f"The entry point ended with exit code {code}{_meaning(code)}.", words)


def _meaning(code: int) -> str:
    if code in (126, 127):
        return " (command not found)" if code == 127 else " (command cannot be executed)"
    try:
        return f" ({signal.Signals(code - 128).name})" if code > 128 else ""
    except ValueError:
        return ""
