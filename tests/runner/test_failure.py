"""``logs/error.txt``: the traceback that matters, or the last lines; never anything that acts on a terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlflow_remote_backend.job import Reason
from mlflow_remote_backend.runner.failure import MAX_TRACEBACK_LINES, error_text, last_traceback, log_lines
from mlflow_remote_backend.runner.verdict import Verdict

VERDICT = Verdict(Reason.USER_ERROR, "The program exited with code 1.", 1, words="Their words.", hint="Do this.")


def traceback_of(code: str) -> str:
    """What this very Python prints for the program."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


SIMPLE = traceback_of("def f(x):\n    return 1 / x\nf(0)")
CHAINED = traceback_of(
    "try:\n    {}['missing']\nexcept KeyError as error:\n    raise ValueError('first line\\nsecond line') from error"
)
DURING = traceback_of("try:\n    1 / 0\nexcept ZeroDivisionError:\n    [][1]")


def test_the_text_has_reason_sentence_words_and_hint() -> None:
    text = error_text(VERDICT, SIMPLE.encode())
    assert text.startswith("USER_ERROR: The program exited with code 1.\n\nTheir words.\n\nDo this.\n\n")
    assert text.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("printed", [SIMPLE, CHAINED, DURING], ids=["simple", "chained", "during"])
def test_the_last_traceback_is_found_whole(printed: str) -> None:
    log = "epoch 1\n" + traceback_of("raise OSError('an earlier one')") + "recovered\n\n" + printed + "\nbye\n"
    found = "\n".join(last_traceback(log.splitlines()))
    assert found == printed.rstrip("\n")


def test_a_prefix_before_each_line_is_no_hindrance() -> None:
    printed = "".join(f"[rank0]: {line}\n" for line in SIMPLE.splitlines())
    found = last_traceback(("start\n" + printed + "more\n\nend").splitlines())
    assert found[0] == "[rank0]: Traceback (most recent call last):"
    assert "[rank0]: ZeroDivisionError: division by zero" in found


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are Python 3.11's")
def test_an_exception_group_is_found_whole() -> None:
    printed = traceback_of("raise ExceptionGroup('several', [ValueError('one'), TypeError('two')])")
    found = "\n".join(last_traceback(("start\n" + printed).splitlines()))
    assert "Exception Group Traceback" in found
    assert "ValueError: one" in found
    assert "TypeError: two" in found


def test_without_a_traceback_the_last_40_lines_are_shown() -> None:
    text = error_text(VERDICT, b"".join(b"line %d\n" % number for number in range(100)))
    assert "last 40 lines" in text
    assert "line 60\n" in text
    assert "line 59\n" not in text
    assert text.endswith("line 99\n")


def test_an_empty_log_is_said_to_be_empty() -> None:
    assert "The log is empty." in error_text(VERDICT, b"")


def test_the_text_cannot_act_on_a_terminal() -> None:
    evil = b"\x1b]52;c;ZXZpbA==\x07\x1b[2Jtext\x1b]0;title\x07\x9b31m \x00\x08end\n"
    text = error_text(Verdict(Reason.BOOTSTRAP, "m", words="\x1b]0;t\x07w"), evil)
    assert not set(text) & {"\x00", "\x07", "\x08", "\x9b", "\x1b"}
    assert "text" in text
    assert "title" not in text


def test_progress_bars_are_shown_as_they_stood_at_last() -> None:
    assert log_lines(b"0%\r50%\r100%\ndone\r\n") == ["100%", "done"]


def test_the_text_is_bounded() -> None:
    endless = (
        "Traceback (most recent call last):\n" + '  File "x.py", line 1, in f\n    f()\n' * 5000 + "RecursionError\n"
    )
    assert len(last_traceback(endless.splitlines())) <= MAX_TRACEBACK_LINES + 1
    assert len(error_text(VERDICT, b"x" * 5_000_000)) < 10_000
    assert len(error_text(VERDICT, b"\xff\xfe" * 1_000_000)) < 10_000
