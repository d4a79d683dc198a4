"""Deployments to a Docker engine: a container that holds a keeper and its servers, on a published port.

The state is on the engine: labels find the container, files in it say what it serves; the client's disk has nothing.
The model is copied in, so the engine may be anywhere. The environment is in the volume that jobs share, mounted
read-only, as is the image. The container has no capability, no new privileges, and a user without rights; Docker starts
it again after a restart of the engine. While an update has two models loaded, the memory limit is the sum of what both
may use.

What a running container cannot become (another image, user, port, label …) an update makes a second one for, named
``mld-NAME.next``. Where it shall have the same port, it is in no network while it loads its model, since an engine
publishes a container's ports when it joins one; then the old one leaves the network and the new one joins it, which
takes some tenths of a second. The change has happened when the new one has the name: whatever is found half-way before
that (:meth:`DockerTarget.mend`) is taken back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import random
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ..compute.docker import copying, images, leftovers, request, users
from ..compute.docker.engine import STDOUT, Endpoint, Engine, LogStream, Refused, registry_auth
from ..compute.docker.request import Image
from ..environment import cache
from ..errors import ComputeError, ConfigError, JobError, RequestError
from ..job import EntryPoint, JobSpec, RunRef, SnapshotRef
from ..submission import Narrator
from . import calling
from .kept import File, Keep, KeptTarget, Software, being_changed, name_taken
from .spec import NAME_LABEL, Answer, DeploymentSpec, Order, Secrets
from .target import Watcher

VOLUME = "/mlflow"  # all that can be written to, and it goes with the container; and /tmp, in memory
FOLDER = f"{VOLUME}/deployment"
SCRATCH = f"{FOLDER}/tmp"  # the servers' home and folder for temporary files
PORT = 8080  # inside
USER = "65532:65532"  # who serves where the image names nobody: no user of the engine's machine
SERVICE_LOG = {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "2"}}
WRITABLE = (
    {"Type": "volume", "Target": VOLUME, "VolumeOptions": {"NoCopy": True}},
    {"Type": "tmpfs", "Target": "/tmp", "TmpfsOptions": {"Mode": 0o1777}},
)
PORTS = range(20000, 32000)  # where a free one is looked for: below those that systems hand out by themselves
PORT_ATTEMPTS = 20
PORT_TAKEN = ("port is already allocated", "address already in use")  # by a container, by anybody else
STOP_MARGIN_S = 15
ASK_MARGIN_S = 10.0
READ_ATTEMPTS = 5
NEXT = ".next"  # after a container's name: the one that is to take its place
HOLD_S = 15.0  # for a process in the container to say whether it holds the deployment
DEFAULT_NETWORK = "bridge"
FILLING_S = 2 * 3600.0  # how long packages may take to be copied to an engine
MAKER = "deployment-"  # what the run id of a deployment's environment maker starts with


class DockerTarget(KeptTarget):
    """See target.py for the contract of each verb."""

    name = "docker"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._connected: Engine | None = None
        self._images: dict[str, Image] = {}
        self._baked: dict[str, Image] = {}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DockerTarget:
        return cls(options)

    def engine(self) -> Engine:
        if self._connected is None:
            self._connected = Engine.connect(Endpoint.from_options(self._options, os.environ))
        return self._connected

    def render(self, spec: DeploymentSpec) -> dict[str, Any]:
        made = container(spec, Image(), spec.service.port)
        return {
            "compute": "docker",
            "image": request.image_name(as_job(spec)),
            "environment": spec.environment.lock_key or spec.environment.manager,
            "variables": sorted(spec.env_vars),
            "secrets": list(spec.secret_names),
            "container": {"name": container_name(spec.name), **made},
        }

    def check(self, spec: DeploymentSpec) -> Sequence[str]:
        info = self.engine().info()
        if info.get("OSType") != "linux":
            raise ComputeError(f"The Docker engine runs {info.get('OSType')} containers; a server needs Linux ones.")
        if spec.service.type != "ClusterIP":
            raise ConfigError("service.type is for Kubernetes.", key="service.type")
        for key in ("args", "volumes", "network", "build"):
            if spec.options.get(key):
                raise ConfigError(f"docker.{key} means nothing for a deployment.", key=f"docker.{key}")
        cores, memory_bytes = int(info.get("NCPU") or 0), int(info.get("MemTotal") or 0)
        if spec.resources.cpu and cores and spec.resources.cpu > cores:
            raise ConfigError(f"resources.cpu is over the engine's {cores} cores.", key="resources.cpu")
        if spec.resources.memory_bytes and memory_bytes and spec.resources.memory_bytes > memory_bytes:
            raise ConfigError(f"resources.memory is over the engine's {memory_bytes} bytes.", key="resources.memory")
        return []

    # -- readying -----------------------------------------------------------------------------------------------------

    def software(self, spec: DeploymentSpec, watcher: Watcher) -> Software:
        image = self._image(spec, watcher)
        own = dict(each.partition("=")[::2] for each in image.environment)
        own |= {"HOME": SCRATCH, "USER": "mlflow", "LOGNAME": "mlflow", "TMPDIR": SCRATCH, "PYTHONUNBUFFERED": "1"}
        if not spec.environment.lock_key:
            return Software("python3", own)
        from ..compute.docker import environments

        say = Narrator(watcher.say)
        made = environments.ensure(
            self.engine(),
            as_job(spec),
            image,
            auth=registry_auth(os.environ),
            cache_root=cache.default_root(),
            say=lambda line: say(line),
        )
        return Software(made.python or "python3", {**own, **made.variables})

    def _image(self, spec: DeploymentSpec, watcher: Watcher) -> Image:
        name = request.image_name(as_job(spec))
        if name not in self._images:
            self._images[name] = images.obtain(
                self.engine(),
                name,
                pull=spec.options.get("pull", "missing"),
                platform=spec.options.get("platform") or "",
                auth=registry_auth(os.environ),
                patience_s=spec.image_pull_timeout_s,
                say=watcher.say,
            )
        return self._images[name]

    def make(self, spec: DeploymentSpec) -> DockerKeep:
        """The container, not started; its published port is chosen here, since a free one of Docker's own choice would
        change with each start."""
        port = spec.service.port or _free_port(spec.service.host, self._taken_ports())
        try:
            return self._make(container_name(spec.name), spec, port)
        except Refused as error:
            if error.conflict:
                raise name_taken(spec.name, self.name) from error
            raise

    def _make(self, name: str, spec: DeploymentSpec, port: int) -> DockerKeep:
        image = self._images[request.image_name(as_job(spec))]
        made = self.engine().create(name, container(spec, image, port))
        return DockerKeep(self.engine(), made, spec.name, _owner(spec.options.get("user") or _user(image)))

    def _taken_ports(self) -> set[int]:
        listed = self.engine().containers(NAME_LABEL)
        return {
            int(port["PublicPort"]) for each in listed for port in each.get("Ports") or () if port.get("PublicPort")
        }

    def listens_on(self, spec: DeploymentSpec) -> dict[str, Any]:
        return {"host": "0.0.0.0", "port": PORT}

    # -- finding ------------------------------------------------------------------------------------------------------

    def find(self, name: str) -> DockerKeep | None:
        """The deployment's container; the next one, where a change was killed after it had removed the old one."""
        return self._find(container_name(name), name) or self._find(container_name(name) + NEXT, name)

    def _find(self, container: str, name: str) -> DockerKeep | None:
        found = self.engine().inspect(container)
        if found is None or (found["Config"].get("Labels") or {}).get(NAME_LABEL) != name:
            return None
        return DockerKeep(self.engine(), str(found["Id"]), name, _owner(str(found["Config"].get("User") or "0:0")))

    def names(self) -> list[str]:
        return sorted({each["Labels"][NAME_LABEL] for each in self.engine().containers(NAME_LABEL)})

    # -- changing -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """A create is alone by the container's name; whoever changes one that runs holds a lock in it."""
        keep = self.find(name)
        with keep.held() if keep is not None else contextlib.nullcontext():
            yield

    def only_anew(self, keep: Keep, before: DeploymentSpec, after: DeploymentSpec) -> list[str]:
        """What only another container can have. A port that is not asked for is the one that there is."""
        assert isinstance(keep, DockerKeep)
        now, then = fixed(before), fixed(after)
        if not after.service.port:
            now["service.port"] = 0
        now["docker.image"], then["docker.image"] = keep.image(), self._images[request.image_name(as_job(after))].id
        limit = after.resources.memory_bytes
        if limit and limit < keep.memory_bytes():  # it must be seen to load within it
            then["resources.memory"] = limit
        return sorted(key for key in then if now.get(key) != then[key])

    def roll(self, keep: Keep, order: Order, software: Software, secrets: Secrets, watcher: Watcher) -> None:
        """With memory for two models while both are loaded."""
        assert isinstance(keep, DockerKeep)
        spec = order.spec
        before, after = keep.memory_bytes(), spec.resources.memory_bytes
        if before and after:
            self.engine().change_limits(keep.container, cpus=None, memory_bytes=before + after)
        kept: int | None = before
        try:
            super().roll(keep, order, software, secrets, watcher)
            kept = after
        finally:
            cpus = spec.resources.cpu if kept == after else None
            try:
                self.engine().change_limits(keep.container, cpus=cpus, memory_bytes=kept)
            except ComputeError as error:
                limit = f"{(kept or 0) / 2**20:.0f} MiB"
                watcher.say(f"the limits could not be set back: do the servers use more than {limit}? {error.words}")

    def replace(
        self, keep: Keep, changed: list[str], order: Order, software: Software, secrets: Secrets, watcher: Watcher
    ) -> None:
        assert isinstance(keep, DockerKeep)
        spec = order.spec
        now = keep.port()
        port = spec.service.port or now
        what = f"another container is needed for {', '.join(changed)}; it loads the model beside the one that serves"
        gap = "then port {} is closed for some tenths of a second, 2 s at most; what is under way then is cut off"
        watcher.say(f"{what}; {gap.format(port)}" if port == now else f"{what}, and listens on port {port}")
        following = self._make(container_name(spec.name) + NEXT, spec, port)
        try:
            if port == now:
                following.leave_networks()
            self.fill(following, order, software, secrets, watcher)
            with following.held():
                if port == now:
                    self._hand_over(keep, following, watcher)
                self._ask_once(following, spec)
                self._commit(keep, following, spec, drain=port != now)
        except BaseException:
            with contextlib.suppress(ComputeError):
                self.mend(spec.name)
            raise

    def _hand_over(self, keep: DockerKeep, following: DockerKeep, watcher: Watcher) -> None:
        """The published port, from the one container to the other."""
        began = time.monotonic()
        keep.leave_networks()
        following.join_network()
        watcher.say(f"the port has changed hands in {time.monotonic() - began:.2f} s")

    def _commit(self, keep: DockerKeep, following: DockerKeep, spec: DeploymentSpec, *, drain: bool) -> None:
        if drain:
            keep.discard()
        else:
            self.engine().remove(keep.container)
        self.engine().rename(following.container, container_name(spec.name))

    def mend(self, name: str) -> None:
        own = self._find(container_name(name), name)
        following = self._find(container_name(name) + NEXT, name)
        if own is None and following is not None:
            self.engine().rename(following.container, container_name(name))
        elif following is not None:
            self.engine().remove(following.container)
        if own is not None:
            own.join_network()

    def delete(self, name: str) -> None:
        """Also under the hands of somebody who changes it: what it finds missing ends that."""
        for container in (container_name(name) + NEXT, container_name(name)):
            keep = self._find(container, name)
            if keep is not None:
                keep.discard()

    # -- what died half-way -------------------------------------------------------------------------------------------

    def sweep(self, older_than_s: float, *, dry_run: bool) -> Iterator[str]:
        """Changes that were killed, and containers that were to make an environment. One that runs is at work."""
        for each in self.engine().containers(NAME_LABEL):
            name, found = each["Labels"][NAME_LABEL], each["Names"][0].lstrip("/")
            if found != container_name(name) + NEXT or time.time() - each["Created"] < older_than_s:
                continue
            try:
                with self.changing(name):
                    if not dry_run:
                        self.mend(name)
                    yield f"half an update of {name}"
            except RequestError:  # somebody is at it
                continue
        for left in leftovers.leftovers(self.engine()):
            if left.run_id.startswith(MAKER) and left.age_s > older_than_s and not self._works(left):
                if not dry_run:
                    leftovers.remove(self.engine(), left)
                yield f"{left.kind} {left.name}"

    def _works(self, left: leftovers.Leftover) -> bool:
        """Whether it runs, or is being filled by somebody whom it cannot be asked about."""
        state = (self.engine().inspect(left.name) or {}).get("State") or {}
        return bool(state.get("Running")) or (state.get("Status") == "created" and left.age_s < FILLING_S)


def fixed(spec: DeploymentSpec) -> dict[str, Any]:
    """What a container has from its beginning to its end, by the keys that say it. Pure."""
    options = {f"docker.{key}": spec.options.get(key) for key in ("user", "capabilities", "runtime", "gpus")}
    return {
        **options,
        "docker.env_cache": _mounts(spec),
        "service.port": spec.service.port,
        "service.host": spec.service.host,
        "resources.gpu": spec.resources.gpu,
        "resources.shm_size": spec.resources.shm_size_bytes,
        "resources.memory (a limit or none)": bool(spec.resources.memory_bytes),
        "resources.cpu (a limit or none)": bool(spec.resources.cpu),
        "grace_period": int(spec.grace_period_s),
        "labels": dict(spec.labels),
        "annotations": dict(spec.annotations),
    }


# -- the container -----------------------------------------------------------------------------------------------------


def container_name(name: str) -> str:
    return f"mld-{name}"


def as_job(spec: DeploymentSpec) -> JobSpec:
    """The deployment as the job that would make its environment: made, found and kept as for jobs, by the same code.

    Its containers carry a run's label, so that ``gc`` takes one whose maker died.
    """
    run_id = f"{MAKER}{spec.name}-{hashlib.sha256(spec.dump().encode()).hexdigest()[:8]}"
    return JobSpec(
        run=RunRef(run_id, "", "", ""),
        submission_id=run_id,
        project_name=spec.name,
        entry_point=EntryPoint("serve", ""),
        parameters={},
        snapshot=SnapshotRef("", 0),
        environment=spec.environment,
        compute="docker",
        resources=spec.resources,
        options=spec.options,
    )


def container(spec: DeploymentSpec, image: Image, port: int) -> dict[str, Any]:
    """The document of the deployment's container, as the Engine API has it. Pure. ``port``: of the engine's machine."""
    job = as_job(spec)
    base = request.container(
        dataclasses.replace(job, options={**spec.options, "args": {}}), image, _user(image)
    ).document
    managed, _, by = request.MANAGED_LABEL.partition("=")
    host = dict(base["HostConfig"])
    host["Mounts"] = [*WRITABLE, *_mounts(spec)]
    host |= {
        "ReadonlyRootfs": True,
        "PortBindings": {f"{PORT}/tcp": [{"HostIp": spec.service.host, "HostPort": str(port or "")}]},
        "RestartPolicy": {"Name": "unless-stopped"},
        "LogConfig": SERVICE_LOG,
    }
    if "NanoCpus" in host:  # as a quota, which can be changed while it runs
        host |= {"CpuPeriod": 100_000, "CpuQuota": round(host.pop("NanoCpus") / 10_000)}
    return {
        "Image": base["Image"],
        "Entrypoint": ["python3", "-I", "-S", f"{FOLDER}/server/keeper.py", FOLDER],
        "Cmd": [],
        "User": base.get("User") or USER,
        "WorkingDir": "/",
        "StopSignal": "SIGTERM",
        "StopTimeout": int(spec.grace_period_s) + STOP_MARGIN_S,
        "ExposedPorts": {f"{PORT}/tcp": {}},
        "Labels": {**spec.annotations, **spec.labels, managed: by, NAME_LABEL: spec.name},
        "HostConfig": {key: value for key, value in host.items() if key != "ExtraHosts"},
    }


def _mounts(spec: DeploymentSpec) -> list[dict[str, Any]]:
    if not spec.environment.lock_key:
        return []
    return [{"Type": "volume", "Source": spec.options["env_cache"], "Target": request.CACHE, "ReadOnly": True}]


def _owner(user: str) -> tuple[int, int]:
    return users.numeric(user, "", "")


def _user(image: Image) -> str:
    """The image's own user where it has numbers and is not root; else one without any rights."""
    own = image.user
    return own if own.partition(":")[0].isdigit() and own.partition(":")[0] != "0" else USER


def _free_port(host: str, taken: set[int]) -> int:
    """A port that nobody listens on, as far as this machine can tell. Raises ComputeError."""
    for _ in range(PORT_ATTEMPTS):
        port = random.choice(PORTS)
        if port in taken:
            continue
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe, contextlib.suppress(OSError):
            probe.bind((host if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else "127.0.0.1", port))
            return port
    raise ComputeError("No free port was found.", hint="Give one with service.port.")


def _whole(name: str, data: bytes) -> bytes:
    """The data as it is. Raises ValueError for JSON that is cut off, because a longer file took the place of the one
    whose size stands in the archive."""
    if name.endswith(".json"):
        json.loads(data)
    return data


class DockerKeep:
    """A keeper's folder in a container."""

    path = FOLDER

    def __init__(self, engine: Engine, container: str, name: str, owner: tuple[int, int]) -> None:
        self.engine = engine
        self.container = container
        self._name = name
        self._owner = owner

    def _found(self) -> dict[str, Any]:
        return self.engine.inspect(self.container) or {}

    @property
    def url(self) -> str:
        bound = (self._found().get("NetworkSettings") or {}).get("Ports") or {}
        for each in bound.get(f"{PORT}/tcp") or ():
            return calling.url_of(each["HostIp"], each["HostPort"])
        return ""

    def port(self) -> int:
        """The published one, also while it is not: of the engine's machine."""
        bound = self._found()["HostConfig"]["PortBindings"][f"{PORT}/tcp"]
        return int(bound[0]["HostPort"])

    def image(self) -> str:
        return str(self._found().get("Image"))

    def leave_networks(self) -> None:
        for network in (self._found().get("NetworkSettings") or {}).get("Networks") or {}:
            self.engine.leave_network(self.container, network)

    def join_network(self) -> None:
        """The network that it began in, unless it is in one."""
        found = self._found()
        if not (found.get("NetworkSettings") or {}).get("Networks"):
            mode = found["HostConfig"].get("NetworkMode")
            self.engine.join_network(self.container, DEFAULT_NETWORK if mode in (None, "", "default") else mode)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds everybody else who would change the deployment. Raises RequestError: somebody does already.

        A container that does not run cannot be held.
        """
        if not self.alive():
            yield
            return
        connection = self.engine.exec(self.container, ["python3", "-I", "-S", f"{FOLDER}/server/hold.py", FOLDER])
        try:
            said, words = b"", b""
            with contextlib.suppress(OSError):
                connection.send(b"hold\n")
                for kind, data in connection.frames(HOLD_S):
                    said, words = (said + data, words) if kind == STDOUT else (said, words + data)
                    if said.endswith(b"\n"):
                        break
            if said == b"busy\n":
                raise being_changed(self._name)
            if said != b"held\n":
                what = f"Whether somebody is changing deployment {self._name} cannot be found out."
                raise ComputeError(what, words=words.decode(errors="replace"), transient=True)
            yield
        finally:
            with contextlib.suppress(OSError):
                connection.end_input()
                for _ in connection.frames(HOLD_S):  # until it has let go
                    pass
            connection.close()

    def memory_bytes(self) -> int:
        return int((self._found().get("HostConfig") or {}).get("Memory") or 0)

    def read(self, name: str) -> bytes | None:
        """A file that its writer replaces while the engine packs it comes cut off: then it is asked for again."""
        for _ in range(READ_ATTEMPTS):
            try:
                found = copying.files(self.engine.copy_out(self.container, f"{FOLDER}/{name}"))
                return _whole(name, b"".join(stream.read() for _, stream in found))
            except Refused as error:
                if error.missing:
                    return None
                raise
            except (OSError, ValueError) as error:
                words = str(error)
        what = f"{name} of deployment {self._name} cannot be read out of its container."
        raise ComputeError(what, words=words, transient=True)

    def put(self, files: Sequence[File]) -> None:
        """What others wait for (the last file) goes in beside its place first: a copy is seen while it grows."""
        paths = [(PurePosixPath(FOLDER, file.path).relative_to(VOLUME), file) for file in files]
        folders = {str(parent) for path, _ in paths for parent in path.parents if parent.name}
        folders.add(str(PurePosixPath(SCRATCH).relative_to(VOLUME)))
        items = [copying.Item(each, mode=0o755) for each in sorted(folders)]
        items += [copying.Item(str(path), file.source, file.mode) for path, file in paths]
        self.engine.copy_in(self.container, VOLUME, copying.pack(items, self._owner))

    def drop(self, name: str) -> None:
        """Only housekeeping: where the container does not run, it is left for the next time."""
        if not self.alive():
            return
        connection = self.engine.exec(self.container, ["rm", "-rf", f"{FOLDER}/{name}"])
        try:
            for _ in connection.frames(30):
                pass
        finally:
            connection.close()

    def start(self) -> None:
        if self.alive():
            return
        try:
            self.engine.start(self.container)
        except Refused as error:
            if any(words in error.words for words in PORT_TAKEN):
                raise ConfigError(
                    f"The port of deployment {self._name} is taken on the engine's machine.",
                    key="service.port",
                    words=error.words,
                    hint="Choose another one, or leave it out for a free one.",
                ) from error
            raise JobError(
                f"The container of deployment {self._name} cannot be started.",
                words=error.words,
                hint="Its image needs python3 (3.10 or newer).",
                code="CONTAINER_CONFIG",
            ) from error

    def alive(self) -> bool:
        state = self._found().get("State") or {}
        return bool(state.get("Running"))

    def log(self, *, follow: bool, tail: int | None) -> ContainerLog:
        return ContainerLog(self, follow=follow, tail=tail)

    def ask(self, path: str, body: bytes | None, content_type: str, token: str, timeout_s: float) -> Answer:
        """By the published port; on an engine elsewhere by a process in the container, wherever the port is bound."""
        if self.engine.endpoint.on_this_machine:
            return calling.ask(self.url, path, body=body, content_type=content_type, token=token, timeout_s=timeout_s)
        return self._ask_inside(path, body or b"", content_type, token, timeout_s)

    def _ask_inside(self, path: str, body: bytes, content_type: str, token: str, timeout_s: float) -> Answer:
        asked = {"path": path, "size": len(body), "content_type": content_type, "token": token, "timeout_s": timeout_s}
        argv = ["python3", "-I", "-S", f"{FOLDER}/server/ask.py", str(PORT)]
        connection = self.engine.exec(self.container, argv)
        out, words = b"", b""
        try:
            connection.send(json.dumps(asked).encode() + b"\n" + body)
            for kind, data in connection.frames(timeout_s + ASK_MARGIN_S):
                out, words = (out + data, words) if kind == STDOUT else (out, words + data)
        except OSError as error:
            words = str(error).encode()
        finally:
            connection.close()
        head, newline, content = out.partition(b"\n")
        said: dict[str, Any] = json.loads(head) if newline else {"status": 0, "error": words.decode(errors="replace")}
        if not said["status"]:
            raise ComputeError(f"Deployment {self._name} did not answer.", words=said["error"], transient=True)
        return Answer(said["status"], content, said["content_type"])

    def age_s(self) -> float:
        with contextlib.suppress(KeyError, ValueError):
            created = str(self._found()["Created"])[:19]  # seconds will do; Docker's nanoseconds no parser takes
            return time.time() - datetime.datetime.fromisoformat(created + "+00:00").timestamp()
        return 0.0

    def discard(self) -> None:
        """The servers get their grace; then the container goes, whatever it does."""
        found = self._found()
        if not found:
            return
        if self.alive():
            with contextlib.suppress(ComputeError):
                self.engine.stop(self.container, int(found["Config"].get("StopTimeout") or 30))
        self.engine.remove(self.container)


class ContainerLog:
    """A container's log as it grows. One that has not started yet is waited for: before, there is nothing to follow."""

    def __init__(self, keep: DockerKeep, *, follow: bool, tail: int | None) -> None:
        self._keep = keep
        self._follow = follow
        self._tail = tail
        self._closed = False
        self._stream: LogStream | None = None

    def __iter__(self) -> Iterator[bytes]:
        while self._follow and not self._closed and not self._keep.alive():
            time.sleep(0.05)
        if not self._closed:
            self._stream = self._keep.engine.log(self._keep.container, follow=self._follow, lines=self._tail)
            yield from self._stream

    def close(self) -> None:
        self._closed = True
        if self._stream is not None:
            self._stream.close()
