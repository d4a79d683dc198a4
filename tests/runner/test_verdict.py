"""The table of verdicts: what the records say, and what a person is told."""

from __future__ import annotations

from typing import Any

import pytest

from mlflow_remote_backend.job import Limits, Reason, Retry
from mlflow_remote_backend.runner.spool import ExitRecord, Prepared, Vitals
from mlflow_remote_backend.runner.verdict import Verdict, classify, will_retry

MIB = 1 << 20
TERM = ({"signal": 15, "at": 1.0},)


def judged(
    exit_record: ExitRecord | None = None,
    vitals: Vitals | None = None,
    prepared: Prepared | None = None,
    cancel: bool = False,
) -> Verdict:
    limits = Limits(timeout_s=90, grace_period_s=5)
    return classify(exit_record, vitals, prepared, cancel_requested=cancel, limits=limits)


@pytest.mark.parametrize(
    ("record", "cancel", "reason", "status", "words"),
    [
        # the exit code is the authority
        ({"exit_code": 0}, False, "OK", "FINISHED", "code 0"),
        ({"exit_code": 1}, False, "USER_ERROR", "FAILED", "code 1."),
        ({"exit_code": 126}, False, "USER_ERROR", "FAILED", "cannot be executed"),
        ({"exit_code": 127}, False, "USER_ERROR", "FAILED", "not found"),
        ({"exit_code": 255}, False, "USER_ERROR", "FAILED", "code 255"),
        # signals have names, whether the program died of them or its shell tells of it
        ({"exit_code": 139, "signal": 11}, False, "USER_ERROR", "FAILED", "SIGSEGV (segmentation fault)"),
        ({"exit_code": 139}, False, "USER_ERROR", "FAILED", "SIGSEGV"),
        ({"exit_code": 134, "signal": 6}, False, "USER_ERROR", "FAILED", "SIGABRT"),
        ({"exit_code": 130}, False, "USER_ERROR", "FAILED", "SIGINT"),
        ({"exit_code": 165, "signal": 37}, False, "USER_ERROR", "FAILED", "37"),
        ({"exit_code": 200}, False, "USER_ERROR", "FAILED", "code 200"),
        # cancelled: only where the wish reached the program
        ({"exit_code": 143, "signal": 15, "stopped_by": "cancel"}, True, "CANCELLED", "KILLED", "Cancelled"),
        ({"exit_code": 0, "stopped_by": "cancel"}, True, "CANCELLED", "KILLED", "exit code 0"),
        ({"exit_code": 137, "stopped_by": "cancel", "killed": True}, True, "CANCELLED", "KILLED", "5 s and was killed"),
        ({"exit_code": 143, "stopped_by": "signal", "signals": TERM}, True, "CANCELLED", "KILLED", "Cancelled"),
        ({"exit_code": 0}, True, "OK", "FINISHED", "code 0"),
        ({"exit_code": 4}, True, "USER_ERROR", "FAILED", "code 4"),
        # time
        ({"exit_code": 143, "stopped_by": "timeout", "timed_out": True}, False, "TIMEOUT", "FAILED", "90 s"),
        ({"exit_code": 0, "stopped_by": "timeout", "timed_out": True}, False, "TIMEOUT", "FAILED", "90 s"),
        # stopped from outside
        (
            {"exit_code": 143, "stopped_by": "signal", "signals": TERM},
            False,
            "TERMINATED",
            "FAILED",
            "nobody had asked",
        ),
        ({"exit_code": 1, "stopped_by": "signal", "signals": TERM}, False, "TERMINATED", "FAILED", "exit code 1"),
        ({"exit_code": 137, "stopped_by": "signal", "killed": True}, False, "TERMINATED", "FAILED", "was killed"),
        ({"exit_code": 143, "signal": 15}, False, "TERMINATED", "FAILED", "SIGTERM"),
        ({"exit_code": 0, "stopped_by": "signal"}, False, "OK", "FINISHED", "code 0"),
        # 137 is the memory limit's only where memory says so
        ({"exit_code": 137, "signal": 9}, False, "KILLED_BY_SYSTEM", "FAILED", "not by a memory limit"),
        ({"exit_code": 137, "signal": 9, "oom_kills": 0}, False, "KILLED_BY_SYSTEM", "FAILED", "SIGKILL"),
        (
            {"exit_code": 137, "oom_kills": 0, "memory_peak_bytes": 127 * MIB, "memory_limit_bytes": 128 * MIB},
            False,
            "KILLED_BY_SYSTEM",
            "FAILED",
            "SIGKILL",
        ),
        (
            {"exit_code": 137, "oom_kills": 1, "memory_peak_bytes": 90 * MIB, "memory_limit_bytes": 128 * MIB},
            False,
            "OOM",
            "FAILED",
            "memory limit of 128 MiB; last seen use 90 MiB",
        ),
        ({"exit_code": 137, "oom_kills": 2}, False, "OOM", "FAILED", "run out of memory"),
        (
            {"exit_code": 137, "oom_kills": None, "memory_peak_bytes": 127 * MIB, "memory_limit_bytes": 128 * MIB},
            False,
            "OOM",
            "FAILED",
            "128 MiB",
        ),
        (
            {"exit_code": 1, "oom_kills": 1, "memory_limit_bytes": 128 * MIB},
            False,
            "USER_ERROR",
            "FAILED",
            "memory limit of 128 MiB had killed a process",
        ),
        # never started
        (
            {"exit_code": 127, "error": {"code": "BOOTSTRAP", "message": "No such file"}},
            False,
            "BOOTSTRAP",
            "FAILED",
            "No such",
        ),
        (
            {"exit_code": 143, "error": {"code": "CANCELLED", "message": "before"}},
            True,
            "CANCELLED",
            "KILLED",
            "before",
        ),
        ({"exit_code": 126, "error": {"code": "OTHER", "message": "odd"}}, False, "BOOTSTRAP", "FAILED", "odd"),
    ],
)
def test_what_an_exit_record_says(record: dict[str, Any], cancel: bool, reason: str, status: str, words: str) -> None:
    verdict = judged(ExitRecord(**record), cancel=cancel)
    assert (verdict.reason.value, verdict.status) == (reason, status)
    assert words in verdict.message
    assert verdict.exit_code == record["exit_code"]
    assert verdict.message.endswith((".", "before", "odd", "file"))


@pytest.mark.parametrize(
    ("vitals", "prepared", "cancel", "reason", "words"),
    [
        (None, None, False, "KILLED_BY_SYSTEM", "before its program started"),
        (None, None, True, "CANCELLED", "before the program started"),
        (None, {"failed": {"reason": "ENVIRONMENT", "message": "no such package"}}, False, "ENVIRONMENT", "no such"),
        (None, {"failed": {"reason": "SNAPSHOT_CORRUPT", "message": "bad"}}, False, "SNAPSHOT_CORRUPT", "bad"),
        (None, {"failed": {"reason": "unheard of", "message": "bad"}}, False, "BOOTSTRAP", "bad"),
        (None, {"failed": {"reason": "ENVIRONMENT", "message": "x"}}, True, "CANCELLED", "Cancelled"),
        ({}, {}, False, "KILLED_BY_SYSTEM", "killed at once"),
        (
            {"memory_bytes": 50 * MIB, "memory_limit_bytes": 128 * MIB},
            {},
            False,
            "KILLED_BY_SYSTEM",
            "50 MiB of 128 MiB",
        ),
        ({"memory_bytes": 120 * MIB, "memory_limit_bytes": 128 * MIB}, {}, False, "OOM", "128 MiB"),
        ({"oom_kills": 1, "memory_limit_bytes": 128 * MIB}, {}, False, "OOM", "128 MiB"),
        ({"signals": TERM}, {}, False, "TERMINATED", "SIGTERM"),
        ({"signals": ({"signal": 1, "at": 1.0},)}, {}, False, "KILLED_BY_SYSTEM", "killed"),
        ({"signals": TERM}, {}, True, "CANCELLED", "Cancelled"),
    ],
)
def test_what_is_said_without_an_exit_record(
    vitals: dict[str, Any] | None, prepared: dict[str, Any] | None, cancel: bool, reason: str, words: str
) -> None:
    verdict = judged(
        None,
        None if vitals is None else Vitals(**vitals),
        None if prepared is None else Prepared(**prepared),
        cancel,
    )
    assert verdict.reason.value == reason
    assert words in verdict.message
    assert verdict.status != "FINISHED", "a job that vanished is never finished"


@pytest.mark.parametrize(
    ("reason", "code", "retry", "attempt", "expected"),
    [
        (Reason.OOM, 137, Retry(3, ("oom",)), 0, True),
        (Reason.OOM, 137, Retry(3, ("oom",)), 2, False),
        (Reason.OOM, 137, Retry(3, ("disruption",)), 0, False),
        (Reason.TERMINATED, 143, Retry(2, ("disruption",)), 0, True),
        (Reason.KILLED_BY_SYSTEM, None, Retry(2, ("disruption",)), 0, True),
        (Reason.USER_ERROR, 17, Retry(2, (), (17,)), 0, True),
        (Reason.USER_ERROR, 18, Retry(2, (), (17,)), 0, False),
        (Reason.USER_ERROR, 17, Retry(1, ("oom", "disruption"), (17,)), 0, False),
        (Reason.CANCELLED, 143, Retry(2, ("disruption",), (143,)), 0, False),
        (Reason.TIMEOUT, 143, Retry(2, ("disruption",), (143,)), 0, False),
        (Reason.OK, 0, Retry(2, ("disruption",), (0,)), 0, False),
    ],
)
def test_who_is_tried_again(reason: Reason, code: int | None, retry: Retry, attempt: int, expected: bool) -> None:
    assert will_retry(Verdict(reason, "", code), retry, attempt) is expected
