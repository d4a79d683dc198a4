"""How long it takes from a line's writing to its showing at the submitter.

    python benchmarks/log_latency.py [--lines 300]

A program prints the time every 50 ms; the submitter notes when each line comes out of ``mlflow run``. Prints median
and 99th percentile in seconds; the bars are 0.2 and 1.
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

PROGRAM = """\
import sys, time
for _ in range(int(sys.argv[1])):
    print(time.time(), flush=True)
    time.sleep(0.05)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lines", type=int, default=300)
    lines = parser.parse_args().lines
    with tempfile.TemporaryDirectory(prefix="mlflow-remote-benchmark-") as name:
        late = sorted(latencies(Path(name), lines))
    median, last = statistics.median(late), late[int(len(late) * 0.99) - 1]
    print(f"{'line written to line shown':<34} {'seconds':>9} {'bar':>6}")
    print(f"{'median of ' + str(len(late)) + ' lines':<34} {median:>9.3f} {0.2:>6}")
    print(f"{'99th percentile':<34} {last:>9.3f} {1.0:>6}")


def latencies(folder: Path, lines: int) -> list[float]:
    project = folder / "project"
    project.mkdir()
    (project / "tick.py").write_text(PROGRAM)
    (project / "MLproject").write_text(f"entry_points: {{main: {{command: 'python tick.py {lines}'}}}}\n")
    environ = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "XDG_STATE_HOME": str(folder / "state"),
    }
    command = [sys.executable, "-m", "mlflow", "run", str(project), "--env-manager", "local", "--backend", "remote"]
    with subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        return [time.time() - float(line) for line in run.stdout]


if __name__ == "__main__":
    main()
