"""What every place that runs deployments must be able to do: its verbs and their contract.

A target is stateless but for connections: what it needs to know of a deployment stands where the deployment is (a
folder of this machine, a container, the cluster's objects), so any client that reaches the place can look after it.

1.  ``render`` is pure: what would be created, as plain data without a secret.
2.  ``check`` creates nothing. It raises before anything exists if the deployment could never run.
3.  ``apply`` makes revision 1, or replaces the one that serves by the order's. It blocks until the new revision has
    answered a real request, showing progress and the server's log to the watcher. If it fails (DeploymentFailed, with
    the log's tail), or is interrupted, what served before still serves; of a revision 1 nothing is left. A name that
    is taken raises RequestError and touches nothing.
4.  ``status`` and ``statuses`` never guess: a place out of reach raises a transient ComputeError.
5.  ``logs`` yields the servers' bytes; with ``follow`` until the deployment is gone.
6.  ``call`` hands one request to the server, from wherever the client is, and returns its answer whatever its status.
7.  ``delete`` leaves nothing. Idempotent. ``abandoned`` only tells.
8.  ``sweep`` removes what died half-way and is no deployment of its own, and touches nothing that somebody works at.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from ..errors import ConfigError
from .spec import Answer, DeploymentSpec, DeploymentStatus, Order

OURS = {
    "local": "mlflow_remote_backend.deployment.local:LocalTarget",
    "docker": "mlflow_remote_backend.deployment.docker:DockerTarget",
    "kubernetes": "mlflow_remote_backend.deployment.kubernetes.target:KubernetesTarget",
}


class Watcher(Protocol):
    """Whoever waits for a rollout."""

    def say(self, line: str) -> None: ...

    def log(self, data: bytes) -> None:
        """What the new server wrote."""
        ...


class Target(Protocol):
    """The verbs; see the module's numbered contract."""

    name: str

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Target:
        """The target with its own section of the config. Connects to nothing."""
        ...

    def render(self, spec: DeploymentSpec) -> dict[str, Any]: ...

    def check(self, spec: DeploymentSpec) -> Sequence[str]: ...

    def apply(self, order: Order, watcher: Watcher) -> DeploymentStatus: ...

    def status(self, name: str) -> DeploymentStatus | None:
        """None: there is no such deployment."""
        ...

    def statuses(self) -> list[DeploymentStatus]: ...

    def logs(self, name: str, *, follow: bool = False, tail: int | None = None) -> Iterator[bytes]: ...

    def call(self, name: str, path: str, body: bytes, content_type: str, timeout_s: float) -> Answer: ...

    def delete(self, name: str) -> None: ...

    def abandoned(self, older_than_s: float) -> list[str]:
        """Names of what never served and never will: for ``gc``, which deletes them."""
        ...

    def sweep(self, older_than_s: float, *, dry_run: bool) -> Iterator[str]:
        """Remove, or only tell, what killed creates and updates left beside deployments; what each was, for ``gc``."""
        ...


def from_options(compute: str, options: Mapping[str, Any]) -> Target:
    """The target called ``compute``. Its module is imported here, and connects to nothing yet."""
    if compute not in OURS:
        raise ConfigError(
            f"Models cannot be deployed to the compute {compute!r}.", key="compute", hint=f"Known: {', '.join(OURS)}."
        )
    module, _, attribute = OURS[compute].partition(":")
    target: Target = getattr(importlib.import_module(module), attribute).from_options(options)
    return target
