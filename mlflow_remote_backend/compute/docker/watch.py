"""Watching a job's container from its start to its end, and bringing home what it left."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ... import removal
from ...errors import ComputeError, ConfigError
from ...job import Diagnosis, JobSpec, Reason
from ...runner.run_folder import RunFolder
from ...runner.spool import ExitRecord, Spool, write_json
from . import copying, diagnosis, request
from .engine import Engine, Refused
from .mirror import Mirror

CONTAINER_FILE = "container.json"  # in the run folder: what a later supervisor needs to know
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 5.0
STOP_MARGIN_S = 10.0  # beyond the grace period, before the container itself is killed
GIVE_UP_S = 30.0  # and then, before a cancelled job's engine that does not answer is given up
REMOVAL_S = 10.0  # for an engine to remove a container that somebody wants removed
STAND_IN = "-files"  # after the container's name: what its volume is read from when it is gone
NOT_COPIED = "mlflow-remote-not-copied.txt"  # beside outputs that this machine cannot hold: which, and why
_BEING_REMOVED = ("removing", "dead")

T = TypeVar("T")


def recorded(folder: RunFolder) -> dict[str, str] | None:
    """The container that was made for the run, as the run folder knows it."""
    try:
        found = json.loads((folder.path / CONTAINER_FILE).read_text())
    except (OSError, ValueError):
        return None
    return {key: str(value) for key, value in found.items()}


class _GivenUp(Exception):
    """A cancelled job's engine does not answer."""


class ContainerRun:
    """A container that was started. Its own thread mirrors it, and brings everything home when it has ended.

    ``connect``: reaches its engine, and may fail for as long as that is away.
    """

    def __init__(self, connect: Callable[[], Engine], spec: JobSpec, folder: RunFolder, container: str) -> None:
        self._connect = connect
        self._connected: Engine | None = None
        self._spec = spec
        self._folder = folder
        self._spool = Spool(folder.spool)
        self._came = folder.path / "came"  # output folders as they came with the project
        self._name = request.container_name(spec.run.run_id)
        self._container = container
        self._ended = threading.Event()
        self._stop_by: float | None = None
        self._said = ""
        self._full_since: float | None = None
        self._half: Path | None = None  # an output folder that could not be copied whole
        self._collected = False
        self._nothing_left = False
        self._watcher = threading.Thread(target=self._watch, name="container", daemon=True)
        self._watcher.start()

    def alive(self) -> bool:
        """True until everything is here: log, outputs and exit record."""
        if self._stop_by is None and self._spool.cancel_requested():  # by a tag, or because the run was deleted
            self.stop(self._spec.limits.grace_period_s)
        return not self._ended.is_set()

    def stop(self, grace_period_s: float) -> None:
        if self._stop_by is None:
            self._stop_by = time.monotonic() + grace_period_s + STOP_MARGIN_S
            threading.Thread(target=self._stop, name="stop", daemon=True).start()

    def collect(self) -> None:
        """Called first when what the program left is to be uploaded: it is here then, and its container is on its way
        out. Called again at the very end: then it is gone."""
        self._ended.wait()
        if not self._collected:
            self._collected = True
            return
        self._watcher.join()
        if self._connected is not None and not self._nothing_left:
            self._remove()

    @property
    def _engine(self) -> Engine:
        if self._connected is None:
            raise ComputeError("The Docker engine was not reached yet.", transient=True)
        return self._connected

    def _remove(self) -> None:
        remove(self._engine, self._name)
        self._nothing_left = True

    # -- stopping

    def _stop(self) -> None:
        """``execute`` acts on the file; it alone keeps the grace period. Only if it fails is the container killed."""
        assert self._stop_by is not None
        cancel = b"".join(copying.pack([copying.Item("cancel", b"", 0o644)], (0, 0)))
        self._try(lambda: self._engine.copy_in(self._container, request.SPOOL, cancel), self._stop_by)
        self._try(lambda: self._engine.unpause(self._container), self._stop_by)
        if not self._ended.wait(max(0.0, self._stop_by - time.monotonic())):
            self._try(lambda: self._engine.kill(self._container))

    def _try(self, action: Callable[[], object], deadline: float = math.inf) -> None:
        """Until the engine has done it, or it is too late."""
        pause_s = FIRST_PAUSE_S
        while not self._ended.wait(pause_s) and time.monotonic() < deadline:
            with contextlib.suppress(ComputeError):
                action()
                return
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _too_late(self) -> bool:
        return self._stop_by is not None and time.monotonic() > self._stop_by + GIVE_UP_S

    # -- watching

    def _watch(self) -> None:
        try:
            self._connected = self._ask(self._connect)
            found = self._ask(lambda: self._engine.inspect(self._container))
            if found is not None and found["State"]["Status"] == "created":  # an earlier supervisor got so far
                self._record(Diagnosis(Reason.KILLED_BY_SYSTEM, "The supervisor died before the program was started."))
                self._remove()
            else:
                spool = self._folder.spool
                self._follow(Mirror(self._engine, self._container, spool, self._too_late, self._disk_is_full))
        except _GivenUp:
            self._record(
                Diagnosis(
                    Reason.CANCELLED,
                    f"Cancelled, but the Docker engine does not answer: container {self._name} may still run.",
                    hint="`mlflow-remote gc` removes it once the engine is back.",
                )
            )
        except Exception as error:  # noqa: BLE001 - whatever went wrong must not leave the run without an end
            words = f"{type(error).__name__}: {error}"
            self._record(Diagnosis(Reason.BOOTSTRAP, f"Container {self._name} could not be followed.", words=words))
        finally:
            self._ended.set()

    def _disk_is_full(self, is_full: bool) -> None:
        """The program waits in its write, for ``finalize_timeout``: somebody may make room."""
        if not is_full:
            if self._full_since is not None:
                self._say("")
            self._full_since = None
            return
        self._full_since = self._full_since or time.monotonic()
        self._say("the Docker engine's disk is full and the program waits: make room there, or cancel the run")
        if time.monotonic() > self._full_since + self._spec.limits.finalize_timeout_s:
            self._engine.kill(self._container)

    def _follow(self, mirror: Mirror) -> None:
        self._bring(self._until_ended(mirror), mirror)

    def _until_ended(self, mirror: Mirror) -> dict[str, Any] | None:
        """Mirror the log until the container has ended; how it ended, None if it is gone."""
        pause_s = FIRST_PAUSE_S
        while True:
            found: dict[str, Any] | None = self._ask(lambda: self._engine.inspect(self._container))
            if found is not None and found["State"]["Status"] in _BEING_REMOVED:
                return self._removed(found)
            if found is None or not found["State"]["Running"]:
                return found
            if found["State"]["Paused"]:
                self._say(f"container {self._name} is paused by somebody; `docker unpause {self._name}` lets it go on")
                time.sleep(1.0)
                continue
            self._say("")
            before = mirror.size_bytes, time.monotonic()
            with contextlib.suppress(ComputeError, OSError):
                mirror.follow()
            useful = mirror.size_bytes > before[0] or time.monotonic() > before[1] + LONGEST_PAUSE_S
            pause_s = FIRST_PAUSE_S if useful else min(pause_s * 2, LONGEST_PAUSE_S)
            time.sleep(pause_s)

    def _removed(self, found: dict[str, Any]) -> dict[str, Any] | None:
        """Somebody removes the container: None once it is gone, or as it was found if the engine cannot do it."""
        deadline = time.monotonic() + REMOVAL_S
        while time.monotonic() < deadline:
            if self._ask(lambda: self._engine.inspect(self._container)) is None:
                return None
            time.sleep(FIRST_PAUSE_S)
        return found

    def _ask(self, question: Callable[[], T], give_up: float = math.inf) -> T:
        """The engine's answer, however long that takes: silence is no proof of anything.

        Raises OSError where this machine (its disk) is the trouble at the time ``give_up``.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return question()
            except Refused:
                raise
            except (ComputeError, ConfigError, OSError) as error:
                if self._too_late():
                    raise _GivenUp from error
                if isinstance(error, OSError) and time.monotonic() > give_up:
                    raise
                self._say(f"no contact, the container may still run: {error}")
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _say(self, detail: str) -> None:
        if detail != self._said:
            self._said = detail
            self._folder.say("running", detail)

    # -- bringing home

    def _bring(self, found: dict[str, Any] | None, mirror: Mirror) -> None:
        record = self._ask(lambda: self._from_source(mirror.finish))
        trouble = self._bring_outputs()
        if record is not None:
            self._write_exit(_with_what_we_know(record, found, trouble))
        elif self._spool.cancel_requested():
            self._record(Diagnosis(Reason.CANCELLED, f"Cancelled; container {self._name} was killed."))
        elif self._full_since is not None:
            self._record(diagnosis.no_space(""))
        else:
            own = "" if found is None else self._ask(lambda: self._engine.words_of(self._container))
            self._record(diagnosis.of_ended(self._name, found, own, self._spec.resources.memory_bytes))
        self._ended.set()
        with contextlib.suppress(ComputeError):  # collect tries again
            self._remove()

    def _bring_outputs(self) -> str:
        """Copy the output folders here. Returns why that is impossible, if it stays so for ``finalize_timeout``."""
        give_up = time.monotonic() + self._spec.limits.finalize_timeout_s
        output = ""
        try:
            for output in sorted(self._spec.outputs):  # a folder before those inside it
                self._ask(partial(copying.set_aside, self._folder.work / output, self._came / output), give_up)
            for output in self._spec.outputs:
                problems = self._ask(partial(self._from_source, partial(self._unpack_output, output)), give_up)
                if problems:
                    (self._folder.work / output / NOT_COPIED).write_text("\n".join(problems) + "\n")
        except OSError as error:
            self._half = self._folder.work / output
            return f"folder {output!r} could not be copied to {self._folder.work}: {error.strerror or error}"
        return ""

    def _unpack_output(self, output: str, source: str) -> list[str]:
        archive = self._engine.copy_out(source, f"{request.WORK}/{output}")
        return copying.unpack(archive, self._folder.work, output, self._came / output)

    def _from_source(self, bring: Callable[[str], T]) -> T | None:
        """What ``bring`` brings from the container, or from its volume if that is gone; None: it is not there."""
        for find_source in (self._self_if_there, self._stand_in):
            source = find_source()
            if source is None:
                continue
            try:
                return bring(source)
            except Refused as error:
                if not error.missing:
                    raise
                if source == self._container and self._self_if_there():
                    return None  # the container is there, the file is not
        return None

    def _self_if_there(self) -> str | None:
        return None if self._engine.inspect(self._container) is None else self._container

    def _stand_in(self) -> str | None:
        """A container that is never started, to copy from the volume of one that somebody removed."""
        if self._engine.volume(self._name) is None:
            return None
        known = recorded(self._folder) or {}
        mount = {"Type": "volume", "Source": self._name, "Target": request.MOUNT}
        document = {
            "Image": known.get("image", ""),
            "Entrypoint": ["/nothing"],
            "Labels": request.labels(self._spec),
            "HostConfig": {"Mounts": [mount]},
        }
        name = f"{self._name}{STAND_IN}"
        try:
            return self._engine.create(name, document)
        except Refused as error:
            return name if error.conflict else None

    def _record(self, found: Diagnosis) -> None:
        """The exit record that ``execute`` did not leave."""
        record = ExitRecord(
            exit_code=137,
            log_bytes=self._spool.log.size(),
            error={"code": found.reason.value, "message": found.message, "words": found.words, "hint": found.hint},
            ended_at=time.time(),
        )
        self._write_exit(json.dumps(dataclasses.asdict(record)).encode())

    def _write_exit(self, record: bytes) -> None:
        """Without it the run has no verdict: on a full disk again and again, and rather than half an output folder."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return write_json(self._folder.spool / "exit.json", json.loads(record), durable=True)
            except OSError:
                if self._too_late() or not self._folder.exists():
                    raise
                if self._half is not None:
                    removal.delete(self._half)
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)


def _with_what_we_know(record: bytes, found: Mapping[str, Any] | None, trouble: str) -> bytes:
    """The exit record with what ``execute`` could not see: a kill for want of memory, outputs left behind."""
    try:
        known = json.loads(record)
    except ValueError:
        return json.dumps(dataclasses.asdict(ExitRecord(137))).encode()
    if found is not None and found["State"].get("OOMKilled") and not known.get("oom_kills"):
        known["oom_kills"] = 1
    if trouble and known.get("exit_code") == 0:
        message = f"The program exited with code 0, but its {trouble}."
        known["error"] = {"code": Reason.FINALIZE_INCOMPLETE.value, "message": message}
    return json.dumps(known).encode()


def remove(engine: Engine, name: str) -> None:
    """Remove a job's container and its volume, and what served it for a while. Idempotent."""
    for container in (name, f"{name}{STAND_IN}", f"{name}{request.BUILDER}"):
        engine.remove(container)
    try:
        engine.remove_volume(name)
    except Refused as error:
        if not error.conflict:
            raise
