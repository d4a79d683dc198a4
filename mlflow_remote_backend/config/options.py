"""What a backend_config means, as frozen values. None stands for "not said" wherever a compute knows better."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..job import Limits, Resources, Retry
from .kinds import Masked, Place, plain


@dataclass(frozen=True)
class CliContext:
    """What the ``mlflow run`` command was told and MLflow does not pass on: ``--run-id`` and ``--run-name``."""

    run_id: str | None = None
    run_name: str | None = None


@dataclass(frozen=True)
class SecretRef:
    """One key of a secret that exists at the compute."""

    name: str
    key: str


@dataclass(frozen=True)
class SnapshotOptions:
    """``include`` and ``exclude``: patterns as git's ignore files have them. ``in_place``: only with ``local``."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_size_bytes: int = 300 * 2**20
    allow_secrets: bool = False
    in_place: bool = False


@dataclass(frozen=True)
class EnvironmentOptions:
    """How a lock is made. URLs hold credentials as ``$VARIABLE`` only. ``cuda``: the driver's version, or none."""

    frozen: bool = False
    channels: tuple[str, ...] = ()
    channel_alias: str | None = None
    channel_map: Mapping[str, str] = field(default_factory=dict)
    index_url: str | None = None
    solver: str = "rattler"
    cuda: str | None = None


@dataclass(frozen=True)
class RegisterModel:
    """The model version to register after the run has finished. ``path``: of the model in the run's artifacts."""

    name: str
    path: str = "model"
    alias: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DockerOptions:
    """``volumes``: ``SOURCE:TARGET[:MODE]``, paths absolute. ``gpus``: "all", a count, or device names.

    ``user`` None: the caller's. ``auth`` is what MLflow hands on as ``docker_auth``.
    """

    image: str | None = None
    build: bool = False
    repository: str | None = None
    pull: str = "missing"
    base_url: str | None = None
    context: str | None = None
    network: str | None = None
    volumes: tuple[str, ...] = ()
    gpus: str | int | tuple[str, ...] | None = None
    user: str | None = None
    capabilities: tuple[str, ...] = ()
    runtime: str | None = None
    platform: str | None = None
    env_cache: str = "mlflow-remote-environments"
    args: Mapping[str, Any] = field(default_factory=Masked)
    auth: Mapping[str, Any] = field(default_factory=Masked, repr=False)


@dataclass(frozen=True)
class KubernetesVolume:
    """One volume and where it is mounted. Exactly one of ``pvc``, ``secret``, ``config_map``, ``host_path`` (names or
    a path of the node) and ``source`` (any other volume source, in Kubernetes' words) is set."""

    mount_path: str
    pvc: str | None = None
    secret: str | None = None
    config_map: str | None = None
    host_path: str | None = None
    source: Mapping[str, Any] | None = None
    sub_path: str | None = None
    read_only: bool = False


@dataclass(frozen=True)
class EnvCache:
    """Where environments are kept between pods: a claim, or a path of the node. Exactly one is set."""

    pvc: str | None = None
    host_path: str | None = None


@dataclass(frozen=True)
class KubernetesOptions:
    """``security``: ``restricted`` or ``image``. ``pod_template``: a mapping, or the absolute path of a YAML file.

    ``env_cache`` None: the pod's own. ``ttl_s``: how long a finished Job is kept.
    """

    context: str | None = None
    kubeconfig: str | None = None
    namespace: str | None = None
    image: str | None = None
    runner_image: str | None = None
    sidecar_cpu: float | None = None
    sidecar_memory_bytes: int | None = None
    image_pull_secrets: tuple[str, ...] = ()
    image_pull_policy: str | None = None
    service_account: str | None = None
    api_access: bool = False
    security: str = "restricted"
    run_as_user: int | None = None
    read_only_root: bool = False
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    affinity: Mapping[str, Any] | None = None
    priority_class: str | None = None
    queue: str | None = None
    platform: str | None = None
    volumes: tuple[KubernetesVolume, ...] = ()
    env_cache: EnvCache | None = None
    pod_template: str | Mapping[str, Any] | None = field(default=None, repr=False)  # may hold literal variables
    fail_fast_unschedulable: bool = False
    ttl_s: float = 86400.0


@dataclass(frozen=True)
class BackendConfig:
    """All that a caller wants, checked. Its ``repr`` shows no value of a variable and no credential.

    ``compute``: ``local``, ``docker``, ``kubernetes`` or an installed compute; ``compute_name``: the named compute that
    said so, or empty. ``env_manager`` None: what the project declares. ``wait``: ``"auto"``, True or False.
    ``pass_env``: names and the caller's values. ``extensions``: sections of installed computes, by their name.
    """

    compute: str = "local"
    compute_name: str = ""
    env_manager: str | None = None
    environment: EnvironmentOptions = field(default_factory=EnvironmentOptions)
    wait: str | bool = "auto"
    synchronous: bool = False
    stream_output: bool = True
    on_interrupt: str = "cancel"
    run_id: str | None = None
    run_name: str | None = None
    submission_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    tracking_uri: str | None = None
    storage_dir: str | None = None
    env_vars: Mapping[str, str] = field(default_factory=Masked)
    pass_env: Mapping[str, str] = field(default_factory=Masked)
    secrets: Mapping[str, SecretRef] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    limits: Limits = field(default_factory=Limits)
    retry: Retry = field(default_factory=Retry)
    snapshot: SnapshotOptions = field(default_factory=SnapshotOptions)
    outputs: tuple[str, ...] = ("outputs",)
    log_limit_bytes: int | None = None
    register_model: RegisterModel | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    docker: DockerOptions = field(default_factory=DockerOptions)
    kubernetes: KubernetesOptions = field(default_factory=KubernetesOptions)
    extensions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    def options(self) -> dict[str, Any]:
        """The compute's own section as JSON-like data without credentials: what ``JobSpec.options`` holds."""
        if self.compute in self.extensions:
            section: dict[str, Any] = dict(self.extensions[self.compute])
        else:
            of: Any = {"docker": self.docker, "kubernetes": self.kubernetes}.get(self.compute)
            section = dataclasses.asdict(of) if of else {}
        section.pop("auth", None)
        copied: dict[str, Any] = plain(section, Place("options", Path(), Path()))
        return copied
