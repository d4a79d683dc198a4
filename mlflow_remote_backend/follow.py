"""Follow a job from outside: its status and its log, until its run has its final status.

Two witnesses, neither trusted alone: the compute (``status``, fast) and the run (the tag ``.finalized``, the truth).
Losing contact with either never ends the run. Only where the compute proves that no runner of ours is left does the
follower see to the end itself: it lets the compute recover the job, or writes the final status.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TextIO

from .compute.base import Compute, JobHandle
from .display import Terminal, harmless
from .errors import Detached, RemoteError, RequestError
from .job import VAGUE_REASONS, Diagnosis, JobStatus, Phase, Reason
from .tracking import PREFIX, RunView, Tracking

POLL_S = 0.1  # of the compute's status; it answers from memory or from files
LOG_PAUSE_S = 0.05
GAP_PATIENCE_S = 15.0  # for the stored log to reach what a live one skipped; its open part is uploaded every 10 s
LEAVE_S = 1.0  # for the last line to come to its end, where somebody reads it
FINISH_PATIENCE_S = 5.0  # for a log stream to come to its end once the run has
STORED_PAUSE_S = 5.0  # the open part of the stored log is uploaded every 10 s
TRACKING_POLL_S = 15.0  # of the run, as long as the compute sees the job alive
CAUSE_PATIENCE_S = 5.0  # a compute may tell some seconds after the end what was behind it
LOGIN_PATIENCE_S = 30.0  # for a login that cannot be renewed now: its plugin may work again
TELL_SILENCE_AFTER_S = 30.0  # a contact lost for that long is worth a line

#: What only a compute can know of a program that was stopped from outside.
CAUSES = frozenset(
    {
        Reason.OOM,
        Reason.CONTAINER_CONFIG,
        Reason.BOOTSTRAP,
        Reason.EVICTED,
        Reason.PREEMPTED,
        Reason.NODE_LOST,
        Reason.NODE_REJECTED,
    }
)
#: The same, but only at the time: finished jobs are deleted too, and namespaces long after their jobs.
CAUSES_THEN = CAUSES | {Reason.JOB_DELETED, Reason.NAMESPACE_TERMINATING}
DETACH_SIGNALS = ("SIGTERM", "SIGHUP")


@dataclass
class Cursor:
    """How much of the log was shown: so many bytes of this attempt."""

    attempt: int = 0
    offset: int = 0


class Log:
    """A job's log from its two sources, the compute while that has it and the stored parts, each byte once."""

    def __init__(
        self,
        tracking: Tracking,
        run_id: str,
        compute: Compute | None,
        handle: JobHandle,
        cursor: Cursor | None = None,
    ) -> None:
        self._cursor = cursor or Cursor()
        self._compute = compute
        self._handle = handle
        self._stored = StoredLog(tracking, run_id)

    @property
    def cursor(self) -> Cursor:
        """How far it was read, a copy."""
        return Cursor(self._cursor.attempt, self._cursor.offset)

    @property
    def is_live(self) -> bool:
        return self._compute is not None

    def live(self, follow: bool = False) -> Iterator[bytes]:
        """What has come since the last call, from the compute, and with ``follow`` perhaps what comes.

        Empty where the compute cannot be reached.
        """
        if self._compute is None:
            return
        with contextlib.suppress(RemoteError):
            at = {"offset": self._cursor.offset, "attempt": self._cursor.attempt}
            for chunk in self._compute.logs(self._handle, **at, follow=follow):
                yield from self._take(chunk.attempt, chunk.offset, chunk.data)

    def stored(self) -> Iterator[bytes]:
        """What the stored parts have beyond that. Raises TrackingError."""
        for attempt, offset, data in self._stored.read_from(self._cursor):
            yield from self._take(attempt, offset, data)

    def _take(self, attempt: int, offset: int, data: bytes) -> Iterator[bytes]:
        """In order: a repeat is cut off, a gap is filled from the stored parts where they reach."""
        if attempt > self._cursor.attempt:
            yield from self._rest_before(attempt)
            yield f"\n--- attempt {attempt + 1} ---\n".encode()
            self._cursor = Cursor(attempt, 0)
        if attempt < self._cursor.attempt:
            return
        if offset > self._cursor.offset:
            yield from self._fill_gap(offset)
        fresh = data[max(self._cursor.offset - offset, 0) :]
        if fresh:
            self._cursor.offset = offset + len(data)
            yield fresh

    def _rest_before(self, attempt: int) -> Iterator[bytes]:
        """What is stored of the attempts before this one: a disrupted pod takes its live log with it."""
        with contextlib.suppress(RemoteError):
            for earlier, offset, data in self._stored.read_from(self._cursor, before=attempt):
                yield from self._take(earlier, offset, data)

    def _fill_gap(self, until: int) -> Iterator[bytes]:
        """By the stored parts, which may be some seconds behind."""
        patient_until = time.monotonic() + GAP_PATIENCE_S
        while self._cursor.offset < until:
            with contextlib.suppress(RemoteError):
                for attempt, offset, data in self._stored.read_from(self._cursor):
                    if attempt == self._cursor.attempt and offset < until:
                        self._cursor.offset = min(offset + len(data), until)
                        yield data[: until - offset]
            if self._cursor.offset >= until or time.monotonic() > patient_until:
                break
            time.sleep(1.0)
        if self._cursor.offset < until:
            missing = until - self._cursor.offset
            self._cursor.offset = until
            yield f"\n[{missing} bytes of the log are not here yet; the stored log will have them]\n".encode()


class LogPump(threading.Thread):
    """Copies a job's log to ``sink`` as it comes. ``rest``: the same log again, from a cursor, by the stored parts."""

    def __init__(self, log: Log, rest: Callable[[Cursor], Log], sink: Callable[[bytes], None]) -> None:
        super().__init__(name="log of a job", daemon=True)
        self._log = log
        self._rest = rest
        self._sink = sink
        self._shown = Cursor()
        self._showing = threading.Lock()
        self._ending = threading.Event()
        self._abandoned = False

    def run(self) -> None:
        while not self._ending.is_set():
            if self._log.is_live:
                self._copy(self._log.live(follow=True))
            else:
                with contextlib.suppress(RemoteError):
                    self._copy(self._log.stored())
            self._ending.wait(LOG_PAUSE_S if self._log.is_live else STORED_PAUSE_S)

    def leave(self) -> None:
        """Stop after what is being shown; does not wait."""
        self._ending.set()

    def finish(self) -> None:
        """Show what is left, now that the log is complete: what the compute still has, then the stored parts.

        A stream that has fallen silent, or cannot keep up, is left where it is: the stored parts have the rest. Blocks
        as long as nobody reads what is shown.
        """
        self._ending.set()
        self.join(FINISH_PATIENCE_S)
        if self.is_alive():
            with self._showing:
                self._abandoned = True
            for data in self._rest(self._shown).stored():
                self._sink(data)
            return
        self._copy(self._log.live())
        self._copy(self._log.stored())

    def _copy(self, pieces: Iterator[bytes]) -> None:
        for data in pieces:
            with self._showing:
                if self._abandoned:
                    return
                self._sink(data)
                self._shown = self._log.cursor


class StoredLog:
    """The log as the run's artifacts hold it: works from any machine, without access to the compute."""

    def __init__(self, tracking: Tracking, run_id: str) -> None:
        self._tracking = tracking
        self._run_id = run_id

    def read_from(self, cursor: Cursor, before: int | None = None) -> Iterator[tuple[int, int, bytes]]:
        """Attempt, offset and bytes of what is stored from the cursor on, or only of attempts ``before`` that one.

        Blocks while parts are fetched.
        """
        at = Cursor(cursor.attempt, cursor.offset)
        for part in self._tracking.log_index(self._run_id):
            if before is not None and part.attempt >= before:
                return
            if part.attempt > at.attempt:
                at = Cursor(part.attempt, 0)
            if part.attempt < at.attempt or part.end <= at.offset:
                continue
            data = self._tracking.read_artifact(self._run_id, part.path) or b""
            fresh = data[max(at.offset - part.offset, 0) :]
            yield part.attempt, max(at.offset, part.offset), fresh
            at.offset = part.offset + len(data)


class Interrupts:
    """Ctrl-C and the signals that detach, counted instead of raised, so that no call is torn apart in the middle."""

    def __init__(self) -> None:
        self.count = 0
        self.detach = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            # In a job of ours SIGTERM comes from its own cancel, and its steps go with it.
            in_a_job = "MLFLOW_REMOTE_SUBMISSION_ID" in os.environ
            for name in DETACH_SIGNALS:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    meant = self._interrupt if in_a_job and name == "SIGTERM" else self._detach
                    self._before[number] = signal.signal(number, meant)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def _detach(self, number: int, frame: FrameType | None) -> None:
        self.detach = True


class Follower:
    """Follows one job. ``out`` gets the program's output (None: nobody wants it), ``say`` one line at a time."""

    def __init__(
        self,
        tracking: Tracking,
        compute: Compute | None,
        handle: JobHandle,
        run_id: str,
        *,
        out: TextIO | None = None,
        say: Callable[[str], None] = lambda line: None,
        on_interrupt: str = "cancel",
        grace_period_s: float = 30.0,
    ) -> None:
        self.run_id = run_id
        self.cancelled_here = False
        self._tracking = tracking
        self._compute = compute
        self._handle = handle
        self._say = say
        self._on_interrupt = on_interrupt
        self._grace_period_s = grace_period_s
        self._terminal = Terminal(out) if out is not None else None
        self._told = ""
        self._cause: Diagnosis | None = None  # what befell the running job, as its compute told it
        self._furthest = Phase.CREATING
        self._attempt = 0
        self._silent: dict[str, float] = {}  # who does not answer, and since when; inf: it was told
        self._next_look = 0.0

    def follow(self) -> RunView:
        """Block until the run has its final status, and return the run. Raises Detached if asked to leave before,
        RequestError if the run was deleted."""
        pump = self._pump()
        with Interrupts() as interrupts:
            try:
                view = self._until_ended(interrupts)
            except BaseException:
                self._leave(pump)
                raise
            if pump is not None:
                self._finish(pump, interrupts)
            return self._with_known_cause(view)

    def _with_known_cause(self, view: RunView) -> RunView:
        """The run with the cause in it that we saw, where its runner could only tell that it was stopped."""
        until = time.monotonic() + CAUSE_PATIENCE_S
        while self._compute is not None and is_vague(view):
            with contextlib.suppress(RemoteError):
                status = self._compute.status(self._handle)
                if refine(self._tracking, view, self._cause or afterwards(status)):
                    return self._tracking.view(self.run_id)
                if status.gone:
                    break
            if time.monotonic() > until:
                break
            time.sleep(POLL_S)
        return view

    def _pump(self) -> LogPump | None:
        if self._compute is None and self._terminal is None:
            return None
        pump = LogPump(
            Log(self._tracking, self.run_id, self._compute, self._handle),
            lambda cursor: Log(self._tracking, self.run_id, None, self._handle, cursor),
            self._show,
        )
        pump.start()
        return pump

    def _finish(self, pump: LogPump, interrupts: Interrupts) -> None:
        """Show the rest of the log. Left where it is when somebody asks for that: a screen that nobody reads takes no
        more."""
        asked = interrupts.count
        showing = threading.Thread(target=self._show_the_rest, args=(pump,), name="end of a log", daemon=True)
        showing.start()
        while showing.is_alive() and interrupts.count == asked and not interrupts.detach:
            showing.join(POLL_S)

    def _show_the_rest(self, pump: LogPump) -> None:
        try:
            pump.finish()
        except RemoteError as error:
            self._say(
                f"the log's end may be missing, it cannot be read now: {error} (mlflow-remote logs {self.run_id})"
            )
        self._end_display()

    def _leave(self, pump: LogPump | None) -> None:
        if pump is not None:
            pump.leave()
        ending = threading.Thread(target=self._end_display, name="end of a display", daemon=True)
        ending.start()
        ending.join(LEAVE_S)

    def _show(self, data: bytes) -> None:
        if self._terminal is not None:
            try:
                self._terminal.write(data)
            except (OSError, ValueError):  # the reader left, or the terminal did: the run goes on, and so do we
                self._terminal = None

    def _end_display(self) -> None:
        if self._terminal is not None:
            with contextlib.suppress(OSError, ValueError):
                self._terminal.end()

    def _until_ended(self, interrupts: Interrupts) -> RunView:
        while True:
            self._answer(interrupts)
            status = self._status()
            view = self._look(status)
            if view is not None and view.ended:
                return view
            over = self._compute is None or (status is not None and (status.gone or hopeless(status)))
            if view is not None and view.deleted and over:
                raise RequestError(f"Run {self.run_id} was deleted, so it has no final status.")
            if status is not None and view is not None and over:
                self._see_to_the_end(status)
                continue
            time.sleep(POLL_S)

    def _answer(self, interrupts: Interrupts) -> None:
        if interrupts.detach or interrupts.count > 1 or (interrupts.count and self._on_interrupt == "detach"):
            raise self.detached()
        if interrupts.count and not self.cancelled_here:
            self.cancelled_here = True
            self._say("cancelling … (Ctrl-C again to stop watching)")
            threading.Thread(target=self._cancel, name="cancel", daemon=True).start()

    def _cancel(self) -> None:
        try:
            request_cancel(self._tracking, self._compute, self._handle, self.run_id, self._grace_period_s)
        except RemoteError as error:
            self._say(f"cancelling did not succeed: {error}")

    def detached(self, why: str = "") -> Detached:
        if self.cancelled_here:
            what = f"Stopped watching run {self.run_id}, which is being cancelled."
            return Detached(what, words=why, hint=f"To see its end: mlflow-remote status {self.run_id}")
        return Detached(
            f"Detached from run {self.run_id}, which goes on.",
            words=why,
            hint=f"To come back: mlflow-remote attach {self.run_id}",
        )

    def _status(self) -> JobStatus | None:
        """The compute's word, or None while it cannot be reached."""
        if self._compute is None:
            return None
        try:
            status = self._compute.status(self._handle)
        except RemoteError as error:
            now, patience_s = time.monotonic(), LOGIN_PATIENCE_S if getattr(error, "transient", False) else 0.0
            if error.code != "UNAUTHORIZED":
                self._silent.pop("login", None)
            elif now - self._silent.setdefault("login", now) >= patience_s:
                raise self.detached(f"Your login to the compute is not valid any more. {error.words}") from error
            self._silence("compute", error)
            return None
        self._silent.pop("compute", None)
        self._silent.pop("login", None)
        found = status.diagnosis
        if status.phase in (Phase.RUNNING, Phase.FINALIZING) and found is not None and found.reason in CAUSES_THEN:
            self._cause = found
        self._tell(status)
        return status

    def _silence(self, of: str, error: RemoteError) -> None:
        """Tell, once, when the compute or the tracking server has not answered for a while."""
        since = self._silent.setdefault(of, time.monotonic())
        if time.monotonic() - since > TELL_SILENCE_AFTER_S:
            self._silent[of] = math.inf
            self._say(f"no contact, the run goes on; still trying: {error.what} {error.words}")

    def _tell(self, status: JobStatus) -> None:
        """One line whenever something changes that a person who waits wants to know."""
        back = status.phase.order() < self._furthest.order() and status.attempt == self._attempt
        if back and status.phase is not Phase.QUEUED:
            return  # an old answer, or what is left of a folder that is being removed: only a queue takes a job back
        self._furthest, self._attempt = status.phase, status.attempt
        if status.phase is Phase.DONE or (status.phase is Phase.RUNNING and status.diagnosis is None):
            return
        line = status.detail
        if status.diagnosis is not None and not status.gone:
            line = " ".join(filter(None, (status.diagnosis.message, status.diagnosis.words)))
        line = f"{status.phase.value}: {line}" if line else status.phase.value
        if line != self._told:
            self._told = line
            self._say(harmless(line))

    def _look(self, status: JobStatus | None) -> RunView | None:
        """The run, when there is reason to look at it."""
        ending = status is not None and (status.gone or hopeless(status) or status.phase is Phase.DONE)
        now = time.monotonic()
        if not ending and now < self._next_look:
            return None
        self._next_look = now + TRACKING_POLL_S
        try:
            view = self._tracking.view(self.run_id)
        except RemoteError as error:
            self._silence("tracking", error)
            return None
        self._silent.pop("tracking", None)
        return view

    def _see_to_the_end(self, status: JobStatus) -> None:
        try:
            settle(self._tracking, self._compute, self._handle, self.run_id, status)
        except RemoteError as error:
            self._silence("tracking", error)
        time.sleep(POLL_S)


def hopeless(status: JobStatus) -> bool:
    """The job exists, but it can never run: an image that is not there, a pod that is refused."""
    return status.diagnosis is not None and status.diagnosis.fatal and not status.gone


def settle(tracking: Tracking, compute: Compute | None, handle: JobHandle, run_id: str, status: JobStatus) -> None:
    """End a run whose job is gone or hopeless: by a new runner if that can be, else by writing the status ourselves.

    The status comes first, then the job is removed: a runner that is told to stop then finds the run finalised.
    """
    assert status.gone or hopeless(status), "only on proof"
    if status.gone and compute is not None and compute.recover(handle):
        return
    found = status.diagnosis or Diagnosis(Reason.KILLED_BY_SYSTEM, "The job ended without a final status.")
    if tracking.view(run_id).tag("cancel_requested"):
        found = Diagnosis(Reason.CANCELLED, "Cancelled.", words=found.message)
    tracking.finalise(run_id, found, "follower", exit_code=status.exit_code)
    if compute is None:
        return
    if status.gone:
        compute.collect(handle)
    else:
        compute.cancel(handle)


def is_vague(view: RunView) -> bool:
    """Whether the run has ended and its reason may be told better by somebody who saw more."""
    return view.ended and view.tag("reason") in (each.value for each in VAGUE_REASONS)


def afterwards(status: JobStatus) -> Diagnosis | None:
    """What the compute still shows of why a job ended, where that is certain."""
    found = status.diagnosis
    return found if found is not None and found.reason in CAUSES else None


def refine(tracking: Tracking, view: RunView, found: Diagnosis | None) -> bool:
    """Tell the cause of a run that ended for a vague reason, in tags and ``logs/error.txt``. Never its status.

    True if it did. Raises TrackingError.
    """
    if found is None or not is_vague(view):
        return False
    tracking.refine(view, found)
    return True


def request_cancel(
    tracking: Tracking, compute: Compute | None, handle: JobHandle, run_id: str, grace_period_s: float
) -> None:
    """Ask for the run to be cancelled: by tag, which reaches its runner from anywhere, and at once where possible.

    Idempotent. Blocks until the job has stopped, at most the grace period and some seconds. Raises TrackingError
    only if neither way worked.
    """
    failed: RemoteError | None = None
    try:
        tracking.set_tags(run_id, {PREFIX + "cancel_requested": str(int(time.time()))})
    except RemoteError as error:
        failed = error
    if compute is not None:
        try:
            compute.cancel(handle, grace_period_s=grace_period_s)
            return
        except RemoteError as error:
            failed = failed and error
    if failed is not None:
        raise failed


def stderr_line(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone: no reason to end anything
        print(f"mlflow-remote: {line}", file=sys.stderr, flush=True)
