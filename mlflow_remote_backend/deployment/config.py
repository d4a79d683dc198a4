"""A deployment's config, as MLflow hands it over, -> frozen values. The only reader of its keys.

Keys that mean the same as in backend_config (``compute``, ``resources``, ``docker``, …) are read by ``config.parse``
itself, named computes included; the keys below are a deployment's own. The command line (``-C NAME=VALUE``) knows only
text: ``-C resources.memory=2Gi`` is a nested key, and a value that is JSON counts as such where text is not wanted.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import config as configuration
from ..config.keys import KEYS as RUN_KEYS
from ..config.kinds import (
    DURATION,
    TEXT,
    Key,
    Kind,
    NumberAsText,
    Place,
    Section,
    Text,
    choice,
    count,
    exact,
    map_of,
    merged,
    one_of,
    quoted,
)
from ..config.options import BackendConfig
from ..errors import ConfigError, RequestError
from .spec import Autoscale, Ingress, Secrets, Service

ORIGIN = "the deployment's config"

#: Keys of backend_config that mean the same here.
SHARED = (
    "compute", "env_manager", "environment", "env_vars", "pass_env", "secrets", "resources", "labels", "annotations",
    "start_timeout", "image_pull_timeout", "grace_period", "docker", "kubernetes", "tracking_uri",
)  # fmt: skip

_DNS = "[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_NAME = re.compile(_DNS)
_HOST = Text(name="host name", expects="a host name", pattern=exact(rf"(?:\*\.)?{_DNS}(?:\.{_DNS})*"), max_length=253)
_OBJECT = Text(
    name="name of a Kubernetes object",
    expects="an object's name",
    pattern=exact(rf"{_DNS}(?:\.{_DNS})*"),
    max_length=253,
)
_ADDRESS = Text(name="address", expects="an IP address to bind, such as 127.0.0.1", pattern=exact("[0-9a-fA-F.:]+"))
_PATH = Text(name="path", expects="a path that starts with /", pattern=exact(r"/[^\s]*"))
_VARIABLE = Text(name="variable name", expects="the name of a variable", pattern=exact("[A-Za-z_][A-Za-z0-9_]*"))
_VALUE = one_of(TEXT, NumberAsText(), name="text", expects="text or a number")

_SERVICE = Section(
    of=Service,
    keys=(
        Key("type", choice("ClusterIP", "NodePort", "LoadBalancer"), "Kubernetes: the Service's type.", "ClusterIP"),
        Key("port", count(1, 65535), "The port. Default: a free one; on Kubernetes 80."),
        Key("host", _ADDRESS, "The address to bind; `0.0.0.0` lets other machines in.", "127.0.0.1"),
    ),
)
_AUTOSCALE = Section(
    of=Autoscale,
    keys=(
        Key("min", count(1, 10000), "Fewest replicas.", 1, field="minimum"),
        Key("max", count(1, 10000), "Most replicas.", required=True, field="maximum"),
        Key("cpu", count(1, 1000), "Percent of the requested CPU at which to add.", 80, field="cpu_percent"),
    ),
)
_INGRESS = Section(
    of=Ingress,
    keys=(
        Key("host", _HOST, "The host name.", required=True),
        Key("class", _OBJECT, "The ingress class. Default: the cluster's.", field="class_name"),
        Key("tls_secret", _OBJECT, "Secret with the certificate. Default: plain HTTP."),
        Key("path", _PATH, "The path.", "/"),
    ),
)
_GIGABYTES = Kind(name="number", expects="a number over 0", takes=("number",))

OWN = Section(
    keys=(
        Key("replicas", count(1, 10000), "Kubernetes: how many pods serve.", 1),
        Key("autoscale", _AUTOSCALE, "Kubernetes: a HorizontalPodAutoscaler instead of `replicas`."),
        Key("service", _SERVICE, "How requests come in."),
        Key("ingress", _INGRESS, "Kubernetes: an Ingress before the Service."),
        Key("workers", count(1, 256), "Processes that answer requests, in each replica.", 1),
        Key("timeout", DURATION, "How long one request may take.", "60s", field="timeout_s"),
        Key("token_env", _VARIABLE, "Name of your variable with the token that `/invocations` shall want."),
        Key("tags", map_of(_VALUE), "For people; shown by `get` and `describe`."),
        Key("description", TEXT, "For people; shown by `get` and `describe`."),
        Key("cpu_cores", _GIGABYTES, "Azure's word for `resources.cpu`."),
        Key("memory_gb", _GIGABYTES, "Azure's word for `resources.memory`, in GiB."),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class DeploymentConfig:
    """What was asked for, checked. ``run``: the keys that runs have as well. ``raw``: all of it as plain data, without
    secrets, for the next update to build on."""

    run: BackendConfig
    replicas: int = 1
    autoscale: Autoscale | None = None
    service: Service = field(default_factory=Service)
    ingress: Ingress | None = None
    workers: int = 1
    timeout_s: float = 60.0
    token_env: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict)


def parse(
    config: Mapping[str, Any] | None, *, target: str = "", before: Mapping[str, Any] | None = None
) -> DeploymentConfig:
    """Understand a config. ``target``: the compute that the target's URI names; ``before``: the raw config that this
    one changes. Raises ConfigError."""
    here = Place(ORIGIN, Path.cwd(), Path.home())
    raw = {**_nested(config or {}, here)}
    if target:
        if raw.get("compute") not in (None, target):
            raise here.child("compute").error(f"differs from the target's URI, which says {quoted(target)}")
        raw["compute"] = target
    raw = merged(dict(before or {}), raw)
    own_names = {key.name for key in OWN.keys}
    _refuse_unknown(raw, own_names, here)
    own = OWN.read({name: _typed(OWN, name, raw[name]) for name in raw if name in own_names}, here)
    shared = {name: _typed(RUN_KEYS, name, value) for name, value in raw.items() if name not in own_names}
    shared = _with_azures_words(shared, own, here)
    run = configuration.parse(shared, project_dir=None, environ=os.environ, origin=ORIGIN)
    said = {name: value for name, value in own.items() if name not in ("cpu_cores", "memory_gb")}
    values = OWN.build(said, here)
    made = DeploymentConfig(run=run, raw=_plain(raw), **values)
    _check_together(made, here)
    return made


def secrets_of(config: DeploymentConfig, environ: Mapping[str, str]) -> Secrets:
    """The values of ``pass_env`` and of the token. Raises ConfigError: the token's variable is not set."""
    token = ""
    if config.token_env:
        token = environ.get(config.token_env, "").strip()
        place = Place(ORIGIN, Path(), Path()).child("token_env")
        if not token:
            raise place.error(f"names {config.token_env}, which is not set here", "Export it where you deploy.")
        if not token.isascii() or not token.isprintable() or " " in token:
            raise place.error(f"names {config.token_env}, whose value cannot stand in an HTTP header")
    return Secrets(dict(config.run.pass_env), token)


def check_name(name: str) -> None:
    """A deployment's name becomes a folder, a container's and a Kubernetes object's. Raises RequestError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > 50:
        raise RequestError(
            f"{name!r} cannot be a deployment's name.",
            hint="Up to 50 lower-case letters, digits and -, beginning and ending with a letter or digit.",
        )


def help_text() -> str:
    """The keys as a table for people."""
    lines = [f"  {key.name:<12} {key.doc}" for key in OWN.keys]
    shared = [f"  {key.name:<12} {key.doc}" for key in RUN_KEYS.keys if key.name in SHARED]
    return "\n".join(["Keys of a deployment:", *lines, "", "Keys that mean the same as for runs:", *shared])


# ------------------------------------------------------------------------------------------- from the command line


def _nested(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """``{"resources.memory": "2Gi"}`` -> ``{"resources": {"memory": "2Gi"}}``; everything else as it is."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if not isinstance(name, str):
            raise place.error("holds a name that is no text")
        head, dot, rest = name.partition(".")
        if not dot:
            found = merged(found, {name: _mapping_in(value)})
            continue
        inside: Any = value
        for part in reversed(rest.split(".")):
            inside = {part: inside}
        found = merged(found, {head: inside})
    return found


def _mapping_in(value: Any) -> Any:
    """A JSON mapping that came as text, as what it is: nested keys may still add to it."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _typed(section: Section, name: str, value: Any) -> Any:
    """Text from a command line as what its key takes: ``"2"`` -> 2, ``"{…}"`` -> a mapping."""
    kinds = {key.name: key.kind for key in section.keys}
    if name not in kinds:
        return value
    return _as_kind(kinds[name], value)


def _as_kind(kind: Kind, value: Any) -> Any:
    if value == "null":
        return None
    if isinstance(value, Mapping):
        inside = {key.name: key.kind for key in kind.keys} if isinstance(kind, Section) else {}
        return {name: _as_kind(inside[name], one) if name in inside else one for name, one in value.items()}
    if not isinstance(value, str) or ("string" in kind.takes and not _is_number_for(kind, value)):
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        return value
    return _as_kind(kind, parsed) if isinstance(parsed, Mapping) else parsed


def _is_number_for(kind: Kind, text: str) -> bool:
    """A bare number counts as one where both are taken: ``timeout=30`` are seconds, as in JSON."""
    return bool({"number", "integer"} & set(kind.takes)) and re.fullmatch(r"\d+(\.\d+)?", text) is not None


# ------------------------------------------------------------------------------------------- what no key tells alone


def _refuse_unknown(raw: Mapping[str, Any], own: set[str], place: Place) -> None:
    aliases = ("COMPUTE", "ENV_MANAGER", "kube-context", "repository-uri")
    known = [*own, *SHARED, *aliases]
    runs_only = {key.name for key in RUN_KEYS.keys} - set(SHARED)
    for name in raw:
        if name in known:
            continue
        if name in runs_only:
            raise place.child(name).error("is a key of runs and means nothing for a deployment", "Remove it.")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"Did you mean {quoted(near[0])}?" if near else f"Known: {', '.join(sorted((*own, *SHARED)))}."
        raise place.child(name).error("is not a key", hint)


def _with_azures_words(shared: Mapping[str, Any], own: Mapping[str, Any], place: Place) -> dict[str, Any]:
    found = dict(shared)
    for word, key in (("cpu_cores", "cpu"), ("memory_gb", "memory")):
        value = own.get(word)
        if value is None:
            continue
        if not value > 0:
            raise place.child(word).refused(value, _GIGABYTES.expects)
        resources = dict(found.get("resources") or {})
        if resources.get(key) is not None:
            trouble = f"and {quoted('resources.' + key)} say the same thing"
            raise place.child(word).error(trouble, "Give one of them.")
        found["resources"] = {**resources, key: value if key == "cpu" else int(value * 2**30)}
    return found


def _check_together(config: DeploymentConfig, place: Place) -> None:
    if config.autoscale and config.autoscale.minimum > config.autoscale.maximum:
        raise place.child("autoscale").error('has a "min" over its "max"')
    if config.run.compute == "kubernetes":
        return
    for name, said in (("autoscale", config.autoscale), ("ingress", config.ingress), ("replicas", config.replicas > 1)):
        if said:
            hint = "Use workers for more processes on one machine." if name != "ingress" else "Use service.port."
            raise place.child(name).error(f"needs the compute kubernetes; this one is {config.run.compute}", hint)
    if config.run.secrets:
        raise place.child("secrets").error(
            f"refers to secrets that exist at the compute; {config.run.compute} keeps none",
            "Set the variables here and name them in pass_env.",
        )


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    try:
        copied: dict[str, Any] = json.loads(json.dumps(raw))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{ORIGIN} holds what JSON cannot: {error}.") from error
    return copied
