"""Models served by a real cluster, in a namespace that enforces PodSecurity ``restricted``.

The image of the servers holds MLflow, so that most tests need no environment; one makes a locked one in its pod.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
import serving_image
import yaml
from deployment_contract import NAME, TargetContract
from mlflow.deployments import get_deploy_client
from namespaces import REGISTRY, Namespace
from served_models import Trained, toy, train
from tracking_server import TrackingServer

from mlflow_remote_backend.compute.kubernetes.api import Api
from mlflow_remote_backend.deployment import calling
from mlflow_remote_backend.deployment.kubernetes import manifest
from mlflow_remote_backend.deployment.kubernetes.target import TOKEN_HEADER
from mlflow_remote_backend.deployment.spec import Answer

pytestmark = [pytest.mark.kubernetes, pytest.mark.docker]


@pytest.fixture(scope="session")
def server_image(python_image: str) -> str:
    return serving_image.built(python_image, f"{REGISTRY}/mlflow-remote-test-serving")


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory, pods_tracking_server: TrackingServer) -> Trained:
    """The sample project's model, in a tracking server that pods reach and that hands artifacts on."""
    return train(pods_tracking_server.url, tmp_path_factory.mktemp("training"))


@pytest.fixture
def trained(training: Trained, pods_tracking: object) -> Trained:
    return training


@pytest.fixture
def make_model(tmp_path: Path, pods_tracking: object) -> Callable[..., str]:
    """``make_model("name", predicts="1", loads="time.sleep(3)")``: the URI of a model that a run has logged."""

    def make(name: str, **how: object) -> str:
        with toy(tmp_path / name, **how) as what, mlflow.start_run() as run:
            mlflow.pyfunc.log_model(name="model", **what)
        return f"runs:/{run.info.run_id}/model"

    return make


@pytest.fixture
def client(
    namespace: Namespace,
    runner_image: str,
    server_image: str,
    tracking_host: str,
    tmp_path: Path,
    monkeypatch,
    pods_tracking_server: TrackingServer,
) -> Iterator[object]:
    """Of a named compute, as an administrator describes a cluster. What a test leaves goes with its namespace."""
    options = {
        "namespace": namespace.name,
        "image": server_image,
        "runner_image": runner_image,
        "image_pull_policy": "IfNotPresent",
    }
    described = {
        "compute": "kubernetes",
        "tracking_uri": f"http://{tracking_host}:{pods_tracking_server.port}",
        "env_manager": "local",
        "kubernetes": options,
    }
    file = tmp_path / "mlflow-remote.yaml"
    file.write_text(yaml.safe_dump({"computes": {"lab": described}}))
    monkeypatch.setenv("MLFLOW_REMOTE_CONFIG", str(file))
    return get_deploy_client("remote:/lab")


@pytest.fixture
def config() -> dict:
    return {}


def all_of_ours(namespace: Namespace) -> list[str]:
    """Every object of the deployment that is left."""
    kinds = (*manifest.BESIDE, manifest.DEPLOYMENT, manifest.SECRETS, manifest.PODS)
    found = [
        f"{kind.kind} {each['metadata']['name']}"
        for kind in kinds
        for each in namespace.api.items(kind.path(namespace.name), labelSelector=manifest.selector(NAME))[0]
    ]
    return sorted(found)


@pytest.fixture
def left(namespace: Namespace) -> Callable[[], list[str]]:
    return lambda: all_of_ours(namespace)


def asked(
    api: Api, namespace: str, path: str, body: bytes | None = None, token: str = "", timeout_s: float = 60
) -> Answer:
    """One request through the API server's proxy of the Service."""
    service = f"{manifest.SERVICE.path(namespace)}/http:{NAME}:http/proxy{path}"
    headers = {"Content-Type": calling.JSON, **({TOKEN_HEADER: token} if token else {})}
    return Answer(*api.proxied(service, body, headers, timeout_s=timeout_s))


class TestKubernetes(TargetContract):
    @pytest.fixture(autouse=True)
    def place(self, namespace: Namespace) -> None:
        self.namespace = namespace

    def ask(self, made: dict, path: str, body: bytes | None = None, token: str = "") -> Answer:
        return asked(self.namespace.api, self.namespace.name, path, body, token)
