"""A pod template of the user's as the base of our pod: what does not carry the job is kept. Pure but for ``load``.

Kept: other containers and init containers, volumes, labels, annotations, scheduling, and everything of the main
container that we do not need ourselves. Ours in any case: how the program is started, the sidecar, restart policy,
grace and deadlines. The main container is the one called ``main``; in a Job, as MLflow's ``kube-job-template-path``
names one, else the first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...job import JobSpec
from .manifest import LEFT_IN_PEACE, MAIN, Manifest, named_image

KEY = "kubernetes.pod_template"
MAX_BYTES = 1 << 20

#: Of the pod: what carries the job. Whatever else the template says wins over our defaults.
_OURS = ("restartPolicy", "terminationGracePeriodSeconds", "enableServiceLinks")
#: Of a Job as template: what is understood. The rest is ours, and saying it is worth a warning.
_JOB_FIELDS = ("template", "ttlSecondsAfterFinished")

Document = dict[str, Any]


@dataclass(frozen=True)
class PodTemplate:
    """``metadata`` and ``spec`` of the pod; ``job``: the Job around it, empty where there is none."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)

    def main(self) -> Document:
        """The container that becomes the program's, empty where the template has none."""
        containers = [copy.deepcopy(dict(each)) for each in self.spec.get("containers") or ()]
        named = [each for each in containers if each.get("name") == MAIN]
        return next(iter(named or (containers[:1] if self.job else [])), {})

    def others(self) -> list[Document]:
        main = self.main().get("name")
        return [copy.deepcopy(dict(each)) for each in self.spec.get("containers") or () if each.get("name") != main]


def load(raw: str | Mapping[str, Any] | None) -> PodTemplate | None:
    """The template that the option says: a mapping, or the path of a YAML file. Raises ConfigError."""
    if not raw:
        return None
    document = _read(Path(raw)) if isinstance(raw, str) else raw
    if not isinstance(document, Mapping):
        raise _wrong("it is not a mapping")
    with _shaped():
        return _understand(document)


@contextlib.contextmanager
def _shaped() -> Iterator[None]:
    """What stumbles over a list in the place of a mapping, or the like, is told as the template's fault."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise _wrong("it is not shaped as Kubernetes has a pod", f"{type(error).__name__}: {error}") from error


def _read(path: Path) -> Any:
    import yaml

    try:
        if path.stat().st_size > MAX_BYTES:
            raise _wrong(f"{path} is larger than a pod can be")
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _wrong(f"{path} cannot be read", str(error)) from error


def _understand(document: Mapping[str, Any]) -> PodTemplate:
    """A Job, a Pod, a PodTemplate, ``metadata`` and ``spec`` of a pod, or a pod's spec alone."""
    kind = document.get("kind")
    job: Mapping[str, Any] = document if kind == "Job" else {}
    pod: Any = document
    if kind == "Job":
        pod = (document.get("spec") or {}).get("template") or {}
    elif kind == "PodTemplate":
        pod = document.get("template") or {}
    elif kind not in (None, "Pod"):
        raise _wrong(f"it is a {kind}; expected a Job, a Pod or a PodTemplate")
    if not isinstance(pod, Mapping):
        raise _wrong("its template is not a mapping")
    if not pod.keys() & {"spec", "metadata"}:
        pod = {"spec": pod}
    template = PodTemplate(pod.get("metadata") or {}, pod.get("spec") or {}, job)
    _check(template)
    return template


def _check(template: PodTemplate) -> None:
    if template.spec.get("restartPolicy") not in (None, "Never"):
        raise _wrong("restartPolicy must be Never: another attempt is asked for by `retry`")
    for place in ("containers", "initContainers", "volumes"):
        listed = template.spec.get(place) or []
        if not isinstance(listed, list) or not all(isinstance(each, Mapping) and each.get("name") for each in listed):
            raise _wrong(f"{place} must be a list of mappings, each with a name")


def _wrong(trouble: str, words: str = "") -> ConfigError:
    return ConfigError(f"{KEY!r}: {trouble}.", key=KEY, words=words)


# -------------------------------------------------------------------------------------------------------- merging


def apply(template: PodTemplate, spec: JobSpec, built: Manifest) -> Manifest:
    """Our objects on top of the template, with a warning for each thing in it that weakens security or is not used.

    Raises ConfigError.
    """
    with _shaped():
        return _applied(template, spec, built)


def _applied(template: PodTemplate, spec: JobSpec, built: Manifest) -> Manifest:
    job = copy.deepcopy(built.job)
    ours = job["spec"]["template"]
    before = set(weaknesses(ours["spec"]))
    _merge_metadata(job["metadata"], template.job.get("metadata") or {})
    _merge_metadata(ours["metadata"], template.metadata)
    if not named_image(spec) and template.main().get("image"):
        ours["spec"]["containers"][0]["image"] = template.main()["image"]
    ours["spec"] = _merge_pod(template, ours["spec"])
    ttl = (template.job.get("spec") or {}).get("ttlSecondsAfterFinished")
    if ttl is not None:
        job["spec"]["ttlSecondsAfterFinished"] = ttl
    weakened = [each for each in weaknesses(ours["spec"]) if each not in before]
    warnings = [f"pod_template weakens security: {each}" for each in weakened] + list(_unused(template))
    return Manifest(job, built.release, built.secret_name, (*built.warnings, *warnings))


def _merge_metadata(ours: Document, theirs: Mapping[str, Any]) -> None:
    for kind in ("labels", "annotations"):
        named = theirs.get(kind) or {}
        ours[kind] = {**named, **ours.get(kind, {}), **{key: named[key] for key in LEFT_IN_PEACE if key in named}}


def _merge_pod(template: PodTemplate, ours: Document) -> Document:
    theirs = copy.deepcopy(dict(template.spec))
    merged = {**ours, **{key: value for key, value in theirs.items() if key not in _OURS}}
    if "activeDeadlineSeconds" in ours and "activeDeadlineSeconds" in theirs:
        merged["activeDeadlineSeconds"] = min(ours["activeDeadlineSeconds"], theirs["activeDeadlineSeconds"])
    for key in ("securityContext", "nodeSelector"):
        if ours.get(key) or theirs.get(key):
            first, second = (ours, theirs) if key == "securityContext" else (theirs, ours)
            merged[key] = {**(first.get(key) or {}), **(second.get(key) or {})}
    for key in ("serviceAccountName", "priorityClassName", "affinity"):  # our options name them on purpose
        if ours.get(key):
            merged[key] = ours[key]
    for key in ("tolerations", "imagePullSecrets"):
        if ours.get(key) or theirs.get(key):
            merged[key] = [*(theirs.get(key) or []), *(ours.get(key) or [])]
    merged["volumes"] = _joined("volume", theirs.get("volumes") or [], ours["volumes"])
    merged["initContainers"] = _joined("container", ours["initContainers"], theirs.get("initContainers") or [])
    others = template.others()
    merged["containers"] = [_merge_main(template.main(), ours["containers"][0]), *_apart(others, merged)]
    return merged


def _joined(what: str, first: list[Document], second: list[Document]) -> list[Document]:
    taken = {each["name"] for each in first} & {each["name"] for each in second}
    if taken:
        raise _wrong(f"the {what} name {', '.join(sorted(taken))} is used by the job itself")
    return [*first, *second]


def _apart(others: list[Document], merged: Mapping[str, Any]) -> list[Document]:
    _joined("container", others, merged["initContainers"])
    return others


def _merge_main(theirs: Document, ours: Document) -> Document:
    """Their container with our way of starting the program in it."""
    merged = {**theirs, **ours}
    for key in ("command", "args"):
        merged.pop(key, None)
    merged["command"] = ours["command"]
    names = {each["name"] for each in ours["env"]}
    merged["env"] = [each for each in theirs.get("env") or [] if each.get("name") not in names] + ours["env"]
    merged["volumeMounts"] = _mounts(theirs.get("volumeMounts") or [], ours["volumeMounts"])
    for key in ("resources", "securityContext"):
        both = _deep(ours.get(key) or {}, theirs.get(key) or {})
        if key == "resources":
            both = _deep(theirs.get(key) or {}, ours.get(key) or {})
        if both:
            merged[key] = both
    return merged


def _deep(base: Mapping[str, Any], over: Mapping[str, Any]) -> Document:
    merged = dict(base)
    for key, value in over.items():
        mappings = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _deep(merged[key], value) if mappings else value
    return merged


def _mounts(theirs: list[Document], ours: list[Document]) -> list[Document]:
    taken = {each["mountPath"] for each in theirs} & {each["mountPath"] for each in ours}
    if taken:
        raise _wrong(f"the mount path {', '.join(sorted(taken))} is used by the job itself")
    return [*theirs, *ours]


def _unused(template: PodTemplate) -> Iterator[str]:
    """What the template says and we do otherwise: silence about it would mislead."""
    main = template.main()
    for key in ("command", "args"):
        if main.get(key):
            yield f"pod_template: {key} of container {main.get('name')} is not used; the entry point is run"
    for key in template.job.get("spec") or {}:
        if key not in _JOB_FIELDS:
            yield f"pod_template: spec.{key} of the Job is not used"
    for each in template.others():
        yield (
            f"pod_template: the pod lasts, and another attempt waits, until container {each['name']} has ended too; "
            "one that serves the program belongs into initContainers, with restartPolicy: Always"
        )
    grace = template.spec.get("terminationGracePeriodSeconds")
    if grace is not None:
        yield "pod_template: terminationGracePeriodSeconds is not used; see `grace_period` and `finalize_timeout`"


# -------------------------------------------------------------------------------------------------------- printing


def without_values(template: PodTemplate, job: Document) -> Document:
    """The Job as it may be shown and stored: a template's literal variables may be secrets, so they are masked."""
    theirs = {
        (each.get("name"), entry.get("name"))
        for each in [*(template.spec.get("initContainers") or ()), template.main() | {"name": MAIN}, *template.others()]
        for entry in each.get("env") or ()
    }
    shown = copy.deepcopy(job)
    pod = shown["spec"]["template"]["spec"]
    for container in [*pod["initContainers"], *pod["containers"]]:
        for entry in container.get("env") or ():
            if "value" in entry and (container["name"], entry["name"]) in theirs:
                entry["value"] = "***"
    return shown


# -------------------------------------------------------------------------------------------------------- security


def weaknesses(pod: Mapping[str, Any]) -> list[str]:
    """What in a pod's spec is less than PodSecurity ``restricted`` asks for, or gives it rights. One phrase each."""
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    if pod.get("automountServiceAccountToken") is not False:
        found.append("a service account token is mounted")
    found += [f"volume {each['name']} is a hostPath" for each in pod.get("volumes") or () if each.get("hostPath")]
    shared = pod.get("securityContext") or {}
    for each in [*(pod.get("initContainers") or ()), *(pod.get("containers") or ())]:
        found += [f"container {each['name']}: {trouble}" for trouble in _container_weaknesses(each, shared)]
    return found


def _container_weaknesses(container: Mapping[str, Any], shared: Mapping[str, Any]) -> Iterator[str]:
    own = {**shared, **(container.get("securityContext") or {})}
    capabilities = own.get("capabilities") or {}
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if capabilities.get("add"):
        yield f"capabilities {', '.join(map(str, capabilities['add']))}"
    if "ALL" not in (capabilities.get("drop") or ()):
        yield "capabilities are not dropped"
    if own.get("runAsUser") == 0:
        yield "runs as root"
    elif own.get("runAsNonRoot") is not True:
        yield "may run as root"
    if (own.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "no seccomp profile"
