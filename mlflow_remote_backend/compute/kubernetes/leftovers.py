"""What runs left in a namespace: for ``gc``, which removes it where the run is over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from . import names, objects
from .api import Api, ApiError


@dataclass(frozen=True)
class Leftover:
    """A Job of ours, or a pod whose Job is gone (deleted with ``--cascade=orphan``). ``age_s``: since it was made.

    ``same_server``: it was submitted for the tracking server that was asked about, so that a run which that server does
    not know does not exist. Where servers have several addresses this may be unknown: then it is False.
    """

    kind: str
    name: str
    namespace: str
    run_id: str
    age_s: float
    uid: str
    same_server: bool = False


def leftovers(api: Api, namespace: str, tracking_uri: str) -> Iterator[Leftover]:
    """All of ours in the namespace, running or not. Raises ApiError."""
    jobs, page = api.items(f"/apis/batch/v1/namespaces/{namespace}/jobs", labelSelector=names.SELECTOR)
    pods, _ = api.items(f"/api/v1/namespaces/{namespace}/pods", labelSelector=names.SELECTOR)
    known = {objects.uid(job) for job in jobs}
    orphans = [pod for pod in pods if objects.label(pod, names.JOB_UID) not in known]
    now, mark = page.server_time or time.time(), names.tracking_mark(tracking_uri)
    for kind, found in (("job", jobs), ("pod", orphans)):
        for each in found:
            yield Leftover(
                kind=kind,
                name=objects.name(each),
                namespace=namespace,
                run_id=objects.annotation(each, names.RUN_ID) or objects.label(each, names.RUN_ID),
                age_s=now - objects.created_at(each),
                uid=objects.uid(each),
                same_server=objects.annotation(each, names.TRACKING) == mark,
            )


def remove(api: Api, left: Leftover) -> None:
    """Idempotent; the very object only. A Job takes its pods and its Secret with it. Raises ApiError."""
    group, kind = ("apis/batch/v1", "jobs") if left.kind == "job" else ("api/v1", "pods")
    options = {"propagationPolicy": "Background", "preconditions": {"uid": left.uid}}
    try:
        api.delete(f"/{group}/namespaces/{left.namespace}/{kind}/{left.name}", options)
    except ApiError as error:
        if error.status not in (404, 409):
            raise
