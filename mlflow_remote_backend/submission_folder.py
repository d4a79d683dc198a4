"""What a submission keeps on this machine while it goes on: a lock that tells that its process lives, and its scratch.

    <state>/submissions/TOKEN/    lock, held (flock) until the submission is over; scratch files beside it
    <state>/submission-ids/HASH   held while somebody submits with that ``submission_id``

The kernel releases a lock with its process, however that dies: so nobody mistakes a reused process id for a submitter,
and the next submission removes the scratch of dead ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets as random_tokens
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import file_lock
from .errors import ComputeError
from .runner.run_folder import machine_id, state_root

UNLOCKED_PATIENCE_S = 60.0  # a folder without a lock file: its maker is between two lines, or was killed there


@dataclass(frozen=True)
class SubmissionFolder:
    """The folder of one submission. ``owner``: its name in the run's tag ``.owner``."""

    path: Path
    owner: str

    @property
    def scratch(self) -> Path:
        return self.path


@contextlib.contextmanager
def opened(root: Path | None = None) -> Iterator[SubmissionFolder]:
    """A new submission's folder, locked; removed at the end. Removes those of dead submissions first."""
    root = root or state_root()
    with contextlib.suppress(OSError):
        sweep(root)
    try:
        path, lock = _make(root / "submissions")
    except OSError as error:
        raise ComputeError(
            f"The state folder {root} cannot be written.", words=str(error), hint="Set XDG_STATE_HOME to one of yours."
        ) from error
    try:
        yield SubmissionFolder(path, f"submitter:{machine_id(root)}:{path.name}")
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
        shutil.rmtree(path, ignore_errors=True)  # Windows removes no file that is open


def _make(parent: Path) -> tuple[Path, int]:
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    while True:
        path = parent / random_tokens.token_hex(8)
        path.mkdir(mode=0o700)
        lock = _locked(path / "lock")
        if lock is not None:
            return path, lock


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock, or None where somebody removed the file meanwhile. Blocks."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None
    file_lock.wait_for_lock(lock)
    if file_lock.is_at(path, lock):
        return lock
    os.close(lock)
    return None


def lives(owner: str, root: Path | None = None) -> bool | None:
    """Whether the submission that wrote ``owner`` goes on; None where that cannot be told from here."""
    kind, _, rest = owner.partition(":")
    machine, _, token = rest.rpartition(":")
    root = root or state_root()
    if kind != "submitter" or not token.isalnum() or machine != machine_id(root):
        return None
    return not _is_dead(root / "submissions" / token)


def _is_dead(path: Path) -> bool:
    held = file_lock.is_held(path / "lock")
    return _unlocked_too_long(path) if held is None else not held


def _unlocked_too_long(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > UNLOCKED_PATIENCE_S
    except FileNotFoundError:
        return True


def sweep(root: Path | None = None) -> list[Path]:
    """Remove the folders of submissions that died, and return them."""
    parent = (root or state_root()) / "submissions"
    return [path for path in parent.iterdir() if _removed(path)] if parent.is_dir() else []


def _removed(path: Path) -> bool:
    """Remove the folder if its submission is dead. Its lock is held meanwhile: a maker that is about to take it then
    finds it gone, and makes another one."""
    try:
        lock = os.open(path / "lock", os.O_RDWR)
    except FileNotFoundError:
        dead = _unlocked_too_long(path)
    else:
        dead = file_lock.try_lock(lock)
        if dead:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
    if dead:
        shutil.rmtree(path, ignore_errors=True)  # Windows removes no file that is open
    return dead


@contextlib.contextmanager
def only_one(submission_id: str, root: Path | None = None) -> Iterator[None]:
    """Hold everybody else on this machine who submits with the same id. Blocks until they are done."""
    folder = (root or state_root()) / "submission-ids"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / hashlib.sha256(submission_id.encode()).hexdigest()[:32]
    while (lock := _locked(path)) is None:
        pass
    try:
        yield
    finally:
        if sys.platform != "win32":  # there it is open, and cannot be removed
            path.unlink(missing_ok=True)
        os.close(lock)
