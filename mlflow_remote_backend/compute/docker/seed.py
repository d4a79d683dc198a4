"""The packages of a lock, fetched and verified on this machine, and the lock that finds them where they are copied to.

Here are the package indexes, the channels and their credentials; a container may reach none of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

from ...environment import cache
from ...environment.lockfile import Row
from ...job import EnvironmentRef
from . import request
from .copying import Item

Say = Callable[[str], None]


@dataclass(frozen=True)
class Seed:
    """What to copy into a container before it builds. ``whole``: it then needs no network.

    ``archives``: path in the container -> file of this machine. ``secrets``: variables for what it must fetch itself.
    """

    ref: EnvironmentRef
    folder: str
    archives: Mapping[str, Path]
    whole: bool
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def items(self) -> Iterator[Item]:
        folders = {parent for path in self.archives for parent in Path(path).parents if str(parent) not in ("/", ".")}
        for each in sorted({*folders, Path(self.folder)}):
            yield Item(str(each).lstrip("/"))
        for path, source in self.archives.items():
            yield Item(path.lstrip("/"), source)
        text = json.dumps(dataclasses.asdict(self.ref))
        yield Item(f"{self.folder}/environment.json".lstrip("/"), text.encode(), 0o644)


def gather(ref: EnvironmentRef, cache_root: Path, say: Say, folder: str) -> Seed:
    """Fetch what the lock names into this machine's cache. ``folder``: where it will lie in the container.

    Blocks while it downloads. Raises JobError (ENVIRONMENT).
    """
    from ...environment import fetch, indexes, lease

    rows = _rows(ref, cache_root)
    conda = [row for row in rows if row.manager == "conda"]
    pip = [row for row in rows if row.manager == "pip" and row.url and len(row.hashes) == 1]
    whole = len(conda) + len(pip) == len(rows)
    places = {**_fetch_as_conda(conda), **{row: f"{folder}/pip/{row.hashes[0]}/{row.filename}" for row in pip}}
    channels = [*ref.channels, *_with_credentials(pip, ref.indexes)]
    with lease.sharing(cache_root / cache.BUILDS):
        found = fetch.fetch([*conda, *pip], channels=channels, root=cache_root, report=lambda step: say(str(step)))
    archives = {places[row]: path for row, path in zip([*conda, *pip], found, strict=True)}
    seeded = _relocated(ref, {row: f"file://{quote(places[row])}" for row in pip})
    if whole:
        return Seed(dataclasses.replace(seeded, indexes=("--no-index",), channels=()), folder, archives, True)
    return Seed(seeded, folder, archives, False, indexes.secrets((*ref.indexes, *ref.channels)))


def _fetch_as_conda(rows: Sequence[Row]) -> dict[Row, str]:
    """Where the materialiser looks for an archive before it fetches one (``environment.fetch``)."""
    return {row: f"{request.CACHE}/archives/{row.hashes[0]}/{row.filename}" for row in rows}


def _rows(ref: EnvironmentRef, cache_root: Path) -> list[Row]:
    from ...environment import lockfile, requirements

    if ref.kind == "conda-lock":
        rows = lockfile.conda_lock_rows(lockfile.load_conda_lock(ref.lock), ref.platform)
    else:
        listed = requirements.expand_text(ref.lock, folder=cache_root, where="the environment's lock")
        rows = lockfile.for_platform(lockfile.requirements_rows(listed, "The environment's lock"), ref)
    return [lockfile.located(row, ref.files) for row in rows]


def _with_credentials(rows: Sequence[Row], index_lines: Sequence[str]) -> list[str]:
    """For ``fetch``: ``PLACE PLACE-WITH-${NAMES}`` for files on the host of an index that wants credentials."""
    users = {}
    for line in index_lines:
        user, at, host = urlsplit(line.partition(" ")[2]).netloc.rpartition("@")
        if at:
            users[host] = user
    lines = []
    for row in rows:
        base = row.url.rsplit("/", 2)[0]
        host = urlsplit(base).netloc
        if host in users:
            lines.append(f"{base} {base.replace(f'//{host}', f'//{users[host]}@{host}', 1)}")
    return sorted(set(lines))


def _relocated(ref: EnvironmentRef, urls: Mapping[Row, str]) -> EnvironmentRef:
    """The same lock with files' places replaced; its key is the software's and stays."""
    text, files = ref.lock, dict(ref.files)
    for row in sorted(urls, key=lambda row: -len(row.url)):
        text = text.replace(row.url, urls[row])
        files[row.hashes[0]] = urls[row]
    return dataclasses.replace(ref, lock=text, files=files)
