"""The ``kubernetes`` compute: a Job in any cluster that a kubeconfig or a service account reaches.

| what | how |
|---|---|
| isolation | one pod per attempt, PodSecurity ``restricted``, no service account token |
| outlives the submitter | yes: a sidecar uploads and finalises, whoever watches |
| live log | frames on the sidecar's stdout, through the API; the stored parts where that is not possible |
| retry | the Job controller's, by rules that name their container |
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ComputeError, ConfigError
from ...job import JobSpec, JobStatus, LogChunk, Phase
from ...runner import envelope
from ..base import JobHandle, Request, Secrets
from . import diagnosis, ending, leftovers, manifest, names, objects, pod_template, preflight
from .api import Api, ApiError
from .leftovers import Leftover
from .livelog import LiveLog
from .manifest import Manifest, SecretNames
from .names import Address
from .objects import Observation
from .pod_template import PodTemplate
from .watch import VIEWS

STATUS_PATIENCE_S = 2.0
SUBMIT_PATIENCE_S = 60.0
EVENTS_EVERY_S = 3.0  # at first, while nothing moves
EVENTS_AT_LEAST_EVERY_S = 15.0
READ_EVERY_S = 1.0  # of a followed job, while there are no watches to be believed
SEEN_S = 2.0  # how long the log relies on what status saw
CANCEL_MARGIN_S = 30.0  # beyond the grace period, until cancel returns all the same


@dataclass(frozen=True)
class _Events:
    """A job's events as they were read while it was in ``state``, and when they are to be read again."""

    state: tuple[Phase, tuple[str, ...]]
    found: list[dict[str, Any]]
    pause_s: float
    due_at: float


class KubernetesCompute:
    """See compute/base.py for the contract of each verb."""

    name = "kubernetes"

    def __init__(
        self,
        *,
        context: str = "",
        kubeconfig: str = "",
        namespace: str = "",
        server: str = "",
        authority: str = "",
        template: PodTemplate | None = None,
    ) -> None:
        self._template = template
        self._context = context
        self._kubeconfig = kubeconfig
        self._namespace = namespace
        self._server = server
        self._authority = authority
        self._submissions: dict[str, str] = {}  # Job -> the submission it belongs to, where this process made it
        self._digests: dict[str, str] = {}  # image -> the same by digest
        self._lock = threading.Lock()
        self._api: Api | None = None
        self._seen: dict[str, tuple[float, Observation]] = {}  # handle -> what status saw last, and when
        self._logs: dict[str, LiveLog] = {}
        self._events: dict[str, _Events] = {}  # by the Job's uid
        self._read_lately: dict[str, tuple[float, Observation]] = {}  # handle -> when it was read while followed

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> KubernetesCompute:
        wanted = {key: str(options.get(key) or "") for key in ("context", "kubeconfig", "namespace")}
        return cls(**wanted, template=pod_template.load(options.get("pod_template")))

    @classmethod
    def from_handle(cls, handle: JobHandle) -> KubernetesCompute:
        address = Address.parse(handle.url)
        return cls(
            context=address.context,
            namespace=address.namespace,
            server=address.server,
            authority=address.authority,
        )

    @classmethod
    def of_handles(cls, urls: Iterable[str]) -> list[KubernetesCompute]:
        """One compute for each namespace of each cluster that these handles name; what is no handle is left out."""
        places: dict[tuple[str, ...], KubernetesCompute] = {}
        for url in urls:
            with contextlib.suppress(ComputeError):
                address = Address.parse(url)
                key = (address.namespace, address.context, address.server, address.authority)
                if key not in places:
                    places[key] = cls.from_handle(JobHandle(url))
        return list(places.values())

    # ------------------------------------------------------------------------------------------ before it exists

    def render(self, spec: JobSpec) -> Request:
        built = self._built(spec, Secrets())
        job = pod_template.without_values(self._template, built.job) if self._template is not None else built.job
        return Request(spec, {"job": job, "release": built.release})

    def check(self, request: Request, secrets: Secrets) -> Sequence[str]:
        api = self._connected()
        secrets = _with_copied(request.spec, secrets)
        notices = self._pin(self._built(request.spec, secrets))
        built = self._built(request.spec, secrets)
        # That they fit into one Secret; only the values tell.
        manifest.secret(built, preflight.NO_UID, envelope.dump(request.spec), secrets.program, secrets.runner)
        checked = preflight.check(api, self._namespace_of(api), request.spec, built, secrets)
        return (*built.warnings, *notices, *checked)

    def _pin(self, built: Manifest) -> list[str]:
        """Find the digests of the job's images; from here on manifests name them. Notices where that cannot be."""
        found = {image: preflight.pinned(image) for image in manifest.images(built)}
        self._digests = {image: each.image for image, each in found.items()}
        return [f"image {image} is not pinned: {each.trouble}" for image, each in found.items() if each.trouble]

    def handle_url(self, spec: JobSpec) -> str:
        api = self._connected()
        job = names.job_name(spec.run.run_id)
        self._submissions[job] = spec.submission_id
        login = api.login
        return Address(self._namespace_of(api), job, login.context, login.server, login.authority).url

    # ------------------------------------------------------------------------------------------------- creation

    def submit(self, request: Request, secrets: Secrets) -> JobHandle:
        """Suspended Job, the Secret it owns, release. Each step is found done where its reply was lost.

        Who may not patch Jobs cannot release one: its pod then waits a moment for the Secret.
        """
        api = self._connected()
        secrets = _with_copied(request.spec, secrets)
        built = self._built(request.spec, secrets)
        if preflight.PATCH_JOBS in preflight.missing_rights(api, self._namespace_of(api)):
            built = manifest.released(built)
        job = self._create_job(api, built)
        queue = str(request.spec.options.get("queue") or objects.label(job, names.QUEUE))
        if queue and not request.spec.options.get("queue"):  # the cluster has put the job into its default queue
            built = dataclasses.replace(built, release={"metadata": built.release["metadata"]})
        wire = envelope.dump(_in_queue(request.spec, queue))
        secret = manifest.secret(built, objects.uid(job), wire, secrets.program, secrets.runner)
        _create(api, f"/api/v1/namespaces/{self._namespace_of(api)}/secrets", secret, lambda: secret)
        if not objects.annotation(job, names.RELEASED):
            path = f"{self._jobs_path(api)}/{built.name}"
            api.patch(path, built.release, patience_s=SUBMIT_PATIENCE_S)
        url, image = self.handle_url(request.spec), manifest.main_digest(built)
        return JobHandle(url, objects.uid(job), image, queued=bool(queue))

    def _built(self, spec: JobSpec, secrets: Secrets) -> Manifest:
        program = tuple(sorted({*spec.secret_names, *manifest.copied_variables(spec), *secrets.program}))
        secret_names = SecretNames(program, tuple(sorted(secrets.runner)))
        built = manifest.build(spec, secret_names, envelope.dump(spec))
        if self._template is not None:
            built = pod_template.apply(self._template, spec, built)
        return manifest.with_images(built, self._digests)

    def _create_job(self, api: Api, built: Manifest) -> dict[str, Any]:
        path = self._jobs_path(api)

        def adopt() -> dict[str, Any]:
            found = api.get(f"{path}/{built.name}", patience_s=SUBMIT_PATIENCE_S).body
            _check_same_submission(found, built.job)
            return found

        return _create(api, path, built.job, adopt)

    # ---------------------------------------------------------------------------------------------------- status

    def status(self, handle: JobHandle) -> JobStatus:
        api = self._connected()
        address = Address.parse(handle.url)
        status, seen = self._assessed(api, address, self._observe(api, address, handle))
        if status.gone or (status.diagnosis is not None and status.diagnosis.fatal):
            # What ends a run is what the API says now, not what a watch said a moment, or a night's sleep, ago.
            before, seen = seen, self._read(api, address, handle.uid)
            if seen.job is None and not seen.pods:
                seen = dataclasses.replace(seen, namespace_terminating=_is_ending(api, address.namespace))
            status, seen = self._assessed(api, address, seen)
            status = _with_memory(status, seen, self._seen.get(handle.url, (0.0, before))[1])
        self._seen[handle.url] = (time.monotonic(), seen)
        return self._with_last_word(handle, status)

    def _assessed(self, api: Api, address: Address, seen: Observation) -> tuple[JobStatus, Observation]:
        """The status, and what it was made of: events too, where they may tell why nothing moves."""
        status = diagnosis.assess(seen)
        if not _needs_events(status, seen):
            return status, seen
        seen = dataclasses.replace(seen, events=self._events_of(api, address, seen, status.phase))
        return diagnosis.assess(seen), seen

    def _with_last_word(self, handle: JobHandle, status: JobStatus) -> JobStatus:
        """The sidecar's last frame tells of the end seconds before the API does."""
        said = self._log_of(handle).end
        if not said.get("finalized") or status.gone:
            return status
        return dataclasses.replace(status, phase=Phase.DONE, diagnosis=None, exit_code=said.get("exit_code"))

    def _observe(self, api: Api, address: Address, handle: JobHandle) -> Observation:
        """From memory where somebody follows the job, else by two reads. Raises ApiError."""
        if VIEWS.followed(api, address.namespace, address.job):
            looked = VIEWS.view(api, address.namespace, address.job).look(address.job)
            if looked is not None:
                job, pods, server_time = looked
                return Observation(job, pods, now=server_time, uid=handle.uid)
            read_at, held = self._read_lately.get(handle.url, (0.0, None))
            if held is not None and time.monotonic() - read_at < READ_EVERY_S:
                return held
            held = self._read(api, address, handle.uid)
            self._read_lately[handle.url] = (time.monotonic(), held)
            return held
        return self._read(api, address, handle.uid)

    def _read(self, api: Api, address: Address, uid: str) -> Observation:
        pods, page = api.items(
            f"/api/v1/namespaces/{address.namespace}/pods",
            patience_s=STATUS_PATIENCE_S,
            labelSelector=f"{names.JOB_NAME}={address.job}",
        )
        job: dict[str, Any] | None = None
        try:
            path = f"/apis/batch/v1/namespaces/{address.namespace}/jobs/{address.job}"
            job = api.get(path, patience_s=STATUS_PATIENCE_S).body
        except ApiError as error:
            if error.status != 404:
                raise
        return Observation(job, pods, now=page.server_time or time.time(), uid=uid)

    def _events_of(self, api: Api, address: Address, seen: Observation, phase: Phase) -> list[dict[str, Any]]:
        """Events of the Job and its pods; none where they may not be read.

        Read every few seconds, and less and less often while nothing moves: each is a read of the cluster's database.
        """
        key = seen.uid or address.url
        state = (phase, tuple(map(objects.uid, seen.pods)))
        before = self._events.get(key)
        now = time.monotonic()
        if before is not None and before.state == state and now < before.due_at:
            return before.found
        found: list[dict[str, Any]] = []
        things = [each for each in (seen.job, *seen.pods) if each is not None]
        for thing in things[:4]:
            with contextlib.suppress(ApiError):
                found += api.items(
                    f"/api/v1/namespaces/{address.namespace}/events",
                    patience_s=0.0,
                    fieldSelector=f"involvedObject.uid={objects.uid(thing)}",
                )[0]
        unchanged = before is not None and before.state == state
        pause_s = min(before.pause_s * 1.5, EVENTS_AT_LEAST_EVERY_S) if before and unchanged else EVENTS_EVERY_S
        self._events[key] = _Events(state, found, pause_s, now + pause_s)
        return found

    # ------------------------------------------------------------------------------------------------------ logs

    def logs(self, handle: JobHandle, *, offset: int = 0, attempt: int = 0, follow: bool = False) -> Iterator[LogChunk]:
        try:
            api = self._connected()
            address = Address.parse(handle.url)
            log = self._log_of(handle)
            pods = self._pods_of(api, address, handle)
        except ComputeError:
            return
        yield from log.read(api, address.namespace, pods, offset, attempt, follow=follow)

    def _log_of(self, handle: JobHandle) -> LiveLog:
        with self._lock:
            return self._logs.setdefault(handle.url, LiveLog())

    def _pods_of(self, api: Api, address: Address, handle: JobHandle) -> list[Mapping[str, Any]]:
        """The job's pods as ``status`` saw them a moment ago, else as the API shows them now."""
        seen_at, seen = self._seen.get(handle.url, (0.0, None))
        if seen is None or time.monotonic() - seen_at > SEEN_S:
            seen = self._read(api, address, handle.uid)
            self._seen[handle.url] = (time.monotonic(), seen)
        return diagnosis.own_pods(seen)

    # -------------------------------------------------------------------------------------------- ending, removing

    def cancel(self, handle: JobHandle, *, grace_period_s: float = 30.0) -> None:
        api = self._connected()
        address = Address.parse(handle.url)
        self._delete(api, address, handle.uid, "Foreground")
        deadline = time.monotonic() + grace_period_s + CANCEL_MARGIN_S
        while left := self._living_pods(api, address, handle.uid):
            if time.monotonic() > deadline:
                pod = left[0]
                node = (pod.get("spec") or {}).get("nodeName") or "no node"
                raise ComputeError(f"Pod {objects.name(pod)} is still terminating on {node}.", transient=True)
            time.sleep(0.2)

    def collect(self, handle: JobHandle) -> None:
        self._delete(self._connected(), Address.parse(handle.url), handle.uid, "Background")

    def recover(self, handle: JobHandle) -> bool:
        return False  # the spool died with its pod

    # ---------------------------------------------------------------------------------------------- for gc, doctor

    def leftovers(self, tracking_uri: str) -> list[Leftover]:
        """Jobs of ours, and pods without their Job, in the compute's namespace. Raises ComputeError."""
        api = self._connected()
        return list(leftovers.leftovers(api, self._namespace_of(api), tracking_uri))

    def remove_leftover(self, left: Leftover) -> None:
        leftovers.remove(self._connected(), left)

    def describe(self) -> str:
        """One line about the cluster for people. Raises ComputeError naming the kubeconfig that does not work."""
        api = self._connected()
        version = api.get("/version", patience_s=0.0).body.get("gitVersion", "of unknown version")
        place = f"context {api.login.context}, " if api.login.context else ""
        return f"Kubernetes {version} at {api.login.server} ({place}namespace {self._namespace_of(api)})"

    def _delete(self, api: Api, address: Address, uid: str, propagation: str) -> None:
        """Delete the very Job; one that is gone, or a namesake, is left alone."""
        path = f"/apis/batch/v1/namespaces/{address.namespace}/jobs/{address.job}"
        try:
            uid = uid or self._uid_of_ours(api.get(path).body, address)
            if uid:
                api.delete(path, {"propagationPolicy": propagation, "preconditions": {"uid": uid}})
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    def _uid_of_ours(self, job: Mapping[str, Any], address: Address) -> str:
        """The uid of a Job that says itself that it is this run's, and this submission's where that is known."""
        known = self._submissions.get(address.job)
        same_run = names.job_name(objects.annotation(job, names.RUN_ID)) == address.job
        same_submission = known in (None, objects.annotation(job, names.SUBMISSION_ID))
        ours = objects.label(job, names.MANAGED_BY) == names.MANAGER and same_run and same_submission
        return objects.uid(job) if ours else ""

    def _living_pods(self, api: Api, address: Address, uid: str) -> list[dict[str, Any]]:
        pods, _ = api.items(
            f"/api/v1/namespaces/{address.namespace}/pods", labelSelector=f"{names.JOB_NAME}={address.job}"
        )
        own = [pod for pod in pods if not uid or objects.label(pod, names.JOB_UID) == uid]
        return [pod for pod in own if not objects.ended(pod)]

    # ------------------------------------------------------------------------------------------------- connection

    def _connected(self) -> Api:
        with self._lock:
            if self._api is None:
                self._api = Api.shared(
                    kubeconfig=self._kubeconfig,
                    context=self._context,
                    server=self._server,
                    authority=self._authority,
                )
            return self._api

    def _namespace_of(self, api: Api) -> str:
        return self._namespace or api.login.namespace

    def _jobs_path(self, api: Api) -> str:
        return f"/apis/batch/v1/namespaces/{self._namespace_of(api)}/jobs"


def _is_ending(api: Api, namespace: str) -> bool:
    """The namespace is being deleted, or is gone. False where it may not be read."""
    try:
        found = api.get(f"/api/v1/namespaces/{namespace}", patience_s=STATUS_PATIENCE_S).body
    except ApiError as error:
        return error.status == 404
    return (found.get("status") or {}).get("phase") == "Terminating"


def _in_queue(spec: JobSpec, queue: str) -> JobSpec:
    """As the runner has to know it: a queue may take the job back."""
    return dataclasses.replace(spec, options={**spec.options, "queue": queue}) if queue else spec


def _with_copied(spec: JobSpec, secrets: Secrets) -> Secrets:
    """Also the caller's variables that the project's docker_env wants. Raises ConfigError where one is not set."""
    names_wanted = manifest.copied_variables(spec)
    missing = [name for name in names_wanted if name not in os.environ and name not in secrets.program]
    if missing:
        raise ConfigError(
            f"docker_env.environment copies {', '.join(missing)} from your environment, where it is not set.",
            key="docker_env.environment",
        )
    copied = {name: os.environ[name] for name in names_wanted if name in os.environ}
    return dataclasses.replace(secrets, program={**copied, **secrets.program})


def _with_memory(status: JobStatus, now: Observation, before: Observation) -> JobStatus:
    """What befell a pod is lost with it, unless it was seen before: a drain, an eviction, a preemption."""
    if now.pods or not before.pods or not status.gone:
        return status
    told = ending.disruption(diagnosis.own_pods(before)[0]) if diagnosis.own_pods(before) else None
    return dataclasses.replace(status, diagnosis=told) if told is not None else status


def _needs_events(status: JobStatus, seen: Observation) -> bool:
    """Only what does not move needs them: they cost a request, and say nothing of a program that runs."""
    pod = seen.pods[0] if seen.pods else {}
    prepared = status.phase is Phase.PREPARING and objects.container(pod, manifest.PREPARE).state == "terminated"
    if (prepared or status.phase in (Phase.QUEUED, Phase.STARTING)) and seen.job is not None:
        return not (seen.job.get("spec") or {}).get("suspend")
    unready = (objects.condition(pod, "Ready") or {}).get("status") == "False"
    return status.phase is Phase.RUNNING and unready


def _create(api: Api, path: str, body: dict[str, Any], existing: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """POST until it is done, by this call or by an earlier one whose reply was lost.

    ``existing``: what to return where the name is taken; raises where it is taken by somebody else.
    """
    deadline = time.monotonic() + SUBMIT_PATIENCE_S
    pause_s = 0.1
    while True:
        try:
            return api.create(path, body).body
        except ApiError as error:
            if error.reason == "AlreadyExists":
                return existing()
            if not error.transient or time.monotonic() > deadline:
                raise
            time.sleep(max(pause_s * random.uniform(0.5, 1.0), error.retry_after_s or 0.0))
        pause_s = min(pause_s * 2, 5.0)


def _check_same_submission(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """A Job of that name is ours only if it says so: same manager, same submission, same envelope."""
    same = all(
        objects.annotation(found, key) == objects.annotation(wanted, key)
        for key in (names.SUBMISSION_ID, names.ENVELOPE)
    )
    if objects.label(found, names.MANAGED_BY) != names.MANAGER or not same:
        raise ComputeError(
            f"Job {objects.name(found)} exists already and belongs to another submission.",
            hint="It is left as it is. Submit with another run.",
        )
    if objects.deleted_at(found):
        raise ComputeError(f"Job {objects.name(found)} is being deleted.", hint="Submit again.", transient=True)
