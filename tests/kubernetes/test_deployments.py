"""Models served by a real cluster, in a namespace that enforces PodSecurity ``restricted``.

The image of the servers holds MLflow, so that most tests need no environment; one makes a locked one in its pod.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlflow
import pytest
import serving_image
import yaml
from deployment_contract import NAME, ONE, TargetContract
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException
from namespaces import REGISTRY, Namespace, once_of_all_workers, until
from served_models import Trained, toy, train
from tracking_server import TrackingServer

from mlflow_remote_backend.compute.kubernetes.api import Api
from mlflow_remote_backend.deployment import calling
from mlflow_remote_backend.deployment.kubernetes import manifest, preflight
from mlflow_remote_backend.deployment.kubernetes.target import TOKEN_HEADER
from mlflow_remote_backend.deployment.spec import Answer

pytestmark = [pytest.mark.kubernetes, pytest.mark.docker]


@pytest.fixture(scope="session")
def server_image(python_image: str, runner_image: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """``MLFLOW_REMOTE_TEST_SERVING_IMAGE``, or one that is made here, after the runner image: who builds that one
    removes what other builds have half done."""
    make = partial(serving_image.built, python_image, f"{REGISTRY}/mlflow-remote-test-serving")
    return os.environ.get("MLFLOW_REMOTE_TEST_SERVING_IMAGE") or once_of_all_workers(
        tmp_path_factory, "serving-image", make
    )


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


# -------------------------------------------------------------------------------------------------- beyond the contract


class Storm:
    """``rate_per_s`` requests a second through the Service for the duration of a block, each at its own time, whatever
    becomes of the others. ``answers``: when it was sent, status, and what was said."""

    def __init__(self, namespace: Namespace, rate_per_s: float = 50) -> None:
        self._namespace = namespace
        self._rate_per_s = rate_per_s
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.answers: list[tuple[float, int, str]] = []

    def _one(self) -> None:
        sent = time.monotonic()
        try:
            answer = asked(self._namespace.api, self._namespace.name, "/invocations", calling.body_of(ONE))
            self.answers.append((sent, answer.status, str(json.loads(answer.body)["predictions"])))
        except Exception as error:  # noqa: BLE001  whatever it is, it is a request that failed
            self.answers.append((sent, 0, repr(error)))

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            thread = threading.Thread(target=self._one)
            thread.start()
            self._threads.append(thread)
            due += 1 / self._rate_per_s
            time.sleep(max(0.0, due - time.monotonic()))

    def __enter__(self) -> Storm:
        self._runner = threading.Thread(target=self._run)
        self._runner.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._runner.join()
        for each in self._threads:
            each.join()


def test_an_update_under_many_requests_a_second_fails_not_one(client, make_model, namespace):
    client.create_deployment(NAME, make_model("first", predicts="1"), config={"replicas": 2})
    with Storm(namespace) as storm:
        client.update_deployment(NAME, make_model("second", predicts="2"))
        until(lambda: storm.answers[-1][2] == "[2]", 60, "the new version answers")
        time.sleep(manifest.DRAIN_S + 2)  # the old pods end meanwhile: what must not be noticed
    failed = [each for each in storm.answers if each[1] != 200]
    assert not failed, (len(failed), len(storm.answers), failed[:5])
    assert {said for _, _, said in storm.answers} == {"[1]", "[2]"}


def test_a_model_that_is_too_large_is_said_to_be_and_leaves_nothing(client, make_model, left):
    greedy = make_model("greedy", loads="kept = [bytearray(os.urandom(1)) * (64 << 20) for _ in range(100)]")
    with pytest.raises(MlflowException, match="memory limit") as failed:
        client.create_deployment(NAME, greedy, config={"resources": {"memory": "400Mi"}})
    assert failed.value.code == "OOM"
    assert not left()


def test_what_is_not_ours_is_never_touched(client, make_model, namespace):
    labels = {"metadata": {"name": NAME}, "spec": {"ports": [{"port": 1}], "selector": {"theirs": "yes"}}}
    theirs = namespace.api.create(manifest.SERVICE.path(namespace.name), {"kind": "Service", **labels}).body
    with pytest.raises(MlflowException, match=f"There is a Service {NAME} in namespace {namespace.name}"):
        client.create_deployment(NAME, make_model("first"))
    client.delete_deployment(NAME)
    now = namespace.api.get(manifest.SERVICE.path(namespace.name, NAME)).body
    assert now["metadata"]["resourceVersion"] == theirs["metadata"]["resourceVersion"]
    assert namespace.api.items(manifest.DEPLOYMENT.path(namespace.name))[0] == []


def test_what_the_cluster_would_refuse_is_refused_before_anything_exists(client, make_model, left):
    with pytest.raises(MlflowException, match="Kubernetes refuses the deployment's Ingress") as refused:
        client.create_deployment(
            NAME, make_model("first"), config={"ingress": {"host": "*.example.com", "path": "//x"}}
        )
    assert refused.value.code == "REFUSED"
    assert not left()


def test_the_shipped_role_is_enough(client, make_model, namespace, tmp_path, monkeypatch):
    subject = {"kind": "ServiceAccount", "name": "deployer", "namespace": namespace.name}
    namespace.make("serviceaccounts", {"kind": "ServiceAccount", "metadata": {"name": "deployer"}})
    role = yaml.safe_load(preflight.role())
    namespace.make("roles", role)
    reference = {"kind": "Role", "name": role["metadata"]["name"], "apiGroup": "rbac.authorization.k8s.io"}
    bound = {"kind": "RoleBinding", "metadata": {"name": "deployer"}, "subjects": [subject], "roleRef": reference}
    namespace.make("rolebindings", bound)
    asked_for = {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "spec": {"expirationSeconds": 3600}}
    path = f"{namespace.path('serviceaccounts', 'deployer')}/token"
    token = namespace.api.create(path, asked_for).body["status"]["token"]
    document = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    context = next(each for each in document["contexts"] if each["name"] == document["current-context"])
    context["context"].update(user="deployer", namespace=namespace.name)
    document["users"] = [{"name": "deployer", "user": {"token": token}}]
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(document))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("THE_TOKEN", "s3cret-token")

    asked_for = {"token_env": "THE_TOKEN", "replicas": 2, "resources": {"cpu": 0.1}}
    wanted = {"autoscale": {"min": 2, "max": 3}, "ingress": {"host": "models.example.com"}}
    client.create_deployment(NAME, make_model("first"), config={**asked_for, **wanted})
    monkeypatch.delenv("THE_TOKEN")
    assert client.predict(NAME, ONE)["predictions"] == [1]
    assert len(all_of_ours(namespace)) >= 8  # with two pods
    assert [each["url"] for each in client.list_deployments()] == ["http://models.example.com"]
    client.update_deployment(NAME, config={"autoscale": None, "ingress": None, "replicas": 1})
    assert client.predict(NAME, ONE)["predictions"] == [1]
    kinds = {each.partition(" ")[0] for each in all_of_ours(namespace)}
    assert kinds == {"Deployment", "Service", "Secret", "Pod"}
    client.delete_deployment(NAME)
    assert not all_of_ours(namespace)
