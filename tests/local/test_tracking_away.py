"""The tracking server goes away: before, while and after a program runs. The program never notices, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

import mlflow
import pytest
from faults import fault_proxy, is_api, is_artifact

from mlflow_remote_backend import cli, submitted_run
from mlflow_remote_backend.compute import supervised
from mlflow_remote_backend.errors import TrackingError
from mlflow_remote_backend.runner.run_folder import RunFolder, all_folders
from mlflow_remote_backend.runner.spool import Spool
from mlflow_remote_backend.submitted_run import attach
from mlflow_remote_backend.testing import artifact, artifacts, ended, stored_log, until
from mlflow_remote_backend.tracking import Tracking

pytestmark = pytest.mark.usefixtures("no_leftovers")


@pytest.fixture
def server(tracking, monkeypatch):
    """A proxy before the session's server, where this process and the jobs find it; the server's faults are its."""
    with fault_proxy(tracking) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        monkeypatch.setenv("TEST_EXPERIMENT_ID", os.environ["MLFLOW_EXPERIMENT_ID"])
        monkeypatch.delenv(
            "MLFLOW_EXPERIMENT_ID"
        )  # MLflow would look for it, with its own patience, before it calls us
        mlflow.set_tracking_uri(proxy.url)
        yield proxy


def break_(server, how):
    if how == "refused":
        server.refuse()
    elif how == "silent":
        server.hold.clear()
    else:
        server.fail(how)


def mend(server, how):
    if how == "refused":
        server.listen()
    else:
        server.mend()


def submit(project, **config):
    return mlflow.projects.run(
        str(project),
        backend="remote",
        env_manager="local",
        experiment_id=os.environ["TEST_EXPERIMENT_ID"],
        synchronous=False,
        backend_config={"stream_output": False, **config},
    )


def all_runs():
    return mlflow.search_runs([os.environ["TEST_EXPERIMENT_ID"]], output_format="list")


def until_ended(run):
    """The program's end, told by its spool: the server is away."""
    return until(lambda: Spool(RunFolder(run.run_id).spool).exit(), 60, "the program's end")


@pytest.fixture
def waiting(make_project, tmp_path):
    """A project whose program writes, waits for the file ``stop``, writes again, has an output, and exits with 4."""
    stop = tmp_path / "stop"
    project = make_project(
        f"echo before; while [ ! -e {stop} ]; do sleep 0.1; done; echo after; "
        "mkdir -p outputs; echo r > outputs/r; exit 4"
    )
    return project, stop


@pytest.mark.parametrize("how", ["refused", "silent", 500, 401])
def test_a_server_that_is_away_until_after_the_end_loses_nothing(how, server, waiting):
    project, stop = waiting
    run = submit(project)
    until(lambda: run.view().tag("phase") == "running", 60, "running")
    break_(server, how)
    stop.touch()
    assert until_ended(run).exit_code == 4
    mend(server, how)
    view = ended(run)
    assert (view.status, view.tag("reason"), view.tag("exit_code")) == ("FAILED", "USER_ERROR", "4")
    assert stored_log(run.run_id) == b"before\nafter\n"
    assert artifact(run.run_id, "outputs/r") == b"r\n"


def test_what_can_never_be_uploaded_is_named_in_the_end(server, waiting, monkeypatch):
    """The store of artifacts takes nothing any more, whoever comes to finish the job; the tracking server does."""
    monkeypatch.setattr(supervised, "MOST_RECOVERIES", 1)
    project, stop = waiting
    run = submit(project, finalize_timeout="2s")
    until(lambda: run.view().tag("phase") == "running", 60, "running")
    server.fail(500, is_artifact)
    stop.touch()
    view = ended(run)
    assert (view.status, view.tag("reason"), view.tag("exit_code")) == ("FAILED", "USER_ERROR", "4")
    assert "could not be uploaded" in view.tag("message")
    until(lambda: not list(all_folders()), 30, "its folder removed")


def test_who_waits_goes_on_waiting_and_is_right_in_the_end(server, waiting):
    project, stop = waiting
    run = submit(project)
    answers = []
    waiter = threading.Thread(target=lambda: answers.append(run.wait()))
    waiter.start()
    until(lambda: attach(run.run_id).view().tag("phase") == "running", 60, "running")
    server.refuse()
    stop.touch()
    until_ended(run)
    assert waiter.is_alive()
    server.listen()
    waiter.join(90)
    assert answers == [False]
    assert run.reason == "USER_ERROR"


@pytest.mark.parametrize("where", ["where it runs", "elsewhere"])
def test_who_follows_the_log_gets_each_line_once_across_an_outage(server, waiting, where, monkeypatch):
    monkeypatch.setattr(submitted_run, "STORED_PAUSE_S", 0.5)
    project, stop = waiting
    run = attach(submit(project).run_id)
    if where == "elsewhere":
        run._compute = None
    look, failures = run.view, []

    def view():
        try:
            return look()
        except TrackingError as error:
            failures.append(error)
            raise

    monkeypatch.setattr(run, "view", view)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(run.logs(follow=True)))
    reader.start()
    until(lambda: attach(run.run_id).view().tag("phase") == "running", 60, "running")
    server.refuse()
    until(lambda: failures, 60, "a look that fails")
    stop.touch()
    until_ended(run)
    assert reader.is_alive()
    server.listen()
    reader.join(90)
    assert lines == ["before", "after"]


def test_the_last_lines_of_a_log_that_is_followed_wait_too_and_are_fetched_once(
    sqlite_tracking, make_project, monkeypatch, capsys
):
    run = mlflow.projects.run(
        str(make_project("echo one; echo two; echo three")),
        backend="remote",
        env_manager="local",
        synchronous=False,
        backend_config={"stream_output": False},
    )
    ended(run)
    until(lambda: not RunFolder(run.run_id).exists(), 30, "its folder removed")
    index, read, fetched = Tracking.log_index, Tracking.read_artifact, []

    def away_at_first(self, run_id):
        monkeypatch.setattr(Tracking, "log_index", index)
        raise TrackingError("The store is away.", transient=True)

    def counted(self, run_id, path):
        fetched.append(path)
        return read(self, run_id, path)

    monkeypatch.setattr(Tracking, "log_index", away_at_first)
    monkeypatch.setattr(Tracking, "read_artifact", counted)
    assert cli.main(["logs", "-f", "--tail", "2", run.run_id]) == 0
    assert capsys.readouterr().out == "two\nthree\n"
    assert len([path for path in fetched if path != "logs/index.json"]) == 1


def test_a_log_whose_end_cannot_be_read_is_said(sqlite_tracking, make_project, monkeypatch, capsys):
    run = mlflow.projects.run(
        str(make_project("echo all")), backend="remote", env_manager="local", synchronous=False, backend_config={}
    )

    def away(self, run_id):
        raise TrackingError("The store is away.")

    monkeypatch.setattr(Tracking, "log_index", away)
    assert run.wait()
    shown = capsys.readouterr()
    assert shown.out == "all\n"  # its machine had all of it
    assert "the log's end may be missing, it cannot be read now: The store is away." in shown.err


def test_a_server_that_stays_away_leaves_the_end_to_the_next_look(server, waiting):
    project, stop = waiting
    run = submit(project, finalize_timeout="1s")
    until(lambda: run.view().tag("phase") == "running", 60, "running")
    server.refuse()
    stop.touch()
    folder = RunFolder(run.run_id)
    until(lambda: not folder.supervised(), 120, "the supervisor gave up")
    assert folder.exists()
    server.listen()
    assert not mlflow.MlflowClient().get_run(run.run_id).data.tags.get("mlflow_remote.finalized")
    view = ended(attach(run.run_id))
    assert (view.status, view.tag("exit_code")) == ("FAILED", "4")
    assert stored_log(run.run_id) == b"before\nafter\n"
    until(lambda: not folder.exists(), 30, "its folder removed")


def test_a_cancel_works_without_the_server(server, waiting):
    project, _ = waiting
    run = submit(project)
    until(lambda: run.view().tag("phase") == "running", 60, "running")
    server.refuse()
    canceller = threading.Thread(target=run.cancel)
    canceller.start()
    assert until_ended(run).stopped_by == "cancel"
    server.listen()
    canceller.join(90)
    view = ended(run)
    assert (view.status, view.tag("reason")) == ("KILLED", "CANCELLED")


def test_an_output_too_large_for_the_server_is_named_and_the_rest_is_stored(server, make_project):
    project = make_project(
        "mkdir -p outputs; head -c 300000 /dev/urandom > outputs/large; echo s > outputs/small; echo done"
    )
    server.fail(413, is_artifact, over_bytes=200_000)
    view = ended(submit(project))
    assert (view.status, view.tag("exit_code")) == ("FINISHED", "0")
    assert "outputs/large" in view.tag("message")
    assert artifacts(view.run_id, "outputs") == {"outputs/small"}
    assert "outputs/large" in artifact(view.run_id, "remote/outputs_not_stored.txt").decode()


def test_a_lost_answer_makes_no_second_run(server, make_project):
    server.fail(0, lambda method, path: path.endswith("/runs/create"), reaches=True, times=1)
    run = submit(make_project("echo x"))
    assert ended(run).status == "FINISHED"
    assert len(all_runs()) == 1


def test_a_port_that_reads_like_a_status_code_is_not_taken_for_one():
    with socket.socket() as taken:  # bound, and nobody listens
        port = next(port for port in (14010, 24010, 34010, 44010, 54010) if _binds(taken, port))
        tracking = Tracking(f"http://127.0.0.1:{port}")
        with pytest.raises(TrackingError) as caught:
            tracking.call("reading the run", lambda: tracking.client.get_run("0" * 32), timeout_s=2, retries=0)
    assert (caught.value.code, caught.value.transient) == ("TRACKING_UNREACHABLE", True)


def _binds(to: socket.socket, port: int) -> bool:
    with contextlib.suppress(OSError):
        to.bind(("127.0.0.1", port))
        return True
    return False


# -- before anything exists --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["refused", "silent", "silent API", 500, 401])
def test_a_server_that_is_away_at_the_start_is_an_error_within_15_s_and_nothing_is_left(
    how, server, make_project, home
):
    release = threading.Event()
    if how == "silent API":
        server.fail(500, lambda method, path: is_api(method, path) and release.wait(60))
    else:
        break_(server, how)
    start = time.monotonic()
    try:
        with pytest.raises(mlflow.exceptions.ExecutionException) as caught:
            submit(make_project("echo never"))
        assert time.monotonic() - start < 15
    finally:
        release.set()
        mend(server, how)
    assert server.url in str(caught.value)
    assert caught.value.code == ("TRACKING_AUTH" if how == 401 else "TRACKING_UNREACHABLE")
    assert all_runs() == []
    assert not list(all_folders())
    assert not list((home.state / "mlflow-remote" / "submissions").iterdir())
