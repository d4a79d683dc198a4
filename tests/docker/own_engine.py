"""An engine of a test's own, to stop, kill and start again. Needs root and a ``dockerd``.

It lives in a network namespace of its own: an engine takes the machine's bridges for its own, and would remove the one
that another engine's containers use.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

STARTED_S = 60


class OwnEngine:
    """A ``dockerd`` with folders, a socket and an empty network of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = f"unix://{folder}/docker.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        folders = {"--data-root": "data", "--exec-root": "exec", "--pidfile": "pid"}
        paths = [word for option, name in folders.items() for word in (option, str(self._folder / name))]
        command = [*("unshare", "--net", "dockerd"), *paths, *("-H", self.url, "--bridge", "none", "--iptables=false")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--shutdown-timeout", "5"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + STARTED_S
        while subprocess.run(["docker", "-H", self.url, "info"], capture_output=True).returncode:
            assert time.monotonic() < deadline, (self._folder / "log").read_text()[-3000:]
            assert self._process.poll() is None, (self._folder / "log").read_text()[-3000:]
            time.sleep(0.1)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """A killed engine takes its containerd along and leaves its containers behind, as a crash does."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(60)
        if number == signal.SIGKILL:  # the dead containerd may stay a zombie, which the next engine would wait for
            (self._folder / "exec/containerd/containerd.pid").unlink(missing_ok=True)

    def load(self, image: str) -> None:
        """Copy an image from the engine that the environment names."""
        saved = subprocess.run(["docker", "save", image], check=True, capture_output=True).stdout
        subprocess.run(["docker", "-H", self.url, "load"], input=saved, check=True, capture_output=True)


def why_not() -> str:
    """Why there can be no such engine here; empty if there can."""
    if os.geteuid() != 0:
        return "only root can start an engine"
    missing = [name for name in ("dockerd", "unshare") if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not on PATH"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True)
    return "" if tried.returncode == 0 else "no network namespace can be made here"


@contextlib.contextmanager
def own_engine(folder: Path) -> Iterator[OwnEngine]:
    engine = OwnEngine(folder)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        for mount in sorted(_mounts(folder), reverse=True):
            subprocess.run(["umount", "-l", mount], capture_output=True)


def _mounts(folder: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(str(folder))]
