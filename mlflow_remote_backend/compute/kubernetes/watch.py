"""What a namespace's API shows of our jobs, kept current in memory: one list and one watch per kind.

All followers of a process that look at a namespace share one :class:`View`. The end of a watch says nothing: state
comes from lists, watches only make it current sooner, and a list is read anew every few seconds as a second witness.
Without the right to watch, lists alone do. Objects are kept trimmed (``objects.trimmed``).
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ComputeError
from . import names, objects
from .api import Api, ApiError

WATCH_S = 15.0  # one watch; it ends on the server, and a silent connection is found out soon after
RELIST_S = 15.0
RELIST_MANY_S = 60.0  # from MANY objects on
MANY = 50
UNWATCHED_S = 3.0  # between lists where watching is not allowed
FOLLOWED_WITHIN_S = 10.0  # a second look within this time begins a watch
FEW = 4  # looks at more jobs than that begin one, too: one by one they may take longer than that time
IDLE_S = 60.0  # a view that nobody looked at for so long ends
BRIEF_S = 2.0  # a watch that ended sooner told nothing: lists have to, at this pace at most, until one lasts
STALE_S = 45.0  # a view that got no answer for so long is not believed


@dataclass(frozen=True)
class Kind:
    """A kind of object in one namespace, narrowed by ``query``."""

    path: str
    query: Mapping[str, str] = field(default_factory=dict)


class Reflection:
    """The objects of one kind, by uid, as the API last showed them. A thread of its own keeps them current."""

    def __init__(self, api: Api, kind: Kind) -> None:
        self._api = api
        self._kind = kind
        self._objects: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._version = ""
        self._listed_at = 0.0
        self._brief = 0  # how many watches in a row ended too soon
        self.heard_at = 0.0  # monotonic time of the last answer
        # The server's clock minus our monotonic one, which nobody sets, and which a sleeping laptop stops: after it all
        # that is known is too old, and must not be judged by what the time is now.
        self.clock_offset_s = 0.0
        self.watchable = True
        self.failure: ComputeError | None = None

    def start(self) -> None:
        threading.Thread(target=self._run, name=f"watch {self._kind.path}", daemon=True).start()

    def end(self) -> None:
        self._ending.set()

    def all(self) -> list[dict[str, Any]]:
        with self._lock:
            return list(self._objects.values())

    def _run(self) -> None:
        failures = 0
        while not self._ending.is_set():
            try:
                self._turn()
                self.failure, failures = None, 0
            except ComputeError as error:  # also of a login that cannot be renewed now
                self.failure = error
                self._version = ""
                failures += 1
                pause_s = min(10.0, 0.2 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0)
                self._ending.wait(max(pause_s, getattr(error, "retry_after_s", None) or 0.0))

    def _turn(self) -> None:
        if not self._version or time.monotonic() - self._listed_at > self._relist_s():
            self._list()
        if not self.watchable:
            self._version = ""
            self._ending.wait(UNWATCHED_S)
            return
        began = time.monotonic()
        try:
            self._watch()
        except ApiError as error:
            if error.status == 403:
                self.watchable = False
            elif error.status:
                raise
            else:  # cut off or silent: what is known stays, the next watch goes on from here or a list tells
                self._ending.wait(random.uniform(0.05, 0.5))
        if time.monotonic() - began < BRIEF_S:
            self._brief += 1
            self._version = ""
            self._ending.wait(min(BRIEF_S, 0.1 * 2**self._brief) * random.uniform(0.5, 1.0))
        else:
            self._brief = 0

    def _relist_s(self) -> float:
        return RELIST_MANY_S if len(self._objects) >= MANY else RELIST_S

    def _list(self) -> None:
        found, page = self._api.items(self._kind.path, patience_s=0.0, **self._kind.query)
        with self._lock:
            self._objects = {objects.uid(each): objects.trimmed(each) for each in found}
        self._version = str(page.body.get("metadata", {}).get("resourceVersion") or "")
        self._listed_at = time.monotonic()
        self._heard(page.server_time)

    def _heard(self, server_time: float = 0.0) -> None:
        self.heard_at = time.monotonic()
        if server_time:
            self.clock_offset_s = server_time - time.monotonic()
        elif not self.clock_offset_s:  # somebody on the way drops the header
            self.clock_offset_s = time.time() - time.monotonic()

    def _watch(self) -> None:
        blocks = self._api.stream(
            self._kind.path,
            read_timeout_s=WATCH_S + 5.0,
            watch="true",
            allowWatchBookmarks="true",
            resourceVersion=self._version,
            timeoutSeconds=round(WATCH_S * random.uniform(0.8, 1.2)),
            **self._kind.query,
        )
        with contextlib.closing(blocks):
            for line in lines(blocks):
                if self._ending.is_set() or not self._take(line):
                    return
        self._heard()  # its regular end

    def _take(self, line: bytes) -> bool:
        """One event. False where the watch has to begin anew from a list (410, or what we do not understand)."""
        try:
            event = json.loads(line)
            kind, thing = event["type"], event["object"]
        except (ValueError, KeyError, TypeError):
            self._version = ""
            return False
        if kind == "ERROR":
            self._version = ""
            return False
        self._version = str(objects.metadata(thing).get("resourceVersion") or self._version)
        self._heard()
        with self._lock:
            if kind == "DELETED":
                self._objects.pop(objects.uid(thing), None)
            elif kind in ("ADDED", "MODIFIED"):
                self._objects[objects.uid(thing)] = objects.trimmed(thing)
        return True


def lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Complete lines of a byte stream, without their ends. A last line without one is incomplete: it is dropped."""
    held = b""
    for block in blocks:
        *complete, held = (held + block).split(b"\n")
        yield from complete


class View:
    """The Jobs and pods that the followers of this process look at, in one namespace."""

    def __init__(self, api: Api, namespace: str, job: str = "") -> None:
        """``job``: the only one; empty: all of ours."""
        self.job_name = job
        jobs, pods = {"labelSelector": names.SELECTOR}, {"labelSelector": names.SELECTOR}
        if job:
            jobs, pods = {"fieldSelector": f"metadata.name={job}"}, {"labelSelector": f"{names.JOB_NAME}={job}"}
        self._jobs = Reflection(api, Kind(f"/apis/batch/v1/namespaces/{namespace}/jobs", jobs))
        self._pods = Reflection(api, Kind(f"/api/v1/namespaces/{namespace}/pods", pods))
        self.asked_at = time.monotonic()
        self._jobs.start()
        self._pods.start()

    def end(self) -> None:
        self._jobs.end()
        self._pods.end()

    def look(self, job: str) -> tuple[dict[str, Any] | None, list[dict[str, Any]], float] | None:
        """The Job, the pods of its name, and the server's time; None while this view is not to be believed."""
        self.asked_at = time.monotonic()
        if time.monotonic() - min(self._jobs.heard_at, self._pods.heard_at) > STALE_S:
            return None
        found = next((each for each in self._jobs.all() if objects.name(each) == job), None)
        pods = [each for each in self._pods.all() if objects.label(each, names.JOB_NAME) == job]
        return found, pods, time.monotonic() + self._jobs.clock_offset_s


class Views:
    """The views of this process: at most one per cluster and namespace, begun when somebody follows."""

    def __init__(self) -> None:
        self._views: dict[tuple[int, str], View] = {}
        self._looks: dict[tuple[int, str], dict[str, float]] = {}  # job -> when it was looked at last
        self._lock = threading.Lock()

    def followed(self, api: Api, namespace: str, job: str) -> bool:
        """Notes a look at a job. Whether it is worth a view: a second look at it soon after, or looks at several."""
        now = time.monotonic()
        with self._lock:
            looks = self._looks.setdefault((id(api), namespace), {})
            for stale in [each for each, at in looks.items() if now - at > FOLLOWED_WITHIN_S]:
                del looks[stale]
            again = job in looks
            looks[job] = now
            return again or len(looks) > FEW

    def view(self, api: Api, namespace: str, job: str) -> View:
        """A view that covers the job: of this one alone where no other is looked at, else of all of ours."""
        key = (id(api), namespace)
        with self._lock:
            self._drop_idle()
            held = self._views.get(key)
            if held is None:
                alone = len(self._looks.get(key, ())) <= 1
                held = self._views[key] = View(api, namespace, job if alone else "")
            elif held.job_name not in ("", job):
                held.end()
                held = self._views[key] = View(api, namespace)
            return held

    def _drop_idle(self) -> None:
        for key, view in list(self._views.items()):
            if time.monotonic() - view.asked_at > IDLE_S:
                view.end()
                del self._views[key]


VIEWS = Views()
