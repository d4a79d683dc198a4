"""A project, a cache, and where packages come from: what most tests of the environment need, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from channel import PYTHON_MINOR, SUBDIR
from wheels import Index

from mlflow_remote_backend.environment import locking, spec
from mlflow_remote_backend.job import EnvironmentRef


@dataclass
class Bench:
    """Writes declarations into ``project`` and locks them with ``channel`` and ``index``."""

    project: Path
    root: Path
    channel: Path
    index: Index
    progress: list[Any] = field(default_factory=list)

    def conda(self, *dependencies: str, pip: tuple[str, ...] = (), channels: str = "conda-forge") -> Bench:
        """Writes conda.yaml."""
        lines = ["name: bench", f"channels: [{channels}]", "dependencies:"]
        lines += [f"  - {each}" for each in (*dependencies, *(["pip:"] if pip else []))]
        lines += [f"      - {each}" for each in pip]
        (self.project / "conda.yaml").write_text("\n".join(lines) + "\n")
        return self

    def python_env(self, *dependencies: str, build: tuple[str, ...] = (), python: str = PYTHON_MINOR) -> Bench:
        """Writes python_env.yaml."""
        lines = [f"python: {python}"]
        for key, values in (("build_dependencies", build), ("dependencies", dependencies)):
            lines += [f"{key}:"] + [f"  - {each}" for each in values] if values else []
        (self.project / "python_env.yaml").write_text("\n".join(lines) + "\n")
        return self

    def options(self, **changed: Any) -> spec.EnvironmentOptions:
        mirror = {"conda-forge": self.channel.as_uri()}
        return spec.EnvironmentOptions(**{"channel_map": mirror, "index_url": (self.index.url,), **changed})

    def load(self, manager: str | None = None, **options: Any) -> spec.EnvSpec:
        conda = (self.project / "conda.yaml").exists()
        kind, name = ("conda", "conda.yaml") if conda else ("python", "python_env.yaml")
        return spec.load(self.project, kind, name, manager, self.options(**options))

    def lock(self, manager: str | None = None, *, platform: str = SUBDIR, **options: Any) -> EnvironmentRef:
        return locking.lock(self.load(manager, **options), platform, self.root, self.progress.append)

    def steps(self) -> list[str]:
        """The steps that were reported, each once."""
        return list(dict.fromkeys(progress.step for progress in self.progress))
