"""Whether a program in a container reaches the tracking store, and what must be mounted so that it does. Pure but for
looking whether folders exist.

MLflow's own local backend mounts a file or SQLite store into the container; so do we, at the same path as outside, so
that no URI changes. That needs an engine on this machine. What cannot be reached is an error before anything exists.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

from ...errors import ConfigError
from ..loopback import is_loopback, loopback_proxies

HOST_GATEWAY = "host.docker.internal"  # what Docker Desktop calls the machine; elsewhere we add it where it is used
_DATABASES = ("mysql", "mssql", "postgresql", "postgres")


def store_path(uri: str) -> Path | None:
    """The file or folder of this machine that the URI names, if it names one."""
    if uri in ("databricks", "uc"):
        return None
    parsed = urllib.parse.urlsplit(uri)
    if parsed.netloc or parsed.scheme not in ("", "file", "sqlite"):
        return None
    if parsed.scheme == "sqlite":
        path = urllib.parse.unquote(parsed.path)
        return Path(path[1:] if path.startswith("//") else path)
    return Path(url2pathname(parsed.path) if parsed.scheme else uri)


def store_folders(tracking_uri: str, artifact_uri: str) -> list[Path]:
    """Folders that the program needs at the same path: the store's, and that of the experiment's artifacts.

    SQLite writes journals beside its file, so the file's folder it is. Of the artifacts it is the experiment's folder,
    for a program may open further runs.
    """
    folders = []
    store = store_path(tracking_uri)
    if store is not None:
        folders.append(store.parent if tracking_uri.startswith("sqlite") else store)
    artifacts = store_path(artifact_uri) if artifact_uri and artifact_uri != "ARTIFACT_URI" else None
    if artifacts is not None:  # <experiment's location>/<run id>/artifacts
        folders.append(artifacts.parent.parent)
    return [each for each in folders if not any(other != each and other in each.parents for other in folders)]


def mounts(tracking_uri: str, artifact_uri: str) -> list[dict[str, Any]]:
    """The Engine API's bind mounts for :func:`store_folders`."""
    folders = dict.fromkeys(str(each) for each in store_folders(tracking_uri, artifact_uri))
    return [{"Type": "bind", "Source": each, "Target": each} for each in folders]


def refuse_unreachable(tracking_uri: str, *, engine_here: bool, network: str) -> None:
    """Raises ConfigError where a container cannot reach the tracking store, with the way out."""
    store = store_path(tracking_uri)
    if store is not None:
        _refuse_store(tracking_uri, store, engine_here)
        return
    parsed = urllib.parse.urlsplit(tracking_uri)
    host = parsed.hostname or ""
    if not is_loopback(host) or (network == "host" and engine_here):
        return
    kind = "database" if parsed.scheme.split("+")[0] in _DATABASES else "tracking server"
    here = "" if engine_here else ", and the engine is on another machine"
    named = tracking_uri.replace(parsed.netloc, parsed.netloc.rpartition("@")[2])
    raise ConfigError(
        f"A container cannot reach the {kind} {named}: {host} is the container itself there{here}.",
        key="tracking_uri",
        hint=_way_out(parsed, engine_here),
    )


def _refuse_store(tracking_uri: str, store: Path, engine_here: bool) -> None:
    if not engine_here:
        raise ConfigError(
            f"A container on another machine cannot reach the tracking store {tracking_uri}.",
            key="tracking_uri",
            hint="Use a tracking server (`mlflow server`) that both machines reach, and set MLFLOW_TRACKING_URI to it.",
        )
    if not store.is_absolute() or not store.parent.is_dir():
        raise ConfigError(f"The tracking store {tracking_uri} lies in no folder of this machine.", key="tracking_uri")


def _way_out(parsed: urllib.parse.SplitResult, engine_here: bool) -> str:
    if not engine_here:
        return "Set tracking_uri to an address of the server that the engine's machine reaches."
    port = f":{parsed.port}" if parsed.port else ""
    return (
        'Set docker.network to "host"; or let the server listen on all addresses (`mlflow server --host 0.0.0.0`) '
        f"and set tracking_uri to {parsed.scheme}://{HOST_GATEWAY}{port}{parsed.path}"
    )


def extra_hosts(tracking_uri: str) -> list[str]:
    """What the container must be told to resolve the tracking server's name."""
    host = urllib.parse.urlsplit(tracking_uri).hostname
    return [f"{HOST_GATEWAY}:host-gateway"] if host == HOST_GATEWAY else []


def unusable_proxies(variables: Mapping[str, str], network: str) -> list[str]:
    """Names of proxy variables that mean nothing in a container of that network."""
    return [] if network == "host" else loopback_proxies(variables)
