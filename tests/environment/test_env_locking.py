"""From a declaration to a lock: solved once, ordinary, verified against what is committed, and clear when it fails."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from bench import Bench
from channel import OTHER_SUBDIR, PYTHON_MINOR, PYTHON_VERSION, SUBDIR, make_channel, stub_python, toy, write_package
from channel import index as index_channel
from wheels import Index, git_repository, serving, wheel

from mlflow_remote_backend.environment import conda_shim, indexes, lockfile, locking, requirements, spec, uv
from mlflow_remote_backend.errors import EnvironmentError_
from mlflow_remote_backend.job import EnvironmentRef


def rows(ref: EnvironmentRef) -> dict[str, str]:
    """Name and version of what a lock holds."""
    if ref.kind == "conda-lock":
        found = lockfile.conda_lock_rows(lockfile.load_conda_lock(ref.lock), ref.platform)
    else:
        listed = requirements.expand_text(ref.lock, folder=Path(), where="lock")
        found = lockfile.requirements_rows(listed, "lock")
    return {row.name: row.version for row in found}


# ---------------------------------------------------------------------------------------------- conda


def test_a_conda_yaml_becomes_an_ordinary_conda_lock(bench: Bench, tmp_path: Path) -> None:
    ref = bench.conda(f"python={PYTHON_MINOR}", "toyapp", pip=("fruit[peeled]",)).lock()
    assert (ref.manager, ref.kind, ref.platform) == ("conda", "conda-lock", SUBDIR)
    assert rows(ref) == {
        "python": PYTHON_VERSION,
        "toyapp": "2.0",
        "toylib": "1.1",
        "pip": rows(ref)["pip"],
        "fruit": "1.0",
        "needed": "2.0",
        "peel": "0.1",
    }
    lock = tmp_path / "conda-lock.yml"
    lock.write_text(ref.lock)
    command = [sys.executable, "-m", "conda_lock", "render", "-k", "explicit", "-p", SUBDIR, str(lock)]
    rendered = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "toyapp-2.0" in (tmp_path / f"conda-{SUBDIR}.lock").read_text(), rendered.stderr


def test_pip_neither_installs_nor_changes_what_conda_brings(bench: Bench) -> None:
    ref = bench.conda(f"python={PYTHON_MINOR}", "toylib=1.1", pip=("uses-toylib",)).lock()
    pip = [row["name"] for row in yaml.safe_load(ref.lock)["package"] if row["manager"] == "pip"]
    assert pip == ["uses-toylib"]


def test_an_extra_of_what_conda_brings_is_not_left_out_in_silence(bench: Bench) -> None:
    bench.channel = make_channel(bench.root.parent / "fruity", packages=[toy("fruit", "1.0")])
    ref = bench.conda(f"python={PYTHON_MINOR}", "fruit", pip=("fruit[peeled]",)).lock()
    assert "peel" not in rows(ref)
    assert any("fruit[peeled]" in notice for notice in ref.notices)
    told: list[str] = []
    locking.write_lock(bench.load(), bench.root, lock_for=[SUBDIR], warn=told.append)
    assert any("fruit[peeled]" in notice for notice in told)


def test_a_pip_requirement_that_contradicts_conda_is_a_conflict_in_the_solvers_words(bench: Bench) -> None:
    bench.conda(f"python={PYTHON_MINOR}", "toylib=1.1", pip=("toylib>2",))
    with pytest.raises(EnvironmentError_) as refused:
        bench.lock()
    assert "toylib" in refused.value.words
    assert "1.1" in refused.value.words


def test_both_platforms_are_locked_from_either(bench: Bench) -> None:
    ref = bench.conda(f"python={PYTHON_MINOR}", "toyapp").lock(platform=OTHER_SUBDIR)
    document = yaml.safe_load(ref.lock)
    assert {row["platform"] for row in document["package"]} == {OTHER_SUBDIR}
    assert ref.lock_key != bench.lock().lock_key


def test_a_cuda_version_is_there_only_if_asked_for(bench: Bench, tmp_path: Path) -> None:
    bench.channel = make_channel(tmp_path / "gpu", packages=[toy("gputoy", "1.0", ("python", "__cuda >=12"))])
    bench.conda(f"python={PYTHON_MINOR}", "gputoy")
    with pytest.raises(EnvironmentError_, match="__cuda"):
        bench.lock()
    assert "gputoy" in rows(bench.lock(cuda="12.4"))


# ---------------------------------------------------------------------------------------------- python_env


def test_a_python_env_becomes_hashed_requirements_that_pip_reads(bench: Bench) -> None:
    bench.python_env("fruit[peeled]", "mlflow ; sys_platform == 'linux'", build=("wheel",))
    ref = bench.lock("uv")
    assert rows(ref) == {"fruit": "1.0", "needed": "2.0", "peel": "0.1", "mlflow": "3.17.2", "wheel": "0.43"}
    assert ref.lock.count("--hash=sha256:") == 5
    assert bench.index.url not in ref.lock


def test_markers_are_those_of_the_target_and_not_of_this_machine(bench: Bench) -> None:
    bench.python_env("fruit ; platform_machine == 'aarch64'", "peel ; platform_machine == 'x86_64'")
    assert "fruit" in rows(bench.lock("uv", platform="linux-aarch64"))
    assert "peel" in rows(bench.lock("uv", platform="linux-64"))


def test_the_best_wheel_of_the_target_is_locked(bench: Bench) -> None:
    for tag in (
        "py3-none-any",
        "cp311-cp311-manylinux_2_17_x86_64",
        "cp311-cp311-manylinux_2_17_aarch64",
        "cp312-cp312-manylinux_2_17_x86_64",
        "cp39-abi3-manylinux_2_17_x86_64",
        "cp311-cp311-win_amd64",
        "cp311-cp311-manylinux_2_39_x86_64",
    ):
        bench.index.add(wheel("native", "1.0", tag=tag, body=f"tag = {tag!r}\n"))
    bench.python_env("native", python="3.11")
    (url,) = bench.lock("uv", platform="linux-64").files.values()
    assert url.endswith("native-1.0-cp311-cp311-manylinux_2_17_x86_64.whl")
    (url,) = bench.lock("uv", platform="linux-aarch64").files.values()
    assert url.endswith("native-1.0-cp311-cp311-manylinux_2_17_aarch64.whl")
    bench.python_env("native", python="3.10")
    (url,) = bench.lock("uv", platform="linux-64").files.values()
    assert url.endswith("native-1.0-cp39-abi3-manylinux_2_17_x86_64.whl")


def test_constraints_hold(bench: Bench) -> None:
    (bench.project / "limits.txt").write_text("needed<2\n")
    assert rows(bench.python_env("mlflow", "-c limits.txt").lock("uv"))["needed"] == "1.0"


def test_digests_that_the_project_states_are_held_to(bench: Bench) -> None:
    (bench.project / "r.txt").write_text(f"fruit==1.0 --hash=sha256:{'0' * 64}\npeel\n")
    bench.python_env("-r r.txt")
    with pytest.raises(EnvironmentError_, match=r"(?i)hash"):
        bench.lock("uv")


# ---------------------------------------------------------------------------------------------- once


def test_an_unchanged_declaration_is_not_solved_again(bench: Bench) -> None:
    first = bench.conda(f"python={PYTHON_MINOR}", "toyapp", pip=("fruit",)).lock()
    asked = len(bench.index.requests)
    bench.progress.clear()
    bench.conda("toyapp", f"python={PYTHON_MINOR}", pip=("Fruit",))
    assert bench.lock() == first
    assert bench.steps() == []
    assert len(bench.index.requests) == asked


def test_the_lock_key_ignores_order_mirrors_and_headers(bench: Bench, channel: Path, tmp_path: Path) -> None:
    first = bench.conda(f"python={PYTHON_MINOR}", "toyapp", pip=("fruit", "peel")).lock()
    bench.index.folders["mirror"] = channel
    with serving(Index(files=dict(bench.index.files))) as other:
        bench.conda("toyapp", f"python={PYTHON_MINOR}", pip=("peel", "fruit"))
        second = bench.lock(channel_map={}, channels=(bench.index.address("mirror"),), index_url=(other.url,))
    assert second.lock != first.lock
    assert second.lock_key == first.lock_key


def test_other_bytes_under_the_same_version_are_another_lock_key(bench: Bench) -> None:
    first = bench.python_env("peel").lock("uv")
    bench.index.add(wheel("peel", "0.1", body="changed = True\n"))
    bench.root = bench.root.with_name("other-cache")
    assert bench.lock("uv").lock_key != first.lock_key


def test_two_processes_lock_once(bench: Bench, tmp_path: Path) -> None:
    bench.python_env("fruit")
    script = (
        "import sys, json, pathlib\n"
        "from mlflow_remote_backend.environment import locking, spec\n"
        "options = spec.EnvironmentOptions(index_url=(sys.argv[3],))\n"
        "declared = spec.load(sys.argv[1], 'python', 'python_env.yaml', 'uv', options)\n"
        "steps = []\n"
        f"ref = locking.lock(declared, {SUBDIR!r}, pathlib.Path(sys.argv[2]), lambda p: steps.append(p.step))\n"
        "print(json.dumps([ref.lock_key, steps]))\n"
    )
    command = [sys.executable, "-c", script, str(bench.project), str(bench.root), bench.index.url]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in running]
    assert len({key for key, _ in answers}) == 1
    assert sum("solving" in steps for _, steps in answers) == 1


def test_a_lock_in_a_cache_that_cannot_be_written_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = bench.python_env("peel").lock()

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.utime", refuse)
    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    assert bench.lock() == locked


def test_a_damaged_cache_entry_is_made_anew(bench: Bench) -> None:
    first = bench.python_env("peel").lock("uv")
    (entry,) = bench.root.glob("locks/*/ref.json")
    entry.write_text(entry.read_text()[:100])
    assert bench.lock("uv") == first


def test_a_missing_mlflow_is_foreseen(bench: Bench) -> None:
    (notice,) = bench.python_env("peel").lock("uv").notices
    assert "import mlflow" in notice
    assert bench.python_env("mlflow").lock("uv").notices == ()


# ---------------------------------------------------------------------------------------------- committed locks


def test_a_committed_conda_lock_of_ours_wins_and_nothing_is_solved(bench: Bench, tmp_path: Path) -> None:
    bench.channel = make_channel(tmp_path / "own", packages=[toy("toyapp", "2.0")])
    bench.conda(f"python={PYTHON_MINOR}", "toyapp", pip=("fruit",))
    written = locking.write_lock(bench.load(), bench.root, lock_for=[SUBDIR, OTHER_SUBDIR])
    assert written == bench.project / "conda-lock.yml"
    write_package(bench.channel, toy("toyapp", "3.0"))
    index_channel(bench.channel)  # solving would find it
    ref = bench.lock(frozen=True)
    assert ref.lock == written.read_text()
    assert "solving" not in bench.steps()
    assert bench.lock(platform=OTHER_SUBDIR, frozen=True).lock_key != ref.lock_key


def test_a_lock_of_another_declaration_is_refused_when_frozen_and_replaced_otherwise(bench: Bench) -> None:
    bench.conda(f"python={PYTHON_MINOR}", "toylib=1.0")
    locking.write_lock(bench.load(), bench.root, lock_for=[SUBDIR])
    bench.conda(f"python={PYTHON_MINOR}", "toylib=1.1")
    with pytest.raises(EnvironmentError_, match=r"made from another conda\.yaml"):
        bench.lock(frozen=True)
    ref = bench.lock()
    assert rows(ref)["toylib"] == "1.1"
    assert "locked anew" in ref.notices[0]


def test_a_committed_lock_without_the_platform_says_so(bench: Bench) -> None:
    bench.conda(f"python={PYTHON_MINOR}")
    locking.write_lock(bench.load(), bench.root, lock_for=[OTHER_SUBDIR])
    with pytest.raises(EnvironmentError_, match=f"does not cover {SUBDIR}, only {OTHER_SUBDIR}"):
        bench.lock(frozen=True)


def test_a_lock_by_conda_lock_itself_counts_if_it_satisfies_the_declaration(bench: Bench) -> None:
    bench.conda(f"python={PYTHON_MINOR}", "toylib>=1.0", pip=("fruit",))
    written = locking.write_lock(bench.load(), bench.root, lock_for=[SUBDIR])
    document = yaml.safe_load(written.read_text())
    del document["metadata"]["custom_metadata"]
    written.write_text(yaml.safe_dump(document))
    assert bench.lock(frozen=True).lock == written.read_text()
    bench.conda(f"python={PYTHON_MINOR}", "toylib<1.1", pip=("fruit>1",))
    with pytest.raises(EnvironmentError_, match=r"does not satisfy conda\.yaml: toylib<1\.1, fruit>1 \(locked: 1\.0\)"):
        bench.lock(frozen=True)


def test_a_written_requirements_lock_covers_all_platforms_and_wins(bench: Bench) -> None:
    bench.python_env("fruit ; sys_platform == 'linux'", "peel ; sys_platform == 'win32'")
    written = locking.write_lock(bench.load(), bench.root)
    assert written == bench.project / "requirements.lock"
    asked = len(bench.index.requests)
    ref = bench.lock(frozen=True)
    assert (ref.lock, len(bench.index.requests)) == (written.read_text(), asked)
    bench.python_env("fruit", "peel")
    with pytest.raises(EnvironmentError_, match="made from another"):
        bench.lock(frozen=True)


def test_a_lock_that_was_checked_out_with_other_line_ends_is_as_stale(bench: Bench) -> None:
    written = locking.write_lock(bench.python_env("fruit").load(), bench.root)
    written.write_bytes(written.read_bytes().replace(b"\n", b"\r\n"))
    assert bench.lock(frozen=True)
    with pytest.raises(EnvironmentError_, match="made from another"):
        bench.python_env("fruit", "needed").lock(frozen=True)


def test_a_lock_that_includes_another_travels_whole(bench: Bench) -> None:
    written = locking.write_lock(bench.python_env("fruit").load("uv"), bench.root)
    written.rename(bench.project / "base.lock")
    written.write_text("-r base.lock\n")
    assert rows(bench.lock("uv", frozen=True)) == {"fruit": "1.0", "needed": "2.0"}
    base = bench.project / "base.lock"
    base.write_text(base.read_text().replace("needed==2.0", "needed==2.1"))
    assert rows(bench.lock("uv", frozen=True)) == {"fruit": "1.0", "needed": "2.1"}


def test_of_a_lock_for_several_pythons_the_row_for_this_one_counts(bench: Bench) -> None:
    lines = [
        f"needed==2.0 ; python_version >= '3' --hash=sha256:{'a' * 64}",
        f"needed==9.0 ; python_version < '3' --hash=sha256:{'b' * 64}",
    ]
    (bench.project / "requirements.lock").write_text("\n".join(lines))
    bench.python_env("needed==2.0")
    assert bench.lock("uv", frozen=True)


def test_a_bare_url_is_looked_for_in_a_committed_lock(bench: Bench) -> None:
    url = bench.index.address("files/peel-0.1-py3-none-any.whl")
    lock = bench.project / "requirements.lock"
    lock.write_text(f"peel @ {url} --hash=sha256:{'a' * 64}\n")
    assert bench.python_env(url).lock("uv", frozen=True)
    lock.write_text(f"needed==2.0 --hash=sha256:{'a' * 64}\n")
    with pytest.raises(EnvironmentError_, match=r"does not satisfy.*peel"):
        bench.lock("uv", frozen=True)


def test_the_default_groups_of_a_pylock_are_taken(bench: Bench) -> None:
    file = f'url = "{bench.index.address("files/peel-0.1-py3-none-any.whl")}", hashes = {{ sha256 = "{"a" * 64}" }}'
    tables = [
        f"[[packages]]\nname = '{name}'\nversion = '0.1'\nmarker = '\"{group}\" in dependency_groups'\n"
        f"wheels = [{{ {file} }}]\n"
        for name, group in (("peel", "default"), ("left-out", "dev"))
    ]
    head = 'lock-version = "1.0"\ndependency-groups = ["dev", "default"]\ndefault-groups = ["default"]\n'
    (bench.project / "pylock.toml").write_text(head + "".join(tables))
    assert rows(bench.python_env("peel").lock("uv", frozen=True)) == {"peel": "0.1"}


def test_a_pylock_counts_if_it_satisfies_the_declaration(bench: Bench) -> None:
    bench.python_env("fruit>=1")
    ref = bench.lock("uv")
    listed = requirements.expand_text(ref.lock, folder=bench.project, where="lock")
    located = [lockfile.located(row, ref.files) for row in lockfile.requirements_rows(listed, "lock")]
    (bench.project / "pylock.toml").write_text(lockfile.render_pylock(located))
    assert bench.lock("uv", frozen=True).lock_key == ref.lock_key
    bench.python_env("fruit>=2")
    with pytest.raises(EnvironmentError_, match=r"pylock\.toml does not satisfy"):
        bench.lock("uv", frozen=True)


def test_a_uv_lock_counts_if_it_satisfies_the_declaration(bench: Bench) -> None:
    bench.python_env("fruit")
    (bench.project / "pyproject.toml").write_text(
        f'[project]\nname = "p"\nversion = "0"\nrequires-python = ">={PYTHON_MINOR}"\ndependencies = ["fruit"]\n'
    )
    command = [uv.executable(), "lock", "--default-index", bench.index.url, "--no-cache", "--python", sys.executable]
    subprocess.run(command, cwd=bench.project, check=True, capture_output=True)
    assert rows(bench.lock("uv", frozen=True)) == {"fruit": "1.0", "needed": "2.0"}


def test_requirements_that_are_all_pinned_and_hashed_are_a_lock_already(bench: Bench) -> None:
    hashed = bench.python_env("fruit").lock("uv").lock
    bench.root = bench.root.with_name("other-cache")
    (bench.project / "requirements.txt").write_text(hashed)
    asked = len(bench.index.requests)
    ref = bench.python_env("-r requirements.txt").lock(frozen=True)
    assert rows(ref) == {"fruit": "1.0", "needed": "2.0"}
    assert len(bench.index.requests) == asked


def test_frozen_without_a_lock_is_refused_with_what_to_do(bench: Bench) -> None:
    with pytest.raises(EnvironmentError_, match=r"(?s)no conda-lock\.yml beside conda\.yaml.*mlflow-remote lock"):
        bench.conda(f"python={PYTHON_MINOR}").lock(frozen=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("sha256:", "sha1:"), "no sha256"),
        (lambda text: text.replace("version: 1\n", "version: 7\n"), "has format 7"),
        (lambda text: "package: []\n", "no lock of conda-lock|has format"),
        (lambda text: text[: len(text) // 2] + "\n\t{", "cannot be read"),
        (lambda text: text.replace("file://", "https://user:" + "word" + "@host.example"), "holds a credential"),
        (lambda text: text.replace("  name: ", "  nom: "), None),
    ],
)
def test_a_damaged_committed_lock_is_an_error_and_never_half_used(bench: Bench, change: object, says: str) -> None:
    bench.conda(f"python={PYTHON_MINOR}")
    (bench.project / "conda-lock.yml").write_text(change(_CONDA_LOCK))  # type: ignore[operator]
    with pytest.raises(EnvironmentError_, match=says):
        bench.lock()


_CONDA_LOCK = f"""
version: 1
metadata: {{content_hash: {{}}, channels: [], platforms: [{SUBDIR}], sources: []}}
package:
- name: python
  version: {PYTHON_VERSION}
  manager: conda
  platform: {SUBDIR}
  dependencies: {{}}
  url: file:///channel/{SUBDIR}/python-{PYTHON_VERSION}-0.conda
  hash:
    md5: {"0" * 32}
    sha256: {"0" * 64}
  category: main
  optional: false
"""


def test_a_platform_that_is_none_is_refused_whatever_is_locked(bench: Bench) -> None:
    with pytest.raises(EnvironmentError_, match="nonsense"):
        locking.write_lock(bench.python_env("fruit").load("uv"), bench.root, lock_for=["nonsense"])
    assert not (bench.project / "requirements.lock").exists()


def test_a_project_without_declaration_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentError_, match="declares no environment"):
        locking.write_lock(spec.load(tmp_path, None, None), tmp_path / "cache")


# ---------------------------------------------------------------------------------------------- errors


def fails(bench: Bench, manager: str | None = None, **options: object) -> EnvironmentError_:
    """The error of a lock that must fail, within seconds, leaving nothing but an empty cache."""
    start = time.monotonic()
    with pytest.raises(EnvironmentError_) as refused:
        bench.lock(manager, **options)
    assert time.monotonic() - start < 45
    assert not list(bench.root.glob("locks/*/*.json"))
    assert not list(bench.root.glob("tmp/*"))
    assert refused.value.hint
    return refused.value


def test_a_conda_package_that_does_not_exist(bench: Bench) -> None:
    error = fails(bench.conda("nosuchpackage"))
    assert "nosuchpackage" in error.words
    assert "spelling" in error.hint
    assert "Traceback" not in str(error)


def test_conda_packages_that_contradict_each_other(bench: Bench) -> None:
    error = fails(bench.conda(f"python={PYTHON_MINOR}", "toyapp", "toylib<1.1"))
    assert "toyapp" in error.words
    assert "toylib" in error.words


def test_a_platform_that_the_channel_does_not_have(bench: Bench) -> None:
    bench.conda("python")
    with pytest.raises(EnvironmentError_, match="ppc64le") as refused:
        bench.lock(platform="linux-ppc64le")
    assert "python" in refused.value.words


def test_a_platform_that_nobody_has(bench: Bench) -> None:
    with pytest.raises(EnvironmentError_, match=r"(?s)linux-mips.*linux-64"):
        bench.conda("python").lock(platform="linux-mips")


def test_an_unknown_requirement(bench: Bench) -> None:
    error = fails(bench.python_env("nosuchthing"), "uv")
    assert "nosuchthing" in error.words
    assert "spelling" in error.hint


def test_requirements_that_contradict_each_other(bench: Bench) -> None:
    error = fails(bench.python_env("fruit", "wants-old"), "uv")
    assert "needed" in error.words
    assert "wants-old" in error.words


def test_a_python_that_is_too_old(bench: Bench) -> None:
    error = fails(bench.python_env("future"), "uv")
    assert "Python" in error.words
    assert "Python version" in error.hint


def test_the_channel_called_defaults(bench: Bench) -> None:
    bench.conda("python", channels="defaults")
    error = fails(bench)
    assert "channel_map" in error.hint
    assert rows(bench.lock(channel_map={"defaults": bench.channel.as_uri()}))["python"] == PYTHON_VERSION


def test_a_channel_folder_that_is_not_there(bench: Bench) -> None:
    error = fails(bench.conda("python"), channel_map={"conda-forge": "file:///no/such/channel"})
    assert "/no/such/channel" in error.words
    assert "environment.channel_map" in error.hint


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_channel_that_refuses_connections(bench: Bench) -> None:
    error = fails(bench.conda("python"), channels=(f"http://127.0.0.1:{closed_port()}/channel",))
    assert "did not answer" in error.hint


def test_a_channel_that_never_answers_costs_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conda_shim, "ANSWER_TIMEOUT_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)  # accepts, and says nothing
        with pytest.raises(OSError, match="timed out"):
            conda_shim.require_answers([f"http://127.0.0.1:{silent.getsockname()[1]}/channel"], SUBDIR)


def test_an_index_that_refuses_connections(bench: Bench) -> None:
    error = fails(bench.python_env("peel"), "uv", index_url=(f"http://127.0.0.1:{closed_port()}/simple",))
    assert "did not answer" in error.hint
    assert "environment.index_url" in error.hint


def test_a_solver_that_is_not_installed(bench: Bench) -> None:
    error = fails(bench.conda("python"), solver="no-such-mamba")
    assert "no-such-mamba" in error.what


def test_an_installed_conda_is_asked_if_it_is_wanted(bench: Bench, tmp_path: Path) -> None:
    installed, witness = tmp_path / "someconda", tmp_path / "witness"
    shim = f'exec "{sys.executable}" -m mlflow_remote_backend.environment.conda_shim "$@"'
    installed.write_text(f'#!/bin/sh\necho "$1" >> "{witness}"\n{shim}\n')
    installed.chmod(0o755)
    assert rows(bench.conda(f"python={PYTHON_MINOR}").lock(solver=str(installed)))["python"] == PYTHON_VERSION
    assert "create" in witness.read_text()


def test_a_cache_that_cannot_be_written(bench: Bench) -> None:
    bench.python_env("peel")
    bench.root = Path("/dev/null") / "cache"
    with pytest.raises(EnvironmentError_, match="MLFLOW_REMOTE_CACHE"):
        bench.lock("uv")


# ---------------------------------------------------------------------------------------------- credentials


@pytest.fixture
def guarded(index: Index, channel: Path) -> Index:
    """An index and a channel that want a name and a password."""
    index.login = ("reader", "pass" + "phrase/+")
    index.folders["channel"] = channel
    return index


def everything_written(root: Path) -> str:
    """All text below the cache, but for uv's own."""
    files = [path for path in root.rglob("*") if path.is_file() and "uv" not in path.relative_to(root).parts]
    return "\n".join(path.read_text(errors="replace") for path in files)


def test_credentials_by_variables_reach_channel_and_index_and_nothing_else(
    bench: Bench, guarded: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert guarded.login is not None
    user, password = guarded.login
    monkeypatch.setenv("READER_USER", user)
    monkeypatch.setenv("READER_PASSWORD", password)
    userinfo = "$READER_USER:${READER_PASSWORD}@"
    ref = bench.conda(f"python={PYTHON_MINOR}", "toyapp", pip=("fruit",)).lock(
        channels=(guarded.address("channel", userinfo),),
        channel_map={},
        index_url=(guarded.address("simple", userinfo),),
    )
    assert {"toyapp", "fruit"} <= set(rows(ref))
    assert password not in json.dumps(ref.__dict__) + everything_written(bench.root)
    assert "READER_PASSWORD" not in ref.lock
    assert any("${READER_PASSWORD}" in line for line in ref.indexes)


def test_credentials_by_netrc(bench: Bench, guarded: Index) -> None:
    assert guarded.login is not None
    netrc = Path.home() / ".netrc"
    netrc.write_text("machine 127.0.0.1 login {} password {}\n".format(*guarded.login))
    netrc.chmod(0o600)
    ref = bench.conda(f"python={PYTHON_MINOR}", pip=("fruit",)).lock(
        channels=(guarded.address("channel"),), channel_map={}, index_url=(guarded.url,)
    )
    assert "fruit" in rows(ref)
    assert guarded.login[1] not in ref.lock


def test_a_password_in_pips_own_settings_is_used_and_never_written(
    bench: Bench, guarded: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert guarded.login is not None
    user, password = guarded.login
    settings = tmp_path / "pip.conf"
    userinfo = f"{user}:{quote(password, safe='')}@"
    settings.write_text(f"[global]\nindex-url = {guarded.address('simple', userinfo)}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    ref = bench.python_env("fruit").lock("uv", index_url=())
    assert "fruit" in rows(ref)
    assert quote(password, safe="") not in json.dumps(ref.__dict__) + everything_written(bench.root)
    assert password in indexes.secrets(ref.indexes).values()


def test_a_variable_that_is_not_set_is_named(bench: Bench) -> None:
    error = fails(bench.python_env("peel"), "uv", index_url=("https://${NOT_SET_ANYWHERE}@host.example/simple",))
    assert "NOT_SET_ANYWHERE" in error.what


def test_a_wrong_password_is_not_shown(bench: Bench, guarded: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRONG", "not-the-" + "passphrase")
    for kind in ("conda", "python"):
        if kind == "conda":
            bench.conda("python")
            options = {"channels": (guarded.address("channel", "reader:$WRONG@"),)}
        else:
            (bench.project / "conda.yaml").unlink()
            bench.python_env("peel")
            options = {"index_url": (guarded.address("simple", "reader:$WRONG@"),)}
        error = fails(bench, **options)
        assert os.environ["WRONG"] not in str(error)
        assert "netrc" in error.hint


# ---------------------------------------------------------------------------------------------- indexes


def test_what_pip_is_configured_with_is_used(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "pip.conf"
    settings.write_text(f"[install]\nindex-url = {bench.index.url}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    assert "fruit" in rows(bench.python_env("fruit").lock("uv", index_url=()))


def test_pips_further_indexes_count_as_much_as_its_first_as_in_pip(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Index().add(wheel("needed", "0.5"), wheel("inner", "1.0", requires=["needed"]))) as inner:
        monkeypatch.setenv("PIP_INDEX_URL", bench.index.url)
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", inner.url)
        assert rows(bench.python_env("inner").lock("uv", index_url=())) == {"inner": "1.0", "needed": "2.0"}


def test_a_namesake_on_a_public_index_does_not_replace_a_private_package(bench: Bench) -> None:
    with serving(Index().add(wheel("needed", "0.5"))) as private:
        ref = bench.python_env("needed").lock("uv", index_url=(bench.index.url, private.url))
    assert rows(ref) == {"needed": "0.5"}


def test_folders_of_this_machine_are_left_out_for_a_job_elsewhere(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, data = wheel("needed", "7.0")
    (tmp_path / name).write_bytes(data)
    monkeypatch.setenv("PIP_INDEX_URL", bench.index.url)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    loaded = bench.python_env("needed").load("uv", index_url=())
    assert rows(locking.lock(loaded, SUBDIR, bench.root))["needed"] == "7.0"
    away = locking.lock(loaded, SUBDIR, bench.root, elsewhere=True)
    assert rows(away)["needed"] == "2.0"
    assert str(tmp_path) not in json.dumps(away.__dict__)


def test_uvs_settings_stand_over_pips(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("UV_DEFAULT_INDEX", bench.index.url)
    assert "fruit" in rows(bench.python_env("fruit").lock("uv", index_url=()))


def test_the_projects_own_index_option_counts(bench: Bench) -> None:
    bench.python_env(f"--index-url {bench.index.url}", "fruit")
    assert "fruit" in rows(bench.lock("uv", index_url=()))


def test_a_developers_uv_settings_do_not_shape_a_lock(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = bench.project / "limits.txt"
    limits.write_text("needed<2\n")
    monkeypatch.setenv("UV_CONSTRAINT", str(limits))
    monkeypatch.setenv("UV_RESOLUTION", "lowest")
    (bench.project / "uv.toml").write_text('resolution = "lowest"\n')
    assert rows(bench.python_env("mlflow").lock("uv"))["needed"] == "2.0"


# ---------------------------------------------------------------------------------------------- what is locked by URL


def test_a_package_by_url_is_locked_with_its_digest(bench: Bench) -> None:
    name = "peel-0.1-py3-none-any.whl"
    ref = bench.python_env(f"peel @ {bench.index.address(f'files/{name}')}").lock("uv")
    assert f"peel @ {bench.index.address(f'files/{name}')}" in ref.lock
    assert "--hash=sha256:" in ref.lock


def test_a_git_revision_is_locked_by_its_commit(bench: Bench, tmp_path: Path) -> None:
    url, commit = git_repository(tmp_path / "repository")
    ref = bench.python_env(f"gitpack @ git+{url}@main").lock("uv")
    assert f"gitpack @ git+{url}@{commit}" in ref.lock
    conda = bench.conda(f"python={PYTHON_MINOR}", pip=(f"gitpack @ git+{url}@main",)).lock()
    assert commit in conda.lock


def test_a_package_in_a_folder_of_a_repository_is_locked_with_that_folder(bench: Bench, tmp_path: Path) -> None:
    url, commit = git_repository(tmp_path / "repository", "python")
    wanted, locked = f"git+{url}@main#subdirectory=python", f"git+{url}@{commit}#subdirectory=python"
    bench.python_env(f"'gitpack @ {wanted}'")
    assert f"gitpack @ {locked}" in bench.lock("uv").lock
    assert f"gitpack @ {locked}" in locking.write_lock(bench.load("uv"), bench.root).read_text()
    assert f"gitpack @ {locked}" in bench.lock("uv", frozen=True).lock
    conda = bench.conda(f"python={PYTHON_MINOR}", pip=(f"'gitpack @ {wanted}'",)).lock()
    (row,) = [row for row in lockfile.conda_lock_rows(yaml.safe_load(conda.lock), SUBDIR) if row.revision]
    assert row.address == locked


def test_a_new_build_of_python_is_found_after_the_channel_changed(bench: Bench, tmp_path: Path) -> None:
    bench.channel = make_channel(tmp_path / "moving")
    bench.conda("python")
    assert rows(bench.lock())["python"] == PYTHON_VERSION
    newer = ".".join([*PYTHON_VERSION.split(".")[:2], "99"])
    write_package(bench.channel, stub_python(newer))
    index_channel(bench.channel)
    assert rows(bench.lock())["python"] == PYTHON_VERSION, "locked once"
    written = locking.write_lock(bench.load(), bench.root, lock_for=[SUBDIR])
    assert newer in written.read_text(), "asked to lock anew"
