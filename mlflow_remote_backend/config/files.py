"""Read the files that configuration comes from: JSON, and ``mlflow-remote.yaml`` in the YAML that people mean.

Files may come with somebody else's project, so they are read as hostile: regular files of at most 1 MiB, no tags, no
bombs. Messages name file and line and never quote a line, which may hold a secret.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError

MAX_BYTES = 1 << 20
_MAX_DEPTH = 64
_MAX_NODES = 100_000  # after aliases are expanded
_YAML_1_1_TYPES = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp")}
_YAML_1_2_TYPES = {  # of the core schema; what starts with 0 and is neither 0 nor 0x stays text
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": ("[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


def read_json(path: Path) -> Any:
    """The value in a JSON file. ConfigError if it cannot be read or is not JSON."""
    return parse_json(_read_text(path), str(path))


def parse_json(text: str, source: str) -> Any:
    """The value that ``text`` holds; ``source`` names it in messages."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _without_duplicates(pairs, source))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not valid JSON.", words=str(error), hint="Mend it there.") from None
    except (RecursionError, ValueError):
        raise ConfigError(f"{source} is nested too deeply or holds a number that is too large.") from None


def read_yaml(path: Path) -> Any:
    """The value in a YAML file, None if it is empty. Each alias is a reference: the value may be a graph, not a tree.

    As in YAML 1.2, only ``true`` and ``false`` are booleans and a date or ``1:30`` is text: the key ``on`` and the
    country ``no`` stay what they are.
    """
    import yaml

    text = _read_text(path)
    try:
        _refuse_bombs(text, path)
        loader = _yaml_loader_class()(text)
        node = loader.get_single_node()
        _refuse_duplicate_keys(node, path)
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML.", words=_position(error), hint="Mend the file there.") from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{path} holds a value that cannot be read.", words=type(error).__name__) from None


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():  # a pipe or a device would block
            raise ConfigError(f"{path} is not a regular file." if path.exists() else f"{path} does not exist.")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read.", words=str(error), hint="Check its permissions.") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than 1 MiB.", hint="No configuration of ours is; is the path right?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}).", hint="Save it as UTF-8.") from None


def _without_duplicates(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"{source} has the key {json.dumps(name)} twice.", key=name, hint="Remove one of them.")
        found[name] = value
    return found


def _position(error: Any) -> str:
    """What a YAMLError says and where, without the snippet of the file that its text holds."""
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or type(error).__name__}{where}"


def _yaml_loader_class() -> Any:
    """PyYAML's safe loader without YAML 1.1's surprises: ``on`` as true, ``1:30`` as 90, dates."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        yaml_implicit_resolvers = {  # noqa: RUF012 - how PyYAML declares them
            first: [entry for entry in entries if entry[0] not in _YAML_1_1_TYPES]
            for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    for name, (pattern, first) in _YAML_1_2_TYPES.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"), list(first))
    return Loader


def _refuse_duplicate_keys(root: Any, path: Path) -> None:
    """YAML forbids them, PyYAML lets the last one win."""
    from yaml import MappingNode, ScalarNode

    todo, done = [root], set()
    while todo:
        node = todo.pop()
        if node is None or id(node) in done or isinstance(node, ScalarNode):
            continue
        done.add(id(node))
        if not isinstance(node, MappingNode):
            todo.extend(node.value)
            continue
        todo.extend(value for _, value in node.value)
        names = [key for key, _ in node.value if isinstance(key, ScalarNode) and key.value != "<<"]
        seen: set[str] = set()
        for key in names:
            if key.value in seen:
                where = f"line {key.start_mark.line + 1}"
                raise ConfigError(f"{path} has the key {json.dumps(key.value)} twice ({where}).", key=key.value)
            seen.add(key.value)


def _refuse_bombs(text: str, path: Path) -> None:
    """Bound depth and size as they are after aliases are expanded, before anything is built.

    Counts over the parser's events, so neither the stack nor memory grows with what the text promises.
    """
    import yaml

    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor and size so far

    def close(anchor: str | None, size: int) -> None:
        if anchor is not None:
            sizes[anchor] = size
        outer, total = open_nodes.pop()
        open_nodes.append((outer, total + size))

    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            close(*open_nodes.pop())
        elif isinstance(event, yaml.ScalarEvent):
            close(event.anchor, 1)
        elif isinstance(event, yaml.AliasEvent):
            close(None, sizes.get(str(event.anchor), _MAX_NODES))  # unknown: it is inside what it refers to
        _check_bounds(open_nodes, path)


def _check_bounds(open_nodes: list[tuple[str | None, int]], path: Path) -> None:
    if len(open_nodes) > _MAX_DEPTH:
        raise ConfigError(f"{path} is nested deeper than {_MAX_DEPTH} levels.")
    if open_nodes[-1][1] >= _MAX_NODES:
        raise ConfigError(f"{path} holds more than {_MAX_NODES} values once its aliases are expanded.")
