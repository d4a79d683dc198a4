"""YAML that somebody else wrote, read without trusting it.

PyYAML's C loaders recurse, and a few kilobytes of brackets crash the interpreter; aliases let a kilobyte expand to
gigabytes. Both are looked for in the flat stream of events, before anything is built.
"""

from __future__ import annotations

from typing import Any

import yaml

from ..errors import EnvironmentError_

#: Declarations and locks are four levels deep.
MAX_DEPTH = 32

_OPENING = (yaml.SequenceStartEvent, yaml.MappingStartEvent)
_CLOSING = (yaml.SequenceEndEvent, yaml.MappingEndEvent)


def load_texts(text: str, shown: str) -> Any:
    """The document with every scalar as the text that stands there: ``3.10`` is not 3.1. Raises EnvironmentError_."""
    return _load(text, shown, getattr(yaml, "CBaseLoader", yaml.BaseLoader))


def load(text: str, shown: str) -> Any:
    """The document with YAML's safe types. Raises EnvironmentError_."""
    return _load(text, shown, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _load(text: str, shown: str, loader: Any) -> Any:
    try:
        _inspect(text, shown, loader)
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EnvironmentError_(f"{shown} cannot be read.", words=str(error)) from error


def _inspect(text: str, shown: str, loader: Any) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
            raise EnvironmentError_(f"{shown} uses a YAML alias (*{event.anchor}).", hint="Write the value out.")
        if isinstance(event, _OPENING):
            depth += 1
            if depth > MAX_DEPTH:
                raise EnvironmentError_(f"{shown} is nested more than {MAX_DEPTH} levels deep.")
        elif isinstance(event, _CLOSING):
            depth -= 1
