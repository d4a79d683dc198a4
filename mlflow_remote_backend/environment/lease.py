"""One builder at a time, on one machine or on several that share a folder. Standard library only.

Where the file system has locks, ``flock`` decides, and a dead builder's lock is gone at once. Not every one has (some
network volumes), and some only pretend across machines; so the holder also writes a lease beside it and renews it
while it works. A lease that nobody renews for ``STALE_S`` is taken over: judged by the waiter's own clock, never by
time stamps of another machine.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import file_lock

#: Seconds between renewals of a lease, and without one until it counts as abandoned.
BEAT_S = 5.0
STALE_S = 30.0
_POLL_S = 0.1

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Lost(Exception):
    """The lease was taken over while its holder was suspended; what it builds belongs to somebody else now."""


class Busy(Exception):
    """Somebody else holds it, and we did not want to wait."""


class Lease:
    """Held by this process. ``check`` before each irreversible step: it raises Lost if somebody took over.

    ``descriptors``: the open file with the file system's lock, where it has locks. Whoever inherits it keeps the lock.
    """

    def __init__(self, path: Path, descriptors: tuple[int, ...] = ()) -> None:
        self.path = path
        self.descriptors = descriptors
        self.token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def check(self) -> None:
        if _holder(self.path).get("token") != self.token:
            raise Lost(str(self.path))

    def _write(self) -> bool:
        """Creates the lease file; False if there is one."""
        document = {"token": self.token, "host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}
        draft = self.path.with_name(f"{self.path.name}.{self.token}")
        draft.write_text(json.dumps(document))
        try:
            os.link(draft, self.path)  # atomic, and whole at once
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return self._write_exclusively(document)
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _write_exclusively(self, document: dict[str, object]) -> bool:
        try:
            with self.path.open("x") as stream:
                json.dump(document, stream)
        except FileExistsError:
            return False
        return True

    def _renew(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _start(self) -> None:
        self._thread.start()

    def _release(self) -> None:
        self._stop.set()
        self._thread.join(timeout=1)
        with contextlib.suppress(Lost, OSError):
            self.check()
            self.path.unlink()


@contextlib.contextmanager
def hold(path: Path, *, wait: bool = True, waiting: Callable[[], None] = lambda: None) -> Iterator[Lease]:
    """Holds ``path`` (two files, ``.lock`` and ``.lease``) for the duration of the block.

    Blocks until it is free, calling ``waiting`` once if it is not; raises Busy instead if ``wait`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told: list[bool] = []

    def tell() -> None:
        if not wait:
            raise Busy(str(path))
        if not told:
            told.append(True)
            waiting()

    with _flock(path.with_name(path.name + ".lock"), tell) as locked:
        lease = Lease(path.with_name(path.name + ".lease"), locked)
        _acquire(lease, tell, alone=bool(locked))
        lease._start()
        try:
            yield lease
        finally:
            lease._release()


@contextlib.contextmanager
def _flock(path: Path, tell: Callable[[], None]) -> Iterator[tuple[int, ...]]:
    """The file system's lock; yields its descriptor, or nothing where there is none."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock(descriptor, tell):
            yield ()
            return
        try:
            yield (descriptor,)
        finally:
            file_lock.unlock(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def sharing(path: Path, *, alone: bool = False) -> Iterator[bool]:
    """The block runs while others may share ``path``, or with ``alone`` while nobody does. False: not to be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        locked = False
        with contextlib.suppress(OSError):
            locked = file_lock.try_lock(descriptor, shared=not alone)
        if locked and not alone:
            os.utime(path)  # the last time that somebody needed what it guards
        yield locked
    finally:
        os.close(descriptor)


def _lock(descriptor: int, tell: Callable[[], None]) -> bool:
    while True:
        try:
            if file_lock.try_lock(descriptor):
                return True
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        tell()
        time.sleep(_POLL_S)


def _acquire(lease: Lease, tell: Callable[[], None], *, alone: bool) -> None:
    """Writes the lease, or waits for its holder and takes over from a dead one.

    ``alone``: we have this machine's lock, so a holder on this machine is dead.
    """
    seen: tuple[str, float] | None = None
    since = time.monotonic()
    while not lease._write():
        holder = _holder(lease.path)
        state = (holder.get("token", ""), _modified(lease.path))
        if state != seen:
            seen, since = state, time.monotonic()
        if _dead(holder, alone=alone) or time.monotonic() - since > STALE_S:
            _take_away(lease, holder.get("token", ""))
            continue
        tell()
        time.sleep(_POLL_S)


def _holder(path: Path) -> dict[str, str]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {key: str(value) for key, value in document.items()} if isinstance(document, dict) else {}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _dead(holder: dict[str, str], *, alone: bool) -> bool:
    if not holder or holder.get("host") != socket.gethostname() or holder.get("boot") != _boot():
        return False
    if alone:
        return True
    if sys.platform == "win32":  # where the next call would end a process
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError):
        return False
    return False


def _take_away(lease: Lease, token: str) -> None:
    """Removes an abandoned lease, and puts back one that somebody else has just written in its place."""
    taken = lease.path.with_name(f"{lease.path.name}.{lease.token}.stale")
    try:
        os.rename(lease.path, taken)
    except FileNotFoundError:
        return
    if _holder(taken).get("token", "") != token:
        with contextlib.suppress(OSError):
            os.link(taken, lease.path)
    taken.unlink(missing_ok=True)


def _boot() -> str:
    """This boot of this machine, so that a process id of another one is not mistaken for ours."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
