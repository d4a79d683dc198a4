"""Locks as rows: what stands in a ``conda-lock.yml``, a ``pylock.toml`` or a hashed requirements file.

A row is one package with its digests. The lock key is made of the rows alone, so that order, comments, mirrors and
credentials do not change it, and any other content does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.markers import Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion

from ..errors import EnvironmentError_
from ..job import EnvironmentRef
from . import credentials, documents, platforms, requirements
from .spec import digest

#: Part of every lock key: a change in how prefixes are built makes new ones.
SCHEMA = 1

#: In the metadata of a lock of ours: the declaration it was made from.
DECLARATION = "mlflow_remote_declaration"

_REVISION = re.compile(r"^[0-9a-f]{40}([0-9a-f]{24})?$")


@dataclass(frozen=True)
class Row:
    """One locked package. ``hashes``: ``sha256`` in hex, any of which the file may have; empty for a git revision.

    ``url``: where the file was seen, without credentials; ``direct``: asked for by URL, not from an index.
    ``revision``: the commit of a ``git+`` URL; ``subdirectory``: where in what ``url`` names the package stands.
    ``marker``: PEP 508, where a lock covers several platforms.
    """

    manager: str
    name: str
    version: str
    hashes: tuple[str, ...] = ()
    url: str = ""
    direct: bool = False
    revision: str = ""
    subdirectory: str = ""
    marker: str = ""
    size_bytes: int = 0

    @property
    def filename(self) -> str:
        return PurePosixPath(unquote(urlsplit(self.url).path)).name

    @property
    def address(self) -> str:
        """The URL of a direct row as pip reads it, with commit and subdirectory."""
        return self.url + (f"@{self.revision}" if self.revision else "") + self.fragment

    @property
    def fragment(self) -> str:
        return f"#subdirectory={self.subdirectory}" if self.subdirectory else ""

    @property
    def built(self) -> bool:
        """Whether it must be built where it is installed: a source archive or a git revision."""
        return self.manager == "pip" and bool(self.revision or (self.url and not self.filename.endswith(".whl")))


def lock_key(rows: Iterable[Row], platform: str, python: str = "") -> str:
    """The identity of the software: a ``sha256`` in hex. ``python``: the version wanted of a venv; its minor counts."""
    minor = ".".join(python.split(".")[:2])
    table = sorted(
        [row.manager, row.name, row.version, row.marker, row.revision + row.fragment, *sorted(row.hashes)]
        for row in rows
    )
    return digest([SCHEMA, platform, minor, table])


def names_mlflow(rows: Iterable[Row]) -> bool:
    """Whether ``import mlflow`` works in this environment."""
    return any(row.name in ("mlflow", "mlflow-skinny", "mlflow-tracing") for row in rows)


# ---------------------------------------------------------------------------------------------- conda-lock.yml


def load_conda_lock(text: str, shown: str = "conda-lock.yml") -> dict[str, Any]:
    """The document of a unified conda-lock file, version 1. Raises EnvironmentError_ for anything else."""
    document = documents.load(text, shown)
    if not isinstance(document, dict) or not isinstance(document.get("package"), list):
        raise EnvironmentError_(
            f"{shown} is no lock of conda-lock.", hint="Take it away, or write it anew: mlflow-remote lock."
        )
    if document.get("version") != 1:
        raise EnvironmentError_(
            f"{shown} has format {document.get('version')!r}; format 1 is read here.",
            hint="Lock anew with conda-lock 1.0 to 4, or with mlflow-remote lock.",
        )
    return document


def conda_lock_platforms(document: Mapping[str, Any]) -> tuple[str, ...]:
    """The platforms that a conda-lock file covers, in its order."""
    return tuple(dict.fromkeys(str(row["platform"]) for row in document["package"]))


def conda_lock_rows(document: Mapping[str, Any], platform: str, shown: str = "conda-lock.yml") -> tuple[Row, ...]:
    """The rows for one platform, of the category ``main``. Raises EnvironmentError_ for a row without a sha256."""
    try:
        rows = [
            _conda_lock_row(row, shown)
            for row in document["package"]
            if row["platform"] == platform and row.get("category", "main") == "main"
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise EnvironmentError_(f"{shown} is damaged.", words=f"{type(error).__name__}: {error}") from error
    return tuple(sorted(rows, key=lambda row: (row.manager, row.name)))


def _conda_lock_row(raw: Mapping[str, Any], shown: str) -> Row:
    url, sha256 = str(raw["url"]), str((raw.get("hash") or {}).get("sha256") or "")
    name, version = str(raw["name"]), str(raw["version"])
    if raw["manager"] == "pip":
        name = canonicalize_name(name)
    _refuse_literal(url, name, shown)
    if url.startswith("git+"):
        # conda-lock itself writes the commit where a digest belongs
        return _git_row(name, version, url, shown)
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise EnvironmentError_(
            f"{shown} has no sha256 for {name} {version}, so its content cannot be verified.",
            hint="Lock anew: mlflow-remote lock.",
        )
    url, subdirectory = _split(url)
    direct = bool(raw.get("source"))
    return Row(str(raw["manager"]), name, version, (sha256,), url, direct=direct, subdirectory=subdirectory)


def _refuse_literal(url: str, name: str, shown: str) -> None:
    if credentials.has_literal(url):
        raise EnvironmentError_(
            f"{shown} holds a credential in the URL of {name}.", hint="Lock anew, and revoke that credential."
        )


def _git_row(name: str, version: str, url: str, shown: str, marker: str = "") -> Row:
    """A row for ``git+…@COMMIT``. Raises EnvironmentError_ for a URL that names no commit."""
    plain, subdirectory = _split(url)
    address, _, revision = plain.rpartition("@")
    if not _REVISION.match(revision):
        raise EnvironmentError_(f"{shown}: {name} is not pinned to a commit: {url}")
    return Row(
        "pip", name, version, url=address, direct=True, revision=revision, subdirectory=subdirectory, marker=marker
    )


def _split(url: str) -> tuple[str, str]:
    """A URL without its fragment, and the subdirectory that the fragment names."""
    plain, _, fragment = url.partition("#")
    return plain, next((part[13:] for part in fragment.split("&") if part.startswith("subdirectory=")), "")


def pip_row_document(row: Row, platform: str) -> dict[str, Any]:
    """A pip row in conda-lock's own words."""
    document: dict[str, Any] = {
        "name": row.name,
        "version": row.version,
        "manager": "pip",
        "platform": platform,
        "dependencies": {},
        "url": row.address,
        "hash": {"sha256": row.revision or row.hashes[0]},
        "category": "main",
        "optional": False,
    }
    if row.direct:
        document["source"] = {"type": "url", "url": row.address}
    return document


# ---------------------------------------------------------------------------------------------- requirements files

_KEY_LINE = re.compile(rf"^# {DECLARATION}: ([0-9a-f]{{64}})\r?$", re.MULTILINE)
_PYTHON_LINE = re.compile(r"^# python: (\d+(?:\.\d+){0,2})$", re.MULTILINE)


def requirements_rows(packages: requirements.RequirementList, shown: str) -> tuple[Row, ...]:
    """The rows of an expanded, hashed requirements file. Raises EnvironmentError_ for a line that is no pin."""
    return tuple(sorted((_pin(line, packages.pins.get(line, ()), shown) for line in packages.requirements), key=_order))


def for_platform(rows: Iterable[Row], ref: EnvironmentRef) -> tuple[Row, ...]:
    """The rows whose marker holds on the reference's platform and Python, the markers themselves dropped."""
    environment = platforms.marker_environment(ref.platform, ref.python)
    return tuple(replace(row, marker="") for row in rows if not row.marker or Marker(row.marker).evaluate(environment))


def located(row: Row, files: Mapping[str, str]) -> Row:
    """The row with the place where its file was seen, if ``files`` (by sha256) knows it and the row does not."""
    url = next((files[value] for value in row.hashes if value in files), "")
    return replace(row, url=url, hashes=(next(v for v in row.hashes if v in files),)) if url and not row.url else row


def _order(row: Row) -> tuple[str, str, str]:
    return row.name, row.version, row.marker


def _pin(line: str, hashes: Sequence[str], shown: str) -> Row:
    try:
        parsed = Requirement(line)
    except InvalidRequirement as error:
        raise EnvironmentError_(f"{shown}: {line!r} is no locked package.", words=str(error)) from error
    name, marker = canonicalize_name(parsed.name), str(parsed.marker or "")
    digests = tuple(sorted(value.partition(":")[2] for value in hashes if value.startswith("sha256:")))
    if parsed.url and parsed.url.startswith("git+"):
        return _git_row(name, "", parsed.url, shown, marker)
    if not digests:
        raise EnvironmentError_(f"{shown} has no sha256 for {line}.", hint="Lock anew: mlflow-remote lock.")
    if parsed.url:
        url, subdirectory = _split(parsed.url)
        return Row("pip", name, "", digests, url, direct=True, subdirectory=subdirectory, marker=marker)
    pinned = [each.version for each in parsed.specifier if each.operator in ("==", "===") and "*" not in each.version]
    if not pinned:
        raise EnvironmentError_(f"{shown} does not pin {line}.", hint="Lock anew: mlflow-remote lock.")
    return Row("pip", name, pinned[0], digests, marker=marker)


def render_requirements(rows: Iterable[Row], *, declaration: str, python: str, index_options: Iterable[str]) -> str:
    """Rows as a requirements file that pip and uv install with ``--require-hashes``; equal rows give equal text."""
    head = [
        "# Locked by mlflow-remote; write it anew with: mlflow-remote lock",
        f"# {DECLARATION}: {declaration}",
        f"# python: {python}",
        *index_options,
    ]
    return "\n".join([*head, *(requirement_text(row) for row in sorted(rows, key=_order))]) + "\n"


def requirement_text(row: Row) -> str:
    marker = f" ; {row.marker}" if row.marker else ""
    if row.revision:
        return f"{row.name} @ {row.address}{marker}"
    pin = f"{row.name} @ {row.address}" if row.direct else f"{row.name}=={row.version}"
    return " \\\n    ".join([pin + marker, *(f"--hash=sha256:{value}" for value in sorted(row.hashes))])


def written_declaration(text: str) -> str:
    """The declaration key in a requirements lock of ours; empty in anybody else's."""
    match = _KEY_LINE.search(text)
    return match[1] if match else ""


# ---------------------------------------------------------------------------------------------- pylock.toml


def pylock_rows(
    text: str,
    platform: str,
    python: str,
    *,
    pins: Mapping[str, Sequence[str]] | None = None,
    shown: str = "pylock.toml",
) -> tuple[Row, ...]:
    """The rows of a PEP 751 lock for one platform and Python, each with the one file that fits best.

    ``pins``: digests (``sha256:…``) that the project's own requirements allow, by canonical name.
    Raises EnvironmentError_ where no file fits, or none that is allowed.
    """
    from . import toml  # only where locks are made: a job's Python 3.10 has no parser

    try:
        document = toml.loads(text)
    except ValueError as error:
        raise EnvironmentError_(f"{shown} cannot be read.", words=str(error)) from error
    environment: dict[str, Any] = dict(platforms.marker_environment(platform, python))
    environment |= {"extras": set(), "dependency_groups": set(document.get("default-groups", ()))}
    ranks = _tag_ranks(platform, python)
    try:
        rows = [
            _pylock_row(package, ranks, (pins or {}).get(canonicalize_name(package["name"]), ()), shown)
            for package in document.get("packages", [])
            if "marker" not in package or Marker(package["marker"]).evaluate(environment)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnvironmentError_(f"{shown} is damaged.", words=f"{type(error).__name__}: {error}") from error
    return tuple(sorted(rows, key=_order))


def render_pylock(rows: Iterable[Row]) -> str:
    """Rows whose files are known as a PEP 751 lock, from which uv installs exactly these files, asking no index."""
    head = 'lock-version = "1.0"\ncreated-by = "mlflow-remote"\n'
    return head + "".join(_pylock_table(row) for row in sorted(rows, key=_order))


def _pylock_table(row: Row) -> str:
    # JSON's strings are TOML's basic strings, for what URLs and names hold
    file = f"{{ url = {json.dumps(row.url)}, hashes = {{ sha256 = {json.dumps(row.hashes[0])} }} }}"
    place = f"sdist = {file}" if row.built else f"wheels = [{file}]"
    return f"\n[[packages]]\nname = {json.dumps(row.name)}\nversion = {json.dumps(row.version)}\n{place}\n"


def _pylock_row(package: Mapping[str, Any], ranks: Mapping[str, int], allowed: Sequence[str], shown: str) -> Row:
    name, version = canonicalize_name(package["name"]), str(package.get("version", ""))
    if "vcs" in package:
        vcs = package["vcs"]
        _refuse_literal(vcs["url"], name, shown)
        return Row(
            "pip",
            name,
            version,
            url=f"git+{vcs['url']}",
            direct=True,
            revision=vcs["commit-id"],
            subdirectory=vcs.get("subdirectory", ""),
        )
    if "archive" in package:
        row = _file_row(name, version, package["archive"], direct=True)
        return replace(row, subdirectory=package["archive"].get("subdirectory", ""))
    if "directory" in package:
        raise EnvironmentError_(
            f"{shown}: {name} is a folder on the machine that locked it.", hint="Only published packages can be locked."
        )
    wheels = [wheel for wheel in package.get("wheels", []) if _allowed(wheel, allowed)]
    ranked = [(rank, wheel) for wheel in wheels if (rank := _rank(wheel, ranks)) is not None]
    if ranked:
        return _file_row(name, version, min(ranked, key=lambda pair: (pair[0], _file_name(pair[1])))[1])
    if "sdist" in package and _allowed(package["sdist"], allowed):
        return _file_row(name, version, package["sdist"])
    raise EnvironmentError_(
        f"{shown} has no file of {name} {version} that fits the platform and the Python version"
        + (", among those whose hash the requirements allow." if allowed else "."),
        hint="Lock anew: mlflow-remote lock.",
    )


def _file_row(name: str, version: str, file: Mapping[str, Any], direct: bool = False) -> Row:
    sha256 = file.get("hashes", {}).get("sha256", "")
    if not sha256:
        raise EnvironmentError_(
            f"The package index states no sha256 for {name} {version}, so its content could not be verified.",
            hint="Use an index that states digests (PEP 503).",
        )
    url = credentials.strip(str(file["url"]))
    return Row("pip", name, version, (sha256,), url, direct=direct, size_bytes=int(file.get("size", 0)))


def _allowed(file: Mapping[str, Any], allowed: Sequence[str]) -> bool:
    return not allowed or f"sha256:{file.get('hashes', {}).get('sha256', '')}" in allowed


def _file_name(file: Mapping[str, Any]) -> str:
    return str(file.get("name") or PurePosixPath(unquote(urlsplit(str(file["url"])).path)).name)


def _rank(wheel: Mapping[str, Any], ranks: Mapping[str, int]) -> int | None:
    """How well a wheel fits, 0 best; None if it does not."""
    try:
        tags = parse_wheel_filename(_file_name(wheel))[3]
    except (ValueError, InvalidVersion):
        return None
    return min((ranks[str(tag)] for tag in tags if str(tag) in ranks), default=None)


def _tag_ranks(platform: str, python: str) -> dict[str, int]:
    from packaging.tags import compatible_tags, cpython_tags

    version = tuple(int(part) for part in python.split(".")[:2])
    names = list(platforms.wheel_platforms(platform))
    interpreter = f"cp{version[0]}{version[1]}"
    tags = [*cpython_tags(version, platforms=names), *compatible_tags(version, interpreter, names)]
    return {str(tag): rank for rank, tag in reversed(list(enumerate(tags)))}
