"""Job specs for the pure tests."""

from __future__ import annotations

from typing import Any

from mlflow_remote_backend.job import EntryPoint, EnvironmentRef, JobSpec, Parameter, RunRef, SnapshotRef

RUN_ID = "0123456789abcdef0123456789abcdef"
RUN = RunRef(RUN_ID, "7", "mlflow-artifacts:/7/run/artifacts", "https://mlflow.example.com")
LOCKED = EnvironmentRef("conda", "conda-lock", "sha256:" + "e" * 64, "version: 1\n", "linux-64", "3.11")


def spec(**changes: Any) -> JobSpec:
    """A job on Kubernetes; ``options`` are added to the runner image."""
    options = {"runner_image": "registry.example.com/runner:1-py3.11", **changes.pop("options", {})}
    fields: dict[str, Any] = {
        "run": RUN,
        "submission_id": "fedcba98765432100123456789abcdef",
        "project_name": "project",
        "entry_point": EntryPoint("main", "python train.py {alpha}", (Parameter("alpha", "float", 0.5),)),
        "parameters": {"alpha": "0.4321"},
        "snapshot": SnapshotRef("sha256:" + "a" * 64, 1234, "mlflow-artifacts:/7/run/artifacts/snapshot/x.tar.gz"),
        "environment": EnvironmentRef(),
        "compute": "kubernetes",
        "options": options,
    }
    return JobSpec(**{**fields, **changes})
