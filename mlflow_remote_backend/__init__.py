"""An MLflow Projects execution backend: on this machine, in Docker, or as a Kubernetes Job.

``mlflow run . --backend remote`` and ``mlflow.projects.run(backend="remote", …)`` find it by its entry point. From
Python, :func:`attach` returns the same object for a run that another process submitted, and :func:`plan` tells what
would happen. Importing this package imports neither MLflow nor kubernetes nor docker: names are loaded when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    ComputeError,
    ConfigError,
    Detached,
    ProjectError,
    RemoteError,
    RequestError,
    RunFailed,
    ServiceError,
    SnapshotError,
    TrackingError,
)
from .job import Phase, Reason
from .version import __version__

if TYPE_CHECKING:
    from .backend import RemoteBackend, plan
    from .submitted_run import RemoteSubmittedRun, attach

_LAZY = {
    "RemoteBackend": "backend",
    "plan": "backend",
    "RemoteSubmittedRun": "submitted_run",
    "attach": "submitted_run",
}

__all__ = [
    "ComputeError",
    "ConfigError",
    "Detached",
    "Phase",
    "ProjectError",
    "Reason",
    "RemoteBackend",
    "RemoteError",
    "RemoteSubmittedRun",
    "RequestError",
    "RunFailed",
    "ServiceError",
    "SnapshotError",
    "TrackingError",
    "__version__",
    "attach",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
