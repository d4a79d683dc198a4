"""A job's bytes on somebody's terminal: readable, and unable to do anything to it.

A program's output may hold anything, and a log may come from somebody else's job: escape sequences that set the
title, write the clipboard or move the cursor are dropped; colours, tabs, carriage returns and line ends stay. What is
stored is never touched.
"""

from __future__ import annotations

import codecs
import re
from typing import TextIO

MAX_LINE_CHARS = 64 * 1024  # of one line on the screen; the stored log has it whole

_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_SEQUENCE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\|$)"  # OSC, DCS, SOS, PM, APC, up to BEL or ST
    r"|\x1b[ -/]*[0-~]?"  # other escapes
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]"  # control characters but \t, \n, \r
)
_LINE_END = re.compile(r"[\r\n]")
_LINE = re.compile(r"([^\r\n]*)([\r\n]?)")
_MAYBE_UNFINISHED = re.compile(r"\x1b[^\n]{0,256}$")


def harmless(text: str) -> str:
    """``text`` without anything that a terminal would obey, but for colours."""
    return _SEQUENCE.sub(lambda found: found.group() if _COLOUR.fullmatch(found.group()) else "", text)


class Terminal:
    """Writes a job's bytes to ``out`` as they come; characters and escapes may be cut anywhere between two calls."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # the start of what may be an escape sequence
        self._column = 0
        self.at_line_start = True

    def write(self, data: bytes) -> None:
        text = self._held + self._decoder.decode(data)
        unfinished = _MAYBE_UNFINISHED.search(text)
        if unfinished and _SEQUENCE.fullmatch(unfinished.group()) is None:
            text, self._held = text[: unfinished.start()], unfinished.group()
        else:
            self._held = ""
        self._show(harmless(text))

    def end(self) -> None:
        """Show what was held back, and start a new line if the program did not."""
        rest, self._held = self._held + self._decoder.decode(b"", True), ""
        self._show(harmless(rest))
        if not self.at_line_start:
            self._show("\n")

    def _show(self, text: str) -> None:
        if not text:
            return
        if len(text) + self._column <= MAX_LINE_CHARS:
            self._out.write(text)
            self._column = (
                len(text) - 1 - max(text.rfind("\n"), text.rfind("\r"))
                if _LINE_END.search(text)
                else (self._column + len(text))
            )
        else:
            for body, end in _LINE.findall(text):
                self._show_cut(body, end)
        self._out.flush()
        self.at_line_start = text.endswith("\n")

    def _show_cut(self, body: str, end: str) -> None:
        room = MAX_LINE_CHARS - self._column
        if room > 0:
            self._out.write(
                body if len(body) <= room else body[:room] + "[… the rest of this line is in the stored log]"
            )
        self._column += len(body)
        if end:
            self._out.write(end)
            self._column = 0
