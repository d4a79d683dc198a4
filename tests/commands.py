"""Command line programs, started from tests as a person or a script would start them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

#: ``python -c`` of these with a main program after them: see like_windows.py.
LIKE_WINDOWS = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import like_windows; "
MLFLOW = "sys.modules['mlflow.cli'].cli()"
OURS = "from mlflow_remote_backend.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Command:
    """A command line program in the test's environment. ``folder``: where it runs unless told otherwise."""

    program: tuple[str, ...]
    folder: Path

    def __call__(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] = {},
        cwd: Path | None = None,
        timeout_s: float = 120,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Runs it to its end. Text that is not UTF-8 comes as surrogates. ``check``: a failure fails the test."""
        process = self.start(*arguments, env=env, cwd=cwd)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"{self._line(arguments)} did not end within {timeout_s} s\n{out}\n{err}")
        result = subprocess.CompletedProcess(process.args, process.returncode, out, err)
        if check and process.returncode != 0:
            pytest.fail(f"{self._line(arguments)} exited with {process.returncode}\n{out}\n{err}")
        return result

    def start(
        self, *arguments: str | Path, env: Mapping[str, str] = {}, cwd: Path | None = None, **popen: Any
    ) -> subprocess.Popen[str]:
        """Starts it, leader of a session of its own, stdout and stderr by pipes unless ``popen`` says otherwise."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            [*self.program, *map(str, arguments)],
            env={**os.environ, **env},
            cwd=cwd or self.folder,
            start_new_session=True,
            encoding="utf-8",
            errors="surrogateescape",
            **{**pipes, **popen},
        )

    def _line(self, arguments: tuple[str | Path, ...]) -> str:
        return " ".join([*self.program, *map(str, arguments)])
