"""Fails on purpose, as a training does that is given nonsense: for seeing what a failed run holds."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

OUTPUTS = Path(os.environ.get("MLFLOW_REMOTE_OUTPUT_DIR", "outputs"))


class TrainingFailed(Exception):
    """The training cannot go on."""


def parse_rate(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise TrainingFailed(f"the learning rate {text!r} is not a number") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", default="twelve")
    arguments = parser.parse_args()
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    (OUTPUTS / "before_the_failure.txt").write_text("What was written before the failure is kept.\n")
    print(f"starting with rate {arguments.rate}", flush=True)
    rate = parse_rate(arguments.rate)
    raise TrainingFailed(f"the training diverged at rate {rate}")


if __name__ == "__main__":
    main()
