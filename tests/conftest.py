"""Fixtures for every test.

Each test runs in an environment of its own: no ``MLFLOW_*`` variable from outside, its own home, state, cache and
temporary folders, which carry a token by which processes that outlive the test are found. Docker's variables stay, and
``KUBECONFIG`` for tests marked ``kubernetes``. The tests never reach for a network, but for those marked ``registry``,
``docker`` or ``kubernetes``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Command
from tracking_server import TrackingServer, copy_database, initialised_database, running_server

pytest.register_assert_rewrite(
    "mlflow_remote_backend.testing", "deployment_contract"
)  # so that its failures show what was compared

TEST_IMAGES = frozenset({"local/shell:1", "local/debian-python:12", "local/python:3.11"})
REQUIRED = frozenset(os.environ.get("MLFLOW_REMOTE_TEST_REQUIRE", "").split())

MakeProject = Callable[..., Path]
MakeServer = Callable[..., TrackingServer]


# ---------------------------------------------------------------------------------------------- isolation


@dataclass(frozen=True)
class Home:
    """The folders a test may dirty, and the token that its processes carry in their environment."""

    folder: Path

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def token(self) -> str:
        return f"MLFLOW_REMOTE_TEST_HOME={self.folder}"

    def processes(self) -> dict[int, str]:
        """Processes started by this test that still run, but for pytest itself: pid and command line."""
        return {pid: command for pid, command in _processes(self.token) if pid != os.getpid()}


def _processes(token: str) -> Iterator[tuple[int, str]]:
    """Live processes with ``token`` in their initial environment. Linux only: elsewhere none are found."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if token.encode() in variables and command:  # an empty command line: a zombie, or a kernel thread
                yield int(folder.name), command


@pytest.fixture(autouse=True)
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """The test's own folders, set by environment variables. Whatever process it left is killed at the end."""
    home = Home(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch, _default_hang_up():
        _isolate(patch, home, keep_configuration=request.node.get_closest_marker("registry") is not None)
        if request.node.get_closest_marker("kubernetes") is None:
            patch.delenv("KUBECONFIG", raising=False)  # else gc looks there, and the client keeps the login in files
        yield home
    _forget_mlflow_state()
    for pid in home.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _default_hang_up() -> Iterator[None]:
    """Under ``nohup`` SIGHUP is ignored, by children too, and a shell cannot trap what was ignored when it started."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def _isolate(patch: pytest.MonkeyPatch, home: Home, *, keep_configuration: bool) -> None:
    for name in [n for n in os.environ if n.startswith(("MLFLOW_", "KUBE_MLFLOW_"))]:
        patch.delenv(name)
    for name, folder in {"XDG_STATE_HOME": home.state, "XDG_CACHE_HOME": home.cache, "TMPDIR": home.temporary}.items():
        folder.mkdir()
        patch.setenv(name, str(folder))
    patch.setattr(tempfile, "tempdir", None)  # tempfile remembers the folder it chose first
    if not keep_configuration:  # how pip and uv reach their index stands in the caller's configuration
        patch.setenv("HOME", str(home.folder))
        patch.setenv("XDG_CONFIG_HOME", str(home.folder / "config"))
    patch.setenv("XDG_DATA_HOME", str(home.folder / "data"))
    patch.setenv("MLFLOW_REMOTE_TEST_HOME", str(home.folder))
    patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    patch.setenv("MPLBACKEND", "Agg")
    patch.setenv("PATH", os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    for who in ("AUTHOR", "COMMITTER"):
        patch.setenv(f"GIT_{who}_NAME", "Test")
        patch.setenv(f"GIT_{who}_EMAIL", "test@example.com")


def _forget_mlflow_state() -> None:
    """Ends what a test left active in MLflow's globals. Does nothing where MLflow was never imported."""
    if "mlflow" not in sys.modules:
        return
    import mlflow

    while mlflow.active_run() is not None:
        mlflow.end_run()


@pytest.fixture
def no_leftovers(home: Home) -> Iterator[None]:
    """Fails the test if within 30 s after it a process of it still runs, or its temporary folder is not empty."""
    yield
    deadline = time.monotonic() + 30
    while (leftovers := _leftovers(home)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not leftovers, "left behind:\n" + "\n".join(leftovers)


def _leftovers(home: Home) -> list[str]:
    processes = [f"process {pid}: {command}" for pid, command in home.processes().items()]
    return processes + [f"temporary {path}" for path in home.temporary.iterdir()]


# ---------------------------------------------------------------------------------------------- what tests need


@functools.cache
def missing(need: str) -> str:
    """Why tests marked ``need`` cannot run here; empty where they can. Looked at once."""
    try:
        return {"docker": _no_engine, "kubernetes": _no_cluster, "registry": _no_index}[need]()
    except Exception as error:  # noqa: BLE001  whatever these clients raise is the reason
        return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


def _no_engine() -> str:
    import docker

    client = docker.from_env(timeout=10)
    try:
        client.ping()
        names = {tag for image in client.images.list() for tag in image.tags}
    finally:
        client.close()
    absent = ", ".join(sorted(TEST_IMAGES - names))
    return f"images are missing ({absent}): .ci/images makes them" if absent else ""


def _no_cluster() -> str:
    if not os.environ.get("KUBECONFIG"):
        return "KUBECONFIG is not set"
    from mlflow_remote_backend.compute.kubernetes.api import Api

    Api.open().get("/version", patience_s=0.0)
    return ""


def _no_index() -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "wheel"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return "" if result.returncode == 0 else f"pip reaches no index: {result.stderr.strip()}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test that needs what is not there; fails it where MLFLOW_REMOTE_TEST_REQUIRE says that it must be."""
    for need in ("docker", "kubernetes", "registry"):
        if item.get_closest_marker(need) is None or not (reason := missing(need)):
            continue
        if need in REQUIRED:
            pytest.fail(f"{need} is required here: {reason}", pytrace=False)
        pytest.skip(f"no {need}: {reason}")


# ---------------------------------------------------------------------------------------------- tracking


@pytest.fixture(scope="session")
def database_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised, empty MLflow database, to copy: making one takes seconds."""
    return initialised_database(tmp_path_factory.mktemp("template") / "mlflow.db")


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory: pytest.TempPathFactory, database_template: Path) -> Iterator[TrackingServer]:
    """A real MLflow server for the whole session. Never stop it: for outages there is ``make_tracking_server``."""
    with running_server(tmp_path_factory.mktemp("server"), database_template) as server:
        yield server


@pytest.fixture
def make_tracking_server(tmp_path: Path, database_template: Path) -> Iterator[MakeServer]:
    """``make_tracking_server(host=…, options=…, env=…)``: a server of the test's own, to stop, kill, freeze."""
    with contextlib.ExitStack() as stack:
        made: list[TrackingServer] = []

        def make(**options: Any) -> TrackingServer:
            folder = tmp_path / f"server-{len(made)}"
            made.append(stack.enter_context(running_server(folder, database_template, **options)))
            return made[-1]

        yield make


@pytest.fixture
def tracking(tracking_server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The session's server as this process's and its children's tracking URI, in an experiment of the test's own."""
    import mlflow

    experiment = f"test-{time.time_ns()}"
    with _tracking_uri(tracking_server.url, monkeypatch):
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", mlflow.MlflowClient().create_experiment(experiment))
        yield tracking_server.url


@pytest.fixture
def sqlite_tracking(tmp_path: Path, database_template: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An SQLite store in ``tmp_path/store`` with artifacts in ``tmp_path/store/artifacts``; no server."""
    store = tmp_path / "store"
    store.mkdir()
    database = copy_database(database_template, store / "mlflow.db", str(store / "artifacts"))
    with _tracking_uri(f"sqlite:///{database}", monkeypatch) as uri:
        yield uri


@contextlib.contextmanager
def _tracking_uri(uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    try:
        yield uri
    finally:
        mlflow.set_tracking_uri("")  # back to what the environment says


# ---------------------------------------------------------------------------------------------- projects


@pytest.fixture
def make_project(tmp_path: Path) -> MakeProject:
    """``make_project(command="python main.py", files={"main.py": "…"}, parameters={"alpha": 1.0}, …)`` -> its folder.

    ``files``: relative path -> text or bytes. ``parameters``: as MLproject has them. ``entry_points``: more of them,
    name -> command or mapping. Everything else goes into MLproject as it is.
    """

    def make(
        command: str = "python main.py",
        *,
        name: str = "project",
        files: Mapping[str, str | bytes] = {},
        parameters: Mapping[str, Any] = {},
        entry_points: Mapping[str, Any] = {},
        folder: Path | None = None,
        **mlproject: Any,
    ) -> Path:
        project = folder or tmp_path / name
        main = {"parameters": dict(parameters), "command": command}
        points = {"main": main} | {k: v if isinstance(v, Mapping) else {"command": v} for k, v in entry_points.items()}
        document = {"name": name, **mlproject, "entry_points": points}
        write_files(project, {"MLproject": yaml.safe_dump(document, sort_keys=False), **files})
        return project

    return make


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)


# ---------------------------------------------------------------------------------------------- commands


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """An empty folder for commands to run in, so that a stray ``mlflow.db`` is seen and not left in the checkout."""
    folder = tmp_path / "workdir"
    folder.mkdir()
    return folder


@pytest.fixture
def mlflow_command(workdir: Path) -> Command:
    """The ``mlflow`` command: ``mlflow_command("run", project, "--backend", "remote")`` -> CompletedProcess."""
    return Command((sys.executable, "-m", "mlflow"), workdir)


@pytest.fixture
def mlflow_run(mlflow_command: Command) -> Command:
    """``mlflow_run(project, "--backend", "remote")``: ``mlflow run`` with ``--env-manager local``."""
    return Command((*mlflow_command.program, "run", "--env-manager", "local"), mlflow_command.folder)


@pytest.fixture
def mlflow_remote(workdir: Path) -> Command:
    """The ``mlflow-remote`` command."""
    return Command((sys.executable, "-m", "mlflow_remote_backend.cli"), workdir)


@pytest.fixture
def until() -> Callable[..., Any]:
    """``until(lambda: condition, timeout_s=30)``: polls until it is true and returns its value; else the test fails."""

    def poll(condition: Callable[[], Any], timeout_s: float = 30, *, what: str = "") -> Any:
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"not within {timeout_s} s: {what or condition}")
            time.sleep(0.02)
        return value

    return poll
