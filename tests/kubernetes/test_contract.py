"""The kubernetes compute keeps the contract of every compute."""

from __future__ import annotations

import pytest

from mlflow_remote_backend.testing import ComputeContract

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(600)]


class TestKubernetesInTheRunnerImage(ComputeContract):
    @pytest.fixture
    def backend_config(self, backend_config):
        return backend_config


class TestKubernetesInAnImageWithoutPython(ComputeContract):
    big_line_bytes = 1024 * 1024

    @pytest.fixture
    def backend_config(self, backend_config, shell_image):
        return {**backend_config, "kubernetes": {**backend_config["kubernetes"], "image": shell_image}}
