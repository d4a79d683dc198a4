"""The first container of a deployment's pod, in the runner image: brings the model and its environment to where the
main container finds them.

    python -m mlflow_remote_backend.deployment.server.prepare --spec FILE --root FOLDER --cache FOLDER

Leaves in the root:

    model/                 as it was logged
    server/                pod.py, serve.py
    start.json, start.sh   what the main container runs
    home/                  for whoever wants one

Only this container has credentials. A failure is in the container's termination message, as JSON: reason, message,
words, hint; exit code 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import JobError, RemoteError
from ...job import EnvironmentRef
from ...runner.prepare import check_release
from ..spec import DeploymentSpec

PORT = 8080
TOKEN_FILE = "/mlflow-remote-token/token"
TERMINATION_MESSAGE = Path("/dev/termination-log")
MAX_MESSAGE_BYTES = 4096  # what Kubernetes keeps of it


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))  # the first process has no default
    os.umask(0o002)
    try:
        check_release(os.environ.get("MLFLOW_REMOTE_CLIENT_VERSION", ""))
        spec = DeploymentSpec.load(gzip.decompress(arguments.spec.read_bytes()))
        prepare(spec, arguments.root, arguments.cache)
    except RemoteError as error:
        reason = error.code if isinstance(error, JobError) else "BOOTSTRAP"
        return _failed({"reason": reason, "message": error.what, "words": error.words, "hint": error.hint})
    except (OSError, ValueError) as error:
        words = f"{type(error).__name__}: {error}"
        return _failed({"reason": "BOOTSTRAP", "message": "The pod could not be prepared.", "words": words, "hint": ""})
    return 0


def prepare(spec: DeploymentSpec, root: Path, cache_root: Path) -> None:
    """Blocks for as long as the model and its environment take to arrive. Raises RemoteErrors and OSError."""
    for folder in (root / "home", root / "server"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("pod.py", "serve.py"):
        shutil.copyfile(Path(__file__).with_name(name), root / "server" / name)
    python, variables = _environment(spec.environment, cache_root)
    _fetch(spec, root)
    (root / "start.json").write_text(json.dumps(start(spec, root, variables)))
    (root / "start.sh").write_text(script(python, root))


def _environment(environment: EnvironmentRef, cache_root: Path) -> tuple[str, Mapping[str, str]]:
    """The interpreter (empty: the image's own) and what activating its environment sets."""
    if not environment.lock_key:
        return "", {}
    from ...environment import activation, cache

    prefix = cache.hit(cache_root, environment.lock_key)
    if prefix is None:
        from ...environment import materialise

        prefix = materialise.materialise(environment, cache_root, lambda step: _say(str(step)))
    return str(prefix / "bin" / "python"), activation.activation(prefix, os.environ, environment.env_vars)


def _fetch(spec: DeploymentSpec, root: Path) -> None:
    """The model, whole or not at all: the container may be started again half-way. Raises JobError."""
    target = root / "model"
    if target.is_dir():
        return
    _say(f"fetching model {spec.model.source} ({spec.model.size_bytes / 1e6:.1f} MB)")
    import mlflow

    with tempfile.TemporaryDirectory(dir=root) as folder:
        try:
            mlflow.set_tracking_uri(spec.tracking_uri)
            fetched = mlflow.artifacts.download_artifacts(artifact_uri=spec.model.source, dst_path=folder)
        except Exception as error:  # each artifact store raises what its own client library raises
            raise JobError(
                f"Model {spec.model.source} cannot be fetched in the pod.",
                words=f"{type(error).__name__}: {error}",
                hint="tracking_uri must be an address that pods reach, with credentials that the server takes; a store "
                "that is not behind the server needs its own, and its client library in the runner image.",
                code="TRACKING_UNREACHABLE",
            ) from error
        os.replace(fetched, target)


def start(spec: DeploymentSpec, root: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """What pod.py runs. Pure. Holds no secret: those are variables and a file of the main container itself."""
    argv = ["-u", f"{root}/server/serve.py", "--model", f"{root}/model", "--timeout", str(spec.timeout_s)]
    argv += ["--grace", str(int(spec.grace_period_s)), "--behind-proxies"]
    if spec.guarded:
        argv += ["--token-file", TOKEN_FILE]
    return {
        "argv": argv,
        "env": dict(variables),
        "workers": spec.workers,
        "port": PORT,
        "grace_s": int(spec.grace_period_s),
    }


def script(python: str, root: Path) -> str:
    """The shell script that the main container starts with: its image may know its Python by either name. Pure."""
    run = f'"$python" -u {shlex.quote(f"{root}/server/pod.py")} {shlex.quote(f"{root}/start.json")}'
    if python:
        return f"python={shlex.quote(python)}\nexec {run}\n"
    return (
        f'for python in python3 python; do command -v "$python" >/dev/null 2>&1 && exec {run}; done\n'
        'echo "mlflow-remote: the image has no Python" >&2; exit 127\n'
    )


def _say(line: str) -> None:
    print(line, flush=True)


def _failed(what: Mapping[str, str]) -> int:
    """Says it for people who look at the log, and leaves it where whoever made the deployment finds it."""
    print("\n".join(filter(None, (what["message"], what["words"], what["hint"]))), file=sys.stderr, flush=True)
    short = dict(what)
    while len(text := json.dumps(short).encode()) > MAX_MESSAGE_BYTES:
        short["words"] = short["words"][: len(short["words"]) // 2]
    try:
        TERMINATION_MESSAGE.write_bytes(text)
    except OSError as error:
        print(f"(the termination message cannot be written: {error})", file=sys.stderr, flush=True)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare", description=__doc__)
    for name in ("spec", "root", "cache"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
