"""An entry point and the values of its parameters -> the shell command. Pure; standard library only.

The semantics are MLflow's (``mlflow.projects``, EntryPoint.compute_command; a property test compares both): values are
quoted for a POSIX shell and put into the template by ``str.format``, extra parameters follow as ``--key value``. Two
differences, both on purpose: quoting is always POSIX, because the job runs on Linux whatever the submitter runs on;
and a value that would break out of quotes which the template itself puts around a placeholder is refused.
"""

from __future__ import annotations

import shlex
import string
from collections.abc import Iterator, Mapping

from ..errors import ProjectError
from ..job import EntryPoint

MAX_COMMAND_BYTES = 128 * 1024 - 1  # Linux: MAX_ARG_STRLEN, the longest single argument a program can be given

UNQUOTED = ""
SINGLE = "'"
DOUBLE = '"'
BACKTICK = "`"
HERE_DOCUMENT = "<<"

#: What a quoted value must not contain inside each of the template's own quotes, lest it ends them or expands.
_DANGEROUS = {SINGLE: "'", DOUBLE: '"$`\\', BACKTICK: "`\\", HERE_DOCUMENT: "$`\\\n"}


def values_of(entry_point: EntryPoint, given: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The declared parameters with their values (defaults filled in), and the extra ones. Raises ProjectError."""
    missing = [each.name for each in entry_point.parameters if each.default is None and each.name not in given]
    if missing:
        raise ProjectError(f"No value given for missing parameters: {', '.join(map(repr, missing))}")
    declared = {each.name: given.get(each.name, str(each.default)) for each in entry_point.parameters}
    return declared, {key: value for key, value in given.items() if key not in declared}


def render(entry_point: EntryPoint, declared: Mapping[str, str], extra: Mapping[str, str]) -> str:
    """The command line for ``bash -c``. Raises ProjectError: NUL, a dangerous value in quotes, too long."""
    for key, value in {**declared, **extra}.items():
        if "\0" in key or "\0" in value:
            raise ProjectError(f"Parameter {key!r} has a NUL byte, which no command line can carry.")
    _check_quoting(entry_point, declared)
    try:
        command = entry_point.command.format(**{key: shlex.quote(value) for key, value in declared.items()})
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ProjectError(
            f"The command of entry point {entry_point.name!r} is not a valid template.",
            words=f"{type(error).__name__}: {error}",
            hint="A placeholder must be a declared parameter; write {{ and }} for literal braces.",
        ) from error
    words = [command, *(f"--{shlex.quote(key)} {shlex.quote(value)}" for key, value in extra.items())]
    return _within_limit(entry_point, " ".join(words))


def _within_limit(entry_point: EntryPoint, command: str) -> str:
    size_bytes = len(command.encode(errors="surrogateescape"))
    if size_bytes > MAX_COMMAND_BYTES:
        raise ProjectError(
            f"The command of entry point {entry_point.name!r} is {size_bytes} bytes long; a program can be given "
            f"at most {MAX_COMMAND_BYTES}.",
            hint="Put long values into a file of the project or an artifact, and pass its path.",
        )
    return command


def _check_quoting(entry_point: EntryPoint, declared: Mapping[str, str]) -> None:
    """Refuse values that would escape from quotes the template itself puts around their placeholder."""
    for name, context in placeholders(entry_point.command):
        value = declared.get(name)
        if value is None or context == UNQUOTED:
            continue
        quoted = shlex.quote(value)
        if quoted != value and any(each in quoted for each in _DANGEROUS[context]):
            raise ProjectError(
                f"Parameter {name!r} of entry point {entry_point.name!r} has a value that its command would execute "
                f"or break: the command puts the placeholder inside {_name(context)}.",
                hint=f"Write {{{name}}} without quotes in MLproject: values are quoted for the shell already.",
            )


def _name(context: str) -> str:
    return {SINGLE: "single quotes", DOUBLE: "double quotes", BACKTICK: "backticks"}.get(context, "a here-document")


def placeholders(template: str) -> Iterator[tuple[str, str]]:
    """Each placeholder's name with the shell quoting that is open where it stands."""
    scanner = _Quoting()
    try:
        for literal, field, _, _ in string.Formatter().parse(template):
            scanner.feed(literal)
            if field is not None:
                yield field.partition(".")[0].partition("[")[0], scanner.context
                scanner.feed("x")  # the value itself opens and closes its own quotes
    except ValueError:
        return  # not a valid template: render says so


class _Quoting:
    """Follows the shell's quoting through a command: enough of its grammar to know what is open at a point.

    Where it errs it errs to the strict side: inside ``"$(…)"`` it still reports double quotes.
    """

    def __init__(self) -> None:
        self.context = UNQUOTED
        self._inside_backtick = False
        self._escaped = False
        self._less_than = 0

    def feed(self, text: str) -> None:
        for character in text:
            self._step(character)

    def _step(self, character: str) -> None:
        if self.context == HERE_DOCUMENT:
            return  # up to its end word the text is not quoted as usual; treat the rest of the command as inside
        if self._escaped:
            self._escaped = False
        elif character == "\\" and self.context != SINGLE:
            self._escaped = True
        elif self.context == SINGLE:
            self.context = self._outer() if character == "'" else SINGLE
        elif self.context == DOUBLE:
            self.context = self._outer() if character == '"' else DOUBLE
        else:
            self._step_unquoted(character)

    def _step_unquoted(self, character: str) -> None:
        self._less_than = self._less_than + 1 if character == "<" else 0
        if character in "'\"":
            self.context = character
        elif character == "`":
            self._inside_backtick = not self._inside_backtick
            self.context = self._outer()
        elif self._less_than == 2:
            self.context = HERE_DOCUMENT

    def _outer(self) -> str:
        return BACKTICK if self._inside_backtick else UNQUOTED
