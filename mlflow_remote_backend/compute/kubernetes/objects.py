"""Readers of raw Kubernetes objects (Job, Pod, Event as JSON gives them). Pure; a missing field reads as empty."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from . import names

Raw = Mapping[str, Any]

TERMINAL_PHASES = ("Succeeded", "Failed")


@dataclass(frozen=True)
class Observation:
    """What the API shows of one job at one moment.

    ``job`` None: it does not exist (proven by a read, not guessed). ``uid``: of the Job we mean, empty where not known.
    ``events``: of the Job and its pods, any order; empty also where we may not read them. ``now``: the server's clock,
    in unix seconds.
    """

    job: Raw | None
    pods: Sequence[Raw] = ()
    events: Sequence[Raw] = ()
    now: float = 0.0
    uid: str = ""
    namespace_terminating: bool = False


@dataclass(frozen=True)
class Patience:
    """How long, in seconds, each kind of waiting may last. Written into the Job, so that whoever looks knows it."""

    start_timeout_s: float = 1800.0
    image_pull_timeout_s: float = 600.0
    node_lost_timeout_s: float = 900.0
    grace_period_s: float = 30.0
    fail_fast_unschedulable: bool = False

    @classmethod
    def of(cls, job: Raw | None) -> Patience:
        try:
            raw = json.loads(annotation(job or {}, names.LIMITS) or "{}")
            return cls(**{key: value for key, value in raw.items() if key in cls.__dataclass_fields__})
        except (ValueError, TypeError, AttributeError):
            return cls()


@dataclass(frozen=True)
class Container:
    """One container as the pod's status shows it. ``state``: ``waiting``, ``running``, ``terminated`` or empty."""

    name: str
    state: str = ""
    reason: str = ""
    message: str = ""
    exit_code: int | None = None
    started_at: float = 0.0
    finished_at: float = 0.0
    restarts: int = 0
    image: str = ""
    image_id: str = ""
    last: Raw = field(default_factory=dict)  # the last terminated state, of a container that was started again


def seconds(timestamp: object) -> float:
    """A Kubernetes timestamp as unix seconds; 0 where there is none."""
    if not isinstance(timestamp, str):
        return 0.0
    try:
        return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0


def metadata(thing: Raw) -> Raw:
    found: Raw = thing.get("metadata") or {}
    return found


def uid(thing: Raw) -> str:
    return str(metadata(thing).get("uid") or "")


def name(thing: Raw) -> str:
    return str(metadata(thing).get("name") or "")


def label(thing: Raw, key: str) -> str:
    return str((metadata(thing).get("labels") or {}).get(key) or "")


def annotation(thing: Raw, key: str) -> str:
    return str((metadata(thing).get("annotations") or {}).get(key) or "")


def created_at(thing: Raw) -> float:
    return seconds(metadata(thing).get("creationTimestamp"))


def deleted_at(thing: Raw) -> float:
    """When its deletion was asked for; 0 where it was not. For a pod the timestamp holds the end of its grace."""
    meta = metadata(thing)
    asked = seconds(meta.get("deletionTimestamp"))
    return asked - float(meta.get("deletionGracePeriodSeconds") or 0) if asked else 0.0


def status(thing: Raw) -> Raw:
    found: Raw = thing.get("status") or {}
    return found


def condition(thing: Raw, kind: str) -> Raw | None:
    """The condition of this kind, whatever its status."""
    return next((each for each in status(thing).get("conditions") or () if each.get("type") == kind), None)


def holds(thing: Raw, kind: str) -> bool:
    found = condition(thing, kind)
    return found is not None and found.get("status") == "True"


def pod_phase(pod: Raw) -> str:
    return str(status(pod).get("phase") or "")


def ended(pod: Raw) -> bool:
    """No container of it runs or will run again."""
    return pod_phase(pod) in TERMINAL_PHASES


def attempt(pod: Raw) -> int:
    raw = annotation(pod, names.ATTEMPT)
    return int(raw) if raw.isdigit() else 0


def containers(pod: Raw) -> list[Container]:
    """All containers that the status tells of, init containers first. A pod the kubelet rejected has none."""
    raw = status(pod)
    listed = [*(raw.get("initContainerStatuses") or ()), *(raw.get("containerStatuses") or ())]
    return [_container(each) for each in listed]


def container(pod: Raw, wanted: str) -> Container:
    return next((each for each in containers(pod) if each.name == wanted), Container(wanted))


def _container(raw: Raw) -> Container:
    states: dict[str, Any] = dict(raw.get("state") or {})
    state_name = next(iter(states), "")
    state = states.get(state_name) or {}
    return Container(
        name=str(raw.get("name") or ""),
        state=state_name,
        reason=str(state.get("reason") or ""),
        message=str(state.get("message") or ""),
        exit_code=state.get("exitCode"),
        started_at=seconds(state.get("startedAt")),
        finished_at=seconds(state.get("finishedAt")),
        restarts=int(raw.get("restartCount") or 0),
        image=str(raw.get("image") or ""),
        image_id=str(raw.get("imageID") or ""),
        last=(raw.get("lastState") or {}).get("terminated") or {},
    )


# ------------------------------------------------------------------------------------------------------------ events


def event_time(event: Raw) -> float:
    """When it was seen last."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((found for found in map(seconds, times) if found), created_at(event))


def event_first_time(event: Raw) -> float:
    return seconds(event.get("firstTimestamp")) or seconds(event.get("eventTime")) or created_at(event)


def events_of(events: Sequence[Raw], thing: Raw) -> Iterator[Raw]:
    """Its events, newest first."""
    wanted = uid(thing)
    own = [each for each in events if (each.get("involvedObject") or {}).get("uid") == wanted]
    return iter(sorted(own, key=event_time, reverse=True))


def latest_event(events: Sequence[Raw], thing: Raw, *reasons: str) -> Raw | None:
    return next((each for each in events_of(events, thing) if each.get("reason") in reasons), None)


_NUMBER = re.compile(r"\b\d+\b")


def same_words(one: str, other: str) -> bool:
    """Whether two messages differ in their counts only (``0/5 nodes are available``), so that one telling is enough."""
    return _NUMBER.sub("#", one) == _NUMBER.sub("#", other)


def trimmed(thing: Raw) -> dict[str, Any]:
    """What diagnoses need of a Job or Pod: about a kilobyte of the five to twenty that it has."""
    meta, spec = metadata(thing), thing.get("spec") or {}
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp", "deletionTimestamp")
    small = {key: meta[key] for key in (*kept, "deletionGracePeriodSeconds", "labels", "annotations") if key in meta}
    return {
        "metadata": small,
        "spec": {key: spec[key] for key in ("suspend", "nodeName", "schedulingGates", "managedBy") if key in spec},
        "status": status(thing),
    }
