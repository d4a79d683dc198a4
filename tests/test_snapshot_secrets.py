"""Credentials do not leave in a snapshot: planted ones stop it with file and line, what only looks like one does not.

Nothing that looks real stands in this file: each secret is put together when the test runs.
"""

from __future__ import annotations

import base64
import json
import os
import random
import string
import time
from pathlib import Path

import pytest

from mlflow_remote_backend import secret_scan
from mlflow_remote_backend.config import SnapshotOptions
from mlflow_remote_backend.errors import SnapshotError
from mlflow_remote_backend.snapshot import Listing, build, scan

ALPHANUMERIC = string.ascii_letters + string.digits
HEX = "0123456789abcdef"


def drawn(alphabet: str, length: int, seed: int = 1) -> str:
    """As random as a real one, and the same in each run."""
    return "".join(random.Random(f"{alphabet}{length}{seed}").choices(alphabet, k=length))


def armoured(kind: str = "RSA ", lines: int = 3) -> str:
    body = "\n".join(drawn(ALPHANUMERIC + "+/", 64, line) for line in range(lines))
    return f"-----BEGIN {kind}PRIVATE " + f"KEY-----\n{body}\n-----END {kind}PRIVATE " + "KEY-----\n"


def encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


AWS_ID = "AK" + "IA" + drawn(string.ascii_uppercase + "234567", 16)
GITHUB = "gh" + "p_" + drawn(ALPHANUMERIC, 36)

PLANTED = {
    "an RSA key": armoured(),
    "an OpenSSH key": armoured("OPENSSH "),
    "an EC key": armoured("EC "),
    "a PKCS 8 key": armoured(""),
    "an encrypted key": armoured("ENCRYPTED "),
    "a PGP key": armoured("PGP ").replace("KEY-----", "KEY BLOCK-----"),
    "a key in a Python string": f'KEY = """{armoured()}"""',
    "a key by lines of strings": "\n".join(f'"{line}\\n"' for line in armoured().splitlines()),
    "a service account": json.dumps({"type": "service_account", "private_key": armoured("")}),
    "a key with its header only": "  -----BEGIN PRIVATE " + "KEY-----\n",
    "a key with Windows line ends": armoured().replace("\n", "\r\n"),
    "a kubeconfig by another name": "  client-key-data: " + base64.b64encode(armoured().encode()).decode(),
    "an AWS id": f"aws_access_key_id = {AWS_ID}",
    "the AWS id of the documentation": "AK" + "IAIOSFODNN7" + "EXAMPLE",
    "a temporary AWS id": "AS" + "IA" + drawn(string.ascii_uppercase + string.digits, 16),
    "an AWS secret": "aws_secret_access_key = " + drawn(ALPHANUMERIC + "/+", 40),
    "an AWS secret in the environment": "export AWS_SECRET_ACCESS_KEY='" + drawn(ALPHANUMERIC, 40) + "'",
    "an AWS secret in JSON": '{"SecretAccessKey": "' + drawn(ALPHANUMERIC, 40) + '"}',
    "an Azure connection string": "AccountName=x;Account" + f"Key={drawn(ALPHANUMERIC + '+/', 86)}==;EndpointSuffix=x",
    "a Google key": "AI" + "za" + drawn(ALPHANUMERIC + "_-", 35),
    "a GitHub token": GITHUB,
    "a GitHub app's token": "gh" + "s_" + drawn(ALPHANUMERIC, 36),
    "a fine-grained GitHub token": "github" + "_pat_" + drawn(ALPHANUMERIC, 22) + "_" + drawn(ALPHANUMERIC, 59),
    "a GitLab token": "gl" + "pat-" + drawn(ALPHANUMERIC + "_-", 20),
    "a Slack token": "xo" + f"xb-{drawn(string.digits, 12)}-{drawn(string.digits, 13)}-{drawn(ALPHANUMERIC, 24)}",
    "a Slack webhook": "https://hooks.slack" + f".com/services/T{drawn(HEX.upper(), 8)}/B{drawn(HEX.upper(), 8)}/"
    + drawn(ALPHANUMERIC, 24),
    "a Hugging Face token": "h" + "f_" + drawn(string.ascii_letters, 34),
    "an OpenAI key": "s" + "k-" + drawn(ALPHANUMERIC, 48),
    "an OpenAI project key": "s" + "k-proj-" + drawn(ALPHANUMERIC + "_-", 100) + "A",
    "an Anthropic key": "s" + "k-ant-api03-" + drawn(ALPHANUMERIC + "_-", 90) + "A",
    "a Databricks token": "da" + "pi" + drawn(HEX, 32) + "-2",
    "a Stripe key": "s" + "k_live_" + drawn(ALPHANUMERIC, 24),
    "a SendGrid key": "S" + f"G.{drawn(ALPHANUMERIC, 22)}.{drawn(ALPHANUMERIC, 43)}",
    "an npm token": "//x/:_authToken=np" + "m_" + drawn(ALPHANUMERIC, 36),
    "a package index token": "py" + "pi-" + drawn(ALPHANUMERIC + "_-", 150) + "A",
    "a web token": f"Authorization: Bearer {encoded({'alg': 'RS256', 'kid': 'x'})}.{encoded({'sub': '1' * 20})}."
    + drawn(ALPHANUMERIC + "_-", 300) + "A",
}  # fmt: skip

LOOK_ALIKES = {
    "a public key": armoured().replace("PRIVATE", "PUBLIC"),
    "a certificate": armoured().replace("RSA PRIVATE " + "KEY", "CERTIFICATE"),
    "a header that is compared with": 'if text.startswith("-----BEGIN RSA PRIVATE ' + 'KEY-----"):\n    raise\n',
    "a header in prose": "The file begins with `-----BEGIN PRIVATE " + "KEY-----` and ends likewise.\n",
    "a shorter AWS id": "AK" + "IA" + "ABCDEFGH",
    "a longer word in capitals": "AK" + "IA" + "A" * 30,
    "letters inside a word": f"prefix{AWS_ID}",
    "a constant in capitals": "AK" + "IA" + "_LONG_CONSTANT_N",
    "a placeholder of x": "gh" + "p_" + "x" * 36,
    "a placeholder of stars": "aws_access_key_id = AK" + "IA" + "*" * 16,
    "a placeholder in words": "xo" + "xb-your-token-goes-here-please",
    "a variable": "aws_secret_access_key = os.environ['AWS_SECRET_ACCESS_KEY']",
    "a template": "AccountName=$NAME;Account" + "Key=$KEY;EndpointSuffix=x",
    "a function of that name": "hf_hub_download_and_load_pretrained_weights(repo)",
    "a package of that name": "pip install sk-learn-contrib-something-rather-long-indeed",
    "words that end in sk": "the-task-" + drawn(HEX, 40) + " risk-" + drawn(HEX, 40),
    "a hash": f"sha256:{drawn(HEX, 64)} {drawn(HEX, 40)}",
    "a UUID": "6f1c2f1e-8f5a-4c3e-9a4b-2f1e6f1c8f5a",
    "a picture in a notebook": "data:image/png;base64," + drawn(ALPHANUMERIC + "+/", 5000),
    "JSON in base64": encoded({"cells": ["x" * 500]}),
    "a marked line": f"key = '{GITHUB}'  # pragma: allowlist secret",
    "a line marked otherwise": f"key = '{GITHUB}'  # gitleaks:allow",
    "a URL with a password of nobody": "postgresql://postgres:postgres@localhost/db",
    "a test key": "s" + "k_test_" + drawn(ALPHANUMERIC, 24),
    "random bytes in letters": drawn(string.ascii_letters, 100_000),
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "MLproject").write_text("name: p\n")
    return tmp_path / "project"


def scanned(project: Path, *, allow_secrets: bool = False) -> Listing:
    return scan(project, SnapshotOptions(allow_secrets=allow_secrets))


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_secret_is_refused_with_file_and_line(project: Path, case: str) -> None:
    (project / "src").mkdir()
    (project / "src" / "settings.txt").write_text(f"first line\nsecond line\n{PLANTED[case]}\n")
    with pytest.raises(SnapshotError, match="1 file of the project would carry credentials") as refusal:
        scanned(project)
    assert refusal.value.words.startswith("- src/settings.txt:3: ")
    assert len(refusal.value.words.splitlines()) == 1


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_what_only_looks_like_one_is_packed(project: Path, case: str) -> None:
    (project / "settings.txt").write_text(f"first line\n{LOOK_ALIKES[case]}\n")
    assert [entry.path for entry in scanned(project).entries] == ["MLproject", "settings.txt"]


def test_the_message_holds_no_secret(project: Path) -> None:
    for number, secret in enumerate(PLANTED.values()):
        (project / f"{number:02}").write_text(secret)
    with pytest.raises(SnapshotError) as refusal:
        scanned(project)
    message = str(refusal.value)
    assert f"{len(PLANTED)} files" in message
    for secret in PLANTED.values():
        parts = [part for line in secret.splitlines() for part in line.replace('"', " ").split() if len(part) > 15]
        assert not any(part in message for part in parts)
    assert f"… and {len(PLANTED) - 10} more" in message
    assert "allow_secrets" in message


def test_each_line_of_a_file_is_reported(project: Path) -> None:
    (project / "a\n.py").write_text(f"\n\nx = '{AWS_ID}'\n\ny = '{GITHUB}'")
    with pytest.raises(SnapshotError) as refusal:
        scanned(project)
    assert refusal.value.words.splitlines() == ["- a\\n.py:3: AWS access key id", "- a\\n.py:5: GitHub token"]


@pytest.mark.parametrize(
    "content",
    [
        os.urandom(100_000) + b"\0" + AWS_ID.encode() + b"\0" + os.urandom(1000),
        b"x" * 5_000_000 + b" " + AWS_ID.encode(),
        b"\xff\xfe\n" * 10 + AWS_ID.encode(),
        AWS_ID.encode(),
    ],
)
def test_binary_files_and_long_lines_are_searched_too(project: Path, content: bytes) -> None:
    (project / "model.pkl").write_bytes(content)
    with pytest.raises(SnapshotError, match="would carry credentials"):
        scanned(project)


def test_only_the_beginning_of_a_large_file_is_searched(project: Path) -> None:
    with (project / "data").open("wb") as file:
        file.truncate(secret_scan.SCAN_BYTES)
        file.seek(0, os.SEEK_END)
        file.write(b" " + AWS_ID.encode())
    scanned(project)
    with (project / "data").open("r+b") as file:
        file.seek(secret_scan.SCAN_BYTES - 100)
        file.write(b" " + AWS_ID.encode() + b" ")
    with pytest.raises(SnapshotError, match="would carry credentials"):
        scanned(project)


def test_what_is_ignored_is_not_searched(project: Path) -> None:
    (project / "private.txt").write_text(GITHUB)
    (project / ".mlflowignore").write_text("private.txt\n")
    assert "private.txt" not in [entry.path for entry in scanned(project).entries]


def test_a_table_of_what_looks_like_keys_is_searched_in_one_pass() -> None:
    line = b"sk-" + b"a1" * 16 + b"\n"
    began = time.process_time()
    assert len(secret_scan.find(line * 40_000)) == 40_000
    assert time.process_time() - began < 5


def test_the_check_can_be_switched_off_and_forgets_nothing(project: Path, tmp_path: Path) -> None:
    (project / "private.txt").write_text(GITHUB)
    written_ns = (project / "private.txt").stat().st_ctime_ns
    while time.time_ns() <= written_ns + 100_000_000:  # a fresher file would not be remembered anyway
        os.sched_yield()
    allowed = scanned(project, allow_secrets=True)
    assert "private.txt" in [entry.path for entry in allowed.entries]
    build(allowed, tmp_path)
    with pytest.raises(SnapshotError, match="would carry credentials"):
        scanned(project)


def test_a_secret_written_between_scan_and_build_stops_the_snapshot(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (project / "settings.py").write_text("KEY = ''\n")
    listing = scanned(project)
    (project / "settings.py").write_text(f"KEY = '{GITHUB}'\n")
    with pytest.raises(SnapshotError, match="would carry credentials") as refusal:
        build(listing, out)
    assert refusal.value.words == "- settings.py:1: GitHub token"
    assert list(out.iterdir()) == []


def test_these_tests_would_pass_their_own_scan() -> None:
    for path in (Path(__file__), Path(secret_scan.__file__)):
        assert secret_scan.find(path.read_bytes()) == ()
