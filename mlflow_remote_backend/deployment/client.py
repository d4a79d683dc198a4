"""MLflow's surface for deployments: what ``mlflow deployments … -t remote`` and ``get_deploy_client("remote")`` call.

    create_deployment -> config.parse -> model.fetch -> model.environment (locked) -> target.check
                      -> target.apply: the environment materialised, the server started, a real request answered

Nothing exists before ``apply``. Errors of ours become :class:`DeploymentException` here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TextIO
from urllib.parse import unquote, urlsplit

from click import ClickException
from mlflow.deployments import BaseDeploymentClient
from mlflow.exceptions import MlflowException

from .. import submission, submission_folder
from ..display import Terminal, harmless
from ..errors import ComputeError, RemoteError, RequestError
from ..follow import stderr_line
from ..submission import plain
from ..tracking import Tracking
from . import calling, config, kept, looking, model, target
from .config import DeploymentConfig
from .spec import DeploymentSpec, DeploymentStatus, ModelRef, Order, Secrets, described
from .target import Target


class DeploymentException(MlflowException, ClickException):  # type: ignore[misc]
    """An error of ours as MLflow's callers understand it; its command ends with it cleanly. ``code``: ours."""

    exit_code = 1

    def __init__(self, error: RemoteError) -> None:
        MlflowException.__init__(self, str(error))
        self.code = error.code

    def __str__(self) -> str:
        return str(self.message)


@contextlib.contextmanager
def for_mlflow() -> Iterator[None]:
    """Turns our errors into MLflow's."""
    try:
        yield
    except RemoteError as error:
        raise DeploymentException(error) from error


class Screen:
    """Shows a rollout to a person, on stderr."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._terminal = Terminal(out or sys.stderr)
        self._said = ""

    def say(self, line: str) -> None:
        if line != self._said:
            stderr_line(line)
        self._said = line

    def log(self, data: bytes) -> None:
        self._terminal.write(data)


class RemoteDeploymentClient(BaseDeploymentClient):  # type: ignore[misc]
    """Deployments of this package. ``target_uri``: ``remote`` (the compute is the config's, ``local`` by default), or
    ``remote:/NAME`` with ``local``, ``docker`` or a named compute of ``mlflow-remote.yaml``.

    ``create_deployment`` and ``update_deployment`` block until the server has answered a real request. Every method
    raises MlflowException. Not thread-safe.
    """

    def __init__(self, target_uri: str) -> None:
        super().__init__(target_uri)
        parts = urlsplit(target_uri)
        self._compute = unquote((parts.netloc + parts.path).strip("/")) if parts.scheme else ""

    # -- MLflow's interface -------------------------------------------------------------------------------------------

    def create_deployment(
        self,
        name: str,
        model_uri: str,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Serve the model under ``name``. Blocks. Returns what :meth:`get_deployment` returns."""
        with for_mlflow():
            _check_name(name, endpoint)
            return described(create(name, model_uri, flavor, config, compute=self._compute, watcher=Screen()))

    def update_deployment(
        self,
        name: str,
        model_uri: str | None = None,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Another model, or other keys, in place of what is served; what is not said stays. Blocks. The old one serves
        until the new one does, and goes on if that fails."""
        with for_mlflow():
            _check_name(name, endpoint)
            where, status = self._existing(name)
            return described(update(where, status, model_uri, flavor, config, watcher=Screen()))

    def delete_deployment(
        self, name: str, config: Mapping[str, Any] | None = None, endpoint: str | None = None
    ) -> None:
        """Stop and remove it, whole. Idempotent. ``config``: where it is, as far as the target's URI does not say."""
        with for_mlflow():
            _check_name(name, endpoint)
            if self._compute or config:
                _target(self._parsed(config)).delete(name)
                return
            seen = looking.everywhere()
            found = [where for where, status in seen.found if status.name == name]
            if not found and seen.unknown:
                raise ComputeError(
                    f"Whether there is a deployment {name} is not known.",
                    words=" ".join(seen.unknown),
                    hint="Name its place, which is waited for longer: the target remote:/COMPUTE.",
                    transient=True,
                )
            for where in found:
                where.delete(name)

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """All deployments on the target's compute; for ``remote`` alone those of every place that answers."""
        with for_mlflow():
            found = [described(status) for status in self._statuses()]
            return [each for each in found if endpoint is None or each["name"] == endpoint]

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        with for_mlflow():
            _check_name(name, endpoint)
            return described(self._existing(name)[1])

    def predict(self, deployment_name: str | None = None, inputs: Any = None, endpoint: str | None = None) -> Any:
        """MLflow's PredictionsResponse for a DataFrame, an array, a mapping or JSON text. The server checks the inputs
        against the model's signature; its complaint is the exception's message. The token, where the deployment wants
        one, is taken from where the deployment keeps it."""
        with for_mlflow():
            name = deployment_name or endpoint
            if not name:
                raise RequestError("predict needs a deployment's name.")
            _check_name(name, endpoint)
            where, status = self._existing(name)
            if not (status.url or status.replicas_ready):  # a container that hands its port on has none for a moment
                raise ComputeError(f"Deployment {name} is {status.state.value}.", words=status.detail, transient=True)
            timeout_s = status.spec.timeout_s + 5.0
            answer = where.call(name, "/invocations", calling.body_of(inputs), calling.JSON, timeout_s)
            return calling.predictions(answer, name)

    def predict_stream(
        self, deployment_name: str | None = None, inputs: Any = None, endpoint: str | None = None
    ) -> NoReturn:
        _refuse("MLflow's scoring server answers each request whole: there is no stream.", "Use predict.")

    def explain(self, deployment_name: str | None = None, df: Any = None, endpoint: str | None = None) -> NoReturn:
        _refuse(
            "MLflow's scoring server serves predictions, not explanations.",
            "Log an explainer (mlflow.shap.log_explainer) as a model of its own and deploy that.",
        )

    # -- endpoints: a deployment is its own ---------------------------------------------------------------------------

    def create_endpoint(self, name: str, config: Mapping[str, Any] | None = None) -> NoReturn:
        _refuse("Each deployment is its own endpoint here.", f"create_deployment({name!r}, …) makes both.")

    def update_endpoint(self, endpoint: str, config: Mapping[str, Any] | None = None) -> NoReturn:
        _refuse("Each deployment is its own endpoint here.", f"update_deployment({endpoint!r}, …) changes both.")

    def delete_endpoint(self, endpoint: str) -> NoReturn:
        _refuse("Each deployment is its own endpoint here.", f"delete_deployment({endpoint!r}) removes both.")

    def list_endpoints(self) -> list[dict[str, Any]]:
        """The deployments, each of which is its own endpoint."""
        return self.list_deployments()

    def get_endpoint(self, endpoint: str) -> dict[str, Any]:
        return self.get_deployment(endpoint)

    # -- finding ------------------------------------------------------------------------------------------------------

    def _parsed(self, said: Mapping[str, Any] | None) -> DeploymentConfig:
        return config.parse(said, target=self._compute)

    def _statuses(self) -> list[DeploymentStatus]:
        if self._compute:
            return _target(self._parsed(None)).statuses()
        seen = looking.everywhere()
        for sentence in seen.unknown:
            stderr_line(sentence)
        return seen.statuses

    def _existing(self, name: str) -> tuple[Target, DeploymentStatus]:
        """The deployment and where it is. Without a compute in the target's URI, every place is looked at."""
        if not self._compute:
            return looking.find(name)
        where = _target(self._parsed(None))
        status = where.status(name)
        if status is None:
            raise kept.no_such(name, self._compute)
        return where, status


def _target(made: DeploymentConfig) -> Target:
    return target.from_options(made.run.compute, made.run.options())


def _refuse(what: str, hint: str) -> NoReturn:
    raise DeploymentException(RequestError(what, hint=hint))


def _check_name(name: str, endpoint: str | None) -> None:
    config.check_name(name)
    if endpoint not in (None, name):
        raise RequestError(
            f"Deployment {name} cannot stand under an endpoint {endpoint}: each deployment is its own endpoint here.",
            hint="Leave the endpoint out.",
        )


# -- the pipeline ------------------------------------------------------------------------------------------------------


def create(
    name: str,
    model_uri: str,
    flavor: str | None,
    said: Mapping[str, Any] | None,
    *,
    compute: str = "",
    watcher: target.Watcher,
) -> DeploymentStatus:
    """A new deployment; blocks until it answers. Raises RemoteErrors, RequestError before anything exists."""
    config.check_name(name)
    made = config.parse(said, target=compute)
    where = _target(made)
    if where.status(name) is not None:
        raise kept.name_taken(name, where.name)
    now = time.time()
    first = DeploymentSpec(name, ModelRef(model_uri), created_at=now, updated_at=now)
    return _apply(where, first, made, flavor, config.secrets_of(made, os.environ), watcher)


def update(
    where: Target,
    status: DeploymentStatus,
    model_uri: str | None,
    flavor: str | None,
    said: Mapping[str, Any] | None,
    *,
    watcher: target.Watcher,
) -> DeploymentStatus:
    """The next revision; blocks until it answers. Without a model's URI it serves the same version, wherever an alias
    points by now. Secrets that the new config does not name stay as they are."""
    before = status.spec
    if flavor and not model_uri:
        raise RequestError("A flavor is of a model: give its URI as well.")
    named = said or {}
    keeps = not {"pass_env", "token_env"} & set(named)
    base = dict(before.config)
    if keeps:  # their values are where the deployment is, perhaps not here
        base = {key: value for key, value in base.items() if key not in ("pass_env", "token_env")}
    made = config.parse(named, target=before.compute_name or before.compute, before=base)
    secrets = None if keeps else config.secrets_of(made, os.environ)
    if keeps:
        held = {key: before.config[key] for key in ("pass_env", "token_env") if key in before.config}
        made = dataclasses.replace(made, raw={**made.raw, **held})
    served = ModelRef(model_uri) if model_uri else before.model
    following = dataclasses.replace(before, model=served, revision=before.revision + 1, updated_at=time.time())
    return _apply(where, following, made, flavor, secrets, watcher)


def _apply(
    where: Target,
    draft: DeploymentSpec,
    made: DeploymentConfig,
    flavor: str | None,
    secrets: Secrets | None,
    watcher: target.Watcher,
) -> DeploymentStatus:
    import mlflow

    tracking = Tracking(mlflow.get_tracking_uri())
    model_uri = draft.model.source or draft.model.uri
    with submission_folder.opened() as own:  # removed by whoever comes next, should this process be killed
        watcher.say(f"fetching model {harmless(model_uri)}")
        folder, found = model.fetch(model_uri, own.scratch, tracking, flavor)
        found = dataclasses.replace(found, uri=draft.model.uri)
        locked = model.environment(folder, made.run, watcher.say)
        spec = describe(draft, made, found, locked, secrets, tracking.uri)
        for notice in where.check(spec):
            watcher.say(notice)
        credentials = submission.secrets_of(made.run, os.environ, locked).runner
        status = where.apply(Order(spec, folder, secrets, credentials), watcher)
    watcher.say(f"deployment {spec.name} answers at {status.url}/invocations")
    return status


def describe(
    draft: DeploymentSpec,
    made: DeploymentConfig,
    found: Any,
    locked: Any,
    secrets: Secrets | None,
    tracking_uri: str,
) -> DeploymentSpec:
    """All of it in one frozen value. Pure. ``draft``: name, revision and times; ``tracking_uri``: the caller's."""
    run = made.run
    return dataclasses.replace(
        draft,
        model=found,
        tracking_uri=(run.tracking_uri or tracking_uri) if run.compute == "kubernetes" else "",
        environment=locked,
        compute=run.compute,
        compute_name=run.compute_name,
        workers=made.workers,
        timeout_s=max(1, round(made.timeout_s)),
        start_timeout_s=run.limits.start_timeout_s,
        image_pull_timeout_s=run.limits.image_pull_timeout_s,
        grace_period_s=run.limits.grace_period_s,
        replicas=made.replicas,
        autoscale=made.autoscale,
        service=made.service,
        ingress=made.ingress,
        resources=run.resources,
        env_vars=run.env_vars,
        secret_names=tuple(sorted(secrets.env)) if secrets else draft.secret_names,
        secret_refs=plain(run.secrets),
        guarded=bool(secrets.token) if secrets else draft.guarded,
        labels=run.labels,
        annotations=run.annotations,
        tags=made.tags,
        description=made.description,
        config=made.raw,
        options=run.options(),
    )


def run_local(
    name: str, model_uri: str, flavor: str | None = None, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``mlflow deployments run-local``: the same as creating a deployment on the compute ``local``."""
    with for_mlflow():
        return described(create(name, model_uri, flavor, config, compute="local", watcher=Screen()))


def target_help() -> str:
    """What ``mlflow deployments help -t remote`` prints."""
    return f"""Deploys models as web services: to this machine, to a Docker engine, or to a Kubernetes cluster.

Target URI: remote (the config's compute; local by default), or remote:/NAME with local, docker, or a compute that
mlflow-remote.yaml names.

  mlflow deployments create -t remote -m models:/diabetes/1 --name diabetes -C compute=docker
  mlflow deployments create -t remote:/docker -m runs:/RUN/model --name diabetes -C resources.memory=2Gi -C workers=2
  mlflow deployments update -t remote --name diabetes -m models:/diabetes/2
  mlflow deployments delete -t remote:/docker --name diabetes

{config.help_text()}

-C takes text: nested keys with dots (-C resources.memory=2Gi), or JSON (-C 'service={{"port": 8080}}').
"""
