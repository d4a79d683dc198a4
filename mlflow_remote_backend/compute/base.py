"""What every compute must be able to do: six verbs and their contract.

A compute is stateless but for connections: everything it needs to find a job again is in the job's handle, a URL
that stands in the run's tag ``mlflow_remote.handle``. ``testing.ComputeContract`` checks the numbered behaviours
below on a real compute; they hold for every compute, ours and others'.

1.  ``render`` is pure: same spec, same request, no input or output.
2.  ``check`` creates nothing. It raises before anything exists if the job could never run: compute out of reach, no
    right to create, a tracking URI that is useless where the job runs. It returns notices on what it could not check.
3.  ``submit`` returns as soon as the job's existence is durable, and does not wait for it to start. Submitting the same
    bound request twice gives one job and equal handles.
4.  A submitted job runs to its end, and its run is finalised, with nobody watching.
5.  ``status`` never blocks longer than a few seconds, never guesses: contact lost raises a transient ComputeError, and
    ``gone`` is only set on proof that no runner of ours will write the final status.
6.  ``logs`` yields the program's bytes in order from the given offset, each byte once, for as long as the source lasts;
    its end says nothing about the job. It raises nothing: a source out of reach is an empty iterator. Only with
    ``follow`` may it wait for more to come.
7.  ``cancel`` is idempotent, returns within the grace period and some seconds, and leaves no process, container or pod.
8.  ``collect`` removes what a finished job left at the compute (not caches). Idempotent.
9.  ``recover`` is for a job whose runner died: where what it left behind lets another runner of ours finish the run
    (a spool on this machine), it starts that one and returns True. Otherwise False: the caller finalises on proof.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..job import JobSpec, JobStatus, LogChunk, RunRef, SnapshotRef


@dataclass(frozen=True)
class Secrets:
    """Values that must never be printed: they reach the program's (``program``) or only our runner's (``runner``)
    environment."""

    program: Mapping[str, str] = field(default_factory=dict, repr=False)
    runner: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Request:
    """One compute's rendering of a job spec. ``document`` is plain data, printable as YAML, and holds no secret value.

    ``archive``: the packed project on this machine, where a compute that can read it need not fetch it.
    """

    spec: JobSpec
    document: Mapping[str, Any] = field(default_factory=dict)
    archive: Path | None = None


@dataclass(frozen=True)
class JobHandle:
    """Where a job is: a URL (``local://MACHINE_ID/RUN_ID``, ``docker://…``, ``kubernetes://…``).

    ``uid`` names the very job (a Job's uid, a container's id, pid and start time), so that a namesake is never touched.
    ``image``: what the program's image is pinned to, where the compute knows; only for the run's record, as ``queued``:
    a queue holds the job back, and nothing of it has begun.
    """

    url: str
    uid: str = ""
    image: str = field(default="", compare=False)
    queued: bool = field(default=False, compare=False)

    @property
    def scheme(self) -> str:
        return self.url.split("://", 1)[0]


class Compute(Protocol):
    """The verbs; see the module's numbered contract."""

    name: str

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Compute:
        """The compute with its own section of backend_config. Connects to nothing."""
        ...

    @classmethod
    def from_handle(cls, handle: JobHandle) -> Compute:
        """The compute that finds this job again, from the handle alone. Connects to nothing."""
        ...

    def render(self, spec: JobSpec) -> Request: ...

    def check(self, request: Request, secrets: Secrets) -> Sequence[str]: ...

    def handle_url(self, spec: JobSpec) -> str:
        """The handle of the job of this bound spec, before the job exists: derived from the run id."""
        ...

    def submit(self, request: Request, secrets: Secrets) -> JobHandle: ...

    def status(self, handle: JobHandle) -> JobStatus: ...

    def logs(
        self, handle: JobHandle, *, offset: int = 0, attempt: int = 0, follow: bool = False
    ) -> Iterator[LogChunk]: ...

    def cancel(self, handle: JobHandle, *, grace_period_s: float = 30.0) -> None: ...

    def collect(self, handle: JobHandle) -> None: ...

    def recover(self, handle: JobHandle) -> bool: ...


def bind(compute: Compute, request: Request, run: RunRef, snapshot: SnapshotRef, archive: Path | None) -> Request:
    """The request with the placeholders of run and snapshot filled in, rendered anew."""
    return dataclasses.replace(compute.render(request.spec.bind(run, snapshot)), archive=archive)
