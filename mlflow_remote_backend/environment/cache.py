"""The environments on this machine: found, listed and pruned. Standard library only; :func:`hit` is the warm path.

<root>/envs/<lock key>/     a prefix at its final path; whole if it holds ``.complete``, the marker written last
<root>/envs/<lock key>.users/   one file for each process that uses the prefix
<root>/locks/<spec key>/    a lock and the EnvironmentRef made of it
<root>/archives, pkgs, uv, python, repodata     what prefixes are made of; on one file system, for hard links
<root>/tmp                  private folders of running tools, and what is about to be deleted
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import removal
from . import lease

MARKER = ".complete"

#: Shared by every build, so that nobody prunes the packages beneath it; its time is that of the last build.
BUILDS = "builds.lock"

#: Seconds between the signs of life of a user of a prefix, and without one until it counts as gone.
USER_BEAT_S = 60.0
USER_STALE_S = 600.0

#: Leftovers of killed tools are taken once they are this old.
LEFTOVER_S = 24 * 3600.0


@dataclass(frozen=True)
class Entry:
    """One environment. ``last_used``: seconds since the epoch; ``complete``: false where a build goes on or broke."""

    lock_key: str
    path: Path
    size_bytes: int
    last_used: float
    complete: bool
    in_use: bool
    kind: str = ""
    platform: str = ""
    packages: int = 0


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` removed: environments by lock key, the number of other files, and the bytes set free."""

    environments: tuple[str, ...] = ()
    kept_in_use: tuple[str, ...] = ()
    files: int = 0
    bytes: int = 0


def default_root() -> Path:
    """``$MLFLOW_REMOTE_CACHE``, else ``$XDG_CACHE_HOME/mlflow-remote``, else ``~/.cache/mlflow-remote``."""
    own = os.environ.get("MLFLOW_REMOTE_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "mlflow-remote"


def prefix(root: Path, lock_key: str) -> Path:
    """Where the environment of a lock key belongs, built or not."""
    if not lock_key.isalnum():
        raise ValueError(f"{lock_key!r} is no lock key")
    return root.absolute() / "envs" / lock_key


def hit(root: Path, lock_key: str) -> Path | None:
    """The finished environment, or None. Notes that it was used now. Well under a millisecond."""
    path = prefix(root, lock_key)
    marker = read_marker(path)
    if marker is None or marker.get("prefix") != str(path):  # a prefix that was moved names files that are not there
        return None
    python = marker.get("python")
    if python and not os.path.exists(path / python):  # a venv whose interpreter was uninstalled
        return None
    with contextlib.suppress(OSError):  # a read-only volume
        os.utime(path / MARKER)
    return path


def read_marker(path: Path) -> dict[str, Any] | None:
    """What the marker of a finished prefix says; None if there is none."""
    try:
        marker = json.loads((path / MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


# ---------------------------------------------------------------------------------------------- in use


@contextlib.contextmanager
def using(root: Path, lock_key: str) -> Iterator[None]:
    """Says for the duration of the block that a process works in the environment, so that nobody prunes it.

    A read-only cache is left alone: nobody prunes that either.
    """
    folder = _users(root, lock_key)
    file = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    stop = threading.Event()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(str(os.getpid()))
    except OSError:
        yield
        return
    thread = threading.Thread(target=_beat, args=(file, stop), name="using", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=1)
        file.unlink(missing_ok=True)


def _beat(file: Path, stop: threading.Event) -> None:
    while not stop.wait(USER_BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(file)


def _users(root: Path, lock_key: str) -> Path:
    return prefix(root, lock_key).with_name(f"{lock_key}.users")


def in_use(root: Path, lock_key: str) -> bool:
    """Whether a process says so (:func:`using`), or one on this machine was started in the environment."""
    folder = _users(root, lock_key)
    if any(_alive(file) for file in _children(folder)):
        return True
    return _started_here(prefix(root, lock_key))


def _alive(file: Path) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - file.stat().st_mtime < USER_STALE_S
    return False


def _started_here(path: Path) -> bool:
    """Whether a process of this user on this machine has the prefix as its activated environment (Linux only)."""
    wanted = {f"{name}={path}".encode() for name in ("CONDA_PREFIX", "VIRTUAL_ENV")}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted & set(environ.read_bytes().split(b"\0")):
                return True
        except OSError:
            continue  # somebody else's process, or one that has just ended
    return False


# ---------------------------------------------------------------------------------------------- listing and pruning


def entries(root: Path) -> tuple[Entry, ...]:
    """All environments, the last used first. Walks the folders for their sizes; a file counts in each that links it."""
    folders = [path for path in (root / "envs").glob("*") if path.is_dir() and path.suffix != ".users"]
    return tuple(sorted((_entry(root, path) for path in folders), key=lambda entry: -entry.last_used))


def _entry(root: Path, path: Path) -> Entry:
    marker = read_marker(path)
    return Entry(
        lock_key=path.name,
        path=path,
        size_bytes=_size(path),
        last_used=_last_used(path),
        complete=marker is not None,
        in_use=in_use(root, path.name),
        kind=str((marker or {}).get("kind", "")),
        platform=str((marker or {}).get("platform", "")),
        packages=int((marker or {}).get("packages", 0)),
    )


def _last_used(path: Path) -> float:
    for file in (path / MARKER, path):
        with contextlib.suppress(OSError):
            return file.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def prune(root: Path, older_than_s: float = 30 * 86400.0, *, dry_run: bool = False) -> Pruned:
    """Removes what was not used for ``older_than_s`` seconds: environments, and archives and locks as well.

    Never removes an environment that is in use or being built. Each is renamed away first, so nobody sees half of one.
    """
    environments, kept, freed = [], [], 0
    for entry in entries(root):
        if time.time() - entry.last_used < older_than_s:
            continue
        if entry.in_use or not (dry_run or _remove_environment(root, entry, older_than_s)):
            kept.append(entry.lock_key)
            continue
        environments.append(entry.lock_key)
        freed += entry.size_bytes
    files, bytes_ = _prune_files(root, older_than_s, dry_run=dry_run)
    return Pruned(tuple(environments), tuple(kept), files, freed + bytes_)


def _remove_environment(root: Path, entry: Entry, older_than_s: float) -> bool:
    """False if it is being built, or was used since it was listed."""
    try:
        with lease.hold(entry.path, wait=False):
            if time.time() - _last_used(entry.path) < older_than_s or in_use(root, entry.lock_key):
                return False
            discard(root, entry.path)
            shutil.rmtree(_users(root, entry.lock_key), ignore_errors=True)
    except lease.Busy:
        return False
    return True


def discard(root: Path, path: Path) -> None:
    """Removes a folder: away from its name at once, from the disk then. Returns if there is none."""
    removal.remove(path, root / "tmp")


def _prune_files(root: Path, older_than_s: float, *, dry_run: bool) -> tuple[int, int]:
    """Archives and locks by their last use, what killed tools left, and packages that no build has used for long."""
    files = freed = 0
    idle = time.time() - _modified(root / BUILDS) >= older_than_s
    with lease.sharing(root / BUILDS, alone=True) as alone:
        for path in _doomed(root, older_than_s, alone=alone, idle=idle):
            with contextlib.suppress(FileNotFoundError):  # somebody else was faster
                freed += _size(path) if path.is_dir() else path.lstat().st_size
                files += 1
            if not dry_run:
                discard(root, path)
    return files, freed


def _doomed(root: Path, older_than_s: float, *, alone: bool, idle: bool) -> Iterator[Path]:
    """Each is judged when it is asked for, so that what is used while others are removed stays."""
    archives = (("archives/*", older_than_s),) if alone else ()
    for pattern, age_s in (*archives, ("locks/*", older_than_s), ("tmp/*", LEFTOVER_S)):
        for path in list(root.glob(pattern)):
            if path.suffix not in (".lock", ".lease") and time.time() - _newest(path) >= age_s:
                yield path
    if alone and idle:
        yield from [path for name in ("pkgs", "uv", "repodata") if (path := root / name).is_dir()]
        yield from _unused_pythons(root)


def _newest(path: Path) -> float:
    """The last change of a file, or of a folder and what stands in it."""
    return max([_modified(path), *(_modified(child) for child in _children(path))])


def _children(folder: Path) -> list[Path]:
    """What stands in a folder; nothing if it is none, or vanishes just now."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return list(folder.iterdir())
    return []


def _unused_pythons(root: Path) -> list[Path]:
    """Interpreters that uv downloaded and no environment is built on."""
    used = {os.path.realpath(path / "bin" / "python") for path in (root / "envs").glob("*")}
    pythons = [path for path in (root / "python").glob("*") if path.is_dir() and not path.is_symlink()]
    return [path for path in pythons if not any(name.startswith(f"{os.path.realpath(path)}/") for name in used)]


def _modified(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.lstat().st_mtime
    return 0.0
