"""The docker compute keeps the contract of every compute."""

from __future__ import annotations

import pytest

from mlflow_remote_backend.testing import ComputeContract

pytestmark = pytest.mark.docker


@pytest.mark.usefixtures("tracking", "no_leftovers")
class TestDockerOnAServer(ComputeContract):
    @pytest.fixture
    def backend_config(self, python_image):
        return {"compute": "docker", "docker": {"image": python_image, "network": "host"}}


@pytest.mark.usefixtures("sqlite_tracking", "no_leftovers")
class TestDockerWithoutAServerAndPython(ComputeContract):
    """An image with nothing but a shell, and a tracking store that is a file of this machine."""

    big_line_bytes = 1024 * 1024

    @pytest.fixture
    def backend_config(self, shell_image):
        return {"compute": "docker", "docker": {"image": shell_image}}
