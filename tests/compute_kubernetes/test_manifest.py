"""A job spec becomes exactly these Kubernetes objects. To accept changes: MLFLOW_REMOTE_UPDATE_GOLDEN=1 pytest …"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from specs import LOCKED, RUN_ID, spec

from mlflow_remote_backend.compute.kubernetes import manifest, names, pod_template
from mlflow_remote_backend.compute.kubernetes.manifest import SecretNames
from mlflow_remote_backend.errors import ConfigError
from mlflow_remote_backend.job import Limits, Resources, Retry, RunRef
from mlflow_remote_backend.runner import observe
from mlflow_remote_backend.version import __version__

GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("MLFLOW_REMOTE_UPDATE_GOLDEN")
VOLUMES = (
    {"mount_path": "/data", "pvc": "data", "read_only": True},
    {"mount_path": "/certificates", "secret": "certificates", "sub_path": "ca.crt"},
    {"mount_path": "/settings", "config_map": "settings"},
    {"mount_path": "/nfs", "source": {"nfs": {"server": "nfs.example.com", "path": "/"}}},
)
SCHEDULING = {
    "service_account": "trainer",
    "image_pull_secrets": ("registry",),
    "image_pull_policy": "Always",
    "node_selector": {"pool": "gpu"},
    "tolerations": ({"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},),
    "affinity": {"nodeAffinity": {}},
    "priority_class": "batch",
    "queue": "team",
}
CASES = {
    "plain": spec(),
    "locked": spec(environment=LOCKED, options={"env_cache": {"pvc": "environments", "host_path": None}}),
    "resources": spec(
        resources=Resources(1.5, 2 << 30, 2, "nvidia.com/gpu", 1 << 30, 10 << 30),
        limits=Limits(timeout_s=3600, grace_period_s=60),
        retry=Retry(3, ("disruption", "oom"), (17,)),
        labels={"team": "vision"},
        annotations={"note": "a note: ünï"},
    ),
    "scheduled": spec(options={**SCHEDULING, "volumes": VOLUMES, "image": "registry.example.com/train:2"}),
    "as-the-image-wants": spec(options={"security": "image", "read_only_root": True, "api_access": True}),
    "docker-env": spec(
        environment=dataclasses.replace(LOCKED, manager="docker", lock_key="", lock=""),
        docker_env={"image": "registry.example.com/project:3"},
        secret_refs={"API_KEY": {"name": "service", "key": "token"}},
    ),
}
SECRETS = SecretNames(program=("AWS_SECRET_ACCESS_KEY",), runner=("MLFLOW_TRACKING_PASSWORD",))


class _Whole(yaml.SafeDumper):
    """Writes what is equal twice, instead of an alias for it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def rendered(name: str) -> dict[str, Any]:
    built = manifest.build(CASES[name], SECRETS, "ENVELOPE")
    values = {"AWS_SECRET_ACCESS_KEY": "program's"}
    made = manifest.secret(built, "11111111-2222", "ENVELOPE", values, {"MLFLOW_TRACKING_PASSWORD": "runner's"})
    return {"job": built.job, "release": built.release, "secret": made}


@pytest.mark.parametrize("name", CASES)
def test_objects_are_as_recorded(name: str) -> None:
    path = GOLDEN / f"{name}.yaml"
    document = rendered(name)
    if UPDATE:
        text = yaml.dump(document, Dumper=_Whole, sort_keys=False, allow_unicode=True, width=120)
        path.write_text(text.replace(__version__, "<version>"))
    assert document == yaml.safe_load(path.read_text().replace("<version>", __version__))


@pytest.mark.parametrize("name", CASES)
def test_manifest_holds_no_parameter_no_template_and_no_secret_value(name: str) -> None:
    text = json.dumps(rendered(name)["job"])
    for hidden in ("train.py", "0.4321", "mlflow.example.com", "program's", "runner's"):
        assert hidden not in text


def test_the_same_spec_gives_the_same_objects() -> None:
    assert rendered("resources") == rendered("resources")


def test_image_is_the_configured_one_then_the_projects_then_the_runners() -> None:
    declared = {"docker_env": {"image": "project:1"}, "environment": dataclasses.replace(LOCKED, manager="docker")}
    assert manifest.main_image(spec(**declared, options={"image": "mine:1"})) == "mine:1"
    assert manifest.main_image(spec(**declared)) == "project:1"
    assert manifest.main_image(spec(docker_env={"image": "project:1"})) == "registry.example.com/runner:1-py3.11"


def test_a_docker_projects_variables_reach_its_container_and_its_volumes_are_told_as_unused() -> None:
    declared = {"image": "project:1", "environment": [["A", "1"], "COPIED"], "volumes": ["/data:/data"]}
    wanted = spec(docker_env=declared, environment=dataclasses.replace(LOCKED, manager="docker", lock_key=""))
    built = manifest.build(wanted, SecretNames(), "{}")
    (main,) = built.job["spec"]["template"]["spec"]["containers"]
    assert {"name": "A", "value": "1"} in main["env"]
    assert manifest.copied_variables(wanted) == ["COPIED"]
    assert "/data:/data" in built.warnings[0]
    assert manifest.declared_variables(spec(docker_env=declared)) == {}, "another environment was chosen"


def test_a_runner_image_is_asked_for_by_name() -> None:
    with pytest.raises(ConfigError, match=r"kubernetes\.runner_image") as caught:
        manifest.build(spec(options={"runner_image": None}), SecretNames(), "{}")
    assert "mlflow-remote image build" in str(caught.value)


def test_fences_for_time_stand_behind_each_other() -> None:
    limits = Limits(timeout_s=100, grace_period_s=20, finalize_timeout_s=50, start_timeout_s=10)
    pod_s, job_s = manifest.pod_deadline_s(limits), manifest.job_deadline_s(limits, Retry(2))
    assert pod_s is not None
    assert job_s is not None
    assert 100 + 20 + 50 < pod_s < job_s
    assert job_s > 2 * pod_s
    assert manifest.pod_deadline_s(Limits()) is None
    assert manifest.job_deadline_s(Limits(), Retry()) is None


def test_the_finaliser_has_its_own_time_after_the_grace_period() -> None:
    limits = Limits(grace_period_s=0.5, finalize_timeout_s=7.2)
    pod = manifest.build(spec(limits=limits), SecretNames(), "{}").job["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 8


def rules(retry: Retry) -> list[dict[str, Any]]:
    job = manifest.build(spec(retry=retry), SecretNames(), "{}").job["spec"]
    found: list[dict[str, Any]] = job["podFailurePolicy"]["rules"]
    return found


@pytest.mark.parametrize(("options", "seconds"), [({}, 86_400), ({"ttl_s": 0.0}, 0), ({"ttl_s": 0.5}, 1)])
def test_a_finished_job_stays_for_as_long_as_asked_for(options: dict[str, float], seconds: int) -> None:
    built = manifest.build(spec(options=options), SecretNames(), "{}")
    assert built.job["spec"]["ttlSecondsAfterFinished"] == seconds


def test_nothing_is_retried_unless_asked_for() -> None:
    job = manifest.build(spec(), SecretNames(), "{}").job["spec"]
    assert job["backoffLimitPerIndex"] == 0
    assert {rule["action"] for rule in rules(Retry())} == {"FailIndex"}


@pytest.mark.parametrize(
    "retry", [Retry(), Retry(3), Retry(3, ("disruption",)), Retry(2, ("oom",)), Retry(9, (), (3, 4))]
)
def test_rules_name_their_container_and_never_ignore(retry: Retry) -> None:
    for rule in rules(retry):
        assert rule["action"] in ("Count", "FailIndex")
        assert ("containerName" in rule["onExitCodes"]) if "onExitCodes" in rule else "onPodConditions" in rule


@pytest.mark.parametrize(("on", "action"), [((), "FailIndex"), (("disruption",), "Count"), (("oom",), "FailIndex")])
def test_a_disrupted_pod_is_repeated_only_if_asked_for(on: tuple[str, ...], action: str) -> None:
    (rule,) = [each for each in rules(Retry(2, on)) if "onPodConditions" in each]
    assert rule["action"] == action


def test_the_sidecar_and_the_rules_agree_on_the_code_for_another_attempt() -> None:
    assert manifest.RETRY_EXIT_CODE == observe.EXIT_RETRY


def test_a_queue_gets_its_label_last() -> None:
    built = manifest.build(spec(options={"queue": "team"}), SecretNames(), "{}")
    assert names.QUEUE not in built.job["metadata"]["labels"]
    assert built.job["spec"]["suspend"] is True
    assert built.release["metadata"]["labels"] == {names.QUEUE: "team"}
    assert "spec" not in built.release


def test_an_unbound_spec_renders_under_a_name_of_its_own() -> None:
    planned = manifest.build(spec(run=RunRef()), SecretNames(), "{}")
    assert planned.name.startswith("mlr-plan-")
    assert manifest.build(spec(), SecretNames(), "{}").name == f"mlr-{RUN_ID}"


def test_labels_of_the_user_do_not_displace_ours() -> None:
    built = manifest.build(spec(labels={names.RUN_ID: "forged", "mine": "x"}), SecretNames(), "{}")
    for metadata in (built.job["metadata"], built.job["spec"]["template"]["metadata"]):
        assert metadata["labels"][names.RUN_ID] == RUN_ID
        assert metadata["labels"]["mine"] == "x"


def containers(name: str) -> list[dict[str, Any]]:
    pod = rendered(name)["job"]["spec"]["template"]["spec"]
    return [*pod["initContainers"], *pod["containers"]]


@pytest.mark.parametrize("name", ["plain", "locked", "resources", "scheduled", "docker-env"])
def test_every_container_is_restricted(name: str) -> None:
    pod = rendered(name)["job"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    for container in containers(name):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", CASES)
def test_every_container_has_a_home_and_a_name(name: str) -> None:
    for container in containers(name):
        variables = {each["name"]: each.get("value") for each in container["env"]}
        for wanted in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TMPDIR"):
            assert variables[wanted]


def test_the_sidecar_comes_first_and_stays() -> None:
    first, second, third = containers("plain")
    assert (first["name"], first["restartPolicy"]) == ("observe", "Always")
    assert second["name"] == "prepare"
    assert "restartPolicy" not in second
    assert third["name"] == "main"


def test_the_sidecar_has_what_a_limit_range_wants_of_each_container() -> None:
    assert manifest.observe_resources({}) == manifest.OBSERVE_RESOURCES
    amounts = {"cpu": "100m", "memory": str(128 << 20)}
    wanted = {"sidecar_cpu": 0.1, "sidecar_memory_bytes": 128 << 20}
    assert manifest.observe_resources(wanted) == {"requests": amounts, "limits": amounts}


def test_the_cache_is_written_by_prepare_and_read_by_the_program() -> None:
    mounts = {each["name"]: each["volumeMounts"] for each in containers("locked")}
    cache = {name: [m for m in found if m["name"] == "cache"] for name, found in mounts.items()}
    assert cache["observe"] == []
    assert "readOnly" not in cache["prepare"][0]
    assert cache["main"][0]["readOnly"] is True


def test_secrets_reach_only_those_who_need_them() -> None:
    def secret_variables(container: dict[str, Any]) -> set[str]:
        return {each["name"] for each in container["env"] if "secretKeyRef" in each.get("valueFrom", {})}

    first, second, third = containers("plain")
    assert secret_variables(first) == secret_variables(second) == {"MLFLOW_TRACKING_PASSWORD"}
    assert secret_variables(third) == {"AWS_SECRET_ACCESS_KEY"}
    assert not [each for each in third["volumeMounts"] if each["mountPath"] == manifest.JOB_FILES]


@pytest.mark.parametrize(
    "template",
    [
        {"spec": "main"},
        {"metadata": {"labels": ["a=b"]}},
        {"spec": {"nodeSelector": ["gpu"]}},
        {"spec": {"containers": [{"name": "main", "env": ["A=b"]}]}},
        {"spec": {"containers": [{"name": "main", "volumeMounts": [{"name": "data"}]}]}},
    ],
    ids=json.dumps,
)
def test_a_template_of_another_shape_is_refused(template: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="pod_template"):
        _with_template(template)


def test_a_container_that_keeps_the_pod_is_told_of() -> None:
    built = _with_template({"spec": {"containers": [{"name": "proxy", "image": "proxy"}]}})
    assert any("until container proxy has ended" in each for each in built.warnings)


def _with_template(template: dict[str, Any]) -> manifest.Manifest:
    loaded = pod_template.load(template)
    assert loaded is not None
    return pod_template.apply(loaded, spec(), manifest.build(spec(), SECRETS, "{}"))
