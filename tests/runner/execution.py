"""Runs ``execute`` as a compute would: a spool, a command, a process. Both twins, any interpreter. And makes runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_remote_backend.job import RunRef
from mlflow_remote_backend.runner import spool as spool_module
from mlflow_remote_backend.runner.spool import Command, ExitRecord, Spool

SCRIPTS = Path(spool_module.__file__).parent
PYTHON = (sys.executable, "-I", "-S", str(SCRIPTS / "execute.py"))


def interpreters() -> dict[str, tuple[str, ...]]:
    """What can run ``execute`` on this machine: this Python, the oldest supported one if it is here, and shells."""
    found = {"python": PYTHON}
    oldest = _runnable("python3.7")
    if oldest:
        found["python3.7"] = (oldest, *PYTHON[1:])
    shells = {"sh": ("sh",), "dash": ("dash",), "busybox": ("busybox", "sh")}
    programs = set()
    for name, command in shells.items():
        program = os.path.realpath(shutil.which(command[0]) or "")
        if program not in (*programs, os.path.realpath("")):
            programs.add(program)
            found[name] = (*command, str(SCRIPTS / "execute.sh"))
    return found


def _runnable(name: str) -> str | None:
    path = shutil.which(name)
    if path is None or subprocess.run([path, "-c", ""], capture_output=True).returncode != 0:
        return None
    return path


@dataclass
class Execution:
    """One started ``execute``."""

    spool: Spool
    process: subprocess.Popen[bytes]

    def log(self) -> bytes:
        return self.spool.log.read(0, 1 << 40)

    def wait(self, timeout_s: float = 60) -> ExitRecord:
        """Its exit record, once it has ended. The process's exit code is the record's."""
        self.process.wait(timeout_s)
        ended = self.spool.exit()
        assert ended is not None, self.log()[-2000:]
        assert self.process.returncode == ended.exit_code
        return ended

    def until_log_has(self, text: bytes, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.log():
            assert time.monotonic() < deadline, f"{text!r} not in the log: {self.log()[-2000:]!r}"
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Starter:
    """``starter(script)`` starts ``execute`` on a shell script; keywords go into its Command."""

    folder: Path
    interpreter: tuple[str, ...] = PYTHON
    started: list[Execution] = field(default_factory=list)

    def __call__(
        self, script: str = "", *, options: tuple[str, ...] = (), popen: dict[str, Any] | None = None, **command: Any
    ) -> Execution:
        spool = Spool.create(self.folder / f"spool-{len(self.started)}")
        spool.write_command(Command(**{"argv": ("bash", "-c", script), "cwd": str(self.folder), **command}))
        arguments = [*self.interpreter, *options, str(spool.path)]
        keywords = {"stdin": subprocess.DEVNULL, "start_new_session": True, **(popen or {})}
        self.started.append(Execution(spool, subprocess.Popen(arguments, **keywords)))
        return self.started[-1]

    def run(self, script: str = "", **command: Any) -> tuple[ExitRecord, bytes]:
        """Run to the end: the exit record and the log."""
        execution = self(script, **command)
        return execution.wait(), execution.log()

    def end_all(self) -> None:
        for each in self.started:
            if each.process.poll() is None:
                os.killpg(each.process.pid, signal.SIGKILL)
                each.process.wait()


def new_run(uri: str) -> RunRef:
    """A new run in that store, in the experiment of the environment."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    run = client.create_run(os.environ.get("MLFLOW_EXPERIMENT_ID", "0"))
    return RunRef(run.info.run_id, run.info.experiment_id, run.info.artifact_uri, uri)
