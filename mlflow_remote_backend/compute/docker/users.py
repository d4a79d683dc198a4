"""Whose files a container's are: the engine takes names, a tar archive wants numbers. Pure."""

from __future__ import annotations


def numeric(user: str, passwd: str, group: str) -> tuple[int, int]:
    """Uid and gid of ``user`` (``NAME|UID[:GROUP|GID]``, empty for root) by the image's own tables.

    As the engine resolves them: without a group it is the user's own, and root's for a user without an entry.
    """
    name, _, wanted = user.partition(":")
    entry = _entry(passwd, name or "root")
    uid = int(name) if name.isdigit() else _number(entry, 2)
    if not wanted:
        return uid, _number(entry, 3)
    return uid, int(wanted) if wanted.isdigit() else _number(_entry(group, wanted), 2)


def needs_tables(user: str) -> bool:
    """Whether the numbers cannot be told without the image's tables."""
    name, _, group = user.partition(":")
    return not (name.isdigit() and group.isdigit())


def _entry(table: str, key: str) -> list[str]:
    """The line whose name, or whose number, is ``key``."""
    lines = [line.split(":") for line in table.splitlines()]
    by = 2 if key.isdigit() else 0
    return next((fields for fields in lines if len(fields) > 2 and fields[by] == key), [])


def _number(entry: list[str], field: int) -> int:
    return int(entry[field]) if len(entry) > field and entry[field].isdigit() else 0
