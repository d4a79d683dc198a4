"""A lock becomes a prefix: verified, at its final path, once, whoever else tries at the same time.

    cache.hit? -> hold the builder's lease -> wipe what a dead builder left -> fetch and verify the archives
               -> py-rattler links conda's, uv installs pip's -> activation scripts -> the marker, last

The prefix is built where it stays, since its path is written into its files. A crash at any point leaves a folder
without a marker, which nobody takes for an environment and the next builder wipes. Used on a client machine and inside
a pod: of this package it needs nothing that conda-lock or MLflow bring, only py-rattler, uv, PyYAML, packaging and
requests.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import EnvironmentError_, JobError, RemoteError
from ..job import EnvironmentRef
from . import activation, cache, hints, lease, platforms, tool
from .progress import Progress, Report, silent

#: Seconds for linking the conda packages of one prefix.
LINK_TIMEOUT_S = 3600


def materialise(
    ref: EnvironmentRef,
    root: Path,
    report: Report = silent,
    *,
    python: Path | None = None,
    compile_bytecode: bool = False,
) -> Path:
    """The prefix of ``ref`` under ``root``, built if it is not there; blocks for milliseconds or minutes.

    ``python``: the interpreter for a venv instead of a searched one. ``compile_bytecode``: for a prefix that will be
    mounted read-only, where programs cannot do it themselves. Raises JobError (ENVIRONMENT); then nothing is left.
    """
    root = root.absolute()
    while True:
        found = cache.hit(root, ref.lock_key)
        if found:
            return found
        try:
            return _build_alone(ref, root, report, python, compile_bytecode)
        except lease.Lost:
            continue  # this machine slept through its lease; whoever took over builds the same
        except EnvironmentError_ as error:
            raise JobError(error.what, words=error.words, hint=error.hint, code="ENVIRONMENT") from error
        except OSError as error:
            raise _system_error(error, root) from error


def _system_error(error: OSError, root: Path) -> JobError:
    return JobError(
        f"The environment could not be built under {root}.",
        words=str(error),
        hint=hints.for_words(str(error), hints.CACHE),
        code="ENVIRONMENT",
    )


def _build_alone(ref: EnvironmentRef, root: Path, report: Report, python: Path | None, compile_bytecode: bool) -> Path:
    prefix = cache.prefix(root, ref.lock_key)
    _require_platform(ref)

    def waiting() -> None:
        report(Progress("waiting", detail="another process builds this environment"))

    with lease.hold(prefix, waiting=waiting) as held:
        found = cache.hit(root, ref.lock_key)
        if found:
            return found
        cache.discard(root, prefix)
        if os.path.lexists(prefix):
            raise OSError(errno.EEXIST, "What an earlier build has left cannot be removed", str(prefix))
        started_s = time.monotonic()
        try:
            with lease.sharing(root / cache.BUILDS), tool.holding(*held.descriptors):
                marker = _build(ref, prefix, root, report, python, compile_bytecode)
            held.check()
        except Exception:
            held.check()  # what lies there may be somebody else's by now
            cache.discard(root, prefix)
            raise
        except BaseException:
            with contextlib.suppress(lease.Lost):
                held.check()
                cache.discard(root, prefix)
            raise
        _write_marker(prefix, {**marker, "seconds": round(time.monotonic() - started_s, 3)})
    report(Progress("ready", detail=str(prefix)))
    return prefix


def _require_platform(ref: EnvironmentRef) -> None:
    here = platforms.host_platform()
    if ref.platform and ref.platform != here:
        raise JobError(
            f"The environment is locked for {ref.platform}, and this is {here}.",
            hint="Lock it for the platform where the job runs.",
            code="ENVIRONMENT",
        )


def _build(
    ref: EnvironmentRef, prefix: Path, root: Path, report: Report, python: Path | None, compile_bytecode: bool
) -> dict[str, Any]:
    """Fills the prefix. Returns what its marker says."""
    from . import lockfile, requirements, uv

    if ref.kind == "conda-lock":
        rows = lockfile.conda_lock_rows(lockfile.load_conda_lock(ref.lock), ref.platform)
        _link_conda([row for row in rows if row.manager == "conda"], ref, prefix, root, report)
    elif ref.kind == "requirements":
        listed = requirements.expand_text(ref.lock, folder=root, where="the environment's lock")
        rows = lockfile.for_platform(lockfile.requirements_rows(listed, "The environment's lock"), ref)
        report(Progress("creating", detail=f"a virtual environment with Python {ref.python}"))
        uv.create_venv(prefix, python or uv.find_python(ref.python, root), root)
    else:
        raise JobError(f"This runner knows no lock of kind {ref.kind!r}.", code="ENVIRONMENT")
    pip = [lockfile.located(row, ref.files) for row in rows if row.manager == "pip"]
    if pip:
        report(Progress("installing", 0, len(pip), "packages", "from the package index"))
        interpreter = prefix / "bin" / "python"
        uv.install(interpreter, pip, index_lines=ref.indexes, root=root, compile_bytecode=compile_bytecode)
    elif compile_bytecode:
        _compile(prefix, root)
    return {
        "schema": lockfile.SCHEMA,
        "lock_key": ref.lock_key,
        "prefix": str(prefix),
        "python": "bin/python" if (prefix / "bin/python").exists() else "",
        "kind": ref.kind,
        "platform": ref.platform,
        "packages": len(rows),
        "activation": _activation(prefix) if ref.kind == "conda-lock" else {},
    }


def _compile(prefix: Path, root: Path) -> None:
    """Bytecode for a prefix without a pip part, whose packages uv would else compile along."""
    folders = [str(path) for path in prefix.glob("lib/python3*/site-packages")]
    with tool.private_folder(root) as folder:
        # workers talk by a socket in TMPDIR, whose path may be too long for one
        environ = {**tool.environment(folder), "TMPDIR": tempfile.gettempdir()}
        for workers in ("0", "1"):
            argv = [str(prefix / "bin" / "python"), "-m", "compileall", "-q", "-j", workers, *folders]
            if tool.run(argv, cwd=folder, environ=environ, timeout_s=LINK_TIMEOUT_S).code == 0:
                return


def _link_conda(rows: Sequence[Any], ref: EnvironmentRef, prefix: Path, root: Path, report: Report) -> None:
    from .fetch import fetch

    archives = fetch(rows, channels=ref.channels, root=root, report=report)
    report(Progress("installing", 0, len(rows), "packages", "from conda channels"))
    request = {
        "do": "install",
        "prefix": str(prefix),
        "cache": str(root / "pkgs"),
        "platform": ref.platform,
        "archives": [[str(path), row.hashes[0]] for path, row in zip(archives, rows, strict=True)],
    }
    prefix.mkdir(parents=True, exist_ok=True)
    ask_rattler(request, root, LINK_TIMEOUT_S)


def ask_rattler(request: dict[str, Any], root: Path, timeout_s: float) -> Any:
    """The answer of ``conda_helper`` to one request. Raises JobError (ENVIRONMENT) in py-rattler's words."""
    with tool.private_folder(root) as folder:
        environ = {**tool.environment(folder), "PYTHONPATH": tool.module_path()}
        command = tool.own_module("conda_helper")
        try:
            result = tool.run(command, cwd=folder, environ=environ, timeout_s=timeout_s, stdin=json.dumps(request))
        except tool.TimedOut as error:
            raise JobError(f"Linking the conda packages {error}.", words=error.stderr, code="ENVIRONMENT") from error
    try:
        answer = json.loads(result.stdout)
    except ValueError:
        words = f"exit code {result.code}\n{result.stderr[-2000:]}"
        raise JobError("The conda packages could not be handled.", words=words, code="ENVIRONMENT") from None
    if "error" in answer:
        raise JobError(
            "The conda packages could not be installed.",
            words=answer["error"],
            hint=hints.for_words(answer["error"], ""),
            code="ENVIRONMENT",
        )
    return answer["ok"]


def _activation(prefix: Path) -> dict[str, str]:
    try:
        return activation.record(prefix)
    except activation.ScriptFailed as error:
        package = activation.owner(prefix, error.script) or "A package"
        raise JobError(
            f"{package} has an activation script that cannot be run without a shell session: {error.script}",
            words=error.words,
            hint="Choose another build of that package, or leave it out and set its variables with env_vars.",
            code="ENVIRONMENT",
        ) from error


def _write_marker(prefix: Path, marker: dict[str, Any]) -> None:
    """The last step, atomic: from here on the prefix counts as complete."""
    draft = prefix / f"{cache.MARKER}.draft"
    with draft.open("w") as stream:
        json.dump(marker, stream, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, prefix / cache.MARKER)


def main() -> int:
    """``python -m mlflow_remote_backend.environment.materialise ROOT``: an EnvironmentRef as JSON in, the prefix out.

    For image builds, so that a baked environment is the one that a job would have made at the same path.
    """
    ref = EnvironmentRef(**json.load(sys.stdin))
    try:
        print(materialise(ref, Path(sys.argv[1]), lambda progress: print(progress, file=sys.stderr)))
    except RemoteError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
