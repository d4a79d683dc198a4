"""A conda channel and a Python package index made at test time, from the running interpreter, without a network.

``make_channel(folder)`` writes an ordinary channel (``linux-64``, ``linux-aarch64``, ``noarch``, each with a
``repodata.json``) that conda-lock, conda and rattler can read. Its ``python`` is a stub of a few hundred bytes that
points at the running interpreter, or with ``real_python=True`` a whole relocatable CPython (about 1 s, 20 MB) that also
runs in a container of the same Debian release. Its ``pip`` and ``setuptools`` come from what ``ensurepip`` bundles.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import stat
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

SUBDIR = "linux-aarch64" if os.uname().machine in ("aarch64", "arm64") else "linux-64"
OTHER_SUBDIR = "linux-64" if SUBDIR == "linux-aarch64" else "linux-aarch64"
PYTHON_MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHON_VERSION = ".".join(map(str, sys.version_info[:3]))
PREFIX_PLACEHOLDER = "/opt/placehold_placehold_placehold_placehold_placehold"


@dataclass(frozen=True)
class Entry:
    """One file of a package: ``data``, or ``link`` if symbolic. ``placeholder``: text that becomes the prefix."""

    data: bytes = b""
    link: str = ""
    mode: int = 0o644
    placeholder: str = ""


@dataclass(frozen=True)
class CondaPackage:
    """A conda package to be written. ``noarch``: ``python``, ``generic`` or empty for one of ``subdir``."""

    name: str
    version: str
    files: Mapping[str, Entry] = field(default_factory=dict)
    depends: tuple[str, ...] = ()
    noarch: str = ""
    subdir: str = SUBDIR
    build: str = "0"
    entry_points: tuple[str, ...] = ()  # of noarch: python; "toyapp = toyapp:main"

    @property
    def folder(self) -> str:
        return "noarch" if self.noarch else self.subdir

    @property
    def stem(self) -> str:
        return f"{self.name}-{self.version}-{self.build}"

    def index(self) -> dict[str, object]:
        record: dict[str, object] = {
            "name": self.name,
            "version": self.version,
            "build": self.build,
            "build_number": 0,
            "depends": list(self.depends),
            "subdir": self.folder,
        }
        if self.noarch:
            record["noarch"] = self.noarch
        return record


def write_package(channel: Path, package: CondaPackage, *, level: int = 1) -> Path:
    """The package as a ``.conda`` file in its folder of the channel, whose index :func:`index` writes."""
    folder = channel / package.folder
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{package.stem}.conda"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("metadata.json", json.dumps({"conda_pkg_format_version": 2}))
        archive.writestr(f"pkg-{package.stem}.tar.zst", _tar(package.files.items(), level))
        archive.writestr(f"info-{package.stem}.tar.zst", _tar(_info(package), level))
    return target


def _info(package: CondaPackage) -> Iterator[tuple[str, Entry]]:
    paths = [_path(name, entry) for name, entry in package.files.items()]
    yield "info/index.json", Entry(json.dumps(package.index()).encode())
    yield "info/paths.json", Entry(json.dumps({"paths": paths, "paths_version": 1}).encode())
    yield "info/files", Entry("".join(f"{name}\n" for name in package.files).encode())
    yield "info/about.json", Entry(b"{}")
    if package.noarch == "python":
        link = {"noarch": {"type": "python", "entry_points": list(package.entry_points)}, "package_metadata_version": 1}
        yield "info/link.json", Entry(json.dumps(link).encode())


def _path(name: str, entry: Entry) -> dict[str, object]:
    record: dict[str, object] = {"_path": name, "path_type": "softlink" if entry.link else "hardlink"}
    record["sha256"] = hashlib.sha256(entry.data).hexdigest()
    record["size_in_bytes"] = len(entry.data)
    if entry.placeholder:
        record |= {"prefix_placeholder": entry.placeholder, "file_mode": "text"}
    return record


def _tar(entries: Iterable[tuple[str, Entry]], level: int) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, entry in entries:
            member = tarfile.TarInfo(name)
            member.mode = entry.mode
            if entry.link:
                member.type, member.linkname = tarfile.SYMTYPE, entry.link
                tar.addfile(member)
            else:
                member.size = len(entry.data)
                tar.addfile(member, io.BytesIO(entry.data))
    return zstandard.ZstdCompressor(level=level, threads=-1).compress(raw.getvalue())


def index(channel: Path) -> None:
    """Writes ``repodata.json`` of each folder from the packages that are there."""
    for subdir in (SUBDIR, OTHER_SUBDIR, "noarch"):
        folder = channel / subdir
        folder.mkdir(parents=True, exist_ok=True)
        packages = {file.name: _record(file) for file in sorted(folder.glob("*.conda"))}
        document = {"info": {"subdir": subdir}, "packages": {}, "packages.conda": packages, "repodata_version": 1}
        (folder / "repodata.json").write_text(json.dumps(document))


def _record(file: Path) -> dict[str, object]:
    with zipfile.ZipFile(file) as archive:
        (info,) = (name for name in archive.namelist() if name.startswith("info-"))
        raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(archive.read(info))).read()
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        member = tar.extractfile("info/index.json")
        assert member is not None
        record: dict[str, object] = json.loads(member.read())
    data = file.read_bytes()
    return record | {
        "sha256": hashlib.sha256(data).hexdigest(),
        "md5": hashlib.md5(data).hexdigest(),
        "size": len(data),
    }


# ---------------------------------------------------------------------------------------------- Python itself


def stub_python(version: str = PYTHON_VERSION, subdir: str = SUBDIR) -> CondaPackage:
    """``python`` as a link to the running interpreter, made to find its own prefix by a ``pyvenv.cfg``."""
    minor = ".".join(version.split(".")[:2])
    home = os.path.dirname(os.path.realpath(sys.executable))
    config = f"home = {home}\ninclude-system-site-packages = false\nversion = {version}\n"
    files = {
        "bin/python": Entry(link=os.path.realpath(sys.executable)),
        "bin/python3": Entry(link="python"),
        f"bin/python{minor}": Entry(link="python"),
        "pyvenv.cfg": Entry(config.encode()),
        f"lib/python{minor}/site-packages/README.txt": Entry(b"site-packages\n"),
    }
    return CondaPackage("python", version, files, subdir=subdir)


#: What a program does not need of the standard library; left out of the real Python.
PRUNED = ("test", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "site-packages", "__pycache__")


def real_python() -> CondaPackage:
    """The running CPython, relocatable. Needs an interpreter with a RUNPATH of its own prefix, or a static one."""
    base = Path(sys.base_prefix)
    files: dict[str, Entry] = {
        f"bin/python{PYTHON_MINOR}": Entry(_relocated(_executable(), base), mode=0o755),
        "bin/python": Entry(link=f"python{PYTHON_MINOR}"),
        "bin/python3": Entry(link=f"python{PYTHON_MINOR}"),
        f"lib/python{PYTHON_MINOR}/site-packages/README.txt": Entry(b"site-packages\n"),
    }
    stdlib = Path(sysconfig.get_path("stdlib"))
    for file in _standard_library(stdlib):
        name = f"lib/python{PYTHON_MINOR}/{file.relative_to(stdlib).as_posix()}"
        files[name] = _entry(file, base)
    for library in sorted((base / "lib").glob("libpython*.so*")):
        files[f"lib/{library.name}"] = _entry(library, base)
    return CondaPackage("python", PYTHON_VERSION, files)


def _executable() -> Path:
    """The interpreter proper, also where this process runs in a virtual environment."""
    return Path(sys.base_prefix) / "bin" / f"python{PYTHON_MINOR}"


def _standard_library(stdlib: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(stdlib):
        folders[:] = sorted(f for f in folders if f not in PRUNED and not f.startswith("config-"))
        for name in sorted(names):
            if not name.endswith((".pyc", ".a")):
                yield Path(root, name)


def _entry(file: Path, base: Path) -> Entry:
    if file.is_symlink() and "/" not in os.readlink(file):
        return Entry(link=os.readlink(file))
    mode = stat.S_IMODE(file.stat().st_mode)
    if ".so" in file.name:
        return Entry(_relocated(file, base), mode=mode)
    data = file.read_bytes()
    mentions = str(base).encode() in data and file.suffix in (".py", ".pc", "")
    return Entry(data, mode=mode, placeholder=str(base) if mentions else "")


def _relocated(file: Path, base: Path) -> bytes:
    """The binary with its RUNPATH ``<base>/lib`` overwritten in place by ``$ORIGIN/../lib``, padded with NUL."""
    old = f"{base}/lib".encode() + b"\0"
    new = b"$ORIGIN/../lib\0" if file.parent.name == "bin" else b"$ORIGIN\0"
    data = file.read_bytes()
    return data.replace(old, new.ljust(len(old), b"\0")) if len(new) <= len(old) else data


def bundled_wheel_package(name: str) -> CondaPackage | None:
    """``name`` as a noarch conda package: the wheel that ``ensurepip`` bundles, else what is installed beside us.

    Distributions of Linux ship Python without the bundled wheels. None where there is neither.
    """
    import ensurepip

    bundled = Path(ensurepip.__file__).parent / "_bundled"
    for wheel in bundled.glob(f"{name}-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            files = {f"site-packages/{member}": Entry(archive.read(member)) for member in archive.namelist()}
        return _python_package(name, wheel.name.split("-")[1], files)
    return _installed_package(name)


def _installed_package(name: str) -> CondaPackage | None:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    listed = [each for each in found.files or () if ".." not in each.parts and each.suffix != ".pyc"]
    files = {f"site-packages/{each}": Entry(Path(each.locate()).read_bytes()) for each in listed}
    return _python_package(name, found.version, files)


def _python_package(name: str, version: str, files: dict[str, Entry]) -> CondaPackage:
    entry_points = ("pip = pip._internal.cli.main:main",) if name == "pip" else ()
    return CondaPackage(name, version, files, ("python",), noarch="python", entry_points=entry_points)


# ---------------------------------------------------------------------------------------------- toys


def toy(name: str, version: str, depends: Sequence[str] = ("python",), *, says: str = "") -> CondaPackage:
    """A noarch Python package whose module knows its version, with a command of its name."""
    body = f"__version__ = {version!r}\n\n\ndef main():\n    print({says or f'{name} {version}'!r})\n"
    dist_info = f"site-packages/{name}-{version}.dist-info"
    files = {
        f"site-packages/{name}.py": Entry(body.encode()),
        f"{dist_info}/METADATA": Entry(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()),
        f"{dist_info}/INSTALLER": Entry(b"conda"),
    }
    return CondaPackage(name, version, files, tuple(depends), noarch="python", entry_points=(f"{name} = {name}:main",))


def make_channel(folder: Path, *, real_python_too: bool = False, packages: Iterable[CondaPackage] = ()) -> Path:
    """An indexed channel in ``folder`` with python, pip, setuptools where bundled, and ``packages``."""
    python = real_python() if real_python_too else stub_python()
    bundled = (bundled_wheel_package(name) for name in ("pip", "setuptools"))
    everything = [python, stub_python(subdir=OTHER_SUBDIR), *(p for p in bundled if p), *packages]
    for package in everything:
        write_package(folder, package)
    index(folder)
    return folder
