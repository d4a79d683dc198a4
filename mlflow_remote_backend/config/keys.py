"""Every key of backend_config, once: what it takes, its default, what it means. ``KEYS`` is the specification.

The patterns are regular expressions that ECMAScript (JSON Schema's) and Python read alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..job import Resources, Retry
from .kinds import (
    CPU,
    DURATION,
    DURATION_OR_ZERO,
    FLAG,
    SIZE,
    TEXT,
    Convert,
    Key,
    Kind,
    NumberAsText,
    Open,
    Place,
    Section,
    Text,
    choice,
    count,
    exact,
    list_of,
    map_of,
    one_of,
)
from .options import (
    DockerOptions,
    EnvCache,
    EnvironmentOptions,
    KubernetesOptions,
    KubernetesVolume,
    RegisterModel,
    SecretRef,
    SnapshotOptions,
)


def _text(name: str, pattern: str, hint: str = "", max_length: int | None = None, expects: str = "") -> Text:
    expects = expects or f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return Text(name=name, expects=expects, hint=hint, pattern=exact(pattern), max_length=max_length)


def _absolute_path(path: str, place: Place) -> str:
    return str(place.home / path[2:] if path.startswith("~/") else place.base / path)


def _absolute_source(volume: str, place: Place) -> str:
    """Make the host's part of ``HOST:CONTAINER[:MODE]`` absolute. A plain name is a volume, not a folder."""
    drive = 2 if re.match(r"[A-Za-z]:[\\/]", volume) else 0
    end = volume.index(":", drive)
    source = volume[:end]
    is_path = source.startswith((".", "~")) or "/" in source or "\\" in source
    return (_absolute_path(source, place) if is_path and not drive else source) + volume[end:]


def _absolute_store(uri: str, place: Place) -> str:
    """Make a relative path, ``file:`` or ``sqlite:`` URI absolute. Others, and MLflow's words for Databricks, stay."""
    if re.match("[A-Za-z]:|databricks|uc$", uri):  # a drive, or one of those words
        return uri
    if uri.startswith("sqlite:///") and not uri.startswith(("sqlite:////", "sqlite:///:")):
        return "sqlite:///" + _absolute_path(uri.removeprefix("sqlite:///"), place)
    if uri.startswith("file:") and not uri.startswith("file:/"):
        return "file://" + _absolute_path(uri.removeprefix("file:"), place)
    return uri if re.match("[A-Za-z][A-Za-z0-9+.-]*:", uri) else _absolute_path(uri, place)


def _solver(solver: str, place: Place) -> str:
    return _absolute_path(solver, place) if "/" in solver else solver


def _secret_ref(text: str, place: Place) -> dict[str, str]:
    name, _, key = text.partition("/")
    return {"name": name, "key": key}


def _retry(max_attempts: int | None = None, on: tuple[Any, ...] = (), exit_codes: tuple[int, ...] = ()) -> Retry:
    """Whoever says what to retry on gets 3 attempts; whoever says only how many gets them after disruptions."""
    words = tuple(dict.fromkeys(word for word in on if isinstance(word, str)))
    codes = {*exit_codes, *(code for entry in on if not isinstance(entry, str) for code in entry.get("exit_codes", ()))}
    attempts = max_attempts or (3 if words or codes else 1)
    if attempts > 1 and not words and not codes:
        words = ("disruption",)
    return Retry(attempts, words, tuple(sorted(codes)))


# ------------------------------------------------------------------------------------------- what text must look like

_VARIABLE = "[A-Za-z_][A-Za-z0-9_]*"
_REFERENCE = rf"\$(?:{_VARIABLE}|\{{{_VARIABLE}\}})"
_LITERAL_CREDENTIALS = (
    rf"://(?:[^/?#@:\s]*:(?!{_REFERENCE}@)[^/?#\s]*@|(?!{_REFERENCE}@)[^/?#@:\s]+@)"  # user:password@, token@
    rf"|/t/(?!{_REFERENCE}(?:/|$))[^/\s]"  # where conda looks for a token
)
_OURS = "MLFLOW_REMOTE_|(?:MLFLOW_RUN_ID|MLFLOW_EXPERIMENT_ID|MLFLOW_TRACKING_URI)$"
_LABEL = "[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_DNS_LABEL = "[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_DNS_NAME = rf"{_DNS_LABEL}(?:\.{_DNS_LABEL})*"
_HOST = r"[A-Za-z0-9](?:[-A-Za-z0-9.]*[A-Za-z0-9])?(?::[0-9]{1,5})?"
_IMAGE_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_REPOSITORY = rf"(?:{_HOST}/)?{_IMAGE_PART}(?:/{_IMAGE_PART})*"
_TAG = r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"

COMPUTE_NAME = _text("name of a compute", "[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_RUN_ID = _text("run id", "[A-Za-z0-9][A-Za-z0-9_-]{0,255}")
_RUN_NAME = _text("name of a run", r"[^\u0000-\u001f]+", max_length=250)
_SUBMISSION_ID = _text(
    "submission id", "[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}", expects="up to 128 letters, digits and ._:/@+-"
)
_PATH = Convert(name="path", expects="a path", convert=_absolute_path)
_ANY_TEXT = Text(name="text", expects="text without NUL bytes", pattern=exact(r"[^\u0000]*"))
_VALUE = one_of(_ANY_TEXT, NumberAsText(), name="text", expects="text without NUL bytes, or a number")
_VARIABLE_NAME = _text(
    "variable name",
    f"(?!{_OURS}){_VARIABLE}",
    "We set MLFLOW_REMOTE_*, MLFLOW_RUN_ID, MLFLOW_EXPERIMENT_ID and MLFLOW_TRACKING_URI (see the key tracking_uri).",
    expects="a variable name, and none of those that we set",
)
_NODE_LABEL = _text("label name", rf"(?:{_DNS_NAME}/)?{_LABEL}", max_length=317, expects="a label name of Kubernetes")
_LABEL_NAME = _text(
    "label name",
    rf"(?!mlflow-remote/|app\.kubernetes\.io/managed-by$)(?:{_DNS_NAME}/)?{_LABEL}",
    "The labels mlflow-remote/* and app.kubernetes.io/managed-by are ours.",
    max_length=317,
    expects="a label name of Kubernetes, such as team or example.com/team, that is not one of ours",
)
_LABEL_VALUE = one_of(
    _text("label value", f"(?:{_LABEL})?", expects="a label value: up to 63 letters, digits, and -_. inside"),
    NumberAsText(takes=("integer",), minimum=0),
    name="text",
    expects="a label value: up to 63 letters, digits, and -_. inside",
)
_TAG_NAME = _text("tag name", r"(?!mlflow_remote\.)[^\u0000-\u001f]+", "The tags mlflow_remote.* are ours.", 250)
_IMAGE = _text("image reference", _REPOSITORY + _TAG, "Such as registry.example.com/team/image:tag.", 512)
_OBJECT = _text("name of a Kubernetes object", _DNS_NAME, max_length=253)
_CREDENTIALS_HINT = "Name variables instead: https://$MY_USER:$MY_PASSWORD@host/path, and set them where you submit."
_URL = _text(
    "URL",
    rf"(?!.*(?:{_LITERAL_CREDENTIALS}))[A-Za-z][A-Za-z0-9+.-]*:[^\u0000\s]+",
    _CREDENTIALS_HINT,
    max_length=4096,
    expects="a URL without literal credentials",
)
_CHANNEL = _text(
    "channel",
    rf"(?!.*(?:{_LITERAL_CREDENTIALS}))[^\u0000\s]+",
    _CREDENTIALS_HINT,
    max_length=4096,
    expects="a channel's name or URL, without literal credentials",
)
_TRACKING_URI = Convert(
    name="URI",
    expects="a tracking URI without credentials",
    hint="Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where you submit: they travel as secrets. "
    "A database's password cannot: put an MLflow server before the database.",
    pattern=exact(r"(?![^\u0000]*://[^/?#\s]*@)[^\u0000]+"),
    max_length=4096,
    convert=_absolute_store,
)
_OUTPUT = _text(
    "folder",
    r"(?![/~])(?!(?:\./*)+$)(?!(?:[^\u0000]*/)?\.\.(?:/|$))[^\u0000]+",
    max_length=4096,
    expects="a folder inside the project, relative to it, such as outputs",
)
_DOCKER_VOLUME = Convert(
    name="`SOURCE:TARGET[:MODE]`",
    expects="SOURCE:TARGET or SOURCE:TARGET:ro, the target absolute",
    pattern=exact(r"(?:[A-Za-z]:[\\/][^:\u0000]*|[^:\u0000]+):/[^:\u0000]*(?::[A-Za-z,]+)?"),
    max_length=4096,
    convert=_absolute_source,
)
_DAEMON = _text(
    "URL",
    r"(?![^\u0000]*://[^/?#@\s]*:[^/?#\s]*@)[^\u0000]+",
    max_length=4096,
    expects="a daemon's URL without a password",
)
_DOCKER_USER = _text("user", "[A-Za-z0-9_][A-Za-z0-9_.-]*(?::[A-Za-z0-9_][A-Za-z0-9_.-]*)?", max_length=128)
_DOCKER_ARGUMENT = one_of(_ANY_TEXT, NumberAsText(), FLAG, name="text, number or boolean")
_CAPABILITY = _text("capability", "[A-Z][A-Z_]{1,40}", expects="a Linux capability without CAP_, such as SYS_PTRACE")
_MOUNT = _text("absolute path", r"/[^:\u0000]*")
_PLATFORM = choice("linux/amd64", "linux/arm64")
_SOLVER = Convert(name="text", expects="rattler, or a conda, mamba or micromamba executable", convert=_solver)
_CUDA = _text("version", r"[0-9]{1,4}(?:\.[0-9]{1,4}){0,2}", expects='a version as text, such as "12.4"')

# ----------------------------------------------------------------------------------------------------------- the keys

_ENVIRONMENT = Section(
    of=EnvironmentOptions,
    keys=(
        Key("frozen", FLAG, "Refuse to run if a committed lock does not fit its spec, instead of locking anew.", False),
        Key("channels", list_of(_CHANNEL), "conda channels to use instead of those that `conda.yaml` names."),
        Key("channel_alias", _URL, "URL that a channel's bare name is appended to."),
        Key("channel_map", map_of(_URL, _CHANNEL), "Channel names or URLs, and the mirrors to use in their place."),
        Key("index_url", _URL, "Python package index (PEP 503) to lock and install from. Default: what pip is told."),
        Key("solver", _SOLVER, "`rattler` (built in), or the conda, mamba or micromamba to call.", "rattler"),
        Key("cuda", _CUDA, "CUDA version that the target's driver offers. Default: no CUDA."),
    ),
)
_RESOURCES = Section(
    of=Resources,
    keys=(
        Key("cpu", CPU, "Cores, as a number or in thousandths (`500m`)."),
        Key("memory", SIZE, "Main memory.", field="memory_bytes"),
        Key("gpu", count(0, 1024), "Number of GPUs."),
        Key("gpu_resource", _NODE_LABEL, "What Kubernetes calls the GPU.", "nvidia.com/gpu"),
        Key("shm_size", SIZE, "Size of `/dev/shm`.", field="shm_size_bytes"),
        Key("ephemeral_storage", SIZE, "Room on the node's disk.", field="ephemeral_storage_bytes"),
    ),
)
_EXIT_CODES = Key("exit_codes", list_of(count(1, 255)), "Exit codes of the program after which to try again.")
_RETRY_ON = one_of(
    choice("disruption", "oom"),
    Section(keys=(_EXIT_CODES,), expects="{exit_codes: [..]}"),
    name="`disruption`, `oom` or `{exit_codes: [..]}`",
)
_RETRY = Section(
    of=_retry,
    keys=(
        Key("max_attempts", count(1, 100), "Attempts in all, the first included. Default: 1, or 3 if `on` is said."),
        Key(
            "on",
            list_of(_RETRY_ON),
            "When to try again: `disruption` (evicted, preempted, node lost), `oom`, and exit codes. "
            "Default: `[disruption]` if `max_attempts` is over 1.",
        ),
        _EXIT_CODES,
    ),
)
_SNAPSHOT = Section(
    of=SnapshotOptions,
    keys=(
        Key("include", list_of(TEXT), "Patterns to pack although an ignore file names them (git's syntax)."),
        Key("exclude", list_of(TEXT), "Patterns to leave out besides those of the ignore files (git's syntax)."),
        Key("max_size", SIZE, "Refuse to pack more than this.", "300MiB", field="max_size_bytes"),
        Key("allow_secrets", FLAG, "Pack files that look like credentials instead of refusing.", False),
        Key("in_place", FLAG, "`local` only: run in the project folder itself, not in an unpacked snapshot.", False),
    ),
)
_REGISTER_MODEL = Section(
    of=RegisterModel,
    keys=(
        Key("name", TEXT, "Name of the registered model.", required=True),
        Key("path", TEXT, "Path of the model in the run's artifacts.", "model"),
        Key("alias", TEXT, "Alias to set on the new version."),
        Key("tags", map_of(_VALUE, _TAG_NAME), "Tags of the new version."),
    ),
)
_DOCKER = Section(
    of=DockerOptions,
    keys=(
        Key("image", _IMAGE, "Image to run in. Default: the project's, else a plain one with Python."),
        Key("build", FLAG, "Bake the environment into an image by its lock key, instead of using a volume.", False),
        Key("repository", _text("repository", _REPOSITORY, max_length=400), "Where built images are pushed to."),
        Key("pull", choice("missing", "always", "never"), "When to pull the image.", "missing"),
        Key("base_url", _DAEMON, "The daemon's URL. Default: `DOCKER_HOST`, else the current Docker context's."),
        Key("context", TEXT, "Docker context to use."),
        Key("network", TEXT, "Docker network to join. Default: Docker's."),
        Key("volumes", list_of(_DOCKER_VOLUME), "What to mount: a volume's name or a path of the daemon's host."),
        Key("gpus", one_of(choice("all"), count(0, 1024), list_of(TEXT)), "`all`, a number, or device ids."),
        Key("user", _DOCKER_USER, "`USER` or `USER:GROUP` in the container. Default: you; files are then yours."),
        Key("capabilities", list_of(_CAPABILITY), "Linux capabilities to keep; all others are dropped."),
        Key("runtime", TEXT, "Container runtime, such as `nvidia` or `runsc`. Default: the daemon's."),
        Key("platform", _PLATFORM, "Platform of the environment. Default: Linux on this machine's processor."),
        Key(
            "env_cache",
            _text("volume name", "[A-Za-z0-9][A-Za-z0-9_.-]+", max_length=200),
            "Docker volume that keeps environments.",
            "mlflow-remote-environments",
        ),
        Key(
            "args",
            map_of(_DOCKER_ARGUMENT),
            "Arguments of `docker run`: `{gpus: all}` is `--gpus all`, `{t: true}` is `-t`.",
            secret=True,
        ),
    ),
)
_VOLUME = Section(
    of=KubernetesVolume,
    only_one=("pvc", "secret", "config_map", "host_path", "source"),
    keys=(
        Key("mount_path", _MOUNT, "Where the program sees it.", required=True),
        Key("pvc", _OBJECT, "Name of a PersistentVolumeClaim."),
        Key("secret", _OBJECT, "Name of a Secret."),
        Key("config_map", _OBJECT, "Name of a ConfigMap."),
        Key("host_path", _MOUNT, "A path of the node."),
        Key("source", Open(), "Any other volume source in Kubernetes' words, such as `{nfs: {..}}`."),
        Key("sub_path", TEXT, "The part of the volume to mount."),
        Key("read_only", FLAG, "Mount it read-only.", False),
    ),
)
_ENV_CACHE = Section(
    of=EnvCache,
    only_one=("pvc", "host_path"),
    keys=(
        Key("pvc", _OBJECT, "Name of a PersistentVolumeClaim."),
        Key("host_path", _MOUNT, "A path of the node, only where the namespace allows it."),
    ),
)
_POD_TEMPLATE = one_of(_PATH, Open(), name="path or mapping", expects="a path or a mapping")
_KUBERNETES = Section(
    of=KubernetesOptions,
    keys=(
        Key("context", TEXT, "Context of the kubeconfig. Default: the current one, or the cluster that we are in."),
        Key("kubeconfig", _PATH, "The kubeconfig. Default: `KUBECONFIG`, else `~/.kube/config`."),
        Key("namespace", _text("namespace", _DNS_LABEL), "Namespace of the job. Default: the context's."),
        Key("image", _IMAGE, "Image of the program. Default: the project's, else the runner image."),
        Key("runner_image", _IMAGE, "Image of our own containers, as `mlflow-remote image build` makes it. Needed."),
        Key("sidecar_cpu", CPU, "Cores of our container beside the program. Default: it asks for 10m, and may have 1."),
        Key(
            "sidecar_memory",
            SIZE,
            "Its main memory. Default: it asks for 64Mi, and may have 256Mi.",
            field="sidecar_memory_bytes",
        ),
        Key("image_pull_secrets", list_of(_OBJECT), "Secrets to pull images with."),
        Key("image_pull_policy", choice("Always", "IfNotPresent", "Never"), "Default: Kubernetes' rule for the tag."),
        Key("service_account", _OBJECT, "Service account of the pod. Default: the namespace's."),
        Key("api_access", FLAG, "Mount the service account's token: the program may submit jobs.", False),
        Key(
            "security",
            choice("restricted", "image"),
            "`restricted`: as PodSecurity's strictest level wants; `image`: as the image wants, root included.",
            "restricted",
        ),
        Key("run_as_user", count(0), "Numeric user id of the containers. Default: the compute's choice."),
        Key("read_only_root", FLAG, "Make the program's root file system read-only.", False),
        Key("node_selector", map_of(_LABEL_VALUE, _NODE_LABEL), "Labels that the node must have."),
        Key("tolerations", list_of(Open()), "Tolerations in Kubernetes' words."),
        Key("affinity", Open(), "Affinity in Kubernetes' words."),
        Key("priority_class", _OBJECT, "Priority class of the pod."),
        Key("queue", _text("queue name", _LABEL), "Kueue's local queue."),
        Key(
            "platform",
            _PLATFORM,
            "Platform of the environment, and of the node. Default: linux/amd64, any node.",
        ),
        Key("volumes", list_of(_VOLUME), "Volumes to mount into the program's container."),
        Key("env_cache", _ENV_CACHE, "Where environments are kept between pods. Default: not at all."),
        Key("pod_template", _POD_TEMPLATE, "Pod or Job to start from, inline or a YAML file."),
        Key("fail_fast_unschedulable", FLAG, "Fail at once, not after `start_timeout`, if no node fits.", False),
        Key("ttl", DURATION_OR_ZERO, "How long a finished Job is kept.", "1d", field="ttl_s"),
    ),
)
_SECRET_REF = one_of(
    Convert(
        name="text",
        expects="SECRET/KEY",
        pattern=exact("[A-Za-z0-9][A-Za-z0-9._-]{0,252}/[A-Za-z0-9._-]{1,253}"),
        convert=_secret_ref,
        hint="Name a secret that exists at the compute. Values of your own travel by pass_env.",
    ),
    Section(
        of=SecretRef,
        keys=(
            Key("name", _text("secret's name", "[A-Za-z0-9][A-Za-z0-9._-]{0,252}"), "The secret.", required=True),
            Key("key", _text("secret's key", "[A-Za-z0-9._-]{1,253}"), "The key in it.", required=True),
        ),
    ),
    name="`SECRET/KEY` or `{name, key}`",
    expects="SECRET/KEY, or {name: SECRET, key: KEY}",
)

KEYS = Section(
    keys=(
        Key("compute", COMPUTE_NAME, "`local`, `docker`, `kubernetes`, an installed compute or a named one.", "local"),
        Key(
            "env_manager",
            choice("conda", "virtualenv", "uv", "local"),
            "What makes the environment; `local` uses what is there. Default: what the project declares.",
        ),
        Key("environment", _ENVIRONMENT, "How the environment is locked."),
        Key(
            "wait",
            one_of(choice("auto"), FLAG),
            "Block until the run ends. `auto`: under the `mlflow` command or with `synchronous=True`.",
            "auto",
        ),
        Key("stream_output", FLAG, "Show the program's log while waiting.", True),
        Key("on_interrupt", choice("cancel", "detach"), "What the first Ctrl-C does; a second one detaches.", "cancel"),
        Key("run_id", _RUN_ID, "Use this run instead of a new one (`--run-id`).", per_run=True),
        Key("run_name", _RUN_NAME, "Name of the run (`--run-name`).", per_run=True),
        Key("submission_id", _SUBMISSION_ID, "Idempotency: the same id never makes two jobs.", per_run=True),
        Key("tags", map_of(_VALUE, _TAG_NAME), "Further tags of the run."),
        Key(
            "tracking_uri",
            _TRACKING_URI,
            "The tracking server as the job reaches it. Default: `KUBE_MLFLOW_TRACKING_URI` from the environment "
            "(unless the compute is `local`), else the caller's tracking URI.",
        ),
        Key("env_vars", map_of(_VALUE, _VARIABLE_NAME), "Variables of the program, with their values.", secret=True),
        Key("pass_env", list_of(_VARIABLE_NAME), "Names of your variables to copy, as secrets.", secret=True),
        Key(
            "secrets",
            map_of(_SECRET_REF, _VARIABLE_NAME),
            "Variables of the program that come from secrets which exist at the compute.",
            secret=True,
        ),
        Key("resources", _RESOURCES, "What the program may use. Default: no limits."),
        Key("timeout", DURATION, "How long the program may run. Default: no limit.", field="timeout_s"),
        Key("grace_period", DURATION_OR_ZERO, "From SIGTERM to SIGKILL.", "30s", field="grace_period_s"),
        Key(
            "finalize_timeout",
            DURATION,
            "How long uploading and finalising may take after the program.",
            "30m",
            field="finalize_timeout_s",
        ),
        Key("start_timeout", DURATION, "How long to wait for a place to run.", "30m", field="start_timeout_s"),
        Key(
            "image_pull_timeout",
            DURATION,
            "How long to wait for a registry that does not answer.",
            "10m",
            field="image_pull_timeout_s",
        ),
        Key(
            "node_lost_timeout",
            DURATION,
            "How long to wait for a node that does not answer.",
            "15m",
            field="node_lost_timeout_s",
        ),
        Key("retry", _RETRY, "When to try again, within the same run. Default: never."),
        Key("snapshot", _SNAPSHOT, "What of the project folder is packed."),
        Key("outputs", list_of(_OUTPUT), "Folders to upload, relative to the project.", ["outputs"]),
        Key("log_limit", SIZE, "Cut the stored log there. Default: nothing is cut.", field="log_limit_bytes"),
        Key("register_model", _REGISTER_MODEL, "Register a model of the run once it has finished."),
        Key("labels", map_of(_LABEL_VALUE, _LABEL_NAME), "Labels on what is created."),
        Key("annotations", map_of(_VALUE, _LABEL_NAME), "Annotations on what is created."),
        Key("docker", _DOCKER, "Read by the compute `docker`."),
        Key("kubernetes", _KUBERNETES, "Read by the compute `kubernetes`."),
        Key("SYNCHRONOUS", FLAG, "From MLflow: whether `run()` shall block.", field="synchronous", per_run=True),
        Key(
            "STORAGE_DIR",
            _PATH,
            "From MLflow (`--storage-dir`): where `local` downloads parameters of type `path`.",
            field="storage_dir",
            per_run=True,
        ),
        Key(
            "docker_auth",
            map_of(one_of(_ANY_TEXT, FLAG, name="text or boolean")),
            "From MLflow: credentials for the registry, as the `login` of Docker's Python client takes them.",
            per_run=True,
            secret=True,
        ),
    ),
)


@dataclass(frozen=True)
class Alias:
    """Another spelling of a key, both dotted. ``option``: of ``mlflow run``, from which MLflow fills it.

    ``kind``: what it takes, if not what ``key`` takes. ``convert``: from that to what ``key`` holds; None: nothing.
    """

    name: str
    key: str
    option: str = ""
    kind: Kind | None = None
    convert: Callable[[Any], Any] = lambda value: value


#: What MLflow injects, and what users of Azure ML and of MLflow's own Kubernetes backend write.
ALIASES = (
    Alias("COMPUTE", "compute"),
    Alias("ENV_MANAGER", "env_manager", "--env-manager"),
    Alias("USE_CONDA", "env_manager", kind=FLAG, convert=lambda use: None if use else "local"),
    Alias("STREAM_OUTPUT", "stream_output"),
    Alias("DOCKER_ARGS", "docker.args", "--docker-args"),
    Alias("build_image", "docker.build", "--build-image", kind=FLAG, convert=lambda build: build or None),
    Alias("repository-uri", "docker.repository"),
    Alias("docker.repository-uri", "docker.repository"),
    Alias("kube-context", "kubernetes.context"),
    Alias("kubernetes.kube-context", "kubernetes.context"),
    Alias("kube-job-template-path", "kubernetes.pod_template"),
    Alias("kubernetes.kube-job-template-path", "kubernetes.pod_template"),
    Alias("kubernetes.ttl_seconds_after_finished", "kubernetes.ttl"),
)

ALL_KEYS = dict(KEYS.walk())
