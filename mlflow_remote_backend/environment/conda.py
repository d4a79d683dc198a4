"""conda.yaml -> conda-lock.yml: conda-lock and our solver for conda's part, uv for pip's part, one ordinary lock.

conda-lock is run as a program, for its internals are not public. It could solve the pip part as well, with the Poetry
that it carries; uv does it in a tenth of the time (1.5 s against 20 s for 87 packages), from the indexes that pip is
configured with, and says what conflicts. Its rows are written in conda-lock's own words.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from ..errors import EnvironmentError_
from . import credentials, hints, indexes, lockfile, tool, uv
from .spec import EnvSpec

#: Seconds for one run of conda-lock; a first look at a large channel takes a minute or two.
LOCK_TIMEOUT_S = 1200

#: Names under which conda channels publish what an index calls otherwise; all others are the same.
_INDEX_NAMES = {
    "dask-core": "dask",
    "matplotlib-base": "matplotlib",
    "msgpack-python": "msgpack",
    "opencv": "opencv-python",
    "py-opencv": "opencv-python",
    "py-xgboost": "xgboost",
    "pyarrow-core": "pyarrow",
    "python-build": "build",
    "python-duckdb": "duckdb",
    "python-flatbuffers": "flatbuffers",
    "python-graphviz": "graphviz",
    "python-kubernetes": "kubernetes",
    "python-lmdb": "lmdb",
    "python-xxhash": "xxhash",
    "pytorch": "torch",
    "pytorch-cpu": "torch",
    "pytorch-gpu": "torch",
    "seaborn-base": "seaborn",
    "tensorflow-base": "tensorflow",
    "uvicorn-standard": "uvicorn",
}


def lock(
    spec: EnvSpec,
    platforms: Sequence[str],
    *,
    index_lines: Sequence[str],
    root: Path,
    solving: Callable[[str], None],
    warn: Callable[[str], object] = lambda notice: None,
) -> str:
    """The text of a ``conda-lock.yml`` for ``platforms``. ``solving`` is told what is being solved, ``warn`` what is
    missing.

    Blocks for a second to minutes. Raises EnvironmentError_ in the solver's words.
    """
    channels = spec.channel_urls()
    with tool.private_folder(root) as folder:
        solving(", ".join(platforms))
        document = _lock_conda(spec, platforms, channels, folder, root)
    if spec.packages.requirements:
        pip = [row for platform in platforms for row in _lock_pip(spec, document, platform, index_lines, root, warn)]
        document["package"] += pip
    return _render(document)


# ---------------------------------------------------------------------------------------------- conda's part


def _lock_conda(
    spec: EnvSpec, platforms: Sequence[str], channels: Sequence[str], folder: Path, root: Path
) -> dict[str, Any]:
    secrets = indexes.secrets(channels)
    request, metadata, output = folder / _file_name(spec), folder / "metadata.yml", folder / "conda-lock.yml"
    plain = [credentials.strip(channel) for channel in channels]
    request.write_text(yaml.safe_dump({"channels": plain, "dependencies": list(spec.conda)}))
    metadata.write_text(yaml.safe_dump({lockfile.DECLARATION: spec.declaration_key()}))
    (folder / "names.json").write_text("{}")
    argv = [
        *(sys.executable, "-m", "conda_lock", "lock", "--conda", _solver(spec, folder), "--kind", "lock"),
        *("--file", str(request), "--lockfile", str(output), "--mdy", str(metadata)),
        *("--pypi_to_conda_lookup_file", str(folder / "names.json")),  # else it is fetched from the internet
        *(("--with-cuda", spec.options.cuda) if spec.options.cuda else ("--without-cuda",)),
        *(word for platform in platforms for word in ("--platform", platform)),
    ]
    message = folder / "solver-message"
    environ = _solver_environment(folder, root, message, channels, secrets)
    try:
        result = tool.run(argv, cwd=folder, environ=environ, timeout_s=LOCK_TIMEOUT_S)
    except tool.TimedOut as error:
        said = credentials.redact(error.stderr, secrets.values())
        raise EnvironmentError_(f"Locking {spec.shown}: the solver {error}.", words=said, hint=hints.CHANNEL) from error
    if result.code:
        said = message.read_text() if message.exists() else _own_words(result.stderr)
        raise _unsolved(spec, platforms, credentials.redact(said, secrets.values()))
    return lockfile.load_conda_lock(output.read_text())


def _file_name(spec: EnvSpec) -> str:
    """The declaration's own name, which conda-lock notes in the lock; it reads any name but a few as conda.yaml."""
    name = spec.file.name if spec.file else "conda.yaml"
    return name if name.endswith((".yml", ".yaml")) and name not in ("meta.yaml", "metadata.yml") else "conda.yaml"


def _solver(spec: EnvSpec, folder: Path) -> str:
    """The executable that conda-lock asks: ours, or an installed conda, mamba or micromamba by name or path."""
    if spec.options.solver not in ("", "rattler"):
        found = shutil.which(spec.options.solver)
        if found is None:
            raise EnvironmentError_(
                f"The solver {spec.options.solver!r} is not installed here.",
                hint="Leave environment.solver out to use the one that comes with this package.",
            )
        return found
    if os.name != "posix":
        return shutil.which("mlflow-remote-conda") or "mlflow-remote-conda"
    shim = folder / "solver"
    command = shlex.join(tool.own_module("conda_shim"))
    shim.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    shim.chmod(stat.S_IRWXU)
    return str(shim)


def _solver_environment(
    folder: Path, root: Path, message: Path, channels: Sequence[str], secrets: Mapping[str, str]
) -> dict[str, str]:
    repodata = root / "repodata"
    repodata.mkdir(parents=True, exist_ok=True)
    # The solver adds credentials itself: conda-lock would pass them as arguments, and write them into the lock.
    full = indexes.expand(channels, secrets)
    authorised = {credentials.strip(url): secret for url, secret in zip(channels, full, strict=True)}
    environ = {
        **tool.environment(folder),
        "PYTHONPATH": tool.module_path(),
        "MLFLOW_REMOTE_SOLVER_MESSAGE": str(message),
        "MLFLOW_REMOTE_REPODATA_CACHE": str(repodata),
        "MLFLOW_REMOTE_CHANNELS": json.dumps(authorised),
    }
    if certificates := indexes.certificates():
        environ.setdefault("SSL_CERT_FILE", certificates)
    return environ


def _own_words(stderr: str) -> str:
    """conda-lock's own complaint: what another solver said, or the last line of its traceback."""
    match = re.search(r"Could not lock the environment for platform \S+\n(.*?)\n    Command:", stderr, re.DOTALL)
    if match:
        return match[1]
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith((" ", "Traceback", "INFO"))]
    return "\n".join(lines[-5:])


def _unsolved(spec: EnvSpec, platforms: Sequence[str], said: str) -> EnvironmentError_:
    return EnvironmentError_(
        f"{spec.shown} cannot be locked for {', '.join(platforms)} from {', '.join(spec.channels)}.",
        words=said,
        hint=hints.for_words(said, hints.CHANNEL),
    )


# ---------------------------------------------------------------------------------------------- pip's part


def _lock_pip(
    spec: EnvSpec,
    document: Mapping[str, Any],
    platform: str,
    index_lines: Sequence[str],
    root: Path,
    warn: Callable[[str], object],
) -> list[dict[str, Any]]:
    conda = [row for row in document["package"] if row["platform"] == platform]
    python = next((str(row["version"]) for row in conda if row["name"] == "python"), "")
    if not python:
        raise EnvironmentError_(
            f"{spec.shown} asks pip for packages, and no python is among its conda packages.",
            hint="Add python=3.11, or the version that you want, to its dependencies.",
        )
    rows = uv.compile_rows(
        spec.packages,
        platform=platform,
        python=python,
        index_lines=index_lines,
        root=root,
        provided=provided_by_conda(conda),
        shown=f"The pip part of {spec.shown}",
        warn=warn,
    )
    return [lockfile.pip_row_document(row, platform) for row in rows]


def provided_by_conda(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The Python packages that conda installs, by an index's names: pip must neither install nor change them.

    ``rows``: a lock's conda rows. What does not depend on python is no Python package, whatever its name.
    """
    provided: dict[str, str] = {}
    for row in rows:
        name, version = str(row["name"]), str(row["version"])
        if "python" not in row.get("dependencies", {}) or not _is_version(version):
            continue
        provided[canonicalize_name(_INDEX_NAMES.get(name, name))] = version
    return provided


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def _render(document: Mapping[str, Any]) -> str:
    """The lock's text: rows sorted, as conda-lock sorts them; equal rows give equal text."""
    packages = sorted(document["package"], key=lambda row: (row["manager"], row["name"], row["platform"]))
    head = (
        "# A lock of conda-lock: the packages of an environment with their digests. Do not edit.\n"
        "# Install it anywhere:  conda-lock install -n NAME conda-lock.yml\n"
        "# Write it anew:        mlflow-remote lock\n"
    )
    return head + yaml.dump(
        {**document, "package": packages},
        Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper),
        sort_keys=False,
        width=1000,
    )
