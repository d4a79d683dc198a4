"""From a changed line of code to the first line of the program's log, in a container.

    python benchmarks/docker.py [--rounds 5] [--image local/python:3.11]

Counted from the end of importing MLflow, which all but the bare `docker run` do. Every round changes a file of the
project. "MLflow" is its own local backend with docker_env and --build-image, which bakes the code into an image. The
bars: at most 0.5 times MLflow, and at most 1.5 s more than a bare `docker run` of the same command.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

FIRST = "the first line"
SUBMIT = """
import sys
import mlflow
import mlflow.projects
print("imported", flush=True)
backend, image = sys.argv[2:]
ours = {"compute": "docker", "docker": {"network": "host"}}
mlflow.projects.run(
    sys.argv[1],
    backend=backend,
    backend_config=ours if backend == "remote" else None,
    build_image=backend == "local",
    synchronous=True,
)
"""
MLPROJECT = "name: benchmark\ndocker_env: {{image: '{image}'}}\nentry_points: {{main: {{command: 'sh main.sh'}}}}\n"
CASES = ("docker run", "MLflow", "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image", default="local/python:3.11")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlflow-remote-benchmark-") as name:
        folder = Path(name)
        project = make_project(folder, options.image)
        spent: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
        for number in range(options.rounds + 1):
            (project / "code.py").write_text(f"version = {number}\n")
            for case in CASES:
                seconds = one_run(folder, project, case, options.image)
                if number:  # the first round makes the database and warms the disk
                    spent[case].append(seconds)
    report(spent)
    remove_images()


def make_project(folder: Path, image: str) -> Path:
    project = folder / "project"
    project.mkdir()
    (project / "MLproject").write_text(MLPROJECT.format(image=image))
    (project / "main.sh").write_text(f"echo {FIRST}\n")
    for number in range(200):
        (project / f"module_{number}.py").write_text(f"value = {number}\n" * 50)
    return project


def one_run(folder: Path, project: Path, case: str, image: str) -> tuple[float, float]:
    """Seconds to the first line of the program, and to the end of everything."""
    if case == "docker run":
        return timed(["docker", "run", "--rm", image, "sh", "-c", f"echo {FIRST}"], folder, since="")
    backend = "local" if case == "MLflow" else "remote"
    return timed([sys.executable, "-c", SUBMIT, str(project), backend, image], folder, since="imported")


def timed(command: Sequence[str], folder: Path, *, since: str) -> tuple[float, float]:
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "XDG_STATE_HOME": str(folder / "state")}
    environ = {**os.environ, **own}
    start = time.perf_counter()
    first = 0.0
    process = subprocess.Popen(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if since and line.strip() == since:
            start = time.perf_counter()
        elif line.strip() == FIRST and not first:
            first = time.perf_counter() - start
    if process.wait() or not first:
        sys.exit("".join(said))
    return first, time.perf_counter() - start


def report(spent: dict[str, list[tuple[float, float]]]) -> None:
    first = {case: statistics.median(each[0] for each in seconds) for case, seconds in spent.items()}
    whole = {case: statistics.median(each[1] for each in seconds) for case, seconds in spent.items()}
    print(f"{'median seconds':<28} {'first line':>10} {'all':>7}")
    for case in CASES:
        print(f"{case:<28} {first[case]:>10.2f} {whole[case]:>7.2f}")
    print(f"{'ours against MLflow':<28} {first['ours'] / first['MLflow']:>10.2f} {'bar 0.5':>15}")
    print(f"{'ours beyond docker run, s':<28} {first['ours'] - first['docker run']:>10.2f} {'bar 1.5':>15}")


def remove_images() -> None:
    """MLflow leaves one image for each change of the code."""
    named = ["docker", "images", "--quiet", "benchmark"]
    dangling = ["docker", "images", "--quiet", "--filter", "dangling=true", "--filter", "reference=benchmark"]
    for command in (named, dangling):
        ids = subprocess.run(command, capture_output=True, text=True).stdout.split()
        if ids:
            subprocess.run(["docker", "rmi", "--force", *set(ids)], capture_output=True)


if __name__ == "__main__":
    main()
