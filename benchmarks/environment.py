"""What environments cost: nothing new, a new lock, a new prefix, and the same beside MLflow's own virtualenv.

    python benchmarks/environment.py [--rounds 3] [--skip-mlflow]

Locks and builds the sample project's environment: Python from a channel that is made on the spot from this interpreter
(so it must be the version that sample_project/conda.yaml wants), the packages from the index that pip is configured
with. Every round has a cache of its own. Prints one table of medians; ratios are of the two numbers before them.

"unchanged" is measured in a fresh process that has loaded MLflow, as the submitter has, and nothing of ours.
"by hand" is a script that calls py-rattler's install and `uv pip install` with the lock's own URLs and digests, caches
as cold as ours. "MLflow" is `mlflow.projects.run` with its local backend and `--env-manager virtualenv`, less the same
run with `local`: what the environment adds. Ours is locking, building and finding, in a process that has loaded
MLflow as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "environment")]

from channel import make_channel  # noqa: E402

from mlflow_remote_backend.environment import locking, materialise, platforms, spec, uv  # noqa: E402
from mlflow_remote_backend.environment.lockfile import Row, conda_lock_rows, load_conda_lock  # noqa: E402
from mlflow_remote_backend.job import EnvironmentRef  # noqa: E402

SAMPLE = HERE.parent / "sample_project"
PLATFORM = platforms.host_platform()

#: Warm runs are short and their differences small: a median of more of them.
WARM_ROUNDS = 15

#: The second run of an unchanged project: seconds of locking (which the submitter does), and of finding and activating
#: (which the supervisor does).
WARM = """
import json, sys, time
import mlflow.projects
began = time.perf_counter()
from pathlib import Path
from mlflow_remote_backend.environment import locking, spec
options = spec.EnvironmentOptions(channel_map={"conda-forge": sys.argv[3]})
declared = spec.load(sys.argv[1], "conda", "conda.yaml", None, options)
ref = locking.lock(declared, sys.argv[4], Path(sys.argv[2]), lambda progress: sys.exit(f"worked: {progress}"))
locked = time.perf_counter()
from mlflow_remote_backend.environment import activation, cache
prefix = cache.hit(Path(sys.argv[2]), ref.lock_key)
activation.activation(prefix, env_vars=ref.env_vars)
print(json.dumps([locked - began, time.perf_counter() - locked]))
"""

BY_HAND = """
import asyncio, json, os, sys
from pathlib import Path
import rattler
request = json.load(sys.stdin)
async def install():
    records = [await rattler.RepoDataRecord.from_package_archive(path) for path in request["archives"]]
    await rattler.install(records, request["prefix"], cache_dir=request["cache"], show_progress=False)
asyncio.run(install())
os._exit(0)
"""


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mlflow-remote-benchmark-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def lock(root: Path, channel: Path) -> EnvironmentRef:
    options = spec.EnvironmentOptions(channel_map={"conda-forge": channel.as_uri()})
    return locking.lock(spec.load(SAMPLE, "conda", "conda.yaml", None, options), PLATFORM, root)


def warm(root: Path, channel: Path) -> tuple[float, float]:
    command = [sys.executable, "-c", WARM, str(SAMPLE), str(root), channel.as_uri(), PLATFORM]
    environ = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    locked, found = json.loads(subprocess.check_output(command, env=environ))
    return locked, found


def by_hand(ref: EnvironmentRef, root: Path) -> None:
    """The same prefix with the two tools alone: nothing verified twice, no lease, no marker."""
    rows = conda_lock_rows(load_conda_lock(ref.lock), ref.platform)
    conda = [row for row in rows if row.manager == "conda"]
    pip = [row for row in rows if row.manager == "pip"]
    prefix = root / "prefix"
    archives = [row.url.removeprefix("file://") for row in conda]
    request = {"archives": archives, "prefix": str(prefix), "cache": str(root / "pkgs")}
    subprocess.run([sys.executable, "-c", BY_HAND], input=json.dumps(request), text=True, check=True)
    (root / "requirements.txt").write_text("".join(map(_line, pip)))
    options = ["--no-deps", "--require-hashes", "--no-index", "--no-config", "--cache-dir", str(root / "uv"), "-q"]
    command = [uv.executable(), "pip", "install", "--python", str(prefix / "bin/python"), *options]
    subprocess.run([*command, "-r", str(root / "requirements.txt")], check=True)


def _line(row: Row) -> str:
    return f"{row.name} @ {row.url} --hash=sha256:{row.hashes[0]}\n"


def cold_installs(ref: EnvironmentRef, base: Path, *, hand_first: bool) -> tuple[float, float]:
    """Seconds of ours and by hand; which comes first matters to the disk and the network."""
    shutil.rmtree(base / "cache" / "uv", ignore_errors=True)  # what solving has fetched
    hand = seconds(lambda: by_hand(ref, base)) if hand_first else 0.0
    ours = seconds(lambda: materialise.materialise(ref, base / "cache"))
    return ours, hand or seconds(lambda: by_hand(ref, base))


# ---------------------------------------------------------------------------------------------- beside MLflow


def python_project(target: Path) -> Path:
    """A python_env project with the sample's packages and a program that does nothing."""
    import yaml

    (pip,) = (each["pip"] for each in yaml.safe_load((SAMPLE / "conda.yaml").read_text())["dependencies"][2:])
    python = ".".join(map(str, sys.version_info[:3]))
    target.mkdir()
    document = {"python": python, "build_dependencies": ["pip", "setuptools", "wheel"], "dependencies": pip}
    (target / "python_env.yaml").write_text(yaml.safe_dump(document))
    entry_points = {"main": {"command": "true"}}
    project = {"name": "benchmark", "python_env": "python_env.yaml", "entry_points": entry_points}
    (target / "MLproject").write_text(yaml.safe_dump(project))
    return target


def mlflow_run(project: Path, manager: str) -> float:
    """Seconds of a run; what pip and MLflow print goes nowhere."""
    import mlflow

    with silence():
        return seconds(
            lambda: mlflow.projects.run(str(project), backend="local", env_manager=manager, synchronous=True)
        )


@contextmanager
def silence() -> Iterator[None]:
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    try:
        yield
    finally:
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(nowhere)


def our_environment(project: Path, root: Path) -> None:
    declared = spec.load(project, "python", "python_env.yaml", "virtualenv")
    materialise.materialise(locking.lock(declared, PLATFORM, root), root)


def beside_mlflow(base: Path) -> list[tuple[float, float]]:
    """(MLflow's, ours) in seconds: cold, then warm."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{base}/mlflow.db")
    project = python_project(base / "project")
    os.environ["MLFLOW_ENV_ROOT"] = str(base / "mlflow-environments")
    os.environ["PIP_CACHE_DIR"] = str(base / "pip-cache")
    mlflow_run(project, "local")  # makes the database
    plain = mlflow_run(project, "local")
    cold = mlflow_run(project, "virtualenv") - plain, seconds(lambda: our_environment(project, base / "cache"))
    pairs = [(mlflow_run(project, "local"), mlflow_run(project, "virtualenv")) for _ in range(WARM_ROUNDS)]
    ours = [seconds(lambda: our_environment(project, base / "cache")) for _ in range(WARM_ROUNDS)]
    return [cold, (median([theirs - without for without, theirs in pairs]), median(ours))]


# ---------------------------------------------------------------------------------------------- the table


def row(name: str, *numbers: str) -> None:
    print(f"{name:52}" + "".join(f"{number:>12}" for number in numbers))


def median(values: list[float]) -> float:
    return statistics.median(values)


def measure(rounds: int) -> None:
    locks, warms, hits, ours, hands = [], [], [], [], []
    with folder() as shared:
        channel = make_channel(shared / "channel", real_python_too=True)
        for number in range(rounds):
            with folder() as base:
                locks.append(seconds(lambda base=base: lock(base / "cache", channel)))
                mine, hand = cold_installs(lock(base / "cache", channel), base, hand_first=number % 2 == 0)
                ours.append(mine)
                hands.append(hand)
                locked, found = warm(base / "cache", channel)
                warms.append(locked)
                hits.append(found)
    row("", "seconds", "beside", "ratio", "bar")
    row("a lock that is in no cache", f"{median(locks):.2f}", "", "", "")
    row("unchanged: lock from the cache", f"{median(warms):.3f}", "", "", "0.2 s")
    row("unchanged: found and activated", f"{median(hits):.4f}", "", "", "")
    row("unchanged: both", f"{median(warms) + median(hits):.3f}", "", "", "0.1 s")
    ratio = median(ours) / median(hands)
    numbers = (f"{median(ours):.2f}", f"{median(hands):.2f}", f"{ratio:.2f}", "1.2")
    row("cold install from the lock, beside by hand", *numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-mlflow", action="store_true", help="leave out MLflow's virtualenv, which takes minutes")
    options = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    measure(options.rounds)
    if options.skip_mlflow:
        return
    if not (shutil.which("pyenv") and shutil.which("virtualenv")):
        print("beside MLflow's virtualenv: left out, pyenv or virtualenv is not installed")
        return
    with folder() as base:
        for name, (theirs, mine) in zip(("cold", "warm"), beside_mlflow(base), strict=True):
            numbers = (f"{mine:.3f}", f"{theirs:.3f}", f"{mine / theirs:.2f}", "0.5")
            row(f"python_env {name}, beside MLflow's virtualenv", *numbers)


if __name__ == "__main__":
    main()
