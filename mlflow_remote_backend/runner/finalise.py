"""The end of a job, from its spool alone: verdict, rest of the log, error text, outputs, the one final status.

In this order: the rest of the log, ``logs/error.txt`` on failure, outputs, tags and timings, the terminal status over
whatever the user's code wrote, the model's registration, and last the tag ``.finalized``. Each step is repeated while
the tracking server is away, up to ``finalize_timeout``; then ``final.json`` in the spool says what is pending, and
:func:`finish` in any later process goes on from there. Every step may be done twice without harm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..job import VAGUE_REASONS, JobSpec, Phase, Reason, final_status
from . import failure, outputs
from .outputs import Problem
from .parts import LogUploader
from .record import RecordError, RunLook, RunRecord, Trouble, persist
from .spool import Prepared, Spool, kill_orphans, read_json, write_json
from .verdict import Verdict, classify, taken_back, will_retry

ERROR = "logs/error.txt"
NOT_STORED = "remote/outputs_not_stored.txt"
RENAMED = "remote/outputs_renamed.txt"
SECONDS = "remote/seconds_"
RUNNER = "runner:"  # how the owners begin that are runners
REGISTER_PATIENCE_S = 10.0  # the run's end does not wait longer for the model registry
LAST_CHANCE_S = 15.0  # of finalize_timeout, at most half of it, is kept for the status of a run that stays incomplete

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """How a job ended for its run. ``finalized``: the run has its final status. ``retry``: it has none on purpose,
    since another attempt follows. ``gone``: the run was deleted. ``pending``: what is not in the run yet, in words."""

    verdict: Verdict
    finalized: bool = False
    retry: bool = False
    gone: bool = False
    pending: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A job's attempt (they count from 0), and who looks after it: ``owner``, as in the tag ``.owner``.

    ``tries``: which of the attempts that ``retry`` allows this is. A queue that takes a job back and starts it again
    has made one more attempt, but used none of these.
    ``work_dir``: where the output folders are; None: the program's working folder. ``last_chance``: nobody will come
    back to this spool, so at ``finalize_timeout`` the run is ended as well as possible.
    """

    spec: JobSpec
    spool: Spool
    record: RunRecord
    owner: str
    work_dir: Path | None = None
    attempt: int = 0
    last_chance: bool = False
    tries: int = 0
    claimed: threading.Event = field(default_factory=threading.Event, compare=False)

    def claim(self) -> None:
        """Say in the run that its job is ours from now on. Raises RecordError."""
        if not self.claimed.is_set():
            job_uid = os.environ.get("MLFLOW_REMOTE_JOB_UID")  # which its submitter may have failed to write
            known = {"job_uid": job_uid} if job_uid else {}
            self.record.log({"owner": self.owner, "attempt": str(self.attempt), **known})
            self.claimed.set()


def runner_name() -> str:
    """Who this process is in ``.owner`` and ``.finalized``."""
    return f"{RUNNER}{socket.gethostname()}:{os.getpid()}"


def finish(
    spec: JobSpec,
    spool_dir: Path,
    record: RunRecord,
    *,
    work_dir: Path | None = None,
    attempt: int = 0,
    owner: str = "",
    last_chance: bool = False,
) -> Outcome:
    """Do what is left to do at the end of a job whose program and runner are dead. Idempotent; blocks at most about
    ``finalize_timeout``."""
    job = Job(spec, Spool(spool_dir), record, owner or runner_name(), work_dir, attempt, last_chance, attempt)
    return finish_job(job, LogUploader(job.spool, record, attempt=attempt))


def finish_job(job: Job, uploader: LogUploader, *, gone: bool = False) -> Outcome:
    """The same for a job that is being observed. ``gone``: its run was deleted, so there is nothing to write to."""
    started = job.spool.started()
    if started is not None and job.spool.exit() is None:
        kill_orphans(started)
    verdict = _verdict(job)
    outcome = Outcome(verdict, gone=gone)
    _save(job, outcome)
    if not gone:
        outcome = _End(job, uploader, verdict).run()
        _save(job, outcome)
    return outcome


def summary(outcome: Outcome) -> dict[str, Any]:
    """The outcome as plain data: for ``final.json``, the end frame and a container's termination message."""
    verdict = outcome.verdict
    return {
        "reason": verdict.reason.value,
        "message": verdict.message,
        "exit_code": verdict.exit_code,
        "status": verdict.status,
        "words": verdict.words,
        "hint": verdict.hint,
        "finalized": outcome.finalized,
        "retry": outcome.retry,
        "gone": outcome.gone,
        "pending": list(outcome.pending),
    }


def _save(job: Job, outcome: Outcome) -> None:
    with contextlib.suppress(OSError):  # a full disk: the next process derives it again
        write_json(job.spool.path / "final.json", summary(outcome), durable=True)


def _verdict(job: Job) -> Verdict:
    """The verdict that an earlier process reached, or ours: once reached it stands."""
    saved = read_json(job.spool.path / "final.json")
    if saved is not None and saved.get("reason") in Reason.__members__:
        texts = (str(saved.get(name) or "") for name in ("words", "hint"))
        return Verdict(Reason(saved["reason"]), str(saved.get("message") or ""), saved.get("exit_code"), *texts)
    spool = job.spool
    return classify(
        spool.exit(),
        spool.vitals(),
        spool.prepared(),
        cancel_requested=spool.cancel_requested() or _cancel_tagged(job.record),
        limits=job.spec.limits,
    )


def _cancel_tagged(record: RunRecord) -> bool:
    try:
        return "cancel_requested" in record.look().tags
    except RecordError:
        return False


def _with_disk_troubles(action: Callable[[], T]) -> T:
    """A full disk passes, as an outage does."""
    try:
        return action()
    except OSError as error:
        raise RecordError("This machine's disk failed.", Trouble.AWAY, str(error)) from error


class _End:
    """The steps of the end. What cannot be done now is pending, what can never be done is lost; the rest is done."""

    def __init__(self, job: Job, uploader: LogUploader, verdict: Verdict) -> None:
        self._job = job
        self._uploader = uploader
        self._verdict = verdict
        self._began = time.monotonic()
        self._until = self._end = self._began + job.spec.limits.finalize_timeout_s
        if job.last_chance:
            self._until -= min(LAST_CHANCE_S, job.spec.limits.finalize_timeout_s / 2)
        self._pending: list[str] = []
        self._lost: list[Problem] = []
        self._told_why = False  # in an artifact of the run
        self._gave_up: RecordError | None = None

    def run(self) -> Outcome:
        known_better = False
        try:
            look = self._patiently(self._job.record.look)
            known_better = self._known_better(look)
            if not look.tags.get("finalized"):
                self._patiently(self._job.claim)
                self._job.record.log({"phase": Phase.FINALIZING.value})
        except RecordError as error:
            if error.trouble is Trouble.GONE:
                return self._outcome(gone=True)
        self._try("the log", lambda: self._uploader.step(final=True))
        if self._verdict.status == "FAILED" and not known_better:
            self._try(ERROR, self._upload_error)
        if will_retry(self._verdict, self._job.spec.retry, self._job.tries):
            attempt, of = self._job.tries + 1, self._job.spec.retry.max_attempts
            return self._leave_to_next_attempt(f"Attempt {attempt} of {of} failed, another one follows:")
        queue = str(self._job.spec.options.get("queue") or "")
        if taken_back(self._verdict, queue):
            return self._leave_to_next_attempt(f"Stopped, perhaps by queue {queue}, which then starts it again:")
        self._upload_outputs()
        if self._pending and not self._job.last_chance:
            return self._outcome()
        self._until, self._gave_up = self._end, None
        return self._end_run()

    def _outcome(self, *, finalized: bool = False, retry: bool = False, gone: bool = False) -> Outcome:
        return Outcome(self._verdict, finalized=finalized, retry=retry, gone=gone, pending=tuple(self._pending))

    def _patiently(self, action: Callable[[], T]) -> T:
        """Repeat while that may help. Once the time is over each further call fails at once, with the same words."""
        if self._gave_up is not None and time.monotonic() >= self._until:
            raise self._gave_up
        try:
            return persist(lambda: _with_disk_troubles(action), self._until)
        except RecordError as error:
            if error.transient:
                self._gave_up = error
            raise

    def _try(self, what: str, action: Callable[[], object]) -> None:
        try:
            self._patiently(action)
        except RecordError as error:
            if error.transient:
                self._pending.append(f"{what} ({error.code}: {error.words})")
            else:
                self._lost.append(Problem(what, error.words))

    # -- artifacts

    def _upload_error(self) -> None:
        log = self._job.spool.log
        log_end = log.read(max(0, log.size() - failure.LOOK_BACK_BYTES), failure.LOOK_BACK_BYTES)
        self._job.record.upload(failure.error_text(self._verdict, log_end).encode("utf-8", "replace"), ERROR)

    def _upload_outputs(self) -> None:
        command = self._job.spool.command()
        work_dir = self._job.work_dir or (Path(command.cwd) if command is not None and command.cwd else None)
        if work_dir is None:
            return
        found = outputs.find(work_dir, self._job.spec.outputs, self._program_began())
        uploads = outputs.Uploads(self._job.record, self._until, self._uploader.write_index)
        problems = uploads.run(found)
        self._pending += [f"{each.name} ({each.why})" for each in problems if each.temporary]
        lost = [each for each in problems if not each.temporary]
        self._lost += lost
        self._store_lines(NOT_STORED, [f"{each.name}: {each.why}" for each in self._lost])
        self._store_lines(RENAMED, [f"{name} is stored as {stored}" for name, stored in uploads.renamed])

    def _program_began(self) -> float:
        """When the program started, by the clock that its files have their times from: it may have been set since."""
        started, exit_record = self._job.spool.started(), self._job.spool.exit()
        began = started.started_at if started else 0.0
        if exit_record is None or not exit_record.ended_at:
            return began
        return min(began, exit_record.ended_at - exit_record.seconds)

    def _store_lines(self, artifact: str, lines: list[str]) -> None:
        def upload() -> None:
            self._job.record.upload("".join(f"{each}\n" for each in lines).encode(), artifact)
            self._told_why |= artifact == NOT_STORED

        if lines:
            self._try(artifact, upload)

    # -- the run

    def _leave_to_next_attempt(self, why: str) -> Outcome:
        """No status yet: the run goes on with the next attempt."""
        tags = {"phase": Phase.QUEUED.value, "message": f"{why} {self._verdict.message}"}
        self._try("tags", lambda: self._job.record.log(tags))
        return self._outcome(retry=True)

    def _end_run(self) -> Outcome:
        """Write the final status, unless somebody else did or the job is another runner's by now."""
        try:
            look = self._patiently(self._job.record.look)
            if look.deleted:
                return self._outcome(gone=True)
            if look.tags.get("finalized"):
                return self._add_what_we_know(look)
            owner = look.tags.get("owner", self._job.owner)
            if owner != self._job.owner and owner.startswith(RUNNER):
                self._pending.append(f"nothing of ours: the job belongs to {owner} by now")
                return self._outcome()
            self._write_end(look)
            return self._outcome(finalized=True)
        except RecordError as error:
            if error.trouble is not Trouble.GONE:
                self._pending.append(f"the final status ({error.code}: {error.words})")
            return self._outcome(gone=error.trouble is Trouble.GONE)

    def _add_what_we_know(self, look: RunLook) -> Outcome:
        """Somebody ended the run, on proof that seemed good. The status stays theirs; the cause may be told better."""
        tags = {"phase": Phase.DONE.value}
        if look.status == final_status(self._verdict.reason):
            tags |= {} if self._known_better(look) else self._tags()
        elif look.tags["finalized"] != self._job.owner and not self._known_better(look):
            tags["conflict"] = f"{self._job.owner} saw {self._verdict.reason.value}: {self._verdict.message}"
        self._patiently(lambda: self._job.record.log(tags))
        return self._outcome(finalized=True)

    def _known_better(self, look: RunLook) -> bool:
        """Somebody who saw more than we do ended the run: an image that is not there, a node that was drained."""
        said = look.tags.get("reason", "") if look.tags.get("finalized") else ""
        told_to_stop = self._job.spool.started() is None and "cancel_requested" not in look.tags
        vague = VAGUE_REASONS | ({Reason.CANCELLED} if told_to_stop else frozenset())
        return self._verdict.reason in vague and said in Reason.__members__ and Reason[said] not in vague

    def _write_end(self, look: RunLook) -> None:
        record = self._job.record
        if self._pending:
            self._admit_loss()
        tags, metrics = self._tags(), self._metrics(look)
        self._patiently(lambda: record.log(tags, metrics))
        self._patiently(lambda: record.end(self._verdict.status))
        last = {"phase": Phase.DONE.value, "finalized": self._job.owner}
        if self._verdict.reason is Reason.OK and self._job.spec.register_model:
            last |= self._register_model()
        self._patiently(lambda: record.log(last))
        self._see_that_it_stands()

    def _see_that_it_stands(self) -> None:
        """A status that the user's code sent, or a follower, may arrive after ours: the reason in the run decides."""
        with contextlib.suppress(RecordError):
            look = self._patiently(self._job.record.look)
            reason = look.tags.get("reason", "")
            if reason in Reason.__members__ and look.status != final_status(Reason[reason]):
                self._patiently(lambda: self._job.record.end(final_status(Reason[reason])))

    def _admit_loss(self) -> None:
        """The last chance: a good end whose results are not all in the run is no good end."""
        missing = f"this could not be uploaded: {'; '.join(self._pending)}."
        if self._verdict.reason is Reason.OK:
            message = f"The program exited with code 0, but {missing}"
            self._verdict = dataclasses.replace(self._verdict, reason=Reason.FINALIZE_INCOMPLETE, message=message)
        else:
            message = f"{self._verdict.message} Also, {missing}"
            self._verdict = dataclasses.replace(self._verdict, message=message)

    def _tags(self) -> dict[str, str]:
        message = self._verdict.message
        lost = [each.name for each in self._lost if each.name != NOT_STORED]
        if ERROR in lost:  # which says more, where it can be stored
            message = " ".join(filter(None, (message, self._verdict.words, self._verdict.hint)))
        if lost:
            why = f"{NOT_STORED} says why" if self._told_why else self._lost[0].why
            message += f" Not stored: {', '.join(lost[:3])}{', …' if len(lost) > 3 else ''}; {why}."
        tags = {"reason": self._verdict.reason.value, "message": message}
        prepared = self._job.spool.prepared()
        if prepared is not None and prepared.image:
            tags["image"] = prepared.image
        if self._verdict.exit_code is not None:
            tags["exit_code"] = str(self._verdict.exit_code)
        return tags

    def _metrics(self, look: RunLook) -> dict[str, float]:
        """Where the time went. Packing and locking at the submitter, which it logged, and unpacking and materialising
        here are one figure each; ``upload`` marks that we added them up already."""
        exit_record, prepared = self._job.spool.exit(), self._job.spool.prepared() or Prepared()
        started = self._job.spool.started()
        before = {} if f"{SECONDS}upload" in look.metrics else look.metrics
        seconds = {name: value + before.get(SECONDS + name, 0.0) for name, value in prepared.seconds.items()}
        if started is not None and look.created_at is not None:
            seconds["start"] = max(started.started_at - look.created_at, 0.0)
        if exit_record is not None and exit_record.error is None:
            seconds["run"] = exit_record.seconds
        seconds["upload"] = time.monotonic() - self._began
        return {SECONDS + name: float(value) for name, value in seconds.items()}

    def _register_model(self) -> dict[str, str]:
        """Tags that say what became of ``register_model``. Its failure is never the run's."""
        spec, wish = self._job.spec, self._job.spec.register_model or {}
        name, path, alias = (str(wish.get(key) or default) for key, default in _WISHES)
        tags = {str(key): str(value) for key, value in (wish.get("tags") or {}).items()}
        tags |= {
            "mlflow_remote.run_id": spec.run.run_id,
            "mlflow_remote.snapshot": spec.snapshot.digest,
            "mlflow_remote.environment": spec.environment.lock_key,
        }
        until = min(self._until, time.monotonic() + REGISTER_PATIENCE_S)
        try:
            version = persist(lambda: self._job.record.register_model(name, path, alias=alias, tags=tags), until)
        except RecordError as error:
            return {"register_error": f"{error.what} {error.words}"}
        return {"model_version": f"{name}/{version}"}


_WISHES = (("name", ""), ("path", "model"), ("alias", ""))
