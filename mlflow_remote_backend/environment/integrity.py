"""Whether the files of installed wheels are still those of the wheels. Standard library only.

uv links a wheel's files from its cache into each environment. A program that writes into its own environment, or a
failing disk, changes the cache as well, and with it every later environment. Each wheel lists the digests of its files
(``RECORD``); hashing them all costs a second for a large environment, so only those are hashed whose size or time
looks touched.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

#: Files of a wheel are unpacked together; one changed this many seconds later than the first is hashed.
TOUCHED_S = 30.0


def damaged(prefix: Path, before: float) -> tuple[str, ...]:
    """Names of the distributions that uv installed into ``prefix`` and that miss a file or hold a changed one.

    Only those that it took from its cache: what it unpacked itself after ``before`` (seconds since the epoch) has just
    been verified with its archive.
    """
    found = []
    for packages in (prefix / "lib").glob("python3*/site-packages"):
        for record in sorted(packages.glob("*.dist-info/RECORD")):
            if _unpacked(record) < before and _installer(record) == "uv" and not _intact(packages, record):
                found.append(record.parent.name.split("-")[0])
    return tuple(found)


def _unpacked(record: Path) -> float:
    """When the wheel was unpacked: the time of a file that is linked and not written anew by each installation."""
    try:
        return record.with_name("METADATA").stat().st_mtime
    except OSError:
        return 0.0


def _installer(record: Path) -> str:
    try:
        return record.with_name("INSTALLER").read_text().strip()
    except OSError:
        return ""


def _intact(packages: Path, record: Path) -> bool:
    rows = list(_rows(record))
    times = {}
    for name, _, size in rows:
        try:
            status = os.stat(packages / name)
        except OSError:
            return False
        if size and status.st_size != int(size):
            return False
        times[name] = status.st_mtime
    oldest = min(times.values(), default=0.0)
    return all(_digest(packages / name) == digest for name, digest, _ in rows if times[name] - oldest > TOUCHED_S)


def _rows(record: Path) -> Iterator[tuple[str, str, str]]:
    """Path, sha256 as RECORD writes it, and size of each listed file that has a digest."""
    with record.open(newline="", encoding="utf-8") as stream:
        for row in csv.reader(stream):
            if len(row) == 3 and row[1].startswith("sha256="):
                yield row[0], row[1].removeprefix("sha256="), row[2]


def _digest(file: Path) -> str:
    digest = hashlib.sha256(file.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
