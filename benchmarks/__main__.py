"""All benchmarks, one table each.

    python benchmarks                  those that need nothing but this machine
    python benchmarks docker …         by name

Each is a program of its own with its options: python benchmarks/snapshot.py --help. Figures are ratios and counts of
one run on one machine; a busy machine makes them worse. Nothing here passes or fails: the bar stands beside the figure.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ON_THIS_MACHINE = ("run_overhead", "snapshot", "log_throughput", "log_latency", "many_runs")


def main(names: list[str]) -> int:
    known = sorted(path.stem for path in HERE.glob("[a-z]*.py"))
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or ON_THIS_MACHINE:
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\ndid not run to their end: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
