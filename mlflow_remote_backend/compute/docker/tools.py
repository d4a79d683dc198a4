"""What a container needs to make an environment, as files to copy into it: this package, and the tools it calls.

Where the container's platform is this machine's, they are taken from this very installation; elsewhere wheels of the
same versions for that platform are installed into a folder, once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackagePath, distribution, version
from pathlib import Path

import mlflow_remote_backend

from ...environment import lease, platforms, tool
from ...errors import JobError
from ...job import EnvironmentRef
from .copying import Item

#: What ``environment.materialise`` says that it needs, with what that needs in turn.
_ALWAYS = ("uv", "packaging", "pyyaml", "requests", "urllib3", "idna", "certifi", "charset-normalizer")
_FOR_CONDA = ("py-rattler",)
OLDEST_PYTHON = "3.10"  # the container's may be newer: what is compiled is abi3, or has a Python twin
INSTALL_TIMEOUT_S = 600


def items(folder: str, ref: EnvironmentRef, cache_root: Path) -> Iterator[Item]:
    """Everything to be copied to ``folder`` of the container. Raises JobError (ENVIRONMENT)."""
    target = folder.lstrip("/")
    yield Item(target)
    yield from _own_package(target)
    names = (*_ALWAYS, *(_FOR_CONDA if ref.kind == "conda-lock" else ()))
    if ref.platform in ("", platforms.host_platform()):
        for name in names:
            yield from _installed(name, target)
    else:
        yield Item(target, _for_platform(names, ref.platform, cache_root))


def _own_package(target: str) -> Iterator[Item]:
    package = Path(mlflow_remote_backend.__file__).parent
    for folder in (package, package / "environment"):
        yield Item(f"{target}/{folder.relative_to(package.parent)}")
        for path in sorted(folder.glob("*.py")):
            yield Item(f"{target}/{path.relative_to(package.parent)}", path)


def _installed(name: str, target: str) -> Iterator[Item]:
    found = distribution(name)
    made: set[str] = set()
    for file in found.files or ():
        place = _place(file)
        source = Path(str(found.locate_file(file)))
        if not place or not source.is_file():
            continue
        for parent in reversed(Path(place).parents[:-1]):
            if str(parent) not in made:
                made.add(str(parent))
                yield Item(f"{target}/{parent}")
        yield Item(f"{target}/{place}", source)


def _place(file: PackagePath) -> str:
    """Where a distribution's file goes: as ``pip install --target`` would, programs beside packages in ``bin``."""
    parts = file.parts
    if ".." not in parts:
        return "" if "__pycache__" in parts else file.as_posix()
    return f"bin/{parts[-1]}" if parts[-1] == "uv" else ""


def _for_platform(names: Sequence[str], platform: str, cache_root: Path) -> Path:
    """A folder with the tools for another platform, installed by uv from the index that this machine uses."""
    from ...environment import uv

    wanted = [f"{name}=={version(name)}" for name in names]
    folder = cache_root / "tools" / f"{platform}-{'-'.join(wanted)}".replace("==", "-")[:200]
    marker = folder / ".complete"
    with lease.hold(folder):
        if marker.exists():
            return folder
        with tool.private_folder(cache_root) as scratch:
            command = [
                *(uv.executable(), "pip", "install", "--target", str(folder), "--only-binary", ":all:", "--no-deps"),
                *("--python", sys.executable, "--python-platform", platforms.uv_platform(platform)),
                *("--python-version", OLDEST_PYTHON, "--cache-dir", str(cache_root / "uv"), *wanted),
            ]
            environ = {**tool.environment(scratch), **_pip_settings()}
            done = tool.run(command, cwd=scratch, environ=environ, timeout_s=INSTALL_TIMEOUT_S)
        if done.code:
            raise JobError(
                f"The tools that make an environment for {platform} cannot be installed.",
                words=uv.words(done.stderr),
                hint="They come from the package index; docker.build with a ready image needs none.",
                code="ENVIRONMENT",
            )
        marker.touch()
    return folder


def _pip_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("UV_")}
