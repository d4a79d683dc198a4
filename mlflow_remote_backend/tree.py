"""Project folder -> what of it belongs into its snapshot, found by one walk that never follows a link.

Which rule wins, strongest first:

1. where the tracking and artifact stores lie: never packed;
2. ``snapshot.exclude``;
3. ``snapshot.include``, for an entry that one of its patterns matches itself;
4. the built-in rules of :mod:`ignore`;
5. ``snapshot.include`` for all below a folder that it matches: naming ``conf/`` does not send ``conf/.env``;
6. the ignore files.

Folders are entries of their own, also empty ones: programs write into folders that they find at home. A symbolic link
is packed as a link, never as what it leads to; one that leads out of the project is refused, because the job would
find it dangling hours later. Devices, pipes and sockets are left out with a warning.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import SnapshotError
from .ignore import (
    IgnoreFiles,
    Patterns,
    Rule,
    above,
    built_in,
    built_in_of_folder,
    listed,
    ways_into,
)
from .runner.unpack import ENCODING, ERRORS, UnpackLimits, is_safe_target, raw

LIMITS = UnpackLimits()  # what the job would refuse to unpack is refused here, before it is sent
SHOWN = 10  # so many names stand in a message, the rest is a number

_SQLITE_COMPANIONS = ("", "-journal", "-wal", "-shm")


@dataclass(frozen=True)
class Found:
    """An entry that belongs into the snapshot. ``target``: of a link, as it will be packed."""

    path: str
    status: os.stat_result
    target: str = ""


@dataclass(frozen=True)
class LeftOut:
    """An entry that does not, and all below it. ``rule``: by which; ``notable``: the user should hear of it."""

    path: str
    rule: str
    notable: bool = False


@dataclass(frozen=True)
class Tree:
    """What a walk found, sorted by the paths' bytes. ``vanished``: what went away while it was looked at."""

    root: Path
    found: tuple[Found, ...]
    left_out: tuple[LeftOut, ...]
    vanished: tuple[str, ...]


def walk(root: Path, include: Sequence[str], exclude: Sequence[str], stores: Sequence[Path]) -> Tree:
    """All that belongs into the snapshot of ``root``. ``stores``: paths where tracking data lies, inside or outside.

    Raises SnapshotError: a folder that cannot be read, links that lead out, too many entries, a path too long.
    """
    selection = Selection(
        listed(include, "snapshot.include"),
        ways_into(include, "snapshot.include"),
        listed(exclude, "snapshot.exclude"),
        _inside(root, stores),
    )
    walking = _Walk(root, selection)
    walking.enter("", _Context(above(root)), named=True)
    walking.refuse_what_cannot_travel()
    return Tree(
        root,
        tuple(sorted(walking.found, key=lambda each: raw(each.path))),
        tuple(sorted(walking.left_out, key=lambda each: raw(each.path))),
        tuple(walking.vanished),
    )


def _inside(root: Path, stores: Sequence[Path]) -> frozenset[str]:
    """The stores that lie below ``root``, as paths of the project, with the files that sqlite keeps beside its own."""
    real = os.path.realpath(root)
    found: set[str] = set()
    for store in stores:
        path = os.path.realpath(store)
        if path == real:
            raise SnapshotError(
                f"The tracking or artifact store lies in the project folder itself, {shown(str(root))}.",
                hint="It would become part of each snapshot. Move it to a folder of its own, for example mlruns.",
            )
        if path.startswith(real + os.sep):
            relative = os.path.relpath(path, real).replace(os.sep, "/")
            found.update(relative + companion for companion in _SQLITE_COMPANIONS)
    return frozenset(found)


@dataclass(frozen=True)
class Selection:
    """The rules that hold for the whole project. ``ways``: the folders on the way to what ``include`` names."""

    include: Patterns
    ways: Patterns
    exclude: Patterns
    stores: frozenset[str]


@dataclass(frozen=True)
class _Context:
    """What holds for the entries of one folder. ``taken``: ``include`` names a folder above them.

    ``shut``: they are left out, by a rule that is reported already, unless ``include`` names one of them.
    """

    ignore: IgnoreFiles
    taken: bool = False
    shut: bool = False


@dataclass(frozen=True)
class _Verdict:
    """``rule``: by which an entry is left out, empty if it is in. ``named``: ``include`` matches the entry itself."""

    rule: str = ""
    named: bool = False
    notable: bool = False


@dataclass
class _Walk:
    root: Path
    selection: Selection
    found: list[Found] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    outward: list[str] = field(default_factory=list)

    def enter(self, path: str, context: _Context, *, named: bool) -> bool:
        """Collect the folder's entries. Whether it belongs into the snapshot itself."""
        entries = self._entries(path)
        names = frozenset(entries)
        rule = None if named or context.shut else built_in_of_folder(self.root / path, names)
        if rule is not None:
            self._leave_out(path, str(rule))
            if self.selection.ways.decide(path, True) is None:
                return False
            context = replace(context, taken=False, shut=True)
        context = replace(context, ignore=self._ignore_files(path, names, context))
        before = len(self.found)
        for name in sorted(entries):
            self._visit(f"{path}/{name}" if path else name, entries[name], context)
        return not context.shut or len(self.found) > before

    def _ignore_files(self, path: str, names: frozenset[str], context: _Context) -> IgnoreFiles:
        try:
            return context.ignore.entering(self.root, path, names)
        except OSError as error:
            self.unreadable.append(f"{shown(os.path.relpath(error.filename, self.root))}: {error.strerror}")
            return context.ignore

    def _entries(self, path: str) -> dict[str, os.DirEntry[bytes]]:
        try:
            with os.scandir(os.path.join(os.fsencode(self.root), raw(path))) as entries:
                return {entry.name.decode(ENCODING, ERRORS): entry for entry in entries}
        except FileNotFoundError:
            self.vanished.append(path)
        except OSError as error:
            self.unreadable.append(f"{shown(path) or '.'}/: {error.strerror}")
        return {}

    def _visit(self, path: str, entry: os.DirEntry[bytes], context: _Context) -> None:
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            self.vanished.append(path)
            return
        except OSError as error:  # the folder may be listed, but not entered
            self.unreadable.append(f"{shown(path)}: {error.strerror}")
            return
        is_folder = stat.S_ISDIR(status.st_mode)
        verdict = self._judge(path, is_folder, context)
        if verdict.rule:
            self._leave_out(path, verdict.rule, shut=context.shut, notable=verdict.notable)
        if is_folder:
            self._visit_folder(path, status, verdict, context)
        elif not verdict.rule:
            self._take(path, status)

    def _visit_folder(self, path: str, status: os.stat_result, verdict: _Verdict, context: _Context) -> None:
        if verdict.rule and self.selection.ways.decide(path, True) is None:
            return
        self._check_path(path)
        taken = verdict.named or (context.taken and not verdict.rule)
        inner = replace(context, taken=taken, shut=bool(verdict.rule))
        if self.enter(path, inner, named=verdict.named):
            self._add(Found(path, status))

    def _judge(self, path: str, is_folder: bool, context: _Context) -> _Verdict:
        if path in self.selection.stores:
            return _Verdict("where tracking data lies (built in)")
        if rule := _positive(self.selection.exclude.decide(path, is_folder)):
            return _Verdict(str(rule))
        include = self.selection.include.decide(path, is_folder)
        if _positive(include):
            return _Verdict(named=True)
        if always := built_in(path):
            return _Verdict(str(always), notable=always.credentials)
        if context.taken:
            return _Verdict(str(include or ""))  # a negated one takes back a part of what another one took
        if context.shut:
            return _Verdict("a folder above it is left out")
        ignored = _positive(context.ignore.decide(path, is_folder))
        return _Verdict(str(ignored) if ignored else "")

    def _take(self, path: str, status: os.stat_result) -> None:
        self._check_path(path)
        if stat.S_ISREG(status.st_mode):
            self._add(Found(path, status))
        elif stat.S_ISLNK(status.st_mode):
            self._take_link(path, status)
        else:
            self._leave_out(path, "no file, folder or link", notable=True)

    def _take_link(self, path: str, status: os.stat_result) -> None:
        try:
            stands = os.readlink(os.path.join(os.fsencode(self.root), raw(path))).decode(ENCODING, ERRORS)
        except FileNotFoundError:
            self.vanished.append(path)
            return
        target = target_inside(self.root, path, stands)
        if target is None:
            self.outward.append(f"{shown(path)} -> {shown(stands)}")
        else:
            self._add(Found(path, status, target))

    def _add(self, found: Found) -> None:
        self.found.append(found)
        if len(self.found) > LIMITS.max_entries:
            raise _too_many(self.found)

    def _leave_out(self, path: str, rule: str, *, shut: bool = False, notable: bool = False) -> None:
        if not shut:  # what lies in a folder that is left out needs no mention of its own
            self.left_out.append(LeftOut(path, rule, notable))

    def _check_path(self, path: str) -> None:
        if len(raw(path)) > LIMITS.max_path_bytes or path.count("/") >= LIMITS.max_depth:
            raise SnapshotError(
                f"A path of the project is too long for a snapshot: {shown(path[:200])}…",
                hint=f"At most {LIMITS.max_path_bytes} bytes and {LIMITS.max_depth} levels. "
                "Ignore its folder in .mlflowignore if the job does not need it.",
            )

    def refuse_what_cannot_travel(self) -> None:
        """Raises SnapshotError where something is found that can neither be packed nor quietly left out."""
        if self.unreadable:
            raise cannot_read(self.unreadable)
        if self.outward:
            raise SnapshotError(
                f"{counted(len(self.outward), 'link')} of the project would lead nowhere where the job runs:",
                words=some_of(self.outward),
                hint="Copy what the job needs into the project, or give it as a parameter of type path or uri; "
                "name links that it does not need in .mlflowignore.",
            )


def _positive(rule: Rule | None) -> Rule | None:
    return None if rule is None or rule.negated else rule


def target_inside(root: Path, path: str, target: str) -> str | None:
    """Where the link ``path`` leads, in the form that a snapshot holds; None where that is outside of ``root``.

    A relative target that stays inside by its form is kept (what it leads to need not exist); any other is resolved.
    """
    names = [part for part in target.split("/") if part not in ("", ".")]
    plain = "/".join(names) or "."
    if not target.startswith("/") and is_safe_target(path, plain):
        return plain
    folder = os.path.join(os.path.realpath(os.fsencode(root)), os.path.dirname(raw(path)))
    parent, name = os.path.split(os.path.join(folder, raw(target).rstrip(b"/")))
    resolved = os.path.join(os.path.realpath(parent), name)
    rewritten = os.path.relpath(resolved, folder).decode(ENCODING, ERRORS)
    return rewritten if is_safe_target(path, rewritten) else None


def shown(path: str) -> str:
    """A path as a person may see it: no control character, no undecodable byte reaches a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in path)


def some_of(lines: Sequence[str]) -> str:
    """At most SHOWN lines, and how many there are more."""
    more = [f"… and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([*(f"- {line}" for line in lines[:SHOWN]), *more])


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def cannot_read(lines: Sequence[str]) -> SnapshotError:
    return SnapshotError(
        f"{counted(len(lines), 'path')} of the project cannot be read:",
        words=some_of(lines),
        hint="Make them readable for you, or name them in .mlflowignore if the job does not need them.",
    )


def _too_many(found: Sequence[Found]) -> SnapshotError:
    tops = Counter(each.path.partition("/")[0] for each in found)
    lines = [f"{count:,}  {shown(top)}" for top, count in tops.most_common(SHOWN)]
    return SnapshotError(
        f"The project has more than {LIMITS.max_entries:,} files and folders. So far, by where they lie:",
        words=some_of(lines),
        hint="Name what the job does not need in .mlflowignore, one pattern a line as in .gitignore.",
    )
