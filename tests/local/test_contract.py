"""The local compute keeps the contract of every compute."""

from __future__ import annotations

import pytest

from mlflow_remote_backend.testing import ComputeContract


@pytest.mark.usefixtures("tracking", "no_leftovers")
class TestLocalOnAServer(ComputeContract):
    @pytest.fixture
    def backend_config(self):
        return {"compute": "local"}


@pytest.mark.usefixtures("sqlite_tracking", "no_leftovers")
class TestLocalWithoutAServer(ComputeContract):
    big_line_bytes = 1024 * 1024

    @pytest.fixture
    def backend_config(self):
        return {}
