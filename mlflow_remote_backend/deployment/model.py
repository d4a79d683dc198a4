"""A model's URI -> its folder on this machine, what its ``MLmodel`` says, and the environment that it declares."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .. import submission
from ..config.options import BackendConfig
from ..errors import RequestError, TrackingError
from ..job import EnvironmentRef
from ..submission import Say
from ..tracking import PREFIX, Tracking
from .spec import ModelRef

FLAVOR = "python_function"
OLDEST_MLFLOW = 3  # its scoring server is FastAPI's; before, it was Flask's
_REGISTERED = re.compile(r"models:/[^/]+[/@][^/]+$")


def fetch(uri: str, folder: Path, tracking: Tracking, flavor: str | None = None) -> tuple[Path, ModelRef]:
    """Download a model into ``folder`` and look at it. Blocks. Raises RequestError (no such model, or none that the
    scoring server can serve) and TrackingError."""
    version = tracking.model_version(uri) if _REGISTERED.match(uri) else None
    try:
        path = tracking.fetch_model(uri, folder)
    except (RequestError, TrackingError) as error:
        if isinstance(error, TrackingError) and error.transient:
            raise
        raise RequestError(
            f"Model {uri} cannot be fetched.",
            words=error.words,
            hint="A model URI is models:/NAME/VERSION, models:/NAME@ALIAS, runs:/RUN/PATH, a store's URI or a folder.",
        ) from error
    found = _read(path, uri)
    flavors = tuple(sorted(found.flavors))
    if FLAVOR not in flavors or (flavor and flavor not in flavors):
        raise RequestError(
            f"Model {uri} has no flavor {flavor or FLAVOR}, which the scoring server serves.",
            hint=f"It has {', '.join(flavors) or 'none'}. Log it with a flavor that python_function loads.",
        )
    origin = {key: value for key, value in (version.tags if version else {}).items() if key.startswith(PREFIX)}
    return path, ModelRef(
        uri=uri,
        source=_source(uri, version),
        flavor=flavor or FLAVOR,
        flavors=flavors,
        run_id=(version.run_id if version else "") or found.run_id or "",
        version=f"{version.name}/{version.version}" if version else "",
        mlflow_version=str(found.mlflow_version or ""),
        size_bytes=_size_bytes(path),
        signature=str(found.signature or ""),
        origin=origin,
    )


def environment(path: Path, config: BackendConfig, say: Say) -> EnvironmentRef:
    """The software that the model declares, locked for where it will be served, as a project's would be. Blocks for
    milliseconds, or minutes when it must solve. Raises EnvironmentError_."""
    if config.env_manager == "local":
        return EnvironmentRef("local")
    from ..environment import cache, locking, spec

    kind, file = _declaration(path, config.env_manager)
    declared = spec.load(path, kind, file, config.env_manager, config.environment)
    platform = submission.platform_of(config)
    elsewhere = config.compute not in ("local", "docker")
    locked = locking.lock(declared, platform, cache.default_root(), submission.Narrator(say), elsewhere=elsewhere)
    refuse_other_server(locked)
    for notice in locked.notices:
        say(notice)
    return locked


def refuse_other_server(locked: EnvironmentRef) -> None:
    """Raises RequestError where the locked environment has no scoring server that we can start: MLflow 3's."""
    from ..environment import cache, lockfile, requirements

    if locked.kind == "conda-lock":
        rows = lockfile.conda_lock_rows(lockfile.load_conda_lock(locked.lock), locked.platform)
    else:
        listed = requirements.expand_text(locked.lock, folder=cache.default_root(), where="the environment's lock")
        rows = lockfile.for_platform(lockfile.requirements_rows(listed, "The environment's lock"), locked)
    found = {row.name: row.version for row in rows if row.name in ("mlflow", "mlflow-skinny")}
    if not found:
        raise RequestError(
            "The model's environment has no MLflow, whose scoring server is to serve it.",
            hint="Log the model with mlflow (or mlflow-skinny and pandas) in its pip_requirements.",
        )
    for name, version in sorted(found.items()):
        major = version.partition(".")[0]
        if major.isdigit() and int(major) < OLDEST_MLFLOW:
            raise RequestError(
                f"The model's environment has {name} {version}, whose scoring server is another one: "
                f"MLflow {OLDEST_MLFLOW} is needed.",
                hint="Log the model anew with MLflow 3, or change its requirements "
                "(mlflow.models.update_model_requirements).",
            )


def _declaration(path: Path, manager: str | None) -> tuple[str, Path]:
    """Kind and file of what the model declares: as MLflow, python_env.yaml unless conda is asked for."""
    env = _read(path, str(path)).flavors[FLAVOR].get("env") or {}
    files = {"conda": env} if isinstance(env, str) else dict(env)
    order = ("conda", "virtualenv") if manager == "conda" else ("virtualenv", "conda")
    for name in order:
        if name in files and (path / files[name]).is_file():
            return "conda" if name == "conda" else "python", path / files[name]
    raise RequestError(
        f"The model in {path} declares no environment that is there.",
        hint="Log it with pip_requirements or conda_env, or deploy it with env_manager: local.",
    )


def _read(path: Path, uri: str) -> Any:
    """MLflow's own view of the MLmodel file."""
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        return Model.load(str(path))
    except (MlflowException, OSError, ValueError, TypeError, AttributeError) as error:
        words = str(error).partition("\n")[0]
        raise RequestError(f"{uri} is no MLflow model: its MLmodel file cannot be read.", words=words) from error


def _source(uri: str, version: Any) -> str:
    """What names the same model tomorrow, and from another folder."""
    if version:
        return f"models:/{version.name}/{version.version}"
    return os.path.abspath(uri) if len(urlsplit(uri).scheme) < 2 else uri


def _size_bytes(path: Path) -> int:
    total = 0
    for each in path.rglob("*"):
        with contextlib.suppress(OSError):
            total += each.lstat().st_size if each.is_file() else 0
    return total
