"""Folders and files that go as a whole. Standard library only."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path


def remove(path: Path, trash: Path) -> None:
    """Remove a folder or file: away from its name at once, so that nobody sees half of one, and from the disk then.

    ``trash`` is a folder on the same file system; whatever earlier removals have left there goes too. Returns if there
    is nothing; what cannot be removed stays. Blocks for as long as the disk takes.
    """
    try:
        trash.mkdir(parents=True, exist_ok=True)
        os.rename(path, trash / f"trash-{uuid.uuid4().hex}")
    except FileNotFoundError:
        pass
    except OSError:  # something is mounted there, or Windows has a file of it open
        delete(path)
    empty(trash)


def empty(trash: Path) -> None:
    """Remove what removals that were killed, or disturbed by somebody who still wrote there, have left."""
    for each in trash.glob("trash-*"):
        delete(each)


def delete(path: Path) -> None:
    """Remove a folder, also one with folders without permissions in it, as packages bring and programs make them; or a
    file. What is not there, or cannot be removed, is passed over."""
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(OSError):
            path.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.is_dir():
        _open_up(path)
        shutil.rmtree(path, ignore_errors=True)


def _open_up(path: Path) -> None:
    """Permission for the owner on each folder; on nothing that a link points to."""
    with contextlib.suppress(OSError):
        path.chmod(0o700)
    for folder, subfolders, _ in os.walk(path):
        for each in (os.path.join(folder, name) for name in subfolders):
            with contextlib.suppress(OSError):
                if not os.path.islink(each):
                    os.chmod(each, 0o700)
