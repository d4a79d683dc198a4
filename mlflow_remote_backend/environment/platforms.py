"""The platforms of conda and what other tools call them. Standard library only."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

from ..errors import EnvironmentError_

#: Kubernetes' and Docker's architectures (``kubernetes.io/arch``) and the machine names of ``uname``.
_ARCHITECTURES = {
    "amd64": "64",
    "x86_64": "64",
    "arm64": "aarch64",
    "aarch64": "aarch64",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
}

#: conda's name -> uv's ``--python-platform``; the Linux ones mean glibc 2.28, as conda-lock assumes too.
_UV = {
    "linux-64": "x86_64-unknown-linux-gnu",
    "linux-aarch64": "aarch64-unknown-linux-gnu",
    "linux-ppc64le": "powerpc64le-unknown-linux-gnu",
    "linux-s390x": "s390x-unknown-linux-gnu",
    "osx-64": "x86_64-apple-darwin",
    "osx-arm64": "aarch64-apple-darwin",
    "win-64": "x86_64-pc-windows-msvc",
}

#: The newest glibc that a locked wheel may ask for (manylinux_2_28).
_GLIBC_MINOR = 28


def host_platform() -> str:
    """conda's name of this machine's platform, ``linux-64`` for instance."""
    machine = platform.machine().lower()
    if sys.platform == "darwin":
        return "osx-arm64" if machine == "arm64" else "osx-64"
    if sys.platform == "win32":
        return "win-arm64" if machine == "arm64" else "win-64"
    return linux_platform(machine)


def linux_platform(architecture: str) -> str:
    """conda's platform of a Linux node or image, from its architecture as Kubernetes or Docker says it."""
    try:
        return f"linux-{_ARCHITECTURES[architecture.lower()]}"
    except KeyError:
        raise EnvironmentError_(
            f"No environment can be locked for the architecture {architecture!r}.",
            hint=f"Known are {', '.join(sorted(_ARCHITECTURES))}.",
        ) from None


def require_known(name: str) -> None:
    """Raises EnvironmentError_ unless ``name`` is a platform that we lock for."""
    if name not in _UV:
        raise EnvironmentError_(
            f"No environment can be locked for the platform {name!r}.", hint=f"Known are {', '.join(_UV)}."
        )


def uv_platform(name: str) -> str:
    """What ``uv pip compile --python-platform`` calls a conda platform."""
    require_known(name)
    return _UV[name]


def wheel_platforms(name: str) -> Iterator[str]:
    """Platform tags of wheels that run on a conda platform, best first (PEP 600 for Linux)."""
    system, _, architecture = name.partition("-")
    machine = "x86_64" if architecture == "64" else architecture
    if system == "linux":
        yield from _manylinux(machine)
    elif system == "osx":
        from packaging.tags import mac_platforms

        yield from mac_platforms((15, 0), machine)
    else:
        yield "win_amd64"


def _manylinux(machine: str) -> Iterator[str]:
    legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    for minor in range(_GLIBC_MINOR, 4, -1):
        yield f"manylinux_2_{minor}_{machine}"
        if minor in legacy:
            yield f"{legacy[minor]}_{machine}"
    yield f"linux_{machine}"


def marker_environment(name: str, python: str) -> dict[str, str]:
    """The values of PEP 508 markers on a conda platform with CPython ``python``, ``3.11`` or ``3.11.7``."""
    system, _, architecture = name.partition("-")
    sys_platform = {"linux": "linux", "osx": "darwin", "win": "win32"}[system]
    machine = {"64": "AMD64" if system == "win" else "x86_64"}.get(architecture, architecture)
    full = python if python.count(".") == 2 else f"{python}.0"
    return {
        "implementation_name": "cpython",
        "implementation_version": full,
        "os_name": "nt" if system == "win" else "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": {"linux": "Linux", "osx": "Darwin", "win": "Windows"}[system],
        "platform_version": "",
        "python_full_version": full,
        "python_version": ".".join(full.split(".")[:2]),
        "sys_platform": sys_platform,
        "extra": "",
    }
