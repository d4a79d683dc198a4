"""The sample project's model, trained and registered once for all tests; and small models that do as they are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from served_models import Trained, toy, train
from tracking_server import copy_database


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory, database_template: Path) -> Trained:
    """The sample project's model in a store of its own."""
    folder = tmp_path_factory.mktemp("training")
    store = f"sqlite:///{copy_database(database_template, folder / 'mlflow.db', str(folder / 'artifacts'))}"
    return train(store, folder)


@pytest.fixture
def trained(training: Trained, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The same, with its store as this test's tracking URI."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", training.store)
    mlflow.set_tracking_uri(training.store)
    yield training
    mlflow.set_tracking_uri("")


MakeModel = Callable[..., str]


@pytest.fixture
def make_model(tmp_path: Path, sqlite_tracking: str) -> MakeModel:
    """``make_model("name", predicts="1", loads="time.sleep(3)")``: the folder of a model that needs MLflow only."""
    import mlflow

    def make(name: str, **how: object) -> str:
        folder = tmp_path / f"{name}-model"
        with toy(tmp_path / name, **how) as what:
            mlflow.pyfunc.save_model(str(folder), **what)
        return str(folder)

    return make
