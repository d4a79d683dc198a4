"""Frames: a job's log and state as lines of text, for whoever reads the sidecar's output. Both sides; standard library.

    mlr1 log ATTEMPT OFFSET LENGTH BASE64     bytes of the program's output; OFFSET in the attempt's log
    mlr1 phase ATTEMPT JSON                   {"phase": "running"}
    mlr1 beat ATTEMPT SIZE                    at least every 30 s, so that no idle connection is cut; SIZE of the log
    mlr1 end ATTEMPT JSON                     the last one: reason, message, exit code, status, whether it is finalised

A line is at most 7 KiB, so that no container runtime splits it (the smallest limit in use is 8 KiB). Offsets make a
cursor exact: what comes twice is known as such, and a gap too (a reader fills it from the stored parts).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from .spool import SpoolReader

MARK = b"mlr1"
MAX_LINE_BYTES = 7 * 1024
PAYLOAD_BYTES = 5 * 1024  # 6828 in base64, and room for the head
HEARTBEAT_S = 30.0

PIECE_BYTES = 256 * 1024
MAX_LAG_BYTES = 32 * 1024 * 1024  # further behind than this, the live view skips to what is new
BUSY_POLL_S = 0.025
IDLE_POLL_S = 0.1
CLOSE_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Frame:
    """One frame. ``kind``: log, phase, beat or end. ``offset`` and ``data``: of a log frame; a beat's ``offset`` is the
    log's size; ``fields``: of phase and end."""

    kind: str
    attempt: int = 0
    offset: int = 0
    data: bytes = field(default=b"", repr=False)
    fields: Mapping[str, Any] = field(default_factory=dict)


def log_frames(attempt: int, offset: int, data: bytes) -> Iterator[bytes]:
    """The bytes as lines, each with its line end."""
    for start in range(0, len(data), PAYLOAD_BYTES):
        piece = data[start : start + PAYLOAD_BYTES]
        yield b"%s log %d %d %d %s\n" % (MARK, attempt, offset + start, len(piece), base64.b64encode(piece))


def phase_frame(attempt: int, phase: str) -> bytes:
    return _with_fields("phase", attempt, {"phase": phase})


def beat_frame(attempt: int, size: int) -> bytes:
    return b"%s beat %d %d\n" % (MARK, attempt, size)


def end_frame(attempt: int, fields: Mapping[str, Any]) -> bytes:
    return _with_fields("end", attempt, fields)


def _with_fields(kind: str, attempt: int, fields: Mapping[str, Any]) -> bytes:
    room = MAX_LINE_BYTES - 64
    return b"%s %s %d %s\n" % (MARK, kind.encode(), attempt, shortened_json(fields, room).encode("ascii"))


def shortened_json(fields: Mapping[str, Any], max_bytes: int) -> str:
    """The fields as ASCII JSON of at most that length; texts and lists are cut as far as that takes."""
    longest = max_bytes
    while True:
        text = json.dumps({key: _short(value, longest) for key, value in fields.items()})
        if len(text) <= max_bytes or longest < 8:
            return text
        longest //= 2


def _short(value: Any, longest: int) -> Any:
    if isinstance(value, list):
        return [_short(each, longest) for each in value[: longest // 64]]
    return value[:longest] if isinstance(value, str) else value


def parse_frame(line: bytes) -> Frame | None:
    """The frame in the line (with or without its end); None where it is none: another system's words, or damaged."""
    words = line.strip().split(b" ", 3)
    if len(words) != 4 or words[0] != MARK:
        return None
    try:
        kind, attempt, rest = words[1].decode("ascii"), int(words[2]), words[3]
        if kind == "log":
            offset, length, payload = rest.split(b" ")
            data = base64.b64decode(payload, validate=True)
            return Frame(kind, attempt, int(offset), data) if len(data) == int(length) else None
        if kind == "beat":
            return Frame(kind, attempt, int(rest))
        if kind in ("phase", "end"):
            fields = json.loads(rest)
            return Frame(kind, attempt, fields=fields) if isinstance(fields, dict) else None
    except (ValueError, binascii.Error):
        pass
    return None


class FrameWriter(threading.Thread):
    """Writes a growing log as frames, in a thread of its own: a slow reader delays nothing else.

    Too far behind, it skips to what is new: the reader sees a gap between offsets.
    """

    def __init__(self, log: SpoolReader, out: BinaryIO, attempt: int) -> None:
        super().__init__(name="frames", daemon=True)
        self._log = log
        self._out = out
        self._attempt = attempt
        self._offset = log.start()
        self._phases: list[str] = []
        self._ending = threading.Event()
        self._next_beat = 0.0

    def phase(self, phase: str) -> None:
        """Tell a new phase with the next frames."""
        self._phases.append(phase)

    def run(self) -> None:
        pause = BUSY_POLL_S
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more: the stored log has everything
            while not self._ending.wait(pause):
                pause = BUSY_POLL_S if self._pump() else min(pause * 1.1, IDLE_POLL_S)

    def close(self, fields: Mapping[str, Any]) -> None:
        """The rest of the log, then the end frame. Blocks while the reader takes it, within reason."""
        self._ending.set()
        self.join(CLOSE_PATIENCE_S)
        if self.is_alive():
            return
        with contextlib.suppress(OSError, ValueError):
            while self._pump():
                pass
            self._out.write(end_frame(self._attempt, fields))
            self._out.flush()

    def _pump(self) -> bool:
        """Write what is new, or a heartbeat if it is time. True if there was something new."""
        lines = [phase_frame(self._attempt, self._phases.pop(0)) for _ in range(len(self._phases))]
        lines += self._new_log()
        now, new = time.monotonic(), bool(lines)
        if not new and now >= self._next_beat:
            lines.append(beat_frame(self._attempt, self._log.size()))
        if lines:
            self._out.writelines(lines)
            self._out.flush()
            self._next_beat = now + HEARTBEAT_S
        return new

    def _new_log(self) -> list[bytes]:
        self._offset = max(self._offset, self._log.start(), self._log.size() - MAX_LAG_BYTES)
        data = self._log.read(self._offset, PIECE_BYTES)
        lines = list(log_frames(self._attempt, self._offset, data))
        self._offset += len(data)
        return lines
