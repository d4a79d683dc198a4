"""The servers' log, of pods that come and go: one thread for each container that is followed.

The kubelet ends streams at will, so one that breaks off is begun anew where it was; what was read before is known by
the kubelet's own timestamps.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...compute.kubernetes import objects
from ...compute.kubernetes.api import Api, ApiError
from ...compute.kubernetes.objects import Raw
from .manifest import MAIN, PODS, PREPARE

SILENCE_S = 60.0  # a server may have nothing to say: then the stream is begun anew
LOOK_S = 1.0  # for pods that have come
PAUSE_S = 0.5
QUEUED_BLOCKS = 1000


def once(
    api: Api, namespace: str, pod: str, container: str, *, tail: int | None = None, previous: bool = False
) -> bytes:
    """What the container has written until now; empty where it has not started. Raises ApiError."""
    query: dict[str, Any] = {"container": container, "tailLines": tail, "previous": "true" if previous else None}
    try:
        return b"".join(api.stream(f"{PODS.path(namespace, pod)}/log", read_timeout_s=SILENCE_S, **query))
    except ApiError as error:
        if error.status in (400, 404):
            return b""
        raise


class Followers:
    """Follows containers as they appear; ``blocks`` yields what all of them write. Not for two readers at once."""

    def __init__(self, api: Api, namespace: str, containers: Sequence[str] = (MAIN,), tail: int | None = None) -> None:
        self._api = api
        self._namespace = namespace
        self._containers = containers
        self._tail = tail
        self._blocks: queue.Queue[bytes] = queue.Queue(QUEUED_BLOCKS)
        self._known: set[tuple[str, str, int]] = set()
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()

    def look(self, pods: Sequence[Raw]) -> None:
        """Begin to follow the containers of these pods that run, or have run, and are not followed yet."""
        for pod in pods:
            for each in objects.containers(pod):
                key = (objects.name(pod), each.name, each.restarts)
                if each.name in self._containers and each.state in ("running", "terminated") and key not in self._known:
                    self._known.add(key)
                    thread = threading.Thread(target=self._follow, args=key[:2], name=f"log {key[0]}", daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def blocks(self, wait_s: float = 0.0) -> Iterator[bytes]:
        """What has come since; waits ``wait_s`` at most for the first."""
        with contextlib.suppress(queue.Empty):
            yield self._blocks.get(timeout=wait_s) if wait_s else self._blocks.get_nowait()
            while True:
                yield self._blocks.get_nowait()

    def alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads) or not self._blocks.empty()

    def stop(self) -> None:
        """The threads end with their streams; nobody waits for them."""
        self._stop.set()

    def _follow(self, pod: str, container: str) -> None:
        path = f"{PODS.path(self._namespace, pod)}/log"
        last, tail = "", self._tail
        while not self._stop.is_set():
            query = {"container": container, "follow": "true", "timestamps": "true", "tailLines": tail}
            since = {"sinceTime": last} if last else {}
            held, known = b"", last
            try:
                for block in self._api.stream(path, read_timeout_s=SILENCE_S, **query, **since):
                    *lines, held = (held + block).split(b"\n")
                    last = self._pass_on(lines, known) or last
                    if self._stop.is_set():
                        return
                self._pass_on([held] if held else [], known)
                return  # the container has ended
            except ApiError as error:
                if not error.transient and error.status != 400:
                    return  # the pod is gone, or its log is not ours to read
            tail = None if last else tail
            self._stop.wait(PAUSE_S)

    def _pass_on(self, lines: Sequence[bytes], known: str) -> str:
        """Lines that are newer than what is known, without the kubelet's timestamps, which have a fixed width; the last
        one's."""
        fresh: list[bytes] = []
        last = ""
        for line in lines:
            stamp, _, text = line.partition(b" ")
            last = stamp.decode(errors="replace")
            if last > known:
                fresh.append(text + b"\n")
        if fresh and not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._blocks.put(b"".join(fresh), timeout=SILENCE_S)
        return last


def follow(
    api: Api, namespace: str, pods: Callable[[], Sequence[Raw] | None], tail: int | None = None
) -> Iterator[bytes]:
    """The log of the servers, of all pods that there are and that come, until ``pods`` says None: it is gone."""
    followers = Followers(api, namespace, (PREPARE, MAIN) if tail is None else (MAIN,), tail)
    next_look, there = 0.0, True
    try:
        while there or followers.alive():
            if there and time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_S
                found = pods()
                there = found is not None
                followers.look(found or ())
            yield from followers.blocks(wait_s=0.2)
    finally:
        followers.stop()
