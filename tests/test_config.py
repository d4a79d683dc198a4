"""backend_config is understood, or refused in words that help."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mlflow_remote_backend.config import (
    BackendConfig,
    CliContext,
    EnvCache,
    KubernetesVolume,
    RegisterModel,
    SecretRef,
    parse,
    schema,
)
from mlflow_remote_backend.config import parser as parser_module
from mlflow_remote_backend.config.keys import ALIASES, ALL_KEYS, KEYS
from mlflow_remote_backend.config.kinds import CPU, DURATION, DURATION_OR_ZERO, SIZE, Kind, ListOf, Place, Section
from mlflow_remote_backend.errors import ConfigError, RequestError
from mlflow_remote_backend.job import EnvironmentRef, Limits, Resources, Retry
from mlflow_remote_backend.submission import platform_of, secrets_of

DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"
HERE = Place("backend_config", Path("/project"), Path("/home/me"))
SECRET = "-".join(["sesame", "opens", "it"])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path / "home")}


def understood(
    raw: Any, environ: Mapping[str, str] | None = None, project: Path | None = None, **more: Any
) -> BackendConfig:
    return parse(raw, project_dir=project, environ={"HOME": "/nonexistent"} if environ is None else environ, **more)


def refused(
    raw: Any, environ: Mapping[str, str] | None = None, project: Path | None = None, **more: Any
) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        understood(raw, environ, project, **more)
    return caught.value


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value


def write_computes(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mlflow-remote.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------- the ways in


@pytest.mark.parametrize("raw", [None, {}, "{}", "null"])
def test_nothing_said_gives_the_defaults(raw: Any) -> None:
    assert understood(raw) == BackendConfig()


def test_defaults_are_those_of_the_contract() -> None:
    config = understood({})
    assert (config.compute, config.compute_name, config.env_manager) == ("local", "", None)
    assert (config.wait, config.stream_output, config.on_interrupt, config.synchronous) == (
        "auto",
        True,
        "cancel",
        False,
    )
    assert config.limits == Limits(None, 30, 1800, 1800, 600, 900)
    assert config.retry == Retry(1, (), ())
    assert config.snapshot.max_size_bytes == 300 * 1024 * 1024
    assert config.outputs == ("outputs",)
    assert config.log_limit_bytes is None
    assert config.resources == Resources()
    assert config.kubernetes.ttl_s == 86400
    assert config.kubernetes.security == "restricted"


@pytest.mark.parametrize("dotted", [dotted for dotted, key in ALL_KEYS.items() if key.default is not None])
def test_a_default_in_the_table_is_the_default_in_force(dotted: str) -> None:
    if "[]" in dotted:
        assert ALL_KEYS[dotted].default is KubernetesVolume("/x").read_only
    elif dotted.startswith("register_model."):
        said = understood({"register_model": {"name": "m", dotted.split(".")[1]: ALL_KEYS[dotted].default}})
        assert said == understood({"register_model": {"name": "m"}})
    else:
        assert understood(nested(dotted, ALL_KEYS[dotted].default)) == understood({})


def test_json_text_and_a_json_file_mean_the_same_as_the_mapping(tmp_path: Path) -> None:
    raw = {"compute": "docker", "resources": {"memory": "4Gi"}}
    file = tmp_path / "backend.json"
    file.write_text(json.dumps(raw))
    assert understood(json.dumps(raw)) == understood(str(file)) == understood(raw)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("[1]", "is a list; expected a mapping, the path of a .json file, or JSON text of a mapping"),
        ("7", "is 7; expected a mapping"),
        (7, "is 7; expected a mapping"),
        (["compute"], "is a list"),
        ("{", "is not valid JSON"),
        ("local", "is not valid JSON"),
        ('{"compute": "local", "compute": "docker"}', 'has the key "compute" twice'),
        ("[" * 100_000, "nested too deeply"),
        ('{"timeout": ' + "9" * 5000 + "}", ""),
        ("/nonexistent/backend.json", "/nonexistent/backend.json does not exist"),
    ],
)
def test_what_is_no_mapping_is_refused(raw: Any, words: str) -> None:
    error = refused(raw)
    assert words in str(error)
    assert isinstance(error, RequestError)


def test_the_callers_dict_is_never_changed() -> None:
    raw = {
        "COMPUTE": "docker",
        "kube-context": "c",
        "ENV_MANAGER": None,
        "docker": {"repository-uri": "team/image", "args": {"gpus": "all"}},
        "kubernetes": {
            "kube-context": "c",
            "tolerations": [{"key": "a", "more": [{"b": None}]}],
            "affinity": {"a": {"b": [1]}},
        },
        "env_vars": {"A": 1, "B": None},
    }
    before = copy.deepcopy(raw)
    config = understood(raw)
    config.kubernetes.affinity["a"]["b"].append(2)  # type: ignore[index]
    config.kubernetes.tolerations[0]["more"].clear()
    assert raw == before


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        understood({}).compute = "docker"  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------- keys and values


@pytest.mark.parametrize(
    ("raw", "attribute", "expected"),
    [
        ({"compute": "kubernetes"}, "compute", "kubernetes"),
        ({"env_manager": "uv"}, "env_manager", "uv"),
        ({"environment": {"frozen": True}}, "environment.frozen", True),
        ({"environment": {"channels": ["conda-forge", "https://$U:${P}@mirror.example/c"]}}, "environment.channels",
         ("conda-forge", "https://$U:${P}@mirror.example/c")),
        ({"environment": {"channel_alias": "https://mirror.example"}},
         "environment.channel_alias", "https://mirror.example"),
        ({"environment": {"channel_map": {"conda-forge": "https://m.example/cf"}}}, "environment.channel_map",
         {"conda-forge": "https://m.example/cf"}),
        ({"environment": {"index_url": "https://me:$PW@index.example/simple"}}, "environment.index_url",
         "https://me:$PW@index.example/simple"),
        ({"environment": {"solver": "micromamba"}}, "environment.solver", "micromamba"),
        ({"environment": {"solver": "bin/micromamba"}}, "environment.solver", "/project/bin/micromamba"),
        ({"environment": {"cuda": "12.10"}}, "environment.cuda", "12.10"),
        ({"wait": False}, "wait", False),
        ({"wait": True}, "wait", True),
        ({"wait": "auto"}, "wait", "auto"),
        ({"stream_output": False}, "stream_output", False),
        ({"on_interrupt": "detach"}, "on_interrupt", "detach"),
        ({"run_id": "0a1b"}, "run_id", "0a1b"),
        ({"run_name": "Größe 7"}, "run_name", "Größe 7"),
        ({"submission_id": "ci/42-1"}, "submission_id", "ci/42-1"),
        ({"tags": {"team": "blue", "n": 3}}, "tags", {"team": "blue", "n": "3"}),
        ({"tracking_uri": "http://mlflow.svc:5000"}, "tracking_uri", "http://mlflow.svc:5000"),
        ({"tracking_uri": "sqlite:///mlflow.db"}, "tracking_uri", "sqlite:////project/mlflow.db"),
        ({"tracking_uri": "sqlite:////data/mlflow.db"}, "tracking_uri", "sqlite:////data/mlflow.db"),
        ({"tracking_uri": "file:mlruns"}, "tracking_uri", "file:///project/mlruns"),
        ({"tracking_uri": "file:///data/mlruns"}, "tracking_uri", "file:///data/mlruns"),
        ({"tracking_uri": "mlruns"}, "tracking_uri", "/project/mlruns"),
        ({"tracking_uri": "databricks"}, "tracking_uri", "databricks"),
        ({"env_vars": {"A": "x", "B": 2, "C": 0.5, "D": "", "E": "a\nb ☃"}}, "env_vars",
         {"A": "x", "B": "2", "C": "0.5", "D": "", "E": "a\nb ☃"}),
        ({"secrets": {"PW": "db/password"}}, "secrets", {"PW": SecretRef("db", "password")}),
        ({"secrets": {"PW": {"name": "db", "key": "password"}}}, "secrets", {"PW": SecretRef("db", "password")}),
        ({"resources": {"cpu": "500m"}}, "resources.cpu", 0.5),
        ({"resources": {"cpu": 2}}, "resources.cpu", 2.0),
        ({"resources": {"memory": "4Gi"}}, "resources.memory_bytes", 4 * 2**30),
        ({"resources": {"gpu": 2}}, "resources.gpu", 2),
        ({"resources": {"gpu": 2.0}}, "resources.gpu", 2),
        ({"resources": {"gpu_resource": "amd.com/gpu"}}, "resources.gpu_resource", "amd.com/gpu"),
        ({"resources": {"shm_size": "1GB"}}, "resources.shm_size_bytes", 10**9),
        ({"resources": {"ephemeral_storage": 10**10}}, "resources.ephemeral_storage_bytes", 10**10),
        ({"timeout": "1d12h"}, "limits.timeout_s", 36 * 3600.0),
        ({"timeout": 90}, "limits.timeout_s", 90.0),
        ({"grace_period": 0}, "limits.grace_period_s", 0.0),
        ({"finalize_timeout": "1h"}, "limits.finalize_timeout_s", 3600.0),
        ({"start_timeout": "5m"}, "limits.start_timeout_s", 300.0),
        ({"image_pull_timeout": "1m30s"}, "limits.image_pull_timeout_s", 90.0),
        ({"node_lost_timeout": "0.5h"}, "limits.node_lost_timeout_s", 1800.0),
        ({"retry": {"max_attempts": 4}}, "retry", Retry(4, ("disruption",), ())),
        ({"retry": {"max_attempts": 1}}, "retry", Retry(1, (), ())),
        ({"retry": {"on": ["oom"]}}, "retry", Retry(3, ("oom",), ())),
        ({"retry": {"max_attempts": 2, "on": ["oom", {"exit_codes": [75, 3]}], "exit_codes": [3]}}, "retry",
         Retry(2, ("oom",), (3, 75))),
        ({"retry": {"exit_codes": [9]}}, "retry", Retry(3, (), (9,))),
        ({"snapshot": {"include": ["data/*.csv"]}}, "snapshot.include", ("data/*.csv",)),
        ({"snapshot": {"exclude": ["*.bin"]}}, "snapshot.exclude", ("*.bin",)),
        ({"snapshot": {"max_size": "1GiB"}}, "snapshot.max_size_bytes", 2**30),
        ({"snapshot": {"allow_secrets": True}}, "snapshot.allow_secrets", True),
        ({"snapshot": {"in_place": True}}, "snapshot.in_place", True),
        ({"outputs": []}, "outputs", ()),
        ({"outputs": ["./outputs", "a/..b", "plots/2d/"]}, "outputs", ("./outputs", "a/..b", "plots/2d/")),
        ({"log_limit": "10MB"}, "log_limit_bytes", 10**7),
        ({"register_model": {"name": "m", "alias": "best", "tags": {"a": 1}}}, "register_model",
         RegisterModel("m", "model", "best", {"a": "1"})),
        ({"labels": {"team": "blue", "example.com/n": 7}}, "labels", {"team": "blue", "example.com/n": "7"}),
        ({"annotations": {"example.com/why": "to see, whether"}},
         "annotations", {"example.com/why": "to see, whether"}),
        ({"docker": {"image": "registry.example.com:5000/team/image:1@sha256:" + "a" * 64}}, "docker.image",
         "registry.example.com:5000/team/image:1@sha256:" + "a" * 64),
        ({"docker": {"build": True}}, "docker.build", True),
        ({"docker": {"repository": "registry.example.com/team/image"}},
         "docker.repository", "registry.example.com/team/image"),
        ({"docker": {"pull": "always"}}, "docker.pull", "always"),
        ({"docker": {"base_url": "ssh://me@host"}}, "docker.base_url", "ssh://me@host"),
        ({"docker": {"context": "lab"}}, "docker.context", "lab"),
        ({"docker": {"network": "none"}}, "docker.network", "none"),
        ({"docker": {"volumes": ["./data:/data:ro", "cache:/cache", "/abs:/abs", "~/d:/d", "a/b:/c", "C:\\d:/d"]}},
         "docker.volumes",
         ("/project/data:/data:ro", "cache:/cache", "/abs:/abs", "/home/me/d:/d", "/project/a/b:/c", "C:\\d:/d")),
        ({"docker": {"gpus": "all"}}, "docker.gpus", "all"),
        ({"docker": {"gpus": 2}}, "docker.gpus", 2),
        ({"docker": {"gpus": ["0", "GPU-1"]}}, "docker.gpus", ("0", "GPU-1")),
        ({"docker": {"user": "1000:1000"}}, "docker.user", "1000:1000"),
        ({"docker": {"capabilities": ["SYS_PTRACE"]}}, "docker.capabilities", ("SYS_PTRACE",)),
        ({"docker": {"runtime": "nvidia"}}, "docker.runtime", "nvidia"),
        ({"docker": {"platform": "linux/arm64"}}, "docker.platform", "linux/arm64"),
        ({"docker": {"env_cache": "envs"}}, "docker.env_cache", "envs"),
        ({"docker": {"args": {"gpus": "all", "t": True, "cpus": 2}}},
         "docker.args", {"gpus": "all", "t": True, "cpus": "2"}),
        ({"kubernetes": {"context": "arn:aws:eks:x"}}, "kubernetes.context", "arn:aws:eks:x"),
        ({"kubernetes": {"kubeconfig": "kube/config"}}, "kubernetes.kubeconfig", "/project/kube/config"),
        ({"kubernetes": {"kubeconfig": "~/.kube/lab"}}, "kubernetes.kubeconfig", "/home/me/.kube/lab"),
        ({"kubernetes": {"namespace": "ml"}}, "kubernetes.namespace", "ml"),
        ({"kubernetes": {"image": "image"}}, "kubernetes.image", "image"),
        ({"kubernetes": {"runner_image": "a/b:c"}}, "kubernetes.runner_image", "a/b:c"),
        ({"kubernetes": {"image_pull_secrets": ["regcred"]}}, "kubernetes.image_pull_secrets", ("regcred",)),
        ({"kubernetes": {"image_pull_policy": "Always"}}, "kubernetes.image_pull_policy", "Always"),
        ({"kubernetes": {"service_account": "trainer"}}, "kubernetes.service_account", "trainer"),
        ({"kubernetes": {"api_access": True}}, "kubernetes.api_access", True),
        ({"kubernetes": {"security": "image"}}, "kubernetes.security", "image"),
        ({"kubernetes": {"run_as_user": 0}}, "kubernetes.run_as_user", 0),
        ({"kubernetes": {"read_only_root": True}}, "kubernetes.read_only_root", True),
        ({"kubernetes": {"node_selector": {"kubernetes.io/arch": "arm64", "gpu": "true"}}}, "kubernetes.node_selector",
         {"kubernetes.io/arch": "arm64", "gpu": "true"}),
        ({"kubernetes": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}}, "kubernetes.tolerations",
         ({"key": "gpu", "operator": "Exists"},)),
        ({"kubernetes": {"affinity": {"nodeAffinity": {"x": [None, 1, 1.5, True]}}}}, "kubernetes.affinity",
         {"nodeAffinity": {"x": [None, 1, 1.5, True]}}),
        ({"kubernetes": {"priority_class": "high"}}, "kubernetes.priority_class", "high"),
        ({"kubernetes": {"queue": "team-blue"}}, "kubernetes.queue", "team-blue"),
        ({"kubernetes": {"platform": "linux/amd64"}}, "kubernetes.platform", "linux/amd64"),
        ({"kubernetes": {"volumes": [{"mount_path": "/data", "pvc": "data", "read_only": True, "sub_path": "a"}]}},
         "kubernetes.volumes", (KubernetesVolume("/data", pvc="data", read_only=True, sub_path="a"),)),
        ({"kubernetes": {"volumes": [{"mount_path": "/n", "source": {"nfs": {"server": "n", "path": "/"}}}]}},
         "kubernetes.volumes", (KubernetesVolume("/n", source={"nfs": {"server": "n", "path": "/"}}),)),
        ({"kubernetes": {"env_cache": {"pvc": "envs"}}}, "kubernetes.env_cache", EnvCache(pvc="envs")),
        ({"kubernetes": {"env_cache": {"host_path": "/var/envs"}}},
         "kubernetes.env_cache", EnvCache(host_path="/var/envs")),
        ({"kubernetes": {"pod_template": "pod.yaml"}}, "kubernetes.pod_template", "/project/pod.yaml"),
        ({"kubernetes": {"pod_template": {"spec": {"x": None}}}}, "kubernetes.pod_template", {"spec": {"x": None}}),
        ({"kubernetes": {"fail_fast_unschedulable": True}}, "kubernetes.fail_fast_unschedulable", True),
        ({"kubernetes": {"ttl": "2h"}}, "kubernetes.ttl_s", 7200.0),
        # other spellings
        ({"COMPUTE": "docker"}, "compute", "docker"),
        ({"ENV_MANAGER": "virtualenv"}, "env_manager", "virtualenv"),
        ({"ENV_MANAGER": None, "env_manager": "uv"}, "env_manager", "uv"),
        ({"USE_CONDA": False}, "env_manager", "local"),
        ({"USE_CONDA": True}, "env_manager", None),
        ({"USE_CONDA": True, "env_manager": "uv"}, "env_manager", "uv"),
        ({"USE_CONDA": False, "ENV_MANAGER": "local"}, "env_manager", "local"),
        ({"STREAM_OUTPUT": False}, "stream_output", False),
        ({"SYNCHRONOUS": True}, "synchronous", True),
        ({"SYNCHRONOUS": None}, "synchronous", False),
        ({"DOCKER_ARGS": {"memory": "1g", "t": True}}, "docker.args", {"memory": "1g", "t": True}),
        ({"DOCKER_ARGS": None}, "docker.args", {}),
        ({"STORAGE_DIR": "scratch"}, "storage_dir", "/project/scratch"),
        ({"STORAGE_DIR": None}, "storage_dir", None),
        ({"build_image": True}, "docker.build", True),
        ({"build_image": False, "docker": {"build": True}}, "docker.build", True),
        ({"docker_auth": None}, "docker.auth", {}),
        ({"repository-uri": "team/image"}, "docker.repository", "team/image"),
        ({"docker": {"repository-uri": "team/image"}}, "docker.repository", "team/image"),
        ({"kube-context": "c"}, "kubernetes.context", "c"),
        ({"kubernetes": {"kube-context": "c"}, "kube-context": "c"}, "kubernetes.context", "c"),
        ({"kube-job-template-path": "job.yaml"}, "kubernetes.pod_template", "/project/job.yaml"),
        ({"kubernetes": {"kube-job-template-path": "job.yaml"}}, "kubernetes.pod_template", "/project/job.yaml"),
        ({"kubernetes": {"ttl_seconds_after_finished": 60}}, "kubernetes.ttl_s", 60.0),
    ],
)  # fmt: skip
def test_a_key_is_taken_for_what_it_means(raw: dict[str, Any], attribute: str, expected: Any) -> None:
    config: Any = understood(raw, {"HOME": "/home/me"}, Path("/project"))
    for name in attribute.split("."):
        config = getattr(config, name)
    assert config == expected
    assert type(config) is type(expected) or isinstance(config, dict)


@pytest.mark.parametrize("dotted", [dotted for dotted in ALL_KEYS if "[]" not in dotted])
def test_null_is_as_if_a_key_were_not_there(dotted: str) -> None:
    if dotted == "register_model.name":
        assert "is missing" in str(refused(nested(dotted, None)))
    elif dotted.startswith(("register_model.", "kubernetes.env_cache.")):
        with pytest.raises(ConfigError):
            understood(nested(dotted, None))
    else:
        assert understood(nested(dotted, None)) == BackendConfig()


def test_what_mlflow_injects_into_every_call_says_nothing_by_itself() -> None:
    from_python = {"ENV_MANAGER": None, "SYNCHRONOUS": False, "DOCKER_ARGS": None, "STORAGE_DIR": None}
    assert understood({**from_python, "build_image": False, "docker_auth": None}) == BackendConfig()
    assert understood({**from_python, "DOCKER_ARGS": {}}) == BackendConfig()  # as the mlflow command has it


def test_docker_auth_is_kept_and_never_shown() -> None:
    config = understood({"docker_auth": {"username": "me", "password": SECRET, "reauth": True}})
    assert config.docker.auth == {"username": "me", "password": SECRET, "reauth": True}
    assert SECRET not in repr(config)


def test_options_are_the_computes_own_section_as_json_without_credentials() -> None:
    volume = {"mount_path": "/d", "pvc": "d"}
    config = understood({"compute": "kubernetes", "kubernetes": {"namespace": "ml", "volumes": [volume]}})
    options = config.options()
    assert options["namespace"] == "ml"
    assert options["volumes"][0] == dataclasses.asdict(KubernetesVolume("/d", pvc="d"))
    assert json.loads(json.dumps(options)) == options
    docker = understood({"compute": "docker", "docker_auth": {"password": SECRET}, "DOCKER_ARGS": {"t": True}})
    assert SECRET not in json.dumps(docker.options())
    assert docker.options()["args"] == {"t": True}
    assert understood({}).options() == {}


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("raw", "key", "words"),
    [
        # types and values
        ({"compute": 1}, "compute", 'is 1; expected a name of a compute'),
        ({"env_manager": "poetry"}, "env_manager", 'is "poetry"; expected one of "conda", "virtualenv", "uv", "local"'),
        ({"wait": "true"}, "wait", "Write true without quotes."),
        ({"wait": 1}, "wait", 'is 1; expected "auto", or true or false'),
        ({"stream_output": "False"}, "stream_output", "Write false without quotes."),
        ({"resources": [1]}, "resources", "is a list; expected a mapping"),
        ({"resources": {"gpu": True}}, "resources.gpu", "is true; expected a whole number from 0 to 1024"),
        ({"resources": {"gpu": 1.5}}, "resources.gpu", "is 1.5; expected a whole number"),
        ({"resources": {"gpu": "1"}}, "resources.gpu", 'is "1"; expected a whole number'),
        ({"resources": {"gpu": -1}}, "resources.gpu", "is -1"),
        ({"resources": {"cpu": 0}}, "resources.cpu", "is 0; expected cores such as 2, 0.5 or"),
        ({"resources": {"cpu": False}}, "resources.cpu", "is false"),
        ({"resources": {"cpu": math.nan}}, "resources.cpu", "is NaN"),
        ({"resources": {"cpu": math.inf}}, "resources.cpu", "is Infinity"),
        ({"resources": {"cpu": -0.5}}, "resources.cpu", "is -0.5"),
        ({"resources": {"memory": "512m"}}, "resources.memory", "Units are case-sensitive"),
        ({"resources": {"memory": "4"}}, "resources.memory", 'is "4"; expected a size such as "4Gi"'),
        ({"resources": {"memory": 0}}, "resources.memory", "is 0"),
        ({"resources": {"memory": 1.5}}, "resources.memory", "is 1.5"),
        ({"resources": {"memory": 10**30}}, "resources.memory", "expected a size"),
        ({"resources": {"memory": 10**5000}}, "resources.memory", "is a huge number"),
        ({"timeout": 0}, "timeout", 'is 0; expected a duration such as "30s", "2h" or "1d12h"'),
        ({"timeout": "0s"}, "timeout", 'is "0s"; expected a duration'),
        ({"timeout": "30"}, "timeout", "Text needs its units"),
        ({"timeout": "12h1d"}, "timeout", "expected a duration"),
        ({"timeout": " 1h"}, "timeout", "expected a duration"),
        ({"timeout": "1h\n"}, "timeout", r'is "1h\n"; expected a duration'),
        ({"timeout": "٣s"}, "timeout", "expected a duration"),
        ({"timeout": True}, "timeout", "is true"),
        ({"timeout": -1}, "timeout", "is -1"),
        ({"timeout": 1e300}, "timeout", "at most 10 years"),
        ({"timeout": "99999d"}, "timeout", "at most 10 years"),
        ({"timeout": math.nan}, "timeout", "is NaN"),
        ({"timeout": {"hours": 1}}, "timeout", "is a mapping"),
        ({"environment": {"cuda": 12.1}}, "environment.cuda", "expected a version as text"),
        ({"outputs": "outputs"}, "outputs", 'is "outputs"; expected a list; each member: a folder inside the project'),
        ({"outputs": ["/tmp"]}, "outputs.0", 'is "/tmp"'),
        ({"outputs": ["a/../../b"]}, "outputs.0", "expected a folder inside the project"),
        ({"outputs": ["."]}, "outputs.0", "expected a folder inside the project"),
        ({"outputs": ["ok", "~/x"]}, "outputs.1", "expected a folder inside the project"),
        ({"retry": {"on": ["om"]}}, "retry.on.0", 'is "om"'),
        ({"retry": {"exit_codes": [0]}}, "retry.exit_codes.0", "is 0; expected a whole number from 1 to 255"),
        ({"retry": {"max_attempts": 0}}, "retry.max_attempts", "is 0"),
        ({"register_model": {}}, "register_model.name", "is missing"),
        ({"register_model": {"name": ""}}, "register_model.name", 'is ""; expected text, not empty'),
        ({"run_id": "a,b=c)"}, "run_id", 'is "a,b=c)"; expected a run id'),
        ({"run_name": "a\nb"}, "run_name", r'is "a\nb"'),
        ({"submission_id": "it's"}, "submission_id", "expected up to 128 letters"),
        ({"tags": {"mlflow_remote.phase": "done"}}, "tags", "The tags mlflow_remote.* are ours."),
        ({"labels": {"mlflow-remote/run-id": "x"}}, "labels", "are ours"),
        ({"labels": {"a b": "x"}}, "labels", 'holds the name "a b"'),
        ({"labels": {"a": "x" * 64}}, "labels.a", "expected a label value: up to 63"),
        ({"labels": {"a": True}}, "labels.a", 'Write "true" in quotes'),
        ({"labels": {"a": -1}}, "labels.a", "is -1; expected a label value"),
        ({"kubernetes": {"node_selector": {"gpu": True}}}, "kubernetes.node_selector.gpu", 'Write "true" in quotes'),
        ({"kubernetes": {"namespace": "My_NS"}}, "kubernetes.namespace", 'is "My_NS"; expected a namespace'),
        ({"kubernetes": {"image": "bad image"}}, "kubernetes.image", "Such as registry.example.com/team/image:tag."),
        ({"docker": {"image": "team/IMAGE:1"}}, "docker.image", "expected an image reference"),
        ({"docker": {"repository": "team/image:1"}}, "docker.repository", "expected a repository"),
        ({"docker": {"volumes": ["/data"]}}, "docker.volumes.0", "expected SOURCE:TARGET"),
        ({"docker": {"gpus": "some"}}, "docker.gpus", 'expected "all", or a whole number'),
        ({"docker": {"capabilities": ["cap_sys_ptrace"]}}, "docker.capabilities.0", "such as SYS_PTRACE"),
        ({"kubernetes": {"volumes": [{"mount_path": "/x"}]}},
         "kubernetes.volumes.0", "needs exactly one of pvc, secret"),
        ({"kubernetes": {"volumes": [{"mount_path": "/x", "pvc": "a", "secret": "b"}]}},
         "kubernetes.volumes.0", "exactly one"),
        ({"kubernetes": {"volumes": [{"pvc": "a"}]}},
         "kubernetes.volumes.0.mount_path", "is missing; expected an absolute"),
        ({"kubernetes": {"env_cache": {}}}, "kubernetes.env_cache", "needs exactly one of pvc, host_path"),
        ({"kubernetes": {"env_cache": "pvc"}}, "kubernetes.env_cache", 'is "pvc"; expected a mapping'),
        ({"kubernetes": {"tolerations": [{"n": math.nan}]}},
         "kubernetes.tolerations.0.n", "a value that JSON can hold"),
        ({"kubernetes": {"affinity": {"a": {1: 2}}}}, "kubernetes.affinity.a", "holds the name 1; expected text"),
        ({"kubernetes": {"affinity": {"a": [b"x"]}}}, "kubernetes.affinity.a.0", "is a bytes object"),
        ({"kubernetes": {"pod_template": 1}}, "kubernetes.pod_template", "is 1; expected a path or a mapping"),
        ({"kubernetes": {"context": "a\0b"}}, "kubernetes.context", r'is "a\u0000b"'),
        ({"kubernetes": {"context": "\ud800"}}, "kubernetes.context", "UTF-8"),
        # variables
        ({"env_vars": {"A-B": "x"}}, "env_vars", 'holds the name "A-B"; expected a variable name'),
        ({"env_vars": {"": "x"}}, "env_vars", 'holds the name ""'),
        ({"env_vars": {"A\n": "x"}}, "env_vars", r'holds the name "A\n"'),
        ({"env_vars": {1: "x"}}, "env_vars", "holds the name 1"),
        ({"env_vars": {"A": True}}, "env_vars.A", 'Write "true" in quotes if you mean the word.'),
        ({"env_vars": {"A": [1]}}, "env_vars.A", "is a list"),
        ({"env_vars": {"A": "x\0y"}}, "env_vars.A", "expected text without NUL bytes"),
        ({"env_vars": {"A": 10**40}}, "env_vars.A", "in quotes"),
        ({"env_vars": {"A": math.inf}}, "env_vars.A", "is a number"),
        ({"env_vars": {"MLFLOW_RUN_ID": "x"}}, "env_vars", "We set MLFLOW_REMOTE_*, MLFLOW_RUN_ID"),
        ({"env_vars": {"MLFLOW_REMOTE_OUTPUT_DIR": "x"}}, "env_vars", "We set MLFLOW_REMOTE_*"),
        ({"env_vars": {"MLFLOW_TRACKING_URI": "x"}}, "env_vars", "see the key tracking_uri"),
        ({"pass_env": ["MLFLOW_RUN_ID"]}, "pass_env.0", "We set MLFLOW_REMOTE_*"),
        ({"pass_env": {"A": "x"}}, "pass_env", "is a mapping"),
        ({"pass_env": ["HOME", "NOT_SET", "NOR_THIS"]}, "pass_env", "names NOT_SET, NOR_THIS, which are not set here"),
        ({"secrets": {"A": "no-slash"}}, "secrets.A", "expected SECRET/KEY, or {name: SECRET, key: KEY}"),
        ({"secrets": {"A": {"name": "db"}}}, "secrets.A.key", "is missing"),
        ({"env_vars": {"HOME": "/"}, "pass_env": ["HOME"]}, "pass_env", 'sets HOME, and so does "env_vars"'),
        ({"env_vars": {"A": "/"}, "secrets": {"A": "s/k"}}, "secrets", 'sets A, and so does "env_vars"'),
        ({"pass_env": ["HOME"], "secrets": {"HOME": "s/k"}}, "secrets", 'sets HOME, and so does "pass_env"'),
        # together
        ({"compute": "docker", "snapshot": {"in_place": True}}, "snapshot.in_place", "is for the compute local only"),
        # several spellings
        ({"COMPUTE": "local", "compute": "docker"}, "COMPUTE", '"COMPUTE" and "compute" say different things'),
        ({"ENV_MANAGER": "uv", "env_manager": "conda"},
         "ENV_MANAGER", "(the option --env-manager) and \"env_manager\""),
        ({"USE_CONDA": False, "env_manager": "conda"}, "USE_CONDA", '"USE_CONDA" and "env_manager"'),
        ({"USE_CONDA": False, "ENV_MANAGER": "conda"}, "USE_CONDA", '"ENV_MANAGER" say different things'),
        ({"kube-context": "a", "kubernetes": {"context": "b"}},
         "kube-context", '"kube-context" and "kubernetes.context"'),
        ({"build_image": True, "docker": {"build": False}}, "build_image", "--build-image"),
        ({"COMPUTE": 5}, "COMPUTE", '"COMPUTE" is 5'),
        ({"USE_CONDA": "false"}, "USE_CONDA", "Write false without quotes."),
        ({"SYNCHRONOUS": "yes"}, "SYNCHRONOUS", 'is "yes"; expected true or false'),
        ({"kubernetes": {"kube-context": 1}}, "kubernetes.kube-context", "is 1"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_key_value_and_what_is_expected(raw: dict[str, Any], key: str, words: str) -> None:
    error = refused(raw)
    assert error.key == key
    assert f'"{key}"' in str(error)
    assert words in str(error)


@pytest.mark.parametrize(
    ("raw", "key", "suggestion"),
    [
        ({"computr": "local"}, "computr", '"compute"'),
        ({"Compute": "local"}, "Compute", '"compute"'),
        ({"Stream-Output": True}, "Stream-Output", '"stream_output"'),
        ({"streamOutput": True}, "streamOutput", '"stream_output"'),
        ({"KUBE_CONTEXT": "x"}, "KUBE_CONTEXT", '"kube-context"'),
        ({"kube_job_template_path": "x"}, "kube_job_template_path", '"kube-job-template-path"'),
        ({"use_conda": False}, "use_conda", '"USE_CONDA"'),
        ({"resources": {"memroy": 1}}, "resources.memroy", '"resources.memory"'),
        ({"resources": {"Shm-Size": 1}}, "resources.Shm-Size", '"resources.shm_size"'),
        ({"memory": "4Gi"}, "memory", '"resources.memory"'),
        ({"nodeSelector": {}}, "nodeSelector", '"kubernetes.node_selector"'),
        ({"image": "x"}, "image", '"docker.image" or "kubernetes.image"'),
        ({"kubernetes": {"memory": 1}}, "kubernetes.memory", '"resources.memory"'),
        ({"kubernetes": {"volumes": [{"mountPath": "/x", "pvc": "a"}]}}, "kubernetes.volumes.0.mountPath",
         '"kubernetes.volumes.0.mount_path"'),
        ({"retry": {"on": [{"exit_code": 1}]}}, "retry.on.0.exit_code", '"retry.on.0.exit_codes"'),
        ({"docker": {"repository_uri": "x"}}, "docker.repository_uri", '"docker.repository-uri"'),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_and_the_nearest_named(raw: dict[str, Any], key: str, suggestion: str) -> None:
    error = refused(raw)
    assert error.key == key
    assert f'"{key}" is not a key' in error.what
    assert error.hint == f"Did you mean {suggestion}?"


def test_an_unknown_key_like_no_other_lists_what_is_known() -> None:
    assert refused({"docker": {"frobnicate": 1}}).hint.startswith("Known here: image, build, repository")
    assert refused({5: 1}).hint.startswith("Known here: compute")


def test_an_unknown_keys_value_and_names_from_outside_cannot_write_to_the_terminal() -> None:
    error = refused({"\x1b]52;c;\x07": SECRET})
    assert "\x1b" not in str(error)
    assert SECRET not in str(error)
    assert "\x1b" not in str(refused({"compute": "\x1b[2J"}))


def test_a_cycle_is_refused() -> None:
    cycle: dict[str, Any] = {}
    cycle["again"] = cycle
    assert "nested deeper than 64 levels" in str(refused({"kubernetes": {"affinity": cycle}}))
    listed: list[Any] = []
    listed.append(listed)
    assert "is a list" in str(refused({"outputs": [listed]}))


def test_long_values_are_cut_in_messages() -> None:
    assert len(str(refused({"compute": "x" * 100_000}))) < 400
    assert len(str(refused({"x" * 100_000: 1}))) < 1500


# ---------------------------------------------------------------------------------------------------------- secrecy


@pytest.mark.parametrize(
    "raw",
    [
        {"env_vars": SECRET},
        {"env_vars": [SECRET]},
        {"env_vars": {"A": [SECRET]}},
        {"env_vars": {"A": SECRET + "\0"}},
        {"pass_env": SECRET},
        {"pass_env": [f"TOKEN={SECRET}"]},
        {"pass_env": {"TOKEN": SECRET}},
        {"secrets": SECRET},
        {"secrets": {"A": SECRET}},
        {"secrets": {"A": {"name": SECRET + " ", "key": "k"}}},
        {"docker_auth": SECRET},
        {"docker_auth": {"password": [SECRET]}},
        {"docker_auth": {"password": SECRET + "\0"}},
        {"DOCKER_ARGS": f"-e A={SECRET}"},
        {"docker": {"args": {"e": SECRET + "\0"}}},
        {"tracking_uri": f"http://me:{SECRET}@mlflow.example"},
        {"tracking_uri": f"postgresql://me:{SECRET}@db.example/mlflow"},
        {"tracking_uri": f"http://{SECRET}@mlflow.example"},
        {"tracking_uri": f"http://me:{SECRET}@mlflow.example/" + "x" * 9000},
        {"environment": {"index_url": f"https://me:{SECRET}@index.example/simple"}},
        {"environment": {"index_url": f"https://{SECRET}@index.example/simple"}},
        {"environment": {"index_url": f"https://$ME:{SECRET}:x@index.example/simple"}},
        {"environment": {"channels": [f"https://me:{SECRET}@mirror.example/c"]}},
        {"environment": {"channels": [f"https://conda.example/t/{SECRET}/c"]}},
        {"environment": {"channel_alias": f"https://me:{SECRET}@mirror.example"}},
        {"environment": {"channel_map": {"a": f"https://me:{SECRET}@mirror.example"}}},
        {"environment": {"channel_map": {f"https://me:{SECRET}@mirror.example": "https://b.example"}}},
        {"docker": {"base_url": f"tcp://me:{SECRET}@daemon.example"}},
        {"kubernetes": [SECRET]},
        {"compute": {"x": SECRET}},
        {"unknown": SECRET},
        {"compute": "local", "resources": {"unknown": {"password": SECRET}}},
        f'{{"env_vars": {{"A": "{SECRET}" }}',
    ],
)  # fmt: skip
def test_no_message_shows_a_secret(raw: Any) -> None:
    error = refused(raw)
    assert SECRET not in str(error)
    cause: BaseException | None = error
    while cause is not None:  # neither do the errors that a traceback would show
        assert SECRET not in str(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def test_credentials_are_refused_with_the_way_to_give_them() -> None:
    index = refused({"environment": {"index_url": f"https://me:{SECRET}@index.example/simple"}})
    assert "$MY_USER:$MY_PASSWORD@host" in index.hint
    tracking = refused({"tracking_uri": f"http://me:{SECRET}@mlflow.example"})
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in tracking.hint


@pytest.mark.parametrize(
    "url",
    [
        "https://$U:$P@host.example/simple",
        "https://me:${P}@host.example/simple",
        "https://$TOKEN@host.example",
        "https://host.example:8443/a/b@1?x=y@z",
        "https://host.example/t/$TOKEN/channel",
        "file:///mirror/channel",
    ],
)
def test_a_url_whose_credentials_are_variables_is_taken(url: str) -> None:
    assert understood({"environment": {"channels": [url], "index_url": url}}).environment.channels == (url,)


def test_repr_shows_no_value_of_a_variable() -> None:
    environ = {"HOME": "/nonexistent", "TOKEN": SECRET}
    config = understood(
        {
            "compute": "kubernetes",
            "env_vars": {"A": SECRET},
            "pass_env": ["TOKEN"],
            "docker_auth": {"password": SECRET},
            "docker": {"args": {"e": SECRET}},
            "kubernetes": {"pod_template": {"spec": {"env": SECRET}}},
        },
        environ,
    )
    assert config.pass_env == {"TOKEN": SECRET}
    assert config.env_vars == {"A": SECRET}
    assert SECRET not in repr(config)
    assert SECRET not in f"{config.pass_env} {config.env_vars} {config.docker.args}"
    assert "TOKEN" in repr(config)
    assert SECRET not in repr(dataclasses.replace(config, compute="docker"))
    assert SECRET not in repr(copy.deepcopy(config))


# ---------------------------------------------------------------------------------------- the command line, variables


def test_run_id_and_run_name_of_the_command_line_are_used() -> None:
    config = understood({}, cli=CliContext(run_id="abc", run_name="my run"))
    assert (config.run_id, config.run_name) == ("abc", "my run")
    assert understood({"run_id": "abc"}, cli=CliContext(run_id="abc")).run_id == "abc"
    assert understood({"run_id": "abc"}, cli=CliContext()).run_id == "abc"


def test_the_command_line_and_a_key_that_differ_are_refused() -> None:
    error = refused({"run_name": "a"}, cli=CliContext(run_name="b"))
    assert '"run_name" and the option --run-name of the mlflow command say different things' in str(error)
    assert "the option --run-id" in str(refused({}, cli=CliContext(run_id="a b")))


def test_the_kube_variable_gives_the_tracking_uri_unless_a_key_does_or_the_job_is_local() -> None:
    environ = {"HOME": "/nonexistent", "KUBE_MLFLOW_TRACKING_URI": "http://mlflow.svc"}
    assert understood({"compute": "kubernetes"}, environ).tracking_uri == "http://mlflow.svc"
    assert understood({"compute": "docker"}, environ).tracking_uri == "http://mlflow.svc"
    assert understood({"compute": "docker", "tracking_uri": "http://other"}, environ).tracking_uri == "http://other"
    assert understood({}, environ).tracking_uri is None


def test_credentials_in_the_kube_variable_are_refused_by_its_name() -> None:
    environ = {"HOME": "/nonexistent", "KUBE_MLFLOW_TRACKING_URI": f"http://me:{SECRET}@mlflow.svc"}
    error = refused({"compute": "kubernetes"}, environ)
    assert "KUBE_MLFLOW_TRACKING_URI" in error.what
    assert SECRET not in str(error)


def test_without_a_project_folder_paths_start_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert understood({"kubernetes": {"kubeconfig": "k"}}).kubernetes.kubeconfig == str(tmp_path / "k")
    (tmp_path / "rel").mkdir()
    relative = understood({"kubernetes": {"kubeconfig": "k"}}, project=Path("rel"))
    assert relative.kubernetes.kubeconfig == str(tmp_path / "rel" / "k")


# ------------------------------------------------------------------------------------------------------ named computes

CLUSTER = """
computes:
  gpu-cluster:
    compute: kubernetes
    env_vars: {A: named, B: named}
    resources: {memory: 4Gi, gpu: 1}
    outputs: [plots]
    labels: {country: no}
    retry: {on: [oom]}
    kubernetes: {namespace: ml, kubeconfig: kube/config, env_cache: {pvc: envs}}
"""


def test_a_named_compute_describes_a_place(project: Path, environ: dict[str, str]) -> None:
    write_computes(project, CLUSTER)
    config = understood({"COMPUTE": "gpu-cluster"}, environ, project)
    assert (config.compute, config.compute_name) == ("kubernetes", "gpu-cluster")
    assert config.kubernetes.namespace == "ml"
    assert config.labels == {"country": "no"}
    assert config.retry.on == ("oom",)


def test_backend_config_lies_over_the_named_compute_over_the_defaults(project: Path, environ: dict[str, str]) -> None:
    write_computes(project, CLUSTER)
    raw = {
        "compute": "gpu-cluster",
        "env_vars": {"B": "mine", "A": None},
        "resources": {"gpu": 2},
        "outputs": ["tables"],
        "kubernetes": {"namespace": None, "queue": "q", "env_cache": {"pvc": None, "host_path": "/envs"}},
    }
    config = understood(raw, environ, project)
    assert config.env_vars == {"B": "mine"}
    assert (config.resources.gpu, config.resources.memory_bytes) == (2, 4 * 2**30)
    assert config.outputs == ("tables",)
    assert (config.kubernetes.namespace, config.kubernetes.queue) == (None, "q")
    assert config.kubernetes.env_cache == EnvCache(host_path="/envs")
    assert config.limits == Limits()


def test_relative_paths_start_where_they_stand(project: Path, environ: dict[str, str], tmp_path: Path) -> None:
    write_computes(tmp_path / "home/.config/mlflow-remote", CLUSTER)
    config = understood({"compute": "gpu-cluster", "kubernetes": {"pod_template": "pod.yaml"}}, environ, project)
    assert config.kubernetes.kubeconfig == str(tmp_path / "home/.config/mlflow-remote/kube/config")
    assert config.kubernetes.pod_template == str(project / "pod.yaml")


def test_the_first_file_that_defines_a_name_wins(project: Path, environ: dict[str, str], tmp_path: Path) -> None:
    def computes(*names: str) -> str:
        return json.dumps(
            {"computes": {n: {"compute": "kubernetes", "kubernetes": {"namespace": names[0]}} for n in names}}
        )

    write_computes(project, computes("a"))
    write_computes(tmp_path / "xdg" / "mlflow-remote", computes("b", "a"))
    pointed = write_computes(tmp_path / "pointed", computes("c", "b", "a"))
    environ |= {"XDG_CONFIG_HOME": str(tmp_path / "xdg"), "MLFLOW_REMOTE_CONFIG": str(pointed)}
    for name in "abc":
        assert understood({"compute": name}, environ, project).kubernetes.namespace == name


def test_an_alias_lies_over_what_a_named_compute_says(project: Path, environ: dict[str, str]) -> None:
    write_computes(project, "computes: {a: {compute: docker, env_manager: uv}}")
    assert understood({"compute": "a", "ENV_MANAGER": "local"}, environ, project).env_manager == "local"
    assert understood({"compute": "a", "ENV_MANAGER": None}, environ, project).env_manager == "uv"


def test_wrong_keys_of_a_named_compute_name_the_file_and_the_compute(project: Path, environ: dict[str, str]) -> None:
    path = write_computes(
        project, "computes: {a: {compute: docker, resources: {memory: 4 G}}, b: {compute: local, timout: 1}}"
    )
    error = refused({"compute": "a"}, environ, project)
    assert error.what.startswith(f'compute "a" in {path}: "resources.memory" is "4 G"; expected a size')
    assert f'compute "b" in {path}: "timout" is not a key' in refused({"compute": "b"}, environ, project).what
    assert understood({}, environ, project) == BackendConfig()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{}", "does not say where it runs"),
        ("[]", "is a list; expected a mapping with keys of backend_config"),
        ("{compute: b}", "A named compute cannot build on another one."),
        ("{compute: local, run_id: abc}", '"run_id" belongs to a single run'),
        ("{compute: local, submission_id: abc}", '"submission_id" belongs to a single run'),
        ("{compute: local, docker_auth: {password: x}}", '"docker_auth" belongs to a single run'),
        ("{compute: docker, snapshot: {in_place: true}}", '"snapshot.in_place" is for the compute local only'),
        ("{compute: docker, pass_env: [NOT_SET]}", "names NOT_SET, which is not set here"),
    ],
)
def test_an_unfit_named_compute_is_refused(project: Path, environ: dict[str, str], section: str, words: str) -> None:
    path = write_computes(project, f"computes: {{a: {section}, b: {{compute: local}}}}")
    error = refused({"compute": "a"}, environ, project)
    assert words in str(error)
    assert f'compute "a" in {path}' in str(error)


@pytest.mark.parametrize("name", ["local", "docker", "kubernetes"])
def test_a_named_compute_cannot_take_a_built_in_name(project: Path, environ: dict[str, str], name: str) -> None:
    path = write_computes(project, f"computes: {{{name}: {{compute: local}}}}")
    error = refused({"compute": name}, environ, project)
    assert f'{path}: "computes.{name}" takes the name of a built-in compute' in str(error)


def test_an_unknown_compute_lists_the_known_and_where_was_looked(
    project: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    path = write_computes(project, CLUSTER)
    environ["MLFLOW_REMOTE_CONFIG"] = str(tmp_path / "not-there.yaml")
    error = refused({"compute": "gpu_clutser"}, environ, project)
    assert error.key == "compute"
    assert 'is "gpu_clutser", which is no known compute' in error.what
    assert 'Did you mean "gpu-cluster"?' in error.hint
    assert "Known: local, docker, kubernetes, gpu-cluster." in error.hint
    assert f"{path}, " in error.hint
    assert f"{tmp_path / 'not-there.yaml'} (does not exist)" in error.hint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1, 2]", 'is a list; expected a mapping: "computes" and under it'),
        (b"just text", 'is "just text"; expected a mapping'),
        (b"gpu: {compute: docker}", '"gpu" is not a key here'),
        (b"computes: [a]", '"computes" is a list; expected a mapping'),
        (b"computes: {'a b': {compute: local}}", 'holds the name "a b"'),
        (b"computes: {a: {compute: local}, a: {compute: docker}}", 'has the key "a" twice (line 1)'),
        (b"computes: {", "is not valid YAML"),
        (b"a: 1\n---\nb: 2", "is not valid YAML"),
        (b"computes: \x01", "is not valid YAML"),
        (b"computes: {a: !!python/object/apply:os.getcwd []}", "is not valid YAML"),
        (b"\xff\xfe\xff", "is not UTF-8 text"),
        (b"#" * (1 << 20) + b"#", "is larger than 1 MiB"),
        (b"[" * 200_000, " nest"),  # PyYAML has a limit of its own from 6.0.4 on, and says it in its words
        (b"- " * 200_000, " nest"),
        (b"a: &a [*a]", "once its aliases are expanded"),
        (b"computes: " + b"9" * 5000, "cannot be read"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_whatever_compute_is_asked_for(
    project: Path, environ: dict[str, str], content: bytes, words: str
) -> None:
    path = project / "mlflow-remote.yaml"
    path.write_bytes(content)
    for raw in ({"compute": "a"}, {}):
        error = refused(raw, environ, project)
        assert words in str(error)
        assert str(path) in str(error)


@pytest.mark.parametrize("form", ["sequences", "merges"])
def test_a_yaml_bomb_is_refused(project: Path, environ: dict[str, str], form: str) -> None:
    lines = ["a0: &a0 [x, x]" if form == "sequences" else "a0: &a0 {x: 1}"]
    for level in range(1, 12):
        below = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"[{below}]" if form == "sequences" else f"{{<<: [{below}]}}"))
    write_computes(project, "\n".join(lines))
    assert "once its aliases are expanded" in str(refused({}, environ, project))


def test_ordinary_anchors_and_merges_work(project: Path, environ: dict[str, str]) -> None:
    text = """
computes:
  deep: {compute: kubernetes, kubernetes: &k {<<: &base {namespace: ml, queue: a}, queue: b}}
  other: {compute: kubernetes, kubernetes: {<<: *k, queue: c}}
"""
    write_computes(project, text)
    assert understood({"compute": "deep"}, environ, project).kubernetes.queue == "b"
    other = understood({"compute": "other"}, environ, project).kubernetes
    assert (other.namespace, other.queue) == ("ml", "c")


def test_yaml_means_what_it_looks_like(project: Path, environ: dict[str, str]) -> None:
    values = "{A: 1:30, B: 2024-01-31, C: off, D: 010, E: 1_000, F: 1e3, G: y, H: 0x10}"
    write_computes(project, f"computes: {{a: {{compute: local, env_vars: {values}}}}}")
    wanted = {"A": "1:30", "B": "2024-01-31", "C": "off", "D": "010", "E": "1_000", "F": "1000.0", "G": "y", "H": "16"}
    assert understood({"compute": "a"}, environ, project).env_vars == wanted


def test_a_secret_in_broken_yaml_is_not_shown(project: Path, environ: dict[str, str]) -> None:
    write_computes(project, f"computes: {{a: {{env_vars: {{TOKEN: '{SECRET}\n")
    error = refused({}, environ, project)
    assert "line 2" in str(error)
    assert SECRET not in str(error)


def test_an_empty_file_is_no_trouble(project: Path, environ: dict[str, str]) -> None:
    for text in ("", "# nothing\n", "computes:\n", "computes: {}\n"):
        write_computes(project, text)
        assert understood({}, environ, project) == BackendConfig()


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in folders")
def test_a_pipe_a_folder_and_a_dangling_link_are_refused_at_once(project: Path, environ: dict[str, str]) -> None:
    path = project / "mlflow-remote.yaml"
    os.mkfifo(path)
    assert "is not a regular file" in str(refused({}, environ, project))
    path.unlink()
    path.mkdir()
    assert "is not a regular file" in str(refused({}, environ, project))
    path.rmdir()
    path.symlink_to("nowhere")
    assert "does not exist" in str(refused({}, environ, project))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that nobody can read from its start")
def test_an_unreadable_file_is_refused_in_the_systems_words(environ: dict[str, str]) -> None:
    error = refused({}, environ | {"MLFLOW_REMOTE_CONFIG": "/proc/self/mem"})
    assert error.what == "/proc/self/mem cannot be read."
    assert "Input/output error" in error.words


# ------------------------------------------------------------------------------------------------ computes of others


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that brings a compute called slurm."""
    info = tmp_path / "site" / "their_slurm-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-slurm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mlflow_remote_backend.compute]\nslurm = their_slurm:Slurm\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


@pytest.mark.usefixtures("slurm")
def test_the_section_of_an_installed_compute_is_passed_on(project: Path, environ: dict[str, str]) -> None:
    raw = {"compute": "slurm", "slurm": {"partition": "gpu", "nodes": [1, {"a": None}]}}
    config = understood(raw, environ, project)
    assert config.compute == "slurm"
    assert config.options() == raw["slurm"]
    assert understood({"slurm": {"partition": SECRET}}).options() == {}
    assert SECRET not in repr(understood({"compute": "slurm", "slurm": {"partition": SECRET}}))
    write_computes(project, "computes: {big: {compute: slurm, slurm: {partition: cpu, time: 1}}}")
    named = understood({"compute": "big", "slurm": {"partition": "gpu"}}, environ, project)
    assert (named.compute, named.compute_name) == ("slurm", "big")
    assert named.options() == {"partition": "gpu", "time": 1}
    assert '"slurm" is 1; expected a mapping' in str(refused({"slurm": 1}))
    assert schema()["properties"]["slurm"] == {"title": "slurm", "type": ["object", "null"]}
    assert "slurm" in refused({"compute": "slrm"}).hint


def test_a_compute_that_is_not_installed_is_an_unknown_key() -> None:
    assert '"slurm" is not a key' in str(refused({"slurm": {}}))


# ------------------------------------------------------------------------------------------------ quantities, by number


def of_units(number: int, units: Mapping[str, int]) -> str:
    """A number of seconds as people write it, largest unit first."""
    text = ""
    for unit, size in units.items():
        count, number = divmod(number, size)
        text += f"{count}{unit}" if count else ""
    return text


@given(st.integers(1, 3650 * 86400))
def test_durations_round_trip(seconds: int) -> None:
    text = of_units(seconds, {"d": 86400, "h": 3600, "m": 60, "s": 1})
    assert DURATION.read(text, HERE) == DURATION.read(seconds, HERE) == float(seconds)


@given(
    st.integers(1, 10**6),
    st.sampled_from([("k", 10**3), ("M", 10**6), ("GB", 10**9), ("Ki", 2**10), ("MiB", 2**20), ("Gi", 2**30)]),
)
def test_sizes_round_trip(number: int, unit: tuple[str, int]) -> None:
    assert SIZE.read(f"{number}{unit[0]}", HERE) == number * unit[1] == SIZE.read(number * unit[1], HERE)


@given(st.integers(0, 9999), st.integers(0, 999))
def test_fractions_of_a_size_are_exact_and_rounded_up(whole: int, thousandths: int) -> None:
    assume(whole or thousandths)
    exact = (whole * 1000 + thousandths) * 2**30
    assert SIZE.read(f"{whole}.{thousandths:03}Gi", HERE) == -(-exact // 1000)


@given(st.integers(1, 10**9 - 1))
def test_thousandths_of_a_core_round_trip(millis: int) -> None:
    assert CPU.read(f"{millis}m", HERE) == millis / 1000
    assert CPU.read(f"{millis // 1000}.{millis % 1000:03}", HERE) == pytest.approx(millis / 1000)


@pytest.mark.parametrize(
    "text", ["", "s", "1", "1w", "-1s", "+1s", "1s1s", "1e3s", "1.s", ".5s", "0x1s", "1 h", "1H", "nan", "0s", "0h0s"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        DURATION.read(text, HERE)


@pytest.mark.parametrize(
    "text",
    ["", "G", "1", "-1G", "1g", "1gb", "512m", "1 G", "1Gib", "1e3M", "0M", "0.0Gi", "1G2M", "1b", "9" * 30 + "P"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        SIZE.read(text, HERE)


# ------------------------------------------------------------------------------------------------------- JSON Schema

SCHEMA = schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


class EveryName(dict[str, str]):
    """An environment in which every variable is set."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return ""

    def get(self, name: str, default: Any = None) -> Any:
        return {"HOME": "/nonexistent"}.get(name, default)


def parser_accepts(raw: Any) -> bool:
    try:
        understood(raw, EveryName())
    except ConfigError:
        return False
    return True


def patterns(kind: Kind) -> Iterator[str]:
    """The regular expressions of a kind and of all that it holds."""
    text = json.dumps(kind.schema())
    found = json.loads(text)

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("pattern"), str):
                yield node["pattern"]
            for one in node.values():
                yield from walk(one)
        elif isinstance(node, list):
            for one in node:
                yield from walk(one)

    yield from dict.fromkeys(walk(found))


WORDS = [
    *("auto", "local", "conda", "30s", "1d12h", "0s", "4Gi", "512m", "0.5", "500m", "a/b", "../x", ".", "oom", "all"),
    *("/x", "https://$A:$B@h.example/", "https://a:b@h.example/", "true", "MLFLOW_RUN_ID", "A", "30s\n", "linux/amd64"),
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)


@functools.cache
def values_for(dotted: str) -> st.SearchStrategy[Any]:
    """Values near what a key takes, and far from it."""
    key = ALL_KEYS[dotted]
    texts = st.one_of(SCALARS, *(st.from_regex(pattern) for pattern in patterns(key.kind)))
    section = key.kind.item if isinstance(key.kind, ListOf) else key.kind
    names = [one.name for one in section.keys] if isinstance(section, Section) else ["exit_codes", "name", "key", "A"]
    mappings = st.dictionaries(
        st.sampled_from(names) | texts.filter(lambda one: isinstance(one, str)), texts, max_size=3
    )
    members = st.lists(texts | mappings, max_size=3)
    return texts | mappings | members | st.dictionaries(st.sampled_from(names), members, max_size=2)


def expressible(raw: Any) -> bool:
    """Not what a schema cannot say: how much the parts of a text add up to, and which computes there are."""
    name = raw.get("compute", raw.get("COMPUTE"))
    known = not isinstance(name, str) or name in parser_module.COMPUTES
    return known and not re.search(r'"(?:[0-9.]+[dhms])*[0-9]{4,}[0-9.dhmskKGMTPiB]*"', json.dumps(raw))


LEAVES = [dotted for dotted in ALL_KEYS if "[]" not in dotted]


@pytest.mark.parametrize("dotted", LEAVES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_schema_and_the_parser_accept_the_same(dotted: str, data: st.DataObject) -> None:
    raw = nested(dotted, data.draw(values_for(dotted)))
    assume(expressible(raw))
    assert VALIDATOR.is_valid(raw) == parser_accepts(raw), raw


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.name)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_schema_knows_the_other_spellings(alias: Any, data: st.DataObject) -> None:
    raw = nested(alias.name, data.draw(values_for(alias.key)))
    assume(expressible(raw))
    assert VALIDATOR.is_valid(raw) == parser_accepts(raw), raw


@pytest.mark.parametrize(
    ("raw", "valid"),
    [
        ({"resources": {"memory": 2**63 - 1, "cpu": 1e6}}, True),
        ({"resources": {"memory": 2**63}}, False),
        ({"timeout": 315360000}, True),
        ({"timeout": 315360001}, False),
        ({"env_vars": {"A": 10**18}}, True),
        ({"env_vars": {"A": 10**18 + 1}}, False),
        ({"kubernetes": {"run_as_user": 2**31}}, False),
        ({"unknown": 1}, False),
        ({"docker": {"unknown": 1}}, False),
    ],
)
def test_the_schema_has_the_parsers_bounds(raw: Any, valid: bool) -> None:
    assert VALIDATOR.is_valid(raw) is parser_accepts(raw) is valid


def test_the_schema_is_a_schema_and_documents_every_key() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA

    def check(properties: dict[str, Any], section: Section) -> None:
        for key in section.keys:
            entry = properties[key.name]
            assert entry["title"] == key.name
            assert entry["description"] == key.doc
            assert entry.get("default") == key.default
            if isinstance(key.kind, Section):
                check(entry.get("properties") or entry["anyOf"][0]["properties"], key.kind)

    check(SCHEMA["properties"], KEYS)


# ------------------------------------------------------------------------------------------------------------- docs


def documented_tables() -> dict[str, list[str]]:
    """The tables of docs/configuration.md as the keys want them: a heading's section and its rows."""
    tables: dict[str, list[str]] = {}
    for dotted, key in ALL_KEYS.items():
        section, _, _ = dotted.rpartition(".")
        default = "" if key.default is None else f"`{json.dumps(key.default).strip(chr(34))}`"
        others = ", ".join(f"`{alias.name}`" for alias in ALIASES if alias.key == dotted)
        needed = " **Required.**" if key.required else ""
        row = f"| `{dotted}` | {key.kind.name} | {default} | {key.doc}{needed} | {others} |"
        tables.setdefault(section, []).append(row.replace("|  |", "| |").replace("|  |", "| |"))
    return tables


def test_the_docs_have_a_row_for_every_key_and_no_other() -> None:
    wanted = [row for rows in documented_tables().values() for row in rows]
    found = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert sorted(found) == sorted(wanted)


def test_the_docs_examples_are_understood(tmp_path: Path) -> None:
    blocks = DOCS.read_text(encoding="utf-8").split("```")[1::2]
    yamls = [block.removeprefix("yaml\n") for block in blocks if block.startswith("yaml\n")]
    jsons = [block.removeprefix("json\n") for block in blocks if block.startswith("json\n")]
    assert yamls
    assert jsons
    for number, text in enumerate(yamls):
        project = tmp_path / str(number)
        write_computes(project, text)
        for name in yaml.safe_load(text)["computes"]:
            understood({"compute": name}, EveryName(), project)
    for text in jsons:
        understood(text, EveryName())


# ------------------------------------------------------------------------------------------------------------ weight


def test_importing_and_parsing_load_nothing_heavy() -> None:
    heavy = {"yaml", "jsonschema", "mlflow", "docker", "kubernetes", "requests", "numpy", "asyncio", "subprocess"}
    code = (
        "import sys; from mlflow_remote_backend.config import parse;"
        "parse({'compute': 'docker'}, project_dir=None, environ={'HOME': '/nonexistent'});"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert heavy & set(done.stdout.split()) == set()
    assert "mlflow_remote_backend.config" in done.stdout.split()


def test_grace_zero_is_allowed_and_no_other_zero() -> None:
    assert DURATION_OR_ZERO.read("0s", HERE) == 0.0
    zero = {dotted for dotted, key in ALL_KEYS.items() if key.kind is DURATION_OR_ZERO}
    assert zero == {"grace_period", "kubernetes.ttl"}


@pytest.mark.parametrize(("compute", "program", "runner"), [("local", 1, 1), ("docker", 0, 1), ("kubernetes", 0, 0)])
def test_names_of_files_go_no_further_than_this_machine(compute: str, program: int, runner: int) -> None:
    environ = {"MLFLOW_TRACKING_SERVER_CERT_PATH": "/home/me/ca.pem", "MLFLOW_TRACKING_TOKEN": SECRET}
    secrets = secrets_of(BackendConfig(compute=compute), environ, EnvironmentRef("local"))
    for found, files in ((secrets.program, program), (secrets.runner, runner)):
        assert found["MLFLOW_TRACKING_TOKEN"] == SECRET
        assert ("MLFLOW_TRACKING_SERVER_CERT_PATH" in found) == bool(files)


def test_a_proxy_on_this_machine_is_none_for_pods() -> None:
    environ = {
        "HTTPS_PROXY": "http://127.0.0.1:3128",
        "https_proxy": "localhost:3128",
        "HTTP_PROXY": "http://[::1:3128",
        "http_proxy": "http://proxy.example:3128",
        "NO_PROXY": "x",
    }
    for compute, wanted in (("local", set(environ)), ("kubernetes", {"HTTP_PROXY", "http_proxy", "NO_PROXY"})):
        secrets = secrets_of(BackendConfig(compute=compute), environ, EnvironmentRef("local"))
        assert set(secrets.program) == set(secrets.runner) == wanted


def test_a_key_that_is_written_as_the_documentation_names_it_is_shown_nested() -> None:
    assert refused({"environment.frozen": True}).hint == 'Write {"environment": {"frozen": …}}.'


def test_an_environment_is_locked_for_where_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    for config, wanted in (
        (BackendConfig(compute="docker"), "linux-aarch64"),
        (BackendConfig(compute="kubernetes"), "linux-64"),
        (understood({"compute": "docker", "docker": {"platform": "linux/amd64"}}), "linux-64"),
    ):
        assert platform_of(config) == wanted
