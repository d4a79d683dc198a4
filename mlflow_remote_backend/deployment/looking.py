"""Deployments as the command ``mlflow-remote`` shows them beside runs: wherever this user's deployments can be.

The places are this machine, the engine it uses, and the computes that the user's ``mlflow-remote.yaml`` names. They are
looked at side by side, each for PATIENCE_S at most: one that is away must not keep the others'.

A word names a deployment if it is ``deployment/NAME``, or could not be the start of a run's id.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .. import config as configuration
from ..display import harmless
from ..errors import RemoteError, RequestError
from . import config, target
from .spec import DeploymentStatus, described
from .target import Target

PATIENCE_S = 5.0
COLLECT_PATIENCE_S = 60.0
_PREFIX = "deployment/"
_RUN_ID = re.compile("[0-9a-f]{1,32}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Place:
    """Somewhere that deployments can be. ``named``: by the user, who will want to know why it does not answer."""

    name: str
    named: bool = False


@dataclass(frozen=True)
class Seen:
    """What was found, and a sentence for each place of which nothing is known."""

    found: Sequence[tuple[Target, DeploymentStatus]] = ()
    unknown: Sequence[str] = field(default_factory=tuple)

    @property
    def statuses(self) -> list[DeploymentStatus]:
        return [status for _, status in self.found]


def name_in(word: str) -> str:
    """The deployment that the word names; empty: it is for a run."""
    if word.startswith(_PREFIX):
        return word.removeprefix(_PREFIX)
    return "" if _RUN_ID.fullmatch(word) else word


def places() -> list[Place]:
    """Those that are reached without being told how. Raises ConfigError: the user's file is damaged."""
    named = configuration.named_computes(os.environ)
    return [*map(Place, target.OURS), *(Place(name, named=True) for name in named)]


def everywhere() -> Seen:
    """Every deployment that the places tell of. Blocks for PATIENCE_S and a little more at most."""
    asked = places()
    answers = _side_by_side([_of(each, lambda where: where.statuses()) for each in asked], PATIENCE_S)
    found: list[tuple[Target, DeploymentStatus]] = []
    known: set[tuple[str, str, float]] = set()
    unknown = []
    for place, answer in zip(asked, answers, strict=True):
        if isinstance(answer, BaseException):
            unknown += _complaint(place, answer, PATIENCE_S)
            continue
        where, statuses = answer
        for status in statuses:  # two names may mean one place
            key = (status.spec.compute, status.name, status.spec.created_at)
            if key not in known:
                known.add(key)
                found.append((where, status))
    return Seen(found, unknown)


def find(name: str) -> tuple[Target, DeploymentStatus]:
    """Raises RequestError: there is none, or more than one."""
    seen = everywhere()
    found = [(where, status) for where, status in seen.found if status.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        on = ", ".join(status.spec.compute_name or status.spec.compute for _, status in found)
        raise RequestError(
            f"There are {len(found)} deployments {name}: on {on}.", hint="Say which: the target remote:/COMPUTE."
        )
    looked = ", ".join(place.name for place in places())
    raise RequestError(
        f"There is no deployment {name} on {looked}, as far as they answer.",
        words=" ".join(seen.unknown),
        hint="`mlflow-remote ls` shows what there is; the target remote:/COMPUTE waits longer for a single place.",
    )


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


def collect(older_than_s: float, *, dry_run: bool) -> Iterator[tuple[str, str, str]]:
    """Delete what never served and whose maker died, and what killed updates left; kind, name and place of each. A
    place of which nothing is known is told as the kind ``error``."""
    asked = places()
    work = [_of(each, lambda where: _collected(where, older_than_s, dry_run)) for each in asked]
    told: set[tuple[str, str]] = set()
    for place, answer in zip(asked, _side_by_side(work, COLLECT_PATIENCE_S), strict=True):
        if isinstance(answer, BaseException):
            yield from (("error", sentence, place.name) for sentence in _complaint(place, answer, COLLECT_PATIENCE_S))
            continue
        where, done = answer
        for kind, what in done:
            if (where.name, what) not in told:
                told.add((where.name, what))
                yield kind, what, where.name


def _collected(where: Target, older_than_s: float, dry_run: bool) -> list[tuple[str, str]]:
    done = []
    for name in where.abandoned(older_than_s):
        if not dry_run:
            where.delete(name)
        done.append(("deployment", name))
    done += [("leftover", what) for what in where.sweep(older_than_s, dry_run=dry_run)]
    return done


# -- asking the places -------------------------------------------------------------------------------------------------


def _of(place: Place, ask: Callable[[Target], _T]) -> Callable[[], tuple[Target, _T]]:
    def answer() -> tuple[Target, _T]:
        made = config.parse({"compute": place.name})
        where = target.from_options(made.run.compute, made.run.options())
        return where, ask(where)

    return answer


def _side_by_side(asks: Sequence[Callable[[], _T]], patience_s: float) -> list[_T | BaseException]:
    """Each answer, or why there is none; TimeoutError: not in time. Who is still at it is left to itself."""
    answers: list[_T | BaseException] = [TimeoutError()] * len(asks)

    def run(index: int) -> None:
        try:
            answers[index] = asks[index]()
        except BaseException as error:  # noqa: BLE001  told to whoever asked
            answers[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(asks))]
    deadline = time.monotonic() + patience_s
    for each in threads:
        each.start()
    for each in threads:
        each.join(max(0.0, deadline - time.monotonic()))
    return list(answers)


def _complaint(place: Place, error: BaseException, patience_s: float) -> list[str]:
    """Nothing is to be said of an engine that this machine does not have."""
    if isinstance(error, TimeoutError):
        return [f"{place.name} did not answer within {patience_s:g} s: its deployments are not shown."]
    if not isinstance(error, RemoteError):
        raise error
    if not place.named:
        return []
    return [f"{place.name}: {error.what} {error.words}".strip()]
