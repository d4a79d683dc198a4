"""The first step where the job runs: fetch and verify the snapshot, make the environment, resolve the command.

Leaves in the spool ``command.json``, which ``execute`` reads, and ``prepare.json``, from which ``observe`` learns how
long it took or why it failed. The warm path (environment cached, artifact store proxied) imports the standard library
and this package only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import removal
from ..errors import JobError, ProjectError, RemoteError
from ..job import JobSpec, Parameter
from ..version import __version__
from . import command, envelope
from .fetch import fetch
from .spool import Command, Prepared, Spool

OUTPUT_FOLDER = "outputs"
LOOK_S = 0.5  # how late a cancel stops a pod's preparation


@dataclass(frozen=True)
class Place:
    """Where a job's parts lie, as ``prepare`` sees them. ``environ``: what the program starts from.

    ``archive``: the snapshot on this file system, where it need not be fetched. ``work_seen_as``: the project folder's
    path in the program's own container, where that differs. ``make_environment``: makes the locked environment where
    the program will find it, if that is not on this file system, and returns the variables that activate it.
    """

    spool: Path
    work: Path
    cache: Path
    environ: Mapping[str, str] = field(repr=False)
    archive: Path | None = None
    work_seen_as: str = ""
    tee: bool = False
    caller_dir: str = ""  # where the submitter stood, for path parameters relative to it
    on_phase: Callable[[str], None] = lambda detail: None
    make_environment: Callable[[], Mapping[str, str]] | None = None


def prepare(spec: JobSpec, place: Place) -> None:
    """Make everything ready for ``execute``. Raises nothing but KeyboardInterrupt: a failure is in ``prepare.json``."""
    seconds: dict[str, float] = {}
    failed: dict[str, str] | None = None
    try:
        _prepare(spec, place, seconds)
    except RemoteError as error:
        failed = {"reason": _reason(error), "message": error.what, "words": error.words, "hint": error.hint}
    except OSError as error:
        failed = {"reason": "BOOTSTRAP", "message": "The job could not be prepared.", "words": str(error), "hint": ""}
    if place.spool.parent.is_dir():  # else the job was cancelled, and has ended without us
        _spool(place).write_prepared(Prepared(failed, seconds))


def _spool(place: Place) -> Spool:
    """The spool as whoever made it wants it shared; else a private one. Makes no job's folder anew that is gone."""
    if place.spool.is_dir():
        return Spool(place.spool)
    os.stat(place.spool.parent)
    return Spool.create(place.spool)


def _reason(error: RemoteError) -> str:
    return error.code if isinstance(error, JobError) else "BOOTSTRAP"


def _prepare(spec: JobSpec, place: Place, seconds: dict[str, float]) -> None:
    with _timed(seconds, "snapshot"):
        folder = _project_folder(spec, place)
    with _timed(seconds, "environment"):
        variables = _environment(spec, place)
    (folder / OUTPUT_FOLDER).mkdir(exist_ok=True)
    line = _command_line(spec, place, folder)
    _spool(place).write_command(_command(spec, place, folder, line, variables))


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = time.monotonic() - start


def _project_folder(spec: JobSpec, place: Place) -> Path:
    if spec.in_place:
        return Path(spec.in_place)
    _empty(place.work)
    if place.archive is not None:
        return _unpack(spec, place, place.archive)
    place.on_phase("fetching the project")
    with tempfile.TemporaryDirectory(dir=place.work.parent) as folder:
        archive = Path(folder) / "snapshot"
        fetch(spec.snapshot.uri, archive, spec.run.tracking_uri, place.environ)
        return _unpack(spec, place, archive)


def _unpack(spec: JobSpec, place: Place, archive: Path) -> Path:
    from .unpack import UnpackLimits, unpack

    place.on_phase("unpacking the project")
    with archive.open("rb") as stream:
        unpack(stream, place.work, spec.snapshot.digest, UnpackLimits.of(spec.snapshot))
    return place.work


def _empty(folder: Path) -> None:
    """Remove what an earlier attempt, or an earlier start of this step, left in the project's folder."""
    if folder.is_dir():
        for each in folder.iterdir():
            removal.delete(each)


def _environment(spec: JobSpec, place: Place) -> dict[str, str]:
    """The variables that make the locked environment the program's: none where it uses what is there."""
    if not spec.environment.lock_key:
        return {}
    if place.make_environment is not None:
        return dict(place.make_environment())
    from ..environment import activation, cache

    prefix = cache.hit(place.cache, spec.environment.lock_key)
    if prefix is None:
        from ..environment import materialise

        prefix = materialise.materialise(spec.environment, place.cache, lambda step: place.on_phase(str(step)))
    return activation.activation(prefix, place.environ, spec.environment.env_vars)


def _command_line(spec: JobSpec, place: Place, folder: Path) -> str:
    try:
        declared, extra = command.values_of(spec.entry_point, spec.parameters)
        for each in spec.entry_point.parameters:
            if each.type == "path":
                declared[each.name] = _path_value(spec, place, folder, each, declared[each.name])
            elif each.type == "uri" and not urllib.parse.urlsplit(declared[each.name]).scheme:
                raise ProjectError(f"Expected URI for parameter {each.name} but got {declared[each.name]}")
        return command.render(spec.entry_point, declared, extra)
    except ProjectError as error:
        raise JobError(error.what, words=error.words, hint=error.hint) from error


def _path_value(spec: JobSpec, place: Place, folder: Path, parameter: Parameter, value: str) -> str:
    """A file the program can open: a remote URI is fetched; a relative path is the project's, else the caller's."""
    scheme = urllib.parse.urlsplit(value).scheme
    if len(scheme) > 1 and scheme != "file":
        return _download(spec, place, parameter, value)
    path = urllib.parse.unquote(urllib.parse.urlsplit(value).path) if scheme == "file" else value
    bases = [str(folder)] if place.work_seen_as else [str(folder), place.caller_dir or str(folder)]
    for base in bases:
        candidate = os.path.join(base, path)
        if os.path.exists(candidate):
            inside = os.path.abspath(candidate)
            return _as_seen(place, folder, inside)
    if os.path.isabs(path) and place.work_seen_as:
        return path  # a volume of the program's own container, which is not mounted here
    raise JobError(
        f"Got value {value} for parameter {parameter.name}, but no such file or directory was found.",
        hint="A path parameter names a file of the project, a file where the job runs, or a URI that can be fetched.",
        code="USER_ERROR",
    )


def _as_seen(place: Place, folder: Path, path: str) -> str:
    if not place.work_seen_as:
        return path
    return os.path.join(place.work_seen_as, os.path.relpath(path, folder))


def _download(spec: JobSpec, place: Place, parameter: Parameter, uri: str) -> str:
    place.on_phase(f"fetching parameter {parameter.name}")
    folder = place.work.parent / "parameters"
    target = folder / parameter.name.replace(os.sep, "_")
    removal.delete(target)
    folder.mkdir(exist_ok=True)
    target.mkdir()
    from mlflow.artifacts import download_artifacts

    try:
        fetched = download_artifacts(artifact_uri=uri, dst_path=str(target))
    except Exception as error:  # each artifact store raises what its own client library raises
        words = f"{type(error).__name__}: {error}"
        raise JobError(f"Parameter {parameter.name}: {uri} cannot be fetched.", words=words) from error
    return _as_seen(place, place.work, os.path.abspath(fetched))


def _command(spec: JobSpec, place: Place, folder: Path, line: str, variables: Mapping[str, str]) -> Command:
    seen = place.work_seen_as or str(folder)
    ours = {
        "MLFLOW_RUN_ID": spec.run.run_id,
        "MLFLOW_EXPERIMENT_ID": spec.run.experiment_id,
        "MLFLOW_TRACKING_URI": spec.run.tracking_uri,
        "MLFLOW_REMOTE_OUTPUT_DIR": os.path.join(seen, OUTPUT_FOLDER),
        "MLFLOW_REMOTE_SUBMISSION_ID": spec.submission_id,
    }
    return Command(
        argv=("bash", "-c", line),
        fallback_argv=("sh", "-c", line),
        cwd=seen,
        env={"PYTHONUNBUFFERED": "1", **variables, **spec.env_vars, **ours},
        grace_period_s=spec.limits.grace_period_s,
        timeout_s=spec.limits.timeout_s,
        log_limit_bytes=spec.log_limit_bytes,
        memory_limit_hint=spec.resources.memory_bytes if spec.compute != "local" else None,  # where nothing limits it
        tee=place.tee,
    )


# -- as a container's own program, beside ``execute`` and ``observe`` in one pod ---------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the job of an envelope on a volume that the job's containers share. Exit status: 1 if it failed.

    Makes the folders (the program's home beside the spool), group-writable because the program may run as another user
    of the same group, and puts ``execute`` where the program's own image finds it.
    """
    arguments = _parser().parse_args(argv)
    os.umask(0o002)
    made = Spool.create(arguments.spool, mode=0o2770)
    _stop_when_told(made)
    for folder in (arguments.tools, arguments.spool.parent / "home"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("execute.py", "execute.sh"):
        shutil.copyfile(Path(__file__).with_name(name), arguments.tools / name)
    try:
        check_release(os.environ.get("MLFLOW_REMOTE_CLIENT_VERSION", ""))
        spec = envelope.load(arguments.envelope.read_bytes())
    except (JobError, OSError) as error:
        what, words = getattr(error, "what", "The envelope cannot be read."), getattr(error, "words", str(error))
        failed = {"reason": "BOOTSTRAP", "message": what, "words": words, "hint": getattr(error, "hint", "")}
        made.write_prepared(Prepared(failed))
        return 1
    prepare(spec, _pod_place(arguments))
    ended = made.prepared()
    return 1 if ended is None or ended.failed else 0


def _stop_when_told(spool: Spool) -> None:
    """End this process soon after a SIGTERM or a cancel, whatever it is at: a container's first process must do so
    itself, and an environment may take minutes. The kernel ends its children with it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while signal.sigtimedwait({signal.SIGTERM}, LOOK_S) is None and not spool.cancel_requested():
            pass
        stopped = {"reason": "TERMINATED", "message": "The job was stopped while it was being prepared."}
        spool.write_prepared(Prepared({**stopped, "words": "", "hint": ""}))
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="told to stop", daemon=True).start()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare", description=main.__doc__)
    for name in ("envelope", "spool", "work", "tools"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "cache")
    return parser


def check_release(client: str) -> None:
    """Raises JobError where the runner is of another release than whoever made the job."""
    if client and client != __version__:
        raise JobError(
            f"The runner image has release {__version__} of mlflow-remote-backend, the submitter {client}.",
            hint="Rebuild the image with mlflow-remote image build, or install the same release on both sides.",
        )


def _pod_place(arguments: argparse.Namespace) -> Place:
    return Place(
        spool=arguments.spool,
        work=arguments.work,
        cache=arguments.cache,
        environ=os.environ,
        work_seen_as=str(arguments.work),
        on_phase=lambda detail: print(detail, flush=True),
    )


if __name__ == "__main__":
    sys.exit(main())
