"""Frames: what one side writes the other reads, whatever stands between the lines."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_remote_backend.runner import frames
from mlflow_remote_backend.runner.frames import (
    MAX_LINE_BYTES,
    Frame,
    FrameWriter,
    beat_frame,
    end_frame,
    log_frames,
    parse_frame,
    phase_frame,
)
from mlflow_remote_backend.runner.spool import SEGMENT_BYTES, Spool


@given(st.binary(max_size=20_000), st.integers(0, 99), st.integers(0, 1 << 50))
def test_bytes_survive_the_way_through_frames(data: bytes, attempt: int, offset: int) -> None:
    parsed = [parse_frame(line) for line in log_frames(attempt, offset, data)]
    assert all(frame is not None and frame.kind == "log" and frame.attempt == attempt for frame in parsed)
    assert b"".join(frame.data for frame in parsed if frame) == data
    position = offset
    for frame in parsed:
        assert frame is not None
        assert frame.offset == position
        position += len(frame.data)


def test_no_line_is_longer_than_a_container_runtime_keeps_whole() -> None:
    lines = [
        *log_frames(10**6, 1 << 60, os.urandom(100_000)),
        end_frame(
            10**6, {"message": "\x1b[31mü" * 50_000, "words": "🦀" * 9_000, "pending": ["x" * 500] * 1000, "code": 1}
        ),
        phase_frame(0, "running"),
        beat_frame(0, 1 << 60),
    ]
    assert max(map(len, lines)) <= MAX_LINE_BYTES
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 and line.isascii() for line in lines)
    assert all(parse_frame(line) for line in lines)


def test_fields_arrive_as_they_are() -> None:
    fields = {"reason": "OK", "message": "two\nlines ü", "exit_code": 0, "finalized": True, "pending": ["a"]}
    assert parse_frame(end_frame(2, fields)) == Frame("end", 2, fields=fields)
    assert parse_frame(phase_frame(1, "running")) == Frame("phase", 1, fields={"phase": "running"})
    assert parse_frame(beat_frame(1, 77)) == Frame("beat", 1, 77)


LOG_LINE = next(iter(log_frames(0, 0, b"hello world")))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"unable to retrieve container logs for containerd://abc",
        b'rpc error: code = NotFound desc = an error occurred when try to find container "x"',
        b"mlr1",
        b"mlr1 log 0 0 11",
        LOG_LINE[:-6],
        LOG_LINE.replace(b" 11 ", b" 12 "),
        LOG_LINE.replace(b"aGVs", b"aGV*"),
        LOG_LINE.replace(b"mlr1", b"mlr2"),
        b"mlr1 log x 0 11 aGVsbG8gd29ybGQ=",
        b"mlr1 end 0 [1]",
        b"mlr1 end 0 {",
        b"mlr1 unknown 0 {}",
        b"mlr1 beat 0 \xff",
    ],
)
def test_what_is_no_frame_is_none(line: bytes) -> None:
    assert parse_frame(line) is None


def test_a_writer_follows_a_growing_log_to_its_end(tmp_path: Path, until: Callable[..., Any]) -> None:
    spool = Spool.create(tmp_path / "spool")
    out = io.BytesIO()
    writer = FrameWriter(spool.log, out, attempt=3)
    writer.start()
    writer.phase("running")
    data = os.urandom(1_000_000)
    with open(spool.path / "log" / "000000", "ab", buffering=0) as log:
        for start in range(0, len(data), 100_000):
            log.write(data[start : start + 100_000])
            until(lambda: _offset(out) >= start + 100_000)  # noqa: B023
    writer.close({"reason": "OK"})
    parsed = [parse_frame(line) for line in out.getvalue().splitlines()]
    assert b"".join(frame.data for frame in parsed if frame) == data
    assert [frame.kind for frame in parsed if frame and frame.kind not in ("log", "beat")] == ["phase", "end"]
    assert {frame.attempt for frame in parsed if frame} == {3}


def _offset(out: io.BytesIO) -> int:
    parsed = filter(None, map(parse_frame, out.getvalue().splitlines()))
    return max((each.offset + len(each.data) for each in parsed if each.kind == "log"), default=0)


def test_who_reads_slowly_skips_and_sees_the_gap(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "spool")
    size = frames.MAX_LAG_BYTES + 3 * SEGMENT_BYTES
    for number in range(0, size, SEGMENT_BYTES):
        (spool.path / "log" / f"{number // SEGMENT_BYTES:06d}").write_bytes(bytes(SEGMENT_BYTES))
    out = io.BytesIO()
    writer = FrameWriter(spool.log, out, attempt=0)
    writer.start()
    writer.close({})
    logs = [frame for line in out.getvalue().splitlines() if (frame := parse_frame(line)) and frame.kind == "log"]
    assert logs[0].offset == size - frames.MAX_LAG_BYTES
    assert logs[-1].offset + len(logs[-1].data) == size


def test_a_reader_that_is_gone_disturbs_nobody(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "spool")
    (spool.path / "log" / "000000").write_bytes(b"x")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as out:
        writer = FrameWriter(spool.log, out, attempt=0)
        writer.start()
        writer.join(10)
        writer.close({})
    assert not writer.is_alive()
