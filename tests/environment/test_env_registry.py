"""The same with real packages, from the index that pip is configured with on this machine."""

from __future__ import annotations

import configparser
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from channel import PYTHON_MINOR, SUBDIR, make_channel

from mlflow_remote_backend.environment import activation, cache, indexes, locking, materialise, spec, uv
from mlflow_remote_backend.job import EnvironmentRef

pytestmark = pytest.mark.registry
SAMPLE = Path(__file__).parents[2] / "sample_project"


@pytest.fixture(scope="module")
def real_channel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_channel(tmp_path_factory.mktemp("real-channel"), real_python_too=True)


def printed(prefix: Path, program: str) -> str:
    environ = {**os.environ, **activation.activation(prefix)}
    return subprocess.check_output(["python", "-c", program], env=environ, text=True).strip()


def sample_environment(real_channel: Path, root: Path) -> EnvironmentRef:
    options = spec.EnvironmentOptions(channel_map={"conda-forge": real_channel.as_uri()})
    return locking.lock(spec.load(SAMPLE, "conda", "conda.yaml", None, options), SUBDIR, root)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the sample wants Python 3.11, the channel has this one")
def test_the_samples_environment_is_locked_built_and_works(real_channel: Path, tmp_path: Path) -> None:
    ref = sample_environment(real_channel, tmp_path)
    assert ref.notices == ()
    prefix = materialise.materialise(ref, tmp_path)
    program = "import sys, mlflow, sklearn, pandas, matplotlib; print(sys.prefix, sys.base_prefix)"
    assert printed(prefix, program) == f"{prefix} {prefix}"
    assert (tmp_path / "envs" / ref.lock_key) == cache.hit(tmp_path, ref.lock_key)


def test_what_the_runner_image_holds_is_enough_to_build(tmp_path: Path) -> None:
    (tmp_path / "python_env.yaml").write_text(f"python: '{PYTHON_MINOR}'\ndependencies: [six]\n")
    ref = locking.lock(spec.load(tmp_path, "python", "python_env.yaml"), SUBDIR, tmp_path / "cache")
    python = runner_python(tmp_path / "runner")
    command = [str(python), "-m", "mlflow_remote_backend.environment.materialise", str(tmp_path / "job")]
    environ = {**os.environ, "PYTHONPATH": str(SAMPLE.parent)}
    done = subprocess.run(
        command, input=json.dumps(dataclasses.asdict(ref)), capture_output=True, text=True, env=environ, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert printed(Path(done.stdout.strip()), "import six; print(six.__name__)") == "six"


def runner_python(folder: Path) -> Path:
    """A Python with the extra ``runner`` of setup.cfg and nothing else."""
    declared = configparser.ConfigParser()
    declared.read(SAMPLE.parent / "setup.cfg")
    wanted = declared["options.extras_require"]["runner"].split()
    lines = indexes.choose((), ())
    argv = [word for line in lines for word in line.split()]
    subprocess.run([uv.executable(), "venv", "-q", "--python", sys.executable, str(folder)], check=True)
    command = [uv.executable(), "pip", "install", "-q", "--python", str(folder / "bin/python"), *argv, *wanted]
    subprocess.run(command, check=True)
    return folder / "bin/python"


@pytest.mark.parametrize("platform", ["linux-64", "linux-aarch64"])
def test_a_python_env_is_locked_for_both_platforms(platform: str, tmp_path: Path) -> None:
    (tmp_path / "python_env.yaml").write_text("python: '3.11'\ndependencies: [numpy>=2, requests]\n")
    declared = spec.load(tmp_path, "python", "python_env.yaml")
    ref = locking.lock(declared, platform, tmp_path / "cache", elsewhere=True)
    (numpy,) = (url for url in ref.files.values() if "/numpy-" in url)
    assert ("aarch64" in numpy) == (platform == "linux-aarch64")
