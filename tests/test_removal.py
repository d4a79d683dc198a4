"""What is removed is gone: at once from its name, and from the disk."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_remote_backend import removal
from mlflow_remote_backend.environment import cache
from mlflow_remote_backend.runner.run_folder import RunFolder

NOBODY = 65534


@pytest.fixture
def everybodys() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


def filled(folder: Path) -> Path:
    (folder / "some" / "deep" / "folder").mkdir(parents=True)
    (folder / "some" / "deep" / "file").touch()
    return folder


def test_who_looks_while_a_run_folder_is_removed_makes_nothing_anew_in_it(tmp_path: Path) -> None:
    left = []
    for number in range(50):
        folder = RunFolder(f"run{number}", tmp_path)
        for each in range(20):
            filled(folder.path / str(each))
        over, looked = threading.Event(), threading.Event()

        def look(folder: RunFolder = folder, over: threading.Event = over, looked: threading.Event = looked) -> None:
            while not over.is_set():
                lock = folder.try_lock()
                looked.set()
                if lock is not None:
                    os.close(lock)

        looking = threading.Thread(target=look)
        looking.start()
        looked.wait()
        folder.remove()
        over.set()
        looking.join()
        left += [folder.path] * folder.exists()
    assert left == []
    assert not any((tmp_path / "trash").iterdir())


@pytest.mark.parametrize("mode", [0o000, 0o300, 0o500])
def test_folders_without_permissions_go_too(everybodys: Path, mode: int) -> None:
    """Root needs no permission, so it is somebody else who tries."""
    doomed, kept = filled(everybodys / "doomed"), filled(everybodys / "kept")
    kept.chmod(0o500)
    (doomed / "some" / "link").symlink_to(kept)
    (doomed / "some" / "deep").chmod(mode)
    (doomed / "some").chmod(mode)
    if os.getuid() == 0:
        for each in (doomed, kept):
            subprocess.run(["chown", "-Rh", str(NOBODY), str(each)], check=True)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(PermissionError):
            os.setuid(NOBODY)
        removal.remove(doomed, everybodys / "trash")
        os._exit(0)
    os.waitpid(child, 0)
    assert not doomed.exists()
    assert not list((everybodys / "trash").iterdir())
    assert kept.stat().st_mode & 0o777 == 0o500
    kept.chmod(0o700)


def test_what_a_killed_removal_left_goes_with_the_next(tmp_path: Path) -> None:
    filled(tmp_path / "trash" / "trash-of-somebody")
    removal.remove(tmp_path / "nothing", tmp_path / "trash")
    assert not list((tmp_path / "trash").iterdir())


def test_files_that_are_pruned_leave_the_disk(tmp_path: Path) -> None:
    archive = tmp_path / "archives" / "package.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(b"package")
    os.utime(archive, (0, 0))
    assert cache.prune(tmp_path).files == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / cache.BUILDS]
