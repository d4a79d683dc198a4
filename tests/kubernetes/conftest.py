"""A real cluster, the one that KUBECONFIG names; each test in a namespace of its own that enforces PodSecurity.

Images come by the environment, or are made once per session:
``MLFLOW_REMOTE_TEST_RUNNER_IMAGE``  the runner image; else it is built here and pushed to MLFLOW_REMOTE_TEST_REGISTRY
``MLFLOW_REMOTE_TEST_IMAGE``         Python 3.10 or newer with pip: the runner image's base, and the image of projects
``MLFLOW_REMOTE_TEST_SHELL_IMAGE``   a POSIX shell and no Python; else local/shell:1 is pushed to the registry
``MLFLOW_REMOTE_TEST_TRACKING_HOST`` this machine as pods reach it; else its addresses are tried from a pod
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import REGISTRY, Document, Namespace, Tracking, once_of_all_workers, own_addresses, until
from tracking_server import TrackingServer, running_server

from mlflow_remote_backend.compute.kubernetes import objects
from mlflow_remote_backend.compute.kubernetes.api import Api
from mlflow_remote_backend.testing import Projects

IMAGE = os.environ.get("MLFLOW_REMOTE_TEST_IMAGE", "local/python:3.11")
SHELL_IMAGE = os.environ.get("MLFLOW_REMOTE_TEST_SHELL_IMAGE")
RUNNER_IMAGE = os.environ.get("MLFLOW_REMOTE_TEST_RUNNER_IMAGE")
TRACKING_HOST = os.environ.get("MLFLOW_REMOTE_TEST_TRACKING_HOST")


@pytest.fixture(scope="session")
def cluster() -> Api:
    """The cluster, with the rights of KUBECONFIG: an administrator's."""
    return Api.open()


@pytest.fixture
def namespace(cluster: Api) -> Iterator[Namespace]:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    made = Namespace(cluster, f"mlr-test-{uuid.uuid4().hex[:8]}", labels).create()
    try:
        yield made
    finally:
        made.remove()


# ------------------------------------------------------------------------------------------------------------ images


@pytest.fixture(scope="session")
def runner_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The runner image with the code of this checkout."""
    return RUNNER_IMAGE or once_of_all_workers(tmp_path_factory, "runner-image", build_runner_image)


def build_runner_image() -> str:
    from mlflow_remote_backend.runner import image

    built = image.build(IMAGE, f"{REGISTRY}/mlflow-remote-runner", packages=["iniconfig>=2"])
    assert built.digest
    return built.digest


@pytest.fixture(scope="session")
def python_image() -> str:
    return IMAGE


@pytest.fixture(scope="session")
def shell_image() -> str:
    """Pulled by nodes like any other: one that was only loaded into a node may be looked for elsewhere."""
    return SHELL_IMAGE or pushed("local/shell:1", "mlflow-remote-shell")


def pushed(image: str, name: str) -> str:
    """An image of this machine's Docker engine in the test's registry, by digest."""
    import docker

    client = docker.from_env()
    try:
        client.images.get(image).tag(f"{REGISTRY}/{name}", "1")
        client.images.push(f"{REGISTRY}/{name}", "1")
        digests = client.images.get(f"{REGISTRY}/{name}:1").attrs["RepoDigests"]
        return next(each for each in digests if each.startswith(f"{REGISTRY}/{name}@"))
    finally:
        client.close()


# ---------------------------------------------------------------------------------------------------------- tracking


@pytest.fixture(scope="session")
def pods_tracking_server(tmp_path_factory: pytest.TempPathFactory, database_template: Path) -> Iterator[TrackingServer]:
    """A real MLflow server that pods reach too."""
    folder = tmp_path_factory.mktemp("pods-server")
    with running_server(folder, database_template, host="0.0.0.0") as server:
        yield server


@pytest.fixture(scope="session")
def tracking_host(
    cluster: Api, runner_image: str, pods_tracking_server: TrackingServer, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """This machine's address as pods of the cluster reach it."""

    def look() -> str:
        place = Namespace(cluster, f"mlr-test-{uuid.uuid4().hex[:8]}").create()
        try:
            return _reached_from_a_pod(place, runner_image, pods_tracking_server.port)
        finally:
            place.remove()

    return TRACKING_HOST or once_of_all_workers(tmp_path_factory, "tracking-host", look)


def _reached_from_a_pod(place: Namespace, image: str, port: int) -> str:
    code = (
        "import socket,sys\n"
        "for host in sys.argv[2:]:\n"
        "    try:\n"
        "        socket.create_connection((host, int(sys.argv[1])), 3).close()\n"
        "    except OSError:\n"
        "        continue\n"
        "    print(host); break\n"
    )
    command = ["python", "-c", code, str(port), *own_addresses()]
    container = {"name": "main", "image": image, "command": command}
    spec = {"restartPolicy": "Never", "containers": [container]}
    place.make("pods", {"kind": "Pod", "metadata": {"name": "probe"}, "spec": spec})
    until(lambda: any(map(objects.ended, place.list("pods"))), 120, "the probing pod has ended")
    found = place.logs("probe", "main").decode().strip()
    if not found:
        pytest.fail("no address of this machine is reached from a pod; set MLFLOW_REMOTE_TEST_TRACKING_HOST")
    return found


@pytest.fixture
def pods_tracking(
    pods_tracking_server: TrackingServer, tracking_host: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tracking]:
    """The session's server as this process's tracking URI, in an experiment of the test's own."""
    with tracking_by(pods_tracking_server, tracking_host, monkeypatch) as made:
        yield made


@contextlib.contextmanager
def tracking_by(server: TrackingServer, host: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracking]:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    mlflow.set_tracking_uri(server.url)
    experiment = mlflow.MlflowClient().create_experiment(f"test-{time.time_ns()}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    try:
        yield Tracking(server.url, f"http://{host}:{server.port}", server)
    finally:
        mlflow.set_tracking_uri("")


# ----------------------------------------------------------------------------------------------------------- running


@pytest.fixture
def backend_config(namespace: Namespace, runner_image: str, pods_tracking: Tracking) -> Document:
    """A kubernetes compute in the test's namespace."""
    options = {
        "namespace": namespace.name,
        "runner_image": runner_image,
        "image_pull_policy": "IfNotPresent",
    }
    return {"compute": "kubernetes", "tracking_uri": pods_tracking.from_pods, "kubernetes": options}


@pytest.fixture
def projects(tmp_path: Path, backend_config: Document) -> Projects:
    return Projects(tmp_path / "projects", backend_config)
