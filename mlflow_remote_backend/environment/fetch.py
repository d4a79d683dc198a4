"""conda archives, fetched once and verified by us: ``<root>/archives/<sha256>/<file name>``.

py-rattler verifies what it downloads and not what it finds on disk, so every archive is hashed here, whether it comes
over HTTP, from a folder, or from an earlier fetch. An archive under its final name is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from ..errors import JobError
from . import credentials, hints, indexes
from .lockfile import Row
from .progress import Progress, Report

if TYPE_CHECKING:
    import requests

THREADS = 8
ATTEMPTS = 3
CHUNK_BYTES = 1024 * 1024

#: Seconds to wait for a connection, and for the next bytes.
TIMEOUT_S = (10, 60)


class Mismatch(Exception):
    """The content is not what the lock says. ``got``: its sha256."""

    def __init__(self, got: str) -> None:
        super().__init__(got)
        self.got = got


def fetch(rows: Sequence[Row], *, channels: Sequence[str], root: Path, report: Report) -> list[Path]:
    """The verified archives of conda rows, in the rows' order. ``channels``: as in an EnvironmentRef.

    Downloads several at a time. Raises JobError (ENVIRONMENT): not there, no answer, or another content than locked.
    """
    places = [_place(row, channels) for row in rows]
    secrets = indexes.secrets(places)
    counter = _Counter(len(rows), report)

    def one(row: Row, place: str) -> Path:
        path = _archive(row, place, secrets, root, counter)
        counter.finished()
        return path

    with ThreadPoolExecutor(THREADS, thread_name_prefix="fetch") as pool:
        try:
            return list(pool.map(one, rows, places))
        except BaseException:
            counter.stopped = True  # the other downloads end at their next chunk
            raise


@dataclass
class _Counter:
    """Counts archives and bytes for the report; any thread may call it."""

    total: int
    report: Report
    done: int = 0
    bytes: int = 0
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def received(self, count: int) -> None:
        if self.stopped:
            raise OSError("another download has failed")
        with self.lock:
            self.bytes += count
            detail = f"{self.done} of {self.total} packages"
            self.report(Progress("downloading", self.bytes, 0, "bytes", detail))

    def finished(self) -> None:
        with self.lock:
            self.done += 1


def _place(row: Row, channels: Sequence[str]) -> str:
    """Where to fetch an archive: from the channel's mirror if there is one, with ``${NAME}`` for its credentials.

    ``channels``: lines ``NAME URL``.
    """
    base, subdir, filename = row.url.rsplit("/", 2)
    pairs = [line.split(" ", 1) for line in channels]
    same = [url for name, url in pairs if base in (name.rstrip("/"), credentials.strip(url).rstrip("/"))]
    namesakes = [url for name, url in pairs if base.rsplit("/", 1)[-1] == name]
    for url in (*same, *namesakes):
        return f"{url.rstrip('/')}/{subdir}/{filename}"
    return row.url


def _archive(row: Row, place: str, secrets: dict[str, str], root: Path, counter: _Counter) -> Path:
    (expected,) = row.hashes
    target = root / "archives" / expected / row.filename
    if target.exists() and _digest(target) == expected:
        with contextlib.suppress(OSError):
            os.utime(target)  # its last use, for cache.prune
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{os.getpid()}-{threading.get_ident()}.part")
    try:
        _receive(credentials.expand(place, secrets), part, expected, counter.received)
        os.replace(part, target)
    except Mismatch as error:
        raise JobError(
            f"{row.name} {row.version} is not the package that was locked: {credentials.strip(place)}",
            words=f"expected sha256 {expected}, got {error.got}",
            hint=hints.HASH,
            code="ENVIRONMENT",
        ) from error
    except OSError as error:
        words = credentials.redact(str(error), secrets.values())
        raise JobError(
            f"{row.name} {row.version} could not be fetched: {credentials.strip(place)}",
            words=words,
            hint=hints.for_words(words, hints.CHANNEL),
            code="ENVIRONMENT",
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return _consume(iter(lambda: stream.read(CHUNK_BYTES), b""), lambda chunk: None)


def _consume(chunks: Iterator[bytes], use: Callable[[bytes], object]) -> str:
    """Passes chunks on and returns their sha256."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        use(chunk)
    return digest.hexdigest()


def _counted(chunks: Iterator[bytes], received: Callable[[int], None]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        received(len(chunk))


def _receive(url: str, part: Path, expected: str, received: Callable[[int], None]) -> None:
    """Writes what ``url`` holds to ``part``. Raises Mismatch, or OSError after the last attempt."""

    def write(chunks: Iterator[bytes]) -> None:
        with part.open("wb") as stream:
            got = _consume(_counted(chunks, received), stream.write)
        if got != expected:
            raise Mismatch(got)

    if url.startswith("file:"):
        with open(unquote(urlsplit(url).path), "rb") as source:
            write(iter(lambda: source.read(CHUNK_BYTES), b""))
    else:
        _with_attempts(lambda: _download(url, write))


def _with_attempts(action: Callable[[], None]) -> None:
    """Tries again what may pass: a broken connection, a server's 5xx; not a refusal."""
    import requests

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 0
            if attempt == ATTEMPTS or 400 <= status < 500:
                raise
            time.sleep(0.5 * 2**attempt)


_sessions = threading.local()


def _session() -> requests.Session:
    """One session for each thread: connections are kept, ``~/.netrc``, proxies and certificates are honoured."""
    import requests

    if not hasattr(_sessions, "session"):
        _sessions.session = requests.Session()
        if certificates := indexes.certificates():
            _sessions.session.verify = certificates
    session: requests.Session = _sessions.session
    return session


def _download(url: str, write: Callable[[Iterator[bytes]], None]) -> None:
    headers = {"Accept-Encoding": "identity"}  # the digest is that of the file itself
    with _session().get(url, stream=True, timeout=TIMEOUT_S, headers=headers) as response:
        response.raise_for_status()
        write(response.iter_content(CHUNK_BYTES))
