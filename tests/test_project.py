"""A project comes from a folder, a git repository or a zip file, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import http.server
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mlflow_remote_backend import project
from mlflow_remote_backend.errors import ProjectError

pytestmark = pytest.mark.usefixtures("no_leftovers")


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(make_project) -> Path:
    """A git repository with two commits, a branch, a tag and a project in a subfolder."""
    folder = make_project("echo first", name="repo")
    make_project("echo sub", name="sub", folder=folder / "projects" / "sub")
    git(folder, "init", "--quiet", "--initial-branch", "trunk")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    git(folder, "tag", "v1")
    git(folder, "branch", "old")
    make_project("echo second", name="repo", folder=folder)
    git(folder, "commit", "--quiet", "-am", "second")
    return folder


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder behind a web server; its address."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def fetched_command(uri: str, version: str | None = None) -> str:
    with project.fetch(uri, version, "main", {}) as found:
        assert found.dir.is_dir()
        return found.entry_point.command


def test_a_folder_is_used_where_it_lies(make_project):
    folder = make_project("echo {alpha}", parameters={"alpha": {"type": "float", "default": 0.5}, "data": "path"})
    with project.fetch(str(folder), None, "main", {"data": "x y.csv", "extra": 1}) as found:
        assert found.dir == folder
        assert found.name == "project"
        assert [(each.name, each.type, each.default) for each in found.entry_point.parameters] == [
            ("alpha", "float", "0.5"),
            ("data", "path", None),
        ]
        assert found.parameters == {"data": "x y.csv", "extra": "1"}
        assert found.logged_params == {"alpha": "0.5", "data": "'x y.csv'", "extra": "1"}
        assert found.source_name == str(folder)
    assert folder.is_dir()


@pytest.mark.parametrize("form", ["{}", "file://{}", "'{}'"])
def test_all_spellings_of_a_folder_are_understood(make_project, form):
    assert fetched_command(form.format(make_project("echo here"))) == "echo here"


def test_a_subfolder_is_named_after_a_hash(repository):
    assert fetched_command(f"{repository}#projects/sub") == "echo sub"


@pytest.mark.parametrize("subfolder", ["missing", "projects/missing"])
def test_a_missing_subfolder_is_named(repository, subfolder):
    with pytest.raises(ProjectError, match=subfolder):
        fetched_command(f"{repository}#{subfolder}")


def test_a_subfolder_cannot_lead_out(repository):
    with pytest.raises(ProjectError, match="not allowed"):
        fetched_command(f"{repository}#../..")


@pytest.mark.parametrize(
    ("version", "command"), [("v1", "echo first"), ("old", "echo first"), ("trunk", "echo second")]
)
def test_a_version_is_a_tag_or_a_branch(repository, version, command):
    assert fetched_command(f"file://{repository}", version) == command


def test_a_tag_that_ends_like_a_branch_is_no_branch(repository):
    git(repository, "branch", "release/v1")
    for version, is_branch in (("v1", False), ("release/v1", True)):
        with project.fetch(str(repository), version, "main", {}) as found:
            assert found.is_branch is is_branch


def test_a_version_is_a_commit_also_a_short_one(repository):
    commit = git(repository, "rev-parse", "v1")
    assert fetched_command(str(repository), commit) == "echo first"
    assert fetched_command(str(repository), commit[:8]) == "echo first"


def test_asking_for_a_version_leaves_the_users_working_tree_alone(repository):
    (repository / "MLproject").write_text("name: edited\n")
    fetched_command(str(repository), "v1")
    assert (repository / "MLproject").read_text() == "name: edited\n"
    assert git(repository, "rev-parse", "--abbrev-ref", "HEAD") == "trunk"


def test_a_submission_from_a_git_hook_leaves_the_repository_of_the_hook_alone(repository, tmp_path, monkeypatch):
    git(tmp_path, "clone", "--quiet", str(repository), "hooked")
    hooked = tmp_path / "hooked"
    before = git(hooked, "log", "--decorate"), git(hooked, "remote", "--verbose")
    with monkeypatch.context() as hook:
        hook.setenv("GIT_DIR", str(hooked / ".git"))
        hook.setenv("GIT_INDEX_FILE", str(hooked / ".git" / "index"))
        assert fetched_command(f"file://{repository}", "v1") == "echo first"
    assert (git(hooked, "log", "--decorate"), git(hooked, "remote", "--verbose")) == before
    assert git(hooked, "status", "--short") == ""


def test_a_git_url_is_cloned_with_its_default_branch(repository, tmp_path):
    bare = tmp_path / "hosted.git"
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), str(bare))
    git(bare, "update-server-info")  # what a plain web server needs to serve a repository
    with served(tmp_path) as base:
        assert fetched_command(f"{base}/hosted.git") == "echo second"
        assert fetched_command(f"{base}/hosted.git#projects/sub", "v1") == "echo sub"


def test_submodules_come_along(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "protocol.file.allow")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "always")
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "--quiet", "--initial-branch", "main")
    git(outer, "submodule", "--quiet", "add", str(repository), "inner")
    git(outer, "commit", "--quiet", "-m", "with a submodule")
    with project.fetch(f"{outer}#inner", "main", "main", {}) as found:
        assert found.entry_point.command == "echo second"


def test_git_tags_are_known(repository):
    git(repository, "remote", "add", "origin", "https://user:" + "geheim@example.com/team/repo.git")
    (repository / "MLproject").write_text("name: edited\nentry_points: {main: {command: echo third}}\n")
    with project.fetch(f"{repository}#projects/sub", None, "main", {}) as found:
        assert found.git.commit == git(repository, "rev-parse", "HEAD")
        assert found.git.repo_url == "https://example.com/team/repo.git"
        assert found.source_name == f"file://{repository}#projects/sub"
    with project.fetch(str(repository), None, "main", {}) as found:
        assert found.source_name == f"file://{repository}"


def test_the_diff_shows_what_is_packed_and_of_the_rest_nothing(repository):
    files = {"left.txt": "left", "gone.txt": "gone", "new name.txt": "old"}
    for name, text in files.items():
        (repository / name).write_text(f"{text} before\n")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "third")
    with project.fetch(str(repository), None, "main", {}) as found:
        assert project.uncommitted(found, set(files)) == b""
        for name in ("left.txt", "new name.txt", "projects/sub/MLproject"):
            (repository / name).write_text("now\n")
        (repository / "gone.txt").unlink()
        diff = project.uncommitted(found, {"new name.txt", "projects/sub/MLproject"}).decode()
    assert "-old before\n+now\n" in diff
    assert "projects/sub/MLproject" in diff
    assert "a/gone.txt b/gone.txt\ndeleted" in diff
    assert "gone before" not in diff
    assert "left" not in diff


def test_a_folder_that_git_ignores_has_no_commit(repository, make_project):
    inner = make_project("echo x", folder=repository / "scratch")
    (repository / ".gitignore").write_text("scratch\n")
    with project.fetch(str(inner), None, "main", {}) as found:
        assert found.git.commit == ""


@pytest.mark.parametrize("version", ["no-such-branch", "--upload-pack=touch PWNED", "-x", "v1;touch PWNED"])
def test_an_unknown_or_hostile_version_is_an_error_and_runs_nothing(repository, version, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProjectError):
        fetched_command(str(repository), version)
    assert not list(tmp_path.rglob("PWNED"))


def test_a_version_of_a_folder_inside_a_repository_is_refused_with_how_to_write_it(repository):
    with pytest.raises(ProjectError, match="#projects/sub"):
        fetched_command(str(repository / "projects" / "sub"), "v1")


def test_a_version_of_a_plain_folder_is_refused(make_project):
    with pytest.raises(ProjectError, match="not a git repository"):
        fetched_command(str(make_project()), "v1")


def test_a_server_that_is_not_there_is_an_error_in_gits_words(tmp_path):
    with pytest.raises(ProjectError, match="git fetch") as caught:
        fetched_command("http://user:" + "geheim@127.0.0.1:9/repo.git")
    assert caught.value.words
    assert "geheim" not in str(caught.value)


def zipped(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as out:
        for path in folder.rglob("*"):
            out.write(path, path.relative_to(folder))
    return archive


def test_a_zip_file_is_unpacked(make_project, tmp_path):
    archive = zipped(make_project("echo zipped"), tmp_path / "p.zip")
    assert fetched_command(str(archive)) == "echo zipped"
    assert fetched_command(f"file://{archive}") == "echo zipped"


def test_a_zip_url_is_downloaded(make_project, tmp_path):
    zipped(make_project("echo zipped"), tmp_path / "p.zip")
    with served(tmp_path) as base:
        assert fetched_command(f"{base}/p.zip") == "echo zipped"
        with pytest.raises(ProjectError, match="404"):
            fetched_command(f"{base}/missing.zip")


@pytest.mark.parametrize("name", ["missing.zip", "torn.zip", "p.zip#nowhere"])
def test_no_message_about_a_zip_url_has_its_password(make_project, tmp_path, name):
    zipped(make_project(), tmp_path / "p.zip")
    (tmp_path / "torn.zip").write_bytes(b"not a zip")
    with served(tmp_path) as base, pytest.raises(ProjectError) as raised:
        fetched_command(f"{base}/{name}".replace("://", "://user:" + "geheim@"))
    assert name in str(raised.value)
    assert "geheim" not in str(raised.value)


def test_a_zip_member_cannot_leave_its_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as out:
        out.writestr("../../PWNED", "x")
    with pytest.raises(ProjectError, match="outside"):
        fetched_command(str(tmp_path / "evil.zip"))


def test_what_is_no_zip_file_is_an_error(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"not a zip")
    with pytest.raises(ProjectError, match="cannot be unpacked"):
        fetched_command(str(tmp_path / "x.zip"))


@pytest.mark.parametrize(
    ("mlproject", "trouble"),
    [
        ("name: [", "cannot be read"),
        ("- a\n- b\n", "cannot be read"),
        ("entry_points: {main: {}}", "no command"),
        ("entry_points: {main: {command: 7}}", "no command"),
        ("entry_points: {main: {command: x, parameters: [1]}}", "cannot be read"),
        ("entry_points: {other: {command: x}}", "'?main"),
        ("conda_env: missing.yaml", "missing.yaml"),
        ("conda_env: a\npython_env: b", "multiple environment"),
        ("name: !!python/object/apply:os.system ['touch PWNED']", "cannot be read"),
        ("name: " + "x" * (1 << 20), "larger than"),
    ],
)
def test_a_broken_mlproject_is_an_error_about_the_project(tmp_path, mlproject, trouble, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MLproject").write_text(mlproject)
    with pytest.raises(ProjectError, match=trouble):
        fetched_command(str(tmp_path))
    assert not (tmp_path / "PWNED").exists()


def test_a_missing_parameter_is_named(make_project):
    folder = make_project("echo {alpha}", parameters={"alpha": "float"})
    with pytest.raises(ProjectError, match="'alpha'"):
        fetched_command(str(folder))


def test_a_nul_byte_in_a_parameter_is_refused(make_project):
    with pytest.raises(ProjectError, match="NUL"), project.fetch(str(make_project()), None, "main", {"a": "b\0c"}):
        pass


def test_a_parameter_that_is_not_utf_8_is_refused(make_project):
    with pytest.raises(ProjectError, match="UTF-8"), project.fetch(str(make_project()), None, "main", {"a": "\udcff"}):
        pass


def test_a_script_is_an_entry_point(make_project):
    folder = make_project(files={"a b.py": "", "run.sh": ""})
    with project.fetch(str(folder), None, "a b.py", {}) as found:
        assert found.entry_point.command == "python 'a b.py'"
    with project.fetch(str(folder), None, "run.sh", {}) as found:
        assert found.entry_point.command.endswith("run.sh")


def test_the_environment_that_the_project_declares_is_found(make_project):
    conda = make_project(name="c", files={"conda.yaml": "dependencies: [python]"}, conda_env="conda.yaml")
    python = make_project(name="p", files={"python_env.yaml": "python: 3.11"}, python_env="python_env.yaml")
    docker = make_project(name="d", docker_env={"image": "train:1", "volumes": ["/a:/b"]})
    plain = make_project(name="n")
    found = {}
    for folder in (conda, python, docker, plain):
        with project.fetch(str(folder), None, "main", {}) as each:
            found[folder.name] = (each.env_type, each.env_config_path, each.docker_env)
    assert found["c"] == ("conda", conda / "conda.yaml", None)
    assert found["p"] == ("python", python / "python_env.yaml", None)
    assert found["d"] == ("docker", None, {"image": "train:1", "volumes": ["/a:/b"]})
    assert found["n"] == ("python", None, None)
