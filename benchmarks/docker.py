"""From a changed line of code to the first line of the program's log, in a container.

    python benchmarks/docker.py [--rounds 5] [--image local/python:3.11] [--sqlite]

Counted from the end of importing MLflow, which all but the bare `docker run` do. Every round changes a file of the
project. "MLflow" is its own local backend with docker_env and --build-image, which bakes the code into an image. All
join the machine's network, which is where the server listens. The bars: at most 0.5 times MLflow, and at most 1.5 s
more than a bare `docker run` of the same command.

Two more cases say what no submission can be without. "plan": all that must be known before anything exists, nothing
created. "engine": a container made, the project's files copied into its volume, and started, by the engine alone; a
program that does not run as root can get its files in no other way, since a new volume is root's.

Runs are tracked by a server on this machine; with --sqlite by a database file, whose opening costs MLflow's client more
than a second in both cases.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

FIRST = "the first line"
SUBMIT = """
import sys
import mlflow
import mlflow.projects
print("imported", flush=True)
backend = sys.argv[2]
mlflow.projects.run(
    sys.argv[1],
    backend=backend,
    backend_config={"compute": "docker"} if backend == "remote" else None,
    build_image=backend == "local",
    docker_args={"network": "host"},
    synchronous=True,
)
"""
PLAN = """
import sys
import mlflow
import mlflow.projects
print("imported", flush=True)
from mlflow_remote_backend.backend import plan
plan(sys.argv[1], backend_config={"compute": "docker", "docker": {"network": "host"}})
print(sys.argv[3], flush=True)
"""
ENGINE = """
import io, sys, tarfile
import docker
content = io.BytesIO()
with tarfile.open(fileobj=content, mode="w") as archive:
    archive.add(sys.argv[1], arcname="code")
engine = docker.from_env().api
engine.version()
print("imported", flush=True)
volume = docker.types.Mount("/mlflow/projects", None, type="volume")
host = engine.create_host_config(network_mode="host", mounts=[volume])
container = engine.create_container(sys.argv[2], ["sh", "/mlflow/projects/code/main.sh"], host_config=host)["Id"]
engine.put_archive(container, "/mlflow/projects", content.getvalue())
output = engine.attach(container, stream=True)
engine.start(container)
print(next(iter(output)).decode(), end="", flush=True)
engine.remove_container(container, force=True, v=True)
"""
MLPROJECT = "name: benchmark\ndocker_env: {{image: '{image}'}}\nentry_points: {{main: {{command: 'sh main.sh'}}}}\n"
CASES = ("docker run", "MLflow", "ours", "plan", "engine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image", default="local/python:3.11")
    parser.add_argument("--sqlite", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlflow-remote-benchmark-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its bytecode
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        if not options.sqlite:
            os.environ["MLFLOW_TRACKING_URI"] = stack.enter_context(server(folder))
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


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    options = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


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
        bare = ["docker", "run", "--rm", "--network", "host", image, "sh", "-c", f"echo {FIRST}"]
        return timed(bare, folder, since="")
    if case in ("plan", "engine"):
        script = PLAN if case == "plan" else ENGINE
        return timed([sys.executable, "-c", script, str(project), image, FIRST], folder, since="imported")
    backend = "local" if case == "MLflow" else "remote"
    return timed([sys.executable, "-c", SUBMIT, str(project), backend], folder, since="imported")


def timed(command: Sequence[str], folder: Path, *, since: str) -> tuple[float, float]:
    start = time.perf_counter()
    first = 0.0
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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
    """Medians, and the best of all rounds: what is left of the figures on a busy machine."""
    print(f"{'seconds':<28} {'first line':>10} {'(best)':>7} {'all':>7}")
    best = {case: min(each[0] for each in seconds) for case, seconds in spent.items()}
    first = {case: statistics.median(each[0] for each in seconds) for case, seconds in spent.items()}
    for case, seconds in spent.items():
        whole = statistics.median(each[1] for each in seconds)
        print(f"{case:<28} {first[case]:>10.2f} {best[case]:>7.2f} {whole:>7.2f}")
    ratio, best_ratio = first["ours"] / first["MLflow"], best["ours"] / best["MLflow"]
    more, best_more = first["ours"] - first["docker run"], best["ours"] - best["docker run"]
    print(f"{'ours against MLflow':<28} {ratio:>10.2f} {best_ratio:>7.2f}   bar 0.5")
    print(f"{'ours beyond docker run, s':<28} {more:>10.2f} {best_more:>7.2f}   bar 1.5")
    floor, best_floor = first["plan"] + first["engine"], best["plan"] + best["engine"]
    floor_ratio, best_floor_ratio = floor / first["MLflow"], best_floor / best["MLflow"]
    print(f"{'plan and engine, of MLflow':<28} {floor_ratio:>10.2f} {best_floor_ratio:>7.2f}   nothing tracked")


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
