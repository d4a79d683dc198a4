"""MLflow's limits of a request stand in the environment, which all threads and children share."""

from __future__ import annotations

import os
import threading

import pytest
from mlflow import environment_variables

from mlflow_remote_backend.runner.call_limits import limited, users_environ

NAMES = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR")
TIMEOUT, RETRIES, _ = NAMES


@pytest.fixture(autouse=True)
def not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
        monkeypatch.delenv(name, raising=False)


def test_they_are_the_users_again_outside_our_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT, "77")
    for _ in range(2):
        with limited(5, 1):
            assert (os.environ[TIMEOUT], os.environ[RETRIES]) == ("5", "1")
        assert environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 77
        for name in NAMES[1:]:
            assert getattr(environment_variables, name).get() == getattr(environment_variables, name).default
        assert environment_variables.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.get() is False


def test_of_calls_side_by_side_the_longest_timeout_and_the_fewest_retries_count() -> None:
    with limited(5, 2):
        with limited(30, 1):
            assert (os.environ[TIMEOUT], os.environ[RETRIES]) == ("30", "1")
        assert (os.environ[TIMEOUT], os.environ[RETRIES]) == ("5", "2")


def test_who_goes_through_the_environment_meanwhile_does_not_stumble() -> None:
    stop = threading.Event()

    def calls() -> None:
        while not stop.is_set():
            with limited(5, 1):
                pass

    thread = threading.Thread(target=calls)
    thread.start()
    try:
        for _ in range(20_000):
            dict(os.environ)
    finally:
        stop.set()
        thread.join()


def test_a_program_that_is_started_meanwhile_inherits_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with limited(5, 1):
        assert not set(NAMES) & set(users_environ())
    assert not set(NAMES) & set(users_environ())
    monkeypatch.setenv(TIMEOUT, "77")
    with limited(5, 1):
        assert users_environ()[TIMEOUT] == "77"
    assert users_environ()[TIMEOUT] == "77"
