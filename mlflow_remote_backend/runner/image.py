"""The runner image: what prepares, observes and finalises a job on a cluster, and runs its program by default.

Built from any image with Python 3.10 or newer and pip. The wheels are gathered here, with the index that pip is
configured with, so the build itself needs no network. It holds mlflow-skinny (not mlflow), py-rattler, uv and this
package; no credential, no project, no environment. The tag names this package's version and the base's Python.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ComputeError
from ..version import __version__

DEFAULT_BASE = "python:3.11-slim"
NAME = "mlflow-remote-runner"
USER = 1000  # numeric, so that Kubernetes can tell that it is not root
CODE_LABEL = "mlflow-remote.code"
VERSION_LABEL = "mlflow-remote.version"
STAGE_LABEL = "mlflow-remote.stage"  # on the first build stage, so that it is found and removed afterwards
CODE_VARIABLE = "MLFLOW_REMOTE_CODE"
#: As the extra ``runner`` in setup.cfg; a test compares them.
REQUIREMENTS = ("mlflow-skinny>=3.1,<4", "py-rattler>=0.28,<0.29", "uv>=0.9", "pyyaml>=6")
OLDEST_PYTHON = (3, 10)
OLDEST_GLIBC_MINOR = 17  # manylinux2014

_PROBE = (
    "import json,platform,sys,pip;"
    "print(json.dumps([sys.version_info[0],sys.version_info[1],platform.machine(),*platform.libc_ver()]))"
)
_DOCKERFILE = """\
FROM {base} AS build
LABEL {stage_label}=build
COPY wheels /wheels
RUN python -m venv --without-pip /opt/mlflow-remote \\
 && python -m pip --python /opt/mlflow-remote/bin/python install --no-index --find-links /wheels \\
    --no-cache-dir --disable-pip-version-check {requirements} \\
 && python -m pip --python /opt/mlflow-remote/bin/python install --no-index --no-deps \\
    --no-cache-dir --disable-pip-version-check /wheels/{own_wheel}
FROM {base}
COPY --from=build /opt/mlflow-remote /opt/mlflow-remote
ENV PATH=/opt/mlflow-remote/bin:$PATH {code_variable}={code}
LABEL {version_label}={version} {code_label}={code}
USER {user}:{user}
WORKDIR /
CMD ["python", "-m", "mlflow_remote_backend.runner.observe", "--help"]
"""


@dataclass(frozen=True)
class Target:
    """What the base image runs on."""

    python: tuple[int, int]
    machine: str
    libc: str
    libc_version: str

    @property
    def platforms(self) -> list[str]:
        """Platform tags of wheels that run there, newest first (PEP 600, PEP 656)."""
        kind = "manylinux" if self.libc == "glibc" else "musllinux"
        major, minor = (int(part) for part in self.libc_version.split(".")[:2])
        oldest = OLDEST_GLIBC_MINOR if kind == "manylinux" else 0
        return [f"{kind}_{major}_{each}_{self.machine}" for each in range(minor, oldest - 1, -1)]


@dataclass(frozen=True)
class BuiltImage:
    """``tag``: its local name, or the pushed one. ``digest``: ``REPOSITORY@sha256:…`` if it was pushed, or empty."""

    tag: str
    image_id: str
    digest: str = ""


def build(
    base: str = DEFAULT_BASE,
    push: str = "",
    *,
    packages: Sequence[str] = (),
    docker_url: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> BuiltImage:
    """Make the runner image from ``base`` and push it to the repository ``push`` if given. Blocks for some minutes.

    ``packages``: what it shall hold beside what every runner needs, as for pip: an artifact store's client library.

    Raises ComputeError: no Docker engine, a base without a fitting Python or pip, a package that has no wheel, a push
    that the registry refuses.
    """
    docker = _docker(docker_url)
    target = _probe(docker, base)
    with tempfile.TemporaryDirectory(prefix="mlflow-remote-image-") as folder:
        context = Path(folder)
        (context / "wheels").mkdir()
        say(f"gathering wheels for Python {target.python[0]}.{target.python[1]} on {target.machine}")
        _gather(target, packages, context / "wheels")
        own_wheel = write_own_wheel(context / "wheels")
        (context / "Dockerfile").write_text(dockerfile(base, own_wheel.name, packages))
        tag = f"{push or NAME}:{image_version(target)}"
        say(f"building {tag}")
        image_id = _build(docker, context, tag)
    digest = _push(docker, push, image_version(target), say) if push else ""
    return BuiltImage(tag, image_id, digest)


def image_version(target: Target) -> str:
    return f"{__version__}-py{target.python[0]}.{target.python[1]}"


def dockerfile(base: str, own_wheel: str, packages: Sequence[str] = ()) -> str:
    return _DOCKERFILE.format(
        base=base,
        requirements=shlex.join([*REQUIREMENTS, *packages]),
        own_wheel=own_wheel,
        code_variable=CODE_VARIABLE,
        code=code_digest(),
        version_label=VERSION_LABEL,
        version=__version__,
        code_label=CODE_LABEL,
        stage_label=STAGE_LABEL,
        user=USER,
    )


# ------------------------------------------------------------------------------------------------------- our own code


def code_digest() -> str:
    """A digest of this package's code as it is installed here: what the image was built from, and the client's own."""
    digest = hashlib.sha256()
    for name, content in _own_files():
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _own_files() -> Iterator[tuple[str, bytes]]:
    package = Path(__file__).resolve().parent.parent
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".sh", ".yaml", ".json", ".typed"):
            yield f"{package.name}/{path.relative_to(package).as_posix()}", path.read_bytes()


def write_own_wheel(folder: Path) -> Path:
    """This package, as it is installed here, as a wheel in ``folder``. Equal code gives equal bytes."""
    stem = f"mlflow_remote_backend-{__version__}"
    info = f"{stem}.dist-info"
    files = dict(_own_files())
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: mlflow-remote-backend\nVersion: {__version__}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: mlflow-remote\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return wheel


def _record(files: Mapping[str, bytes], own_name: str) -> bytes:
    lines = [f"{name},sha256={_urlsafe_sha256(content)},{len(content)}" for name, content in files.items()]
    return ("\n".join([*lines, f"{own_name},,"]) + "\n").encode()


def _urlsafe_sha256(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


# ------------------------------------------------------------------------------------------------------------- wheels


def _gather(target: Target, packages: Sequence[str], folder: Path) -> None:
    """Download what the runner needs, as wheels for the target. Raises ComputeError in pip's own words."""
    major, minor = target.python
    platforms = [word for platform in target.platforms for word in ("--platform", platform)]
    abis = [word for abi in (f"cp{major}{minor}", "abi3", "none") for word in ("--abi", abi)]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)),
        *("--only-binary", ":all:", "--implementation", "cp", "--python-version", f"{major}.{minor}"),
        *platforms,
        *abis,
        *(*REQUIREMENTS, "--", *packages),
    ]
    environ = {**os.environ, "PIP_NO_INPUT": "1"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environ)
    if done.returncode != 0:
        raise ComputeError(
            f"The wheels for the runner image cannot be gathered (Python {major}.{minor}, {target.machine}).",
            words="\n".join(done.stderr.strip().splitlines()[-8:]),
            hint="pip needs an index that has them: pip config list shows which one it uses.",
        )


# ------------------------------------------------------------------------------------------------------------- docker


def _docker(url: str) -> Any:
    import docker

    try:
        client = docker.DockerClient(base_url=url) if url else docker.from_env()
        client.ping()
        return client
    except docker.errors.DockerException as error:
        raise ComputeError(
            "Building the runner image needs a Docker engine, and none answers.",
            words=str(error),
            hint="Start one, or point DOCKER_HOST at one. Running jobs on Kubernetes needs none.",
        ) from error


def _probe(client: Any, base: str) -> Target:
    import docker

    try:
        said = client.containers.run(base, ["python", "-c", _PROBE], entrypoint="", remove=True, network_mode="none")
        major, minor, machine, libc, version = json.loads(said)
    except (docker.errors.DockerException, ValueError) as error:
        raise ComputeError(
            f"Image {base} cannot be the base of the runner image: its Python or pip does not answer.",
            words=str(error),
            hint=f"Name an image that has `python` and `pip`, for example --base {DEFAULT_BASE}.",
        ) from error
    if (major, minor) < OLDEST_PYTHON:
        raise ComputeError(f"Image {base} has Python {major}.{minor}; the runner needs 3.10 or newer.")
    return Target((major, minor), machine, libc or "musl", version or "1.2")


def _build(client: Any, context: Path, tag: str) -> str:
    import docker

    lines: list[str] = []
    try:
        options = {"network_mode": "none", "rm": True, "forcerm": True, "decode": True}
        for each in client.api.build(path=str(context), tag=tag, **options):
            lines += str(each.get("stream", "")).splitlines()
            if "error" in each:
                raise ComputeError(f"Image {tag} cannot be built.", words="\n".join([*lines[-12:], each["error"]]))
        client.images.prune(filters={"dangling": True, "label": f"{STAGE_LABEL}=build"})
        return str(client.images.get(tag).id)
    except docker.errors.DockerException as error:
        hint = "--push wants a repository, as REGISTRY/NAME." if "invalid reference format" in str(error) else ""
        raise ComputeError(f"Image {tag} cannot be built.", words=str(error), hint=hint) from error


def _push(client: Any, repository: str, tag: str, say: Callable[[str], None]) -> str:
    import docker

    say(f"pushing {repository}:{tag}")
    digest = ""
    try:
        for each in client.api.push(repository, tag, stream=True, decode=True):
            if "error" in each:
                hint = "Is docker logged in there?"
                raise ComputeError(f"Image {repository}:{tag} cannot be pushed.", words=each["error"], hint=hint)
            digest = (each.get("aux") or {}).get("Digest", digest)
    except docker.errors.DockerException as error:
        raise ComputeError(f"Image {repository}:{tag} cannot be pushed.", words=str(error)) from error
    return f"{repository}@{digest}" if digest else ""
