"""The ``local`` compute: a process on this machine, in an unpacked snapshot, watched by a detached supervisor.

| what | how |
|---|---|
| isolation | none: the user's own account; the project's locked environment, or what is there |
| outlives the submitter | yes, unless the host kills the whole session tree (systemd's KillUserProcesses, CI runners) |
| live log | the spool, read directly |
| retry | no: nothing is disrupted here that would be better a second time |
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import ComputeError, ConfigError
from ..job import Diagnosis, JobSpec, JobStatus, LogChunk, Phase, Reason
from ..runner import run_folder
from ..runner.prepare import Place
from ..runner.run_folder import RunFolder
from ..runner.spool import Spool, SpoolReader
from ..runner.supervise import Running, Start, start_detached
from .base import JobHandle, Request, Secrets

PROGRAM = f"{__name__}:LocalProgram"
CANCEL_MARGIN_S = 30.0  # what finalising may take beyond the grace period before cancel returns all the same
READ_BYTES = 1 << 20


class LocalCompute:
    """See compute/base.py for the contract of each verb."""

    name = "local"

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or run_folder.state_root()

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
        if os.name != "posix":
            raise ComputeError("compute: local needs Linux or macOS.", hint="Use compute: docker or kubernetes here.")
        if request.spec.retry.max_attempts > 1:
            raise ConfigError("retry is not possible with compute: local.", key="retry", hint="Leave retry out.")
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            run_folder.machine_id(self.root)
        except OSError as error:
            raise ComputeError(
                f"The state folder {self.root} cannot be written.",
                words=str(error),
                hint="Set XDG_STATE_HOME to a folder of yours.",
            ) from error
        if not shutil.which("bash"):
            raise ComputeError("compute: local needs bash, which is not on PATH.")
        return []

    def handle_url(self, spec: JobSpec) -> str:
        return f"local://{run_folder.machine_id(self.root)}/{spec.run.run_id}"

    def submit(self, request: Request, secrets: Secrets) -> JobHandle:
        spec = request.spec
        folder = RunFolder(spec.run.run_id, self.root)
        handle = JobHandle(self.handle_url(spec), spec.submission_id)
        if folder.envelope.exists():
            return handle  # the same submission again: one job
        folder.create(spec)
        lock = folder.try_lock()
        if lock is None:
            return handle
        if request.archive is not None:
            shutil.copyfile(request.archive, folder.archive)
        start = Start(dict(os.environ), secrets.program, os.getcwd())
        start_detached(folder, lock, PROGRAM, start)
        return handle

    def status(self, handle: JobHandle) -> JobStatus:
        folder = self._folder(handle)
        if not folder.exists():
            return JobStatus(Phase.DONE, _lost("its folder is gone"), gone=True)
        said = folder.said()
        ended = Spool(folder.spool).exit()
        status = JobStatus(
            Phase(said.get("phase") or Phase.STARTING),
            exit_code=ended.exit_code if ended else None,
            job_uid=str(said.get("pid", "")),
            detail=str(said.get("detail", "")),
        )
        if folder.supervised():
            return status
        if not folder.exists():
            return JobStatus(Phase.DONE, _lost("its folder is gone"), gone=True)
        return JobStatus(
            status.phase, _lost("its supervisor died"), status.exit_code, gone=True, job_uid=status.job_uid
        )

    def logs(self, handle: JobHandle, *, offset: int = 0, attempt: int = 0) -> Iterator[LogChunk]:
        reader = SpoolReader(self._folder(handle).spool)
        while data := reader.read(offset, READ_BYTES):
            yield LogChunk(offset, data, attempt)
            offset += len(data)

    def cancel(self, handle: JobHandle, *, grace_period_s: float = 30.0) -> None:
        folder = self._folder(handle)
        if not folder.exists():
            return
        run_folder.replace_text(folder.cancel, str(grace_period_s))
        if not folder.supervised():
            self.recover(handle)
        deadline = time.monotonic() + grace_period_s + CANCEL_MARGIN_S
        while folder.supervised() and time.monotonic() < deadline:
            time.sleep(0.05)

    def collect(self, handle: JobHandle) -> None:
        folder = self._folder(handle)
        if not folder.supervised():
            folder.remove()

    def recover(self, handle: JobHandle) -> bool:
        folder = self._folder(handle)
        if not folder.envelope.exists():
            return False
        lock = folder.try_lock()
        if lock is not None:
            start_detached(folder, lock, PROGRAM, Start(dict(os.environ)))
        return True

    def _folder(self, handle: JobHandle) -> RunFolder:
        parts = urlsplit(handle.url)
        machine = handle.url.split("://", 1)[1].partition("/")[0]
        if machine != run_folder.machine_id(self.root):
            raise ComputeError(
                f"The job runs on another machine, or was submitted with another state folder: {machine}.",
                hint="Its stored log and its status are still to be had from here; to cancel it now, go there.",
                transient=True,
            )
        return RunFolder(parts.path.lstrip("/"), self.root)


def _lost(why: str) -> Diagnosis:
    return Diagnosis(
        Reason.KILLED_BY_SYSTEM,
        f"The job ended without a final status: {why}.",
        hint="The machine may have been restarted, or somebody killed the supervisor.",
    )


class LocalProgram:
    """Starts ``execute`` as a child of the supervisor, with the submitter's variables."""

    def place(self, spec: JobSpec, folder: RunFolder, environ: Mapping[str, str]) -> Place:
        from ..environment import cache

        return Place(
            spool=folder.spool,
            work=folder.work,
            cache=cache.root(environ),
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
        return _Execute(Spool(folder.spool)) if Spool(folder.spool).started() else None


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
