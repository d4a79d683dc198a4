"""What locking and materialising tell a person who waits. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One step of the work. ``total``: 0 while unknown; ``unit``: ``packages``, ``bytes``, or empty for a bare step."""

    step: str
    done: int = 0
    total: int = 0
    unit: str = ""
    detail: str = ""

    def __str__(self) -> str:
        count = ""
        if self.unit == "bytes":
            count = f" {self.done / 1e6:.1f}" + (f" of {self.total / 1e6:.1f} MB" if self.total else " MB")
        elif self.unit:
            count = f" {self.done}" + (f" of {self.total}" if self.total else "") + f" {self.unit}"
        return f"{self.step}{count}" + (f": {self.detail}" if self.detail else "")


#: Called from the working thread, or from one of its download threads; must not block.
Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """The report of somebody who does not watch."""
