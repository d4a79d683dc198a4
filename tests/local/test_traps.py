"""What MLflow does to plugins of project backends, and what a run of this one looks like all the same."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
import zipfile

import mlflow
import pytest

from mlflow_remote_backend import submission
from mlflow_remote_backend.submitted_run import attach
from mlflow_remote_backend.testing import ended, stored_log, until

pytestmark = pytest.mark.usefixtures("no_leftovers")


def submit(project, parameters=None, **config):
    return mlflow.projects.run(
        str(project),
        parameters=parameters,
        backend="remote",
        env_manager="local",
        synchronous=False,
        backend_config={"stream_output": False, **config},
    )


def all_runs():
    return mlflow.search_runs(search_all_experiments=True, output_format="list")


def only_run():
    (run,) = all_runs()
    return run


def git(folder, *arguments):
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def waits(stop):
    return f"while [ ! -e {stop} ]; do sleep 0.1; done"


# -- tags --------------------------------------------------------------------------------------------------------------


def test_a_running_run_already_has_its_name_source_backend_and_parent(sqlite_tracking, make_project, tmp_path):
    """MLflow sets some of them only after ``run()`` has returned, others never for plugins."""
    stop = tmp_path / "stop"
    project = make_project(waits(stop), entry_points={"other": waits(stop) + "; echo"})
    with mlflow.start_run() as parent:
        run = mlflow.projects.run(
            str(project),
            entry_point="other",
            parameters={"extra": 1},
            backend="remote",
            env_manager="local",
            synchronous=False,
            backend_config={"run_name": "named", "tags": {"team": "a"}, "stream_output": False},
        )
    seen = mlflow.MlflowClient().get_run(run.run_id)
    stop.touch()
    tags = seen.data.tags
    assert seen.info.status == "RUNNING"
    assert seen.info.run_name == "named"
    assert seen.data.params["extra"] == "1"
    expected = {
        "mlflow.project.backend": "remote",
        "mlflow.project.entryPoint": "other",
        "mlflow.project.env": "local",
        "mlflow.source.type": "PROJECT",
        "mlflow.source.name": str(project),
        "mlflow.parentRunId": parent.info.run_id,
        "mlflow.runName": "named",
        "team": "a",
    }
    assert {name: tags.get(name) for name in expected} == expected
    assert tags["mlflow.user"]
    assert ended(run).status == "FINISHED"


def test_the_command_has_set_them_while_it_waits(sqlite_tracking, make_project, mlflow_run, tmp_path):
    stop = tmp_path / "stop"
    command = mlflow_run.start(make_project(waits(stop)), "--backend", "remote", "--run-name", "named")
    until(lambda: all_runs() or command.poll() is not None, 90, "a run")
    seen = only_run()
    stop.touch()
    _, err = command.communicate(timeout=90)
    assert command.returncode == 0, err
    assert (seen.info.run_name, seen.data.tags["mlflow.project.backend"]) == ("named", "remote")


# -- the status --------------------------------------------------------------------------------------------------------

FINISHES_ITSELF = """
    import os, sys
    import mlflow
    mlflow.MlflowClient().set_terminated(os.environ["MLFLOW_RUN_ID"], "FINISHED")
    print("done", flush=True)
    while not os.path.exists(sys.argv[1]):
        pass
    sys.exit(7)
"""


def test_a_program_that_ends_its_own_run_and_fails_is_failed(sqlite_tracking, make_project, tmp_path):
    stop = tmp_path / "stop"
    project = make_project(f"python main.py {stop}", files={"main.py": textwrap.dedent(FINISHES_ITSELF)})
    run = submit(project)
    until(lambda: "done" in run.logs(), 90, "the program's own end of its run")
    assert mlflow.MlflowClient().get_run(run.run_id).info.status == "FINISHED"
    assert run.get_status() == "RUNNING"
    stop.touch()
    view = ended(run)
    assert (view.status, view.tag("exit_code")) == ("FAILED", "7")


def test_a_project_that_wants_an_image_is_not_run_without_it(sqlite_tracking, make_project):
    with pytest.raises(mlflow.exceptions.ExecutionException, match='"compute": "docker"'):
        submit(make_project("echo x", docker_env={"image": "local/shell:1"}))
    assert not all_runs()


# -- run_id, the caller's dict, other commands -------------------------------------------------------------------------


def test_a_given_run_must_be_open_and_nobody_elses(sqlite_tracking, make_project):
    project = make_project("echo x")
    given = mlflow.MlflowClient().create_run("0").info.run_id
    assert submit(project, run_id=given, run_name="mine").run_id == given
    assert ended(attach(given)).name == "mine"
    for unusable in (given, "0" * 32):
        with pytest.raises(mlflow.exceptions.ExecutionException, match=unusable):
            submit(project, run_id=unusable)
    assert len(all_runs()) == 1


def test_a_given_run_with_another_value_of_a_parameter_stays_as_it_is(sqlite_tracking, make_project):
    client = mlflow.MlflowClient()
    given = client.create_run("0").info.run_id
    client.log_param(given, "extra", "before")
    before = client.get_run(given).data.tags
    with pytest.raises(mlflow.exceptions.ExecutionException, match="not allowed"):
        submit(make_project("echo x"), run_id=given, parameters={"extra": "now"})
    assert client.get_run(given).data.tags == before


def test_a_parameter_that_mlflow_refuses_ends_the_run(sqlite_tracking, make_project):
    with pytest.raises(mlflow.exceptions.ExecutionException, match="a\\+b"):
        submit(make_project("echo x"), parameters={"a+b": "1"})
    (run,) = all_runs()
    assert run.info.status == "FAILED"
    assert "a+b" in run.data.tags["mlflow_remote.message"]


@pytest.mark.parametrize("credential", ["AKIA" + "ABCDEFGHIJKLMNOP", "none"])
def test_the_diff_of_a_dirty_tree_holds_nothing_that_stays_behind(sqlite_tracking, make_project, credential):
    project = make_project("echo x", files={".env": "PASSWORD=before\n", "keys.py": f"KEY = '{credential}'\n"})
    git(project, "init", "--quiet")
    git(project, "add", ".")
    git(project, "commit", "--quiet", "-m", "with credentials")
    (project / ".env").write_text("PASSWORD=geheim\n")
    (project / "keys.py").write_text("KEY = from_environment()\n")
    view = ended(submit(project))
    diff = mlflow.artifacts.load_text(f"{view.artifact_uri}/remote/uncommitted.diff")
    assert "geheim" not in diff
    if credential == "none":
        assert "-KEY = 'none'\n+KEY = from_environment()\n" in diff
    else:
        assert credential not in diff
        assert "line 6: AWS access key id" in diff


def test_the_diff_is_that_of_what_was_packed(sqlite_tracking, make_project, monkeypatch):
    project = make_project("echo x", files={"code.py": "first\n"})
    git(project, "init", "--quiet")
    git(project, "add", ".")
    git(project, "commit", "--quiet", "-m", "first")
    (project / "code.py").write_text("packed\n")
    locked = submission._locked

    def edited_meanwhile(*arguments):
        (project / "code.py").write_text("edited later\n")
        return locked(*arguments)

    monkeypatch.setattr(submission, "_locked", edited_meanwhile)
    view = ended(submit(project))
    diff = mlflow.artifacts.load_text(f"{view.artifact_uri}/remote/uncommitted.diff")
    assert "+packed\n" in diff
    assert "later" not in diff


def test_the_callers_configuration_is_not_changed(sqlite_tracking, make_project):
    config = {"stream_output": False, "env_vars": {"A": "1"}, "resources": {"cpu": 1}, "tags": {"t": "u"}}
    before = copy.deepcopy(config)
    run = mlflow.projects.run(
        str(make_project("echo $A")), backend="remote", env_manager="local", synchronous=False, backend_config=config
    )
    assert ended(run).status == "FINISHED"
    ours = {name: value for name, value in config.items() if name in before}
    assert ours == before


def test_another_click_program_is_not_the_mlflow_command(sqlite_tracking, make_project, workdir):
    """It neither waits nor exits for its caller."""
    program = """
        import sys, click, mlflow, mlflow.cli

        @click.group()
        def tool(): ...

        @tool.command()
        @click.option("--run-id")
        @click.argument("project")
        def run(project, run_id):
            submitted = mlflow.projects.run(project, backend="remote", env_manager="local", synchronous=False)
            print("submitted", submitted.run_id, submitted.get_status())

        tool()
    """
    stop = workdir / "stop"
    project = make_project(waits(stop) + "; exit 3")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), "run", "--run-id", "not-ours", str(project)],
        cwd=workdir,
        capture_output=True,
        text=True,
        timeout=120,
    )
    stop.touch()
    run = only_run()
    assert (done.returncode, done.stdout) == (0, f"submitted {run.info.run_id} RUNNING\n"), done.stderr
    assert ended(attach(run.info.run_id)).tag("exit_code") == "3"


# -- where projects come from ------------------------------------------------------------------------------------------


@pytest.fixture
def repository(make_project, tmp_path):
    """A git repository with a project in ``sub/project``: a branch ``old`` says one thing, the main branch another."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "--quiet", "--initial-branch", "main")
    for branch, word in (("old", "old words"), ("main", "new words")):
        make_project(f"echo {word}", folder=root / "sub" / "project")
        git(root, "add", ".")
        git(root, "commit", "--quiet", "--message", word)
        if branch == "old":
            git(root, "branch", "old")
    return root


@pytest.mark.parametrize(("version", "said"), [(None, "new words\n"), ("old", "old words\n")])
def test_a_git_uri_with_version_and_subdirectory(version, said, sqlite_tracking, repository, mlflow_run):
    uri = f"file://{repository}#sub/project"
    options = ["--version", version] if version else []
    done = mlflow_run(uri, "--backend", "remote", *options)
    assert (done.returncode, done.stdout) == (0, said), done.stderr
    tags = only_run().data.tags
    assert tags["mlflow.source.git.commit"] == git(repository, "rev-parse", version or "HEAD")
    if version:
        assert tags["mlflow.source.git.branch"] == version
        assert str(repository) in tags["mlflow.source.git.repoURL"]


@pytest.mark.parametrize("own", [True, False])
def test_only_a_folder_of_this_machine_defines_computes(sqlite_tracking, make_project, tmp_path, monkeypatch, own):
    """What is fetched from elsewhere must not say where the caller's credentials go."""
    computes = "computes: {named: {compute: local, env_vars: {BY: %s}}}"
    (tmp_path / "mine.yaml").write_text(computes % "me")
    monkeypatch.setenv("MLFLOW_REMOTE_CONFIG", str(tmp_path / "mine.yaml"))
    project = make_project("echo $BY", files={"mlflow-remote.yaml": computes % "the project"})
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as out:
        for path in project.iterdir():
            out.write(path, path.name)
    view = ended(submit(project if own else tmp_path / "p.zip", compute="named"))
    assert stored_log(view.run_id) == (b"the project\n" if own else b"me\n")


def test_a_zip_uri(sqlite_tracking, make_project, tmp_path):
    project = make_project("cat data.txt", files={"data.txt": "from a zip\n"})
    with zipfile.ZipFile(tmp_path / "project.zip", "w") as archive:
        for path in project.rglob("*"):
            archive.write(path, path.relative_to(project))
    run = submit(tmp_path / "project.zip")
    assert ended(run).status == "FINISHED"
    assert stored_log(run.run_id) == b"from a zip\n"


# -- jobs that submit jobs ---------------------------------------------------------------------------------------------

NESTED = """
    import os
    import mlflow
    inner = mlflow.projects.run(
        "inner", backend="remote", env_manager="local", synchronous=False, backend_config={"stream_output": False}
    )
    print(inner.run_id)
"""


def test_a_run_from_inside_a_job_has_it_as_parent_and_outlives_it(sqlite_tracking, make_project, tmp_path):
    stop = tmp_path / "stop"
    project = make_project(files={"main.py": textwrap.dedent(NESTED)})
    make_project(waits(stop) + "; exit 5", folder=project / "inner")
    outer = ended(submit(project))
    assert outer.status == "FINISHED", stored_log(outer.run_id)
    inner = attach(stored_log(outer.run_id).decode().split()[-1])
    assert inner.view().tags["mlflow.parentRunId"] == outer.run_id
    assert inner.get_status() == "RUNNING"
    stop.touch()
    assert ended(inner).tag("exit_code") == "5"
    assert "mlflow.parentRunId" not in outer.tags
    assert "MLFLOW_RUN_ID" not in os.environ
