"""What the API shows of a deployment -> how far a revision is, or why it does not come up. Pure.

A pod that cannot start is explained by the same table as a job's (``compute.kubernetes.waiting``), a container that has
ended by what it left: ``prepare`` its own words, ``main`` its exit code and log.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...compute.kubernetes import ending, objects, waiting
from ...compute.kubernetes.objects import Container, Observation, Patience, Raw
from ...job import Diagnosis, Reason
from .. import diagnosis
from ..spec import DeploymentSpec, DeploymentStatus, State
from .manifest import ATTEMPT, MAIN, PREPARE, SERVING, SPEC, url

LOAD_MARGIN_S = 30.0  # from a probe's last failure until the kubelet has acted on it


@dataclass(frozen=True)
class Seen:
    """A deployment at one moment. ``pods``: all of its name; ``now``: the server's clock, unix seconds."""

    deployment: Raw
    pods: Sequence[Raw] = ()
    events: Sequence[Raw] = ()
    now: float = 0.0


@dataclass(frozen=True)
class Fault:
    """Why the new revision does not come up. ``diagnosis`` None: the log of ``pod`` and ``container`` has to tell."""

    diagnosis: Diagnosis | None
    pod: str = ""
    container: str = ""
    exit_code: int | None = None


@dataclass(frozen=True)
class Progress:
    """``done``: every replica is of the new revision and answers. ``line``: for a person who waits."""

    done: bool = False
    line: str = ""
    fault: Fault | None = None


def progress(seen: Seen, spec: DeploymentSpec, attempt: str) -> Progress:
    """How far this very attempt is."""
    if complete(seen.deployment, attempt):
        return Progress(done=True)
    own = [pod for pod in seen.pods if objects.annotation(pod, ATTEMPT) == attempt and not objects.deleted_at(pod)]
    for pod in sorted(own, key=objects.created_at):
        fault = _fault(seen, pod, spec)
        if fault is not None:
            return Progress(fault=fault)
    if not own:
        refused = _refused(seen, spec)
        if refused is not None and refused.fatal:
            return Progress(fault=Fault(refused))
        return Progress(line=refused.message if refused else "waiting for a pod")
    return Progress(line=_line(seen, own, spec))


def complete(deployment: Raw, attempt: str) -> bool:
    """As ``kubectl rollout status`` has it: all replicas are new and available, and the old ones are on their way."""
    body, status = deployment.get("spec") or {}, objects.status(deployment)
    if body.get("paused") or template_annotation(deployment, ATTEMPT) != attempt:
        return False
    if int(status.get("observedGeneration") or 0) < int(objects.metadata(deployment).get("generation") or 0):
        return False
    wanted, total, updated, available = (
        int(body.get("replicas", 1)),
        *(int(status.get(key) or 0) for key in ("replicas", "updatedReplicas", "availableReplicas")),
    )
    return updated >= wanted and total <= updated and available >= updated


def template_annotation(deployment: Raw, key: str) -> str:
    template = (deployment.get("spec") or {}).get("template") or {}
    return objects.annotation(template, key)


def _line(seen: Seen, own: list[Raw], spec: DeploymentSpec) -> str:
    ready = sum(objects.holds(pod, "Ready") for pod in own)
    wanted = int((seen.deployment.get("spec") or {}).get("replicas", 1))
    pod = next((each for each in own if not objects.holds(each, "Ready")), own[0])
    main, prepare = objects.container(pod, MAIN), objects.container(pod, PREPARE)
    if not (pod.get("spec") or {}).get("nodeName"):
        found = waiting.unscheduled(pod, _observed(seen), _patience(spec))
        what = f"waiting for a node: {found.words}" if found else "waiting for a node"
    elif main.state == "running":
        what = "loading the model" if not objects.holds(pod, "Ready") else "replacing the pods of before"
    elif prepare.state == "running":
        what = "preparing: the model and its environment"
    elif prepare.state == "terminated":
        what = "starting the server's container"
    else:
        what = f"starting the pod, image {prepare.image}" if prepare.image else "starting the pod"
    return what if wanted == 1 else f"{ready} of {wanted} replicas answer; {what}"


def _observed(seen: Seen) -> Observation:
    return Observation(job=None, pods=seen.pods, events=seen.events, now=seen.now)


def _patience(spec: DeploymentSpec) -> Patience:
    return Patience(start_timeout_s=spec.start_timeout_s, image_pull_timeout_s=spec.image_pull_timeout_s)


# ------------------------------------------------------------------------------------------------------------ faults


def _fault(seen: Seen, pod: Raw, spec: DeploymentSpec) -> Fault | None:
    name = objects.name(pod)
    prepare, main = objects.container(pod, PREPARE), objects.container(pod, MAIN)
    for each, judge in ((prepare, _prepare_ended), (main, _main_ended)):
        ended = _last_end(each)
        if ended is not None and (each.name == MAIN or ended.get("exitCode") != 0):
            return Fault(judge(ended, each, spec), name, each.name, ended.get("exitCode"))
    if main.state == "running" and main.started_at and not objects.holds(pod, "Ready"):
        if seen.now - main.started_at > spec.start_timeout_s + LOAD_MARGIN_S:
            return Fault(_too_slow(spec), name, MAIN)
        return None
    if objects.ended(pod):  # evicted, rejected by its node
        return Fault(_as_deployment(ending.cause(pod)))
    found = waiting.unscheduled(pod, _observed(seen), _patience(spec))
    found = found or waiting.stuck_container(pod, _observed(seen), _patience(spec))
    if found is None or not found.fatal:
        return None
    return Fault(_as_deployment(found))


def _last_end(each: Container) -> Mapping[str, Any] | None:
    """How the container ended last; None if it never did."""
    if each.state == "terminated":
        lived_s = each.finished_at - each.started_at
        return {"exitCode": each.exit_code, "reason": each.reason, "message": each.message, "lived_s": lived_s}
    if not each.last:
        return None
    lived_s = objects.seconds(each.last.get("finishedAt")) - objects.seconds(each.last.get("startedAt"))
    return {**each.last, "lived_s": lived_s}


def _prepare_ended(ended: Mapping[str, Any], container: Container, spec: DeploymentSpec) -> Diagnosis:
    if ended.get("reason") == "OOMKilled":
        hint = "Raise resources.memory."
        return Diagnosis(Reason.OOM, "Preparing the pod needed more memory than it may have.", "OOMKilled", hint)
    said = _said(str(ended.get("message") or ""))
    reason = said.get("reason", "")
    if reason in Reason.__members__:
        return Diagnosis(Reason[reason], said.get("message", ""), said.get("words", ""), said.get("hint", ""))
    words = str(ended.get("message") or ended.get("reason") or "").strip()
    hint = waiting.container_hint(words) if ended.get("reason") in ("StartError", "ContainerCannotRun") else ""
    message = f"Preparing the pod failed with exit code {ended.get('exitCode')}."
    return Diagnosis(Reason.BOOTSTRAP, message, words, hint)


def _said(message: str) -> dict[str, str]:
    try:
        said = json.loads(message)
    except ValueError:
        return {}
    return {key: str(value) for key, value in said.items()} if isinstance(said, dict) else {}


def _main_ended(ended: Mapping[str, Any], container: Container, spec: DeploymentSpec) -> Diagnosis | None:
    """None where the log has to tell: ``of_log`` judges then."""
    reason = ended.get("reason")
    if reason == "OOMKilled":
        return diagnosis.of_failed(spec, {"why": "oom"}, "")
    if reason in ("StartError", "ContainerCannotRun"):
        words = str(ended.get("message") or reason)
        message = f"The server's container ({container.image}) could not be started."
        return Diagnosis(Reason.CONTAINER_CONFIG, message, words, waiting.container_hint(words))
    if ended["lived_s"] >= spec.start_timeout_s:
        return _too_slow(spec)  # the kubelet ended it by its startup probe
    return None


def _too_slow(spec: DeploymentSpec) -> Diagnosis:
    return diagnosis.of_failed(spec, {"why": "timeout"}, "")


def of_log(fault: Fault, spec: DeploymentSpec, log: str) -> Diagnosis:
    """The cause, with the container's log where only that can tell."""
    return fault.diagnosis or diagnosis.of_failed(spec, {"why": "", "exit": fault.exit_code}, log)


def _refused(seen: Seen, spec: DeploymentSpec) -> Diagnosis | None:
    """Why there is no pod at all: the controller says it in the Deployment's condition."""
    condition = objects.condition(seen.deployment, "ReplicaFailure")
    if condition is None or condition.get("status") != "True":
        return None
    event = {
        "involvedObject": {"uid": objects.uid(seen.deployment)},
        "reason": "FailedCreate",
        "message": condition.get("message"),
        "lastTimestamp": condition.get("lastTransitionTime"),
        "firstTimestamp": condition.get("lastTransitionTime"),
    }
    found = waiting.refused_pod(
        Observation(job=seen.deployment, events=[event], now=seen.now, uid=objects.uid(seen.deployment)),
        _patience(spec),
    )
    return _as_deployment(found) if found is not None else None


def _as_deployment(found: Diagnosis) -> Diagnosis:
    """The table speaks of jobs."""
    said = found.message.replace("the job's", "the deployment's").replace("The job's", "The deployment's")
    return dataclasses.replace(found, message=said, hint=found.hint.replace("the job starts", "the deployment starts"))


# ------------------------------------------------------------------------------------------------------------ status


def status(deployment: Raw, pods: Sequence[Raw], namespace: str) -> DeploymentStatus | None:
    """What the deployment is right now, by what its objects say. None: its annotations are not ours to read."""
    coming = _spec(template_annotation(deployment, SPEC))
    if coming is None:
        return None
    attempt = template_annotation(deployment, ATTEMPT)
    serving = coming if complete(deployment, attempt) else _spec(objects.annotation(deployment, SERVING))
    own = [pod for pod in pods if not objects.deleted_at(pod)]
    ready = sum(objects.holds(pod, "Ready") for pod in own)
    restarts = sum(objects.container(pod, MAIN).restarts for pod in own)
    return DeploymentStatus(
        serving or coming,
        _state(serving, coming, ready, deployment),
        url=url(serving or coming, namespace),
        replicas_ready=ready,
        restarts=restarts,
        detail=_detail(own, restarts),
    )


def _state(serving: DeploymentSpec | None, coming: DeploymentSpec, ready: int, deployment: Raw) -> State:
    if serving is None:
        return State.STARTING
    if serving != coming:
        return State.UPDATING
    return State.READY if ready else State.STOPPED


def _detail(pods: Sequence[Raw], restarts: int) -> str:
    if not restarts:
        return ""
    last = next((each.last for each in (objects.container(pod, MAIN) for pod in pods) if each.last), {})
    reason = f" ({last.get('reason')})" if last.get("reason") not in (None, "Error") else ""
    return f"restarted {restarts} times, last exit code {last.get('exitCode')}{reason}"


def _spec(text: str) -> DeploymentSpec | None:
    try:
        return DeploymentSpec.load(text) if text else None
    except ValueError:
        return None
