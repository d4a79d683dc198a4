"""What a cluster's own policies do to our objects: default queues, forbidden pods, added containers."""

from __future__ import annotations

import base64
import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from namespaces import Document, Namespace, until

from mlflow_remote_backend.backend import plan
from mlflow_remote_backend.compute.kubernetes import names, objects
from mlflow_remote_backend.compute.kubernetes.api import ApiError
from mlflow_remote_backend.runner import envelope
from mlflow_remote_backend.testing import Projects, ended, stored_log

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

ADMISSION = "/apis/admissionregistration.k8s.io/v1"


@contextlib.contextmanager
def policy(namespace: Namespace, kind: str, group: str, resource: str, spec: Document) -> Iterator[None]:
    """An admission policy for what is created in the namespace. ``kind``: Validating or Mutating, which a cluster of
    before 1.36 may not have."""
    name = f"mlr-test-{uuid.uuid4().hex[:8]}"
    rule = {"apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": [resource]}
    here = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace.name}}}
    body = {"failurePolicy": "Fail", "matchConstraints": {"resourceRules": [rule], **here}, **spec}
    path = f"{ADMISSION}/{kind.lower()}admissionpolic"
    binding: Document = {"policyName": name}
    binding |= {"validationActions": ["Deny"]} if kind == "Validating" else {}
    try:
        namespace.api.create(f"{path}ies", {"kind": f"{kind}AdmissionPolicy", "metadata": {"name": name}, "spec": body})
    except ApiError as error:
        if error.status == 404:
            pytest.skip(f"this cluster has no {kind}AdmissionPolicy")
        raise
    try:
        namespace.api.create(
            f"{path}ybindings",
            {"kind": f"{kind}AdmissionPolicyBinding", "metadata": {"name": name}, "spec": binding},
        )
        yield
    finally:
        for each in (f"{path}ybindings/{name}", f"{path}ies/{name}"):
            namespace.api.delete(each, {})


def changed(expression: str) -> Document:
    return {
        "reinvocationPolicy": "Never",
        "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": expression}}],
    }


def dry(namespace: Namespace, resource: str, body: Document) -> Any:
    return namespace.api.create(namespace.path(resource), body, dryRun="All").body


POD: Document = {
    "kind": "Pod",
    "metadata": {"name": "bare"},
    "spec": {
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "main",
                "image": "image",
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    },
}


def test_a_job_that_the_cluster_puts_into_its_default_queue_waits_there(
    projects: Projects, namespace: Namespace
) -> None:
    """Kueue does so where the namespace has a LocalQueue called ``default``."""
    labelled = changed(f'Object{{metadata: Object.metadata{{labels: {{"{names.QUEUE}": "default"}}}}}}')
    with policy(namespace, "Mutating", "batch", "jobs", labelled):
        job = {"kind": "Job", "metadata": {"name": "probe"}, "spec": {"suspend": True, "template": {**POD}}}
        job["spec"]["template"]["spec"] = {**POD["spec"], "restartPolicy": "Never"}
        until(lambda: objects.label(dry(namespace, "jobs", job), names.QUEUE), 60, "the policy is in force")
        run = projects.submit(projects.make("echo my turn"))
    made = namespace.job(run.run_id)
    assert (objects.label(made, names.QUEUE), made["spec"]["suspend"]) == ("default", True)
    assert run.view().tag("phase") == "queued"
    (secret,) = namespace.ours("secrets")
    told = envelope.load(base64.b64decode(secret["data"]["envelope.json"]))
    assert told.options["queue"] == "default", "the runner has to know that it may be taken back"
    namespace.patch("jobs", objects.name(made), {"spec": {"suspend": False}})
    assert ended(run).status == "FINISHED"
    assert stored_log(run.run_id) == b"my turn\n"


def test_a_policy_against_pods_of_nobody_forbids_no_job(projects: Projects, namespace: Namespace) -> None:
    owned = {"validations": [{"expression": "object.metadata.?ownerReferences.orValue([]).exists(o, o.controller)"}]}

    def refused() -> bool:
        try:
            dry(namespace, "pods", POD)
        except ApiError as error:
            return "denied request" in error.words
        return False

    with policy(namespace, "Validating", "", "pods", owned):
        until(refused, 60, "the policy is in force")
        assert ended(projects.submit(projects.make("echo let in"))).status == "FINISHED"


def test_a_container_that_the_cluster_adds_is_told_of(
    projects: Projects, namespace: Namespace, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy = 'Object.spec.containers{name: "proxy", image: "proxy", resources: Object.spec.containers.resources{}}'
    added = changed(f"Object{{spec: Object.spec{{containers: [{proxy}]}}}}")
    namespace.label(**{"pod-security.kubernetes.io/enforce": None})
    with policy(namespace, "Mutating", "", "pods", added):
        until(lambda: len(dry(namespace, "pods", POD)["spec"]["containers"]) == 2, 60, "the policy is in force")
        capfd.readouterr()
        planned = plan(str(projects.make("exit 0")), backend_config=projects.backend_config)
    (notice,) = (each for each in planned.notices if "adds container" in each)
    assert "container proxy" in notice
