"""The runner's door to MLflow: kinds of trouble, limits, forks, on real stores behind a real proxy."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from faults import FaultProxy, is_api, is_artifact

from mlflow_remote_backend.job import RunRef
from mlflow_remote_backend.runner import record as record_module
from mlflow_remote_backend.runner.record import (
    MAX_TAG_CHARS,
    Backoff,
    RecordError,
    RunRecord,
    Trouble,
    persist,
    redact,
    survives_fork,
)


@pytest.fixture(params=["sqlite", "server"])
def run(request: pytest.FixtureRequest) -> RunRef:
    return request.getfixturevalue(f"{request.param}_run")


def client(run: RunRef) -> Any:
    import mlflow

    return mlflow.MlflowClient(run.tracking_uri)


# ------------------------------------------------------------------------------------------------- what it can do


def test_tags_metrics_and_status_arrive(run: RunRef) -> None:
    record = RunRecord(run)
    record.log({"phase": "running", "message": "ünï 🦀\n"}, {"remote/seconds_run": 1.5})
    record.end("KILLED")
    stored = client(run).get_run(run.run_id)
    assert stored.info.status == "KILLED"
    assert stored.data.tags["mlflow_remote.phase"] == "running"
    assert stored.data.tags["mlflow_remote.message"] == "ünï 🦀\n"
    assert stored.data.metrics == {"remote/seconds_run": 1.5}
    look = record.look()
    assert (look.status, look.deleted, look.tags) == ("KILLED", False, {"phase": "running", "message": "ünï 🦀\n"})


def test_a_status_is_written_over_another_one(run: RunRef) -> None:
    client(run).set_terminated(run.run_id, "FINISHED")
    RunRecord(run).end("FAILED")
    assert client(run).get_run(run.run_id).info.status == "FAILED"


def test_long_tag_values_are_cut_and_short_ones_are_not(run: RunRef) -> None:
    RunRecord(run).log({"long": "x" * 100_000, "fits": "y" * MAX_TAG_CHARS})
    tags = RunRecord(run).look().tags
    assert len(tags["long"]) == MAX_TAG_CHARS
    assert tags["long"].endswith("x…")
    assert tags["fits"] == "y" * MAX_TAG_CHARS


def test_artifacts_are_stored_replaced_and_read(run: RunRef, tmp_path: Path) -> None:
    record = RunRecord(run)
    assert record.download("logs/a") is None
    record.upload(b"\x00\xff one", "logs/a")
    record.upload(b"two", "logs/a")
    assert record.download("logs/a") == b"two"
    (tmp_path / "file").write_bytes(b"three")
    record.upload_file(tmp_path / "file", "outputs/deep")
    assert record.download("outputs/deep/file") == b"three"


def test_with_a_full_disk_small_things_are_uploaded_from_another(
    run: RunRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if tmp_path in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(tmp_path))
        patched.setattr(Path, "write_bytes", full)
        RunRecord(run).upload(b"one", "logs/a")
    assert RunRecord(run).download("logs/a") == b"one"


def test_a_file_that_vanished_is_no_trouble_of_the_server(run: RunRef, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RunRecord(run).upload_file(tmp_path / "missing", "outputs")


# ------------------------------------------------------------------------------------------------- kinds of trouble


def trouble(record: RunRecord, what: str = "log") -> Trouble:
    calls = {
        "log": lambda: record.log({"a": "b"}),
        "look": record.look,
        "end": lambda: record.end("FAILED"),
        "upload": lambda: record.upload(b"x", "logs/x"),
    }
    with pytest.raises(RecordError) as caught:
        calls[what]()
    assert "\n" not in caught.value.words
    return caught.value.trouble


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0, Trouble.AWAY),
        (500, Trouble.AWAY),
        (502, Trouble.AWAY),
        (503, Trouble.AWAY),
        (504, Trouble.AWAY),
        (429, Trouble.AWAY),
        (404, Trouble.AWAY),  # a gateway that does not know the server yet; MLflow's own has a body
        (401, Trouble.AUTH),
        (403, Trouble.AUTH),
        (413, Trouble.TOO_LARGE),
        (400, Trouble.REFUSED),
    ],
)
def test_http_statuses_are_told_apart(server_run: RunRef, proxy: FaultProxy, status: int, expected: Trouble) -> None:
    record = RunRecord(server_run)
    record.look()
    proxy.fail(status)
    assert {trouble(record, what) for what in ("log", "look", "end", "upload")} == {expected}
    proxy.mend()
    record.log({"a": "b"})


def test_a_server_that_is_not_there_is_away(server_run: RunRef, proxy: FaultProxy) -> None:
    record = RunRecord(server_run)
    proxy.refuse()
    assert trouble(record, "look") is Trouble.AWAY
    proxy.listen()
    assert record.look().status == "RUNNING"


def test_a_server_that_does_not_answer_is_away(
    server_run: RunRef, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "CALL_RETRIES", 0)
    record = RunRecord(server_run)
    record.look()
    proxy.hold.clear()
    with pytest.raises(RecordError) as caught:
        record._call("asking", lambda client: client.get_run(server_run.run_id), timeout_s=1)
    assert caught.value.trouble is Trouble.AWAY


def test_a_deleted_run_is_gone(run: RunRef) -> None:
    client(run).delete_run(run.run_id)
    record = RunRecord(run)
    assert record.look().deleted
    assert trouble(record, "log") is Trouble.GONE
    assert trouble(record, "end") is Trouble.GONE


def test_a_deleted_run_of_a_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    created = mlflow.MlflowClient(uri).create_run("0")
    run = RunRef(created.info.run_id, "0", created.info.artifact_uri, uri)
    RunRecord(run).log({"a": "b"}, {"m": 1.0})
    client(run).delete_run(run.run_id)
    assert trouble(RunRecord(run), "log") is Trouble.GONE


def test_a_server_that_does_not_know_the_run_is_away(run: RunRef) -> None:
    record = RunRecord(dataclasses.replace(run, run_id="0" * 32))
    assert {trouble(record, what) for what in ("log", "look", "end")} == {Trouble.AWAY}


def test_a_store_whose_client_library_is_missing_is_not_waited_for(
    run: RunRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("boto3", "botocore", "botocore.client"):
        monkeypatch.setitem(sys.modules, name, None)
    experiment = client(run).create_experiment("in an object store", artifact_location="s3://bucket/root")
    info = client(run).create_run(experiment).info
    there = RunRef(info.run_id, experiment, info.artifact_uri, run.tracking_uri)
    assert trouble(RunRecord(there), "upload") is Trouble.REFUSED


def test_a_locked_database_is_away(sqlite_run: RunRef) -> None:
    import sqlite3

    record = RunRecord(dataclasses.replace(sqlite_run, tracking_uri=f"{sqlite_run.tracking_uri}?timeout=0.1"))
    record.look()
    with sqlite3.connect(sqlite_run.tracking_uri.removeprefix("sqlite:///")) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert trouble(record, "log") is Trouble.AWAY
        database.rollback()
    record.log({"a": "b"})


def test_credentials_are_not_in_the_words(server_run: RunRef, proxy: FaultProxy) -> None:
    password = "pass" + "word1234"
    uri = proxy.url.replace("://", f"://someone:{password}@")
    proxy.refuse()
    with pytest.raises(RecordError) as caught:
        RunRecord(dataclasses.replace(server_run, tracking_uri=uri)).look()
    assert password not in str(caught.value)
    assert password not in caught.value.words


@pytest.mark.parametrize(
    "text",
    [
        "https://user:{}@host/path",
        "{{'Authorization': 'Bearer {}'}}",
        "Authorization: Basic {}",
        "X-Amz-Signature={}",
    ],
)
def test_redact(text: str) -> None:
    secret = "abc" + "DEF123=="
    assert secret not in redact(text.format(secret))


# --------------------------------------------------------------------------------------------------------- patience


def test_persist_repeats_until_it_works(server_run: RunRef, proxy: FaultProxy) -> None:
    record = RunRecord(server_run)
    record.look()
    fault = proxy.fail(503, is_api, times=3)
    persist(lambda: record.log({"a": "b"}), time.monotonic() + 60, sleep=lambda seconds: None)
    assert fault.times == 0
    assert record.look().tags["a"] == "b"


def test_persist_gives_up_when_its_time_is_over_and_at_once_where_time_does_not_help() -> None:
    now = [0.0]
    tried: list[float] = []

    def fail(trouble: Trouble) -> None:
        tried.append(now[0])
        raise RecordError("it", trouble, "words")

    def sleep(seconds: float) -> None:
        assert seconds > 0
        now[0] += seconds

    with pytest.raises(RecordError):
        persist(lambda: fail(Trouble.AWAY), 100.0, clock=lambda: now[0], sleep=sleep)
    assert tried[-1] == 100.0
    assert 4 < len(tried) < 30
    for each in (Trouble.GONE, Trouble.REFUSED, Trouble.TOO_LARGE):
        tried.clear()
        with pytest.raises(RecordError):
            persist(lambda each=each: fail(each), 1000.0, clock=lambda: now[0], sleep=sleep)  # type: ignore[misc]
        assert len(tried) == 1


def test_backoff_grows_up_to_its_bound_and_differs() -> None:
    pauses = [Backoff(1, 8).pause_s() for _ in range(20)]
    assert len(set(pauses)) > 10
    one = Backoff(1, 8)
    grown = [one.pause_s() for _ in range(10)]
    assert all(0.5 <= each <= 8 for each in grown)
    assert min(grown[4:]) >= 4
    one.reset()
    assert one.pause_s() <= 1


# ------------------------------------------------------------------------------------------------- the environment


def test_a_call_has_limits_of_its_own(sqlite_run: RunRef) -> None:
    inside: dict[str, str | None] = {}

    def look(client: Any) -> None:
        for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
            inside[name] = os.environ.get(name)

    RunRecord(sqlite_run)._call("looking", look, timeout_s=123)
    assert inside == {"MLFLOW_HTTP_REQUEST_TIMEOUT": "123", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def test_threads_that_come_first_all_at_once_all_succeed(sqlite_run: RunRef) -> None:
    """In a fresh process MLflow is not imported yet; its modules import each other."""
    code = (
        "import sys, threading\n"
        "from mlflow_remote_backend.job import RunRef\n"
        "from mlflow_remote_backend.runner.record import RunRecord\n"
        "assert 'mlflow' not in sys.modules\n"
        "record = RunRecord(RunRef(sys.argv[1], tracking_uri=sys.argv[2]))\n"
        "calls = [lambda: record.log({'a': 'b'}), record.look, lambda: record.upload(b'x', 'logs/x')] * 2\n"
        "done = []\n"
        "threads = [threading.Thread(target=lambda call=call: done.append(call())) for call in calls]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert len(done) == 6, done\n"
    )
    subprocess.run([sys.executable, "-c", code, sqlite_run.run_id, sqlite_run.tracking_uri], check=True)


# ------------------------------------------------------------------------------------------------------------- forks


def test_a_fork_shares_no_connection_with_its_parent(run: RunRef, tmp_path: Path) -> None:
    """As the supervisor does: fork from a process that uses MLflow, let go of its files, write at the same time."""
    ours = client(run)
    ours.set_tag(run.run_id, "before", "x")  # connections are open now
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _let_go_of_files()
            record = RunRecord(run)
            for number in range(30):
                record.log({f"child{number}": "x"})
            record.upload(b"from the child", "logs/child")
            status = 0
        finally:
            os._exit(status)
    failed: list[BaseException] = []

    def write() -> None:
        try:
            for number in range(30):
                ours.set_tag(run.run_id, f"parent{number}", "x")
        except Exception as error:  # noqa: BLE001  any is a failure of the test
            failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    _, status = os.waitpid(child, 0)
    writer.join()
    assert (status, failed) == (0, [])
    tags = ours.get_run(run.run_id).data.tags
    assert sum(name.startswith("parent") for name in tags) == 30
    assert sum(name.startswith("mlflow_remote.child") for name in tags) == 30
    assert RunRecord(run).download("logs/child") == b"from the child"


def _let_go_of_files() -> None:
    """Connections that are used all the same then fail, instead of by chance succeeding."""
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != null:
            try:
                os.dup2(null, int(name))
            except OSError:
                continue


@pytest.mark.parametrize(
    ("tracking", "artifacts", "expected"),
    [
        ("sqlite:////x", "/x/artifacts", True),
        ("file:///x", "file:///x", True),
        ("http://x", "mlflow-artifacts:/0/x", True),
        ("http://x", "s3://bucket/x", False),
        ("http://x", "gs://bucket/x", False),
        ("databricks", "dbfs:/x", False),
    ],
)
def test_forks_are_only_safe_where_that_is_known(tracking: str, artifacts: str, expected: bool) -> None:
    assert survives_fork(tracking, artifacts) is expected


def test_only_artifact_requests_are_artifact_requests() -> None:
    assert is_artifact("PUT", "/api/2.0/mlflow-artifacts/artifacts/0/x")
    assert not is_api("PUT", "/api/2.0/mlflow-artifacts/artifacts/0/x")
    assert is_api("POST", "/api/2.0/mlflow/runs/log-batch")
