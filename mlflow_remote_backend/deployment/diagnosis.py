"""What a keeper says of a revision that did not come up, and its log's tail -> why. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import DeploymentFailed
from ..job import Diagnosis, Reason
from .spec import DeploymentSpec

TAIL_LINES = 40
_MODULE = re.compile(r"^(?:ModuleNotFoundError|ImportError): (.*)$", re.MULTILINE)
_FILE = re.compile(
    r"^(?:FileNotFoundError|OSError|mlflow\.exceptions\.MlflowException): (.*No such file.*)$", re.MULTILINE
)
_LAST_ERROR = re.compile(r"^(?:[\w.]+(?:Error|Exception|Interrupt|Exit)): .*$", re.MULTILINE)


def of_failed(spec: DeploymentSpec, failed: Mapping[str, Any], log: str) -> Diagnosis:
    """``failed``: of the keeper's state: ``exit``, ``why`` and, for a port, ``words``. ``log``: the revision's."""
    why, code = failed.get("why"), failed.get("exit")
    if why == "port":
        return Diagnosis(
            Reason.CONTAINER_CONFIG,
            f"Port {spec.service.port} of {spec.service.host} cannot be taken.",
            words=str(failed.get("words", "")),
            hint="Choose another service.port, or leave it out for a free one.",
        )
    if why == "oom":
        return Diagnosis(
            Reason.OOM,
            "The server was killed by its memory limit while it loaded the model.",
            hint="Raise resources.memory, or lower workers: each loads the model.",
        )
    if why == "timeout":
        return Diagnosis(
            Reason.START_TIMEOUT,
            f"The server did not answer within {spec.start_timeout_s:g} s.",
            hint="start_timeout says how long a model may take to load.",
        )
    if module := _MODULE.findall(log):
        return Diagnosis(
            Reason.ENVIRONMENT,
            f"The model's environment lacks something that it imports: {module[-1]}",
            hint="Log the model with it in pip_requirements (or with code_paths, if it is your own code).",
        )
    if missing := _FILE.findall(log):
        return Diagnosis(
            Reason.USER_ERROR,
            f"The model lacks a file that it needs: {missing[-1]}",
            hint="Log it anew; its artifacts in the store are not whole.",
        )
    if code in (-9, 137):
        return Diagnosis(
            Reason.KILLED_BY_SYSTEM,
            "The server was killed from outside while it loaded the model.",
            hint="Most often the machine ran out of memory.",
        )
    last = _LAST_ERROR.findall(log)
    said = f": {last[-1]}" if last else "."
    return Diagnosis(Reason.USER_ERROR, f"The model could not be loaded (exit code {code}){said}")


def error(spec: DeploymentSpec, found: Diagnosis, log: str, serving: int | None = None) -> DeploymentFailed:
    """The exception for a revision that did not come up. ``serving``: the one that does, if not the one before."""
    still = f" Revision {serving or spec.revision - 1} still serves."
    before = still if spec.revision > 1 else " Nothing is left of it."
    tail = "\n".join(log.splitlines()[-TAIL_LINES:])
    words = "\n".join(filter(None, (found.words, tail and f"The last lines of its log:\n{tail}")))
    return DeploymentFailed(
        f"Deployment {spec.name}, revision {spec.revision}: {found.message}{before}",
        words=words,
        hint=found.hint,
        code=found.reason.value,
    )
