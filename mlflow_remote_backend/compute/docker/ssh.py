"""An engine behind ``ssh://``: each connection is an ``ssh`` that runs ``docker system dial-stdio`` there.

So does the ``docker`` command. The user's own configuration, keys, agent and jump hosts hold, and a connection that
breaks is one like any other. The SDK's own way would need another implementation of ssh, and ends with its connection.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import tempfile
from typing import Any
from urllib.parse import urlsplit

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from ...errors import ConfigError

MOST_CONNECTIONS = 10
_WORDS_BYTES = 2000


def command(url: str) -> list[str]:
    """What connects its standard input and output to the engine at ``url``. Raises ConfigError.

    It never asks for a password: a supervisor has nobody to ask.
    """
    try:
        parsed = urlsplit(url)
        host, port = parsed.hostname or "", parsed.port
    except ValueError:
        host, port = "", None
    if not host or host.startswith("-") or (parsed.username or "").startswith("-"):
        raise ConfigError(
            f"{url!r} is no address of an engine behind ssh.",
            key="docker.base_url",
            hint="Write ssh://[USER@]HOST[:PORT].",
        )
    remote = [
        "docker",
        *(["--host", f"unix://{parsed.path}"] if parsed.path.strip("/") else []),
        "system",
        "dial-stdio",
    ]
    user = ["-l", parsed.username] if parsed.username else []
    return ["ssh", "-o", "BatchMode=yes", *user, *(["-p", str(port)] if port else []), "--", host, shlex.join(remote)]


class _Connection(HTTPConnection):
    def __init__(self, *args: Any, argv: list[str], errors: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._argv = argv
        self._errors = errors

    def connect(self) -> None:
        ours, theirs = socket.socketpair()
        if isinstance(self.timeout, (int, float)):
            ours.settimeout(self.timeout)
        with theirs:  # a session of its own: a Ctrl-C is for us
            self._process = subprocess.Popen(
                self._argv, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=self._errors, start_new_session=True
            )
        self.sock = ours


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class SshAdapter(HTTPAdapter):
    """Carries a session's requests over ssh. Raises ConfigError where ``url`` is none."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the adapter
        self._pool = _Pool(
            "localhost", timeout=timeout_s, maxsize=MOST_CONNECTIONS, argv=command(url), errors=self._errors
        )
        super().__init__()

    def words(self) -> str:
        """What ssh said last, for a person."""
        size = self._errors.seek(0, 2)
        self._errors.seek(max(0, size - _WORDS_BYTES))
        return self._errors.read().decode(errors="replace").strip()

    def get_connection(self, url: Any, proxies: Any = None) -> _Pool:
        return self._pool

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> _Pool:
        return self._pool

    def request_url(self, request: Any, proxies: Any) -> str:
        return str(request.path_url)

    def close(self) -> None:
        super().close()
        self._pool.close()
