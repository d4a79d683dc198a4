"""Watch a running job through its spool, bring its log and outputs into its run, and write the one final status.

Three threads while the program runs, so that none waits for another: the caller's looks at the spool every 50 ms; one
uploads the log; one talks to the run (phase, cancel, deletion). A fourth writes frames where somebody reads them.
Nothing here can slow the program: it writes to the spool, whatever the tracking server does.

At the end, in this order: the rest of the log, ``logs/error.txt`` on failure, outputs, tags and timings, the terminal
status over whatever the user's code wrote, and last the tag ``.finalized``. Each step is repeated while the tracking
server is away, up to ``finalize_timeout``; then ``final.json`` in the spool says what is pending, and
:func:`finish` in any later process goes on from there. Every step may be done twice without harm.

The stored log is the program's output byte for byte: nothing in it is masked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..job import JobSpec, Phase, Reason
from . import failure, frames, outputs
from .outputs import Problem
from .parts import LogUploader
from .record import Backoff, RecordError, RunRecord, Trouble, persist
from .spool import ExitRecord, Prepared, Spool, kill_orphans, read_json, write_json
from .verdict import Verdict, classify, will_retry

POLL_S = 0.05
LAST_WORDS_S = 2.0  # for the exit record of an execute that is gone: it may still be on its way from a container
UPLOAD_LOOK_S = 0.5
TAGS_EVERY_S = 10.0  # plus up to half of it, so that many runs do not ask at once
GONE_LOOKS = 2  # a run must be missing twice before its program is stopped
FRAME_PIECE_BYTES = 256 * 1024
FRAME_LAG_BYTES = 32 * 1024 * 1024  # further behind than this, the live view skips to what is new
FRAME_IDLE_S = 0.1
NOT_STORED = "remote/outputs_not_stored.txt"

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """How the observation ended. ``finalized``: the run has its final status. ``retry``: it has none on purpose, since
    another attempt follows. ``gone``: the run was deleted. ``pending``: what is not in the run yet, for people."""

    verdict: Verdict
    finalized: bool = False
    retry: bool = False
    gone: bool = False
    pending: tuple[str, ...] = ()


def runner_name() -> str:
    """Who this process is in ``.owner`` and ``.finalized``."""
    return f"runner:{socket.gethostname()}:{os.getpid()}"


def observe(
    spec: JobSpec,
    spool_dir: Path,
    record: RunRecord,
    *,
    work_dir: Path | None = None,
    alive: Callable[[], bool] | None = None,
    on_phase: Callable[[str], object] = lambda phase: None,
    frames_to: BinaryIO | None = None,
    attempt: int = 0,
    owner: str = "",
    last_chance: bool = False,
) -> Outcome:
    """Watch the job in ``spool_dir`` to its end and finalise its run. Blocks for as long as that takes; never raises
    for what the tracking server does.

    ``work_dir``: where the program's output folders are (default: its working folder). ``alive``: whether execute, or
    prepare before it, may still write to the spool; asked about twenty times a second; default: its lock in the spool.
    ``attempt``: counts from 0. ``last_chance``: nobody will come back to this spool, so that at ``finalize_timeout``
    the run is ended as FINALIZE_INCOMPLETE if something could not be uploaded but the tracking server answers.
    """
    job = Job(spec, Spool(spool_dir), record, work_dir, attempt, owner or runner_name())
    watch = _Watch(job, alive or _lock_held(job.spool), on_phase, frames_to)
    watch.run()
    outcome = _finish(job, watch.uploader, on_phase, watch.gone, last_chance)
    watch.close(outcome)
    return outcome


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
    """Do what is left to do at the end of a job whose program and runner are dead: from its spool alone. Idempotent."""
    job = Job(spec, Spool(spool_dir), record, work_dir, attempt, owner or runner_name())
    with contextlib.suppress(RecordError):
        record.log({"owner": job.owner})
    uploader = LogUploader(job.spool, record, attempt=attempt)
    return _finish(job, uploader, lambda phase: None, False, last_chance)


@dataclass(frozen=True)
class Job:
    """What is observed, and by whom."""

    spec: JobSpec
    spool: Spool
    record: RunRecord
    work_dir: Path | None
    attempt: int
    owner: str


def _lock_held(spool: Spool) -> Callable[[], bool]:
    """Execute lives unless its lock was released: where there is none (yet), nobody can know, and we wait."""
    return lambda: spool.execute_lives() is not False


# -------------------------------------------------------------------------------------------------- while it runs


class _Watch:
    """The threads that watch one job."""

    def __init__(
        self, job: Job, alive: Callable[[], bool], on_phase: Callable[[str], object], frames_to: BinaryIO | None
    ) -> None:
        self.uploader = LogUploader(job.spool, job.record, attempt=job.attempt)
        self.gone = False
        self._job = job
        self._alive = alive
        self._on_phase = on_phase
        self._phase = Phase.PREPARING
        self._ended = threading.Event()
        self._frames = _Frames(job.spool, frames_to, job.attempt) if frames_to is not None else None
        self._threads = [
            threading.Thread(target=self._upload_log, name="log upload", daemon=True),
            threading.Thread(target=self._talk_to_run, name="run tags", daemon=True),
        ]

    def run(self) -> None:
        """Return when the program has ended, however, and the threads have let go of the tracking server."""
        if self._frames is not None:
            self._frames.start()
        for thread in self._threads:
            thread.start()
        while not self._has_ended():
            time.sleep(POLL_S)
        self._enter(Phase.FINALIZING)
        self._ended.set()
        for thread in self._threads:
            thread.join()
        started = self._job.spool.started()
        if started is not None and self._job.spool.exit() is None:
            kill_orphans(started)

    def close(self, outcome: Outcome) -> None:
        if self._frames is not None:
            self._frames.close(outcome)

    def _has_ended(self) -> bool:
        spool, alive = self._job.spool, self._alive()
        if spool.exit() is not None:
            return True
        prepared = spool.prepared()
        if prepared is not None and prepared.failed:
            return True
        if self._phase is Phase.PREPARING and spool.started() is not None:
            self._enter(Phase.RUNNING)
        return not alive and not self._wait_for_exit()

    def _wait_for_exit(self) -> bool:
        """Whether the exit record of an execute that is gone still comes."""
        if self._job.spool.started() is None:
            return False
        until = time.monotonic() + LAST_WORDS_S
        while self._job.spool.exit() is None:
            if time.monotonic() > until:
                return False
            time.sleep(POLL_S)
        return True

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._on_phase(phase.value)
        if self._frames is not None:
            self._frames.phase(phase.value)

    # -- the log

    def _upload_log(self) -> None:
        backoff = Backoff()
        pause = UPLOAD_LOOK_S
        while not self._ended.wait(pause):
            try:
                self.uploader.step()
                backoff.reset()
                pause = UPLOAD_LOOK_S
            except RecordError:
                pause = backoff.pause_s()
            except OSError:  # the spool's disk is full: execute waits too
                pause = backoff.pause_s()

    # -- the run

    def _talk_to_run(self) -> None:
        """Claim the run, tell its phase, and look from time to time whether it is to be stopped."""
        told: dict[str, str] = {}
        missing, next_look, backoff, pause = 0, 0.0, Backoff(), 0.0
        while not self._ended.wait(pause):
            pause = POLL_S * 4
            wanted = {"owner": self._job.owner, "attempt": str(self._job.attempt), "phase": self._phase.value}
            try:
                if wanted != told:
                    self._job.record.log({k: v for k, v in wanted.items() if told.get(k) != v})
                    told = wanted
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + TAGS_EVERY_S * random.uniform(1.0, 1.5)
                    missing = missing + 1 if self._look() else 0
                backoff.reset()
            except RecordError as error:
                missing = missing + 1 if error.trouble is Trouble.GONE else 0
                pause = backoff.pause_s()
            if missing >= GONE_LOOKS:
                self.gone = True
                self._job.spool.request_cancel()

    def _look(self) -> bool:
        """Look at the run; pass on a wish to cancel. True if the run was deleted."""
        look = self._job.record.look()
        if "cancel_requested" in look.tags:
            self._job.spool.request_cancel()
        return look.deleted


class _Frames(threading.Thread):
    """Writes frames of the log as it grows. A slow reader delays only this thread."""

    def __init__(self, spool: Spool, out: BinaryIO, attempt: int) -> None:
        super().__init__(name="frames", daemon=True)
        self._log = spool.log
        self._out = out
        self._attempt = attempt
        self._offset = spool.log.start()
        self._news: list[bytes] = []
        self._ending = threading.Event()
        self._next_beat = 0.0

    def phase(self, phase: str) -> None:
        self._news.append(frames.phase_frame(self._attempt, phase))

    def run(self) -> None:
        pause = POLL_S
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more: the stored log has everything
            while not self._ending.wait(pause):
                pause = POLL_S / 2 if self._pump() else min(pause * 1.2, FRAME_IDLE_S)

    def _pump(self) -> bool:
        """Write what is new. True if there was something."""
        news, self._news = self._news, []
        for line in news:
            self._out.write(line)
        wrote = bool(news) or self._write_log()
        if wrote or time.monotonic() >= self._next_beat:
            if not wrote:
                self._out.write(frames.beat_frame(self._attempt, self._log.size()))
            self._next_beat = time.monotonic() + frames.HEARTBEAT_S
            self._out.flush()
        return wrote

    def _write_log(self) -> bool:
        data = self._log.read(self._offset, FRAME_PIECE_BYTES)
        if not data:
            start = self._log.start()
            if start <= self._offset:
                return False
            self._offset = start  # dropped before we came: the stored parts have it
            return True
        for line in frames.log_frames(self._attempt, self._offset, data):
            self._out.write(line)
        self._offset += len(data)
        behind = self._log.size() - self._offset
        if behind > FRAME_LAG_BYTES:
            self._offset += behind - FRAME_PIECE_BYTES
        return True

    def close(self, outcome: Outcome) -> None:
        """The rest of the log, then the end frame. Waits for the reader."""
        self._ending.set()
        self.join()
        with contextlib.suppress(OSError, ValueError):
            while self._pump():
                pass
            self._out.write(frames.end_frame(self._attempt, summary(outcome)))
            self._out.flush()


# ------------------------------------------------------------------------------------------------------- at the end


def summary(outcome: Outcome) -> dict[str, Any]:
    """The outcome as plain data: for the end frame, ``final.json`` and a container's termination message."""
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


def _finish(
    job: Job, uploader: LogUploader, on_phase: Callable[[str], object], gone: bool, last_chance: bool
) -> Outcome:
    """The end of a job, from verdict to final status; leaves ``final.json`` in the spool."""
    verdict = _verdict(job)
    outcome = Outcome(verdict, gone=gone)
    _save(job, outcome)
    if not gone:
        end = _End(job, uploader, verdict, time.monotonic() + job.spec.limits.finalize_timeout_s, last_chance)
        outcome = end.run()
        _save(job, outcome)
    if outcome.finalized:
        on_phase(Phase.DONE.value)
    return outcome


def _save(job: Job, outcome: Outcome) -> None:
    with contextlib.suppress(OSError):  # a full disk: the next process derives it again
        write_json(job.spool.path / "final.json", summary(outcome), durable=True)


def _verdict(job: Job) -> Verdict:
    """The verdict that an earlier process reached, or ours."""
    saved = read_json(job.spool.path / "final.json")
    if saved is not None and saved.get("reason") in Reason.__members__:
        return Verdict(
            Reason(saved["reason"]),
            saved.get("message", ""),
            saved.get("exit_code"),
            saved.get("words", ""),
            saved.get("hint", ""),
        )
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


class _End:
    """The steps of the end, in their order. What cannot be done is noted as pending; the rest is done all the same."""

    def __init__(self, job: Job, uploader: LogUploader, verdict: Verdict, until: float, last_chance: bool) -> None:
        self._job = job
        self._uploader = uploader
        self._verdict = verdict
        self._until = until
        self._last_chance = last_chance
        self._began = time.monotonic()
        self._pending: list[str] = []
        self._lost: list[Problem] = []

    def run(self) -> Outcome:
        retry = will_retry(self._verdict, self._job.spec.retry, self._job.attempt)
        self._try("phase", lambda: self._job.record.log({"phase": Phase.FINALIZING.value}), patient=False)
        self._try("the log", lambda: self._uploader.step(final=True))
        if self._verdict.reason is not Reason.OK:
            self._try("logs/error.txt", self._upload_error)
        if retry:
            return self._outcome(retry=True)
        self._upload_outputs()
        if self._pending and not self._last_chance:
            return self._outcome()
        try:
            return self._write_status()
        except RecordError as error:
            if error.trouble is Trouble.GONE:
                return self._outcome(gone=True)
            self._pending.append(f"the final status ({error.code}: {error.words})")
            return self._outcome()

    def _outcome(self, *, finalized: bool = False, retry: bool = False, gone: bool = False) -> Outcome:
        return Outcome(self._verdict, finalized=finalized, retry=retry, gone=gone, pending=tuple(self._pending))

    def _patiently(self, action: Callable[[], T]) -> T:
        return persist(action, self._until)

    def _try(self, what: str, action: Callable[[], object], *, patient: bool = True) -> None:
        """Do one step; where it stays impossible note it as pending, and go on."""
        try:
            if patient:
                self._patiently(action)
            else:
                action()
        except RecordError as error:
            if patient:
                self._pending.append(f"{what} ({error.code}: {error.words})")

    # -- the steps

    def _upload_error(self) -> None:
        log = self._job.spool.log
        log_end = log.read(max(0, log.size() - failure.LOOK_BACK_BYTES), failure.LOOK_BACK_BYTES)
        text = failure.error_text(self._verdict, log_end)
        self._job.record.upload(text.encode("utf-8", "replace"), "logs/error.txt")

    def _upload_outputs(self) -> None:
        command = self._job.spool.command()
        work_dir = self._job.work_dir or (Path(command.cwd) if command is not None and command.cwd else None)
        if work_dir is None:
            return
        found = outputs.find(work_dir, self._job.spec.outputs)
        problems = outputs.upload_all(self._job.record, found, self._patiently)
        self._lost = [each for each in problems if not each.temporary]
        self._pending += [f"{each.name} ({each.why})" for each in problems if each.temporary]
        if self._lost:
            text = "".join(f"{each.name}: {each.why}\n" for each in self._lost)
            self._try(NOT_STORED, lambda: self._job.record.upload(text.encode(), NOT_STORED))

    def _write_status(self) -> Outcome:
        """The run's end, unless somebody else wrote it already or owns the run by now."""
        look = self._patiently(self._job.record.look)
        if look.deleted:
            return self._outcome(gone=True)
        if look.tags.get("finalized"):
            return self._outcome(finalized=True)
        if look.tags.get("owner", self._job.owner) != self._job.owner and self._owned_by_runner(look.tags["owner"]):
            self._pending.append(f"nothing: the run belongs to {look.tags['owner']} by now")
            return self._outcome()
        if self._pending:
            self._give_up()
        tags, metrics = self._tags(), self._metrics()
        self._patiently(lambda: self._job.record.log(tags, metrics))
        self._patiently(lambda: self._job.record.end(self._verdict.status))
        last = {"phase": Phase.DONE.value, "finalized": self._job.owner}
        self._patiently(lambda: self._job.record.log(last))
        return self._outcome(finalized=True)

    @staticmethod
    def _owned_by_runner(owner: str) -> bool:
        return owner.startswith("runner:")

    def _give_up(self) -> None:
        """Nobody will come back: a good end whose results are not all in the run is no good end."""
        missing = "; ".join(self._pending)
        if self._verdict.reason is Reason.OK:
            message = f"The program exited with code 0, but this could not be uploaded: {missing}."
            self._verdict = dataclasses.replace(self._verdict, reason=Reason.FINALIZE_INCOMPLETE, message=message)
        else:
            self._verdict = dataclasses.replace(
                self._verdict, message=f"{self._verdict.message} This could not be uploaded: {missing}."
            )

    def _tags(self) -> dict[str, str]:
        message = self._verdict.message
        if self._lost:
            first = ", ".join(each.name for each in self._lost[:3])
            message += f" {len(self._lost)} output file(s) could not be stored ({first}): {NOT_STORED} says why."
        tags = {"reason": self._verdict.reason.value, "message": message}
        if self._verdict.exit_code is not None:
            tags["exit_code"] = str(self._verdict.exit_code)
        if self._verdict.reason is Reason.OK and self._job.spec.register_model:
            tags.update(self._register_model())
        return tags

    def _metrics(self) -> dict[str, float]:
        spool = self._job.spool
        exit_record: ExitRecord | None = spool.exit()
        prepared = spool.prepared() or Prepared()
        seconds = {name: float(value) for name, value in prepared.seconds.items()}
        if exit_record is not None and exit_record.error is None:
            seconds["run"] = exit_record.seconds
        seconds["upload"] = time.monotonic() - self._began
        return {f"remote/seconds_{name}": value for name, value in seconds.items()}

    def _register_model(self) -> dict[str, str]:
        """Tags that say what became of ``register_model``. Its failure is never the run's."""
        spec, wish = self._job.spec, self._job.spec.register_model or {}
        tags = {str(key): str(value) for key, value in (wish.get("tags") or {}).items()}
        tags |= {
            "mlflow_remote.run_id": spec.run.run_id,
            "mlflow_remote.snapshot": spec.snapshot.digest,
            "mlflow_remote.environment": spec.environment.lock_key,
        }
        name, path = str(wish.get("name", "")), str(wish.get("path") or "model")
        try:
            version = self._patiently(
                lambda: self._job.record.register_model(name, path, alias=str(wish.get("alias") or ""), tags=tags)
            )
        except RecordError as error:
            return {"register_error": f"{error.what} {error.words}"}
        return {"model_version": f"{name}/{version}"}
