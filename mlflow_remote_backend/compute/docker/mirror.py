"""A container's spool, mirrored into the run folder's spool: from there it is observed as if the program ran here.

While the container runs, a further process in it (``tail.py``) sends the log from the very offset that the local spool
has reached; a connection that breaks, or is silent too long, is made anew at that offset. So nothing is lost or comes
twice, whatever happens to the engine in between. What the last connection did not bring is copied out of the stopped
container. The log's position is the local spool's size: there is no other state.
"""

from __future__ import annotations

import json
import os
import secrets as random_tokens
import time
from collections.abc import Callable
from pathlib import Path

from ...runner.spool import SEGMENT_BYTES, SpoolReader
from . import copying, request
from .engine import STDERR, STDOUT, Connection, Engine

SILENCE_S = 10.0  # tail.py says that it lives each second
DROP_EVERY_BYTES = 2 * SEGMENT_BYTES  # how much the container's spool keeps of what is safe here
RETRY_FULL_DISK_S = 0.5
_RECORDS = ("started.json", "vitals.json")
_MAX_RECORD_BYTES = 1 << 20
_READ_BYTES = 1 << 20


class LocalLog:
    """The local spool's log, written at its end.

    A full disk is waited for, since the container's spool is the buffer; until ``give_up`` says that it is enough, then
    ``append`` raises OSError.
    """

    def __init__(self, spool: Path, give_up: Callable[[], bool]) -> None:
        self._give_up = give_up
        self._folder = spool / "log"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.size = SpoolReader(spool).size()

    def append(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            room = SEGMENT_BYTES - self.size % SEGMENT_BYTES
            try:
                written = self._write(rest[:room])
            except OSError:
                if self._give_up():
                    raise
                time.sleep(RETRY_FULL_DISK_S)
                continue
            self.size += written
            rest = rest[written:]

    def _write(self, data: memoryview) -> int:
        path = self._folder / f"{self.size // SEGMENT_BYTES:06d}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return os.write(descriptor, data)
        finally:
            os.close(descriptor)


class Mirror:
    """Brings what is new in a container's spool. One thread at a time.

    ``full``: called about once a second while the log is followed, with whether the container's disk is full.
    """

    def __init__(
        self,
        engine: Engine,
        container: str,
        spool: Path,
        give_up: Callable[[], bool],
        full: Callable[[bool], object] = lambda is_full: None,
    ) -> None:
        self._full = full
        self._engine = engine
        self._container = container
        self._spool = spool
        self._log = LocalLog(spool, give_up)

    @property
    def size_bytes(self) -> int:
        return self._log.size

    def follow(self) -> None:
        """Bring the log while it grows; blocks until the connection ends.

        That is no proof of anything: look at the container. Raises OSError (broken, or silent for SILENCE_S seconds)
        and ComputeError (the engine refuses or does not answer).
        """
        connection = self._engine.exec(self._container, ["/bin/sh", f"{request.OURS}/follow.sh"])
        greeting = random_tokens.token_hex(8).encode() + b"\n"
        try:
            connection.send(b"%d %s" % (self._log.size, greeting))
            self._receive(connection, greeting)
        finally:
            connection.close()

    def _receive(self, connection: Connection, greeting: bytes) -> None:
        """An engine that could not start the process says so in its output; that must never become the program's."""
        kept_from = self._log.size
        words = b""
        for kind, data in connection.frames(SILENCE_S):
            if kind == STDOUT and greeting:
                greeting, data = _after_greeting(greeting, data)
            if kind == STDOUT and data:
                self._log.append(data)
                if self._log.size - kept_from > DROP_EVERY_BYTES:
                    kept_from = self._log.size
                    connection.send(b"drop %d\n" % kept_from)
            elif kind == STDERR:
                *lines, words = (words + data).split(b"\n")
                for line in lines:
                    self._take_record(line)
                words = words[:_MAX_RECORD_BYTES]

    def _take_record(self, line: bytes) -> None:
        name, _, text = line.partition(b" ")
        if name in (b"alive", b"full"):
            self._full(name == b"full")
        elif name.decode(errors="replace") in _RECORDS:
            self._write_record(name.decode(), text)

    def _write_record(self, name: str, content: bytes) -> None:
        if name == "started.json":
            content = _without_identity(content)
        temporary = self._spool / f".{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, self._spool / name)

    def finish(self, source: str) -> bytes | None:
        """Bring the rest of the spool from a container that has ended; ``source``: it, or another with its volume.

        Returns the exit record, which is not written yet: it says that all else is here. None: ``execute`` left none.
        """
        exit_record = None
        for member, stream in copying.files(self._engine.copy_out(source, request.SPOOL)):
            folder, name = os.path.split(member.name)
            if os.path.basename(folder) == "log" and name.isdigit():
                self._take_segment(int(name), stream)
            elif name in _RECORDS and member.size <= _MAX_RECORD_BYTES:
                self._write_record(name, stream.read())
            elif name == "exit.json" and member.size <= _MAX_RECORD_BYTES:
                exit_record = stream.read()
        return exit_record

    def _take_segment(self, segment: int, stream: copying.Content) -> None:
        """Append what of the segment lies beyond our end. An engine's archive has a folder's files in their order."""
        position = segment * SEGMENT_BYTES
        while data := stream.read(_READ_BYTES):
            beyond = data[max(0, self._log.size - position) :]
            if beyond and position + len(data) - len(beyond) == self._log.size:
                self._log.append(beyond)
            position += len(data)


def _after_greeting(greeting: bytes, data: bytes) -> tuple[bytes, bytes]:
    """What is still to come of the greeting, and what follows it. Raises OSError if something else came."""
    expected = greeting[: len(data)]
    if not data.startswith(expected):
        raise OSError(f"not our process: {data[:200]!r}")
    return greeting[len(expected) :], data[len(expected) :]


def _without_identity(content: bytes) -> bytes:
    """``started.json`` without the process ids: here they would name processes of this machine."""
    try:
        started = json.loads(content)
        return json.dumps({"started_at": float(started["started_at"])}).encode()
    except (ValueError, TypeError, KeyError):
        return b"{}"
