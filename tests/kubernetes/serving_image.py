"""An image that holds MLflow's scoring server and scikit-learn, made once of the base image and wheels from pip's
index."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

DOCKERFILE = """\
FROM {base} AS build
COPY wheels /wheels
RUN python -m pip install --no-index --find-links /wheels --no-cache-dir --target /opt/serving {needs}
FROM {base}
COPY --from=build /opt/serving /opt/serving
ENV PYTHONPATH=/opt/serving
"""


def requirements() -> list[str]:
    """What serves the sample's model and MLflow's own, in the releases that train them here."""
    return [f"{name}=={version(name)}" for name in ("mlflow-skinny", "pandas", "scikit-learn", "skops")]


def download(folder: Path) -> None:
    """The wheels of :func:`requirements` and all that they need, for this Python."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:", "--dest", str(folder)]
    subprocess.run([*command, *requirements()], check=True, timeout=280)


def built(base: str, repository: str) -> str:
    """The image in the registry, by digest; made unless the engine has it."""
    import docker

    digest = hashlib.sha256(" ".join([base, *requirements()]).encode()).hexdigest()[:12]
    tag = f"{repository}:{digest}"
    client = docker.from_env(timeout=300)
    try:
        if not client.images.list(name=tag):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "wheels").mkdir()
                download(Path(folder) / "wheels")
                needs = " ".join(requirements())
                (Path(folder) / "Dockerfile").write_text(DOCKERFILE.format(base=base, needs=needs))
                client.images.build(path=folder, tag=tag, network_mode="none", rm=True)
        said = list(client.api.push(repository, tag=digest, stream=True, decode=True))
        assert not [each for each in said if "error" in each], said
        (pushed,) = (each["aux"]["Digest"] for each in said if "Digest" in each.get("aux", {}))
        return f"{repository}@{pushed}"
    finally:
        client.close()
