"""Snapshots: what of a project is packed, by which rule; archive and digest agree, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlflow_remote_backend import snapshot_cache, tree
from mlflow_remote_backend.config import SnapshotOptions
from mlflow_remote_backend.errors import SnapshotError
from mlflow_remote_backend.runner.unpack import Kind, raw, unpack
from mlflow_remote_backend.snapshot import MEMORY_BYTES, Listing, Snapshot, build, scan

ROOT = Path(__file__).parent.parent
LARGE = MEMORY_BYTES + 1000  # bytes of a file that is streamed while it is packed


@dataclass(frozen=True)
class Link:
    target: str


Content = bytes | str | None | Link  # None: a folder


def plant(root: Path, files: Mapping[str, Content]) -> Path:
    """Make these files below ``root``; ``name!`` is executable."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = os.path.join(os.fsencode(root), raw(name.removesuffix("!") if isinstance(content, bytes) else name))
        os.makedirs(path if content is None else os.path.dirname(path), exist_ok=True)
        if isinstance(content, Link):
            os.symlink(raw(content.target), path)
        elif content is not None:
            with open(path, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            os.chmod(path, 0o755 if name.endswith("!") and isinstance(content, bytes) else 0o644)
    return root


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return plant(tmp_path / "project", {"MLproject": "name: p\n"})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def packed_paths(listing: Listing) -> list[str]:
    return [entry.path for entry in listing.entries if entry.kind is not Kind.FOLDER]


def scanned(project: Path, stores: Sequence[Path] = (), required: Sequence[str] = (), **options: Any) -> Listing:
    return scan(project, SnapshotOptions(**options), stores, required=required)


def paths(project: Path, stores: Sequence[Path] = (), **options: Any) -> list[str]:
    """The files and links that would be packed, but for MLproject and the ignore files."""
    ours = {"MLproject", ".gitignore", ".mlflowignore", ".amlignore"}
    return [path for path in packed_paths(scanned(project, stores, **options)) if os.path.basename(path) not in ours]


def contents(folder: Path) -> dict[bytes, object]:
    """All below a folder: content and executable bit of files, target of links, None for folders."""
    found: dict[bytes, object] = {}
    top = os.fsencode(folder)
    for path, folders, files in os.walk(top):
        for name in folders + files:
            each = os.path.join(path, name)
            status = os.lstat(each)
            relative = os.path.relpath(each, top)
            if stat.S_ISLNK(status.st_mode):
                found[relative] = ("link", os.readlink(each))
            elif stat.S_ISDIR(status.st_mode):
                found[relative] = None
            else:
                with open(each, "rb") as file:
                    found[relative] = (file.read(), bool(status.st_mode & 0o100))
    return found


def unpacked(packed: Snapshot, folder: Path) -> dict[bytes, object]:
    with packed.path.open("rb") as archive:
        assert unpack(archive, folder, packed.digest) == packed.listing.entries
    return contents(folder)


# ------------------------------------------------------------------------------------------------ one tree, one digest

HOSTILE = {
    "new\nline": "a",
    "tab\t": "b",
    "\udcff\udcfe.bin": b"c",
    "-rf": "d",
    "ünï/cödé": "e",
    "x" * 255: "f",
    "/".join(["deep" * 12] * 40): "g",
    "'\"$(touch p)`;": "h",
    "\x1b[31mred": "i",
    "with space ": "j",
    "back\\slash": "k",
    "empty folder": None,
    "run!": b"#!/bin/sh\n",
    "empty": "",
    "l/up": Link("../run"),
    "l/dir": Link("../ünï"),
    "\udcfflink": Link("\udcff\udcfe.bin"),
    "l/" + "y" * 120: Link("/".join(["z" * 100] * 3)),
}


def test_a_project_arrives_as_it_was(project: Path, out: Path, tmp_path: Path) -> None:
    plant(project, HOSTILE)
    packed = build(scanned(project), out)
    assert unpacked(packed, tmp_path / "work") == contents(project)


def test_the_same_tree_has_the_same_digest_and_archive_anywhere(tmp_path: Path) -> None:
    names = list(HOSTILE.items())
    first = plant(tmp_path / "one" / "p", dict(names))
    old = os.umask(0o077)
    try:
        second = plant(tmp_path / "two" / "q", dict(reversed(names)))
    finally:
        os.umask(old)
    for folder, _, files in os.walk(os.fsencode(second)):
        for name in files:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700 if os.stat(path).st_mode & 0o100 else 0o400)
            os.utime(path, (1, 1), follow_symlinks=False)
        os.utime(folder, (2, 2))
    archives = [build(scanned(root), plant(tmp_path / f"out{n}", {})) for n, root in enumerate((first, second))]
    assert archives[0].digest == archives[1].digest
    assert archives[0].path.read_bytes() == archives[1].path.read_bytes()


def test_the_digest_does_not_depend_on_locale_or_hash_seed(project: Path) -> None:
    plant(project, HOSTILE)
    code = (
        "import sys, pathlib; from mlflow_remote_backend import snapshot, config\n"
        "project, cache = map(pathlib.Path, sys.argv[1:])\n"
        "print(snapshot.scan(project, config.SnapshotOptions(), cache=cache).digest)"
    )
    digests = set()
    for number, locale in enumerate(("C", "C.UTF-8", "POSIX")):
        env = {**os.environ, "LC_ALL": locale, "PYTHONHASHSEED": str(number), "PYTHONPATH": str(ROOT)}
        run = [sys.executable, "-c", code, str(project), str(project.parent / f"cache{number}")]
        digests.add(subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout.strip())
    assert digests == {scanned(project).digest}


def change(project: Path, how: str) -> None:
    match how:
        case "content":
            (project / "a").write_text("B")
        case "executable":
            (project / "a").chmod(0o755)
        case "name":
            (project / "a").rename(project / "b")
        case "moved":
            (project / "a").rename(project / "d" / "a")
        case "one more":
            (project / "c").write_text("")
        case "empty folder":
            (project / "e").mkdir()
        case "link":
            (project / "l").unlink()
            (project / "l").symlink_to("d")


@pytest.mark.parametrize("how", ["content", "executable", "name", "moved", "one more", "empty folder", "link"])
def test_the_digest_changes_with(project: Path, how: str) -> None:
    plant(project, {"a": "A", "d": None, "l": Link("a")})
    before = scanned(project).digest
    change(project, how)
    assert scanned(project).digest != before


def test_the_archive_tells_nothing_of_this_machine(project: Path, out: Path) -> None:
    plant(project, {"b": "B", "a/c!": b"C", "a-b": "D", "l": Link("b")})
    packed = build(scanned(project), out)
    with tarfile.open(packed.path) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == ["MLproject", "a", "a-b", "a/c", "b", "l"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert {member.mode for member in members} == {0o644, 0o755}
    assert packed.path.read_bytes()[4:8] == bytes(4)  # gzip's own time
    assert stat.S_IMODE(packed.path.stat().st_mode) == 0o600
    assert packed.path.name == f"{packed.digest.removeprefix('sha256:')[:32]}.tar.gz"
    assert packed.size_bytes == packed.path.stat().st_size


def test_the_reference_carries_the_totals_that_bound_unpacking(project: Path, out: Path) -> None:
    plant(project, {"a": "12345", "d/b": "678"})
    ref = build(scanned(project), out).ref
    assert (ref.unpacked_bytes, ref.entries) == (8 + len("name: p\n"), 4)


def test_the_listing_has_hash_size_and_path_of_each_file(project: Path) -> None:
    plant(project, {"d/a": "A", "n\n": "", "l": Link("d/a")})
    listing = scanned(project)
    text = listing.to_text()
    assert text.startswith(f"# snapshot {listing.digest}\n")
    rows = [line.split(None, 2) for line in text.splitlines()[1:]]
    assert ["559aead08264d5795d3909718cdd05abd49572e84fe55590eef31a88a08fdffd", "1", "d/a"] in rows
    assert {row[2] for row in rows} == {"MLproject", "d/a", "n\\n", "l -> d/a"}
    text.encode()


# ------------------------------------------------------------------------------------------------ what is left out


def test_a_planted_tree_gives_exactly_this(project: Path) -> None:
    never = {
        ".git/config": "g", ".hg/store": "h", ".svn/entries": "s", "sub/.git": "gitdir: elsewhere",
        "mlruns/0/meta.yaml": "m", "mlflow.db": "d", "mlflow.db-wal": "w", "mlartifacts/1/a": "a",
        "notebooks/mlruns/0/meta.yaml": "m",
        "__pycache__/a.pyc": "c", "pkg/__pycache__/b.pyc": "c", ".pytest_cache/v": "c", ".mypy_cache/x": "c",
        ".ruff_cache/x": "c", ".ipynb_checkpoints/x.ipynb": "c", ".tox/x": "c", ".nox/x": "c",
        "node_modules/m/i.js": "c",
        ".DS_Store": "j",
        ".venv/bin/activate": "v", "myenv/pyvenv.cfg": "home = /usr", "myenv/lib/x.py": "v",
        "condaenv/conda-meta/history": "", "condaenv/bin/x": "v",
        "target/CACHEDIR.TAG": "Signature: 8a477f597d28d172789f06886806bc55\n", "target/debug/x": "c",
        ".env": "k", ".env.production": "k", ".ENV": "k", "deploy/server.pem": "k", "deploy/server.key": "k",
        "deploy/store.p12": "k", "id_rsa": "k", "keys/id_ed25519": "k", ".ssh/config": "k", ".aws/credentials": "k",
        ".netrc": "k", ".npmrc": "k", ".pypirc": "k", "kubeconfig": "k", ".kube/config": "k", ".azure/x": "k",
        ".databrickscfg": "k", ".docker/config.json": "k", ".git-credentials": "k", ".config/gcloud/x": "k",
        ".mlflow/credentials": "k", "sub/.env": "k",
    }  # fmt: skip
    kept = {
        "MLproject", "train.py", "conda.yaml", ".env.example", "id_rsa.pub", "environment/x.py", "env/x.py", "data.csv",
        "docs/CACHEDIR.TAG", ".docker/Dockerfile", ".config/app.yaml", "mlflow_utils.py", "keys.py", "sub/x.py",
        ".github/workflows/ci.yaml", ".gitattributes", "monkey",
    }  # fmt: skip
    plant(project, {**never, **dict.fromkeys(kept, "x")})
    listing = scanned(project)
    assert set(packed_paths(listing)) == kept


def test_who_submits_hears_of_key_and_credential_files_that_stay_behind(project: Path) -> None:
    plant(project, {".env": "A=1", "deploy/server.pem": "k", "__pycache__/a.pyc": "c"})
    (warning,) = scanned(project).warnings
    assert warning == "Not in the snapshot, may hold credentials (built in): .env, deploy/server.pem"


def test_each_thing_left_out_is_listed_with_its_rule(project: Path) -> None:
    plant(project, {".gitignore": "# data\n*.csv\n", "a.csv": "x", "__pycache__/a.pyc": "c", "mlruns/x": "y", "b": "b"})
    rules = {each.path: each.rule for each in scanned(project, exclude=("b",)).left_out}
    assert rules == {
        "a.csv": ".gitignore:2 '*.csv'",
        "__pycache__": "cache (built in)",
        "mlruns": "MLflow's own store (built in)",
        "b": "snapshot.exclude 'b'",
    }


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({".gitignore": "*.csv\n"}, ["d/b.txt", "data.txt"]),
        ({".mlflowignore": "*.csv\n"}, ["d/b.txt", "data.txt"]),
        ({".amlignore": "*.csv\n"}, ["d/b.txt", "data.txt"]),
        ({".mlflowignore": "/a.csv\n", ".amlignore": "*\n"}, ["d/b.csv", "d/b.txt", "data.txt"]),
        ({".gitignore": "*.csv\n", ".mlflowignore": "!/a.csv\nd/\n"}, ["a.csv", "data.txt"]),
        ({".gitignore": "*.txt\n", ".mlflowignore": "*.csv\n"}, []),
        ({"d/.gitignore": "*\n"}, ["a.csv", "data.txt"]),
        ({".gitignore": "*.csv\n", "d/.gitignore": "!*.csv\n"}, ["d/b.csv", "d/b.txt", "data.txt"]),
        ({".mlflowignore": "!*.csv\n", "d/.gitignore": "*.csv\n"}, ["a.csv", "d/b.csv", "d/b.txt", "data.txt"]),
        ({".mlflowignore": "!b.csv\n", ".gitignore": "d/\n"}, ["a.csv", "data.txt"]),
        ({"d/.amlignore": "*.csv\n"}, ["a.csv", "d/b.txt", "data.txt"]),
        ({".gitignore": "\ufeff*.csv\r\n# no\r\n\r\n*.txt\r\n"}, []),
        ({".gitignore": "\\#x\n[\n!\n/\n*.csv"}, ["d/b.txt", "data.txt"]),
        ({".gitignore": Link("data.txt")}, ["a.csv", "d/b.csv", "d/b.txt", "data.txt"]),
        ({".dockerignore": "*\n"}, [".dockerignore", "a.csv", "d/b.csv", "d/b.txt", "data.txt"]),
    ],
)
def test_ignore_files(project: Path, files: dict[str, Content], left: list[str]) -> None:
    plant(project, {"a.csv": "a", "d/b.csv": "b", "d/b.txt": "c", "data.txt": "*", **files})
    assert paths(project) == left


GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
NAMES = [
    "a",
    "b",
    "ab",
    "x.py",
    "y.log",
    "[z]",
    "q w",
    "data",
    "foo!",
    "#h",
    "!n",
    "é",
    "sp ",
    "st*r",
    "qm?",
    "bs\\k",
    ".h",
]
PATTERNS = [
    "a", "/a", "a/", "a/b", "/a/b/", "*.py", "!*.py", "!a", "!a/", "!a/b", "*", "!*/", "**", "**/a", "a/**", "!a/**",
    "a/**/b", "**/b/", "data/*", "!data/a/", "[ab]", "[!a]", "[a-b]b", "?", "?b", "\\#h", "#h", "!\\!n", "q w", "sp\\ ",
    "sp ", "st\\*r", "bs\\\\k", "[", "a[", "/", "!", "//a", "a//b", "*a*/", "/*", "!/a", "**/", "*/", "a\\", "foo!",
    "[[]z]", ".*", "!.h", "*/b", "*/*", "!*/*/x.py", "x.py/", "[^a]", "[a-]", "[]a]", "[z-a]x", "data", "!data/",
]  # fmt: skip


def random_tree(root: Path, chance: random.Random) -> None:
    """Folders, files and nested .gitignore files at random."""
    folders = [""]
    for _ in range(chance.randrange(3, 9)):
        path = f"{chance.choice(folders)}/{chance.choice(NAMES)}".lstrip("/")
        if not (root / path).exists():
            (root / path).mkdir(parents=True)
            folders.append(path)
    for _ in range(chance.randrange(5, 25)):
        path = root / chance.choice(folders) / chance.choice(NAMES)
        if not path.exists():
            path.write_text("x")
    for folder in folders:
        if not folder or chance.random() < 0.3:
            lines = chance.choices(PATTERNS, k=chance.randrange(6))
            (root / folder / ".gitignore").write_text(chance.choice(["\n", "\r\n"]).join(lines) + "\n", newline="")


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@pytest.mark.skipif(shutil.which("git") is None, reason="git is what this compares with")
def test_gitignore_means_what_it_means_to_git(tmp_path: Path) -> None:
    for seed in range(40):
        root = tmp_path / str(seed)
        random_tree(root, random.Random(seed))
        subprocess.run(["git", "init", "-q", root], env={**os.environ, **GIT}, check=True)
        listed = subprocess.run(
            ["git", "ls-files", "--others", "--exclude-standard", "-z"],
            cwd=root, env={**os.environ, **GIT}, capture_output=True, check=True,
        )  # fmt: skip
        expected = sorted(path for path in listed.stdout.split(b"\0") if path)
        assert sorted(raw(path) for path in packed_paths(scanned(root))) == expected, f"seed {seed}"


def test_a_lone_carriage_return_ends_no_pattern_and_no_bracket_matches_a_slash(project: Path) -> None:
    plant(project, {".gitignore": "Icon\r\r\n/data[^0-9]*\n", "Icon": "", "data/x": "", "data-": ""})
    assert paths(project) == ["Icon", "data/x"]


def test_patterns_reach_names_with_line_feeds_and_undecodable_bytes(project: Path) -> None:
    plant(project, {".gitignore": "secret.txt\nx?y\n*.bin\n**/keys/*.txt\n", "\udcff.bin": b"s"})
    plant(project, {"a\nb/secret.txt": "s", "x\ny": "s", "c\nd/keys/e.txt": "s"})
    assert paths(project) == []


def test_two_asterisks_reach_all_levels(project: Path) -> None:
    plant(project, {".gitignore": "*.csv\n!d/**\n", "a.csv": "a", "d/a.csv": "a", "d/e/f/a.csv": "a"})
    assert paths(project) == ["d/a.csv", "d/e/f/a.csv"]


def test_only_what_lies_in_the_tree_decides(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither .git/info/exclude nor the user's own excludes: the same tree has the same digest for everyone."""
    home = Path(os.environ["HOME"])
    plant(home, {".gitconfig": f"[core]\nexcludesFile = {home}/excludes\n", "excludes": "*.txt\n"})
    plant(home / ".config" / "git", {"ignore": "*.txt\n"})
    plant(project, {".git/info/exclude": "*.txt\n", ".git/HEAD": "ref: refs/heads/main\n", "a.txt": "a"})
    assert paths(project) == ["a.txt"]


def test_a_project_inside_a_repository_obeys_its_ignore_files(tmp_path: Path) -> None:
    repository = plant(tmp_path / "repo", {".git/HEAD": "x", ".gitignore": "*.csv\n/projects/p/raw/\n/raw/\n!*.keep\n"})
    plant(tmp_path, {".gitignore": "*\n"})  # above the repository: not git's business
    project = plant(repository / "projects" / "p", {"MLproject": "x", "a.csv": "a", "raw/b": "b", "d/raw/c": "c"})
    plant(repository / "projects", {".gitignore": "*.tmp\n"})
    plant(project, {"x.tmp": "x", ".gitignore": "!a.csv\n"})
    assert paths(project) == ["a.csv", "d/raw/c"]


@pytest.mark.parametrize("pattern", ["*", "scratch/", "/scratch", "p", "**/p/", "scratch/*"])
def test_a_project_that_its_repository_ignores_is_packed_nevertheless(tmp_path: Path, pattern: str) -> None:
    repository = plant(tmp_path / "repo", {".git/HEAD": "x", ".gitignore": f"{pattern}\n*.csv\n"})
    project = plant(repository / "scratch" / "p", {"MLproject": "x", "a.py": "a", "b.csv": "b"})
    assert paths(project) == ["a.py"]


def test_a_project_folder_that_is_an_environment_itself_is_packed(project: Path) -> None:
    plant(project, {"pyvenv.cfg": "home = /usr", "CACHEDIR.TAG": "Signature: 8a477f597d28d172789f06886806bc55"})
    assert paths(project) == ["CACHEDIR.TAG", "pyvenv.cfg"]


def test_a_pipe_in_place_of_a_mark_blocks_nothing(project: Path) -> None:
    plant(project, {"d/x": "x"})
    os.mkfifo(project / "d" / "CACHEDIR.TAG")
    os.mkfifo(project / "d" / ".gitignore")
    assert paths(project) == ["d/x"]


# ------------------------------------------------------------------------------------------------ include and exclude

LARDER: dict[str, Content] = {
    ".gitignore": "data/\nbuild/\n*.log\n",
    "data/raw/a.csv": "a",
    "data/raw/b.txt": "b",
    "data/c.csv": "c",
    "build/lib/x.so": "x",
    "a.log": "l",
    "d/b.log": "l",
    ".env": "E=1",
    "conf/.env": "E=2",
    "conf/a.yaml": "y",
    "conf/.ssh/known_hosts": "h",
    "conf/.ssh/id": "i",
    ".venv/lib/site.py": "s",
    ".venv/pyvenv.cfg": "",
    "venv/pyvenv.cfg": "",
    "venv/lib/site.py": "s",
}


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ((), (), ["conf/a.yaml"]),
        (("*.log",), (), ["a.log", "conf/a.yaml", "d/b.log"]),
        (("/a.log",), (), ["a.log", "conf/a.yaml"]),
        (("data/raw/*.csv",), (), ["conf/a.yaml", "data/raw/a.csv"]),
        (("data/",), (), ["conf/a.yaml", "data/c.csv", "data/raw/a.csv", "data/raw/b.txt"]),
        (("data/", "!data/raw/"), (), ["conf/a.yaml", "data/c.csv"]),
        (("data/",), ("*.csv",), ["conf/a.yaml", "data/raw/b.txt"]),
        (("data/",), ("data/raw",), ["conf/a.yaml", "data/c.csv"]),
        (("*.csv",), (), ["conf/a.yaml"]),  # names no folder, so it opens none that is ignored
        (("data/**/*.csv",), (), ["conf/a.yaml", "data/c.csv", "data/raw/a.csv"]),
        ((".env",), (), [".env", "conf/.env", "conf/a.yaml"]),
        (("/.env",), (), [".env", "conf/a.yaml"]),
        (("conf/",), (), ["conf/a.yaml"]),  # names the folder, not the credentials in it
        (("conf/", "conf/.ssh/known_hosts"), (), ["conf/.ssh/known_hosts", "conf/a.yaml"]),
        (("conf/.ssh",), (), ["conf/.ssh/id", "conf/.ssh/known_hosts", "conf/a.yaml"]),
        ((".venv",), (), [".venv/lib/site.py", ".venv/pyvenv.cfg", "conf/a.yaml"]),
        (("venv",), (), ["conf/a.yaml", "venv/lib/site.py", "venv/pyvenv.cfg"]),
        (("venv/lib/site.py",), (), ["conf/a.yaml", "venv/lib/site.py"]),
        ((".venv/lib/*.py",), (), [".venv/lib/site.py", "conf/a.yaml"]),
        ((), ("conf",), []),
        ((), ("conf/*", "!conf/a.yaml"), ["conf/a.yaml"]),
        (("build/lib/none",), (), ["conf/a.yaml"]),
    ],
)
def test_include_and_exclude(
    project: Path, include: tuple[str, ...], exclude: tuple[str, ...], left: list[str]
) -> None:
    plant(project, LARDER)
    assert paths(project, include=include, exclude=exclude) == left


def test_what_lies_in_an_opened_folder_is_listed_once_with_it(project: Path) -> None:
    plant(project, LARDER)
    left_out = scanned(project, include=("data/raw/*.csv", "venv/lib/site.py", ".venv/lib/site.py")).left_out
    outside_conf = [each.path for each in left_out if not each.path.startswith("conf")]
    assert outside_conf == [".env", ".venv", "a.log", "build", "d/b.log", "data", "venv"]


def test_a_folder_opened_in_vain_is_not_packed(project: Path) -> None:
    plant(project, LARDER)
    folders = [
        entry.path for entry in scanned(project, include=("build/lib/none",)).entries if entry.kind is Kind.FOLDER
    ]
    assert folders == ["conf", "d"]


# ------------------------------------------------------------------------------------------------ stores and needs


def test_where_tracking_data_lies_is_never_packed(project: Path, tmp_path: Path) -> None:
    plant(project, {f"track/my.sqlite{end}": "s" for end in ("", "-wal", "-shm", "-journal", ".py")})
    plant(project, {"artifacts/0/model": "m", "x": "x"})
    alias = tmp_path / "alias"
    alias.symlink_to(project)
    stores = [project / "track" / "my.sqlite", alias / "artifacts", tmp_path / "elsewhere", tmp_path]
    assert paths(project, stores, include=("artifacts/", "track/*")) == ["track/my.sqlite.py", "x"]


def test_a_store_in_the_project_folder_itself_is_refused(project: Path) -> None:
    with pytest.raises(SnapshotError, match="store lies in the project folder itself"):
        scanned(project, [project])


@pytest.mark.parametrize(
    ("files", "required", "rule"),
    [
        ({".gitignore": "*\n"}, (), ".gitignore:1 '*'"),
        ({".mlflowignore": "\nMLp*\n"}, (), ".mlflowignore:2 'MLp*'"),
        ({".gitignore": "*.yaml\n", "conda.yaml": "c"}, ("conda.yaml",), ".gitignore:1 '*.yaml'"),
        ({".gitignore": "envs/\n", "envs/conda.yaml": "c"}, ("./envs/conda.yaml",), ".gitignore:1 'envs/'"),
        ({".env": "c"}, (".env",), "may hold credentials (built in)"),
    ],
)
def test_what_the_job_needs_must_not_be_ignored(
    project: Path, files: dict[str, Content], required: tuple[str, ...], rule: str
) -> None:
    plant(project, files)
    with pytest.raises(SnapshotError, match=r"The job needs .*, but it would not be in the snapshot") as refusal:
        scanned(project, required=required)
    assert rule in refusal.value.what
    assert "snapshot.include" in refusal.value.hint


def test_what_the_job_needs_must_be_there(project: Path) -> None:
    with pytest.raises(SnapshotError, match=r"needs conda\.yaml, but the project folder has no such file"):
        scanned(project, required=["conda.yaml"])
    with pytest.raises(SnapshotError, match="does not exist, or is no folder"):
        scanned(project / "MLproject")


# ------------------------------------------------------------------------------------------------ links and others


@pytest.mark.parametrize(
    ("at", "leads_to", "packed"),
    [
        ("l", "a", "a"),
        ("l", "./d//b", "d/b"),
        ("l", "d/", "d"),
        ("l", "l", "l"),
        ("l", "missing/x", "missing/x"),
        ("d/l", "../a", "../a"),
        ("d/l", "..", ".."),
        ("l", ".", "."),
        ("l", "d/../a", "a"),
        ("d/l", "../../project/a", "../a"),
        ("l", "{project}/d/b", "d/b"),
        ("d/l", "{project}/a", "../a"),
        ("d/l", "{project}", ".."),
        ("l", "{alias}/d/b", "d/b"),
        ("l", "deep/../x", "e/x"),
        ("l", "{project}/missing", "missing"),
        ("l", "{project}/deep/..", "e"),
        ("d/l", "{project}/d/../", ".."),
    ],
)
def test_links_that_stay_inside_are_packed_as_relative_links(
    project: Path, out: Path, tmp_path: Path, at: str, leads_to: str, packed: str
) -> None:
    plant(project, {"a": "A", "d/b": "B", "e/f/c": "C", "e/x": "X", "deep": Link("e/f")})
    (tmp_path / "alias").symlink_to(project)
    plant(project, {at: Link(leads_to.format(project=project, alias=tmp_path / "alias"))})
    listing = scanned(project)
    assert {entry.path: entry.target for entry in listing.entries}[at] == packed
    work = tmp_path / "work"
    unpacked(build(listing, out), work)
    assert os.path.realpath(work / at).startswith(str(work))


@pytest.mark.parametrize(
    "leads_to",
    ["/etc/passwd", "..", "../canary", "d/../../canary", "{canary}", "{project}/../canary", "out/x", "d/out/../canary"],
)
def test_links_that_lead_out_are_refused_by_name(project: Path, tmp_path: Path, leads_to: str) -> None:
    canary = tmp_path / "canary"
    canary.write_text("secret of somebody else")
    plant(project, {"d/x": "x", ".mlflowignore": "out\n"})
    if "out" in leads_to:
        plant(project, {"out": Link(".."), "d/out": Link("../..")})
    plant(project, {"link": Link(leads_to.format(project=project, canary=canary))})
    if leads_to == "out/x":  # by its form it stays inside; it dangles in the job, which is said
        assert "leads to out/x, which is not in the snapshot" in " ".join(scanned(project).warnings)
        return
    with pytest.raises(SnapshotError, match="1 link of the project would lead nowhere") as refusal:
        scanned(project)
    assert "link -> " in refusal.value.words
    plant(project, {".mlflowignore": "link\nout\n"})
    assert paths(project) == ["d/x"]


def test_nothing_behind_a_link_to_a_folder_is_packed(project: Path, tmp_path: Path) -> None:
    plant(project, {"d/a": "A", "to_d": Link("d"), "loop/self": Link("."), "loop/up": Link("..")})
    assert paths(project) == ["d/a", "loop/self", "loop/up", "to_d"]
    assert scanned(project).warnings == ()


def test_a_link_to_what_stays_behind_is_told(project: Path) -> None:
    plant(project, {".gitignore": "data/\n", "data/a": "a", "latest": Link("data/a"), "data2": Link("latest")})
    assert scanned(project).warnings == ("The link latest leads to data/a, which is not in the snapshot.",)


def test_hard_links_are_files(project: Path, out: Path, tmp_path: Path) -> None:
    plant(project, {"a": "A"})
    os.link(project / "a", project / "b")
    work = tmp_path / "work"
    unpacked(build(scanned(project), out), work)
    assert (work / "a").stat().st_nlink == (work / "b").stat().st_nlink == 1


def test_pipes_and_sockets_are_left_out_and_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(project / "pipe")
    monkeypatch.chdir(project)  # the path of a socket may have 100 bytes only
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        listing = scanned(project)
    assert packed_paths(listing) == ["MLproject"]
    assert listing.warnings == ("Not in the snapshot, no file, folder or link: pipe, socket",)


def test_names_that_differ_in_case_only_are_told(project: Path, out: Path, tmp_path: Path) -> None:
    plant(project, {"Makefile": "a", "makefile": "b"})
    if len(list(project.iterdir())) < 3:
        pytest.skip("this file system ignores case")
    packed = build(scanned(project), out)
    assert "Makefile and makefile differ in case only" in packed.warnings[0]
    unpacked(packed, tmp_path / "work")


# ------------------------------------------------------------------------------------------------ limits


def test_over_the_limit_the_message_tells_size_limit_and_the_ten_largest(project: Path) -> None:
    for number in range(12):
        with (project / f"big{number:02}").open("wb") as file:
            file.truncate((number + 1) << 30)  # 78 GiB that need no disk, and would take minutes to read
    with pytest.raises(SnapshotError) as refusal:
        scanned(project, max_size_bytes=1 << 20)
    assert "78.0 GiB in 13 files; a snapshot may have 1.0 MiB" in refusal.value.what
    lines = refusal.value.words.splitlines()
    assert [line.split()[-1] for line in lines] == [f"big{number:02}" for number in range(11, 1, -1)]
    assert lines[0] == "- 12.0 GiB  big11"
    assert ".mlflowignore" in refusal.value.hint
    assert "max_size" in refusal.value.hint
    assert paths(project, max_size_bytes=1 << 20, exclude=("big*",)) == []


def test_exactly_at_the_limit_is_packed(project: Path) -> None:
    size_bytes = (project / "MLproject").stat().st_size
    assert scanned(project, max_size_bytes=size_bytes).size_bytes == size_bytes
    with pytest.raises(SnapshotError):
        scanned(project, max_size_bytes=size_bytes - 1)


def test_too_many_entries_are_refused_with_where_they_lie(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "LIMITS", tree.UnpackLimits(max_entries=50))
    plant(project, {f"cache/{number}": "" for number in range(60)})
    with pytest.raises(SnapshotError, match="more than 50 files and folders") as refusal:
        scanned(project)
    assert "cache" in refusal.value.words


def test_a_tree_too_deep_to_unpack_is_refused(project: Path) -> None:
    deep = "/".join(["d"] * 199)
    plant(project, {f"{deep}/x": "x"})
    assert len(paths(project)) == 1
    plant(project, {f"{deep}/d/d": "x"})
    with pytest.raises(SnapshotError, match="too long for a snapshot"):
        scanned(project)


# ------------------------------------------------------------------------------------------------ changes meanwhile


def verified(packed: Snapshot, tmp_path: Path) -> dict[bytes, object]:
    """What arrives, once; the archive agrees with its digest, or unpacking raises."""
    work = tmp_path / "verified"
    shutil.rmtree(work, ignore_errors=True)
    return unpacked(packed, work)


@pytest.mark.parametrize("size_bytes", [10, LARGE])
def test_a_file_that_grows_is_packed_as_it_was_read(project: Path, out: Path, tmp_path: Path, size_bytes: int) -> None:
    log = project / "train.log"
    log.write_bytes(b"x" * size_bytes)
    listing = scanned(project)
    with log.open("ab") as file:
        file.write(b"more")
    packed = build(listing, out)
    assert packed.digest == listing.digest
    assert verified(packed, tmp_path)[b"train.log"] == (b"x" * size_bytes, False)


@pytest.mark.parametrize("before", [10, LARGE])
@pytest.mark.parametrize("after", [0, 5, 10, LARGE - 1, LARGE, LARGE + 1])
def test_a_file_that_is_rewritten_is_packed_as_it_is(
    project: Path, out: Path, tmp_path: Path, before: int, after: int
) -> None:
    state = project / "state.bin"
    state.write_bytes(b"x" * before)
    listing = scanned(project)
    state.write_bytes(b"y" * after)
    packed = build(listing, out)
    assert packed.digest != listing.digest
    assert packed.digest == scanned(project).digest
    assert verified(packed, tmp_path)[b"state.bin"] == (b"y" * after, False)
    assert [path.name for path in out.iterdir()] == [packed.path.name]


def replaced_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def replaced_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("size_bytes", [10, LARGE])
@pytest.mark.parametrize("away", [Path.unlink, replaced_by_link, replaced_by_pipe, replaced_by_folder])
def test_a_file_that_is_gone_is_left_out_and_named(
    project: Path, out: Path, tmp_path: Path, size_bytes: int, away: Callable[[Path], None]
) -> None:
    (project / "a").write_bytes(b"x" * size_bytes)
    listing = scanned(project)
    away(project / "a")
    packed = build(listing, out)
    assert packed.warnings == ("Not in the snapshot, gone while it was packed: a",)
    assert set(verified(packed, tmp_path)) == {b"MLproject"}


def test_a_folder_that_is_gone_takes_its_files_along(project: Path, out: Path, tmp_path: Path) -> None:
    plant(project, {"d/a": "a", "d/b": "b"})
    listing = scanned(project)
    shutil.rmtree(project / "d")
    packed = build(listing, out)
    assert verified(packed, tmp_path) == {b"MLproject": (b"name: p\n", False), b"d": None}


def test_a_needed_file_that_is_gone_stops_the_submission(project: Path, out: Path) -> None:
    listing = scanned(project)
    (project / "MLproject").unlink()
    with pytest.raises(SnapshotError, match="MLproject, which the job needs, went away"):
        build(listing, out)
    assert list(out.iterdir()) == []


def rewriting(path: Path, stop: threading.Event) -> None:
    chance = random.Random(1)
    while not stop.is_set():
        path.write_bytes(chance.randbytes(chance.randrange(20_000)))


def replacing(path: Path, stop: threading.Event) -> None:
    chance = random.Random(2)
    while not stop.is_set():
        new = path.with_name(".new")
        new.write_bytes(chance.randbytes(chance.randrange(20_000)))
        new.replace(path)


def appending(path: Path, stop: threading.Event) -> None:
    while not stop.is_set():
        with path.open("ab") as file:
            file.write(b"a line of a log\n" * 1000)
        if path.stat().st_size > 20 << 20:
            path.unlink()


def rewriting_large(path: Path, stop: threading.Event) -> None:
    number = 0
    while not stop.is_set():
        number += 1
        path.write_bytes(b"%d" % (number % 10) * (LARGE + number % 5))


def coming_and_going(path: Path, stop: threading.Event) -> None:
    while not stop.is_set():
        path.mkdir(exist_ok=True)
        (path / "x").write_text("x")
        shutil.rmtree(path)


@contextlib.contextmanager
def busy(project: Path, *writers: tuple[Callable[[Path, threading.Event], None], str]) -> Iterator[None]:
    stop = threading.Event()
    threads = [threading.Thread(target=writer, args=(project / name, stop)) for writer, name in writers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_archive_and_digest_agree_while_others_write(project: Path, tmp_path: Path) -> None:
    plant(project, {f"still/{number}": f"{number}" for number in range(20)})
    writers = (
        (rewriting, "state"),
        (replacing, "best.ckpt"),
        (appending, "train.log"),
        (rewriting_large, "model.bin"),
        (coming_and_going, "tmp"),
    )
    with busy(project, *writers):
        for number in range(6):
            packed = build(scanned(project), plant(tmp_path / f"out{number}", {}))
            arrived = verified(packed, tmp_path)
            assert [arrived[f"still/{n}".encode()] for n in range(20)] == [(str(n).encode(), False) for n in range(20)]


@contextlib.contextmanager
def as_somebody_else() -> Iterator[None]:
    """Root may read everything, so as root this goes on as nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def reachable_project(project: Path, tmp_path: Path) -> Path:
    """A project that nobody can get to: pytest's own folders are for their user only."""
    for folder in (project, *project.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    return project


def test_what_cannot_be_read_is_named(reachable_project: Path) -> None:
    plant(reachable_project, {"a": "a", "b\n": "b", "d/x": "x", "e/.gitignore": "x"})
    for name, mode in {"a": 0, "b\n": 0, "d": 0, "e/.gitignore": 0}.items():
        (reachable_project / name).chmod(mode)
    with as_somebody_else(), pytest.raises(SnapshotError, match="cannot be read") as refusal:
        scan(reachable_project, SnapshotOptions(), cache=Path("/nowhere"))
    assert "d/: Permission denied" in refusal.value.words
    assert ".gitignore" in refusal.value.words
    (reachable_project / "d").chmod(0o755)
    (reachable_project / "e/.gitignore").chmod(0o644)
    with as_somebody_else(), pytest.raises(SnapshotError, match="2 paths of the project cannot be read") as refusal:
        scan(reachable_project, SnapshotOptions(), cache=Path("/nowhere"))
    assert refusal.value.words.splitlines() == ["- a: Permission denied", "- b\\n: Permission denied"]
    assert ".mlflowignore" in refusal.value.hint
    with as_somebody_else():
        assert scan(reachable_project, SnapshotOptions(exclude=("a", "b*")), cache=Path("/nowhere")).entries


def test_a_folder_that_can_be_listed_but_not_entered_is_named(reachable_project: Path) -> None:
    plant(reachable_project, {"d/x": "x"})
    (reachable_project / "d").chmod(0o744)
    with as_somebody_else(), pytest.raises(SnapshotError, match="cannot be read") as refusal:
        scan(reachable_project, SnapshotOptions(), cache=Path("/nowhere"))
    assert refusal.value.words == "- d/x: Permission denied"


def test_what_cannot_be_read_but_is_ignored_is_no_matter(reachable_project: Path) -> None:
    plant(reachable_project, {".gitignore": "private/\n", "private/x": "x"})
    (reachable_project / "private").chmod(0)
    with as_somebody_else():
        assert packed_paths(scan(reachable_project, SnapshotOptions(), cache=Path("/nowhere"))) == [
            ".gitignore",
            "MLproject",
        ]


@contextlib.contextmanager
def files_at_most(size_bytes: int) -> Iterator[None]:
    """The kernel refuses to write any file beyond this size: what a full disk is to a program, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_the_archive_is_a_clear_error_and_leaves_nothing(project: Path, out: Path) -> None:
    (project / "a").write_bytes(random.Random(1).randbytes(1 << 20))
    listing = scanned(project)
    with files_at_most(100_000), pytest.raises(SnapshotError, match="archive cannot be written to") as failure:
        build(listing, out)
    assert failure.value.words == "File too large"
    assert "TMPDIR" in failure.value.hint
    assert list(out.iterdir()) == []
    with pytest.raises(SnapshotError, match="archive cannot be written to"):
        build(listing, out / "no such folder")


# ------------------------------------------------------------------------------------------------ the cache

_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, bytes)):
        _opened.append(os.fsdecode(arguments[0]))


@pytest.fixture(scope="module", autouse=True)
def _watched() -> None:
    sys.addaudithook(_note_opened)


@contextlib.contextmanager
def opened_below(folder: Path) -> Iterator[list[str]]:
    """Names of the files below ``folder`` that this process opens meanwhile."""
    global _opened
    found: list[str] = []
    _opened = []
    try:
        yield found
    finally:
        prefix = f"{folder}/"
        found += sorted(path.removeprefix(prefix) for path in _opened if path.startswith(prefix))
        _opened = None


def settle(project: Path) -> None:
    """Return once the tree's last change is 0.1 s past: the cache does not trust a fresher file."""
    deadline = max(path.lstat().st_ctime_ns for path in project.rglob("*")) + 100_000_000
    while time.time_ns() <= deadline:
        os.sched_yield()


def test_an_unchanged_project_is_neither_read_nor_packed_again(project: Path, tmp_path: Path) -> None:
    plant(project, HOSTILE)
    settle(project)
    first = build(scanned(project), plant(tmp_path / "one", {}))
    with opened_below(project) as opened:
        second = build(scanned(project), plant(tmp_path / "two", {}))
    assert opened == []
    assert second.digest == first.digest
    assert second.path.read_bytes() == first.path.read_bytes()
    assert verified(second, tmp_path) == contents(project)


def test_only_what_changed_is_read_again(project: Path) -> None:
    plant(project, {"a": "A", "d/b": "B"})
    settle(project)
    before = scanned(project)
    (project / "a").write_text("C")
    with opened_below(project) as opened:
        after = scanned(project)
    assert opened == ["a"]
    assert before.digest != after.digest


def test_a_change_that_keeps_size_and_time_is_seen(project: Path) -> None:
    plant(project, {"a": "A"})
    settle(project)
    before = scanned(project)
    times = (project / "a").stat()
    (project / "a").write_text("B")
    os.utime(project / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert scanned(project).digest != before.digest


def test_a_change_right_after_a_snapshot_is_seen(project: Path) -> None:
    seen = set()
    for number in range(300):
        (project / "a").write_text(f"{number:03}")
        seen.add(scanned(project).digest)
    assert len(seen) == 300


def cache_root() -> Path:
    return snapshot_cache.default_root()


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"{}",
        b'{"scan": 1, "files": {}}',
        b'{"files": {"a": [1, 2]}}',
        b"null",
        b'{"scan": null}',
    ],
)
def test_a_damaged_cache_is_no_cache(project: Path, garbage: bytes) -> None:
    plant(project, {"a": "A"})
    settle(project)
    before = scanned(project).digest
    (file,) = (cache_root() / "files").iterdir()
    file.write_bytes(garbage)
    with opened_below(project) as opened:
        assert scanned(project).digest == before
    assert opened == ["MLproject", "a"]


@pytest.mark.parametrize("record", [None, 1, [], ["a"], [1, 2, 3, 4, "short"], {"a": 1}])
def test_a_damaged_record_is_no_record(project: Path, record: object) -> None:
    plant(project, {"a": "A"})
    settle(project)
    before = scanned(project).digest
    (file,) = (cache_root() / "files").iterdir()
    content = json.loads(file.read_text())
    content["files"]["a"] = record
    file.write_text(json.dumps(content))
    assert scanned(project).digest == before


def test_a_damaged_archive_is_packed_again(project: Path, tmp_path: Path) -> None:
    plant(project, {"a": "A" * 1000})
    build(scanned(project), plant(tmp_path / "one", {}))
    (kept,) = (cache_root() / "archives").glob("*.tar.gz")
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    assert verified(build(scanned(project), plant(tmp_path / "two", {})), tmp_path) == contents(project)


def test_without_a_place_for_the_cache_all_works(project: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    listing = scan(project, SnapshotOptions(), cache=tmp_path / "file" / "cache")
    assert verified(build(listing, out, cache=tmp_path / "file" / "cache"), tmp_path) == contents(project)


def test_the_cache_is_for_the_user_only_and_bounded(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_cache, "MAX_PROJECTS", 3)
    monkeypatch.setattr(snapshot_cache, "MAX_ARCHIVES_BYTES", 2_500)
    old = os.umask(0)
    try:
        for number in range(6):
            each = plant(tmp_path / f"p{number}", {"a": random.Random(number).randbytes(1000)})
            settle(each)
            build(scanned(each), plant(tmp_path / f"out{number}", {}))
    finally:
        os.umask(old)
    assert len(list((cache_root() / "files").iterdir())) == 3
    kept = list((cache_root() / "archives").iterdir())
    assert 0 < sum(path.stat().st_size for path in kept) <= 2_500
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (cache_root() / "files", *kept)}
    assert set(modes.values()) == {0o700, 0o600}


def test_the_benchmark_runs(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "snapshot.py"),
        "--files",
        "30",
        "--megabytes",
        "1",
        "--rounds",
        "1",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    table = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in table[-3:]] == ["scan", "archive", "both"]
