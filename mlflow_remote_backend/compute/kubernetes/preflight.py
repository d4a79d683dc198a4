"""Before anything is created: could this job run here? Asked of the cluster itself, in its own words."""

from __future__ import annotations

from collections.abc import Sequence

from ...job import JobSpec
from ..base import Secrets
from .api import Api
from .manifest import Manifest


def check(api: Api, namespace: str, spec: JobSpec, built: Manifest, secrets: Secrets) -> Sequence[str]:
    return ()
