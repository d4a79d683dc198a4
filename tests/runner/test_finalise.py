"""The end of a job when its runner dies in the middle of it: whoever comes next brings the run to the same end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from execution import Starter, new_run

from mlflow_remote_backend.job import EntryPoint, EnvironmentRef, JobSpec, RunRef, SnapshotRef
from mlflow_remote_backend.runner.finalise import finish
from mlflow_remote_backend.runner.parts import load_index
from mlflow_remote_backend.runner.record import RunRecord
from mlflow_remote_backend.runner.spool import Prepared, read_json, write_json

T = TypeVar("T")


class Died(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it."""


class DyingRecord(RunRecord):
    """Dies at its n-th call, before or after the call took effect."""

    def __init__(self, run: RunRef, calls: int, *, after: bool) -> None:
        super().__init__(run)
        self.left = calls
        self.after = after

    def _call(self, doing: str, action: Callable[[Any], T], timeout_s: int = 30) -> T:
        self.left -= 1
        if self.left < 0 and not self.after:
            raise Died(doing)
        result = super()._call(doing, action, timeout_s)
        if self.left < 0:
            raise Died(doing)
        return result


def spec_of(run: RunRef) -> JobSpec:
    return JobSpec(run, "s", "p", EntryPoint("main", "…"), {}, SnapshotRef("sha256:0", 1), EnvironmentRef())


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("code", "status"), [(0, "FINISHED"), (3, "FAILED")])
def test_a_runner_that_dies_at_any_step_is_replaced_by_one_that_ends_the_run_right(
    sqlite_tracking: str, execute_py: Starter, tmp_path: Path, code: int, status: str, after: bool
) -> None:
    ended = execute_py(f"seq 100; mkdir outputs; echo x > outputs/one; echo y > outputs/two; exit {code}")
    ended.wait()
    ended.spool.write_prepared(Prepared(None, {"environment": 2.0}))
    deaths = 0
    while True:
        run = new_run(sqlite_tracking)
        spool = tmp_path / f"copy-{deaths}"
        shutil.copytree(ended.spool.path, spool)
        try:
            finish(spec_of(run), spool, DyingRecord(run, deaths, after=after), work_dir=tmp_path, owner="runner:first")
            break
        except Died:
            deaths += 1
        assert finish(spec_of(run), spool, RunRecord(run), work_dir=tmp_path, owner="runner:second").finalized
        _check_end(run, status, code)
    assert deaths >= 8, "all steps were tried"
    _check_end(run, status, code)


def _check_end(run: RunRef, status: str, code: int) -> None:
    import mlflow

    record = RunRecord(run)
    found = mlflow.MlflowClient(run.tracking_uri).get_run(run.run_id)
    tags = record.look().tags
    assert (found.info.status, tags["exit_code"], tags["phase"]) == (status, str(code), "done")
    assert tags["finalized"].startswith("runner:")
    assert "conflict" not in tags
    assert found.data.metrics["remote/seconds_environment"] == 2.0
    (part,) = load_index(record.download("logs/index.json"))
    assert record.download(part.path) == b"".join(b"%d\n" % i for i in range(1, 101))
    assert (record.download("outputs/one"), record.download("outputs/two")) == (b"x\n", b"y\n")
    assert (record.download("logs/error.txt") is not None) == (code != 0)


def test_a_verdict_that_was_reached_stands(sqlite_run: RunRef, execute_py: Starter, tmp_path: Path) -> None:
    ended = execute_py("exit 3")
    ended.wait()
    with pytest.raises(Died):
        finish(spec_of(sqlite_run), ended.spool.path, DyingRecord(sqlite_run, 2, after=True), work_dir=tmp_path)
    ended.spool.request_cancel()  # somebody cancels what has ended already
    assert finish(spec_of(sqlite_run), ended.spool.path, RunRecord(sqlite_run), work_dir=tmp_path).finalized
    look = RunRecord(sqlite_run).look()
    assert (look.status, look.tags["reason"]) == ("FAILED", "USER_ERROR")


def test_a_run_that_is_gone_is_let_alone(sqlite_run: RunRef, execute_py: Starter, tmp_path: Path) -> None:
    import mlflow

    ended = execute_py("exit 0")
    ended.wait()
    mlflow.MlflowClient(sqlite_run.tracking_uri).delete_run(sqlite_run.run_id)
    assert finish(spec_of(sqlite_run), ended.spool.path, RunRecord(sqlite_run), work_dir=tmp_path).gone


def test_a_clock_that_was_set_back_hides_no_output(sqlite_run: RunRef, execute_py: Starter, tmp_path: Path) -> None:
    """The program started while the clock was an hour ahead; what it wrote has the right time."""
    ended = execute_py("mkdir outputs; echo x > outputs/one")
    ended.wait()
    for name in ("started.json", "exit.json"):
        record = read_json(ended.spool.path / name) or {}
        write_json(ended.spool.path / name, {**record, "started_at": record["started_at"] + 3600})
    assert finish(spec_of(sqlite_run), ended.spool.path, RunRecord(sqlite_run), work_dir=tmp_path).finalized
    assert RunRecord(sqlite_run).download("outputs/one") == b"x\n"
