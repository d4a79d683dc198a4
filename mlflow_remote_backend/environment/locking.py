"""What is declared becomes a lock, at most once: a committed lock, else the cached one, else the solvers.

    EnvSpec -> spec key -> locks/<spec key>/ref.json?     nothing is solved, a few milliseconds
                        -> a committed lock that fits     verified against what is declared
                        -> conda-lock and uv              and kept under the spec key

``frozen`` stops before the last step. Nothing outside the cache is created, and nothing in it when locking fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import EnvironmentError_
from ..job import EnvironmentRef
from . import cache, hints, indexes, lease, lockfile, platforms, requirements
from .lockfile import Row
from .progress import Progress, Report, silent
from .spec import EnvSpec, digest, requirement_name

#: Part of every spec key: a change in how locks are made makes new ones.
SCHEMA = 2

#: Where a project may keep its lock, beside its declaration; the first that exists counts.
CONDA_LOCKS = ("conda-lock.yml", "conda-lock.yaml")
PYTHON_LOCKS = ("requirements.lock", "pylock.toml", "uv.lock")

_REF = "ref.json"

_INCLUDES = re.compile(r"^\s*(-r|-c|--requirement|--constraint)", re.MULTILINE)


def lock(
    spec: EnvSpec, platform: str, root: Path, report: Report = silent, *, elsewhere: bool = False
) -> EnvironmentRef:
    """The environment of ``spec`` for a conda platform (``linux-64``), with the lock in it.

    ``root``: the cache (:func:`cache.default_root`). ``elsewhere``: the job runs on another machine, so indexes in
    folders of this one are left out. Blocks for milliseconds, or minutes when it must solve. Raises EnvironmentError_.
    """
    if not spec.kind:
        return EnvironmentRef(manager=spec.manager)
    platforms.require_known(platform)
    committed = _committed(spec)
    declared = (*(committed.index_options if committed else ()), *spec.packages.index_options)
    lines = indexes.choose(spec.options.index_url, tuple(dict.fromkeys(declared)))
    if elsewhere:
        lines = indexes.without_local(lines)
    root = root.absolute()
    folder = root / "locks" / spec_key(spec, platform, lines, committed)
    ref = _read(folder)
    if ref is None:
        try:
            ref = _lock_once(_Request(spec, platform, lines, committed, root, report), folder)
        except OSError as error:
            raise EnvironmentError_(
                f"{spec.shown} could not be locked; the cache is {root}.",
                words=str(error),
                hint=hints.for_words(str(error), hints.CACHE),
            ) from error
    return replace(ref, notices=(*spec.warnings, *ref.notices))


def spec_key(spec: EnvSpec, platform: str, index_lines: Sequence[str], committed: Committed | None) -> str:
    """The identity of a lock's inputs: what is declared, for which platform, from where, solved by what."""
    options = spec.options
    return digest(
        {
            "schema": SCHEMA,
            "manager": spec.manager,
            "declaration": spec.declaration(),
            "env_vars": dict(spec.env_vars),
            "seeds": list(spec.seeds),
            "platform": platform,
            "channels": list(spec.channel_urls()),
            "indexes": list(index_lines),
            "solver": options.solver,
            "cuda": options.cuda,
            "frozen": options.frozen,
            "committed": [committed.file.name, committed.digest] if committed else [],
            "tools": {name: _version(name) for name in ("conda-lock", "py-rattler", "uv")},
        }
    )


@functools.cache
def _version(distribution: str) -> str:
    """A tool's version; milliseconds to read, and the same for as long as this process lives."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _lock_once(request: _Request, folder: Path) -> EnvironmentRef:
    def waiting() -> None:
        request.report(Progress("waiting", detail="another process locks the same"))

    with lease.hold(folder, waiting=waiting), lease.sharing(request.root / cache.BUILDS):
        ref = _read(folder) or _lock(request)
        _write(folder, ref)
    return ref


def _read(folder: Path) -> EnvironmentRef | None:
    """The cached reference; None for none, or one that cannot be read."""
    try:
        document = json.loads((folder / _REF).read_bytes())
        lists = {name: tuple(value) for name, value in document.items() if isinstance(value, list)}
        ref = EnvironmentRef(**{**document, **lists})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    with contextlib.suppress(OSError):  # a read-only volume
        os.utime(folder / _REF)  # its last use, for cache.prune
    return ref


def _write(folder: Path, ref: EnvironmentRef) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / _REF, json.dumps(dataclasses.asdict(ref), sort_keys=True))


def _replace(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Request:
    """All that one solving needs."""

    spec: EnvSpec
    platform: str
    index_lines: tuple[str, ...]
    committed: Committed | None
    root: Path
    report: Report

    def solving(self, what: str) -> None:
        self.report(Progress("solving", detail=f"{self.spec.shown} for {what}"))


@dataclass(frozen=True)
class _Lock:
    """A lock's text and its rows for the platform."""

    text: str
    rows: tuple[Row, ...]
    notices: tuple[str, ...] = ()


def _lock(request: _Request) -> EnvironmentRef:
    found = _from_hashed_requirements(request) or _from_committed(request)
    if isinstance(found, str) or found is None:
        if request.spec.options.frozen:
            raise _frozen(request.spec, found)
        notice = () if found is None else (f"{found} It was locked anew; mlflow-remote lock writes the file.",)
        found = _solve(request)
        found = replace(found, notices=notice + found.notices)
    return _ref(request, found)


def _frozen(spec: EnvSpec, reason: str | None) -> EnvironmentError_:
    names = " or ".join(CONDA_LOCKS[:1] if spec.kind == "conda-lock" else PYTHON_LOCKS)
    return EnvironmentError_(
        reason or f"There is no {names} beside {spec.shown}, and environment.frozen forbids to solve.",
        hint="Write it with mlflow-remote lock and commit it, or leave environment.frozen out.",
    )


def _ref(request: _Request, found: _Lock) -> EnvironmentRef:
    spec = request.spec
    urls = zip(spec.channels, spec.channel_urls(), strict=True)
    notices = found.notices
    if not lockfile.names_mlflow(found.rows):
        notices += (
            f"The environment of {spec.shown} has no mlflow: a program that says 'import mlflow' will fail. "
            "The run still has its log, outputs and status.",
        )
    return EnvironmentRef(
        manager=spec.manager,
        kind=spec.kind,
        lock_key=lockfile.lock_key(found.rows, request.platform, spec.python),
        lock=found.text,
        platform=request.platform,
        python=spec.python,
        indexes=request.index_lines,
        channels=tuple(f"{name} {url}" for name, url in urls if "://" in url),
        files=_files(found.rows) if spec.kind == "requirements" else {},
        env_vars=dict(spec.env_vars),
        notices=notices,
    )


def _files(rows: Sequence[Row]) -> dict[str, str]:
    return {row.hashes[0]: row.url for row in rows if row.url and not row.direct and len(row.hashes) == 1}


# ---------------------------------------------------------------------------------------------- solving


def _solve(request: _Request) -> _Lock:
    spec = request.spec
    if spec.kind == "conda-lock":
        from . import conda

        notices: list[str] = []
        text = conda.lock(
            spec,
            [request.platform],
            index_lines=request.index_lines,
            root=request.root,
            solving=request.solving,
            warn=notices.append,
        )
        rows = lockfile.conda_lock_rows(lockfile.load_conda_lock(text), request.platform)
        return _Lock(text, rows, tuple(notices))
    from . import uv

    request.solving(f"{request.platform}, Python {spec.python}")
    rows = uv.compile_rows(
        _seeded(spec),
        platform=request.platform,
        python=spec.python,
        index_lines=request.index_lines,
        root=request.root,
        provided={},
        shown=spec.shown,
    )
    return _Lock(_rendered(spec, rows), rows)


def _seeded(spec: EnvSpec) -> requirements.RequirementList:
    return spec.packages + requirements.RequirementList(spec.seeds)


def _rendered(spec: EnvSpec, rows: Sequence[Row]) -> str:
    return lockfile.render_requirements(
        rows, declaration=spec.declaration_key(), python=spec.python, index_options=spec.packages.index_options
    )


def write_lock(
    spec: EnvSpec,
    root: Path,
    report: Report = silent,
    *,
    lock_for: Sequence[str] = ("linux-64",),
    warn: Callable[[str], object] = lambda notice: None,
) -> Path:
    """Solves anew and writes the project's lock beside its declaration: ``conda-lock.yml`` for the platforms
    ``lock_for``, or ``requirements.lock`` for all of them. Returns its path; ``warn`` is told what the user should
    know of it. Raises EnvironmentError_.
    """
    if not spec.kind:
        raise EnvironmentError_(
            "The project declares no environment that could be locked.",
            hint="Add a conda.yaml or a python_env.yaml and name it in the MLproject file.",
        )
    for platform in lock_for:
        platforms.require_known(platform)
    for each in spec.warnings:
        warn(each)
    root = root.absolute()
    lines = indexes.without_local(indexes.choose(spec.options.index_url, spec.packages.index_options))
    if spec.kind == "conda-lock":
        from . import conda

        def solving(what: str) -> None:
            report(Progress("solving", detail=f"{spec.shown} for {what}"))

        target = spec.folder / CONDA_LOCKS[0]
        text = conda.lock(spec, list(lock_for), index_lines=lines, root=root, solving=solving, warn=warn)
    else:
        from . import uv

        report(Progress("solving", detail=f"{spec.shown} for all platforms, Python {spec.python}"))
        target = spec.folder / PYTHON_LOCKS[0]
        rows = uv.compile_universal(_seeded(spec), python=spec.python, index_lines=lines, root=root, shown=spec.shown)
        text = _rendered(spec, rows)
    _replace(target, text)
    return target


# ---------------------------------------------------------------------------------------------- committed locks


@dataclass(frozen=True)
class Committed:
    """A lock that the project brings. ``digest``: sha256 of its bytes, and of what it includes."""

    file: Path
    data: bytes
    digest: str

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", errors="replace")

    @property
    def includes(self) -> bool:
        """Whether it names further files, which are not where the job runs."""
        return self.file.name == "requirements.lock" and _INCLUDES.search(self.text) is not None

    @property
    def index_options(self) -> tuple[str, ...]:
        """Where its packages are, as pip-compile writes it."""
        return self.listed.index_options if self.file.name == "requirements.lock" else ()

    @property
    def listed(self) -> requirements.RequirementList:
        return requirements.expand_text(self.text, folder=self.file.parent, where=self.file.name)


def _committed(spec: EnvSpec) -> Committed | None:
    import hashlib

    for name in CONDA_LOCKS if spec.kind == "conda-lock" else PYTHON_LOCKS:
        file = spec.folder / name
        if file.is_file():
            data = file.read_bytes()
            found = Committed(file, data, hashlib.sha256(data).hexdigest())
            if found.includes:
                return replace(found, digest=digest([found.digest, dataclasses.asdict(found.listed)]))
            return found
    return None


def _from_committed(request: _Request) -> _Lock | str | None:
    """The project's own lock; a sentence why it does not fit; None if there is none."""
    committed, spec = request.committed, request.spec
    if committed is None:
        return None
    if spec.kind == "conda-lock":
        return _from_conda_lock(request, committed)
    if committed.file.name == "requirements.lock":
        return _from_requirements_lock(request, committed)
    return _from_pylock(request, committed)


def _from_conda_lock(request: _Request, committed: Committed) -> _Lock | str:
    spec, name = request.spec, committed.file.name
    document = lockfile.load_conda_lock(committed.text, name)
    covered = lockfile.conda_lock_platforms(document)
    if request.platform not in covered:
        return f"{name} does not cover {request.platform}, only {', '.join(covered)}."
    rows = lockfile.conda_lock_rows(document, request.platform, name)
    written = (document.get("metadata", {}).get("custom_metadata") or {}).get(lockfile.DECLARATION, "")
    missing = [] if written else _conda_unsatisfied(spec, rows, request.root) + _unsatisfied(request, rows)
    return _fitting(_Lock(committed.text, rows), name, spec, written, missing)


def _from_requirements_lock(request: _Request, committed: Committed) -> _Lock | str:
    spec, name = request.spec, committed.file.name
    rows = lockfile.requirements_rows(committed.listed, name)
    written = lockfile.written_declaration(committed.text)
    missing = [] if written else _unsatisfied(request, rows)
    text = committed.text
    if committed.includes:
        text = "".join(f"{lockfile.requirement_text(row)}\n" for row in rows)
    return _fitting(_Lock(text, rows), name, spec, written, missing)


def _from_pylock(request: _Request, committed: Committed) -> _Lock | str:
    from . import uv

    spec, name = request.spec, committed.file.name
    text = uv.export(committed.file.parent, request.root) if name == "uv.lock" else committed.text
    rows = lockfile.pylock_rows(text, request.platform, spec.python, shown=name)
    return _fitting(_Lock(_rendered(spec, rows), rows), name, spec, "", _unsatisfied(request, rows))


def _fitting(found: _Lock, name: str, spec: EnvSpec, written: str, missing: Sequence[str]) -> _Lock | str:
    """``written``: the declaration that the lock says it was made from; ``missing``: what it lacks if it says none."""
    if written and written != spec.declaration_key():
        return f"{name} was made from another {spec.shown}."
    if missing:
        return f"{name} does not satisfy {spec.shown}: {', '.join(missing)}."
    return found


def _from_hashed_requirements(request: _Request) -> _Lock | None:
    """Requirements that are all pinned with digests are a lock already."""
    spec = request.spec
    if not spec.hashed:
        return None
    rows = lockfile.requirements_rows(spec.packages, spec.shown)
    return _Lock(_rendered(spec, rows), rows)


def _conda_unsatisfied(spec: EnvSpec, rows: Sequence[Row], root: Path) -> list[str]:
    """Declared conda specs that no row satisfies, asked of py-rattler; pip itself, which others leave out, aside."""
    from .materialise import ask_rattler

    packages = [[row.name, row.version, _build(row)] for row in rows if row.manager == "conda"]
    wanted = [each for each in spec.conda if each != "pip"]
    failed: list[str] = ask_rattler({"do": "match", "packages": packages, "specs": wanted}, root, 60)
    return failed


def _build(row: Row) -> str:
    """The build string, which stands in the file's name: ``numpy-2.1.0-py311_0.conda``."""
    stem = row.filename.removesuffix(".conda").removesuffix(".tar.bz2")
    return stem.rsplit("-", 1)[-1]


def _unsatisfied(request: _Request, rows: Sequence[Row]) -> list[str]:
    """Declared requirements that no row satisfies. Build tools, which other lockers leave out, are not asked for."""
    from packaging.markers import Marker
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    python = request.spec.python or next((row.version for row in rows if row.name == "python"), "3")
    environment: dict[str, Any] = platforms.marker_environment(request.platform, python)
    locked = {row.name: row for row in rows if not row.marker or Marker(row.marker).evaluate(environment)}
    failed = []
    for line in request.spec.packages.requirements:
        if not requirement_name(line):  # a bare URL
            failed += [] if any(row.direct and line.startswith(row.url) for row in rows) else [line]
            continue
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        if name in ("pip", "setuptools", "wheel") or (wanted.marker and not wanted.marker.evaluate(environment)):
            continue
        row = locked.get(name)
        if row is None or not _satisfies(row, wanted.url, wanted.specifier):
            failed.append(line if row is None else f"{line} (locked: {row.version or row.url})")
    return failed


def _satisfies(row: Row, url: str | None, specifier: Any) -> bool:
    if url:
        return row.direct and url.startswith(row.url)
    return bool(not row.version or specifier.contains(row.version, prereleases=True))
