"""The stored log: numbered parts and their index. Uploads while the program writes, each byte about once.

A part closes at 8 MiB, or once it is 60 s old and holds 256 KiB; a closed part is never uploaded again. The open one
is uploaded as soon as a byte has waited for 10 s: at most every 10 s, and not at all while parts close faster.
The index follows within 2 s, a long one within as many seconds as it has 8 KiB.
``logs/index.json`` lists the parts of all attempts in one sequence::

    {"version": 1, "parts": [{"path": "logs/std_log.txt", "attempt": 0, "offset": 0, "length": 8388608,
                              "sha256": "…", "closed": true}, …]}

``offset`` is the position of a part's first byte in its attempt's log. The file ``uploaded.json`` in the spool says the
same for whoever goes on after this process.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .record import RecordError, RunRecord, Trouble, scratch_file
from .spool import Spool, read_json, write_json

FOLDER = "logs"
INDEX = f"{FOLDER}/index.json"
VERSION = 1

CLOSE_BYTES = 8 * 1024 * 1024
CLOSE_AGE_S = 60.0
CLOSE_AGED_BYTES = 256 * 1024
OPEN_EVERY_S = 10.0
INDEX_EVERY_S = 2.0  # while parts close one after the other
INDEX_BYTES_PER_S = 8192  # on average: a log of weeks has an index of megabytes, which then comes less often
SMALLEST_LIMIT_BYTES = 64 * 1024  # a server that refuses even that as too large is not worth smaller pieces
KEEP_BYTES = 64 * 1024 * 1024  # of the stored log stays in the spool for those who follow it there
LITTLE_DISK_BYTES = 256 * 1024 * 1024  # with less free space nothing stored is kept


@dataclass(frozen=True)
class Part:
    """One stored part of a log. ``offset``: of its first byte in the log of ``attempt``."""

    path: str
    attempt: int
    offset: int
    length: int
    sha256: str
    closed: bool

    @property
    def end(self) -> int:
        return self.offset + self.length


def part_path(number: int) -> str:
    return f"{FOLDER}/std_log.txt" if number == 0 else f"{FOLDER}/std_log.{number:06d}.txt"


def dump_index(parts: Sequence[Part]) -> bytes:
    return json.dumps({"version": VERSION, "parts": [dataclasses.asdict(each) for each in parts]}, indent=1).encode()


def load_index(document: Mapping[str, Any] | bytes | None) -> list[Part]:
    """The parts in an index, as bytes or as its object; none where it is missing or damaged."""
    if isinstance(document, bytes):
        try:
            document = json.loads(document)
        except ValueError:
            return []
    known = {each.name for each in dataclasses.fields(Part)}
    try:
        return [Part(**{k: v for k, v in each.items() if k in known}) for each in (document or {}).get("parts", [])]  # type: ignore[union-attr]
    except (TypeError, AttributeError):
        return []


class LogUploader:
    """Uploads the log of one attempt from its spool. One thread at a time calls :meth:`step`.

    ``stored``: how many bytes of this attempt's log are in the run; ``sent_bytes``: all that was uploaded for it.
    """

    def __init__(
        self, spool: Spool, record: RunRecord, *, attempt: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.sent_bytes = 0
        self._spool = spool
        self._record = record
        self._attempt = attempt
        self._clock = clock
        self._state = spool.path / "uploaded.json"
        self._parts: list[Part] = []
        self._foreign = 0  # so many of them, the first ones, are of earlier attempts
        self._ready = False
        self._indexed: list[Part] | None = None  # what the run's index holds, as far as we wrote it
        self._index_due = 0.0
        self._limit_bytes = CLOSE_BYTES
        self._opened_at: float | None = None  # when the open part's first byte was seen
        self._waiting_since: float | None = None  # when the first byte that is not stored was seen

    @property
    def stored(self) -> int:
        own = self._parts[self._foreign :]
        return own[-1].end if own else 0

    def step(self, *, final: bool = False) -> None:
        """Upload what is due; ``final``: everything. Raises RecordError, OSError; a later call goes on from there."""
        self._begin()
        while self._close_one(final):
            self._write_index_if_due()
            self._drop()
        now = self._clock()
        if self._waiting_since is not None and now - self._waiting_since >= OPEN_EVERY_S:
            start = self._open_offset()
            self._store(start, self._spool.log.size() - start, closed=False)
        self._write_index_if_due(now_or_never=final)
        self._drop()

    def _begin(self) -> None:
        """Know what is stored already: from this spool's state, or from what the run's index says."""
        if self._ready:
            return
        state = read_json(self._state)
        if state is not None:
            self._parts, self._foreign = load_index(state), int(state.get("foreign", 0))
        else:
            parts = load_index(self._record.download(INDEX))
            own = [part for part in parts if self._is_own(part)]
            self._foreign = len(parts) - len(own)
            foreign = [dataclasses.replace(part, closed=True) for part in parts if part not in own]
            self._parts = [*foreign, *own]
        self._ready = True

    def _is_own(self, part: Part) -> bool:
        """Whether a part that the index has is of this very spool, whose state was lost: the bytes tell, or that some
        of them are dropped, as only stored ones are."""
        if part.attempt != self._attempt:
            return False
        return part.offset < self._spool.log.start() or part.sha256 == self._digest(part.offset, part.length)

    def _digest(self, offset: int, length: int) -> str:
        digest = hashlib.sha256()
        for piece in self._spool.log.chunks(offset, offset + length):
            digest.update(piece)
        return digest.hexdigest()

    def _open_part(self) -> Part | None:
        last = self._parts[-1] if self._parts else None
        return last if last is not None and not last.closed else None

    def _open_offset(self) -> int:
        part = self._open_part()
        return part.offset if part else max(self.stored, self._spool.log.start())

    def _close_one(self, final: bool) -> bool:
        """Store and close the open part if it is time. True if it did."""
        now, size, start = self._clock(), self._spool.log.size(), self._open_offset()
        length = size - start
        self._note(now, length > 0, size > self.stored)
        aged = self._opened_at is not None and now - self._opened_at >= CLOSE_AGE_S and length >= CLOSE_AGED_BYTES
        part = self._open_part()
        left_open = final and (length > 0 or part is not None)
        if not (length >= self._limit_bytes or aged or left_open):
            return False
        length = min(length, max(self._limit_bytes, part.length if part else 0))
        if part is not None and part.length == length:
            self._parts[-1] = dataclasses.replace(part, closed=True)
            self._save()
        else:
            self._store(start, length, closed=True)
        self._opened_at = None
        return True

    def _note(self, now: float, something: bool, waiting: bool) -> None:
        self._opened_at = (self._opened_at if self._opened_at is not None else now) if something else None
        self._waiting_since = (self._waiting_since if self._waiting_since is not None else now) if waiting else None

    def _store(self, offset: int, length: int, *, closed: bool) -> None:
        """Upload these bytes as the open part's whole content."""
        number = len(self._parts) - (1 if self._open_part() else 0)
        path = part_path(number)
        began = self._clock()
        try:
            sha256 = self._upload(path, offset, length)
        except RecordError as error:
            if error.trouble is not Trouble.TOO_LARGE or length <= SMALLEST_LIMIT_BYTES:
                raise
            self._limit_bytes = max(length // 2, SMALLEST_LIMIT_BYTES)
            return  # the next look finds the part over its limit, and closes it there
        self._parts[number:] = [Part(path, self._attempt, offset, length, sha256, closed)]
        self._waiting_since = began if self._spool.log.size() > offset + length else None
        self._save()

    def _upload(self, path: str, offset: int, length: int) -> str:
        # On another disk where the spool's is full: only what is stored can be dropped from there.
        with scratch_file(Path(path).name, lambda file: self._copy(offset, length, file), self._spool.path) as copy:
            self._record.upload_file(copy, FOLDER)
        self.sent_bytes += length
        return self._digest(offset, length)

    def _copy(self, offset: int, length: int, target: Path) -> None:
        with open(target, "wb") as file:
            for piece in self._spool.log.chunks(offset, offset + length):
                file.write(piece)
            if file.tell() != length:
                raise OSError(errno.EIO, "The spool does not hold what it should", str(target))

    def _save(self) -> None:
        document = {**json.loads(dump_index(self._parts)), "foreign": self._foreign}
        try:
            write_json(self._state, document)
        except OSError:  # a full disk: whoever goes on finds the same in the run's index, and must find nothing older
            self._state.unlink(missing_ok=True)
            self._index_due = self._clock()

    def _write_index_if_due(self, now_or_never: bool = False) -> None:
        due = now_or_never or (self._parts and self._clock() >= self._index_due)
        if self._indexed != self._parts and due:  # a silent program has an empty index at its end
            self.write_index()

    def write_index(self) -> None:
        """Store the index as it is. Raises RecordError."""
        written, document = list(self._parts), dump_index(self._parts)
        self._record.upload(document, INDEX)
        self.sent_bytes += len(document)
        pause_s = max(INDEX_EVERY_S, len(document) / INDEX_BYTES_PER_S)
        self._indexed, self._index_due = written, self._clock() + pause_s

    def _drop(self) -> None:
        """Free the spool of what is stored, but for a while's worth for those who follow it on this machine."""
        disk = os.statvfs(self._spool.path)
        keep = 0 if disk.f_bavail * disk.f_frsize < LITTLE_DISK_BYTES else KEEP_BYTES
        self._spool.log.drop_before(min(self._open_offset(), self._spool.log.size() - keep))
