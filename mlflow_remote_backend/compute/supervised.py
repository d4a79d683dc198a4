"""What the computes share whose jobs a detached supervisor on this machine takes to their end: ``local``, ``docker``.

Their job is a run folder (``runner/run_folder.py``) and the supervisor that holds its lock; they differ in the
:class:`~mlflow_remote_backend.runner.supervise.Program` that the supervisor starts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import ComputeError, ConfigError
from ..job import Diagnosis, JobSpec, JobStatus, LogChunk, Phase, Reason
from ..runner import run_folder
from ..runner.call_limits import users_environ
from ..runner.run_folder import RunFolder
from ..runner.spool import Spool, SpoolReader
from ..runner.supervise import Start, start_detached
from .base import JobHandle, Request

CANCEL_MARGIN_S = 30.0  # what finalising may take beyond the grace period before cancel returns all the same
READ_BYTES = 1 << 20
MOST_RECOVERIES = 10  # supervisors that died, or gave up on the tracking server, before somebody else writes the status


class SupervisedCompute:
    """The verbs that need nothing but the run folder. A subclass names its ``program`` and finds a handle's folder."""

    name: str
    program: str  # ``module:Class`` of the Program

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or run_folder.state_root()

    def run_folder(self, handle: JobHandle) -> RunFolder:
        """The handle's folder. Raises a transient ComputeError where the job belongs to another machine."""
        raise NotImplementedError

    def handle_of(self, folder: RunFolder) -> JobHandle:
        """The handle of the job in a folder of this machine."""
        raise NotImplementedError

    def check_machine(self, spec: JobSpec) -> None:
        """Raises where no supervisor could live here, or the spec wants what no supervisor does."""
        if sys.platform == "win32":
            raise ComputeError(f"compute: {self.name} needs Linux or macOS.", hint="Use compute: kubernetes here.")
        if spec.retry.max_attempts > 1:
            raise ConfigError(f"retry is not possible with compute: {self.name}.", key="retry", hint="Leave retry out.")
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            run_folder.machine_id(self.root)
        except OSError as error:
            raise ComputeError(
                f"The state folder {self.root} cannot be written.",
                words=str(error),
                hint="Set XDG_STATE_HOME to a folder of yours.",
            ) from error

    def start(self, request: Request, start: Start) -> None:
        """Make the run folder and start a supervisor on it. Does nothing where the same job has, or had, one."""
        folder = RunFolder(request.spec.run.run_id, self.root)
        if folder.said() or folder.supervised():
            return  # the same submission again: one job
        folder.create(request.spec)
        lock = folder.try_lock()
        if lock is None:
            return
        try:
            if request.archive is not None:
                shutil.copyfile(request.archive, folder.archive)
        except OSError as error:
            os.close(lock)
            raise ComputeError(f"The project cannot be copied to {folder.path}.", words=str(error)) from error
        start_detached(folder, lock, self.program, start)

    def status(self, handle: JobHandle) -> JobStatus:
        folder = self.run_folder(handle)
        if not folder.exists():
            return JobStatus(Phase.DONE, lost("its folder is gone"), gone=True)
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
            return JobStatus(Phase.DONE, lost("its folder is gone"), gone=True)
        return JobStatus(status.phase, lost("its supervisor died"), status.exit_code, gone=True, job_uid=status.job_uid)

    def logs(self, handle: JobHandle, *, offset: int = 0, attempt: int = 0, follow: bool = False) -> Iterator[LogChunk]:
        reader = SpoolReader(self.run_folder(handle).spool)
        offset = max(offset, reader.start())  # before it, what is stored already was dropped
        while data := reader.read(offset, READ_BYTES):
            yield LogChunk(offset, data, attempt)
            offset += len(data)

    def cancel(self, handle: JobHandle, *, grace_period_s: float = 30.0) -> None:
        folder = self.run_folder(handle)
        if not folder.exists():
            return
        try:
            run_folder.replace_text(folder.cancel, str(grace_period_s))
        except OSError:  # a full disk has room for an empty file; the job's own grace period counts then
            with contextlib.suppress(FileNotFoundError):  # it has ended
                folder.cancel.touch()
        if not folder.supervised():
            self.recover(handle)
        _wait_while(folder.supervised, grace_period_s + CANCEL_MARGIN_S)

    def collect(self, handle: JobHandle) -> None:
        folder = self.run_folder(handle)
        if not folder.supervised():
            self._stop_program(folder)
            folder.remove()

    def _stop_program(self, folder: RunFolder) -> None:
        """One that has outlived its supervisor: its run has ended, and nobody else would end it. Blocks meanwhile."""
        spool = Spool(folder.spool)
        if not spool.execute_lives():
            return
        with contextlib.suppress(OSError):
            grace_s = folder.spec().limits.grace_period_s
            spool.request_cancel()
            _wait_while(spool.execute_lives, grace_s + CANCEL_MARGIN_S)

    def recover(self, handle: JobHandle) -> bool:
        folder = self.run_folder(handle)
        if not folder.said() or folder.recoveries() >= MOST_RECOVERIES:
            return False
        lock = folder.try_lock()
        if lock is not None:
            try:
                folder.count_recovery()
            except OSError as error:
                os.close(lock)
                what = f"The job's folder {folder.path} cannot be written, so no supervisor can take the job up."
                raise ComputeError(what, words=str(error), transient=True) from error
            last = folder.recoveries() >= MOST_RECOVERIES
            start_detached(folder, lock, self.program, Start(users_environ(), recovery=True, last_chance=last))
        return True


def _wait_while(lives: Callable[[], object], most_s: float) -> None:
    deadline = time.monotonic() + most_s
    while lives() and time.monotonic() < deadline:
        time.sleep(0.05)


def lost(why: str) -> Diagnosis:
    """A supervisor that left no final status."""
    return Diagnosis(
        Reason.KILLED_BY_SYSTEM,
        f"The job ended without a final status: {why}.",
        hint="The machine may have been restarted, or somebody killed the supervisor.",
    )
