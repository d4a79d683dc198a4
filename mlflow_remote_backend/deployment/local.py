"""Deployments to this machine: a keeper and its servers as processes of this user, on a loopback port.

Each is a folder ``<state>/deployments/NAME`` (``<state>`` as for runs), so that any later process of the user finds it.
It ends with the machine: after a restart its state is ``stopped``, and an update starts it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import file_lock, removal
from ..errors import ComputeError, ConfigError
from ..runner import run_folder
from ..runner.call_limits import users_environ
from ..submission import FORWARDED, Narrator
from . import calling
from .kept import KEEPER_START_S, File, KeptTarget, Software, being_changed, name_taken
from .spec import Answer, DeploymentSpec
from .target import Watcher

STOP_MARGIN_S = 15.0
_READ_BYTES = 256 * 1024

#: Starts its arguments and ends, so that the client has no child to wait for.
_IN_BACKGROUND = '"$@" </dev/null &'


class LocalTarget(KeptTarget):
    """See target.py for the contract of each verb."""

    name = "local"

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or run_folder.state_root()) / "deployments"

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> LocalTarget:
        return cls()

    def render(self, spec: DeploymentSpec) -> dict[str, Any]:
        return {
            "compute": "local",
            "folder": str(self.root / spec.name),
            "listens_on": f"{spec.service.host}:{spec.service.port or 'a free port'}",
            "environment": spec.environment.lock_key or "what is there",
            "workers": spec.workers,
        }

    def check(self, spec: DeploymentSpec) -> Sequence[str]:
        if os.name != "posix":
            raise ComputeError("compute: local needs Linux or macOS.", hint="Use compute: docker here.")
        if spec.service.type != "ClusterIP":
            raise ConfigError("service.type is for Kubernetes.", key="service.type")
        limits = [name for name in ("cpu", "memory_bytes", "gpu") if getattr(spec.resources, name)]
        return ["resources are not limited by the compute local: a process has what the machine has."] if limits else []

    def software(self, spec: DeploymentSpec, watcher: Watcher) -> Software:
        own = {name: value for name, value in users_environ().items() if not name.startswith(_WITHHELD)}
        if not spec.environment.lock_key:
            return Software(sys.executable, own)
        from ..environment import activation, cache, materialise

        narrator = Narrator(watcher.say)
        prefix = materialise.materialise(spec.environment, cache.default_root(), narrator)
        variables = activation.activation(prefix, own, spec.environment.env_vars)
        return Software(str(prefix / "bin" / "python"), {**own, **variables})

    def make(self, spec: DeploymentSpec) -> LocalKeep:
        folder = self.root / spec.name
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(mode=0o700)
            (folder / "log").touch(0o600)  # whoever follows it finds it from the first moment to the last
        except FileExistsError:
            raise name_taken(spec.name, self.name) from None
        except OSError as error:
            raise ComputeError(f"The deployment's folder {folder} cannot be made.", words=str(error)) from error
        return LocalKeep(folder)

    def find(self, name: str) -> LocalKeep | None:
        return LocalKeep(self.root / name) if name in self.names() else None

    def names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if path.is_dir())

    @contextlib.contextmanager
    def changing(self, name: str) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.root / f".{name}.changing"
        while True:
            with path.open("w") as file:
                if not file_lock.try_lock(file.fileno()):
                    raise being_changed(name)
                if not file_lock.is_at(path, file.fileno()):
                    continue
                try:
                    yield
                finally:
                    if not (self.root / name).is_dir():
                        path.unlink(missing_ok=True)
                return


#: What opens the tracking server and its store is for whoever fetches the model, and a server fetches nothing.
_WITHHELD = (*FORWARDED, "MLFLOW_RUN_ID", "MLFLOW_REMOTE_EXECUTION", "MLFLOW_EXPERIMENT_", "PYTHONPATH", "PYTHONHOME")


class LocalKeep:
    """A keeper's folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = str(folder)

    @property
    def url(self) -> str:
        state = json.loads(self.read("state.json") or b"{}")
        return calling.url_of(state["host"], state["port"]) if state.get("port") else ""

    def read(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def put(self, files: Sequence[File]) -> None:
        for file in files:
            target = self._folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if isinstance(file.source, Path):
                shutil.copytree(file.source, target, symlinks=False, dirs_exist_ok=True)
                continue
            beside = target.with_name(f".{target.name}.{os.getpid()}")
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, file.mode)
            with open(descriptor, "wb") as stream:
                stream.write(file.source)
            os.replace(beside, target)

    def drop(self, name: str) -> None:
        removal.delete(self._folder / name)

    def start(self) -> None:
        if self.alive():
            return
        command = [sys.executable, "-I", "-S", str(self._folder / "server/keeper.py"), self.path]
        environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        with (self._folder / "log").open("ab") as log:
            shell = subprocess.run(
                ["/bin/sh", "-c", _IN_BACKGROUND, "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environ,
                start_new_session=True,
                check=False,
            )
        if shell.returncode:
            raise ComputeError("No keeper can be started on this machine.", words=(self.read("log") or b"").decode())

    def alive(self) -> bool:
        """The kernel's word: a keeper holds its lock as long as it lives."""
        return bool(file_lock.is_held(self._folder / "lock"))

    def log(self, *, follow: bool, tail: int | None) -> FileTail:
        return FileTail(self, self._folder / "log", follow=follow, tail=tail)

    def ask(self, path: str, body: bytes | None, content_type: str, token: str, timeout_s: float) -> Answer:
        return calling.ask(self.url, path, body=body, content_type=content_type, token=token, timeout_s=timeout_s)

    def age_s(self) -> float:
        with contextlib.suppress(OSError):
            return time.time() - self._folder.stat().st_mtime
        return 0.0

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            (self._folder / "stop").touch()
        wanted = json.loads(self.read("wanted.json") or b"{}")
        deadline = time.monotonic() + float(wanted.get("grace_s", 30)) + STOP_MARGIN_S
        while self._may_live() and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.alive():
            pid = json.loads(self.read("state.json") or b"{}").get("pid")
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(pid, signal.SIGKILL)
        removal.remove(self._folder, self._folder.parent.parent / "trash")

    def _may_live(self) -> bool:
        """Also one that was started just now and has not taken its lock yet."""
        if self.alive():
            return True
        log = self._folder / "log"
        with contextlib.suppress(OSError):
            return not (self._folder / "lock").exists() and time.time() - log.stat().st_mtime < KEEPER_START_S
        return False


class FileTail:
    """A log file as it grows, until its keeper is gone or somebody closes this."""

    def __init__(self, keep: LocalKeep, path: Path, *, follow: bool, tail: int | None) -> None:
        self._keep = keep
        self._path = path
        self._follow = follow
        self._closed = False
        self._offset = self._start(tail)

    def _start(self, tail: int | None) -> int:
        if tail is None or not self._path.exists():
            return 0
        size = self._path.stat().st_size
        if tail == 0:
            return size
        data = self._path.read_bytes()  # the keeper bounds its size
        return len(data) - len(b"".join(data.splitlines(keepends=True)[-tail:]))

    def __iter__(self) -> Iterator[bytes]:
        while not self._closed:
            ended = not self._follow or not self._path.exists()
            if data := self._read():
                yield data
            elif ended:
                return
            else:
                time.sleep(0.1)
        if data := self._read():  # what came before it was closed
            yield data

    def _read(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0  # it was put aside
                file.seek(self._offset)
                data = file.read(_READ_BYTES)
        except OSError:
            return b""
        self._offset += len(data)
        return data

    def close(self) -> None:
        self._closed = True
