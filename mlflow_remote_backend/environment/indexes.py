"""Which package indexes and which conda channels are asked, and with which credentials.

Companies configure their index for pip, on every machine; uv does not read that. So the first wins that
says something: ``environment.index_url`` of the backend config, the project's requirement files, uv's own settings,
pip's variables and files. Nothing said: uv's default, which is pip's.

An index is kept as an option line of a requirements file (``--index-url URL``), with ``${NAME}`` where a credential
belongs. A credential that stands in clear in this user's pip or uv settings gets a name of ours; :func:`secrets`
has the values of all names, from the environment or from where they stand.
"""

from __future__ import annotations

import configparser
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import EnvironmentError_
from . import credentials

#: pip takes the best version that any of its indexes has, uv the best of the first index that has the package at all
#: (nobody can then push a newer namesake onto a public index). Whoever speaks pip's language gets what pip does.
LIKE_PIP = "--index-strategy unsafe-best-match"

_PIP_KEYS = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host")
_PREFIX = "MLFLOW_REMOTE_INDEX"
_NAMED = re.compile(r"[\w.-]+=(?=\w+:)")  # uv takes NAME=URL too
CHANNEL_SETTINGS_HINT = (
    "Where a channel is found can be set in the backend config: environment.channel_alias for all names, "
    "environment.channel_map for one, environment.channels to use others."
)


def choose(configured: Sequence[str], declared: Sequence[str]) -> tuple[str, ...]:
    """The option lines to lock and install with. ``configured``: ``environment.index_url``, the first one the default,
    further ones asked before it.

    Reads the environment and pip's and uv's files; a millisecond. Credentials are replaced by names.
    """
    if configured:
        return (
            f"--index-url {credentials.braced(configured[0])}",
            *(f"--extra-index-url {credentials.braced(url)}" for url in configured[1:]),
        )
    declared = (*declared, LIKE_PIP) if declared else ()
    if any(line.startswith(("--index-url", "--no-index")) for line in declared):
        return declared
    of_uv = tuple(line for line, _ in _uv_lines())
    of_pip = () if of_uv else tuple(line for line, _ in _pip_lines())
    lines = (*of_uv, *(line for line in of_pip if line not in declared), *declared)
    return (*lines, LIKE_PIP) if of_pip and not declared else lines


def secrets(lines: Iterable[str]) -> dict[str, str]:
    """Values of the variables that ``lines`` or channels refer to, for the tool or the job that needs them.

    Raises EnvironmentError_ for a variable that is set nowhere.
    """
    wanted = dict.fromkeys(name for line in lines for name in credentials.placeholders(line))
    known = dict(os.environ)
    if any(name.startswith(_PREFIX) and name not in known for name in wanted):
        known = {**_literal_values(), **known}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise EnvironmentError_(
            f"The variable {missing[0]} is not set; a package index or channel is addressed with it.",
            hint=f"Set {missing[0]} where you submit; where the job runs it arrives as a secret.",
        )
    return {name: known[name] for name in wanted}


def expand(lines: Iterable[str], values: Mapping[str, str]) -> tuple[str, ...]:
    """The option lines with their credentials filled in. ``values`` as :func:`secrets` gives them."""
    return tuple(credentials.expand(line, values) for line in lines)


def reachable_from_here(lines: Iterable[str]) -> tuple[str, ...]:
    """The lines without folders that do not exist on this machine (an index of the submitter's own disk)."""
    return tuple(line for line in lines if (place := local_folder(line)) is None or place.exists())


def without_local(lines: Iterable[str]) -> tuple[str, ...]:
    """The lines without folders of this machine, for a job that runs elsewhere."""
    return tuple(line for line in lines if local_folder(line) is None)


def local_folder(line: str) -> Path | None:
    """The folder that an option line points to; None for a URL of a server or another option."""
    option, _, place = line.partition(" ")
    if option not in ("--index-url", "--extra-index-url", "--find-links"):
        return None
    if place.startswith("file:"):
        return Path(unquote(urlsplit(place).path))
    return None if "://" in place else Path(place)


# ---------------------------------------------------------------------------------------------- uv's settings


def _uv_lines() -> Iterator[tuple[str, dict[str, str]]]:
    """Option lines of uv's variables and files, each with the literal credentials found in it."""
    settings = _uv_file()
    default = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL") or settings.default
    extra = _words("UV_INDEX") or _words("UV_EXTRA_INDEX_URL") or settings.extra
    find_links = _words("UV_FIND_LINKS") or settings.find_links
    places = [("--index-url", default)] if default else []
    places += [("--extra-index-url", url) for url in extra] + [("--find-links", place) for place in find_links]
    for number, (option, place) in enumerate(places):
        name, _, url = place.partition("=") if _NAMED.match(place) else ("", "", place)
        url, values = _named(url, f"{_PREFIX}_UV{number}")
        yield f"{option} {_with_variables(url, name)}", values


def _with_variables(url: str, name: str) -> str:
    """The URL of an index that uv knows by a name, with the variables where uv looks for its credentials."""
    variable = f"UV_INDEX_{re.sub(r'[^A-Z0-9]', '_', name.upper())}"
    user, password = (part if part in os.environ else "" for part in (f"{variable}_USERNAME", f"{variable}_PASSWORD"))
    parts = urlsplit(url)
    if not (user or password) or "@" in parts.netloc:
        return url
    userinfo = (f"${{{user}}}" if user else "") + (f":${{{password}}}" if password else "")
    return parts._replace(netloc=f"{userinfo}@{parts.netloc}").geturl()


def _words(variable: str) -> list[str]:
    return os.environ.get(variable, "").replace(",", " ").split()


@dataclass(frozen=True)
class _UvFile:
    default: str = ""
    extra: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()


def _uv_file() -> _UvFile:
    """The indexes in uv's user file, else in its system file. A damaged file is uv's to complain about."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    own = os.environ.get("UV_CONFIG_FILE")
    for file in [Path(own)] if own else [home / "uv/uv.toml", Path("/etc/uv/uv.toml")]:
        if not file.is_file():
            continue
        from . import toml

        try:
            return _uv_indexes(toml.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError):
            return _UvFile()
    return _UvFile()


def _uv_indexes(document: Mapping[str, Any]) -> _UvFile:
    table = {**document, **document.get("pip", {})}
    listed = document.get("index", [])
    default = [_named_place(each) for each in listed if each.get("default")]
    extra = [_named_place(each) for each in listed if not each.get("default") and not each.get("explicit")]
    return _UvFile(
        default[0] if default else table.get("index-url", ""),
        tuple(extra or table.get("extra-index-url", [])),
        tuple(table.get("find-links", [])),
    )


def _named_place(index: Mapping[str, Any]) -> str:
    named = index.get("name") and "://" in index["url"]
    return f"{index['name']}={index['url']}" if named else str(index["url"])


def _named(url: str, name: str) -> tuple[str, dict[str, str]]:
    """The URL with its literal credentials replaced by variables called after ``name``, and their values."""
    if not credentials.has_literal(url):
        return credentials.braced(url), {}
    parts = urlsplit(url)
    values = {f"{name}_USER": unquote(parts.username or "")}
    userinfo = f"${{{name}_USER}}"
    if parts.password is not None:
        values[f"{name}_PASSWORD"] = unquote(parts.password)
        userinfo += f":${{{name}_PASSWORD}}"
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{userinfo}@{host}").geturl(), values


def _literal_values() -> dict[str, str]:
    """Values of the names that :func:`_named` made up for literal credentials in this user's settings."""
    return {name: value for _, values in (*_uv_lines(), *_pip_lines()) for name, value in values.items()}


# ---------------------------------------------------------------------------------------------- pip's settings


def _pip_lines() -> Iterator[tuple[str, dict[str, str]]]:
    """Option lines of pip's settings with the literal credentials found in each."""
    settings = _pip_settings()
    number = 0
    for key in _PIP_KEYS[:3]:
        for place in settings.get(key, "").split():
            url, values = _named(place, f"{_PREFIX}_{number}")
            number += 1
            yield f"--{key} {url}", values
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        yield "--no-index", {}
    for host in settings.get("trusted-host", "").split():
        yield f"--trusted-host {host}", {}


def _pip_settings() -> dict[str, str]:
    """pip's settings as pip merges them: its files in order, then ``PIP_*`` variables; the last one wins."""
    settings: dict[str, str] = {}
    for file in _pip_files():
        settings |= _pip_file(file)
    for key in _PIP_KEYS:
        value = os.environ.get("PIP_" + key.upper().replace("-", "_"))
        if value:
            settings[key] = value
    return settings


def _pip_files() -> Iterator[Path]:
    """pip's configuration files, a later one overriding an earlier (pip's documentation, "Configuration")."""
    own = os.environ.get("PIP_CONFIG_FILE")
    if own == os.devnull:
        return
    home = Path.home()
    if sys.platform == "win32":
        yield Path(os.environ.get("PROGRAMDATA", "C:/ProgramData")) / "pip/pip.ini"
        yield home / "pip/pip.ini"
        yield Path(os.environ.get("APPDATA", home)) / "pip/pip.ini"
        yield Path(sys.prefix) / "pip.ini"
    else:
        if sys.platform == "darwin":
            yield Path("/Library/Application Support/pip/pip.conf")
        for folder in os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(os.pathsep):
            yield Path(folder) / "pip/pip.conf"
        yield Path("/etc/pip.conf")
        yield home / ".pip/pip.conf"
        support = home / "Library/Application Support/pip"
        if sys.platform == "darwin" and support.is_dir():
            yield support / "pip.conf"
        else:
            yield Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip/pip.conf"
        yield Path(sys.prefix) / "pip.conf"
    if own:
        yield Path(own)


def _pip_file(file: Path) -> dict[str, str]:
    """The sections ``global`` and ``install`` of one file, the latter stronger. An unreadable file says nothing."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, configparser.Error):
        return {}
    settings: dict[str, str] = {}
    for section in ("global", "install"):
        if parser.has_section(section):
            settings |= {key.lower().replace("_", "-"): value for key, value in parser.items(section) if value}
    return settings


def certificates() -> str:
    """The bundle of certificates that this machine's settings name, for tools that know it by another name."""
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT"):
        if os.environ.get(name):
            return os.environ[name]
    merged: dict[str, str] = {}
    for file in _pip_files():
        merged |= _pip_file(file)
    return merged.get("cert", "")


# ---------------------------------------------------------------------------------------------- conda channels


def channel_url(name: str, *, folder: Path, alias: str, mapping: Mapping[str, str]) -> str:
    """Where a declared channel is found: ``mapping`` first, then a URL as it is, then ``alias``/name, then the name
    itself, which the solver knows. A path is relative to ``folder``. Credentials only as ``${NAME}``.

    Raises EnvironmentError_ for credentials in clear and for ``defaults``, which is no channel but a setting of conda.
    """
    place = mapping.get(name) or mapping.get(name.rstrip("/")) or name
    if place in ("defaults", "nodefaults"):
        raise EnvironmentError_(
            "The channel 'defaults' is a setting of each conda installation (and needs a licence in larger companies).",
            hint="Name a channel in conda.yaml, conda-forge for instance, or say where it is found: "
            'environment.channel_map: {"defaults": "https://…"}.',
        )
    if credentials.has_literal(place):
        raise EnvironmentError_(
            f"The channel {credentials.redact(place)} holds a credential.",
            hint="It would end up in the lock. Name variables in its place: https://${CONDA_USER}:${CONDA_PASSWORD}@…, "
            "or use ~/.netrc.",
        )
    if "://" in place:
        return credentials.braced(place.rstrip("/"))
    if place.startswith(("/", "./", "../")):
        return (folder / place).resolve().as_uri()
    return f"{credentials.braced(alias.rstrip('/'))}/{place}" if alias else place
