"""The run as Python users hold it: one object for the submitter and for any later process."""

from __future__ import annotations

import contextlib
import html
import itertools
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from mlflow.exceptions import ExecutionException
from mlflow.projects.submitted_run import SubmittedRun

from . import compute as computes
from . import submission_folder
from .compute.base import Compute, JobHandle
from .errors import ComputeError, Detached, RemoteError, RequestError, RunFailed, TrackingError
from .follow import (
    STORED_PAUSE_S,
    Follower,
    Log,
    afterwards,
    hopeless,
    is_vague,
    refine,
    request_cancel,
    settle,
    stderr_line,
)
from .job import Diagnosis, Phase, Reason
from .tracking import RunView, Tracking

CREATING_PATIENCE_S = (
    15 * 60
)  # how long a run may be in phase creating when nobody can tell whether its submitter lives
TAIL_LINES = 40
EXPLAIN_TRIES = 3  # a compute that shows no cause then will not


class RemoteExecutionException(ExecutionException):  # type: ignore[misc]
    """An error of ours as MLflow's command understands it. ``code``: ours; ``__cause__``: the error itself."""

    def __init__(self, error: RemoteError) -> None:
        super().__init__(str(error))
        self.code = error.code
        self.exit_code = getattr(error, "exit_code", None)


def for_mlflow(error: RemoteError) -> RemoteExecutionException:
    """The error to raise where MLflow is the caller: ``raise for_mlflow(error) from error``."""
    return RemoteExecutionException(error)


class RemoteSubmittedRun(SubmittedRun):  # type: ignore[misc]
    """A run of this backend. Everything is read from MLflow or from the job's compute when asked for.

    ``wait`` blocks until the run has its final status and answers True (FINISHED) or False. In an object that was
    handed to MLflow's own waiting (``synchronous=True``) it raises instead of answering False, so that the reason is
    not lost. Not thread-safe, like MLflow's own.
    """

    def __init__(
        self,
        tracking: Tracking,
        run_id: str,
        compute: Compute | None,
        handle: JobHandle,
        *,
        stream_output: bool = True,
        on_interrupt: str = "cancel",
        grace_period_s: float = 30.0,
        raises: bool = False,
    ) -> None:
        self._tracking = tracking
        self._run_id = run_id
        self._compute = compute
        self._handle = handle
        self._stream_output = stream_output
        self._on_interrupt = on_interrupt
        self._grace_period_s = grace_period_s
        self._raises = raises
        self._shown = False  # the log, to its end
        self._explains_tried = 0  # how often the compute was asked why the run ended
        self.cancelled_here = False  # by Ctrl-C, while following

    @property
    def run_id(self) -> str:
        return self._run_id

    # -- MLflow's interface --------------------------------------------------------------------------------------------

    def wait(self) -> bool:
        """Block until the run has ended; show its log meanwhile. True if it is FINISHED.

        Raises (as MLflow's ExecutionException, with ours as cause): Detached on a detach; RunFailed where MLflow waits.
        """
        try:
            view = self.follow(sys.stdout if self._stream_output and not self._shown else None)
        except RemoteError as error:
            raise for_mlflow(error) from error
        if view.status == "FINISHED":
            return True
        if self._raises:
            failed = self.failure(view)
            raise for_mlflow(failed) from failed
        return False

    def get_status(self) -> str:
        """The run's status now, a RunStatus name. A status that only the user's code wrote does not count as an end."""
        view = self.view()
        return view.status if view.ended or view.status in ("RUNNING", "SCHEDULED") else "RUNNING"

    def cancel(self) -> None:
        """Stop the job and wait until it has stopped; the run ends KILLED. Idempotent. Never raises, but says it."""
        try:
            if not self._known_to_have_ended():
                request_cancel(self._tracking, self._compute, self._handle, self._run_id, self._grace_period_s)
                self._await_end(self._grace_period_s + 30.0, settle_it=True)
        except RemoteError as error:
            stderr_line(f"cancelling run {self._run_id}: {error}")

    def _known_to_have_ended(self) -> bool:
        try:
            return self.view().ended
        except RemoteError:
            return False  # a tracking server that is away must not keep anybody from stopping a job

    # -- beyond it -----------------------------------------------------------------------------------------------------

    def follow(self, out: TextIO | None) -> RunView:
        """Block until the run has ended, writing its log to ``out``, and return it. Raises Detached."""
        self._await_job()
        follower = Follower(
            self._tracking,
            self._compute,
            self._handle,
            self._run_id,
            out=out,
            say=stderr_line,
            on_interrupt=self._on_interrupt,
            grace_period_s=self._grace_period_s,
        )
        try:
            view = follower.follow()
        finally:
            self.cancelled_here = follower.cancelled_here
        self._shown = out is not None
        return view

    def _await_job(self) -> None:
        """Block while another process is still creating the job: until then nothing at the compute proves anything."""
        if self._handle.uid:
            return
        while True:
            view = self.view()
            if view.ended or created(view):
                break
            time.sleep(0.5)
        self._handle = JobHandle(view.tag("handle"), view.tag("job_uid"))
        self._compute = _reachable(self._handle)

    def failure(self, view: RunView, *, with_tail: bool = True) -> RunFailed:
        """What went wrong in a run that has ended, with the last 40 lines of its log unless they were shown already."""
        code = view.tag("exit_code")
        tail = self._tail() if with_tail else ""
        return RunFailed(
            f"Run {self._run_id} ended as {view.status}: {view.tag('message') or 'no reason known'}",
            words=tail and f"The last lines of its log:\n{tail}",
            hint=f"More: mlflow-remote describe {self._run_id[:8]}, or logs/error.txt among its artifacts.",
            code=view.tag("reason") or None,
            run_id=self._run_id,
            exit_code=int(code) if code.lstrip("-").isdigit() else None,
            tail=tail,
        )

    def _tail(self) -> str:
        try:
            return "\n".join(last_lines(self._tracking, self._run_id, TAIL_LINES))
        except RemoteError:
            return ""

    def view(self) -> RunView:
        """The run as MLflow has it now. Ends a run first whose job is proven dead, and tells a cause that is shown."""
        view = self._tracking.view(self._run_id)
        return self._explained(view) if view.ended else self._settled(view)

    def _explained(self, view: RunView) -> RunView:
        if self._compute is None or not is_vague(view) or self._explains_tried >= EXPLAIN_TRIES:
            return view
        self._explains_tried += 1
        with contextlib.suppress(RemoteError):
            if refine(self._tracking, view, afterwards(self._compute.status(self._handle))):
                return self._tracking.view(self._run_id)
        return view

    def _settled(self, view: RunView) -> RunView:
        if not created(view):
            close_if_abandoned(self._tracking, view)
            return self._tracking.view(self._run_id)
        if self._compute is None:
            return view
        try:
            status = self._compute.status(self._handle)
            if status.gone or hopeless(status):
                settle(self._tracking, self._compute, self._handle, self._run_id, status)
                self._await_end(5.0)
                return self._tracking.view(self._run_id)
        except ComputeError:  # out of reach is no proof of anything; a pod of a lost node outlives its run's end
            return self._tracking.view(self._run_id)
        return view

    def _await_end(self, patience_s: float, *, settle_it: bool = False) -> None:
        """``settle_it``: look at the job too, since one that was stopped before its runner began ends no run."""
        deadline = time.monotonic() + patience_s
        view = self.view if settle_it else lambda: self._tracking.view(self._run_id)
        while not view().ended and time.monotonic() < deadline:
            time.sleep(0.1)

    @property
    def exit_code(self) -> int | None:
        """The program's exit code, None while it is not known."""
        code = self._tracking.view(self._run_id).tag("exit_code")
        return int(code) if code.lstrip("-").isdigit() else None

    @property
    def reason(self) -> str:
        """Why the run ended as it did (a job.Reason name), empty while it goes on."""
        return self._tracking.view(self._run_id).tag("reason")

    def logs(self, follow: bool = False) -> Iterator[str]:
        """The program's output, line by line without line ends; what is not UTF-8 is replaced.

        ``follow``: go on until the run has ended (blocks). The exact bytes are the artifacts ``logs/``.
        """
        held = b""
        for data in self.log_bytes(follow):
            *lines, held = (held + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
        if held:
            yield held.decode(errors="replace")

    def log_bytes(self, follow: bool = False, *, tail: int | None = None) -> Iterator[bytes]:
        """The program's output in pieces, byte for byte, one attempt after the other. ``follow`` as in ``logs``; a
        tracking server that is away is waited for then. ``tail``: of what is there now only so many lines."""
        log = Log(self._tracking, self._run_id, self._compute, self._handle)
        pause_s = 0.5 if self._compute is not None else STORED_PAUSE_S
        kept = b""
        while tail is not None:
            try:
                for data in itertools.chain(log.live(), log.stored()):
                    lines = (kept + data).splitlines(keepends=True)
                    kept = b"".join(lines[max(len(lines) - tail, 0) :])
                break
            except TrackingError as error:
                if not follow or not error.transient:
                    raise
            time.sleep(pause_s)
        if kept:
            yield kept
        while True:
            ended = not follow
            try:
                ended = ended or self._never_goes_on(self.view())
                yield from log.live(follow=not ended)
                if ended or self._compute is None:
                    yield from log.stored()
                if ended:
                    return
            except TrackingError as error:
                if not follow or not error.transient:
                    raise
            time.sleep(pause_s)

    def _never_goes_on(self, view: RunView) -> bool:
        """A deleted run never has a final status; without its compute nobody tells when its job ends."""
        return view.ended or (view.deleted and self._compute is None)

    def get_metrics(self) -> dict[str, float]:
        """The latest value of each metric."""
        return dict(self._tracking.view(self._run_id).metrics)

    def get_details(self) -> dict[str, Any]:
        """All that is known of the run, as plain data."""
        return details(self.view())

    def download_outputs(self, dst: str | Path = ".") -> Path:
        """Fetch ``outputs/`` into the folder ``dst`` and return its path. Blocks. RequestError: there is none."""
        stored = self._tracking.list_artifacts(self._run_id, "")
        if "outputs" not in stored:
            raise RequestError(
                f"Run {self._run_id} has stored no folder outputs/. It has: {', '.join(stored) or 'none'}.",
                hint=f"mlflow artifacts download -r {self._run_id} -a FOLDER fetches another one.",
            )
        target = Path(dst)
        target.mkdir(parents=True, exist_ok=True)
        client = self._tracking.client
        fetch = partial(client.download_artifacts, self._run_id, "outputs", str(target))
        return Path(self._tracking.call("fetching outputs", fetch))

    def register_model(self, name: str, path: str = "model") -> Any:
        """Make the run's model at ``path`` a new version of the registered model ``name``; MLflow's ModelVersion."""
        view = self.view()
        origin = {
            "mlflow_remote.run_id": self._run_id,
            "mlflow_remote.snapshot": view.tag("snapshot"),
            "mlflow_remote.environment": view.tag("environment"),
        }
        return self._tracking.register_model(view, name, path, {key: value for key, value in origin.items() if value})

    def __repr__(self) -> str:
        return f"RemoteSubmittedRun(run_id={self._run_id!r}, handle={self._handle.url!r})"

    def _repr_html_(self) -> str:
        """A small table for notebooks. Everything in it is escaped: names and messages come from anywhere."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>"
            for key, value in self.get_details().items()
            if value not in ("", None, {}, [])
        )
        return f"<table>{rows}</table>"


def details(view: RunView) -> dict[str, Any]:
    """A run as plain data, for ``describe`` and ``--json``. Times are seconds since the epoch."""
    return {
        "run_id": view.run_id,
        "name": view.name,
        "status": view.status if view.ended or view.status == "RUNNING" else "RUNNING",
        "phase": view.tag("phase"),
        "reason": view.tag("reason"),
        "message": view.tag("message"),
        "exit_code": view.tag("exit_code"),
        "compute": view.tag("compute"),
        "handle": view.tag("handle"),
        "attempt": view.tag("attempt"),
        "entry_point": view.tags.get("mlflow.project.entryPoint", ""),
        "source": view.tags.get("mlflow.source.name", ""),
        "snapshot": view.tag("snapshot"),
        "environment": view.tag("environment"),
        "image": view.tag("image"),
        "model_version": view.tag("model_version"),
        "register_error": view.tag("register_error"),
        "experiment_id": view.experiment_id,
        "artifact_uri": view.artifact_uri,
        "started": view.start_time_ms and view.start_time_ms / 1000,
        "ended": view.end_time_ms and view.end_time_ms / 1000,
        "params": dict(view.params),
        "metrics": dict(view.metrics),
    }


def last_lines(tracking: Tracking, run_id: str, count: int) -> list[str]:
    """The last lines of the stored log: only as many parts are fetched as they need."""
    data = b""
    for part in reversed(tracking.log_index(run_id)):
        data = (tracking.read_artifact(run_id, part.path) or b"") + data
        if data.count(b"\n") > count:
            break
    lines = data.splitlines()
    return [line.decode(errors="replace") for line in lines[max(len(lines) - count, 0) :]]


def created(view: RunView) -> bool:
    """Whether the run's job exists, or did: its submitter or its runner has said so."""
    return view.tag("phase") != Phase.CREATING.value or bool(view.tag("job_uid"))


def close_if_abandoned(tracking: Tracking, view: RunView) -> bool:
    """End a run whose submitter died before its job existed. True if it did."""
    alive = submission_folder.lives(view.tag("owner"))
    age_s = time.time() - (view.start_time_ms or 0) / 1000
    if alive or (alive is None and age_s < CREATING_PATIENCE_S) or created(view):
        return False
    reason = Reason.CANCELLED if view.tag("cancel_requested") else Reason.BOOTSTRAP
    closing = Diagnosis(reason, "The submitting process ended before the job was created.")
    handle = JobHandle(view.tag("handle"))
    if not handle.url:
        tracking.finalise(view.run_id, closing, "look")
        return True
    try:
        compute = computes.from_handle(handle)
        status = compute.status(handle)
        if hopeless(status):
            settle(tracking, compute, handle, view.run_id, status)
            return True
        if status.phase is not Phase.CREATING and (not status.gone or compute.recover(handle)):
            return False  # there is a job, though its submitter never got to say so
        tracking.finalise(view.run_id, closing, "look")
        compute.collect(handle)
    except ComputeError:
        return False  # not known: leave it to somebody who can tell
    return True


def attach(run_id: str, *, tracking_uri: str | None = None) -> RemoteSubmittedRun:
    """The run with this id (or unique start of one), submitted by any process on any machine.

    Raises RequestError if there is none, or it is not a run of this backend; TrackingError.
    """
    import mlflow

    tracking = Tracking(tracking_uri or mlflow.get_tracking_uri())
    view = tracking.view(tracking.resolve(run_id))
    if not view.tag("submission_id"):
        raise RequestError(f"Run {run_id} was not submitted with backend='remote'.")
    handle = JobHandle(view.tag("handle"), view.tag("job_uid"))
    return RemoteSubmittedRun(tracking, view.run_id, _reachable(handle), handle)


def looked_at(tracking: Tracking, view: RunView) -> RunView:
    """The run as it is after a look at its job: one that is proven dead without a final status has one now."""
    if view.ended:
        return view
    handle = JobHandle(view.tag("handle"), view.tag("job_uid"))
    return RemoteSubmittedRun(tracking, view.run_id, _reachable(handle), handle).view()


def _reachable(handle: JobHandle) -> Compute | None:
    """The job's compute, or None where it cannot be used from here: then MLflow alone has to tell."""
    if not handle.url:
        return None
    try:
        compute = computes.from_handle(handle)
        compute.status(handle)
    except ComputeError:
        return None
    return compute


__all__ = ["Detached", "RemoteSubmittedRun", "attach", "details"]
