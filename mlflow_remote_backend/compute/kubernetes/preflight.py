"""Before anything is created: could this job run here? Asked of the cluster itself, and answered in its own words.

In this order, each only if the one before passed: addresses that are useless in a pod; rights, all missing ones at once
with a Role that grants them; the namespace; a dry run of the very Job and Secret, and of the Pod where the caller may
create pods, since only a pod tells of quota, PodSecurity and other admission. What could not be asked is said.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ...errors import ComputeError, ConfigError
from ...job import JobSpec, Reason
from ..base import Secrets
from ..loopback import is_loopback
from . import images, manifest, names, waiting
from .api import Answer, Api, ApiError
from .images import Pinned
from .manifest import Manifest

PATIENCE_S = 10.0
NO_UID = "00000000-0000-0000-0000-000000000000"
REMEMBERED_S = 60.0  # many submissions of one process ask the same questions

#: verb, group, resource: without them no job can run.
REQUIRED = (
    ("create", "batch", "jobs"),
    ("get", "batch", "jobs"),
    ("delete", "batch", "jobs"),
    ("create", "", "secrets"),
    ("list", "", "pods"),
)
#: Without them less can be done, and it is said what.
OPTIONAL = {
    ("patch", "batch", "jobs"): "jobs are not created suspended first, so their Secret comes a moment later",
    ("list", "batch", "jobs"): "many jobs at once are asked for one by one",
    ("watch", "batch", "jobs"): "state is polled",
    ("watch", "", "pods"): "state is polled",
    ("get", "", "pods/log"): "the log is shown from the run's stored parts, some seconds later",
    ("list", "", "events"): "why a pod does not start may stay unknown",
    ("create", "", "pods"): "quota and admission rules for pods could not be checked",
}
PATCH_JOBS = ("patch", "batch", "jobs")
CREATE_PODS = ("create", "", "pods")

Right = tuple[str, str, str]


def check(api: Api, namespace: str, spec: JobSpec, built: Manifest, secrets: Secrets) -> tuple[str, ...]:
    """Notices about what could not be checked. Raises ConfigError or ComputeError where the job could never run."""
    check_addresses(spec, secrets)
    lacking = missing_rights(api, namespace)
    _require_rights(namespace, lacking)
    check_namespace(api, namespace)
    notices = [f"no right to {named(right)}: {OPTIONAL[right]}" for right in OPTIONAL if right in lacking]
    return (*notices, *_dry_run(api, namespace, built, secrets, pods=CREATE_PODS not in lacking))


# --------------------------------------------------------------------------------------------------------- addresses


_TRACKING_HINT = (
    "Set `tracking_uri` in backend_config, or KUBE_MLFLOW_TRACKING_URI, to an http(s) address of the server that pods "
    "of the cluster can reach."
)
_ARTIFACT_HINT = "Start the server with --artifacts-destination, so that it hands artifacts on, or use an object store."


def check_addresses(spec: JobSpec, secrets: Secrets) -> None:
    """Raise ConfigError where tracking server or artifact store cannot be reached from a pod, by the URI's form."""
    trouble = tracking_trouble(spec.run.tracking_uri, secrets.runner)
    if trouble:
        shown = names.without_userinfo(spec.run.tracking_uri) or "(none)"
        raise ConfigError(
            f"The tracking URI {shown} is of no use in a pod: {trouble}.",
            key="tracking_uri",
            hint=_TRACKING_HINT,
        )
    trouble = artifact_trouble(spec.run.artifact_uri)
    if trouble:
        raise ConfigError(
            f"The artifact store at {spec.run.artifact_uri} is of no use in a pod: {trouble}.",
            key="tracking_uri",
            hint=_ARTIFACT_HINT,
        )


def tracking_trouble(uri: str, environ: Mapping[str, str]) -> str:
    """Why a pod cannot use this tracking URI, empty if it may."""
    if not uri:
        return "there is no server"
    if uri == "databricks" or uri.startswith("databricks"):
        known = environ.keys() >= {"DATABRICKS_HOST", "DATABRICKS_TOKEN"}
        return "" if known else "a pod has no Databricks profile; DATABRICKS_HOST and DATABRICKS_TOKEN are not set"
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        return _host_trouble(parts)
    if parts.scheme in ("", "file"):
        return "it is a folder of this machine"
    if parts.scheme.partition("+")[0] in ("sqlite", "mysql", "mssql", "postgresql"):
        return "it is a database, which only an MLflow server may speak to"
    return f"the runner does not know {parts.scheme}:"


def _host_trouble(parts: urllib.parse.SplitResult) -> str:
    try:
        host = (parts.hostname or "").rstrip(".")
        _ = parts.port
    except ValueError as error:
        return str(error)
    if not host:
        return "it names no host"
    if host == "host.docker.internal":
        return f"pods do not know {host}"
    return f"in a pod {host} is the pod itself" if is_loopback(host) else ""


def artifact_trouble(uri: str) -> str:
    """Why a pod cannot use this artifact URI, empty if it may or nothing is known yet."""
    if not uri or uri == "ARTIFACT_URI":
        return ""
    scheme = urllib.parse.urlsplit(uri).scheme
    if scheme in ("", "file") or (len(scheme) == 1 and scheme.isalpha()):
        return "it is a folder of this machine or of the server's"
    return ""


# ------------------------------------------------------------------------------------------------------------ rights


@dataclass
class _Remembered:
    value: Any
    at: float


_MEMORY: dict[tuple[Any, ...], _Remembered] = {}
_MEMORY_LOCK = threading.Lock()


def _once(key: tuple[Any, ...], ask: Callable[[], Any]) -> Any:
    """The answer of a minute ago, or a new one. A failure is not remembered."""
    with _MEMORY_LOCK:
        for stale in [each for each, held in _MEMORY.items() if time.monotonic() - held.at > REMEMBERED_S]:
            del _MEMORY[stale]
        held = _MEMORY.get(key)
    if held is not None:
        return held.value
    value = ask()
    with _MEMORY_LOCK:
        _MEMORY[key] = _Remembered(value, time.monotonic())
    return value


def missing_rights(api: Api, namespace: str) -> frozenset[Right]:
    """Which of REQUIRED and OPTIONAL the caller lacks. What the cluster does not want to tell counts as granted."""
    return denied(api, namespace, (*REQUIRED, *OPTIONAL))


def denied(api: Api, namespace: str, wanted: Iterable[Right]) -> frozenset[Right]:
    """Which of these rights the caller lacks. What the cluster does not want to tell counts as granted."""
    rights = tuple(wanted)

    def ask() -> frozenset[Right]:
        # The first one alone: threads that begin a process's first TLS connection at once were seen to fail in OpenSSL.
        first, *others = rights
        allowed = [_allowed(api, namespace, first)]
        with ThreadPoolExecutor(max_workers=6, thread_name_prefix="preflight") as pool:
            allowed += pool.map(lambda right: _allowed(api, namespace, right), others)
        return frozenset(right for right, each in zip(rights, allowed, strict=True) if not each)

    found: frozenset[Right] = _once((id(api), namespace, "rights", rights), ask)
    return found


def _allowed(api: Api, namespace: str, right: Right) -> bool:
    verb, group, resource = right
    name, _, subresource = resource.partition("/")
    wanted = {"namespace": namespace, "verb": verb, "group": group, "resource": name, "subresource": subresource}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": wanted},
    }
    try:
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        answer = api.create(path, review, patience_s=PATIENCE_S, repeatable=True)
    except ApiError as error:
        if error.status == 403:
            return True
        raise
    return bool((answer.body.get("status") or {}).get("allowed"))


def _require_rights(namespace: str, denied: frozenset[Right]) -> None:
    lacking = [right for right in REQUIRED if right in denied]
    if lacking:
        raise ComputeError(
            f"You lack rights in namespace {namespace}: {', '.join(map(named, lacking))}.",
            hint=f"An administrator of the namespace can grant them by this Role:\n\n{role()}",
            code="FORBIDDEN",
        )


def named(right: Right) -> str:
    verb, group, resource = right
    return f"{verb} {resource}" + (f".{group}" if group else "")


def role() -> str:
    """The Role that grants all that is used, as YAML."""
    return resources.files(__package__).joinpath("rbac.yaml").read_text()


# ------------------------------------------------------------------------------------------------------------ images


def pinned(image: str) -> Pinned:
    """The image by digest, as its registry has it; many submissions ask once."""
    found: Pinned = _once(("image", image), lambda: images.pin(image))
    return found


# --------------------------------------------------------------------------------------------------------- namespace


def check_namespace(api: Api, namespace: str) -> None:
    """It exists and is not being deleted. Without the right to read it, the dry run tells."""
    try:
        found = api.get(f"/api/v1/namespaces/{namespace}", patience_s=PATIENCE_S).body
    except ApiError as error:
        if error.status == 403:
            return
        if error.status == 404:
            raise _no_namespace(api, namespace, error.words) from error
        raise
    if (found.get("status") or {}).get("phase") == "Terminating":
        raise ComputeError(
            f"Namespace {namespace} is being deleted.", hint="Choose another one.", code="NAMESPACE_TERMINATING"
        )


def _no_namespace(api: Api, namespace: str, words: str) -> ComputeError:
    return ComputeError(
        f"There is no namespace {namespace} at {api.login.server} (context {api.login.context or 'none'}).",
        words=words,
        hint="Set `kubernetes.namespace`, or create it: kubectl create namespace " + namespace,
    )


# ----------------------------------------------------------------------------------------------------------- dry run


def _dry_run(api: Api, namespace: str, built: Manifest, secrets: Secrets, *, pods: bool) -> tuple[str, ...]:
    """Notices. Raises ComputeError where the API server would refuse an object, in its own words."""
    key = (id(api), namespace, pods, _shape(built))
    found: tuple[str, ...] = _once(key, lambda: _ask_dry(api, namespace, built, secrets, pods=pods))
    return found


def _shape(built: Manifest) -> str:
    """A digest of the Job without what differs between two jobs of the same kind."""
    job = copy.deepcopy(built.job)
    text = json.dumps(job, sort_keys=True)
    for identity in (built.secret_name, built.name, *_identities(job)):
        text = text.replace(identity, "")
    return hashlib.sha256(text.encode()).hexdigest()


def _identities(job: Mapping[str, Any]) -> list[str]:
    annotations, labels = job["metadata"]["annotations"], job["metadata"]["labels"]
    found = [annotations[key] for key in manifest.IDENTITY_ANNOTATIONS] + [labels[names.RUN_ID]]
    return [each for each in found if each]


def _ask_dry(api: Api, namespace: str, built: Manifest, secrets: Secrets, *, pods: bool) -> tuple[str, ...]:
    secret = manifest.secret(built, NO_UID, "{}", {}, {})
    notices: list[str] = []
    warnings = _create_dry(api, f"/apis/batch/v1/namespaces/{namespace}/jobs", built.job, "Job").warnings
    _create_dry(api, f"/api/v1/namespaces/{namespace}/secrets", secret, "Secret")
    if pods:
        warnings = ()  # the pod itself tells
        notices += _create_pod_dry(api, namespace, built)
    return (*notices, *(f"Kubernetes warns: {each}" for each in warnings))


def _create_dry(api: Api, path: str, body: Mapping[str, Any], kind: str) -> Answer:
    """The answer; an empty one where it does not tell whether the object would be taken."""
    try:
        asked = {"dryRun": "All", "fieldValidation": "Warn"}
        return api.create(path, body, patience_s=PATIENCE_S, repeatable=True, **asked)
    except ApiError as error:
        if error.reason == "AlreadyExists" or error.transient:
            return Answer({})
        if "NamespaceTerminating" in error.causes:
            raise _refused(kind, error, Reason.NAMESPACE_TERMINATING) from error
        if error.status == 404 and "namespaces" in error.words:
            raise _no_namespace(api, path.split("/namespaces/")[1].split("/")[0], error.words) from error
        reason = Reason.QUOTA if "exceeded quota" in error.words else Reason.REFUSED
        raise _refused(kind, error, reason) from error


def _refused(kind: str, error: ApiError, reason: Reason) -> ComputeError:
    hint = waiting.refusal_hint(error.words) if kind == "Pod" else "Check the job's options; nothing was created."
    return ComputeError(f"Kubernetes refuses the job's {kind}.", words=error.words, hint=hint, code=reason.value)


def _create_pod_dry(api: Api, namespace: str, built: Manifest) -> list[str]:
    """The pod as the Job controller would make it. A quota that is only used up now is no refusal: the job waits."""
    template = built.job["spec"]["template"]
    metadata = template["metadata"]
    labels = {**metadata["labels"], names.JOB_NAME: built.name, names.JOB_UID: NO_UID}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            **metadata,
            "name": f"{built.name}-0-xxxxx",
            "labels": labels,
            "ownerReferences": [controller("batch/v1", "Job", built.name)],
        },
        "spec": template["spec"],
    }
    try:
        answer = _create_dry(api, f"/api/v1/namespaces/{namespace}/pods", pod, "Pod")
    except ComputeError as error:
        if error.code == Reason.QUOTA.value and quota_may_pass(error.words):
            return [f"the namespace's quota has no room now, so the job will wait: {error.words}"]
        raise
    return _injected(pod, answer.body)


def _injected(asked: Mapping[str, Any], answered: Mapping[str, Any]) -> list[str]:
    """A notice for each container that the cluster adds beside the program: it keeps the pod after the program's end,
    and is not there yet while the environment is made."""
    ours = {each["name"] for each in asked["spec"]["containers"]}
    found = [str(each.get("name")) for each in (answered.get("spec") or {}).get("containers") or ()]
    return [
        f"the cluster adds container {name} to the pod: if it does not end by itself, the pod stays after the program "
        "has ended, with its resources; if it carries the pod's network, there is none before it starts. Have it "
        "injected as a native sidecar, or switch that off by `labels` or `annotations`"
        for name in found
        if name not in ours
    ]


def controller(version: str, kind: str, name: str) -> dict[str, Any]:
    """Whose pod a dry run asks for: policies forbid pods of nobody."""
    return {
        "apiVersion": version,
        "kind": kind,
        "name": name,
        "uid": NO_UID,
        "controller": True,
        "blockOwnerDeletion": False,
    }


_QUOTA_AMOUNTS = re.compile(r"requested: (?P<requested>[^:]*), used: (?P<used>[^:]*), limited: (?P<limited>.*)")


def quota_may_pass(words: str) -> bool:
    """Whether ``exceeded quota: …`` tells of a quota that is large enough for the pod once others have ended."""
    found = _QUOTA_AMOUNTS.search(words)
    if found is None:
        return False
    requested, limited = (_amounts(found[group]) for group in ("requested", "limited"))
    return all(amount <= limited.get(name, amount) for name, amount in requested.items())


def _amounts(text: str) -> dict[str, float]:
    pairs = (pair.split("=", 1) for pair in text.split(",") if "=" in pair)
    return {name.strip(): quantity(value.strip()) for name, value in pairs}


_SUFFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60}


def quantity(text: str) -> float:
    """A Kubernetes quantity (``500m``, ``1Gi``, ``2e3``) as a number; infinite where it is none."""
    found = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)", text)
    factor = {**_SUFFIXES, **_BINARY}.get(found[2]) if found else None
    return float(found[1]) * factor if found and factor is not None else float("inf")
