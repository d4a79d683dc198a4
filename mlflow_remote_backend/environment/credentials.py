"""Credentials in URLs: named by a variable, or not there at all. Standard library only.

A URL that we keep, write or send holds ``${NAME}`` where a user name, a password or a token belongs; its value is
filled in at the last moment and goes to a tool by its environment, never by its arguments, which every user of a
machine can read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

_USERINFO = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<userinfo>[^/?#\s@]*(?:@[^/?#\s@]*)*)@(?=[^/?#\s@]*)")
_PLACEHOLDER = re.compile(r"\$\{(?P<braced>[A-Za-z_][A-Za-z0-9_]*)\}|\$(?P<bare>[A-Za-z_][A-Za-z0-9_]*)")
#: conda's tokens stand in the path: ``https://host/t/TOKEN/channel``.
_CONDA_TOKEN = re.compile(r"(?<=/t/)(?P<token>[^/\s]+)(?=/)")


def has_literal(url: str) -> bool:
    """Whether text with URLs carries a credential in clear: user information or a conda token that is no ``$VARIABLE``.

    A user name beside a password is none. Alone it counts over HTTP, where it may be a token, and not over SSH, where
    ``git@`` is an address.
    """
    if any(_PLACEHOLDER.sub("", match["token"]) for match in _CONDA_TOKEN.finditer(url)):
        return True
    return any(_is_literal(match["scheme"], match["userinfo"]) for match in _USERINFO.finditer(url))


def _is_literal(scheme: str, userinfo: str) -> bool:
    user, _, password = userinfo.partition(":")
    if not password and not re.match(r"(\w+\+)?https?://", scheme):
        return False
    return _PLACEHOLDER.sub("", password or user) != ""


def strip(url: str) -> str:
    """The URL without its user information and conda token, placeholders included."""
    return re.sub(r"/t/[^/\s]+(?=/)", "", _USERINFO.sub(r"\g<scheme>", url)) if "://" in url else url


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Text of another system fit to be shown: user information in URLs and the given values replaced by ``***``."""
    text = _USERINFO.sub(r"\g<scheme>***@", text)
    text = _CONDA_TOKEN.sub("***", text)
    for secret in sorted({s for s in secrets if len(s) >= 4}, key=len, reverse=True):
        text = text.replace(secret, "***").replace(quote(secret, safe=""), "***")
    return text


def placeholders(url: str) -> tuple[str, ...]:
    """Names of the variables that the URL refers to, in order."""
    return tuple(match["braced"] or match["bare"] for match in _PLACEHOLDER.finditer(url))


def braced(url: str) -> str:
    """The URL with ``$NAME`` written as ``${NAME}``, which pip, uv and conda-lock all understand."""
    return _PLACEHOLDER.sub(lambda match: "${" + (match["braced"] or match["bare"]) + "}", url)


def expand(url: str, values: Mapping[str, str]) -> str:
    """The URL with its variables filled in, percent-encoded where needed. Raises KeyError(name) for a missing one."""

    def value(match: re.Match[str]) -> str:
        text = values[match["braced"] or match["bare"]]
        inside = match.end() <= _authority_end(url)
        return quote(text, safe="%") if inside and "://" not in text else text

    return _PLACEHOLDER.sub(value, url)


def _authority_end(url: str) -> int:
    """Where the user information of ``url`` ends; 0 if it has none."""
    match = _USERINFO.search(url)
    return match.end() if match else 0
