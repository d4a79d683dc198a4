"""What a job writes cannot do anything to the terminal that shows it."""

from __future__ import annotations

import io
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_remote_backend.display import CUT_NOTE, MAX_LINE_CHARS, Terminal, harmless

ESCAPES = {
    "set title": b"\x1b]0;owned\x07",
    "set title, ST": b"\x1b]0;owned\x1b\\",
    "clipboard": b"\x1b]52;c;cm0gLXJm\x07",
    "hyperlink": b"\x1b]8;;http://evil\x1b\\text\x1b]8;;\x1b\\",
    "move cursor": b"\x1b[10A\x1b[2K",
    "clear screen": b"\x1b[2J\x1b[H",
    "alternate screen": b"\x1b[?1049h",
    "device query": b"\x1b[c\x1b[6n",
    "DCS": b"\x1bP+q544e\x1b\\",
    "APC": b"\x1b_payload\x1b\\",
    "reset": b"\x1bc",
    "charset": b"\x1b(0",
    "C1 CSI": "\u009b2J".encode(),
    "backspace": b"\x08\x08",
    "bell": b"\x07",
    "shift out": b"\x0e",
}


def shown(*pieces: bytes) -> str:
    out = io.StringIO()
    terminal = Terminal(out)
    for piece in pieces:
        terminal.write(piece)
    terminal.end()
    return out.getvalue()


@pytest.mark.parametrize("escape", ESCAPES.values(), ids=ESCAPES.keys())
def test_what_a_terminal_would_obey_is_dropped(escape):
    text = shown(b"before" + escape + b"after\n")
    assert text.replace("text", "") == "beforeafter\n"


@pytest.mark.parametrize("escape", ESCAPES.values(), ids=ESCAPES.keys())
def test_it_is_dropped_wherever_it_is_cut(escape):
    data = b"before" + escape + b"after\n"
    for cut in range(len(data)):
        assert shown(data[:cut], data[cut:]).replace("text", "") == "beforeafter\n", cut
    assert shown(*(bytes([byte]) for byte in data)).replace("text", "") == "beforeafter\n"


def test_colours_tabs_returns_and_unicode_stay():
    data = "\x1b[1;31mröd\x1b[0m\tx\ry\n😀\n"
    assert shown(data.encode()) == data


def test_a_character_may_be_cut_anywhere():
    data = "ü😀é\n".encode()
    for cut in range(len(data)):
        assert shown(data[:cut], data[cut:]) == "ü😀é\n"


def test_what_is_not_utf_8_is_replaced():
    assert shown(b"a\xffb\n") == "a\ufffdb\n"


def test_the_end_starts_a_new_line_and_shows_what_was_held_back():
    assert shown(b"no newline") == "no newline\n"
    assert shown(b"half \xc3") == "half \ufffd\n"
    assert shown(b"half \x1b[3") == "half [3\n"
    assert shown(b"") == ""


def test_what_the_screen_has_no_character_for_is_replaced_and_the_rest_is_shown():
    screen = io.BytesIO()
    terminal = Terminal(io.TextIOWrapper(screen, encoding="cp1252"))
    terminal.write("é ✓\nnext\n".encode())
    assert screen.getvalue() == b"\xe9 ?\nnext\n"


def test_a_line_too_long_for_a_screen_is_cut_and_says_so_once():
    text = shown(*[b"1" * 50_000] * 10, b"\nnext\n")
    assert text == "1" * MAX_LINE_CHARS + CUT_NOTE + "\nnext\n"


def test_long_lines_are_cut_one_by_one():
    text = shown(b"1" * 70_000 + b"\n" + b"2" * 10 + b"\r" + b"3" * 70_000 + b"\n4\n")
    assert text == "1" * MAX_LINE_CHARS + CUT_NOTE + "\n" + "2" * 10 + "\r" + "3" * MAX_LINE_CHARS + CUT_NOTE + "\n4\n"


@settings(deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_no_bytes_in_whatever_pieces_ever_show_a_control_character(data, cuts):
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    text = shown(*(data[a:b] for a, b in itertools.pairwise(places)))
    rest = harmless(text)
    assert rest == text
    assert not [
        c for c in text.replace("\x1b[", "") if (ord(c) < 32 and c not in "\t\r\n") or ord(c) in range(0x7F, 0xA0)
    ]
