"""The exceptions of this package, sorted by who can mend them. Imports nothing of MLflow.

    RemoteError
    ├── RequestError            the caller's request is wrong; nothing was created
    │   ├── ConfigError         a key or a value of backend_config
    │   ├── ProjectError        the project, its MLproject file or its parameters
    │   ├── SnapshotError       the project folder cannot or must not be packed
    │   └── EnvironmentError_   the declared environment cannot be locked
    ├── ServiceError            another system refused or did not answer (``transient``: worth trying again)
    │   ├── TrackingError       the MLflow tracking server or artifact store
    │   └── ComputeError        the place that runs jobs: this machine, Docker, Kubernetes
    ├── JobError                our part inside the job failed before the program started
    ├── RunFailed               the run ended, and not as FINISHED
    ├── DeploymentFailed        a deployment, or its new version, did not come up
    └── Detached                nobody watches any more; the run goes on

Each message has three parts: what happened and to what, the other system's own words, and what to do next.
At the border to MLflow (``backend.py``, ``submitted_run.py``) each becomes an ``mlflow.exceptions.ExecutionException``
with the same text, code and cause, because MLflow's command turns only that one into a clean exit; for deployments
(``deployment/client.py``) an ``MlflowException``, which their interface asks for.
"""

from __future__ import annotations


class RemoteError(Exception):
    """Base of all errors of this package.

    ``what``: what happened, and to what. ``words``: the other system's own words, verbatim but for credentials.
    ``hint``: what to do next. ``code``: stable and machine-readable, a :class:`~mlflow_remote_backend.job.Reason`
    name where the error ends a run.
    """

    code = "ERROR"

    def __init__(self, what: str, *, words: str = "", hint: str = "", code: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.words = words.strip()
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        parts = [self.what]
        if self.words:
            parts.append(self.words)
        if self.hint:
            parts.append(self.hint)
        return "\n".join(parts)


class RequestError(RemoteError):
    """The caller's request is wrong. Raised before anything is created."""

    code = "BAD_REQUEST"


class ConfigError(RequestError):
    """A key or a value in ``backend_config`` or ``mlflow-remote.yaml``. ``key``: dotted path of the offender."""

    code = "BAD_CONFIG"

    def __init__(self, what: str, *, key: str = "", words: str = "", hint: str = "") -> None:
        super().__init__(what, words=words, hint=hint)
        self.key = key


class ProjectError(RequestError):
    """The project, its MLproject file, its entry point or a parameter."""

    code = "BAD_PROJECT"


class SnapshotError(RequestError):
    """The project folder cannot be packed, or must not be (secrets, size)."""

    code = "BAD_SNAPSHOT"


class EnvironmentError_(RequestError):
    """The declared environment cannot be locked for the target platform."""

    code = "ENVIRONMENT"


class ServiceError(RemoteError):
    """Another system refused or did not answer. ``transient``: the same call may succeed later."""

    code = "SERVICE"

    def __init__(
        self, what: str, *, words: str = "", hint: str = "", code: str | None = None, transient: bool = False
    ) -> None:
        super().__init__(what, words=words, hint=hint, code=code)
        self.transient = transient


class TrackingError(ServiceError):
    """The MLflow tracking server or the artifact store."""

    code = "TRACKING_UNREACHABLE"


class ComputeError(ServiceError):
    """The place that runs jobs refused, or is out of reach."""

    code = "COMPUTE"


class JobError(RemoteError):
    """Our part inside the job failed before the program started. ``code`` is the run's reason."""

    code = "BOOTSTRAP"


class RunFailed(RemoteError):
    """The run ended, and not as FINISHED. ``tail``: the last lines of its log; ``exit_code``: of the entry point."""

    code = "USER_ERROR"

    def __init__(
        self,
        what: str,
        *,
        words: str = "",
        hint: str = "",
        code: str | None = None,
        run_id: str = "",
        exit_code: int | None = None,
        tail: str = "",
    ) -> None:
        super().__init__(what, words=words, hint=hint, code=code)
        self.run_id = run_id
        self.exit_code = exit_code
        self.tail = tail


class DeploymentFailed(RemoteError):
    """A deployment, or its new version, did not come up. What served before still serves. ``code``: a Reason name."""

    code = "USER_ERROR"


class Detached(RemoteError):
    """Nobody watches any more, by wish or because contact was lost. The run goes on."""

    code = "DETACHED"
