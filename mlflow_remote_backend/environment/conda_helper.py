"""What py-rattler does for us besides solving, in a short-lived process of its own.

Reads one JSON request from standard input and answers with one JSON line: ``{"ok": …}`` or ``{"error": "…"}``.

    {"do": "install", "prefix": P, "cache": FOLDER, "platform": "linux-64", "archives": [[PATH, SHA256], …]}
    {"do": "match", "packages": [[NAME, VERSION, BUILD], …], "specs": ["numpy>=2", …]}     -> the specs that fail

A process of its own, because py-rattler may crash while the interpreter shuts down; it ends by ``os._exit`` once the
answer is written.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answers one request and ends the process, always with 0: the answer says how it went."""
    try:
        answer = {"ok": _answer(json.load(sys.stdin))}
    except Exception as error:  # noqa: BLE001 - the answer carries it
        answer = {"error": f"{error}" or type(error).__name__}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)


def _answer(request: dict[str, Any]) -> Any:
    if request["do"] == "install":
        return asyncio.run(_install(request))
    return [spec for spec in request["specs"] if not _satisfied(spec, request["packages"])]


async def _install(request: dict[str, Any]) -> int:
    import rattler

    records = await asyncio.gather(
        *(rattler.RepoDataRecord.from_package_archive(path) for path, _ in request["archives"])
    )
    for record, (path, expected) in zip(records, request["archives"], strict=True):
        if record.sha256 is None or record.sha256.hex() != expected:
            raise ValueError(f"{path} has changed since it was verified: expected sha256 {expected}")
    cache = rattler.PackageCache.new_layered(
        [Path(request["cache"])],
        # an entry that a program has written into since is made anew instead of being linked once more
        validation_mode=rattler.ValidationMode.full(),
    )
    await rattler.install(
        list(records),
        request["prefix"],
        platform=rattler.Subdir(request["platform"]),
        execute_link_scripts=False,
        show_progress=False,
        package_cache=cache,
    )
    return len(records)


def _satisfied(spec: str, packages: list[list[str]]) -> bool:
    import rattler

    wanted = rattler.MatchSpec(spec.rpartition("::")[2])
    for name, version, build in packages:
        record = rattler.PackageRecord(name, version, rattler.BuildString(build), 0, "noarch")
        if wanted.matches(record):
            return True
    return False


if __name__ == "__main__":
    main()
