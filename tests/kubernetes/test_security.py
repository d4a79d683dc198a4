"""No credential where others can read it, no right that is not needed, no pod that is less than restricted."""

from __future__ import annotations

import base64
import io
import json
import os
import sqlite3
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import certifi
import mlflow
import pytest
import yaml
from namespaces import REGISTRY, Namespace, Tracking, until

from mlflow_remote_backend.compute.kubernetes import objects, preflight
from mlflow_remote_backend.compute.kubernetes.api import Api, ApiError
from mlflow_remote_backend.submitted_run import RemoteExecutionException
from mlflow_remote_backend.testing import Projects, ended, stored_log

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

Document = dict[str, Any]


# -------------------------------------------------------------------------------------------------------- sentinels


def sentinel(name: str) -> str:
    """A value that occurs nowhere else, put together here so that no scanner takes it for a real one."""
    return "-".join(["planted", name.lower().replace("_", "-"), "7f3a"])


PLANTED = {name: sentinel(name) for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PASSED_ON")}
PLANTED |= {"AWS" + "_SECRET_ACCESS_KEY": sentinel("aws"), "AWS" + "_SESSION_TOKEN": sentinel("session")}


def forms(value: str) -> list[bytes]:
    """A value as it is, and as it hides: base64 at each of three alignments, percent-encoded."""
    raw = value.encode()
    aligned = [base64.b64encode(b"\0" * shift + raw)[4:-4] for shift in range(3)]
    return [raw, *aligned, urllib.parse.quote(value, safe="").replace("-", "%2D").encode()]


def leaks(content: bytes, values: Mapping[str, str]) -> list[str]:
    return [name for name, value in values.items() if any(form in content for form in forms(value))]


def database_content(path: Path) -> bytes:
    with sqlite3.connect(path) as database:
        return "\n".join(database.iterdump()).encode()


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    return PLANTED


def test_planted_secrets_are_found_nowhere(
    projects: Projects,
    namespace: Namespace,
    pods_tracking: Tracking,
    planted: Mapping[str, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    script = '[ -n "$PASSED_ON" ] && [ -n "$MLFLOW_TRACKING_PASSWORD" ] && echo has them; sleep 2; exit 3'
    config = {"pass_env": ["PASSED_ON"], "stream_output": True}
    run = projects.submit(projects.make(script), **config)
    live = json.dumps(namespace.everything()).encode()
    assert run.wait() is False
    assert stored_log(run.run_id) == b"has them\n"
    assert not leaks(live, planted)
    assert not leaks(json.dumps(namespace.everything()).encode(), planted)
    assert not leaks(database_content(pods_tracking.server.folder / "mlflow.db"), planted)
    for path in pods_tracking.server.artifacts.rglob("*"):
        if path.is_file():
            assert not leaks(path.read_bytes(), planted), path
    shown = capfd.readouterr()
    assert not leaks((shown.out + shown.err).encode(), planted)
    for secret in namespace.ours("secrets"):
        assert secret["immutable"] is True
        assert objects.metadata(secret)["ownerReferences"][0]["kind"] == "Job"


def test_credentials_in_the_tracking_uri_go_no_further(
    projects: Projects, namespace: Namespace, pods_tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = sentinel("userinfo")
    uri = pods_tracking.from_pods.replace("http://", f"http://user:{word}@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    run = projects.submit(projects.make("exit 0"), tracking_uri=None)
    assert ended(run).status == "FINISHED"
    assert not leaks(json.dumps(namespace.everything()).encode(), {"userinfo": word})
    assert not leaks(database_content(pods_tracking.server.folder / "mlflow.db"), {"userinfo": word})


@pytest.mark.parametrize("debug", ["", "1"])
def test_an_error_of_the_api_server_shows_no_secret(
    projects: Projects, namespace: Namespace, planted: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, debug: str
) -> None:
    monkeypatch.setenv("MLFLOW_REMOTE_DEBUG", debug)
    hard = {"kind": "ResourceQuota", "metadata": {"name": "q"}, "spec": {"hard": {"count/secrets": "0"}}}
    namespace.make("resourcequotas", hard)
    until(lambda: namespace.list("resourcequotas")[0].get("status", {}).get("hard"), what="the quota is counted")
    with pytest.raises(RemoteExecutionException) as caught:
        projects.submit(projects.make("exit 0"), pass_env=["PASSED_ON"])
    chain: BaseException | None = caught.value
    while chain is not None:
        assert not leaks(f"{chain!r} {chain} {vars(chain)}".encode(), planted)
        chain = chain.__cause__ or chain.__context__


# ---------------------------------------------------------------------------------------------------------- the pod


def test_the_pod_has_no_token_and_no_rights(projects: Projects, namespace: Namespace) -> None:
    script = """
    ls /var/run/secrets/kubernetes.io 2>&1 | grep -q 'No such' && echo no token
    env | grep -c _SERVICE_HOST
    id -u
    grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status | tr -d '\\t '
    """
    run = projects.submit(projects.make(script))
    view = ended(run)
    log = stored_log(view.run_id).decode().splitlines()
    assert log[0] == "no token"
    assert log[2] == "1000"
    assert set(log[3:]) == {"CapEff:0000000000000000", "NoNewPrivs:1", "Seccomp:2"}


def test_an_arbitrary_user_id_works(projects: Projects, namespace: Namespace) -> None:
    """As OpenShift assigns them from a namespace's range."""
    config = {**projects.backend_config["kubernetes"], "run_as_user": 1_000_680_000}
    view = projects.run("id -u; mkdir -p outputs; touch outputs/x $HOME/y /tmp/z; echo $USER", kubernetes=config)
    assert view.status == "FINISHED"
    assert stored_log(view.run_id) == b"1000680000\nmlflow\n"


def test_a_read_only_root_works(projects: Projects) -> None:
    config = {**projects.backend_config["kubernetes"], "read_only_root": True}
    view = projects.run(
        "touch /x 2>/dev/null || echo read-only; touch /tmp/x x $HOME/x && echo fine", kubernetes=config
    )
    assert stored_log(view.run_id) == b"read-only\nfine\n"


def test_the_runners_own_environment_is_not_the_programs(projects: Projects) -> None:
    view = projects.run(
        "cat /proc/1/environ | tr '\\0' '\\n' | cut -d= -f1; env | cut -d= -f1; ls /mlflow-remote-job 2>&1"
    )
    names = stored_log(view.run_id).decode()
    assert "MLFLOW_REMOTE_POD_UID" not in names
    assert "No such file" in names


def test_a_template_that_weakens_security_is_told_of(
    projects: Projects, namespace: Namespace, capfd: pytest.CaptureFixture[str]
) -> None:
    namespace.label(**{"pod-security.kubernetes.io/enforce": "privileged"})
    template = {"spec": {"containers": [{"name": "main", "securityContext": {"runAsUser": 0, "runAsNonRoot": False}}]}}
    config = {**projects.backend_config["kubernetes"], "pod_template": template}
    view = projects.run("id -u", kubernetes=config)
    assert stored_log(view.run_id) == b"0\n"
    assert "pod_template weakens security: container main: runs as root" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------------------- TLS


def kubeconfig_with(folder: Path, **cluster: Any) -> str:
    """This session's kubeconfig with other words about the cluster's certificates."""
    document = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    for each in document["clusters"]:
        each["cluster"] = {"server": each["cluster"]["server"], **cluster}
    path = folder / "changed.kubeconfig"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def test_a_server_that_the_clusters_authority_did_not_sign_is_refused(cluster: Api, tmp_path: Path) -> None:
    stranger = Api.open(kubeconfig=kubeconfig_with(tmp_path, **{"certificate-authority": certifi.where()}))
    with pytest.raises(ApiError, match="CERTIFICATE_VERIFY_FAILED"):
        stranger.get("/version", patience_s=0.0)


def test_only_a_kubeconfig_can_ask_for_no_verification(cluster: Api, tmp_path: Path) -> None:
    insecure = Api.open(kubeconfig=kubeconfig_with(tmp_path, **{"insecure-skip-tls-verify": True}))
    assert insecure.get("/version", patience_s=0.0).body["major"]


# ------------------------------------------------------------------------------------------------------------ rights


@pytest.fixture
def as_submitter(namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``as_submitter(without=("get", "", "pods/log"))``: this process has the shipped Role's rights, less one."""

    def become(without: tuple[str, str, str] | None = None) -> None:
        role = yaml.safe_load(preflight.role())
        role["rules"] = list(_rules(role["rules"], without))
        subject = {"kind": "ServiceAccount", "name": "submitter", "namespace": namespace.name}
        reference = {"kind": "Role", "name": "mlflow-remote", "apiGroup": "rbac.authorization.k8s.io"}
        namespace.make("serviceaccounts", {"kind": "ServiceAccount", "metadata": {"name": "submitter"}})
        namespace.make("roles", role)
        binding = {
            "kind": "RoleBinding",
            "metadata": {"name": "submitter"},
            "subjects": [subject],
            "roleRef": reference,
        }
        namespace.make("rolebindings", binding)
        path = f"{namespace.path('serviceaccounts', 'submitter')}/token"
        request = {
            "kind": "TokenRequest",
            "apiVersion": "authentication.k8s.io/v1",
            "spec": {"expirationSeconds": 3600},
        }
        token = namespace.api.create(path, request).body["status"]["token"]
        monkeypatch.setenv("KUBECONFIG", str(_kubeconfig(tmp_path, token, namespace.name)))

    return become


def _rules(rules: list[Document], without: tuple[str, str, str] | None) -> Iterator[Document]:
    for rule in rules:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                verbs = [verb for verb in rule["verbs"] if (verb, group, resource) != without]
                if verbs:
                    yield {"apiGroups": [group], "resources": [resource], "verbs": verbs}


def _kubeconfig(folder: Path, token: str, namespace: str) -> Path:
    document = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    context = next(c for c in document["contexts"] if c["name"] == document["current-context"])
    context["context"].update(user="submitter", namespace=namespace)
    document["users"] = [{"name": "submitter", "user": {"token": token}}]
    path = folder / "submitter.kubeconfig"
    path.write_text(yaml.safe_dump(document))
    return path


def test_the_shipped_role_is_enough(projects: Projects, as_submitter: Any, capfd: pytest.CaptureFixture[str]) -> None:
    as_submitter()
    run = projects.submit(projects.make("echo hello; sleep 1; echo bye"), stream_output=True)
    assert run.wait() is True
    cancelled = projects.submit(projects.make("sleep 600"))
    cancelled.cancel()
    assert ended(cancelled).status == "KILLED"
    assert "no right" not in capfd.readouterr().err


@pytest.mark.parametrize("right", preflight.REQUIRED, ids=lambda right: "-".join(right))
def test_each_right_that_is_needed_is_asked_for_by_name(
    projects: Projects, namespace: Namespace, as_submitter: Any, right: tuple[str, str, str]
) -> None:
    as_submitter(without=right)
    with pytest.raises(RemoteExecutionException) as caught:
        projects.submit(projects.make("exit 0"))
    verb, _, resource = right
    assert f"{verb} {resource}" in str(caught.value)
    assert "kind: Role" in str(caught.value)
    assert not namespace.ours("jobs")


@pytest.mark.parametrize("right", preflight.OPTIONAL, ids=lambda right: "-".join(right))
def test_without_each_other_right_less_is_done_and_that_is_said(
    projects: Projects,
    namespace: Namespace,
    as_submitter: Any,
    right: tuple[str, str, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    as_submitter(without=right)
    run = projects.submit(projects.make("echo hello; sleep 1; echo bye"), stream_output=True)
    assert run.wait() is True
    shown = capfd.readouterr()
    assert shown.out == "hello\nbye\n"
    verb, _, resource = right
    assert f"no right to {verb} {resource}" in shown.err


def test_a_namespace_of_others_is_out_of_reach(projects: Projects, as_submitter: Any) -> None:
    as_submitter()
    config = {**projects.backend_config["kubernetes"], "namespace": "kube-system"}
    with pytest.raises(RemoteExecutionException, match="You lack rights in namespace kube-system"):
        projects.submit(projects.make("exit 0"), kubernetes=config)


# ------------------------------------------------------------------------------------------------------------ images


@pytest.fixture
def retag(shell_image: str) -> Iterator[Any]:
    """``retag("first")``: the tag in the registry is now an image that has the file /first."""
    docker = pytest.importorskip("docker")
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine to make images: {error}")
    name = f"{REGISTRY}/retagged:{uuid.uuid4().hex[:8]}"

    def push(marker: str) -> str:
        content = f"FROM {shell_image}\nUSER 0:0\nRUN touch /{marker}\n".encode()
        client.images.build(fileobj=io.BytesIO(content), tag=name, rm=True)
        client.images.push(name)
        return name

    yield push
    client.images.remove(name, force=True)


def test_a_tag_that_moves_after_submission_changes_nothing(
    projects: Projects, namespace: Namespace, retag: Any
) -> None:
    config = {**projects.backend_config["kubernetes"], "image": retag("first"), "queue": "held"}
    run = projects.submit(projects.make("ls -d /first /second 2>/dev/null"), kubernetes=config)
    retag("second")
    namespace.patch("jobs", objects.name(namespace.job(run.run_id)), {"spec": {"suspend": False}})
    view = ended(run)
    assert stored_log(view.run_id) == b"/first\n"
    image = namespace.job(run.run_id)["spec"]["template"]["spec"]["containers"][0]["image"]
    assert "@sha256:" in image
