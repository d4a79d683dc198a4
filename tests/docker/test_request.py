"""The document of a container: what an engine is asked for, compared whole; and who may ask for what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlflow_remote_backend.compute.docker import arguments, reach, request, users
from mlflow_remote_backend.compute.docker.request import Image
from mlflow_remote_backend.errors import ConfigError, ProjectError
from mlflow_remote_backend.job import EntryPoint, EnvironmentRef, JobSpec, Limits, Resources, RunRef, SnapshotRef

GOLDEN = Path(__file__).parent / "golden"
RUN_ID = "0123456789abcdef0123456789abcdef"
DEFAULTS = {"pull": "missing", "env_cache": "mlflow-remote-environments"}


def spec(**fields) -> JobSpec:
    options = {**DEFAULTS, **fields.pop("options", {})}
    base = {
        "run": RunRef(RUN_ID, "7", "mlflow-artifacts:/7/run/artifacts", "http://tracking.test:5000"),
        "submission_id": "submission-1",
        "project_name": "demo",
        "entry_point": EntryPoint("main", "python train.py --alpha {alpha}"),
        "parameters": {"alpha": "0.5"},
        "snapshot": SnapshotRef("sha256:" + "0" * 64, 1000),
        "environment": EnvironmentRef("docker"),
        "compute": "docker",
    }
    return JobSpec(**{**base, **fields}, options=options)


def everything() -> JobSpec:
    return spec(
        docker_env={
            "image": "team/image:1",
            "volumes": ["/data:/data:ro", "named:/cache"],
            "environment": [["MODE", "fast"], "HOST_TOKEN"],
        },
        resources=Resources(cpu=1.5, memory_bytes=2 << 30, gpu=2, shm_size_bytes=64 << 20),
        limits=Limits(grace_period_s=20),
        env_vars={"OPEN": "value-that-is-not-shown"},
        secret_names=("TOKEN",),
        labels={"team": "vision"},
        annotations={"note": "n"},
        options={
            "user": "1000:1000",
            "network": "training",
            "volumes": ["/more:/more"],
            "capabilities": ["SYS_PTRACE"],
            "runtime": "runsc",
            "args": {"shm-size": "1g", "ulimit": "nofile=1024:2048", "publish": "127.0.0.1:8080:80", "e": "A=b"},
        },
    )


def in_a_locked_environment() -> JobSpec:
    ref = EnvironmentRef("conda", "conda-lock", "f" * 64, "the lock", "linux-64", "3.11.7")
    return spec(environment=ref, options={"image": "python:3.11-slim"})


def on_a_local_store() -> JobSpec:
    return spec(
        run=RunRef(RUN_ID, "7", f"/home/me/work/mlruns/7/{RUN_ID}/artifacts", "sqlite:////home/me/work/mlflow.db"),
        docker_env={"image": "team/image:1"},
    )


@pytest.mark.parametrize("make", [everything, in_a_locked_environment, on_a_local_store])
def test_the_request_is_as_it_was(make) -> None:
    expected = (GOLDEN / f"{make.__name__}.json").read_text()
    assert json.dumps(request.printable(make()), indent=2, sort_keys=True) + "\n" == expected


def test_rendering_twice_gives_the_same() -> None:
    assert request.printable(everything()) == request.printable(everything())


def test_no_value_of_a_variable_is_printed() -> None:
    text = json.dumps(request.printable(everything()))
    assert "value-that-is-not-shown" not in text
    assert "fast" not in text
    assert "OPEN" in text


def test_literal_variables_are_the_projects_and_the_arguments() -> None:
    made = request.container(everything(), Image(), "")
    assert made.environment == {"MODE": "fast", "A": "b"}
    assert request.copied_variables(everything()) == ["HOST_TOKEN"]


def test_ours_cannot_be_relabelled() -> None:
    labelled = spec(docker_env={"image": "i"}, labels={"mlflow-remote/run-id": "another"})
    assert request.labels(labelled)["mlflow-remote/run-id"] == RUN_ID


# -- which image, which user


@pytest.mark.parametrize(
    ("options", "docker_env", "python", "expected"),
    [
        ({"image": "mine:1"}, {"image": "projects:1"}, "", "mine:1"),
        ({}, {"image": "projects:1"}, "", "projects:1"),
        ({}, None, "3.10.4", "python:3.10-slim"),
        ({}, None, "", f"python:{request.DEFAULT_PYTHON}-slim"),
    ],
)
def test_the_image_is_the_callers_then_the_projects_then_a_plain_one(options, docker_env, python, expected) -> None:
    job = spec(options=options, docker_env=docker_env, environment=EnvironmentRef("virtualenv", python=python))
    assert request.image_name(job) == expected


def test_a_docker_env_without_image_is_refused() -> None:
    with pytest.raises(ProjectError, match="names no image"):
        request.image_name(spec(docker_env={"volumes": []}))


@pytest.mark.parametrize(
    ("image_user", "rootless", "local_store", "expected"),
    [
        ("", False, False, "1000:1000"),
        ("root", False, False, "1000:1000"),
        ("0:0", False, True, "1000:1000"),
        ("app", False, False, ""),
        ("101:101", False, False, ""),
        ("app", False, True, "1000:1000"),
        ("", True, False, "0:0"),
        ("app", True, True, "0:0"),
    ],
)
def test_files_that_come_out_are_the_callers_unless_the_image_has_a_user(
    image_user, rootless, local_store, expected
) -> None:
    found = request.default_user(image_user, "1000:1000", rootless=rootless, local_store=local_store)
    assert found == expected


PASSWD = "root:x:0:0::/root:/bin/sh\napp:x:101:102::/app:/bin/sh\n:broken\n7:x:55:66::/:\n"
GROUP = "root:x:0:\nusers:x:100:\n"


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", (0, 0)),
        ("app", (101, 102)),
        ("101", (101, 102)),
        ("app:users", (101, 100)),
        ("app:7", (101, 7)),
        ("12345", (12345, 0)),
        ("1:2", (1, 2)),
        ("nobody-knows", (0, 0)),
    ],
)
def test_names_become_numbers_as_the_engine_resolves_them(user, expected) -> None:
    assert users.numeric(user, PASSWD, GROUP) == expected


# -- volumes of the project


def test_volumes_expand_as_in_the_shell_that_mlflow_uses() -> None:
    job = spec(docker_env={"image": "i", "volumes": ["~/data:/d", "$ROOT/x:/x:ro", "${ROOT}:/y", "name:/n"]})
    volumes = request.project_volumes(job, {"HOME": "/home/me", "ROOT": "/big"})
    assert volumes == ["/home/me/data:/d", "/big/x:/x:ro", "/big:/y", "name:/n"]


@pytest.mark.parametrize("volume", ["./data:/d", "../up:/d", "some/where:/d", "$UNSET/x:/d"])
def test_a_relative_volume_is_refused(volume) -> None:
    with pytest.raises(ConfigError, match="relative"):
        request.project_volumes(spec(docker_env={"image": "i", "volumes": [volume]}), {})


@pytest.mark.parametrize("path", ["/var/run/docker.sock", "/run/user/1000/docker.sock", "/run/containerd.sock"])
def test_a_project_does_not_get_the_engines_socket(path) -> None:
    with pytest.raises(ConfigError, match="socket"):
        request.project_volumes(spec(docker_env={"image": "i", "volumes": [f"{path}:/sock"]}), {})
    asked = spec(docker_env={"image": "i"}, options={"volumes": [f"{path}:/sock"]})
    assert request.container(asked, Image(), "").document["HostConfig"]["Binds"] == [f"{path}:/sock"]


# -- docker run's arguments

DEVICE = {"PathOnHost": "/dev/x", "PathInContainer": "/dev/x", "CgroupPermissions": "rwm"}
MOUNT = {"Type": "bind", "Source": "/a", "Target": "/b", "ReadOnly": True}
BASE = {"Image": "i", "HostConfig": {"CapDrop": ["ALL"], "SecurityOpt": ["no-new-privileges"]}}


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"m": "512m"}, "Memory", 512 << 20),
        ({"memory": "1.5g"}, "Memory", 3 << 29),
        ({"memory-swap": "-1"}, "MemorySwap", -1),
        ({"cpus": "1.5"}, "NanoCpus", 1_500_000_000),
        ({"c": "512"}, "CpuShares", 512),
        ({"v": "/a:/b"}, "Binds", ["/a:/b"]),
        ({"net": "host"}, "NetworkMode", "host"),
        ({"add-host": "a:1.2.3.4"}, "ExtraHosts", ["a:1.2.3.4"]),
        ({"device": "/dev/x"}, "Devices", [DEVICE]),
        ({"ulimit": "core=0"}, "Ulimits", [{"Name": "core", "Soft": 0, "Hard": 0}]),
        ({"tmpfs": "/run:size=1m"}, "Tmpfs", {"/run": "size=1m"}),
        ({"mount": "type=bind,src=/a,dst=/b,ro"}, "Mounts", [MOUNT]),
        ({"init": True}, "Init", True),
        ({"read-only": "true"}, "ReadonlyRootfs", True),
        ({"cap-add": "CHOWN"}, "CapAdd", ["CHOWN"]),
        ({"security-opt": "apparmor=unconfined"}, "SecurityOpt", ["no-new-privileges", "apparmor=unconfined"]),
        ({"security-opt": "no-new-privileges=false"}, "SecurityOpt", []),
        ({"log-opt": "max-size=5m"}, "LogConfig", {"Type": "json-file", "Config": {"max-size": "5m"}}),
        ({"sysctl": "a.b=1"}, "Sysctls", {"a.b": "1"}),
        ({"p": "8080:80/udp"}, "PortBindings", {"80/udp": [{"HostIp": "", "HostPort": "8080"}]}),
    ],
)  # fmt: skip
def test_an_argument_means_what_it_means_to_docker_run(given, key, value) -> None:
    assert arguments.apply(BASE, given).host[key] == value


def test_an_argument_for_memory_wins_over_the_key() -> None:
    asked = spec(resources=Resources(memory_bytes=64 << 20), options={"args": {"m": "128m"}})
    host = request.container(asked, Image(), "").document["HostConfig"]
    assert (host["Memory"], host["MemorySwap"]) == (128 << 20, 128 << 20)
    swapping = spec(resources=Resources(memory_bytes=64 << 20), options={"args": {"memory-swap": "1g", "m": "128m"}})
    assert request.container(swapping, Image(), "").document["HostConfig"]["MemorySwap"] == 1 << 30


def test_privileged_gives_what_we_would_take() -> None:
    host = arguments.apply(BASE, {"privileged": True}).host
    assert host == {"Privileged": True, "SecurityOpt": []}


@pytest.mark.parametrize(
    ("text", "count", "ids"), [("all", -1, []), ("2", 2, []), ('"device=0,1"', 0, ["0", "1"]), ("count=3", 3, [])]
)
def test_gpus_are_asked_for_as_docker_does(text, count, ids) -> None:
    (made,) = arguments.apply(BASE, {"gpus": text}).host["DeviceRequests"]
    assert (made["Count"], made["DeviceIDs"], made["Capabilities"]) == (count, ids, [["gpu"]])


def test_a_job_has_no_terminal_and_says_so() -> None:
    given = {"t": True, "i": True, "rm": True}
    assert arguments.apply(BASE, given).document == BASE
    assert len(arguments.notices(given)) == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "mine"}, "cannot have"),
        ({"restart": "always"}, "cannot have"),
        ({"shm_size": "1g"}, "no argument of docker run"),
        ({"memory": "much"}, "cannot be understood"),
        ({"memory": True}, "has no value"),
        ({"privileged": "maybe"}, "has a value"),
        ({"label": "mlflow-remote/run-id=x"}, "cannot be understood"),
        ({"publish": "1-2:3-4"}, "cannot be understood"),
        ({"mount": "type=bind,oops=1,dst=/x"}, "cannot be understood"),
        ({"security-opt": "seccomp=/my/profile.json"}, "cannot be understood"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused_by_name(given, words) -> None:
    with pytest.raises(ConfigError, match=words):
        arguments.apply(BASE, given)


def test_a_misspelt_argument_is_told_the_right_one() -> None:
    with pytest.raises(ConfigError, match="shm-size"):
        arguments.apply(BASE, {"shm_size": "1g"})


def test_an_entrypoint_can_be_replaced_and_removed() -> None:
    image = Image(entrypoint=("/entry",))
    job = spec(docker_env={"image": "i"}, options={"args": {"entrypoint": ""}})
    assert request.container(job, image, "").entrypoint == ()
    assert request.container(spec(docker_env={"image": "i"}), image, "").entrypoint == ("/entry",)


# -- the tracking store as the container sees it


@pytest.mark.parametrize(
    "uri",
    [
        "http://localhost:5000",
        "http://127.0.0.1:5000/prefix",
        "http://[::1]:5000",
        "https://0.0.0.0",
        "http://127.8.9.1",
        "postgresql://user:password@localhost/db",
        "mysql+pymysql://127.0.0.1/db",
    ],
)
def test_a_loopback_address_is_refused_with_the_way_out(uri) -> None:
    with pytest.raises(ConfigError) as caught:
        reach.refuse_unreachable(uri, engine_here=True, network="")
    assert caught.value.key == "tracking_uri"
    assert "docker.network" in caught.value.hint
    assert "password" not in str(caught.value)
    reach.refuse_unreachable(uri, engine_here=True, network="host")
    with pytest.raises(ConfigError):
        reach.refuse_unreachable(uri, engine_here=False, network="host")


@pytest.mark.parametrize(
    "uri", ["http://mlflow.example.com", "databricks", "databricks://profile", "http://10.0.0.5:5000"]
)
def test_an_address_of_the_network_is_taken(uri) -> None:
    reach.refuse_unreachable(uri, engine_here=False, network="")


@pytest.mark.parametrize("kind", ["sqlite", "file", "path"])
def test_a_store_of_this_machine_needs_an_engine_of_this_machine(kind, tmp_path) -> None:
    uri = {"sqlite": f"sqlite:///{tmp_path}/a b.db", "file": tmp_path.as_uri(), "path": str(tmp_path)}[kind]
    reach.refuse_unreachable(uri, engine_here=True, network="")
    with pytest.raises(ConfigError, match="another machine"):
        reach.refuse_unreachable(uri, engine_here=False, network="")


@pytest.mark.parametrize(
    ("tracking", "artifacts", "folders"),
    [
        ("sqlite:////a/mlflow.db", "/a/mlruns/0/RUN/artifacts", ["/a"]),
        ("sqlite:////a/mlflow.db", "file:///b/0/RUN/artifacts", ["/a", "/b/0"]),
        ("file:///a/mlruns", "file:///a/mlruns/0/RUN/artifacts", ["/a/mlruns"]),
        ("http://host", "/shared/0/RUN/artifacts", ["/shared/0"]),
        ("http://host", "mlflow-artifacts:/0/RUN/artifacts", []),
        ("http://host", "s3://bucket/0/RUN/artifacts", []),
    ],
)
def test_a_store_of_this_machine_is_mounted_at_its_own_path(tracking, artifacts, folders) -> None:
    mounts = reach.mounts(tracking, artifacts)
    assert [each["Source"] for each in mounts] == folders
    assert all(each["Source"] == each["Target"] for each in mounts)


def test_the_gateway_name_is_made_known_where_it_is_used() -> None:
    assert reach.extra_hosts("http://host.docker.internal:5000") == ["host.docker.internal:host-gateway"]
    assert reach.extra_hosts("http://elsewhere:5000") == []


def test_a_proxy_on_the_loopback_is_not_handed_on() -> None:
    variables = {"HTTP_PROXY": "http://127.0.0.1:3128", "https_proxy": "http://proxy.example:3128", "TOKEN": "x"}
    assert reach.unusable_proxies(variables, "") == ["HTTP_PROXY"]
    assert reach.unusable_proxies(variables, "host") == []
