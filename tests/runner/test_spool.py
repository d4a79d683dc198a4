"""The spool: what one step writes, the others read, also while it is being written and when it is damaged."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from mlflow_remote_backend.runner.spool import (
    SEGMENT_BYTES,
    Command,
    ExitRecord,
    Prepared,
    Spool,
    Vitals,
    read_json,
    write_json,
)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.create(tmp_path / "spool")


def fill(spool: Spool, size: int) -> bytes:
    """A log of that size, in segments as execute.py writes them."""
    data = os.urandom(1 << 16) * (size // (1 << 16) + 1)
    for number, start in enumerate(range(0, max(size, 1), SEGMENT_BYTES)):
        (spool.path / "log" / f"{number:06d}").write_bytes(data[start : min(start + SEGMENT_BYTES, size)])
    return data[:size]


@pytest.mark.parametrize("size", [0, 1, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 2 * SEGMENT_BYTES + 7])
def test_the_log_is_its_segments_in_order(spool: Spool, size: int) -> None:
    data = fill(spool, size)
    assert spool.log.size() == size
    assert spool.log.read(0, size + 10) == data
    assert spool.log.read(size, 10) == b""


def test_a_read_goes_across_a_border(spool: Spool) -> None:
    data = fill(spool, SEGMENT_BYTES + 100)
    assert spool.log.read(SEGMENT_BYTES - 10, 20) == data[SEGMENT_BYTES - 10 : SEGMENT_BYTES + 10]
    assert b"".join(spool.log.chunks(5, SEGMENT_BYTES + 50, 1000)) == data[5 : SEGMENT_BYTES + 50]


def test_one_long_segment_of_the_shell_twin_reads_the_same(spool: Spool) -> None:
    data = os.urandom(1 << 16) * 300
    (spool.path / "log" / "000000").write_bytes(data)
    assert spool.log.size() == len(data)
    assert spool.log.read(SEGMENT_BYTES - 5, 10) == data[SEGMENT_BYTES - 5 : SEGMENT_BYTES + 5]
    spool.log.drop_before(len(data))
    assert spool.log.read(0, 10) == data[:10]


def test_dropping_keeps_offsets_and_the_size(spool: Spool) -> None:
    data = fill(spool, 2 * SEGMENT_BYTES)
    spool.log.drop_before(SEGMENT_BYTES - 1)
    assert spool.log.start() == 0
    spool.log.drop_before(2 * SEGMENT_BYTES)
    assert (spool.log.start(), spool.log.size()) == (SEGMENT_BYTES, 2 * SEGMENT_BYTES)
    assert spool.log.read(0, 10) == b""
    assert spool.log.read(SEGMENT_BYTES, 10) == data[SEGMENT_BYTES : SEGMENT_BYTES + 10]


def test_a_spool_without_anything_tells_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "missing")
    assert (spool.log.size(), spool.log.read(0, 10), spool.exit(), spool.vitals()) == (0, b"", None, None)
    assert (spool.command(), spool.prepared(), spool.started(), spool.execute_lives()) == (None, None, None, None)
    assert not spool.cancel_requested()


def test_what_is_written_is_read(spool: Spool) -> None:
    command = Command(("bash", "-c", "ünï \udcff"), cwd="/x", env={"A": "\udcfe"}, env_remove=("B",), timeout_s=1.5)
    spool.write_command(command)
    spool.write_prepared(Prepared({"reason": "ENVIRONMENT", "message": "m"}, {"environment": 1.5}))
    assert spool.command() == command
    assert spool.prepared() == Prepared({"reason": "ENVIRONMENT", "message": "m"}, {"environment": 1.5})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "{}", '{"exit_code"', "\xff"])
def test_a_damaged_record_is_none(spool: Spool, text: str) -> None:
    (spool.path / "exit.json").write_text(text, encoding="latin-1")
    assert spool.exit() is None


def test_a_record_of_another_release_is_read_as_far_as_it_is_known(spool: Spool) -> None:
    write_json(spool.path / "exit.json", {"exit_code": 3, "invented_later": [1]})
    write_json(spool.path / "vitals.json", {"invented_later": 1})
    assert spool.exit() == ExitRecord(3)
    assert spool.vitals() == Vitals()


def test_readers_never_see_half_a_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"text": "x" * 100_000})
    stop = threading.Event()

    def rewrite() -> None:
        for number in range(200):
            write_json(path, {"text": str(number % 10) * 100_000})
        stop.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    looks = 0
    while not stop.is_set() or looks == 0:
        record = read_json(path)
        assert record is not None
        assert len(set(record["text"])) == 1
        looks += 1
    writer.join()
    assert looks


def test_threads_that_write_at_once_leave_one_whole_record(tmp_path: Path) -> None:
    """The supervisor tells of the image and of the project from two threads."""
    path = tmp_path / "record.json"
    failed: list[OSError] = []

    def write(text: str) -> None:
        try:
            for _ in range(300):
                write_json(path, {"text": text * 1000})
        except OSError as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=[letter]) for letter in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed
    record = read_json(path)
    assert record is not None
    assert len(record["text"]) == 1000
    assert os.listdir(tmp_path) == ["record.json"]


def test_what_the_log_links_to_is_not_read(spool: Spool, tmp_path: Path) -> None:
    """The program can write there, and the reader may be another container, with secrets of its own."""
    (tmp_path / "secret").write_bytes(b"of the reader")
    (spool.path / "log" / "000000").symlink_to(tmp_path / "secret")
    assert spool.log.read(0, 100) == b""
