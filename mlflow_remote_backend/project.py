"""Project URI -> a checked-out :class:`Project`: where the code comes from and what its MLproject file declares.

MLflow's own loader parses MLproject, so that its semantics are MLflow's by construction. Fetching is ours: MLflow
leaves its temporary folder behind, and for a local path with a version it checks that version out in the user's own
working tree. Here every fetched project lies in a temporary folder that goes when the submission ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import tempfile
import urllib.parse
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ProjectError
from .job import EntryPoint, Parameter

_REMOTE_GIT = re.compile(r"[\w.-]+@?[\w.-]*:(?!//)")  # HOST:PATH or USER@HOST:PATH, as git and ssh know them
MAX_MLPROJECT_BYTES = 1 << 20  # a larger MLproject is a mistake or an attack
MAX_ZIP_BYTES = 4 << 30
MAX_DIFF_BYTES = 5 << 20
_DIFF = ("diff", "HEAD", "--no-ext-diff", "--no-color", "--no-renames", "--irreversible-delete")
_PATHS_PER_CALL = 200  # of at most 3000 bytes each: a command line has an end
#: Set in git's hooks: with them git works on the repository of whoever submits, wherever it is started.
_OF_A_REPOSITORY = frozenset(
    {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX"}
)
GIT_TIMEOUT_S = 600  # fetching; a hung server must not hang the submission for ever


@dataclass(frozen=True)
class GitState:
    """What git knows of the project folder."""

    commit: str = ""
    repo_url: str = ""
    root: str = ""


@dataclass(frozen=True)
class Project:
    """A project on disk, with what MLproject declares of one entry point.

    ``env_type``: ``conda``, ``python``, ``docker`` or empty; ``env_config_path``: the declared environment file.
    ``logged_params``: the parameters as MLflow logs them (declared ones with defaults, then extra ones).
    ``own_dir``: the caller's folder that ``uri`` names; None for a project that was fetched from elsewhere.
    """

    uri: str
    dir: Path
    name: str
    version: str
    entry_point: EntryPoint
    parameters: Mapping[str, str]
    logged_params: Mapping[str, str]
    env_type: str
    env_config_path: Path | None
    docker_env: Mapping[str, Any] | None
    source_name: str
    git: GitState
    is_branch: bool = False
    own_dir: Path | None = None


@contextlib.contextmanager
def fetch(
    uri: str,
    version: str | None,
    entry_point: str,
    parameters: Mapping[str, Any] | None,
    *,
    scratch: Path | None = None,
) -> Iterator[Project]:
    """The project at ``uri`` (a folder, a git URL, a zip file or URL; ``#sub/folder``), there until the block ends.

    ``scratch``: where a checkout is made; default: the system's temporary folder.
    Blocks while git or HTTP fetches. Raises ProjectError: not there, no such version, entry point or parameter.
    """
    with contextlib.ExitStack() as stack:
        base, subdirectory = _split_subdirectory(uri)
        folder, is_branch = _checkout(base, version, scratch, stack)
        path = (folder / subdirectory).resolve()
        if not path.is_dir() or not path.is_relative_to(folder.resolve()):
            raise ProjectError(f"Project {redact_url(uri)!r} has no folder {subdirectory!r}.")
        found = _load(uri, path, version or "", entry_point, parameters or {}, is_branch)
        local = _local_path(base)
        yield dataclasses.replace(found, own_dir=local / subdirectory) if local and local.is_dir() else found


def _split_subdirectory(uri: str) -> tuple[str, str]:
    base, _, subdirectory = uri.strip("'\"").partition("#")
    if "." in subdirectory:
        raise ProjectError(f"'.' is not allowed in the subdirectory {subdirectory!r} of a project URI.")
    return base, subdirectory.strip("/")


def _checkout(base: str, version: str | None, scratch: Path | None, stack: contextlib.ExitStack) -> tuple[Path, bool]:
    """The folder that holds the project, and whether ``version`` names a branch."""
    local = _local_path(base)
    if base.endswith(".zip"):
        return _unzip(base, local, _temporary_folder(scratch, stack)), False
    if local is None and "://" not in base and not _REMOTE_GIT.match(base):
        raise ProjectError(f"There is no project at {base!r}: no such folder, and not the URL of a repository.")
    if local is not None and version is None:
        if not local.is_dir():
            raise ProjectError(f"Project {base!r} is a file; a project is a folder, a git repository or a zip file.")
        return local, False
    if local is not None and not _is_git_repository(local):
        raise ProjectError(f"Version {version!r} asks for a git project, but {base!r} is not a git repository.")
    if local is not None and (
        inside := _git_or_empty(local, "rev-parse", "--show-prefix").decode(errors="replace").strip()
    ):
        raise ProjectError(
            f"Version {version!r} asks for a git project, but {base!r} is a folder inside of one.",
            hint=f"Give the repository's own folder, and #{inside.rstrip('/')} after it.",
        )
    return _clone(str(local) if local else base, version, _temporary_folder(scratch, stack))


def _temporary_folder(scratch: Path | None, stack: contextlib.ExitStack) -> Path:
    folder = tempfile.mkdtemp(prefix="mlflow-remote-project-", dir=scratch)
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _local_path(base: str) -> Path | None:
    path = urllib.parse.unquote(urllib.parse.urlsplit(base).path) if base.startswith("file://") else base
    try:
        resolved = Path(path).resolve()
        return resolved if resolved.exists() else None
    except (OSError, ValueError):
        return None


def _unzip(base: str, local: Path | None, folder: Path) -> Path:
    archive = local or _download(base, folder / "project.zip")
    target, name = folder / "project", redact_url(base)
    try:
        with zipfile.ZipFile(archive) as zipped:
            size_bytes = sum(member.file_size for member in zipped.infolist())
            if size_bytes > MAX_ZIP_BYTES:
                raise ProjectError(f"Zip project {name!r} unpacks to {size_bytes} bytes, more than {MAX_ZIP_BYTES}.")
            for member in zipped.infolist():
                if not (target / member.filename).resolve().is_relative_to(target.resolve()):
                    raise ProjectError(f"Zip project {name!r} has a member outside its folder: {member.filename!r}.")
            zipped.extractall(target)
    except (zipfile.BadZipFile, OSError) as error:
        raise ProjectError(f"Zip project {name!r} cannot be unpacked.", words=str(error)) from error
    return target


def _download(url: str, target: Path) -> Path:
    import requests

    try:
        with requests.get(url, stream=True, timeout=(10, 60)) as response:
            response.raise_for_status()
            with target.open("wb") as out:
                shutil.copyfileobj(response.raw, out, 1 << 20)
    except (requests.RequestException, OSError) as error:
        raise ProjectError(f"Project {redact_url(url)!r} cannot be fetched.", words=redact_url(str(error))) from error
    return target


def _is_git_repository(path: Path) -> bool:
    return bool(_git_or_empty(path, "rev-parse", "--git-dir"))


def _clone(url: str, version: str | None, folder: Path) -> tuple[Path, bool]:
    """A shallow checkout of ``version`` (branch, tag or commit; default: the remote's HEAD) with its submodules."""
    if version is not None and version.startswith("-"):
        raise ProjectError(f"Version {version!r} is not a branch, tag or commit.")
    name = redact_url(url)
    target = folder / "project"
    target.mkdir()
    _git(target, name, "init", "--quiet")
    _git(target, name, "remote", "add", "--", "origin", url)
    _fetch_version(target, name, version)
    _git(target, name, "checkout", "--quiet", "--force", "FETCH_HEAD")
    _git(target, name, "submodule", "--quiet", "update", "--init", "--recursive")
    return target, version is not None and bool(_git_or_empty(target, "ls-remote", "origin", f"refs/heads/{version}"))


def _fetch_version(target: Path, name: str, version: str | None) -> None:
    """Leave the wanted commit in FETCH_HEAD: alone if the server can do that, else with all of the history."""
    try:
        _git(target, name, "fetch", "--quiet", "--depth", "1", "origin", version or "HEAD")
    except ProjectError:
        # Servers may refuse a bare commit hash, above all a short one, and plain web servers a shallow copy.
        _git(target, name, "fetch", "--quiet", "--tags", "origin", "HEAD", "+refs/heads/*:refs/remotes/origin/*")
        if version is not None:
            commit = _resolve(target, name, version)
            (target / ".git" / "FETCH_HEAD").write_text(f"{commit}\t\t\n")


def _resolve(target: Path, name: str, version: str) -> str:
    for candidate in (f"refs/remotes/origin/{version}", version):
        found = _git_or_empty(target, "rev-parse", "--verify", "--quiet", f"{candidate}^{{commit}}")
        if found:
            return found.decode().strip()
    raise ProjectError(f"Project {name!r} has no branch, tag or commit {version!r}.")


def _git(folder: Path, name: str, *arguments: str) -> bytes:
    """git's output; raises ProjectError in git's own words."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_REPOSITORY}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env={**environment, "GIT_TERMINAL_PROMPT": "0"},
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise ProjectError(f"Project {name!r} needs git, which is not on PATH.") from error
    except subprocess.TimeoutExpired as error:
        raise ProjectError(f"git {arguments[0]} of {name!r} took longer than {GIT_TIMEOUT_S} s.") from error
    if done.returncode != 0:
        words = redact_url(done.stderr.decode(errors="replace"))
        raise ProjectError(f"git {arguments[0]} of project {name!r} failed.", words=words)
    return done.stdout


def _git_or_empty(folder: Path, *arguments: str) -> bytes:
    try:
        return _git(folder, str(folder), *arguments)
    except ProjectError:
        return b""


def redact_url(text: str) -> str:
    """``text`` without the user and password of any URL in it."""
    words = []
    for word in text.split(" "):
        scheme, separator, rest = word.partition("://")
        host, slash, path = rest.partition("/")
        words.append(f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}" if separator else word)
    return " ".join(words)


def _load(
    uri: str, path: Path, version: str, entry_point: str, parameters: Mapping[str, Any], is_branch: bool
) -> Project:
    from mlflow.exceptions import MlflowException

    given = {str(key): str(value) for key, value in parameters.items()}
    _refuse_unfit(given)
    loaded = _mlproject(path)
    try:
        point = loaded.get_entry_point(entry_point)
        final, extra = point.compute_parameters(given, storage_dir=None)
    except MlflowException as error:
        raise ProjectError(f"Project {redact_url(uri)!r}: {error.message}") from error
    except Exception as error:  # whatever a hostile YAML makes MLflow's loader raise is the project's fault
        words = f"{type(error).__name__}: {error}"
        raise ProjectError(f"The MLproject file of {redact_url(uri)!r} cannot be read.", words=words) from error
    git = _git_state(path)
    env_type, env_config_path = _declared_environment(loaded)
    return Project(
        uri=uri,
        dir=path,
        name=loaded.name or path.name,
        version=version,
        entry_point=_entry_point(entry_point, point),
        parameters=given,
        logged_params={str(key): str(value) for key, value in {**final, **extra}.items()},
        env_type=env_type,
        env_config_path=env_config_path,
        docker_env=loaded.docker_env or None,
        source_name=_source_name(uri, path, git),
        git=git,
        is_branch=is_branch,
    )


def declared_environment(path: Path) -> tuple[str, Path | None]:
    """``conda``, ``python``, ``docker`` or empty, and the declared environment file of the project in ``path``."""
    return _declared_environment(_mlproject(path))


def _declared_environment(loaded: Any) -> tuple[str, Path | None]:
    kind = {"conda_env": "conda", "python_env": "python", "docker_env": "docker"}.get(loaded.env_type or "", "")
    return kind, Path(loaded.env_config_path) if loaded.env_config_path else None


def _mlproject(path: Path) -> Any:
    """MLflow's own reading of the MLproject file. Raises ProjectError."""
    from mlflow.exceptions import MlflowException
    from mlflow.projects.utils import load_project

    try:
        _refuse_huge_mlproject(path)
        return load_project(str(path))
    except MlflowException as error:
        raise ProjectError(f"Project {str(path)!r}: {error.message}") from error
    except ProjectError:
        raise
    except Exception as error:  # whatever a hostile YAML makes MLflow's loader raise is the project's fault
        words = f"{type(error).__name__}: {error}"
        raise ProjectError(f"The MLproject file of {str(path)!r} cannot be read.", words=words) from error


def _refuse_huge_mlproject(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name.lower() == "mlproject" and entry.stat().st_size > MAX_MLPROJECT_BYTES:
            raise ProjectError(f"{entry} is larger than {MAX_MLPROJECT_BYTES} bytes.")


def _refuse_unfit(parameters: Mapping[str, str]) -> None:
    for key, value in parameters.items():
        if any("\ud800" <= each <= "\udfff" for each in key + value):
            raise ProjectError(f"Parameter {key!r} is not UTF-8 text, which MLflow cannot store.")
        if "\0" in key or "\0" in value:
            raise ProjectError(f"Parameter {key!r} has a NUL byte, which no command line can carry.")


def _entry_point(name: str, point: Any) -> EntryPoint:
    if not isinstance(point.command, str):
        raise ProjectError(f"Entry point {name!r} has no command.")
    declared = tuple(
        Parameter(key, str(each.type), None if each.default is None else str(each.default))
        for key, each in point.parameters.items()
    )
    return EntryPoint(name, point.command, declared)


def _git_state(path: Path) -> GitState:
    if not _git_or_empty(path, "rev-parse", "--is-inside-work-tree"):
        return GitState()
    if not _git_or_empty(path, "ls-files", "--", "."):
        return GitState()  # inside somebody's checkout, but none of it is theirs: an ignored or untracked folder
    remotes = _git_or_empty(path, "remote").decode().split()
    url = _git_or_empty(path, "remote", "get-url", remotes[0]) if remotes else b""
    return GitState(
        commit=_git_or_empty(path, "rev-parse", "HEAD").decode().strip(),
        repo_url=redact_url(url.decode(errors="replace").strip()),
        root=_git_or_empty(path, "rev-parse", "--show-toplevel").decode(errors="surrogateescape").strip(),
    )


def uncommitted(found: Project, packed: Collection[str]) -> bytes:
    """The diff of the tracked files that differ from HEAD: of those that are ``packed``, and the names of deleted ones.

    What the ignore rules leave out is in no diff either.
    """
    if not found.git.commit:
        return b""
    changed = _git_or_empty(found.dir, "diff", "HEAD", "--name-only", "--relative", "--no-renames", "-z", "--", ".")
    names = [name for name in map(os.fsdecode, changed.split(b"\0")) if name]
    paths = [name for name in names if name in packed or not os.path.lexists(found.dir / name)]
    diff = b""
    for start in range(0, len(paths), _PATHS_PER_CALL):
        some = paths[start : start + _PATHS_PER_CALL]
        diff += _git_or_empty(found.dir, "--literal-pathspecs", *_DIFF, "--", *some)
        if len(diff) > MAX_DIFF_BYTES:
            return diff[:MAX_DIFF_BYTES] + b"\n[cut at 5 MiB]\n"
    return diff


def _source_name(uri: str, path: Path, git: GitState) -> str:
    """``mlflow.source.name`` as MLflow's local backend sets it: the URI; for a local folder in git file://ROOT#SUB."""
    if _local_path(_split_subdirectory(uri)[0]) is None:
        return redact_url(uri)
    if not git.root:
        return str(path)
    subfolder = os.path.relpath(path, os.path.realpath(git.root))
    return f"file://{git.root}" + ("" if subfolder == "." else f"#{subfolder}")
