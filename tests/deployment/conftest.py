"""The sample project's model, trained and registered once for all tests; and small models that do as they are told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tracking_server import copy_database

pytest.register_assert_rewrite("deployment_contract")

SAMPLE = Path(__file__).parents[2] / "sample_project"

#: Loads in ``model/`` a module of the model's own code, whose ``_load_pyfunc`` is the test's.
TOY = """
import os, sys, time

class Toy:
    def predict(self, data, params=None):
        return [PREDICTS] * len(data)

def _load_pyfunc(path):
    LOADS
    return Toy()
"""


@dataclass(frozen=True)
class Trained:
    """A finished run of the sample project. ``model``: the registered version's URI; ``data``: the held-out patients;
    ``predicted``: for each, as the run itself predicted."""

    store: str
    run_id: str
    model: str
    data: object
    predicted: list[float]


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory, database_template: Path) -> Trained:
    """``mlflow run sample_project --backend remote`` with ``register_model``, in a store of its own."""
    import mlflow
    import pandas

    folder = tmp_path_factory.mktemp("training")
    store = f"sqlite:///{copy_database(database_template, folder / 'mlflow.db', str(folder / 'artifacts'))}"
    config = {"register_model": {"name": "diabetes", "path": "model", "alias": "champion", "tags": {"who": "test"}}}
    command = [sys.executable, "-m", "mlflow", "run", str(SAMPLE), "--backend", "remote", "--env-manager", "local"]
    environ = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store,
        "XDG_STATE_HOME": str(folder / "state"),
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        "MPLBACKEND": "Agg",
    }
    done = subprocess.run(
        [*command, "--backend-config", json.dumps(config)], cwd=folder, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(store)
    version = client.get_model_version("diabetes", "1")
    table = pandas.read_csv(
        client.download_artifacts(version.run_id, "outputs/predictions.csv", str(folder)),
        index_col="patient",
    )
    data = table.drop(columns=["actual", "predicted"])
    return Trained(store, version.run_id, "models:/diabetes/1", data, list(table["predicted"]))


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

    def make(name: str, *, predicts: str = "1", loads: str = "pass", requirements: tuple[str, ...] = ()) -> str:
        module = tmp_path / name / "toy_loader.py"
        module.parent.mkdir()
        module.write_text(TOY.replace("PREDICTS", predicts).replace("LOADS", loads))
        (module.parent / "data").mkdir()
        (module.parent / "data" / "weights.txt").write_text("42")
        folder = tmp_path / f"{name}-model"
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module="toy_loader",
            data_path=str(module.parent / "data"),
            code_paths=[str(module)],
            pip_requirements=[f"mlflow-skinny=={mlflow.__version__}", "pandas", *requirements],
        )
        sys.modules.pop("toy_loader", None)
        shutil.rmtree(module.parent)
        return str(folder)

    return make
