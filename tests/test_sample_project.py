"""The sample project does what the README says of it, with MLflow's own backend and with ours."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Command

SAMPLE = Path(__file__).parent.parent / "sample_project"


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A copy, since MLflow's own backend runs in the project's folder and writes there."""
    leave_out = shutil.ignore_patterns("outputs", "__pycache__", "mlruns", "mlflow.db*")
    return Path(shutil.copytree(SAMPLE, tmp_path / "sample_project", ignore=leave_out))


def latest_run(tracking_uri: str) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    return client.search_runs(experiments, order_by=["attributes.start_time DESC"], max_results=1)[0]


def stored(tracking_uri: str, run_id: str, path: str) -> Path:
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(run_id=run_id, artifact_path=path, tracking_uri=tracking_uri))


def test_its_parameters_are_typed_and_one_is_a_path(sample: Path) -> None:
    document = yaml.safe_load((sample / "MLproject").read_text())
    types = {name: each["type"] for name, each in document["entry_points"]["main"]["parameters"].items()}
    assert types == {"alpha": "float", "l1_ratio": "float", "features": "path"}
    assert (sample / document["conda_env"]).exists()


@pytest.mark.parametrize("backend", ["local", "remote"])
def test_it_trains_and_records(sample: Path, backend: str, sqlite_tracking: str, mlflow_run: Command) -> None:
    mlflow_run(sample, "--backend", backend, "-P", "alpha=0.30", check=True)
    run = latest_run(sqlite_tracking)
    assert run.info.status == "FINISHED"
    assert run.data.params["alpha"] == "0.30"
    assert run.data.params["l1_ratio"] == "0.1"
    assert 0.3 < run.data.metrics["r2"] < 0.7
    assert {"rmse", "mae", "r2"} <= set(run.data.metrics)


def test_its_model_has_a_signature_and_predicts_what_the_run_predicted(
    sample: Path, sqlite_tracking: str, mlflow_run: Command
) -> None:
    import mlflow
    import pandas as pd

    mlflow_run(sample, "--backend", "remote", check=True)
    run = latest_run(sqlite_tracking)
    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    assert model.metadata.signature is not None
    table = pd.read_csv(stored(sqlite_tracking, run.info.run_id, "outputs/predictions.csv"), index_col="patient")
    measured = table.drop(columns=["actual", "predicted"])
    assert model.predict(measured) == pytest.approx(table["predicted"].to_numpy())


def test_its_picture_and_table_are_in_the_run(sample: Path, sqlite_tracking: str, mlflow_run: Command) -> None:
    shown = mlflow_run(sample, "--backend", "remote", check=True)
    run_id = latest_run(sqlite_tracking).info.run_id
    assert stored(sqlite_tracking, run_id, "outputs/predictions.png").read_bytes().startswith(b"\x89PNG")
    with open(stored(sqlite_tracking, run_id, "outputs/predictions.csv"), newline="") as file:
        assert len(list(csv.DictReader(file))) == 111
    log = stored(sqlite_tracking, run_id, "logs/std_log.txt").read_text()
    assert "training on 331 patients, 10 columns" in log.splitlines()
    assert "logged the model" in shown.stdout
    assert not (sample / "outputs").exists()


def test_a_path_parameter_names_a_file_of_the_project(sample: Path, sqlite_tracking: str, mlflow_run: Command) -> None:
    mlflow_run(sample, "--backend", "remote", "-P", "features=features.txt", check=True)
    assert latest_run(sqlite_tracking).data.params["columns"] == "bmi bp s5"


def test_the_failing_entry_point_leaves_its_traceback_and_its_output(
    sample: Path, sqlite_tracking: str, mlflow_run: Command
) -> None:
    shown = mlflow_run(sample, "--backend", "remote", "-e", "fail")
    assert shown.returncode == 1
    run = latest_run(sqlite_tracking)
    assert run.info.status == "FAILED"
    assert run.data.tags["mlflow_remote.exit_code"] == "1"
    assert run.data.tags["mlflow_remote.reason"] == "USER_ERROR"
    error = stored(sqlite_tracking, run.info.run_id, "logs/error.txt").read_text()
    for words in ("ValueError: could not convert", "direct cause", "TrainingFailed: the learning rate 'twelve'"):
        assert words in error
        assert words in shown.stdout + shown.stderr
    assert stored(sqlite_tracking, run.info.run_id, "outputs/before_the_failure.txt").exists()


def test_every_entry_point_says_what_it_takes(sample: Path, sqlite_tracking: str, mlflow_remote: Command) -> None:
    for entry_point in yaml.safe_load((sample / "MLproject").read_text())["entry_points"]:
        planned = mlflow_remote("plan", sample, "-e", entry_point, "--env-manager", "local", "--json", check=True)
        assert json.loads(planned.stdout)
