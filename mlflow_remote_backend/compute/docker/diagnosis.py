"""What an engine says of a container, or of an image -> why the job ended. Pure.

``execute``'s own exit record says more than the engine can, so this speaks only where there is none, or where the
engine knows what ``execute`` could not see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...job import Diagnosis, Reason

_NO_SPACE = ("no space left on device", "disk quota exceeded")
_FATAL_PULL = (
    "not found", "manifest unknown", "unauthorized", "denied", "no matching manifest", "invalid reference",
    "does not match the specified platform", "repository does not exist", "authentication required", "basic auth",
    "unsupported",
)  # fmt: skip


def of_ended(
    name: str, found: Mapping[str, Any] | None, own_words: str = "", memory_bytes: int | None = None
) -> Diagnosis:
    """Why a container ended without an exit record. ``found``: as inspected, None if it is gone.

    ``own_words``: what its first process wrote.
    """
    if found is None:
        return Diagnosis(
            Reason.JOB_DELETED,
            f"Container {name} was removed by somebody while the program ran.",
            hint="What it had written until then is kept. `docker events` on the engine's machine tells more.",
        )
    state = found.get("State") or {}
    code = int(state.get("ExitCode") or 0)
    words = str(state.get("Error") or "")
    if state.get("OOMKilled"):
        limit = f" of {_mebibytes(memory_bytes)}" if memory_bytes else ""
        return Diagnosis(
            Reason.OOM,
            f"The container was killed by its memory limit{limit}.",
            words=words,
            hint="Raise resources.memory, or use less: smaller batches, fewer workers.",
        )
    if "exec format error" in own_words:
        return Diagnosis(
            Reason.CONTAINER_CONFIG,
            f"The image of container {name} is made for another kind of machine than the Docker engine's.",
            words=own_words.strip(),
            hint="Use an image for the engine's platform; `docker image inspect IMAGE` tells an image's Architecture.",
        )
    if code in (125, 126, 127, 128) or (own_words and code not in (137, 143, 255)):
        return Diagnosis(
            Reason.BOOTSTRAP,
            f"Our first process in container {name} could not start the program (exit code {code}).",
            words="\n".join(filter(None, (words, own_words.strip()))),
            hint="The image needs a POSIX shell with cat, ls, id, tail and head, and a writable /mlflow/projects.",
        )
    return Diagnosis(
        Reason.KILLED_BY_SYSTEM,
        f"Container {name} was killed from outside ({_ended_by(code)}), not by its memory limit.",
        words=words,
        hint="`docker kill`, a stopped or restarted engine, or a reboot of its machine do that.",
    )


def _ended_by(code: int) -> str:
    if code > 128:
        return {137: "SIGKILL", 143: "SIGTERM"}.get(code, f"signal {code - 128}")
    return f"exit code {code}"


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"


def of_start(name: str, image: str, words: str) -> Diagnosis:
    """Why the engine did not create or start a container: its own words tell."""
    lowered = words.lower()
    if any(each in lowered for each in _NO_SPACE):
        return no_space(words)
    if "/bin/sh" in lowered and ("no such file" in lowered or "not found" in lowered):
        return Diagnosis(
            Reason.CONTAINER_CONFIG,
            f"Image {image} has no /bin/sh, which a job needs to start.",
            words=words,
            hint="Use an image with a POSIX shell: distroless and scratch images have none.",
        )
    if "could not select device driver" in lowered or "nvidia-container-cli" in lowered:
        return Diagnosis(
            Reason.CONTAINER_CONFIG,
            f"The Docker engine cannot give container {name} the GPUs that it asks for.",
            words=words,
            hint="Its machine needs the driver and the NVIDIA Container Toolkit: `docker run --gpus all …` must work.",
        )
    if "bind source path does not exist" in lowered or "mount" in lowered or "volume" in lowered:
        return Diagnosis(
            Reason.VOLUME,
            f"Something that container {name} is to mount is not there.",
            words=words,
            hint="Paths are the engine's machine's. See docker.volumes, docker_env.volumes and the tracking store.",
        )
    return Diagnosis(
        Reason.CONTAINER_CONFIG,
        f"The Docker engine refuses container {name}.",
        words=words,
        hint="Look at the keys of docker in backend_config, and at -A/--docker-args.",
    )


def no_space(words: str) -> Diagnosis:
    return Diagnosis(
        Reason.VOLUME,
        "The Docker engine's disk is full.",
        words=words,
        hint="`docker system df` shows what fills it; `mlflow-remote gc --cache` removes kept environments.",
    )


def of_pull(image: str, words: str, waited_s: float = 0.0) -> Diagnosis:
    """Why an image cannot be pulled. ``fatal``: trying again is no use."""
    lowered = words.lower()
    if any(each in lowered for each in _NO_SPACE):
        return no_space(words)
    fatal = any(each in lowered for each in _FATAL_PULL)
    waited = f" within {waited_s:.0f} s" if waited_s and not fatal else ""
    return Diagnosis(
        Reason.IMAGE_PULL,
        f"Image {image} cannot be pulled{waited}.",
        words=words,
        hint="Check its name and tag, and `docker login` for its registry."
        if fatal
        else "The registry did not answer as it should; image_pull_timeout says how long to try.",
        fatal=fatal,
    )
