"""The runner image: from a plain Python image, without a network, and refused where it is of another release."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import Namespace

from mlflow_remote_backend.runner import image
from mlflow_remote_backend.testing import Projects, ended
from mlflow_remote_backend.version import __version__

docker = pytest.importorskip("docker")

INSIDE = """
import importlib.metadata as m, json, os, sys
names = {each.metadata["Name"].lower() for each in m.distributions()}
print(json.dumps({"python": sys.version_info[:2], "uid": os.getuid(), "own": m.version("mlflow-remote-backend"),
                  "names": sorted(names), "code": os.environ["MLFLOW_REMOTE_CODE"]}))
"""


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    found = docker.from_env()
    yield found
    found.close()


@pytest.mark.docker
@pytest.mark.registry
@pytest.mark.kubernetes
@pytest.mark.timeout(300)
def test_a_plain_python_image_becomes_a_runner(runner_image: str, client: Any) -> None:
    """That needs no network inside: the build has none."""
    said = client.containers.run(
        runner_image, ["python", "-c", INSIDE], remove=True, network_mode="none", user="4711:0"
    )
    inside = json.loads(said)
    assert (inside["uid"], inside["own"], inside["code"]) == (4711, __version__, image.code_digest())
    assert {"mlflow-skinny", "py-rattler", "uv", "iniconfig"} <= set(inside["names"])
    assert "mlflow" not in inside["names"]
    made = client.images.get(runner_image).attrs
    major, minor = inside["python"]
    assert f"mlflow-remote-runner:{__version__}-py{major}.{minor}" in " ".join(made["RepoTags"])
    assert made["Config"]["User"] == "1000:1000"
    assert made["Config"]["Labels"][image.VERSION_LABEL] == __version__


@pytest.mark.docker
def test_an_image_that_cannot_be_a_base_is_named(client: Any) -> None:
    with pytest.raises(Exception, match="local/shell:1 cannot be the base of the runner image"):
        image.build("local/shell:1")


def test_each_python_has_a_tag_of_its_own() -> None:
    tags = {image.image_version(image.Target((3, minor), "x86_64", "glibc", "2.36")) for minor in (10, 11, 12, 13)}
    assert len(tags) == 4


@pytest.mark.kubernetes
def test_a_runner_of_another_release_says_so_before_the_program_starts(
    projects: Projects, namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_remote_backend.compute.kubernetes.manifest.__version__", "0.0.7")
    run = projects.submit(projects.make("echo started"))
    view = ended(run)
    assert (view.status, view.tag("reason")) == ("FAILED", "BOOTSTRAP")
    assert f"has release {__version__} of mlflow-remote-backend, the submitter 0.0.7" in view.tag("message")
    error = Path(run._tracking.client.download_artifacts(run.run_id, "logs/error.txt")).read_text()
    assert "mlflow-remote image build" in error
