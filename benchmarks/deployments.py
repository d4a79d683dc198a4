"""Serving a model, against MLflow's own ways: how soon it answers, and how fast.

    python benchmarks/deployments.py [--part first-answer|requests] [--rounds 2] [--image …] [--base-image …]

first-answer  Wall seconds from starting the command to the first prediction by the published port, on Docker. Ours is
              `mlflow deployments create -t remote:/docker` with the environment cached; MLflow's is
              mlflow.models.build_docker(env_manager="local") and `docker run`, without nginx. Every round serves a new
              version of the sample project's model. A first round fills both caches: ours with the environment,
              Docker's with the layer that holds MLflow; that first build is shown by itself. The bar is a ratio of
              0.2.
              --base-image is what build_docker starts from, and must be able to run `python -m pip install`.
requests      Requests a second and their 99th percentile of one server on this machine, ours against
              `mlflow models serve --env-manager local` in the same environment, both writing their access log to a
              file. Both are up at once and are asked in turn, --rounds windows of --seconds each, over --connections
              connections that stay open. The bars are ratios of 0.95 and 1.05.

Docker is needed for the first part. Nothing is left but Docker's own build cache and the environments' volume.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "sample_project"
COLUMNS = ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]
PATIENT = [59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.86, 87]
BODY = json.dumps({"dataframe_split": {"columns": COLUMNS, "data": [PATIENT]}}).encode()
NAME = f"benchmark-{os.getpid()}"
BUILD = """
import sys
from mlflow.models import build_docker
build_docker(sys.argv[1], name=sys.argv[2], env_manager="local", base_image=sys.argv[3] or None)
"""
PATIENCE_S = 900.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=("first-answer", "requests"))
    parser.add_argument("--rounds", type=int, default=0, help="default: 2 builds, 10 windows")
    parser.add_argument("--image", default="python:3.11-slim", help="that our container starts from")
    parser.add_argument("--base-image", default="", help="that build_docker starts from; default: MLflow's own")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--connections", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlflow-remote-benchmark-") as name:
        folder = Path(name)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        model = trained(folder)
        if options.part in (None, "first-answer"):
            first_answers(folder, model, options)
        if options.part in (None, "requests"):
            requests(folder, model, options)


def trained(folder: Path) -> Path:
    """The sample project's model, by MLflow's own local backend."""
    command = [sys.executable, "-m", "mlflow", "run", str(SAMPLE), "--env-manager", "local"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    import mlflow

    run_id = mlflow.search_runs(search_all_experiments=True)["run_id"][0]
    return Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/model", dst_path=str(folder / "trained")))


# -- how soon it answers -----------------------------------------------------------------------------------------------


def first_answers(folder: Path, model: Path, options: argparse.Namespace) -> None:
    spent: dict[str, list[float]] = {"mlflow": [], "ours": []}
    first_build = 0.0
    if options.base_image:
        options.base_image = unknown_to_the_build_cache(options.base_image)
    for number in range((options.rounds or 2) + 1):
        version = folder / f"version-{number}"
        shutil.copytree(model, version)
        (version / "version.txt").write_text(f"{number} {time.time()}")
        for case, serve in (("ours", ours), ("mlflow", by_building)):
            seconds = serve(folder, version, options)
            if number:
                spent[case].append(seconds)
            elif case == "mlflow":
                first_build = seconds
            print(f"  {case} {seconds:.1f} s{'' if number else ' (fills the caches)'}", flush=True)
    subprocess.run(["docker", "rmi", f"{NAME}-base"], check=False, capture_output=True)
    of = {case: statistics.median(seconds) for case, seconds in spent.items()}
    print(f"{'first answer on Docker':<34} {'median s':>9} {'ratio':>7} {'bar':>6}")
    print(f"{'build_docker, docker run: the first':<34} {first_build:>8.2f} {first_build / of['mlflow']:>7.2f}")
    print(f"{'build_docker, docker run: later ones':<34} {of['mlflow']:>7.2f} {1:>7.2f}")
    print(f"{'mlflow deployments create':<34} {of['ours']:>9.2f} {of['ours'] / of['mlflow']:>7.3f} {0.2:>6}")


def unknown_to_the_build_cache(base: str) -> str:
    """The same image under another id, so that nothing that was built on it is found."""
    made = f"{NAME}-base"
    text = f"FROM {base}\nLABEL benchmark={NAME}\n".encode()
    subprocess.run(["docker", "build", "--tag", made, "-"], input=text, check=True, capture_output=True)
    return made


def ours(folder: Path, version: Path, options: argparse.Namespace) -> float:
    port = free_port()
    deployments = [sys.executable, "-m", "mlflow", "deployments"]
    create = [*deployments, "create", "-t", "remote:/docker", "-m", str(version), "--name", NAME]
    create += ["-C", f"service.port={port}", "-C", f"docker.image={options.image}"]
    began = time.perf_counter()
    process = subprocess.Popen(create, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        seconds = until_answered(port, began, process)
        process.wait()
        return seconds
    finally:
        delete = [*deployments, "delete", "-t", "remote:/docker", "--name", NAME]
        subprocess.run(delete, cwd=folder, check=True, capture_output=True)


def by_building(folder: Path, version: Path, options: argparse.Namespace) -> float:
    port = free_port()
    build = [sys.executable, "-c", BUILD, str(version), NAME, options.base_image]
    began = time.perf_counter()
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    run = ["docker", "run", "--detach", "--name", NAME, "-p", f"127.0.0.1:{port}:8000"]
    run += ["-e", "DISABLE_NGINX=true", "-e", "UVICORN_HOST=0.0.0.0"]  # else only nginx, inside, would reach it
    try:
        subprocess.run([*run, NAME], check=True, capture_output=True)
        return until_answered(port, began, None)
    finally:
        subprocess.run(["docker", "rm", "--force", NAME], check=False, capture_output=True)
        subprocess.run(["docker", "rmi", NAME], check=False, capture_output=True)


def until_answered(port: int, began: float, process: subprocess.Popen[bytes] | None) -> float:
    while time.perf_counter() - began < PATIENCE_S:
        if process is not None and process.poll() not in (None, 0):
            raise SystemExit(f"mlflow deployments create failed with exit code {process.returncode}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("POST", "/invocations", BODY, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status == 200 and json.loads(answer.read())["predictions"]:
                return time.perf_counter() - began
        time.sleep(0.05)
    raise SystemExit(f"no answer within {PATIENCE_S:g} s")


# -- how fast it answers -----------------------------------------------------------------------------------------------


def requests(folder: Path, model: Path, options: argparse.Namespace) -> None:
    windows: dict[str, list[list[float]]] = {"mlflow": [], "ours": []}
    with deployed(folder, model) as our_port, served(folder, model) as their_port:
        ports = {"mlflow": their_port, "ours": our_port}
        for number in range((options.rounds or 10) + 1):
            order = list(ports) if number % 2 else list(ports)[::-1]
            for case in order:
                latencies = asked(ports[case], options.seconds, options.connections)
                if number:  # the first window warms both
                    windows[case].append(latencies)
    rate = {case: statistics.median(len(each) / options.seconds for each in all_) for case, all_ in windows.items()}
    slow = {case: statistics.median(p99_ms(each) for each in all_) for case, all_ in windows.items()}
    print(f"{'one server, one worker':<34} {'req/s':>9} {'ratio':>7} {'bar':>6} {'p99 ms':>9} {'ratio':>7} {'bar':>6}")
    print(f"{'mlflow models serve':<34} {rate['mlflow']:>9.1f} {1:>7.2f} {'':>6} {slow['mlflow']:>9.2f} {1:>7.2f}")
    ratios = rate["ours"] / rate["mlflow"], slow["ours"] / slow["mlflow"]
    print(
        f"{'mlflow deployments create':<34} {rate['ours']:>9.1f} {ratios[0]:>7.3f} {0.95:>6} "
        f"{slow['ours']:>9.2f} {ratios[1]:>7.3f} {1.05:>6}"
    )


def p99_ms(latencies_s: list[float]) -> float:
    return sorted(latencies_s)[int(len(latencies_s) * 0.99)] * 1000


@contextlib.contextmanager
def deployed(folder: Path, model: Path) -> Iterator[int]:
    port = free_port()
    deployments = [sys.executable, "-m", "mlflow", "deployments"]
    create = [*deployments, "create", "-t", "remote:/local", "-m", str(model), "--name", NAME]
    create += ["-C", f"service.port={port}", "-C", "env_manager=local"]
    subprocess.run(create, cwd=folder, check=True, capture_output=True)
    try:
        yield port
    finally:
        delete = [*deployments, "delete", "-t", "remote:/local", "--name", NAME]
        subprocess.run(delete, cwd=folder, check=True, capture_output=True)


@contextlib.contextmanager
def served(folder: Path, model: Path) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        until_answered(port, time.perf_counter(), None)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def asked(port: int, seconds: float, connections: int) -> list[float]:
    """Seconds that each request took."""
    spent: list[list[float]] = [[] for _ in range(connections)]
    end = time.perf_counter() + seconds
    threads = [threading.Thread(target=ask_until, args=(port, end, each)) for each in spent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [each for one in spent for each in one]


def ask_until(port: int, end: float, spent: list[float]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while (began := time.perf_counter()) < end:
        connection.request("POST", "/invocations", BODY, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise SystemExit(f"HTTP {answer.status}")
        spent.append(time.perf_counter() - began)
    connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()
