"""How a supervisor starts a job's program in a container, watches it, and brings home what it left.

The container and the volume that holds its project and spool carry the run's name. They are made and removed by the
supervisor; if that dies, the next one finds them again by that name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet  # the builtin one only since Python 3.11
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ...environment import cache
from ...errors import ComputeError, ConfigError, JobError
from ...job import JobSpec, Reason
from ...runner import supervise
from ...runner.prepare import Place
from ...runner.run_folder import RunFolder
from ...runner.spool import Command, Prepared, Spool, secrets_script, write_json
from ...runner.supervise import Running, Start
from . import copying, diagnosis, images, reach, request, scripts, users
from .engine import Connection, Endpoint, Engine, Refused, registry_auth
from .request import Container, Image
from .watch import CONTAINER_FILE, FIRST_PAUSE_S, LONGEST_PAUSE_S, ContainerRun, recorded, remove

if TYPE_CHECKING:
    from .environments import Environment

CANCEL_POLL_S = 0.2
T = TypeVar("T")

#: What runs the program's line inside an image's entrypoint, which knows only one program to start.
_WRAPPED_SHELL = 'command -v bash >/dev/null 2>&1 && exec bash -c "$0"; exec sh -c "$0"'


@dataclasses.dataclass(frozen=True)
class Site:
    """Where the container will be: an engine that answers, and the image on it."""

    engine: Engine
    image: Image
    rootless: bool


class DockerProgram:
    """The supervisor's hook for ``compute: docker``."""

    def __init__(self) -> None:
        self._site: Future[Site] | None = None
        self._environment: Environment | None = None

    def place(self, spec: JobSpec, folder: RunFolder, environ: Mapping[str, str]) -> Place:
        """The engine is connected and the image pulled while the project is unpacked."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="image")
        self._site = pool.submit(_site, spec, folder, environ)
        pool.shutdown(wait=False)
        return Place(
            spool=folder.spool,
            work=folder.work,
            cache=cache.default_root(),
            environ=environ,
            archive=folder.archive if folder.archive.exists() else None,
            work_seen_as=request.WORK,
            on_phase=lambda detail: folder.say("preparing", detail),
            make_environment=lambda: self._make_environment(spec, folder, environ),
        )

    def _make_environment(self, spec: JobSpec, folder: RunFolder, environ: Mapping[str, str]) -> Mapping[str, str]:
        from . import environments

        site = self._wait_for_site(folder)
        self._environment = environments.ensure(
            site.engine,
            spec,
            site.image,
            auth=registry_auth(environ),
            cache_root=cache.default_root(),
            say=lambda detail: folder.say("preparing", detail),
            cancelled=Spool(folder.spool).cancel_requested,
        )
        return self._environment.variables

    def start(self, spec: JobSpec, folder: RunFolder, start: Start) -> Running:
        site = self._wait_for_site(folder)
        python = ""
        if self._environment is not None:
            site, python = dataclasses.replace(site, image=self._environment.image), self._environment.python
        spool = Spool(folder.spool)
        spool.write_prepared(dataclasses.replace(spool.prepared() or Prepared(), image=site.image.identity))
        made = _container(spec, site, start.environ, python)
        folder.say("starting", f"creating container {made.name}")
        secrets = {**_copied(spec, start.environ), **_usable(spec, start.program_secrets)}

        def started(again: bool) -> str:
            if again:  # until it has all its secrets the program does not run: nothing of it is lost
                remove(site.engine, made.name)
            container = _create(site.engine, spec, made)
            write_json(folder.path / CONTAINER_FILE, {"id": container, "image": site.image.id, "name": made.name})
            _copy_in(site, spec, folder, container, made)
            _start(site.engine, container, secrets)
            return container

        with _start_errors(site.engine, made):
            container = _patiently(started, spec, folder)
        folder.say("running")
        return ContainerRun(lambda: site.engine, spec, folder, container)

    def _wait_for_site(self, folder: RunFolder) -> Site:
        """The image may take minutes; whoever cancels meanwhile need not wait for it."""
        assert self._site is not None, "place comes first"
        while True:
            with contextlib.suppress(NotYet):
                return self._site.result(timeout=CANCEL_POLL_S)
            if Spool(folder.spool).cancel_requested():
                raise JobError("Cancelled while the image was pulled.", code=Reason.CANCELLED.value)

    def find(self, spec: JobSpec, folder: RunFolder) -> Running | None:
        """Does not ask the engine, which may be away for long: what it says is heard in the program's own thread."""
        known = recorded(folder)
        connect = partial(Engine.connect, Endpoint.from_options(spec.options, {}))
        if known is not None and not (folder.spool / "exit.json").exists():
            return ContainerRun(connect, spec, folder, known["id"])
        if known is None and not folder.recoveries():
            return None  # the job's first supervisor
        return _Over(connect, request.container_name(spec.run.run_id))


def _site(spec: JobSpec, folder: RunFolder, environ: Mapping[str, str]) -> Site:
    options = spec.options
    endpoint = Endpoint.from_options(options, environ)
    engine = _patiently(lambda again: Engine.connect(endpoint), spec, folder)
    image = images.obtain(
        engine,
        options.get("resolved_image") or request.image_name(spec),
        pull=options.get("pull", "missing"),
        platform=options.get("platform") or "",
        auth=registry_auth(environ),
        patience_s=spec.limits.image_pull_timeout_s,
        say=lambda detail: folder.say("starting", detail),
    )
    return Site(engine, image, bool(options.get("rootless")))


def _patiently(attempt: Callable[[bool], T], spec: JobSpec, folder: RunFolder) -> T:
    """What ``attempt`` returns, tried again for ``start_timeout`` while the engine does not answer: it may restart.

    ``attempt`` is told whether it is tried again. Raises JobError: START_TIMEOUT, CANCELLED.
    """
    deadline = time.monotonic() + spec.limits.start_timeout_s
    pause_s = FIRST_PAUSE_S
    again = False
    while True:
        try:
            return attempt(again)
        except ComputeError as error:
            if not error.transient:
                raise
            if Spool(folder.spool).cancel_requested():
                raise JobError("Cancelled while the Docker engine was away.", code=Reason.CANCELLED.value) from error
            if time.monotonic() + pause_s > deadline:
                code = Reason.START_TIMEOUT.value
                raise JobError(error.what, words=error.words, hint=error.hint, code=code) from error
            folder.say("starting", f"no contact: {error.what} {error.words}".strip())
        again = True
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, LONGEST_PAUSE_S)


# -- making the container ----------------------------------------------------------------------------------------------


def _container(spec: JobSpec, site: Site, environ: Mapping[str, str], python: str) -> Container:
    local_store = bool(reach.store_folders(spec.run.tracking_uri, spec.run.artifact_uri))
    user = request.default_user(site.image.user, request.caller_ids(), rootless=site.rootless, local_store=local_store)
    return request.container(spec, site.image, user, environ=environ, python=python)


@contextlib.contextmanager
def _start_errors(engine: Engine, made: Container) -> Iterator[None]:
    """A container that cannot be made or started leaves nothing, and its run the engine's words."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(ComputeError):
            remove(engine, made.name)
        if isinstance(error, Refused):
            raise images.failed(diagnosis.of_start(made.name, str(made.document["Image"]), error.words)) from error
        raise


def _create(engine: Engine, spec: JobSpec, made: Container) -> str:
    """The container's id. Its name is the lock against a second one: what an earlier attempt left is replaced."""
    try:
        return engine.create(made.name, made.document, made.platform or None)
    except Refused as error:
        if not error.conflict:
            raise
        found = engine.inspect(made.name) or {"Config": {}, "State": {"Status": ""}}
        ours = (found["Config"].get("Labels") or {}).get(request.RUN_LABEL) == spec.run.run_id
        if not ours or found["State"]["Status"] != "created":
            raise
        engine.remove(made.name)
        return engine.create(made.name, made.document, made.platform or None)


def _copy_in(site: Site, spec: JobSpec, folder: RunFolder, container: str, made: Container) -> None:
    engine = site.engine
    owner = _owner(engine, container, str(made.document.get("User") or site.image.user))
    spool = Spool(folder.spool)
    command = spool.command()
    if command is None:
        raise JobError("The job's command is missing from its spool.")
    spool.write_command(_in_container(command, made, spec))
    code, ours = (each.removeprefix(f"{request.MOUNT}/") for each in (request.WORK, request.OURS))
    items = [
        copying.Item(ours),
        *(copying.Item(f"{ours}/{name}", mode=0o700) for name in ("spool", "spool/log", "home", "tmp")),
        copying.Item(f"{ours}/spool/command.json", folder.spool / "command.json"),
        copying.Item(f"{ours}/spool/command.sh", folder.spool / "command.sh"),
        *_runner_files(ours),
        copying.Item(code, folder.work),
    ]
    engine.copy_in(container, request.MOUNT, copying.pack(items, owner))


def _runner_files(ours: str) -> Iterator[copying.Item]:
    execute = Path(supervise.__file__).with_name("execute.py")
    for source in (execute, execute.with_suffix(".sh"), Path(scripts.__file__).with_name("tail.py")):
        yield copying.Item(f"{ours}/{source.name}", source.read_bytes(), 0o644)
    for name, text in (("start.sh", scripts.START), ("follow.sh", scripts.FOLLOW), ("tail.sh", scripts.TAIL)):
        yield copying.Item(f"{ours}/{name}", text.encode(), 0o644)


def _owner(engine: Engine, container: str, user: str) -> tuple[int, int]:
    """Uid and gid of the container's user."""
    if not users.needs_tables(user):
        return users.numeric(user, "", "")
    return users.numeric(user, _text(engine, container, "/etc/passwd"), _text(engine, container, "/etc/group"))


def _text(engine: Engine, container: str, path: str) -> str:
    """A small file of the container's image; empty where there is none."""
    try:
        content = [stream.read() for _, stream in copying.files(engine.copy_out(container, path))]
    except Refused as error:
        if error.missing:
            return ""
        raise
    return b"".join(content).decode("utf-8", "replace")


def _in_container(command: Command, made: Container, spec: JobSpec) -> Command:
    """The prepared command as it runs in this image: wrapped in its entrypoint, with the project's own variables."""
    argv, fallback = command.argv, ("sh", *command.argv[1:])
    if made.entrypoint:
        argv, fallback = _wrapped(made.entrypoint, command.argv[-1]), ()
    return dataclasses.replace(
        command,
        argv=argv,
        fallback_argv=fallback,
        env={**made.environment, **command.env},
        memory_limit_hint=spec.resources.memory_bytes,
        tee=False,
    )


def _wrapped(entrypoint: tuple[str, ...], line: str) -> tuple[str, ...]:
    """The program's line as an image's entrypoint runs it. Raises JobError if that would never look at it."""
    text = _text_of_shell(entrypoint)
    if text == ():
        return (*entrypoint, line)
    if text and "$" not in text[0]:
        raise JobError(
            "The image's ENTRYPOINT runs a command of its own and ignores the project's.",
            words=text[0],
            hint="-A entrypoint= leaves the image's entrypoint out.",
            code=Reason.CONTAINER_CONFIG.value,
        )
    return (*entrypoint, "/bin/sh", "-c", _WRAPPED_SHELL, line)


def _text_of_shell(argv: tuple[str, ...]) -> tuple[str, ...] | None:
    """What a shell in ``argv`` is told by ``-c``: its script, which may be still to come, and that one's arguments."""
    for index, each in enumerate(argv):
        pairs = zip(("", *argv), argv[:index], strict=False)
        before = [word for last, word in pairs if not word.startswith("-") and not re.fullmatch(r"-\w*o", last)]
        if re.fullmatch(r"-\w*c", each) and before and re.fullmatch(r"(.*/)?\w*sh", before[-1]):
            return argv[index + 1 :]
    return None


def _copied(spec: JobSpec, environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in request.copied_variables(spec) if name in environ}


def _usable(spec: JobSpec, secrets: Mapping[str, str]) -> dict[str, str]:
    useless = reach.unusable_proxies(secrets, request.network_of(spec))
    return {name: value for name, value in secrets.items() if name not in useless}


def _start(engine: Engine, container: str, secrets: Mapping[str, str]) -> None:
    """Start the container and hand it the secrets, which only its own stdin ever carries."""
    connection: Connection = engine.attach_input(container)
    try:
        engine.start(container)
        try:
            connection.send((secrets_script(secrets) + scripts.WHOLE).encode("utf-8", "surrogateescape"))
        except OSError as error:
            what = "The connection to the Docker engine broke while the program was started."
            raise ComputeError(what, words=str(error), transient=True) from error
        with contextlib.suppress(OSError):  # closing it ends the input as well
            connection.end_input()
    finally:
        connection.close()


class _Over:
    """A program that has ended, everything of it brought here, or that was never started: a container is recorded
    before that. What an earlier supervisor left on the engine when it died is still to go."""

    def __init__(self, connect: Callable[[], Engine], name: str) -> None:
        self._connect = connect
        self._name = name

    def alive(self) -> bool:
        return False

    def stop(self, grace_period_s: float) -> None:
        """It does not run."""

    def collect(self) -> None:
        """An engine that does not answer now is not waited for: `mlflow-remote gc` does the rest."""
        with contextlib.suppress(ComputeError, ConfigError):
            remove(self._connect(), self._name)
