"""One final status, and the right one, however the calls of all who may write to a run interleave.

The real runner's end (``finalise``), followers (``settle``), a cancel from elsewhere, the user's own ``end_run`` and
MLflow's waiting each run in a thread; every call to the tracking server is a point where Hypothesis decides who goes
on. The store is MLflow's as far as it matters here: whoever writes last wins, and no call compares before it sets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlflow_remote_backend.compute.base import JobHandle
from mlflow_remote_backend.follow import settle
from mlflow_remote_backend.job import (
    Diagnosis,
    EntryPoint,
    EnvironmentRef,
    JobSpec,
    JobStatus,
    Phase,
    Reason,
    RunRef,
    SnapshotRef,
    final_status,
)
from mlflow_remote_backend.runner.finalise import finish
from mlflow_remote_backend.runner.record import RunRecord
from mlflow_remote_backend.runner.spool import ExitRecord, Prepared, Spool, Started, write_json
from mlflow_remote_backend.tracking import TERMINAL, Tracking

RUN = RunRef("1" * 32, "0", "mlflow-artifacts:/0", "http://tracking.example.com")
SPEC = JobSpec(RUN, "s", "p", EntryPoint("main", "…"), {}, SnapshotRef("sha256:0", 1), EnvironmentRef())
HANDLE = JobHandle("kubernetes://namespace/job", "uid")
Order = tuple[list[int], list[int]]
CANCEL = "mlflow_remote.cancel_requested"


class Died(BaseException):
    """Stands for SIGKILL."""


class Schedule:
    """Lets one actor at a time do one call; ``go`` runs them to their end.

    Who is next: for each actor in turn ``delays`` says how many calls of others it lets go first, as long as there are
    any; among the rest ``choices`` decides, and when it is used up they take turns.
    """

    def __init__(self, delays: Sequence[int], choices: Sequence[int]) -> None:
        self._delays = list(delays)
        self._choices = list(choices)
        self._changed = threading.Condition()
        self._waiting: list[threading.Thread] = []
        self._chosen: threading.Thread | None = None
        self._actors: list[threading.Thread] = []
        self._ended: set[threading.Thread] = set()
        self.failures: list[BaseException] = []

    def add(self, action: Callable[[], object]) -> None:
        self._actors.append(threading.Thread(target=self._act, args=(action,), daemon=True))

    def _act(self, action: Callable[[], object]) -> None:
        try:
            self.turn()
            action()
        except Died:
            pass
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.failures.append(error)
        finally:
            with self._changed:
                self._ended.add(threading.current_thread())
                self._changed.notify_all()

    def turn(self) -> None:
        """Wait to be chosen."""
        me = threading.current_thread()
        with self._changed:
            self._waiting.append(me)
            self._changed.notify_all()
            while self._chosen is not me:
                self._changed.wait()
            self._chosen = None
            self._changed.notify_all()

    def _delay(self, actor: threading.Thread) -> int:
        number = self._actors.index(actor)
        return self._delays[number] if number < len(self._delays) else 0

    def go(self) -> None:
        for each in self._actors:
            each.start()
        count = 0
        while True:
            with self._changed:
                while self._chosen is not None or len(self._waiting) + len(self._ended) < len(self._actors):
                    assert self._changed.wait(30), "an actor hangs"
                if not self._waiting:
                    return
                order = sorted(self._waiting, key=self._actors.index)
                order = [each for each in order if self._delay(each) <= count] or [min(order, key=self._delay)]
                number = self._choices.pop(0) if self._choices else count
                count += 1
                self._chosen = order[number % len(order)]
                self._waiting.remove(self._chosen)
                self._changed.notify_all()


@dataclass
class Store:
    """A run as MLflow's store has it, and its client as far as it is used here."""

    schedule: Schedule
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, bytes] = field(default_factory=dict)
    history: list[tuple[str, str]] = field(default_factory=list)  # status and reason after each call

    def client(self, dies_at: int = -1) -> Client:
        return Client(self, dies_at)


@dataclass
class Client:
    """``dies_at``: the call at which its process is killed; even numbers before it took effect, odd ones after."""

    store: Store
    dies_at: int
    calls: int = 0

    def _call(self, effect: Callable[[], object]) -> None:
        self.store.schedule.turn()
        self.calls += 1
        if self.calls == self.dies_at // 2 and self.dies_at % 2 == 0:
            raise Died
        effect()
        self.store.history.append((self.store.status, self.store.tags.get("mlflow_remote.reason", "")))
        if self.calls == self.dies_at // 2 and self.dies_at % 2 == 1:
            raise Died

    def get_run(self, run_id: str) -> Any:
        found: list[Any] = []

        def read() -> None:
            info = SimpleNamespace(
                run_id=run_id,
                experiment_id="0",
                run_name="",
                status=self.store.status,
                artifact_uri="",
                start_time=0,
                end_time=None,
                lifecycle_stage="active",
            )
            found.append(
                SimpleNamespace(info=info, data=SimpleNamespace(tags=dict(self.store.tags), params={}, metrics={}))
            )

        self._call(read)
        return found[0]

    def log_batch(self, run_id: str, metrics: Sequence[Any] = (), params: Any = (), tags: Sequence[Any] = ()) -> None:
        self._call(lambda: self.store.tags.update({each.key: each.value for each in tags}))

    def set_terminated(self, run_id: str, status: str) -> None:
        def write() -> None:
            self.store.status = status

        self._call(write)

    def log_artifact(self, run_id: str, path: str, folder: str) -> None:
        data = Path(path).read_bytes()
        self._call(lambda: self.store.artifacts.update({f"{folder}/{Path(path).name}": data}))

    def log_text(self, run_id: str, text: str, name: str) -> None:
        self._call(lambda: self.store.artifacts.update({name: text.encode()}))

    def list_artifacts(self, run_id: str, folder: str = "") -> list[Any]:
        found: list[Any] = []
        self._call(lambda: found.extend(SimpleNamespace(path=each) for each in self.store.artifacts))
        return found

    def download_artifacts(self, run_id: str, name: str, target: str) -> str:
        path = Path(target, Path(name).name)
        self._call(lambda: path.write_bytes(self.store.artifacts[name]))
        return str(path)


@dataclass
class World:
    """One run, its spool, and those who act on it. ``dead``: its runner was killed."""

    folder: Path
    schedule: Schedule
    store: Store
    dead: threading.Event = field(default_factory=threading.Event)

    def tracking(self) -> Tracking:
        tracking = Tracking(RUN.tracking_uri)
        tracking._client = self.store.client()
        return tracking

    def runner(self, dies_at: int = -1) -> None:
        record = RunRecord(RUN)
        record._client = self.store.client(dies_at)
        try:
            finish(SPEC, self.folder, record, owner="runner:1", work_dir=self.folder, last_chance=True)
        finally:
            self.dead.set()

    def follower(self, diagnosis: Diagnosis) -> None:
        """Looks again and again, as every follower does; ends the run itself only where its runner is dead."""
        tracking = self.tracking()
        while not tracking.view(RUN.run_id).ended:
            if self.dead.is_set():
                settle(tracking, None, HANDLE, RUN.run_id, JobStatus(Phase.DONE, diagnosis, gone=True))

    def hopeless_follower(self, diagnosis: Diagnosis) -> None:
        """Ends the run because its job can never run, whatever a runner in it may be doing."""
        settle(self.tracking(), None, HANDLE, RUN.run_id, JobStatus(Phase.PREPARING, diagnosis))

    def user(self, status: str) -> None:
        """A status that the user's code writes, and that reaches the server whenever it does."""
        self.store.client().set_terminated(RUN.run_id, status)

    def canceller(self) -> None:
        self.tracking().set_tags(RUN.run_id, {CANCEL: "1"})

    def mlflow_waits(self, interrupted: bool) -> None:
        """``mlflow.projects``' own waiting: reads, waits for us, and then sets what it thinks where nothing is set."""
        client = self.store.client()
        tracking = self.tracking()
        client.get_run(RUN.run_id)
        if interrupted:
            self.canceller()
        while not (view := tracking.view(RUN.run_id)).ended:
            if self.dead.is_set():
                settle(tracking, None, HANDLE, RUN.run_id, JobStatus(Phase.DONE, LOST, gone=True))
        if client.get_run(RUN.run_id).info.status not in TERMINAL:
            client.set_terminated(RUN.run_id, "FINISHED" if view.status == "FINISHED" and not interrupted else "FAILED")

    def check(self, statuses: set[str]) -> None:
        """After whatever else was written last, one more look: the run says the truth, and the store is put right."""
        assert not self.schedule.failures
        self.store.schedule = Schedule([], [])
        self.store.schedule.add(lambda: self.tracking().view(RUN.run_id))
        self.store.schedule.go()
        reason = self.store.tags["mlflow_remote.reason"]
        assert self.store.status == final_status(Reason[reason]), self.store.history
        assert self.store.status in statuses, self.store.history
        assert self.store.tags["mlflow_remote.finalized"]
        assert self.store.tags["mlflow_remote.phase"] == "done"


LOST = Diagnosis(Reason.NODE_LOST, "The job's node was lost.")
NO_IMAGE = Diagnosis(Reason.IMAGE_PULL, "No such image.")

orders = st.tuples(st.lists(st.integers(0, 80), max_size=6), st.lists(st.integers(0, 5), max_size=30))
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., World]:
    count = 0

    def make(order: Order, **record: Any) -> World:
        nonlocal count
        count += 1
        spool = Spool.create(tmp_path / str(count))
        spool.write_prepared(Prepared())
        if record:
            write_json(spool.path / "started.json", Started(pid=0))
            write_json(spool.path / "exit.json", ExitRecord(**record))
        schedule = Schedule(*order)
        return World(spool.path, schedule, Store(schedule))

    return make


@relaxed
@given(orders, st.sampled_from([0, 3]), st.lists(st.sampled_from(["FINISHED", "FAILED", "KILLED"]), max_size=2))
def test_the_exit_code_decides_whoever_else_writes(
    made: Callable[..., World], order: Order, code: int, users: list[str]
) -> None:
    world = made(order, exit_code=code)
    world.schedule.add(world.runner)
    for status in users:
        world.schedule.add(lambda status=status: world.user(status))
    world.schedule.add(lambda: world.follower(LOST))
    world.schedule.add(lambda: world.mlflow_waits(False))
    world.schedule.add(world.canceller)  # too late: the program has ended by itself
    world.schedule.go()
    world.check({"FINISHED" if code == 0 else "FAILED"})


@relaxed
@given(orders)
def test_a_cancelled_program_ends_as_killed(made: Callable[..., World], order: Order) -> None:
    world = made(order, exit_code=143, signal=15, stopped_by="cancel")
    world.schedule.add(world.runner)
    world.schedule.add(lambda: world.follower(LOST))
    world.schedule.add(lambda: world.mlflow_waits(True))
    world.schedule.add(lambda: world.user("FINISHED"))
    world.schedule.go()
    world.check({"KILLED"})


@relaxed
@given(orders, st.integers(0, 40), st.sampled_from([0, 3]), st.booleans())
def test_a_runner_killed_at_any_call_is_replaced_by_those_who_look(
    made: Callable[..., World], order: Order, dies_at: int, code: int, cancelled: bool
) -> None:
    world = made(order, exit_code=code)
    world.schedule.add(lambda: world.runner(dies_at))
    world.schedule.add(lambda: world.follower(LOST))
    world.schedule.add(lambda: world.follower(Diagnosis(Reason.JOB_DELETED, "The Job was deleted.")))
    world.schedule.add(lambda: world.mlflow_waits(False))
    if cancelled:
        world.schedule.add(world.canceller)
    world.schedule.go()
    truth = "FINISHED" if code == 0 else "FAILED"
    world.check({truth, "FAILED", *(["KILLED"] if cancelled else [])})


@relaxed
@given(orders, st.booleans())
def test_a_job_that_can_never_run_has_one_end_although_its_sidecar_lives(
    made: Callable[..., World], order: Order, cancelled: bool
) -> None:
    world = made(order)
    world.schedule.add(world.runner)
    world.schedule.add(lambda: world.hopeless_follower(NO_IMAGE))
    world.schedule.add(lambda: world.hopeless_follower(NO_IMAGE))
    world.schedule.add(lambda: world.follower(LOST))
    if cancelled:
        world.schedule.add(world.canceller)
    world.schedule.go()
    world.check({"FAILED", *(["KILLED"] if cancelled else [])})
