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
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MARK = b"mlr1"
MAX_LINE_BYTES = 7 * 1024
PAYLOAD_BYTES = 5 * 1024  # 6828 in base64, and room for the head
HEARTBEAT_S = 30.0


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
    """Long texts are cut until the line is short enough."""
    longest = MAX_LINE_BYTES // 2
    while True:
        short = {key: value[:longest] if isinstance(value, str) else value for key, value in fields.items()}
        line = b"%s %s %d %s\n" % (MARK, kind.encode(), attempt, json.dumps(short).encode("ascii"))
        if len(line) <= MAX_LINE_BYTES or longest < 16:
            return line
        longest //= 2


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
