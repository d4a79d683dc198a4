"""Fixtures for the runner's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from execution import Starter, interpreters

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
