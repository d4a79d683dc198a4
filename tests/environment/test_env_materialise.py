"""From a lock to a prefix: verified, built once, whole or not at all, and no work when it is there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench import Bench
from channel import PYTHON_MINOR, SUBDIR, CondaPackage, Entry, make_channel, toy, write_package
from channel import index as index_channel
from wheels import Index, git_repository, serving, source, wheel

from mlflow_remote_backend.environment import activation, cache, hints, lease, locking, materialise, tool, uv
from mlflow_remote_backend.errors import JobError
from mlflow_remote_backend.job import EnvironmentRef


def run(prefix: Path, program: str, **extra: str) -> str:
    """What a Python program prints in the activated environment."""
    environ = {**os.environ, **activation.activation(prefix), **extra}
    done = subprocess.run(["python", "-c", program], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def refuses(bench: Bench, ref: EnvironmentRef) -> JobError:
    """The error of an environment that must not be built, after which nothing of it is there."""
    with pytest.raises(JobError) as refused:
        materialise.materialise(ref, bench.root)
    assert refused.value.code == "ENVIRONMENT"
    assert cache.hit(bench.root, ref.lock_key) is None
    assert not cache.prefix(bench.root, ref.lock_key).exists()
    assert not list(bench.root.glob("tmp/*"))
    return refused.value


# ---------------------------------------------------------------------------------------------- it works


def test_a_conda_environment_with_its_pip_part_runs(bench: Bench) -> None:
    ref = bench.conda(f"python={PYTHON_MINOR}", "toyapp", pip=("fruit",)).lock()
    prefix = materialise.materialise(ref, bench.root, bench.progress.append)
    assert prefix == bench.root / "envs" / ref.lock_key
    assert run(prefix, "import sys, toyapp, toylib, fruit; print(sys.prefix, toylib.__version__)") == f"{prefix} 1.1"
    assert subprocess.check_output([prefix / "bin/toyapp"], text=True) == "toyapp 2.0\n"
    assert bench.steps() == ["solving", "downloading", "installing", "ready"]
    assert json.loads((prefix / ".complete").read_text())["packages"] == 6
    assert not list(bench.root.glob("tmp/*"))


def test_a_venv_runs_with_the_wanted_python(bench: Bench) -> None:
    prefix = materialise.materialise(bench.python_env("fruit").lock(), bench.root)
    assert run(prefix, "import sys, fruit; print(sys.prefix, *sys.version_info[:2])") == (
        f"{prefix} {PYTHON_MINOR.replace('.', ' ')}"
    )


def test_activation_names_the_environment_and_nothing_of_another(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = materialise.materialise(bench.python_env("peel").lock("uv"), bench.root)
    environ = {"PATH": f"/usr/bin:{prefix}/bin", "CONDA_PREFIX": "/other", "PYTHONHOME": "/other"}
    assert activation.activation(prefix, environ, {"GREETING": "hello"}) == {
        "VIRTUAL_ENV": str(prefix),
        "PATH": f"{prefix}/bin:/usr/bin",
        "CONDA_PREFIX": "",
        "PYTHONHOME": "",
        "GREETING": "hello",
    }


@pytest.mark.parametrize("line", ["--index-url {}", "-i {}", "--index-url={}"])
def test_the_index_that_a_committed_lock_names_is_asked(bench: Bench, line: str) -> None:
    written = locking.write_lock(bench.python_env("peel").load("uv"), bench.root)
    written.write_text(f"{line.format(bench.index.url)}\n{written.read_text()}")
    asked = len(bench.index.requests)
    ref = bench.lock("uv", index_url=(), frozen=True)
    assert len(bench.index.requests) == asked
    prefix = materialise.materialise(ref, bench.root)
    assert len(bench.index.requests) > asked
    assert list(prefix.rglob("peel-*.dist-info"))


def test_an_environment_that_is_there_costs_no_look_anywhere(bench: Bench, stock: EnvironmentRef) -> None:
    first = materialise.materialise(stock, bench.root)
    asked = len(bench.index.requests)
    moved = dataclasses.replace(stock, lock="not even read")
    bench.progress.clear()
    assert materialise.materialise(moved, bench.root, bench.progress.append) == first
    assert (len(bench.index.requests), bench.progress) == (asked, [])


def test_the_warm_path_loads_the_standard_library_only(bench: Bench) -> None:
    ref = bench.python_env("peel").lock("uv")
    materialise.materialise(ref, bench.root)
    program = (
        "import sys, pathlib\n"
        "from mlflow_remote_backend.environment import activation, cache\n"
        "prefix = cache.hit(pathlib.Path(sys.argv[1]), sys.argv[2])\n"
        "assert activation.activation(prefix)['VIRTUAL_ENV'] == str(prefix)\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(names - set(sys.stdlib_module_names) - {'__main__', 'mlflow_remote_backend'}))\n"
    )
    command = [sys.executable, "-S", "-c", program, str(bench.root), ref.lock_key]
    environ = {**os.environ, "PYTHONPATH": str(Path(materialise.__file__).parents[2])}
    assert subprocess.check_output(command, text=True, env=environ).split() == []


def test_the_path_of_the_prefix_is_written_into_its_files(bench: Bench, tmp_path: Path) -> None:
    marked = CondaPackage(
        "marked", "1.0", {"etc/marked": Entry(b"at /opt/nowhere/etc\n", placeholder="/opt/nowhere")}, noarch="generic"
    )
    bench.channel = make_channel(tmp_path / "marked", packages=[marked])
    prefix = materialise.materialise(bench.conda("marked").lock(), bench.root)
    assert (prefix / "etc/marked").read_text() == f"at {prefix}/etc\n"


def test_bytecode_is_compiled_where_programs_could_not(bench: Bench) -> None:
    ref = bench.python_env("peel").lock("uv")
    prefix = materialise.materialise(ref, bench.root, compile_bytecode=True)
    assert list(prefix.glob("lib/*/site-packages/__pycache__/peel.*.pyc"))
    prefix = materialise.materialise(
        bench.conda(f"python={PYTHON_MINOR}", "toylib").lock(), bench.root, compile_bytecode=True
    )
    assert list(prefix.glob("lib/*/site-packages/__pycache__/toylib.*.pyc"))


def test_a_lock_of_another_platform_is_refused(bench: Bench) -> None:
    ref = dataclasses.replace(bench.python_env("peel").lock("uv"), platform="osx-arm64")
    assert "locked for osx-arm64" in refuses(bench, ref).what


# ---------------------------------------------------------------------------------------------- verified


def archive_of(channel: Path, name: str) -> Path:
    (file,) = channel.glob(f"*/{name}.conda")
    return file


@pytest.mark.parametrize("over_http", [False, True])
def test_a_tampered_conda_archive_is_refused(bench: Bench, tmp_path: Path, over_http: bool) -> None:
    bench.channel = make_channel(tmp_path / "tampered", packages=[toy("toylib", "1.1")])
    bench.index.folders["channel"] = bench.channel
    channels = (bench.index.address("channel"),) if over_http else ()
    ref = bench.conda(f"python={PYTHON_MINOR}", "toylib").lock(channels=channels)
    archive = archive_of(bench.channel, "toylib-1.1-0")
    original = archive.read_bytes()
    write_package(bench.channel, toy("toylib", "1.1", says="evil"))
    error = refuses(bench, ref)
    assert "toylib 1.1 is not the package that was locked" in error.what
    assert "expected sha256" in error.words
    archive.write_bytes(original)
    assert run(materialise.materialise(ref, bench.root), "import toylib; toylib.main()") == "toylib 1.1"


def test_one_changed_byte_of_a_wheel_is_refused(bench: Bench) -> None:
    ref = bench.python_env("peel").lock("uv")
    name = "peel-0.1-py3-none-any.whl"
    right = bench.index.files[name]
    bench.index.broken[name] = right[:50] + bytes([right[50] ^ 1]) + right[51:]
    assert re.search(r"Bad CRC|ash mismatch", refuses(bench, ref).words)


def test_a_wheel_that_was_replaced_on_the_index_is_refused(bench: Bench) -> None:
    ref = bench.python_env("peel").lock("uv")
    bench.index.add(wheel("peel", "0.1", body="evil = True\n"))
    error = refuses(bench, ref)
    assert "ash mismatch" in error.words
    assert "lock anew" in error.hint


def test_a_lock_without_a_digest_installs_nothing(bench: Bench) -> None:
    ref = bench.python_env("peel").lock("uv")
    text = "\n".join(line.rstrip("\\ ") for line in ref.lock.splitlines() if "--hash" not in line)
    assert "no sha256" in refuses(bench, dataclasses.replace(ref, lock=text)).what


def test_a_namesake_on_another_index_is_not_installed(bench: Bench) -> None:
    ref = bench.python_env("peel").lock("uv")
    with serving(Index().add(wheel("peel", "0.1", body="evil = True\n"), wheel("peel", "9.9"))) as evil:
        confused = dataclasses.replace(ref, files={}, indexes=(f"--index-url {evil.url}",))
        assert refuses(bench, confused)


def test_a_damaged_archive_in_the_cache_is_fetched_again(bench: Bench, stock: EnvironmentRef) -> None:
    shutil.rmtree(materialise.materialise(stock, bench.root))
    (archive,) = bench.root.glob("archives/*/toyapp-2.0-0.conda")
    archive.write_bytes(b"damaged")
    shutil.rmtree(bench.root / "pkgs")
    assert run(materialise.materialise(stock, bench.root), "import toyapp; toyapp.main()") == "toyapp 2.0"


def test_a_program_that_writes_into_its_environment_does_not_change_the_next_one(
    bench: Bench, stock: EnvironmentRef
) -> None:
    prefix = materialise.materialise(stock, bench.root)
    later = 10 * 60 * 10**9
    for name in ("toyapp.py", "fruit.py"):
        (file,) = prefix.glob(f"lib/*/site-packages/{name}")
        original, written_ns = file.read_bytes(), file.stat().st_mtime_ns
        with file.open("r+b") as stream:  # in place: what is linked elsewhere changes too
            stream.write(original.replace(b"1", b"6").replace(b"2", b"7"))
        os.utime(file, ns=(written_ns + later, written_ns + later))
    shutil.rmtree(prefix)
    again = materialise.materialise(stock, bench.root)
    assert run(again, "import toyapp, fruit; toyapp.main(); print(fruit.__version__)") == "toyapp 2.0\n1.0"


def test_post_link_scripts_stay_off(bench: Bench, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    script = Entry(f"#!/bin/sh\ntouch {witness}\n".encode(), mode=0o755)
    files = {"bin/.linker-post-link.sh": script, "bin/.linker-pre-link.sh": script, "share/linker": Entry(b"x")}
    bench.channel = make_channel(tmp_path / "linker", packages=[CondaPackage("linker", "1.0", files)])
    prefix = materialise.materialise(bench.conda("linker").lock(), bench.root)
    assert (prefix / "share/linker").exists()
    assert not witness.exists()


# ---------------------------------------------------------------------------------------------- built from source


def test_a_source_archive_is_built_with_tools_from_the_lock(bench: Bench) -> None:
    bench.index.add(source("builtpack", "1.0", build_requires=("needed",)))
    ref = bench.python_env("builtpack", "needed").lock("uv")
    prefix = materialise.materialise(ref, bench.root)
    assert run(prefix, "import builtpack; print(builtpack.built_with)") == "2.0"


def test_a_source_archive_whose_tools_are_not_locked_is_refused_with_what_to_do(bench: Bench) -> None:
    bench.index.add(source("builtpack", "1.0", build_requires=("needed",)))
    error = refuses(bench, bench.python_env("builtpack").lock("uv"))
    assert "needed" in error.words
    assert "build_dependencies" in error.hint


def test_a_git_revision_is_installed_at_its_commit(bench: Bench, tmp_path: Path) -> None:
    url, _ = git_repository(tmp_path / "repository")
    ref = bench.python_env(f"gitpack @ git+{url}@main", "needed").lock("uv")
    (tmp_path / "repository/backend.py").write_text("raise SystemExit('a later commit')\n")
    subprocess.run(["git", "commit", "-qam", "Break"], cwd=tmp_path / "repository", check=True)
    assert run(materialise.materialise(ref, bench.root), "import gitpack; print(gitpack.built_with)") == "2.0"


def test_a_package_in_a_folder_of_a_repository_is_installed(bench: Bench, tmp_path: Path) -> None:
    url, _ = git_repository(tmp_path / "repository", "python")
    ref = bench.python_env(f"'git+{url}@main#egg=gitpack&subdirectory=python'", "needed").lock("uv")
    assert run(materialise.materialise(ref, bench.root), "import gitpack; print(gitpack.built_with)") == "2.0"


# ---------------------------------------------------------------------------------------------- where from


def test_an_archive_comes_from_the_mirror_that_stands_for_its_channel(bench: Bench, channel: Path) -> None:
    ref = bench.conda(f"python={PYTHON_MINOR}", "toyapp").lock()
    bench.index.folders["mirror"] = channel
    elsewhere = dataclasses.replace(
        ref,
        lock=ref.lock.replace(channel.as_uri(), "https://unreachable.invalid/conda-forge"),
        channels=(f"conda-forge {bench.index.address('mirror')}",),
    )
    materialise.materialise(elsewhere, bench.root)
    assert any(path.startswith("/mirror/noarch/toyapp") for path in bench.index.requests)


def test_two_channels_whose_names_end_alike_are_two(bench: Bench, tmp_path: Path) -> None:
    for folder, name in (("one", "aaa"), ("two", "bbb")):
        make_channel(tmp_path / folder / "forge", packages=[toy(name, "1.0")])
    channels = f"forge, '{(tmp_path / 'two/forge').as_uri()}'"
    ref = bench.conda("aaa", "bbb", channels=channels).lock(channel_map={"forge": (tmp_path / "one/forge").as_uri()})
    assert materialise.materialise(ref, bench.root)


def test_a_file_that_is_gone_from_where_it_was_seen_comes_from_the_index(bench: Bench) -> None:
    ref = bench.python_env("fruit").lock("uv")
    gone = {digest: url.replace("/files/", "/gone/") for digest, url in ref.files.items()}
    prefix = materialise.materialise(dataclasses.replace(ref, files=gone), bench.root)
    assert run(prefix, "import fruit, needed; print(needed.__version__)") == "2.0"


@pytest.mark.parametrize("userinfo", ["reader:$READER@", "reader:${READER}@"])
def test_credentials_are_filled_in_where_the_job_runs(
    bench: Bench, channel: Path, monkeypatch: pytest.MonkeyPatch, userinfo: str
) -> None:
    bench.index.login = ("reader", "pass" + "phrase")
    bench.index.folders["channel"] = channel
    monkeypatch.setenv("READER", bench.index.login[1])
    ref = bench.conda(f"python={PYTHON_MINOR}", pip=("fruit",)).lock(
        channels=(bench.index.address("channel", userinfo),), index_url=(bench.index.address("simple", userinfo),)
    )
    materialise.materialise(ref, bench.root)
    shutil.rmtree(bench.root)
    monkeypatch.delenv("READER")
    error = refuses(bench, ref)
    assert "READER is not set" in error.what


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("error sending request for url (http://127.0.0.1:40123/simple/peel/)", "did not answer"),
        ("Failed to fetch: `https://index.example/peel/`, HTTP status client error (401 Unauthorized)", "netrc"),
        ("error sending request for url (https://index.example/packages/401/peel-1.403.0.whl)", "did not answer"),
        ("HTTP status client error (403) for url (https://index.example/simple/peel/)", "netrc"),
        ("HTTP status client error (404) for url (http://127.0.0.1:40401/noarch/repodata.json)", "no such thing"),
        ("peel-1.0-404.conda: Hash mismatch, expected sha256:a401f", "not the one that was locked"),
        ("Failed to fetch: `https://index.example/a.whl`, HTTP status client error (404 Not Found)", "no such thing"),
        ("failed to fetch branch, fatal: repository 'https://host.example/r.git/' not found", "no such thing"),
        ("failed to fetch branch, fatal: could not read Username for 'https://host.example'", "netrc"),
        ("No solution found: you require async-timeout==9, which is unsatisfiable", "Loosen"),
        ("No solution found: you require mysql-connector-python==9, dnspython==1 and keras-backend==0", "Loosen"),
        ("dns error: failed to lookup address", "did not answer"),
        ("tcp connect error, Connection refused (os error 111)", "did not answer"),
        ("NewConnectionError: Max retries exceeded", "did not answer"),
        ("Call to `setuptools.build_meta` failed: the build backend returned an error", "build_dependencies"),
    ],
)
def test_the_hint_is_by_the_status_and_not_by_digits_that_look_like_one(words: str, hint: str) -> None:
    assert hint in hints.for_words(words, "")


def test_a_server_that_is_away_costs_seconds_and_is_named(bench: Bench) -> None:
    with serving(Index(files=dict(bench.index.files))) as gone:
        ref = bench.python_env("peel").lock("uv", index_url=(gone.url,))
    error = refuses(bench, ref)
    assert "did not answer" in error.hint


# ---------------------------------------------------------------------------------------------- a Python


def test_a_python_that_is_nowhere_is_refused_with_what_was_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    ref = dataclasses.replace(bench.python_env("peel").lock("uv"), python="3.99")
    error = refuses(bench, ref)
    assert "no Python 3.99 here" in error.what
    assert PYTHON_MINOR in error.what
    assert "env_manager conda" in error.hint


def test_interpreters_of_pyenv_are_found_though_its_shims_refuse(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = tmp_path / "pyenv/versions"
    for release in ("3.98.1", "3.98.12", "3.98.dev", "miniforge3"):
        (versions / release / "bin").mkdir(parents=True)
        (versions / release / "bin/python").symlink_to(sys.executable)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert uv.find_python("3.98", bench.root) == versions / "3.98.12/bin/python"
    assert uv.find_python("3.98.1", bench.root) == versions / "3.98.1/bin/python"
    assert uv.find_python("3.98.7", bench.root) == versions / "3.98.12/bin/python"


def test_an_environment_whose_interpreter_was_uninstalled_is_built_anew(bench: Bench) -> None:
    ref = bench.python_env("peel").lock("uv")
    prefix = materialise.materialise(ref, bench.root)
    python = prefix / "bin/python"
    python.unlink()
    python.symlink_to("/no/such/interpreter")
    assert cache.hit(bench.root, ref.lock_key) is None
    assert run(materialise.materialise(ref, bench.root), "import peel; print(peel.__version__)") == "0.1"


def test_an_environment_that_was_moved_is_no_environment(bench: Bench) -> None:
    ref = bench.python_env("peel").lock("uv")
    materialise.materialise(ref, bench.root)
    moved = bench.root.with_name("moved")
    bench.root.rename(moved)
    assert cache.hit(moved, ref.lock_key) is None


# ---------------------------------------------------------------------------------------------- at once, and killed

BUILD = """
import json, os, signal, sys
from pathlib import Path
from mlflow_remote_backend.environment import materialise, tool
from mlflow_remote_backend.job import EnvironmentRef

root, die_at = Path(sys.argv[1]), sys.argv[2]
steps = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def report(progress):
    steps.append(progress.step + (progress.detail[:4] if progress.step == "installing" else ""))
    if steps[-1] == die_at:
        die()

def run_program(*arguments):
    script = f"kill -9 {os.getpid()}; until [ -e stop ]; do sleep 0.05; done"
    tool.run(["sh", "-c", script], cwd=root, environ=os.environ, timeout_s=60)

if die_at == "program":
    materialise._build = run_program
if die_at == "marker":
    materialise._write_marker = lambda *arguments: die()
if die_at == "renaming":
    materialise.os.replace = lambda *arguments: die()
materialise.materialise(EnvironmentRef(**json.load(sys.stdin)), root, report)
print(json.dumps(steps))
"""


def start_build(bench: Bench, ref: EnvironmentRef, die_at: str = "") -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", BUILD, str(bench.root), die_at]
    process = subprocess.Popen(command, text=True, **pipes)
    assert process.stdin is not None
    process.stdin.write(json.dumps(dataclasses.asdict(ref)))
    process.stdin.close()
    process.stdin = None
    return process


def test_several_processes_at_once_build_once(bench: Bench, stock: EnvironmentRef) -> None:
    before = bench.index.downloads().count("fruit-1.0-py3-none-any.whl")  # for its metadata
    builders = [start_build(bench, stock) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in builders]
    assert [process.returncode for process in builders] == [0, 0, 0], outputs
    assert sum("ready" in json.loads(out) for out, _ in outputs) == 1
    assert bench.index.downloads().count("fruit-1.0-py3-none-any.whl") == before + 1


@pytest.mark.parametrize("step", ["downloading", "installingfrom", "marker", "renaming"])
def test_a_builder_killed_at_any_step_leaves_nothing_that_looks_complete(
    bench: Bench, stock: EnvironmentRef, step: str
) -> None:
    process = start_build(bench, stock, step)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert cache.hit(bench.root, stock.lock_key) is None
    assert not any(entry.complete for entry in cache.entries(bench.root))
    prefix = materialise.materialise(stock, bench.root)
    assert run(prefix, "import toyapp, fruit; toyapp.main()") == "toyapp 2.0"


def test_a_killed_builders_program_is_waited_for_as_long_as_it_lives(bench: Bench) -> None:
    """It goes on writing into the prefix."""
    ref = bench.python_env("peel").lock("uv")
    prefix = cache.prefix(bench.root, ref.lock_key)
    with start_build(bench, ref, "program") as process:
        assert process.wait(120) == -signal.SIGKILL
    with pytest.raises(lease.Busy), lease.hold(prefix, wait=False):
        pytest.fail("the program still runs")
    (bench.root / "stop").touch()
    assert run(materialise.materialise(ref, bench.root), "import peel; print(peel.__version__)") == "0.1"


def test_what_a_program_has_started_in_the_background_holds_nothing_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = bench.python_env("peel").lock("uv")
    prefix = cache.prefix(bench.root, ref.lock_key)
    build = materialise._build
    script = "setsid sh -c 'until [ -e stop ]; do sleep 0.05; done' > /dev/null 2>&1 < /dev/null &"

    def leaves_one(*arguments: Any) -> Any:
        tool.run(["sh", "-c", script], cwd=bench.root, environ=os.environ, timeout_s=60)
        return build(*arguments)

    monkeypatch.setattr(materialise, "_build", leaves_one)
    materialise.materialise(ref, bench.root)
    try:
        with lease.hold(prefix, wait=False) as held:
            held.check()
    finally:
        (bench.root / "stop").touch()


def test_what_a_killed_builder_left_is_not_built_upon(bench: Bench) -> None:
    ref = bench.python_env("peel").lock("uv")
    left = cache.prefix(bench.root, ref.lock_key) / "lib" / f"python{PYTHON_MINOR}" / "site-packages"
    left.mkdir(parents=True)
    (left / "sitecustomize.py").write_text("raise SystemExit('left over')\n")
    (left / "peel.py").write_text("raise SystemExit('left over')\n")
    prefix = materialise.materialise(ref, bench.root)
    assert run(prefix, "import peel; print(peel.__version__)") == "0.1"
    assert not (left / "sitecustomize.py").exists()


def test_an_interrupted_build_leaves_no_process_and_no_folder(bench: Bench, stock: EnvironmentRef) -> None:

    def interrupt(progress: Any) -> None:
        if progress.step == "installing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialise.materialise(stock, bench.root, interrupt)
    assert not cache.prefix(bench.root, stock.lock_key).exists()
    assert materialise.materialise(stock, bench.root)


def test_a_disk_that_fills_up_is_named_and_leaves_nothing(bench: Bench, stock: EnvironmentRef, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    program = (
        "import json, sys; from pathlib import Path\n"
        "from mlflow_remote_backend.environment import materialise\n"
        "from mlflow_remote_backend.job import EnvironmentRef\n"
        "try: materialise.materialise(EnvironmentRef(**json.load(sys.stdin)), Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print(sorted(path.name for path in Path(sys.argv[1]).glob('envs/*') if path.is_dir()))\n"
    )
    shell = f'mount -t tmpfs -o size=600k none "$1" && exec "{sys.executable}" -c "$2" "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, "sh", str(small), program]
    done = subprocess.run(command, input=json.dumps(dataclasses.asdict(stock)), capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no mount namespace to be had: {done.stderr.strip()}")
    assert "JobError" in done.stdout, done.stdout + done.stderr
    assert "No space left" in done.stdout
    assert "Make room" in done.stdout
    assert done.stdout.strip().endswith("[]")


def test_a_rattler_that_crashes_is_an_error_and_no_environment(
    bench: Bench, stock: EnvironmentRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = [sys.executable, "-c", "import os; os.abort()"]
    monkeypatch.setattr("mlflow_remote_backend.environment.tool.own_module", lambda name: crash)
    assert f"exit code {-signal.SIGABRT}" in refuses(bench, stock).words


# ---------------------------------------------------------------------------------------------- activation


def scripted(bench: Bench, folder: Path, **scripts: str) -> Path:
    """An environment whose packages bring activation scripts."""
    packages = [
        CondaPackage(name, "1.0", {f"etc/conda/activate.d/{name}.sh": Entry(text.encode())}, noarch="generic")
        for name, text in scripts.items()
    ]
    bench.channel = make_channel(folder, packages=packages)
    return materialise.materialise(bench.conda(*scripts).lock(), bench.root)


def test_what_activation_scripts_set_is_there_without_running_them(bench: Bench, tmp_path: Path) -> None:
    prefix = scripted(
        bench,
        tmp_path / "scripted",
        a_first='export GDAL_DATA="$CONDA_PREFIX/share/gdal"; export PATH="$PATH:/opt/tail"; local_only=1; echo noise',
        b_second='[ -n "$NEVER" ] && export NEVER=2; export BOTH="$GDAL_DATA:x"; PATH="/opt/head:$PATH"; false',
        c_third='export ODD="a\'b\nc=\\"d"',
    )
    (prefix / "etc/conda/activate.d/a_first.sh").unlink()
    found = activation.activation(prefix, {"PATH": "/usr/bin"})
    assert found["GDAL_DATA"] == f"{prefix}/share/gdal"
    assert found["BOTH"] == f"{prefix}/share/gdal:x"
    assert found["PATH"] == f"/opt/head:{prefix}/bin:/usr/bin:/opt/tail"
    assert found["ODD"] == "a'b\nc=\"d"
    assert not {"local_only", "NEVER", "SHLVL", "PWD", "_"} & set(found)


def test_what_activation_scripts_put_before_a_variable_stands_before_it(bench: Bench, tmp_path: Path) -> None:
    prefix = scripted(
        bench,
        tmp_path / "scripted",
        a_first='export LIBS="$CONDA_PREFIX/lib:$LIBS" KIND="${KIND:-own}" OPT="$CONDA_PREFIX${OPT:+:$OPT}"',
        b_second='export LIBS="/second:$LIBS"; export OPT="/second:$OPT"',
    )
    alone = activation.activation(prefix, {"PATH": "/usr/bin"})
    assert (alone["LIBS"], alone["OPT"]) == (f"/second:{prefix}/lib:", f"/second:{prefix}")
    found = activation.activation(prefix, {"PATH": "/usr/bin", "LIBS": "/nvidia", "OPT": "/nvidia", "KIND": "other"})
    assert (found["LIBS"], found["OPT"]) == (f"/second:{prefix}/lib:/nvidia", f"/second:{prefix}:/nvidia")
    assert found["KIND"] == "own"


@pytest.mark.parametrize("script", ["exit 3", "nosuchcommand_xyz", "if then", "cat /nonexistent/file"])
def test_a_package_whose_activation_cannot_be_known_is_named(bench: Bench, tmp_path: Path, script: str) -> None:
    with pytest.raises(JobError, match=r"badpack 1\.0 has an activation script.*badpack\.sh"):
        scripted(bench, tmp_path / "bad", badpack=script)


def test_variables_that_packages_declare_are_set(bench: Bench, tmp_path: Path) -> None:
    files = {"etc/conda/env_vars.d/v.json": Entry(b'{"COLOUR": "blue"}')}
    bench.channel = make_channel(tmp_path / "v", packages=[CondaPackage("v", "1.0", files, noarch="generic")])
    prefix = materialise.materialise(bench.conda("v").lock(), bench.root)
    assert activation.activation(prefix)["COLOUR"] == "blue"


# ---------------------------------------------------------------------------------------------- really offline


def test_locking_and_building_need_no_network_at_all(bench: Bench, tmp_path: Path) -> None:
    for name, data in bench.index.files.items():
        (tmp_path / name).write_bytes(data)
    bench.conda(f"python={PYTHON_MINOR}", "toyapp", pip=("--no-index", f"--find-links {tmp_path}", "fruit"))
    program = (
        "import sys; from pathlib import Path\n"
        "from mlflow_remote_backend.environment import locking, materialise, spec\n"
        "options = spec.EnvironmentOptions(channels=(sys.argv[2],))\n"
        "declared = spec.load(sys.argv[1], 'conda', 'conda.yaml', None, options)\n"
        f"ref = locking.lock(declared, {SUBDIR!r}, Path(sys.argv[3]))\n"
        "print(materialise.materialise(ref, Path(sys.argv[3])))\n"
    )
    python = [sys.executable, "-c", program, str(bench.project), bench.channel.as_uri(), str(bench.root)]
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--net", *python], capture_output=True, text=True)
    if "unshare" in done.stderr:
        pytest.skip(f"no network namespace to be had: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert run(Path(done.stdout.strip()), "import toyapp, fruit; toyapp.main()") == "toyapp 2.0"


def test_a_channel_that_changes_does_not_change_a_lock(bench: Bench, tmp_path: Path) -> None:
    bench.channel = make_channel(tmp_path / "growing", packages=[toy("toylib", "1.0")])
    ref = bench.conda(f"python={PYTHON_MINOR}", "toylib").lock()
    write_package(bench.channel, toy("toylib", "2.0"))
    index_channel(bench.channel)
    prefix = materialise.materialise(ref, bench.root)
    assert run(prefix, "import toylib; print(toylib.__version__)") == "1.0"
