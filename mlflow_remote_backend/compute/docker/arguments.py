"""``-A/--docker-args``: arguments of ``docker run`` laid over the Engine API's document for a container. Pure.

The names, units and spellings are those of the ``docker run`` command. Some have no meaning here and are left out
with a notice (``t``, ``rm``, ``d``: a job has no terminal and removes its container anyway); some would break what we
promise and are refused (``name``, ``restart``).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError

KEY = "docker.args"

_SHORT = {
    "a": "attach", "c": "cpu-shares", "d": "detach", "e": "env", "h": "hostname", "i": "interactive", "l": "label",
    "m": "memory", "net": "network", "net-alias": "network-alias", "p": "publish", "P": "publish-all", "t": "tty",
    "u": "user", "v": "volume", "w": "workdir", "dns-opt": "dns-option",
}  # fmt: skip

#: Arguments that change nothing for a job, and why.
IGNORED = {
    "tty": "a job has no terminal: its log is the program's bytes, unchanged",
    "interactive": "the program's standard input is /dev/null",
    "attach": "the log is followed in any case",
    "detach": "the key wait decides whether the submission blocks",
    "rm": "a job's container is always removed",
    "sig-proxy": "on_interrupt decides what Ctrl-C does",
    "quiet": "it only shortens what pulling an image shows",
}
_REFUSED = {
    "name": "The container's name is derived from the run id.",
    "restart": "A job runs once; use the key retry where that is possible.",
    "cidfile": "The container's id is in the run's tag mlflow_remote.job_uid.",
    "env-file": "Use env_vars or pass_env.",
    "pull": "Use the key docker.pull.",
    "stop-timeout": "Use the key grace_period.",
    "stop-signal": "A job is stopped by SIGTERM, then SIGKILL after grace_period.",
    "isolation": "Only Linux containers can run a job.",
    "label-file": "Use the key labels.",
}

_UNITS = {"": 1, "b": 1, **{letter: 1024**power for power, letter in enumerate("kmgtp", start=1)}}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgtp]?)(?:i?b)?", re.IGNORECASE)


@dataclass
class Draft:
    """A container on its way: the Engine API's ``document``, and what goes elsewhere.

    ``env``: literal variables of the program. ``endpoint``: settings within the network it joins. ``entrypoint``: in
    place of the image's; None: the image's.
    """

    document: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)
    endpoint: dict[str, Any] = field(default_factory=dict)
    entrypoint: list[str] | None = None
    platform: str = ""

    @property
    def host(self) -> dict[str, Any]:
        host: dict[str, Any] = self.document.setdefault("HostConfig", {})
        return host


Lay = Callable[[Draft, str], None]


def size_bytes(text: str) -> int:
    """Docker's sizes: ``512m`` is 512 MiB, ``1g`` is 1 GiB. ValueError if it is none."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError("expected a size such as 512m or 2g")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def apply(document: Mapping[str, Any], arguments: Mapping[str, Any]) -> Draft:
    """The document with the arguments laid over it. Raises ConfigError: unknown, refused, or a value that is none."""
    draft = Draft(copy.deepcopy(dict(document)))
    for name, value in arguments.items():
        _apply_one(draft, name, value)
    return draft


def notices(arguments: Mapping[str, Any]) -> list[str]:
    """One sentence for each argument that is left out."""
    known = {name: IGNORED.get(_SHORT.get(name, name)) for name in arguments}
    return [f"docker.args {name} is left out: {why}." for name, why in known.items() if why]


def _apply_one(draft: Draft, given: str, value: Any) -> None:
    name = _SHORT.get(given, given)
    if name in IGNORED:
        return
    if name in _REFUSED:
        raise ConfigError(f"docker.args holds {given!r}, which a job cannot have.", key=KEY, hint=_REFUSED[name])
    if name not in _ARGUMENTS:
        hint = f"Did you mean {near!r}?" if (near := _nearest(name)) else "See `docker run --help`."
        raise ConfigError(f"docker.args holds {given!r}, which is no argument of docker run.", key=KEY, hint=hint)
    if value is False:
        return
    flag = name in _FLAGS
    if (value is True) != flag and not (flag and str(value).lower() == "true"):
        expected = f"Write it without a value: -A {given}" if flag else f"Write -A {given}=VALUE"
        raise ConfigError(f"docker.args {given!r} has {'a' if flag else 'no'} value.", key=KEY, hint=expected)
    try:
        _ARGUMENTS[name](draft, str(value))
    except (ValueError, KeyError) as error:
        raise ConfigError(f"docker.args {given!r} cannot be understood.", key=KEY, words=str(error)) from None


def _nearest(name: str) -> str:
    import difflib

    return next(iter(difflib.get_close_matches(name, _ARGUMENTS, n=1)), "")


# -- how each is laid --------------------------------------------------------------------------------------------------


def _set(key: str, convert: Callable[[str], Any] = str) -> Lay:
    return lambda draft, value: draft.document.update({key: convert(value)})


def _host(key: str, convert: Callable[[str], Any] = str) -> Lay:
    return lambda draft, value: draft.host.update({key: convert(value)})


def _host_flag(key: str) -> Lay:
    return lambda draft, value: draft.host.update({key: True})


def _host_member(key: str, convert: Callable[[str], Any] = str) -> Lay:
    """Adds one member to a list."""
    return lambda draft, value: draft.host.setdefault(key, []).append(convert(value))


def _host_entry(key: str) -> Lay:
    """Adds ``name=value`` to a mapping."""

    def lay(draft: Draft, text: str) -> None:
        name, value = _pair(text)
        draft.host.setdefault(key, {})[name] = value

    return lay


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError("expected NAME=VALUE")
    return name, value


def _endpoint(key: str, convert: Callable[[str], Any] = str) -> Lay:
    """A setting of the container in the network that it joins, which must be one of the user's own."""

    def lay(draft: Draft, text: str) -> None:
        draft.endpoint[key] = convert(text)

    return lay


def _memory(draft: Draft, text: str) -> None:
    """In place of resources.memory, which allows no swap: then neither does this."""
    host, size = draft.host, size_bytes(text)
    if host.get("MemorySwap") is not None and host["MemorySwap"] == host.get("Memory"):
        host["MemorySwap"] = size
    host["Memory"] = size


def _label(draft: Draft, text: str) -> None:
    name, _, value = text.partition("=")
    if name.startswith("mlflow-remote/") or name == "app.kubernetes.io/managed-by":
        raise ValueError(f"label {name} is ours")
    draft.document.setdefault("Labels", {})[name] = value


def _env(draft: Draft, text: str) -> None:
    """``NAME=VALUE``, or ``NAME`` for the caller's value, which travels as a secret (:func:`copied_names`)."""
    name, equals, value = text.partition("=")
    if equals:
        draft.env[name] = value


def _privileged(draft: Draft, text: str) -> None:
    host = draft.host
    host["Privileged"] = True
    host.pop("CapDrop", None)
    host["SecurityOpt"] = [each for each in host.get("SecurityOpt", []) if not each.startswith("no-new-privileges")]


def _security(draft: Draft, text: str) -> None:
    host = draft.host
    if text.startswith("no-new-privileges"):
        host["SecurityOpt"] = [each for each in host.get("SecurityOpt", []) if not each.startswith("no-new-privileges")]
        if text.partition("=")[2] == "false" or text.partition(":")[2] == "false":
            return
    if text.startswith("seccomp=") and text != "seccomp=unconfined":
        raise ValueError("a seccomp profile of a file cannot be given here; only seccomp=unconfined")
    host.setdefault("SecurityOpt", []).append(text)


def _gpus(draft: Draft, text: str) -> None:
    draft.host["DeviceRequests"] = [gpu_request(text)]


def gpu_request(text: str) -> dict[str, Any]:
    """``all``, a count, or ``device=0,1`` -> the Engine API's device request. ValueError if it is none."""
    text = text.strip("\"'")
    request: dict[str, Any] = {"Driver": "", "Count": 0, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}
    if text == "all" or text.isdigit():
        return {**request, "Count": -1 if text == "all" else int(text)}
    name, value = _pair(text)
    if name == "count":
        return gpu_request(value)
    if name != "device":
        raise ValueError("expected all, a number, or device=ID,ID")
    return {**request, "DeviceIDs": value.split(",")}


def _publish(draft: Draft, text: str) -> None:
    match = re.fullmatch(r"(?:(?:([^:]+):)?(\d*):)?(\d+)(?:/(tcp|udp|sctp))?", text)
    if not match:
        raise ValueError("expected [[ADDRESS:]PORT:]PORT[/PROTOCOL], without ranges")
    address, outside, inside, protocol = match.groups()
    port = f"{inside}/{protocol or 'tcp'}"
    binding = {"HostIp": address or "", "HostPort": outside or ""}
    draft.document.setdefault("ExposedPorts", {})[port] = {}
    draft.host.setdefault("PortBindings", {}).setdefault(port, []).append(binding)


def _expose(draft: Draft, text: str) -> None:
    draft.document.setdefault("ExposedPorts", {})[text if "/" in text else f"{text}/tcp"] = {}


def _device(text: str) -> dict[str, str]:
    outside, inside, permissions = ([*text.split(":"), "", ""])[:3]
    return {"PathOnHost": outside, "PathInContainer": inside or outside, "CgroupPermissions": permissions or "rwm"}


def _ulimit(text: str) -> dict[str, Any]:
    name, value = _pair(text)
    soft, _, hard = value.partition(":")
    return {"Name": name, "Soft": int(soft), "Hard": int(hard or soft)}


def _tmpfs(draft: Draft, text: str) -> None:
    path, _, options = text.partition(":")
    draft.host.setdefault("Tmpfs", {})[path] = options


_MOUNT_KEYS = {
    "type": "Type", "source": "Source", "src": "Source", "target": "Target", "dst": "Target", "destination": "Target",
}  # fmt: skip


def mount(text: str) -> dict[str, Any]:
    """``type=bind,source=/a,target=/b,readonly`` -> the Engine API's mount. ValueError on what is beyond that."""
    made: dict[str, Any] = {"Type": "volume"}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name in ("readonly", "ro"):
            made["ReadOnly"] = value.lower() not in ("false", "0")
        elif name in _MOUNT_KEYS:
            made[_MOUNT_KEYS[name]] = value
        else:
            raise ValueError(f"mount option {name!r} is not supported here")
    if "Target" not in made:
        raise ValueError("a mount needs target=PATH")
    return made


def _log(draft: Draft, driver: str) -> None:
    draft.host["LogConfig"] = {"Type": driver, "Config": {}}


def _log_option(draft: Draft, text: str) -> None:
    name, value = _pair(text)
    draft.host.setdefault("LogConfig", {"Type": "json-file"}).setdefault("Config", {})[name] = value


def _entrypoint(draft: Draft, text: str) -> None:
    draft.entrypoint = [text] if text else []


def _platform(draft: Draft, text: str) -> None:
    draft.platform = text


def _nano_cpus(text: str) -> int:
    return round(float(text) * 1e9)


def _swap(text: str) -> int:
    return -1 if text == "-1" else size_bytes(text)


_FLAGS = {
    "init", "no-healthcheck", "oom-kill-disable", "privileged", "publish-all", "read-only", "disable-content-trust",
}  # fmt: skip
_ARGUMENTS: dict[str, Lay] = {
    "add-host": _host_member("ExtraHosts"),
    "blkio-weight": _host("BlkioWeight", int),
    "cap-add": _host_member("CapAdd"),
    "cap-drop": _host_member("CapDrop"),
    "cgroup-parent": _host("CgroupParent"),
    "cgroupns": _host("CgroupnsMode"),
    "cpu-period": _host("CpuPeriod", int),
    "cpu-quota": _host("CpuQuota", int),
    "cpu-rt-period": _host("CpuRealtimePeriod", int),
    "cpu-rt-runtime": _host("CpuRealtimeRuntime", int),
    "cpu-shares": _host("CpuShares", int),
    "cpus": _host("NanoCpus", _nano_cpus),
    "cpuset-cpus": _host("CpusetCpus"),
    "cpuset-mems": _host("CpusetMems"),
    "device": _host_member("Devices", _device),
    "device-cgroup-rule": _host_member("DeviceCgroupRules"),
    "disable-content-trust": lambda draft, value: None,
    "dns": _host_member("Dns"),
    "dns-option": _host_member("DnsOptions"),
    "dns-search": _host_member("DnsSearch"),
    "domainname": _set("Domainname"),
    "entrypoint": _entrypoint,
    "env": _env,
    "expose": _expose,
    "gpus": _gpus,
    "group-add": _host_member("GroupAdd"),
    "hostname": _set("Hostname"),
    "init": _host_flag("Init"),
    "ip": _endpoint("IPAMConfig", lambda address: {"IPv4Address": address}),
    "ip6": _endpoint("IPAMConfig", lambda address: {"IPv6Address": address}),
    "ipc": _host("IpcMode"),
    "label": _label,
    "link": _host_member("Links"),
    "log-driver": _log,
    "log-opt": _log_option,
    "mac-address": _set("MacAddress"),
    "memory": _memory,
    "memory-reservation": _host("MemoryReservation", size_bytes),
    "memory-swap": _host("MemorySwap", _swap),
    "memory-swappiness": _host("MemorySwappiness", int),
    "mount": _host_member("Mounts", mount),
    "network": _host("NetworkMode"),
    "network-alias": _endpoint("Aliases", lambda alias: [alias]),
    "no-healthcheck": lambda draft, value: draft.document.update({"Healthcheck": {"Test": ["NONE"]}}),
    "oom-kill-disable": _host_flag("OomKillDisable"),
    "oom-score-adj": _host("OomScoreAdj", int),
    "pid": _host("PidMode"),
    "pids-limit": _host("PidsLimit", int),
    "platform": _platform,
    "privileged": _privileged,
    "publish": _publish,
    "publish-all": _host_flag("PublishAllPorts"),
    "read-only": _host_flag("ReadonlyRootfs"),
    "runtime": _host("Runtime"),
    "security-opt": _security,
    "shm-size": _host("ShmSize", size_bytes),
    "storage-opt": _host_entry("StorageOpt"),
    "sysctl": _host_entry("Sysctls"),
    "tmpfs": _tmpfs,
    "ulimit": _host_member("Ulimits", _ulimit),
    "user": _set("User"),
    "userns": _host("UsernsMode"),
    "uts": _host("UTSMode"),
    "volume": _host_member("Binds"),
    "volume-driver": _host("VolumeDriver"),
    "volumes-from": _host_member("VolumesFrom"),
    "workdir": _set("WorkingDir"),
}


def copied_names(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the caller's variables that ``-e NAME`` copies into the container."""
    values = [value for name, value in arguments.items() if _SHORT.get(name, name) == "env"]
    return [value for value in values if isinstance(value, str) and "=" not in value]
