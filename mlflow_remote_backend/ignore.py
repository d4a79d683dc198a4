"""Which files of a project do not belong into its snapshot, and by which rule.

Ignore files have git's semantics: ``pathspec`` translates each pattern; the order in which patterns count, and what a
nested file speaks of, is git's (gitignore(5)): the last pattern that matches an entry decides, a deeper file outranks
a higher one, and nothing below an ignored folder can be had back. Decided here:

- The first that exists of ``.mlflowignore`` and ``.amlignore`` counts beside ``.gitignore`` in every folder, not only
  at the top, and outranks every ``.gitignore``: what belongs into a job is the narrower question (``!data/train.csv``
  takes back what git ignores).
- A project inside a git work tree also obeys the ``.gitignore`` files between it and the top of that tree, as git
  does; patterns that ignore the project folder itself do not count, since somebody named it.
- ``.git/info/exclude`` and the user's global excludes are not read: they differ from machine to machine, and the same
  tree shall have the same digest everywhere. Nor is git's index: a tracked file that a pattern matches is ignored.
- An ignore file that is a symbolic link is not read, as in git.
- Character classes by name, ``[[:digit:]]``, are not known to ``pathspec``: such a pattern matches nothing.

Beside them stand rules that are built in (:func:`built_in`).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pathspec import GitIgnoreSpec
from pathspec.pattern import Pattern

from .runner.unpack import raw

GIT_FILE = ".gitignore"
OWN_FILES = (".mlflowignore", ".amlignore")  # the first that exists in a folder counts there

VERSION_CONTROL = frozenset({".git", ".hg", ".svn", ".bzr", ".jj", "cvs"})
STORES = frozenset({"mlruns", "mlartifacts"})  # what MLflow makes where it is started
STORE_PREFIX = "mlflow.db"  # with -journal, -wal and -shm
CACHES = frozenset(
    {
        "__pycache__",
        ".cache",
        ".pytest_cache",
        ".mypy_cache",
        ".ruff_cache",
        ".hypothesis",
        ".ipynb_checkpoints",
        ".tox",
        ".nox",
        ".ds_store",
        "thumbs.db",
    }
)
ENVIRONMENTS = frozenset({".venv", ".pixi", "node_modules"})
ENVIRONMENT_MARKS = frozenset({"pyvenv.cfg", "conda-meta"})  # in a folder of any name
CACHE_MARK = "CACHEDIR.TAG"  # "Cache Directory Tagging Specification", bford.info/cachedir
CACHE_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55"

CREDENTIALS = frozenset(
    {
        ".env",
        ".envrc",
        ".netrc",
        "_netrc",
        ".npmrc",
        ".pypirc",
        ".pgpass",
        ".git-credentials",
        ".databrickscfg",
        ".boto",
        ".s3cfg",
        ".dockercfg",
        ".htpasswd",
        ".ssh",
        ".aws",
        ".azure",
        ".kube",
        ".gnupg",
        "kubeconfig",
        "kubeconfig.yaml",
        "kubeconfig.yml",
        "id_rsa",
        "id_dsa",
        "id_ecdsa",
        "id_ecdsa_sk",
        "id_ed25519",
        "id_ed25519_sk",
        "application_default_credentials.json",
    }
)
CREDENTIAL_SUFFIXES = (".pem", ".key", ".p12", ".pfx", ".ppk", ".jks", ".keystore", ".kdbx", ".kubeconfig")
CREDENTIAL_PATHS = (".docker/config.json", ".config/gcloud", ".mlflow/credentials", ".streamlit/secrets.toml")
ENV_SAMPLES = (".example", ".sample", ".template", ".dist")  # .env.example is made to be shared

_END = "\0"  # can stand in no file name


@dataclass(frozen=True)
class Rule:
    """One pattern of an ignore file. ``source``: the file and line it comes from, for people."""

    source: str
    text: str
    negated: bool
    folders_only: bool
    anchored: bool
    pattern: Pattern

    def __str__(self) -> str:
        return f"{self.source} {self.text!r}"

    def matches(self, path: str, is_folder: bool) -> bool:
        """Whether the pattern speaks of ``path`` (:func:`_as_matched`) itself, not merely of a folder above it."""
        if self.folders_only and not is_folder:
            return False
        subject = path if self.anchored else path[path.rfind("/") + 1 :]
        if "**" not in self.text and subject.count("/") != self.text.strip("!/").count("/"):
            return False  # no bracket matches a slash
        return self.pattern.match_file(subject + _END) is not None


def _as_matched(text: str) -> str:
    """A path or a pattern as it is compared: a character for each byte, since to git ``?`` is one byte of a name.

    No line feed is left, which the dot of an expression would not match; in a pattern there can be none.
    """
    return raw(text).decode("latin-1").replace("\n", "\r")


@dataclass(frozen=True)
class Patterns:
    """The rules of one ignore file. Paths given to it are the project's; it sees them from its own folder.

    ``strip``: length of what is taken off a path's front, for a file below the project's top; ``prefix``: what is put
    there, for one above it.
    """

    rules: tuple[Rule, ...] = ()
    strip: int = 0
    prefix: str = ""

    def decide(self, path: str, is_folder: bool) -> Rule | None:
        """The last rule that matches ``path``; None where this file has nothing to say of it."""
        subject = _as_matched(self.prefix + path[self.strip :])
        for rule in reversed(self.rules):
            if rule.matches(subject, is_folder):
                return rule
        return None


def parse(text: str, source: str, *, strip: int = 0, prefix: str = "") -> Patterns:
    """The patterns in ``text``, one a line. ``source``: the file's name, for people. Pure."""
    lines = enumerate(text.removeprefix("\ufeff").split("\n"), start=1)
    rules = (_rule(pattern, f"{source}:{number}") for number, line in lines if (pattern := _pattern_of(line)))
    return Patterns(tuple(rule for rule in rules if rule is not None), strip, prefix)


def listed(patterns: Iterable[str], source: str) -> Patterns:
    """The patterns of a configuration key, e.g. ``snapshot.exclude``. Pure."""
    rules = (_rule(each.strip(), source) for each in patterns if each.strip())
    return Patterns(tuple(rule for rule in rules if rule is not None))


def ways_into(patterns: Iterable[str], source: str) -> Patterns:
    """Rules for the folders on the way to what ``patterns`` name: ``/a/`` and ``/a/b/`` for ``a/b/*.csv``. Pure.

    A pattern without a slash opens none: it speaks of entries everywhere, which is no reason to look everywhere.
    """
    ways: list[str] = []
    for each in patterns:
        parts = each.removeprefix("**/").strip("/").split("/")
        ways += [f"/{'/'.join(parts[:count])}/" for count in range(1, len(parts))]
    return listed(ways, source)


def _pattern_of(line: str) -> str:
    """The pattern on a line, empty where there is none. A trailing space counts if it is escaped, as in git."""
    line = line.removesuffix("\r")
    if line.startswith("#"):
        return ""
    bare = line.rstrip(" ")
    escapes = len(bare) - len(bare.rstrip("\\"))
    return bare + " " if escapes % 2 and len(bare) < len(line) else bare


def _rule(text: str, source: str) -> Rule | None:
    """The rule of one pattern; None where git would find it invalid, and it never matches.

    The pattern and each path that is asked about end in a byte that no file name holds. So a pattern speaks of the
    entry itself and never of one of its folders, which the walk has judged before it came here; ``pathspec`` alone
    would take a folder's match for the file's, and with negations that is not what git does.
    """
    negated = text.startswith("!")
    body = text[1:] if negated else text
    folders_only = body.endswith("/")
    body = body.removesuffix("/")
    escapes = len(body) - len(body.rstrip("\\"))
    if not body or escapes % 2:
        return None
    if body == "**" or body.endswith("/**"):
        body += "/*"  # the same to git; but "**" has its meaning only as a whole name
    try:
        (pattern,) = GitIgnoreSpec.from_lines([_as_matched(body) + _END]).patterns
    except (ValueError, re.error):  # a bracket that is not closed, a range that runs backwards
        return None
    if pattern.include is None:
        return None
    return Rule(source, text, negated, folders_only, "/" in body, pattern)


@dataclass(frozen=True)
class IgnoreFiles:
    """All ignore files that speak of a folder's entries: ``git``'s and ``own`` ones, from the top down."""

    git: tuple[Patterns, ...] = ()
    own: tuple[Patterns, ...] = ()

    def decide(self, path: str, is_folder: bool) -> Rule | None:
        """The rule that decides on an entry of the folder, negated or not; None: nothing speaks of it."""
        for patterns in reversed(self.git + self.own):
            rule = patterns.decide(path, is_folder)
            if rule is not None:
                return rule
        return None

    def entering(self, root: Path, folder: str, names: frozenset[str]) -> IgnoreFiles:
        """The files that speak of the entries of ``folder`` (relative, empty for the top), which holds ``names``."""
        git = _read(root, folder, GIT_FILE) if GIT_FILE in names else None
        own_name = next((name for name in OWN_FILES if name in names), None)
        own = _read(root, folder, own_name) if own_name else None
        return replace(
            self,
            git=(*self.git, git) if git and git.rules else self.git,
            own=(*self.own, own) if own and own.rules else self.own,
        )


def _read(root: Path, folder: str, name: str) -> Patterns | None:
    path = f"{folder}/{name}" if folder else name
    text = _text_of(root / path)
    return None if text is None else parse(text, path, strip=len(folder) + 1 if folder else 0)


def _text_of(path: Path) -> str | None:
    """The text of a regular file, None for anything else."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return None
    return path.read_bytes().decode("utf-8", "surrogateescape")  # a lone carriage return ends no line


def above(root: Path) -> IgnoreFiles:
    """The ``.gitignore`` files above ``root`` in the git work tree that holds it; none outside of one."""
    root = root.resolve()
    top = next((folder for folder in (root, *root.parents) if (folder / ".git").exists()), root)
    inner = root.relative_to(top).parts
    files = []
    for depth in range(len(inner)):
        folder = top.joinpath(*inner[:depth])
        below = inner[depth:]
        if (folder / GIT_FILE).exists() and (text := _text_of(folder / GIT_FILE)) is not None:
            source = os.path.relpath(folder / GIT_FILE, root)
            files.append(_not_of_the_way(parse(text, source, prefix="/".join(below) + "/"), below))
    return IgnoreFiles(git=tuple(files))


def _not_of_the_way(patterns: Patterns, way: tuple[str, ...]) -> Patterns:
    """Without the rules that speak of the project folder or of one on the way to it."""
    folders = [_as_matched("/".join(way[:count])) for count in range(1, len(way) + 1)]
    rules = (rule for rule in patterns.rules if not any(rule.matches(folder, True) for folder in folders))
    return replace(patterns, rules=tuple(rules))


@dataclass(frozen=True)
class BuiltIn:
    """A rule that holds without any file. ``credentials``: people are told of each entry that it leaves out."""

    why: str
    credentials: bool = False

    def __str__(self) -> str:
        return f"{self.why} (built in)"


_CREDENTIALS = BuiltIn("may hold credentials", credentials=True)


def built_in(path: str) -> BuiltIn | None:
    """The built-in rule that leaves out an entry of this path, by its name. Pure; case does not matter."""
    lower = path.lower()
    name = lower[lower.rfind("/") + 1 :]
    if name in CACHES:
        return BuiltIn("cache")
    if name in VERSION_CONTROL:
        return BuiltIn("version control")
    if name in STORES or name.startswith(STORE_PREFIX):
        return BuiltIn("MLflow's own store")
    if name in ENVIRONMENTS:
        return BuiltIn("installed software")
    if name in CREDENTIALS or name.endswith(CREDENTIAL_SUFFIXES):
        return _CREDENTIALS
    if name.startswith(".env.") and not name.endswith(ENV_SAMPLES):
        return _CREDENTIALS
    if f"/{lower}".endswith(tuple(f"/{each}" for each in CREDENTIAL_PATHS)):
        return _CREDENTIALS
    return None


def built_in_of_folder(folder: Path, names: frozenset[str]) -> BuiltIn | None:
    """The built-in rule that leaves out a folder because of the ``names`` it holds."""
    if names & ENVIRONMENT_MARKS:
        return BuiltIn("installed software")
    if CACHE_MARK in names and _is_tagged(folder / CACHE_MARK):
        return BuiltIn("cache")
    return None


def _is_tagged(path: Path) -> bool:
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False  # a pipe of that name would block for ever
        with path.open("rb") as file:
            return file.read(len(CACHE_SIGNATURE)) == CACHE_SIGNATURE
    except OSError:
        return False
