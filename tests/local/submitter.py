"""Submits a project again and again, each time in a forked child that kills itself one step later than the last.

Usage: submitter.py PROJECT FIRST_STEP LAST_STEP STRIDE. A step is a call of one of the package's functions. Prints
one line for each child: its step, and ``killed`` or ``ended``. MLflow is loaded once, so that a child costs little.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

import mlflow.projects

import mlflow_remote_backend
import mlflow_remote_backend.backend

PACKAGE = os.path.dirname(mlflow_remote_backend.__file__)


def die_at(step: int) -> None:
    """SIGKILL this process when the package's ``step``-th function is called. A supervisor that it forked lives on."""
    pid, calls = os.getpid(), 0

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        if os.getpid() != pid:
            sys.setprofile(None)
        elif event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls += 1
            if calls == step:
                os.kill(pid, signal.SIGKILL)

    sys.setprofile(trace)


def submit(project: str, step: int) -> None:
    die_at(step)
    mlflow.projects.run(
        project, backend="remote", env_manager="local", synchronous=False, backend_config={"stream_output": False}
    )


def main(project: str, first: str, last: str, stride: str) -> None:
    for step in range(int(first), int(last), int(stride)):
        child = os.fork()
        if child == 0:
            try:
                submit(project, step)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        print(step, "killed" if killed else "ended", flush=True)
        if not killed:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
