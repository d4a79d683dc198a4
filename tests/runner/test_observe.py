"""From a running program to a finished run: real programs under execute, real stores, real outages."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import pytest
from execution import Execution, Starter
from faults import FaultProxy, is_artifact

from mlflow_remote_backend.job import EntryPoint, EnvironmentRef, JobSpec, Limits, Retry, RunRef, SnapshotRef
from mlflow_remote_backend.runner import envelope
from mlflow_remote_backend.runner import observe as observe_module
from mlflow_remote_backend.runner.finalise import Outcome, finish
from mlflow_remote_backend.runner.frames import parse_frame
from mlflow_remote_backend.runner.observe import EXIT_PENDING, EXIT_RETRY, observe
from mlflow_remote_backend.runner.outputs import storable
from mlflow_remote_backend.runner.parts import load_index
from mlflow_remote_backend.runner.record import RunRecord, persist
from mlflow_remote_backend.runner.spool import Prepared, Spool

Until = Callable[..., Any]


@pytest.fixture(params=["sqlite", "server"])
def run(request: pytest.FixtureRequest) -> RunRef:
    return request.getfixturevalue(f"{request.param}_run")


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe_module, "LOOK_S", 0.2)


def spec_of(run: RunRef, **changes: Any) -> JobSpec:
    spec = JobSpec(
        run,
        "submission",
        "project",
        EntryPoint("main", "…"),
        {},
        SnapshotRef("sha256:" + "0" * 64, 1),
        EnvironmentRef("uv", lock_key="lock-1"),
        limits=Limits(grace_period_s=5, finalize_timeout_s=60),
    )
    return dataclasses.replace(spec, **changes)


@dataclass
class Observed:
    """A program under execute, and a thread that observes it."""

    execution: Execution
    spec: JobSpec
    options: dict[str, Any]
    phases: list[str] = field(default_factory=list)
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._observe, daemon=True)
        self.thread.start()

    def _observe(self) -> None:
        self.outcome = observe(
            self.spec,
            self.execution.spool.path,
            RunRecord(self.spec.run),
            **{
                "alive": lambda: self.execution.process.poll() is None,
                "on_phase": self.phases.append,
                **self.options,
            },
        )

    def ended(self, timeout_s: float = 90) -> Outcome:
        self.thread.join(timeout_s)
        assert self.outcome is not None, f"observe did not end within {timeout_s} s"
        return self.outcome


@pytest.fixture
def start(execute_py: Starter) -> Callable[..., Observed]:
    """``start(run, script, spec=…, **options of observe)``: both sides of a job, started."""

    def start(
        run: RunRef,
        script: str,
        *,
        spec: dict[str, Any] | None = None,
        command: dict[str, Any] | None = None,
        **options: Any,
    ) -> Observed:
        execution = execute_py(script, **{"grace_period_s": 5, **(command or {})})
        execution.spool.write_prepared(Prepared(None, {"environment": 1.25}))
        return Observed(execution, spec_of(run, **(spec or {})), options)

    return start


def client(run: RunRef) -> Any:
    import mlflow

    return mlflow.MlflowClient(run.tracking_uri)


@dataclass(frozen=True)
class Left:
    """What a run holds in the end."""

    status: str
    tags: dict[str, str]
    metrics: dict[str, float]
    artifacts: dict[str, bytes]

    @property
    def log(self) -> bytes:
        parts = load_index(self.artifacts.get("logs/index.json"))
        return b"".join(self.artifacts[part.path] for part in parts)


def left_of(run: RunRef, folder: Path) -> Left:
    ours = client(run)
    found = ours.get_run(run.run_id)
    tags = {k.removeprefix("mlflow_remote."): v for k, v in found.data.tags.items() if k.startswith("mlflow_remote.")}
    target = folder / f"left-{len(list(folder.glob('left-*')))}"
    target.mkdir()
    artifacts = {}
    if ours.list_artifacts(run.run_id):
        ours.download_artifacts(run.run_id, "", str(target))
        artifacts = {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    return Left(found.info.status, tags, found.data.metrics, artifacts)


# --------------------------------------------------------------------------------------------------- a run's end


def test_a_good_run_holds_everything(run: RunRef, start: Callable[..., Observed], tmp_path: Path) -> None:
    observed = start(run, r"printf 'hello\xff\0\r'; mkdir -p outputs/deep; echo data > outputs/deep/file; exit 0")
    outcome = observed.ended()
    left = left_of(run, tmp_path)
    assert outcome.finalized
    assert not outcome.pending
    assert left.status == "FINISHED"
    assert left.tags["finalized"] == left.tags["owner"]
    assert {k: v for k, v in left.tags.items() if k not in ("finalized", "owner")} == {
        "attempt": "0",
        "exit_code": "0",
        "message": "The program exited with code 0.",
        "phase": "done",
        "reason": "OK",
    }
    assert {"remote/seconds_environment", "remote/seconds_run", "remote/seconds_upload"} <= set(left.metrics)
    assert set(left.artifacts) == {"logs/std_log.txt", "logs/index.json", "outputs/deep/file"}
    assert left.log == b"hello\xff\0\r"
    assert observed.phases == ["running", "finalizing", "done"]


def test_a_failed_run_holds_its_error_and_its_outputs(
    run: RunRef, start: Callable[..., Observed], tmp_path: Path
) -> None:
    program = "import os; os.makedirs('outputs'); open('outputs/half', 'w').write('x'); {}['missing']"
    observed = start(run, f'echo before; {sys.executable} -c "{program}"')
    observed.ended()
    left = left_of(run, tmp_path)
    assert (left.status, left.tags["reason"], left.tags["exit_code"]) == ("FAILED", "USER_ERROR", "1")
    assert left.artifacts["outputs/half"] == b"x"
    error = left.artifacts["logs/error.txt"].decode()
    assert error.startswith("USER_ERROR: The program exited with code 1.")
    assert error.endswith("KeyError: 'missing'\n")


def test_the_exit_code_wins_over_what_the_users_code_wrote(
    run: RunRef, start: Callable[..., Observed], tmp_path: Path
) -> None:
    observed = start(run, "echo started; while [ ! -e go ]; do sleep 0.05; done; exit 3")
    observed.execution.until_log_has(b"started")
    client(run).set_terminated(run.run_id, "FINISHED")
    (tmp_path / "go").touch()
    observed.ended()
    left = left_of(run, tmp_path)
    assert (left.status, left.tags["exit_code"]) == ("FAILED", "3")


def test_while_it_runs_the_run_says_so(run: RunRef, start: Callable[..., Observed], until: Until) -> None:
    observed = start(run, "echo started; while [ ! -e go ]; do sleep 0.05; done", owner="runner:me")
    record = RunRecord(run)
    until(lambda: record.look().tags.get("phase") == "running")
    tags = record.look().tags
    assert (tags["owner"], tags["attempt"]) == ("runner:me", "0")
    assert "finalized" not in tags
    (observed.execution.spool.path.parent / "go").touch()
    observed.ended()
    assert record.look().tags["finalized"] == "runner:me"


def test_outputs_that_cannot_be_stored_are_named_and_harm_nobody(
    sqlite_run: RunRef, start: Callable[..., Observed], tmp_path: Path
) -> None:
    script = "mkdir outputs; echo x > outputs/good; ln -s /etc/passwd outputs/evil; mkfifo outputs/pipe; exit 0"
    observed = start(sqlite_run, script)
    assert observed.ended().finalized
    left = left_of(sqlite_run, tmp_path)
    assert (left.status, left.tags["reason"]) == ("FINISHED", "OK")
    assert "outputs/evil" in left.tags["message"]
    named = left.artifacts["remote/outputs_not_stored.txt"].decode()
    assert "outputs/evil: " in named
    assert "outputs/pipe: " in named
    assert set(left.artifacts) & {"outputs/good", "outputs/evil", "outputs/pipe"} == {"outputs/good"}


def test_files_with_odd_names_are_stored(server_run: RunRef, start: Callable[..., Observed], tmp_path: Path) -> None:
    names = ["ünï 🦀", "a b", "50%", "x#y?z&w", "x", "-rf", "..hidden", "new\nline", "sem;i", "'\"", "x" * 200, "%2e"]
    (tmp_path / "outputs").mkdir()
    for name in names:
        (tmp_path / "outputs" / name).write_text(name)
    (tmp_path / "outputs" / os.fsdecode(b"bad\xff")).write_text("x")
    start(server_run, "find outputs -type f -exec touch {} +").ended()
    left = left_of(server_run, tmp_path)
    assert left.status == "FINISHED"
    assert "remote/outputs_not_stored.txt" not in left.artifacts
    renamed = left.artifacts["remote/outputs_renamed.txt"].decode()
    for name in names:
        stored = storable(name)
        assert left.artifacts[f"outputs/{stored}"] == name.encode()
        assert stored == name or f" is stored as outputs/{stored}\n" in renamed
    assert left.artifacts["outputs/bad~FF"] == b"x"


def test_a_job_whose_preparation_failed_is_finalised_with_its_reason(
    run: RunRef, tmp_path: Path, execute_py: Starter
) -> None:
    spool = Spool.create(tmp_path / "spool")
    failed = {
        "reason": "ENVIRONMENT",
        "message": "No numpy 99.",
        "words": "solver: nothing fits",
        "hint": "Ask for less.",
    }
    spool.write_prepared(Prepared(failed, {"snapshot": 0.5}))
    outcome = observe(spec_of(run), spool.path, RunRecord(run), alive=lambda: True)
    left = left_of(run, tmp_path)
    assert outcome.finalized
    assert (left.status, left.tags["reason"], left.tags["message"]) == ("FAILED", "ENVIRONMENT", "No numpy 99.")
    assert "solver: nothing fits" in left.artifacts["logs/error.txt"].decode()
    assert left.metrics["remote/seconds_snapshot"] == 0.5


def test_a_job_that_vanished_before_its_start_is_failed(sqlite_run: RunRef, tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "spool")
    outcome = observe(spec_of(sqlite_run), spool.path, RunRecord(sqlite_run), alive=lambda: False)
    assert outcome.finalized
    left = left_of(sqlite_run, tmp_path)
    assert (left.status, left.tags["reason"]) == ("FAILED", "KILLED_BY_SYSTEM")


def test_a_program_killed_with_its_runner_is_failed_and_its_log_is_kept(
    run: RunRef, start: Callable[..., Observed], tmp_path: Path
) -> None:
    observed = start(run, "seq 1000; echo started; sleep 3600")
    observed.execution.until_log_has(b"started")
    observed.execution.kill()
    assert observed.ended().finalized
    left = left_of(run, tmp_path)
    assert (left.status, left.tags["reason"]) == ("FAILED", "KILLED_BY_SYSTEM")
    assert left.log.endswith(b"1000\nstarted\n")  # and the fixture looks for the program that execute left behind


def test_a_program_whose_runner_seemed_dead_for_a_moment_is_watched_to_its_end(
    sqlite_run: RunRef, start: Callable[..., Observed], tmp_path: Path
) -> None:
    begin = time.monotonic()
    observed = start(sqlite_run, "sleep 4; echo end", alive=lambda: not 0.5 < time.monotonic() - begin < 1.0)
    observed.ended()
    left = left_of(sqlite_run, tmp_path)
    assert (left.status, left.log) == ("FINISHED", b"end\n")


# ------------------------------------------------------------------------------------------------------- stopping


def test_a_cancel_that_a_full_disk_keeps_back_comes_later(
    sqlite_run: RunRef, start: Callable[..., Observed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe_module, "LOOK_S", 0.2)
    original, refused = Spool.request_cancel, []

    def full(spool: Spool) -> None:
        if len(refused) < 2:
            refused.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")
        original(spool)

    monkeypatch.setattr(Spool, "request_cancel", full)
    observed = start(sqlite_run, "sleep 600")
    client(sqlite_run).set_tag(sqlite_run.run_id, "mlflow_remote.cancel_requested", "1")
    observed.ended(60)
    assert client(sqlite_run).get_run(sqlite_run.run_id).info.status == "KILLED"


def test_a_cancel_by_tag_reaches_the_program(
    run: RunRef, start: Callable[..., Observed], tmp_path: Path, quick_looks: None
) -> None:
    observed = start(run, "trap 'echo saved; exit 0' TERM; echo started; while :; do sleep 0.05; done")
    observed.execution.until_log_has(b"started")
    client(run).set_tag(run.run_id, "mlflow_remote.cancel_requested", "1")
    observed.ended()
    left = left_of(run, tmp_path)
    assert (left.status, left.tags["reason"]) == ("KILLED", "CANCELLED")
    assert left.log.endswith(b"saved\n")
    assert "logs/error.txt" not in left.artifacts, "a cancel is no failure"


def test_a_run_that_is_deleted_takes_its_program_with_it(
    run: RunRef, start: Callable[..., Observed], quick_looks: None
) -> None:
    observed = start(run, "echo started; sleep 3600")
    observed.execution.until_log_has(b"started")
    client(run).delete_run(run.run_id)
    outcome = observed.ended()
    assert outcome.gone
    assert not outcome.finalized
    assert observed.execution.wait().stopped_by == "cancel"


@pytest.mark.parametrize("when", ["while it runs", "when it ends"])
def test_a_server_that_does_not_know_the_run_for_a_while_stops_and_loses_nothing(
    sqlite_run: RunRef, start: Callable[..., Observed], tmp_path: Path, quick_looks: None, when: str
) -> None:
    """Such as one that was started with another database."""
    stop = tmp_path / "stop"
    observed = start(sqlite_run, f"echo started; while [ ! -e {stop} ]; do sleep 0.05; done; exit 3")
    observed.execution.until_log_has(b"started")
    with sqlite3.connect(sqlite_run.tracking_uri.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE runs SET run_uuid = 'hidden'")
    if when == "when it ends":
        stop.touch()
        observed.execution.wait()
    time.sleep(3)
    with sqlite3.connect(sqlite_run.tracking_uri.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE runs SET run_uuid = ?", (sqlite_run.run_id,))
    stop.touch()
    assert observed.ended().finalized
    left = left_of(sqlite_run, tmp_path)
    assert (left.status, left.tags["exit_code"], left.log) == ("FAILED", "3", b"started\n")


def test_a_run_that_somebody_ended_stops_its_program(
    sqlite_run: RunRef, start: Callable[..., Observed], tmp_path: Path, quick_looks: None
) -> None:
    observed = start(sqlite_run, "echo started; sleep 3600")
    observed.execution.until_log_has(b"started")
    client(sqlite_run).set_terminated(sqlite_run.run_id, "FAILED")
    client(sqlite_run).set_tag(sqlite_run.run_id, "mlflow_remote.finalized", "follower")
    assert observed.ended().finalized
    left = left_of(sqlite_run, tmp_path)
    assert (left.status, left.tags["finalized"]) == ("FAILED", "follower")
    assert "CANCELLED" in left.tags["conflict"]
    assert left.log == b"started\n", "what there is to store is stored all the same"


def test_a_follower_that_was_right_about_the_status_may_be_told_the_cause(sqlite_run: RunRef, tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "spool")
    spool.write_prepared(Prepared({"reason": "ENVIRONMENT", "message": "No numpy 99."}))
    record = RunRecord(sqlite_run)
    record.log({"reason": "KILLED_BY_SYSTEM", "finalized": "follower"})
    record.end("FAILED")
    assert finish(spec_of(sqlite_run), spool.path, record).finalized
    left = left_of(sqlite_run, tmp_path)
    assert (left.status, left.tags["reason"], left.tags["finalized"]) == ("FAILED", "ENVIRONMENT", "follower")


@pytest.mark.parametrize("asked", [False, True], ids=["told by SIGTERM", "told by the run"])
def test_a_runner_that_knows_less_than_who_ended_the_run_adds_nothing(
    sqlite_run: RunRef, tmp_path: Path, asked: bool
) -> None:
    """The image is not there: a follower says so, ends the run and deletes the pod, which the sidecar notices."""
    spool = Spool.create(tmp_path / "spool")
    spool.write_prepared(Prepared())
    if asked:
        spool.request_cancel()
    record = RunRecord(sqlite_run)
    record.log({"reason": "IMAGE_PULL", "message": "No such image.", "finalized": "follower"})
    record.upload(b"IMAGE_PULL: No such image.", "logs/error.txt")
    record.end("FAILED")
    assert finish(spec_of(sqlite_run), spool.path, record).finalized
    left = left_of(sqlite_run, tmp_path)
    assert (left.status, left.tags["reason"], left.tags["message"]) == ("FAILED", "IMAGE_PULL", "No such image.")
    assert left.artifacts["logs/error.txt"] == b"IMAGE_PULL: No such image."
    assert "conflict" not in left.tags


def test_of_two_runners_the_later_one_owns_the_end(
    sqlite_run: RunRef, start: Callable[..., Observed], until: Until
) -> None:
    observed = start(sqlite_run, "while [ ! -e go ]; do sleep 0.05; done; exit 3", owner="runner:first")
    record = RunRecord(sqlite_run)
    until(lambda: record.look().tags.get("owner") == "runner:first")
    record.log({"owner": "runner:second"})
    (observed.execution.spool.path.parent / "go").touch()
    outcome = observed.ended()
    assert not outcome.finalized
    assert record.look().status == "RUNNING"
    assert "runner:second" in outcome.pending[0]


# --------------------------------------------------------------------------------------------- the server is away

OUTAGES: dict[str, Callable[[FaultProxy], object]] = {
    "refused": lambda proxy: proxy.refuse(),
    "500": lambda proxy: proxy.fail(500),
    "401": lambda proxy: proxy.fail(401),
    "artifacts 503": lambda proxy: proxy.fail(503, is_artifact),
    "lost answers": lambda proxy: proxy.fail(0, reaches=True),
}


@contextlib.contextmanager
def outage(proxy: FaultProxy, kind: str) -> Iterator[None]:
    OUTAGES[kind](proxy)
    try:
        yield
    finally:
        if kind == "refused":
            proxy.listen()
        else:
            proxy.mend()


@pytest.mark.parametrize("kind", OUTAGES)
def test_an_outage_up_to_after_the_end_costs_nothing(
    server_run: RunRef, proxy: FaultProxy, start: Callable[..., Observed], tmp_path: Path, kind: str
) -> None:
    script = (
        "seq 20000; mkdir outputs; echo x > outputs/file; while [ ! -e go ]; do sleep 0.05; done; seq 20000; exit 4"
    )
    observed = start(server_run, script)
    observed.execution.until_log_has(b"20000\n")
    with outage(proxy, kind):
        (tmp_path / "go").touch()
        assert observed.execution.wait().exit_code == 4, "the program does not notice"
        observed.thread.join(1.5)
        assert observed.thread.is_alive()
    assert observed.ended().finalized
    left = left_of(server_run, tmp_path)
    assert (left.status, left.tags["exit_code"]) == ("FAILED", "4")
    assert left.log == b"".join(b"%d\n" % i for i in range(1, 20001)) * 2
    assert left.artifacts["outputs/file"] == b"x\n"


def test_a_server_that_does_not_answer_holds_nobody_but_us(
    server_run: RunRef, proxy: FaultProxy, start: Callable[..., Observed], tmp_path: Path
) -> None:
    observed = start(server_run, "while [ ! -e go ]; do sleep 0.05; done; seq 1000; exit 0")
    proxy.hold.clear()
    (tmp_path / "go").touch()
    assert observed.execution.wait(20).exit_code == 0
    proxy.hold.set()
    observed.ended()
    left = left_of(server_run, tmp_path)
    assert (left.status, left.log) == ("FINISHED", b"".join(b"%d\n" % i for i in range(1, 1001)))


def test_a_locked_database_is_waited_for(sqlite_run: RunRef, start: Callable[..., Observed], tmp_path: Path) -> None:
    path = sqlite_run.tracking_uri.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        observed = start(sqlite_run, "echo hello; exit 0")
        observed.execution.wait()
        observed.thread.join(1)
        assert observed.thread.is_alive()
        database.execute("ROLLBACK")
    assert observed.ended().finalized
    left = left_of(sqlite_run, tmp_path)
    assert (left.status, left.log) == ("FINISHED", b"hello\n")


@pytest.mark.parametrize(("kind", "code"), [("500", "TRACKING_UNREACHABLE"), ("401", "TRACKING_AUTH")])
def test_what_stays_undone_is_kept_and_finished_later(
    server_run: RunRef, proxy: FaultProxy, start: Callable[..., Observed], tmp_path: Path, kind: str, code: str
) -> None:
    impatient = {"limits": Limits(finalize_timeout_s=1.0)}
    with outage(proxy, kind):
        observed = start(server_run, "echo hello; mkdir outputs; echo x > outputs/file; exit 0", spec=impatient)
        outcome = observed.ended()
    assert not outcome.finalized
    assert outcome.verdict.reason.value == "OK", "what became of the program is known"
    assert any(code in each for each in outcome.pending)
    spool = observed.execution.spool
    final = json.loads((spool.path / "final.json").read_text())
    assert (final["finalized"], final["exit_code"]) == (False, 0)
    assert client(server_run).get_run(server_run.run_id).info.status == "RUNNING"

    for _ in range(2):  # doing it twice does no harm
        later = finish(spec_of(server_run), spool.path, RunRecord(server_run), work_dir=tmp_path)
        assert later.finalized
    left = left_of(server_run, tmp_path)
    assert (left.status, left.log, left.artifacts["outputs/file"]) == ("FINISHED", b"hello\n", b"x\n")
    assert json.loads((spool.path / "final.json").read_text())["finalized"] is True


def test_at_the_last_chance_an_incomplete_run_is_ended_and_says_what_is_missing(
    server_run: RunRef, proxy: FaultProxy, start: Callable[..., Observed], tmp_path: Path
) -> None:
    script = "mkdir outputs; echo x > outputs/file; exit 0"
    with outage(proxy, "artifacts 503"):
        impatient = {"limits": Limits(finalize_timeout_s=1.0)}
        outcome = start(server_run, script, spec=impatient, last_chance=True).ended()
    assert outcome.finalized
    left = left_of(server_run, tmp_path)
    assert (left.status, left.tags["reason"], left.tags["exit_code"]) == ("FAILED", "FINALIZE_INCOMPLETE", "0")
    assert "code 0" in left.tags["message"]
    assert "outputs/file" in left.tags["message"]


def test_a_file_that_is_too_large_for_the_server_is_named_and_the_others_are_stored(
    server_run: RunRef, proxy: FaultProxy, start: Callable[..., Observed], tmp_path: Path
) -> None:
    proxy.fail(413, is_artifact, over_bytes=100_000)
    observed = start(
        server_run, "mkdir outputs; head -c 200000 /dev/zero > outputs/big; echo x > outputs/small; exit 0"
    )
    assert observed.ended().finalized
    left = left_of(server_run, tmp_path)
    assert left.status == "FINISHED"
    assert left.artifacts["outputs/small"] == b"x\n"
    assert "outputs/big" in left.tags["message"]
    assert "200000 bytes" in left.artifacts["remote/outputs_not_stored.txt"].decode()


def test_a_store_whose_client_library_is_missing_ends_the_run_soon_and_is_told_in_it(
    sqlite_run: RunRef, start: Callable[..., Observed], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("boto3", "botocore", "botocore.client"):
        monkeypatch.setitem(sys.modules, name, None)
    client = mlflow.MlflowClient(sqlite_run.tracking_uri)
    experiment = client.create_experiment("in an object store", artifact_location="s3://bucket/root")
    info = client.create_run(experiment).info
    there = RunRef(info.run_id, experiment, info.artifact_uri, sqlite_run.tracking_uri)
    assert start(there, "echo lost; exit 3").ended().finalized
    run = client.get_run(there.run_id)
    assert (run.info.status, run.data.tags["mlflow_remote.reason"]) == ("FAILED", "USER_ERROR")
    message = run.data.tags["mlflow_remote.message"]
    assert "Not stored: the log, logs/error.txt; No module named 'botocore" in message


# --------------------------------------------------------------------------------------------- attempts and models


def test_an_attempt_that_is_followed_by_another_one_writes_no_status(
    sqlite_run: RunRef, start: Callable[..., Observed], tmp_path: Path
) -> None:
    retry = {"retry": Retry(2, (), (17,))}
    first = start(sqlite_run, "echo first; exit 17", spec=retry, attempt=0).ended()
    assert first.retry
    assert not first.finalized
    between = RunRecord(sqlite_run).look()
    assert (between.status, "finalized" in between.tags) == ("RUNNING", False)
    assert "1 of 2" in between.tags["message"]
    second = start(sqlite_run, "echo second; exit 0", spec=retry, attempt=1).ended()
    assert second.finalized
    left = left_of(sqlite_run, tmp_path)
    assert (left.status, left.tags["attempt"], left.log) == ("FINISHED", "1", b"first\nsecond\n")


def test_the_last_attempt_ends_the_run(sqlite_run: RunRef, start: Callable[..., Observed], tmp_path: Path) -> None:
    outcome = start(sqlite_run, "exit 17", spec={"retry": Retry(2, (), (17,))}, attempt=1).ended()
    assert outcome.finalized
    assert left_of(sqlite_run, tmp_path).status == "FAILED"


def log_a_model(run: RunRef) -> None:
    import mlflow

    class Model(mlflow.pyfunc.PythonModel):
        def predict(self, context: Any, model_input: list[str], params: Any = None) -> list[str]:
            return model_input

    with mlflow.start_run(run_id=run.run_id):
        mlflow.pyfunc.log_model(name="model", python_model=Model(), pip_requirements=[])


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_registered_after_a_good_end(run: RunRef, start: Callable[..., Observed], tmp_path: Path) -> None:
    log_a_model(run)
    name = f"Bob's model {run.run_id}"
    wish = {"register_model": {"name": name, "path": "model", "alias": "champion", "tags": {"team": "a"}}}
    observed = start(run, "exit 0", spec=wish)
    observed.ended()
    left = left_of(run, tmp_path)
    assert left.status == "FINISHED"
    assert left.tags.get("model_version") == f"{name}/1", left.tags
    version = client(run).get_model_version_by_alias(name, "champion")
    assert version.run_id == run.run_id
    assert version.tags == {
        "team": "a",
        "mlflow_remote.run_id": run.run_id,
        "mlflow_remote.snapshot": "sha256:" + "0" * 64,
        "mlflow_remote.environment": "lock-1",
    }
    again = RunRecord(run).register_model(name, "model", alias="champion", tags={})
    assert again == "1", "a second try makes no second version"


def test_a_model_that_cannot_be_registered_is_no_failure_of_the_run(
    sqlite_run: RunRef, start: Callable[..., Observed], tmp_path: Path
) -> None:
    start(sqlite_run, "exit 0", spec={"register_model": {"name": "m", "path": "nothing-here"}}).ended()
    left = left_of(sqlite_run, tmp_path)
    assert (left.status, left.tags["reason"], left.tags["phase"]) == ("FINISHED", "OK", "done")
    assert "nothing-here" in left.tags["register_error"]
    assert "finalized" in left.tags


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_registered_once_though_the_answer_was_lost(server_run: RunRef, proxy: FaultProxy) -> None:
    log_a_model(server_run)
    name = f"lost-{server_run.run_id}"
    lost = proxy.fail(0, lambda method, path: path.endswith("model-versions/create"), reaches=True, times=1)
    tags = {"mlflow_remote.run_id": server_run.run_id}
    record = RunRecord(server_run)
    until = time.monotonic() + 60
    assert persist(lambda: record.register_model(name, "model", alias="", tags=tags), until) == "1"
    assert lost.times == 0
    assert len(mlflow.MlflowClient(server_run.tracking_uri).search_model_versions(f"name = '{name}'")) == 1


def test_a_failed_run_registers_no_model(sqlite_run: RunRef, start: Callable[..., Observed], tmp_path: Path) -> None:
    start(sqlite_run, "exit 1", spec={"register_model": {"name": "m", "path": "model"}}).ended()
    assert not {"register_error", "model_version"} & set(left_of(sqlite_run, tmp_path).tags)


# ------------------------------------------------------------------------------------------------------ the sidecar


@dataclass
class Sidecar:
    """observe's own program, as a pod runs it."""

    spool: Path
    spec: JobSpec
    folder: Path
    attempt: int = 0
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        (self.folder / "envelope.json").write_text(envelope.dump(self.spec))
        (self.folder / "termination-log").touch()
        self.start()

    def start(self) -> None:
        arguments = [sys.executable, "-m", "mlflow_remote_backend.runner.observe"]
        arguments += ["--envelope", str(self.folder / "envelope.json"), "--spool", str(self.spool)]
        arguments += ["--work", str(self.folder), "--termination-log", str(self.folder / "termination-log")]
        environ = {**os.environ, "MLFLOW_REMOTE_ATTEMPT": str(self.attempt), "MLFLOW_REMOTE_POD_UID": "pod-1"}
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environ)

    def ended(self) -> list[Any]:
        out, _ = self.process.communicate(timeout=90)
        return [parse_frame(line) for line in out.splitlines()]

    def message(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "termination-log").read_text()))


@pytest.fixture
def sidecar(execute_py: Starter, tmp_path: Path) -> Iterator[Callable[..., tuple[Sidecar, Execution]]]:
    started: list[Sidecar] = []

    def start(run: RunRef, script: str, *, attempt: int = 0, **spec: Any) -> tuple[Sidecar, Execution]:
        execution = execute_py(script, grace_period_s=5)
        execution.spool.write_prepared(Prepared())
        started.append(Sidecar(execution.spool.path, spec_of(run, **spec), tmp_path, attempt))
        return started[-1], execution

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


def test_the_sidecar_tells_the_log_by_frames_and_finalises(
    run: RunRef, sidecar: Callable[..., tuple[Sidecar, Execution]], tmp_path: Path
) -> None:
    observer, execution = sidecar(run, r"seq 3000; printf '\xff\0no newline'; exit 5")
    frames = observer.ended()
    assert observer.process.returncode == 0
    assert all(frames), "nothing but frames on stdout"
    assert b"".join(each.data for each in frames if each.kind == "log") == execution.log()
    assert frames[-1].kind == "end"
    assert (frames[-1].fields["exit_code"], frames[-1].fields["finalized"]) == (5, True)
    assert observer.message()["reason"] == "USER_ERROR"
    left = left_of(run, tmp_path)
    assert (left.status, left.tags["finalized"], left.log) == ("FAILED", "runner:pod-1", execution.log())


def test_a_sidecar_whose_sigterm_was_lost_ends_a_cancelled_job_that_never_starts(tmp_path, monkeypatch, until) -> None:
    monkeypatch.setattr(observe_module, "CANCELLED_START_S", 0.2)
    spool = Spool(tmp_path)
    alive = observe_module._sidecar_alive(spool, lambda: False)
    assert alive()  # it waits for execute to start
    spool.request_cancel()
    assert alive()
    until(lambda: not alive(), 5)
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert alive()  # it has started after all


def test_a_sidecar_told_to_end_after_a_killed_program_finalises_at_once(
    sqlite_run: RunRef, sidecar: Callable[..., tuple[Sidecar, Execution]], tmp_path: Path, until: Until
) -> None:
    observer, execution = sidecar(sqlite_run, "echo started; sleep 3600")
    until(lambda: RunRecord(sqlite_run).look().tags.get("phase") == "running")
    execution.kill()
    observer.process.send_signal(signal.SIGTERM)
    observer.ended()
    left = left_of(sqlite_run, tmp_path)
    assert (left.status, left.tags["reason"], left.log) == ("FAILED", "KILLED_BY_SYSTEM", b"started\n")


def test_a_sidecar_told_to_end_while_the_program_lives_waits_for_it(
    sqlite_run: RunRef, sidecar: Callable[..., tuple[Sidecar, Execution]], tmp_path: Path, until: Until
) -> None:
    observer, _ = sidecar(sqlite_run, "while [ ! -e go ]; do sleep 0.05; done; echo end; exit 0")
    until(lambda: RunRecord(sqlite_run).look().tags.get("phase") == "running")
    observer.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        observer.process.wait(0.5)
    (tmp_path / "go").touch()
    observer.ended()
    assert left_of(sqlite_run, tmp_path).status == "FINISHED"


def test_a_killed_sidecar_is_replaced_without_loss_or_repetition(
    run: RunRef, sidecar: Callable[..., tuple[Sidecar, Execution]], tmp_path: Path, until: Until
) -> None:
    script = "i=0; while [ ! -e go ]; do echo line $i; i=$((i+1)); sleep 0.02; done; echo end; exit 0"
    observer, execution = sidecar(run, script)
    until(lambda: RunRecord(run).look().tags.get("phase") == "running")
    execution.until_log_has(b"line 50\n")
    observer.process.kill()
    observer.process.communicate()
    observer.start()
    execution.until_log_has(b"line 100\n")
    (tmp_path / "go").touch()
    observer.ended()
    left = left_of(run, tmp_path)
    assert (left.status, left.log) == ("FINISHED", execution.log())


def test_the_sidecar_says_by_its_exit_code_that_another_attempt_is_to_follow(
    sqlite_run: RunRef, sidecar: Callable[..., tuple[Sidecar, Execution]]
) -> None:
    observer, _ = sidecar(sqlite_run, "exit 17", retry=Retry(2, (), (17,)))
    frames = observer.ended()
    assert observer.process.returncode == EXIT_RETRY
    assert frames[-1].fields["retry"] is True


def test_the_sidecar_says_by_its_exit_code_that_something_is_pending(
    server_run: RunRef, proxy: FaultProxy, sidecar: Callable[..., tuple[Sidecar, Execution]]
) -> None:
    proxy.fail(503)
    observer, _ = sidecar(server_run, "exit 0", limits=Limits(finalize_timeout_s=0.5))
    observer.ended()
    assert observer.process.returncode == EXIT_PENDING
    message = observer.message()
    assert (message["exit_code"], message["finalized"]) == (0, False)
    assert message["pending"]


def test_an_envelope_of_another_release_is_refused_with_words(tmp_path: Path) -> None:
    (tmp_path / "envelope.json").write_text('{"version": 99}')
    (tmp_path / "termination-log").touch()
    arguments = ["--envelope", str(tmp_path / "envelope.json"), "--spool", str(tmp_path / "spool")]
    code = observe_module.main([*arguments, "--termination-log", str(tmp_path / "termination-log")])
    assert code == EXIT_PENDING
    assert "version 99" in json.loads((tmp_path / "termination-log").read_text())["message"]
