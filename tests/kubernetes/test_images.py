"""Where the program's container comes from: the project's own image, and one that wants a password.

``MLFLOW_REMOTE_TEST_PRIVATE_PORT``: a port of 127.0.0.1 from which the cluster's node, this machine, pulls without TLS.
Only an administrator of the node can arrange that; without it the tests of passwords are skipped.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import REGISTRY, Namespace
from private_registry import PASSWORD, USER, private_registry

from mlflow_remote_backend.compute.kubernetes import objects
from mlflow_remote_backend.submitted_run import RemoteExecutionException
from mlflow_remote_backend.testing import Projects, ended, stored_log

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

Document = dict[str, Any]
PRIVATE_PORT = os.environ.get("MLFLOW_REMOTE_TEST_PRIVATE_PORT")


def test_a_docker_project_runs_in_its_own_image(
    projects: Projects, namespace: Namespace, make_project: Callable[..., Path], shell_image: str
) -> None:
    """No Python in it, its variables set, and nothing else that MLproject does not say."""
    project = make_project(
        "command -v python || echo no python; echo $GREETING; cat file.txt",
        files={"file.txt": "from the project\n"},
        docker_env={"image": shell_image, "environment": [["GREETING", "hello"]]},
    )
    view = ended(projects.submit(project))
    assert (view.status, view.tags["mlflow.project.env"]) == ("FINISHED", "docker")
    assert stored_log(view.run_id) == b"no python\nhello\nfrom the project\n"
    (main,) = namespace.pod(view.run_id)["spec"]["containers"]
    assert main["image"] == shell_image
    assert view.tag("image") == shell_image.rpartition("@")[2]


@pytest.fixture
def private_image(shell_image: str) -> Iterator[str]:
    """The shell image by a registry that asks for a password."""
    if PRIVATE_PORT is None:
        pytest.skip("MLFLOW_REMOTE_TEST_PRIVATE_PORT is not set: nodes pull from other registries by TLS only")
    with private_registry(REGISTRY, int(PRIVATE_PORT)) as address:
        yield shell_image.replace(REGISTRY, address, 1)


def pull_secret(namespace: Namespace, image: str, password: str) -> str:
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    document = {"auths": {image.partition("/")[0]: {"auth": auth}}}
    data = {".dockerconfigjson": base64.b64encode(json.dumps(document).encode()).decode()}
    body = {"metadata": {"name": "pull"}, "type": "kubernetes.io/dockerconfigjson", "data": data}
    return objects.name(namespace.make("secrets", {"kind": "Secret", **body}))


def test_a_private_image_is_pulled_by_the_secret_that_is_named(
    projects: Projects, namespace: Namespace, private_image: str
) -> None:
    secret = pull_secret(namespace, private_image, PASSWORD)
    kubernetes = {**projects.backend_config["kubernetes"], "image": private_image, "image_pull_secrets": [secret]}
    run = projects.submit(projects.make("echo let in"), kubernetes=kubernetes)
    assert ended(run).status == "FINISHED"
    assert stored_log(run.run_id) == b"let in\n"


def test_a_wrong_password_is_told_in_the_registrys_words(
    projects: Projects, namespace: Namespace, private_image: str
) -> None:
    secret = pull_secret(namespace, private_image, "wrong")
    kubernetes = {**projects.backend_config["kubernetes"], "image": private_image, "image_pull_secrets": [secret]}
    view = ended(projects.submit(projects.make("echo never"), kubernetes=kubernetes))
    assert (view.status, view.tag("reason")) == ("FAILED", "IMAGE_PULL")
    assert "401" in view.tag("message") or "nauthorized" in view.tag("message")


def test_a_runner_image_of_another_release_is_told_as_such(projects: Projects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow_remote_backend.compute.kubernetes.manifest.__version__", "0.0.1")
    view = projects.run("echo never")
    assert (view.status, view.tag("reason")) == ("FAILED", "BOOTSTRAP")
    assert "0.0.1" in view.tag("message")


def test_no_runner_image_is_refused_with_the_command_that_makes_one(projects: Projects) -> None:
    kubernetes = {**projects.backend_config["kubernetes"], "runner_image": None}
    with pytest.raises(RemoteExecutionException, match="mlflow-remote image build"):
        projects.submit(projects.make("exit 0"), kubernetes=kubernetes)
