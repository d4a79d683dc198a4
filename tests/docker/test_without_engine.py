"""What can be known without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_remote_backend.compute.docker import environments, images, program
from mlflow_remote_backend.compute.docker.request import Image
from mlflow_remote_backend.compute.docker.watch import ContainerRun
from mlflow_remote_backend.errors import ConfigError, JobError
from mlflow_remote_backend.job import EnvironmentRef, Limits
from mlflow_remote_backend.runner.run_folder import RunFolder


@pytest.mark.parametrize("containerd", [True, False])
def test_what_was_made_is_pushed_though_the_engine_gives_it_a_digest_at_once(monkeypatch, containerd) -> None:
    """As containerd's image store does."""
    done: list[str] = []
    found = {"Id": "sha256:made", "RepoDigests": ["registry/team@sha256:made"] if containerd else []}
    engine: Any = SimpleNamespace(image=lambda name: found if "made" in done else None)
    spec: Any = SimpleNamespace(options={"repository": "registry/team"}, environment=EnvironmentRef(lock_key="k" * 64))
    build = environments._Build(engine, spec, Image("sha256:base"), "", lambda detail: None, lambda: False)
    monkeypatch.setattr(environments, "_pulled", lambda *_: None)
    monkeypatch.setattr(environments, "_make", lambda *_: done.append("made"))
    monkeypatch.setattr(environments, "_commit", lambda *_: done.append("committed"))
    monkeypatch.setattr(environments, "_push", lambda *_: done.append("pushed"))
    monkeypatch.setattr(environments, "_marker", lambda *_: {})
    environments._in_image(build, None, None)  # type: ignore[arg-type]
    assert done == ["made", "committed", "pushed"]


def test_an_image_that_was_asked_for_by_its_digest_is_known_by_that_one() -> None:
    digests = ["a/copy@sha256:1111", "registry/team@sha256:2222"]
    engine: Any = SimpleNamespace(image=lambda name: {"Id": "sha256:id", "RepoDigests": digests})
    assert images.obtain(engine, "registry/team@sha256:2222").identity == "sha256:2222"


@pytest.mark.parametrize("shell", [("sh",), ("/bin/bash", "-o", "pipefail"), ("tini", "--", "bash", "-eo", "pipefail")])
def test_a_shell_is_known_with_its_options(shell) -> None:
    assert program._wrapped((*shell, "-c"), "line") == (*shell, "-c", "line")
    with pytest.raises(JobError, match="ignores"):
        program._wrapped((*shell, "-c", "true"), "line")


@pytest.mark.parametrize("outputs", [("outputs", "outputs/deep"), ("outputs/deep", "outputs")], ids=str)
def test_output_folders_within_each_other_are_kept_as_they_came(tmp_path, outputs) -> None:
    folder = RunFolder("run", tmp_path)
    for name in ("one", "deep/two"):
        (folder.work / "outputs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.work / "outputs" / name).touch()
    run: Any = ContainerRun.__new__(ContainerRun)
    run._spec, run._folder, run._came = SimpleNamespace(outputs=outputs, limits=Limits()), folder, folder.path / "came"
    run._from_source = lambda bring: None
    assert run._bring_outputs() == ""
    found = (each for each in (folder.path / "came").rglob("*") if each.is_file())
    assert sorted(each.relative_to(folder.path / "came").as_posix() for each in found) == [
        "outputs/deep/two",
        "outputs/one",
    ]


def test_a_program_that_is_over_needs_no_engine() -> None:
    def connect() -> Any:
        raise ConfigError("The Docker engine's TLS files cannot be used.")

    program._Over(connect, "mlr-run").collect()
