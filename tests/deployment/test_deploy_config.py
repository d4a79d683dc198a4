"""A deployment's config: what is understood, what is refused, and how the message helps."""

from __future__ import annotations

import json

import pandas
import pytest
from mlflow.pyfunc.scoring_server import infer_and_parse_data
from mlflow.types import ColSpec, DataType, Schema

from mlflow_remote_backend.deployment import calling, config, model
from mlflow_remote_backend.deployment.spec import Autoscale, DeploymentSpec, ModelRef, Service
from mlflow_remote_backend.errors import ConfigError, RequestError
from mlflow_remote_backend.job import EnvironmentRef


def test_the_command_lines_text_means_what_json_means():
    text = {
        "compute": "docker",
        "docker.image": "team/python:3.11",
        "resources": '{"cpu": 2}',
        "resources.memory": "2Gi",
        "workers": "3",
        "timeout": "30",
        "service.port": "8080",
        "tags": '{"owner": "ada"}',
    }
    data = {
        "compute": "docker",
        "docker": {"image": "team/python:3.11"},
        "resources": {"cpu": 2, "memory": "2Gi"},
        "workers": 3,
        "timeout": 30,
        "service": {"port": 8080},
        "tags": {"owner": "ada"},
    }
    said, meant = config.parse(text), config.parse(data)
    assert (said.run, said.workers, said.timeout_s, said.service, said.tags) == (
        (meant.run, 3, 30.0, Service(port=8080), {"owner": "ada"})
    )


def test_azures_words_are_understood():
    made = config.parse({"compute": "docker", "cpu_cores": "0.5", "memory_gb": 1, "description": "for trying"})
    assert made.run.resources.cpu == 0.5
    assert made.run.resources.memory_bytes == 2**30
    assert made.description == "for trying"


def test_two_words_for_one_thing_are_refused():
    with pytest.raises(ConfigError, match="say the same thing"):
        config.parse({"cpu_cores": 1, "resources": {"cpu": 2}})


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ({"resorces": {}}, "resources"),
        ({"worker": 2}, "workers"),
        ({"autoscal": {}}, "autoscale"),
        ({"retry": {}}, "means nothing for a deployment"),
        ({"service": {"prot": 1}}, "prot"),
        ({"resources": {"memmory": "1Gi"}}, "memory"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(said, hint):
    with pytest.raises(ConfigError) as refused:
        config.parse({"compute": "local", **said})
    assert hint in str(refused.value)


@pytest.mark.parametrize("said", [{"replicas": 2}, {"autoscale": {"max": 3}}, {"ingress": {"host": "a.example.com"}}])
def test_what_only_a_cluster_can_do_is_refused_elsewhere(said):
    with pytest.raises(ConfigError, match="needs the compute kubernetes"):
        config.parse({"compute": "docker", **said})
    assert config.parse({"compute": "kubernetes", **said}).run.compute == "kubernetes"


def test_autoscale_has_defaults_and_bounds():
    assert config.parse({"compute": "kubernetes", "autoscale": {"max": 4}}).autoscale == Autoscale(1, 4, 80)
    with pytest.raises(ConfigError, match="over its"):
        config.parse({"compute": "kubernetes", "autoscale": {"min": 5, "max": 4}})


def test_a_named_compute_and_the_targets_uri(tmp_path, monkeypatch):
    file = tmp_path / "mlflow-remote.yaml"
    file.write_text("computes:\n  box:\n    compute: docker\n    docker: {image: team/python:3}\n")
    monkeypatch.setenv("MLFLOW_REMOTE_CONFIG", str(file))
    made = config.parse({"workers": 2}, target="box")
    assert (made.run.compute, made.run.compute_name, made.run.docker.image) == ("docker", "box", "team/python:3")
    with pytest.raises(ConfigError, match="differs from the target's URI"):
        config.parse({"compute": "local"}, target="box")
    with pytest.raises(ConfigError, match="no known compute"):
        config.parse({}, target="bx")


def test_an_update_changes_only_what_it_says():
    before = config.parse({"compute": "docker", "docker": {"image": "a/b:1"}, "workers": 2}).raw
    after = config.parse({"docker": {"user": "7"}, "workers": None}, before=before)
    assert (after.run.docker.image, after.run.docker.user, after.workers) == ("a/b:1", "7", 1)


def test_null_of_the_command_line_takes_a_key_back():
    before = config.parse({"compute": "docker", "docker": {"user": "7"}, "token_env": "T", "description": "d"}).raw
    said = {"docker.user": "null", "token_env": "null", "description": "null", "resources.memory": "null"}
    after = config.parse(said, before=before)
    assert (after.run.docker.user, after.token_env, after.description) == (None, "", "")
    before = config.parse({"compute": "docker", "resources": {"memory": "2Gi"}}).raw
    after = config.parse({"resources.memory": "null", "memory_gb": "4"}, before=before)
    assert after.run.resources.memory_bytes == 4 * 2**30


def test_bytes_are_sent_as_the_scoring_server_takes_them():
    sent = calling.body_of(pandas.DataFrame({"image": [bytes(range(256))]}))
    schema = Schema([ColSpec(DataType.binary, "image")])
    assert infer_and_parse_data(json.loads(sent), schema)["image"][0] == bytes(range(256))


def test_the_token_is_a_variables_name_and_its_value_is_shown_nowhere(monkeypatch):
    made = config.parse({"token_env": "THE_TOKEN"})
    with pytest.raises(ConfigError, match="THE_TOKEN, which is not set here"):
        config.secrets_of(made, {})
    secrets = config.secrets_of(made, {"THE_TOKEN": "s3cret-value"})
    assert secrets.token == "s3cret-value"
    assert "s3cret" not in repr(secrets) + repr(made)
    with pytest.raises(ConfigError) as refused:
        config.secrets_of(made, {"THE_TOKEN": "two words"})
    assert "two words" not in str(refused.value)


@pytest.mark.parametrize("name", ["", "A", "a/b", "-a", "a" * 51, "a_b", "..", "a\n"])
def test_a_name_that_cannot_be_everywhere_is_refused(name):
    with pytest.raises(RequestError, match="cannot be a deployment's name"):
        config.check_name(name)


def test_a_spec_survives_its_text():
    spec = DeploymentSpec("a", ModelRef("models:/a/1", flavors=("x", "y")), autoscale=Autoscale(1, 3, 50), workers=2)
    assert DeploymentSpec.load(spec.dump()) == spec
    with pytest.raises(ValueError, match="list"):
        DeploymentSpec.load("[]")


def test_an_environment_without_the_scoring_server_is_refused():
    def locked(*lines: str) -> EnvironmentRef:
        hashed = "".join(f"{line} --hash=sha256:{'0' * 64}\n" for line in lines)
        return EnvironmentRef("virtualenv", "requirements", "key", hashed, "linux-64", "3.11")

    model.refuse_other_server(locked("mlflow-skinny==3.1.0", "pandas==2.0.0"))
    model.refuse_other_server(locked("mlflow==3.0.0rc1", "mlflow-skinny==3.0.0rc1"))
    with pytest.raises(RequestError, match=r"has mlflow 2\.9\.2"):
        model.refuse_other_server(locked("mlflow==2.9.2"))
    with pytest.raises(RequestError, match="has no MLflow"):
        model.refuse_other_server(locked("pandas==2.0.0"))
