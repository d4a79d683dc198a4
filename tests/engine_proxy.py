"""A proxy before the engine's socket that can be cut, frozen and closed, as a network or a restart would."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

_PIECE_BYTES = 64 * 1024


class EngineProxy:
    """``url``: where it listens. Connections pass until told otherwise; each state holds for new ones as well.

    With the ``host`` 127.0.0.2 it passes for an engine of another machine.
    """

    def __init__(self, target: str, host: str = "127.0.0.1") -> None:
        self._target = target
        self._open = threading.Event()
        self._open.set()
        self._refusing = False
        self._lock = threading.Lock()
        self._live: set[socket.socket] = set()
        self._listener = socket.create_server((host, 0))
        self.url = f"tcp://{host}:{self._listener.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection there is."""
        with self._lock:
            live, self._live = self._live, set()
        for each in live:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._open.clear()

    def thaw(self) -> None:
        self._open.set()

    def refuse(self) -> None:
        """The engine is gone: connections break, new ones too."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        self._refusing = False

    def close(self) -> None:
        self._listener.close()
        self.thaw()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                client.close()
                continue
            self.connections += 1
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            server.connect(self._target)
            with self._lock:
                self._live |= {client, server}
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(_PIECE_BYTES):
                self._open.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for each in (source, sink):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def engine_proxy(host: str = "127.0.0.1") -> Iterator[EngineProxy]:
    address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    proxy = EngineProxy(address.removeprefix("unix://"), host)
    try:
        yield proxy
    finally:
        proxy.close()
