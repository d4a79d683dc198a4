"""What a run on a cluster costs, beside what the cluster itself costs, in one sitting.

    python benchmarks/kubernetes.py [--runner-image IMAGE] [--tracking-host ADDRESS] [--rounds 5] [--many 200]
                                    [--only first ends latency memory many mlflow]
                                    [--mlflow-python PYTHON --repository REPOSITORY --project-image IMAGE]

Uses the cluster that KUBECONFIG names, in a namespace of its own, and a tracking server on this machine, which pods
reach at ADDRESS (default: the address from which this machine speaks to a node). Without a runner image one is made
and pushed to the registry on 127.0.0.1:5000. "Bare" is a Job of one container; "empty" has our three containers doing
nothing. MLflow's own kubernetes backend needs client 36 and Docker: PYTHON is one of an environment that has MLflow and
that client, and REPOSITORY is where its images are pushed; without them that table is left out. Below it stands what
nobody can save: the start of `mlflow`, and the cluster's own time to the end of a Job that does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # not this folder, where this file would pass for the client

from mlflow_remote_backend.compute.kubernetes import manifest, objects  # noqa: E402
from mlflow_remote_backend.compute.kubernetes.api import Api  # noqa: E402

TICK = "import sys,time\nfor _ in range(int(sys.argv[1])):\n    print(time.time(), flush=True)\n    time.sleep(0.05)\n"
WAITING = "trap 'exit 0' TERM; while :; do sleep 0.05; done"
TABLES = ("first", "ends", "latency", "memory", "many", "mlflow")
JOBS = "/apis/batch/v1/namespaces/{}/jobs"


@dataclass
class Place:
    """Where it is measured."""

    api: Api
    namespace: str
    folder: Path
    server: str
    arguments: argparse.Namespace

    @property
    def jobs(self) -> str:
        return JOBS.format(self.namespace)

    def backend_config(self, **more: Any) -> dict[str, Any]:
        port = self.server.rpartition(":")[2]
        options = {"namespace": self.namespace, "runner_image": self.arguments.runner_image}
        uri = f"http://{self.arguments.tracking_host}:{port}"
        return {"compute": "kubernetes", "tracking_uri": uri, "env_manager": "local", "kubernetes": options, **more}

    def project(self, command: str, files: dict[str, str] | None = None, **mlproject: Any) -> Path:
        made = self.folder / f"project-{uuid.uuid4().hex[:6]}"
        made.mkdir()
        document = {"name": "benchmark", **mlproject, "entry_points": {"main": {"command": command}}}
        (made / "MLproject").write_text(json.dumps(document))
        for name, text in (files or {}).items():
            (made / name).write_text(text)
        return made


def main() -> None:
    arguments = parsed()
    api = Api.open()
    arguments.tracking_host = arguments.tracking_host or address_towards(api)
    arguments.runner_image = arguments.runner_image or made_runner_image(arguments.project_image)
    namespace = f"mlr-benchmark-{uuid.uuid4().hex[:6]}"
    api.create("/api/v1/namespaces", {"kind": "Namespace", "metadata": {"name": namespace}})
    try:
        with tempfile.TemporaryDirectory(prefix="mlflow-remote-benchmark-") as name, serving(Path(name)) as server:
            os.environ["MLFLOW_TRACKING_URI"] = server
            place = Place(api, namespace, Path(name), server, arguments)
            measure(place)
    finally:
        api.delete(f"/api/v1/namespaces/{namespace}", {})


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runner-image", default="")
    parser.add_argument("--tracking-host", default="")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--many", type=int, default=200)
    parser.add_argument("--lines", type=int, default=300)
    parser.add_argument("--mlflow-python", default="")
    parser.add_argument("--repository", default="")
    parser.add_argument("--project-image", default="local/python:3.11")
    return parser.parse_args()


def address_towards(api: Api) -> str:
    """This machine's address on the way to the cluster's first node."""
    node = api.items("/api/v1/nodes")[0][0]
    address = next(each["address"] for each in node["status"]["addresses"] if each["type"] == "InternalIP")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        return str(probe.getsockname()[0])


def made_runner_image(base: str) -> str:
    from mlflow_remote_backend.runner import image

    return image.build(base, "127.0.0.1:5000/mlflow-remote-runner").digest


def measure(place: Place) -> None:
    print(f"{'':<52} {'median':>8} {'best':>8}   bar")
    tables = dict(zip(TABLES, (first_lines, ends, latency, sidecar_memory, many, against_mlflow), strict=True))
    for name in place.arguments.only:
        tables[name](place)


def row(name: str, seconds: list[float], bar: str = "") -> float:
    middle = statistics.median(seconds)
    print(f"{name:<52} {middle:>8.2f} {min(seconds):>8.2f}   {bar}", flush=True)
    return middle


# ------------------------------------------------------------------------------------------------- until it begins


def first_lines(place: Place) -> None:
    """From the call to the first line of the log at the caller."""
    rounds = place.arguments.rounds
    bare, empty = raw_pods(place)
    row("bare Job, first line, s", [raw_job(place, bare) for _ in range(rounds)])
    three = row("three empty containers, first line, s", [raw_job(place, empty) for _ in range(rounds)])
    project = place.project("echo hello")
    submit_and_follow(place, project)  # imports and caches
    ours = row(
        "ours, from backend.run to the first line, s", [submit_and_follow(place, project) for _ in range(rounds)], "4"
    )
    figure("ours beyond three empty containers, s", f"{ours - three:.2f}", "1.5")


def raw_pods(place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    """A pod of one container, and one of our three that do nothing."""
    main = {"name": "main", "image": place.arguments.runner_image, "command": ["sh", "-c", "echo hello"]}
    bare = {"restartPolicy": "Never", "containers": [main]}
    observe = {**main, "name": "observe", "restartPolicy": "Always", "command": ["sh", "-c", WAITING]}
    prepare = {**main, "name": "prepare", "command": ["true"]}
    return bare, {**bare, "initContainers": [observe, prepare]}


def create_raw(place: Place, pod: dict[str, Any]) -> str:
    name = f"raw-{uuid.uuid4().hex[:8]}"
    labelled = {"metadata": {"labels": {"raw": name}}, "spec": {**pod, "terminationGracePeriodSeconds": 5}}
    spec = {"backoffLimit": 0, "template": labelled}
    place.api.create(place.jobs, {"kind": "Job", "metadata": {"name": name}, "spec": spec})
    return name


def raw_job(place: Place, pod: dict[str, Any]) -> float:
    """Seconds from creating a Job to its first line, followed as well as can be."""
    start = time.perf_counter()
    name = create_raw(place, pod)
    pods = f"/api/v1/namespaces/{place.namespace}/pods"
    while True:
        found, _ = place.api.items(pods, labelSelector=f"raw={name}")
        if found and objects.container(found[0], "main").state in ("running", "terminated"):
            break
        time.sleep(0.04)  # below our own limit of requests
    log = f"{pods}/{objects.name(found[0])}/log"
    next(iter(place.api.stream(log, read_timeout_s=30, container="main", follow="true")))
    took = time.perf_counter() - start
    place.api.delete(f"{place.jobs}/{name}", {"propagationPolicy": "Background"})
    return took


def raw_job_to_its_end(place: Place, pod: dict[str, Any]) -> float:
    """Seconds from creating a Job to its end as the cluster tells it."""
    start = time.perf_counter()
    name = create_raw(place, pod)
    while not _ended(place.api.get(f"{place.jobs}/{name}").body):
        time.sleep(0.05)
    took = time.perf_counter() - start
    place.api.delete(f"{place.jobs}/{name}", {"propagationPolicy": "Background"})
    return took


class Display:
    """Stands for a terminal: remembers when each line came."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.came: list[tuple[float, str]] = []

    def write(self, text: str) -> int:
        self.came.append((time.time(), text))
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def submit(place: Place, project: Path, **config: Any) -> Any:
    from mlflow_remote_backend.backend import RemoteBackend

    document = place.backend_config(stream_output=False, **config)
    return RemoteBackend().run(str(project), "main", {}, None, document, place.server, "0")


def submit_and_follow(place: Place, project: Path) -> float:
    start = time.time()
    display = Display()
    submit(place, project).follow(display)
    return display.came[0][0] - start


# ---------------------------------------------------------------------------------------------------- while it runs


def ends(place: Place) -> None:
    """From the program's end to the end of ``mlflow run``, which does not wait for the Job's own condition."""
    project = place.project("date +%s.%N; exit 0")
    seconds = []
    for _ in range(place.arguments.rounds):
        command = [sys.executable, "-m", "mlflow", "run", str(project), "-b", "remote", "--env-manager", "local"]
        config = place.folder / "config.json"
        config.write_text(json.dumps(place.backend_config()))
        done = subprocess.run(
            [*command, "--backend-config", str(config)], capture_output=True, text=True, cwd=place.folder
        )
        if done.returncode:
            sys.exit(done.stderr)
        seconds.append(time.time() - float(done.stdout.split()[0]))
    row("program's end to the exit of `mlflow run`, s", seconds, "2")


def latency(place: Place) -> None:
    lines = place.arguments.lines
    display = Display()
    submit(place, place.project(f"python tick.py {lines}", {"tick.py": TICK})).follow(display)
    late = sorted(at - float(line) for at, text in display.came for line in text.split())
    figure("line written to line shown, median, s", f"{statistics.median(late):.2f}", "0.3")
    figure("line written to line shown, 99th percentile, s", f"{late[int(len(late) * 0.99) - 1]:.2f}", "1")


def sidecar_memory(place: Place) -> None:
    """The sidecar's working set while it uploads, as the kubelet tells it."""
    run = submit(place, place.project("seq 1 2000000; sleep 25"))
    peak = 0.0
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and not run.view().ended:
        peak = max(peak, working_set(place, run.run_id))
        time.sleep(1)
    run.cancel()
    figure("the sidecar, MB of working set, at most", f"{peak / 1e6:.0f}", "110")


def working_set(place: Place, run_id: str) -> float:
    pods, _ = place.api.items(
        f"/api/v1/namespaces/{place.namespace}/pods", labelSelector=f"mlflow-remote/run-id={run_id}"
    )
    node = pods[0]["spec"].get("nodeName") if pods else None
    if not node:
        return 0.0
    summary = place.api.get(f"/api/v1/nodes/{node}/proxy/stats/summary").body
    for pod in summary.get("pods", ()):
        if pod["podRef"]["uid"] == objects.uid(pods[0]):
            for container in pod.get("containers", ()):
                if container["name"] == manifest.OBSERVE:
                    return float(container.get("memory", {}).get("workingSetBytes") or 0)
    return 0.0


# ------------------------------------------------------------------------------------------------------------- many


def many(place: Place) -> None:
    """Submissions from one process to a queue that admits nothing, then a look at all of them once a second."""
    count = place.arguments.many
    project = place.project("echo hello")
    options = {**place.backend_config()["kubernetes"], "queue": "held"}
    start = time.monotonic()
    runs = [submit(place, project, kubernetes=options)]
    api = runs[0]._compute._connected()
    with counting(api) as by_second:
        runs += [submit(place, project, kubernetes=options) for _ in range(count - 1)]
    took = time.monotonic() - start
    asked, looking = api.requests, time.monotonic()
    for _ in range(10):
        for run in runs:
            run._compute.status(run._handle)
        time.sleep(1)
    looked_s = time.monotonic() - looking
    watches = sum(1 for each in threading.enumerate() if each.name.startswith("watch "))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    figure(f"{count} submissions from one process, s", f"{took:.1f}", "60")
    figure("... requests a second", f"{asked / took:.1f}", "40")
    figure("... requests in the busiest second", str(max(by_second)))
    figure("... snapshots uploaded", str(uploaded(place)), "1")
    figure("... watches while following", str(watches), "2")
    figure("... requests a second while following", f"{(api.requests - asked) / looked_s:.1f}")
    figure("... MB of memory, at most", f"{memory:.0f}", "300")
    for run in runs:
        place.api.delete(f"{place.jobs}/mlr-{run.run_id}", {"propagationPolicy": "Background"})


@contextlib.contextmanager
def counting(api: Api) -> Iterator[list[int]]:
    """Requests sent in each second."""
    by_second: list[int] = []
    done = threading.Event()

    def count() -> None:
        before = api.requests
        while not done.wait(1.0):
            now = api.requests
            by_second.append(now - before)
            before = now

    threading.Thread(target=count, daemon=True).start()
    yield by_second
    done.set()


def figure(name: str, value: str, bar: str = "") -> None:
    print(f"{name:<52} {value:>8} {'':>8}   {bar}", flush=True)


def uploaded(place: Place) -> int:
    """Archives of the last project in the store."""
    found = [
        path for path in (place.folder / "artifacts").rglob("snapshot/*") if path.suffix in (".gz", ".zst", ".tar")
    ]
    newest = max(found, key=lambda path: path.stat().st_mtime)
    return sum(1 for path in found if path.name == newest.name)


# --------------------------------------------------------------------------------------------------- against MLflow

TEMPLATE = """
apiVersion: batch/v1
kind: Job
metadata: {name: "{replaced with MLflow Project name}", namespace: NAMESPACE}
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      containers:
      - {name: "{replaced with MLflow Project name}", image: "{replaced}", command: ["{replaced}"]}
"""


def against_mlflow(place: Place) -> None:
    """One change of the code: from the start of the command to the Job's end as the cluster tells it."""
    arguments = place.arguments
    if not (arguments.mlflow_python and arguments.repository and arguments.project_image):
        print("MLflow's own backend: left out (--mlflow-python, --repository, --project-image)")
        return
    files = {f"module_{number}.py": f"value = {number}\n" * 50 for number in range(200)}
    project = place.project("echo hello", files, docker_env={"image": arguments.project_image})
    theirs = row("MLflow's own backend, to the Job's end, s", [changed(place, project, _theirs) for _ in range(3)])
    ours = row("ours, to the Job's end, s", [changed(place, project, _ours) for _ in range(3)])
    figure("ours against MLflow", f"{ours / theirs:.2f}", "0.7")
    bare, empty = raw_pods(place)
    row("of it: a bare Job, from creation to its end, s", [raw_job_to_its_end(place, bare) for _ in range(3)])
    row("of it: three empty containers, the same, s", [raw_job_to_its_end(place, empty) for _ in range(3)])
    row(
        "of it: the start of `mlflow`, s",
        [command_takes([sys.executable, "-m", "mlflow", "--version"]) for _ in range(3)],
    )


def command_takes(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def changed(place: Place, project: Path, command: Any) -> float:
    (project / "module_0.py").write_text(f"value = {uuid.uuid4().int}\n")
    before = {objects.uid(job) for job in place.api.items(place.jobs)[0]}
    start = time.perf_counter()
    process = subprocess.Popen(
        command(place, project), cwd=place.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not [job for job in place.api.items(place.jobs)[0] if objects.uid(job) not in before and _ended(job)]:
        if process.poll() not in (None, 0):
            sys.exit((process.communicate()[0] or b"").decode())
        time.sleep(0.05)
    took = time.perf_counter() - start
    process.communicate()
    return took


def _ended(job: dict[str, Any]) -> bool:
    return objects.holds(job, "Complete") or objects.holds(job, "Failed")


def _theirs(place: Place, project: Path) -> list[str]:
    template = place.folder / "template.yaml"
    template.write_text(TEMPLATE.replace("NAMESPACE", place.namespace))
    document = {
        "kube-context": place.api.login.context,
        "kube-job-template-path": str(template),
        "repository-uri": place.arguments.repository,
    }
    os.environ["KUBE_MLFLOW_TRACKING_URI"] = place.backend_config()["tracking_uri"]
    config = place.folder / "theirs.json"
    config.write_text(json.dumps(document))
    options = ["-b", "kubernetes", "--build-image", "--backend-config", str(config)]
    return [place.arguments.mlflow_python, "-m", "mlflow", "run", str(project), *options]


def _ours(place: Place, project: Path) -> list[str]:
    config = place.folder / "config.json"
    document = {**place.backend_config(), "env_manager": None}
    config.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    command = [sys.executable, "-m", "mlflow", "run", str(project), "-b", "remote", "--backend-config", str(config)]
    return command


# ----------------------------------------------------------------------------------------------------------- server


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "0.0.0.0", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")),
        *("--allowed-hosts", "*"),
    ]
    environ = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, env=environ, stdout=quiet, stderr=quiet, start_new_session=True)
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


if __name__ == "__main__":
    main()
