"""What a project declares that it needs, read once and written down in one spelling.

``load`` understands ``conda.yaml`` and ``python_env.yaml`` under each ``env_manager`` as MLflow's users know them:

    declared \\ manager   (none)       conda                     virtualenv, uv                        local
    conda.yaml           conda        conda                     venv: its python and pip parts        what is there
    python_env.yaml      virtualenv   python from conda, rest   venv                                  what is there
                                      by pip (MLflow refuses)
    docker_env           the image    the image                 the image                             the image
    nothing              local        python alone              an empty venv                         what is there

Reading is pure but for the files of the project: no network, no tool, milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ..errors import EnvironmentError_
from . import documents, indexes, requirements
from .requirements import RequirementList

MANAGERS = ("conda", "virtualenv", "uv", "local")

#: Files longer than this are refused unread.
MAX_FILE_BYTES = 1024 * 1024

#: Where a declaration without channels is looked for; a name, which the solver resolves.
DEFAULT_CHANNEL = "conda-forge"

#: conda packages that are left to the virtual environment itself when a conda.yaml becomes one (as MLflow does).
_PYTHON_PARTS = re.compile(
    r"^([\w./-]+::)?(?P<package>python|pip|setuptools|wheel)"
    r"\s*(?P<operator><=|>=|==|!=|=|<|>)?\s*(?P<version>[\d.]+)?\*?(?P<build>[=\s][\w.*]+)?$"
)


class OptionsLike(Protocol):
    """The section ``environment`` of the backend config, as ``config`` reads it; None where nothing is set."""

    @property
    def frozen(self) -> bool: ...
    @property
    def channels(self) -> Sequence[str]: ...
    @property
    def channel_alias(self) -> str | None: ...
    @property
    def channel_map(self) -> Mapping[str, str]: ...
    @property
    def index_url(self) -> str | Sequence[str] | None: ...
    @property
    def solver(self) -> str: ...
    @property
    def cuda(self) -> str | None: ...


@dataclass(frozen=True)
class EnvironmentOptions:
    """The same with nothing left open.

    ``frozen``: never solve, a fitting lock must be committed. ``channels``: instead of the declared ones.
    ``channel_alias``: URL before every channel name; ``channel_map``: URLs of single channels. ``index_url``: package
    indexes, the first the default. ``solver``: ``rattler``, or the name or path of a conda, mamba or micromamba.
    ``cuda``: version of the driver where the job runs, for packages that depend on ``__cuda``; empty for none.
    """

    frozen: bool = False
    channels: tuple[str, ...] = ()
    channel_alias: str = ""
    channel_map: Mapping[str, str] = field(default_factory=dict)
    index_url: tuple[str, ...] = ()
    solver: str = "rattler"
    cuda: str = ""

    @staticmethod
    def of(options: OptionsLike | None) -> EnvironmentOptions:
        """``options`` in one form, or the defaults."""
        if options is None:
            return EnvironmentOptions()
        urls = (options.index_url,) if isinstance(options.index_url, str) else tuple(options.index_url or ())
        return EnvironmentOptions(
            frozen=options.frozen,
            channels=tuple(options.channels),
            channel_alias=options.channel_alias or "",
            channel_map=dict(options.channel_map),
            index_url=urls,
            solver=options.solver,
            cuda=options.cuda or "",
        )


@dataclass(frozen=True)
class EnvSpec:
    """What is to be locked. ``kind``: the lock's format, ``conda-lock``, ``requirements``, or empty (nothing to lock).

    ``file``: the declaration, or None; ``shown``: its name for messages. ``python``: the version wanted, for a venv.
    ``conda``: conda's match specs; ``channels``: as declared, in order of priority. ``packages``: what pip is asked
    for, expanded; ``seeds``: what virtualenv would add. ``env_vars``: conda.yaml's ``variables``. ``warnings``: one
    line each.
    """

    manager: str
    kind: str = ""
    file: Path | None = None
    shown: str = ""
    python: str = ""
    channels: tuple[str, ...] = ()
    conda: tuple[str, ...] = ()
    packages: RequirementList = field(default_factory=RequirementList)
    seeds: tuple[str, ...] = ()
    env_vars: Mapping[str, str] = field(default_factory=dict)
    options: EnvironmentOptions = field(default_factory=EnvironmentOptions)
    warnings: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where a committed lock stands: beside the declaration."""
        return self.file.parent if self.file else Path.cwd()

    @property
    def hashed(self) -> bool:
        """Whether all requirements come with digests, so that they are a lock themselves."""
        lines = self.packages.requirements
        return self.kind == "requirements" and bool(lines) and all(line in self.packages.pins for line in lines)

    def channel_urls(self) -> tuple[str, ...]:
        """Where the channels are found, in order, ``${NAME}`` for credentials; a bare name if the solver knows it.

        Raises EnvironmentError_.
        """
        alias, mapping = self.options.channel_alias, self.options.channel_map
        return tuple(
            indexes.channel_url(name, folder=self.folder, alias=alias, mapping=mapping) for name in self.channels
        )

    def declaration(self) -> dict[str, Any]:
        """What was asked for, whatever the order and spelling; without mirrors, credentials, platform or tools."""
        return {
            "kind": self.kind,
            "python": self.python,
            "channels": list(self.channels),
            "conda": sorted(_spelled(spec) for spec in self.conda),
            "requirements": sorted(set(self.packages.requirements)),
            "constraints": sorted(set(self.packages.constraints)),
            "indexes": list(self.packages.index_options),
            "build": sorted(set(self.packages.build_options)),
            "pins": {name: sorted(hashes) for name, hashes in sorted(self.packages.pins.items())},
        }

    def declaration_key(self) -> str:
        """The digest of :meth:`declaration`: a committed lock carries it and fits as long as it is the same."""
        return digest(self.declaration())


def digest(value: Any) -> str:
    """``sha256`` in hex of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load(
    project_dir: str | Path,
    env_type: str | None,
    env_config_path: str | Path | None,
    env_manager: str | None = None,
    options: OptionsLike | None = None,
) -> EnvSpec:
    """What the project needs under ``env_manager``; see the table above.

    ``env_type``: ``conda``, ``python`` or ``docker`` (MLflow's ``conda_env``… as well), None if nothing is declared;
    ``env_config_path``: the declaration, absolute or relative to the project. Raises EnvironmentError_.
    """
    if env_manager is not None and env_manager not in MANAGERS:
        raise EnvironmentError_(
            f"There is no environment manager {env_manager!r}.", hint=f"env_manager is one of {', '.join(MANAGERS)}."
        )
    chosen = EnvironmentOptions.of(options)
    for url in chosen.index_url:
        requirements.refuse_literal(url, "environment.index_url")
    declared = (env_type or "").removesuffix("_env")
    if declared == "docker" or env_manager == "local":
        return EnvSpec("docker" if declared == "docker" else "local", options=chosen)
    project = Path(project_dir).absolute()
    if env_config_path is None:
        return _undeclared(project, env_manager, chosen)
    file = project / env_config_path
    shown = _shown(file, project)
    if declared == "conda":
        return _conda_project(file, shown, env_manager or "conda", chosen)
    return _python_project(file, shown, env_manager or "virtualenv", chosen)


def _shown(file: Path, project: Path) -> str:
    return file.relative_to(project).as_posix() if file.is_relative_to(project) else str(file)


def _undeclared(project: Path, manager: str | None, options: EnvironmentOptions) -> EnvSpec:
    if manager is None:
        return EnvSpec("local", options=options)
    file = project / "python_env.yaml"  # need not exist: a committed lock would stand beside it
    shown = f"env_manager {manager}"
    if manager == "conda":
        conda = (f"python={_this_python()}", "pip")
        spec = EnvSpec("conda", "conda-lock", file, shown, channels=(DEFAULT_CHANNEL,), conda=conda, options=options)
        return _with_channels(spec)
    return _venv(manager, file, shown, _this_python(), RequirementList(), options)


def _this_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


# ---------------------------------------------------------------------------------------------- conda.yaml


def _conda_project(file: Path, shown: str, manager: str, options: EnvironmentOptions) -> EnvSpec:
    document = _document(file, shown)
    conda, pip = _dependencies(document, shown)
    packages = requirements.expand(pip, folder=file.parent, where=f"{shown}, pip")
    if manager != "conda":
        return _venv_of_conda(manager, file, shown, conda, packages, options, _variables(document, shown))
    if packages.requirements and not _names_package(conda, "pip"):
        conda = (*conda, "pip")
    channels = tuple(dict.fromkeys(_list(document, "channels", shown)))
    spec = EnvSpec(
        "conda",
        "conda-lock",
        file,
        shown,
        channels=channels,
        conda=conda,
        packages=packages,
        env_vars=_variables(document, shown),
        options=options,
    )
    return _with_channels(spec)


def _with_channels(spec: EnvSpec) -> EnvSpec:
    """The spec with ``options.channels`` instead of its own, or with the default channel and a word about it."""
    channels = tuple(channel for channel in spec.options.channels or spec.channels if channel != "nodefaults")
    if channels:
        return replace(spec, channels=channels)
    warning = f"{spec.shown} names no channel; {DEFAULT_CHANNEL} is used."
    return replace(spec, channels=(DEFAULT_CHANNEL,), warnings=(*spec.warnings, warning))


def _dependencies(document: Mapping[str, Any], shown: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """conda's specs and pip's lines. Raises for what conda-lock would drop or misread in silence."""
    conda: list[str] = []
    pip: list[str] = []
    listed = document.get("dependencies", [])
    if not isinstance(listed, list):
        raise EnvironmentError_(f"{shown}: dependencies must be a list, not {listed!r}.")
    for entry in listed:
        if isinstance(entry, str) and entry.strip():
            conda.append(_conda_spec(entry.strip(), shown))
        elif isinstance(entry, dict) and set(entry) == {"pip"}:
            pip += _strings(entry["pip"] or [], f"{shown}, pip")
        else:
            raise EnvironmentError_(
                f"{shown}: {entry!r} is no dependency.",
                hint="A dependency is a text like 'numpy>=2', or a mapping 'pip:' with a list of requirements.",
            )
    return tuple(conda), tuple(pip)


def _conda_spec(text: str, shown: str) -> str:
    if "://" in text or text.endswith((".conda", ".tar.bz2")):
        requirements.refuse_literal(text, shown)
        raise EnvironmentError_(
            f"{shown} asks for a single package file: {text}",
            hint="Write name and version (numpy=2.1) and name the channel that has it under channels.",
        )
    if not re.match(r"^([\w./-]+::)?[A-Za-z0-9_][\w.-]*([\s=<>!~\[].*)?$", text):
        raise EnvironmentError_(f"{shown}: {text!r} is no conda package.", hint="Write it like numpy>=2.")
    return text


def _spelled(spec: str) -> str:
    """A conda spec in one spelling: ``NumPy  >= 2`` and ``numpy>=2`` are the same."""
    name = re.match(r"^([\w./-]+::)?[\w.-]+", spec)
    end = name.end() if name else 0
    version = re.sub(r"\s*([=<>!~|,]+)\s*", r"\1", re.sub(r"\s+", " ", spec[end:]))
    return spec[:end].lower() + version.strip()


def conda_name(spec: str) -> str:
    """The package's name in a conda spec, without channel and version."""
    match = re.match(r"^(?:[\w./-]+::)?([\w.-]+)", spec)
    return match[1].lower() if match else spec


def _names_package(specs: Sequence[str], name: str) -> bool:
    return any(conda_name(spec) == name for spec in specs)


def _variables(document: Mapping[str, Any], shown: str) -> dict[str, str]:
    variables = document.get("variables") or {}
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise EnvironmentError_(f"{shown}: variables must map names to texts, not {variables!r}.")
    return dict(variables)


def _venv_of_conda(
    manager: str,
    file: Path,
    shown: str,
    conda: Sequence[str],
    packages: RequirementList,
    options: EnvironmentOptions,
    variables: Mapping[str, str],
) -> EnvSpec:
    """A conda.yaml as a virtual environment: its python, its pip part and its variables, and a word about what is left
    out."""
    python, build, left_out = "", [], []
    for spec in conda:
        match = _PYTHON_PARTS.match(spec)
        if conda_name(spec) == "python":
            python = python or _pinned_python(match, spec, shown)
        elif not match:
            left_out.append(spec)
        else:
            operator = "==" if match["operator"] == "=" else match["operator"] or ""
            build.append(f"{match['package']}{operator}{match['version'] or ''}")
    warnings = []
    if left_out:
        warnings.append(f"{shown}: env_manager {manager} leaves out what is not Python: {', '.join(left_out)}.")
    if not python:
        python = _this_python()
        warnings.append(f"{shown} names no python; {python}, the one that submits, is used.")
    packages = requirements.expand(build, folder=file.parent, where=shown) + packages
    made = _venv(manager, file, shown, python, packages, options, tuple(warnings))
    return replace(made, env_vars=dict(variables))


def _pinned_python(match: re.Match[str] | None, spec: str, shown: str) -> str:
    if not match or not match["version"] or match["operator"] in ("<", ">", "!="):
        raise EnvironmentError_(
            f"{shown}: {spec!r} names no single Python version, which a virtual environment needs.",
            hint="Write python=3.11, or use env_manager conda.",
        )
    return match["version"].rstrip(".")


# ---------------------------------------------------------------------------------------------- python_env.yaml


def _python_project(file: Path, shown: str, manager: str, options: EnvironmentOptions) -> EnvSpec:
    document = _document(file, shown)
    python = document.get("python") or _this_python()
    if not isinstance(python, str) or not re.fullmatch(r"\d+(\.\d+){0,2}", python):
        raise EnvironmentError_(f"{shown}: python must be a version like 3.11 or 3.11.7, not {python!r}.")
    packages = RequirementList()
    for key in ("build_dependencies", "dependencies"):
        packages += requirements.expand(_list(document, key, shown), folder=file.parent, where=f"{shown}, {key}")
    if manager == "conda":
        return _conda_of_python(file, shown, python, packages, options)
    return _venv(manager, file, shown, python, packages, options)


def _conda_of_python(
    file: Path, shown: str, python: str, packages: RequirementList, options: EnvironmentOptions
) -> EnvSpec:
    """python_env.yaml with python from a conda channel, so that no interpreter need be on the machine."""
    spec = EnvSpec(
        "conda",
        "conda-lock",
        file,
        shown,
        channels=(DEFAULT_CHANNEL,),
        conda=(f"python={python}", "pip"),
        packages=_without(packages, "pip"),
        options=options,
    )
    return _with_channels(spec)


def _without(packages: RequirementList, name: str) -> RequirementList:
    kept = tuple(line for line in packages.requirements if requirement_name(line) != name)
    return replace(packages, requirements=kept)


def _venv(
    manager: str,
    file: Path,
    shown: str,
    python: str,
    packages: RequirementList,
    options: EnvironmentOptions,
    warnings: tuple[str, ...] = (),
) -> EnvSpec:
    if "." not in python:
        raise EnvironmentError_(
            f"{shown}: {python!r} is no single Python version, which a virtual environment needs.",
            hint="Write 3.11 or 3.11.7, or use env_manager conda.",
        )
    return EnvSpec(
        manager,
        "requirements",
        file,
        shown,
        python=python,
        packages=packages,
        seeds=_seeds(packages, python) if manager == "virtualenv" else (),
        options=options,
        warnings=warnings,
    )


def _seeds(packages: RequirementList, python: str) -> tuple[str, ...]:
    """What virtualenv puts into every environment, unless the project names it itself: locked like the rest."""
    minor = tuple(int(part) for part in python.split(".")[:2])
    wanted = ("pip", "setuptools") if minor < (3, 12) else ("pip",)
    named = {requirement_name(line) for line in packages.requirements}
    return tuple(name for name in wanted if name not in named)


# ---------------------------------------------------------------------------------------------- reading


def requirement_name(line: str) -> str:
    """The canonical name in a requirement line; empty for a bare URL."""
    try:
        return canonicalize_name(Requirement(line).name)
    except InvalidRequirement:
        return ""


def _list(document: Mapping[str, Any], key: str, shown: str) -> list[str]:
    return _strings(document.get(key) or [], f"{shown}, {key}")


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise EnvironmentError_(f"{where} must be a list of texts, not {str(value)[:200]}.")
    return [each for each in value if each.strip()]


def _document(file: Path, shown: str) -> Mapping[str, Any]:
    """The mapping in a YAML file, every scalar as the text that stands there (``3.10`` is not 3.1)."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise EnvironmentError_(f"{shown} is over {MAX_FILE_BYTES // 2**20} MiB; that is no declaration.")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentError_(f"{shown} cannot be read.", words=str(error)) from error
    document = documents.load_texts(text, shown)
    if not isinstance(document, dict):
        raise EnvironmentError_(f"{shown} must be a mapping, not {str(document)[:100]!r}.")
    return document
