"""A job spec -> the Kubernetes objects that run it, as plain dicts. Pure.

One Job with one pod of three containers, in the order in which Kubernetes starts them:

    observe   native sidecar, first init container: uploads log and outputs, writes the final status
    prepare   second init container: snapshot, environment, command
    main      the program, started by ``execute`` in the project's image or in the runner image

and one Secret that the Job owns: the envelope and the values of secret variables. The manifest itself holds no secret
value and no parameter, only digests. They share one volume, ROOT, that lives as long as the pod.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError
from ...job import JobSpec, Limits, Resources, Retry
from ...runner import envelope as wire
from ...version import __version__
from . import names

MAIN, PREPARE, OBSERVE = "main", "prepare", "observe"

ROOT = "/mlflow-remote"
SPOOL, WORK, TOOLS, HOME = f"{ROOT}/spool", f"{ROOT}/work", f"{ROOT}/tools", f"{ROOT}/home"
CACHE = "/mlflow-remote-cache"
JOB_FILES = "/mlflow-remote-job"
ENVELOPE_FILE = "envelope.json"
TOLD_TO_END = "/tmp/told-to-end"  # our own containers' /tmp, which the program does not see

DEFAULT_USER = 1000
MAX_PLAIN_ENVELOPE_BYTES = 64 << 10
MAX_SECRET_BYTES = 1_000_000  # Kubernetes takes 1 MiB
TTL_S = 86_400  # how long a finished Job stays, for people who look with kubectl
PREPARE_MEMORY_BYTES = 512 << 20  # unpacking and linking an environment must not fail for a program that needs little
OBSERVE_RESOURCES = {
    "requests": {"cpu": "10m", "memory": "64Mi"},
    "limits": {"cpu": "1", "memory": "256Mi"},
}
#: The attempt, counted from 0, as a pod of ours learns it.
ATTEMPT_FIELD = f"metadata.annotations['{names.ATTEMPT}']"
#: What observe exits with where the failed attempt shall be followed by another one: the Job's rules look for it.
RETRY_EXIT_CODE = 75
#: Slack between the fences for time: each next one only matters where the one before it failed.
POD_SLACK_S = 60
JOB_SLACK_S = 7 * 86_400  # this clock runs while the pod waits for a node, too: a healthy job must not be cut short

#: For who would move the pod to save a node: the cluster autoscaler, and Karpenter. Both leave it until it has ended.
LEFT_IN_PEACE = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}

#: Annotations that differ between two jobs of the same kind.
IDENTITY_ANNOTATIONS = (names.RUN_ID, names.SUBMISSION_ID, names.SNAPSHOT, names.ENVELOPE)

#: Starts execute with whatever Python the image has, else with a shell. The image needs nothing of ours.
START_SCRIPT = (
    f"for python in python3 python; do"
    f' if command -v "$python" >/dev/null 2>&1; then exec "$python" -I -S {TOOLS}/execute.py --tee {SPOOL}; fi;'
    f" done; exec sh {TOOLS}/execute.sh --tee {SPOOL}"
)


#: Starts observe. A container's first process does not get a SIGTERM that it has no handler for yet, and Kubernetes
#: sends only one: a pod deleted while Python starts would wait for its whole grace. A shell is ready in milliseconds.
OBSERVE_SCRIPT = (
    f"trap ': >{TOLD_TO_END}' TERM INT; \"$@\" & "
    "while :; do wait $!; code=$?; kill -0 $! 2>/dev/null || exit $code; done"
)


@dataclass(frozen=True)
class SecretNames:
    """Names of the variables that travel as secrets: the program's, and those of our runner only."""

    program: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What is created for a job. ``release``: the merge patch that lets the suspended Job start."""

    job: dict[str, Any]
    release: dict[str, Any]
    secret_name: str
    warnings: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return str(self.job["metadata"]["name"])


def build(spec: JobSpec, secret_names: SecretNames, envelope: str) -> Manifest:
    """The objects for this spec. ``envelope``: its wire form, of which the manifest holds the digest.

    Raises ConfigError where the options make no pod.
    """
    options = spec.options
    identity = spec.run.run_id if spec.run.opened else f"plan-{spec.submission_id}"
    labels = {**spec.labels, names.MANAGED_BY: names.MANAGER, names.RUN_ID: names.label_value(spec.run.run_id)}
    secret_name = names.secret_name(identity, spec.submission_id)
    pod = _pod(spec, secret_names, secret_name)
    queue = options.get("queue")
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": names.job_name(identity),
            "labels": labels,
            "annotations": {**spec.annotations, **_annotations(spec, envelope)},
        },
        "spec": {
            "suspend": True,
            **_completion(spec.retry),
            **_fence("activeDeadlineSeconds", job_deadline_s(spec.limits, spec.retry)),
            "ttlSecondsAfterFinished": math.ceil(options.get("ttl_s", TTL_S)),
            "template": {
                "metadata": {
                    "labels": labels,
                    "annotations": {
                        **LEFT_IN_PEACE,
                        "kubectl.kubernetes.io/default-container": MAIN,
                        **spec.annotations,
                        names.RUN_ID: spec.run.run_id,
                    },
                },
                "spec": pod,
            },
        },
    }
    release: dict[str, Any] = {"metadata": {"annotations": {names.RELEASED: "true"}}}
    release |= {} if queue else {"spec": {"suspend": False}}
    release["metadata"] |= {"labels": {names.QUEUE: queue}} if queue else {}
    return Manifest(job, release, secret_name, _docker_env_warnings(spec))


def secret(
    manifest: Manifest, owner_uid: str, envelope: str, program: Mapping[str, str], runner: Mapping[str, str]
) -> dict[str, Any]:
    """The Secret owned by the Job with this uid. It dies with its owner; nobody can change it."""
    values = {f"program.{name}": value for name, value in program.items()}
    values |= {f"runner.{name}": value for name, value in runner.items()}
    data = {ENVELOPE_FILE: _encoded(envelope), **{name: _base64(value.encode()) for name, value in values.items()}}
    size_bytes = sum(map(len, data.values())) * 3 // 4
    if size_bytes > MAX_SECRET_BYTES:
        raise ConfigError(
            f"The job's description and its secret variables have {size_bytes} bytes; a Secret of Kubernetes holds "
            f"{MAX_SECRET_BYTES}.",
            hint="Pass large values as files of the project or as artifacts.",
        )
    metadata = manifest.job["metadata"]
    owner = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": manifest.name,
        "uid": owner_uid,
        "controller": False,
        "blockOwnerDeletion": False,  # true needs rights over finalizers, which OpenShift enforces
    }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": manifest.secret_name,
            "labels": {key: metadata["labels"][key] for key in (names.MANAGED_BY, names.RUN_ID)},
            "ownerReferences": [owner],
        },
        "immutable": True,
        "type": "Opaque",
        "data": data,
    }


def _encoded(envelope: str) -> str:
    """The envelope as it is for people who look at it, compressed where it is large: ``envelope.load`` takes both."""
    plain = envelope.encode()
    return _base64(plain if len(plain) <= MAX_PLAIN_ENVELOPE_BYTES else wire.compressed(envelope))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def images(built: Manifest) -> list[str]:
    """The images of all containers, each once."""
    pod = built.job["spec"]["template"]["spec"]
    return list(dict.fromkeys(each["image"] for each in (*pod["initContainers"], *pod["containers"])))


def main_digest(built: Manifest) -> str:
    """The digest of the program's image, empty where it is not pinned."""
    main = built.job["spec"]["template"]["spec"]["containers"][0]
    return str(main["image"].partition("@")[2])


def with_images(built: Manifest, names_to_digests: Mapping[str, str]) -> Manifest:
    """The same objects with images named by digest where one is known."""
    job = copy.deepcopy(built.job)
    pod = job["spec"]["template"]["spec"]
    for each in (*pod["initContainers"], *pod["containers"]):
        each["image"] = names_to_digests.get(each["image"], each["image"])
    return dataclasses.replace(built, job=job)


def released(built: Manifest) -> Manifest:
    """The same Job as it is after its release."""
    job = copy.deepcopy(built.job)
    for kind in ("labels", "annotations"):
        job["metadata"][kind] |= built.release["metadata"].get(kind, {})
    job["spec"] |= built.release.get("spec", {})
    return dataclasses.replace(built, job=job)


def envelope_digest(envelope: str) -> str:
    return "sha256:" + hashlib.sha256(envelope.encode()).hexdigest()


def _annotations(spec: JobSpec, envelope: str) -> dict[str, str]:
    limits = spec.limits
    patience = {
        "start_timeout_s": limits.start_timeout_s,
        "image_pull_timeout_s": limits.image_pull_timeout_s,
        "node_lost_timeout_s": limits.node_lost_timeout_s,
        "grace_period_s": limits.grace_period_s,
        "fail_fast_unschedulable": bool(spec.options.get("fail_fast_unschedulable")),
    }
    return {
        names.RUN_ID: spec.run.run_id,
        names.SUBMISSION_ID: spec.submission_id,
        names.SNAPSHOT: spec.snapshot.digest,
        names.ENVELOPE: envelope_digest(envelope),
        names.ATTEMPTS: str(spec.retry.max_attempts),
        names.LIMITS: json.dumps(patience, sort_keys=True),
        names.VERSION: __version__,
        names.TRACKING: names.tracking_mark(spec.run.tracking_uri),
    }


# ------------------------------------------------------------------------------------------------ time and attempts


def pod_deadline_s(limits: Limits) -> int | None:
    """The second fence, of the kubelet: it ends the pod and keeps it with its log. None: no limit."""
    if limits.timeout_s is None:
        return None
    parts = (limits.start_timeout_s, limits.timeout_s, limits.grace_period_s, limits.finalize_timeout_s)
    return math.ceil(sum(parts)) + POD_SLACK_S


def job_deadline_s(limits: Limits, retry: Retry) -> int | None:
    """The last fence, of the Job controller, which deletes the pod: for when no kubelet is left to keep the second."""
    pod_s = pod_deadline_s(limits)
    if pod_s is None:
        return None
    return retry.max_attempts * pod_s + math.ceil(limits.start_timeout_s) + JOB_SLACK_S


def _fence(key: str, seconds: int | None) -> dict[str, int]:
    return {} if seconds is None else {key: seconds}


def _completion(retry: Retry) -> dict[str, Any]:
    """One pod at a time, one completion; another attempt only where a rule says so.

    Indexed, because only ``backoffLimitPerIndex`` knows FailIndex and tells each pod its attempt. ``Ignore`` is never
    used: it makes pods without end. Rules name their container: the sidecar's exit code would match others.
    """
    return {
        "completionMode": "Indexed",
        "completions": 1,
        "parallelism": 1,
        "backoffLimitPerIndex": retry.max_attempts - 1,
        "maxFailedIndexes": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _rules(retry)},
    }


def _rules(retry: Retry) -> list[dict[str, Any]]:
    disruption = {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    rules: list[dict[str, Any]] = []
    if retry.max_attempts > 1:
        again = {"containerName": OBSERVE, "operator": "In", "values": [RETRY_EXIT_CODE]}
        rules.append({"action": "Count", "onExitCodes": again})
        rules.append({"action": "Count" if "disruption" in retry.on else "FailIndex", **disruption})
    for container in (MAIN, PREPARE):
        failed = {"containerName": container, "operator": "NotIn", "values": [0]}
        rules.append({"action": "FailIndex", "onExitCodes": failed})
    return rules


# ----------------------------------------------------------------------------------------------------------- the pod


def _pod(spec: JobSpec, secret_names: SecretNames, secret_name: str) -> dict[str, Any]:
    options = spec.options
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(spec.limits.grace_period_s + spec.limits.finalize_timeout_s),
        **_fence("activeDeadlineSeconds", pod_deadline_s(spec.limits)),
        "automountServiceAccountToken": bool(options.get("api_access")),
        "enableServiceLinks": False,
        "securityContext": pod_security(options),
        "initContainers": [_observe(spec, secret_names, secret_name), _prepare(spec, secret_names, secret_name)],
        "containers": [_main(spec, secret_names, secret_name)],
        "volumes": _volumes(spec, secret_name),
    }
    return pod | scheduling(options)


def scheduling(options: Mapping[str, Any]) -> dict[str, Any]:
    """On Linux, and on the processor that ``platform`` names, unless the node selector says otherwise."""
    here = {"kubernetes.io/os": "linux"}
    processor = str(options.get("platform") or "").rpartition("/")[2]
    here |= {"kubernetes.io/arch": processor} if processor else {}
    wanted = {
        "serviceAccountName": options.get("service_account"),
        "imagePullSecrets": [{"name": name} for name in options.get("image_pull_secrets") or ()],
        "nodeSelector": {**here, **(options.get("node_selector") or {})},
        "tolerations": list(options.get("tolerations") or ()),
        "affinity": options.get("affinity"),
        "priorityClassName": options.get("priority_class"),
    }
    return {key: value for key, value in wanted.items() if value}


def _observe(spec: JobSpec, secret_names: SecretNames, secret_name: str) -> dict[str, Any]:
    return {
        "name": OBSERVE,
        "restartPolicy": "Always",
        **runner_image(spec.options),
        "command": ["/bin/sh", "-c", OBSERVE_SCRIPT, "observe", "python", "-m", "mlflow_remote_backend.runner.observe"],
        "args": [
            *("--envelope", f"{JOB_FILES}/{ENVELOPE_FILE}", "--spool", SPOOL),
            *("--work", WORK, "--told-to-end", TOLD_TO_END),
        ],
        "env": _runner_env(secret_names, secret_name),
        "resources": observe_resources(spec.options),
        "securityContext": container_security(spec.options, read_only_root=True),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "job", "mountPath": ROOT},
            {"name": "runner-tmp", "mountPath": "/tmp"},
            {"name": "files", "mountPath": JOB_FILES, "readOnly": True},
        ],
    }


def _prepare(spec: JobSpec, secret_names: SecretNames, secret_name: str) -> dict[str, Any]:
    mounts = [
        {"name": "job", "mountPath": ROOT},
        {"name": "runner-tmp", "mountPath": "/tmp"},
        {"name": "files", "mountPath": JOB_FILES, "readOnly": True},
    ]
    return {
        "name": PREPARE,
        **runner_image(spec.options),
        "command": ["python", "-m", "mlflow_remote_backend.runner.prepare"],
        "args": [
            *("--envelope", f"{JOB_FILES}/{ENVELOPE_FILE}", "--spool", SPOOL),
            *("--work", WORK, "--cache", CACHE, "--tools", TOOLS),
        ],
        "env": _runner_env(secret_names, secret_name),
        "resources": prepare_resources(spec.resources),
        "securityContext": container_security(spec.options, read_only_root=True),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts + _cache_mount(spec, read_only=False),
    }


def _main(spec: JobSpec, secret_names: SecretNames, secret_name: str) -> dict[str, Any]:
    options = spec.options
    mounts = [{"name": "job", "mountPath": ROOT}, {"name": "tmp", "mountPath": "/tmp"}]
    if spec.resources.shm_size_bytes is not None:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    mounts += [volume_mount(index, each) for index, each in enumerate(options.get("volumes") or ())]
    container: dict[str, Any] = {
        "name": MAIN,
        "image": main_image(spec),
        **pull_policy(options),
        "command": ["/bin/sh", "-c", START_SCRIPT],
        "workingDir": ROOT,
        "env": [
            *home_env(),
            *({"name": name, "value": value} for name, value in declared_variables(spec).items()),
            _downward("MLFLOW_REMOTE_ATTEMPT", ATTEMPT_FIELD),
            *secret_env("program", secret_names.program, secret_name),
            *_reference_env(spec),
        ],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts + _cache_mount(spec, read_only=True),
    }
    extra = {"securityContext": main_security(options), "resources": resource_amounts(spec.resources)}
    return container | {key: value for key, value in extra.items() if value}


def main_image(spec: JobSpec) -> str:
    """The program's image: configured, else the project's docker_env, else the runner's."""
    return named_image(spec) or str(runner_image(spec.options)["image"])


def named_image(spec: JobSpec) -> str:
    """The image that the options or the project name, empty where neither does."""
    declared = (spec.docker_env or {}).get("image") if spec.environment.manager == "docker" else None
    return str(spec.options.get("image") or declared or "")


def _docker_env(spec: JobSpec, key: str) -> list[Any]:
    """What the project's docker_env says, where the project runs by it."""
    return list((spec.docker_env or {}).get(key) or ()) if spec.environment.manager == "docker" else []


def declared_variables(spec: JobSpec) -> dict[str, str]:
    """The ``[NAME, VALUE]`` members of ``docker_env.environment``."""
    pairs = [each for each in _docker_env(spec, "environment") if isinstance(each, (list, tuple)) and len(each) == 2]
    return {str(name): str(value) for name, value in pairs}


def copied_variables(spec: JobSpec) -> list[str]:
    """The names in ``docker_env.environment`` that are copied from the caller: their values travel as secrets."""
    return [str(each) for each in _docker_env(spec, "environment") if not isinstance(each, (list, tuple))]


def _docker_env_warnings(spec: JobSpec) -> tuple[str, ...]:
    volumes = ", ".join(map(str, _docker_env(spec, "volumes")))
    told = f"docker_env.volumes ({volumes}) name folders of a Docker host and are not mounted; see `kubernetes.volumes`"
    return (told,) if volumes else ()


def runner_image(options: Mapping[str, Any]) -> dict[str, Any]:
    image = options.get("runner_image")
    if not image:
        raise ConfigError(
            "compute kubernetes needs 'kubernetes.runner_image': the image that holds our runner.",
            key="kubernetes.runner_image",
            hint="Make it once with: mlflow-remote image build --push REPOSITORY",
        )
    return {"image": image, **pull_policy(options)}


def pull_policy(options: Mapping[str, Any]) -> dict[str, str]:
    policy = options.get("image_pull_policy")
    return {"imagePullPolicy": policy} if policy else {}


# ----------------------------------------------------------------------------------------------------- environment


def home_env() -> list[dict[str, Any]]:
    """Under an arbitrary uid there is no home, and ``getpass.getuser()`` raises, which MLflow does not catch."""
    variables = {
        "HOME": HOME,
        "USER": "mlflow",
        "LOGNAME": "mlflow",
        "XDG_CACHE_HOME": f"{HOME}/.cache",
        "MPLCONFIGDIR": f"{HOME}/.config/matplotlib",
        "TMPDIR": "/tmp",
    }
    return [{"name": name, "value": value} for name, value in variables.items()]


def _runner_env(secret_names: SecretNames, secret_name: str) -> list[dict[str, Any]]:
    fields = {
        "MLFLOW_REMOTE_ATTEMPT": ATTEMPT_FIELD,
        "MLFLOW_REMOTE_JOB_UID": f"metadata.labels['{names.JOB_UID}']",
        "MLFLOW_REMOTE_POD_NAME": "metadata.name",
        "MLFLOW_REMOTE_POD_UID": "metadata.uid",
        "MLFLOW_REMOTE_NODE": "spec.nodeName",
    }
    downward = [_downward(name, path) for name, path in fields.items()]
    client = [{"name": "MLFLOW_REMOTE_CLIENT_VERSION", "value": __version__}]
    return home_env() + downward + client + secret_env("runner", secret_names.runner, secret_name)


def _downward(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def secret_env(group: str, variables: tuple[str, ...], secret_name: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret_name, "key": f"{group}.{name}"}}}
        for name in sorted(variables)
    ]


def _reference_env(spec: JobSpec) -> list[dict[str, Any]]:
    """Variables from secrets that exist in the namespace already."""
    references = sorted(spec.secret_refs.items())
    return [{"name": name, "valueFrom": {"secretKeyRef": reference(each)}} for name, each in references]


def reference(each: Any) -> dict[str, str]:
    """``name`` and ``key``: a mapping where the spec came by the wire, a value of ours where it did not."""
    found = each if isinstance(each, Mapping) else dataclasses.asdict(each)
    return {"name": found["name"], "key": found["key"]}


# --------------------------------------------------------------------------------------------------------- resources


def resource_amounts(wanted: Resources) -> dict[str, Any]:
    """Requests equal limits: what a job was promised it has, and an out-of-memory kill hits the one who overdid it."""
    amounts: dict[str, str] = {}
    if wanted.cpu is not None:
        amounts["cpu"] = f"{math.ceil(wanted.cpu * 1000)}m"
    if wanted.memory_bytes is not None:
        amounts["memory"] = str(wanted.memory_bytes)
    if wanted.ephemeral_storage_bytes is not None:
        amounts["ephemeral-storage"] = str(wanted.ephemeral_storage_bytes)
    if wanted.gpu:
        amounts[wanted.gpu_resource] = str(wanted.gpu)
    return {"requests": dict(amounts), "limits": dict(amounts)} if amounts else {}


def observe_resources(options: Mapping[str, Any]) -> dict[str, Any]:
    wanted = resource_amounts(Resources(options.get("sidecar_cpu"), options.get("sidecar_memory_bytes")))
    return {kind: {**amounts, **wanted.get(kind, {})} for kind, amounts in OBSERVE_RESOURCES.items()}


def prepare_resources(program: Resources) -> dict[str, Any]:
    """As the program, whose place it takes before it, but never short of memory for making an environment."""
    memory = program.memory_bytes
    plain = Resources(cpu=program.cpu, memory_bytes=memory, ephemeral_storage_bytes=program.ephemeral_storage_bytes)
    resources = resource_amounts(plain)
    if memory is not None:
        resources["limits"]["memory"] = str(max(memory, PREPARE_MEMORY_BYTES))
    return resources


def _volumes(spec: JobSpec, secret_name: str) -> list[dict[str, Any]]:
    files = {"secretName": secret_name, "items": [{"key": ENVELOPE_FILE, "path": ENVELOPE_FILE}]}
    volumes: list[dict[str, Any]] = [
        {"name": "job", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "runner-tmp", "emptyDir": {}},
        {"name": "files", "secret": files},
    ]
    if spec.environment.lock_key:
        volumes.append({"name": "cache", **cache_source(spec.options.get("env_cache") or {})})
    if spec.resources.shm_size_bytes is not None:
        shm = {"medium": "Memory", "sizeLimit": str(spec.resources.shm_size_bytes)}
        volumes.append({"name": "shm", "emptyDir": shm})
    wanted = spec.options.get("volumes") or ()
    return volumes + [{"name": volume_name(index), **volume_source(each)} for index, each in enumerate(wanted)]


def volume_name(index: int) -> str:
    return f"volume-{index}"


def volume_source(volume: Mapping[str, Any]) -> dict[str, Any]:
    """Kubernetes' words for a volume of the options, which names exactly one source."""
    if volume.get("pvc"):
        return {"persistentVolumeClaim": {"claimName": volume["pvc"], "readOnly": bool(volume.get("read_only"))}}
    if volume.get("secret"):
        return {"secret": {"secretName": volume["secret"]}}
    if volume.get("config_map"):
        return {"configMap": {"name": volume["config_map"]}}
    if volume.get("host_path"):
        return {"hostPath": {"path": volume["host_path"]}}
    return dict(volume.get("source") or {"emptyDir": {}})


def volume_mount(index: int, volume: Mapping[str, Any]) -> dict[str, Any]:
    mount = {"name": volume_name(index), "mountPath": volume["mount_path"]}
    optional = {"subPath": volume.get("sub_path"), "readOnly": volume.get("read_only")}
    return mount | {key: value for key, value in optional.items() if value}


def cache_source(cache: Mapping[str, Any]) -> dict[str, Any]:
    if cache.get("pvc"):
        return {"persistentVolumeClaim": {"claimName": cache["pvc"]}}
    if cache.get("host_path"):
        return {"hostPath": {"path": cache["host_path"], "type": "Directory"}}
    return {"emptyDir": {}}


def _cache_mount(spec: JobSpec, *, read_only: bool) -> list[dict[str, Any]]:
    if not spec.environment.lock_key:
        return []
    return [{"name": "cache", "mountPath": CACHE, **({"readOnly": True} if read_only else {})}]


# ---------------------------------------------------------------------------------------------------------- security


def pod_security(options: Mapping[str, Any]) -> dict[str, Any]:
    user = _user(options)
    context: dict[str, Any] = {"seccompProfile": {"type": "RuntimeDefault"}}
    if options.get("security") != "image":
        context |= {"runAsNonRoot": True, "runAsUser": user, "runAsGroup": user}
    # The group makes volumes writable for a plain user, and what one container writes readable for the others.
    return context | {"fsGroup": user, "fsGroupChangePolicy": "OnRootMismatch"}


def _user(options: Mapping[str, Any]) -> int:
    user = options.get("run_as_user")
    return DEFAULT_USER if user is None else int(user)


def container_security(options: Mapping[str, Any], *, read_only_root: bool) -> dict[str, Any]:
    context: dict[str, Any] = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": read_only_root,
    }
    if options.get("security") == "image":  # the pod says nothing then, and our own containers stay restricted
        context |= {"runAsNonRoot": True, "runAsUser": _user(options) or DEFAULT_USER}
    return context


def main_security(options: Mapping[str, Any]) -> dict[str, Any]:
    read_only_root = bool(options.get("read_only_root"))
    if options.get("security") == "image":
        return {"readOnlyRootFilesystem": True} if read_only_root else {}
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": read_only_root,
    }
