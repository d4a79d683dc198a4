"""The wire format between the submitter and the runner: a :class:`JobSpec` as versioned JSON.

Both sides may be different releases of this package, so the reader refuses a version it does not know and
ignores fields that a newer release of the same version added. A large one travels compressed (gzip), since what
carries it may be bounded: a Kubernetes Secret holds 1 MiB. Standard library only: the runner's warm path loads nothing
else.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import types
import typing
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import JobError
from ..job import JobSpec

VERSION = 1
MAX_BYTES = 64 << 20  # uncompressed; a lock of some hundred packages is some hundred kilobytes
_GZIP = b"\x1f\x8b"

T = TypeVar("T")


def dump(spec: JobSpec) -> str:
    """The spec as canonical JSON text (sorted keys, ASCII): equal specs give equal bytes."""
    document = {"version": VERSION, "spec": dataclasses.asdict(spec)}
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def compressed(text: str) -> bytes:
    """The envelope in the form that takes less room; ``load`` reads both. Equal texts give equal bytes."""
    return gzip.compress(text.encode(), mtime=0)


def load(text: str | bytes) -> JobSpec:
    """The spec in ``text``, compressed or not. Raises JobError (BOOTSTRAP) on another version or damage."""
    try:
        document = json.loads(_expanded(text))
        version = document["version"]
    except (ValueError, TypeError, KeyError, EOFError, OSError, zlib.error) as error:
        raise JobError("The job's envelope cannot be read.", words=str(error)) from error
    if version != VERSION:
        raise JobError(
            f"The job's envelope has version {version!r}; this runner reads version {VERSION}.",
            hint="Submit with the release of mlflow-remote-backend that the runner has, or rebuild the runner image.",
        )
    try:
        return read(JobSpec, document["spec"])
    except (TypeError, KeyError, AttributeError) as error:
        raise JobError("The job's envelope is damaged.", words=str(error)) from error


def _expanded(text: str | bytes) -> str | bytes:
    if isinstance(text, str) or not text.startswith(_GZIP):
        return text
    with gzip.open(io.BytesIO(text)) as stream:
        expanded = stream.read(MAX_BYTES + 1)
    if len(expanded) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES} bytes")
    return expanded


def read(cls: type[T], raw: Mapping[str, Any]) -> T:
    """A dataclass from its ``asdict`` form; unknown fields are ignored, missing ones take their default."""
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: _value(hints[key], value) for key, value in raw.items() if key in fields})


def _value(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if dataclasses.is_dataclass(hint):
        return read(typing.cast("type[Any]", hint), value)
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_value(item, each) for each in value)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
        return _value(inner, value)
    return value
