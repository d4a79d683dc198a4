"""The stored log: when parts close, what is uploaded again, how another process goes on. The clock is the test's."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from faults import FaultProxy, is_artifact

from mlflow_remote_backend.job import RunRef
from mlflow_remote_backend.runner import parts
from mlflow_remote_backend.runner.parts import CLOSE_BYTES, INDEX, LogUploader, Part, load_index, part_path
from mlflow_remote_backend.runner.record import RecordError, RunRecord, Trouble
from mlflow_remote_backend.runner.spool import SEGMENT_BYTES, Spool

KIB = 1024
MIB = 1024 * KIB


class CountingRecord(RunRecord):
    """A real record that remembers what was uploaded."""

    def __init__(self, run: RunRef) -> None:
        super().__init__(run)
        self.uploaded: list[tuple[str, int]] = []

    def upload_file(self, path: Path, folder: str) -> None:
        size = path.stat().st_size
        super().upload_file(path, folder)
        self.uploaded.append((path.name, size))

    def of_the_log(self) -> list[tuple[str, int]]:
        return [each for each in self.uploaded if each[0] != "index.json"]


@dataclass
class Bench:
    """A spool that the test writes as execute would, an uploader on it, a clock in the test's hands."""

    folder: Path
    run: RunRef
    attempt: int = 0
    now: float = 1000.0
    written: bytes = b""
    spool: Spool = field(init=False)
    record: CountingRecord = field(init=False)
    uploader: LogUploader = field(init=False)

    def __post_init__(self) -> None:
        self.spool = Spool.create(self.folder / f"spool-{self.attempt}")
        self.record = CountingRecord(self.run)
        self.start_anew()

    def start_anew(self) -> None:
        """As another process would, from what is on disk."""
        self.uploader = LogUploader(self.spool, self.record, attempt=self.attempt, clock=lambda: self.now)

    def write(self, data: bytes | int) -> None:
        data = os.urandom(data) if isinstance(data, int) else data
        position = len(self.written)
        self.written += data
        while position < len(self.written):
            number = position // SEGMENT_BYTES
            end = min((number + 1) * SEGMENT_BYTES, len(self.written))
            with open(self.spool.path / "log" / f"{number:06d}", "ab") as file:
                file.write(self.written[position:end])
            position = end

    def step(self, after_s: float = 0.0, *, final: bool = False) -> None:
        self.now += after_s
        self.uploader.step(final=final)

    def index(self) -> list[Part]:
        return load_index(RunRecord(self.run).download(INDEX))

    def stored(self) -> bytes:
        """The log as the run's artifacts hold it, checked against the index."""
        data = b""
        for part in self.index():
            content = RunRecord(self.run).download(part.path)
            assert content is not None
            assert len(content) == part.length
            assert hashlib.sha256(content).hexdigest() == part.sha256
            if part.attempt == self.attempt:
                assert part.offset == len(data)
                data += content
        return data


@pytest.fixture
def bench(tmp_path: Path, sqlite_run: RunRef) -> Bench:
    return Bench(tmp_path, sqlite_run)


def test_part_names_are_the_contracts() -> None:
    assert [part_path(number) for number in (0, 1, 20)] == [
        "logs/std_log.txt",
        "logs/std_log.000001.txt",
        "logs/std_log.000020.txt",
    ]


def test_the_index_of_a_long_log_is_uploaded_less_often(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows with each part: uploaded with each, it would be most of what a job of weeks sends."""
    monkeypatch.setattr(parts, "INDEX_BYTES_PER_S", 64)
    began = bench.now
    for _ in range(60):
        bench.write(256 * KIB)
        bench.step()
        bench.step(60)
    sizes = [size for name, size in bench.record.uploaded if name == "index.json"]
    assert sum(sizes) <= 64 * (bench.now - began) + sizes[-1]
    assert len(bench.index()) < 61
    bench.write(b"end")
    bench.step(final=True)
    assert bench.stored() == bench.written


def test_a_part_whose_start_was_dropped_is_still_known(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the spool keeps neither what is stored nor the list of it."""
    monkeypatch.setattr(parts, "KEEP_BYTES", 0)
    bench.write(5 * MIB)
    bench.step()
    bench.step(61)
    bench.write(CLOSE_BYTES)
    bench.step()
    bench.write(MIB)
    bench.step(3)
    assert bench.spool.log.start() == SEGMENT_BYTES
    (bench.spool.path / "uploaded.json").unlink()
    bench.start_anew()
    bench.step(final=True)
    assert bench.stored() == bench.written


def test_a_short_log_is_one_part_uploaded_once(bench: Bench) -> None:
    bench.write(b"hello\xff\x00")
    bench.step()
    bench.step(9.9)
    assert bench.record.uploaded == []
    bench.step(final=True)
    assert bench.stored() == bench.written
    assert bench.record.of_the_log() == [("std_log.txt", 7)]
    assert bench.index() == [Part("logs/std_log.txt", 0, 0, 7, hashlib.sha256(bench.written).hexdigest(), closed=True)]


def test_a_silent_program_has_an_index_without_parts_at_its_end(bench: Bench) -> None:
    bench.step(60)
    assert bench.record.uploaded == []
    bench.step(final=True)
    assert [name for name, _ in bench.record.uploaded] == ["index.json"]
    assert bench.index() == []


def test_a_byte_waits_at_most_10_s(bench: Bench) -> None:
    bench.write(b"one\n")
    bench.step()
    bench.step(10)
    assert bench.stored() == b"one\n"
    assert not bench.index()[0].closed
    bench.step(100)
    assert len(bench.record.of_the_log()) == 1, "nothing new, nothing uploaded"
    bench.write(b"two\n")
    bench.step()
    bench.step(9)
    assert bench.stored() == b"one\n"
    bench.step(1)
    assert bench.stored() == b"one\ntwo\n"


def test_a_part_closes_at_8_mib_and_is_never_uploaded_again(bench: Bench) -> None:
    bench.write(CLOSE_BYTES + 10)
    bench.step()
    assert bench.record.of_the_log() == [("std_log.txt", CLOSE_BYTES)]
    bench.write(3 * CLOSE_BYTES)
    bench.step(1)
    bench.step(10, final=True)
    assert bench.stored() == bench.written
    names = [name for name, _ in bench.record.of_the_log()]
    assert len(names) == len(set(names)) == 5
    assert all(part.closed for part in bench.index())


def test_a_part_closes_once_it_is_60_s_old_and_holds_256_kib(bench: Bench) -> None:
    bench.write(200 * KIB)
    bench.step()
    bench.step(60)
    bench.step(1)
    assert [part.closed for part in bench.index()] == [False], "too small to close"
    bench.write(60 * KIB)
    bench.step(2)  # the index follows at most every 2 s
    assert [part.closed for part in bench.index()] == [True]
    bench.write(b"next")
    bench.step(10)
    bench.step(10)
    assert [(part.offset, part.closed) for part in bench.index()] == [(0, True), (260 * KIB, False)]
    assert bench.stored() == bench.written


@pytest.mark.parametrize("rate_bytes_s", [2 * MIB, 11 * MIB])
def test_of_a_fast_log_each_byte_is_uploaded_about_once(bench: Bench, rate_bytes_s: int) -> None:
    for _ in range(80 * MIB // rate_bytes_s):
        bench.write(rate_bytes_s)
        bench.step(1)
    bench.step(final=True)
    assert bench.stored() == bench.written
    assert bench.uploader.sent_bytes <= 1.1 * len(bench.written)


def test_the_spool_is_freed_of_what_is_stored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "KEEP_BYTES", 2 * SEGMENT_BYTES)
    for _ in range(5):
        bench.write(SEGMENT_BYTES)
        bench.step(1)
    bench.write(100)
    bench.step(1)
    assert bench.spool.log.start() == 3 * SEGMENT_BYTES
    assert bench.spool.log.size() == len(bench.written)
    bench.step(final=True)
    assert bench.stored() == bench.written


def test_with_little_disk_nothing_stored_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LITTLE_DISK_BYTES", 1 << 80)
    bench.write(2 * SEGMENT_BYTES + 5)
    bench.step()
    assert bench.spool.log.start() == 2 * SEGMENT_BYTES


def test_another_process_goes_on_where_the_last_one_was(bench: Bench) -> None:
    bench.write(CLOSE_BYTES + 100)
    bench.step()
    bench.step(10)  # the open part is stored as well
    bench.write(50)
    bench.start_anew()
    bench.step(final=True)
    assert bench.stored() == bench.written
    assert bench.record.of_the_log() == [
        ("std_log.txt", CLOSE_BYTES),
        ("std_log.000001.txt", 100),
        ("std_log.000001.txt", 150),
    ]


def test_finishing_twice_uploads_nothing_twice(bench: Bench) -> None:
    bench.write(1000)
    bench.step(final=True)
    bench.start_anew()
    bench.step(final=True)
    assert bench.record.of_the_log() == [("std_log.txt", 1000)]


def test_a_process_that_died_between_upload_and_note_uploads_it_again(bench: Bench) -> None:
    bench.write(1000)
    bench.step(final=True)
    (bench.spool.path / "uploaded.json").unlink()
    bench.start_anew()
    bench.step(final=True)
    assert bench.stored() == bench.written
    assert [part.path for part in bench.index()] == ["logs/std_log.txt"]


def test_a_second_pod_of_the_same_attempt_overwrites_nothing(bench: Bench) -> None:
    bench.write(b"of the first pod")
    bench.step(final=True)
    other = Bench(bench.folder / "other", bench.run)
    other.write(b"of the second pod")
    other.step(final=True)
    assert RunRecord(bench.run).download("logs/std_log.txt") == b"of the first pod"
    assert RunRecord(bench.run).download("logs/std_log.000001.txt") == b"of the second pod"
    assert [part.path for part in bench.index()] == ["logs/std_log.txt", "logs/std_log.000001.txt"]


def test_with_a_full_spool_the_log_is_uploaded_over_another_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write(2 * SEGMENT_BYTES)
    copy = LogUploader._copy

    def full(self: LogUploader, offset: int, length: int, target: Path) -> None:
        if bench.spool.path in target.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(self, offset, length, target)

    monkeypatch.setattr(LogUploader, "_copy", full)
    bench.step(final=True)
    assert bench.stored() == bench.written


def test_a_process_that_died_while_it_could_write_no_note_is_followed_by_one_that_loses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full, so what is stored is dropped from the spool at once: an old note would ask for it again."""
    monkeypatch.setattr(parts, "LITTLE_DISK_BYTES", 1 << 62)
    bench.write(1000)
    bench.step()
    bench.step(10)
    with monkeypatch.context() as full:
        full.setattr(parts, "write_json", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        bench.write(3 * SEGMENT_BYTES)
        bench.step()
    assert bench.spool.log.start() > 0
    bench.start_anew()
    bench.step(final=True)
    content = b"".join(RunRecord(bench.run).download(part.path) or b"" for part in bench.index())
    assert content == bench.written


def test_bytes_that_are_gone_are_a_gap_and_no_lie(bench: Bench) -> None:
    bench.write(SEGMENT_BYTES + 100)
    (bench.spool.path / "log" / "000000").unlink()
    bench.step(final=True)
    (part,) = bench.index()
    assert (part.offset, part.length) == (SEGMENT_BYTES, 100)
    assert RunRecord(bench.run).download(part.path) == bench.written[SEGMENT_BYTES:]


def test_the_next_attempt_continues_the_sequence(bench: Bench) -> None:
    bench.write(b"first attempt")
    bench.step()
    bench.step(10)  # and then its machine died: the part is still open
    second = Bench(bench.folder, bench.run, attempt=1)
    second.write(b"second attempt")
    second.step(final=True)
    assert second.stored() == b"second attempt"
    assert [(part.path, part.attempt, part.offset, part.closed) for part in second.index()] == [
        ("logs/std_log.txt", 0, 0, True),
        ("logs/std_log.000001.txt", 1, 0, True),
    ]
    assert bench.stored() == b"first attempt"


def test_what_could_not_be_uploaded_is_uploaded_later(tmp_path: Path, server_run: RunRef, proxy: FaultProxy) -> None:
    bench = Bench(tmp_path, server_run)
    bench.write(CLOSE_BYTES + 1000)
    proxy.fail(500, is_artifact)
    with pytest.raises(RecordError):
        bench.step()
    bench.write(1000)
    with pytest.raises(RecordError):
        bench.step(60)
    proxy.mend()
    bench.step(1)
    bench.step(final=True)
    assert bench.stored() == bench.written


def test_an_upload_whose_answer_was_lost_is_done_again(tmp_path: Path, server_run: RunRef, proxy: FaultProxy) -> None:
    bench = Bench(tmp_path, server_run)
    bench.write(1000)
    proxy.fail(0, is_artifact, reaches=True, times=2)  # MLflow itself tries twice
    with pytest.raises(RecordError) as caught:
        bench.step(final=True)
    assert caught.value.trouble is Trouble.AWAY
    proxy.mend()
    bench.step(final=True)
    assert bench.stored() == bench.written


@pytest.mark.parametrize("limit_bytes", [700 * KIB, 100 * KIB])
def test_a_server_that_refuses_large_files_gets_small_parts(
    tmp_path: Path, server_run: RunRef, proxy: FaultProxy, limit_bytes: int
) -> None:
    bench = Bench(tmp_path, server_run)
    proxy.fail(413, is_artifact, over_bytes=limit_bytes)
    bench.write(MIB + 17)
    bench.step()
    bench.step(10)
    bench.write(200 * KIB)
    bench.step(final=True)
    assert bench.stored() == bench.written
    assert all(part.length <= limit_bytes for part in bench.index())
    tries = [seen for seen in proxy.seen if seen.status == 413]
    assert len(tries) <= 8


def test_a_damaged_index_counts_as_none() -> None:
    for document in (b"", b"{", b"[]", b'{"parts": 3}', b'{"parts": [3]}', b'{"parts": [{"path": "x"}]}', None, {}):
        assert load_index(document) == []


def test_an_index_of_another_release_is_read(bench: Bench) -> None:
    bench.write(10)
    bench.step(final=True)
    document = json.loads(parts.dump_index(bench.index()))
    document["parts"][0]["invented_later"] = 1
    assert load_index(document) == bench.index()
