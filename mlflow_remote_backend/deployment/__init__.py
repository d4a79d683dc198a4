"""Models as web services, through MLflow's ``mlflow.deployments`` interface: the entry point ``remote``.

    client.py      MLflow's surface and the pipeline, top to bottom
    config.py      what the user wrote -> frozen values; the keys that runs have are read by config.parse
    spec.py        DeploymentSpec, DeploymentStatus: frozen, printable, JSON
    model.py       model URI -> its folder, its facts, its locked environment
    target.py      what every place that runs deployments must be able to do
    kept.py        what local and docker share: a keeper's folder; local.py, docker.py: where that folder is
    diagnosis.py   a keeper's word and the log's tail -> why a revision did not come up; pure
    calling.py     inputs -> request -> predictions or the server's complaint
    looking.py     deployments for the command mlflow-remote: ls, describe, logs, gc
    server/        what runs where the model is served

Importing this package imports neither MLflow nor a target: MLflow's three names are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import RemoteDeploymentClient, run_local, target_help

__all__ = ["RemoteDeploymentClient", "run_local", "target_help"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(".client", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
