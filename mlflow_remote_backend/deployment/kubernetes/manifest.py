"""A deployment's spec -> the Kubernetes objects that serve it, as plain dicts. Pure.

One Deployment, whose pods have two containers:

    prepare   init container, in the runner image: fetches the model, makes its environment; alone has credentials
    main      pod.py and the scoring servers, in the image that the options name or in the runner's

a Service, and what is asked for: HorizontalPodAutoscaler, Ingress, and a PodDisruptionBudget where more than one pod
serves. Each revision has a Secret of its own: the spec, the values of variables, the token, the credentials. All of
them carry the deployment's name, and the Deployment owns the others.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...compute.kubernetes import manifest as jobs
from ...compute.kubernetes import names
from ...errors import ConfigError
from ...version import __version__
from ..server.prepare import PORT, TOKEN_FILE
from ..spec import NAME_LABEL, DeploymentSpec, Secrets

MAIN, PREPARE = jobs.MAIN, jobs.PREPARE
ROOT, CACHE = jobs.ROOT, jobs.CACHE
FILES = "/mlflow-remote-deployment"
SPEC_FILE = "spec.json"
TOKEN_KEY = "token"

#: On the pod template: what this revision is. On the Deployment: SERVING and SERVING_SECRET, what has come
#: up last, as SPEC and SECRET.
REVISION = "mlflow-remote/revision"
ATTEMPT = "mlflow-remote/attempt"  # one per create or update, so that two of them are never taken for each other
SPEC = "mlflow-remote/spec"
SERVING = "mlflow-remote/serving"
SERVING_SECRET = "mlflow-remote/serving-secret"
SECRET = "mlflow-remote/secret"
SECRETS_OF = "mlflow-remote/secret-variables"  # on a Secret: names of the variables whose values are secret

#: From a pod's end until nobody sends it requests any more: endpoints reach proxies and load balancers with a delay.
DRAIN_S = 5
GRACE_MARGIN_S = 10
STARTUP_PERIOD_S = 2
READINESS_PERIOD_S = 5
LIVENESS_PERIOD_S = 10
PROBE_TIMEOUT_S = 5
DEFAULT_PORT = 80
MAX_ANNOTATION_BYTES = 100_000  # all of an object's annotations may have 256 KiB
MAX_SECRET_BYTES = jobs.MAX_SECRET_BYTES
MASK = "***"

Document = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of object as the API addresses it. ``path``: of its list in a namespace."""

    kind: str
    version: str
    plural: str

    def path(self, namespace: str, name: str = "") -> str:
        root = "api" if "/" not in self.version else "apis"
        base = f"/{root}/{self.version}/namespaces/{namespace}/{self.plural}"
        return f"{base}/{name}" if name else base

    @property
    def group(self) -> str:
        return self.version.partition("/")[0] if "/" in self.version else ""


DEPLOYMENT = Kind("Deployment", "apps/v1", "deployments")
SERVICE = Kind("Service", "v1", "services")
SECRETS = Kind("Secret", "v1", "secrets")
AUTOSCALER = Kind("HorizontalPodAutoscaler", "autoscaling/v2", "horizontalpodautoscalers")
BUDGET = Kind("PodDisruptionBudget", "policy/v1", "poddisruptionbudgets")
INGRESS = Kind("Ingress", "networking.k8s.io/v1", "ingresses")
PODS = Kind("Pod", "v1", "pods")
#: Beside the Deployment, in the order in which they are made.
BESIDE = (SERVICE, AUTOSCALER, BUDGET, INGRESS)


@dataclass(frozen=True)
class Variables:
    """Names of the variables that travel in the Secret: the server's, and those of whoever fetches the model."""

    server: tuple[str, ...] = ()
    fetching: tuple[str, ...] = ()


def selector(name: str) -> str:
    return f"{NAME_LABEL}={name}"


def secret_name(name: str, revision: int, attempt: str) -> str:
    return f"{name}-r{revision}-{attempt}"


def is_ours(thing: Mapping[str, Any], name: str) -> bool:
    """Whether this object is of the deployment: it says so itself."""
    labels = (thing.get("metadata") or {}).get("labels") or {}
    return labels.get(names.MANAGED_BY) == names.MANAGER and labels.get(NAME_LABEL) == name


# ------------------------------------------------------------------------------------------------- the Deployment


def deployment(spec: DeploymentSpec, variables: Variables, attempt: str) -> Document:
    """The Deployment, released. ``attempt``: names this very create or update. Raises ConfigError: no runner image."""
    secret = secret_name(spec.name, spec.revision, attempt)
    return {
        "apiVersion": DEPLOYMENT.version,
        "kind": DEPLOYMENT.kind,
        "metadata": _metadata(spec, attempt),
        "spec": {
            "replicas": spec.autoscale.minimum if spec.autoscale else spec.replicas,
            "selector": {"matchLabels": {NAME_LABEL: spec.name}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "revisionHistoryLimit": 1,
            "progressDeadlineSeconds": progress_deadline_s(spec),
            "paused": False,
            "template": {
                "metadata": {
                    "labels": {**spec.labels, "app.kubernetes.io/name": spec.name, NAME_LABEL: spec.name},
                    "annotations": {
                        **spec.annotations,
                        REVISION: str(spec.revision),
                        ATTEMPT: attempt,
                        SPEC: public(spec),
                        SECRET: secret,
                        names.VERSION: __version__,
                        "kubectl.kubernetes.io/default-container": MAIN,
                    },
                },
                "spec": _pod(spec, variables, secret),
            },
        },
    }


def public(spec: DeploymentSpec) -> str:
    """The spec as JSON that everybody may see who sees the Deployment: without values of variables and the lock.

    A signature of thousands of columns is left out: annotations are bounded.
    """
    config = {key: _masked(value) if key == "env_vars" else value for key, value in spec.config.items()}
    shown = dataclasses.replace(
        spec,
        env_vars=_masked(spec.env_vars),
        environment=dataclasses.replace(
            spec.environment, lock="", files={}, env_vars=_masked(spec.environment.env_vars)
        ),
        config=config,
        options={},
    )
    if len(shown.dump()) > MAX_ANNOTATION_BYTES:
        shown = dataclasses.replace(shown, model=dataclasses.replace(shown.model, signature="(too long to be shown)"))
    return shown.dump()


def _masked(values: Any) -> Any:
    return dict.fromkeys(values, MASK) if isinstance(values, Mapping) else values


def progress_deadline_s(spec: DeploymentSpec) -> int:
    """When Kubernetes itself says that a rollout does not move: after whoever waits for it has given up."""
    return math.ceil(2 * spec.start_timeout_s + spec.image_pull_timeout_s) + 3600


def _metadata(spec: DeploymentSpec, attempt: str) -> Document:
    labels = {"app.kubernetes.io/name": spec.name, names.MANAGED_BY: names.MANAGER, NAME_LABEL: spec.name}
    annotations = {**spec.annotations, ATTEMPT: attempt, names.VERSION: __version__}
    return {"name": spec.name, "labels": {**spec.labels, **labels}, "annotations": annotations}


# ----------------------------------------------------------------------------------------------------------- the pod


def _pod(spec: DeploymentSpec, variables: Variables, secret: str) -> Document:
    pod: Document = {
        "terminationGracePeriodSeconds": DRAIN_S + math.ceil(spec.grace_period_s) + GRACE_MARGIN_S,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": jobs.pod_security(spec.options),
        "initContainers": [_prepare(spec, variables, secret)],
        "containers": [_main(spec, variables, secret)],
        "volumes": _volumes(spec, secret),
        "topologySpreadConstraints": [_spread(spec)],
    }
    return pod | jobs.scheduling(spec.options)


def _spread(spec: DeploymentSpec) -> Document:
    """Over nodes, where there are several: one that fails takes as few pods as may be."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {NAME_LABEL: spec.name}},
    }


def _prepare(spec: DeploymentSpec, variables: Variables, secret: str) -> Document:
    client = [{"name": "MLFLOW_REMOTE_CLIENT_VERSION", "value": __version__}]
    mounts = [
        {"name": "server", "mountPath": ROOT},
        {"name": "runner-tmp", "mountPath": "/tmp"},
        {"name": "files", "mountPath": FILES, "readOnly": True},
    ]
    return {
        "name": PREPARE,
        **jobs.runner_image(spec.options),
        "command": ["python", "-m", "mlflow_remote_backend.deployment.server.prepare"],
        "args": ["--spec", f"{FILES}/{SPEC_FILE}", "--root", ROOT, "--cache", CACHE],
        "env": jobs.home_env() + client + jobs.secret_env("fetching", variables.fetching, secret),
        "resources": jobs.prepare_resources(spec.resources),
        "securityContext": jobs.container_security(spec.options, read_only_root=True),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts + _cache_mount(spec, read_only=False),
    }


def _main(spec: DeploymentSpec, variables: Variables, secret: str) -> Document:
    options = spec.options
    # Read-write: what a model unpacks beside itself would not work otherwise; the volume dies with the pod.
    mounts: list[Document] = [{"name": "server", "mountPath": ROOT}, {"name": "tmp", "mountPath": "/tmp"}]
    if spec.guarded:
        mounts.append({"name": "token", "mountPath": TOKEN_FILE.rpartition("/")[0], "readOnly": True})
    if spec.resources.shm_size_bytes is not None:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    mounts += [jobs.volume_mount(index, each) for index, each in enumerate(options.get("volumes") or ())]
    references = [
        {"name": name, "valueFrom": {"secretKeyRef": jobs.reference(each)}}
        for name, each in sorted(spec.secret_refs.items())
    ]
    container: Document = {
        "name": MAIN,
        "image": options.get("image") or jobs.runner_image(options)["image"],
        **jobs.pull_policy(options),
        "command": ["/bin/sh", f"{ROOT}/start.sh"],
        "workingDir": ROOT,
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "env": [
            *jobs.home_env(),
            {"name": "PYTHONUNBUFFERED", "value": "1"},
            *jobs.secret_env("server", variables.server, secret),
            *references,
        ],
        "lifecycle": {"preStop": {"sleep": {"seconds": DRAIN_S}}},
        **_probes(spec),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts + _cache_mount(spec, read_only=True),
    }
    extra = {"securityContext": jobs.main_security(options), "resources": jobs.resource_amounts(spec.resources)}
    return container | {key: value for key, value in extra.items() if value}


def _probes(spec: DeploymentSpec) -> Document:
    """Startup waits as long as the model may take to load. Liveness is slower than the longest request: a server that
    is busy is not dead, and starting it again would lose what it is at."""
    ping = {"httpGet": {"path": "/ping", "port": "http"}, "timeoutSeconds": PROBE_TIMEOUT_S}
    busy = math.ceil(spec.timeout_s / LIVENESS_PERIOD_S)
    return {
        "startupProbe": {
            **ping,
            "periodSeconds": STARTUP_PERIOD_S,
            "failureThreshold": max(1, math.ceil(spec.start_timeout_s / STARTUP_PERIOD_S)),
        },
        "readinessProbe": {**ping, "periodSeconds": READINESS_PERIOD_S, "failureThreshold": 3},
        "livenessProbe": {**ping, "periodSeconds": LIVENESS_PERIOD_S, "failureThreshold": 3 + busy},
    }


def _volumes(spec: DeploymentSpec, secret: str) -> list[Document]:
    files = {"secretName": secret, "items": [{"key": SPEC_FILE, "path": SPEC_FILE}]}
    volumes: list[Document] = [
        {"name": "server", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "runner-tmp", "emptyDir": {}},
        {"name": "files", "secret": files},
    ]
    if spec.guarded:
        item = {"key": TOKEN_KEY, "path": TOKEN_FILE.rpartition("/")[2]}
        volumes.append({"name": "token", "secret": {"secretName": secret, "items": [item]}})
    if spec.environment.lock_key:
        volumes.append({"name": "cache", **jobs.cache_source(spec.options.get("env_cache") or {})})
    if spec.resources.shm_size_bytes is not None:
        shm = {"medium": "Memory", "sizeLimit": str(spec.resources.shm_size_bytes)}
        volumes.append({"name": "shm", "emptyDir": shm})
    wanted = spec.options.get("volumes") or ()
    return volumes + [
        {"name": jobs.volume_name(index), **jobs.volume_source(each)} for index, each in enumerate(wanted)
    ]


def _cache_mount(spec: DeploymentSpec, *, read_only: bool) -> list[Document]:
    if not spec.environment.lock_key:
        return []
    return [{"name": "cache", "mountPath": CACHE, **({"readOnly": True} if read_only else {})}]


def images(made: Mapping[str, Any]) -> list[str]:
    pod = made["spec"]["template"]["spec"]
    return list(dict.fromkeys(each["image"] for each in (*pod["initContainers"], *pod["containers"])))


def with_images(made: Document, names_to_digests: Mapping[str, str]) -> Document:
    """The same Deployment with images named by digest where one is known."""
    copied: Document = json.loads(json.dumps(made))
    pod = copied["spec"]["template"]["spec"]
    for each in (*pod["initContainers"], *pod["containers"]):
        each["image"] = names_to_digests.get(each["image"], each["image"])
    return copied


def replacing(live: Mapping[str, Any], made: Document, before: DeploymentSpec | None, autoscaled: bool) -> Document:
    """The document that makes ``made`` of the Deployment that is there, with what others have added to its metadata.

    ``before``: what it was made from, whose labels and annotations go; ``autoscaled``: the number of replicas is not
    ours.
    """
    metadata, found = dict(made["metadata"]), live["metadata"]
    metadata |= {key: found[key] for key in ("resourceVersion", "finalizers") if key in found}
    for kind in ("labels", "annotations"):
        ours_before = getattr(before, kind) if before is not None else {}
        others = {key: value for key, value in (found.get(kind) or {}).items() if key not in ours_before}
        metadata[kind] = {**others, **made["metadata"][kind]}
    spec = dict(made["spec"])
    if autoscaled:
        spec["replicas"] = live["spec"].get("replicas", spec["replicas"])
    return {**made, "metadata": metadata, "spec": spec}


def replacing_beside(live: Mapping[str, Any], made: Document) -> Document:
    """The same for an object that stands beside it: what Kubernetes has filled in (a Service's address) stays."""
    metadata, found = dict(made["metadata"]), live["metadata"]
    metadata |= {key: found[key] for key in ("resourceVersion", "ownerReferences", "finalizers") if key in found}
    metadata["annotations"] = {**(found.get("annotations") or {}), **metadata["annotations"]}
    kept = {key: live["spec"][key] for key in _FILLED_IN if key in live["spec"]} if made["kind"] == "Service" else {}
    return {**made, "metadata": metadata, "spec": {**kept, **made["spec"]}}


#: Fields of a Service that Kubernetes sets and does not let anybody change.
_FILLED_IN = ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy")


# ------------------------------------------------------------------------------------------------ what stands beside


def beside(spec: DeploymentSpec, attempt: str) -> dict[Kind, Document]:
    """The other objects that this spec wants, but for the Secret; none of a kind that it does not want."""
    wanted = {
        SERVICE: _service(spec, attempt),
        AUTOSCALER: _autoscaler(spec, attempt),
        BUDGET: _budget(spec, attempt),
        INGRESS: _ingress(spec, attempt),
    }
    return {kind: made for kind, made in wanted.items() if made is not None}


def owned(made: Document, uid: str) -> Document:
    """The same object as the Deployment with this uid owns it: it dies with it."""
    owner = {
        "apiVersion": DEPLOYMENT.version,
        "kind": DEPLOYMENT.kind,
        "name": made["metadata"]["labels"][NAME_LABEL],
        "uid": uid,
        "controller": False,
        "blockOwnerDeletion": False,  # true needs rights over finalizers, which OpenShift enforces
    }
    return {**made, "metadata": {**made["metadata"], "ownerReferences": [owner]}}


def _object(kind: Kind, spec: DeploymentSpec, attempt: str, body: Document) -> Document:
    return {"apiVersion": kind.version, "kind": kind.kind, "metadata": _metadata(spec, attempt), "spec": body}


def service_port(spec: DeploymentSpec) -> int:
    return spec.service.port or DEFAULT_PORT


def _service(spec: DeploymentSpec, attempt: str) -> Document:
    port = {"name": "http", "port": service_port(spec), "targetPort": "http", "protocol": "TCP"}
    body = {"type": spec.service.type, "selector": {NAME_LABEL: spec.name}, "ports": [port]}
    return _object(SERVICE, spec, attempt, body)


def _autoscaler(spec: DeploymentSpec, attempt: str) -> Document | None:
    if spec.autoscale is None:
        return None
    target = {"type": "Utilization", "averageUtilization": spec.autoscale.cpu_percent}
    body = {
        "scaleTargetRef": {"apiVersion": DEPLOYMENT.version, "kind": DEPLOYMENT.kind, "name": spec.name},
        "minReplicas": spec.autoscale.minimum,
        "maxReplicas": spec.autoscale.maximum,
        "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
    }
    return _object(AUTOSCALER, spec, attempt, body)


def _budget(spec: DeploymentSpec, attempt: str) -> Document | None:
    """Only where a drain can leave some: for a single pod it would block every drain for good."""
    if (spec.autoscale.minimum if spec.autoscale else spec.replicas) < 2:
        return None
    body = {"maxUnavailable": 1, "selector": {"matchLabels": {NAME_LABEL: spec.name}}}
    return _object(BUDGET, spec, attempt, body)


def _ingress(spec: DeploymentSpec, attempt: str) -> Document | None:
    if spec.ingress is None:
        return None
    ingress = spec.ingress
    backend = {"service": {"name": spec.name, "port": {"name": "http"}}}
    path = {"path": ingress.path, "pathType": "Prefix", "backend": backend}
    body: Document = {"rules": [{"host": ingress.host, "http": {"paths": [path]}}]}
    if ingress.class_name:
        body["ingressClassName"] = ingress.class_name
    if ingress.tls_secret:
        body["tls"] = [{"hosts": [ingress.host], "secretName": ingress.tls_secret}]
    return _object(INGRESS, spec, attempt, body)


def url(spec: DeploymentSpec, namespace: str) -> str:
    """Where users reach it: its Ingress, else the Service's name, which is known inside of the cluster."""
    if spec.ingress is not None:
        scheme = "https" if spec.ingress.tls_secret else "http"
        return f"{scheme}://{spec.ingress.host}{spec.ingress.path.rstrip('/')}"
    port = "" if service_port(spec) == DEFAULT_PORT else f":{service_port(spec)}"
    return f"http://{spec.name}.{namespace}.svc{port}"


# --------------------------------------------------------------------------------------------------------- the Secret


def secret(spec: DeploymentSpec, secrets: Secrets, credentials: Mapping[str, str], attempt: str) -> Document:
    """The revision's Secret, which nobody can change. Raises ConfigError: it is larger than Kubernetes takes."""
    values = {f"server.{name}": value.encode() for name, value in {**spec.env_vars, **secrets.env}.items()}
    values |= {f"fetching.{name}": value.encode() for name, value in credentials.items()}
    values[SPEC_FILE] = gzip.compress(spec.dump().encode(), mtime=0)
    if secrets.token:
        values[TOKEN_KEY] = secrets.token.encode()
    size_bytes = sum(map(len, values.values()))
    if size_bytes > MAX_SECRET_BYTES:
        raise ConfigError(
            f"The deployment's description and its variables have {size_bytes} bytes; a Secret of Kubernetes holds "
            f"{MAX_SECRET_BYTES}.",
            hint="Large values belong into the model's files, or into a volume.",
        )
    metadata = {**_metadata(spec, attempt), "name": secret_name(spec.name, spec.revision, attempt)}
    metadata["annotations"] = {**metadata["annotations"], SECRETS_OF: json.dumps(sorted(secrets.env))}
    return {
        "apiVersion": SECRETS.version,
        "kind": SECRETS.kind,
        "metadata": metadata,
        "immutable": True,
        "type": "Opaque",
        "data": {name: base64.b64encode(value).decode("ascii") for name, value in values.items()},
    }


def secrets_in(document: Mapping[str, Any]) -> Secrets:
    """What a revision's Secret holds of the user's secrets: an update that says nothing of them goes on with them."""
    held = {name: base64.b64decode(value) for name, value in (document.get("data") or {}).items()}
    annotations = document["metadata"].get("annotations") or {}
    env = {name: held[f"server.{name}"].decode() for name in json.loads(annotations.get(SECRETS_OF) or "[]")}
    return Secrets(env, held.get(TOKEN_KEY, b"").decode())


def spec_in(document: Mapping[str, Any]) -> DeploymentSpec:
    """The whole spec in a revision's Secret. Raises ValueError where it is damaged."""
    return DeploymentSpec.load(gzip.decompress(base64.b64decode(document["data"][SPEC_FILE])))


def variables(spec: DeploymentSpec, secrets: Secrets, credentials: Mapping[str, str]) -> Variables:
    return Variables(tuple(sorted({*spec.env_vars, *secrets.env})), tuple(sorted(credentials)))
