"""The folder on the submitter's machine that holds a job of the ``local`` or ``docker`` compute while it runs.

    <state>/runs/RUN_ID/
        envelope.json     what runs: the job spec
        lock              held (flock) by the supervisor as long as it lives: the proof that it does
        supervisor.json   its pid; where it is on its way: phase, detail
        recoveries        one byte for each supervisor that had to be replaced
        supervisor.log    what it had to say, for the developer of this package
        cancel            somebody asked to cancel; holds the grace period in seconds
        archive           the snapshot, until it is unpacked
        spool/            the wire between execute and observe (spool.py)
        work/             the unpacked project, where the program runs
        came/             docker: its output folders as they came with it, once the program has ended
        scratch/          the supervisor's temporary files

It is removed once the run is finalised and everything is uploaded, by way of ``<state>/trash``. ``<state>`` is
``$XDG_STATE_HOME/mlflow-remote``, by default ``~/.local/state/mlflow-remote``. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import secrets as random_tokens
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import file_lock, removal
from ..errors import ComputeError
from ..job import JobSpec
from . import envelope
from .spool import Spool, read_json, write_json


def state_root(environ: Mapping[str, str] = os.environ) -> Path:
    base = environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(base) / "mlflow-remote"


def machine_id(root: Path | None = None) -> str:
    """The name of this machine and state folder in handles: stable, and different where the folder is another one."""
    folder = root or state_root()
    path = folder / "machine-id"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = "".join(c if c.isalnum() or c == "-" else "-" for c in socket.gethostname().lower()) or "machine"
    fresh = folder / f"machine-id.{os.getpid()}.{random_tokens.token_hex(4)}"
    fresh.write_text(f"{name}-{random_tokens.token_hex(4)}\n")
    with contextlib.suppress(FileExistsError):
        os.link(fresh, path)  # the first one wins when two processes start at once
    fresh.unlink()
    return path.read_text().strip()


class RunFolder:
    """Paths and small files of one job. Making one touches nothing."""

    def __init__(self, run_id: str, root: Path | None = None) -> None:
        if not run_id or any(c in run_id for c in "/\0") or run_id.startswith("."):
            raise ComputeError(f"{run_id!r} is not a run id.")
        self.run_id = run_id
        self.root = root or state_root()
        self.path = self.root / "runs" / run_id
        self.envelope = self.path / "envelope.json"
        self.lock = self.path / "lock"
        self.log = self.path / "supervisor.log"
        self.cancel = self.path / "cancel"
        self.archive = self.path / "archive"
        self.spool = self.path / "spool"
        self.work = self.path / "work"
        self.scratch = self.path / "scratch"
        self._progress = self.path / "supervisor.json"
        self._recoveries = self.path / "recoveries"

    def exists(self) -> bool:
        return self.path.is_dir()

    def create(self, spec: JobSpec) -> None:
        """Make the folder with its envelope: from here on the job exists. Raises ComputeError (disk, rights)."""
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            Spool.create(self.spool)
            replace_text(self.envelope, envelope.dump(spec))
        except OSError as error:
            raise ComputeError(f"The job's folder {self.path} cannot be made.", words=str(error)) from error

    def spec(self) -> JobSpec:
        return envelope.load(self.envelope.read_bytes())

    def say(self, phase: str, detail: str = "") -> None:
        """Tell whoever looks where the supervisor is on its way. On a full disk they see what it told before."""
        with contextlib.suppress(OSError):
            write_json(self._progress, {"pid": os.getpid(), "phase": phase, "detail": detail})

    def said(self) -> dict[str, Any]:
        """What the supervisor told last; empty if none ever lived."""
        return read_json(self._progress) or {}

    def recoveries(self) -> int:
        """How often a new supervisor was started because the last one had died."""
        try:
            return self._recoveries.stat().st_size
        except FileNotFoundError:
            return 0

    def count_recovery(self) -> None:
        with self._recoveries.open("ab") as file:
            file.write(b".")

    def try_lock(self) -> int | None:
        """A descriptor that holds the lock, or None: a supervisor lives, or the folder is gone."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            return None
        while not file_lock.try_lock(descriptor):
            if self.supervised() or not self.exists():
                os.close(descriptor)
                return None
            time.sleep(0.001)  # somebody was just looking whether a supervisor lives
        if file_lock.is_at(self.lock, descriptor):
            return descriptor
        os.close(descriptor)  # removed meanwhile
        return None

    def supervised(self) -> bool:
        """Whether a supervisor of ours lives: the kernel's word, immune to reused process ids."""
        return bool(file_lock.is_held(self.lock))

    def remove(self) -> None:
        """All of it at once: who looks meanwhile finds it whole, or gone, and makes nothing anew in half of it."""
        removal.remove(self.path, self.root / "trash")


def replace_text(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    beside = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    beside.write_text(text)
    os.replace(beside, path)


def all_folders(root: Path | None = None) -> Iterator[RunFolder]:
    runs = (root or state_root()) / "runs"
    if runs.is_dir():
        for each in sorted(runs.iterdir()):
            yield RunFolder(each.name, root)
