"""Whatever a run id looks like, its names are ones that Kubernetes takes, and its own."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_remote_backend.compute.kubernetes import names
from mlflow_remote_backend.compute.kubernetes.names import Address
from mlflow_remote_backend.errors import ComputeError

HOST_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # RFC 1123
LABEL = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
TEXT = st.one_of(st.text(max_size=300), st.from_regex(r"[a-z0-9-]{1,60}", fullmatch=True), st.just("0" * 32))


@given(TEXT, TEXT)
def test_names_are_host_names_with_room_for_a_pods_suffix(run_id: str, submission_id: str) -> None:
    job = names.job_name(run_id)
    assert HOST_NAME.fullmatch(job)
    assert len(f"{job}-0-abcde") <= 63
    assert HOST_NAME.fullmatch(names.secret_name(run_id, submission_id))


@given(TEXT, TEXT)
def test_two_run_ids_never_share_a_name_or_a_label(one: str, other: str) -> None:
    if one != other:
        assert names.job_name(one) != names.job_name(other)
        assert names.label_value(one) != names.label_value(other) or not one or not other


@given(TEXT)
def test_labels_are_valid_and_selectors_cannot_be_broken_out_of(run_id: str) -> None:
    value = names.label_value(run_id)
    assert len(value) <= 63
    assert not value or LABEL.fullmatch(value)
    assert names.run_selector(run_id).count(",") == 1
    assert names.run_selector(run_id).count("=") == 2


def test_a_plain_run_id_is_seen_in_the_name() -> None:
    assert names.job_name("0123456789abcdef0123456789abcdef") == "mlr-0123456789abcdef0123456789abcdef"
    assert names.label_value("0123456789abcdef") == "0123456789abcdef"


NAME = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?", fullmatch=True)


@given(NAME, NAME, st.text(max_size=80), st.text(max_size=80))
def test_a_handle_is_read_back_as_it_was(namespace: str, job: str, context: str, server: str) -> None:
    address = Address(namespace, job, context, server)
    url = address.url
    assert url.isascii()
    assert not re.search(r"\s", url)
    assert Address.parse(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "local://here/run",
        "kubernetes://",
        "kubernetes://namespace",
        "kubernetes://namespace/",
        "kubernetes:///job",
        "kubernetes://name_space/job",
        "kubernetes://namespace/job/log",
        "kubernetes://namespace/..%2F..%2Fsecrets",
        "kubernetes://namespace/job%00",
    ],
)
def test_what_is_no_handle_is_refused(url: str) -> None:
    with pytest.raises(ComputeError):
        Address.parse(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:word@host.example.com:6443/x", "https://host.example.com:6443/x"),
        ("https://host.example.com", "https://host.example.com"),
    ],
)
def test_an_address_is_shown_without_credentials(url: str, shown: str) -> None:
    assert names.without_userinfo(url) == shown
