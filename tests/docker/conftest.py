"""A real engine, real images, and jobs that are supervised in the test's own process."""

from __future__ import annotations

import dataclasses
import os
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import pytest

from mlflow_remote_backend.compute.docker import leftovers
from mlflow_remote_backend.compute.docker import request as docker_request
from mlflow_remote_backend.compute.docker.engine import Endpoint, Engine
from mlflow_remote_backend.compute.docker.program import DockerProgram
from mlflow_remote_backend.compute.docker.watch import ContainerRun
from mlflow_remote_backend.job import EntryPoint, JobSpec, RunRef, SnapshotRef
from mlflow_remote_backend.runner.prepare import prepare
from mlflow_remote_backend.runner.run_folder import RunFolder
from mlflow_remote_backend.runner.spool import ExitRecord, Prepared, Spool
from mlflow_remote_backend.runner.supervise import Start

PYTHON_IMAGE = os.environ.get("MLFLOW_REMOTE_TEST_IMAGE", "local/python:3.11")
SHELL_IMAGE = os.environ.get("MLFLOW_REMOTE_TEST_SHELL_IMAGE", "local/shell:1")
NOBODY = f"http://tracking-{os.getpid()}.test"  # the tracking server of jobs that have none
DEADLINE_S = 60


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine.connect(Endpoint.from_options({}, os.environ))


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    """The SDK's own client, for what we never ask an engine."""
    with docker.APIClient(version="auto", **Endpoint.from_options({}, os.environ).arguments()) as made:
        yield made


@pytest.fixture(scope="session")
def registry() -> str:
    """A registry that the engine may push to: the address of one that runs."""
    address = os.environ.get("MLFLOW_REMOTE_TEST_REGISTRY", "127.0.0.1:5000")
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://{address}/v2/", timeout=5).close()
    except OSError as error:
        pytest.skip(f"no registry at {address}: {error}")
    return address


@pytest.fixture(scope="session")
def python_image() -> str:
    """An image with Python 3.10 or newer."""
    return PYTHON_IMAGE


@pytest.fixture(scope="session")
def shell_image() -> str:
    """An image with a POSIX shell and no Python."""
    return SHELL_IMAGE


@pytest.fixture
def image_with(client: Any, engine: Engine) -> Iterator[Callable[..., str]]:
    """``image_with("name", User="nobody")``: the Python image with another configuration; gone after the test."""
    made: list[str] = []

    def make(name: str, base: str = PYTHON_IMAGE, **config: Any) -> str:
        container = client.create_container_from_config({"Image": base, "Cmd": ["true"]})["Id"]
        client.commit(container, f"mlflow-remote-test/{name}", "1", conf=config)
        client.remove_container(container)
        made.append(f"mlflow-remote-test/{name}:1")
        return made[-1]

    yield make
    for name in made:
        engine.remove_image(name)


@pytest.fixture(autouse=True)
def nothing_left_on_the_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test makes under our label must be gone after it; then it is removed all the same.

    It is known by its tracking server: others may use this engine at the same time.
    """
    if request.node.get_closest_marker("docker") is None:
        yield
        return
    engine = request.getfixturevalue("engine")
    servers = [
        request.getfixturevalue(each) for each in ("tracking", "sqlite_tracking") if each in request.fixturenames
    ]
    marks = {docker_request.tracking_mark(uri) for uri in (NOBODY, *servers)}
    before = _ours(engine, marks)
    yield
    deadline = time.monotonic() + 10
    while (left := _ours(engine, marks) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    for _, name in sorted(left):
        engine.remove(name)
        engine.remove_volume(name)
    assert not left


def _ours(engine: Engine, marks: set[str]) -> set[tuple[str, str]]:
    return {(each.kind, each.name) for each in leftovers.leftovers(engine) if each.tracking in marks}


@dataclass
class Job:
    """A job whose supervisor is this process. ``secrets``: of the program."""

    spec: JobSpec
    folder: RunFolder
    environ: Mapping[str, str]
    secrets: Mapping[str, str]
    program: DockerProgram
    details: list[str] = field(default_factory=list)  # what was said while it was prepared

    def prepare(self) -> Prepared:
        place = self.program.place(self.spec, self.folder, self.environ)
        say = self.folder.say
        self.folder.say = lambda phase, detail="": (self.details.append(detail), say(phase, detail))  # type: ignore
        prepare(self.spec, place)
        prepared = Spool(self.folder.spool).prepared()
        assert prepared is not None
        return prepared

    def prepare_failed(self) -> Mapping[str, str]:
        failed = self.prepare().failed
        assert failed is not None
        return failed

    def start(self) -> ContainerRun:
        assert self.prepare().failed is None
        running = self.program.start(self.spec, self.folder, Start(self.environ, self.secrets))
        assert isinstance(running, ContainerRun)
        return running

    def run(self) -> ExitRecord:
        running = self.start()
        return self.end(running)

    def end(self, running: ContainerRun, deadline_s: float = DEADLINE_S) -> ExitRecord:
        """Waits for the end, and lets everything be collected."""
        deadline = time.monotonic() + deadline_s
        while running.alive():
            assert time.monotonic() < deadline, self.log()[-2000:]
            time.sleep(0.01)
        running.collect()  # as the supervisor: before the upload, and at the very end
        running.collect()
        record = Spool(self.folder.spool).exit()
        assert record is not None
        return record

    @property
    def name(self) -> str:
        return docker_request.container_name(self.spec.run.run_id)

    def log(self) -> bytes:
        return Spool(self.folder.spool).log.read(0, 1 << 40)

    def output(self, name: str) -> bytes:
        return (self.folder.work / "outputs" / name).read_bytes()


MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """``make_job(command, files={...}, options={...}, secrets={...}, **fields of JobSpec)`` -> Job, not started."""

    def make(
        command: str,
        *,
        files: Mapping[str, str | bytes] = {},
        options: Mapping[str, Any] = {},
        secrets: Mapping[str, str] = {},
        environ: Mapping[str, str] | None = None,
        image: str = PYTHON_IMAGE,
        **fields: Any,
    ) -> Job:
        run_id = uuid.uuid4().hex
        folder = RunFolder(run_id, tmp_path / "state")
        archive, digest = _archive(tmp_path, files)
        spec = JobSpec(
            run=RunRef(run_id, "0", "mlflow-artifacts:/0/x/artifacts", fields.pop("tracking_uri", NOBODY)),
            submission_id=uuid.uuid4().hex,
            project_name="test",
            entry_point=EntryPoint("main", command),
            parameters={},
            snapshot=SnapshotRef(digest, archive.stat().st_size),
            environment=fields.pop("environment", None) or docker_environment(),
            compute="docker",
            options={"image": image, "pull": "missing", "env_cache": "mlflow-remote-test", **_pinned(options)},
            **fields,
        )
        folder.create(spec)
        folder.archive.write_bytes(archive.read_bytes())
        return Job(spec, folder, dict(os.environ if environ is None else environ), secrets, DockerProgram())

    return make


def _pinned(options: Mapping[str, Any]) -> dict[str, Any]:
    """As ``submit`` hands them to the supervisor: with the engine that was checked, whatever its environment says."""
    return {**options, "endpoint": dataclasses.asdict(Endpoint.from_options(options, os.environ))}


def docker_environment() -> Any:
    from mlflow_remote_backend.job import EnvironmentRef

    return EnvironmentRef("docker")


def _archive(tmp_path: Path, files: Mapping[str, str | bytes]) -> tuple[Path, str]:
    from mlflow_remote_backend import snapshot
    from mlflow_remote_backend.config import SnapshotOptions

    project = tmp_path / f"project-{uuid.uuid4().hex[:8]}"
    for name, content in {"MLproject": "name: test\n", **files}.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(content.encode() if isinstance(content, str) else content)
    packed = snapshot.build(snapshot.scan(project, SnapshotOptions(), []), tmp_path)
    return packed.path, packed.digest
