"""A real ``mlflow server`` as a child of the tests: SQLite, artifacts through the server, one worker.

It can be stopped, killed, frozen and started again on the same port with the same data, for tests of outages.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

START_TIMEOUT_S = 120.0


def _checks_host_names() -> bool:
    """MLflow's server answers only to known host names since 3.5."""
    major, minor = (int(each) for each in importlib.metadata.version("mlflow").split(".")[:2])
    return (major, minor) >= (3, 5)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def initialised_database(target: Path) -> Path:
    """``target`` as an empty MLflow database. Making one takes seconds, so make it once and copy it."""
    code = "import sys; from mlflow.tracking import MlflowClient; MlflowClient(sys.argv[1]).search_experiments()"
    subprocess.run([sys.executable, "-c", code, f"sqlite:///{target}"], cwd=target.parent, check=True, timeout=180)
    return target


def copy_database(template: Path, target: Path, artifact_root: str) -> Path:
    """A copy of an initialised database whose default experiment keeps its artifacts under ``artifact_root``."""
    shutil.copyfile(template, target)
    with contextlib.closing(sqlite3.connect(target)) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ?", (f"{artifact_root.rstrip('/')}/0",))
    return target


@dataclass
class TrackingServer:
    """One server. ``folder`` holds ``mlflow.db``, ``artifacts/`` and ``server.log``; ``env`` is added to its own."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    options: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def start(self) -> TrackingServer:
        """Starts it and returns once it answers. Raises RuntimeError with its log if it does not."""
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"mlflow server did not start:\n{self.log}")
            time.sleep(0.05)
        return self

    def healthy(self) -> bool:
        # No proxy: the tests' machine may have one in its environment.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            opener.open(f"{self.url}/health", timeout=2) as answer,
        ):
            return bool(answer.status == 200)
        return False

    def stop(self) -> None:
        """Ends it and all its children; returns when the port is free again."""
        self._signal(signal.SIGTERM)
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
        self.kill()

    def kill(self) -> None:
        """The same with SIGKILL, as a crash would."""
        self._signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(timeout=30)
            self.process = None

    def freeze(self) -> None:
        """It accepts connections and never answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "mlflow", "server", "--host", self.host, "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(self.artifacts), "--workers", "1"),
            *self.options,
        ]

    def _environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        # Job execution would start seven more processes, none of which tracking needs.
        ours = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return {**clean, **ours, **self.env}


@contextlib.contextmanager
def running_server(
    folder: Path, template: Path, *, host: str = "127.0.0.1", **options: object
) -> Iterator[TrackingServer]:
    """A started server with an empty store in ``folder``, stopped at the end.

    ``host="0.0.0.0"``: also reachable from containers and pods, under any name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_database(template, folder / "mlflow.db", "mlflow-artifacts:")
    server = TrackingServer(folder, host=host, **options)  # type: ignore[arg-type]
    if host != "127.0.0.1" and _checks_host_names():
        server.options = (*server.options, "--allowed-hosts", "*")
    try:
        yield server.start()
    finally:
        server.thaw()
        server.stop()
