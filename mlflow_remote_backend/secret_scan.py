"""Bytes of a file -> the credentials that stand in them, as rule and line. Pure; never returns a credential's text.

A small table of our own, on purpose. The well-kept scanners (detect-secrets, gitleaks, trufflehog) audit whole
repositories: they are slow on data files or another language's binary, and their entropy and ``password = …`` rules
report so much that people would switch the check off. Here a finding stops a submission, so a rule is in the table
only if it cannot be mistaken: a vendor's own prefix and length, or a key's own armour. Their marks for a line that is
meant (``pragma: allowlist secret``, ``gitleaks:allow``) are honoured.

Not found: passwords without such a form, secrets inside compressed files, text in UTF-16, and whatever stands after
the first ``SCAN_BYTES`` of a file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

SCAN_BYTES = 32 << 20  # of a file: anything longer is data, and scanning it all would cost more than sending it


@dataclass(frozen=True)
class Rule:
    """``needle``: bytes that every match contains; without them the slower expression need not be tried."""

    name: str
    needle: bytes
    expression: re.Pattern[bytes]


@dataclass(frozen=True)
class Finding:
    """A credential in a file. ``line`` counts from 1."""

    line: int
    rule: str


def _token(name: str, prefix: str, body: str) -> Rule:
    """A token with a prefix of its own, which stands alone: no letter or digit before or after it.

    The look behind comes after the prefix, because ``re`` searches fast only for what begins with fixed bytes.
    """
    fixed = re.escape(prefix)
    return Rule(
        name, prefix.encode(), re.compile(rf"{fixed}(?<![A-Za-z0-9_-]{fixed})(?:{body})(?![A-Za-z0-9])".encode())
    )


# A header alone is also what programs compare with; a key has a body, or its header a line to itself. Inside JSON
# and quoted strings the line break is written as \n.
_ARMOUR = rb"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
_PRIVATE_KEY = re.compile(
    rb"(?m:^)[ \t>|]*" + _ARMOUR + rb"[ \t\r]*(?m:$)"
    rb"|" + _ARMOUR + rb"(?:\s|\\[nr]|[\"'+,\\])*[A-Za-z0-9+/=]{16,}"
)

RULES = (
    Rule("private key", b"PRIVATE KEY", _PRIVATE_KEY),
    Rule(
        "client key of a kubeconfig", b"client-key-data", re.compile(rb"client-key-data['\"]?:\s*['\"]?LS0tLS1CRUdJTi")
    ),
    _token("AWS access key id", "AKIA", r"[A-Z0-9]{16}"),
    _token("AWS temporary access key id", "ASIA", r"[A-Z0-9]{16}"),
    Rule(
        "AWS secret access key",
        b"ecret",
        re.compile(rb"ecret_?[aA]ccess_?[kK]ey['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9+/]{40}(?![A-Za-z0-9+/=])"),
    ),
    Rule(
        "AWS secret access key",
        b"SECRET_ACCESS_KEY",
        re.compile(rb"SECRET_ACCESS_KEY['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9+/]{40}(?![A-Za-z0-9+/=])"),
    ),
    Rule("Azure storage key", b"AccountKey=", re.compile(rb"AccountKey=[A-Za-z0-9+/]{86}==")),
    _token("Google API key", "AIza", r"[A-Za-z0-9_-]{35}"),
    _token("Google OAuth client secret", "GOCSPX-", r"[A-Za-z0-9_-]{28}"),
    *(_token("GitHub token", f"gh{kind}_", r"[A-Za-z0-9]{36,251}") for kind in "pousr"),
    _token("GitHub token", "github_pat_", r"[A-Za-z0-9_]{50,}"),
    _token("GitLab token", "glpat-", r"[A-Za-z0-9_.-]{20,}"),
    _token("Slack token", "xox", r"[abeoprs]-(?=[A-Za-z-]*[0-9])[A-Za-z0-9-]{15,}"),
    Rule(
        "Slack webhook",
        b"hooks.slack.com/",
        re.compile(rb"hooks\.slack\.com/services/T[A-Z0-9]{8,}/B[A-Z0-9]{8,}/[A-Za-z0-9]{20,}"),
    ),
    _token("Hugging Face token", "hf_", r"[A-Za-z0-9]{30,}"),
    _token("OpenAI or Anthropic key", "sk-", r"(?:proj|svcacct|admin|ant)-[A-Za-z0-9_-]{32,}|[A-Za-z0-9]{32,}"),
    _token("Databricks token", "dapi", r"[0-9a-f]{32}(?:-[0-9])?"),
    *(_token("Stripe key", f"{kind}k_live_", r"[A-Za-z0-9]{24,}") for kind in "sr"),
    _token("SendGrid key", "SG.", r"[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"),
    _token("npm token", "npm_", r"[A-Za-z0-9]{36}"),
    _token("package index token", "pypi-", r"[A-Za-z0-9_-]{85,}"),
    # A JSON Web Token, by how its first field can begin: {"alg":, {"typ":, {"kid":
    _token(
        "JSON Web Token", "eyJ", r"(?:hbGciOi|0eXAiOi|raWQiOi)[A-Za-z0-9_-]*\.eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{20,}"
    ),
)

#: Names the table: what was found clean by another one has to be looked at again.
VERSION = hashlib.sha256(repr([(rule.needle, rule.expression.pattern) for rule in RULES]).encode()).hexdigest()[:16]

_ALLOWED_LINE = re.compile(rb"pragma:\s*allowlist\s+secret|gitleaks:allow")
_PLACEHOLDER = re.compile(rb"[xX0*.]{8}")  # what people write where a token belongs


def find(data: bytes) -> tuple[Finding, ...]:
    """The credentials in the first SCAN_BYTES of ``data``, by line, at most one per line and rule."""
    found = set()
    for rule in RULES:
        line, counted_to = 1, 0
        for match in _matches(rule, data):
            if not _PLACEHOLDER.search(match[0]) and not _ALLOWED_LINE.search(_line_at(data, match.start())):
                line += data.count(b"\n", counted_to, match.start())
                counted_to = match.start()
                found.add((line, rule.name))
    return tuple(Finding(line, name) for line, name in sorted(found))


def _matches(rule: Rule, data: bytes) -> Iterator[re.Match[bytes]]:
    if data.find(rule.needle, 0, SCAN_BYTES) < 0:
        return iter(())
    return rule.expression.finditer(data, 0, SCAN_BYTES)


def _line_at(data: bytes, offset: int) -> bytes:
    """The line that holds ``offset``, or the 4 KiB around it: a file of one line can have any length."""
    start = max(data.rfind(b"\n", max(offset - 2048, 0), offset) + 1, offset - 2048)
    end = data.find(b"\n", offset, offset + 2048)
    return data[start : end if end >= 0 else offset + 2048]
