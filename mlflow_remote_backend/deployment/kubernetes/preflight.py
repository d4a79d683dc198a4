"""Before anything is created: could this deployment run here? Asked of the cluster, and answered in its own words.

In this order, each only if the one before passed: what the config alone tells; addresses that are useless in a pod;
rights, all missing ones at once; the namespace; a dry run of the very objects, and of a pod where the caller may create
pods, since only a pod tells of quota and PodSecurity.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any

from ...compute.kubernetes import preflight as jobs
from ...compute.kubernetes import waiting
from ...compute.kubernetes.api import Api, ApiError
from ...compute.kubernetes.preflight import Right
from ...errors import ComputeError, ConfigError, RequestError
from ...job import Reason
from ..spec import DeploymentSpec
from .manifest import AUTOSCALER, BUDGET, DEPLOYMENT, INGRESS, PODS, SECRETS, SERVICE, Document, Kind

PATIENCE_S = 10.0
CHANGES = ("create", "get", "update", "delete")

REQUIRED = (
    *((verb, DEPLOYMENT.group, DEPLOYMENT.plural) for verb in ("create", "get", "list", "update", "patch", "delete")),
    *((verb, "", SERVICE.plural) for verb in CHANGES),
    *((verb, "", SECRETS.plural) for verb in ("create", "get", "delete")),
    ("list", "", PODS.plural),
)
#: Without them less can be done, and it is said what.
OPTIONAL = {
    ("get", "", "pods/log"): "the servers' log is not shown, and not asked why a model cannot be loaded",
    ("list", "", "events"): "why a pod does not start may stay unknown",
    ("create", "", PODS.plural): "quota and admission rules for pods could not be checked",
    ("create", "", "services/proxy"): "predict does not work from here, but inside of the cluster or by an Ingress",
    ("get", "", "services/proxy"): "the deployment is not asked from here once it is ready",
}
CREATE_PODS: Right = ("create", "", PODS.plural)
ASK: Right = ("get", "", "services/proxy")
_ASKED_FOR = {AUTOSCALER: "autoscale", BUDGET: "replicas", INGRESS: "ingress"}
#: Of a named compute that is for jobs as well: what a deployment does without.
_FOR_JOBS_ONLY = {"queue": "a deployment is not queued", "api_access": "a server gets no token of the cluster"}


def of_config(spec: DeploymentSpec) -> list[str]:
    """What needs no cluster to be known: notices. Raises ConfigError and RequestError."""
    if spec.options.get("pod_template"):
        raise ConfigError(
            "kubernetes.pod_template is a job's pod, and not understood for deployments.",
            key="kubernetes.pod_template",
            hint='Take it back ("kubernetes": {"pod_template": null}); node_selector, tolerations and affinity '
            "are understood.",
        )
    if spec.autoscale is not None and spec.resources.cpu is None:
        raise ConfigError(
            "autoscale needs resources.cpu: replicas are added by the share of it that is used.", key="resources.cpu"
        )
    scheme = urllib.parse.urlsplit(spec.model.source).scheme
    if len(scheme) < 2 or scheme == "file":
        raise RequestError(
            f"The model {spec.model.uri} is a folder of this machine, which pods cannot fetch.",
            hint="Log it to a run, or register it: then give runs:/RUN/PATH or models:/NAME/VERSION.",
        )
    return [f"kubernetes.{key}: {what}" for key, what in _FOR_JOBS_ONLY.items() if spec.options.get(key)]


def of_addresses(spec: DeploymentSpec, credentials: Mapping[str, str]) -> None:
    trouble = jobs.tracking_trouble(spec.tracking_uri, credentials)
    if trouble:
        raise ConfigError(
            f"The tracking URI {spec.tracking_uri or '(none)'} is of no use in a pod: {trouble}.",
            key="tracking_uri",
            hint="Set tracking_uri in the deployment's config, or KUBE_MLFLOW_TRACKING_URI, to an http(s) address of "
            "the server that pods of the cluster can reach.",
        )


def of_cluster(api: Api, namespace: str, beside: Iterable[Kind]) -> tuple[list[str], frozenset[Right]]:
    """Rights and namespace: notices, and the rights that are lacking. Raises ComputeError: it could never run."""
    wanted = [*REQUIRED, *_rights_for(beside)]
    lacking = jobs.denied(api, namespace, (*wanted, *OPTIONAL))
    needed = [right for right in wanted if right in lacking]
    if needed:
        raise ComputeError(
            f"You lack rights in namespace {namespace}: {', '.join(map(jobs.named, needed))}.",
            hint=f"An administrator of the namespace can grant them by this Role:\n\n{role()}",
            code="FORBIDDEN",
        )
    jobs.check_namespace(api, namespace)
    return [f"no right to {jobs.named(each)}: {OPTIONAL[each]}" for each in OPTIONAL if each in lacking], lacking


def _rights_for(beside: Iterable[Kind]) -> Iterator[Right]:
    for kind in beside:
        if kind in _ASKED_FOR:
            yield from ((verb, kind.group, kind.plural) for verb in CHANGES)


def role() -> str:
    """The Role that grants all that is used, as YAML."""
    return resources.files(__package__).joinpath("rbac.yaml").read_text()


def pod_of(deployment: Mapping[str, Any]) -> Document:
    """A pod as the Deployment's controller would make it."""
    template = deployment["spec"]["template"]
    name = f"{deployment['metadata']['name']}-xxxxxxxxxx"
    owner = jobs.controller("apps/v1", "ReplicaSet", name)
    metadata = {**template["metadata"], "name": f"{name}-xxxxx", "ownerReferences": [owner]}
    return {"apiVersion": PODS.version, "kind": PODS.kind, "metadata": metadata, "spec": template["spec"]}


def dry_pod(api: Api, namespace: str, deployment: Mapping[str, Any]) -> list[str]:
    """Notices. Raises ComputeError where such a pod would be refused for good."""
    try:
        api.create(PODS.path(namespace), pod_of(deployment), patience_s=PATIENCE_S, dryRun="All")
    except ApiError as error:
        if error.transient or error.reason == "AlreadyExists":
            return []
        if "exceeded quota" in error.words and jobs.quota_may_pass(error.words):
            return [f"the namespace's quota has no room now, so the deployment will wait: {error.words}"]
        raise refused(PODS, error) from error
    return []


def refused(kind: Kind, error: ApiError) -> ComputeError:
    """Kubernetes does not take an object of ours."""
    hint = waiting.refusal_hint(error.words) if kind == PODS else "Check the deployment's config."
    reason = Reason.QUOTA if "exceeded quota" in error.words else Reason.REFUSED
    return ComputeError(
        f"Kubernetes refuses the deployment's {kind.kind}.", words=error.words, hint=hint, code=reason.value
    )


def taken(kind: Kind, name: str, namespace: str) -> RequestError:
    """An object of that name is not ours."""
    return RequestError(
        f"There is a {kind.kind} {name} in namespace {namespace}, and it is not this deployment's.",
        hint="It is left as it is. Choose another name for the deployment.",
    )
