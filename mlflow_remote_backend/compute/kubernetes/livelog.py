"""The live log: frames that the pod's sidecar writes, read through the API as raw bytes.

What is not a frame is not the program's: the kubelet writes errors of its own into a log that it serves with status
200. The end of a stream says nothing: kubelet, API server and every middlebox cut streams at will. A reading that is
begun anew asks for the last second again, and offsets tell what is known already.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...job import LogChunk
from ...runner.frames import HEARTBEAT_S, Frame, parse_frame
from . import objects
from .api import Api, ApiError
from .manifest import OBSERVE
from .watch import lines

SILENCE_S = 2 * HEARTBEAT_S  # without a heartbeat for so long, the connection is dead
PATIENCE_S = 10.0  # for what is there already
MAX_STREAMS = 20  # of this process: a node serves little more than a hundred (inotify instances of the kubelet)
FIRST_PAUSE_S = 0.2
LAST_PAUSE_S = 10.0

_STREAMS = threading.BoundedSemaphore(MAX_STREAMS)


@dataclass
class Position:
    """How far one pod's log has been read: the cursor behind it, and when (the node's clock) that was written."""

    offset: int = 0
    timestamp: str = ""


@dataclass
class Cursor:
    """What the reader has: so many bytes of this attempt's log."""

    attempt: int
    offset: int

    def fresh(self, frame: Frame) -> LogChunk | None:
        """What of a log frame lies behind the cursor, which moves on."""
        if frame.kind != "log" or frame.attempt < self.attempt:
            return None
        if frame.attempt > self.attempt:
            self.attempt, self.offset = frame.attempt, 0
        known = max(0, self.offset - frame.offset)
        if known >= len(frame.data):
            return None
        self.offset = frame.offset + len(frame.data)
        return LogChunk(frame.offset + known, frame.data[known:], frame.attempt)


@dataclass
class LiveLog:
    """The log of one job over all its attempts. Not for two readers at once."""

    end: Mapping[str, Any] = field(default_factory=dict)  # what the sidecar said last; empty while it goes on
    _positions: dict[str, Position] = field(default_factory=dict)  # by pod uid
    _complete: set[str] = field(default_factory=set)  # uids of pods whose end frame was seen
    _failures: int = 0  # in a row, without a frame between
    _not_before: float = 0.0
    forbidden: bool = False

    def read(
        self,
        api: Api,
        namespace: str,
        pods: list[Mapping[str, Any]],
        offset: int,
        attempt: int,
        *,
        follow: bool,
    ) -> Iterator[LogChunk]:
        """Chunks from ``offset`` of ``attempt`` on, then of later attempts. Raises nothing.

        With ``follow`` until the sidecar has said its last word or the stream breaks off; else what is there now. Which
        attempt a pod is its frames tell: Kubernetes counts from 0 again when a queue starts a job anew.
        """
        if self.forbidden or time.monotonic() < self._not_before or not _STREAMS.acquire(blocking=False):
            return
        try:
            cursor = Cursor(attempt, offset)
            for pod in sorted(pods, key=lambda pod: (objects.attempt(pod), objects.created_at(pod))):
                if objects.uid(pod) not in self._complete and _talks(pod):
                    yield from self._read_pod(api, namespace, pod, cursor, follow and not objects.ended(pod))
            self._failures = 0
        except ApiError as error:
            self.forbidden = error.status == 403
            self._failures += 1
            self._pause(error)
        finally:
            _STREAMS.release()

    def _pause(self, error: ApiError) -> None:
        longest_s = min(LAST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._failures, 10))
        pause_s = max(random.uniform(longest_s / 2, longest_s), error.retry_after_s or 0.0)
        self._not_before = time.monotonic() + pause_s

    def _read_pod(
        self, api: Api, namespace: str, pod: Mapping[str, Any], cursor: Cursor, follow: bool
    ) -> Iterator[LogChunk]:
        position = self._positions.setdefault(objects.uid(pod), Position())
        known = position.timestamp if cursor.offset >= position.offset else ""
        blocks = api.stream(
            f"/api/v1/namespaces/{namespace}/pods/{objects.name(pod)}/log",
            read_timeout_s=SILENCE_S if follow else PATIENCE_S,
            container=OBSERVE,
            follow="true" if follow else "",
            timestamps="true",
            sinceTime=known,
        )
        heard = False
        with contextlib.closing(blocks):
            for line in lines(blocks):
                timestamp, _, text = line.partition(b" ")
                frame = parse_frame(text)
                if frame is None:
                    continue
                heard = True
                self._failures = 0
                position.timestamp = timestamp.decode("ascii", "replace")
                chunk = cursor.fresh(frame)
                if chunk is not None:
                    position.offset = cursor.offset
                    yield chunk
                if frame.kind == "end":
                    self._take_end(pod, frame)
                    return
        self._after_stream(pod, heard)

    def _take_end(self, pod: Mapping[str, Any], frame: Frame) -> None:
        self._complete.add(objects.uid(pod))
        if not frame.fields.get("retry"):
            self.end = dict(frame.fields)

    def _after_stream(self, pod: Mapping[str, Any], heard: bool) -> None:
        if objects.ended(pod):
            self._complete.add(objects.uid(pod))
        elif not heard:  # the kubelet's own words instead of frames: not again at once
            self._failures += 1
            self._not_before = time.monotonic() + min(LAST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._failures, 10))


def _talks(pod: Mapping[str, Any]) -> bool:
    """Its sidecar has been started, so that it has a log."""
    return objects.container(pod, OBSERVE).state in ("running", "terminated")
