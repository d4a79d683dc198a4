"""The kinds of values that ``backend_config`` holds. Each reads a raw value and describes itself as JSON Schema.

Both come from one declaration, so the parser and ``mlflow-remote schema`` cannot drift apart. Understanding takes two
steps: ``read`` checks and converts what one layer says (``backend_config``, or a named compute); ``build`` finishes
what the merged layers say. Between the two a section is a dict of its canonical keys, and None means "not said".

Nothing here shows a secret: no message holds what is inside a mapping or a list, nor a URL's credentials, nor any
value at a place that is marked secret.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_MAX_DEPTH = 64
_CREDENTIALS = re.compile(r"://[^/?#\s]*@|/t/[^/?#\s]+")
_JSON_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


@dataclass(frozen=True)
class Place:
    """Where a value stands. ``key``: dotted; ``origin``: for messages; ``base``: its relative paths start there."""

    origin: str
    base: Path
    home: Path
    key: str = ""
    secret: bool = False

    def child(self, name: object, *, secret: bool = False) -> Place:
        key = f"{self.key}.{name}" if self.key else str(name)
        return replace(self, key=key, secret=self.secret or secret)

    def error(self, trouble: str, hint: str = "") -> ConfigError:
        subject = f"{self.origin}: {quoted(self.key)}" if self.key else self.origin
        return ConfigError(f"{subject} {trouble}.", key=self.key, hint=hint)

    def refused(self, value: object, expected: str, hint: str = "") -> ConfigError:
        said = f"{_with_article(json_type(value))} (its value is not shown)" if self.secret else shown(value)
        return self.error(f"is {said}; expected {expected}", hint)


def quoted(text: str) -> str:
    """A name in quotes, on one line: control and non-ASCII characters escaped, cut at 120 characters."""
    return json.dumps(text if len(text) <= 120 else text[:119] + "…").replace("\\u2026", "…")


def shown(value: object) -> str:
    """A value for a message: at most about 80 characters, escaped, never what is inside a mapping or a list."""
    if isinstance(value, str):
        text = _CREDENTIALS.sub(lambda found: "://***@" if found[0].startswith(":") else "/t/***", value)
        return quoted(text if len(text) <= 80 else text[:79] + "…")
    if isinstance(value, bool) or value is None or (isinstance(value, float) and type(value) is float):
        return json.dumps(value)
    if isinstance(value, int):
        return str(int(value)) if value.bit_length() < 256 else "a huge number"
    return _with_article(json_type(value))


def json_type(value: object) -> str:
    """JSON's name for the type of a value, or a Python type's name for what JSON cannot hold."""
    if isinstance(value, Mapping):
        return "mapping"
    if isinstance(value, (list, tuple)):
        return "list"
    for kind, name in _JSON_TYPES.items():
        if isinstance(value, kind):
            return name
    return f"{type(value).__name__} object"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def _matches(value: object) -> set[str]:
    """The JSON Schema types that a value has. JSON does not tell 2.0 from 2; it has no NaN and no infinity."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return set()
        return {"number", "integer"} if value.is_integer() else {"number"}
    name = json_type(value)
    return {"number", "integer"} if name == "integer" else {name}


def exact(pattern: str) -> str:
    """``pattern`` for the whole text, the same in ECMAScript and in Python (whose ``$`` overlooks a final newline)."""
    return f"^(?:{pattern})$(?!\\n)"


@dataclass(frozen=True)
class Kind:
    """A kind of value. ``name``: for tables; ``expects``: for messages; ``hint``: on refusal.

    ``takes``: types as :func:`json_type` names them, and "integer" for numbers that are whole.
    """

    name: str = "text"
    expects: str = "text"
    takes: tuple[str, ...] = ("string",)
    hint: str = ""

    def read(self, value: Any, place: Place) -> Any:
        """``value`` checked and converted. ConfigError names the key, the value and what is expected."""
        if not _matches(value) & set(self.takes):
            raise place.refused(value, self.expects, self._hint_for(value))
        return self.understand(value, place)

    def understand(self, value: Any, place: Place) -> Any:
        """Convert a value of the right JSON type."""
        return value

    def build(self, value: Any, place: Place) -> Any:
        """Finish a value that the layers have been merged into."""
        return value

    def schema(self) -> dict[str, Any]:
        """JSON Schema (draft 2020-12) of what ``read`` accepts."""
        raise NotImplementedError

    def _hint_for(self, value: object) -> str:
        if isinstance(value, str) and "boolean" in self.takes and value.lower() in {"true", "false"}:
            return f"Write {value.lower()} without quotes."
        if isinstance(value, bool) and self.name == "text":
            return f'Write "{str(value).lower()}" in quotes if you mean the word.'
        return self.hint


@dataclass(frozen=True)
class Flag(Kind):
    name: str = "boolean"
    expects: str = "true or false"
    takes: tuple[str, ...] = ("boolean",)

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Text(Kind):
    """Text without NUL. ``pattern``: a regular expression that ECMAScript and Python read alike (see :func:`exact`)."""

    pattern: str = "^[^\\u0000]+$"
    max_length: int | None = None

    def understand(self, value: str, place: Place) -> Any:
        if self.max_length is not None and len(value) > self.max_length:
            raise place.refused(value, f"{self.expects}, at most {self.max_length} characters", self.hint)
        if not re.search(self.pattern, value):
            raise place.refused(value, self.expects, self._hint_for(value))
        return _encodable(value, place)

    def schema(self) -> dict[str, Any]:
        limit = {} if self.max_length is None else {"maxLength": self.max_length}
        return {"type": "string", "pattern": self.pattern, **limit}


@dataclass(frozen=True)
class Convert(Text):
    """Text that ``convert`` turns into something else, with the place at hand."""

    convert: Callable[[str, Place], Any] = lambda text, place: text

    def understand(self, value: str, place: Place) -> Any:
        return self.convert(super().understand(value, place), place)


@dataclass(frozen=True)
class Choice(Kind):
    options: tuple[str, ...] = ()

    def understand(self, value: str, place: Place) -> str:
        if value not in self.options:
            raise place.refused(value, self.expects, self.hint)
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.options)}


def choice(*options: str, hint: str = "") -> Choice:
    """One of these words."""
    words = ", ".join(f'"{option}"' for option in options)
    name = " or ".join(f"`{option}`" for option in options)
    return Choice(name=name, expects=words if len(options) == 1 else f"one of {words}", options=options, hint=hint)


@dataclass(frozen=True)
class Count(Kind):
    """A whole number within bounds."""

    name: str = "integer"
    takes: tuple[str, ...] = ("integer",)
    minimum: int = 0
    maximum: int = 2**31 - 1

    def understand(self, value: float, place: Place) -> int:
        if not self.minimum <= value <= self.maximum:
            raise place.refused(value, self.expects, self.hint)
        return int(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}


def count(minimum: int, maximum: int = 2**31 - 1) -> Count:
    """A whole number from ``minimum`` to ``maximum``."""
    return Count(expects=f"a whole number from {minimum} to {maximum}", minimum=minimum, maximum=maximum)


@dataclass(frozen=True)
class Quantity(Kind):
    """A number, or text of a number with units: ``from_text`` turns the text that ``pattern`` accepts into a number.

    ``minimum``: itself refused if ``above``. Integers only if ``takes`` says so; then the result is an int.
    """

    pattern: str = ""
    from_text: Callable[[str], float] = float
    minimum: float = 0
    above: bool = True
    maximum: float = 2**63 - 1

    def understand(self, value: Any, place: Place) -> float:
        if isinstance(value, str) and not re.search(self.pattern, value):
            raise place.refused(value, self.expects, self.hint)
        number = self.from_text(value) if isinstance(value, str) else value
        if not self.minimum <= number <= self.maximum or (self.above and number == self.minimum):
            raise place.refused(value, self.expects, "Leave the key out for its default." if number == 0 else "")
        return int(number) if "integer" in self.takes else float(number)

    def schema(self) -> dict[str, Any]:
        bound = {"exclusiveMinimum" if self.above else "minimum": self.minimum, "maximum": self.maximum}
        return {"type": list(self.takes), "pattern": self.pattern, **bound}


_NUMBER = r"[0-9]{1,16}(?:\.[0-9]{1,9})?"
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_NOT_ZERO = "(?=[^A-Za-z]*[1-9])"
_BYTES = {"B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _BYTES |= {f"{_letter}{end}": 1000**_power for end in ("", "B")}
    _BYTES |= {f"{_letter}{end}": 1024**_power for end in ("i", "iB")}
_BYTES |= {"k": 1000, "kB": 1000}


def _seconds(text: str) -> float:
    return math.fsum(float(number) * _SECONDS[unit] for number, unit in re.findall("([0-9.]+)([dhms])", text))


def _bytes(text: str) -> int:
    """A part of a byte counts as a whole one."""
    number = text.rstrip("BikKMGTP")
    whole, _, part = number.partition(".")
    unit: int = _BYTES[text[len(number) :]]
    return -(-int(whole + part) * unit // int(10 ** len(part)))


def _cores(text: str) -> float:
    return int(text[:-1]) / 1000 if text.endswith("m") else float(text)


def _duration(*, zero: bool) -> Quantity:
    parts = "".join(f"(?:{_NUMBER}{unit})?" for unit in _SECONDS)
    some = "(?=[0-9])" if zero else "(?=.*[1-9])"
    return Quantity(
        name="duration",
        expects='a duration such as "30s", "2h" or "1d12h", or seconds as a number, '
        f"{'from' if zero else 'over'} 0 and at most 10 years",
        takes=("string", "number"),
        pattern=exact(some + parts),
        from_text=_seconds,
        above=not zero,
        maximum=3650 * 86400,
        hint='Text needs its units, such as "30s"; a number counts seconds.',
    )


FLAG = Flag()
TEXT = Text(expects="text, not empty, without NUL bytes")
DURATION = _duration(zero=False)
DURATION_OR_ZERO = _duration(zero=True)
SIZE = Quantity(
    name="size",
    expects='a size such as "4Gi", "300MiB" or "512M", or bytes as a whole number, over 0',
    hint='Units are case-sensitive: "512M" is 512,000,000 bytes, "512Mi" is 536,870,912.',
    takes=("string", "integer"),
    pattern=exact(f"(?=[0-9.]*[1-9]){_NUMBER}(?:{'|'.join(sorted(_BYTES, key=len, reverse=True))})"),
    from_text=_bytes,
)
CPU = Quantity(
    name="cores",
    expects='cores such as 2, 0.5 or "500m" (thousandths), over 0',
    takes=("string", "number"),
    pattern=exact(r"(?=.*[1-9])(?:[0-9]{1,6}(?:\.[0-9]{1,3})?|[0-9]{1,9}m)"),
    from_text=_cores,
    minimum=0.001,
    above=False,
    maximum=1_000_000,
)


@dataclass(frozen=True)
class NumberAsText(Kind):
    """A number where text is wanted: written as JSON would. Larger ones lose digits on their way; they need quotes."""

    name: str = "number"
    expects: str = "text"
    takes: tuple[str, ...] = ("number",)
    minimum: int = -(10**18)

    def understand(self, value: float, place: Place) -> str:
        if not self.minimum <= value <= 10**18:
            raise place.refused(value, self.expects, "Write it in quotes.")
        return str(int(value) if "integer" in self.takes else value)

    def schema(self) -> dict[str, Any]:
        return {"type": self.takes[0], "minimum": self.minimum, "maximum": 10**18}


@dataclass(frozen=True)
class OneOf(Kind):
    """The first of ``kinds`` that takes the value's JSON type."""

    kinds: tuple[Kind, ...] = ()

    def understand(self, value: Any, place: Place) -> Any:
        kind = next(kind for kind in self.kinds if _matches(value) & set(kind.takes))
        try:
            return kind.read(value, place)
        except ConfigError as error:
            if error.key != place.key:  # something inside the value
                raise
            raise place.refused(value, self.expects, error.hint or self._hint_for(value)) from None

    def build(self, value: Any, place: Place) -> Any:
        sections = (kind for kind in self.kinds if isinstance(kind, Section) and isinstance(value, Mapping))
        return next(sections, Kind()).build(value, place)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [kind.schema() for kind in self.kinds]}


def one_of(*kinds: Kind, name: str = "", expects: str = "", hint: str = "") -> OneOf:
    """Any of these kinds, which take different JSON types."""
    return OneOf(
        name=name or " or ".join(kind.name for kind in kinds),
        expects=expects or ", or ".join(kind.expects for kind in kinds),
        takes=tuple(taken for kind in kinds for taken in kind.takes),
        kinds=kinds,
        hint=hint,
    )


@dataclass(frozen=True)
class ListOf(Kind):
    """A list; the result is a tuple. A list of one layer replaces that of the layer under it."""

    takes: tuple[str, ...] = ("list",)
    item: Kind = TEXT

    def understand(self, value: Any, place: Place) -> tuple[Any, ...]:
        places = [place.child(number) for number in range(len(value))]
        return tuple(
            self.item.build(self.item.read(one, where), where) for one, where in zip(value, places, strict=True)
        )

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self.item.schema()}


def list_of(item: Kind) -> ListOf:
    """A list of these."""
    return ListOf(name=f"list of {item.name}", expects=f"a list; each member: {item.expects}", item=item)


class Masked(dict[str, Any]):
    """A mapping whose values are nobody's business: ``repr`` shows its names only."""

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name!r}: ***" for name in self) + "}"


@dataclass(frozen=True)
class MapOf(Kind):
    """A mapping with free names that ``names`` accepts. A null takes back what the layer under it says.

    At a secret place the result hides its values.
    """

    takes: tuple[str, ...] = ("mapping",)
    names: Text = TEXT
    values: Kind = TEXT

    def understand(self, value: Mapping[Any, Any], place: Place) -> dict[str, Any]:
        return {self._name(name, place): self._value(name, one, place) for name, one in value.items()}

    def _name(self, name: object, place: Place) -> str:
        try:
            return str(self.names.read(name, replace(place, secret=False)))
        except ConfigError as error:
            raise place.error(f"holds the name {shown(name)}; expected {self.names.expects}", error.hint) from None

    def _value(self, name: str, value: Any, place: Place) -> Any:
        return None if value is None else self.values.read(value, place.child(name))

    def build(self, value: Mapping[str, Any], place: Place) -> dict[str, Any]:
        said = {name: self.values.build(one, place.child(name)) for name, one in value.items() if one is not None}
        return Masked(said) if place.secret else said

    def schema(self) -> dict[str, Any]:
        names = {key: found for key, found in self.names.schema().items() if key != "type"}
        return {"type": "object", "propertyNames": names, "additionalProperties": nullable(self.values.schema())}


def map_of(values: Kind, names: Text = TEXT) -> MapOf:
    """A mapping from names to these."""
    name = f"mapping of {names.name} to {values.name}"
    return MapOf(name=name, expects=f"a {name}", names=names, values=values)


@dataclass(frozen=True)
class Open(Kind):
    """Any JSON mapping, copied and passed on as it is: whom it is for will check it."""

    name: str = "mapping"
    expects: str = "a mapping"
    takes: tuple[str, ...] = ("mapping",)

    def understand(self, value: Mapping[Any, Any], place: Place) -> dict[str, Any]:
        copied: dict[str, Any] = plain(value, place)
        return copied

    def schema(self) -> dict[str, Any]:
        return {"type": "object"}


def plain(value: Any, place: Place, depth: int = _MAX_DEPTH) -> Any:
    """A deep copy of JSON-like data. Refuses what JSON cannot hold, and cycles."""
    if not depth:
        raise place.error(f"is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise place.error(f"holds the name {shown(name)}; expected text")
        return {name: plain(one, place.child(name), depth - 1) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one, place.child(number), depth - 1) for number, one in enumerate(value)]
    if not _matches(value) & {"string", "number", "boolean", "null"}:
        raise place.refused(value, "a value that JSON can hold")
    return _encodable(value, place) if isinstance(value, str) else value


def _encodable(text: str, place: Place) -> str:
    if re.search("[\ud800-\udfff]", text):  # half of a surrogate pair: JSON can spell it, UTF-8 cannot
        raise place.refused(text, "text that can be written as UTF-8")
    return text


@dataclass(frozen=True)
class Key:
    """One key of a section. ``default``: as a user would write it; ``field``: of the section's value, if not ``name``.

    ``doc``: Markdown, one sentence or two. ``per_run``: belongs to a single run, so a named compute cannot hold it.
    ``secret``: no message and no ``repr`` shows its values.
    """

    name: str
    kind: Kind
    doc: str
    default: Any = None
    field: str = ""
    required: bool = False
    per_run: bool = False
    secret: bool = False

    def place(self, section: Place) -> Place:
        return section.child(self.name, secret=self.secret)

    def schema(self) -> dict[str, Any]:
        said = self.kind.schema() if self.required else nullable(self.kind.schema())
        default = {} if self.default is None else {"default": self.default}
        return {"title": self.name, "description": self.doc, **default, **said}


class UnknownKey(ConfigError):
    """A section holds a key that it does not know. ``siblings``: those it knows."""

    def __init__(self, place: Place, siblings: tuple[str, ...]) -> None:
        super().__init__(str(place.error("is not a key")), key=place.key)
        self.place = place
        self.siblings = siblings


@dataclass(frozen=True)
class Section(Kind):
    """A mapping with the given keys only. ``of`` makes its value from the fields that were said.

    ``only_one``: of these keys exactly one must be said. An unknown key raises :class:`UnknownKey`.
    """

    name: str = "mapping"
    expects: str = "a mapping"
    takes: tuple[str, ...] = ("mapping",)
    keys: tuple[Key, ...] = ()
    of: Callable[..., Any] = dict
    only_one: tuple[str, ...] = ()

    def understand(self, value: Mapping[Any, Any], place: Place) -> dict[str, Any]:
        known = {key.name: key for key in self.keys}
        said: dict[str, Any] = {}
        for name, one in value.items():
            if name not in known:
                raise UnknownKey(place.child(name), tuple(known))
            said[name] = None if one is None else known[name].kind.read(one, known[name].place(place))
        return said

    def build(self, value: Mapping[str, Any], place: Place) -> Any:
        said = [(key, value[key.name]) for key in self.keys if value.get(key.name) is not None]
        names = {key.name for key, _ in said}
        for key in self.keys:
            if key.required and key.name not in names:
                raise place.child(key.name).error(f"is missing; expected {key.kind.expects}")
        if self.only_one and len(names & set(self.only_one)) != 1:
            raise place.error(f"needs exactly one of {', '.join(self.only_one)}")
        return self.of(**{k.field or k.name: k.kind.build(one, k.place(place)) for k, one in said})

    def schema(self) -> dict[str, Any]:
        required = {"required": needed} if (needed := [key.name for key in self.keys if key.required]) else {}
        choices = [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in self.only_one]
        return {
            "type": "object",
            "properties": {key.name: key.schema() for key in self.keys},
            "additionalProperties": False,
            **required,
            **({"oneOf": choices} if choices else {}),
        }

    def walk(self, prefix: str = "") -> Iterator[tuple[str, Key]]:
        """Every key with its dotted name, sections before what they hold. Lists' members are ``name[]``."""
        for key in self.keys:
            dotted = prefix + key.name
            yield dotted, key
            if isinstance(key.kind, Section):
                yield from key.kind.walk(f"{dotted}.")
            elif isinstance(key.kind, ListOf) and isinstance(key.kind.item, Section):
                yield from key.kind.item.walk(f"{dotted}[].")


def nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, and null: "as if it were not there"."""
    if "oneOf" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    types = schema["type"]
    return {**schema, "type": [*types, "null"] if isinstance(types, list) else [types, "null"]}


def merged(under: Any, over: Any) -> Any:
    """``over`` laid on ``under``: mappings merge, everything else is replaced, a None takes back."""
    if isinstance(under, Mapping) and isinstance(over, Mapping):
        return {**under, **{name: merged(under.get(name), one) for name, one in over.items()}}
    return over
