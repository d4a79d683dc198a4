"""The sample project's model, trained and registered; and small models that do as they are told."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def train(store: str, folder: Path) -> Trained:
    """``mlflow run sample_project --backend remote`` with ``register_model``, into the tracking store."""
    import mlflow
    import pandas

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
    mlflow.set_tracking_uri(store)
    table = pandas.read_csv(
        client.download_artifacts(version.run_id, "outputs/predictions.csv", str(folder)),
        index_col="patient",
    )
    mlflow.set_tracking_uri("")
    data = table.drop(columns=["actual", "predicted"])
    return Trained(store, version.run_id, "models:/diabetes/1", data, list(table["predicted"]))


@contextlib.contextmanager
def toy(
    folder: Path, *, predicts: str = "1", loads: str = "pass", requirements: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """What MLflow's ``save_model`` and ``log_model`` take for a model that needs MLflow only. ``folder``: a new one."""
    import mlflow

    module = folder / "toy_loader.py"
    (folder / "data").mkdir(parents=True)
    module.write_text(TOY.replace("PREDICTS", predicts).replace("LOADS", loads))
    (folder / "data" / "weights.txt").write_text("42")
    try:
        yield {
            "loader_module": "toy_loader",
            "data_path": str(folder / "data"),
            "code_paths": [str(module)],
            "pip_requirements": [f"mlflow-skinny=={mlflow.__version__}", "pandas", *requirements],
        }
    finally:
        sys.modules.pop("toy_loader", None)
        shutil.rmtree(folder)
