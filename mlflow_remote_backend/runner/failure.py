"""The text of ``logs/error.txt``: reason, sentence, the other system's words, and what the log's end says. Pure.

What stands in the log is somebody's program's: nothing in the text can act on a terminal (``display.harmless``), and
its size is bounded.
"""

from __future__ import annotations

import re

from ..display import harmless
from .verdict import Verdict

LOOK_BACK_BYTES = 1024 * 1024  # of the log's end is searched for a traceback
TAIL_LINES = 40
MAX_LINE_CHARS = 2000
MAX_TRACEBACK_LINES = 400  # its first and last halves are kept
AFTER_TRACEBACK_LINES = 20  # an exception's message may have several lines

_START = re.compile(r"^(?P<before>.*?)(?:  \+ )?(?:Exception Group )?Traceback \(most recent call last\):\s*$")
_CHAINED = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)


def error_text(verdict: Verdict, log_end: bytes) -> str:
    """The whole file. ``log_end``: the last bytes of the log."""
    parts = [f"{verdict.reason.value}: {verdict.message}", harmless(verdict.words), verdict.hint]
    lines = log_lines(log_end)
    found = last_traceback(lines)
    if found:
        parts.append("The last traceback in the log:\n\n" + "\n".join(found))
    elif lines:
        parts.append(f"The log's last {min(TAIL_LINES, len(lines))} lines:\n\n" + "\n".join(lines[-TAIL_LINES:]))
    else:
        parts.append("The log is empty.")
    return "\n\n".join(part for part in parts if part) + "\n"


def log_lines(log_end: bytes) -> list[str]:
    """The log's last lines as a person saw them: what ``\\r`` had overwritten is left out, long ones are cut."""
    text = harmless(log_end[-LOOK_BACK_BYTES:].decode("utf-8", "replace"))
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    if lines and not lines[-1]:
        lines.pop()
    return [line if len(line) <= MAX_LINE_CHARS else line[:MAX_LINE_CHARS] + " …" for line in lines]


def last_traceback(lines: list[str]) -> list[str]:
    """The last traceback with all that it was chained to; empty where there is none.

    A prefix before each of its lines (``[rank0]: ``, a logger's) is no hindrance as long as it is the same.
    """
    starts = [(number, match) for number, line in enumerate(lines) if (match := _START.match(line))]
    if not starts:
        return []
    last, match = starts[-1]
    first = last
    for number, _ in reversed(starts[:-1]):
        if not any(_is_chain(line) for line in lines[number:first]):
            break
        first = number
    end = _end(lines, last, match.group("before"))
    found = lines[first:end]
    if len(found) > MAX_TRACEBACK_LINES:
        half = MAX_TRACEBACK_LINES // 2
        found = [*found[:half], f"[… {len(found) - 2 * half} lines …]", *found[-half:]]
    return found


def _is_chain(line: str) -> bool:
    return any(each in line for each in _CHAINED)


def _end(lines: list[str], start: int, before: str) -> int:
    """Where the traceback ends: after its exception's line, and what that says on further lines."""
    number = start + 1
    while number < len(lines) and _inside(lines[number], before):
        number += 1
    number = min(number + 1, len(lines))
    limit = min(number + AFTER_TRACEBACK_LINES, len(lines))
    while number < limit and lines[number].strip() and not _START.match(lines[number]):
        number += 1
    return number


def _inside(line: str, before: str) -> bool:
    """Whether a line belongs to the frames: they are indented; an exception group draws a bar at their left."""
    rest = line[len(before) :] if before and line.startswith(before) else line
    return rest.startswith((" ", "\t")) or not rest.strip()
