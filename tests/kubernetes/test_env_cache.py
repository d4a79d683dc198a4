"""Where a pod's environment comes from: made once into a cache that pods share, or by each pod for itself."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from namespaces import Namespace, Tracking, own_addresses
from wheels import Index, serving, wheel

from mlflow_remote_backend.backend import plan
from mlflow_remote_backend.compute.kubernetes import objects
from mlflow_remote_backend.submitted_run import RemoteSubmittedRun
from mlflow_remote_backend.testing import Projects, ended, stored_log

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

Document = dict[str, Any]


@pytest.fixture
def index(tracking_host: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """A package index that this process and pods reach, and that counts."""
    for name in [each for each in os.environ if each.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    host = tracking_host if tracking_host in own_addresses() else "0.0.0.0"
    stock = ("pip", "24.0"), ("setuptools", "70.0"), ("wheel", "0.43"), ("needed", "2.0")
    with serving(Index(host=host).add(*(wheel(name, version) for name, version in stock))) as running:
        yield running


@pytest.fixture
def node_folder(cluster: Any, tmp_path: Path) -> Path:
    """A folder of this machine that is one of the cluster's only node too."""
    nodes = cluster.items("/api/v1/nodes")[0]
    addresses = {each["address"] for node in nodes for each in node["status"]["addresses"]}
    if len(nodes) != 1 or not addresses & set(own_addresses()):
        pytest.skip("the cluster's node is not this machine")
    folder = tmp_path / "on-the-node"
    folder.mkdir()
    folder.chmod(0o2777)
    return folder


@pytest.fixture
def claim(cluster: Any, namespace: Namespace, node_folder: Path) -> Iterator[str]:
    """A PersistentVolumeClaim, bound to a local volume."""
    node = objects.name(cluster.items("/api/v1/nodes")[0][0])
    name = f"environments-{uuid.uuid4().hex[:6]}"
    here = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
    size, modes = {"storage": "1Gi"}, ["ReadWriteOnce"]
    volume = {
        "capacity": size,
        "accessModes": modes,
        "storageClassName": "by-hand",
        "local": {"path": str(node_folder)},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [here]}},
    }
    cluster.create(
        "/api/v1/persistentvolumes", {"kind": "PersistentVolume", "metadata": {"name": name}, "spec": volume}
    )
    wanted = {
        "accessModes": modes,
        "storageClassName": "by-hand",
        "volumeName": name,
        "resources": {"requests": size},
    }
    namespace.make(
        "persistentvolumeclaims", {"kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": wanted}
    )
    yield name
    cluster.delete(f"/api/v1/persistentvolumes/{name}", {})


@pytest.fixture
def submit(projects: Projects, index: Index, pods_tracking: Tracking) -> Any:
    """``submit(env_cache, userinfo)``: a project with a python_env.yaml, run in its environment."""
    declared = {"python": "3.11", "build_dependencies": [], "dependencies": ["needed"]}
    project = projects.make("", command="python -c 'import needed; print(needed.__version__, needed.__file__)'")
    (project / "python_env.yaml").write_text(yaml.safe_dump(declared))
    document = yaml.safe_load((project / "MLproject").read_text())
    (project / "MLproject").write_text(yaml.safe_dump({**document, "python_env": "python_env.yaml"}))

    def start(env_cache: Document | None, userinfo: str = "") -> RemoteSubmittedRun:
        options = {**projects.backend_config["kubernetes"], "env_cache": env_cache}
        environment = {"index_url": index.address("simple", userinfo)}
        config = {**projects.backend_config, "kubernetes": options, "environment": environment}
        if not index.requests:
            plan(str(project), backend_config={**config, "env_manager": "virtualenv", "compute": "local"})
            index.requests[:] = ["the lock is made"]  # which reads packages too
        return mlflow.projects.run(
            str(project), backend="remote", env_manager="virtualenv", synchronous=False, backend_config=config
        )

    return start


def builds(index: Index) -> int:
    """How often pods have made the environment."""
    return index.downloads().count("needed-2.0-py3-none-any.whl")


def check(run: RemoteSubmittedRun) -> None:
    view = ended(run)
    assert view.status == "FINISHED", view.tag("message")
    version, path = stored_log(run.run_id).decode().split()
    assert version == "2.0"
    assert f"/mlflow-remote-cache/envs/{view.tag('environment')}/" in path


def test_two_pods_at_once_make_an_environment_in_a_claim_once_and_a_third_not_at_all(
    submit: Any, claim: str, index: Index
) -> None:
    at_once = [submit({"pvc": claim}), submit({"pvc": claim})]
    for run in at_once:
        check(run)
    check(submit({"pvc": claim}))
    assert builds(index) == 1


def test_an_environment_is_kept_on_the_node(submit: Any, namespace: Namespace, node_folder: Path, index: Index) -> None:
    namespace.label(**{"pod-security.kubernetes.io/enforce": "privileged"})
    for _ in range(2):
        check(submit({"host_path": str(node_folder)}))
    assert builds(index) == 1


def test_a_path_of_the_node_is_refused_in_words_where_the_namespace_does(submit: Any, node_folder: Path) -> None:
    with pytest.raises(Exception, match=r"violates PodSecurity.*hostPath"):
        submit({"host_path": str(node_folder)})


def test_without_a_cache_each_pod_makes_its_own(submit: Any, index: Index) -> None:
    for times in (1, 2):
        check(submit(None))
        assert builds(index) == times


def test_a_pod_knows_what_a_private_index_wants(submit: Any, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.login = ("reader", "pass" + "phrase")
    monkeypatch.setenv("INDEX_PASSWORD", index.login[1])
    check(submit(None, "reader:${INDEX_PASSWORD}@"))
