"""What activating a prefix would set, known without running a shell. Standard library only when it is used.

Some conda packages bring scripts (``etc/conda/activate.d/*.sh``) that set variables. They are run once, when the
prefix is built, and what they changed is kept in its marker; a job then starts with the same variables at no cost.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from . import cache

#: Seconds for all activation scripts of a prefix.
SCRIPTS_TIMEOUT_S = 60

#: In a recorded value, where the variable's value at the time of activation belongs.
_FORMER = "\0FORMER\0"

#: Between a recorded value for a variable that is not set and one for a variable that is.
_IF_SET = "\0IF SET\0"

#: What a variable is set to, to see where a script puts its former value.
_PROBE = "mlflow-remote-former-value"

_STATUS = "MLFLOW_REMOTE_SCRIPT_STATUS"

_SHELL_OWN = frozenset({"_", "SHLVL", "PWD", "OLDPWD", "PS1", "BASH_EXECUTION_STRING", "CONDA_SHLVL", "PATH"})


class ScriptFailed(Exception):
    """An activation script could not be run. ``script``: its path in the prefix."""

    def __init__(self, script: str, words: str) -> None:
        super().__init__(f"{script}: {words}")
        self.script = script
        self.words = words


def activation(
    prefix: Path, environ: Mapping[str, str] | None = None, env_vars: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The variables that activating ``prefix`` sets in ``environ`` (default: this process's); reads one small file.

    ``env_vars``: of the EnvironmentRef (conda.yaml's ``variables``). What would contradict them is set empty, which
    counts as unset.
    """
    environ = os.environ if environ is None else environ
    marker = cache.read_marker(prefix) or {}
    kind = "CONDA_PREFIX" if (prefix / "conda-meta").is_dir() else "VIRTUAL_ENV"
    changed = {kind: str(prefix), "PATH": _prepended(prefix / "bin", environ.get("PATH", os.defpath))}
    if kind == "CONDA_PREFIX":
        changed |= {"CONDA_DEFAULT_ENV": str(prefix), "CONDA_SHLVL": "1"}
    other = {"CONDA_PREFIX": "VIRTUAL_ENV", "VIRTUAL_ENV": "CONDA_PREFIX"}[kind]
    changed |= {name: "" for name in (other, "PYTHONHOME") if environ.get(name)}
    for name, recorded in marker.get("activation", {}).items():
        former = changed.get(name, environ.get(name, ""))
        unset, _, if_set = recorded.partition(_IF_SET)
        changed[name] = (if_set if former and if_set else unset).replace(_FORMER, former)
    return {**changed, **(env_vars or {})}


def _prepended(folder: Path, path: str) -> str:
    parts = [part for part in path.split(os.pathsep) if part and part != str(folder)]
    return os.pathsep.join([str(folder), *parts])


def record(prefix: Path) -> dict[str, str]:
    """What the prefix's own variables and activation scripts set, for the marker. Raises ScriptFailed."""
    return {**_package_variables(prefix), **_script_variables(prefix)}


def _package_variables(prefix: Path) -> dict[str, str]:
    """``etc/conda/env_vars.d/*.json``: variables that packages set without a script (conda's documentation)."""
    found: dict[str, str] = {}
    for file in sorted((prefix / "etc/conda/env_vars.d").glob("*.json")):
        try:
            document = json.loads(file.read_text())
            found |= {str(name): str(value) for name, value in document.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise ScriptFailed(file.relative_to(prefix).as_posix(), str(error)) from error
    return found


def _script_variables(prefix: Path) -> dict[str, str]:
    scripts = sorted((prefix / "etc/conda/activate.d").glob("*.sh"))
    changed: dict[str, str] = {}
    environ = _clean_environment(prefix)
    for script in scripts:
        after = _source(script, prefix, environ)
        probed = _probed(script, prefix, environ, after.keys() - environ.keys() - _SHELL_OWN)
        for name in (environ.keys() | after.keys()) - _SHELL_OWN | {"PATH"}:
            if name in after and after[name] != environ.get(name):
                changed[name] = _template(name, environ, after, changed.get(name)) + probed.get(name, "")
        environ = after
    return changed


def _template(name: str, before: Mapping[str, str], after: Mapping[str, str], former: str | None) -> str:
    """The new value, with the old one kept as a place where the script put it before, after or inside."""
    value, old = after[name], before.get(name, "")
    if not old or old not in value:
        return value
    formers = (_FORMER if former is None else former).split(_IF_SET)
    return _IF_SET.join(value.replace(old, each, 1) for each in formers)


def _probed(script: Path, prefix: Path, environ: Mapping[str, str], added: Set[str]) -> dict[str, str]:
    """What a script would make of a former value of the variables that it ``added``, where it would keep that value."""
    if not added:
        return {}
    try:
        after = _source(script, prefix, {**environ, **dict.fromkeys(added, _PROBE)})
    except ScriptFailed:
        return {}
    values = {name: after.get(name, "") for name in added}
    return {
        name: _IF_SET + value.replace(_PROBE, _FORMER, 1)
        for name, value in values.items()
        if _PROBE in value and value != _PROBE
    }


def _clean_environment(prefix: Path) -> dict[str, str]:
    path = _prepended(prefix / "bin", os.environ.get("PATH", os.defpath))
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR", "USER") if name in os.environ}
    own = {"CONDA_PREFIX": str(prefix), "CONDA_DEFAULT_ENV": str(prefix), "CONDA_SHLVL": "1"}
    return {**kept, **own, "PATH": path}


def _source(script: Path, prefix: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables after a script was sourced; its output is dropped.

    A last command that fails is nothing (``[ -n "$X" ] && …``); one that fails and complains, an exit or a hang raise.
    """
    from . import tool

    shell = shutil.which("bash") or "/bin/sh"
    program = f'. "$1" >/dev/null; {_STATUS}=$? exec env -0'
    shown = script.relative_to(prefix).as_posix()
    argv = [shell, "-c", program, "activate", str(script)]
    try:
        done = tool.run(argv, cwd=prefix, environ=environ, timeout_s=SCRIPTS_TIMEOUT_S)
    except (OSError, tool.TimedOut) as error:
        raise ScriptFailed(shown, str(error)) from error
    pairs = (entry.partition("=") for entry in done.stdout.split("\0") if entry)
    after = {name: value for name, _, value in pairs}
    status = after.pop(_STATUS, None)
    complaint = done.stderr.strip()
    if done.code or status is None or (status != "0" and complaint):
        raise ScriptFailed(shown, complaint or f"it ended with exit code {done.code}")
    return after


def owner(prefix: Path, script: str) -> str:
    """The conda package that brought a file of the prefix; empty if none says so."""
    for file in (prefix / "conda-meta").glob("*.json"):
        try:
            document: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if script in document.get("files", ()):
            return f"{document.get('name')} {document.get('version')}"
    return ""
