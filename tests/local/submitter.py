"""Submits a project again and again, each time in a forked child that kills itself at a later line than the last.

Usage: submitter.py PROJECT POINTS. The first child runs undisturbed and counts the lines of MODULES that a submission
executes; the others die by SIGKILL at POINTS of them, evenly spread. Prints one line for each child: where it died, and
``killed`` or ``ended``. MLflow is loaded once, so that a child costs little. A supervisor that a child forked lives on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import mlflow.projects

import mlflow_remote_backend
import mlflow_remote_backend.backend
import mlflow_remote_backend.compute.local

PACKAGE = os.path.dirname(mlflow_remote_backend.__file__)
#: Where a submission has effects. Packing and parsing execute many more lines, and leave nothing but scratch.
MODULES = (
    *("backend.py", "submission.py", "tracking.py", "compute/base.py", "compute/local.py", "compute/supervised.py"),
    *("runner/run_folder.py", "runner/submission_folder.py", "runner/supervise.py", "runner/spool.py"),
)
FILES = frozenset(os.path.join(PACKAGE, each) for each in MODULES)


def at_each_line(action: Callable[[str], None]) -> None:
    """Call ``action`` before each line of MODULES, in this process and this thread only."""
    pid = os.getpid()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if os.getpid() != pid:
            sys.settrace(None)
            return None
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            action(f"{os.path.relpath(frame.f_code.co_filename, PACKAGE)}:{frame.f_lineno}")
        return trace

    sys.settrace(trace)


def submit(project: str) -> None:
    mlflow.projects.run(
        project, backend="remote", env_manager="local", synchronous=False, backend_config={"stream_output": False}
    )
    sys.settrace(None)


def count(project: str) -> int:
    """The lines of a whole submission, counted in a child."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            lines: list[str] = []
            at_each_line(lines.append)
            submit(project)
            os.write(write, str(len(lines)).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.wait()
    return int(os.read(read, 100))


def die(project: str, at: int) -> None:
    """Submit in a child that kills itself before its line number ``at``."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            left = at

            def step(where: str) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    os.write(1, f"{at} {where} ".encode())
                    os.kill(os.getpid(), signal.SIGKILL)

            at_each_line(step)
            submit(project)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else f"{at} ended", flush=True)


def main(project: str, points: str) -> None:
    total = count(project)
    print(total, "lines ended", flush=True)
    for point in range(int(points)):
        die(project, total * (2 * point + 1) // (2 * int(points)))


if __name__ == "__main__":
    main(*sys.argv[1:])
