"""How much cheaper a snapshot is when nothing changed since the last one.

    python benchmarks/snapshot.py [--files 10000] [--megabytes 50] [--rounds 3]

Prints one table: seconds of the first and the second snapshot of a fresh project, and their ratio, median of the
rounds. "scan" tells the digest, "archive" has the archive at hand; the bar is on the two together. Each round has a
project and a cache of its own.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from mlflow_remote_backend import snapshot
from mlflow_remote_backend.config import SnapshotOptions

BAR = 0.3


def make_project(folder: Path, files: int, size_bytes: int, seed: int) -> None:
    """A project like many: sources in packages, some data, an ignore file. Different bytes for each seed."""
    chance = random.Random(seed)
    words = ["import", "numpy", "as", "self", "return", "model", "loss", "0.001", "risk", "token", "weights", "the"]
    (folder / "MLproject").write_text("name: benchmark\nentry_points: {main: {command: 'true'}}\n")
    (folder / ".gitignore").write_text("*.log\nbuild/\ndist/\n*.egg-info/\n.coverage\nhtmlcov/\n/data/raw/\n")
    each_bytes = size_bytes // files
    for number in range(files):
        path = folder / f"package_{number % 100}" / f"module_{number // 100}.{'py' if number % 5 else 'csv'}"
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".csv":
            text = ",".join(f"{chance.random():.8f}" for _ in range(each_bytes // 11 + 1))
        else:
            text = " ".join(chance.choices(words, k=each_bytes // 3))
        path.write_text(text[:each_bytes])


def take(project: Path, cache: Path, target: Path) -> tuple[float, float, str]:
    """Seconds until the digest is known, seconds until the archive is there besides, and the digest."""
    start = time.perf_counter()
    listing = snapshot.scan(project, SnapshotOptions(), cache=cache)
    scanned = time.perf_counter()
    target.mkdir()
    digest = snapshot.build(listing, target, cache=cache).digest
    return scanned - start, time.perf_counter() - scanned, digest


def one_round(files: int, size_bytes: int, seed: int) -> list[tuple[float, float]]:
    """(first, second) in seconds: of scan, of archive, of both."""
    with tempfile.TemporaryDirectory(prefix="mlflow-remote-benchmark-") as name:
        folder = Path(name)
        project = folder / "project"
        project.mkdir()
        make_project(project, files, size_bytes, seed)
        first = take(project, folder / "cache", folder / "first")
        second = take(project, folder / "cache", folder / "second")
        if first[2] != second[2]:
            raise SystemExit("The digests of one tree differ.")
        scan, archive = (first[0], second[0]), (first[1], second[1])
        return [scan, archive, (sum(first[:2]), sum(second[:2]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds = [one_round(options.files, options.megabytes * 1_000_000, seed) for seed in range(options.rounds)]
    print(f"snapshot of {options.files:,} files, {options.megabytes} MB, nothing changed since the last")
    print(f"{'':10}{'first s':>10}{'second s':>10}{'ratio':>8}{'bar':>6}")
    for row, name in enumerate(("scan", "archive", "both")):
        first = statistics.median(each[row][0] for each in rounds)
        second = statistics.median(each[row][1] for each in rounds)
        bar = f"{BAR}" if name == "both" else ""
        print(f"{name:10}{first:>10.2f}{second:>10.2f}{second / first:>8.2f}{bar:>6}")


if __name__ == "__main__":
    main()
