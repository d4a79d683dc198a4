"""What the targets share whose servers a keeper looks after (``server/keeper.py``): ``local`` and ``docker``.

    revisions/N/      spec.json, model/, token, wanted.json: what revision N is, and what the keeper is told for it
    server/           keeper.py, serve.py, ask.py, hold.py
    listen.json, wanted.json, state.json, stop, lock: see the keeper

They differ in where that folder is (:class:`Keep`): on this machine, or in a container.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets as random_tokens
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import ComputeError, DeploymentFailed, RequestError
from . import calling, diagnosis
from . import server as served
from .spec import Answer, DeploymentSpec, DeploymentStatus, Order, Secrets, State
from .target import Watcher

KEEPER_START_S = 15.0  # from the keeper's start to its first word, on a busy machine
POLL_S = 0.1
REMOVAL_S = 3.0  # from a keeper's end until all of it is gone
MARGIN_S = 60.0  # beyond the keeper's own patience
PROBE_TIMEOUT_S = 10.0
SERVER_FILES = ("keeper.py", "serve.py", "ask.py", "hold.py")


@dataclass(frozen=True)
class File:
    """Something to put into a keep. ``source``: a file or folder of this machine, or content."""

    path: str
    source: Path | bytes
    mode: int = 0o600


class LogStream(Protocol):
    """Bytes as they come; ``close``, from any thread, ends it."""

    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


class Keep(Protocol):
    """The folder of one deployment's keeper. ``path``: as the keeper sees it; ``url``: where its port is reached."""

    path: str

    @property
    def url(self) -> str: ...

    def read(self, name: str) -> bytes | None: ...

    def put(self, files: Sequence[File]) -> None:
        """Each whole or not at all, in this order."""
        ...

    def drop(self, name: str) -> None: ...

    def start(self) -> None:
        """Start the keeper, unless it lives."""
        ...

    def alive(self) -> bool: ...

    def log(self, *, follow: bool, tail: int | None) -> LogStream: ...

    def age_s(self) -> float:
        """Seconds since it was made."""
        ...

    def ask(self, path: str, body: bytes | None, content_type: str, token: str, timeout_s: float) -> Answer:
        """One request to the server. Raises a transient ComputeError: it did not answer."""
        ...

    def discard(self) -> None:
        """End the keeper and remove all of it. Idempotent."""
        ...


@dataclass(frozen=True)
class Software:
    """What serves: the interpreter as the keeper sees it, and the variables it starts with."""

    python: str
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)


class KeptTarget:
    """The verbs that need nothing but the keep. A subclass makes keeps, finds them, and readies the software."""

    name: str

    def software(self, spec: DeploymentSpec, watcher: Watcher) -> Software:
        """Materialise the environment where the server will run. Blocks for milliseconds or minutes."""
        raise NotImplementedError

    def make(self, spec: DeploymentSpec) -> Keep:
        """An empty keep under the name. Raises RequestError: the name is taken."""
        raise NotImplementedError

    def find(self, name: str) -> Keep | None:
        raise NotImplementedError

    def names(self) -> list[str]:
        raise NotImplementedError

    def changing(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Holds everybody else who creates, updates or deletes the same deployment. Raises RequestError."""
        raise NotImplementedError

    def only_anew(self, keep: Keep, before: DeploymentSpec, after: DeploymentSpec) -> list[str]:
        """What of the change only another keep can have; empty: this one becomes it. Asked once the software is
        ready."""
        return []

    def replace(
        self, keep: Keep, changed: list[str], order: Order, software: Software, secrets: Secrets, watcher: Watcher
    ) -> None:
        """Another keep in place of this one, which serves until then, and goes on if that fails."""
        raise NotImplementedError

    def mend(self, name: str) -> None:
        """Bring to an end what a change that was killed half-way has left. Whoever calls holds the deployment."""

    # -- the verbs ----------------------------------------------------------------------------------------------------

    def apply(self, order: Order, watcher: Watcher) -> DeploymentStatus:
        spec = order.spec
        with self.changing(spec.name):
            if spec.revision == 1:
                self._create(order, watcher)
            else:
                self._update(order, watcher)
        status = self.status(spec.name)
        if status is None:
            raise removed(spec.name)
        return status

    def _create(self, order: Order, watcher: Watcher) -> None:
        if self.find(order.spec.name) is not None:
            raise name_taken(order.spec.name, self.name)
        software = self.software(order.spec, watcher)
        keep = self.make(order.spec)
        try:
            self.fill(keep, order, software, order.secrets or Secrets(), watcher)
            self._ask_once(keep, order.spec)
        except BaseException:
            keep.discard()
            raise

    def fill(self, keep: Keep, order: Order, software: Software, secrets: Secrets, watcher: Watcher) -> None:
        """Make an empty keep serve."""
        keep.put([File("listen.json", _json(self.listens_on(order.spec))), *server_files()])
        self._roll(keep, order, software, secrets, watcher, log_tail=None)

    def listens_on(self, spec: DeploymentSpec) -> dict[str, Any]:
        return {"host": spec.service.host, "port": spec.service.port}

    def _update(self, order: Order, watcher: Watcher) -> None:
        spec = order.spec
        self.mend(spec.name)
        keep = self.find(spec.name)
        if keep is None:
            raise no_such(spec.name, self.name)
        serving = _serving(keep)
        if serving >= spec.revision:
            raise changed_since(spec.name)
        before = _spec_in(keep, serving or _coming(keep))
        try:
            software = self.software(spec, watcher)
            secrets = order.secrets or _secrets_in(_wanted_of(keep, serving), keep)
            changed = self.only_anew(keep, before, spec) if before is not None else []
            serving = _serving(keep)  # of an update that was killed, with which the keeper went on
            if serving >= spec.revision:
                raise changed_since(spec.name)
            if changed:
                self.replace(keep, changed, order, software, secrets, watcher)
            else:
                self._exchange(keep, order, software, secrets, watcher)
        except DeploymentFailed:
            raise  # its message says what serves
        except BaseException:
            watcher.say(f"revision {serving} of deployment {spec.name} goes on" if serving else "nothing was changed")
            raise

    def _exchange(self, keep: Keep, order: Order, software: Software, secrets: Secrets, watcher: Watcher) -> None:
        """The next revision in place of the one in the same keep; on failure, the one that served is what is wanted.

        The keeper may be at the revision of an update that was killed: its number and its files stay its own.
        """
        serving = _serving(keep)
        wanted_before = _wanted_of(keep, serving)
        in_use = {serving, _coming(keep)}
        revision = max(order.spec.revision, *(number + 1 for number in in_use))
        for unused in {revision - 3, revision - 2, revision} - in_use:  # the last one of an update that failed
            keep.drop(f"revisions/{unused}")
        order = dataclasses.replace(order, spec=dataclasses.replace(order.spec, revision=revision))
        try:
            self.roll(keep, order, software, secrets, watcher)
        except BaseException:
            with contextlib.suppress(ComputeError, OSError):  # it must not hide the first one
                keep.put([File("wanted.json", wanted_before)])
            raise

    def roll(self, keep: Keep, order: Order, software: Software, secrets: Secrets, watcher: Watcher) -> None:
        """Make a keep that serves serve the next revision."""
        self._roll(keep, order, software, secrets, watcher, log_tail=0)
        self._ask_once(keep, order.spec)

    def _roll(
        self,
        keep: Keep,
        order: Order,
        software: Software,
        secrets: Secrets,
        watcher: Watcher,
        *,
        log_tail: int | None,
    ) -> None:
        """Put the revision there, and wait until its servers answer. ``log_tail``: lines to show of what is in the
        log already."""
        spec, attempt = order.spec, random_tokens.token_hex(8)
        folder = f"revisions/{spec.revision}"
        watcher.say(f"handing over the model ({spec.model.size_bytes / 1e6:.1f} MB)")
        files = [File(f"{folder}/spec.json", spec.dump().encode()), File(f"{folder}/model", order.model)]
        if secrets.token:
            files.append(File(f"{folder}/token", secrets.token.encode()))
        asked = _json({**wanted(spec, keep.path, software, secrets, attempt), "listen": self.listens_on(spec)})
        keep.put([*files, File(f"{folder}/wanted.json", asked), File("wanted.json", asked)])
        with _showing(keep, watcher, tail=log_tail) as log:
            keep.start()
            watcher.say("loading the model")
            self._await(keep, spec, attempt, log)

    def _await(self, keep: Keep, spec: DeploymentSpec, attempt: str, log: _Log) -> None:
        began = time.monotonic()
        while True:
            state = json.loads(keep.read("state.json") or b"{}")
            if state.get("attempt") == attempt:
                return
            serving = state.get("serving")
            failed = state.get("failed")
            if failed and failed.get("attempt") == attempt:
                raise diagnosis.error(spec, diagnosis.of_failed(spec, failed, log.text()), log.text(), serving)
            waited_s = time.monotonic() - began
            if (not state or waited_s > KEEPER_START_S) and self._gone(keep, spec.name):
                raise removed(spec.name)
            if waited_s > KEEPER_START_S and not keep.alive():
                ended = {"why": "", "exit": "?"}
                raise diagnosis.error(spec, diagnosis.of_failed(spec, ended, log.text()), log.text(), serving)
            if waited_s > spec.start_timeout_s + MARGIN_S:
                late = {"why": "timeout"}
                raise diagnosis.error(spec, diagnosis.of_failed(spec, late, log.text()), log.text(), serving)
            time.sleep(POLL_S)

    def _gone(self, keep: Keep, name: str) -> bool:
        """Whether somebody removes it, who ends its keeper first."""
        deadline = time.monotonic() + REMOVAL_S
        while self.find(name) is not None:
            if keep.alive() or time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _ask_once(self, keep: Keep, spec: DeploymentSpec) -> None:
        """A real request to where users will send theirs. Raises DeploymentFailed."""
        try:
            answer = keep.ask("/ping", None, calling.JSON, "", PROBE_TIMEOUT_S)
        except ComputeError as error:
            raise DeploymentFailed(
                f"Deployment {spec.name} serves, but {keep.url} does not answer from here.",
                words=error.words,
                hint="Look at service.host and service.port, and at what stands between here and there.",
            ) from error
        if answer.status != 200:
            raise DeploymentFailed(f"Deployment {spec.name} answers /ping with HTTP {answer.status}.")

    def status(self, name: str) -> DeploymentStatus | None:
        keep = self.find(name)
        if keep is None:
            return None
        state = json.loads(keep.read("state.json") or b"{}")
        coming = json.loads(keep.read("wanted.json") or b"{}").get("revision")
        serving = state.get("serving")
        spec = _spec_in(keep, serving or coming)
        if spec is None:
            return None  # between being made and its first file
        alive = keep.alive()
        restarts = int(state.get("restarts") or 0)
        detail = f"restarted {restarts} times, last exit code {state.get('exit')}" if restarts else ""
        if not alive:
            detail = "its keeper does not run: the machine was restarted, or somebody ended it; update starts it again"
        return DeploymentStatus(
            spec,
            _state(alive, serving, coming),
            url=keep.url if alive else "",
            replicas_ready=1 if alive and serving else 0,
            restarts=restarts,
            detail=detail,
        )

    def statuses(self) -> list[DeploymentStatus]:
        return [found for name in self.names() if (found := self.status(name)) is not None]

    def logs(self, name: str, *, follow: bool = False, tail: int | None = None) -> Iterator[bytes]:
        keep = self.find(name)
        if keep is None:
            raise no_such(name, self.name)
        stream = keep.log(follow=follow, tail=tail)
        try:
            yield from stream
        finally:
            stream.close()

    def call(self, name: str, path: str, body: bytes, content_type: str, timeout_s: float) -> Answer:
        keep = self.find(name)
        if keep is None:
            raise no_such(name, self.name)
        serving = json.loads(keep.read("state.json") or b"{}").get("serving")
        coming = json.loads(keep.read("wanted.json") or b"{}").get("revision")
        token = keep.read(f"revisions/{serving or coming}/token") or b""
        return keep.ask(path, body or None, content_type, token.decode(), timeout_s)

    def delete(self, name: str) -> None:
        with self.changing(name):
            keep = self.find(name)
            if keep is not None:
                keep.discard()

    def abandoned(self, older_than_s: float) -> list[str]:
        """Names under which nothing ever served, and nothing is about to: whoever created them died on the way."""
        found = []
        for name in self.names():
            keep = self.find(name)
            if keep is None or keep.age_s() < older_than_s:
                continue
            state = json.loads(keep.read("state.json") or b"{}")
            if not state.get("served") and (state.get("failed") or not keep.alive()):
                found.append(name)
        return found

    def sweep(self, older_than_s: float, *, dry_run: bool) -> Iterator[str]:
        yield from ()


# -- the keep's files --------------------------------------------------------------------------------------------------


def wanted(spec: DeploymentSpec, path: str, software: Software, secrets: Secrets, attempt: str) -> dict[str, Any]:
    """What the keeper is told to run. Holds secrets: it goes into a file that only its user reads."""
    folder = f"{path}/revisions/{spec.revision}"
    grace_s = int(spec.grace_period_s)
    argv = [software.python, "-u", f"{path}/server/serve.py", "--model", f"{folder}/model"]
    argv += ["--timeout", str(spec.timeout_s), "--grace", str(grace_s)]
    if secrets.token:
        argv += ["--token-file", f"{folder}/token"]
    return {
        "revision": spec.revision,
        "attempt": attempt,
        "argv": argv,
        "env": {**software.variables, **spec.env_vars, **secrets.env},
        "secret_names": sorted(secrets.env),
        "workers": spec.workers,
        "patience_s": spec.start_timeout_s,
        "grace_s": grace_s,
    }


def server_files() -> list[File]:
    folder = Path(served.__file__).parent
    return [File(f"server/{name}", (folder / name).read_bytes(), 0o644) for name in SERVER_FILES]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _serving(keep: Keep) -> int:
    """The revision that serves, 0 if none does."""
    return json.loads(keep.read("state.json") or b"{}").get("serving") or 0


def _coming(keep: Keep) -> int:
    """The revision that is wanted: the one that serves, or one to take its place."""
    return json.loads(keep.read("wanted.json") or b"{}").get("revision") or 0


def _wanted_of(keep: Keep, serving: int) -> bytes:
    """What the keeper was told for the revision that serves; ``wanted.json`` may be a killed update's."""
    return keep.read(f"revisions/{serving}/wanted.json") or keep.read("wanted.json") or b"{}"


def _spec_in(keep: Keep, revision: int | None) -> DeploymentSpec | None:
    text = keep.read(f"revisions/{revision}/spec.json") if revision else None
    return DeploymentSpec.load(text) if text else None


def _secrets_in(wanted_text: bytes, keep: Keep) -> Secrets:
    """Those of the revision that serves: an update that says nothing of them goes on with them."""
    document = json.loads(wanted_text)
    names = document.get("secret_names", ())
    token = keep.read(f"revisions/{document.get('revision')}/token") or b""
    return Secrets({name: document["env"][name] for name in names}, token.decode())


def _state(alive: bool, serving: int | None, coming: int | None) -> State:
    if not alive:
        return State.STOPPED
    if not serving:
        return State.STARTING
    return State.READY if serving == coming else State.UPDATING


# -- the log while it is waited for ------------------------------------------------------------------------------------


class _Log:
    """What the servers wrote since it was opened: shown, and kept (its end) for a diagnosis."""

    KEPT_BYTES = 256 * 1024

    def __init__(self, stream: LogStream, watcher: Watcher) -> None:
        self._stream = stream
        self._watcher = watcher
        self._kept = b""
        self._thread = threading.Thread(target=self._pump, name="deployment-log", daemon=True)
        self._thread.start()

    def _pump(self) -> None:
        with contextlib.suppress(
            ComputeError, OSError, ValueError
        ):  # the stream was closed, or broke: only the show ends
            for data in self._stream:
                self._kept = (self._kept + data)[-self.KEPT_BYTES :]
                self._watcher.log(data)

    def text(self) -> str:
        """Waits a moment for what is under way: a server's last words come just after its end."""
        before = None
        for _ in range(20):
            if before is not None and len(before) == len(self._kept):
                break
            before = self._kept
            time.sleep(0.2)
        return self._kept.decode(errors="replace")

    def close(self) -> None:
        self._stream.close()
        self._thread.join(timeout=2)


@contextlib.contextmanager
def _showing(keep: Keep, watcher: Watcher, *, tail: int | None) -> Iterator[_Log]:
    log = _Log(keep.log(follow=True, tail=tail), watcher)
    try:
        yield log
    finally:
        log.close()


def name_taken(name: str, where: str) -> RequestError:
    return RequestError(
        f"There is a deployment {name} on {where} already.",
        hint="update changes it; delete removes it; or choose another name.",
    )


def being_changed(name: str) -> RequestError:
    return RequestError(f"Deployment {name} is being changed by another process.", hint="Try again when it is done.")


def changed_since(name: str) -> RequestError:
    return RequestError(
        f"Deployment {name} was changed by somebody since it was looked at.", hint="Look, and try again."
    )


def removed(name: str) -> DeploymentFailed:
    return DeploymentFailed(f"Deployment {name} was removed by somebody while it was rolled out.")


def no_such(name: str, where: str) -> RequestError:
    return RequestError(f"There is no deployment {name} on {where}.", hint="mlflow-remote ls shows what there is.")
