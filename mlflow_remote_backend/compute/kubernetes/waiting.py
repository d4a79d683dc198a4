"""Why a job does not run yet: raw Kubernetes objects -> Diagnosis. Pure.

Each cause has its own patience. ``fatal`` says that it is used up, or that waiting is of no use; until then the cause
may pass by itself. Times are the server's own, so a process that looks for the first time comes to the same verdict.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ...job import Diagnosis, Reason
from . import objects
from .manifest import OBSERVE, PREPARE
from .objects import Container, Observation, Patience, Raw

IMAGE_GRACE_S = 30.0  # an image that does not exist, or is not ours to pull: pushes and secrets may be on their way
CONFIG_GRACE_S = 60.0  # a Secret that is not visible yet; "context deadline exceeded" of a busy node
RESERVED_GRACE_S = 300.0  # the runtime is still at an earlier try to create the same container
MISSING_VOLUME_GRACE_S = 120.0  # a Secret, ConfigMap or claim that a volume needs and that does not exist
SILENT_CREATION_S = 60.0  # how long a container may be created before its pod's warnings are worth telling

#: Container states in which an image is the trouble (kubelet: pkg/kubelet/images/types.go, cri-api errors.go).
_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "ImageInspectError")
_IMAGE_NEVER = ("InvalidImageName", "ErrImageNeverPull", "SignatureValidationFailed")
_CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError")
_VOLUME_EVENTS = ("FailedMount", "FailedAttachVolume", "FailedMapVolume", "VolumeResizeFailed", "FailedBinding")
_NODE_EVENTS = ("FailedCreatePodSandBox", "NetworkNotReady", "FailedSync")

_IMAGE_DEFINITE = re.compile(
    r"not found|manifest unknown|unauthori[sz]ed|denied|forbidden|authentication required|no basic auth"
    r"|no match for platform|does not exist|insufficient_scope|invalid reference|repository name not known"
    r"|short[- ]name",
    re.IGNORECASE,
)
_IMAGE_PASSING = re.compile(
    r"timeout|timed out|deadline exceeded|connection refused|connection reset|no such host|temporary failure"
    r"|too many requests|toomanyrequests|\b429\b|\b50[0-4]\b|QPS exceeded|unavailable|EOF|TLS handshake|i/o",
    re.IGNORECASE,
)
#: What the kubelet and the runtime say of a busy or restarting node, and repeat until it works: kubernetes 117972,
#: containerd 4604.
_CONFIG_PASSING = re.compile(
    r"deadline exceeded|timed out|failed to sync|context canceled|connection refused|code = Unavailable"
    r'|subPath|(secret|configmap) ".*" not found',
    re.IGNORECASE,
)
_CONFIG_RESERVED = re.compile(r"name .* is reserved", re.IGNORECASE)
_MISSING = re.compile(r'(secret|configmap|persistentvolumeclaim) "[^"]*" (is )?not found', re.IGNORECASE)
_QUOTA_RACE = re.compile(r"Operation cannot be fulfilled on resourcequotas|quota evaluation timed out", re.IGNORECASE)
#: What an API server says of the pod itself. All else, of itself or of what stands behind it, passes.
_POD_REFUSED = re.compile(
    r"is forbidden(?!: status unknown for quota)|is invalid|denied the request|violates|cannot be handled|not found",
    re.IGNORECASE,
)
_WEBHOOK_DOWN = re.compile(r"failed calling webhook|failed to call webhook", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------- no pod


def refused_pod(seen: Observation, patience: Patience) -> Diagnosis | None:
    """Why the Job has no pod although it is not suspended: the only sign is an event on the Job."""
    job = seen.job or {}
    event = objects.latest_event(seen.events, job, "FailedCreate")
    since = _attempt_since(seen)
    if event is None or objects.event_time(event) < since:
        return None
    words = str(event.get("message") or "")
    waited_s = seen.now - (since or objects.event_first_time(event))
    out_of_patience = waited_s > patience.start_timeout_s
    if _QUOTA_RACE.search(words):
        return None
    if "exceeded quota" in words:
        return Diagnosis(
            Reason.QUOTA,
            "The namespace's quota leaves no room for the job's pod.",
            words,
            "It starts when others end. " + refusal_hint(words),
            fatal=out_of_patience,
        )
    if "failed quota" in words:
        return Diagnosis(
            Reason.QUOTA,
            "The namespace's quota wants resources that the job does not state.",
            words,
            refusal_hint(words),
        )
    if "being terminated" in words or "NamespaceTerminating" in words:
        return Diagnosis(Reason.NAMESPACE_TERMINATING, "The job's namespace is being deleted.", words)
    if _WEBHOOK_DOWN.search(words):
        hint = "An admission webhook of the cluster does not answer; its administrators can tell more."
        return Diagnosis(Reason.REFUSED, "Kubernetes cannot admit the pod.", words, hint, fatal=out_of_patience)
    if not _POD_REFUSED.search(words):
        hint = "The cluster tries again by itself; its administrators can tell more."
        return Diagnosis(Reason.REFUSED, "Kubernetes cannot make the job's pod now.", words, hint, out_of_patience)
    return Diagnosis(Reason.REFUSED, "Kubernetes refuses the job's pod.", words, refusal_hint(words))


def refusal_hint(words: str) -> str:
    """What to do about a refusal of the pod, by Kubernetes' own words."""
    if "violates PodSecurity" in words:
        return "Use `kubernetes.security: restricted` (the default), and leave out of pod_template what is named here."
    if "service account" in words or "serviceaccount" in words:
        return "Create the service account, or name another one in `kubernetes.service_account`."
    if re.search(r"(maximum|minimum) .* usage per (Container|Pod)|max limit to request", words):
        return (
            "The namespace's LimitRange says how much a container may have: change `resources`, or, where our own asks "
            "for too little (10m of cpu, 64Mi), `kubernetes.sidecar_cpu` and `kubernetes.sidecar_memory`."
        )
    if "exceeded quota" in words:
        return "Ask for less in `resources`, or for a larger quota."
    if "failed quota" in words:
        return "State cpu and memory in `resources`."
    return "A policy of the cluster forbids it; its administrators can tell more."


# ------------------------------------------------------------------------------------------------------- scheduling


def unscheduled(pod: Raw, seen: Observation, patience: Patience) -> Diagnosis | None:
    """Why the pod has no node, in the scheduler's words."""
    found = objects.condition(pod, "PodScheduled")
    if found is None or found.get("status") != "False" or found.get("reason") == "SchedulingGated":
        return None
    words = str(found.get("message") or "")
    scaling = objects.latest_event(seen.events, pod, "NotTriggerScaleUp")
    if scaling is not None:
        words += "\n" + str(scaling.get("message") or "")
    waited_s = seen.now - (objects.seconds(found.get("lastTransitionTime")) or objects.created_at(pod))
    claim = "persistentvolumeclaim" in words or "PersistentVolumeClaim" in words or "unbound" in words
    hint = (
        "The claim must exist in the namespace and be bound: kubectl get pvc."
        if claim
        else "It starts when there is room. Check `resources`, `node_selector`, `tolerations` and `affinity`, and "
        "`kubernetes.platform` where the nodes have another processor."
    )
    return Diagnosis(
        Reason.UNSCHEDULABLE,
        "No node takes the job's pod.",
        words,
        hint,
        fatal=patience.fail_fast_unschedulable or waited_s > patience.start_timeout_s,
    )


# ------------------------------------------------------------------------------------------------- on the node


def stuck_container(pod: Raw, seen: Observation, patience: Patience) -> Diagnosis | None:
    """Why a container of a scheduled pod does not start."""
    for each in objects.containers(pod):
        if each.state != "waiting":
            continue
        if each.reason in _IMAGE_REASONS + _IMAGE_NEVER:
            return _image(pod, each, seen, patience)
        if each.reason in _CONFIG_REASONS:
            return _config(pod, each, seen)
        if each.reason == "CrashLoopBackOff":
            return _crashing(each)
    return _warnings(pod, seen, patience)


def _image(pod: Raw, waiting: Container, seen: Observation, patience: Patience) -> Diagnosis:
    words = _pull_words(pod, waiting, seen.events)
    message = f"Image {waiting.image or '?'} of container {waiting.name} cannot be pulled."
    hint = "Check its name, or name a pull secret in `kubernetes.image_pull_secrets`."
    waited_s = seen.now - _waiting_since(pod, waiting, seen.events)
    if waiting.reason in _IMAGE_NEVER:
        if waiting.reason == "ErrImageNeverPull":
            hint = "`image_pull_policy: Never` needs the image on the node already."
        return Diagnosis(Reason.IMAGE_PULL, message, words or waiting.reason, hint)
    if "short name" in words or "short-name" in words:  # CRI-O, on nodes with several registries or none to search
        hint = "Name the image with its registry: docker.io/library/python:3.11."
    if _IMAGE_PASSING.search(words) or not _IMAGE_DEFINITE.search(words):
        who = "node's runtime" if waiting.reason == "ImageInspectError" else "registry"
        limit_s, hint = patience.image_pull_timeout_s, f"The {who} does not answer as it should; still trying."
    else:
        limit_s = IMAGE_GRACE_S
    return Diagnosis(Reason.IMAGE_PULL, message, words or waiting.reason, hint, waited_s > limit_s, limit_s)


def _pull_words(pod: Raw, waiting: Container, events: Sequence[Raw]) -> str:
    """Why the pull failed. While the kubelet backs off, the container's own message says only that it does."""
    if waiting.reason != "ImagePullBackOff" or re.search(r": (ErrImagePull|.*rpc error|.*failed to)", waiting.message):
        return waiting.message
    for event in objects.events_of(events, pod):
        text = str(event.get("message") or "")
        if event.get("reason") == "Failed" and text.startswith("Failed to pull image") and waiting.image in text:
            return text
    return waiting.message


def _waiting_since(pod: Raw, waiting: Container, events: Sequence[Raw]) -> float:
    """Since when the container waits: its first event, else the end of the init containers, else the pod's start."""
    field_path = f"{{{waiting.name}}}"
    told = [
        objects.event_first_time(each)
        for each in objects.events_of(events, pod)
        if field_path in str((each.get("involvedObject") or {}).get("fieldPath") or "")
    ]
    before = [each.finished_at for each in objects.containers(pod) if each.finished_at]
    known = [*told[-1:], *before] or [objects.seconds(objects.status(pod).get("startTime")) or objects.created_at(pod)]
    return min(told) if told else max(known)


def _config(pod: Raw, waiting: Container, seen: Observation) -> Diagnosis:
    words = waiting.message or waiting.reason
    waited_s = seen.now - _waiting_since(pod, waiting, seen.events)
    limit_s = CONFIG_GRACE_S if _CONFIG_PASSING.search(words) else 0.0
    limit_s = RESERVED_GRACE_S if _CONFIG_RESERVED.search(words) else limit_s
    return Diagnosis(
        Reason.CONTAINER_CONFIG,
        f"Container {waiting.name} ({waiting.image or 'image unknown'}) could not be created.",
        words,
        container_hint(words),
        fatal=waited_s > limit_s or limit_s == 0.0,
        patience_s=limit_s or None,
    )


def container_hint(words: str) -> str:
    """What to do where a container could not be created or started, by the kubelet's or the runtime's own words."""
    if "non-root" in words or "runAsNonRoot" in words:
        return "The image runs as root. Set `kubernetes.run_as_user`, or `kubernetes.security: image` where allowed."
    if "exec format error" in words:
        return "The image is for another processor than the node has."
    if "/bin/sh" in words or '"sh"' in words:
        return "The image has no shell, which starting the program needs."
    if _MISSING.search(words) or "couldn't find key" in words:
        return "What `secrets` or the volumes refer to must exist in the namespace before the job starts."
    return "Try the image by hand: kubectl run --rm -it --image=IMAGE test -- sh"


def crashing_sidecar(pod: Raw) -> Diagnosis | None:
    """Our sidecar ends again and again while the program runs: that goes on, and nobody records it."""
    observe = objects.container(pod, OBSERVE)
    if observe.reason != "CrashLoopBackOff":
        return None
    return replace(_crashing(observe), fatal=False)


def _crashing(waiting: Container) -> Diagnosis:
    """A sidecar that ends again and again; the last end tells why, not the back-off."""
    code, said = waiting.last.get("exitCode"), str(waiting.last.get("message") or "").strip()
    what = "our runner" if waiting.name == OBSERVE else f"container {waiting.name}"
    return Diagnosis(
        Reason.BOOTSTRAP,
        f"In the job's pod {what} ends again and again, last with exit code {code}.",
        said or str(waiting.last.get("reason") or waiting.message),
        "The runner image may be of another release than this client: mlflow-remote image build",
        fatal=waiting.restarts >= 3,
    )


def _warnings(pod: Raw, seen: Observation, patience: Patience) -> Diagnosis | None:
    """A pod that is being created for a minute: what its warnings say."""
    since = objects.seconds(objects.status(pod).get("startTime")) or objects.created_at(pod)
    waited_s = seen.now - since
    creating = any(
        each.state == "waiting" and each.reason in ("ContainerCreating", "PodInitializing", "")
        for each in objects.containers(pod)
    )
    if not creating or objects.container(pod, PREPARE).state == "running" or waited_s < SILENT_CREATION_S:
        return None
    event = objects.latest_event(seen.events, pod, *_VOLUME_EVENTS, *_NODE_EVENTS)
    if event is None or event_is_over(event, pod):
        return None
    words = str(event.get("message") or "")
    if event.get("reason") in _VOLUME_EVENTS:
        limit_s = MISSING_VOLUME_GRACE_S if _MISSING.search(words) else patience.start_timeout_s
        return Diagnosis(
            Reason.VOLUME,
            "A volume of the job's pod cannot be mounted.",
            words,
            "Check the claims, secrets and config maps that `volumes` and `env_cache` name.",
            waited_s > limit_s,
            limit_s,
        )
    message = "The node cannot set up the job's pod."
    return Diagnosis(Reason.NODE_REJECTED, message, words, "", waited_s > patience.start_timeout_s)


def event_is_over(event: Raw, pod: Raw) -> bool:
    """Whether a container has started since: then the trouble was passing."""
    started = [each.started_at for each in objects.containers(pod)]
    return max(started, default=0.0) > objects.event_time(event)


def not_started(seen: Observation, patience: Patience) -> Diagnosis | None:
    """Nothing in particular is wrong, yet it takes longer than ``start_timeout``."""
    since = _attempt_since(seen)
    if not since or seen.now - since <= patience.start_timeout_s:
        return None
    event = next((each for pod in seen.pods for each in objects.events_of(seen.events, pod)), None)
    return Diagnosis(
        Reason.START_TIMEOUT,
        f"The job did not start within {patience.start_timeout_s:.0f} s.",
        str((event or {}).get("message") or ""),
        "A longer `start_timeout` gives it more time.",
    )


def _attempt_since(seen: Observation) -> float:
    """Since when this attempt is to start: the first with its Job, another one when the one before it has ended.

    0 where that is not known: the pod before it was deleted.
    """
    job = objects.status(seen.job or {})
    if not seen.pods and any(job.get(key) for key in ("active", "failed", "uncountedTerminatedPods")):
        return 0.0
    later = [pod for pod in seen.pods if objects.ended(pod) or objects.attempt(pod)]
    times = [objects.created_at(pod) for pod in later]
    times += [each.finished_at for pod in later for each in objects.containers(pod)]
    return max([objects.seconds(job.get("startTime")), *times])
