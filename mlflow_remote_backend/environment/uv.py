"""uv, as a program: requirements become rows, rows become packages in a prefix, and a Python is found.

uv is asked in a private folder, so that no ``pyproject.toml`` or ``uv.toml`` of a project joins in. Credentials reach
it by its environment. It fetches only from the indexes it is given, and installs nothing whose digest is not in the
lock.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.utils import canonicalize_name

from ..errors import EnvironmentError_, JobError
from . import credentials, hints, indexes, integrity, lockfile, platforms, requirements, tool
from .lockfile import Row
from .requirements import RequirementList

#: Seconds for solving, which may have to build source archives for their metadata, and for one installation.
COMPILE_TIMEOUT_S = 900
INSTALL_TIMEOUT_S = 3600

#: How uv says that a package, one of conda's for instance, does not know an extra.
_NO_EXTRA = re.compile(r"The package `(?P<name>[\w.-]+)[^`]*` does not have an extra named `(?P<extra>[^`]+)`")

#: Seconds and attempts before an index counts as unreachable; a user's own settings win.
_PATIENCE = {"UV_HTTP_CONNECT_TIMEOUT": "5", "UV_HTTP_TIMEOUT": "30", "UV_HTTP_RETRIES": "1"}


def compile_rows(
    packages: RequirementList,
    *,
    platform: str,
    python: str,
    index_lines: Sequence[str],
    root: Path,
    provided: Mapping[str, str],
    shown: str,
    warn: Callable[[str], object] = lambda notice: None,
) -> tuple[Row, ...]:
    """Solves ``packages`` for a platform and a Python version: one row, one file, for each package.

    ``provided``: packages that something else installs (conda), by canonical name with their version; they take part in
    the solution and are not among the rows; ``warn`` is told of their extras, whose packages are not known.
    Raises EnvironmentError_ in uv's words.
    """
    secrets = indexes.secrets(index_lines)
    with tool.private_folder(root) as folder:
        _write_request(folder, packages, provided)
        argv = [
            *(executable(), "pip", "compile", "requirements.in", "--format", "pylock.toml", "--no-header"),
            *("--constraints", "constraints.txt", "--python-platform", platforms.uv_platform(platform)),
            *("--python-version", python, "--python", sys.executable, "--no-python-downloads"),
            *("--cache-dir", str(root / "uv"), *_build_options(packages.build_options)),
        ]
        lines = (*index_lines, f"--find-links {folder / 'provided'}") if provided else index_lines
        result = _run(argv, folder, lines, secrets, COMPILE_TIMEOUT_S, what=f"Locking {shown}")
    if result.code:
        raise _unsolved(shown, platform, python, credentials.redact(result.stderr, secrets.values()))
    for match in _NO_EXTRA.finditer(result.stderr):
        if canonicalize_name(match["name"]) in provided:
            asked = f"{match['name']}[{match['extra']}]"
            warn(f"{match['name']} comes from conda, and what {asked} adds is not installed: name those packages too.")
    pins = _pins(packages)
    rows = lockfile.pylock_rows(result.stdout, platform, python, pins=pins, shown=f"The package index, for {shown},")
    return tuple(row for row in rows if row.name not in provided)


def compile_universal(
    packages: RequirementList, *, python: str, index_lines: Sequence[str], root: Path, shown: str
) -> tuple[Row, ...]:
    """Solves ``packages`` for all platforms at once: rows with markers, and with the digests of every file."""
    secrets = indexes.secrets(index_lines)
    with tool.private_folder(root) as folder:
        _write_request(folder, packages, {})
        argv = [
            *(executable(), "pip", "compile", "requirements.in", "--universal", "--generate-hashes", "--no-header"),
            *("--no-annotate", "--constraints", "constraints.txt", "--python-version", python),
            *("--python", sys.executable, "--no-python-downloads"),
            *("--cache-dir", str(root / "uv"), *_build_options(packages.build_options)),
        ]
        result = _run(argv, folder, index_lines, secrets, COMPILE_TIMEOUT_S, what=f"Locking {shown}")
        if result.code:
            said = credentials.redact(result.stderr, secrets.values())
            raise _unsolved(shown, "all platforms", python, said)
        listed = requirements.expand_text(result.stdout, folder=folder, where=f"The lock of {shown}")
    return lockfile.requirements_rows(listed, f"The lock of {shown}")


def export(project: Path, root: Path) -> str:
    """A project's ``uv.lock`` as the text of a ``pylock.toml``. Raises EnvironmentError_."""
    with tool.private_folder(root) as folder:
        argv = [
            *(executable(), "export", "--frozen", "--no-emit-project", "--no-dev", "--format", "pylock.toml"),
            *("--project", str(project), "--python", sys.executable, "--no-python-downloads", "--no-header"),
        ]
        result = tool.run(argv, cwd=folder, environ=tool.environment(folder), timeout_s=60)
    if result.code:
        raise EnvironmentError_(
            "uv.lock cannot be read by uv.",
            words=words(result.stderr),
            hint="uv.lock belongs to the pyproject.toml beside it: uv lock writes it.",
        )
    return result.stdout


def executable() -> str:
    """The path of uv: the one installed with this package, else the first on PATH."""
    try:
        from uv import find_uv_bin

        return str(find_uv_bin())
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
    if found is None:
        raise EnvironmentError_("uv is not installed.", hint="pip install uv")
    return found


def version() -> str:
    """uv's version, for keys."""
    from importlib import metadata

    try:
        return metadata.version("uv")
    except metadata.PackageNotFoundError:
        return executable()


def _write_request(folder: Path, packages: RequirementList, provided: Mapping[str, str]) -> None:
    lines = [
        " ".join([line, *(f"--hash={value}" for value in packages.pins.get(line, ()))])
        for line in packages.requirements
    ]
    (folder / "requirements.in").write_text("".join(f"{line}\n" for line in lines))
    pins = [f"{name}=={version}" for name, version in provided.items()]
    (folder / "constraints.txt").write_text("".join(f"{line}\n" for line in (*packages.constraints, *pins)))
    if provided:
        _write_provided(folder, provided)


def _write_provided(folder: Path, provided: Mapping[str, str]) -> None:
    """What conda installs, as empty wheels without dependencies: the solver then knows that it is there, and which."""
    (folder / "provided").mkdir()
    tables = []
    for name, version in provided.items():
        stem = f"{name.replace('-', '_')}-{version}"
        with zipfile.ZipFile(folder / "provided" / f"{stem}-py3-none-any.whl", "w") as wheel:
            info = f"{stem}.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        tables.append(f'[[dependency-metadata]]\nname = "{name}"\nversion = "{version}"\nrequires-dist = []\n')
    (folder / "uv.toml").write_text("".join(tables))


def _pins(packages: RequirementList) -> dict[str, tuple[str, ...]]:
    from .spec import requirement_name

    return {requirement_name(line): hashes for line, hashes in packages.pins.items()}


def _build_options(options: Iterable[str]) -> list[str]:
    argv: list[str] = []
    for option in options:
        argv += ["--prerelease", "allow"] if option == "--pre" else option.split(None, 1)
    return argv


def _run(
    argv: Sequence[str],
    folder: Path,
    index_lines: Iterable[str],
    secrets: Mapping[str, str],
    timeout_s: float,
    *,
    what: str,
    extra: Mapping[str, str] | None = None,
) -> tool.Result:
    environ = {**_PATIENCE, **tool.environment(folder), **_index_environment(index_lines, secrets), **(extra or {})}
    if certificates := indexes.certificates():
        environ.setdefault("SSL_CERT_FILE", certificates)
    if "--no-index" in index_lines:
        argv = [*argv, "--no-index"]
    try:
        return tool.run(argv, cwd=folder, environ=environ, timeout_s=timeout_s)
    except tool.TimedOut as error:
        raise EnvironmentError_(
            f"{what}: uv {error}.", words=credentials.redact(error.stderr, secrets.values()), hint=hints.INDEX
        ) from error


def _index_environment(lines: Iterable[str], secrets: Mapping[str, str]) -> dict[str, str]:
    """The option lines as uv's variables: arguments could be read by every user of the machine."""
    places: dict[str, list[str]] = {}
    for line in indexes.expand(lines, secrets):
        option, _, place = line.partition(" ")
        places.setdefault(option, []).append(place)
    environ = {
        "UV_DEFAULT_INDEX": " ".join(places.get("--index-url", [])[:1]),
        "UV_INDEX": " ".join(places.get("--extra-index-url", [])),
        "UV_FIND_LINKS": ",".join(places.get("--find-links", [])),
        "UV_INSECURE_HOST": " ".join(places.get("--trusted-host", [])),
        "UV_INDEX_STRATEGY": os.environ.get("UV_INDEX_STRATEGY") or " ".join(places.get("--index-strategy", [])[:1]),
    }
    return {name: value for name, value in environ.items() if value}


def _unsolved(shown: str, platform: str, python: str, stderr: str) -> EnvironmentError_:
    return EnvironmentError_(
        f"{shown} cannot be locked for {platform} with Python {python}.",
        words=words(stderr),
        hint=hints.for_words(stderr, hints.INDEX),
    )


def words(stderr: str) -> str:
    """What uv says of a failure, without its progress lines."""
    progress = re.compile(r"^(Resolved|Using|Prepared|Installed|Download|Build|Built|warning:| [+~-])")
    lines = [line for line in stderr.splitlines() if not progress.match(line)]
    return "\n".join(lines).strip()


# ---------------------------------------------------------------------------------------------- a Python


def find_python(wanted: str, root: Path) -> Path:
    """An interpreter of the wanted version's minor release, the exact one if it is there, else uv's managed download.

    ``wanted``: ``3.11`` or ``3.11.7``. Raises JobError (ENVIRONMENT) naming what was found.
    """
    minor = ".".join(wanted.split(".")[:2])
    for version in dict.fromkeys((wanted, minor)):
        found = _installed(version, root)
        if found:
            return found
    return _download(wanted, minor, root)


def _installed(version: str, root: Path) -> Path | None:
    own = _own_interpreter()
    if own and _matches(".".join(map(str, sys.version_info[:3])), version):
        return own
    with tool.private_folder(root) as folder:
        options = ("--system", "--no-python-downloads", "--no-project", "--no-config")
        argv = [executable(), "python", "find", version, *options]
        result = tool.run(argv, cwd=folder, environ=_python_environment(folder, root), timeout_s=60)
    if result.code == 0 and result.stdout.strip():
        return Path(result.stdout.strip())
    return next((python for release, python in _pyenv_pythons() if _matches(release, version)), None)


def _matches(release: str, version: str) -> bool:
    return release == version or release.startswith(f"{version}.")


def _own_interpreter() -> Path | None:
    """The interpreter beneath this process, outside of any virtual environment."""
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return python if python.exists() else None


def _pyenv_pythons() -> list[tuple[str, Path]]:
    """The interpreters that pyenv keeps, newest first; its shims on PATH answer only for the selected ones."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = [(folder.name, folder / "bin" / "python") for folder in root.glob("*.*.*") if folder.is_dir()]
    found = [(release, python) for release, python in found if re.fullmatch(r"[\d.]+", release) and python.exists()]
    return sorted(found, key=lambda pair: tuple(map(int, pair[0].split("."))), reverse=True)


def _python_environment(folder: Path, root: Path) -> dict[str, str]:
    environ = {**_PATIENCE, **tool.environment(folder), "UV_PYTHON_INSTALL_DIR": str(root / "python")}
    if certificates := indexes.certificates():
        environ.setdefault("SSL_CERT_FILE", certificates)
    return environ


def _download(wanted: str, minor: str, root: Path) -> Path:
    with tool.private_folder(root) as folder:
        environ = _python_environment(folder, root)
        argv = [executable(), "python", "install", wanted, "--no-bin", "--no-config", "--cache-dir", str(root / "uv")]
        result = tool.run(argv, cwd=folder, environ=environ, timeout_s=INSTALL_TIMEOUT_S)
        if result.code == 0:
            argv = [executable(), "python", "find", wanted, "--managed-python", "--no-project", "--no-config"]
            found = tool.run(argv, cwd=folder, environ=environ, timeout_s=60)
            if found.code == 0:
                return Path(found.stdout.strip())
        listed = tool.run(
            [executable(), "python", "list", "--only-installed", "--no-config", "--output-format", "json"],
            cwd=folder,
            environ=environ,
            timeout_s=60,
        )
    raise JobError(
        f"There is no Python {minor} here, and uv could not download {wanted}. Found: {_found(listed.stdout)}.",
        words=credentials.redact(words(result.stderr)),
        hint=f"Install Python {minor} (or name a mirror in UV_PYTHON_INSTALL_MIRROR), ask for another version in the "
        "project, or use env_manager conda, which takes Python from a conda channel.",
        code="ENVIRONMENT",
    )


def _found(listed: str) -> str:
    import json

    try:
        found = {str(row["version"]) for row in json.loads(listed)}
    except (ValueError, KeyError, TypeError):
        found = set()
    found |= {release for release, _ in _pyenv_pythons()} | {".".join(map(str, sys.version_info[:3]))}
    return ", ".join(sorted(found, key=lambda text: [int(part) for part in re.findall(r"\d+", text)]))


# ---------------------------------------------------------------------------------------------- installing


def create_venv(prefix: Path, python: Path, root: Path) -> None:
    """An empty virtual environment at ``prefix``. Raises JobError (ENVIRONMENT)."""
    with tool.private_folder(root) as folder:
        argv = [executable(), "venv", "--no-project", "--no-config", "--python", str(python), str(prefix)]
        result = tool.run(argv, cwd=folder, environ=tool.environment(folder), timeout_s=120)
    if result.code:
        raise JobError(f"{python} makes no virtual environment.", words=words(result.stderr), code="ENVIRONMENT")


def install(
    python: Path, rows: Sequence[Row], *, index_lines: Sequence[str], root: Path, compile_bytecode: bool = False
) -> None:
    """Installs locked rows into the environment of ``python``: wheels first, then what is built with them.

    Every archive's digest is checked by uv against the row; a git revision is its own digest.
    Raises JobError (ENVIRONMENT) in uv's words.
    """
    began = time.time()
    installation = _Installation(python, indexes.reachable_from_here(index_lines), root, compile_bytecode)
    installation.add([row for row in rows if not row.built])
    # Source archives are built with what the wheels brought: isolated builds would fetch tools that no lock names.
    installation.add([row for row in rows if row.built], "--no-build-isolation")
    installation.mend(rows, before=began)


@dataclass(frozen=True)
class _Installation:
    """One environment that is being filled."""

    python: Path
    index_lines: tuple[str, ...]
    root: Path
    compile_bytecode: bool

    def add(self, rows: Sequence[Row], *options: str) -> None:
        """Installs rows by the files that the lock saw; where those are out of reach, by name from the indexes."""
        exact = [row for row in rows if row.url and row.hashes and not row.direct]
        named = [row for row in rows if row not in exact and not row.revision]
        failed = self._uv("pylock.toml", lockfile.render_pylock(exact), options, exact) if exact else None
        if failed and hints.is_unreachable(failed.stderr):
            named, failed = [*exact, *named], None
        if failed:
            raise self._error(failed, len(exact))
        # git has no archive whose digest could be required; the commit names the content
        revisions = [row for row in rows if row.revision]
        for group, required in ((named, ("--require-hashes",)), (revisions, ())):
            text = "".join(f"{lockfile.requirement_text(row)}\n" for row in group)
            failed = self._uv("requirements.txt", text, (*required, *options), group) if group else None
            if failed:
                raise self._error(failed, len(group))

    def mend(self, rows: Sequence[Row], *, before: float) -> None:
        """Installs once more, from fresh files, what came damaged out of uv's cache."""
        prefix = self.python.parent.parent
        damaged = {canonicalize_name(name) for name in integrity.damaged(prefix, before)}
        if not damaged:
            return
        self._forget(damaged)
        again = [row for row in rows if row.name in damaged]
        self.add(again, "--reinstall", *(("--no-build-isolation",) if any(row.built for row in again) else ()))
        if still := integrity.damaged(prefix, before):
            raise JobError(
                f"Installed files differ from their packages: {', '.join(still)}.",
                hint="The disk may be damaged, or something else writes into the cache.",
                code="ENVIRONMENT",
            )

    def _forget(self, names: Iterable[str]) -> None:
        with tool.private_folder(self.root) as folder:
            argv = [executable(), "cache", "clean", *sorted(names), "--cache-dir", str(self.root / "uv"), "--no-config"]
            tool.run(argv, cwd=folder, environ=tool.environment(folder), timeout_s=60)

    def _uv(self, name: str, text: str, options: Sequence[str], rows: Sequence[Row]) -> tool.Result | None:
        """One installation from a file. Returns a failed result, redacted; None when it went well."""
        secrets = indexes.secrets(self.index_lines)
        with tool.private_folder(self.root) as folder:
            (folder / name).write_text(text)
            argv = [
                *(executable(), "pip", "install", "--python", str(self.python), "--no-deps", "--no-config"),
                *("--break-system-packages", "--cache-dir", str(self.root / "uv"), "-r", name, *options),
                *(("--compile-bytecode",) if self.compile_bytecode else ()),
                *(("--preview-features", "pylock") if name == "pylock.toml" else ()),
            ]
            result = _run(argv, folder, self.index_lines, secrets, INSTALL_TIMEOUT_S, what="Installing packages")
        return replace(result, stderr=credentials.redact(result.stderr, secrets.values())) if result.code else None

    def _error(self, failed: tool.Result, count: int) -> JobError:
        return JobError(
            f"{count} locked packages could not be installed.",
            words=words(failed.stderr),
            hint=hints.for_words(failed.stderr, hints.INDEX),
            code="ENVIRONMENT",
        )
