"""What jobs left on an engine, and the caches that they share: listed for ``mlflow-remote gc``, removed on its word.

Only what carries our labels is ever listed. Whether a run has ended is for the caller to know.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import request, watch
from .engine import Engine, Refused


@dataclass(frozen=True)
class Leftover:
    """A container or a volume of a run. ``age_s``: since it was made. ``tracking``: the run's tracking server, as
    ``request.tracking_mark`` has it."""

    kind: str
    name: str
    run_id: str
    tracking: str
    age_s: float


@dataclass(frozen=True)
class Cached:
    """A volume or an image with environments. ``in_use``: a container stands on it."""

    kind: str
    name: str
    in_use: bool = False


def leftovers(engine: Engine) -> Iterator[Leftover]:
    """Containers first, since a volume cannot go before them."""
    for each in engine.containers(request.RUN_LABEL):
        yield _leftover("container", each["Names"][0].lstrip("/"), each["Labels"], time.time() - each["Created"])
    for each in engine.volumes(request.RUN_LABEL):
        yield _leftover("volume", each["Name"], each["Labels"], _age_s(each))


def _leftover(kind: str, name: str, labels: Mapping[str, str], age_s: float) -> Leftover:
    return Leftover(kind, name, labels[request.RUN_LABEL], labels.get(request.TRACKING_LABEL, ""), age_s)


def _age_s(volume: Mapping[str, Any]) -> float:
    try:
        created = datetime.datetime.fromisoformat(str(volume["CreatedAt"]).replace("Z", "+00:00"))
    except (KeyError, ValueError):
        return 0.0
    return time.time() - created.timestamp()


def remove(engine: Engine, left: Leftover) -> None:
    """Idempotent. Raises ComputeError."""
    if left.kind == "container":
        engine.remove(left.name)
    else:
        watch.remove(engine, left.name)


def caches(engine: Engine) -> Iterator[Cached]:
    """The volumes and images that keep environments."""
    used = engine.containers(request.RUN_LABEL)
    mounted = {mount.get("Name") for each in used for mount in each.get("Mounts") or ()}
    images = {each["ImageID"] for each in used}
    for each in engine.volumes(request.CACHE_LABEL):
        yield Cached("volume", each["Name"], each["Name"] in mounted)
    for each in engine.images(request.ENVIRONMENT_LABEL):
        for tag in each.get("RepoTags") or ():
            yield Cached("image", tag, each["Id"] in images)


def remove_cache(engine: Engine, cached: Cached) -> bool:
    """False if it is in use after all. Raises ComputeError."""
    if cached.in_use:
        return False
    try:
        if cached.kind == "volume":
            engine.remove_volume(cached.name)
        else:
            engine.remove_image(cached.name)
    except Refused as error:
        if error.conflict:
            return False
        raise
    return True
