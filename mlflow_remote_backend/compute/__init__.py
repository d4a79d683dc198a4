"""The places that run jobs. Each is one file (or folder) that implements :class:`~.base.Compute`.

A compute's module is imported when it is used. Computes of other distributions come by the entry point group
``mlflow_remote_backend.compute``: its name is the name in ``compute:``, and the scheme of its handles.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ComputeError, ConfigError

if TYPE_CHECKING:
    from .base import Compute, JobHandle

OURS = {
    "local": "mlflow_remote_backend.compute.local:LocalCompute",
    "docker": "mlflow_remote_backend.compute.docker:DockerCompute",
    "kubernetes": "mlflow_remote_backend.compute.kubernetes.compute:KubernetesCompute",
}
GROUP = "mlflow_remote_backend.compute"


def from_options(name: str, options: Mapping[str, Any]) -> Compute:
    """The compute called ``name`` with its own section of backend_config. Connects to nothing yet."""
    compute: Compute = _class(name).from_options(options)
    return compute


def from_handle(handle: JobHandle) -> Compute:
    """The compute that can find the job of this handle. Connects to nothing yet."""
    compute: Compute = _class(handle.scheme).from_handle(handle)
    return compute


def _class(name: str) -> Any:
    if name in OURS:
        module, _, attribute = OURS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    from importlib.metadata import entry_points

    for each in entry_points(group=GROUP):
        if each.name == name:
            try:
                return each.load()
            except Exception as error:  # a broken plugin of somebody else is named, not hidden
                raise ComputeError(f"Compute {name!r} ({each.value}) cannot be loaded.", words=str(error)) from error
    raise ConfigError(f"There is no compute {name!r}.", key="compute", hint=f"Known: {', '.join(OURS)}.")
