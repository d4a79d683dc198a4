"""What engines say, word for word, and what a person is told."""

from __future__ import annotations

import pytest

from mlflow_remote_backend.compute.docker import diagnosis
from mlflow_remote_backend.job import Reason


@pytest.mark.parametrize(
    ("words", "reason", "said"),
    [
        (
            "failed to create task for container: OCI runtime create failed: exec: "
            '"/bin/sh": stat /bin/sh: no such file or directory: unknown',
            Reason.CONTAINER_CONFIG,
            "no /bin/sh",
        ),
        (
            'could not select device driver "" with capabilities: [[gpu]]',
            Reason.CONTAINER_CONFIG,
            "NVIDIA Container Toolkit",
        ),
        (
            "invalid mount config for type bind: bind source path does not exist: /data",
            Reason.VOLUME,
            "engine's machine",
        ),
        ("error creating overlay mount: no space left on device", Reason.VOLUME, "disk is full"),
        ("unable to find user nobody2: no matching entries in passwd file", Reason.CONTAINER_CONFIG, "refuses"),
    ],
)
def test_why_a_container_did_not_start(words: str, reason: Reason, said: str) -> None:
    found = diagnosis.of_start("mlr-1", "image", words)
    assert found.reason is reason
    assert said in f"{found.message} {found.hint}"
    assert found.words == words


@pytest.mark.parametrize(
    ("state", "own_words", "reason", "said"),
    [
        (None, "", Reason.JOB_DELETED, "removed by somebody"),
        ({"OOMKilled": True, "ExitCode": 137}, "", Reason.OOM, "memory limit of 64 MiB"),
        ({"ExitCode": 125}, "The connection broke before everything had come.", Reason.BOOTSTRAP, "exit code 125"),
        ({"ExitCode": 126}, "", Reason.BOOTSTRAP, "exit code 126"),
        ({"ExitCode": 127}, "sh: cat: not found", Reason.BOOTSTRAP, "POSIX shell"),
        ({"ExitCode": 137}, "", Reason.KILLED_BY_SYSTEM, "SIGKILL"),
        ({"ExitCode": 255}, "", Reason.KILLED_BY_SYSTEM, "reboot"),
        ({"ExitCode": 1}, "exec /bin/sh: exec format error", Reason.CONTAINER_CONFIG, "another kind of machine"),
        ({"ExitCode": 255}, "exec /bin/sh: exec format error", Reason.CONTAINER_CONFIG, "another kind of machine"),
        ({"ExitCode": 0}, "", Reason.KILLED_BY_SYSTEM, "exit code 0"),
    ],
)
def test_why_a_container_ended_without_a_record(state, own_words: str, reason: Reason, said: str) -> None:
    found = diagnosis.of_ended("mlr-1", None if state is None else {"State": state}, own_words, 64 << 20)
    assert found.reason is reason
    assert said in f"{found.message} {found.hint}"


@pytest.mark.parametrize(
    ("words", "fatal", "reason"),
    [
        ("manifest for registry.example.com/a:1 not found: manifest unknown", True, Reason.IMAGE_PULL),
        ("pull access denied for a, repository does not exist or may require 'docker login'", True, Reason.IMAGE_PULL),
        ("no matching manifest for linux/arm64/v8 in the manifest list entries", True, Reason.IMAGE_PULL),
        ("dial tcp 10.0.0.1:443: connect: connection refused", False, Reason.IMAGE_PULL),
        ("net/http: TLS handshake timeout", False, Reason.IMAGE_PULL),
        ("toomanyrequests: You have reached your pull rate limit", False, Reason.IMAGE_PULL),
        ("failed to register layer: write /usr/lib/x: no space left on device", True, Reason.VOLUME),
    ],
)
def test_why_an_image_cannot_be_pulled(words: str, fatal: bool, reason: Reason) -> None:
    found = diagnosis.of_pull("registry.example.com/a:1", words)
    assert (found.fatal, found.reason) == (fatal, reason)
