"""Counts seconds, and saves how far it came when it is asked to stop: for trying to follow, to cancel and to attach."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

OUTPUTS = Path(os.environ.get("MLFLOW_REMOTE_OUTPUT_DIR", "outputs"))
STEP_S = 0.5


class Stopped(Exception):
    """SIGTERM came."""


def stop(signal_number: int, frame: FrameType | None) -> None:
    raise Stopped


def count(seconds: float) -> None:
    started_at = time.monotonic()
    while (passed_s := time.monotonic() - started_at) < seconds:
        print(f"{passed_s:5.1f} of {seconds:.1f} s", flush=True)
        time.sleep(min(STEP_S, seconds - passed_s))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    try:
        count(arguments.seconds)
    except Stopped:
        OUTPUTS.mkdir(parents=True, exist_ok=True)
        (OUTPUTS / "checkpoint.txt").write_text("Saved after being asked to stop.\n")
        print("asked to stop; saved a checkpoint", flush=True)
        sys.exit(128 + signal.SIGTERM)
    print("done", flush=True)


if __name__ == "__main__":
    main()
