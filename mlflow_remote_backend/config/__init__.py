"""Raw ``backend_config`` -> a frozen :class:`BackendConfig`. The only reader of its keys.

``keys.py`` declares every key once: what it takes, its default, what it means. The parser (``parser.py``), the JSON
Schema and the tables of docs/configuration.md all come from it. ``kinds.py`` has the kinds of values, ``options.py``
what comes out, ``files.py`` reads JSON and ``mlflow-remote.yaml``. Nothing heavy is imported; PyYAML only for a file.
"""

from __future__ import annotations

from .options import (
    BackendConfig,
    CliContext,
    DockerOptions,
    EnvCache,
    EnvironmentOptions,
    KubernetesOptions,
    KubernetesVolume,
    RegisterModel,
    SecretRef,
    SnapshotOptions,
)
from .parser import named_computes, parse, schema

__all__ = [
    "BackendConfig",
    "CliContext",
    "DockerOptions",
    "EnvCache",
    "EnvironmentOptions",
    "KubernetesOptions",
    "KubernetesVolume",
    "RegisterModel",
    "SecretRef",
    "SnapshotOptions",
    "named_computes",
    "parse",
    "schema",
]
