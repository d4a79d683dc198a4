"""A namespace of a test's own, and what kubectl would be used for in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from tracking_server import TrackingServer

from mlflow_remote_backend.compute.kubernetes import names, objects
from mlflow_remote_backend.compute.kubernetes.api import Api, ApiError

REGISTRY = os.environ.get("MLFLOW_REMOTE_TEST_REGISTRY", "127.0.0.1:5000")

Document = dict[str, Any]

SIOCGIFADDR = 0x8915


def until(condition: Callable[[], Any], timeout_s: float = 60, what: str = "") -> Any:
    """Polls until it is true and returns its value; else the test fails."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s} s: {what or condition}")
        time.sleep(0.1)
    return value


def own_addresses() -> list[str]:
    """IPv4 addresses of this machine's interfaces but loopback. Linux."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with contextlib.suppress(OSError):
                raw = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
                found.append(socket.inet_ntoa(raw[20:24]))
    return [each for each in found if not each.startswith("127.")]


@dataclass(frozen=True)
class Tracking:
    """``uri``: as this process reaches the server; ``from_pods``: as a pod does."""

    uri: str
    from_pods: str
    server: TrackingServer


@dataclass
class Namespace:
    """A namespace of the test's own. Its methods are what kubectl would be used for."""

    api: Api
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def create(self) -> Namespace:
        body = {"kind": "Namespace", "metadata": {"name": self.name, "labels": dict(self.labels)}}
        self.api.create("/api/v1/namespaces", body)
        until(lambda: self.list("serviceaccounts"), what="the default service account")
        return self

    def path(self, resource: str, name: str = "") -> str:
        groups = {
            "jobs": "apis/batch/v1",
            "roles": "apis/rbac.authorization.k8s.io/v1",
            "rolebindings": "apis/rbac.authorization.k8s.io/v1",
        }
        base = f"/{groups.get(resource, 'api/v1')}/namespaces/{self.name}/{resource}"
        return f"{base}/{name}" if name else base

    def list(self, resource: str, **query: str) -> list[Document]:
        return self.api.items(self.path(resource), **query)[0]

    def ours(self, resource: str) -> list[Document]:
        return self.list(resource, labelSelector=names.SELECTOR)

    def make(self, resource: str, body: Document) -> Document:
        return self.api.create(self.path(resource), body).body

    def patch(self, resource: str, name: str, body: Document) -> None:
        self.api.patch(self.path(resource, name), body)

    def delete(self, resource: str, name: str, **options: Any) -> None:
        with contextlib.suppress(ApiError):
            self.api.delete(self.path(resource, name), options)

    def label(self, **labels: str | None) -> None:
        self.api.patch(f"/api/v1/namespaces/{self.name}", {"metadata": {"labels": labels}})

    def pod(self, run_id: str) -> Document:
        """The newest pod of the run."""
        found = [each for each in self.ours("pods") if objects.label(each, names.RUN_ID) == run_id]
        return max(found, key=objects.created_at)

    def job(self, run_id: str) -> Document:
        return self.api.get(self.path("jobs", names.job_name(run_id))).body

    def logs(self, pod: str, container: str) -> bytes:
        path = f"{self.path('pods', pod)}/log"
        return b"".join(self.api.stream(path, read_timeout_s=30, container=container))

    def everything(self) -> dict[str, list[Document]]:
        """All objects of the namespace that a tenant can see, but for the values of secrets."""
        kinds = ("jobs", "pods", "configmaps", "events", "serviceaccounts")
        return {kind: self.list(kind) for kind in kinds}

    def remove(self) -> None:
        """Delete it without waiting: pods are not given their grace."""
        for pod in self.list("pods"):
            self.delete("pods", objects.name(pod), gracePeriodSeconds=0)
        self.api.delete(f"/api/v1/namespaces/{self.name}", {})


def once_of_all_workers(factory: pytest.TempPathFactory, name: str, make: Callable[[], str]) -> str:
    """What ``make`` answers, asked once by all workers of pytest-xdist, where there are some."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make()
    answer = factory.getbasetemp().parent / name
    with answer.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not answer.exists():
            answer.write_text(make())
        return answer.read_text()
