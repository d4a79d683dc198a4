"""What ``mlflow run --backend remote`` costs over ``--backend local``, on an empty project without an environment.

    python benchmarks/run_overhead.py [--rounds 7]

Wall seconds of the whole command, in turn: local, remote with a forked supervisor, remote with one started anew.
Prints the medians and their ratios; the bars are 1.15 (forked) and 1.5 (anew).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {
    "local": ["--backend", "local"],
    "remote, forked": ["--backend", "remote"],
    "remote, anew": ["--backend", "remote"],
}
BARS = {"remote, forked": 1.15, "remote, anew": 1.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="mlflow-remote-benchmark-") as name:
        folder = Path(name)
        (folder / "project").mkdir()
        (folder / "project" / "MLproject").write_text("name: empty\nentry_points: {main: {command: 'true'}}\n")
        seconds: dict[str, list[float]] = {case: [] for case in CASES}
        for number in range(rounds + 1):
            for case, arguments in CASES.items():
                spent = one_run(folder, case, arguments)
                if number:  # the first round makes the database and warms the disk
                    seconds[case].append(spent)
    report(seconds)


def one_run(folder: Path, case: str, arguments: list[str]) -> float:
    environ = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "XDG_STATE_HOME": str(folder / "state"),
        "MLFLOW_REMOTE_SUPERVISOR": "spawn" if case.endswith("anew") else "fork",
    }
    command = [sys.executable, "-m", "mlflow", "run", str(folder / "project"), "--env-manager", "local", *arguments]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True)
    return time.perf_counter() - start


def report(seconds: dict[str, list[float]]) -> None:
    base = statistics.median(seconds["local"])
    print(f"{'mlflow run of an empty project':<34} {'median s':>9} {'ratio':>7} {'bar':>6}")
    for case, spent in seconds.items():
        median = statistics.median(spent)
        bar = f"{BARS[case]:>6}" if case in BARS else ""
        print(f"{case:<34} {median:>9.2f} {median / base:>7.2f} {bar}")


if __name__ == "__main__":
    main()
