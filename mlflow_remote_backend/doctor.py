"""What works from this machine, and what to do about what does not."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from .errors import RemoteError
from .runner.run_folder import machine_id, state_root
from .tracking import Tracking
from .version import __version__


@dataclass(frozen=True)
class Finding:
    """One check. ``state``: ``ok``, ``missing`` (only needed for some computes) or ``broken``."""

    name: str
    state: str
    detail: str


def examine(tracking_uri: str) -> Iterator[Finding]:
    """All checks, one after the other. Each blocks at most some seconds. Creates nothing."""
    yield Finding("mlflow-remote", "ok", f"{__version__}, Python {sys.version.split()[0]}")
    for name in ("mlflow", "docker", "kubernetes", "conda-lock", "py-rattler", "uv"):
        yield _installed(name)
    yield _program("bash", "compute: local needs it")
    yield _program("git", "git projects need it")
    yield _check("state folder", lambda: f"{state_root()} ({machine_id()})")
    yield _check("tracking server", lambda: _tracking(tracking_uri))
    yield _check("docker", _docker, "missing")
    yield _check("kubernetes", _kubernetes, "missing")


def _installed(name: str) -> Finding:
    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        return Finding(name, "broken", "not installed; pip install mlflow-remote-backend brings it")


def _program(name: str, why: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, "ok", path) if path else Finding(name, "missing", f"not on PATH; {why}")


def _check(name: str, action: Callable[[], str], state: str = "broken") -> Finding:
    try:
        return Finding(name, "ok", action())
    except (RemoteError, OSError) as error:
        return Finding(name, state, str(error).replace("\n", " "))
    except Exception as error:  # noqa: BLE001 - a check that breaks is a finding, not the end of the others
        return Finding(name, "broken", f"{type(error).__name__}: {error}")


def _tracking(uri: str) -> str:
    tracking = Tracking(uri)
    tracking.preflight("0")
    return tracking.uri


def _docker() -> str:
    from .compute.docker import DockerCompute

    return DockerCompute.from_options({}).describe()


def _kubernetes() -> str:
    from .compute.kubernetes.compute import KubernetesCompute

    return KubernetesCompute.from_options({}).describe()
