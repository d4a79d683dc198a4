"""A job outlives whoever dies: its submitter at any line, its supervisor, its program."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from mlflow.exceptions import ExecutionException
from tracking_server import copy_database

from mlflow_remote_backend import gc, submission, submission_folder
from mlflow_remote_backend.compute import supervised
from mlflow_remote_backend.compute.local import LocalCompute
from mlflow_remote_backend.environment import cache, materialise, tool
from mlflow_remote_backend.errors import ComputeError, ConfigError
from mlflow_remote_backend.runner import run_folder
from mlflow_remote_backend.runner.run_folder import RunFolder, all_folders
from mlflow_remote_backend.runner.spool import Spool
from mlflow_remote_backend.submitted_run import attach
from mlflow_remote_backend.testing import ended, stored_log, until
from mlflow_remote_backend.tracking import Tracking

pytestmark = pytest.mark.usefixtures("no_leftovers")

SUBMITTER = Path(__file__).with_name("submitter.py")


@pytest.fixture(params=["fork", "spawn"])
def supervisor(request, monkeypatch):
    """Both ways in which a supervisor comes into being."""
    monkeypatch.setenv("MLFLOW_REMOTE_SUPERVISOR", request.param)
    return request.param


def submit(project, **config):
    return mlflow.projects.run(
        str(project),
        backend="remote",
        env_manager="local",
        synchronous=False,
        backend_config={"stream_output": False, **config},
    )


def all_runs():
    return mlflow.search_runs(search_all_experiments=True, output_format="list")


def folder_of(run):
    return RunFolder(run.run_id)


def supervisor_pid(run):
    return folder_of(run).said()["pid"]


def is_alive(pid):
    """Until its last thread is dead: so long it holds its files, and its locks, though its first one is a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z" or len(threads) > 1


AFTER_A_DOWNLOAD = """
import gc, sys, threading
import mlflow
with mlflow.start_run() as earlier:
    mlflow.log_text("text", "file")
gc.disable()  # so that the pool is surely still there
mlflow.artifacts.download_artifacts(run_id=earlier.info.run_id, artifact_path="file", dst_path=sys.argv[2])
assert threading.active_count() > 1
run = mlflow.projects.run(
    sys.argv[1], backend="remote", env_manager="local", synchronous=False, backend_config={"stream_output": False}
)
print(run.run_id)
"""


def test_a_submitter_that_has_downloaded_artifacts_still_forks(sqlite_tracking, make_project, tmp_path):
    """MLflow leaves a pool of idle threads behind for each download, until they are collected."""
    project = waiting_project(make_project, tmp_path / "stop")
    command = [sys.executable, "-c", AFTER_A_DOWNLOAD, project, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = attach(done.stdout.split()[-1])
    until_logged(run, "before")
    assert b"download_artifacts" in Path(f"/proc/{supervisor_pid(run)}/cmdline").read_bytes()  # as its submitter's
    (tmp_path / "stop").touch()
    assert ended(run).status == "FINISHED"


# -- the submitter dies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "points"), [("fork", 14), ("spawn", 3)])
def test_a_submitter_killed_at_any_line_leaves_a_run_that_ends_right_or_none(
    how, points, sqlite_tracking, make_project, home, tmp_path, monkeypatch
):
    """Each run either ran its program once and is FINISHED, or is closed, never ran it and says why."""
    monkeypatch.setenv("MLFLOW_REMOTE_SUPERVISOR", how)
    ran = tmp_path / "ran"
    ran.mkdir()
    project = make_project(f'echo once >> "{ran}/$MLFLOW_RUN_ID"')
    done = subprocess.run(
        [sys.executable, SUBMITTER, project, str(points)], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert report.count("killed") >= points - 1, report

    runs = [ended(attach(run.info.run_id)) for run in all_runs()]
    assert len(runs) > points // 3, report
    for view in runs:
        runs_of_program = (ran / view.run_id).read_text().count("once") if (ran / view.run_id).exists() else 0
        if view.status == "FINISHED":
            assert runs_of_program == 1
        else:
            assert (runs_of_program, view.tag("reason")) == (0, "BOOTSTRAP"), view
            assert "submitting process ended" in view.tag("message")
    assert {view.status for view in runs} == {"FINISHED", "FAILED"}, report
    tracking = Tracking(sqlite_tracking)
    until(lambda: (list(gc.collect(tracking)), not list(all_folders()))[1], 30, "the folders removed")
    assert not list(home.temporary.iterdir())


def test_a_supervisor_that_starts_anew_does_without_the_libraries_of_training(
    sqlite_tracking, make_project, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_REMOTE_SUPERVISOR", "spawn")
    run = submit(waiting_project(make_project, tmp_path / "stop"))
    until_logged(run, "before")
    maps = Path(f"/proc/{supervisor_pid(run)}/maps")
    until(lambda: "sqlalchemy" in maps.read_text(), 60, "MLflow loaded")
    until(lambda: attach(run.run_id).view().tag("phase") == "running", 60, "the run's phase written")
    loaded = maps.read_text()
    (tmp_path / "stop").touch()
    assert ended(run).status == "FINISHED"
    assert not [name for name in ("pandas", "numpy", "scipy", "sklearn") if name in loaded]


def test_submitters_that_begin_at_once_never_take_each_others_folder_for_a_dead_ones(tmp_path):
    def submit_often():
        for _ in range(100):
            with submission_folder.opened(tmp_path) as own:
                (own.scratch / "archive").write_text("packed")

    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(submit_often) for _ in range(8)]:
            each.result()
    assert not list((tmp_path / "submissions").iterdir())


# -- the supervisor dies -----------------------------------------------------------------------------------------------


def waiting_project(make_project, stop, after="echo after"):
    return make_project(f"echo before; while [ ! -e {stop} ]; do sleep 0.1; done; {after}")


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid), 30, f"process {pid} dead")


def until_logged(run, line):
    until(lambda: line in run.logs(), 60, f"{line!r} in the log")


def test_the_program_outlives_its_supervisor_and_the_next_look_finds_somebody_to_finish_it(
    supervisor, sqlite_tracking, make_project, tmp_path
):
    run = submit(waiting_project(make_project, tmp_path / "stop", "echo after; exit 5"))
    until_logged(run, "before")
    first = supervisor_pid(run)
    kill(first)
    assert run.get_status() == "RUNNING"  # a look is all it needs
    until(lambda: folder_of(run).supervised() and supervisor_pid(run) != first, 60, "another supervisor")
    (tmp_path / "stop").touch()
    view = ended(run)
    assert (view.status, view.tag("exit_code")) == ("FAILED", "5")
    assert stored_log(run.run_id) == b"before\nafter\n"


def test_a_program_that_ended_while_nobody_watched_is_finalised_by_the_next_look(
    sqlite_tracking, make_project, tmp_path
):
    run = submit(waiting_project(make_project, tmp_path / "stop", "mkdir -p outputs; echo r > outputs/result"))
    until_logged(run, "before")
    kill(supervisor_pid(run))
    (tmp_path / "stop").touch()
    until(lambda: Spool(folder_of(run).spool).exit(), 60, "the program's end")
    list(gc.collect(Tracking(sqlite_tracking)))
    view = ended(run)
    assert (view.status, view.tag("reason")) == ("FINISHED", "OK")
    assert {each.path for each in mlflow.MlflowClient().list_artifacts(run.run_id, "outputs")} == {"outputs/result"}


def test_a_supervisor_and_its_execute_killed_together_leave_no_program_and_no_false_end(
    sqlite_tracking, make_project, tmp_path
):
    run = submit(waiting_project(make_project, tmp_path / "stop"))
    until_logged(run, "before")
    started = Spool(folder_of(run).spool).started()
    kill(supervisor_pid(run))
    kill(started.execute_pid)
    view = ended(run)
    assert (view.status, view.tag("reason")) == ("FAILED", "KILLED_BY_SYSTEM")
    assert stored_log(run.run_id) == b"before\n"
    assert not is_alive(started.pid)


def test_a_supervisor_that_dies_before_the_program_started_ends_the_run_and_starts_nothing(
    sqlite_tracking, make_project, tmp_path, monkeypatch
):
    """Whoever looks has neither the submitter's variables nor its secrets."""
    monkeypatch.setattr("mlflow_remote_backend.runner.supervise.prepare", lambda *args: signal.pause())
    monkeypatch.setenv("MLFLOW_REMOTE_SUPERVISOR", "fork")
    run = submit(make_project(f"touch {tmp_path}/ran"))
    until(lambda: folder_of(run).said().get("phase") == "preparing", 60, "preparing")
    kill(supervisor_pid(run))
    monkeypatch.undo()
    view = ended(attach(run.run_id))
    assert (view.status, view.tag("reason")) == ("FAILED", "KILLED_BY_SYSTEM")
    assert "before it had started the program" in view.tag("message")
    assert not (tmp_path / "ran").exists()


def kill_for_good(run):
    """The run's supervisor, whom nobody replaces then."""
    kill(supervisor_pid(run))
    for _ in range(100):
        folder_of(run).count_recovery()


def test_a_supervisor_that_always_dies_does_not_come_back_for_ever(sqlite_tracking, make_project, tmp_path):
    run = submit(waiting_project(make_project, tmp_path / "stop"))
    until_logged(run, "before")
    started = Spool(folder_of(run).spool).started()
    kill_for_good(run)
    kill(started.execute_pid)
    view = ended(run)
    assert (view.status, view.tag("reason")) == ("FAILED", "KILLED_BY_SYSTEM")
    os.kill(started.pid, signal.SIGKILL)


def test_what_this_machine_does_not_do_is_said(sqlite_tracking, make_project, capfd):
    project = make_project("echo limited by nothing")
    with pytest.raises(ExecutionException, match="this machine keeps none"):
        submit(project, secrets={"DB": "database/password"})
    run = submit(project, resources={"memory": "100Mi"})
    assert "resources are not limited by the compute local" in capfd.readouterr().err
    assert ended(run).status == "FINISHED"


def test_a_killed_runner_is_no_want_of_memory_where_nothing_limits_it(sqlite_tracking, make_project, tmp_path):
    run = submit(waiting_project(make_project, tmp_path / "stop"), resources={"memory": "1Mi"})
    until_logged(run, "before")
    started = Spool(folder_of(run).spool).started()
    until(lambda: Spool(folder_of(run).spool).vitals(), 30, "the memory in use was looked at")
    kill(started.execute_pid)
    view = ended(run)
    assert (view.status, view.tag("reason")) == ("FAILED", "KILLED_BY_SYSTEM")
    assert "memory" not in view.tag("message")
    with contextlib.suppress(ProcessLookupError):
        os.kill(started.pid, signal.SIGKILL)


def test_what_the_user_sets_wins_over_what_is_only_usual(sqlite_tracking, make_project):
    run = submit(make_project('echo "[$PYTHONUNBUFFERED]"'), env_vars={"PYTHONUNBUFFERED": ""})
    assert ended(run).status == "FINISHED"
    assert stored_log(run.run_id) == b"[]\n"


STEPS = """
import mlflow, sys
mlflow.projects.run(sys.argv[1], backend="remote", env_manager="local")
"""


def test_the_step_that_a_cancelled_project_waits_for_is_cancelled_too(sqlite_tracking, make_project, tmp_path):
    step = waiting_project(make_project, tmp_path / "stop")
    whole = make_project(f'"{sys.executable}" steps.py "{step}"', name="whole", files={"steps.py": STEPS})
    run = submit(whole)

    def inner():
        return [each.info.run_id for each in all_runs() if each.info.run_id != run.run_id]

    until_logged(attach(until(inner, 60, "the step's run")[0]), "before")
    run.cancel()
    assert ended(run).status == "KILLED"
    assert ended(attach(inner()[0]), 30).status == "KILLED"
    assert not (tmp_path / "stop").exists()


def test_a_program_does_not_outlive_its_run(sqlite_tracking, make_project, tmp_path):
    run = submit(waiting_project(make_project, tmp_path / "stop"))
    until_logged(run, "before")
    started = Spool(folder_of(run).spool).started()
    kill_for_good(run)
    assert ended(run).status == "FAILED"
    until(lambda: not is_alive(started.pid) and not is_alive(started.execute_pid), 30, "program and execute have ended")
    assert not folder_of(run).exists()


def test_a_machine_without_room_for_a_supervisor_says_so(sqlite_tracking, make_project, monkeypatch):
    fork, forks = os.fork, []

    def second_fails():
        forks.append(1)
        if len(forks) > 1:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setenv("MLFLOW_REMOTE_SUPERVISOR", "fork")
    monkeypatch.setattr(os, "fork", second_fails)
    with pytest.raises(ExecutionException, match="No supervisor process can be started"):
        submit(make_project("echo x"))
    (run,) = all_runs()
    assert (run.info.status, run.data.tags["mlflow_remote.reason"]) == ("FAILED", "BOOTSTRAP")
    assert not list(all_folders())


def test_who_ignores_its_children_can_submit(sqlite_tracking, make_project, monkeypatch):
    monkeypatch.setenv("MLFLOW_REMOTE_SUPERVISOR", "fork")
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        run = submit(make_project("echo x"))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert ended(run).status == "FINISHED"


def test_who_waits_for_a_run_that_is_deleted_is_told_so(sqlite_tracking, make_project, tmp_path, mlflow_run):
    process = mlflow_run.start(waiting_project(make_project, tmp_path / "stop"), "--backend", "remote")
    run_id = until(lambda: [each.info.run_id for each in all_runs()], 60, "a run")[0]
    until_logged(attach(run_id), "before")
    mlflow.MlflowClient().delete_run(run_id)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"Run {run_id} was deleted" in said
    until(lambda: not list(all_folders()), 30, "its folder removed")


def test_a_long_lived_submitter_has_no_zombies_and_no_threads_left(supervisor, sqlite_tracking, make_project):
    before = {each.ident for each in threading.enumerate()}
    for run in [submit(make_project("echo x", name=f"p{i}")) for i in range(2)]:
        assert ended(run).status == "FINISHED"
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if not is_alive(pid)]
    assert {each.ident for each in threading.enumerate()} <= before


# -- a job that is still being created ---------------------------------------------------------------------------------


def test_who_attaches_while_the_job_is_being_created_waits_for_it(sqlite_tracking, make_project, monkeypatch, capfd):
    """And judges nothing: there is no job yet, which is no proof that there will be none."""
    attached = []
    original = LocalCompute.submit

    def submit_slowly(compute, request, secrets):
        run = attach(request.spec.run.run_id)
        waiting = threading.Thread(target=lambda: attached.append(run.follow(sys.stdout)))
        waiting.start()
        assert run.get_status() == "RUNNING"
        list(gc.collect(Tracking(sqlite_tracking)))
        waiting.join(1.0)
        assert waiting.is_alive()
        return original(compute, request, secrets)

    monkeypatch.setattr(LocalCompute, "submit", submit_slowly)
    run = submit(make_project("echo hello"))
    assert ended(run).status == "FINISHED"
    until(lambda: attached, 30, "the end for who attached")
    assert attached[0].status == "FINISHED"
    assert capfd.readouterr().out == "hello\n"


def test_a_submission_that_fails_half_way_ends_its_run_and_its_job(sqlite_tracking, make_project, monkeypatch):
    original = LocalCompute.submit

    def fail_late(compute, request, secrets):
        original(compute, request, secrets)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalCompute, "submit", fail_late)
    with pytest.raises(KeyboardInterrupt):
        submit(make_project("sleep 3600"))
    (run,) = all_runs()
    view = attach(run.info.run_id).view()
    assert (view.ended, view.status, view.tag("reason")) == (True, "KILLED", "CANCELLED")
    assert not list(all_folders())


# -- many --------------------------------------------------------------------------------------------------------------


def test_many_runs_submitted_side_by_side_are_neither_lost_nor_mixed_up(tracking, make_project):
    project = make_project("echo run {number}; exit $(({number} % 3))", parameters={"number": "string"})

    def run(number):
        submitted = mlflow.projects.run(
            str(project),
            parameters={"number": number},
            backend="remote",
            env_manager="local",
            synchronous=False,
            backend_config={"stream_output": False},
        )
        return number, ended(submitted)

    with ThreadPoolExecutor(4) as pool:
        for number, view in pool.map(run, range(12)):
            assert view.tag("exit_code") == str(number % 3)
            assert view.status == ("FAILED" if number % 3 else "FINISHED")
            assert stored_log(view.run_id) == f"run {number}\n".encode()
    until(lambda: not list(all_folders()), 30, "the folders removed")


def test_the_same_submission_id_at_the_same_time_makes_one_job(sqlite_tracking, make_project, tmp_path):
    project = make_project(f"echo once >> {tmp_path}/ran")
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: submit(project, submission_id="at-once"), range(3)))
    assert len({run.run_id for run in runs}) == 1
    assert ended(runs[0]).status == "FINISHED"
    assert (tmp_path / "ran").read_text() == "once\n"


def test_a_submission_that_is_continued_names_the_archive_that_it_named_before(
    sqlite_tracking, make_project, monkeypatch
):
    """Its job may exist already, and is known again by its envelope."""
    project = make_project("echo x")
    named = []

    def note(compute, request, secrets):
        named.append(request.spec.snapshot.uri)
        raise RuntimeError

    with monkeypatch.context() as dying:
        dying.setattr(LocalCompute, "submit", note)
        dying.setattr(submission, "_failure_ends", lambda *_: contextlib.nullcontext())
        with pytest.raises(RuntimeError):
            submit(project, submission_id="half")
    with monkeypatch.context() as at_once:
        at_once.setattr(Tracking, "stored_snapshot", lambda *_: None)
        assert ended(submit(project)).status == "FINISHED"
    monkeypatch.setattr(LocalCompute, "submit", note)
    with pytest.raises(RuntimeError):
        submit(project, submission_id="half")
    assert named[0] == named[1]


# -- gc ----------------------------------------------------------------------------------------------------------------


def test_gc_asks_no_server_about_the_jobs_of_another_one(sqlite_tracking, make_project, tmp_path, database_template):
    """It would not know the run, and the folder holds what was not uploaded yet."""
    run = submit(waiting_project(make_project, tmp_path / "stop"))
    until_logged(run, "before")
    kill(supervisor_pid(run))
    long_ago = time.time() - 3600
    os.utime(folder_of(run).path, (long_ago, long_ago))
    other = copy_database(database_template, tmp_path / "other.db", str(tmp_path))
    assert [each for each in gc.collect(Tracking(f"sqlite:///{other}")) if each.kind == "folder"] == []
    assert folder_of(run).exists()
    (tmp_path / "stop").touch()
    assert ended(run).status == "FINISHED"


def test_gc_goes_on_after_a_job_whose_engine_cannot_be_named_any_more(
    sqlite_tracking, make_project, tmp_path, monkeypatch
):
    run = submit(waiting_project(make_project, tmp_path / "stop"))
    until_logged(run, "before")
    kill(supervisor_pid(run))

    def refuse(*_):
        raise ConfigError("The Docker engine's TLS files cannot be used.")

    with monkeypatch.context() as gone:
        gone.setattr(gc, "_folder_action", refuse)
        gone.setattr(gc, "_deployments", lambda dry_run: iter([gc.Collected("deployment", "toy", "removed")]))
        done = list(gc.failures(gc.collect(Tracking(sqlite_tracking))))
    assert [each.kind for each in done if each.kind in ("error", "deployment")] == ["error", "deployment"]
    (tmp_path / "stop").touch()
    assert ended(run).status == "FINISHED"


# -- the lock's way to a new process -----------------------------------------------------------------------------------

HAND_OVER = """
import os, sys
from pathlib import Path
from mlflow_remote_backend.runner.run_folder import RunFolder
from mlflow_remote_backend.runner.supervise import Start, _spawn

folder = RunFolder("a" * 32, Path(sys.argv[1]))
folder.path.mkdir(parents=True)
for number in range(3, 12):
    lock = folder.try_lock()
    while lock is None:  # the last one, which finds no envelope and ends
        lock = folder.try_lock()
    if lock != number:
        os.dup2(lock, number, inheritable=False)
        os.close(lock)
    _spawn(folder, number, "nothing:Program", Start(dict(os.environ)))
    os.close(number)
    print(number, folder.supervised())
"""


def test_a_spawned_supervisor_holds_the_lock_whatever_its_number(tmp_path):
    """Otherwise whoever looks before it has said anything takes it for dead."""
    done = subprocess.run([sys.executable, "-c", HAND_OVER, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [f"{number} True" for number in range(3, 12)], done.stderr


def test_an_index_of_the_log_that_is_half_written_is_as_good_as_none(sqlite_tracking, make_project):
    """A store may replace an artifact in place: whoever reads it then gets half of it."""
    run = submit(make_project("echo something"))
    run.wait()
    index = mlflow.artifacts.load_text(f"runs:/{run.run_id}/logs/index.json")
    mlflow.MlflowClient().log_text(run.run_id, index[: len(index) // 2], "logs/index.json")
    assert list(attach(run.run_id).logs()) == []
    mlflow.MlflowClient().log_text(run.run_id, index, "logs/index.json")
    assert list(attach(run.run_id).logs()) == ["something"]


def test_the_environment_of_a_running_job_is_in_use_for_whoever_shares_the_cache(
    sqlite_tracking, make_project, monkeypatch, tmp_path
):
    monkeypatch.setenv("MLFLOW_REMOTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_started_here", lambda path: False)  # as on another machine
    run = mlflow.projects.run(
        str(make_project("echo ready; sleep 60")), backend="remote", env_manager="uv", synchronous=False
    )
    until_logged(run, "ready")
    assert cache.prune(tmp_path / "cache", 0.0).environments == ()
    run.cancel()
    assert ended(run).status == "KILLED"
    until(lambda: cache.prune(tmp_path / "cache", 0.0).environments, 10, "the environment to be free")


def test_a_cancel_while_the_environment_is_made_ends_the_program_that_makes_it(
    sqlite_tracking, make_project, monkeypatch, tmp_path
):
    """Else it would go on writing into the prefix, which the next builder makes."""
    monkeypatch.setenv("MLFLOW_REMOTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_REMOTE_SUPERVISOR", "fork")
    script = "echo $$ > draft; mv draft pid; while :; do sleep 0.1; done"

    def build(*_):
        return tool.run(["sh", "-c", script], cwd=tmp_path, environ=os.environ, timeout_s=3600)

    monkeypatch.setattr(materialise, "_build", build)
    run = mlflow.projects.run(str(make_project("echo never")), backend="remote", env_manager="uv", synchronous=False)
    until((tmp_path / "pid").exists, 60, "the program that makes the environment")
    pid = int((tmp_path / "pid").read_text())
    run.cancel()
    view = ended(run)
    assert (view.status, view.tag("reason")) == ("KILLED", "CANCELLED")
    until(lambda: not list(all_folders()), 30, "the folder removed")
    assert not is_alive(pid)


# -- this machine's disk is full ---------------------------------------------------------------------------------------


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_supervisor_that_cannot_tell_where_it_is_goes_on(tmp_path, monkeypatch):
    folder = RunFolder("run", tmp_path)
    folder.path.mkdir(parents=True)
    folder.say("running")
    monkeypatch.setattr(run_folder, "write_json", no_room)
    folder.say("finalizing")
    assert folder.said()["phase"] == "running"


def test_a_dead_supervisor_is_replaced_once_there_is_room_again(tmp_path, monkeypatch):
    compute = LocalCompute(tmp_path)
    folder = RunFolder("run", tmp_path)
    folder.path.mkdir(parents=True)
    folder.say("running")
    monkeypatch.setattr(RunFolder, "count_recovery", no_room)
    with pytest.raises(ComputeError, match="cannot be written") as raised:
        compute.recover(compute.handle_of(folder))
    assert raised.value.transient
    assert not folder.supervised()


def test_a_job_can_be_cancelled_all_the_same(tmp_path, monkeypatch):
    compute = LocalCompute(tmp_path)
    folder = RunFolder("run", tmp_path)
    folder.path.mkdir(parents=True)
    monkeypatch.setattr(run_folder, "replace_text", no_room)
    compute.cancel(compute.handle_of(folder))
    assert folder.cancel.read_text() == ""

    def ended_meanwhile(path, text):
        folder.remove()
        raise FileNotFoundError(path)

    monkeypatch.setattr(run_folder, "replace_text", ended_meanwhile)
    compute.cancel(compute.handle_of(folder))
    assert not folder.exists()


def test_a_submission_that_does_not_fit_ends_its_run_and_leaves_nothing(sqlite_tracking, make_project, monkeypatch):
    monkeypatch.setattr(supervised, "shutil", SimpleNamespace(copyfile=no_room))
    with pytest.raises(ExecutionException, match="cannot be copied"):
        submit(make_project("echo x"))
    (run,) = all_runs()
    assert (run.info.status, run.data.tags["mlflow_remote.reason"]) == ("FAILED", "BOOTSTRAP")
    assert not list(all_folders())
