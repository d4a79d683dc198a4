"""The target ``kubernetes``: see deployment/target.py for the contract of each verb.

create: the Deployment, paused, so that nothing starts before it owns its Secret and what stands beside it; then it is
released. update: a new Secret, then the Deployment is replaced, and Kubernetes exchanges pod after pod: one is taken
away only when another one answers. If the new ones do not come up, the Deployment is put back to what it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets as random_tokens
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...compute.kubernetes import names, objects
from ...compute.kubernetes.api import Api, ApiError
from ...compute.kubernetes.preflight import pinned
from ...errors import ComputeError, DeploymentFailed, RequestError
from ...job import Diagnosis, Reason
from .. import calling, diagnosis
from ..kept import name_taken, no_such, removed
from ..spec import NAME_LABEL, Answer, DeploymentSpec, DeploymentStatus, Order, Secrets
from ..target import Watcher
from . import logs, manifest, preflight, rollout
from .manifest import BESIDE, DEPLOYMENT, PODS, SECRETS, SERVICE, Document, Kind
from .rollout import Fault, Seen

POLL_S = 0.5
EVENTS_EVERY_S = 3.0
LOOK_PATIENCE_S = 2.0
CHANGE_PATIENCE_S = 60.0
AWAY_S = 120.0  # how long a rollout is watched on while the API server does not answer
PREPARE_S = 3600.0  # fetching a model and making its environment
DELETE_S = 120.0  # beyond the grace period
PROXY_READY_S = 20.0  # from a pod's readiness until the API server's proxy knows of it
SETTLE_S = 1.0  # for the last lines of a log
TOKEN_HEADER = "X-MLflow-Remote-Token"


class KubernetesTarget:
    """See target.py for the contract of each verb. Threads must not share one."""

    name = "kubernetes"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._connected: Api | None = None
        self._digests: dict[str, str] = {}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> KubernetesTarget:
        return cls(options)

    # ------------------------------------------------------------------------------------------ before it exists

    def render(self, spec: DeploymentSpec) -> dict[str, Any]:
        made = manifest.deployment(spec, manifest.variables(spec, _names_only(spec), {}), "ATTEMPT")
        documents = [made, *manifest.beside(spec, "ATTEMPT").values()]
        return {"compute": "kubernetes", "objects": documents}

    def check(self, spec: DeploymentSpec) -> Sequence[str]:
        notices = preflight.of_config(spec)
        preflight.of_addresses(spec, os.environ)
        api, namespace = self._api(), self._namespace()
        wanted = manifest.beside(spec, "check")
        found, lacking = preflight.of_cluster(api, namespace, wanted)
        notices += found
        made = manifest.deployment(spec, manifest.variables(spec, _names_only(spec), {}), "check")
        notices += self._pin(made)
        made = manifest.with_images(made, self._digests)
        self._dry_run({DEPLOYMENT: made, **wanted}, spec)
        if preflight.CREATE_PODS not in lacking:
            notices += preflight.dry_pod(api, namespace, made)
        return notices

    def _pin(self, made: Document) -> list[str]:
        found = {image: pinned(image) for image in manifest.images(made)}
        self._digests = {image: each.image for image, each in found.items()}
        return [f"image {image} is not pinned: {each.trouble}" for image, each in found.items() if each.trouble]

    def _dry_run(self, wanted: Mapping[Kind, Document], spec: DeploymentSpec) -> None:
        """Raises RequestError: a name is taken; ComputeError: Kubernetes refuses an object."""
        for kind, document in wanted.items():
            live = self._get(kind, spec.name)
            if live is not None and not manifest.is_ours(live, spec.name):
                raise preflight.taken(kind, spec.name, self._namespace())
            try:
                self._put(kind, document, live, spec, dryRun="All")
            except ApiError as error:
                if error.transient:
                    continue
                raise preflight.refused(kind, error) from error

    # ------------------------------------------------------------------------------------------- create and update

    def apply(self, order: Order, watcher: Watcher) -> DeploymentStatus:
        attempt = random_tokens.token_hex(4)
        if order.spec.revision == 1:
            self._create(order, attempt, watcher)
        else:
            self._update(order, attempt, watcher)
        status = self.status(order.spec.name)
        if status is None:
            raise removed(order.spec.name)
        return status

    def _create(self, order: Order, attempt: str, watcher: Watcher) -> None:
        spec, secrets = order.spec, order.secrets or Secrets()
        made = self._made(spec, secrets, order.credentials, attempt)
        secret = manifest.secret(
            spec, secrets, order.credentials, attempt
        )  # before anything exists: it may be too large
        paused = {**made, "spec": {**made["spec"], "paused": True}}
        live = self._create_one(DEPLOYMENT, paused, attempt)
        try:
            self._create_one(SECRETS, manifest.owned(secret, objects.uid(live)), attempt)
            for kind, document in manifest.beside(spec, attempt).items():
                self._create_one(kind, manifest.owned(document, objects.uid(live)), attempt)
            self._patch(spec.name, {"spec": {"paused": False}})
            self._roll(spec, attempt, watcher)
            self._mark_serving(made)
        except BaseException:
            with _told(watcher, f"removing what was made of deployment {spec.name}"):
                self._delete(spec.name, objects.uid(live))
            raise

    def _update(self, order: Order, attempt: str, watcher: Watcher) -> None:
        spec = order.spec
        live = self._ours(spec.name)
        if objects.deleted_at(live):
            raise RequestError(f"Deployment {spec.name} is being removed.", hint="Create it anew once it is gone.")
        secrets = order.secrets if order.secrets is not None else self._secrets_of(live)
        made = self._made(spec, secrets, order.credentials, attempt)
        secret = manifest.owned(manifest.secret(spec, secrets, order.credentials, attempt), objects.uid(live))
        self._create_one(SECRETS, secret, attempt)
        try:
            self._replace(live, made, spec)
            self._roll(spec, attempt, watcher)
        except BaseException:
            with _told(watcher, f"putting deployment {spec.name} back to what it was"):
                self._put_back(live, attempt)
                self._delete_one(SECRETS, secret["metadata"]["name"], spec.name)
            raise
        self._set_beside(spec, attempt, objects.uid(live))
        self._mark_serving(made)
        self._drop_secrets(live, keep=made)

    def _made(self, spec: DeploymentSpec, secrets: Secrets, credentials: Mapping[str, str], attempt: str) -> Document:
        made = manifest.deployment(spec, manifest.variables(spec, secrets, credentials), attempt)
        return manifest.with_images(made, self._digests)

    def _replace(self, live: Mapping[str, Any], made: Document, spec: DeploymentSpec) -> None:
        """Make the Deployment what it shall be, unless somebody else changed it meanwhile. Raises RequestError then."""
        seen = rollout.template_annotation(live, manifest.ATTEMPT)
        deadline = time.monotonic() + CHANGE_PATIENCE_S
        while True:
            try:
                self._put(DEPLOYMENT, made, live, spec)
                return
            except ApiError as error:
                if not error.transient or time.monotonic() > deadline:
                    raise
            live = self._ours(spec.name)
            now = rollout.template_annotation(live, manifest.ATTEMPT)
            if now == made["metadata"]["annotations"][manifest.ATTEMPT]:
                return  # done by the call whose reply was lost
            if now != seen:
                raise RequestError(
                    f"Deployment {spec.name} was changed by somebody else at the same time.", hint="Try again."
                )

    def _put_back(self, before: Mapping[str, Any], attempt: str) -> None:
        """The Deployment as it was before this attempt; waits until the attempt's pods are gone."""
        name = objects.name(before)
        deadline = time.monotonic() + CHANGE_PATIENCE_S
        while True:
            live = self._get(DEPLOYMENT, name)
            if live is None or rollout.template_annotation(live, manifest.ATTEMPT) != attempt:
                break
            body = {**live, "metadata": {**live["metadata"], "annotations": before["metadata"]["annotations"]}}
            body["metadata"]["labels"] = before["metadata"].get("labels") or {}
            try:
                self._api().replace(DEPLOYMENT.path(self._namespace(), name), {**body, "spec": before["spec"]})
            except ApiError as error:
                if not error.transient or time.monotonic() > deadline:
                    raise
        while time.monotonic() < deadline:
            pods = self._pods(name)
            if not any(objects.annotation(pod, manifest.ATTEMPT) == attempt for pod in pods):
                return
            time.sleep(POLL_S)

    def _set_beside(self, spec: DeploymentSpec, attempt: str, uid: str) -> None:
        """Service, autoscaler, budget and Ingress as the new revision wants them; those it does not want go."""
        wanted = manifest.beside(spec, attempt)
        for kind in BESIDE:
            live = self._get(kind, spec.name)
            if live is not None and not manifest.is_ours(live, spec.name):
                if kind in wanted:
                    raise preflight.taken(kind, spec.name, self._namespace())
                continue
            if kind in wanted:
                self._put(kind, manifest.owned(wanted[kind], uid), live, spec)
            elif live is not None:
                self._delete_one(kind, spec.name, spec.name)

    def _mark_serving(self, made: Document) -> None:
        annotations = made["spec"]["template"]["metadata"]["annotations"]
        serving = {
            manifest.SERVING: annotations[manifest.SPEC],
            manifest.SERVING_SECRET: annotations[manifest.SECRET],
        }
        self._patch(made["metadata"]["name"], {"metadata": {"annotations": serving}})

    def _drop_secrets(self, before: Mapping[str, Any], keep: Document) -> None:
        """Secrets of revisions that nothing refers to any more."""
        kept = keep["spec"]["template"]["metadata"]["annotations"][manifest.SECRET]
        old = {
            rollout.template_annotation(before, manifest.SECRET),
            objects.annotation(before, manifest.SERVING_SECRET),
        }
        for name in old - {kept, ""}:
            self._delete_one(SECRETS, name, objects.name(before))

    # --------------------------------------------------------------------------------------------------- rolling out

    def _roll(self, spec: DeploymentSpec, attempt: str, watcher: Watcher) -> None:
        """Wait until the attempt serves, showing how far it is. Raises DeploymentFailed."""
        followers = logs.Followers(self._api(), self._namespace(), (manifest.PREPARE, manifest.MAIN))
        try:
            fault = self._await(spec, attempt, followers, watcher)
            _show(followers, watcher, SETTLE_S)
        finally:
            followers.stop()
        if fault is not None:
            log = self._log_of(fault)
            raise diagnosis.error(spec, rollout.of_log(fault, spec, log), log)
        self._ask_once(spec)

    def _await(self, spec: DeploymentSpec, attempt: str, followers: logs.Followers, watcher: Watcher) -> Fault | None:
        began = answered = time.monotonic()
        limit_s = 2 * spec.start_timeout_s + spec.image_pull_timeout_s + PREPARE_S
        events, events_at = [], 0.0
        while True:
            now = time.monotonic()
            try:
                if now - events_at > EVENTS_EVERY_S:
                    events, events_at = self._events(spec.name), now
                seen = self._look(spec.name, events)
                answered = now
            except ApiError as error:
                if error.status == 404:
                    raise removed(spec.name) from error
                if not error.transient or now - answered > AWAY_S:
                    raise
                watcher.say(f"the API server does not answer: {error.words}")
                time.sleep(POLL_S)
                continue
            told = rollout.progress(seen, spec, attempt)
            if told.done or told.fault is not None:
                return told.fault
            if rollout.template_annotation(seen.deployment, manifest.ATTEMPT) != attempt:
                raise RequestError(f"Deployment {spec.name} was changed by somebody else while it was rolled out.")
            if now - began > limit_s:
                return Fault(Diagnosis(Reason.START_TIMEOUT, f"It did not come up within {limit_s:.0f} s.", told.line))
            watcher.say(told.line)
            followers.look([pod for pod in seen.pods if objects.annotation(pod, manifest.ATTEMPT) == attempt])
            _show(followers, watcher, POLL_S)

    def _look(self, name: str, events: Sequence[Mapping[str, Any]] = ()) -> Seen:
        api, namespace = self._api(), self._namespace()
        answer = api.get(DEPLOYMENT.path(namespace, name), patience_s=LOOK_PATIENCE_S)
        return Seen(answer.body, self._pods(name), events, answer.server_time or time.time())

    def _events(self, name: str) -> list[dict[str, Any]]:
        """Of the deployment's pods; none where they may not be read."""
        with contextlib.suppress(ApiError):
            found, _ = self._api().items(
                f"/api/v1/namespaces/{self._namespace()}/events",
                patience_s=0.0,
                fieldSelector="involvedObject.kind=Pod",
            )
            prefix = f"{name}-"
            return [each for each in found if str(each["involvedObject"].get("name", "")).startswith(prefix)]
        return []

    def _log_of(self, fault: Fault) -> str:
        if not fault.pod:
            return ""
        where = (self._api(), self._namespace(), fault.pod, fault.container)
        with contextlib.suppress(ApiError):  # it may have been started again since: then the log before that tells
            raw = logs.once(*where, previous=True) or logs.once(*where)
            return raw.decode(errors="replace")
        return ""

    def _ask_once(self, spec: DeploymentSpec) -> None:
        """A real request, as users send theirs. Where that is not allowed, the kubelet's own word has to do."""
        deadline = time.monotonic() + PROXY_READY_S
        while True:
            try:
                answer = self.ask_service(spec, "/ping", None, timeout_s=manifest.PROBE_TIMEOUT_S)
            except ApiError as error:
                if error.status == 403:
                    return
                if time.monotonic() > deadline:
                    raise DeploymentFailed(
                        f"Deployment {spec.name} is ready, but does not answer through its Service.",
                        words=error.words,
                        hint="A NetworkPolicy of the namespace may keep the API server's proxy from its pods.",
                    ) from error
                time.sleep(POLL_S)
                continue
            if answer.status != 200:
                raise DeploymentFailed(f"Deployment {spec.name} answers /ping with HTTP {answer.status}.")
            return

    # ------------------------------------------------------------------------------------------------------ looking

    def status(self, name: str) -> DeploymentStatus | None:
        live = self._get(DEPLOYMENT, name, patience_s=LOOK_PATIENCE_S)
        if live is None or not manifest.is_ours(live, name):
            return None
        found = rollout.status(live, self._pods(name), self._namespace())
        return found if found is None else self._whole(live, found)

    def _whole(self, live: Mapping[str, Any], found: DeploymentStatus) -> DeploymentStatus:
        """With the spec as it is in the revision's Secret, for whoever may read that: an update builds on it."""
        for name in (
            rollout.template_annotation(live, manifest.SECRET),
            objects.annotation(live, manifest.SERVING_SECRET),
        ):
            secret = self._secret(name)
            if secret is not None:
                spec = manifest.spec_in(secret)
                if spec.revision == found.spec.revision and spec.updated_at == found.spec.updated_at:
                    return dataclasses.replace(found, spec=spec)
        return found

    def _secret(self, name: str) -> Mapping[str, Any] | None:
        """None: there is none, or it is not ours to read."""
        if not name:
            return None
        try:
            return self._get(SECRETS, name, patience_s=LOOK_PATIENCE_S)
        except ApiError as error:
            if error.status == 403:
                return None
            raise

    def _secrets_of(self, live: Mapping[str, Any]) -> Secrets:
        name = objects.annotation(live, manifest.SERVING_SECRET) or rollout.template_annotation(live, manifest.SECRET)
        secret = self._secret(name)
        if secret is None:
            raise ComputeError(
                f"Secret {name}, with what deployment {objects.name(live)} keeps secret, cannot be read.",
                hint="Name pass_env and token_env anew; or delete the deployment and create it.",
            )
        return manifest.secrets_in(secret)

    def statuses(self) -> list[DeploymentStatus]:
        api, namespace = self._api(), self._namespace()
        selector = f"{names.SELECTOR},{NAME_LABEL}"
        listed, _ = api.items(DEPLOYMENT.path(namespace), patience_s=LOOK_PATIENCE_S, labelSelector=selector)
        if not listed:
            return []
        pods, _ = api.items(PODS.path(namespace), patience_s=LOOK_PATIENCE_S, labelSelector=NAME_LABEL)
        found = []
        for each in listed:
            own = [pod for pod in pods if objects.label(pod, NAME_LABEL) == objects.name(each)]
            found.append(rollout.status(each, own, namespace))
        return [each for each in found if each is not None]

    def logs(self, name: str, *, follow: bool = False, tail: int | None = None) -> Iterator[bytes]:
        self._ours(name)
        if not follow:
            for pod in sorted(self._pods(name), key=objects.created_at):
                yield logs.once(self._api(), self._namespace(), objects.name(pod), manifest.MAIN, tail=tail)
            return

        def pods() -> list[dict[str, Any]] | None:
            with contextlib.suppress(ApiError):
                if self._get(DEPLOYMENT, name, patience_s=LOOK_PATIENCE_S) is None:
                    return None
                return self._pods(name)
            return []

        yield from logs.follow(self._api(), self._namespace(), pods, tail)

    def call(self, name: str, path: str, body: bytes, content_type: str, timeout_s: float) -> Answer:
        live = self._ours(name)
        status = rollout.status(live, (), self._namespace())
        if status is None:
            raise no_such(name, self.name)
        token = self._token(live, status.spec) if status.spec.guarded else ""
        return self.ask_service(status.spec, path, body or None, content_type, token, timeout_s=timeout_s)

    def _token(self, live: Mapping[str, Any], spec: DeploymentSpec) -> str:
        """From the Secret; else from the caller's variable, for whoever may call but not read Secrets."""
        with contextlib.suppress(ComputeError):
            return self._secrets_of(live).token
        variable = str(spec.config.get("token_env") or "")
        if token := os.environ.get(variable, ""):
            return token
        raise RequestError(
            f"Deployment {spec.name} wants a token, which you may not read.", hint=f"Set {variable} to it."
        )

    def ask_service(
        self,
        spec: DeploymentSpec,
        path: str,
        body: bytes | None,
        content_type: str = calling.JSON,
        token: str = "",
        *,
        timeout_s: float,
    ) -> Answer:
        """Through the API server's proxy of the Service. Raises ApiError, transient where no server answered."""
        service = f"{SERVICE.path(self._namespace())}/http:{spec.name}:http/proxy{path}"
        headers = {"Content-Type": content_type, **({TOKEN_HEADER: token} if token else {})}
        return Answer(*self._api().proxied(service, body, headers, timeout_s=timeout_s))

    # ----------------------------------------------------------------------------------------------------- removing

    def delete(self, name: str) -> None:
        """Blocks until nothing is left: the pods' grace period at most."""
        self._delete(name)

    def _delete(self, name: str, uid: str = "") -> None:
        """``uid``: only the Deployment that has it, and what that owns, whatever else has the name by now."""
        live = self._get(DEPLOYMENT, name)
        ours = live is not None and manifest.is_ours(live, name) and uid in ("", objects.uid(live))
        for kind in BESIDE:
            self._delete_one(kind, name, name, uid=uid)
        if not ours or live is None:
            return
        secret_names = {
            rollout.template_annotation(live, manifest.SECRET),
            objects.annotation(live, manifest.SERVING_SECRET),
        }
        self._delete_one(DEPLOYMENT, name, name, propagation="Foreground", uid=uid)
        grace_s = float(live["spec"]["template"]["spec"].get("terminationGracePeriodSeconds") or 0)
        self._await_gone(name, secret_names - {""}, grace_s + DELETE_S, objects.uid(live))

    def _await_gone(self, name: str, secret_names: set[str], limit_s: float, uid: str) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            live = self._get(DEPLOYMENT, name)
            left = ["the Deployment"] if live is not None and objects.uid(live) == uid else []
            left += [f"pod {objects.name(pod)}" for pod in self._pods(name)] if not left else []
            if not left:
                for secret in secret_names:
                    self._delete_one(SECRETS, secret, name)
                return
            if time.monotonic() > deadline:
                raise ComputeError(
                    f"Deployment {name} is being removed, but {', '.join(left)} is still there.", transient=True
                )
            time.sleep(POLL_S / 2)

    def abandoned(self, older_than_s: float) -> list[str]:
        """Names under which nothing ever served, after longer than whoever made them waits."""
        api, namespace = self._api(), self._namespace()
        selector = f"{names.SELECTOR},{NAME_LABEL}"
        listed, page = api.items(DEPLOYMENT.path(namespace), patience_s=LOOK_PATIENCE_S, labelSelector=selector)
        now = page.server_time or time.time()
        found = []
        for each in listed:
            status = rollout.status(each, (), namespace)
            if (
                status is None
                or objects.annotation(each, manifest.SERVING)
                or objects.status(each).get("readyReplicas")
            ):
                continue
            paused = (each.get("spec") or {}).get("paused")
            patience_s = 0.0 if paused else manifest.progress_deadline_s(status.spec)
            if now - objects.created_at(each) > max(older_than_s, patience_s):
                found.append(objects.name(each))
        return found

    def sweep(self, older_than_s: float, *, dry_run: bool) -> Iterator[str]:
        """Nothing: what a killed update leaves, a Secret, its Deployment owns, and it goes with the next update or with
        the Deployment."""
        yield from ()

    # --------------------------------------------------------------------------------------------------- the cluster

    def _api(self) -> Api:
        if self._connected is None:
            wanted = {key: str(self._options.get(key) or "") for key in ("kubeconfig", "context")}
            self._connected = Api.shared(**wanted)
        return self._connected

    def _namespace(self) -> str:
        return str(self._options.get("namespace") or "") or self._api().login.namespace

    def _get(self, kind: Kind, name: str, patience_s: float = preflight.PATIENCE_S) -> dict[str, Any] | None:
        """None: it does not exist, or is of a kind that we may not read, so that none of it is ours."""
        try:
            return self._api().get(kind.path(self._namespace(), name), patience_s=patience_s).body
        except ApiError as error:
            if error.status == 404 or (error.status == 403 and kind in BESIDE and kind != SERVICE):
                return None
            raise

    def _ours(self, name: str) -> dict[str, Any]:
        live = self._get(DEPLOYMENT, name)
        if live is None or not manifest.is_ours(live, name):
            raise no_such(name, self.name)
        return live

    def _pods(self, name: str) -> list[dict[str, Any]]:
        path = PODS.path(self._namespace())
        return self._api().items(path, patience_s=LOOK_PATIENCE_S, labelSelector=manifest.selector(name))[0]

    def _create_one(self, kind: Kind, document: Document, attempt: str) -> dict[str, Any]:
        """POST, tried again where its reply was lost. Raises RequestError: the name is taken by somebody else."""
        name = document["metadata"]["name"]
        deadline = time.monotonic() + CHANGE_PATIENCE_S
        while True:
            try:
                return self._api().create(kind.path(self._namespace()), document).body
            except ApiError as error:
                if error.reason == "AlreadyExists":
                    live = self._get(kind, name)
                    if live is not None and objects.annotation(live, manifest.ATTEMPT) == attempt:
                        return live
                    if kind == DEPLOYMENT and live is not None and manifest.is_ours(live, name):
                        raise name_taken(name, self.name) from error
                    raise preflight.taken(kind, name, self._namespace()) from error
                if not error.transient:
                    raise preflight.refused(kind, error) from error
                if time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)

    def _put(
        self, kind: Kind, document: Document, live: Mapping[str, Any] | None, spec: DeploymentSpec, **query: Any
    ) -> None:
        """Create it, or make of the live one what it shall be. Raises ApiError."""
        if live is None:
            self._api().create(kind.path(self._namespace()), document, **query)
            return
        body = document
        if kind == DEPLOYMENT:
            before = rollout.status(live, (), self._namespace())
            autoscaled = spec.autoscale is not None
            body = manifest.replacing(live, document, before.spec if before else None, autoscaled)
        else:
            body = manifest.replacing_beside(live, document)
        self._api().replace(kind.path(self._namespace(), objects.name(live)), body, **query)

    def _patch(self, name: str, body: Document) -> None:
        self._api().patch(DEPLOYMENT.path(self._namespace(), name), body, patience_s=CHANGE_PATIENCE_S)

    def _delete_one(
        self, kind: Kind, name: str, deployment: str, propagation: str = "Background", uid: str = ""
    ) -> None:
        """Only if it is ours, and that very one; and has this uid or an owner that has it. Idempotent."""
        live = self._get(kind, name)
        if live is None or not manifest.is_ours(live, deployment):
            return
        owners = live["metadata"].get("ownerReferences") or ()
        if uid and uid not in (objects.uid(live), *(owner["uid"] for owner in owners)):
            return
        options = {"propagationPolicy": propagation, "preconditions": {"uid": objects.uid(live)}}
        try:
            self._api().delete(kind.path(self._namespace(), name), options)
        except ApiError as error:
            if error.status not in (404, 409):
                raise


def _names_only(spec: DeploymentSpec) -> Secrets:
    return Secrets(dict.fromkeys(spec.secret_names, ""))


def _show(followers: logs.Followers, watcher: Watcher, wait_s: float) -> None:
    """What has come of the log, for ``wait_s`` seconds."""
    deadline = time.monotonic() + wait_s
    while (left_s := deadline - time.monotonic()) > 0:
        for block in followers.blocks(wait_s=left_s):
            watcher.log(block)


@contextlib.contextmanager
def _told(watcher: Watcher, what: str) -> Iterator[None]:
    """Clearing up after a failure: it is said, and a failure of its own does not hide the first one."""
    watcher.say(what)
    try:
        yield
    except ComputeError as error:
        watcher.say(f"that failed: {error}")
