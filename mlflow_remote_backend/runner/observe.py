"""Watch a running job through its spool, bring its log into its run while it grows, and see to its end.

Three threads while the program runs, so that none waits for another: the caller's looks at the spool every 50 ms; one
uploads the log; one talks to the run (phase, cancel, deletion). A fourth writes frames where somebody reads them.
Nothing here can slow the program: it writes to the spool, whatever the tracking server does. How it ends is in
``finalise.py``.

Called by the supervisor of a job on this machine; on Kubernetes this module is the sidecar's program.

The stored log is the program's output byte for byte: nothing in it is masked.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import JobError
from ..job import JobSpec, Phase
from . import envelope, frames
from .finalise import RUNNER, Job, Outcome, finish_job, runner_name, summary
from .parts import LogUploader
from .record import Backoff, RecordError, RunRecord, Trouble, persist
from .spool import Spool

POLL_S = 0.05
LAST_WORDS_S = 2.0  # for the record of an execute or prepare that is gone: it may still be on its way
UPLOAD_LOOK_S = 0.5
TELL_S = 0.2  # how late a change of phase may be told
LOOK_S = 10.0  # at the run, plus up to half of it, so that many runs do not ask at once
ATTEMPT_PATIENCE_S = 60.0  # for a tracking server that is away while a job of a queue starts
CANCELLED_START_S = 10.0  # for a job that was cancelled while it started to start, and end, after all
GONE_LOOKS = 2  # a run must be missing twice before its program is stopped

EXIT_RETRY = 75  # EX_TEMPFAIL: another attempt is to follow; the rules of a Kubernetes Job look for it
EXIT_PENDING = 74  # EX_IOERR: something is not in the run
#: Kubernetes cuts what is longer: 12 KiB for a pod, by equal shares of its containers, of which a cluster may add some.
TERMINATION_MESSAGE_BYTES = 1024


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
    tries: int | None = None,
    owner: str = "",
    last_chance: bool = False,
) -> Outcome:
    """Watch the job in ``spool_dir`` to its end and finalise its run. Blocks for as long as that takes; raises nothing
    for what the tracking server does.

    ``alive``: whether execute, or prepare before it, may still write to the spool; asked about twenty times a second.
    Default: execute's lock. ``on_phase`` hears of running, finalizing and done. ``frames_to``: gets frames of the log.
    The others: see :class:`~.finalise.Job`.
    """
    tries = attempt if tries is None else tries
    job = Job(spec, Spool(spool_dir), record, owner or runner_name(), work_dir, attempt, last_chance, tries)
    writer = frames.FrameWriter(job.spool.log, frames_to, attempt) if frames_to is not None else None
    watch = _Watch(job, alive or _lock_held(job.spool), on_phase, writer)
    watch.run()
    outcome = finish_job(job, watch.uploader, gone=watch.gone)
    if outcome.finalized:
        on_phase(Phase.DONE.value)
    if writer is not None:
        writer.close(summary(outcome))
    return outcome


def _lock_held(spool: Spool) -> Callable[[], bool]:
    """Execute lives unless its lock was released: where there is none (yet), nobody can know, and we wait."""
    return lambda: spool.execute_lives() is not False


class _Watch:
    """The threads that watch one job."""

    def __init__(
        self,
        job: Job,
        alive: Callable[[], bool],
        on_phase: Callable[[str], object],
        writer: frames.FrameWriter | None,
    ) -> None:
        self.uploader = LogUploader(job.spool, job.record, attempt=job.attempt)
        self.gone = False
        self._others_ended_it = False
        self._job = job
        self._alive = alive
        self._on_phase = on_phase
        self._writer = writer
        self._phase = Phase.PREPARING
        self._ended = threading.Event()

    def run(self) -> None:
        """Return when the program has ended, however, and the threads have let go of the tracking server."""
        threads = [
            threading.Thread(target=self._upload_log, name="log upload", daemon=True),
            threading.Thread(target=self._talk_to_run, name="run tags", daemon=True),
        ]
        for thread in threads:
            thread.start()
        if self._writer is not None:
            self._writer.start()
        while not self._has_ended():
            time.sleep(POLL_S)
        self._enter(Phase.FINALIZING)
        self._ended.set()
        for thread in threads:
            thread.join()

    def _has_ended(self) -> bool:
        alive = self._alive()
        if self._phase is Phase.PREPARING and self._job.spool.started() is not None:
            self._enter(Phase.RUNNING)
        return self._recorded_end() or not (alive or self._comes_back())

    def _comes_back(self) -> bool:
        """Whether an execute, or prepare, that seemed gone is not. If it is, its last record may still come."""
        until = time.monotonic() + LAST_WORDS_S
        if self._phase is Phase.PREPARING and self._job.spool.cancel_requested():
            until = 0.0  # it would tell nothing new
        while not self._recorded_end() and time.monotonic() < until:
            time.sleep(POLL_S)
            if self._alive():
                return True
        return False

    def _recorded_end(self) -> bool:
        prepared = self._job.spool.prepared() if self._phase is Phase.PREPARING else None
        return self._job.spool.exit() is not None or (prepared is not None and bool(prepared.failed))

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._on_phase(phase.value)
        if self._writer is not None:
            self._writer.phase(phase.value)

    # -- the log

    def _upload_log(self) -> None:
        backoff, pause = Backoff(), UPLOAD_LOOK_S
        while not self._ended.wait(pause) and not self.gone:
            try:
                self.uploader.step()
            except (RecordError, OSError):  # the server is away, or the spool's disk is full: execute waits too
                pause = backoff.pause_s()
            else:
                backoff.reset()
                pause = UPLOAD_LOOK_S

    # -- the run

    def _talk_to_run(self) -> None:
        """Look from time to time whether the program is to be stopped; claim the run, and tell its phase."""
        told, missing, next_look, backoff, pause = None, 0, 0.0, Backoff(), 0.0
        while not self._ended.wait(pause) and not self._others_ended_it:
            try:
                if time.monotonic() >= next_look:
                    missing = missing + 1 if self._look() else 0
                    next_look = time.monotonic() + (0 if missing else LOOK_S * random.uniform(1.0, 1.5))
                if told is not (phase := self._phase) and not missing and not self._others_ended_it:
                    self._job.claim()
                    self._job.record.log({"phase": phase.value})
                    told = phase
                backoff.reset()
                pause = TELL_S
            except (RecordError, OSError) as error:  # the latter: no room to pass a cancel on
                missing = missing + 1 if getattr(error, "trouble", None) is Trouble.GONE else 0
                pause = backoff.pause_s()
            if missing >= GONE_LOOKS and not self.gone:
                self.gone = True
                self._job.spool.request_cancel()

    def _look(self) -> bool:
        """Look at the run; stop the program where somebody wants that, or has ended the run. True if it is deleted."""
        look = self._job.record.look()
        self._others_ended_it = bool(look.tags.get("finalized"))
        if "cancel_requested" in look.tags or self._others_ended_it:
            self._job.spool.request_cancel()
        return look.deleted


# ------------------------------------------------------------------------------------------------------ the sidecar


def main(argv: Sequence[str] | None = None) -> int:
    """The sidecar: observe one spool; frames go to stdout, the outcome to ``--termination-log``.

    Exits with 0 when the run has its final status (or was deleted), EXIT_RETRY where another attempt is to follow,
    EXIT_PENDING where something could not be brought into the run.
    """
    options = _options(argv)
    told_to_end = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: told_to_end.set())
    try:
        spec = envelope.load(Path(options.envelope).read_bytes())
    except (JobError, OSError) as error:
        return _refuse(options.termination_log, error)
    spool = Spool.create(Path(options.spool), mode=0o2770)
    # Only our descriptor writes frames: whatever a library prints goes to stderr.
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=1 << 16) as out, RunRecord(spec.run) as record:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        outcome = observe(
            spec,
            spool.path,
            record,
            work_dir=Path(options.work) if options.work else None,
            alive=_sidecar_alive(spool, lambda: told_to_end.is_set() or _exists(options.told_to_end)),
            frames_to=out,
            attempt=_attempt(spec, record, options),
            tries=options.attempt,
            owner=options.owner,
            last_chance=True,
        )
    _leave_message(options.termination_log, summary(outcome))
    if outcome.retry:
        return EXIT_RETRY
    return 0 if outcome.finalized or outcome.gone else EXIT_PENDING


def _attempt(spec: JobSpec, record: RunRecord, options: argparse.Namespace) -> int:
    """Which attempt of the run this is. Kubernetes counts failures, so it begins anew when a queue takes a job back and
    starts it again; the run knows better. Blocks for jobs of a queue only.
    """
    counted = int(options.attempt)
    if not spec.options.get("queue"):
        return counted
    try:
        tags = persist(record.look, time.monotonic() + ATTEMPT_PATIENCE_S).tags
    except RecordError:
        return counted
    owner, before = tags.get("owner", ""), tags.get("attempt", "")
    if not owner.startswith(RUNNER) or not before.isdigit():
        return counted
    return max(counted, int(before) if owner == options.owner else int(before) + 1)


def _sidecar_alive(spool: Spool, told_to_end: Callable[[], bool]) -> Callable[[], bool]:
    """Kubernetes ends a sidecar after the main container: from then on only a held lock says that execute lives.

    Its one SIGTERM can come before anybody catches it. So a cancelled job that has not started by CANCELLED_START_S
    later counts as told, too: an execute that comes after all finds the cancel and does not start.
    """
    lock_held = _lock_held(spool)
    never_starts = _NeverStarts(spool)
    return lambda: bool(spool.execute_lives()) if told_to_end() or never_starts() else lock_held()


class _NeverStarts:
    """Whether a cancelled job has not started for CANCELLED_START_S since its cancel was first seen."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._by: float | None = None

    def __call__(self) -> bool:
        if self._by is None and self._spool.cancel_requested():
            self._by = time.monotonic() + CANCELLED_START_S
        return self._by is not None and time.monotonic() >= self._by and self._spool.started() is None


def _exists(path: str) -> bool:
    return bool(path) and os.path.exists(path)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    environ = os.environ
    uid = environ.get("MLFLOW_REMOTE_POD_UID")
    parser = argparse.ArgumentParser(prog="observe", description="Watch a job through its spool and finalise its run.")
    parser.add_argument("--envelope", required=True, help="file with the job's envelope")
    parser.add_argument("--spool", required=True, help="folder shared with prepare and execute")
    parser.add_argument("--work", default="", help="folder where the program runs (default: as its command says)")
    parser.add_argument("--attempt", type=int, default=int(environ.get("MLFLOW_REMOTE_ATTEMPT") or 0))
    parser.add_argument("--owner", default=RUNNER + uid if uid else "", help="who we are in the tag .owner")
    parser.add_argument("--told-to-end", default="", metavar="FILE", help="there once a SIGTERM came: as good as one")
    parser.add_argument("--termination-log", default="/dev/termination-log", help="where Kubernetes reads the outcome")
    return parser.parse_args(argv)


def _refuse(termination_log: str, error: JobError | OSError) -> int:
    words = getattr(error, "words", "") or str(error)
    what = getattr(error, "what", "The job's envelope cannot be read.")
    _leave_message(termination_log, {"reason": "BOOTSTRAP", "message": what, "words": words, "finalized": False})
    print(f"{what} {words}", file=sys.stderr)
    return EXIT_PENDING


def _leave_message(path: str, fields: dict[str, Any]) -> None:
    """The outcome where Kubernetes keeps it with the pod's status, which outlives log and tracking server."""
    with contextlib.suppress(OSError):
        if os.path.exists(path):  # else this is no pod
            Path(path).write_text(frames.shortened_json(fields, TERMINATION_MESSAGE_BYTES))


if __name__ == "__main__":
    sys.exit(main())
