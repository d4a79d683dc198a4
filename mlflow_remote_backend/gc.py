"""Bring to an end what died half-way, and remove what it left. Touches only what carries our mark.

A run folder or an object at a compute goes only if its run has ended, or has been absent from the tracking server for
ABSENT_S. Caches stay unless they are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

from . import compute as computes
from . import removal
from .compute.base import Compute
from .compute.supervised import SupervisedCompute
from .deployment import looking
from .errors import ComputeError, ConfigError, JobError, RemoteError, RequestError
from .follow import settle
from .runner.run_folder import RunFolder, all_folders, state_root
from .submission_folder import sweep
from .submitted_run import close_if_abandoned, created
from .tracking import RunView, Tracking, absolute_uri

ABSENT_S = 15 * 60
_ON_KUBERNETES = "tags.`mlflow_remote.handle` LIKE 'kubernetes://%'"


@dataclass(frozen=True)
class Collected:
    """One thing that was dealt with. ``kind``: run, folder …; ``what``: its name; ``action``: what was done to it."""

    kind: str
    what: str
    action: str


def collect(tracking: Tracking, *, dry_run: bool = False, cache: bool = False) -> Iterator[Collected]:
    """End abandoned runs, finish dead jobs of this machine, remove what finished ones left. Yields as it goes."""
    yield from _abandoned_runs(tracking, dry_run)
    yield from _folders(tracking, dry_run)
    yield from _engine(tracking, dry_run, cache)
    yield from _clusters(tracking, dry_run)
    yield from _deployments(dry_run)
    if not dry_run:
        removal.empty(state_root() / "trash")
        yield from (Collected("scratch", str(path), "removed: its submission died") for path in sweep())


def _deployments(dry_run: bool) -> Iterator[Collected]:
    why = {"deployment": "it never served, its maker died", "leftover": "whoever was at it died"}
    for kind, what, place in looking.collect(ABSENT_S, dry_run=dry_run):
        action = f"{'would be ' if dry_run else ''}removed: {why.get(kind, '')}" if kind in why else what
        yield Collected(kind, f"{what} on {place}" if kind in why else place, action)


def _abandoned_runs(tracking: Tracking, dry_run: bool) -> Iterator[Collected]:
    for view in tracking.runs("attributes.status = 'RUNNING' and tags.`mlflow_remote.phase` = 'creating'"):
        if dry_run:
            yield Collected("run", view.run_id, "would be looked at: its job was never created")
        elif close_if_abandoned(tracking, view):
            yield Collected("run", view.run_id, "ended: its submitter died before the job was created")


def _folders(tracking: Tracking, dry_run: bool) -> Iterator[Collected]:
    for folder in all_folders(state_root()):
        if folder.supervised() or not _is_of(tracking, folder):
            continue
        try:
            action = _folder_action(tracking, folder, dry_run)
        except FileNotFoundError:
            continue  # somebody else has removed it
        except (ComputeError, ConfigError) as error:  # one engine that is away must not keep the others' folders
            yield Collected("error", error.code, str(error))
            continue
        if action:
            yield Collected("folder", str(folder.path), ("would be " if dry_run else "") + action)


def _is_of(tracking: Tracking, folder: RunFolder) -> bool:
    """Whether the job reports to this server: another one must not be asked whether its run is known."""
    try:
        return absolute_uri(folder.spec().run.at_submitter.tracking_uri).rstrip("/") == tracking.uri.rstrip("/")
    except (OSError, JobError):
        return True  # never written, or unreadable: of nobody else


def _folder_action(tracking: Tracking, folder: RunFolder, dry_run: bool) -> str:
    view = _view(tracking, folder.run_id)
    if view is None and time.time() - folder.path.stat().st_mtime < ABSENT_S:
        return ""
    why = "its run is not known to the tracking server" if view is None else "its run has ended"
    compute = _compute_of(folder)
    if compute is None:
        if not _over(view):
            return ""
        _unless(dry_run, folder.remove)
        return f"removed: {why}"
    handle = compute.handle_of(folder)
    if _over(view):
        _unless(dry_run, lambda: compute.collect(handle))
        return f"removed: {why}"
    if view is not None and not created(view):
        return ""  # its submitter is at work on it, or was dealt with above
    if not dry_run:
        settle(tracking, cast(Compute, compute), handle, folder.run_id, compute.status(handle))
    return "given a new supervisor: the old one had died"


def _view(tracking: Tracking, run_id: str) -> RunView | None:
    """The run; None if the tracking server does not know it."""
    try:
        return tracking.view(run_id)
    except RequestError:
        return None


def _over(view: RunView | None) -> bool:
    """Whether nobody will write to the run any more."""
    return view is None or view.ended


def _compute_of(folder: RunFolder) -> SupervisedCompute | None:
    """The compute whose job is in the folder; None where its envelope was never written, or cannot be read."""
    try:
        spec = folder.spec()
    except (OSError, JobError):
        return None
    compute = computes.from_options(spec.compute, spec.options)
    return compute if isinstance(compute, SupervisedCompute) else None


def _unless(dry_run: bool, action: Callable[[], object]) -> None:
    if not dry_run:
        action()


def _engine(tracking: Tracking, dry_run: bool, cache: bool) -> Iterator[Collected]:
    """What runs left on the Docker engine that this machine uses, if there is one that answers."""
    from .compute.docker import DockerCompute

    compute = DockerCompute.from_options({})
    try:
        left = compute.leftovers(tracking.uri)
    except (ComputeError, ConfigError):
        return
    for each in left:
        view = _view(tracking, each.run_id)
        if _over(view) and (view is not None or each.age_s > ABSENT_S):
            _unless(dry_run, partial(compute.remove_leftover, each))
            yield Collected(each.kind, each.name, "would be removed" if dry_run else "removed: its run has ended")
    for cached in compute.caches() if cache else ():
        if dry_run and not cached.in_use:
            yield Collected(cached.kind, cached.name, "would be removed: environments")
        elif not dry_run and compute.remove_cache(cached):
            yield Collected(cached.kind, cached.name, "removed: environments")


def _clusters(tracking: Tracking, dry_run: bool) -> Iterator[Collected]:
    """What runs left in the namespaces to which runs of this server were submitted, as far as they are reached."""
    from .compute.kubernetes.compute import KubernetesCompute

    for compute in KubernetesCompute.of_handles(view.tag("handle") for view in tracking.runs(_ON_KUBERNETES)):
        try:
            left = compute.leftovers(tracking.uri)
        except ComputeError:
            continue
        for each in left:
            view = _view(tracking, each.run_id)
            absent = view is None and each.same_server and each.age_s > ABSENT_S
            if not absent and (view is None or not view.ended):
                continue
            try:
                _unless(dry_run, partial(compute.remove_leftover, each))
            except ComputeError as error:  # a right that is missing here must not keep what is elsewhere
                yield Collected("error", error.code, str(error))
                continue
            yield Collected(each.kind, each.name, "would be removed" if dry_run else "removed: its run has ended")


def failures(items: Iterator[Collected]) -> Iterator[Collected]:
    """The items, and a last one instead of an exception if something cannot be reached."""
    try:
        yield from items
    except RemoteError as error:
        yield Collected("error", error.code, str(error))
