"""A channel and an index on this machine, and a user without settings: what the environment's tests run against."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import Bench
from channel import PYTHON_MINOR, make_channel, toy
from wheels import Index, serving, wheel

from mlflow_remote_backend.job import EnvironmentRef


@pytest.fixture(scope="session")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A channel with a stub of python, and two toys of which one needs the other."""
    toys = [toy("toylib", "1.0"), toy("toylib", "1.1"), toy("toyapp", "2.0", ("python", "toylib >=1.1"))]
    return make_channel(tmp_path_factory.mktemp("channel"), packages=toys)


def index_packages() -> list[tuple[str, bytes]]:
    """What the index serves: small namesakes of what every environment holds, and a few that need each other."""
    return [
        wheel("pip", "24.0"),
        wheel("setuptools", "70.0"),
        wheel("wheel", "0.43"),
        wheel("mlflow", "3.17.2", requires=["needed"]),
        wheel("needed", "1.0"),
        wheel("needed", "2.0"),
        wheel("fruit", "1.0", requires=["needed>=2", "peel ; extra == 'peeled'"]),
        wheel("peel", "0.1"),
        wheel("toylib", "1.1"),
        wheel("toylib", "9.9"),
        wheel("uses-toylib", "1.0", requires=["toylib>=1"]),
        wheel("wants-old", "1.0", requires=["needed<2"]),
        wheel("future", "1.0", python=">=4"),
    ]


@pytest.fixture
def index() -> Iterator[Index]:
    with serving(Index().add(*index_packages())) as running:
        yield running


@pytest.fixture(autouse=True)
def bare_user(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without settings of pip, uv or conda, so that a test means the same on every machine."""
    if request.node.get_closest_marker("registry"):
        return
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_", "CONDA_")) or name.lower().endswith("_proxy") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def bench(tmp_path: Path, channel: Path, index: Index) -> Bench:
    project = tmp_path / "project"
    project.mkdir()
    return Bench(project, tmp_path / "cache", channel, index)


@pytest.fixture(scope="session")
def solved_stock(channel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, EnvironmentRef]:
    """The environment that most tests build, solved once: its index's address, and the reference."""
    folder = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch, serving(Index().add(*index_packages())) as index:
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        project = Bench(folder, folder / "cache", channel, index)
        return index.address(""), project.conda(f"python={PYTHON_MINOR}", "toyapp", pip=("fruit",)).lock()


@pytest.fixture
def stock(bench: Bench, solved_stock: tuple[str, EnvironmentRef]) -> EnvironmentRef:
    """A lock of python, toyapp (with toylib) and pip's fruit (with needed), as this test's own index serves them."""
    address, ref = solved_stock
    here = bench.index.address("")
    lines = tuple(line.replace(address, here) for line in ref.indexes)
    return dataclasses.replace(ref, lock=ref.lock.replace(address, here), indexes=lines)
