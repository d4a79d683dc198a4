"""The run, as the runner writes it: the runner's only MlflowClient user. Imports MLflow when first used, not before.

Every failure becomes a :class:`RecordError` that says what kind of trouble it is, so that callers need no knowledge of
MLflow, requests, SQLAlchemy or an object store. One call takes at most some tens of seconds; patience is the caller's
(:func:`persist`): MLflow's own retries would block a call for four minutes.

Safe in a process that was forked from one that used MLflow: MLflow keeps one HTTP session per process id, and database
connections of another process are put aside here (SQLAlchemy, "Using Connection Pools with Multiprocessing or
os.fork()"). Clients of object stores (S3 and others) are not covered: fork only where artifacts are files or go
through the tracking server (:func:`survives_fork`).
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import TrackingError
from ..job import RunRef
from .call_limits import limited

PREFIX = "mlflow_remote."
MAX_TAG_CHARS = 5000  # the smallest limit of servers in use (MLflow 2.x); 8000 since MLflow 3
MAX_WORDS_CHARS = 1000
CALL_TIMEOUT_S = 30  # one request, until the first byte of its answer
CALL_RETRIES = 1  # mends a connection that the server closed while it was idle
UPLOAD_BYTES_PER_S = 1 << 20  # a file may take a second per MiB longer: the server answers when it has stored it
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0

T = TypeVar("T")


class Trouble(enum.Enum):
    """Who can mend a failed call."""

    # Time: network, 5xx, 429, a locked database, a full disk, a server that does not know the run (it may have been
    # started with another database), and whatever we do not know.
    AWAY = "away"
    AUTH = "auth"  # new credentials: 401, 403
    TOO_LARGE = "too large"  # smaller pieces: 413
    GONE = "gone"  # nobody: the run was deleted
    REFUSED = "refused"  # nobody: this very request is wrong


class RecordError(TrackingError):
    """A call to the tracking server or artifact store failed; ``trouble`` says how."""

    def __init__(self, what: str, trouble: Trouble, words: str) -> None:
        code = "TRACKING_AUTH" if trouble is Trouble.AUTH else "TRACKING_UNREACHABLE"
        super().__init__(what, words=words, code=code, transient=trouble in (Trouble.AWAY, Trouble.AUTH))
        self.trouble = trouble


@dataclass(frozen=True)
class RunLook:
    """The run as it is now. ``tags`` without their prefix ``mlflow_remote.``: only ours. ``created_at``: seconds since
    1970, by the clock of the machine that created it."""

    status: str
    deleted: bool
    tags: Mapping[str, str] = field(repr=False)
    metrics: Mapping[str, float] = field(default_factory=dict, repr=False)
    created_at: float | None = None


class RunRecord:
    """The door to one run. Cheap to make; thread-safe. Every method raises RecordError and nothing else."""

    def __init__(self, run: RunRef) -> None:
        self.run = run
        self._client: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is held that must be given back; MLflow's connections go with the process."""

    def load(self) -> None:
        """Import MLflow now, which takes seconds, rather than in the first call."""
        self._connect()

    def _connect(self) -> Any:
        with self._lock:  # two threads must not import MLflow at once: its modules import each other
            if self._client is None:
                from mlflow import MlflowClient

                put_foreign_connections_aside()
                self._client = MlflowClient(tracking_uri=self.run.tracking_uri or None)
            return self._client

    def _call(
        self,
        doing: str,
        action: Callable[[Any], T],
        timeout_s: int = CALL_TIMEOUT_S,
        retries: int = CALL_RETRIES,
    ) -> T:
        with limited(timeout_s, retries):
            try:
                return action(self._connect())
            except RecordError:
                raise
            except Exception as error:
                trouble = trouble_of(error)
                raise RecordError(f"MLflow: {doing} failed ({trouble.value}).", trouble, words_of(error)) from error

    # -- the run itself

    def look(self) -> RunLook:
        run = self._call("reading the run", lambda client: client.get_run(self.run.run_id))
        tags = {key[len(PREFIX) :]: value for key, value in run.data.tags.items() if key.startswith(PREFIX)}
        created_at = run.info.start_time / 1000 if run.info.start_time else None
        deleted = run.info.lifecycle_stage == "deleted"
        return RunLook(run.info.status, deleted, tags, dict(run.data.metrics), created_at)

    def log(self, tags: Mapping[str, str] = {}, metrics: Mapping[str, float] = {}) -> None:
        """Set tags (ours, names without prefix; a long value is cut) and log metrics (full names), in one request."""

        def log(client: Any) -> None:
            from mlflow.entities import Metric, RunTag

            now_ms = int(time.time() * 1000)
            run_tags = [RunTag(PREFIX + key, cut(value, MAX_TAG_CHARS)) for key, value in tags.items()]
            run_metrics = [Metric(key, value, now_ms, 0) for key, value in metrics.items()]
            client.log_batch(self.run.run_id, metrics=run_metrics, tags=run_tags)

        self._call("setting tags", log)

    def end(self, status: str) -> None:
        """Write the terminal status over whatever is there."""
        self._call("ending the run", lambda client: client.set_terminated(self.run.run_id, status))

    # -- artifacts

    def upload_file(self, path: Path, folder: str, name: str = "") -> None:
        """Store the file in the artifact folder, over an older one, as ``name`` or as it is called. Raises OSError too:
        the file cannot be read."""
        with open(path, "rb") as file:  # MLflow's words for a file that vanished would look like a server's
            size = os.fstat(file.fileno()).st_size
        if name and name != path.name:
            with tempfile.TemporaryDirectory(prefix="mlflow-remote-") as scratch:
                renamed = Path(scratch, name)  # MLflow takes the name from the path
                renamed.symlink_to(path.absolute())
                self.upload_file(renamed, folder)
            return
        self._call(
            f"uploading {folder}/{path.name} ({size} bytes)",
            lambda client: client.log_artifact(self.run.run_id, str(path), folder),
            timeout_s=CALL_TIMEOUT_S + size // UPLOAD_BYTES_PER_S,
        )

    def upload(self, data: bytes, name: str) -> None:
        """Store the bytes as the artifact ``name`` (``folder/file``)."""
        folder, _, base = name.rpartition("/")
        with scratch_file(base, lambda file: file.write_bytes(data)) as path:
            self.upload_file(path, folder)

    def download(self, name: str) -> bytes | None:
        """The artifact's bytes; None where there is none of that name."""

        def get(client: Any) -> bytes | None:
            folder = name.rpartition("/")[0]
            if name not in [each.path for each in client.list_artifacts(self.run.run_id, folder)]:
                return None
            with tempfile.TemporaryDirectory(prefix="mlflow-remote-") as scratch:
                return Path(client.download_artifacts(self.run.run_id, name, scratch)).read_bytes()

        return self._call(f"downloading {name}", get)

    # -- the model registry

    def register_model(self, name: str, path: str, *, alias: str, tags: Mapping[str, str]) -> str:
        """Make a version of the registered model ``name`` from what the run logged under ``path``; return its number.

        The model is made where it does not exist. A version that an earlier call made for this run is taken instead.
        """

        def register(client: Any) -> str:
            if not has_model(client, self.run.run_id, self.run.experiment_id, path):
                raise RecordError(f"The run has no model {path!r}.", Trouble.REFUSED, "")
            version = self._registered(client, name) or self._register(name, path, tags)
            if alias:
                client.set_registered_model_alias(name, alias, version)
            return version

        # Repeated by whoever calls, after a look, not by MLflow's HTTP client: it would make a second version after a
        # lost answer.
        return self._call(f"registering model {name!r} from {path!r}", register, retries=0)

    def _registered(self, client: Any, name: str) -> str:
        found = client.search_model_versions(f"run_id = '{self.run.run_id}'")
        ours = (v for v in found if v.name == name and v.tags.get(PREFIX + "run_id") == self.run.run_id)
        return next((str(v.version) for v in ours), "")

    def _register(self, name: str, path: str, tags: Mapping[str, str]) -> str:
        """By the fluent function: it alone finds a model that MLflow 3 keeps beside the run."""
        import mlflow

        mlflow.set_tracking_uri(self.run.tracking_uri)  # the runner's process serves this one run
        uri = f"runs:/{self.run.run_id}/{path}"
        return str(mlflow.register_model(uri, name, await_registration_for=0, tags=dict(tags)).version)


def has_model(client: Any, run_id: str, experiment_id: str, path: str) -> bool:
    """Whether the run logged a model of that name, among its artifacts or beside them as MLflow 3 does. MLflow itself
    would find out only after it has made the registered model."""
    if any(each.path == f"{path}/MLmodel" for each in client.list_artifacts(run_id, path)):
        return True
    wanted = f"source_run_id = '{run_id}'"
    found = client.search_logged_models(experiment_ids=[experiment_id], filter_string=wanted, max_results=100)
    return any(each.name == path for each in found)


@contextlib.contextmanager
def scratch_file(name: str, write: Callable[[Path], object], *places: Path) -> Iterator[Path]:
    """A file of that name that ``write`` fills: in the first of the places, or of temporary ones, that has room."""
    with contextlib.ExitStack() as scratch:
        for place in (*places, None, "/dev/shm"):
            try:
                folder = scratch.enter_context(tempfile.TemporaryDirectory(prefix="mlflow-remote-", dir=place))
                write(Path(folder, name))
                break
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):
                    raise
        else:
            raise OSError(errno.ENOSPC, "No disk has room for a file to upload", name)
        yield Path(folder, name)


# ----------------------------------------------------------------------------------------------------------- patience


class Backoff:
    """How long to pause before trying again: doubling, with full jitter, so that many runs do not come at once."""

    def __init__(self, first_s: float = FIRST_PAUSE_S, longest_s: float = LONGEST_PAUSE_S) -> None:
        self._first_s = self._next_s = first_s
        self._longest_s = longest_s

    def pause_s(self) -> float:
        pause = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(self._next_s * 2, self._longest_s)
        return pause

    def reset(self) -> None:
        self._next_s = self._first_s


def persist(
    action: Callable[[], T],
    until: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Try until it works or ``until`` (of ``clock``) has come. Raises the last RecordError; at once what time, or new
    credentials, cannot mend."""
    backoff = Backoff()
    while True:
        try:
            return action()
        except RecordError as error:
            left = until - clock()
            if not error.transient or left <= 0:
                raise
            sleep(min(backoff.pause_s(), left))


# -------------------------------------------------------------------------------------------------- kinds of trouble

_BY_HTTP_STATUS = {401: Trouble.AUTH, 403: Trouble.AUTH, 407: Trouble.AUTH, 413: Trouble.TOO_LARGE}
_BY_MLFLOW_CODE = {
    "UNAUTHENTICATED": Trouble.AUTH,
    "CUSTOMER_UNAUTHORIZED": Trouble.AUTH,
    "PERMISSION_DENIED": Trouble.AUTH,
    "INVALID_PARAMETER_VALUE": Trouble.REFUSED,
    "BAD_REQUEST": Trouble.REFUSED,
}
_REFUSED_BY_FILE_SYSTEM = frozenset({errno.ENAMETOOLONG, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.EEXIST})
_NOT_ACTIVE = re.compile(r"must be in (?:the )?'active'")  # a deleted run: in a database's words, and in a folder's
_STATUS_IN_TEXT = re.compile(r"failed with error code (\d{3})\b|\b(\d{3}) (?:Client|Server) Error\b")


def trouble_of(error: BaseException) -> Trouble:
    """What kind of trouble an exception of MLflow or of a library below it means. Unknown ones are taken to pass."""
    for each in _chain(error):
        if _NOT_ACTIVE.search(str(each)):
            return Trouble.GONE
        if isinstance(each, OSError) and each.errno in _REFUSED_BY_FILE_SYSTEM:
            return Trouble.REFUSED
        if isinstance(each, ImportError):  # the artifact store's client library is not here, and will not be
            return Trouble.REFUSED
        status = _http_status(each)
        if status is not None:
            if status in _BY_HTTP_STATUS:
                return _BY_HTTP_STATUS[status]
            code = getattr(each, "error_code", "")
            if status in (400, 404) and code in _BY_MLFLOW_CODE:
                return _BY_MLFLOW_CODE[code]
            return Trouble.REFUSED if status in (400, 405, 422) else Trouble.AWAY
        code = getattr(each, "error_code", None)
        if code in _BY_MLFLOW_CODE:
            return _BY_MLFLOW_CODE[code]
    return Trouble.AWAY


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and those it was made from, at most ten."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            return
        yield current
        current = current.__cause__ or current.__context__


def _http_status(error: BaseException) -> int | None:
    """The HTTP status that an exception carries: of requests, of MLflow's text, of botocore, of other stores."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for found in (getattr(response, "status_code", response), getattr(error, "status_code", None)):
        if isinstance(found, int) and 100 <= found < 600:
            return found
    match = _STATUS_IN_TEXT.search(str(error))
    return int(match.group(1) or match.group(2)) if match else None


_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_CREDENTIAL = re.compile(
    r"(?i)\b((?:authorization|x-amz-[a-z-]*(?:signature|token|credential))['\":=\s]+(?:(?:bearer|basic)\s+)?"
    r"|(?:bearer|basic)\s+)[^\s'\",;&]+"
)
_TAG = re.compile(r"<[^>]{1,200}>")


def redact(text: str) -> str:
    """The text without what looks like a credential: user information in URLs, authorization headers."""
    return _CREDENTIAL.sub(r"\1***", _USER_INFO.sub("***@", text))


def words_of(error: BaseException) -> str:
    """The other system's own words, without credentials and markup, cut to a length that a person reads."""
    text = str(getattr(error, "message", "") or error) or type(error).__name__
    return cut(" ".join(redact(_TAG.sub(" ", text)).split()), MAX_WORDS_CHARS)


def cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


# -------------------------------------------------------------------------------------------------------------- forks

_foreign_connections: list[Any] = []  # kept: closing one would act on a file or a session that is its maker's
_listening = False


def put_foreign_connections_aside() -> None:
    """From now on this process, and those forked from it, use no database connection that another process made."""
    global _listening
    if _listening or "sqlalchemy" not in sys.modules:
        return
    from sqlalchemy import event, exc
    from sqlalchemy.pool import Pool

    def connect(connection: Any, record: Any) -> None:
        record.info["pid"] = os.getpid()

    def checkout(connection: Any, record: Any, proxy: Any) -> None:
        if record.info.get("pid") != os.getpid():
            _foreign_connections.append(connection)
            record.dbapi_connection = proxy.dbapi_connection = None
            raise exc.DisconnectionError("The connection was made by another process.")

    event.listen(Pool, "connect", connect)
    event.listen(Pool, "checkout", checkout)
    _listening = True


def survives_fork(tracking_uri: str, artifact_uri: str) -> bool:
    """Whether what MLflow holds open for these two is known to be safe in a forked process."""
    artifacts = artifact_uri.partition(":")[0] if ":" in artifact_uri else "file"
    return not tracking_uri.startswith("databricks") and artifacts in ("file", "mlflow-artifacts", "http", "https")
