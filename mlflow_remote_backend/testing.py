"""The behavioural suite that every compute must pass, ours and others'. Needs pytest.

A new compute is one subclass in a test module, with one fixture::

    class TestMyCompute(ComputeContract):
        @pytest.fixture
        def backend_config(self):
            return {"compute": "my-compute", "my-compute": {...}}

The tests submit real projects through ``mlflow.projects.run`` to the tracking server that ``MLFLOW_TRACKING_URI``
names, and look at nothing but what a user can see: the run, its artifacts, the log. The programs are POSIX shell, so
that a compute whose image has no Python is tested as well.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from .errors import RemoteError
from .submitted_run import RemoteSubmittedRun, attach
from .tracking import RunView

HOSTILE_VALUES = (
    "$(touch PWNED)", "`touch PWNED`", "; touch PWNED", "'", '"', "-rf", "a\nb", " ", "", "😀", "{x}", "a" * 100_000,
)  # fmt: skip
PATIENCE_S = 120.0  # for a job to start and end; generous, since an image may have to be pulled


class Projects:
    """Makes little projects in ``folder`` and runs them on one compute."""

    def __init__(self, folder: Path, backend_config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.backend_config = dict(backend_config)
        self._count = 0

    def make(self, script: str, *, parameters: Mapping[str, Any] | None = None, command: str = "sh main.sh") -> Path:
        """A project whose entry point runs ``script`` by ``sh``."""
        self._count += 1
        project = self.folder / f"project-{self._count}"
        project.mkdir(parents=True)
        (project / "main.sh").write_text(textwrap.dedent(script))
        main = {"parameters": dict(parameters or {}), "command": command}
        (project / "MLproject").write_text(yaml.safe_dump({"name": "contract", "entry_points": {"main": main}}))
        return project

    def submit(
        self, project: Path, *, parameters: Mapping[str, Any] | None = None, **config: Any
    ) -> RemoteSubmittedRun:
        """Start the project and return at once."""
        import mlflow

        submitted: RemoteSubmittedRun = mlflow.projects.run(
            str(project),
            parameters=dict(parameters or {}),
            backend="remote",
            backend_config={**self.backend_config, "stream_output": False, **config},
            env_manager="local",
            synchronous=False,
        )
        return submitted

    def run(self, script: str, *, parameters: Mapping[str, Any] | None = None, **config: Any) -> RunView:
        """Run ``script`` to its end."""
        return ended(self.submit(self.make(script), parameters=parameters, **config))


def ended(run: RemoteSubmittedRun, patience_s: float = PATIENCE_S) -> RunView:
    """The run once it has its final status; fails the test if it does not get one."""
    view: RunView = until(lambda: (seen := run.view()).ended and seen, patience_s, f"run {run.run_id} ended")
    return view


def until(condition: Callable[[], Any], patience_s: float, what: str) -> Any:
    deadline = time.monotonic() + patience_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {patience_s} s: {what}"
        time.sleep(0.1)


def stored_log(run_id: str) -> bytes:
    """The stored log, put together from its parts as the index lists them, each part checked."""
    import hashlib

    import mlflow

    index = json.loads(artifact(run_id, "logs/index.json"))
    parts = [(part, artifact(run_id, part["path"])) for part in index["parts"]]
    for part, data in parts:
        assert len(data) == part["length"]
        assert hashlib.sha256(data).hexdigest() == part["sha256"]
    assert mlflow.MlflowClient().list_artifacts(run_id, "logs")
    return b"".join(data for _, data in parts)


def artifact(run_id: str, path: str) -> bytes:
    import mlflow

    with tempfile.TemporaryDirectory() as place:
        return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=path, dst_path=place)).read_bytes()


def artifacts(run_id: str, folder: str) -> set[str]:
    import mlflow

    return {each.path for each in mlflow.MlflowClient().list_artifacts(run_id, folder)}


class ComputeContract:
    """Subclass it and give ``backend_config``. Class attributes say what a compute is not expected to do."""

    big_line_bytes = 100 * 1024 * 1024

    @pytest.fixture
    def backend_config(self) -> Mapping[str, Any]:
        raise NotImplementedError("a subclass says how its compute is configured")

    @pytest.fixture
    def projects(self, tmp_path: Path, backend_config: Mapping[str, Any]) -> Projects:
        return Projects(tmp_path / "contract", backend_config)

    # -- the run holds everything --------------------------------------------------------------------------------------

    def test_a_successful_run_is_finished_and_says_so_everywhere(self, projects: Projects) -> None:
        view = projects.run("echo hello")
        assert (view.status, view.tag("reason"), view.tag("exit_code")) == ("FINISHED", "OK", "0")
        assert view.tag("phase") == "done"
        assert view.tag("finalized")
        assert view.tags["mlflow.project.backend"] == "remote"
        assert view.tags["mlflow.source.type"] == "PROJECT"
        assert view.tags["mlflow.project.entryPoint"] == "main"
        assert view.tag("handle").endswith(view.run_id) or view.run_id in view.tag("handle")
        assert view.tag("snapshot").startswith("sha256:")
        assert view.metrics["remote/seconds_run"] >= 0
        assert view.metrics["remote/seconds_snapshot"] >= 0
        assert stored_log(view.run_id) == b"hello\n"
        assert "logs/error.txt" not in artifacts(view.run_id, "logs")
        assert artifacts(view.run_id, "remote") >= {"remote/job.yaml"}

    def test_another_exit_code_than_0_is_failed(self, projects: Projects) -> None:
        codes = (1, 2, 77, 126, 127, 255)
        runs = [projects.submit(projects.make(f"echo before; exit {code}")) for code in codes]
        for code, view in zip(codes, map(ended, runs), strict=True):
            assert (view.status, view.tag("reason"), view.tag("exit_code")) == ("FAILED", "USER_ERROR", str(code))
            assert str(code) in view.tag("message")
            assert b"before" in artifact(view.run_id, "logs/error.txt")

    def test_a_program_that_dies_by_a_signal_is_failed_and_the_signal_named(self, projects: Projects) -> None:
        signals = {"SEGV": 11, "ABRT": 6, "USR1": 10}
        runs = [projects.submit(projects.make(f"echo before; kill -{name} $$")) for name in signals]
        for (name, number), view in zip(signals.items(), map(ended, runs), strict=True):
            assert (view.status, view.tag("exit_code")) == ("FAILED", str(128 + number))
            assert f"SIG{name}" in view.tag("message")

    def test_the_stored_log_equals_what_the_program_wrote_byte_for_byte(self, projects: Projects) -> None:
        view = projects.run(
            r"""
            printf 'plain\n'
            printf '\377\376 invalid \200 utf-8 \303'
            printf '\251 cut character\n'
            printf 'nul \000 byte\n'
            printf 'progress 1\rprogress 2\rprogress 3\r'
            printf '\033[31mred\033[0m \033]0;title\007\n'
            printf 'to stderr\n' >&2
            printf '\r\n\n\n   spaces   \n\t'
            printf 'no final newline'
            """
        )
        assert stored_log(view.run_id) == (
            b"plain\n"
            b"\xff\xfe invalid \x80 utf-8 \xc3\xa9 cut character\n"
            b"nul \0 byte\n"
            b"progress 1\rprogress 2\rprogress 3\r"
            b"\x1b[31mred\x1b[0m \x1b]0;title\x07\n"
            b"to stderr\n"
            b"\r\n\n\n   spaces   \n\t"
            b"no final newline"
        )

    def test_both_streams_keep_their_order(self, projects: Projects) -> None:
        view = projects.run("i=0; while [ $i -lt 500 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done")
        expected = b"".join(b"out %d\nerr %d\n" % (i, i) for i in range(500))
        assert stored_log(view.run_id) == expected

    def test_a_program_that_writes_nothing_has_an_empty_log(self, projects: Projects) -> None:
        view = projects.run("exit 0")
        assert view.status == "FINISHED"
        assert "".join(attach(view.run_id).logs()) == ""

    def test_one_enormous_line_is_stored_whole(self, projects: Projects) -> None:
        view = projects.run(f"head -c {self.big_line_bytes} /dev/zero | tr '\\0' x; echo; echo after")
        log = stored_log(view.run_id)
        assert len(log) == self.big_line_bytes + len("\nafter\n")
        assert log.count(b"x") == self.big_line_bytes
        assert log.endswith(b"x\nafter\n")

    def test_a_grandchild_that_holds_the_pipe_does_not_hold_the_run(self, projects: Projects) -> None:
        view = projects.run("sleep 3600 & echo started; exit 0")
        assert (view.status, view.tag("reason")) == ("FINISHED", "OK")
        assert stored_log(view.run_id) == b"started\n"

    @pytest.mark.parametrize("code", [0, 3])
    def test_outputs_are_stored_also_on_failure(self, projects: Projects, code: int) -> None:
        view = projects.run(
            f"""
            mkdir -p outputs/deep/er
            printf 'a table' > outputs/table.csv
            printf 'a picture' > "$MLFLOW_REMOTE_OUTPUT_DIR/deep/er/ü ñ.png"
            ln -s /etc/passwd outputs/link
            exit {code}
            """
        )
        assert artifact(view.run_id, "outputs/table.csv") == b"a table"
        assert artifact(view.run_id, "outputs/deep/er/ü ñ.png") == b"a picture"
        assert "outputs/link" not in artifacts(view.run_id, "outputs")

    def test_the_last_traceback_is_in_the_error(self, projects: Projects) -> None:
        view = projects.run(
            """
            echo 'Traceback (most recent call last):'
            echo '  File "train.py", line 7, in <module>'
            echo 'ValueError: no such column'
            i=0; while [ $i -lt 60 ]; do echo noise $i; i=$((i+1)); done
            exit 1
            """
        )
        error = artifact(view.run_id, "logs/error.txt").decode()
        assert "USER_ERROR" in error
        assert "ValueError: no such column" in error

    # -- the program's surroundings ------------------------------------------------------------------------------------

    def test_the_program_finds_its_project_its_run_and_no_input(self, projects: Projects) -> None:
        view = projects.run(
            """
            ls MLproject main.sh
            echo "run=$MLFLOW_RUN_ID experiment=$MLFLOW_EXPERIMENT_ID"
            echo "unbuffered=$PYTHONUNBUFFERED"
            if read line; then echo got input; else echo no input; fi
            [ -n "$MLFLOW_TRACKING_URI" ] && echo has tracking
            """,
            env_vars={"GREETING": 'it\'s "me" $HOME'},
        )
        assert view.status == "FINISHED"
        log = stored_log(view.run_id).decode()
        assert f"run={view.run_id} experiment={view.experiment_id}" in log
        assert "unbuffered=1" in log
        assert "no input" in log
        assert "has tracking" in log

    def test_variables_arrive_as_they_were_given(self, projects: Projects, monkeypatch: pytest.MonkeyPatch) -> None:
        value = 'it\'s "me" $HOME `id` \\ \n two lines ünï'
        monkeypatch.setenv("PASSED_ON", "passed " + value)
        view = projects.run(
            'printf "%s|%s" "$GREETING" "$PASSED_ON"', env_vars={"GREETING": value}, pass_env=["PASSED_ON"]
        )
        assert stored_log(view.run_id).decode() == f"{value}|passed {value}"

    def test_hostile_parameters_arrive_byte_equal_and_run_nothing(self, projects: Projects) -> None:
        values = {f"p{number}": value for number, value in enumerate(HOSTILE_VALUES)}
        project = projects.make(
            "printf '%s\\0' \"$@\"; [ ! -e PWNED ]",
            parameters=dict.fromkeys(values, "string"),
            command=" ".join(["sh main.sh", *(f"{{{name}}}" for name in values)]),
        )
        view = ended(projects.submit(project, parameters=values))
        assert view.status == "FINISHED"
        assert stored_log(view.run_id).decode().split("\0")[:-1] == list(HOSTILE_VALUES)

    def test_the_command_is_a_shells_with_pipes_and_variables(self, projects: Projects) -> None:
        project = projects.make("", command="echo {word} | tr a-z A-Z && X=1 && echo $X", parameters={"word": "string"})
        view = ended(projects.submit(project, parameters={"word": "loud"}))
        assert stored_log(view.run_id) == b"LOUD\n1\n"

    # -- ending it ---------------------------------------------------------------------------------------------------

    def test_cancel_ends_the_whole_process_group_and_the_run_is_killed(self, projects: Projects) -> None:
        run = projects.submit(projects.make("sleep 3600 & sleep 3600 & echo started; wait"))
        self.until_logged(run, "started")
        run.cancel()
        view = ended(run)
        assert (view.status, view.tag("reason")) == ("KILLED", "CANCELLED")

    def test_a_cancelled_program_has_its_grace_period(self, projects: Projects) -> None:
        run = projects.submit(
            projects.make(
                "trap 'echo saving; sleep 1; echo saved; exit 0' TERM; echo started; while :; do sleep 0.1; done"
            )
        )
        self.until_logged(run, "started")
        run.cancel()
        view = ended(run)
        assert (view.status, view.tag("reason")) == ("KILLED", "CANCELLED")
        assert stored_log(view.run_id).endswith(b"saving\nsaved\n")

    def test_a_program_that_ignores_sigterm_is_killed_after_the_grace_period(self, projects: Projects) -> None:
        run = projects.submit(
            projects.make("trap '' TERM; echo started; while :; do sleep 0.1; done"), grace_period="2s"
        )
        self.until_logged(run, "started")
        run.cancel()
        assert ended(run).status == "KILLED"

    def test_cancel_is_idempotent_and_never_raises(self, projects: Projects) -> None:
        run = projects.submit(projects.make("echo done"))
        ended(run)
        run.cancel()
        run.cancel()
        assert run.get_status() == "FINISHED"

    def test_a_program_that_runs_too_long_is_stopped_and_failed(self, projects: Projects) -> None:
        view = projects.run("echo started; sleep 3600", timeout="2s", grace_period="1s")
        assert (view.status, view.tag("reason")) == ("FAILED", "TIMEOUT")
        assert "2" in view.tag("message")
        assert stored_log(view.run_id) == b"started\n"

    def test_the_exit_code_wins_over_a_status_that_the_program_wrote(self, projects: Projects) -> None:
        import mlflow

        run = projects.submit(projects.make("echo started; sleep 5; exit 5"))
        self.until_logged(run, "started")
        mlflow.MlflowClient().set_terminated(run.run_id, "FINISHED")
        assert run.get_status() == "RUNNING"
        view = ended(run)
        assert (view.status, view.tag("exit_code")) == ("FAILED", "5")

    # -- nobody watching -----------------------------------------------------------------------------------------------

    def test_wait_answers_and_the_log_is_shown(self, projects: Projects, capsys: pytest.CaptureFixture[str]) -> None:
        run = projects.submit(projects.make("echo one; sleep 0.3; echo two"), stream_output=True)
        assert run.wait() is True
        assert capsys.readouterr().out == "one\ntwo\n"
        failing = projects.submit(projects.make("echo no; exit 4"), stream_output=True)
        assert failing.wait() is False
        assert (failing.exit_code, failing.reason) == (4, "USER_ERROR")

    def test_a_killed_submitter_leaves_a_run_that_ends_right(self, projects: Projects) -> None:
        project = projects.make("echo started; sleep 3; echo survived; exit 6")
        run_id = self.submit_and_die(projects, project)
        view = ended(attach(run_id))
        assert (view.status, view.tag("exit_code")) == ("FAILED", "6")
        assert list(attach(run_id).logs()) == ["started", "survived"]

    def test_another_process_attaches_and_shows_the_whole_log_once(self, projects: Projects) -> None:
        run = projects.submit(projects.make("i=0; while [ $i -lt 40 ]; do echo $i; i=$((i+1)); sleep 0.05; done"))
        self.until_logged(run, "5")
        assert [*attach(run.run_id[:12]).logs(follow=True)] == [str(i) for i in range(40)]
        assert [*attach(run.run_id).logs()] == [str(i) for i in range(40)]

    def test_the_same_submission_id_never_makes_two_jobs(self, projects: Projects) -> None:
        project = projects.make("echo once")
        first = projects.submit(project, submission_id="contract-1")
        second = projects.submit(project, submission_id="contract-1")
        assert first.run_id == second.run_id
        assert ended(second).status == "FINISHED"
        assert stored_log(first.run_id) == b"once\n"

    def test_a_given_run_is_used(self, projects: Projects) -> None:
        import mlflow

        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID", "0")
        given = mlflow.MlflowClient().create_run(experiment).info.run_id
        run = projects.submit(projects.make("echo mine"), run_id=given, run_name="a name")
        assert run.run_id == given
        view = ended(run)
        assert (view.status, view.name) == ("FINISHED", "a name")

    # -- parts ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def until_logged(run: RemoteSubmittedRun, line: str) -> None:
        """Wait until the program has written ``line``."""

        def shown() -> bool:
            try:
                return line in run.logs()
            except RemoteError:
                return False

        until(shown, PATIENCE_S, f"{line!r} in the log of {run.run_id}")

    @staticmethod
    def submit_and_die(projects: Projects, project: Path) -> str:
        """Submit in another process and SIGKILL it as soon as the job exists; its run id."""
        code = (
            "import json, mlflow, os, sys, time\n"
            "run = mlflow.projects.run(sys.argv[1], backend='remote', env_manager='local', synchronous=False,\n"
            "                          backend_config=json.loads(sys.argv[2]))\n"
            "print(run.run_id, flush=True)\n"
            "time.sleep(3600)\n"
        )
        config = json.dumps({**projects.backend_config, "stream_output": False})
        submitter = subprocess.Popen(
            [sys.executable, "-c", code, str(project), config], stdout=subprocess.PIPE, text=True
        )
        assert submitter.stdout is not None
        with submitter.stdout:
            run_id = submitter.stdout.readline().strip()
        submitter.send_signal(signal.SIGKILL)
        submitter.wait()
        assert run_id, "the submitter died before the job existed"
        return run_id
