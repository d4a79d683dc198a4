"""The ``docker`` compute: the program runs in a container; a supervisor on this machine does all the rest.

| what | how |
|---|---|
| isolation | no capability, no new privileges, the caller's user; the project's image, or its locked environment |
| engine | any that the Docker SDK reaches; this machine's folders are not mounted, but for a tracking store |
| outlives the submitter | as with ``local``; a container outlives even its supervisor, and the next one takes over |
| live log | mirrored into the run folder's spool, and read there |
| retry | no |
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...environment.platforms import linux_platform
from ...errors import ComputeError, ConfigError, ProjectError
from ...job import JobSpec, JobStatus, LogChunk, Phase
from ...runner import run_folder
from ...runner.call_limits import users_environ
from ...runner.run_folder import RunFolder
from ...runner.supervise import Start
from ..base import JobHandle, Request, Secrets
from ..supervised import SupervisedCompute
from . import arguments, copying, images, leftovers, program, reach, request, watch
from .engine import AUTH_VARIABLE, Endpoint, Engine, opens, registry_auth
from .leftovers import Cached, Leftover

PLATFORMS = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}
_BUILT_IN_NETWORKS = ("", "bridge", "host", "none", "default")
_LEAST_MEMORY_BYTES = 6 << 20  # the engine's own


class DockerCompute(SupervisedCompute):
    """See compute/base.py for the contract of each verb."""

    name = "docker"
    program = f"{program.__name__}:DockerProgram"

    def __init__(self, options: Mapping[str, Any] | None = None, root: Path | None = None) -> None:
        super().__init__(root)
        self._options = dict(options or {})
        self._connected: Engine | None = None
        self._info: dict[str, Any] = {}
        self._known: images.Known | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DockerCompute:
        return cls(options)

    @classmethod
    def from_handle(cls, handle: JobHandle) -> DockerCompute:
        """The engine is the one that the run folder knows, or the one that the caller's environment names."""
        try:
            return cls(RunFolder(_run_id(handle)).spec().options)
        except FileNotFoundError:
            return cls({})

    def describe(self) -> str:
        """One line about the engine, for a person. Raises ComputeError if it does not answer."""
        engine, info = self._engine(), self._engine_info()
        return (
            f"{engine.endpoint.url}: Docker {info.get('ServerVersion')}, {self.platform()}, "
            f"{info.get('NCPU')} cores, {int(info.get('MemTotal') or 0) / 2**30:.1f} GiB"
        )

    def platform(self) -> str:
        """What the engine's containers are by default: ``linux/amd64``, ``linux/arm64``."""
        machine = str(self._engine_info().get("Architecture", ""))
        return PLATFORMS.get(machine, f"linux/{machine}")

    # -- before anything exists

    def render(self, spec: JobSpec) -> Request:
        return Request(spec, request.printable(spec))

    def check(self, request_: Request, secrets: Secrets) -> Sequence[str]:
        spec = request_.spec
        self.check_machine(spec)
        _refuse_impossible(spec)
        _refuse_unset(spec, os.environ)
        request.project_volumes(spec, os.environ)
        info = self._engine_info()
        self._refuse_too_much(spec, info)
        network = request.network_of(spec)
        here = self._engine().endpoint.on_this_machine
        reach.refuse_unreachable(spec.run.tracking_uri, engine_here=here, network=network)
        if network not in _BUILT_IN_NETWORKS and not network.startswith("container:"):
            self._refuse_unknown_network(network)
        self._refuse_other_platform(spec)
        notice = self._image(spec, secrets).notice
        return [*([notice] if notice else []), *_notices(spec, secrets)]

    def _image(self, spec: JobSpec, secrets: Secrets) -> images.Known:
        """The image as the engine or its registry knows it now; asked once, so that what was checked is what runs."""
        if self._known is None:
            self._known = images.look_up(
                self._engine(),
                request.image_name(spec),
                pull=spec.options.get("pull", "missing"),
                platform=spec.options.get("platform") or self.platform(),
                auth=registry_auth(secrets.runner),
            )
        return self._known

    def _refuse_other_platform(self, spec: JobSpec) -> None:
        """An environment that is locked for another platform than the container's could not even be made there."""
        locked, wanted = spec.environment.platform, spec.options.get("platform") or self.platform()
        if spec.environment.lock_key and locked != linux_platform(wanted.rpartition("/")[2]):
            raise ConfigError(
                f"The environment is locked for {locked}, and the container is {wanted}.",
                key="docker.platform",
                hint=f"Set docker.platform to {self.platform()}, the engine's own.",
            )

    def _refuse_too_much(self, spec: JobSpec, info: Mapping[str, Any]) -> None:
        """What the engine would refuse when the container is made."""
        if info.get("OSType") != "linux":
            raise ComputeError(f"The Docker engine runs {info.get('OSType')} containers; a job needs Linux containers.")
        cores, memory_bytes = int(info.get("NCPU") or 0), int(info.get("MemTotal") or 0)
        wanted = spec.resources
        if cores and wanted.cpu and wanted.cpu > cores:
            raise _too_much("resources.cpu", f"{wanted.cpu:g} cores", f"{cores}")
        if memory_bytes and wanted.memory_bytes and wanted.memory_bytes > memory_bytes:
            raise _too_much("resources.memory", f"{wanted.memory_bytes} bytes", f"{memory_bytes}")
        if wanted.memory_bytes and wanted.memory_bytes < _LEAST_MEMORY_BYTES:
            raise ConfigError("resources.memory is below 6 MiB, Docker's own minimum.", key="resources.memory")
        runtime, known = spec.options.get("runtime"), info.get("Runtimes") or {}
        if runtime and runtime not in known:
            raise ConfigError(
                f"The Docker engine has no runtime {runtime!r}.",
                key="docker.runtime",
                hint=f"It has {', '.join(sorted(known))}.",
            )

    def _refuse_unknown_network(self, network: str) -> None:
        if self._engine().network(network) is None:
            raise ConfigError(
                f"The Docker engine has no network {network!r}.",
                key="docker.network",
                hint=f"`docker network create {network}` makes one; `docker network ls` lists them.",
            )

    # -- the job

    def handle_url(self, spec: JobSpec) -> str:
        return f"docker://{_engine_id(self._engine_info())}/{request.container_name(spec.run.run_id)}"

    def submit(self, request_: Request, secrets: Secrets) -> JobHandle:
        """The supervisor gets the very engine and image that were checked, whatever a tag or a context says later."""
        spec = request_.spec
        known = self._image(spec, secrets)
        pinned = {
            **spec.options,
            "endpoint": dataclasses.asdict(self._engine().endpoint),
            "engine": _engine_id(self._engine_info()),
            "rootless": _is_rootless(self._engine_info()),
            "resolved_image": known.pinned,
        }
        bound = dataclasses.replace(request_, spec=dataclasses.replace(spec, options=pinned))
        auth = {key: value for key, value in secrets.runner.items() if key == AUTH_VARIABLE}
        self.start(bound, Start({**users_environ(), **auth}, secrets.program, os.getcwd()))
        uid = f"{run_folder.machine_id(self.root)}/{spec.submission_id}"
        return JobHandle(self.handle_url(spec), uid, known.digest)

    def handle_of(self, folder: RunFolder) -> JobHandle:
        options = folder.spec().options
        return JobHandle(f"docker://{options.get('engine', 'engine')}/{request.container_name(folder.run_id)}")

    def run_folder(self, handle: JobHandle) -> RunFolder:
        return RunFolder(_run_id(handle), self.root)

    def status(self, handle: JobHandle) -> JobStatus:
        if self._ours(handle):
            return super().status(handle)
        found = self._container(handle)
        if found is None:
            raise _elsewhere(handle, "and no container of it is on this engine")
        state = found["State"]
        if state["Running"]:
            paused = "paused by somebody" if state["Paused"] else ""
            return JobStatus(Phase.RUNNING, job_uid=str(found["Id"]), detail=paused)
        phase = Phase.STARTING if state["Status"] == "created" else Phase.FINALIZING
        return JobStatus(phase, job_uid=str(found["Id"]), detail="finished by the machine that submitted it")

    def logs(self, handle: JobHandle, *, offset: int = 0, attempt: int = 0, follow: bool = False) -> Iterator[LogChunk]:
        return super().logs(handle, offset=offset, attempt=attempt) if self._ours(handle) else iter(())

    def cancel(self, handle: JobHandle, *, grace_period_s: float = 30.0) -> None:
        if self._ours(handle):
            super().cancel(handle, grace_period_s=grace_period_s)
            return
        found = self._container(handle)
        if found is None or not found["State"]["Running"]:
            return
        engine = self._engine()
        cancel = copying.pack([copying.Item("cancel", b"", 0o644)], (0, 0))
        engine.copy_in(str(found["Id"]), request.SPOOL, b"".join(cancel))
        engine.unpause(str(found["Id"]))
        self._wait_until_ended(str(found["Id"]), grace_period_s + watch.STOP_MARGIN_S)

    def _wait_until_ended(self, container: str, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while (found := self._engine().inspect(container)) is not None and found["State"]["Running"]:
            if time.monotonic() > deadline:
                self._engine().kill(container)
                return
            time.sleep(0.2)

    def collect(self, handle: JobHandle) -> None:
        if not self._ours(handle) or self.run_folder(handle).supervised():
            return
        watch.remove(self._engine(), request.container_name(_run_id(handle)))
        super().collect(handle)

    def recover(self, handle: JobHandle) -> bool:
        return self._ours(handle) and super().recover(handle)

    # -- what is left on the engine

    def leftovers(self, tracking_uri: str) -> list[Leftover]:
        """Containers and volumes of runs of that tracking server, ended or not. Raises a transient ComputeError."""
        mark = request.tracking_mark(tracking_uri)
        return [each for each in leftovers.leftovers(self._engine()) if each.tracking == mark]

    def remove_leftover(self, left: Leftover) -> None:
        leftovers.remove(self._engine(), left)

    def caches(self) -> Iterator[Cached]:
        return leftovers.caches(self._engine())

    def remove_cache(self, cached: Cached) -> bool:
        """False: it is in use."""
        return leftovers.remove_cache(self._engine(), cached)

    # -- the engine

    def _engine(self) -> Engine:
        if self._connected is None:
            self._connected = Engine.connect(Endpoint.from_options(self._options, os.environ))
        return self._connected

    def _engine_info(self) -> dict[str, Any]:
        if not self._info:
            self._info = self._engine().info()
        return self._info

    def _ours(self, handle: JobHandle) -> bool:
        """Whether this machine, with this state folder, submitted the job: then its folder is the truth."""
        if self.run_folder(handle).exists():
            return True
        return handle.uid.partition("/")[0] == run_folder.machine_id(self.root)

    def _container(self, handle: JobHandle) -> dict[str, Any] | None:
        """The job's container on the engine that we reach; a namesake of another run is none."""
        if urlsplit(handle.url).netloc != _engine_id(self._engine_info()):
            raise _elsewhere(handle, "and its container on an engine that is not the one reached from here")
        found = self._engine().inspect(request.container_name(_run_id(handle)))
        labels = (found or {}).get("Config", {}).get("Labels") or {}
        return found if labels.get(request.RUN_LABEL) == _run_id(handle) else None


def _engine_id(info: Mapping[str, Any]) -> str:
    return str(info.get("ID") or info.get("Name") or "engine").replace(":", "-").lower()


def _is_rootless(info: Mapping[str, Any]) -> bool:
    return any("rootless" in each for each in info.get("SecurityOptions") or ())


def _run_id(handle: JobHandle) -> str:
    name = urlsplit(handle.url).path.lstrip("/")
    if not name.startswith("mlr-"):
        raise ComputeError(f"{handle.url!r} is no handle of a docker job.")
    return name.removeprefix("mlr-")


def _elsewhere(handle: JobHandle, and_what: str) -> ComputeError:
    return ComputeError(
        f"The job was submitted from another machine, {and_what}: {handle.url}",
        hint="Its stored log and its status are still to be had from here; a cancel by tag reaches it as well.",
        transient=True,
    )


def _too_much(key: str, wanted: str, there: str) -> ConfigError:
    return ConfigError(f"{key} asks for {wanted}; the Docker engine's machine has {there}.", key=key)


def _refuse_impossible(spec: JobSpec) -> None:
    if spec.secret_refs:
        raise ConfigError(
            "secrets refers to secrets that exist at the compute; Docker keeps none.",
            key="secrets",
            hint="Set the variables where you submit and name them in pass_env: they travel as secrets.",
        )
    if spec.in_place:
        raise ConfigError("snapshot.in_place is for the compute local only.", key="snapshot.in_place")


def _refuse_unset(spec: JobSpec, environ: Mapping[str, str]) -> None:
    """As MLflow's local backend: a variable that is to be copied must be there."""
    missing = [name for name in request.copied_variables(spec) if name not in environ]
    if missing:
        raise ProjectError(
            f"The project's docker_env copies variables that are not set here: {', '.join(missing)}.",
            hint="Export them where you submit.",
        )


def _notices(spec: JobSpec, secrets: Secrets) -> list[str]:
    found = arguments.notices(spec.options.get("args") or {})
    if spec.resources.ephemeral_storage_bytes:
        found.append("resources.ephemeral_storage is not limited by Docker.")
    if spec.options.get("build") and not spec.environment.lock_key:
        found.append("docker.build has nothing to build: the image is the environment, and code is copied in.")
    auth, image = registry_auth(secrets.runner), request.image_name(spec)
    if auth and not opens(auth, spec.options.get("repository") or image) and not opens(auth, image):
        found.append(f"docker_auth is for {auth.get('registry') or 'Docker Hub'}, and goes to no other registry.")
    useless = reach.unusable_proxies(secrets.program, request.network_of(spec))
    if useless:
        found.append(f"{', '.join(useless)} name a proxy on this machine's loopback; the container does not get them.")
    return found
