"""Frozen values that describe a job and what became of it. Pure: no input, no output, imports only ``errors``.

The words: a *project* has *entry points*; a *job spec* says completely what shall run; a compute renders it into a
*request*; what the compute then runs is the *job*, found again by its *handle*; what it did is in MLflow's *run*.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Phase(str, enum.Enum):
    """Where a job is, in the order in which it gets there. A job only moves forward (or is DONE)."""

    CREATING = "creating"  # the run exists, the job not yet
    QUEUED = "queued"  # a queue or a scheduler holds it back
    STARTING = "starting"  # it has a place; images are pulled, containers made
    PREPARING = "preparing"  # our runner fetches the snapshot and makes the environment
    RUNNING = "running"  # the program runs
    FINALIZING = "finalizing"  # the program has ended; log and outputs are uploaded
    DONE = "done"  # the final status is written

    def order(self) -> int:
        return list(Phase).index(self)


class Reason(str, enum.Enum):
    """Why a run ended as it did: the stable codes of the tag ``mlflow_remote.reason``. Never renamed."""

    OK = "OK"
    USER_ERROR = "USER_ERROR"  # the program ended with another exit code than 0
    OOM = "OOM"  # killed by a memory limit
    TIMEOUT = "TIMEOUT"  # the program ran longer than ``timeout``
    START_TIMEOUT = "START_TIMEOUT"  # it did not start within ``start_timeout``
    CANCELLED = "CANCELLED"  # somebody asked for it
    TERMINATED = "TERMINATED"  # stopped from outside by SIGTERM, nobody asked us
    KILLED_BY_SYSTEM = "KILLED_BY_SYSTEM"  # SIGKILL that was neither ours nor a known memory limit
    IMAGE_PULL = "IMAGE_PULL"
    CONTAINER_CONFIG = "CONTAINER_CONFIG"
    UNSCHEDULABLE = "UNSCHEDULABLE"
    QUOTA = "QUOTA"
    REFUSED = "REFUSED"  # PodSecurity or another admission rule
    VOLUME = "VOLUME"
    EVICTED = "EVICTED"
    PREEMPTED = "PREEMPTED"
    NODE_LOST = "NODE_LOST"
    NODE_REJECTED = "NODE_REJECTED"
    JOB_DELETED = "JOB_DELETED"
    NAMESPACE_TERMINATING = "NAMESPACE_TERMINATING"
    SNAPSHOT_CORRUPT = "SNAPSHOT_CORRUPT"
    ENVIRONMENT = "ENVIRONMENT"  # the environment could not be made where the job runs
    BOOTSTRAP = "BOOTSTRAP"  # our runner could not start the program
    TRACKING_UNREACHABLE = "TRACKING_UNREACHABLE"
    TRACKING_AUTH = "TRACKING_AUTH"
    FINALIZE_INCOMPLETE = "FINALIZE_INCOMPLETE"  # the program ended well, uploading did not


#: Reasons that end a run as KILLED; OK ends it as FINISHED; every other one as FAILED.
KILLED_REASONS = frozenset({Reason.CANCELLED})


#: Reasons that say no more than how it looked from inside: whoever knows what was behind it may tell that instead.
VAGUE_REASONS = frozenset({Reason.TERMINATED, Reason.KILLED_BY_SYSTEM})


def final_status(reason: Reason) -> str:
    """MLflow's terminal status (a RunStatus name) for a reason: the one table that decides it."""
    if reason is Reason.OK:
        return "FINISHED"
    return "KILLED" if reason in KILLED_REASONS else "FAILED"


@dataclass(frozen=True)
class Parameter:
    """A parameter of an entry point as MLproject declares it. ``type``: string, float, path or uri."""

    name: str
    type: str = "string"
    default: Any = None


@dataclass(frozen=True)
class EntryPoint:
    """An entry point: its command template (``{name}`` placeholders) and its declared parameters, in order."""

    name: str
    command: str
    parameters: tuple[Parameter, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What the program may use. ``cpu``: cores; ``gpu``: count of ``gpu_resource``; None: no limit."""

    cpu: float | None = None
    memory_bytes: int | None = None
    gpu: int | None = None
    gpu_resource: str = "nvidia.com/gpu"
    shm_size_bytes: int | None = None
    ephemeral_storage_bytes: int | None = None


@dataclass(frozen=True)
class Limits:
    """How long, in seconds, each thing may take. None: no limit."""

    timeout_s: float | None = None  # the program
    grace_period_s: float = 30.0  # from SIGTERM to SIGKILL
    finalize_timeout_s: float = 1800.0  # uploading and finalising after the program
    start_timeout_s: float = 1800.0
    image_pull_timeout_s: float = 600.0
    node_lost_timeout_s: float = 900.0


@dataclass(frozen=True)
class Retry:
    """``max_attempts`` counts the first one. ``on``: any of ``disruption``, ``oom``; ``exit_codes``: of the program."""

    max_attempts: int = 1
    on: tuple[str, ...] = ()
    exit_codes: tuple[int, ...] = ()


@dataclass(frozen=True)
class SnapshotRef:
    """A packed project. ``digest``: ``sha256:…`` of its content, however the archive of ``size_bytes`` is compressed.

    ``uri``: where a job fetches it, empty until stored. ``unpacked_bytes``, ``entries``: its totals, by which unpacking
    is bounded; 0 where they are not known.
    """

    digest: str
    size_bytes: int
    uri: str = ""
    unpacked_bytes: int = 0
    entries: int = 0


@dataclass(frozen=True)
class EnvironmentRef:
    """The software a job needs. ``manager``: conda, virtualenv, uv, local (what is there) or docker (the image).

    ``lock_key`` is empty for local and docker; ``lock``: the lock file's text, which travels with the job.
    ``kind``: format of the lock, ``conda-lock`` or ``requirements``. ``python``: version wanted, for a venv.
    ``indexes``: option lines (``--index-url URL``) and ``channels``: lines ``NAME URL``, where packages are fetched,
    with ``${NAME}`` for credentials; ``files``: where a file of that sha256 was seen, for locks that do not say it.
    ``env_vars``: what the environment sets. ``notices``: one line each, for a person.
    """

    manager: str = "local"
    kind: str = ""
    lock_key: str = ""
    lock: str = ""
    platform: str = ""
    python: str = ""
    indexes: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    env_vars: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunRef:
    """MLflow's run that records the job. Before it is opened the fields hold placeholders."""

    run_id: str = "RUN_ID"
    experiment_id: str = ""
    artifact_uri: str = "ARTIFACT_URI"
    tracking_uri: str = ""  # as the job reaches it, without credentials
    submitter_uri: str = ""  # as a supervisor on the submitter's machine reaches it; empty: the same

    @property
    def at_submitter(self) -> RunRef:
        """The run as the submitter's machine reaches it."""
        return dataclasses.replace(self, tracking_uri=self.submitter_uri or self.tracking_uri)

    @property
    def opened(self) -> bool:
        return self.run_id != "RUN_ID"


@dataclass(frozen=True)
class JobSpec:
    """All that a compute needs to know to run a job, whole and printable. Holds no credential: those travel apart."""

    run: RunRef
    submission_id: str
    project_name: str
    entry_point: EntryPoint
    parameters: Mapping[str, str]
    snapshot: SnapshotRef
    environment: EnvironmentRef
    compute: str = "local"
    resources: Resources = field(default_factory=Resources)
    limits: Limits = field(default_factory=Limits)
    retry: Retry = field(default_factory=Retry)
    env_vars: Mapping[str, str] = field(default_factory=dict)
    secret_names: tuple[str, ...] = ()  # names of variables that travel as secrets; values are in Secrets
    secret_refs: Mapping[str, Any] = field(default_factory=dict)  # references to secrets that exist at the compute
    outputs: tuple[str, ...] = ("outputs",)
    log_limit_bytes: int | None = None
    register_model: Mapping[str, Any] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    docker_env: Mapping[str, Any] | None = None  # the project's docker_env, as MLproject has it
    options: Mapping[str, Any] = field(default_factory=dict)  # the compute's own section of backend_config
    in_place: str = ""  # local only: run in this folder instead of an unpacked snapshot

    def bind(self, run: RunRef, snapshot: SnapshotRef) -> JobSpec:
        """The same spec with the placeholders of run and snapshot filled in."""
        return dataclasses.replace(self, run=run, snapshot=snapshot)


@dataclass(frozen=True)
class Diagnosis:
    """Structured cause of a wait or a failure. ``words``: the other system's own; ``hint``: what to do next.

    ``fatal``: the job cannot succeed any more. Otherwise the cause may pass, and ``patience_s`` says how long to wait
    (None: the compute's start timeout).
    """

    reason: Reason
    message: str
    words: str = ""
    hint: str = ""
    fatal: bool = True
    patience_s: float | None = None


@dataclass(frozen=True)
class JobStatus:
    """What a compute knows of a job right now.

    ``gone``: proof that no runner of ours will write the final status any more (the process is dead, the pod has
    ended or does not exist). Only then may somebody else finalise. ``exit_code``: of the program, where known.
    ``attempt``: counts from 0.
    """

    phase: Phase
    diagnosis: Diagnosis | None = None
    exit_code: int | None = None
    gone: bool = False
    attempt: int = 0
    job_uid: str = ""
    detail: str = ""  # one line for a person who waits: "pulling image …"


@dataclass(frozen=True)
class LogChunk:
    """Bytes of a job's log. ``offset``: position of the first byte in the attempt's log."""

    offset: int
    data: bytes
    attempt: int = 0
