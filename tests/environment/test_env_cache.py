"""The cache: what is listed, what is pruned, what never is, and who may build."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from bench import Bench

from mlflow_remote_backend import file_lock
from mlflow_remote_backend.environment import activation, cache, lease, materialise

DAY_S = 86400.0


def environment(root: Path, key: str, *, age_s: float = 0.0, complete: bool = True) -> Path:
    """An environment that was last used ``age_s`` ago; the marker is all that the cache looks at."""
    prefix = cache.prefix(root, key)
    (prefix / "lib").mkdir(parents=True)
    (prefix / "lib/module.py").write_text("x = 1\n")
    if complete:
        (prefix / cache.MARKER).write_text(json.dumps({"prefix": str(prefix), "kind": "requirements", "packages": 3}))
    age(prefix, age_s)
    return prefix


def age(path: Path, age_s: float) -> None:
    then = time.time() - age_s
    for each in [*path.rglob("*"), path]:
        os.utime(each, (then, then))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# ---------------------------------------------------------------------------------------------- found


def test_only_a_marked_prefix_at_its_own_path_is_a_hit(root: Path) -> None:
    prefix = environment(root, "abc")
    assert cache.hit(root, "abc") == prefix
    (prefix / cache.MARKER).write_text("{}")
    assert cache.hit(root, "abc") is None
    (prefix / cache.MARKER).write_text("half a mark")
    assert cache.hit(root, "abc") is None
    environment(root, "def", complete=False)
    assert cache.hit(root, "def") is None
    assert cache.hit(root, "nothere") is None


def test_a_hit_notes_the_time(root: Path) -> None:
    environment(root, "abc", age_s=DAY_S)
    cache.hit(root, "abc")
    (entry,) = cache.entries(root)
    assert time.time() - entry.last_used < 60


@pytest.mark.parametrize("key", ["", "..", "../../etc", "a/b", "a.b", "a b"])
def test_a_key_cannot_lead_out_of_the_cache(root: Path, key: str) -> None:
    with pytest.raises(ValueError, match="no lock key"):
        cache.hit(root, key)


def test_the_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_root() == tmp_path / "mlflow-remote"
    monkeypatch.setenv("MLFLOW_REMOTE_CACHE", "~/elsewhere")
    assert cache.default_root() == Path.home() / "elsewhere"
    monkeypatch.delenv("MLFLOW_REMOTE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.default_root() == Path.home() / ".cache/mlflow-remote"


def test_entries_tell_size_age_and_state(root: Path) -> None:
    environment(root, "old", age_s=DAY_S)
    environment(root, "new")
    environment(root, "broken", age_s=2 * DAY_S, complete=False)
    listed = cache.entries(root)
    assert [(entry.lock_key, entry.complete) for entry in listed] == [("new", True), ("old", True), ("broken", False)]
    assert listed[0].packages == 3
    assert listed[0].size_bytes > 6


def test_an_empty_cache_lists_and_prunes_nothing(root: Path) -> None:
    assert cache.entries(root) == ()
    assert cache.prune(root) == cache.Pruned()


# ---------------------------------------------------------------------------------------------- pruned


def test_what_was_not_used_for_long_goes_and_the_rest_stays(root: Path) -> None:
    environment(root, "old", age_s=40 * DAY_S)
    environment(root, "broken", age_s=40 * DAY_S, complete=False)
    kept = environment(root, "new", age_s=20 * DAY_S)
    planned = cache.prune(root, dry_run=True)
    assert set(planned.environments) == {"old", "broken"}
    assert len(cache.entries(root)) == 3
    done = cache.prune(root)
    assert done.environments == planned.environments
    assert done.bytes > 0
    assert [entry.path for entry in cache.entries(root)] == [kept]
    assert not list((root / "tmp").iterdir())


def test_an_environment_that_says_it_is_used_stays(root: Path) -> None:
    environment(root, "old", age_s=40 * DAY_S)
    with cache.using(root, "old"):
        assert cache.prune(root, 0).kept_in_use == ("old",)
    assert cache.prune(root, 0).environments == ("old",)


def test_a_user_that_died_does_not_keep_an_environment_for_ever(root: Path) -> None:
    environment(root, "old", age_s=40 * DAY_S)
    with cache.using(root, "old"):
        (user,) = (root / "envs/old.users").iterdir()
        then = time.time() - 2 * cache.USER_STALE_S
        os.utime(user, (then, then))
        assert cache.prune(root).environments == ("old",)


def test_a_user_shows_signs_of_life(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "USER_BEAT_S", 0.02)
    environment(root, "abc")
    with cache.using(root, "abc"):
        (user,) = (root / "envs/abc.users").iterdir()
        os.utime(user, (0, 0))
        wait_until(lambda: user.stat().st_mtime > 0)
    assert not list((root / "envs/abc.users").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_an_environment_that_a_process_was_started_in_stays(root: Path) -> None:
    prefix = environment(root, "old", age_s=40 * DAY_S)
    environ = {**os.environ, **activation.activation(prefix)}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environ) as process:
        assert cache.prune(root).kept_in_use == ("old",)
        process.communicate(b"\n")
    assert cache.prune(root).environments == ("old",)


def test_an_environment_that_is_being_built_stays(root: Path) -> None:
    prefix = environment(root, "old", age_s=40 * DAY_S, complete=False)
    with lease.hold(prefix):
        assert cache.prune(root).kept_in_use == ("old",)
    assert cache.prune(root).environments == ("old",)


def test_an_environment_used_since_it_was_listed_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(root, "old", age_s=40 * DAY_S)
    listed = cache.entries(root)
    monkeypatch.setattr(cache, "entries", lambda root: listed)
    cache.hit(root, "old")
    assert cache.prune(root).environments == ()


def test_folders_without_write_permission_go_too(root: Path) -> None:
    prefix = environment(root, "old")
    (prefix / "lib").chmod(0o500)
    age(prefix, 40 * DAY_S)
    assert cache.prune(root).environments == ("old",)
    assert not list((root / "tmp").iterdir())


def test_archives_locks_and_leftovers_go_by_their_age(root: Path) -> None:
    for name in ("archives/aa/x.conda", "locks/bb/ref.json", "tmp/tool-x/file", "archives/new/y.conda"):
        file = root / name
        file.parent.mkdir(parents=True)
        file.write_text("x")
    for folder in ("archives/aa", "locks/bb", "tmp/tool-x"):
        age(root / folder, 40 * DAY_S)
    assert cache.prune(root).files == 3
    assert {path.name for path in root.rglob("*") if path.is_file()} == {"y.conda", cache.BUILDS}


def test_packages_go_when_nothing_was_built_for_long_and_not_during_a_build(root: Path) -> None:
    for name in ("pkgs", "uv"):
        (root / name / "thing").mkdir(parents=True)
    (root / cache.BUILDS).touch()
    with lease.sharing(root / cache.BUILDS):
        age(root / cache.BUILDS, 40 * DAY_S)
        assert cache.prune(root).files == 0
    age(root / cache.BUILDS, 40 * DAY_S)
    assert cache.prune(root, dry_run=True).files == 2, "looking is not using"
    assert cache.prune(root).files == 2
    assert not (root / "pkgs").exists()


def test_archives_stay_during_a_build(root: Path) -> None:
    (root / "archives/aa").mkdir(parents=True)
    (root / "archives/aa/x.conda").write_text("x")
    with lease.sharing(root / cache.BUILDS):
        assert cache.prune(root, 0).files == 0
    assert cache.prune(root, 0).files == 1


def test_an_archive_used_while_others_are_removed_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("aa", "bb"):
        (root / "archives" / name).mkdir(parents=True)
        age(root / "archives" / name, 40 * DAY_S)
    discard = cache.discard

    def discard_while_others_are_used(root: Path, path: Path) -> None:
        discard(root, path)
        for other in (root / "archives").iterdir():
            os.utime(other)

    monkeypatch.setattr(cache, "discard", discard_while_others_are_used)
    assert cache.prune(root).files == 1
    assert len(list((root / "archives").iterdir())) == 1


@pytest.mark.parametrize(
    ("gone", "look"),
    [("archives/aa", "iterdir"), ("archives/file", "is_dir"), ("tmp/tool-x", "iterdir"), ("envs/old.users", "iterdir")],
)
def test_what_vanishes_while_it_is_looked_at_is_passed_over(
    root: Path, monkeypatch: pytest.MonkeyPatch, gone: str, look: str
) -> None:
    """Somebody else prunes, or a tool's private folder goes with the tool."""
    environment(root, "old", age_s=40 * DAY_S)
    for name in ("archives/aa/x.conda", "archives/file", "tmp/tool-x/file", "envs/old.users/host-1"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    for folder in ("archives", "tmp", "envs/old.users"):
        age(root / folder, 40 * DAY_S)
    original = getattr(Path, look)

    def look_too_late(path: Path) -> object:
        if path == root / gone and os.path.lexists(path):
            path.rename(root / "gone")
        return original(path)

    monkeypatch.setattr(Path, look, look_too_late)
    done = cache.prune(root)
    assert done.files == (3 if gone == "envs/old.users" else 2)
    assert done.environments == ("old",)


def test_a_pruned_environment_is_built_again(bench: Bench) -> None:
    ref = bench.python_env("peel").lock("uv")
    prefix = materialise.materialise(ref, bench.root)
    done = cache.prune(bench.root, 0)
    assert done.environments == (ref.lock_key,)
    assert not prefix.exists()
    assert materialise.materialise(bench.lock("uv"), bench.root) == prefix


def test_a_downloaded_python_stays_while_an_environment_is_built_on_it(root: Path) -> None:
    for release in ("cpython-3.11", "cpython-3.12"):
        (root / "python" / release / "bin").mkdir(parents=True)
        (root / "python" / release / "bin/python").touch()
    prefix = environment(root, "abc")
    (prefix / "bin").mkdir()
    (prefix / "bin/python").symlink_to(root / "python/cpython-3.11/bin/python")
    (root / cache.BUILDS).touch()
    age(root / cache.BUILDS, 40 * DAY_S)
    cache.prune(root)
    assert [path.name for path in (root / "python").iterdir()] == ["cpython-3.11"]


# ---------------------------------------------------------------------------------------------- one at a time


def wait_until(condition: object, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


@pytest.fixture(params=["flock", "no flock"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file system's locks, there and not there; lives pass fast."""
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "STALE_S", 1.0)
    if request.param == "no flock":

        def unsupported(descriptor: int, *, shared: bool = False) -> bool:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(file_lock, "try_lock", unsupported)
    return str(request.param)


def test_nobody_else_gets_in_and_the_next_one_does(tmp_path: Path, locks: str) -> None:
    inside, most = [], []

    def work() -> None:
        for _ in range(5):
            with lease.hold(tmp_path / "x"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert most == [1] * 20
    assert {path.name for path in tmp_path.iterdir()} <= {"x.lock"}


def test_who_does_not_want_to_wait_is_told(tmp_path: Path, locks: str) -> None:
    with lease.hold(tmp_path / "x"), pytest.raises(lease.Busy), lease.hold(tmp_path / "x", wait=False):
        pytest.fail("two at once")
    with lease.hold(tmp_path / "x", wait=False):
        pass


def test_a_waiter_says_once_that_it_waits(tmp_path: Path, locks: str) -> None:
    told: list[bool] = []
    with contextlib.ExitStack() as first:
        first.enter_context(lease.hold(tmp_path / "x"))
        second = threading.Thread(target=_hold_briefly, args=(tmp_path / "x", told))
        second.start()
        wait_until(lambda: told)
    second.join(timeout=20)
    assert told == [True]


def _hold_briefly(path: Path, told: list[bool]) -> None:
    with lease.hold(path, waiting=lambda: told.append(True)):
        pass


def test_a_living_holder_keeps_it_beyond_the_time_of_an_abandoned_one(tmp_path: Path, locks: str) -> None:
    taken: list[bool] = []
    with lease.hold(tmp_path / "x") as held:
        other = threading.Thread(target=_hold_briefly, args=(tmp_path / "x", []), daemon=True)
        other.start()
        began = time.monotonic()
        while time.monotonic() - began < 2 * lease.STALE_S:
            held.check()
            taken.append(other.is_alive())
            time.sleep(0.02)
    assert all(taken)
    other.join(timeout=20)


def test_a_dead_process_of_this_machine_is_followed_at_once(
    tmp_path: Path, locks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_S", 3600.0)
    program = (
        "import os, sys, pathlib\nfrom mlflow_remote_backend.environment import lease\n"
        "with lease.hold(pathlib.Path(sys.argv[1])):\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], check=False)
    assert (tmp_path / "x.lease").exists()
    with lease.hold(tmp_path / "x", wait=False) as held:
        held.check()


def test_an_abandoned_lease_of_another_machine_is_taken_over_after_a_while(tmp_path: Path, locks: str) -> None:
    foreign = {"token": "theirs", "host": "elsewhere", "boot": "b", "pid": os.getpid()}
    (tmp_path / "x.lease").write_text(json.dumps(foreign))
    os.utime(tmp_path / "x.lease", (2**33, 2**33))  # a clock that is far ahead
    began = time.monotonic()
    with lease.hold(tmp_path / "x") as held:
        held.check()
    assert time.monotonic() - began >= lease.STALE_S


def test_a_renewed_lease_of_another_machine_is_respected(tmp_path: Path, locks: str) -> None:
    foreign = tmp_path / "x.lease"
    foreign.write_text(json.dumps({"token": "theirs", "host": "elsewhere", "boot": "b", "pid": 1}))
    told: list[bool] = []
    waiter = threading.Thread(target=_hold_briefly, args=(tmp_path / "x", told), daemon=True)
    waiter.start()
    began = time.monotonic()
    while time.monotonic() - began < 2 * lease.STALE_S:
        os.utime(foreign)
        assert waiter.is_alive()
        time.sleep(0.02)
    foreign.unlink()
    waiter.join(timeout=20)
    assert told == [True]


def test_who_lost_its_lease_is_told_before_it_finishes(tmp_path: Path, locks: str) -> None:
    with lease.hold(tmp_path / "x") as held:
        (tmp_path / "x.lease").write_text(json.dumps({"token": "theirs"}))
        with pytest.raises(lease.Lost):
            held.check()
    assert json.loads((tmp_path / "x.lease").read_text()) == {"token": "theirs"}, "another's lease is left alone"


def test_an_empty_lease_is_an_abandoned_one(tmp_path: Path, locks: str) -> None:
    (tmp_path / "x.lease").touch()
    with lease.hold(tmp_path / "x") as held:
        held.check()


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, locks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", unsupported)
    with lease.hold(tmp_path / "x") as held:
        held.check()
        with pytest.raises(lease.Busy), lease.hold(tmp_path / "x", wait=False):
            pytest.fail("two at once")


def test_a_builder_that_slept_through_its_lease_yields_to_the_one_that_took_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = bench.python_env("peel").lock("uv")
    build = materialise._build
    seen: list[int] = []

    def slow(*arguments: object) -> object:
        marker = build(*arguments)  # type: ignore[arg-type]
        seen.append(1)
        if len(seen) == 1:  # meanwhile somebody else took over, and has gone again
            file = cache.prefix(bench.root, ref.lock_key)
            file.with_name(file.name + ".lease").unlink()
        return marker

    monkeypatch.setattr(materialise, "_build", slow)
    assert materialise.materialise(ref, bench.root) == cache.hit(bench.root, ref.lock_key)
    assert len(seen) == 2


@pytest.mark.parametrize("error", [OSError("the folder is not mine any more"), KeyboardInterrupt()])
def test_a_builder_that_lost_its_lease_leaves_alone_what_the_one_that_took_over_has_built(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    ref = bench.python_env("peel").lock("uv")
    build = materialise._build

    def fails_late(*arguments: object) -> object:
        monkeypatch.setattr(materialise, "_build", build)
        lease_file = cache.prefix(bench.root, ref.lock_key).with_name(f"{ref.lock_key}.lease")
        lease_file.write_text(json.dumps({"token": "theirs"}))
        materialise._write_marker(prefix, build(*arguments))  # type: ignore[arg-type]
        lease_file.unlink()
        raise error

    prefix = cache.prefix(bench.root, ref.lock_key)
    monkeypatch.setattr(materialise, "_build", fails_late)
    with contextlib.suppress(KeyboardInterrupt):
        assert materialise.materialise(ref, bench.root, bench.progress.append) == prefix
    assert cache.hit(bench.root, ref.lock_key) == prefix
    assert [progress.step for progress in bench.progress].count("installing") == 1
