"""Ctrl-C, closed terminals and termination signals while somebody waits; what the command and ``run()`` then answer."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys

import mlflow
import pytest

from mlflow_remote_backend.submitted_run import attach
from mlflow_remote_backend.testing import ended, stored_log, until

pytestmark = pytest.mark.usefixtures("no_leftovers")

ENDLESS = "echo started; while :; do sleep 0.1; done"
STUBBORN = "trap '' TERM; " + ENDLESS
LEAVES = "trap 'echo leaving; exit 0' TERM; echo started; while [ ! -e {stop} ]; do sleep 0.1; done; echo stopped"


class Terminal:
    """``mlflow run`` at a terminal of its own. ``shown``: all that was printed there."""

    def __init__(self, project, *, env, cwd, options=()):
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "mlflow", "run", "--env-manager", "local", "--backend", "remote", *options]
        self.process = subprocess.Popen(
            [*command, str(project)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, **env},
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        os.set_blocking(self._master, False)
        self.shown = ""

    def read(self):
        with contextlib.suppress(BlockingIOError, OSError):
            while data := os.read(self._master, 65536):
                self.shown += data.decode(errors="replace")
        return self.shown

    def until_shown(self, text):
        until(lambda: text in self.read() or self.process.poll() is not None, 90, f"{text!r} on the terminal")
        assert text in self.read(), self.shown

    def ctrl_c(self):
        os.write(self._master, b"\x03")

    def hang_up(self):
        os.close(self._master)

    def exit_code(self):
        until(lambda: (self.read(), self.process.poll())[1] is not None, 90, "the command's end")
        return self.process.returncode


def _take_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def at_terminal(workdir):
    started = []

    def run(project, *options, **env):
        started.append(Terminal(project, env=env, cwd=workdir, options=options))
        return started[-1]

    yield run
    for each in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.process.pid, signal.SIGKILL)
        each.process.wait()


def only_run():
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return attach(run.info.run_id)


def cancel(run):
    run.cancel()
    return ended(run)


def test_ctrl_c_cancels_and_the_command_exits_130(sqlite_tracking, make_project, at_terminal, tmp_path):
    terminal = at_terminal(make_project(LEAVES.format(stop=tmp_path / "stop")))
    terminal.until_shown("started")
    terminal.ctrl_c()
    assert terminal.exit_code() == 130, terminal.shown
    assert "cancelling" in terminal.shown
    assert "Traceback" not in terminal.shown
    view = only_run().view()
    assert (view.ended, view.status, view.tag("reason")) == (True, "KILLED", "CANCELLED")
    assert stored_log(view.run_id).endswith(b"leaving\n")


def test_a_second_ctrl_c_detaches_and_the_cancel_goes_on(sqlite_tracking, make_project, at_terminal):
    terminal = at_terminal(make_project(STUBBORN), "--backend-config", '{"grace_period": "8s"}')
    terminal.until_shown("started")
    terminal.ctrl_c()
    terminal.until_shown("Ctrl-C again")
    terminal.ctrl_c()
    assert terminal.exit_code() == 3, terminal.shown
    run = only_run()
    assert f"mlflow-remote status {run.run_id}" in terminal.shown
    assert not run.view().ended
    assert ended(run).status == "KILLED"


def test_on_interrupt_detach_leaves_the_run_alone(sqlite_tracking, make_project, at_terminal, tmp_path):
    stop = tmp_path / "stop"
    config = '{"on_interrupt": "detach"}'
    terminal = at_terminal(make_project(LEAVES.format(stop=stop)), "--backend-config", config)
    terminal.until_shown("started")
    terminal.ctrl_c()
    assert terminal.exit_code() == 3, terminal.shown
    stop.touch()
    view = ended(only_run())
    assert (view.status, stored_log(view.run_id)) == ("FINISHED", b"started\nstopped\n")


@pytest.mark.parametrize("how", ["SIGTERM", "hang up"])
def test_termination_and_a_closed_terminal_detach(how, sqlite_tracking, make_project, at_terminal, tmp_path):
    stop = tmp_path / "stop"
    terminal = at_terminal(make_project(LEAVES.format(stop=stop)))
    terminal.until_shown("started")
    if how == "hang up":
        terminal.hang_up()
    else:
        terminal.process.send_signal(getattr(signal, how))
    until(lambda: terminal.process.poll() is not None, 60, "the command's end")
    assert terminal.process.returncode == 3
    stop.touch()
    view = ended(only_run())
    assert (view.status, stored_log(view.run_id)) == ("FINISHED", b"started\nstopped\n")


def test_ctrl_c_while_the_job_is_being_created_leaves_no_running_run(sqlite_tracking, make_project, at_terminal):
    terminal = at_terminal(make_project("echo hardly"))
    until(lambda: terminal.process.poll() is not None or _any_run(), 60, "a run")
    terminal.ctrl_c()
    code = terminal.exit_code()
    view = ended(only_run())
    assert (code, view.status) in {(130, "KILLED"), (0, "FINISHED")}, terminal.shown


def test_ctrl_c_while_the_environment_is_solved_ends_the_solver(sqlite_tracking, make_project, at_terminal, tmp_path):
    """It has a session of its own, where the terminal's signal does not come."""
    solver = tmp_path / "solver"
    solver.write_text(f"#!/bin/sh\ntouch {tmp_path}/solving\nwhile :; do sleep 0.1; done\n")
    solver.chmod(0o755)
    (tmp_path / "uv").mkdir()
    (tmp_path / "uv/__init__.py").write_text(f"def find_uv_bin(): return {str(solver)!r}\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    terminal = at_terminal(make_project("echo never"), "--env-manager", "uv", PYTHONPATH=path)
    until((tmp_path / "solving").exists, 60, "the solver")
    terminal.ctrl_c()
    assert terminal.exit_code() == 130, terminal.shown
    assert "cancelled before the job existed" in terminal.shown
    assert "Traceback" not in terminal.shown
    assert not _any_run()


def _any_run():
    return mlflow.search_runs(search_all_experiments=True, output_format="list")


# -- Python ------------------------------------------------------------------------------------------------------------


#: Shell: wait until the test's process catches SIGTERM, which it does while it follows the run.
UNTIL_WATCHED = (
    f"until [ $((0x$(sed -n 's/^SigCgt:[^0-9a-f]*//p' /proc/{os.getpid()}/status) >> {signal.SIGTERM - 1} & 1)) = 1 ]; "
    "do sleep 0.05; done"
)


def run_synchronously(project, **config):
    return mlflow.projects.run(
        str(project), backend="remote", env_manager="local", backend_config=config, synchronous=True
    )


def test_a_synchronous_run_shows_its_log_once_and_returns(sqlite_tracking, make_project, capfd):
    run = run_synchronously(make_project("echo shown; exit 0"), wait=True)
    assert capfd.readouterr().out == "shown\n"
    assert run.get_status() == "FINISHED"


@pytest.mark.parametrize("wait", ["auto", True])
def test_a_synchronous_run_that_fails_raises_with_its_last_lines_and_exit_code(wait, sqlite_tracking, make_project):
    project = make_project("for i in $(seq 60); do echo line $i; done; exit 9")
    with pytest.raises(mlflow.exceptions.ExecutionException) as caught:
        run_synchronously(project, wait=wait, stream_output=False)
    assert "line 60" in str(caught.value)
    assert "line 20\n" not in str(caught.value)
    assert (caught.value.exit_code, caught.value.code) == (9, "USER_ERROR")
    view = only_run().view()
    assert (view.ended, view.status, view.tag("exit_code")) == (True, "FAILED", "9")


def test_wait_false_returns_at_once_and_wait_answers(sqlite_tracking, make_project, tmp_path):
    stop = tmp_path / "stop"
    project = make_project(f"while [ ! -e {stop} ]; do sleep 0.1; done; exit 3")
    run = mlflow.projects.run(
        str(project),
        backend="remote",
        env_manager="local",
        backend_config={"wait": False, "stream_output": False},
        synchronous=False,
    )
    assert run.get_status() == "RUNNING"
    stop.touch()
    assert run.wait() is False
    assert (run.get_status(), run.exit_code) == ("FAILED", 3)


def test_a_detach_from_a_synchronous_run_is_no_keyboard_interrupt_and_writes_no_status(
    sqlite_tracking, make_project, tmp_path
):
    """MLflow's own waiting would mark the run FAILED."""
    stop = tmp_path / "stop"
    project = make_project(f"{UNTIL_WATCHED}; kill -TERM {os.getpid()}; while [ ! -e {stop} ]; do sleep 0.1; done")
    with pytest.raises(mlflow.exceptions.ExecutionException, match="Detached from run"):
        run_synchronously(project, stream_output=False)
    run = only_run()
    assert not run.view().ended
    stop.touch()
    assert ended(run).status == "FINISHED"


def test_ctrl_c_in_a_synchronous_run_ends_killed_not_failed(sqlite_tracking, make_project):
    project = make_project(f"trap 'exit 0' TERM; {UNTIL_WATCHED}; kill -INT {os.getpid()}; while :; do sleep 0.1; done")
    with pytest.raises(mlflow.exceptions.ExecutionException, match="KILLED"):
        run_synchronously(project, stream_output=False)
    view = only_run().view()
    assert (view.ended, view.status, view.tag("reason")) == (True, "KILLED", "CANCELLED")
