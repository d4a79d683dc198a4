"""MLflow's limits of a request: ours, while a call of ours runs.

MLflow reads them from the environment at each request, and takes them in no other way. All threads share that: where
several calls run, the longest timeout and the fewest retries count for all. Afterwards a variable that was not set
holds MLflow's default instead of being removed: whoever goes through the environment at that moment would stumble over
one that is gone (``os.environ.items()`` takes the names first, then looks each up).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

BACKOFF_FACTOR = 1
_VARIABLES = (
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
)

_lock = threading.Lock()
_running: list[tuple[int, int]] = []
_before: dict[str, str | None] = {}
_defaults: dict[str, str] = {}  # what stands in the environment only because we put it there


@contextlib.contextmanager
def limited(timeout_s: int, retries: int) -> Iterator[None]:
    """While the block runs a request of MLflow's takes at most ``timeout_s`` until the first byte of its answer, and is
    tried ``retries`` times more."""
    own = (timeout_s, retries)
    with _lock:
        if not _running:
            _before.update(_as_the_user_has_them())
        _running.append(own)
        _apply()
    try:
        yield
    finally:
        with _lock:
            _running.remove(own)
            if _running:
                _apply()
            else:
                _restore()


def users_environ() -> dict[str, str]:
    """The environment without our limits: what a program is to inherit."""
    with _lock:
        own = _before if _running else _as_the_user_has_them()
        others = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    return {**others, **{name: value for name, value in own.items() if value is not None}}


def _as_the_user_has_them() -> dict[str, str | None]:
    found = {name: os.environ.get(name) for name in _VARIABLES}
    return {name: None if value == _defaults.get(name) else value for name, value in found.items()}


def _apply() -> None:
    longest_s, fewest = max(each[0] for each in _running), min(each[1] for each in _running)
    os.environ.update(zip(_VARIABLES, (str(longest_s), str(fewest), str(BACKOFF_FACTOR), "true"), strict=True))


def _restore() -> None:
    from mlflow import environment_variables

    for name, value in _before.items():
        if value is None:
            value = _defaults[name] = str(getattr(environment_variables, name).default)
        os.environ[name] = value
