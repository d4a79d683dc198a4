"""Requirements as pip writes them, expanded into plain lines that mean the same anywhere.

``-r`` and ``-c`` files are read in place. What could not travel is refused with file and line: editable and local
packages (a project's code comes with its snapshot, not with its environment) and credentials in clear.
"""

from __future__ import annotations

import codecs
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ..errors import EnvironmentError_
from . import credentials

#: A requirements file longer than this is refused unread.
MAX_FILE_BYTES = 8 * 1024 * 1024

_INDEX_OPTIONS = {
    "-i": "--index-url",
    "--index-url": "--index-url",
    "--pypi-url": "--index-url",
    "--extra-index-url": "--extra-index-url",
    "-f": "--find-links",
    "--find-links": "--find-links",
    "--trusted-host": "--trusted-host",
}
_BUILD_OPTIONS = ("--no-binary", "--only-binary")
_IGNORED_OPTIONS = ("--require-hashes", "--prefer-binary", "--use-pep517", "--use-feature")
_COMMENT = re.compile(r"(^|\s+)#.*$")
_HASH = re.compile(r"\s--hash[= ](?P<hash>\w+:[0-9a-fA-F]+)")
_ARCHIVE = re.compile(r"\.(whl|zip|tar\.gz|tar\.bz2|tgz)$")
_VCS = re.compile(r"(git|hg|svn|bzr)\+")


@dataclass(frozen=True)
class RequirementList:
    """Expanded requirements. ``pins`` keeps each requirement's ``--hash`` values, by the requirement's line.

    ``index_options``: ``--index-url URL`` and its kin, in order; ``build_options``: ``--pre``, ``--no-binary NAME``, …
    """

    requirements: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    index_options: tuple[str, ...] = ()
    build_options: tuple[str, ...] = ()
    pins: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __add__(self, other: RequirementList) -> RequirementList:
        return RequirementList(
            self.requirements + other.requirements,
            self.constraints + other.constraints,
            self.index_options + other.index_options,
            self.build_options + other.build_options,
            {**self.pins, **other.pins},
        )


@dataclass(frozen=True)
class _Line:
    """One logical line and where it stands, for messages."""

    text: str
    where: str


def expand(lines: Iterable[str], *, folder: Path, where: str) -> RequirementList:
    """Reads requirement lines as they stand in ``where``; ``-r`` and ``-c`` are relative to ``folder``.

    Raises EnvironmentError_ naming file and line for anything that cannot be locked.
    """
    collected = RequirementList()
    for number, text in enumerate(lines, 1):
        collected += _expand_line(_Line(text.strip(), f"{where}, entry {number}"), folder, ())
    return collected


def expand_text(text: str, *, folder: Path, where: str) -> RequirementList:
    """The requirements in the text of a whole file, which stands or would stand in ``folder``."""
    collected = RequirementList()
    for number, line in _logical_lines(text):
        collected += _expand_line(_Line(line, f"{where}, line {number}"), folder, ())
    return collected


def _expand_file(file: Path, where: str, trail: tuple[Path, ...]) -> RequirementList:
    resolved = file.resolve()
    if resolved in trail:
        chain = " -> ".join(path.name for path in (*trail, resolved))
        raise EnvironmentError_(f"{where} includes itself: {chain}.", hint="Take one of these -r lines out.")
    collected = RequirementList()
    for number, text in _logical_lines(_read(file, where)):
        line = _Line(text, f"{where}, line {number}")
        collected += _expand_line(line, file.parent, (*trail, resolved))
    return collected


def _read(file: Path, where: str) -> str:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise EnvironmentError_(f"{where} is over {MAX_FILE_BYTES // 2**20} MiB; that is no list of requirements.")
        data = file.read_bytes()
        # PowerShell redirects to UTF-16, which pip reads as well
        utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if utf_16 else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentError_(
            f"{where} cannot be read.", words=str(error), hint="Paths are relative to the file that names them."
        ) from error


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with continuations joined and comments and blank lines left out, each with its first line's number."""
    pending, first = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        first = first or number
        if raw.rstrip().endswith("\\") and not raw.lstrip().startswith("#"):
            pending += raw.rstrip()[:-1] + " "
            continue
        line = _COMMENT.sub("", pending + raw).strip()
        if line:
            yield first, line
        pending, first = "", 0
    if pending.strip():
        yield first, pending.strip()


def _expand_line(line: _Line, folder: Path, trail: tuple[Path, ...]) -> RequirementList:
    text = _COMMENT.sub("", line.text).strip()
    if not text:
        return RequirementList()
    if text.startswith("-"):
        return _expand_options(_Line(text, line.where), folder, trail)
    hashes = tuple(match["hash"] for match in _HASH.finditer(text))
    requirement = _requirement(_Line(_HASH.sub("", text).strip(), line.where))
    return RequirementList((requirement,), pins={requirement: hashes} if hashes else {})


def _expand_options(line: _Line, folder: Path, trail: tuple[Path, ...]) -> RequirementList:
    """A line of options. pip allows several on one line: ``--index-url X --extra-index-url Y``."""
    refuse_literal(line.text, line.where)
    try:
        words = shlex.split(line.text)
    except ValueError as error:
        raise EnvironmentError_(f"{line.where} cannot be read: {line.text}", words=str(error)) from error
    collected = RequirementList()
    while words:
        option, value = _next_option(words)
        collected += _option(option, value, line, folder, trail)
    return collected


def _next_option(words: list[str]) -> tuple[str, str]:
    """Takes one option with its value off ``words``: ``-r x``, ``-rx``, ``--opt=x``, ``--opt x`` or a flag."""
    word = words.pop(0)
    if word.startswith("--"):
        option, equals, value = word.partition("=")
        if not equals and option not in ("--pre", "--no-index", *_IGNORED_OPTIONS[:3]) and words:
            value = words.pop(0)
        return option, value
    option, value = word[:2], word[2:]
    return option, value or (words.pop(0) if words else "")


def _option(option: str, value: str, line: _Line, folder: Path, trail: tuple[Path, ...]) -> RequirementList:
    if option in ("-r", "--requirement"):
        return _included(value, line, folder, trail)
    if option in ("-c", "--constraint"):
        included = _included(value, line, folder, trail)
        return RequirementList((), included.requirements + included.constraints, included.index_options)
    if option in ("-e", "--editable"):
        if not _VCS.match(value):
            raise _local(line)
        return _expand_line(_Line(value, line.where), folder, trail)
    if option in _INDEX_OPTIONS:
        name = _INDEX_OPTIONS[option]
        place = value if name == "--trusted-host" else _index(value, folder)
        return RequirementList(index_options=(f"{name} {place}",))
    if option == "--no-index":
        return RequirementList(index_options=(option,))
    if option == "--pre":
        return RequirementList(build_options=(option,))
    if option in _BUILD_OPTIONS:
        return RequirementList(build_options=(f"{option} {value}",))
    if option in _IGNORED_OPTIONS:
        return RequirementList()
    raise EnvironmentError_(
        f"{line.where}: the option {option} is not known here: {line.text}",
        hint="Known are -r, -c, --index-url, --extra-index-url, --find-links, --no-index, --trusted-host, --pre, "
        "--no-binary and --only-binary.",
    )


def _included(value: str, line: _Line, folder: Path, trail: tuple[Path, ...]) -> RequirementList:
    if "://" in value:
        raise EnvironmentError_(
            f"{line.where} names a file on a server: {line.text}",
            hint="Download it into the project and name it there: what a server answers may change.",
        )
    return _expand_file(folder / value, value, trail)


def _index(value: str, folder: Path) -> str:
    """An index's URL, or a folder made absolute."""
    if "://" in value:
        return credentials.braced(value)
    return str((folder / value).resolve())


def _requirement(line: _Line) -> str:
    """One requirement in one spelling: canonical name, sorted extras and specifiers. Raises for what cannot travel."""
    text = line.text
    refuse_literal(text, line.where, placeholders_too=True)
    if _VCS.match(text) or re.match(r"https?://", text):
        named = _named(text)
        if not named:
            return text
        text = named
    try:
        parsed = Requirement(text)
    except InvalidRequirement as error:
        if _looks_local(text):
            raise _local(line) from None
        raise EnvironmentError_(f"{line.where} is not a requirement: {text}", words=str(error)) from error
    if _ARCHIVE.search(text) and not parsed.url:
        raise _local(line)
    if parsed.url and (parsed.url.startswith("file:") or "://" not in parsed.url):
        raise _local(line)
    return canonical(parsed)


def canonical(requirement: Requirement) -> str:
    """The requirement's text with a canonical name; equal requirements give equal text."""
    requirement.name = canonicalize_name(requirement.name)
    return str(requirement)


def _named(text: str) -> str:
    """``NAME @ URL`` for a bare URL with pip's ``#egg=NAME``; extras, marker and subdirectory stay. Empty without."""
    url, _, marker = text.partition("; ")
    address, _, fragment = url.strip().partition("#")
    parts = fragment.split("&")
    name = next((part.removeprefix("egg=") for part in parts if part.startswith("egg=")), "")
    rest = "&".join(part for part in parts if not part.startswith("egg="))
    return f"{name} @ {address}{rest and '#'}{rest}{marker and ' ; '}{marker}" if name else ""


def _looks_local(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "/" in text.split(";")[0] or bool(_ARCHIVE.search(text))


def _local(line: _Line) -> EnvironmentError_:
    return EnvironmentError_(
        f"{line.where} asks for a package from a local folder: {line.text}",
        hint="Only packages from an index, a URL or a git repository can be locked. The project's own code needs no "
        "installing: the program starts in the project's folder; a folder like src/ is added with PYTHONPATH.",
    )


def refuse_literal(text: str, where: str, *, placeholders_too: bool = False) -> None:
    """Raises EnvironmentError_ if a URL in ``text`` holds a credential in clear.

    ``placeholders_too``: ``${NAME}`` is refused as well, where its value would be written into the lock.
    """
    if not credentials.has_literal(text) and not (
        placeholders_too
        and "://" in text
        and ("${" in text or (credentials.strip(text) != text and "://git@" not in text))
    ):
        return
    raise EnvironmentError_(
        f"{where} holds a credential: {credentials.redact(text)}",
        hint="It would end up in the lock, which is stored with the run. Write the URL without it and put the "
        "credential into ~/.netrc or a keyring"
        + ("." if placeholders_too else ", or name variables in its place: https://${INDEX_USER}:${INDEX_PASSWORD}@…"),
    )
