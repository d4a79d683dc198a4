"""The door to Kubernetes: the only module that imports its client. Plain dicts go in, plain dicts come out.

Requests go through the dynamic client's ``request`` and answers are read raw, because typed bodies refuse what a newer
server knows (client 37 refuses even ``cpu: 1``) and typed answers are slow. The client's own ``Watch`` and log reader
are not used: they have no read timeout, retry a 410 once, and drop a log's last line without a newline.

Every request has a connect and a read timeout. ``patience_s`` is how long one is tried again while the server is
overloaded, in trouble or out of reach; after it, :class:`ApiError` with ``transient`` set. An expired login is renewed
once from the kubeconfig.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from ...errors import ComputeError
from .names import without_userinfo

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 15.0
PATIENCE_S = 30.0
MAX_PAUSE_S = 20.0  # between two tries; a server's Retry-After may ask for more, up to MAX_RETRY_AFTER_S
MAX_RETRY_AFTER_S = 60.0
REQUESTS_PER_S = 25.0  # with the burst never more than 40 in one second
BURST = 15
RENEW_PAUSE_S = 5.0  # after a login that could not be renewed: its plugin is not called for each request
LOGIN_TIMEOUT_S = 60.0  # a login plugin of the kubeconfig, which may wait for a person at a browser
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

#: Releases of the client that sent anonymous requests (2585, 2595) or broke log reading; fixed in 36.0.3.
_DEFECTIVE_CLIENTS = ("36.0.0", "36.0.1", "36.0.2")
_TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]+")
_ANONYMOUS = 'User "system:anonymous"'
_USERINFO = re.compile(r"://[^/@\s]+@")


class ApiError(ComputeError):
    """The API server refused or did not answer. ``status``: the HTTP status, 0 where there was no answer.

    ``reason``: Kubernetes' machine-readable word (``AlreadyExists``, ``Forbidden``, …); ``causes``: its causes.
    """

    def __init__(
        self,
        what: str,
        *,
        words: str = "",
        hint: str = "",
        code: str | None = None,
        transient: bool = False,
        status: int = 0,
        reason: str = "",
        causes: tuple[str, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(what, words=words, hint=hint, code=code, transient=transient)
        self.status = status
        self.reason = reason
        self.causes = causes
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Answer:
    """A JSON answer. ``warnings``: its ``Warning:`` headers; ``server_time``: unix seconds of its ``Date:``, or 0."""

    body: dict[str, Any]
    warnings: tuple[str, ...] = ()
    server_time: float = 0.0


@dataclass(frozen=True)
class Login:
    """Where a cluster is and as whom we speak to it. ``source``: the kubeconfig file, or ``in-cluster``.

    ``authority``: a digest of the cluster's own certificate authority, empty where the login names none.
    """

    source: str
    context: str
    server: str
    namespace: str
    authority: str = ""


class Throttle:
    """At most ``rate_per_s`` requests a second after ``burst`` at once, over all threads. ``take`` blocks."""

    def __init__(self, rate_per_s: float = REQUESTS_PER_S, burst: int = BURST) -> None:
        self._rate_per_s = rate_per_s
        self._burst = float(burst)
        self._tokens = float(burst)
        self._at = time.monotonic()
        self._lock = threading.Lock()
        self.taken = 0

    def take(self) -> None:
        with self._lock:
            self.taken += 1
            now = time.monotonic()
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate_per_s) - 1
            self._at = now
            pause_s = max(0.0, -self._tokens / self._rate_per_s)
        if pause_s:
            time.sleep(pause_s)


@dataclass
class Api:
    """One cluster as one user sees it. Threads may share it."""

    login: Login
    _client: Any = field(repr=False)
    kubeconfig: str = ""
    _throttle: Throttle = field(default_factory=Throttle, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _leave_at: float = field(default=0.0, repr=False)  # monotonic: when the server takes requests again
    _not_renewed: tuple[float, ApiError] | None = field(default=None, repr=False)  # when that was, and why

    @classmethod
    def open(cls, *, kubeconfig: str = "", context: str = "") -> Api:
        """Read the login; asks the server nothing. Raises ComputeError naming the file and the context.

        Without a kubeconfig the pod's own service account is used where there is one; never a default address.
        """
        client, login = _connect(kubeconfig, context)
        return cls(login, client, kubeconfig)

    @classmethod
    def shared(cls, *, kubeconfig: str = "", context: str = "", server: str = "", authority: str = "") -> Api:
        """The process's one connection for this login, opened when first asked for: one throttle, one pool.

        ``server``: the cluster must be that one. It is found under whatever context it has in this kubeconfig.
        """
        key = (os.pathsep.join(_kubeconfig_files(kubeconfig)), context, server, authority)
        with _SHARED_LOCK:
            if key not in _SHARED:
                _SHARED[key] = cls._leading_to(kubeconfig, context, server, authority)
            return _SHARED[key]

    @classmethod
    def _leading_to(cls, kubeconfig: str, context: str, server: str, authority: str) -> Api:
        """By the first context that does. Raises ComputeError: none does, or the one that is named cannot log in now;
        another one may be somebody else's.
        """
        refused: ComputeError | None = None
        for candidate in _contexts_of(kubeconfig, context, server):
            login = (os.pathsep.join(_kubeconfig_files(kubeconfig)), candidate)
            try:
                if login not in _OPENED:
                    _OPENED[login] = cls.open(kubeconfig=kubeconfig, context=candidate)
            except ComputeError as error:
                if candidate == context:
                    raise
                refused = refused or error
                continue
            try:
                _OPENED[login].require(server, authority)
            except ComputeError as error:
                refused = refused or error
            else:
                return _OPENED[login]
        assert refused is not None
        raise refused

    @property
    def requests(self) -> int:
        """How many requests were sent so far."""
        return self._throttle.taken

    def require(self, server: str, authority: str = "") -> None:
        """Raise ComputeError where this is another cluster.

        Many are called https://127.0.0.1:6443, and in a pod the same cluster has another address.
        """
        if self.login.source == "in-cluster":
            the_same = self.login.authority == authority
        else:
            known = self.login.authority and authority
            the_same = self.login.server == server and (not known or self.login.authority == authority)
        if server and not the_same:
            raise ComputeError(
                f"The job runs on another cluster, at {server}, to which {self.login.source} does not lead.",
                hint="Its stored log and its status are still to be had from here, through the tracking server.",
            )

    # ---------------------------------------------------------------------------------------------- verbs

    def get(self, path: str, *, patience_s: float = PATIENCE_S, **query: Any) -> Answer:
        return self._json("GET", path, query, None, "", patience_s)

    def create(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        patience_s: float = PATIENCE_S,
        repeatable: bool = False,
        **query: Any,
    ) -> Answer:
        """POST once; again only after 429, which was not processed, and where it creates nothing (``repeatable``).
        ``compute`` meets a lost reply."""
        return self._json("POST", path, query, body, "application/json", patience_s, repeatable)

    def patch(self, path: str, body: Any, *, patience_s: float = PATIENCE_S, **query: Any) -> Answer:
        """A JSON merge patch; ours are idempotent."""
        return self._json("PATCH", path, query, body, "application/merge-patch+json", patience_s)

    def replace(self, path: str, body: Mapping[str, Any], *, patience_s: float = PATIENCE_S, **query: Any) -> Answer:
        """PUT. ``body`` holds the resourceVersion that it is based on: ApiError with status 409 if that is over."""
        return self._json("PUT", path, query, body, "application/json", patience_s)

    def delete(self, path: str, options: Mapping[str, Any], *, patience_s: float = PATIENCE_S) -> Answer:
        return self._json("DELETE", path, {}, {"apiVersion": "v1", "kind": "DeleteOptions", **options}, "", patience_s)

    def items(self, path: str, *, patience_s: float = PATIENCE_S, **query: Any) -> tuple[list[dict[str, Any]], Answer]:
        """All items of a list, read in pages of 500, and the last page (its metadata has the resourceVersion)."""
        found: list[dict[str, Any]] = []
        proceed = ""
        while True:
            page = self.get(
                path, patience_s=patience_s, limit=500, **({"continue": proceed} if proceed else {}), **query
            )
            found += page.body.get("items") or []
            proceed = page.body.get("metadata", {}).get("continue", "")
            if not proceed:
                return found, page

    def stream(self, path: str, *, read_timeout_s: float, **query: Any) -> Generator[bytes, None, None]:
        """The raw bytes of a long answer as they arrive. Ends at its end; ApiError where it breaks or falls silent."""
        response = self._send("GET", path, query, None, "", (CONNECT_TIMEOUT_S, read_timeout_s))
        try:
            while block := response.read1(1 << 16):
                yield block
        except Exception as error:
            raise self._unreachable("GET", path, error) from error
        finally:
            response.close()  # not back to the pool: the rest of the answer would come first to the next user

    def proxied(
        self, path: str, body: bytes | None, headers: Mapping[str, str], *, timeout_s: float
    ) -> tuple[int, bytes, str]:
        """One request to a Service or pod through the API server's proxy: status, body and content type of whatever
        answers. GET, or POST where there is a body. Raises ApiError where the API server itself answers, or nobody.

        The API server takes ``Authorization`` for its own and does not pass it on.
        """
        method = "GET" if body is None else "POST"
        for renewed in (False, True):
            client = self._client
            response = self._send_raw(client.client, method, path, body, headers, timeout_s)
            status, content = int(response.status), bytes(response.data)
            if status < 400 or _status_body(content).get("kind") != "Status":
                return status, content, str(response.headers.get("Content-Type") or "")
            if status != 401 or renewed:
                raise self._failure(method, path, _Refused(status, content, response.headers))
            self._renew(client)
        raise AssertionError("unreachable")

    def _send_raw(
        self, client: Any, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Any:
        """By the client's pool, since its own methods would encode a JSON body anew. Not throttled: it is no question
        to the API server."""
        import urllib3

        sent = dict(headers)
        client.update_params_for_auth(sent, [], ["BearerToken"], path, method, body)
        try:
            return client.rest_client.pool_manager.request(
                method,
                client.configuration.host + path,
                body=body,
                headers=sent,
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=timeout_s),
                retries=False,
                redirect=False,
            )
        except Exception as error:
            raise self._unreachable(method, path, error) from error

    # ---------------------------------------------------------------------------------------------- requests

    def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any],
        body: Any,
        content_type: str,
        patience_s: float,
        repeatable: bool = True,
    ) -> Answer:
        deadline = time.monotonic() + patience_s
        for attempt in range(1_000_000):
            try:
                return self._json_once(method, path, query, body, content_type)
            except ApiError as error:
                pause_s = _pause_s(attempt, error)
                if (
                    not error.transient
                    or not (repeatable or error.status == 429)
                    or time.monotonic() + pause_s > deadline
                ):
                    raise
                time.sleep(pause_s)
        raise AssertionError("unreachable")

    def _json_once(self, method: str, path: str, query: Mapping[str, Any], body: Any, content_type: str) -> Answer:
        timeout = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
        response = self._send(method, path, query, body, content_type, timeout)
        try:
            content = response.data
        except Exception as error:
            response.close()
            raise self._unreachable(method, path, error) from error
        try:
            document = json.loads(content)
        except ValueError as error:
            raise self._error(method, path, 0, words=f"the answer is not JSON: {error}", transient=True) from error
        return Answer(document, _warnings(response.headers), _server_time(response.headers))

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any],
        body: Any,
        content_type: str,
        timeout: tuple[float, float],
    ) -> Any:
        """The raw response of a 2xx answer. An expired login is renewed once. Raises ApiError."""
        for renewed in (False, True):
            client = self._client
            self._require_leave(method, path)
            self._throttle.take()
            try:
                return client.request(
                    method,
                    path,
                    body=body,
                    serialize=False,
                    query_params=[(key, value) for key, value in query.items() if value not in (None, "")],
                    header_params={"Accept": "application/json, */*"},
                    content_type=content_type or "application/json",
                    _request_timeout=timeout,
                )
            except Exception as error:
                failure = self._failure(method, path, error)
                if failure.status == 429 and failure.retry_after_s:
                    self._leave_at = time.monotonic() + min(failure.retry_after_s, MAX_RETRY_AFTER_S)
                if failure.status != 401 or renewed:
                    raise failure from error
            self._renew(client)
        raise AssertionError("unreachable")

    def _require_leave(self, method: str, path: str) -> None:
        """Raise ApiError as long as the server has asked to be left alone, whoever of us it told so, and for a moment
        after the login could not be renewed."""
        if self._not_renewed is not None and time.monotonic() - self._not_renewed[0] < RENEW_PAUSE_S:
            raise self._not_renewed[1]
        left_s = self._leave_at - time.monotonic()
        if left_s > 0:
            words = f"it has asked not to be asked for {left_s:.0f} s more"
            raise self._error(method, path, 429, words=words, transient=True, retry_after_s=left_s)

    def _renew(self, stale: Any) -> None:
        """Raises a transient ApiError, and keeps the old login, where there is no new one now."""
        with self._lock:
            if self._client is not stale:
                return  # another thread has renewed it meanwhile
            context = "" if self.login.source == "in-cluster" else self.login.context
            try:
                self._client, _ = _connect(self.kubeconfig, context)
            except ComputeError as error:
                words, hint = error.words, error.hint
                failure = ApiError(error.what, words=words, hint=hint, code="UNAUTHORIZED", status=401, transient=True)
                self._not_renewed = (time.monotonic(), failure)
                raise failure from error

    # ---------------------------------------------------------------------------------------------- errors

    def _failure(self, method: str, path: str, error: Exception) -> ApiError:
        status = getattr(error, "status", None)
        if not status:
            return self._unreachable(method, path, error)
        body = _status_body(getattr(error, "body", None))
        headers = getattr(error, "headers", None) or {}
        details = body.get("details") or {}
        words = str(body.get("message") or getattr(error, "reason", "") or f"HTTP {status}")
        reason = str(body.get("reason") or "")
        if int(status) == 403 and _ANONYMOUS in words:
            status, reason = 401, "Unauthorized"  # nobody is never who we mean to be
        # Somebody changed the object meanwhile; a DELETE conflicts only with its own precondition, for good.
        conflict = status == 409 and reason == "Conflict" and method != "DELETE"
        transient = status in _TRANSIENT_STATUS or conflict
        return self._error(
            method,
            path,
            int(status),
            words=words,
            transient=transient,
            reason=reason,
            causes=tuple(str(cause.get("reason", "")) for cause in details.get("causes") or ()),
            retry_after_s=_retry_after_s(headers, details),
        )

    def _error(self, method: str, path: str, status: int, *, words: str, transient: bool, **more: Any) -> ApiError:
        what = f"Kubernetes at {self.login.server} {_verdict(status)} {method} {path.partition('?')[0]}."
        hint, code = "", None
        if status == 401:
            hint, code = "Your cluster login has expired or is not valid. Log in again.", "UNAUTHORIZED"
        return ApiError(what, words=redact(words), hint=hint, code=code, transient=transient, status=status, **more)

    def _unreachable(self, method: str, path: str, error: Exception) -> ApiError:
        """No answer, or half of one: from the client library or below it, whatever it raised."""
        while isinstance(error, AttributeError) and isinstance(error.__context__, Exception):
            error = error.__context__  # the client stumbles over an error that has no body
        words = f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
        return self._error(method, path, 0, words=words, transient=True)


class _Refused(Exception):
    """An answer of the API server's own, in the form in which the client raises one."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.body, self.headers = status, body, headers


def _verdict(status: int) -> str:
    if status == 0:
        return "did not answer"
    return {401: "did not accept the login for", 403: "forbids", 404: "does not know"}.get(status, "refused")


def redact(text: str) -> str:
    """``text`` without what looks like a credential."""
    return _USERINFO.sub("://***@", _BEARER.sub(r"\1 ***", text))


def _pause_s(attempt: int, error: ApiError) -> float:
    """Full jitter over an exponential back-off; never less than the server's own Retry-After."""
    jittered = random.uniform(0, min(MAX_PAUSE_S, 0.2 * 2 ** min(attempt, 10)))
    return max(jittered, min(error.retry_after_s or 0.0, MAX_RETRY_AFTER_S))


def _status_body(body: object) -> dict[str, Any]:
    if isinstance(body, bytes):
        body = body.decode(errors="replace")
    if isinstance(body, str):
        with contextlib.suppress(ValueError):
            parsed = json.loads(body)
            return parsed if isinstance(parsed, dict) else {"message": body[:2000]}
        return {"message": body.strip()[:2000]}
    return body if isinstance(body, dict) else {}


def _retry_after_s(headers: Mapping[str, str], details: Mapping[str, Any]) -> float | None:
    raw = headers.get("Retry-After") or details.get("retryAfterSeconds")
    try:
        return float(raw) if raw else None
    except (TypeError, ValueError):
        return None


def _warnings(headers: Any) -> tuple[str, ...]:
    """The texts of ``Warning: 299 - "text"`` headers (RFC 9111)."""
    lines: Iterable[str] = headers.getlist("Warning") if hasattr(headers, "getlist") else ()
    return tuple(m[1].replace('\\"', '"') for line in lines for m in re.finditer(r'299 \S+ "((?:[^"\\]|\\.)*)"', line))


def _server_time(headers: Mapping[str, str]) -> float:
    try:
        return parsedate_to_datetime(headers.get("Date") or "").timestamp()
    except (TypeError, ValueError):
        return 0.0


_OPENED: dict[tuple[str, str], Api] = {}  # by kubeconfig and context: a login may take seconds
_SHARED: dict[tuple[str, str, str, str], Api] = {}  # those of which it is known that they lead to the right cluster
_SHARED_LOCK = threading.Lock()


# ------------------------------------------------------------------------------------------------------ logging in


def _contexts_of(kubeconfig: str, context: str, server: str) -> list[str]:
    """The contexts that may lead to ``server``, the named one first; that one if none is known to. Never empty.

    Several clusters may have one address, and several users one cluster.
    """
    if not server:
        return [context]
    servers = _servers(_kubeconfig_files(kubeconfig))
    leading = [name for name, each in servers.items() if each == server]
    return sorted(leading, key=lambda name: name != context) or [context if context in servers else ""]


def _servers(files: Iterable[str]) -> dict[str, str]:
    """Context -> its cluster's address, read without asking any login plugin. The first file that says it wins."""
    import yaml

    clusters: dict[str, str] = {}
    contexts: dict[str, str] = {}
    for path in files:
        with contextlib.suppress(OSError, yaml.YAMLError, AttributeError, TypeError, KeyError):
            document = yaml.safe_load(Path(path).read_text())
            for each in document.get("clusters") or ():
                server = without_userinfo(str(each["cluster"].get("server", "")))
                clusters.setdefault(each["name"], server.rstrip("/"))  # as the client has it
            for each in document.get("contexts") or ():
                contexts.setdefault(each["name"], each["context"].get("cluster", ""))
    return {name: clusters.get(cluster, "") for name, cluster in contexts.items()}


def _current_context(files: Iterable[str]) -> str:
    """The first file's that names one, as for kubectl; the client takes the last one's. Empty: none does."""
    import yaml

    documents = (yaml.safe_load(Path(path).read_text()) or {} for path in files)
    return next((str(each["current-context"]) for each in documents if each.get("current-context")), "")


def _connect(kubeconfig: str, context: str) -> tuple[Any, Login]:
    """A client and the login behind it. Raises ComputeError naming the file and the context that do not work."""
    from kubernetes import __version__ as client_version

    if client_version in _DEFECTIVE_CLIENTS:
        raise ComputeError(
            f"The installed Kubernetes client {client_version} is known to fail with logins and logs.",
            hint="Install kubernetes>=36.0.3,<38.",
        )
    files = _kubeconfig_files(kubeconfig)
    if not files and not context and (SERVICE_ACCOUNT / "token").exists():
        return _connect_in_cluster()
    if not files:
        raise ComputeError(
            f"There is no kubeconfig at {kubeconfig or os.environ.get('KUBECONFIG') or '~/.kube/config'}.",
            hint="Set kubernetes.kubeconfig in backend_config, or KUBECONFIG, to the file that describes the cluster.",
        )
    return _connect_by_kubeconfig(os.pathsep.join(files), context)


def _kubeconfig_files(kubeconfig: str) -> list[str]:
    listed = kubeconfig or os.environ.get("KUBECONFIG") or os.path.join("~", ".kube", "config")
    paths = [os.path.expanduser(each) for each in listed.split(os.pathsep) if each]
    return [path for path in paths if os.path.exists(path)]


def _connect_in_cluster() -> tuple[Any, Login]:
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
        namespace = (SERVICE_ACCOUNT / "namespace").read_text().strip()
    except (config.ConfigException, OSError) as error:
        raise ComputeError("The pod's service account cannot be used.", words=str(error)) from error
    return _client(configuration), Login("in-cluster", "", configuration.host, namespace, _authority(configuration))


def _connect_by_kubeconfig(files: str, context: str) -> tuple[Any, Login]:
    from kubernetes import client, config

    configuration = client.Configuration()
    place = f"kubeconfig {files}, context {context or 'current'}"
    try:
        merged = config.kube_config.KubeConfigMerger(files).config
        contexts = [each.value for each in merged["contexts"].value]
        wanted = context or _current_context(files.split(os.pathsep))
        chosen = next((each for each in contexts if each["name"] == wanted), None)
        if chosen is None:
            raise ComputeError(
                f"Context {wanted!r} is not in kubeconfig {files}."
                if wanted
                else f"Kubeconfig {files} chooses no context.",
                hint=f"Name one in kubernetes.context: {', '.join(sorted(str(each['name']) for each in contexts))}.",
            )
        _load_with_timeout(files, chosen["name"], configuration)
        _require_credentials(merged, chosen, configuration)
        cluster = merged["clusters"].get_with_name(chosen["context"]["cluster"]).value["cluster"]
        configuration.proxy = cluster.get("proxy-url") or configuration.proxy  # which client 36 leaves out
        connected, authority = _client(configuration), _authority(configuration)
    except ComputeError:
        raise
    except Exception as error:  # the client raises whatever YAML, base64, a proxy and a login plugin make it raise
        raise ComputeError(f"The cluster's login cannot be read: {place}.", words=redact(str(error))) from error
    namespace = chosen["context"].get("namespace") or "default"
    return connected, Login(files, chosen["name"], without_userinfo(configuration.host), namespace, authority)


def _require_credentials(merged: Any, chosen: Any, configuration: Any) -> None:
    """Raise ComputeError where the login's plugin has failed: the client only logs that, and goes on as nobody."""
    name = chosen["context"].get("user")
    listed = [each.value for each in merged["users"].value or ()] if "users" in merged else []
    user = next((each.get("user") or {} for each in listed if each["name"] == name), {})
    plugin = user.get("exec")
    if not plugin or configuration.cert_file or configuration.api_key or configuration.username:
        return
    command = " ".join(map(str, (plugin.get("command"), *(plugin.get("args") or ()))))
    raise ComputeError(
        f"The login plugin of context {chosen['name']} gave no credentials.",
        words=redact(command),
        hint=f"See what it says: kubectl --context {chosen['name']} get pods. You may have to log in again.",
        code="UNAUTHORIZED",
    )


def _authority(configuration: Any) -> str:
    """A digest of the certificates by which the login knows its cluster."""
    if not configuration.ssl_ca_cert:
        return ""
    content = Path(configuration.ssl_ca_cert).read_bytes()
    return hashlib.sha256(b"".join(content.split())).hexdigest()[:16]


def _load_with_timeout(files: str, context: str, configuration: Any) -> None:
    """Loading runs the kubeconfig's login plugin, which may hang: not longer than LOGIN_TIMEOUT_S."""
    from kubernetes import config

    failures: list[BaseException] = []

    def load() -> None:
        try:
            config.load_kube_config(config_file=files, context=context, client_configuration=configuration)
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread
            failures.append(error)

    thread = threading.Thread(target=load, name="kubeconfig-login", daemon=True)
    thread.start()
    thread.join(LOGIN_TIMEOUT_S)
    if thread.is_alive():
        raise TimeoutError(f"its login plugin did not answer within {LOGIN_TIMEOUT_S:.0f} s")
    if failures:
        raise failures[0]


def _client(configuration: Any) -> Any:
    """The dynamic client, without the discovery that it would begin with: we name paths ourselves."""
    from kubernetes import client, dynamic

    configuration.retries = False  # trying again is decided here, where it is known what may be repeated
    configuration.connection_pool_maxsize = 64  # log streams and watches hold theirs for hours
    configuration.socket_options = _keep_alive()
    made = client.ApiClient(configuration)
    if configuration.verify_ssl:
        public = not (configuration.ssl_ca_cert or getattr(configuration, "ca_cert_data", None))
        made.rest_client.pool_manager.pool_classes_by_scheme = _pools(public=public)
    return dynamic.DynamicClient(made, discoverer=lambda client, cache_file: None)


def _pools(*, public: bool) -> dict[str, Any]:
    """Connection pools by scheme. ``public``: servers are verified by the machine's own authorities.

    Every connection has a TLS context of its own: urllib3 loads the login's certificates into the context whenever it
    connects, and one that other threads use meanwhile ends the process (OpenSSL's SSL_CTX may be shared only as long as
    nobody changes it).
    """
    import urllib3

    class Connection(urllib3.connection.HTTPSConnection):
        def connect(self) -> None:
            self.ssl_context = _tls(public=public)
            super().connect()

    class Pool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Connection

    return {"http": urllib3.HTTPConnectionPool, "https": Pool}


def _tls(*, public: bool) -> Any:
    """Certificates are verified as kubectl does; ``public``: by the machine's own authorities.

    Python 3.13 would also refuse a cluster's own authority for want of an extension that RFC 5280 asks for, which those
    of many clusters lack (kubernetes-client/python 2394).
    """
    import ssl

    from urllib3.util.ssl_ import create_urllib3_context

    context = create_urllib3_context()
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if public:
        context.load_default_certs()
    return context


def _keep_alive() -> list[tuple[int, int, int]]:
    """Middleboxes drop idle connections silently after some minutes; the kernel notices within one."""
    import socket

    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options
