"""The main program of a deployment's pod: opens the port, starts the servers on it, ends with them. Standard library
only.

    python pod.py START_FILE

``start.json`` says what to run: ``argv`` (after the interpreter), ``env`` (added to ours), ``workers``, ``port``,
``grace_s``. One pod is one revision: whoever replaces it is Kubernetes, so there is nothing to look after here.

- The port is bound, not listened on, until a server has loaded the model: until then connections are refused, and
  probes know at once.
- The first server that ends takes the others with it, and its exit code is ours: the kubelet starts the container again
  and keeps what it was.
- SIGTERM ends the servers in order; they have ``grace_s`` to finish what they are at.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TICK_S = 0.05
GRACE_MARGIN_S = 2.0


def bound(port: int) -> socket.socket:
    """The port on all addresses of the pod, of both families where there are both. Raises OSError."""
    if socket.has_dualstack_ipv6():
        try:
            both = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
            both.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            both.bind(("::", port))
            return both
        except OSError:  # IPv6 is switched off
            both.close()
    plain = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    plain.bind(("0.0.0.0", port))
    return plain


class Servers:
    """The processes that serve. ``run`` returns when all have ended: the exit code for the container."""

    def __init__(self, start: Any) -> None:
        self._grace_s = start["grace_s"]
        self._told = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._tell)
        public = bound(start["port"])
        argv = [sys.executable, *start["argv"], "--fd", str(public.fileno())]
        environ = {**os.environ, **start["env"]}
        self._processes = [
            subprocess.Popen(
                argv, env=environ, pass_fds=(public.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True
            )
            for _ in range(start["workers"])
        ]
        public.close()  # the last server that stops listening closes the port: nobody waits in a queue without end

    def _tell(self, number: int, frame: object) -> None:
        self._told = True

    def run(self) -> int:
        while not self._told and self._first_exit() is None:
            time.sleep(TICK_S)
        code = self._first_exit()
        if code is not None:
            print(f"mlflow-remote: a server ended with {_named(code)}; the others end with it", flush=True)
        self._end()
        if code is None:
            return 0
        return 128 - code if code < 0 else code or 1  # a server that ends by itself is a failure

    def _first_exit(self) -> int | None:
        return next((each.returncode for each in self._processes if each.poll() is not None), None)

    def _end(self) -> None:
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + self._grace_s + GRACE_MARGIN_S
        while any(each.poll() is None for each in self._processes) and time.monotonic() < deadline:
            time.sleep(TICK_S)
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        """To each server and whatever it started."""
        for each in self._processes:
            try:
                os.killpg(each.pid, number)
            except (ProcessLookupError, PermissionError):
                continue


def _named(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def main(path: str) -> int:
    with open(path, encoding="utf-8") as file:
        start = json.load(file)
    return Servers(start).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
