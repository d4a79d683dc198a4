"""What it costs a program to have its log kept, and what that costs our runner.

    python benchmarks/log_throughput.py [--seconds 30] [--rate 100000] [--megabytes 1024] [--store sqlite|server]

Prints one table:

- a program that writes RATE lines a second for SECONDS, each with a system call of its own: the speed it keeps, against
  writing to a file, both at that rate and as fast as it can;
- what observe uses of memory meanwhile, over an idle process that holds an MlflowClient on the same store;
- a log of MEGABYTES: uploaded bytes against log bytes;
- the time from a line's writing to its frame.

Every log is compared with what was written: a loss is an error. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mlflow_remote_backend.job import EntryPoint, EnvironmentRef, JobSpec, RunRef, SnapshotRef
from mlflow_remote_backend.runner import envelope, execute
from mlflow_remote_backend.runner.frames import parse_frame
from mlflow_remote_backend.runner.spool import Command, Prepared, Spool

MIB = 1 << 20

#: Writes COUNT lines of 100 bytes, each by its own system call, at RATE a second (0: as fast as possible); then says
#: on stderr how many seconds it took.
WRITER = """
import os, sys, time
count, rate = int(sys.argv[1]), int(sys.argv[2])
tail = b" " + b"x" * 89 + b"\\n"
start = time.perf_counter()
for number in range(count):
    os.write(1, b"%09d" % number + tail)
    if rate and number % 1000 == 0:
        ahead = number / rate - (time.perf_counter() - start)
        if ahead > 0:
            time.sleep(ahead)
open(sys.argv[3], "w").write(str(time.perf_counter() - start))
"""
LINE_BYTES = 100

#: Writes the clock's time, one line at a time.
CLOCK = """
import sys, time
for _ in range(int(sys.argv[1])):
    print(time.time(), flush=True)
    time.sleep(0.05)
"""


def lines_digest(count: int) -> str:
    digest = hashlib.sha256()
    tail = b" " + b"x" * 89 + b"\n"
    for start in range(0, count, 10_000):
        digest.update(b"".join(b"%09d" % number + tail for number in range(start, min(start + 10_000, count))))
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Measured:
    """One job. ``wrote_s``: the program's own time. Memory in bytes."""

    wrote_s: float
    log_bytes: int
    stored_bytes: int
    sent_bytes: int
    memory_peak_bytes: int
    memory_end_bytes: int
    frames: bytes


class Store:
    """An MLflow store for the benchmark's runs."""

    def __init__(self, uri: str, artifacts: str) -> None:
        import mlflow

        self.uri = uri
        self.client = mlflow.MlflowClient(uri)
        self.experiment = self.client.create_experiment(f"benchmark-{time.time_ns()}", artifact_location=artifacts)

    def run(self) -> RunRef:
        run = self.client.create_run(self.experiment)
        return RunRef(run.info.run_id, self.experiment, run.info.artifact_uri, self.uri)

    def stored_digest(self, run_id: str, folder: Path) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        index = json.loads(Path(self.client.download_artifacts(run_id, "logs/index.json", str(folder))).read_text())
        for part in index["parts"]:
            path = Path(self.client.download_artifacts(run_id, part["path"], str(folder)))
            digest.update(path.read_bytes())
            size += path.stat().st_size
            path.unlink()
        return digest.hexdigest(), size


@contextlib.contextmanager
def store(kind: str, folder: Path) -> Iterator[Store]:
    database = f"sqlite:///{folder / 'mlflow.db'}"
    if kind == "sqlite":
        yield Store(database, str(folder / "artifacts"))
        return
    import urllib.request

    port = 5987
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts")]
    environ = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environ, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url + "/health", timeout=2)
                break
            if time.monotonic() > deadline:
                raise RuntimeError((folder / "server.log").read_text())
            time.sleep(0.2)
        yield Store(url, "mlflow-artifacts:/benchmark")
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def memory_bytes(pid: int) -> int:
    """Memory of the process that is its own: private pages, so that shared libraries do not count."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean", "Private_Dirty")):
                total += int(line.split()[1]) * 1024
    return total


#: The observing process: as the sidecar, but that it says how many bytes it uploaded.
OBSERVER = """
import sys
from pathlib import Path
from mlflow_remote_backend.runner import envelope, observe
from mlflow_remote_backend.runner.record import RunRecord
sent = 0
class Counting(RunRecord):
    def upload_file(self, path, folder, name=""):
        global sent
        sent += path.stat().st_size
        super().upload_file(path, folder, name)
spec = envelope.load(Path(sys.argv[1]).read_bytes())
with open(sys.argv[3], "wb") as frames:
    outcome = observe.observe(spec, Path(sys.argv[2]), Counting(spec.run), frames_to=frames)
assert outcome.finalized, outcome
Path(sys.argv[4]).write_text(str(sent))
"""

IDLE = """
import sys, time
from mlflow_remote_backend.runner.record import RunRecord
from mlflow_remote_backend.job import RunRef
record = RunRecord(RunRef(sys.argv[1], tracking_uri=sys.argv[2]))
record.log({"benchmark": "idle"}); record.look()
print("ready", flush=True)
sys.stdin.read()
"""


def idle_memory_bytes(where: Store) -> int:
    """Of a process that imported MLflow, holds a client, has used it, and now does nothing."""
    arguments = [sys.executable, "-c", IDLE, where.run().run_id, where.uri]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        size = memory_bytes(process.pid)
        process.stdin.close()
    return size


def run_job(where: Store, folder: Path, argv: list[str], took: Path) -> tuple[Measured, str]:
    """Run a program under execute and observe; returns the figures and the run's id."""
    run = where.run()
    spec = JobSpec(
        run, "benchmark", "benchmark", EntryPoint("main", ""), {}, SnapshotRef("", 0), EnvironmentRef(), outputs=()
    )
    spool = Spool.create(folder / "spool")
    spool.write_command(Command(tuple(argv)))
    spool.write_prepared(Prepared())
    (folder / "envelope.json").write_text(envelope.dump(spec))
    frames, sent = folder / "frames", folder / "sent"
    watching = [sys.executable, "-c", OBSERVER, str(folder / "envelope.json"), str(spool.path), str(frames), str(sent)]
    observer = subprocess.Popen(watching)
    sizes: list[int] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.5):
            sizes.append(memory_bytes(observer.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    subprocess.run([sys.executable, "-I", "-S", execute.__file__, str(spool.path)], check=True)
    if observer.wait() != 0:
        raise RuntimeError("observe failed")
    stop.set()
    sampler.join()
    ended = spool.exit()
    assert ended is not None
    sizes = [size for size in sizes if size]
    late = sizes[-6:] or [0]
    measured = Measured(
        float(took.read_text()) if took.exists() else 0.0,
        ended.log_bytes or 0,
        0,
        int(sent.read_text()),
        max(sizes, default=0),
        int(statistics.median(late)),
        frames.read_bytes(),
    )
    return measured, run.run_id


def write_to_file(folder: Path, count: int, rate: int) -> float:
    took = folder / "took-file"
    with open(folder / "plain.log", "wb") as out:
        subprocess.run([sys.executable, "-c", WRITER, str(count), str(rate), str(took)], stdout=out, check=True)
    (folder / "plain.log").unlink()
    return float(took.read_text())


def write_to_job(where: Store, folder: Path, count: int, rate: int) -> Measured:
    took = folder / "took-job"
    measured, run_id = run_job(where, folder, [sys.executable, "-c", WRITER, str(count), str(rate), str(took)], took)
    digest, size = where.stored_digest(run_id, folder)
    if digest != lines_digest(count):
        raise SystemExit(f"the stored log differs from what was written: {size} bytes of {count * LINE_BYTES}")
    return dataclasses.replace(measured, stored_bytes=size)


def latency_s(where: Store, folder: Path, lines: int) -> list[float]:
    """From a line's writing to its frame standing in the file, as seen by a reader that looks every 5 ms."""
    seen: list[float] = []
    frames = folder / "frames"
    done = threading.Event()

    def read() -> None:
        position, rest = 0, b""
        while not done.is_set():
            time.sleep(0.005)
            if not frames.exists():
                continue
            with open(frames, "rb") as file:
                file.seek(position)
                data = file.read()
            position, now = position + len(data), time.time()
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                frame = parse_frame(line)
                if frame is not None and frame.kind == "log":
                    seen.extend(now - float(each) for each in frame.data.split())

    reader = threading.Thread(target=read)
    reader.start()
    run_job(where, folder, [sys.executable, "-c", CLOCK, str(lines)], folder / "took")
    done.set()
    reader.join()
    return sorted(seen)


Row = tuple[str, str, str]


def throughput(where: Store, folder: Path, count: int, rate: int) -> Iterator[Row]:
    """Speed at that rate and at full speed, and observe's memory meanwhile."""
    idle = idle_memory_bytes(where)
    plain = write_to_file(fresh(folder, "paced-file"), count, rate)
    paced = write_to_job(where, fresh(folder, "paced"), count, rate)
    yield f"{count} lines at {rate}/s: speed kept", f"{plain / paced.wrote_s:.2f}", ">= 0.80"
    plain = write_to_file(fresh(folder, "fast-file"), count, 0)
    fast = write_to_job(where, fresh(folder, "fast"), count, 0)
    speed = f"{count / plain / 1000:.0f} k lines/s to a file"
    yield f"as fast as possible ({speed}): speed kept", f"{plain / fast.wrote_s:.2f}", ""
    over = max(paced.memory_peak_bytes, fast.memory_peak_bytes) - idle
    yield "observe's memory over an idle process, peak", f"{over / MIB:.1f} MiB", "<= 32"
    yield "the same at the end", f"{(paced.memory_end_bytes - idle) / MIB:.1f} MiB", "flat"


def upload(where: Store, folder: Path, size_bytes: int) -> Iterator[Row]:
    """Bytes uploaded for a large log."""
    big = write_to_job(where, fresh(folder, "big"), size_bytes // LINE_BYTES, 0)
    ratio = big.sent_bytes / big.log_bytes
    yield f"uploaded against a log of {big.log_bytes / MIB:.0f} MiB", f"{ratio:.3f}", "<= 1.1"


def latency(where: Store, folder: Path) -> Iterator[Row]:
    """From line to frame."""
    waits = latency_s(where, fresh(folder, "latency"), 200)
    yield "line to frame, median", f"{statistics.median(waits) * 1000:.0f} ms", "<= 200"
    yield "line to frame, 99th percentile", f"{waits[int(len(waits) * 0.99)] * 1000:.0f} ms", "<= 1000"


def fresh(folder: Path, job: str) -> Path:
    (folder / job).mkdir()
    return folder / job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--rate", type=int, default=100_000)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--store", choices=("sqlite", "server"), default="sqlite")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlflow-remote-benchmark-") as name, store(options.store, Path(name)) as to:
        rows = [
            *throughput(to, Path(name), options.seconds * options.rate, options.rate),
            *upload(to, Path(name), options.megabytes * MIB),
            *latency(to, Path(name)),
        ]
    width = max(len(row[0]) for row in rows)
    print(f"{'':{width}}  {'measured':>10}  bar      ({options.store} store, {os.cpu_count()} cores)")
    for what, figure, bar in rows:
        print(f"{what:{width}}  {figure:>10}  {bar}")


if __name__ == "__main__":
    main()
