"""The connection to an API server that many threads share."""

from __future__ import annotations

import base64
import contextlib
import datetime
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mlflow_remote_backend.compute.kubernetes import api as api_module
from mlflow_remote_backend.compute.kubernetes.api import Api, ApiError, Login
from mlflow_remote_backend.errors import ComputeError

THREADS, TIMES = 16, 50
CLIENT = f"""
import sys, threading
from mlflow_remote_backend.compute.kubernetes.api import Api, Throttle

api = Api.open(kubeconfig=sys.argv[1])
api._throttle = Throttle(rate_per_s=1e6, burst=10**6)
answers = []

def ask():
    for _ in range({TIMES}):
        answers.append(api.get("/version", patience_s=0.0).body["gitVersion"])

threads = [threading.Thread(target=ask) for _ in range({THREADS})]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(answers))
"""


class Authority:
    """A certificate authority that lives as long as a test, and whom it signed."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        self.certificate = self._signed("authority", self._key, authority=True)

    def sign(self, name: str) -> tuple[bytes, bytes]:
        """A certificate for 127.0.0.1 and its key, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return self._signed(name, key), private

    def _signed(self, name: str, key: ec.EllipticCurvePrivateKey, *, authority: bool = False) -> bytes:
        now = datetime.datetime.now(datetime.timezone.utc)
        here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(here, critical=False)
        )
        return made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


class Answering(BaseHTTPRequestHandler):
    """Ends each connection after one answer, so that every request connects anew."""

    def do_GET(self) -> None:
        content = json.dumps({"gitVersion": "v1.36.2"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Not of interest."""


@contextlib.contextmanager
def serving(tls: ssl.SSLContext) -> Iterator[int]:
    class Server(ThreadingHTTPServer):
        request_queue_size = 4 * THREADS

        def finish_request(self, request: Any, client_address: Any) -> None:
            with tls.wrap_socket(request, server_side=True) as wrapped:
                super().finish_request(wrapped, client_address)

    server = Server(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Iterator[Path]:
    """Of a server that wants a client's certificate."""
    authority = Authority()
    for name in ("server", "user"):
        certificate, key = authority.sign(name)
        (tmp_path / f"{name}.crt").write_bytes(certificate)
        (tmp_path / f"{name}.key").write_bytes(key)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    tls.load_verify_locations(cadata=authority.certificate.decode())
    tls.verify_mode = ssl.CERT_REQUIRED

    def encoded(content: bytes) -> str:
        return base64.b64encode(content).decode()

    with serving(tls) as port:
        cluster = {
            "server": f"https://127.0.0.1:{port}",
            "certificate-authority-data": encoded(authority.certificate),
        }
        user = {
            "client-certificate-data": encoded((tmp_path / "user.crt").read_bytes()),
            "client-key-data": encoded((tmp_path / "user.key").read_bytes()),
        }
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": cluster}],
            "users": [{"name": "here", "user": user}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "here"}}],
        }
        path = tmp_path / "kubeconfig"
        path.write_text(json.dumps(document))
        yield path


def test_threads_that_connect_at_once_do_not_bring_the_process_down(kubeconfig: Path) -> None:
    """They did while they shared a TLS context into which each loaded the client's certificate."""
    command = [sys.executable, "-X", "faulthandler", "-c", CLIENT, str(kubeconfig)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, f"{THREADS * TIMES}\n"), done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------------- which cluster


def test_another_cluster_is_refused_each_time_after_one_login(
    kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logins, really = [], Api.open

    def login(**named: str) -> Api:
        logins.append(named)
        return really(**named)

    monkeypatch.setattr(Api, "open", login)
    for _ in range(2):
        with pytest.raises(ComputeError, match=r"another cluster, at https://prod\.example\.com"):
            Api.shared(kubeconfig=str(kubeconfig), context="here", server="https://prod.example.com")
    assert len(logins) == 1


def test_a_cluster_of_the_same_address_is_another_one(kubeconfig: Path) -> None:
    login = Api.open(kubeconfig=str(kubeconfig)).login
    wanted = {"kubeconfig": str(kubeconfig), "context": "here", "server": login.server}
    assert login.authority
    assert Api.shared(**wanted, authority=login.authority).login == login
    assert Api.shared(**wanted).login == login
    with pytest.raises(ComputeError, match="another cluster"):
        Api.shared(**wanted, authority="0123456789abcdef")


def test_of_two_clusters_of_one_address_the_one_that_is_meant_is_found(kubeconfig: Path) -> None:
    document = json.loads(kubeconfig.read_text())
    (here,) = document["clusters"]
    other = {**here["cluster"], "certificate-authority-data": base64.b64encode(Authority().certificate).decode()}
    document["clusters"].insert(0, {"name": "other", "cluster": other})
    document["contexts"].insert(0, {"name": "other", "context": {"cluster": "other", "user": "here"}})
    kubeconfig.write_text(json.dumps(document))
    mine = Api.open(kubeconfig=str(kubeconfig), context="here").login
    for context in ("other", "", "gone"):
        login = Api.shared(
            kubeconfig=str(kubeconfig), context=context, server=mine.server, authority=mine.authority
        ).login
        assert (login.context, login.authority) == ("here", mine.authority)
    with pytest.raises(ComputeError, match="another cluster"):
        Api.shared(kubeconfig=str(kubeconfig), context="other", server=mine.server, authority="0123456789abcdef")


def test_a_pod_knows_its_cluster_by_its_authority() -> None:
    api = Api(Login("in-cluster", "", "https://10.96.0.1:443", "training", "aa"), None)
    api.require("https://prod.example.com", "aa")
    for server in ("https://prod.example.com", "https://10.96.0.1:443"):
        with pytest.raises(ComputeError, match="another cluster"):
            api.require(server, "bb")


@pytest.mark.parametrize("current", ["", None, "gone"])
def test_a_context_that_is_named_needs_no_current_one(kubeconfig: Path, current: str | None) -> None:
    document = json.loads(kubeconfig.read_text())
    kubeconfig.write_text(json.dumps({**document, "current-context": current}))
    assert Api.open(kubeconfig=str(kubeconfig), context="here").login.context == "here"
    with pytest.raises(ComputeError) as caught:
        Api.open(kubeconfig=str(kubeconfig))
    assert "here" in caught.value.hint


def test_the_first_kubeconfig_chooses_the_context(kubeconfig: Path, tmp_path: Path) -> None:
    document = json.loads(kubeconfig.read_text())
    document["contexts"] = [{"name": "there", "context": {"cluster": "here", "user": "here", "namespace": "other"}}]
    second = tmp_path / "second"
    second.write_text(json.dumps({**document, "current-context": "there"}))
    login = Api.open(kubeconfig=f"{kubeconfig}{os.pathsep}{second}").login
    assert (login.context, login.namespace) == ("here", "default")


def test_the_clusters_proxy_is_used(kubeconfig: Path) -> None:
    document = json.loads(kubeconfig.read_text())
    document["clusters"][0]["cluster"]["proxy-url"] = "http://127.0.0.1:1"
    kubeconfig.write_text(json.dumps(document))
    with pytest.raises(ComputeError, match="ProxyError"):
        Api.open(kubeconfig=str(kubeconfig)).get("/version", patience_s=0.0)
    document["clusters"][0]["cluster"]["proxy-url"] = "ftp://127.0.0.1:1"
    kubeconfig.write_text(json.dumps(document))
    with pytest.raises(ComputeError, match="login cannot be read"):
        Api.open(kubeconfig=str(kubeconfig))


# ------------------------------------------------------------------------------------------------------ login plugins

PLUGIN = """
import json, pathlib, sys
calls = pathlib.Path(sys.argv[1])
calls.write_text(calls.read_text() + ".")
if calls.read_text() == "..":
    sys.exit("the session is over, log in again")
status = {"token": "token" + str(len(calls.read_text()))}
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}))
"""


class Guarded(BaseHTTPRequestHandler):
    """As an API server that knows one token, and lets nobody in without."""

    protocol_version = "HTTP/1.1"
    token = "token1"

    def do_GET(self) -> None:
        sent = self.headers.get("Authorization")
        code = 200 if sent == f"Bearer {self.token}" else 401 if sent else 403
        words = "" if sent else 'pods is forbidden: User "system:anonymous" cannot list resource "pods"'
        body = json.dumps({"kind": "Status" if code >= 400 else "PodList", "message": words}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Not of interest."""


@pytest.fixture
def plugin_login(tmp_path: Path) -> Iterator[Path]:
    """A kubeconfig whose login plugin gives a new token each time, but for the second one."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "calls").write_text("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    run = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": sys.executable,
        "args": [str(tmp_path / "plugin.py"), str(tmp_path / "calls")],
        "interactiveMode": "Never",
    }
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "here", "user": {"exec": run}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "here"}}],
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(document))
    try:
        yield tmp_path / "kubeconfig"
    finally:
        server.shutdown()
        server.server_close()


def test_a_login_plugin_that_fails_once_does_not_make_us_nobody(
    plugin_login: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client only logs that, and sends no login from then on; and nobody is refused by 403, not by 401."""
    monkeypatch.setattr(Guarded, "token", "token1")
    monkeypatch.setattr(api_module, "RENEW_PAUSE_S", 0.0)
    api = Api.open(kubeconfig=str(plugin_login))
    assert api.get("/api/v1/pods").body["kind"] == "PodList"
    monkeypatch.setattr(Guarded, "token", "token3")
    with pytest.raises(ApiError, match=r"login plugin of context here(.|\n)*log in again") as failed:
        api.get("/api/v1/pods", patience_s=0.0)
    assert (failed.value.code, failed.value.status) == ("UNAUTHORIZED", 401)
    assert api.get("/api/v1/pods").body["kind"] == "PodList"


def test_a_login_plugin_that_fails_at_first_is_told_of(plugin_login: Path) -> None:
    (plugin_login.parent / "calls").write_text(".")
    with pytest.raises(ComputeError, match="login plugin of context here"):
        Api.open(kubeconfig=str(plugin_login))


def test_a_login_that_fails_makes_us_nobody_else(plugin_login: Path) -> None:
    document = json.loads(plugin_login.read_text())
    document["users"].append({"name": "admin", "user": {"token": "token1"}})
    document["contexts"].insert(0, {"name": "admin", "context": {"cluster": "here", "user": "admin"}})
    plugin_login.write_text(json.dumps(document))
    server = document["clusters"][0]["cluster"]["server"]
    (plugin_login.parent / "calls").write_text(".")
    with pytest.raises(ComputeError, match="login plugin of context here"):
        Api.shared(kubeconfig=str(plugin_login), context="here", server=server)
    assert Api.shared(kubeconfig=str(plugin_login), context="here", server=server).login.context == "here"


def test_a_server_that_asks_to_be_left_alone_is(monkeypatch: pytest.MonkeyPatch, plugin_login: Path) -> None:
    asked = []

    def busy(handler: Guarded) -> None:
        asked.append(handler.path)
        handler.send_response(429)
        handler.send_header("Retry-After", "30")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    monkeypatch.setattr(Guarded, "do_GET", busy)
    api = Api.open(kubeconfig=str(plugin_login))
    for _ in range(3):
        with pytest.raises(ApiError) as refused:
            api.get("/api/v1/pods", patience_s=2.0)
        assert (refused.value.status, refused.value.transient) == (429, True)
        assert 20 < (refused.value.retry_after_s or 0) <= 30
    assert len(asked) == 1
