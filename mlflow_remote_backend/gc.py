"""Bring to an end what died half-way, and remove what it left. Touches only what carries our mark.

A run folder or an object at a compute goes only if its run has ended, or has been absent from the tracking server for
ABSENT_S. Caches stay unless they are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from .compute.base import JobHandle
from .compute.local import LocalCompute
from .errors import RemoteError, RequestError
from .follow import settle
from .runner.run_folder import RunFolder, all_folders, machine_id
from .submitted_run import close_if_abandoned
from .tracking import Tracking

ABSENT_S = 15 * 60


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


def _abandoned_runs(tracking: Tracking, dry_run: bool) -> Iterator[Collected]:
    for view in tracking.runs("attributes.status = 'RUNNING' and tags.`mlflow_remote.phase` = 'creating'"):
        if dry_run:
            yield Collected("run", view.run_id, "would be looked at: its job was never created")
        elif close_if_abandoned(tracking, view):
            yield Collected("run", view.run_id, "ended: its submitter died before the job was created")


def _folders(tracking: Tracking, dry_run: bool) -> Iterator[Collected]:
    compute = LocalCompute()
    for folder in all_folders(compute.root):
        if folder.supervised():
            continue
        action = _folder_action(tracking, compute, folder, dry_run)
        if action:
            yield Collected("folder", str(folder.path), ("would be " if dry_run else "") + action)


def _folder_action(tracking: Tracking, compute: LocalCompute, folder: RunFolder, dry_run: bool) -> str:
    handle = JobHandle(f"local://{machine_id(compute.root)}/{folder.run_id}")
    try:
        view = tracking.view(folder.run_id)
    except RequestError:
        if time.time() - folder.path.stat().st_mtime < ABSENT_S:
            return ""
        if not dry_run:
            folder.remove()
        return "removed: its run is not known to the tracking server"
    if view.ended:
        if not dry_run:
            folder.remove()
        return "removed: its run has ended"
    if not dry_run:
        settle(tracking, compute, handle, folder.run_id, compute.status(handle))
    return "given a new supervisor: the old one had died"


def failures(items: Iterator[Collected]) -> Iterator[Collected]:
    """The items, and a last one instead of an exception if something cannot be reached."""
    try:
        yield from items
    except RemoteError as error:
        yield Collected("error", error.code, str(error))
