"""Deployments as the command ``mlflow-remote`` shows them beside runs: on this machine, on the engine it uses.

A word names a deployment if it is ``deployment/NAME``, or could not be the start of a run's id.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from ..display import harmless
from ..errors import RemoteError, RequestError
from . import config, target
from .spec import DeploymentStatus, described
from .target import Target

_PREFIX = "deployment/"
_RUN_ID = re.compile("[0-9a-f]{1,32}")


def name_in(word: str) -> str:
    """The deployment that the word names; empty: it is for a run."""
    if word.startswith(_PREFIX):
        return word.removeprefix(_PREFIX)
    return "" if _RUN_ID.fullmatch(word) else word


def targets() -> Iterator[Target]:
    """The places that are reached without being told how."""
    for compute in target.OURS:
        yield target.from_options(compute, config.parse({"compute": compute}).run.options())


def everywhere() -> Iterator[tuple[Target, DeploymentStatus]]:
    """Every deployment there; a place that does not answer has none."""
    for where in targets():
        with contextlib.suppress(RemoteError):
            yield from ((where, status) for status in where.statuses())


def statuses() -> list[DeploymentStatus]:
    return [status for _, status in everywhere()]


def find(name: str) -> tuple[Target, DeploymentStatus]:
    """Raises RequestError: there is none, or more than one."""
    found = [(where, status) for where, status in everywhere() if status.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(
            f"There are {len(found)} deployments {name}: on {', '.join(each.name for each, _ in found)}.",
            hint="Say which: the target remote:/COMPUTE.",
        )
    raise RequestError(f"There is no deployment {name} on {', '.join(target.OURS)}, as far as they answer.")


def data(status: DeploymentStatus) -> dict[str, Any]:
    """For ``--json``: what tells it from a run comes first."""
    return {"kind": "deployment", **described(status)}


def details(name: str) -> dict[str, Any]:
    return data(find(name)[1])


def line(status: DeploymentStatus) -> str:
    spec = status.spec
    served = spec.model.version or spec.model.uri
    head = f"{spec.name[:24]:<24}  {status.state.value:<10}  {spec.compute_name or spec.compute:<12}"
    return harmless(f"{head}  {served}  {status.url}  {status.detail}".rstrip())


def logs(name: str, *, follow: bool, tail: int | None) -> Iterator[bytes]:
    where, _ = find(name)
    yield from where.logs(name, follow=follow, tail=tail)


def collect(older_than_s: float, *, dry_run: bool) -> Iterator[tuple[str, str]]:
    """Delete what never served and whose maker died; name and place of each."""
    for where in targets():
        with contextlib.suppress(RemoteError):
            for name in where.abandoned(older_than_s):
                if not dry_run:
                    where.delete(name)
                yield name, where.name
