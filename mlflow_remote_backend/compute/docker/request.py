"""JobSpec -> the document of its container, in the Engine API's words. Pure.

The container never gets a folder of the submitter's but for what the user asks to mount, and a tracking store of this
machine. Its project, our scripts and the command are copied in; the program's variables stand in the command file and
the secrets come by stdin, so neither is in ``docker inspect``. Layout inside::

    /mlflow/projects               a volume of the run's own, so that nothing is lost with the container
    /mlflow/projects/code          the project, where MLflow's own backend has it
    /mlflow/projects/.mlflow-remote  ours: execute, scripts, spool/, home/, tmp/
    /mlflow-remote                 the volume with environments, read-only
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError, ProjectError
from ...job import JobSpec
from . import arguments, reach

MOUNT = "/mlflow/projects"
WORK = f"{MOUNT}/code"
OURS = f"{MOUNT}/.mlflow-remote"
SPOOL = f"{OURS}/spool"
CACHE = "/mlflow-remote"

MANAGED_LABEL = "app.kubernetes.io/managed-by=mlflow-remote"
RUN_LABEL = "mlflow-remote/run-id"
ENVIRONMENT_LABEL = "mlflow-remote/environment"  # on an image: the lock key of what it holds
CACHE_LABEL = "mlflow-remote/cache"
TRACKING_LABEL = "mlflow-remote/tracking"  # tells runs of one tracking server from another's on the same engine
BUILDER = "-environment"  # after the container's name: the one that makes its environment
STOP_MARGIN_S = 10  # what execute may take beyond the grace period when the engine itself stops the container
DEFAULT_PYTHON = "3.12"
OWN_LOG = {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "1"}}  # execute's own words, not the program's
_SOCKETS = ("docker.sock", "containerd.sock", "podman.sock")


@dataclass(frozen=True)
class Image:
    """What a container's document depends on of its image. ``digest``: the registry's, empty for a local image.

    ``user``: as the image declares it, empty for root. ``environment``: of image config, ``NAME=VALUE``.
    """

    id: str = ""
    digest: str = ""
    user: str = ""
    entrypoint: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    architecture: str = ""

    @property
    def identity(self) -> str:
        """What to know it by in the run's record, whatever its tag says later."""
        return self.digest or self.id

    @classmethod
    def from_inspect(cls, found: Mapping[str, Any]) -> Image:
        config = found.get("Config") or {}
        digests = found.get("RepoDigests") or []
        return cls(
            id=str(found["Id"]),
            digest=str(digests[0]).partition("@")[2] if digests else "",
            user=str(config.get("User") or ""),
            entrypoint=tuple(config.get("Entrypoint") or ()),
            environment=tuple(config.get("Env") or ()),
            architecture=str(found.get("Architecture") or ""),
        )


@dataclass(frozen=True)
class Container:
    """All that is needed to make a job's container. ``environment``: variables of the program, literal ones.

    ``shell``: what the program's shell line is handed to, where the image's entrypoint wraps it.
    """

    name: str
    document: Mapping[str, Any]
    platform: str
    entrypoint: tuple[str, ...]
    environment: Mapping[str, str]


def container_name(run_id: str) -> str:
    return f"mlr-{run_id}"


def image_name(spec: JobSpec) -> str:
    """The image to run in: what the caller says, what the project says, else a plain one with Python."""
    declared = (spec.docker_env or {}).get("image")
    name = spec.options.get("image") or declared
    if name:
        return str(name)
    if spec.docker_env is not None:
        raise ProjectError(
            "The project's docker_env names no image.",
            hint="Add `image:` under docker_env in MLproject, or set docker.image in backend_config.",
        )
    version = re.match(r"\d+\.\d+", spec.environment.python)
    return f"python:{version[0] if version else DEFAULT_PYTHON}-slim"


def default_user(image_user: str, caller: str, *, rootless: bool, local_store: bool) -> str:
    """Whose files the program writes. Empty: the image's own user.

    The caller's ids, so that files in mounted folders are the caller's; but a user that the image made for itself is
    kept, unless a store of this machine must be written to. Under a rootless engine the container's root is the caller.
    """
    own = image_user.partition(":")[0]
    if own not in ("", "0", "root") and not local_store:
        return ""
    return "0:0" if rootless else caller


def caller_ids() -> str:
    """``uid:gid`` of this process, where the system has such."""
    return f"{os.getuid()}:{os.getgid()}" if hasattr(os, "getuid") else ""


def container(
    spec: JobSpec, image: Image, user: str, *, environ: Mapping[str, str] | None = None, python: str = ""
) -> Container:
    """The job's container. ``user``: from :func:`default_user`, overruled by the user's own wish.

    ``environ``: the caller's variables, for ``~`` and ``$NAME`` in volumes of the project. ``python``: an interpreter
    for our own scripts where the image has none. Raises ConfigError.
    """
    options = spec.options
    name = container_name(spec.run.run_id)
    base = {
        "Image": image.id or image_name(spec),
        "Entrypoint": ["/bin/sh", f"{OURS}/start.sh"],
        "Cmd": [python] if python else [],
        "User": options.get("user") or user,
        "WorkingDir": WORK,
        "OpenStdin": True,
        "StdinOnce": True,
        "Tty": False,
        "StopSignal": "SIGTERM",
        "StopTimeout": int(spec.limits.grace_period_s) + STOP_MARGIN_S,
        "Labels": labels(spec),
        "HostConfig": _host(spec, name, environ or {}),
    }
    draft = arguments.apply(base, options.get("args") or {})
    document = _without_empty(draft.document)
    network = document["HostConfig"].get("NetworkMode", "")
    if draft.endpoint:
        document["NetworkingConfig"] = {"EndpointsConfig": {network or "bridge": draft.endpoint}}
    return Container(
        name=name,
        document=document,
        platform=draft.platform or options.get("platform") or "",
        entrypoint=tuple(draft.entrypoint) if draft.entrypoint is not None else image.entrypoint,
        environment={**literal_variables(spec), **draft.env},
    )


def labels(spec: JobSpec) -> dict[str, str]:
    name, _, value = MANAGED_LABEL.partition("=")
    ours = {
        name: value,
        RUN_LABEL: spec.run.run_id,
        TRACKING_LABEL: tracking_mark(spec.run.at_submitter.tracking_uri),
        "mlflow-remote/submission-id": spec.submission_id,
    }
    return {**spec.annotations, **spec.labels, **ours}


def tracking_mark(tracking_uri: str) -> str:
    """A short name for a tracking server, which a label can hold."""
    return hashlib.sha256(tracking_uri.rstrip("/").encode()).hexdigest()[:16]


def network_of(spec: JobSpec) -> str:
    """The network that the container will join, empty for the engine's default."""
    args = spec.options.get("args") or {}
    return str(args.get("network") or args.get("net") or spec.options.get("network") or "")


def _host(spec: JobSpec, name: str, environ: Mapping[str, str]) -> dict[str, Any]:
    options, resources = spec.options, spec.resources
    run_volume = {
        "Type": "volume",
        "Source": name,
        "Target": MOUNT,
        "VolumeOptions": {"NoCopy": True, "Labels": labels(spec)},
    }
    gpus = options.get("gpus") if options.get("gpus") is not None else resources.gpu
    return {
        "Mounts": [run_volume, *_cache_mount(spec), *reach.mounts(spec.run.tracking_uri, spec.run.artifact_uri)],
        "Binds": [*project_volumes(spec, environ), *options.get("volumes", ())],
        "NetworkMode": options.get("network"),
        "ExtraHosts": reach.extra_hosts(spec.run.tracking_uri),
        "CapDrop": ["ALL"],
        "CapAdd": list(options.get("capabilities", ())),
        "SecurityOpt": ["no-new-privileges"],
        "LogConfig": OWN_LOG,
        "Runtime": options.get("runtime"),
        "DeviceRequests": [_gpus(gpus)] if gpus else None,
        "NanoCpus": round(resources.cpu * 1e9) if resources.cpu else None,
        "Memory": resources.memory_bytes,
        "MemorySwap": resources.memory_bytes,  # no swap: the limit is the limit, and an OOM kill says so
        "ShmSize": resources.shm_size_bytes,
    }


def _cache_mount(spec: JobSpec) -> list[dict[str, Any]]:
    if not spec.environment.lock_key or spec.options.get("build"):
        return []
    return [{"Type": "volume", "Source": spec.options["env_cache"], "Target": CACHE, "ReadOnly": True}]


def _gpus(wanted: str | int | list[str] | tuple[str, ...]) -> dict[str, Any]:
    if isinstance(wanted, (list, tuple)):
        return arguments.gpu_request("device=" + ",".join(wanted))
    return arguments.gpu_request(str(wanted))


def _without_empty(document: Mapping[str, Any]) -> dict[str, Any]:
    host = {key: value for key, value in document["HostConfig"].items() if value not in (None, [], {})}
    return {**{key: value for key, value in document.items() if value is not None}, "HostConfig": host}


# -- what the project declares -----------------------------------------------------------------------------------------


def project_volumes(spec: JobSpec, environ: Mapping[str, str]) -> list[str]:
    """``docker_env.volumes`` as MLflow's local backend hands them to ``docker run -v``, through a shell."""
    found = []
    for each in (spec.docker_env or {}).get("volumes") or ():
        source, colon, rest = str(each).partition(":")
        if any(socket in source for socket in _SOCKETS):
            raise ConfigError(
                f"The project asks for the container engine's own socket: docker_env volume {each!r}.",
                key="docker_env.volumes",
                hint="That would give its code all rights on the engine's machine. "
                "If you mean it, take it out of MLproject and put it into docker.volumes of backend_config.",
            )
        found.append(_expanded(source, environ) + colon + rest)
    return found


def _expanded(source: str, environ: Mapping[str, str]) -> str:
    if source == "~" or source.startswith("~/"):
        source = environ.get("HOME", "~") + source[1:]
    name = r"\$(?:(\w+)|\{(\w+)\})"
    expanded = re.sub(name, lambda found: environ.get(found[1] or found[2], found[0]), source)
    if "/" in expanded and not expanded.startswith("/") and not re.match(r"[A-Za-z]:[\\/]", expanded):
        raise ConfigError(
            f"docker_env volume {source!r} is a relative path, which an engine cannot know.",
            key="docker_env.volumes",
            hint="Write an absolute path, ~/PATH, or the name of a Docker volume.",
        )
    return expanded


def literal_variables(spec: JobSpec) -> dict[str, str]:
    """The ``[NAME, VALUE]`` members of ``docker_env.environment``."""
    declared = (spec.docker_env or {}).get("environment") or ()
    return {str(each[0]): str(each[1]) for each in declared if isinstance(each, (list, tuple)) and len(each) == 2}


def copied_variables(spec: JobSpec) -> list[str]:
    """Names that the project's docker_env and ``-A e=NAME`` copy from the caller: their values travel as secrets."""
    declared = (spec.docker_env or {}).get("environment") or ()
    names = [str(each) for each in declared if not isinstance(each, (list, tuple))]
    return [*names, *arguments.copied_names(spec.options.get("args") or {})]


# -- what a person reads before it happens -----------------------------------------------------------------------------


def printable(spec: JobSpec) -> dict[str, Any]:
    """The request as ``plan`` shows it and ``remote/job.yaml`` keeps it: names of variables, never their values."""
    made = container(spec, Image(), spec.options.get("user") or "(yours, or the image's own)")
    return {
        "compute": "docker",
        "engine": {key: spec.options.get(key) for key in ("base_url", "context") if spec.options.get(key)} or "default",
        "image": {"name": image_name(spec), "pull": spec.options.get("pull", "missing"), "platform": made.platform},
        "environment": _environment(spec),
        "command": spec.entry_point.command,
        "variables": sorted({*spec.env_vars, *made.environment}),
        "secrets": sorted({*spec.secret_names, *copied_variables(spec)}),
        "container": {"name": made.name, **made.document},
    }


def _environment(spec: JobSpec) -> dict[str, str]:
    if not spec.environment.lock_key:
        return {"manager": spec.environment.manager}
    kept = "image" if spec.options.get("build") else f"volume {spec.options['env_cache']}"
    return {"manager": spec.environment.manager, "lock_key": spec.environment.lock_key, "kept_in": kept}
