"""MLflow's surface: what ``mlflow run --backend remote`` and ``mlflow.projects.run(backend="remote")`` call.

MLflow's command runs every plugin asynchronously and exits as soon as ``run`` returns (mlflow: cli, run). So under it
this backend waits by itself, shows the log, and makes the exit status the run's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from mlflow.projects.backend.abstract_backend import AbstractBackend

from . import submission
from .config import BackendConfig, CliContext
from .errors import Detached, RemoteError
from .follow import stderr_line
from .submission import Order, Plan, Submission
from .submitted_run import RemoteSubmittedRun, for_mlflow

EXIT_DETACHED = 3
EXIT_INTERRUPTED = 130


class RemoteBackend(AbstractBackend):  # type: ignore[misc]
    """The entry point ``remote`` of ``mlflow.project_backend``."""

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: Mapping[str, Any] | None,
        version: str | None,
        backend_config: Any,
        tracking_uri: str,
        experiment_id: str,
    ) -> RemoteSubmittedRun:
        """Submit the project. Blocks until the job exists; until it has ended where nobody else will wait for it.

        Raises ExecutionException; under the ``mlflow`` command SystemExit 3 on a detach and 130 on Ctrl-C.
        """
        cli = cli_context()
        order = Order(
            project_uri, entry_point, params or {}, version, backend_config, tracking_uri, str(experiment_id), cli
        )
        try:
            submitted = submission.submit(order, stderr_line)
        except RemoteError as error:
            raise for_mlflow(error) from error
        except KeyboardInterrupt:
            if cli is None:
                raise
            stderr_line("cancelled before the job existed")
            raise SystemExit(EXIT_INTERRUPTED) from None
        run = submitted_run(submitted)
        if submitted.config.stream_output or cli is not None:
            stderr_line(f"run {run.run_id} ({where(submitted)})")
        if _must_wait(submitted.config, cli):
            _wait(run, submitted)
        return run


def submitted_run(submitted: Submission) -> RemoteSubmittedRun:
    config = submitted.config
    return RemoteSubmittedRun(
        submitted.tracking,
        submitted.run.run_id,
        submitted.compute,
        submitted.handle,
        stream_output=config.stream_output,
        on_interrupt=config.on_interrupt,
        grace_period_s=config.limits.grace_period_s,
        raises=bool(config.synchronous),
    )


def cli_context() -> CliContext | None:
    """What only ``mlflow run``'s command line knows: it hands neither --run-id nor --run-name to a plugin.

    None unless the root command of click's context is MLflow's own: another click program that calls
    ``mlflow.projects.run`` is not the ``mlflow`` command.
    """
    mlflow_cli = sys.modules.get("mlflow.cli")
    if mlflow_cli is None:
        return None
    import click

    context = click.get_current_context(silent=True)
    if context is None or context.find_root().command is not mlflow_cli.cli:
        return None
    return CliContext(run_id=context.params.get("run_id"), run_name=context.params.get("run_name"))


def _must_wait(config: BackendConfig, cli: CliContext | None) -> bool:
    if config.wait == "auto":
        return cli is not None
    return bool(config.wait)


def _wait(run: RemoteSubmittedRun, submitted: Submission) -> None:
    try:
        view = run.follow(sys.stdout if submitted.config.stream_output else None)
    except Detached as detached:
        stderr_line(str(detached).replace("\n", " "))
        if cli_context() is None:
            raise for_mlflow(detached) from detached
        raise SystemExit(EXIT_DETACHED) from None
    except RemoteError as error:
        raise for_mlflow(error) from error
    stderr_line(f"run {run.run_id} {view.status}{_reason(view.tag('message'))}")
    if view.status == "FINISHED":
        return
    if view.status == "KILLED" and run.cancelled_here and cli_context() is not None:
        raise SystemExit(EXIT_INTERRUPTED)
    failed = run.failure(view, with_tail=not submitted.config.stream_output)
    raise for_mlflow(failed) from failed


def _reason(message: str) -> str:
    return f": {message}" if message else ""


def where(submitted: Submission) -> str:
    """Where a person finds the run: its page where there is one, else its tracking store and its artifacts."""
    uri = submitted.tracking.uri
    if uri.startswith(("http://", "https://")):
        return f"{uri.rstrip('/')}/#/experiments/{submitted.run.experiment_id}/runs/{submitted.run.run_id}"
    return f"tracked in {uri}, artifacts in {submitted.run.artifact_uri}"


def plan(
    uri: str,
    entry_point: str = "main",
    *,
    parameters: Mapping[str, Any] | None = None,
    version: str | None = None,
    backend_config: Any = None,
    tracking_uri: str | None = None,
    experiment_id: str = "0",
) -> Plan:
    """What ``mlflow.projects.run(uri, …, backend="remote")`` would do, without doing it.

    Locks the environment (into the lock cache), packs the project in a temporary folder, and asks the compute
    whether it would take the job. Blocks meanwhile. Raises RequestError and ServiceError of this package.
    """
    import mlflow

    order = Order(
        uri,
        entry_point,
        parameters or {},
        version,
        backend_config,
        tracking_uri or mlflow.get_tracking_uri(),
        experiment_id,
    )
    return submission.plan(order)
