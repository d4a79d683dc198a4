"""The supervisor: one detached process that takes a job on this machine from its envelope to its final status.

It prepares, starts the program (through a :class:`Program`: a child process, or a container), observes and finalises.
It has a session of its own, so that neither a closed terminal nor a killed submitter reaches it, and holds the run
folder's lock as long as it lives. If it dies, the next process that looks starts another one on the same folder: the
spool has everything that the program wrote.

Started in one of two ways. *Forked* from a submitter that has MLflow loaded already: nearly free. *Anew*, where
forking is not safe: the program starts as early, but the end waits for MLflow to load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from ..environment import tool
from ..errors import ComputeError
from ..job import JobSpec, Phase
from .prepare import Place, prepare
from .record import survives_fork
from .run_folder import RunFolder
from .spool import Prepared, Spool

#: Threads that MLflow itself starts and that a forked child can do without.
_HARMLESS_THREADS = ("MLflowTelemetry", "GetTelemetryConfig")
#: Threads of the pools that MLflow makes for each transfer of artifacts; they outlast it until they are collected.
_POOL_THREADS = "Mlflow"
POOL_ENDS_S = 0.5
PROCESS_NAME = "mlflow-remote"  # by which execute.py knows a supervisor, and a person who looks at ps
#: What MLflow imports where it can, and only training and evaluation need. Without them a supervisor that starts anew
#: takes 131 MB instead of 234, and loads MLflow in two thirds of the time (MLflow 3.17).
UNUSED_LIBRARIES = frozenset({"matplotlib", "numpy", "pandas", "scipy", "sklearn"})
START_VARIABLE = "MLFLOW_REMOTE_SUPERVISOR"  # "fork" or "spawn": overrules the choice


class Running(Protocol):
    """A program that was started."""

    def alive(self) -> bool:
        """Whether ``execute`` still lives (or may: a container engine that does not answer is no proof of death)."""
        ...

    def stop(self, grace_period_s: float) -> None:
        """Ask ``execute`` to end the program: SIGTERM, the grace period, SIGKILL. Returns at once."""
        ...

    def collect(self) -> None:
        """Bring what the program left (outputs) into the run folder and remove its container. Idempotent."""
        ...


class Program(Protocol):
    """How a compute starts ``execute`` for a prepared job."""

    def place(self, spec: JobSpec, folder: RunFolder, environ: Mapping[str, str]) -> Place: ...

    def start(self, spec: JobSpec, folder: RunFolder, start: Start) -> Running: ...

    def find(self, spec: JobSpec, folder: RunFolder) -> Running | None:
        """The program that an earlier supervisor of this folder started, or None if it never did."""
        ...


@dataclass(frozen=True)
class Start:
    """What a supervisor is given beside its folder, over a pipe or a fork, never on disk."""

    environ: Mapping[str, str] = field(repr=False)
    program_secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    caller_dir: str = ""
    last_chance: bool = False  # after this supervisor there is no other: it ends the run as well as possible
    recovery: bool = False  # an earlier supervisor died: whoever looked has not the variables to start the program with


# -- starting it -------------------------------------------------------------------------------------------------------


def start_detached(folder: RunFolder, lock: int, program: str, start: Start) -> None:
    """Start a supervisor for ``folder`` and hand it the ``lock``. ``program``: ``module:Class`` of the Program.

    Returns once it exists. Raises ComputeError if no process can be started.
    """
    try:
        if _fork_is_safe(folder.spec()):
            _fork(folder, lock, program, start)
        else:
            _spawn(folder, lock, program, start)
    except OSError as error:
        raise ComputeError("No supervisor process can be started on this machine.", words=str(error)) from error
    finally:
        os.close(lock)


def _fork_is_safe(spec: JobSpec) -> bool:
    """Only where no other thread could hold a lock that the child would wait for, MLflow is loaded already, and what
    it holds open survives."""
    wish = os.environ.get(START_VARIABLE, "")
    if wish in ("fork", "spawn"):
        return wish == "fork"
    if not sys.platform.startswith("linux") or "mlflow.tracking" not in sys.modules or "IPython" in sys.modules:
        return False
    if not survives_fork(spec.run.at_submitter.tracking_uri, spec.run.artifact_uri):
        return False
    return threading.current_thread() is threading.main_thread() and not _threads_in_the_way()


def _threads_in_the_way() -> list[threading.Thread]:
    """Other threads that may hold a lock. Pools that nobody uses any more are seen off first."""
    found = _others()
    if found and all(each.name.startswith(_POOL_THREADS) for each in found):
        gc.collect()
        deadline = time.monotonic() + POOL_ENDS_S
        for each in found:
            each.join(max(0.0, deadline - time.monotonic()))
        found = _others()
    return found


def _others() -> list[threading.Thread]:
    known = (each for each in threading.enumerate() if each is not threading.main_thread())
    return [each for each in known if not each.name.startswith(_HARMLESS_THREADS)]


def _fork(folder: RunFolder, lock: int, program: str, start: Start) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    middle = os.fork()
    if middle:
        ended = 0
        with contextlib.suppress(ChildProcessError):  # whoever ignores SIGCHLD is not told how its children ended
            ended = os.waitpid(middle, 0)[1]
        if ended:
            words = "There is no room for another process."
            raise ComputeError("No supervisor process can be started on this machine.", words=words)
        return
    status = 1
    try:  # nothing of the submitter's stack may run in the child: every path ends in os._exit
        os.setsid()
        if os.fork() == 0:
            _leave_the_submitter(folder, lock)
            status = _supervise_safely(folder, program, start)
        else:
            status = 0
    finally:
        os._exit(status)


def _leave_the_submitter(folder: RunFolder, lock: int) -> None:
    """Let go of all files of the submitter, so that nobody who waits for its pipes to close waits for us.

    Descriptors are pointed at /dev/null rather than closed: objects that still know their numbers may close them later,
    which must not hit a file of ours.
    """
    log = os.open(folder.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor not in (0, 1, 2, lock, log, null):
            with contextlib.suppress(OSError):
                os.dup2(null, descriptor, inheritable=False)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir("/")
    for each in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(each, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)


#: Starts its arguments with our stdin and ends, so that a submitter which lives on has no child to wait for. A shell
#: gives /dev/null to what it puts into the background; hence the detour over a spare descriptor.
_IN_BACKGROUND = 'exec {spare}<&0; "$@" <&{spare} {spare}<&- &'


def _spawn(folder: RunFolder, lock: int, program: str, start: Start) -> None:
    package_parent = str(Path(__file__).resolve().parents[2])
    environ = {
        **start.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [package_parent, start.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "mlflow_remote_backend.runner.supervise", str(folder.root), folder.run_id, program]
    with folder.log.open("ab") as log:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", _IN_BACKGROUND.format(spare=3 if lock != 3 else 4), "sh", *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd="/",
            env=environ,
            start_new_session=True,
            pass_fds=[lock],
        )
    payload = dataclasses.asdict(start)
    assert shell.stdin is not None
    with shell.stdin as pipe, contextlib.suppress(BrokenPipeError):
        pipe.write(json.dumps(payload).encode())
    if shell.wait() != 0:
        raise ComputeError("No supervisor process can be started on this machine.", words=folder.log.read_text()[-500:])


def main(argv: list[str]) -> int:
    """The supervisor's own command line: state root, run id, program. Reads the start values from its input."""
    root, run_id, program = argv
    sys.meta_path.insert(0, _Without(UNUSED_LIBRARIES))
    for each in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(each, signal.SIG_IGN)
    start = Start(**json.loads(sys.stdin.buffer.read()))
    return _supervise_safely(RunFolder(run_id, Path(root)), program, start)


class _Without:
    """Makes libraries look as if they were not installed. MLflow then does without them, as mlflow-skinny does."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _supervise_safely(folder: RunFolder, program: str, start: Start) -> int:
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(PROCESS_NAME)  # a fork's command line is still its submitter's
    try:
        folder.scratch.mkdir(exist_ok=True)
        tempfile.tempdir = str(folder.scratch)  # ours and our libraries', not the program's: goes with the folder
        supervise(folder, _load(program), start)
        return 0
    except BaseException:  # noqa: BLE001 - the last frame of a detached process: its log is the only place left to say it
        traceback.print_exc()
        return 1


def _load(name: str) -> Program:
    module, _, attribute = name.partition(":")
    loaded: Program = getattr(importlib.import_module(module), attribute)()
    return loaded


# -- being it ----------------------------------------------------------------------------------------------------------


def supervise(folder: RunFolder, program: Program, start: Start) -> None:
    """Take the job in ``folder`` to its end. Blocks until its run is finalised or ``finalize_timeout`` is over."""
    spec = folder.spec()
    folder.say("starting")
    job = _Job(spec, folder, program, start)
    job.begin()
    from .observe import observe
    from .record import RunRecord

    with RunRecord(spec.run.at_submitter) as record, _environment_in_use(spec):
        outcome = observe(
            spec,
            folder.spool,
            record,
            work_dir=job.work_dir,
            alive=job.alive,
            on_phase=job.entered,
            last_chance=start.last_chance,
        )
    job.end()
    if outcome.finalized or outcome.gone:
        folder.remove()
    else:
        folder.say("finalizing", "waiting for somebody to look: the tracking server was away for too long")


def _environment_in_use(spec: JobSpec) -> contextlib.AbstractContextManager[None]:
    """Nobody prunes the environment meanwhile, on another machine that shares the cache neither."""
    if spec.compute != "local" or not spec.environment.lock_key:
        return contextlib.nullcontext()
    from ..environment import cache

    return cache.using(cache.default_root(), spec.environment.lock_key)


_NEVER_STARTED = {
    "reason": "KILLED_BY_SYSTEM",
    "message": "The job's supervisor died before it had started the program.",
    "words": "",
    "hint": "Submit it again. The machine may have been restarted, or somebody killed the supervisor.",
}
PREPARE_LEAVES_S = 10.0  # for a preparation that was cancelled to let go of the folder


class _Job:
    """The job as its supervisor drives it: prepare in a thread, then the program; ``alive`` is observe's heartbeat."""

    def __init__(self, spec: JobSpec, folder: RunFolder, program: Program, start: Start) -> None:
        self.spec = spec
        self.folder = folder
        self.spool = Spool(folder.spool)
        self.work_dir = Path(spec.in_place) if spec.in_place else folder.work
        self._program = program
        self._start = start
        self._running: Running | None = None
        self._cancelled = False
        self._starting = False
        self._deciding = threading.Lock()
        self._preparing: threading.Thread | None = None
        self._tools = tool.Work()

    def begin(self) -> None:
        self._running = self._program.find(self.spec, self.folder)
        if self.spool.prepared() is not None:
            return
        if self._start.recovery:
            self.spool.write_prepared(Prepared(_NEVER_STARTED))
        else:
            self._preparing = threading.Thread(target=self._prepare_and_start, name="prepare", daemon=True)
            self._preparing.start()

    def _prepare_and_start(self) -> None:
        """In a thread of its own. Whatever goes wrong here ends the run, by name."""
        try:
            self.folder.say("preparing")
            place = self._program.place(self.spec, self.folder, self._start.environ)
            with self._tools.here():
                prepare(self.spec, replace(place, caller_dir=self._start.caller_dir))
            done = self.spool.prepared() or Prepared()
            if not done.failed and self._may_start():
                self._running = self._program.start(self.spec, self.folder, self._start)
                if self._cancelled:  # while it was being started
                    self._stop()
        except Exception as error:  # noqa: BLE001 - it is in the run and in the supervisor's log
            traceback.print_exc()
            failed = {
                "reason": getattr(error, "code", "BOOTSTRAP"),
                "message": getattr(error, "what", "") or f"The program could not be started: {error!r}",
                "words": getattr(error, "words", ""),
                "hint": getattr(error, "hint", ""),
            }
            self.spool.write_prepared(Prepared(failed, (self.spool.prepared() or Prepared()).seconds))

    def alive(self) -> bool:
        """Called several times a second: passes on a cancel, and tells whether the program may still write."""
        if not self._cancelled and self.folder.cancel.exists():
            self._cancel()
        if self._preparing is not None and self._preparing.is_alive():
            return self._starting or not self._cancelled
        return self._running is not None and self._running.alive()

    def entered(self, phase: str) -> None:
        """Called as the job moves on; before anything is uploaded, what the program left is brought here."""
        if phase == Phase.FINALIZING.value and self._running is not None:
            self._running.collect()
        self.folder.say(phase)

    def _may_start(self) -> bool:
        """From here on a cancel waits for the program to be started, and stops it: a container must not be left."""
        with self._deciding:
            self._starting = not self._cancelled
            return self._starting

    def _cancel(self) -> None:
        with self._deciding:
            self._cancelled = True
        self.spool.request_cancel()
        if self._running is not None:
            self._stop()

    def _stop(self) -> None:
        assert self._running is not None
        grace = self.folder.cancel.read_text().strip()
        self._running.stop(float(grace) if grace else self.spec.limits.grace_period_s)

    def end(self) -> None:
        """Nothing may be left: neither the program's container nor what prepare had started."""
        if self._running is not None:
            self._running.collect()
        with contextlib.suppress(OSError):
            os.killpg(0, signal.SIGTERM)  # our own session; we ourselves ignore it
        if self._preparing is not None:
            self._tools.end()  # they have sessions of their own
            self._preparing.join(PREPARE_LEAVES_S)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
