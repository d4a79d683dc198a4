"""The solver that conda-lock asks: a ``conda`` of two commands, answered by py-rattler.

conda-lock has no solver of its own. It runs ``conda create --dry-run --json …`` and reads the plan from standard
output; this module answers that call and ``--version``, so that no conda, mamba or micromamba need be installed.
What conda-lock passes: the target platform in ``CONDA_SUBDIR``; channels in order of priority as ``--channel``, the
last of them one of its own on disk that holds the target's virtual packages (``__glibc``, ``__cuda``); the specs.

Two things go around conda-lock, by variables: the channels' addresses with their credentials
(``MLFLOW_REMOTE_CHANNELS``, a JSON mapping), which would otherwise stand in arguments and in the lock; and the
reason of a failure (a file, ``MLFLOW_REMOTE_SOLVER_MESSAGE``), which conda-lock buries in a traceback.

py-rattler may crash while the interpreter shuts down, after its work is done; :func:`main` therefore ends the process
by ``os._exit`` once its output is flushed. Only this module and ``conda_helper`` import
rattler.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from . import credentials

VERSION = "24.11.0"  # what conda-lock is told; it asks only to know that the executable answers
FAKE_CHANNEL = "conda-lock-fake-repodata"  # conda-lock's name for the folder of virtual packages
#: Seconds to wait for a channel to answer at all; for one request (a package list may have 100 MB); for the solve.
ANSWER_TIMEOUT_S = 10
REQUEST_TIMEOUT_S = 600
SOLVE_TIMEOUT_S = 600


def main(argv: list[str] | None = None) -> None:
    """Answers one call and ends the process: 0 with the answer on standard output, 1 with ``{"message": …}``."""
    code = _answer(sys.argv[1:] if argv is None else argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _answer(argv: list[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.version:
        print(f"conda {VERSION}")
        return 0
    if arguments.command != "create" or not arguments.dry_run:
        print(json.dumps({"message": f"only 'create --dry-run' is answered here, not: {' '.join(argv)}"}))
        return 1
    try:
        plan = asyncio.run(_solve(arguments.channel, arguments.specs, os.environ["CONDA_SUBDIR"]))
    except Exception as error:  # noqa: BLE001 - whatever it is, conda-lock and we read it from the message
        _tell(str(error))
        return 1
    print(json.dumps(plan))
    return 0


def _tell(message: str) -> None:
    file = os.environ.get("MLFLOW_REMOTE_SOLVER_MESSAGE")
    if file:
        Path(file).write_text(message, encoding="utf-8")
    print(json.dumps({"message": message}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlflow-remote-conda", add_help=False, allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("command", nargs="?", default="")
    parser.add_argument("specs", nargs="*")
    parser.add_argument("--channel", action="append", default=[])
    parser.add_argument("--prefix")
    for flag in ("--dry-run", "--json", "--override-channels", "--quiet", "--yes"):
        parser.add_argument(flag, action="store_true")
    return parser


async def _solve(channels: list[str], specs: list[str], platform: str) -> dict[str, Any]:
    import rattler

    authorised: dict[str, str] = json.loads(os.environ.get("MLFLOW_REMOTE_CHANNELS", "{}"))
    virtual = [channel for channel in channels if FAKE_CHANNEL in channel]
    sources = [rattler.Channel(authorised.get(channel, channel)) for channel in channels if channel not in virtual]
    require_answers([source.base_url for source in sources], platform)
    cache = os.environ.get("MLFLOW_REMOTE_REPODATA_CACHE")
    client = rattler.Client.default_client(max_retries=1, timeout=REQUEST_TIMEOUT_S)
    records = await rattler.solve(
        sources,
        [rattler.MatchSpec(spec) for spec in specs],
        gateway=rattler.Gateway(cache_dir=Path(cache) if cache else None, client=client),
        platforms=[rattler.Subdir(platform), rattler.Subdir("noarch")],
        virtual_packages=[_virtual(*row) for channel in virtual for row in _virtual_packages(channel, platform)],
        timeout=datetime.timedelta(seconds=SOLVE_TIMEOUT_S),
    )
    actions = [_action(record) for record in records]
    return {"success": True, "actions": {"FETCH": actions, "LINK": actions, "PREFIX": ""}}


def require_answers(channels: list[str], platform: str) -> None:
    """Raises OSError for a channel whose server says nothing, within seconds; any answer will do.

    rattler would try again for minutes, and a time limit of its requests would also end a long download.
    """
    import requests

    for channel in channels:
        if channel.startswith("file:"):
            folder = Path(url2pathname(urlsplit(channel).path))
            if not folder.is_dir():
                raise OSError(f"there is no channel in the folder {folder}")
        if not channel.startswith(("http:", "https:")):
            continue
        url = f"{channel.rstrip('/')}/{platform}/repodata.json"
        with requests.get(url, timeout=ANSWER_TIMEOUT_S, stream=True):
            pass


def _virtual(name: str, version: str, build: str) -> Any:
    import rattler

    return rattler.GenericVirtualPackage(
        rattler.PackageName(name), rattler.Version(version), rattler.BuildString(build)
    )


def _virtual_packages(channel: str, platform: str) -> list[tuple[str, str, str]]:
    """Name, version and build of each virtual package in conda-lock's own channel."""
    folder = Path(url2pathname(urlsplit(channel).path))
    found = []
    for subdir in (platform, "noarch"):
        repodata = folder / subdir / "repodata.json"
        if repodata.exists():
            packages = json.loads(repodata.read_text())["packages"].values()
            found += [(row["name"], row["version"], row["build"]) for row in packages]
    return found


def _action(record: Any) -> dict[str, Any]:
    """A solved record as conda's ``FETCH`` action; only what conda-lock reads of it."""
    return {
        "name": record.name.normalized,
        "version": str(record.version),
        "build_string": str(record.build),
        "url": credentials.strip(record.url),
        "fn": record.file_name,
        "md5": record.md5.hex() if record.md5 else "",
        "sha256": record.sha256.hex() if record.sha256 else None,
        "depends": list(record.depends),
        "constrains": list(record.constrains),
        "channel": credentials.strip(record.channel or ""),
        "subdir": str(record.subdir),
        "timestamp": 0,
        "dist_name": f"{record.name.normalized}-{record.version}-{record.build}",
    }


if __name__ == "__main__":
    main()
