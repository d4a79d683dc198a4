"""Fixtures for the runner's tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from execution import Starter, interpreters, new_run
from faults import FaultProxy, fault_proxy
from tracking_server import TrackingServer

from mlflow_remote_backend.job import RunRef

INTERPRETERS = interpreters()


@pytest.fixture(params=INTERPRETERS)
def execute(request: pytest.FixtureRequest, tmp_path: Path, no_leftovers: None) -> Iterator[Starter]:
    """Each of the twins, run by each interpreter that is here. Nothing may be left of it after the test."""
    starter = Starter(tmp_path, INTERPRETERS[request.param])
    yield starter
    starter.end_all()


@pytest.fixture
def execute_py(tmp_path: Path, no_leftovers: None) -> Iterator[Starter]:
    """``execute.py`` by this Python."""
    starter = Starter(tmp_path)
    yield starter
    starter.end_all()


@pytest.fixture
def sqlite_run(sqlite_tracking: str) -> RunRef:
    """A run in an SQLite store of the test's own."""
    return new_run(sqlite_tracking)


@pytest.fixture
def proxy(tracking_server: TrackingServer) -> Iterator[FaultProxy]:
    """A proxy before the session's server, passing on until it is told to fail."""
    with fault_proxy(tracking_server.url) as proxy:
        yield proxy


@pytest.fixture
def server_run(tracking: str, proxy: FaultProxy) -> RunRef:
    """A run on the session's server, to be reached through ``proxy``."""
    return dataclasses.replace(new_run(tracking), tracking_uri=proxy.url)
