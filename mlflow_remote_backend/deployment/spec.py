"""Frozen values that describe a deployment and what became of it. Pure: no input, no output.

The words: a *deployment* is one model that is served under a name; its *server* is MLflow's scoring server; each
create or update makes a *revision*, counted from 1; a *target* is the place that runs deployments (a process of this
machine, a container, a cluster), chosen by ``compute`` as for runs.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.kinds import Masked
from ..job import EnvironmentRef, Resources
from ..runner import envelope

#: Labels on what a target creates, beside ``app.kubernetes.io/managed-by``: how a deployment is found again.
NAME_LABEL = "mlflow-remote/deployment"


@dataclass(frozen=True)
class ModelRef:
    """A model, downloaded and looked at. ``uri``: as it was asked for; ``source``: the same with an alias resolved, so
    that whoever fetches it again, a year from now, gets the same one.

    ``flavor``: the one that is served; ``flavors``: all that it has. ``origin``: the registered version's tags that say
    where it came from (run, snapshot, environment), as far as they are known.
    """

    uri: str
    source: str = ""
    flavor: str = "python_function"
    flavors: tuple[str, ...] = ()
    run_id: str = ""
    version: str = ""
    mlflow_version: str = ""
    size_bytes: int = 0
    signature: str = ""
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Service:
    """How requests come in. ``type``: Kubernetes' only. ``port`` 0: any free one. ``host``: the address to bind."""

    type: str = "ClusterIP"
    port: int = 0
    host: str = "127.0.0.1"


@dataclass(frozen=True)
class Autoscale:
    """Kubernetes only. ``cpu_percent``: of what is requested, at which replicas are added."""

    minimum: int = 1
    maximum: int = 2
    cpu_percent: int = 80


@dataclass(frozen=True)
class Ingress:
    """Kubernetes only. ``class_name`` empty: the cluster's default; ``tls_secret`` empty: plain HTTP."""

    host: str
    class_name: str = ""
    tls_secret: str = ""
    path: str = "/"


@dataclass(frozen=True)
class DeploymentSpec:
    """All that a target needs to know to serve a model, whole and printable. Holds no secret value.

    ``timeout_s``: of one request; ``start_timeout_s``: until a new revision answers. ``guarded``: requests need a
    token. ``secret_names``: variables that travel as secrets. ``config``: what the user wrote, for the next update.
    ``options``: the target's own section of the config, as for runs. ``tracking_uri``: the tracking server as pods of a
    cluster reach it; empty for targets that are handed the model.
    """

    name: str
    model: ModelRef
    tracking_uri: str = ""
    environment: EnvironmentRef = field(default_factory=EnvironmentRef)
    compute: str = "local"
    compute_name: str = ""
    revision: int = 1
    workers: int = 1
    timeout_s: int = 60
    start_timeout_s: float = 1800.0
    image_pull_timeout_s: float = 600.0
    grace_period_s: float = 30.0
    replicas: int = 1
    autoscale: Autoscale | None = None
    service: Service = field(default_factory=Service)
    ingress: Ingress | None = None
    resources: Resources = field(default_factory=Resources)
    env_vars: Mapping[str, str] = field(default_factory=Masked)
    secret_names: tuple[str, ...] = ()
    secret_refs: Mapping[str, Any] = field(default_factory=dict)
    guarded: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    created_at: float = 0.0
    updated_at: float = 0.0
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def dump(self) -> str:
        """As JSON, for where the target keeps it. Equal specs give equal texts."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def load(cls, text: str | bytes) -> DeploymentSpec:
        """Raises ValueError where it is damaged."""
        try:
            return envelope.read(cls, json.loads(text))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Secrets:
    """What the server must know and nobody else may see. ``token``: that requests carry; empty for none."""

    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    token: str = field(default="", repr=False)


@dataclass(frozen=True)
class Order:
    """A revision to be served: its spec, the model's folder on this machine, and the secrets (None: as before).

    ``credentials``: variables by which MLflow and its artifact store are reached, for a target that fetches the model
    itself; a server never gets them.
    """

    spec: DeploymentSpec
    model: Path
    secrets: Secrets | None = None
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)


class State(str, enum.Enum):
    """Where a deployment is."""

    STARTING = "starting"  # its first revision does not answer yet
    READY = "ready"
    UPDATING = "updating"  # a revision serves, the next one is coming up
    STOPPED = "stopped"  # nothing answers


@dataclass(frozen=True)
class DeploymentStatus:
    """What a target knows of a deployment right now.

    ``url``: of its server, without a path, as its users reach it (a cluster's may be known inside of it only); empty
    where it has none. ``detail``: one line for a person. ``restarts``: of servers that died.
    """

    spec: DeploymentSpec
    state: State
    url: str = ""
    replicas_ready: int = 0
    restarts: int = 0
    detail: str = ""

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Answer:
    """A server's answer to one request."""

    status: int
    body: bytes
    content_type: str = ""


def described(status: DeploymentStatus) -> dict[str, Any]:
    """A deployment as plain data: what ``get_deployment`` returns and ``--json`` prints. No secret is in it."""
    spec = status.spec
    return {
        "name": spec.name,
        "state": status.state.value,
        "detail": status.detail,
        "url": status.url,
        "compute": spec.compute_name or spec.compute,
        "flavor": spec.model.flavor,
        "model_uri": spec.model.uri,
        "model_version": spec.model.version,
        "run_id": spec.model.run_id,
        "model_bytes": spec.model.size_bytes,
        "mlflow_version": spec.model.mlflow_version,
        "signature": spec.model.signature,
        "origin": dict(spec.model.origin),
        "environment": spec.environment.lock_key or spec.environment.manager,
        "revision": spec.revision,
        "replicas": spec.replicas,
        "replicas_ready": status.replicas_ready,
        "restarts": status.restarts,
        "workers": spec.workers,
        "guarded": spec.guarded,
        "created": spec.created_at,
        "updated": spec.updated_at,
        "tags": dict(spec.tags),
        "labels": dict(spec.labels),
        "description": spec.description,
        "config": {key: _masked(key, value) for key, value in spec.config.items()},
    }


def _masked(key: str, value: Any) -> Any:
    """Values of variables are nobody's business, as in everything else that is shown."""
    return dict.fromkeys(value, "***") if key == "env_vars" and isinstance(value, Mapping) else value
