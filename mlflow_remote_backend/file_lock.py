"""Locks on files, which the system releases with the process that holds them, however it dies. Standard library only.

By ``flock``; on Windows by a lock on one byte beyond any content, of which there is no shared kind. There a file that
is open cannot be removed either.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

POLL_S = 0.02

if sys.platform == "win32":
    import msvcrt

    _BEYOND = 1 << 30

    def _lock(descriptor: int, shared: bool) -> None:
        os.lseek(descriptor, _BEYOND, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def unlock(descriptor: int) -> None:
        os.lseek(descriptor, _BEYOND, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int, shared: bool) -> None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)

    def unlock(descriptor: int) -> None:
        """Let go of the lock, whoever else has inherited the open file."""
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Take the lock on an open file, to be held until it is closed. False: somebody else holds it.

    Raises OSError where the file system has no locks.
    """
    try:
        _lock(descriptor, shared)
    except (BlockingIOError, PermissionError):
        return False
    return True


def wait_for_lock(descriptor: int) -> None:
    """Take the lock on an open file. Blocks until nobody else holds it."""
    while not try_lock(descriptor):
        time.sleep(POLL_S)


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at the path. Asked once its lock is taken, where whoever lets go removes
    the file: the lock on a removed one holds nobody who comes later."""
    with contextlib.suppress(FileNotFoundError):
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    return False


def is_held(path: Path) -> bool | None:
    """Whether somebody holds the lock on the file; None: there is no such file. Raises OSError (rights, no locks)."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        return not try_lock(descriptor, shared=True)  # shared, so that two who look do not fool each other
    finally:
        os.close(descriptor)
