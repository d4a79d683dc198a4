"""The ``local`` compute: a process on this machine, in an unpacked snapshot, watched by a detached supervisor.

| what | how |
|---|---|
| isolation | none: the user's own account; the project's locked environment, or what is there |
| outlives the submitter | yes, unless the host kills the whole session tree (systemd's KillUserProcesses, CI runners) |
| live log | the spool, read directly |
| retry | no: nothing is disrupted here that would be better a second time |
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import ComputeError, ConfigError
from ..job import JobSpec, Resources
from ..runner import run_folder
from ..runner.call_limits import users_environ
from ..runner.prepare import Place
from ..runner.run_folder import RunFolder
from ..runner.spool import Spool
from ..runner.supervise import Running, Start
from .base import JobHandle, Request, Secrets
from .supervised import SupervisedCompute

START_S = 5.0  # from a process's start to its lock, on a busy machine


class LocalCompute(SupervisedCompute):
    """See compute/base.py for the contract of each verb."""

    name = "local"
    program = f"{__name__}:LocalProgram"

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> LocalCompute:
        return cls()

    @classmethod
    def from_handle(cls, handle: JobHandle) -> LocalCompute:
        return cls()

    def render(self, spec: JobSpec) -> Request:
        return Request(
            spec,
            {
                "compute": "local",
                "folder": str(RunFolder(spec.run.run_id, self.root).path),
                "working_directory": spec.in_place or "work (the unpacked snapshot)",
                "command": spec.entry_point.command,
                "environment": spec.environment.lock_key or "what is there",
            },
        )

    def check(self, request: Request, secrets: Secrets) -> Sequence[str]:
        self.check_machine(request.spec)
        if request.spec.docker_env is not None:
            raise ConfigError(
                f"The project wants to run in the image {request.spec.docker_env.get('image')} (docker_env), and "
                "compute: local runs no container.",
                key="compute",
                hint='Give the backend_config {"compute": "docker"}.',
            )
        if not shutil.which("bash"):
            raise ComputeError("compute: local needs bash, which is not on PATH.")
        if request.spec.secret_refs:
            raise ConfigError(
                "secrets refers to secrets that exist at the compute; this machine keeps none.",
                key="secrets",
                hint="Set the variables where you submit: a job of this machine has them.",
            )
        if dataclasses.replace(request.spec.resources, gpu_resource=Resources.gpu_resource) == Resources():
            return []
        return ["resources are not limited by the compute local: a program has what the machine has."]

    def handle_url(self, spec: JobSpec) -> str:
        return f"local://{run_folder.machine_id(self.root)}/{spec.run.run_id}"

    def submit(self, request: Request, secrets: Secrets) -> JobHandle:
        self.start(request, Start(users_environ(), secrets.program, os.getcwd()))
        return JobHandle(self.handle_url(request.spec), request.spec.submission_id)

    def handle_of(self, folder: RunFolder) -> JobHandle:
        return JobHandle(f"local://{run_folder.machine_id(self.root)}/{folder.run_id}")

    def run_folder(self, handle: JobHandle) -> RunFolder:
        parts = urlsplit(handle.url)
        machine = handle.url.split("://", 1)[1].partition("/")[0]
        if machine != run_folder.machine_id(self.root):
            raise ComputeError(
                f"The job runs on another machine, or was submitted with another state folder: {machine}.",
                hint="Its stored log and its status are still to be had from here; to cancel it now, go there.",
                transient=True,
            )
        return RunFolder(parts.path.lstrip("/"), self.root)


class LocalProgram:
    """Starts ``execute`` as a child of the supervisor, with the submitter's variables."""

    def place(self, spec: JobSpec, folder: RunFolder, environ: Mapping[str, str]) -> Place:
        from ..environment import cache

        return Place(
            spool=folder.spool,
            work=folder.work,
            cache=cache.default_root(),
            environ=environ,
            archive=folder.archive if folder.archive.exists() else None,
            on_phase=lambda detail: folder.say("preparing", detail),
        )

    def start(self, spec: JobSpec, folder: RunFolder, start: Start) -> Running:
        folder.say("running")
        script = Path(run_folder.__file__).with_name("execute.py")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script), str(folder.spool)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**start.environ, **start.program_secrets},
            start_new_session=True,
        )
        return _Execute(Spool(folder.spool), process)

    def find(self, spec: JobSpec, folder: RunFolder) -> Running | None:
        """Its lock comes first, its record of the start some milliseconds later."""
        spool = Spool(folder.spool)
        prepared = spool.prepared()
        until = time.monotonic() + (0.0 if prepared is None or prepared.failed else START_S)
        while spool.started() is None and not spool.execute_lives():
            if time.monotonic() >= until:
                return None
            time.sleep(0.02)
        return _Execute(spool)


class _Execute:
    """``execute`` as its spool shows it: whichever supervisor started it, its lock tells whether it lives."""

    def __init__(self, spool: Spool, process: subprocess.Popen[bytes] | None = None) -> None:
        self._spool = spool
        self._process = process

    def alive(self) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        return bool(self._spool.execute_lives())

    def stop(self, grace_period_s: float) -> None:
        """Nothing beyond the spool's cancel file, which execute acts on by itself."""

    def collect(self) -> None:
        """Nothing to bring: the program ran in the run folder itself."""
