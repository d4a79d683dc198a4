"""Deployments on Kubernetes, without a cluster: what would be created, and what is made of what the API shows. The same
on a real cluster is in tests/kubernetes/test_deployments.py."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from mlflow_remote_backend.compute.kubernetes.api import ApiError
from mlflow_remote_backend.compute.kubernetes.pod_template import weaknesses
from mlflow_remote_backend.deployment.kubernetes import manifest, preflight, rollout
from mlflow_remote_backend.deployment.kubernetes.manifest import (
    AUTOSCALER,
    BUDGET,
    INGRESS,
    SERVICE,
    replacing_beside,
)
from mlflow_remote_backend.deployment.kubernetes.rollout import Seen
from mlflow_remote_backend.deployment.kubernetes.target import KubernetesTarget
from mlflow_remote_backend.deployment.server import prepare, serve
from mlflow_remote_backend.deployment.spec import (
    Autoscale,
    DeploymentSpec,
    Ingress,
    ModelRef,
    Order,
    Secrets,
    Service,
    State,
)
from mlflow_remote_backend.errors import ConfigError, DeploymentFailed, RequestError
from mlflow_remote_backend.job import EnvironmentRef, Reason

OPTIONS = {"runner_image": "registry.example.com/runner:1", "image": "registry.example.com/team/server:3"}
SECRETS = Secrets({"PASSWORD": "s3cret-value"}, "s3cret-token")
CREDENTIALS = {"MLFLOW_TRACKING_PASSWORD": "s3cret-password"}


def spec(**fields) -> DeploymentSpec:
    options = {**OPTIONS, **fields.pop("options", {})}
    model = ModelRef("models:/toy@champion", source="models:/toy/1")
    return DeploymentSpec(
        "toy", model, "http://mlflow.example.com", compute="kubernetes", created_at=1.0, options=options, **fields
    )


def made(**fields) -> dict:
    what = spec(**fields)
    return manifest.deployment(what, manifest.variables(what, SECRETS, CREDENTIALS), "a1b2c3d4")


def pod_of(document: dict) -> dict:
    return document["spec"]["template"]["spec"]


# ---------------------------------------------------------------------------------------------------------- manifest


def test_the_pod_is_restricted_and_has_no_token_of_the_cluster():
    pod = pod_of(made(guarded=True, environment=EnvironmentRef("virtualenv", lock_key="k" * 64)))
    assert weaknesses(pod) == []
    assert pod["automountServiceAccountToken"] is False
    assert pod["initContainers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def test_no_secret_and_no_value_of_a_variable_is_in_what_others_see():
    what = spec(
        guarded=True,
        env_vars={"A": "visible-nowhere"},
        config={"env_vars": {"A": "visible-nowhere"}},
        secret_names=("P",),
    )
    documents = [
        manifest.deployment(what, manifest.variables(what, SECRETS, CREDENTIALS), "a"),
        *manifest.beside(what, "a").values(),
    ]
    text = json.dumps(documents)
    assert "s3cret" not in text
    assert "visible-nowhere" not in text
    assert "PASSWORD" in text


def test_only_the_container_that_fetches_the_model_has_credentials():
    pod = pod_of(made(guarded=True))
    fetching, main = pod["initContainers"][0], pod["containers"][0]

    def variables(container: dict) -> set[str]:
        return {each["name"] for each in container["env"] if "secretKeyRef" in each.get("valueFrom", {})}

    assert variables(fetching) == {"MLFLOW_TRACKING_PASSWORD"}
    assert variables(main) == {"PASSWORD"}
    assert "files" not in {each["name"] for each in main["volumeMounts"]}
    assert "token" not in {each["name"] for each in fetching["volumeMounts"]}


def test_a_rolling_update_never_has_too_few_pods_and_lets_requests_finish():
    document = made(replicas=3, grace_period_s=45)
    assert document["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    main = pod_of(document)["containers"][0]
    assert main["lifecycle"] == {"preStop": {"sleep": {"seconds": manifest.DRAIN_S}}}
    assert pod_of(document)["terminationGracePeriodSeconds"] >= manifest.DRAIN_S + 45


def test_probes_wait_for_a_slow_model_and_do_not_kill_a_busy_one():
    main = pod_of(made(start_timeout_s=1800, timeout_s=300))["containers"][0]
    startup, liveness = main["startupProbe"], main["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 1800
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > 300
    assert main["readinessProbe"]["httpGet"] == {"path": "/ping", "port": "http"}


def test_what_stands_beside_is_only_what_is_asked_for():
    assert set(manifest.beside(spec(), "a")) == {SERVICE}
    assert set(manifest.beside(spec(replicas=2), "a")) == {SERVICE, BUDGET}
    everything = spec(autoscale=Autoscale(2, 5, 70), ingress=Ingress("m.example.com", "nginx", "cert", "/toy"))
    found = manifest.beside(everything, "a")
    assert set(found) == {SERVICE, AUTOSCALER, BUDGET, INGRESS}
    assert found[AUTOSCALER]["spec"]["metrics"][0]["resource"]["target"]["averageUtilization"] == 70
    assert found[INGRESS]["spec"]["tls"] == [{"hosts": ["m.example.com"], "secretName": "cert"}]
    assert manifest.url(everything, "ns") == "https://m.example.com/toy"
    assert manifest.url(spec(service=Service(port=8000)), "ns") == "http://toy.ns.svc:8000"
    assert set(manifest.beside(spec(autoscale=Autoscale(1, 2)), "a")) == {SERVICE, AUTOSCALER}


def test_a_secret_holds_all_that_the_next_update_needs():
    what = spec(env_vars={"A": "1"}, secret_names=("PASSWORD",), guarded=True)
    document = manifest.secret(what, SECRETS, CREDENTIALS, "a1b2c3d4")
    assert document["immutable"] is True
    assert manifest.secrets_in(document) == SECRETS
    assert manifest.spec_in(document) == what
    with pytest.raises(ConfigError, match="a Secret of Kubernetes holds"):
        manifest.secret(what, Secrets({"BIG": "x" * 1_100_000}), {}, "a")


def test_an_update_keeps_what_others_added_and_what_the_autoscaler_did():
    live = made(replicas=2, labels={"team": "a", "old": "1"})
    live["metadata"] |= {"resourceVersion": "7", "uid": "u"}
    live["metadata"]["annotations"]["theirs"] = "yes"
    live["spec"]["replicas"] = 5
    new = made(replicas=2, labels={"team": "b"})
    replaced = manifest.replacing(live, new, spec(labels={"team": "a", "old": "1"}), autoscaled=True)
    assert replaced["metadata"]["resourceVersion"] == "7"
    assert replaced["metadata"]["annotations"]["theirs"] == "yes"
    assert (replaced["metadata"]["labels"]["team"], replaced["spec"]["replicas"]) == ("b", 5)
    assert "old" not in replaced["metadata"]["labels"]
    assert manifest.replacing(live, new, None, autoscaled=False)["spec"]["replicas"] == 2


@pytest.mark.parametrize("replacing", [partial(manifest.replacing, before=None, autoscaled=False), replacing_beside])
def test_an_update_leaves_the_finalizers_that_others_wait_for(replacing):
    made = manifest.beside(spec(), "a1")[SERVICE]
    live = {**made, "metadata": {**made["metadata"], "resourceVersion": "7", "finalizers": ["example.com/balancer"]}}
    replaced = replacing(live, made)["metadata"]
    assert (replaced["resourceVersion"], replaced["finalizers"]) == ("7", ["example.com/balancer"])


def test_whoever_changes_what_is_removed_is_told_so(monkeypatch):
    target = KubernetesTarget({})
    monkeypatch.setattr(target, "_events", lambda name: [])
    gone = ApiError("Kubernetes does not know it.", status=404)
    monkeypatch.setattr(target, "_look", Mock(side_effect=gone))
    with pytest.raises(DeploymentFailed, match="was removed by somebody"):
        target._await(spec(), "a1", Mock(), Mock())
    going = {"metadata": {"name": "toy", "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    monkeypatch.setattr(target, "_ours", lambda name: going)
    with pytest.raises(RequestError, match="is being removed"):
        target._update(Order(spec(), Path()), "a1", Mock())


class Cluster:
    """Objects by kind and name; what is deleted goes, with what it owns."""

    def __init__(self) -> None:
        self.objects: dict[tuple[object, str], dict] = {}

    def put(self, kind: manifest.Kind, document: dict, uid: str) -> dict:
        metadata = {**document["metadata"], "uid": uid}
        return self.objects.setdefault((kind, metadata["name"]), {**document, "metadata": metadata})

    def get(self, kind: manifest.Kind, name: str, patience_s: float = 0.0) -> dict | None:
        return self.objects.get((kind, name))

    def delete(self, path: str, options: dict) -> None:
        (found,) = [key for key in self.objects if key[0].path("ns", key[1]) == path]
        uid = self.objects[found]["metadata"]["uid"]
        assert options["preconditions"]["uid"] == uid
        self.objects = {
            key: each
            for key, each in self.objects.items()
            if key != found and uid not in [owner["uid"] for owner in each["metadata"].get("ownerReferences", ())]
        }


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_failed_create_removes_only_what_it_made(monkeypatch, made_anew):
    cluster, target = Cluster(), KubernetesTarget({"namespace": "ns"})

    def create_one(kind: manifest.Kind, document: dict, attempt: str) -> dict:
        return cluster.put(kind, document, f"{kind.kind}-{attempt}")

    def fails(*args: object) -> None:
        if made_anew:  # somebody deletes it, and creates another one under the name
            cluster.objects.clear()
            other = create_one(manifest.DEPLOYMENT, made(), "other")
            for kind, document in manifest.beside(spec(), "other").items():
                create_one(kind, manifest.owned(document, other["metadata"]["uid"]), "other")
        raise DeploymentFailed("was removed by somebody")

    monkeypatch.setattr(target, "_create_one", create_one)
    monkeypatch.setattr(target, "_get", cluster.get)
    monkeypatch.setattr(target, "_api", lambda: cluster)
    monkeypatch.setattr(target, "_pods", lambda name: [])
    monkeypatch.setattr(target, "_patch", Mock())
    monkeypatch.setattr(target, "_roll", fails)
    with pytest.raises(DeploymentFailed, match="was removed by somebody"):
        target._create(Order(spec(), Path(), SECRETS), "a1", Mock())
    left = {each["metadata"]["uid"] for each in cluster.objects.values()}
    assert left == ({"Deployment-other", "Service-other"} if made_anew else set())


def test_a_signature_of_thousands_of_columns_does_not_break_the_limit_of_annotations():
    wide = dataclasses.replace(spec(), model=ModelRef("models:/toy/1", signature="x" * 200_000))
    assert len(manifest.public(wide)) < manifest.MAX_ANNOTATION_BYTES


# ---------------------------------------------------------------------------------------------------------- preflight


def test_what_no_cluster_is_needed_for_is_refused_first():
    assert preflight.of_config(spec()) == []
    assert preflight.of_config(spec(options={"queue": "gpu"})) == ["kubernetes.queue: a deployment is not queued"]
    with pytest.raises(ConfigError, match="autoscale needs"):
        preflight.of_config(spec(autoscale=Autoscale(1, 2)))
    with pytest.raises(ConfigError, match="pod_template is a job's pod"):
        preflight.of_config(spec(options={"pod_template": {"spec": {}}}))
    folder = DeploymentSpec("toy", ModelRef("/tmp/model", source="/tmp/model"), compute="kubernetes", options=OPTIONS)
    with pytest.raises(RequestError, match="is a folder of this machine"):
        preflight.of_config(folder)
    with pytest.raises(ConfigError, match="of no use in a pod"):
        preflight.of_addresses(folder, {})


def test_the_role_grants_all_that_is_asked_for():
    rules = yaml.safe_load(preflight.role())["rules"]
    granted = {
        (verb, group, resource)
        for rule in rules
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    optional_kinds = {
        (verb, kind.group, kind.plural) for kind in (AUTOSCALER, BUDGET, INGRESS) for verb in preflight.CHANGES
    }
    assert granted == {*preflight.REQUIRED, *preflight.OPTIONAL, *optional_kinds}


# ------------------------------------------------------------------------------------------------------------ rollout


def live(attempt: str = "a1b2c3d4", **status) -> dict:
    document = made()
    document["metadata"] |= {"generation": 2, "uid": "u-1", "creationTimestamp": "2026-01-01T00:00:00Z"}
    document["spec"]["template"]["metadata"]["annotations"][manifest.ATTEMPT] = attempt
    document["status"] = {"observedGeneration": 2, **status}
    return document


def pod(
    name: str = "toy-x", attempt: str = "a1b2c3d4", *, main: dict | None = None, init: dict | None = None, **status
):
    return {
        "metadata": {
            "name": name,
            "annotations": {manifest.ATTEMPT: attempt},
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"nodeName": "n"},
        "status": {
            "phase": "Running",
            "initContainerStatuses": [{"name": "prepare", "state": init or {"terminated": {"exitCode": 0}}}],
            "containerStatuses": [{"name": "main", **(main or {"state": {"waiting": {"reason": "PodInitializing"}}})}],
            **status,
        },
    }


ALL_NEW = {"replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}


def test_a_rollout_is_done_when_all_pods_are_new_and_answer():
    assert rollout.progress(Seen(live(**ALL_NEW)), spec(), "a1b2c3d4").done
    assert not rollout.progress(Seen(live(**{**ALL_NEW, "replicas": 2})), spec(), "a1b2c3d4").done
    assert not rollout.progress(Seen(live(**{**ALL_NEW, "availableReplicas": 0})), spec(), "a1b2c3d4").done
    assert not rollout.progress(Seen(live(**{**ALL_NEW, "observedGeneration": 1})), spec(), "a1b2c3d4").done
    assert not rollout.progress(Seen(live("another", **ALL_NEW)), spec(), "a1b2c3d4").done


def test_an_old_pods_end_is_nobodys_fault():
    crashed = pod(attempt="before", main={"state": {"terminated": {"exitCode": 1, "reason": "Error"}}})
    assert rollout.progress(Seen(live(), [crashed]), spec(), "a1b2c3d4").fault is None


@pytest.mark.parametrize(
    ("main", "reason"),
    [
        ({"state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}, Reason.OOM),
        (
            {
                "state": {"running": {"startedAt": "2026-01-01T00:10:00Z"}},
                "restartCount": 1,
                "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            },
            Reason.OOM,
        ),
        (
            {
                "state": {
                    "terminated": {
                        "exitCode": 0,
                        "reason": "Completed",
                        "startedAt": "2026-01-01T00:00:00Z",
                        "finishedAt": "2026-01-01T00:30:09Z",
                    }
                }
            },
            Reason.START_TIMEOUT,
        ),
        ({"state": {"terminated": {"exitCode": 128, "reason": "StartError", "message": "no /bin/sh"}}},
         Reason.CONTAINER_CONFIG),
        ({"state": {"terminated": {"exitCode": 7, "reason": "Error"}}}, Reason.USER_ERROR),
    ],
)  # fmt: skip
def test_why_a_server_ended(main, reason):
    fault = rollout.progress(Seen(live(), [pod(main=main)], now=1e9), spec(), "a1b2c3d4").fault
    assert fault is not None
    assert rollout.of_log(fault, spec(), "").reason is reason


def test_what_prepare_said_is_the_diagnosis():
    said = {"reason": "TRACKING_AUTH", "message": "It may not.", "words": "HTTP 403", "hint": "Ask."}
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": json.dumps(said)}}
    fault = rollout.progress(Seen(live(), [pod(init=ended)]), spec(), "a1b2c3d4").fault
    assert fault is not None
    assert (fault.diagnosis.reason, fault.diagnosis.words) == (Reason.TRACKING_AUTH, "HTTP 403")


def test_a_refused_pod_is_told_in_the_clusters_words_and_not_as_a_jobs():
    words = 'pods "toy-1" is forbidden: violates PodSecurity "restricted:latest": privileged'
    condition = {
        "type": "ReplicaFailure",
        "status": "True",
        "message": words,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    fault = rollout.progress(Seen(live(conditions=[condition])), spec(), "a1b2c3d4").fault
    assert fault is not None
    assert fault.diagnosis.words == words
    assert fault.diagnosis.message == "Kubernetes refuses the deployment's pod."


def test_the_state_is_what_the_objects_say():
    def state(document: dict, *pods: dict) -> State:
        return rollout.status(document, pods, "ns").state

    ready = pod(conditions=[{"type": "Ready", "status": "True"}])
    assert state(live()) is State.STARTING
    assert state(live(**ALL_NEW), ready) is State.READY
    before = live()
    before["metadata"]["annotations"][manifest.SERVING] = manifest.public(spec(description="before"))
    assert state(before, ready) is State.UPDATING
    assert rollout.status(before, [ready], "ns").spec.description == "before"
    gone = live()
    gone["metadata"]["annotations"][manifest.SERVING] = manifest.public(spec())
    assert state(gone) is State.STOPPED


# ---------------------------------------------------------------------------------------------------- inside of the pod


def test_the_start_script_quotes_and_says_what_is_missing(tmp_path):
    root = tmp_path / "it's here"
    (root / "server").mkdir(parents=True)
    (root / "server" / "pod.py").write_text("import sys; print('started', sys.argv[1])")
    (root / "start.sh").write_text(prepare.script("", root))
    done = subprocess.run(["/bin/sh", str(root / "start.sh")], capture_output=True, text=True)
    assert done.stdout == f"started {root}/start.json\n"
    done = subprocess.run(["/bin/sh", str(root / "start.sh")], capture_output=True, text=True, env={"PATH": "/nowhere"})
    assert (done.returncode, done.stderr) == (127, "mlflow-remote: the image has no Python\n")


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ([(b"authorization", b"Bearer token")], True),
        ([(b"x-mlflow-remote-token", b"token")], True),
        ([(b"x-mlflow-remote-token", b"Bearer token")], False),
        ([(b"authorization", b"Bearer token"), (b"x-mlflow-remote-token", b"token")], False),
        ([(b"x-mlflow-remote-token", b"")], False),
        ([], False),
    ],
)
def test_the_token_comes_by_either_header_and_once(headers, allowed):
    assert serve.Guard(None, "token")._allowed({"headers": headers}) is allowed
