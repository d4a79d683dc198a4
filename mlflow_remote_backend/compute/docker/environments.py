"""A locked environment where the container finds it: in a volume that runs share, or in an image of its own.

Both are made by the very materialiser that a local run uses (``environment.materialise``), in a short-lived container
of the job's own image, so that what depends on the platform is right by construction. The packages are fetched and
verified here, where the index and its credentials are, and copied in; where all of them are, the container has no
network at all. The interpreter of a virtual environment is the image's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...environment import activation, cache
from ...errors import ComputeError, JobError
from ...job import EnvironmentRef, JobSpec
from . import copying, request
from .engine import Engine, Refused, split_reference
from .request import Image

IMAGE_NAME = "mlflow-remote-environment"
SEED = "/mlflow-remote-seed"
TOOLS = "/mlflow-remote-tools"
BUILD_TIMEOUT_S = 7200.0
_POLL_S = 0.2
_LAST_LINES = 40

Say = Callable[[str], None]

#: Reads the secrets for the indexes from its stdin (``export`` lines), then builds. ``$1``: root, ``$2``: baked or not.
_BUILD = r"""
eval "$(cat)"
for python in python3 python; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
    python=
done
if [ -z "$python" ]; then
    echo "The image has no Python 3.10 or newer, which making an environment in it needs." >&2
    exit 3
fi
export PYTHONPATH=@TOOLS@ HOME=/tmp MLFLOW_REMOTE_CACHE="$1"
"$python" -c '
import json, sys
sys.path.insert(0, "@TOOLS@")
from pathlib import Path
from mlflow_remote_backend.environment.materialise import materialise
from mlflow_remote_backend.errors import RemoteError
from mlflow_remote_backend.job import EnvironmentRef
ref = EnvironmentRef(**json.load(open("@SEED@/environment.json")))
try:
    materialise(ref, Path(sys.argv[1]), lambda step: print(step, file=sys.stderr, flush=True), compile_bytecode=True)
except RemoteError as error:
    sys.exit(str(error))
' "$1" || exit 4
if [ -n "$2" ]; then
    cd "$1" && for each in *; do [ "$each" = envs ] || rm -rf "$each"; done
    rm -rf @TOOLS@ @SEED@
fi
""".replace("@TOOLS@", TOOLS).replace("@SEED@", SEED)


@dataclass(frozen=True)
class Environment:
    """A materialised environment. ``image``: the one to run in. ``python``: its interpreter, if it has one.

    ``variables``: what activating it sets, over the image's own.
    """

    image: Image
    python: str
    variables: Mapping[str, str]


@dataclass(frozen=True)
class _Build:
    """One environment to be made or found. ``volume``: empty where it is baked into an image."""

    engine: Engine
    spec: JobSpec
    image: Image
    volume: str
    say: Say
    cancelled: Callable[[], bool]

    @property
    def ref(self) -> EnvironmentRef:
        return self.spec.environment

    @property
    def prefix(self) -> str:
        return f"{request.CACHE}/envs/{self.ref.lock_key}"

    @property
    def container(self) -> str:
        return f"{request.container_name(self.spec.run.run_id)}{request.BUILDER}"


def ensure(
    engine: Engine,
    spec: JobSpec,
    image: Image,
    *,
    auth: Mapping[str, Any] | None,
    cache_root: Path,
    say: Say,
    cancelled: Callable[[], bool] = lambda: False,
) -> Environment:
    """The environment of the spec, made if nobody made it yet. Blocks for milliseconds or minutes.

    ``cache_root``: where archives are kept on this machine. Raises JobError: ENVIRONMENT, IMAGE_PULL, CANCELLED.
    """
    baked = bool(spec.options.get("build"))
    volume = "" if baked else str(spec.options["env_cache"])
    build = _Build(engine, spec, image, volume, say, cancelled)
    try:
        if baked:
            found, marker = _in_image(build, auth, cache_root)
        else:
            found, marker = image, _in_volume(build, cache_root)
    except ComputeError as error:
        raise JobError(error.what, words=error.words, hint=error.hint, code="ENVIRONMENT") from error
    finally:
        with contextlib.suppress(ComputeError):
            engine.remove(build.container)
    return Environment(found, _python(build.prefix, marker), _variables(build, found, marker))


# -- in a volume -------------------------------------------------------------------------------------------------------


def _in_volume(build: _Build, cache_root: Path) -> dict[str, Any]:
    marker = None
    if build.engine.volume(build.volume) is not None:
        marker = _marker(build, build.image, [_mount(build, read_only=True)])
    if marker is None:
        name, _, value = request.MANAGED_LABEL.partition("=")
        build.engine.create_volume(build.volume, {name: value, request.CACHE_LABEL: "environments"})
        _make(build, cache_root)
        marker = _marker_in(build, build.container)
    return _required(build, marker)


def _mount(build: _Build, *, read_only: bool) -> dict[str, Any]:
    return {"Type": "volume", "Source": build.volume, "Target": request.CACHE, "ReadOnly": read_only}


def _marker(build: _Build, image: Image, mounts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the environment's marker says, looked up through a container that is never started."""
    document = {
        "Image": image.id,
        "Entrypoint": ["/nothing"],
        "Labels": request.labels(build.spec),
        "HostConfig": {"Mounts": list(mounts)},
    }
    build.engine.remove(build.container)
    container = build.engine.create(build.container, document)
    try:
        return _marker_in(build, container)
    finally:
        build.engine.remove(container)


def _marker_in(build: _Build, container: str) -> dict[str, Any] | None:
    try:
        found = copying.files(build.engine.copy_out(container, f"{build.prefix}/{cache.MARKER}"))
        text = b"".join(stream.read() for _, stream in found)
    except Refused as error:
        if error.missing:
            return None
        raise
    marker = json.loads(text)
    return marker if isinstance(marker, dict) and marker.get("prefix") == build.prefix else None


def _required(build: _Build, marker: dict[str, Any] | None) -> dict[str, Any]:
    if marker is None:
        raise JobError(f"The environment {build.ref.lock_key[:16]} is not where it was made.", code="ENVIRONMENT")
    return marker


# -- in an image -------------------------------------------------------------------------------------------------------


def image_tag(ref: EnvironmentRef, base: Image) -> str:
    """Names the environment and what it stands on; the code has no part in it."""
    return f"env-{ref.lock_key[:16]}-{base.id.rpartition(':')[2][:12]}"


def _in_image(build: _Build, auth: Mapping[str, Any] | None, cache_root: Path) -> tuple[Image, dict[str, Any]]:
    repository = str(build.spec.options.get("repository") or "")
    name = f"{repository or IMAGE_NAME}:{image_tag(build.ref, build.image)}"
    found = build.engine.image(name)
    if found is None and repository:
        found = _pulled(build, name, auth)
    made_now = found is None
    if made_now:
        _make(build, cache_root)
        _commit(build, name)
        found = build.engine.image(name)
    # An engine with containerd's image store gives a digest to what was never pushed, too.
    if repository and found is not None and (made_now or not found.get("RepoDigests")):
        _push(build, name, auth)
        found = build.engine.image(name)
    if found is None:
        raise JobError(f"Image {name} is gone although it was just made.", code="ENVIRONMENT")
    made = Image.from_inspect(found)
    image = dataclasses.replace(build.image, id=made.id, digest=made.digest)
    return image, _required(build, _marker(build, image, []))


def _pulled(build: _Build, name: str, auth: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The image as somebody else has pushed it, if anybody has."""
    build.say(f"looking for image {name}")
    with contextlib.suppress(Refused):
        for _ in build.engine.pull(name, build.spec.options.get("platform") or None, auth):
            pass
    return build.engine.image(name)


def _commit(build: _Build, name: str) -> None:
    build.say(f"making image {name}")
    base = (build.engine.image(build.image.id) or {}).get("Config") or {}
    managed, _, by = request.MANAGED_LABEL.partition("=")
    config = {
        **base,
        "Labels": {**(base.get("Labels") or {}), managed: by, request.ENVIRONMENT_LABEL: build.ref.lock_key},
        "Entrypoint": base.get("Entrypoint") or [],  # where there is none, the engine would take the builder's
        "Cmd": base.get("Cmd") or ["/bin/sh"],
    }
    repository, tag = split_reference(name)
    build.engine.commit(build.container, repository, tag, config, "mlflow-remote: an environment by its lock key")


def _push(build: _Build, name: str, auth: Mapping[str, Any] | None) -> None:
    repository, tag = split_reference(name)
    build.say(f"pushing image {name}")
    try:
        for line in build.engine.push(repository, tag, auth):
            if line.get("progress"):
                build.say(f"pushing image {name}: {line['progress']}")
    except Refused as error:
        raise JobError(
            f"Image {name} cannot be pushed.",
            words=error.words,
            hint="`docker login` for its registry, or leave docker.repository out to keep the image on the engine.",
            code="ENVIRONMENT",
        ) from error


# -- making it ---------------------------------------------------------------------------------------------------------


def _make(build: _Build, cache_root: Path) -> None:
    """Run the materialiser in a container, which is left behind, stopped. Raises JobError."""
    from . import seed, tools  # they load the solver's side of things, which a warm start does not need

    build.say("fetching the environment's packages")
    seeded = seed.gather(build.ref, cache_root, build.say, SEED)
    mounts = [_mount(build, read_only=False)] if build.volume else []
    document = {
        "Image": build.image.id,
        "Entrypoint": ["/bin/sh", "-c", _BUILD, "build"],
        "Cmd": [request.CACHE, "" if build.volume else "baked"],
        "User": "0:0",
        "WorkingDir": "/",
        "OpenStdin": True,
        "StdinOnce": True,
        "Labels": request.labels(build.spec),
        "HostConfig": {
            "Mounts": mounts,
            "NetworkMode": "none" if seeded.whole else build.spec.options.get("network") or "default",
            "CapDrop": ["ALL"],
            "CapAdd": ["DAC_OVERRIDE", "FOWNER"],  # the cache may hold folders of an engine's other users
            "SecurityOpt": ["no-new-privileges"],
            "LogConfig": request.OWN_LOG,
        },
    }
    build.say("copying the environment's packages to the engine")
    build.engine.remove(build.container)
    container = build.engine.create(build.container, document)
    for items in (tools.items(TOOLS, build.ref, cache_root), seeded.items()):
        build.engine.copy_in(container, "/", copying.pack(items, (0, 0)))
    _start(build, container, seeded.secrets)
    _wait(build, container)


def _start(build: _Build, container: str, secrets: Mapping[str, str]) -> None:
    script = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in secrets.items())
    connection = build.engine.attach_input(container)
    try:
        build.engine.start(container)
        connection.send(script.encode())
        connection.end_input()
    finally:
        connection.close()


def _wait(build: _Build, container: str) -> None:
    deadline = time.monotonic() + BUILD_TIMEOUT_S
    while True:
        found = build.engine.inspect(container)
        if found is None or not found["State"]["Running"]:
            break
        if build.cancelled():
            raise JobError("Cancelled while the environment was made.", code="CANCELLED")
        if time.monotonic() > deadline:
            raise JobError(f"The environment was not made within {BUILD_TIMEOUT_S:.0f} s.", code="ENVIRONMENT")
        said = build.engine.words_of(container, 1).strip()
        build.say(f"making the environment: {said}" if said else "making the environment")
        time.sleep(_POLL_S)
    code = found["State"]["ExitCode"] if found else None
    if code != 0:
        raise _failed(build, container, code)


def _failed(build: _Build, container: str, code: int | None) -> JobError:
    if code is None:
        return JobError("The container that was to make the environment was removed by somebody.", code="ENVIRONMENT")
    words = build.engine.words_of(container, _LAST_LINES).strip()
    hint = "Choose an image with Python 3.10 or newer in docker.image." if code == 3 else ""
    what = f"The environment could not be made in image {request.image_name(build.spec)}."
    return JobError(what, words=words, hint=hint, code="ENVIRONMENT")


# -- using it ----------------------------------------------------------------------------------------------------------


def _python(prefix: str, marker: Mapping[str, Any]) -> str:
    return f"{prefix}/{marker['python']}" if marker.get("python") else ""


def _variables(build: _Build, image: Image, marker: Mapping[str, Any]) -> dict[str, str]:
    """What activating the prefix sets over the image's own variables; the prefix is not on this machine."""
    own = dict(each.partition("=")[::2] for each in image.environment)
    with tempfile.TemporaryDirectory() as stand_in:
        folder = Path(stand_in)
        (folder / cache.MARKER).write_text(json.dumps(marker))
        if build.ref.kind == "conda-lock":
            (folder / "conda-meta").mkdir()
        variables = activation.activation(folder, own, build.ref.env_vars)
    return {name: value.replace(stand_in, build.prefix) for name, value in variables.items()}
