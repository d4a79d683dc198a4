"""TOML for Python 3.10 as well, where conda-lock brings the parser that later became the standard library's."""

from __future__ import annotations

import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

__all__ = ["loads"]


def loads(text: str) -> dict[str, Any]:
    """The document in ``text``. Raises ValueError where it is damaged."""
    document: dict[str, Any] = tomllib.loads(text)
    return document
