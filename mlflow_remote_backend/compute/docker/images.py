"""The image that a job runs in: found on the engine, or pulled, and from then on named by its id alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ComputeError, JobError
from ...job import Diagnosis
from . import diagnosis
from .engine import Engine, Refused, split_reference
from .request import Image

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 15.0
_TELL_EVERY_S = 0.5

Say = Callable[[str], None]


def obtain(
    engine: Engine,
    name: str,
    *,
    pull: str = "missing",
    platform: str = "",
    auth: Mapping[str, Any] | None = None,
    patience_s: float = 600.0,
    say: Say = lambda detail: None,
) -> Image:
    """The image on the engine, pulled if need be. ``pull``: missing, always or never. Blocks while it is pulled.

    A registry that does not answer is tried again for ``patience_s``. Raises JobError: IMAGE_PULL or VOLUME.
    """
    found = None if pull == "always" else engine.image(name)
    if found is None:
        if pull == "never":
            raise failed(diagnosis.of_pull(name, "not found on the engine, and docker.pull is never"))
        _pull(engine, name, platform, auth, patience_s, say)
        found = engine.image(name)
    if found is None:
        raise failed(diagnosis.of_pull(name, "not found on the engine although it was pulled"))
    image = Image.from_inspect(found)
    digest = name.partition("@")[2]  # the engine may know the image by those of other repositories, too
    return dataclasses.replace(image, digest=digest) if digest else image


def failed(found: Diagnosis) -> JobError:
    return JobError(found.message, words=found.words, hint=found.hint, code=found.reason.value)


def _pull(
    engine: Engine, name: str, platform: str, auth: Mapping[str, Any] | None, patience_s: float, say: Say
) -> None:
    deadline = time.monotonic() + patience_s
    pause_s = FIRST_PAUSE_S
    while True:
        say(f"pulling image {name}")
        try:
            _pull_once(engine, name, platform, auth, say)
            return
        except ComputeError as error:
            found = diagnosis.of_pull(name, error.words, patience_s)
            if found.fatal or time.monotonic() + pause_s > deadline:
                raise failed(found) from error
        say(f"pulling image {name}: trying again in {pause_s:.0f} s: {found.words}")
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, LONGEST_PAUSE_S)


def _pull_once(engine: Engine, name: str, platform: str, auth: Mapping[str, Any] | None, say: Say) -> None:
    layers: dict[str, tuple[int, int]] = {}
    next_tell = 0.0
    for line in engine.pull(name, platform or None, auth):
        progress = line.get("progressDetail") or {}
        if line.get("status") == "Downloading" and progress.get("total"):
            layers[str(line.get("id"))] = (int(progress["current"]), int(progress["total"]))
        if layers and time.monotonic() > next_tell:
            next_tell = time.monotonic() + _TELL_EVERY_S
            done, total = (sum(each) / 1e6 for each in zip(*layers.values(), strict=True))
            say(f"pulling image {name}: {done:.0f} of {total:.0f} MB")


@dataclass(frozen=True)
class Known:
    """What is known of an image before anything exists. ``pinned``: what to ask the engine for from now on, so that it
    stays the same image whatever a tag says later. ``digest``: for the record. ``notice``: what could not be known."""

    pinned: str
    digest: str
    notice: str = ""


def look_up(engine: Engine, name: str, *, pull: str, platform: str, auth: Mapping[str, Any] | None) -> Known:
    """Raises ComputeError (IMAGE_PULL) where the image can never be had. Pulls nothing."""
    found = None if pull == "always" else engine.image(name)
    if found is not None:
        image = Image.from_inspect(found)
        return Known(image.id, image.identity)
    if pull == "never":
        raise _refused(diagnosis.of_pull(name, "not found on the engine, and docker.pull is never"))
    try:
        known = engine.registry_image(name, auth)
    except Refused as error:
        reason = diagnosis.of_pull(name, error.words)
        if reason.fatal:
            raise _refused(reason) from error
        notice = f"Image {name} is not on the engine, and its registry could not be asked: {error.words}"
        return Known(name, "", notice)
    platforms = {f"{each.get('os')}/{each.get('architecture')}" for each in known.get("Platforms") or ()}
    if platform and platforms and platform not in platforms:
        words = f"no matching manifest for {platform}; there is {', '.join(sorted(platforms))}"
        raise _refused(diagnosis.of_pull(name, words))
    digest = str((known.get("Descriptor") or {}).get("digest") or "")
    return Known(f"{split_reference(name)[0]}@{digest}" if digest else name, digest)


def _refused(found: Diagnosis) -> ComputeError:
    return ComputeError(found.message, words=found.words, hint=found.hint, code=found.reason.value)
