"""A job's bytes on somebody's terminal: readable, and unable to do anything to it.

A program's output may hold anything, and a log may come from somebody else's job: escape sequences that set the
title, write the clipboard or move the cursor are dropped (ECMA-48 and xterm's list of them); colours, tabs, carriage
returns and line ends stay. What is stored is never touched.
"""

from __future__ import annotations

import codecs
import re
from typing import TextIO

MAX_LINE_CHARS = 64 * 1024  # of one line on the screen; the stored log has it whole
MAX_SEQUENCE_CHARS = 4096  # an unfinished escape sequence is held back up to this length
CUT_NOTE = "[… the rest of this line is in the stored log]"

_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_CSI = r"(?:\x1b\[|\x9b)[0-?]*[ -/]*"  # parameters and intermediates, still without the final character
_STRING = r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*"  # OSC, DCS, SOS, PM, APC without their terminator
_SEQUENCE = re.compile(rf"{_CSI}[@-~]|{_STRING}(?:\x07|\x9c|\x1b\\)|\x1b[ -/]+[0-~]|\x1b[0-OQ-WYZ\\`-~]")
_UNFINISHED = re.compile(rf"(?:{_CSI}|{_STRING}\x1b?|\x1b[ -/]*)\Z")
_INTRODUCER = re.compile(r"[\x1b\x90\x98\x9b\x9d-\x9f]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_LINE = re.compile(r"([^\r\n]*)([\r\n]?)")


def harmless(text: str) -> str:
    """``text`` without anything that a terminal would obey, but for colours."""
    shown, rest = _filter(text)
    return shown + _CONTROL.sub("", rest)


def _filter(text: str) -> tuple[str, str]:
    """What may be shown of ``text``, and its end if that may be the start of an escape sequence."""
    shown = []
    at = 0
    while found := _INTRODUCER.search(text, at):
        start = found.start()
        shown.append(_CONTROL.sub("", text[at:start]))
        sequence = _SEQUENCE.match(text, start)
        if sequence:
            shown.append(sequence.group() if _COLOUR.fullmatch(sequence.group()) else "")
            at = sequence.end()
        elif _UNFINISHED.match(text, start) and len(text) - start <= MAX_SEQUENCE_CHARS:
            return "".join(shown), text[start:]
        else:
            at = start + 1  # no sequence after all: only its introducer goes
    shown.append(_CONTROL.sub("", text[at:]))
    return "".join(shown), ""


class Terminal:
    """Writes a job's bytes to ``out`` as they come; characters and escapes may be cut anywhere between two calls."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._column = 0
        self._at_line_start = True

    def write(self, data: bytes) -> None:
        shown, self._held = _filter(self._held + self._decoder.decode(data))
        self._show(shown)

    def end(self) -> None:
        """Show what was held back, and start a new line if the program did not."""
        rest, self._held = harmless(self._held + self._decoder.decode(b"", True)), ""
        self._show(rest)
        if not self._at_line_start:
            self._show("\n")

    def _show(self, text: str) -> None:
        if not text:
            return
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        if len(text) + self._column <= MAX_LINE_CHARS:
            self._out.write(text)
            last_end = max(text.rfind("\n"), text.rfind("\r"))
            self._column = len(text) - 1 - last_end if last_end >= 0 else self._column + len(text)
        else:
            for body, end in _LINE.findall(text):
                self._show_cut(body, end)
        self._out.flush()
        self._at_line_start = text.endswith("\n")

    def _show_cut(self, body: str, end: str) -> None:
        room = MAX_LINE_CHARS - self._column
        if room >= 0 and body:
            self._out.write(body if len(body) <= room else body[:room] + CUT_NOTE)
            if len(body) > room:
                self._column = MAX_LINE_CHARS  # the note is written once
        self._column += len(body)
        if end:
            self._out.write(end)
            self._column = 0
