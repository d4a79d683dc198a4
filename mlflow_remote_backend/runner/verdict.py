"""What the records of a finished job say about how it ended. Pure: records in, verdict out."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from ..job import Limits, Reason, Retry, final_status
from .spool import ExitRecord, Prepared, Vitals

#: Share of the memory limit beyond which an unexplained SIGKILL is taken for the limit's. Growth of the last 0.1 s is
#: not in the figure, and what the kernel could have given back is left out of it.
NEAR_LIMIT = 0.9

_SIGNAL_WORDS = {
    "SIGSEGV": "segmentation fault",
    "SIGABRT": "abort",
    "SIGBUS": "bus error",
    "SIGFPE": "arithmetic error",
    "SIGILL": "illegal instruction",
    "SIGTERM": "termination requested",
    "SIGINT": "interrupt",
    "SIGPIPE": "broken pipe",
    "SIGHUP": "hangup",
    "SIGUSR1": "user signal 1",
    "SIGUSR2": "user signal 2",
}
_EXIT_WORDS = {
    126: "a command was found but cannot be executed: no execute permission, or not for this machine",
    127: "a command was not found",
}
#: Reasons that ``retry: on: disruption`` covers as far as a runner can tell them; a compute may know more.
DISRUPTIONS = frozenset(
    {Reason.TERMINATED, Reason.KILLED_BY_SYSTEM, Reason.EVICTED, Reason.PREEMPTED, Reason.NODE_LOST}
)


@dataclass(frozen=True)
class Verdict:
    """How the job ended. ``message``: one sentence for a person; ``words``: another system's; ``hint``: what next."""

    reason: Reason
    message: str
    exit_code: int | None = None
    words: str = ""
    hint: str = ""

    @property
    def status(self) -> str:
        """MLflow's terminal status."""
        return final_status(self.reason)


def classify(
    exit_record: ExitRecord | None,
    vitals: Vitals | None,
    prepared: Prepared | None,
    *,
    cancel_requested: bool,
    limits: Limits | None = None,
) -> Verdict:
    """The verdict. ``exit_record`` None: execute was killed, or never started; then vitals and prepare tell the rest.

    A program that ended by itself before a requested cancel reached it is judged by its exit code.
    """
    limits = limits or Limits()
    if exit_record is None:
        return _without_exit(vitals, prepared, cancel_requested)
    if exit_record.error is not None:
        return _not_started(exit_record, exit_record.error)
    code = exit_record.exit_code
    if exit_record.stopped_by == "cancel" or (exit_record.stopped_by == "signal" and cancel_requested):
        return Verdict(Reason.CANCELLED, f"Cancelled; the program {_ended(exit_record, limits)}.", code)
    if exit_record.timed_out:
        limit = "its timeout" if limits.timeout_s is None else f"its timeout of {_seconds(limits.timeout_s)}"
        message = f"The program ran longer than {limit} and {_ended(exit_record, limits)}."
        return Verdict(Reason.TIMEOUT, message, code, hint="Set a longer timeout, or none.")
    if code == 0:
        return Verdict(Reason.OK, "The program exited with code 0.", 0)
    return _failed(exit_record, limits)


def _not_started(exit_record: ExitRecord, error: object) -> Verdict:
    assert isinstance(error, dict)
    reason = Reason(error["code"]) if error.get("code") in Reason.__members__ else Reason.BOOTSTRAP
    message = str(error.get("message", "The program could not be started."))
    return Verdict(reason, message, exit_record.exit_code, str(error.get("words", "")), str(error.get("hint", "")))


def _failed(exit_record: ExitRecord, limits: Limits) -> Verdict:
    code = exit_record.exit_code
    if exit_record.stopped_by == "signal" or code == 128 + signal.SIGTERM:
        ended = _ended(exit_record, limits)
        message = f"Stopped from outside by SIGTERM, which nobody had asked for; the program {ended}."
        return Verdict(Reason.TERMINATED, message, code)
    if code == 128 + signal.SIGKILL:
        return _killed(exit_record)
    number = code - 128
    if exit_record.signal is not None or _signal(number) in _SIGNAL_WORDS:
        name = _signal_name(exit_record.signal or number)
        return Verdict(Reason.USER_ERROR, f"The program was ended by signal {name}, exit code {code}.", code)
    explained = f": {_EXIT_WORDS[code]}" if code in _EXIT_WORDS else ""
    message = f"The program exited with code {code}{explained}."
    if exit_record.oom_kills:
        message += f" The memory limit{_of(exit_record.memory_limit_bytes)} had killed a process of it."
    return Verdict(Reason.USER_ERROR, message, code)


def _killed(exit_record: ExitRecord) -> Verdict:
    peak, limit = exit_record.memory_peak_bytes, exit_record.memory_limit_bytes
    if exit_record.oom_kills or (exit_record.oom_kills is None and _near(peak, limit)):
        return _out_of_memory(peak, limit, exit_record.exit_code)
    message = "The program was killed by SIGKILL, exit code 137 (not by a memory limit that we can see)."
    return Verdict(Reason.KILLED_BY_SYSTEM, message, exit_record.exit_code)


def _out_of_memory(use: int | None, limit: int | None, code: int | None) -> Verdict:
    of = _of(limit) if limit else ""
    seen = f"; last seen use {_mebibytes(use)}" if use else ""
    what = f"the container's memory limit{of}" if limit else "the system, which had run out of memory"
    hint = "Ask for more in resources: memory, or let the program use less."
    return Verdict(Reason.OOM, f"Killed by {what}{seen}.", code, hint=hint)


def _without_exit(vitals: Vitals | None, prepared: Prepared | None, cancel_requested: bool) -> Verdict:
    if prepared is not None and prepared.failed and not cancel_requested:
        failed = prepared.failed
        reason = Reason(failed["reason"]) if failed.get("reason") in Reason.__members__ else Reason.BOOTSTRAP
        return Verdict(reason, failed.get("message", ""), None, failed.get("words", ""), failed.get("hint", ""))
    if cancel_requested:
        return Verdict(Reason.CANCELLED, "Cancelled." if vitals else "Cancelled before the program started.")
    if vitals is None:
        return Verdict(Reason.KILLED_BY_SYSTEM, "The job was ended from outside before its program started.")
    if vitals.oom_kills or _near(vitals.memory_bytes, vitals.memory_limit_bytes):
        return _out_of_memory(vitals.memory_bytes, vitals.memory_limit_bytes, None)
    if any(each.get("signal") == signal.SIGTERM for each in vitals.signals):
        message = "Stopped from outside by SIGTERM, which nobody had asked for, and killed before it had ended."
        return Verdict(Reason.TERMINATED, message)
    used, limit = vitals.memory_bytes, vitals.memory_limit_bytes
    memory = f" (memory: {_mebibytes(used)}{_of(limit)})" if used and limit else ""  # else it is the whole machine's
    return Verdict(Reason.KILLED_BY_SYSTEM, f"The program and our runner with it were killed at once{memory}.")


def will_retry(verdict: Verdict, retry: Retry, attempt: int) -> bool:
    """Whether this failed attempt (they count from 0) is to be followed by another one."""
    if attempt + 1 >= retry.max_attempts or verdict.reason in (Reason.OK, Reason.CANCELLED, Reason.TIMEOUT):
        return False
    if verdict.reason is Reason.OOM and "oom" in retry.on:
        return True
    if verdict.reason in DISRUPTIONS and "disruption" in retry.on:
        return True
    return verdict.exit_code is not None and verdict.exit_code in retry.exit_codes


def taken_back(verdict: Verdict, queue: str) -> bool:
    """Whether the job's queue may have stopped it, to start it again later: more than that is not seen from inside."""
    return bool(queue) and verdict.reason in (Reason.TERMINATED, Reason.KILLED_BY_SYSTEM)


# -------------------------------------------------------------------------------------------------------------- words


def _ended(exit_record: ExitRecord, limits: Limits) -> str:
    if exit_record.killed:
        return f"did not end within its grace period of {_seconds(limits.grace_period_s)} and was killed"
    return f"ended with exit code {exit_record.exit_code}"


def _near(use: int | None, limit: int | None) -> bool:
    return bool(use and limit and use >= limit * NEAR_LIMIT)


def _signal(number: int) -> str:
    """The signal's name; empty for a number that is none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""


def _signal_name(number: int) -> str:
    name = _signal(number)
    words = _SIGNAL_WORDS.get(name)
    return f"{name} ({words})" if words else name or str(number)


def _of(limit: int | None) -> str:
    return f" of {_mebibytes(limit)}" if limit else ""


def _mebibytes(size: int | None) -> str:
    return f"{(size or 0) / (1 << 20):,.0f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:g} s"
