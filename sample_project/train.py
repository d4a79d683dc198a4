"""Trains an elastic net on scikit-learn's diabetes data and records it in the MLflow run it is started in.

Ten measurements of 442 patients; the target is how far the disease went one year later. A quarter of the patients is
held out: the metrics, the picture and the table are about those.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import matplotlib
import mlflow
import pandas as pd
from mlflow.models import infer_signature
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

SEED = 42
#: What the model needs where it is served. Newer releases of MLflow save scikit-learn's models with skops.
MODEL_NEEDS = ("scikit-learn", "pandas", "skops")
OUTPUTS = Path(os.environ.get("MLFLOW_REMOTE_OUTPUT_DIR", "outputs"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Numbers stay text until they are used: MLflow has logged the project's parameters as text already, and logging
    # 0.3 where it logged 0.30 would be a changed parameter, which it refuses.
    parser.add_argument("--alpha", default="0.5", help="weight of the penalty")
    parser.add_argument("--l1-ratio", default="0.1", help="0: ridge, 1: lasso")
    parser.add_argument("--features", type=Path, default=Path(os.devnull), help="file with the columns to train on")
    return parser.parse_args()


def load_data(features: Path) -> tuple[pd.DataFrame, pd.Series]:
    """The measurements as they were taken, only the columns that ``features`` names, and the target."""
    data, target = load_diabetes(return_X_y=True, as_frame=True, scaled=False)
    columns = features.read_text().split() or list(data.columns)
    unknown = sorted(set(columns) - set(data.columns))
    if unknown:
        raise SystemExit(f"{features} names unknown columns: {', '.join(unknown)}. Known: {', '.join(data.columns)}")
    return data[columns], target


def train(data: pd.DataFrame, target: pd.Series, alpha: float, l1_ratio: float) -> Pipeline:
    return make_pipeline(StandardScaler(), ElasticNet(alpha=alpha, l1_ratio=l1_ratio, random_state=SEED)).fit(
        data, target
    )


def score(actual: pd.Series, predicted: pd.Series) -> dict[str, float]:
    return {
        "rmse": root_mean_squared_error(actual, predicted),
        "mae": mean_absolute_error(actual, predicted),
        "r2": r2_score(actual, predicted),
    }


def write_outputs(table: pd.DataFrame) -> None:
    """The held-out patients with what was predicted for them, as a table and as a picture."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    OUTPUTS.mkdir(parents=True, exist_ok=True)
    table.to_csv(OUTPUTS / "predictions.csv", index_label="patient")
    figure, axes = pyplot.subplots(figsize=(5, 5))
    axes.scatter(table["actual"], table["predicted"], s=12)
    axes.axline((table["actual"].mean(),) * 2, slope=1, color="grey", linewidth=1)
    axes.set(xlabel="actual", ylabel="predicted", title="Progression after one year")
    figure.savefig(OUTPUTS / "predictions.png", dpi=120)


def pinned() -> Iterator[str]:
    """The releases that the model was trained with."""
    for name in MODEL_NEEDS:
        with suppress(PackageNotFoundError):
            yield f"{name}=={version(name)}"


def log_model(model: Pipeline, data: pd.DataFrame) -> None:
    mlflow.sklearn.log_model(
        model,
        name="model",
        signature=infer_signature(data, model.predict(data)),
        input_example=data.head(3),
        pip_requirements=list(pinned()),
    )


def main() -> None:
    arguments = parse_arguments()
    data, target = load_data(arguments.features)
    data_train, data_test, target_train, target_test = train_test_split(data, target, random_state=SEED)
    with mlflow.start_run():
        mlflow.log_params({"alpha": arguments.alpha, "l1_ratio": arguments.l1_ratio, "columns": " ".join(data)})
        print(f"training on {len(data_train)} patients, {data.shape[1]} columns", flush=True)
        model = train(data_train, target_train, float(arguments.alpha), float(arguments.l1_ratio))
        predicted = pd.Series(model.predict(data_test), index=data_test.index)
        metrics = score(target_test, predicted)
        mlflow.log_metrics(metrics)
        print("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()), flush=True)
        write_outputs(data_test.assign(actual=target_test, predicted=predicted))
        log_model(model, data_train)
        print("logged the model", flush=True)


if __name__ == "__main__":
    main()
