"""The only door to the Docker SDK: one class with the few things that we ask an engine, in plain dicts and bytes.

Two errors come out of here. :class:`Refused`: the engine answered and said no (``status`` is HTTP's). A *transient*
:class:`~mlflow_remote_backend.errors.ComputeError`: the engine did not answer, so nothing is known. Every call blocks
for at most ``TIMEOUT_S`` without a byte from the engine, but for those that stream.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ...errors import ComputeError, ConfigError

if TYPE_CHECKING:
    from .ssh import SshAdapter

TIMEOUT_S = 60.0
COMMIT_TIMEOUT_S = 3600.0  # an environment of some 10 GB on a slow disk
CONNECT_HINT = (
    "Is it running, and may you use it? `docker info` tells. "
    "docker.base_url, docker.context or DOCKER_HOST name another one."
)

STDOUT, STDERR = 1, 2
_FRAME_HEADER_BYTES = 8
_RECEIVE_BYTES = 256 * 1024


class Refused(ComputeError):
    """The engine answered with an error. ``status``: HTTP's, 0 for an error within a stream."""

    def __init__(self, what: str, *, words: str = "", hint: str = "", code: str | None = None, status: int = 0) -> None:
        super().__init__(what, words=words, hint=hint, code=code, transient=False)
        self.status = status

    @property
    def missing(self) -> bool:
        return self.status == 404

    @property
    def conflict(self) -> bool:
        return self.status == 409


@dataclass(frozen=True)
class Endpoint:
    """Where an engine is. ``context``: the Docker context that says so, if one does; it has the TLS files.

    ``cert_path``: folder of the TLS files, empty for none; ``verify``: whether the engine's certificate is checked.
    """

    url: str = ""
    context: str = ""
    cert_path: str = ""
    verify: bool = True

    @classmethod
    def from_options(cls, options: Mapping[str, Any], environ: Mapping[str, str]) -> Endpoint:
        """``base_url``, then ``context``, then ``DOCKER_HOST``, then the current context: as the ``docker`` command."""
        recorded = options.get("endpoint")
        if recorded:
            return cls(**recorded)
        url = options.get("base_url") or ("" if options.get("context") else environ.get("DOCKER_HOST", ""))
        if not url:
            return cls._of_context(options.get("context") or environ.get("DOCKER_CONTEXT") or "")
        verify = environ.get("DOCKER_TLS_VERIFY", "")
        cert_path = environ.get("DOCKER_CERT_PATH", "")
        if verify and not cert_path:
            cert_path = os.path.join(environ.get("HOME", os.path.expanduser("~")), ".docker")
        encrypted = bool(cert_path) and not url.startswith(("unix:", "npipe:", "ssh:", "http:"))
        return cls(url, cert_path=cert_path if encrypted else "", verify=bool(verify))

    @classmethod
    def _of_context(cls, name: str) -> Endpoint:
        from docker.context import ContextAPI

        try:
            found = ContextAPI.get_context(name or None)
        except Exception as error:  # the SDK raises bare Exception for a damaged context file
            what = f"Docker context {name!r} cannot be read."
            raise ConfigError(what, key="docker.context", words=str(error)) from error
        if found is None:
            raise ConfigError(
                f"There is no Docker context {name!r}.", key="docker.context", hint="`docker context ls` lists them."
            )
        return cls(str(found.Host), context=str(found.name))

    @property
    def on_this_machine(self) -> bool:
        """Whether the engine is reached by a socket of this machine: bind mounts then mean our own folders."""
        host = self.url.partition("://")[2].partition("/")[0].rpartition(":")[0]
        return self.url.startswith(("unix:", "http+unix:", "npipe:")) or host in ("localhost", "127.0.0.1", "[::1]")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the SDK's client."""
        from docker.context import ContextAPI
        from docker.tls import TLSConfig

        if self.context:
            found = ContextAPI.get_context(self.context)
            return {"base_url": self.url, **({"tls": found.TLSConfig} if found and found.TLSConfig else {})}
        if not self.cert_path:
            return {"base_url": self.url}
        cert, key, ca = (os.path.join(self.cert_path, name) for name in ("cert.pem", "key.pem", "ca.pem"))
        tls = TLSConfig(client_cert=(cert, key), ca_cert=ca if self.verify else None, verify=self.verify)
        return {"base_url": self.url, "tls": tls}


class Connection:
    """A two-way stream to a container's process: what we send is its stdin; its stdout and stderr come in frames."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw  # keeps the HTTP response alive, which owns the descriptor
        # Over a plain socket the SDK hands out a read-only file object; a duplicate of its descriptor can send as well.
        plain = isinstance(raw, socket.SocketIO)
        self._socket: Any = socket.socket(fileno=os.dup(raw.fileno())) if plain else raw

    def send(self, data: bytes) -> None:
        self._socket.settimeout(TIMEOUT_S)
        self._socket.sendall(data)

    def end_input(self) -> None:
        """The process reads end of file; its output can still be received."""
        if hasattr(self._socket, "shutdown_write"):
            self._socket.shutdown_write()
        else:
            self._socket.shutdown(socket.SHUT_WR)

    def frames(self, silence_s: float) -> Iterator[tuple[int, bytes]]:
        """Pairs of STDOUT or STDERR and bytes, as they come, until the other side closes.

        Raises OSError: the connection broke, or nothing came for ``silence_s`` seconds (TimeoutError).
        """
        self._socket.settimeout(silence_s)
        header = b""
        kind, left = 0, 0
        while data := self._socket.recv(_RECEIVE_BYTES):
            while data:
                if left:
                    piece, data = data[:left], data[left:]
                    left -= len(piece)
                    yield kind, piece
                    continue
                missing = _FRAME_HEADER_BYTES - len(header)
                header, data = header + data[:missing], data[missing:]
                if len(header) == _FRAME_HEADER_BYTES:
                    kind, left, header = header[0], int.from_bytes(header[4:], "big"), b""

    def close(self) -> None:
        for each in (self._socket, self._raw):
            with contextlib.suppress(OSError):
                each.close()


class LogStream:
    """A container's output as it comes. ``close``, from any thread, ends it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        with contextlib.suppress(OSError, ValueError):  # closed, or the engine is away: no more comes
            yield from self._stream

    def close(self) -> None:
        if hasattr(self._stream, "close"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                self._stream.close()


class Engine:
    """What we ask a Docker engine. Safe to use from several threads."""

    def __init__(self, client: Any, endpoint: Endpoint, way: SshAdapter | None = None) -> None:
        self._client = client
        self._way = way
        self.endpoint = endpoint

    @classmethod
    def connect(cls, endpoint: Endpoint, timeout_s: float = TIMEOUT_S) -> Engine:
        """Raises a transient ComputeError where nothing answers, ConfigError where the address is no address."""
        import docker.errors

        if endpoint.url.startswith("ssh:"):
            return cls._connect_by_ssh(endpoint, timeout_s)
        try:
            client = _client(version="auto", timeout=int(timeout_s), **endpoint.arguments())
        except docker.errors.TLSParameterError as error:
            raise ConfigError("The Docker engine's TLS files cannot be used.", words=str(error)) from error
        except docker.errors.DockerException as error:
            raise _no_answer(endpoint, str(error)) from error
        return cls(client, endpoint)

    @classmethod
    def _connect_by_ssh(cls, endpoint: Endpoint, timeout_s: float) -> Engine:
        import docker
        from docker.constants import MINIMUM_DOCKER_API_VERSION

        from .ssh import SshAdapter

        way = SshAdapter(endpoint.url, timeout_s)

        def over_ssh(version: str) -> Any:  # a client that is told its version connects to nothing by itself
            client = docker.APIClient("unix:///nowhere", version=version, timeout=int(timeout_s))
            client.mount(client.base_url, way)
            return client

        asking = cls(over_ssh(MINIMUM_DOCKER_API_VERSION), endpoint, way)
        version = asking._call("tell its version", lambda client: client.version(api_version=False))["ApiVersion"]
        return cls(over_ssh(version), endpoint, way)

    def info(self) -> dict[str, Any]:
        return dict(self._call("tell about itself", lambda client: client.info()))

    # -- images

    def image(self, name: str) -> dict[str, Any] | None:
        """What the engine has under this name or id; None if nothing."""
        return self._find(f"look for image {name}", lambda client: client.inspect_image(name))

    def registry_image(self, name: str, auth: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the registry says of the image (``Descriptor``, ``Platforms``), without pulling it."""
        what = f"find image {name} in its registry"
        return dict(
            self._call(what, lambda client: client.inspect_distribution(name, auth_config=_credentials(auth, name)))
        )

    def pull(
        self, name: str, platform: str | None = None, auth: Mapping[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Pull; yields the engine's progress lines. Blocks until it is done or the consumer stops."""
        repository, tag = split_reference(name)
        options = {"tag": tag, "platform": platform, "stream": True, "decode": True}
        return self._progress(
            f"pull image {name}",
            lambda client: client.pull(repository, **options, auth_config=_credentials(auth, repository)),
        )

    def push(self, repository: str, tag: str, auth: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        options = {"tag": tag, "stream": True, "decode": True}
        return self._progress(
            f"push image {repository}:{tag}",
            lambda client: client.push(repository, **options, auth_config=_credentials(auth, repository)),
        )

    def commit(self, container: str, repository: str, tag: str, config: Mapping[str, Any], message: str) -> str:
        """Make an image of a container as it is; its id. The engine is silent while it copies what is in it."""
        # Not the SDK's own call: that one cannot wait longer than the client's other calls.
        url = f"{self._client.base_url}/v{self._client.api_version}/commit"
        params = {"container": container, "repo": repository, "tag": tag, "comment": message}
        what = f"make image {repository}:{tag}"
        with self._asking(what):
            answer = self._client.post(url, params=params, json=dict(config), timeout=(TIMEOUT_S, COMMIT_TIMEOUT_S))
        if answer.status_code != 201:
            raise Refused(f"The Docker engine could not {what}.", words=answer.text, status=answer.status_code)
        return str(answer.json()["Id"])

    def images(self, label: str) -> list[dict[str, Any]]:
        return list(self._call("list images", lambda client: client.images(filters={"label": label})))

    def remove_image(self, name: str) -> None:
        self._call(f"remove image {name}", lambda client: client.remove_image(name), none_for=(404,))

    # -- containers

    def create(self, name: str, document: Mapping[str, Any], platform: str | None = None) -> str:
        """Make a container, not started; its id. ``document``: the Engine API's. A taken name is a conflict."""
        made = self._call(
            f"create container {name}",
            lambda client: client.create_container_from_config(dict(document), name, platform),
        )
        return str(made["Id"])

    def start(self, container: str) -> None:
        self._call(f"start container {container}", lambda client: client.start(container))

    def inspect(self, container: str) -> dict[str, Any] | None:
        """The container as it is now; None if it does not exist."""
        return self._find(f"look at container {container}", lambda client: client.inspect_container(container))

    def kill(self, container: str, signal: str = "SIGKILL") -> None:
        """A container that does not run, or is not there, is what was wanted."""
        self._call(f"kill container {container}", lambda client: client.kill(container, signal), none_for=(404, 409))

    def stop(self, container: str, patience_s: int) -> None:
        """SIGTERM, and SIGKILL after ``patience_s``. Blocks until it has ended; one that does not run is fine."""
        what = f"stop container {container}"
        self._call(what, lambda client: client.stop(container, timeout=patience_s), none_for=(304, 404))

    def unpause(self, container: str) -> None:
        """Idempotent: a container that is not paused is what was wanted."""
        what = f"unpause container {container}"
        self._call(what, lambda client: client.unpause(container), none_for=(404, 409, 500))

    def remove(self, container: str) -> None:
        """Remove it, running or not, with its anonymous volumes. Idempotent: also while somebody else removes it."""
        self._call(
            f"remove container {container}",
            lambda client: client.remove_container(container, force=True, v=True),
            none_for=(404, 409),
        )

    def rename(self, container: str, name: str) -> None:
        self._call(f"rename container {container}", lambda client: client.rename(container, name))

    def join_network(self, container: str, network: str) -> None:
        """Join a network: then a container's ports are published, unless another network has published them."""
        what = f"connect container {container} to network {network}"
        self._call(what, lambda client: client.connect_container_to_network(container, network))

    def leave_network(self, container: str, network: str) -> None:
        """Leave a network: then the ports that it published are free, and what is under way on them breaks off."""
        what = f"disconnect container {container} from network {network}"
        self._call(what, lambda client: client.disconnect_container_from_network(container, network, force=True))

    def containers(self, label: str) -> list[dict[str, Any]]:
        """All containers with the label, running or not, as the engine lists them."""
        return list(self._call("list containers", lambda client: client.containers(all=True, filters={"label": label})))

    def words_of(self, container: str, lines: int = 20) -> str:
        """The last lines that the container's own process wrote; empty where the log driver keeps none."""
        what = f"read the log of container {container}"
        said = self._call(what, lambda client: client.logs(container, tail=lines), none_for=(404, 409, 500, 501))
        return bytes(said or b"").decode(errors="replace")

    def log(self, container: str, *, follow: bool, lines: int | None) -> LogStream:
        """What the container's own process writes, from ``lines`` before now on (None: all that is kept)."""
        what = f"read the log of container {container}"
        options = {"stream": True, "follow": follow, "tail": "all" if lines is None else lines}
        return LogStream(self._call(what, lambda client: client.logs(container, **options)))

    def change_limits(self, container: str, *, cpus: float | None, memory_bytes: int | None) -> None:
        """New limits for a container that runs; None leaves the one it has."""
        limits: dict[str, Any] = {}
        if memory_bytes:
            limits |= {"mem_limit": memory_bytes, "memswap_limit": memory_bytes}
        if cpus:
            limits |= {"cpu_period": 100_000, "cpu_quota": round(cpus * 100_000)}
        if limits:
            what = f"change the limits of container {container}"
            self._call(what, lambda client: client.update_container(container, **limits))

    def attach_input(self, container: str) -> Connection:
        """The stdin of a container that is about to start."""
        params = {"stdin": 1, "stream": 1}
        what = f"attach to container {container}"
        return Connection(self._call(what, lambda client: client.attach_socket(container, params=params)))

    def exec(self, container: str, argv: Sequence[str]) -> Connection:
        """Run a further process in a running container, connected to us."""
        what = f"run a process in container {container}"
        made = self._call(what, lambda client: client.exec_create(container, list(argv), stdin=True))
        return Connection(self._call(what, lambda client: client.exec_start(made["Id"], socket=True)))

    def copy_in(self, container: str, folder: str, archive: bytes | Iterator[bytes]) -> None:
        """Unpack a tar archive into a folder of a container, running or not; owners and modes are the archive's."""
        what = f"copy files into container {container}"
        self._call(what, lambda client: client.put_archive(container, folder, archive))

    def copy_out(self, container: str, path: str) -> Iterator[bytes]:
        """A tar archive of a file or folder of a container, running or not. Refused (404): there is none."""
        # Not the SDK's own call: that one waits for ever on a connection that has gone silent.
        url = f"{self._client.base_url}/v{self._client.api_version}/containers/{container}/archive"
        what = f"copy {path} out of container {container}"
        with (
            self._asking(what),
            self._client.get(
                url, params={"path": path}, stream=True, timeout=TIMEOUT_S, headers={"Accept-Encoding": "identity"}
            ) as response,
        ):
            if response.status_code != 200:
                raise Refused(f"The Docker engine could not {what}.", words=response.text, status=response.status_code)
            yield from response.iter_content(_RECEIVE_BYTES)

    # -- volumes

    def create_volume(self, name: str, labels: Mapping[str, str]) -> None:
        """Idempotent: a volume of this name that exists is taken as it is."""
        self._call(f"create volume {name}", lambda client: client.create_volume(name, labels=dict(labels)))

    def volume(self, name: str) -> dict[str, Any] | None:
        return self._find(f"look at volume {name}", lambda client: client.inspect_volume(name))

    def volumes(self, label: str) -> list[dict[str, Any]]:
        found = self._call("list volumes", lambda client: client.volumes(filters={"label": label}))
        return list(found["Volumes"] or [])

    def remove_volume(self, name: str) -> None:
        """Idempotent. Refused (conflict) while a container uses it."""
        self._call(f"remove volume {name}", lambda client: client.remove_volume(name), none_for=(404,))

    def network(self, name: str) -> dict[str, Any] | None:
        return self._find(f"look at network {name}", lambda client: client.inspect_network(name))

    # -- errors

    def _call(self, what: str, ask: Callable[[Any], Any], *, none_for: tuple[int, ...] = ()) -> Any:
        """The SDK's answer; None where the engine answers with one of the HTTP states ``none_for``."""
        try:
            with self._asking(what):
                return ask(self._client)
        except Refused as error:
            if error.status in none_for:
                return None
            raise

    def _find(self, what: str, ask: Callable[[Any], Any]) -> dict[str, Any] | None:
        found = self._call(what, ask, none_for=(404,))
        return None if found is None else dict(found)

    def _progress(self, what: str, ask: Callable[[Any], Any]) -> Iterator[dict[str, Any]]:
        with self._asking(what):
            for line in ask(self._client):
                if "error" in line:
                    raise Refused(f"The Docker engine could not {what}.", words=str(line["error"]))
                yield line

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Turns the SDK's errors into ours."""
        import docker.errors
        import requests.exceptions
        import urllib3.exceptions

        try:
            yield
        except docker.errors.APIError as error:
            words, status = str(error.explanation or error), error.status_code or 0
            raise Refused(f"The Docker engine could not {what}.", words=words, status=status) from error
        except docker.errors.DockerException as error:
            raise Refused(f"The Docker engine could not {what}.", words=str(error)) from error
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            words = (self._way.words() if self._way else "") or str(error)
            raise _no_answer(self.endpoint, words, f"when it was to {what}") from error


def _client(**options: Any) -> Any:
    """The SDK's client, whose own CA holds: requests would take the one that ``REQUESTS_CA_BUNDLE`` names."""
    import docker

    class Client(docker.APIClient):
        def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
            verify = self.verify if verify is None else verify
            return super().merge_environment_settings(url, proxies, stream, verify, cert)

    return Client(**options)


def _credentials(auth: Mapping[str, Any] | None, image: str) -> dict[str, Any]:
    """What to send to the image's registry: ``docker_auth``, or what ``docker login`` left, or nothing.

    A credential helper that does not answer has nothing: so it is with the ``docker`` command.
    """
    from docker.auth import load_config, resolve_repository_name
    from docker.errors import DockerException

    if auth and opens(auth, image):
        return dict(auth)
    try:
        return load_config().resolve_authconfig(resolve_repository_name(image)[0]) or {}
    except DockerException:
        return {}


def opens(auth: Mapping[str, Any], image: str) -> bool:
    """Whether MLflow's ``docker_auth`` is for the image's registry: without ``registry`` it is for Docker Hub, as in
    the ``login`` that it is the arguments of."""
    from docker.auth import INDEX_NAME, resolve_index_name, resolve_repository_name

    registry: str = resolve_repository_name(image)[0]
    return registry == resolve_index_name(str(auth.get("registry") or INDEX_NAME))


def _no_answer(endpoint: Endpoint, words: str, when: str = "") -> ComputeError:
    named = f"{endpoint.url or 'the default address'}" + (f" (context {endpoint.context})" if endpoint.context else "")
    what = f"The Docker engine at {named} does not answer" + (f" {when}." if when else ".")
    return ComputeError(what, words=words, hint=CONNECT_HINT, transient=True)


def split_reference(name: str) -> tuple[str, str]:
    """An image's name -> its repository, and its tag or digest: ``host:5000/image:1`` -> ``host:5000/image``, ``1``."""
    repository, at, digest = name.partition("@")
    if at:
        return repository, digest
    head, colon, tag = name.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (name, "latest")


def registry_auth(environ: Mapping[str, str]) -> Mapping[str, Any] | None:
    """The credentials that MLflow's ``docker_auth`` gave, as they travel to the supervisor; None: Docker's own."""
    text = environ.get(AUTH_VARIABLE, "")
    return cast("dict[str, Any]", json.loads(text)) if text else None


#: The supervisor's variable for ``docker_auth``. It never reaches a container.
AUTH_VARIABLE = "MLFLOW_REMOTE_DOCKER_AUTH"
