"""Wheels and source archives made at test time, and a package index (PEP 503) that serves them on this machine.

The index can ask for a password, break its files, count what is asked of it, and stop answering.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def wheel(
    name: str,
    version: str,
    *,
    requires: Sequence[str] = (),
    tag: str = "py3-none-any",
    body: str = "",
    python: str = ">=3.8",
) -> tuple[str, bytes]:
    """File name and bytes of a wheel with one module that knows its version. Same arguments, same bytes."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
    files = {
        f"{name.replace('-', '_')}.py": body or f"__version__ = {version!r}\n",
        f"{info}/METADATA": "\n".join([*head, *_requirements(requires)]) + "\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = [f"{path},sha256={_digest(text.encode())},{len(text.encode())}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for path, text in files.items():
            archive.writestr(zipfile.ZipInfo(path, (2020, 1, 1, 0, 0, 0)), text)
    return f"{stem}-{tag}.whl", data.getvalue()


def _requirements(requires: Sequence[str]) -> Iterator[str]:
    for requirement in requires:
        _, conditional, extra = requirement.partition("extra == ")
        if conditional:
            yield f"Provides-Extra: {extra.strip(chr(39))}"
        yield f"Requires-Dist: {requirement}"


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


#: A build backend of its own archive's, so that nothing has to be fetched to build it. It says that it ran.
BACKEND = """
import zipfile

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    import needed
    name = "{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel_directory + "/" + name, "w") as archive:
        archive.writestr("{module}.py", "built_with = " + repr(needed.__version__) + "\\n")
        archive.writestr("{stem}.dist-info/METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        archive.writestr("{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr("{stem}.dist-info/RECORD", "")
    return name
"""


def source(name: str, version: str, *, build_requires: Sequence[str] = ()) -> tuple[str, bytes]:
    """File name and bytes of a source archive whose build needs the module ``needed`` in the environment."""
    stem = f"{name.replace('-', '_')}-{version}"
    quoted = ", ".join(f'"{each}"' for each in build_requires)
    build = f'[build-system]\nrequires = [{quoted}]\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    project = f'[project]\nname = "{name}"\nversion = "{version}"\n'
    files = {
        "pyproject.toml": build + project,
        "backend.py": BACKEND.format(stem=stem, module=name.replace("-", "_"), name=name, version=version),
        "PKG-INFO": f"Metadata-Version: 2.2\nName: {name}\nVersion: {version}\n",
    }
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(f"{stem}/{path}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return f"{stem}.tar.gz", gzip.compress(raw.getvalue(), mtime=0)


def git_repository(folder: Path, subdirectory: str = "") -> tuple[str, str]:
    """A repository with a package in it, or in a folder of it: its URL and the commit of ``main``."""
    package = folder / subdirectory
    package.mkdir(parents=True)
    _, archive = source("gitpack", "0.1")
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(archive))) as tar:
        for member in tar.getmembers():
            stream = tar.extractfile(member)
            assert stream is not None
            (package / Path(member.name).name).write_bytes(stream.read())
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "Begin"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    return folder.as_uri(), head.stdout.strip()


@dataclass
class Index:
    """A running index. ``files``: what it serves, by file name; changing the mapping changes the answers."""

    files: dict[str, bytes] = field(default_factory=dict)
    login: tuple[str, str] | None = None
    broken: dict[str, bytes] = field(default_factory=dict)  # served under the digest of the right bytes
    folders: dict[str, Path] = field(default_factory=dict)  # further folders, by the first part of the path
    requests: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    port: int = 0
    host: str = "127.0.0.1"

    def add(self, *packages: tuple[str, bytes]) -> Index:
        self.files.update(packages)
        return self

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/simple"

    def address(self, path: str, userinfo: str = "") -> str:
        return f"http://{userinfo}{self.host}:{self.port}/{path}"

    def downloads(self) -> list[str]:
        """Files that were fetched, in order."""
        return [path.rsplit("/", 1)[-1] for path in self.requests if path.startswith("/files/")]

    def page(self, project: str) -> bytes | None:
        """The page of one project, with the digest of each file as it should be."""
        names = [name for name in self.files if _project(name) == project]
        if not names:
            return None
        digests = {name: hashlib.sha256(self.files[name]).hexdigest() for name in names}
        links = (f'<a href="/files/{name}#sha256={digest}">{name}</a>' for name, digest in digests.items())
        return f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>".encode()


def _project(file_name: str) -> str:
    return file_name.split("-")[0].replace("_", "-").lower()


@contextmanager
def serving(index: Index) -> Iterator[Index]:
    """Serves ``index`` on its host for the duration of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            index.requests.append(self.path)
            if index.login and self.headers.get("Authorization") != _basic(index.login):
                index.refused.append(self.path)
                return self.answer(401, b"who are you?", {"WWW-Authenticate": 'Basic realm="index"'})
            body = self.body()
            self.answer(404, b"not here") if body is None else self.answer(200, body)

        do_HEAD = do_GET

        def body(self) -> bytes | None:
            kind, _, rest = self.path.strip("/").partition("/")
            if kind == "simple":
                return index.page(rest.strip("/"))
            if kind == "files":
                return index.broken.get(rest, index.files.get(rest))
            file = index.folders[kind] / rest if kind in index.folders else None
            return file.read_bytes() if file and file.is_file() else None

        def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            kind = "text/html" if self.path.startswith("/simple") else "application/octet-stream"
            for name, value in {"Content-Length": str(len(body)), "Content-Type": kind, **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Silent: the tests look at ``index.requests``."""

    server = ThreadingHTTPServer((index.host, 0), Handler)
    index.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()


def _basic(login: tuple[str, str]) -> str:
    return "Basic " + base64.b64encode(":".join(login).encode()).decode()
