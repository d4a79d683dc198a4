"""Tags become digests by the registry's own word, with and without credentials; where that cannot be, it is said."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlflow_remote_backend.compute.kubernetes.images import ImageName, pin

DIGEST = "sha256:" + "d" * 64
PASSWORD = "-".join(["not", "a", "real", "one"])


class Registry(BaseHTTPRequestHandler):
    """The part of a registry that is asked: manifests, behind a token or a password or nothing."""

    auth = ""
    asked: list[tuple[str, str]]

    def do_HEAD(self) -> None:
        given = self.headers.get("Authorization", "")
        self.asked.append((self.path, given))
        if self.auth == "basic" and not given.startswith("Basic "):
            return self.reply(401, {"WWW-Authenticate": 'Basic realm="registry"'})
        if self.auth == "token" and given != "Bearer granted":
            port = self.server.server_port  # type: ignore[attr-defined]
            realm = f'Bearer realm="http://127.0.0.1:{port}/token",service="registry",scope="x"'
            return self.reply(401, {"WWW-Authenticate": realm})
        if "/manifests/absent" in self.path:
            return self.reply(404, {})
        return self.reply(200, {"Docker-Content-Digest": DIGEST})

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization", "")))
        self.reply(200, {"Content-Type": "application/json"}, json.dumps({"token": "granted"}).encode())

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def registry(request: pytest.FixtureRequest) -> Iterator[tuple[str, type[Registry]]]:
    handler = type("Handler", (Registry,), {"auth": getattr(request, "param", ""), "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", handler
        server.shutdown()


def logged_in(folder: Path, host: str) -> dict[str, str]:
    auth = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return {"DOCKER_CONFIG": str(folder)}


@pytest.mark.parametrize("registry", ["", "token"], indirect=True)
def test_a_tag_becomes_a_digest(registry: tuple[str, type[Registry]], tmp_path: Path) -> None:
    host, handler = registry
    pinned = pin(f"{host}/team/train:2", {"DOCKER_CONFIG": str(tmp_path)})
    assert (pinned.image, pinned.trouble) == (f"{host}/team/train@{DIGEST}", "")
    assert handler.asked[0][0] == "/v2/team/train/manifests/2"


@pytest.mark.parametrize("registry", ["basic", "token"], indirect=True)
def test_a_login_of_docker_is_used(registry: tuple[str, type[Registry]], tmp_path: Path) -> None:
    host, handler = registry
    assert pin(f"{host}/train", logged_in(tmp_path, host)).image == f"{host}/train@{DIGEST}"
    sent = [given for _, given in handler.asked if given.startswith("Basic ")]
    assert base64.b64decode(sent[0].split()[1]).decode() == f"user:{PASSWORD}"


@pytest.mark.parametrize("registry", ["basic"], indirect=True)
def test_without_a_login_the_tag_stays_and_that_is_said(registry: tuple[str, type[Registry]], tmp_path: Path) -> None:
    host, _ = registry
    pinned = pin(f"{host}/train:1", {"DOCKER_CONFIG": str(tmp_path)})
    assert pinned.image == f"{host}/train:1"
    assert "401" in pinned.trouble


def test_a_tag_that_is_not_there_is_said(registry: tuple[str, type[Registry]]) -> None:
    assert "404" in pin(f"{registry[0]}/train:absent", {}).trouble


def test_a_registry_that_is_away_is_said() -> None:
    pinned = pin("127.0.0.1:1/train:1", {})
    assert pinned.image == "127.0.0.1:1/train:1"
    assert "does not tell its digest" in pinned.trouble


@pytest.mark.parametrize("image", ["python:3.11", "team/train", f"registry.example.com/train@{DIGEST}"])
def test_names_that_only_nodes_can_resolve_and_digests_are_left_as_they_are(image: str) -> None:
    assert (pin(image, {}).image, pin(image, {}).trouble) == (image, "")


@pytest.mark.parametrize(
    ("image", "parsed"),
    [
        ("python", ImageName("", "python", "latest", "")),
        ("python:3.11", ImageName("", "python", "3.11", "")),
        ("team/train:1", ImageName("", "team/train", "1", "")),
        ("localhost/train", ImageName("localhost", "train", "latest", "")),
        ("host.example:5000/a/b:c", ImageName("host.example:5000", "a/b", "c", "")),
        (f"host.example/a/b:c@{DIGEST}", ImageName("host.example", "a/b", "c", DIGEST)),
        (f"host:5000/a@{DIGEST}", ImageName("host:5000", "a", "latest", DIGEST)),
    ],
)
def test_image_names_are_read_as_docker_reads_them(image: str, parsed: ImageName) -> None:
    assert ImageName.parse(image) == parsed
