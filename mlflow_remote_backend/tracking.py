"""MLflow's tracking server, as the submitter and later processes use it: the only MlflowClient outside the runner.

Every failure becomes a TrackingError in the server's own words. Nothing here waits for MLflow's default of four
minutes: calls are bounded by CALL_TIMEOUT_S and CALL_RETRIES, which only apply while one of our calls runs.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .errors import RequestError, TrackingError
from .job import Diagnosis, Phase, Reason, RunRef, final_status
from .project import redact_url
from .runner.call_limits import limited
from .runner.parts import INDEX, Part, load_index
from .runner.record import Trouble, has_model, trouble_of, words_of

PREFIX = "mlflow_remote."
ERROR = "logs/error.txt"
TERMINAL = frozenset({"FINISHED", "FAILED", "KILLED"})
CALL_TIMEOUT_S = 10
CALL_RETRIES = 2
LATE_ANSWER_S = 1.0  # for a server to finish what it has not answered in time
FETCH_TIMEOUT_S = 120  # without a byte, while a model is downloaded
PREFLIGHT_S = 12.0  # a server that is down is told within 15 s
MAX_TAG_CHARS = 5000  # the smallest limit of the servers in use (MLflow 2.x)
MAX_PARAM_CHARS = 6000  # MLflow: utils/validation.py; 500 before 2.0
PARAMS_PER_CALL = 100
HELD_S = 20.0  # somebody may delete the run that holds a snapshot
_HELD: dict[tuple[str, str, str], tuple[float, tuple[str, str]]] = {}

T = TypeVar("T")


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model. ``tags``: its own, among them ours that say where it came from."""

    name: str
    version: str
    run_id: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class RunView:
    """What MLflow knows of a run. Times are milliseconds since the epoch, as MLflow has them."""

    run_id: str
    experiment_id: str
    name: str
    status: str
    artifact_uri: str
    start_time_ms: int | None
    end_time_ms: int | None
    tags: Mapping[str, str] = field(repr=False)
    params: Mapping[str, str] = field(repr=False)
    metrics: Mapping[str, float] = field(repr=False)
    deleted: bool = False

    def tag(self, name: str) -> str:
        """The value of ``mlflow_remote.<name>``, empty where it is not set."""
        return self.tags.get(PREFIX + name, "")

    @property
    def ended(self) -> bool:
        """The run has its one final status. A terminal status without the tag is only what the user's code wrote."""
        return self.status in TERMINAL and bool(self.tag("finalized"))


def absolute_uri(uri: str) -> str:
    """The tracking URI with a relative sqlite file or folder made absolute; others unchanged."""
    for scheme in ("sqlite:///",):
        if uri.startswith(scheme) and not uri.startswith(scheme + "/"):
            return scheme + os.path.abspath(uri[len(scheme) :])
    if "://" in uri or uri.startswith(("file:", "databricks", "uc:")):
        return uri
    return Path(os.path.abspath(uri)).as_uri()


def local_stores(tracking_uri: str, artifact_uri: str = "") -> list[Path]:
    """Files and folders of this machine where tracking data lies: never part of a snapshot."""
    found = []
    for uri in (tracking_uri, artifact_uri):
        scheme, _, path = uri.partition("://")
        if scheme in ("sqlite", "file") and path:
            found.append(Path(path[1:] if scheme == "sqlite" else path).absolute())
        elif uri.startswith("/"):
            found.append(Path(uri))
    return found


class Tracking:
    """One tracking server. Cheap to make; connects when first used. Safe to use from several threads."""

    def __init__(self, uri: str) -> None:
        self.uri = absolute_uri(uri)
        self._client: Any = None

    @property
    def client(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def call(
        self, doing: str, action: Callable[[], T], *, timeout_s: int = CALL_TIMEOUT_S, retries: int = CALL_RETRIES
    ) -> T:
        """Run ``action`` with our time limits. Raises TrackingError: ``doing`` says what was tried."""
        with limited(timeout_s, retries):
            try:
                return action()
            except Exception as error:
                raise self._error(doing, error) from error

    def _error(self, doing: str, error: Exception) -> Exception:
        if isinstance(error, TrackingError):
            return error
        words = words_of(error)
        code = str(getattr(error, "error_code", ""))
        status = getattr(error, "get_http_status_code", lambda: 0)()
        where = f"MLflow at {redact_url(self.uri)}"
        if code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return RequestError(f"{where} refused {doing}.", words=words)
        if trouble_of(error) is Trouble.AUTH:
            hint = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
            return TrackingError(f"{where} refused {doing}.", words=words, hint=hint, code="TRACKING_AUTH")
        if not _unanswered(error, words, status):
            return TrackingError(f"{where}: {doing} failed.", words=words)
        hint = "Check the tracking URI (MLFLOW_TRACKING_URI) and that the server runs."
        return TrackingError(f"{where} did not answer: {doing}.", words=words, hint=hint, transient=True)

    def preflight(self, experiment_id: str) -> str:
        """The experiment's artifact location. Raises within PREFLIGHT_S if there is no such server or experiment."""
        if self.uri.startswith(("http://", "https://")):
            self._reachable()
        read = partial(self.client.get_experiment, experiment_id)
        experiment = self.call("reading the experiment", read, timeout_s=4, retries=1)
        return str(experiment.artifact_location)

    def _reachable(self) -> None:
        import requests

        verify: bool | str = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
        if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
            verify = False
        deadline = time.monotonic() + PREFLIGHT_S
        while True:
            try:
                requests.get(self.uri.rstrip("/") + "/health", timeout=(3, 5), verify=verify)
                return
            except requests.RequestException as error:
                if time.monotonic() + 5 > deadline:
                    where = redact_url(self.uri)
                    hint = "Check the tracking URI (MLFLOW_TRACKING_URI) and that the server runs."
                    raise TrackingError(
                        f"MLflow at {where} does not answer.", words=redact_url(str(error)), hint=hint, transient=True
                    ) from error
                time.sleep(0.2)

    # -- opening a run ------------------------------------------------------------------------------------------------

    def open_run(self, experiment_id: str, *, tags: Mapping[str, str], name: str = "") -> RunRef:
        """Create a run with all its tags at once. A lost answer makes no second run; a late one may, which then ends as
        its submitter's death would end it."""
        submission_id = tags[PREFIX + "submission_id"]
        cut = {key: value[:MAX_TAG_CHARS] for key, value in tags.items()}

        def create() -> Any:
            return self.client.create_run(experiment_id, tags=cut, run_name=name or None)

        for attempt in range(CALL_RETRIES + 1):
            try:
                # Repeated by us, not by MLflow's HTTP client: it would make a second run after a lost answer.
                run = self.call("creating the run", create, retries=0)
                break
            except TrackingError as error:
                if not error.transient:
                    raise
                time.sleep(LATE_ANSWER_S)
                found = self.find_submission(experiment_id, submission_id)
                if found is not None:
                    run = self.call("reading the run", partial(self.client.get_run, found.run_id))
                    break
                if attempt == CALL_RETRIES:
                    raise
        return self._ref(run)

    def reuse_run(self, run_id: str, *, tags: Mapping[str, str], params: Mapping[str, str], name: str = "") -> RunRef:
        """Take over a run that exists already. Raises RequestError if it belongs to a job or has ended, or has other
        values of the parameters: then it stays as it is."""
        view = self.view(run_id)
        if view.tag("handle") or view.status in TERMINAL:
            state = f"belongs to the job {view.tag('handle')}" if view.tag("handle") else f"has ended as {view.status}"
            raise RequestError(
                f"Run {run_id} cannot be used for this submission: it {state}.",
                hint="Leave run_id out to get a new run, or give the id of a run that is still open.",
            )
        self.log_params(run_id, params)
        self.set_tags(run_id, {**tags, **({"mlflow.runName": name} if name else {})})
        return self._ref(self.call("reading the run", lambda: self.client.get_run(run_id)))

    def _ref(self, run: Any) -> RunRef:
        return RunRef(run.info.run_id, run.info.experiment_id, run.info.artifact_uri, self.uri)

    def find_submission(self, experiment_id: str, submission_id: str) -> RunView | None:
        """The run of this submission, if one was created already."""
        query = f"tags.`{PREFIX}submission_id` = '{submission_id}'"
        found = self.call("looking for the run", lambda: self.client.search_runs([experiment_id], query, max_results=1))
        return _view(found[0]) if found else None

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        all_params = [Param(key, value[:MAX_PARAM_CHARS]) for key, value in params.items()]
        for start in range(0, len(all_params), PARAMS_PER_CALL):
            batch = all_params[start : start + PARAMS_PER_CALL]
            self.call("logging the parameters", partial(self.client.log_batch, run_id, params=batch))

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        batch = [RunTag(key, value[:MAX_TAG_CHARS]) for key, value in tags.items()]
        self.call("setting tags", lambda: self.client.log_batch(run_id, tags=batch))

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        batch = [Metric(key, value, now_ms, 0) for key, value in metrics.items()]
        self.call("logging metrics", lambda: self.client.log_batch(run_id, metrics=batch))

    # -- artifacts ----------------------------------------------------------------------------------------------------

    def store_file(self, run_id: str, path: Path, folder: str) -> None:
        self.call(f"storing {folder}/{path.name}", lambda: self.client.log_artifact(run_id, str(path), folder))

    def store_text(self, run_id: str, text: str, name: str) -> None:
        self.call(f"storing {name}", lambda: self.client.log_text(run_id, text, name))

    def stored_snapshot(self, experiment_id: str, digest: str, name: str) -> tuple[str, str] | None:
        """Run id and artifact URI of the snapshot archive ``name`` if the experiment holds it already, or None.

        Many submissions of one process ask once: an answer holds for HELD_S.
        """
        key = (self.uri, experiment_id, name)
        asked_at, held = _HELD.get(key, (-HELD_S, ("", "")))
        if time.monotonic() - asked_at < HELD_S:
            return held
        found = self._look_for_snapshot(experiment_id, digest, name)
        if found is not None:
            _HELD[key] = (time.monotonic(), found)
        return found

    def _look_for_snapshot(self, experiment_id: str, digest: str, name: str) -> tuple[str, str] | None:
        query = f"tags.`{PREFIX}snapshot` = '{digest}' and tags.`{PREFIX}snapshot_stored` = 'true'"
        search = partial(self.client.search_runs, [experiment_id], query, max_results=3)
        for run in self.call("looking for snapshots", search):
            for each in self.list_artifacts(run.info.run_id, "snapshot"):
                if Path(each).name == name:
                    return run.info.run_id, f"{run.info.artifact_uri}/{each}"
        return None

    def list_artifacts(self, run_id: str, folder: str) -> list[str]:
        found = self.call("listing artifacts", lambda: self.client.list_artifacts(run_id, folder))
        return [str(each.path) for each in found]

    def read_artifact(self, run_id: str, name: str) -> bytes | None:
        """The artifact's bytes, or None where it does not exist (yet)."""
        folder, _, _ = name.rpartition("/")
        if name not in self.list_artifacts(run_id, folder):
            return None
        with tempfile.TemporaryDirectory() as target:
            path = self.call(f"reading {name}", lambda: self.client.download_artifacts(run_id, name, target))
            return Path(path).read_bytes()

    def log_index(self, run_id: str) -> list[Part]:
        """The parts of the stored log. Empty until the first one is stored, and while the index is being replaced."""
        return load_index(self.read_artifact(run_id, INDEX))

    # -- looking, and ending -------------------------------------------------------------------------------------------

    def view(self, run_id: str) -> RunView:
        """The run now. Where it was finalised and somebody wrote another status since, the right one is put back."""
        run = self.call(f"reading run {run_id}", lambda: self.client.get_run(run_id))
        view = _view(run)
        if view.ended and (run.info.status != view.status or run.data.tags.get(PREFIX + "phase") != Phase.DONE.value):
            with contextlib.suppress(TrackingError, RequestError):
                self.call("ending the run", lambda: self.client.set_terminated(run_id, view.status))
                self.set_tags(run_id, {PREFIX + "phase": Phase.DONE.value})
        return view

    def resolve(self, start: str) -> str:
        """The full run id that starts with ``start``. Raises RequestError: none, or more than one."""
        if len(start) == 32:
            return start
        if not start or not start.isalnum():
            raise RequestError(f"{start!r} is not a run id, nor the start of one.")
        found = [view.run_id for view in self.runs(f"attributes.run_id LIKE '{start}%'")]
        if len(found) == 1:
            return found[0]
        detail = "no run" if not found else f"{len(found)} runs: " + ", ".join(found[:5])
        where = redact_url(self.uri)
        hint = "Give more of its id." if found else "Check the id, and the tracking URI (MLFLOW_TRACKING_URI)."
        raise RequestError(f"{start!r} is the start of {detail} at {where}.", hint=hint)

    def runs(self, query: str = "", limit: int = 200) -> list[RunView]:
        """Runs of this backend in all experiments, newest first."""
        experiments = [each.experiment_id for each in self.call("listing experiments", self.client.search_experiments)]
        query = " and ".join(filter(None, (f"tags.`{PREFIX}submission_id` != ''", query)))
        if not experiments:
            return []

        def search() -> Any:
            return self.client.search_runs(
                experiments, query, max_results=limit, order_by=["attributes.start_time DESC"]
            )

        return [_view(run) for run in self.call("listing runs", search)]

    def finalise(self, run_id: str, diagnosis: Diagnosis, owner: str, *, exit_code: int | None = None) -> None:
        """Write the one final status, on proof that no runner will. Does nothing where it is written already."""
        if self.view(run_id).ended:
            return
        with contextlib.suppress(TrackingError):  # the status matters more than its explanation
            self.store_text(run_id, _error_text(diagnosis), ERROR)
        tags = {**_cause_tags(diagnosis), PREFIX + "phase": Phase.DONE.value}
        if exit_code is not None:
            tags[PREFIX + "exit_code"] = str(exit_code)
        self.set_tags(run_id, tags)
        status = final_status(diagnosis.reason)
        self.call("ending the run", lambda: self.client.set_terminated(run_id, status))
        self.set_tags(run_id, {PREFIX + "finalized": owner})
        self.view(run_id)  # whoever ended it at the same moment for another reason: the reason that stands decides

    def refine(self, view: RunView, diagnosis: Diagnosis) -> None:
        """Tell why an ended run ended better than its runner could. Its status stays; what was said before too."""
        with contextlib.suppress(TrackingError):
            before = (self.read_artifact(view.run_id, ERROR) or b"").decode(errors="replace")
            self.store_text(view.run_id, f"{_error_text(diagnosis)}\nSeen from inside:\n\n{before}", ERROR)
        self.set_tags(view.run_id, _cause_tags(diagnosis))

    def register_model(self, view: RunView, name: str, path: str, tags: Mapping[str, str]) -> Any:
        """A new version of the registered model ``name`` from the run's model or artifact ``path``."""
        import mlflow

        look = partial(has_model, self.client, view.run_id, view.experiment_id, path)
        if not self.call("looking for the model", look):
            raise RequestError(
                f"Run {view.run_id} has no model {path!r}, so none can be registered as {name}.",
                hint="Its program has to log one: mlflow.<flavor>.log_model(…, name=…).",
            )

        def register() -> Any:
            with _tracking_uri(self.uri):
                return mlflow.register_model(f"runs:/{view.run_id}/{path}", name, tags=dict(tags))

        return self.call(f"registering model {name}", register, retries=0)  # a lost answer makes no second version

    # -- models -------------------------------------------------------------------------------------------------------

    def model_version(self, uri: str) -> ModelVersion | None:
        """The version of a registered model that a ``models:/`` URI names, by its number, an alias, a stage or
        ``latest``; None: it names a logged model. Raises RequestError: there is none."""
        from mlflow.store.artifact.utils.models import get_model_name_and_version

        def read() -> Any:
            named = get_model_name_and_version(self.client, uri)
            return self.client.get_model_version(*named) if len(named) == 2 else None

        found = self.call(f"reading model {uri}", read)
        return found and ModelVersion(found.name, str(found.version), found.run_id or "", dict(found.tags))

    def fetch_model(self, uri: str, folder: Path) -> Path:
        """Download the model into ``folder``; where it lies then. Blocks."""
        import mlflow

        def fetch() -> Path:
            with _tracking_uri(self.uri):
                return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))

        return self.call(f"fetching model {redact_url(uri)}", fetch, timeout_s=FETCH_TIMEOUT_S)


def _error_text(diagnosis: Diagnosis) -> str:
    title = f"{diagnosis.reason.value}: {diagnosis.message}"
    return "\n\n".join(filter(None, (title, diagnosis.words, diagnosis.hint))) + "\n"


def _cause_tags(diagnosis: Diagnosis) -> dict[str, str]:
    message = " ".join(filter(None, (diagnosis.message, diagnosis.words)))
    return {PREFIX + "reason": diagnosis.reason.value, PREFIX + "message": message}


def _view(run: Any) -> RunView:
    """Once a run is finalised its reason decides: MLflow compares nothing before it sets a status."""
    info, tags = run.info, run.data.tags
    reason = tags.get(PREFIX + "reason", "")
    decided = bool(tags.get(PREFIX + "finalized")) and reason in Reason.__members__
    return RunView(
        info.run_id,
        info.experiment_id,
        info.run_name or "",
        final_status(Reason[reason]) if decided else info.status,
        info.artifact_uri,
        info.start_time,
        info.end_time,
        dict(run.data.tags),
        dict(run.data.params),
        dict(run.data.metrics),
        info.lifecycle_stage == "deleted",
    )


@contextlib.contextmanager
def _tracking_uri(uri: str) -> Iterator[None]:
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


_UNANSWERED = ("Max retries", "onnection", "timed out", "Timeout", "too many 5", "database is locked", "unable to open")


def _unanswered(error: BaseException, words: str, status: int) -> bool:
    """Whether the server was away, slow or overloaded, rather than of another opinion."""
    import requests

    chain: list[BaseException] = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
    network = any(isinstance(each, (requests.RequestException, OSError)) for each in chain)
    return network or any(each in words for each in _UNANSWERED) or status in (429, 502, 503, 504)
