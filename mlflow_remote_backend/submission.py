"""The pipeline, top to bottom, one call per arrow: what the caller asked for -> a job that runs.

Everything up to ``compute.check`` creates nothing and may fail freely: :func:`plan` stops there. From
``tracking.open_run`` on a run exists, and a failure ends it with its reason before it is raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from . import compute as computes
from . import config as configuration
from . import project, secret_scan, snapshot, submission_folder
from .compute.base import Compute, JobHandle, Request, Secrets, bind
from .compute.loopback import loopback_proxies
from .compute.supervised import SupervisedCompute
from .config import BackendConfig, CliContext
from .errors import RemoteError, TrackingError
from .job import Diagnosis, EnvironmentRef, JobSpec, Phase, Reason, RunRef, SnapshotRef
from .project import Project
from .runner import command
from .tracking import PREFIX, RunView, Tracking, local_stores
from .tree import shown

#: Variables of the caller by which a program reaches MLflow and its artifact store. They travel as secrets.
FORWARDED = (
    "MLFLOW_TRACKING_",
    "MLFLOW_S3_",
    "AWS_",
    "AZURE_STORAGE_",
    "AZURE_CLIENT_",
    "AZURE_TENANT_",
    "DATABRICKS_",
)
#: Never forwarded though they match: they name things of this machine.
NOT_FORWARDED = frozenset({"MLFLOW_TRACKING_URI", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"})
#: They name files and doors of this machine, so they go no further.
HERE_ONLY = frozenset(
    {
        "MLFLOW_TRACKING_SERVER_CERT_PATH",
        "MLFLOW_TRACKING_CLIENT_CERT_PATH",
        "AWS_CA_BUNDLE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AZURE_CLIENT_CERTIFICATE_PATH",
        "DATABRICKS_CONFIG_FILE",
    }
)
#: Forwarded as they are: how the network is reached from here, which the job usually shares.
NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True)
class Order:
    """What the caller asked for, as MLflow hands it over. ``cli``: what only the command line knows."""

    uri: str
    entry_point: str
    parameters: Mapping[str, Any]
    version: str | None
    backend_config: Any = field(repr=False)
    tracking_uri: str
    experiment_id: str
    cli: CliContext | None = None


@dataclass(frozen=True)
class Plan:
    """What would happen. ``request``: the compute's rendering with placeholders for run and artifact URI; ``diff``: of
    what is packed, as it was then."""

    project: Project
    config: BackendConfig
    packed: snapshot.Snapshot
    diff: str = field(repr=False)
    request: Request
    notices: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Submission:
    """A job that runs, and what is needed to follow it."""

    run: RunRef
    handle: JobHandle
    compute: Compute
    config: BackendConfig
    tracking: Tracking


Say = Callable[[str], None]
T = TypeVar("T")

LEAVES_S = 5.0  # for packing and locking to put away what they are at, after one of them failed or a Ctrl-C


def plan(order: Order, say: Say = lambda line: None) -> Plan:
    """What a submission of this order would do. Creates nothing but caches. Raises RequestError, ServiceError."""
    with contextlib.ExitStack() as stack:
        planned, *_ = _understand(order, say, stack)
        return planned


def submit(order: Order, say: Say = lambda line: None) -> Submission:
    """Start the job. Blocks until it exists, not until it runs.

    Raises RequestError and ServiceError before anything exists; a failure after that ends the run first.
    """
    with contextlib.ExitStack() as stack:
        planned, compute, secrets, tracking, owner = _understand(order, say, stack)
        if planned.config.submission_id:
            stack.enter_context(submission_folder.only_one(planned.config.submission_id))
        earlier = _earlier_submission(tracking, order, planned)
        if earlier is not None and not _unfinished(earlier):
            handle = JobHandle(earlier.tag("handle"), earlier.tag("job_uid"))
            run = RunRef(earlier.run_id, earlier.experiment_id, earlier.artifact_uri, tracking.uri)
            return Submission(run, handle, compute, planned.config, tracking)
        run = _open_run(tracking, order, planned, earlier, owner)
        with _failure_ends(tracking, run, compute, planned.request.spec):
            handle = _start(tracking, run, planned, compute, secrets, earlier)
        return Submission(run, handle, compute, planned.config, tracking)


# -- understanding: nothing is created --------------------------------------------------------------------------------


def _understand(order: Order, say: Say, stack: contextlib.ExitStack) -> tuple[Plan, Compute, Secrets, Tracking, str]:
    """Also: who we are in the tag ``.owner``, for as long as the stack stands."""
    own = stack.enter_context(submission_folder.opened())
    found = stack.enter_context(
        project.fetch(order.uri, order.version, order.entry_point, order.parameters, scratch=own.path)
    )
    config = configuration.parse(order.backend_config, project_dir=found.own_dir, environ=os.environ, cli=order.cli)
    tracking = Tracking(order.tracking_uri)
    artifact_uri = tracking.preflight(order.experiment_id)
    seconds: dict[str, float] = {}
    (packed, diff), locked = _pack_and_lock(found, config, tracking, own.path, say, seconds)
    run = RunRef(
        experiment_id=order.experiment_id, artifact_uri=artifact_uri, tracking_uri=config.tracking_uri or tracking.uri
    )
    spec = describe(run, found, config, packed, locked)
    compute = computes.from_options(config.compute, spec.options)
    request = compute.render(spec)
    secrets = secrets_of(config, os.environ, locked)
    useless = useless_proxies(config, os.environ)
    notices = (
        *packed.warnings,
        *([f"{', '.join(useless)} name a proxy on this machine's loopback; pods do not get them."] if useless else ()),
        *compute.check(request, secrets),
    )
    for notice in notices:
        say(notice)
    return Plan(found, config, packed, diff, request, notices, seconds), compute, secrets, tracking, own.owner


def _pack_and_lock(
    found: Project, config: BackendConfig, tracking: Tracking, folder: Path, say: Say, seconds: dict[str, float]
) -> tuple[tuple[snapshot.Snapshot, str], EnvironmentRef]:
    """The snapshot with its diff and the lock, side by side: one reads the disk, the other waits for a solver."""
    stores = local_stores(tracking.uri)

    def pack() -> tuple[snapshot.Snapshot, str]:
        with timed(seconds, "snapshot"):
            listing = snapshot.scan(found.dir, config.snapshot, stores, required=_required(found))
            packed = snapshot.build(listing, folder)
            return packed, _diff(found, listing)

    def lock() -> EnvironmentRef:
        with timed(seconds, "environment"):
            return _locked(found, config, say)

    if config.env_manager == "local":
        return pack(), lock()
    from .environment import tool

    work = tool.Work()
    (packer, packing), (locker, locking) = _beside(pack), _beside(work.here()(lock))
    try:
        return packing.result(), locking.result()
    except BaseException:
        work.end()
        raise
    finally:
        for each in (packer, locker):
            each.join(LEAVES_S)


def _beside(function: Callable[[], T]) -> tuple[threading.Thread, Future[T]]:
    """In a thread that no process waits for before it ends, as it does for a pool's."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)

    thread = threading.Thread(target=run, name="submission", daemon=True)
    thread.start()
    return thread, future


def _required(found: Project) -> list[str]:
    """What the job cannot do without, whatever the ignore rules say: the environment file that MLproject names."""
    file = found.env_config_path
    if file is None or not file.resolve().is_relative_to(found.dir.resolve()):
        return []
    return [file.resolve().relative_to(found.dir.resolve()).as_posix()]


def _locked(found: Project, config: BackendConfig, say: Say) -> EnvironmentRef:
    """What the project declares, locked for the platform where the job runs; nothing to do for ``local``."""
    if config.env_manager == "local" or (config.env_manager is None and found.env_type == "docker"):
        return EnvironmentRef("docker" if found.env_type == "docker" else "local")
    from .environment import cache, locking, spec

    declared = spec.load(found.dir, found.env_type, found.env_config_path, config.env_manager, config.environment)
    elsewhere = config.compute not in ("local", "docker")
    locked = locking.lock(declared, platform_of(config), cache.default_root(), Narrator(say), elsewhere=elsewhere)
    for notice in locked.notices:
        say(notice)
    return locked


class Narrator:
    """Says what locking is at, at most once a second: a solver reports many times a second."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._next = 0.0

    def __call__(self, step: object) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 1.0
            self._say(str(step))


def write_lock(folder: str, backend_config: Mapping[str, Any], platforms: Sequence[str], say: Say) -> Path:
    """Solve the environment of the project in ``folder`` anew and write its lock file there; the file's path.

    ``say`` is told what is done, and what the user should know of the lock. Blocks while it is solved.
    """
    from .environment import cache, locking, spec

    path = Path(folder).absolute()
    env_type, env_config_path = project.declared_environment(path)
    config = configuration.parse(backend_config, project_dir=path, environ=os.environ)
    declared = spec.load(path, env_type, env_config_path, config.env_manager, config.environment)
    return locking.write_lock(declared, cache.default_root(), Narrator(say), lock_for=platforms, warn=say)


def _some(lines: Sequence[str], most: int = 20) -> list[str]:
    """The first lines for a person, and how many more there are."""
    more = [f"… and {len(lines) - most} more (--json has all)"] if len(lines) > most else []
    return [f"             {line}" for line in [*lines[:most], *more]]


def platform_of(config: BackendConfig) -> str:
    """Where the job runs, as conda names platforms: this machine's, in Docker Linux on the same processor, in a cluster
    linux-64, unless said otherwise."""
    from .environment import platforms

    if config.compute == "local":
        return platforms.host_platform()
    if config.compute == "docker":
        return platforms.linux_platform((config.docker.platform or platform.machine()).rpartition("/")[2])
    wanted = config.kubernetes.platform if config.compute == "kubernetes" else None
    return platforms.linux_platform((wanted or "linux/amd64").rpartition("/")[2])


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = time.monotonic() - start


def describe(
    run: RunRef,
    found: Project,
    config: BackendConfig,
    packed: snapshot.Snapshot,
    locked: EnvironmentRef,
) -> JobSpec:
    """All of it in one frozen value. ``run``: its id still a placeholder, its artifact URI the experiment's.

    Pure but for the submission id.
    """
    command.render(found.entry_point, *command.values_of(found.entry_point, found.parameters))
    return JobSpec(
        run=run,
        submission_id=config.submission_id or uuid.uuid4().hex,
        project_name=found.name,
        entry_point=found.entry_point,
        parameters=found.parameters,
        snapshot=packed.ref,
        environment=locked,
        compute=config.compute,
        resources=config.resources,
        limits=config.limits,
        retry=config.retry,
        env_vars=config.env_vars,
        secret_names=tuple(sorted(config.pass_env)),
        secret_refs=plain(config.secrets),
        outputs=config.outputs,
        log_limit_bytes=config.log_limit_bytes,
        register_model=plain(config.register_model) if config.register_model else None,
        labels=config.labels,
        annotations=config.annotations,
        docker_env=found.docker_env,
        options=config.options(),
        in_place=str(found.dir) if config.snapshot.in_place else "",
    )


def secrets_of(config: BackendConfig, environ: Mapping[str, str], locked: EnvironmentRef) -> Secrets:
    """What travels as secrets: ``pass_env``, by an open-ended rule all that may open MLflow or its store, and what the
    environment's indexes and channels are addressed with. Raises EnvironmentError_: one of these is not set."""
    forwarded = {key: value for key, value in environ.items() if key.startswith(FORWARDED) and key not in NOT_FORWARDED}
    elsewhere = {key: value for key, value in forwarded.items() if key not in HERE_ONLY}
    useless = useless_proxies(config, environ)
    network = {key: environ[key] for key in NETWORK if key in environ and key not in useless}
    of_program = forwarded if config.compute == "local" else elsewhere
    of_runner = elsewhere if config.compute == "kubernetes" else forwarded
    program = {**network, **of_program, **config.pass_env}
    runner = {**network, **of_runner, **_registry_credentials(config), **_index_credentials(config, locked)}
    return Secrets(program, runner)


def useless_proxies(config: BackendConfig, environ: Mapping[str, str]) -> list[str]:
    """Proxy variables that lead a pod to itself: those of a proxy on this machine's loopback. Docker tells them by its
    network."""
    if config.compute != "kubernetes":
        return []
    return loopback_proxies(environ)


def _registry_credentials(config: BackendConfig) -> dict[str, str]:
    """MLflow's ``docker_auth``, for whoever pulls and pushes images; a program never gets it."""
    if config.compute != "docker" or not config.docker.auth:
        return {}
    from .compute.docker.engine import AUTH_VARIABLE

    return {AUTH_VARIABLE: json.dumps(dict(config.docker.auth))}


def _index_credentials(config: BackendConfig, locked: EnvironmentRef) -> dict[str, str]:
    """For whoever makes the environment; on this machine that is a process with the caller's own variables."""
    if config.compute in ("local", "docker"):
        return {}
    from .environment import indexes

    return indexes.secrets((*locked.indexes, *locked.channels))


# -- creating: from here on a failure ends the run ---------------------------------------------------------------------


def _earlier_submission(tracking: Tracking, order: Order, planned: Plan) -> RunView | None:
    if not planned.config.submission_id:
        return None
    return tracking.find_submission(order.experiment_id, planned.config.submission_id)


def _unfinished(earlier: RunView) -> bool:
    """The earlier submission died before its job existed: this one continues it."""
    if earlier.ended or earlier.tag("phase") != Phase.CREATING.value:
        return False
    return submission_folder.lives(earlier.tag("owner")) is False


def _open_run(tracking: Tracking, order: Order, planned: Plan, earlier: RunView | None, owner: str) -> RunRef:
    config, found = planned.config, planned.project
    if earlier is not None:
        tracking.set_tags(earlier.run_id, {PREFIX + "owner": owner})
        return RunRef(earlier.run_id, earlier.experiment_id, earlier.artifact_uri, tracking.uri)
    tags = run_tags(planned, owner)
    if config.run_id:
        return tracking.reuse_run(config.run_id, tags=tags, params=found.logged_params, name=config.run_name or "")
    return tracking.open_run(order.experiment_id, tags=tags, name=config.run_name or "")


def run_tags(planned: Plan, owner: str) -> dict[str, str]:
    """The tags that a run has from its first moment: MLflow's own, as its local backend sets them, and ours."""
    from mlflow.utils import mlflow_tags as names

    spec, found = planned.request.spec, planned.project
    tags = {
        names.MLFLOW_USER: _user(),
        names.MLFLOW_SOURCE_NAME: found.source_name,
        names.MLFLOW_SOURCE_TYPE: "PROJECT",
        names.MLFLOW_PROJECT_ENTRY_POINT: found.entry_point.name,
        names.MLFLOW_PROJECT_BACKEND: "remote",
        names.MLFLOW_PROJECT_ENV: spec.environment.manager,
        names.MLFLOW_GIT_COMMIT: found.git.commit,
        names.MLFLOW_GIT_REPO_URL: found.git.repo_url,
        names.MLFLOW_GIT_BRANCH: found.version if found.is_branch else "",
        names.MLFLOW_PARENT_RUN_ID: _parent_run_id(planned.config.run_id or ""),
        PREFIX + "compute": planned.config.compute_name or spec.compute,
        PREFIX + "submission_id": spec.submission_id,
        PREFIX + "phase": Phase.CREATING.value,
        PREFIX + "owner": owner,
        PREFIX + "snapshot": spec.snapshot.digest,
        PREFIX + "environment": spec.environment.lock_key,
    }
    return {**{key: value for key, value in tags.items() if value}, **planned.config.tags}


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an arbitrary uid without a name, as in a pod
        return str(os.getuid())


def _parent_run_id(own: str) -> str:
    """The active run of this process; inside a job of ours, where none is active, that job's run."""
    import mlflow

    active = mlflow.active_run()
    parent = active.info.run_id if active else os.environ.get("MLFLOW_RUN_ID", "")
    return "" if parent == own else parent


@contextlib.contextmanager
def _failure_ends(tracking: Tracking, run: RunRef, compute: Compute, spec: JobSpec) -> Iterator[None]:
    """Whatever goes wrong now is written into the run before it is raised; what exists of the job is removed."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(RemoteError):
            tracking.finalise(run.run_id, _diagnosis(error), "submitter")
        with contextlib.suppress(RemoteError):
            handle = JobHandle(compute.handle_url(spec.bind(run, spec.snapshot)))
            compute.cancel(handle, grace_period_s=spec.limits.grace_period_s)
            compute.collect(handle)
        raise


def _diagnosis(error: BaseException) -> Diagnosis:
    if isinstance(error, KeyboardInterrupt):
        return Diagnosis(Reason.CANCELLED, "Cancelled while the job was being created.")
    code = getattr(error, "code", "")
    reason = Reason(code) if code in Reason.__members__ else Reason.BOOTSTRAP
    return Diagnosis(reason, f"The job could not be created: {error}")


def _start(
    tracking: Tracking, run: RunRef, planned: Plan, compute: Compute, secrets: Secrets, earlier: RunView | None
) -> JobHandle:
    """``earlier``: the submission that this one continues."""
    spec = planned.request.spec
    tracking.log_params(run.run_id, planned.project.logged_params)
    ours = run.tracking_uri if isinstance(compute, SupervisedCompute) else ""
    job_run = RunRef(run.run_id, run.experiment_id, run.artifact_uri, spec.run.tracking_uri, ours)
    url = compute.handle_url(spec.bind(job_run, spec.snapshot))
    tracking.set_tags(run.run_id, {PREFIX + "handle": url})
    stored = _store(tracking, run, planned, earlier)
    request = bind(compute, planned.request, job_run, stored, planned.packed.path)
    tracking.store_text(run.run_id, printable(request), "remote/job.yaml")
    handle = compute.submit(request, secrets)
    tags = {PREFIX + "job_uid": handle.uid, PREFIX + "image": handle.image}
    tags[PREFIX + "phase"] = Phase.QUEUED.value if handle.queued else ""
    with contextlib.suppress(TrackingError):  # the job runs, and is found by its URL: no reason to end it
        tracking.set_tags(run.run_id, {key: value for key, value in tags.items() if value})
    return handle


def _store(tracking: Tracking, run: RunRef, planned: Plan, earlier: RunView | None) -> SnapshotRef:
    """The snapshot with its archive in the artifact store: uploaded, unless the experiment holds it already.

    A submission that continues an earlier one names the archive that this one named: its job may exist already, and is
    known again by all that it was told.
    """
    packed, spec = planned.packed, planned.request.spec
    tracking.store_text(run.run_id, packed.listing.to_text(), "snapshot/files.txt")
    if spec.environment.lock:
        tracking.store_text(run.run_id, spec.environment.lock, f"environment/{lock_name(spec.environment)}")
    if planned.diff:
        tracking.store_text(run.run_id, planned.diff, "remote/uncommitted.diff")
    tracking.log_metrics(run.run_id, {f"remote/seconds_{key}": value for key, value in planned.seconds.items()})
    own = f"{run.artifact_uri}/snapshot/{packed.path.name}"
    if earlier is not None and earlier.tag("snapshot_stored") and earlier.tag("snapshot") == packed.digest:
        return dataclasses.replace(packed.ref, uri=own)
    held = tracking.stored_snapshot(run.experiment_id, packed.digest, packed.path.name)
    if held is not None:
        holder, uri = held
        pointer = f"runs:/{holder}/snapshot/{packed.path.name}\n"
        tracking.store_text(run.run_id, pointer, "snapshot/stored_in")
        return dataclasses.replace(packed.ref, uri=uri)
    tracking.store_file(run.run_id, packed.path, "snapshot")
    tracking.set_tags(run.run_id, {PREFIX + "snapshot_stored": "true"})  # by which later submissions find it
    return dataclasses.replace(packed.ref, uri=own)


def _diff(found: Project, listing: snapshot.Listing) -> str:
    """The uncommitted changes of what is packed. A line that was taken out may hold a credential, too."""
    diff = project.uncommitted(found, {entry.path for entry in listing.entries})
    secrets = () if listing.allow_secrets else secret_scan.find(re.sub(rb"(?m)^[-+ ]", b"", diff))
    if secrets:
        lines = "".join(f"line {each.line}: {each.rule}\n" for each in secrets)
        return f"The diff is left out, since it holds credentials:\n{lines}"
    return diff.decode(errors="replace")


def lock_name(locked: EnvironmentRef) -> str:
    """The lock's usual file name, by which conda-lock, conda and uv know it."""
    return "conda-lock.yml" if locked.kind == "conda-lock" else "requirements.txt"


def printable(request: Request) -> str:
    """What was (or would be) submitted, as YAML. Holds no secret by construction: a request never does."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # in C where PyYAML has it: many submissions feel it
    return str(yaml.dump(plain(request.document), Dumper=dumper, sort_keys=False, allow_unicode=True, width=120))


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as the dicts and lists that JSON and YAML know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(each) for each in value]
    return value


def plan_data(planned: Plan) -> dict[str, Any]:
    """A plan as plain data, for ``mlflow-remote plan --json``."""
    spec, packed = planned.request.spec, planned.packed
    return {
        "project": {"uri": planned.project.source_name, "entry_point": spec.entry_point.name},
        "compute": planned.config.compute_name or spec.compute,
        "parameters": dict(spec.parameters),
        "snapshot": {
            "digest": packed.digest,
            "size_bytes": packed.size_bytes,
            "files": [each.path for each in packed.listing.entries if each.sha256],
            "left_out": {each.path: each.rule for each in packed.listing.left_out},
        },
        "environment": {"manager": spec.environment.manager, "lock_key": spec.environment.lock_key},
        "request": plain(planned.request.document),
        "notices": list(planned.notices),
        "seconds": dict(planned.seconds),
    }


def plan_text(planned: Plan) -> str:
    """A plan for people: what would be packed, used and created."""
    data = plan_data(planned)
    packed, request = data["snapshot"], data.pop("request")
    locked = data["environment"]["lock_key"] or f"none of its own ({data['environment']['manager']})"
    lines = [
        f"project      {data['project']['uri']}, entry point {data['project']['entry_point']}",
        f"compute      {data['compute']}",
        *(f"parameter    {name} = {shown(value)}" for name, value in planned.project.logged_params.items()),
        f"snapshot     {len(packed['files'])} files, {packed['size_bytes']} bytes packed, {packed['digest']}",
        *_some([shown(path) for path in packed["files"]]),
        *_some([f"left out: {shown(path)} ({shown(rule)})" for path, rule in packed["left_out"].items()]),
        f"environment  {locked}",
        *(f"notice       {line}" for line in data["notices"]),
        "would create:",
        yaml.safe_dump(request, sort_keys=False, allow_unicode=True, width=120).rstrip(),
    ]
    return "\n".join(lines)
