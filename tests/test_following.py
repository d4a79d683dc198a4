"""The log as a follower puts it together from its two sources."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_remote_backend import compute as computes
from mlflow_remote_backend import follow
from mlflow_remote_backend.compute.base import JobHandle
from mlflow_remote_backend.errors import ComputeError
from mlflow_remote_backend.follow import Follower, Interrupts, Log
from mlflow_remote_backend.job import Diagnosis, JobStatus, LogChunk, Phase, Reason
from mlflow_remote_backend.submitted_run import RemoteSubmittedRun
from mlflow_remote_backend.tracking import RunView

PARTS = {"0": (0, 0, b"one\n"), "1": (0, 4, b"more\n"), "2": (1, 0, b"two\n"), "3": (2, 0, b"th")}


class Tracking:
    def log_index(self, run_id: str) -> list[Any]:
        return [
            SimpleNamespace(path=path, attempt=attempt, offset=offset, end=offset + len(data))
            for path, (attempt, offset, data) in PARTS.items()
        ]

    def read_artifact(self, run_id: str, path: str) -> bytes:
        return PARTS[path][2]


class Compute:
    """Its earlier pods are gone, as after a drain, and with them their live log."""

    def logs(self, handle: JobHandle, *, offset: int, attempt: int, follow: bool) -> list[LogChunk]:
        return [LogChunk(0, b"three\n", 2)]


def test_attempts_whose_pods_are_gone_come_from_the_stored_log() -> None:
    log: Any = Log(Tracking(), "run", Compute(), JobHandle("kubernetes://a/b"))  # type: ignore[arg-type]
    shown = b"".join([*log.live(), *log.stored()])
    assert shown == b"one\nmore\n\n--- attempt 2 ---\ntwo\n\n--- attempt 3 ---\nthree\n"


def test_an_end_that_nobody_reads_can_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `mlflow run … | less`: the screen takes nothing more."""
    monkeypatch.setattr(follow, "FINISH_PATIENCE_S", 0.1)
    read, full = threading.Event(), threading.Event()

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            full.set()
            read.wait(60)
            return len(text)

    handle = JobHandle("kubernetes://a/b")
    follower = Follower(Tracking(), Compute(), handle, "run", out=Screen())  # type: ignore[arg-type]
    pump = follower._pump()
    assert pump is not None
    assert full.wait(10)
    interrupts = Interrupts()
    threading.Timer(0.5, lambda: interrupts._interrupt(2, None)).start()
    follower._finish(pump, interrupts)
    follower._leave(pump)
    assert pump.is_alive()
    read.set()


def test_the_log_of_a_deleted_run_ends_where_nobody_tells_of_its_job() -> None:
    class Deleted(Tracking):
        def view(self, run_id: str) -> RunView:
            tags = {"mlflow_remote.phase": "running"}
            return RunView(run_id, "0", "", "RUNNING", "", None, None, tags, {}, {}, deleted=True)

    run = RemoteSubmittedRun(Deleted(), "run", None, JobHandle("kubernetes://a/b"))  # type: ignore[arg-type]
    assert b"".join(run.log_bytes(follow=True)).startswith(b"one\nmore\n")


class OneRun:
    def __init__(self, phase: str) -> None:
        self.tags = {"mlflow_remote.phase": phase, "mlflow_remote.handle": "kubernetes://a/b"}

    def view(self, run_id: str) -> RunView:
        status = "FAILED" if "mlflow_remote.finalized" in self.tags else "RUNNING"
        return RunView(run_id, "0", "", status, "", None, None, dict(self.tags), {}, {})

    def finalise(self, run_id: str, found: Diagnosis, owner: str, **_: Any) -> None:
        self.tags.update({"mlflow_remote.finalized": owner, "mlflow_remote.reason": found.reason.value})


class Hopeless:
    """Its job can never run, and its pod cannot be removed."""

    def status(self, handle: JobHandle) -> JobStatus:
        return JobStatus(Phase.STARTING, Diagnosis(Reason.IMAGE_PULL, "There is no such image."))

    def cancel(self, handle: JobHandle) -> None:
        raise ComputeError("The pod is still terminating.", transient=True)


@pytest.mark.parametrize("phase", ["queued", "creating"])
def test_who_looks_at_a_run_that_can_never_begin_sees_it_ended(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its submitter died before it could say that the job exists, or the job's pod stays."""
    monkeypatch.setattr(computes, "from_handle", lambda handle: Hopeless())
    run = RemoteSubmittedRun(OneRun(phase), "run", Hopeless(), JobHandle("kubernetes://a/b"))  # type: ignore[arg-type]
    assert run.get_status() == "FAILED"
    assert run.reason == "IMAGE_PULL"
