"""The envelope carries a job spec unchanged, and is refused where it cannot be understood."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_remote_backend import job
from mlflow_remote_backend.errors import JobError
from mlflow_remote_backend.runner import envelope

text = st.text(max_size=20)
specs = st.builds(
    job.JobSpec,
    run=st.builds(job.RunRef, text, text, text, text),
    submission_id=text,
    project_name=text,
    entry_point=st.builds(
        job.EntryPoint,
        text,
        text,
        st.lists(st.builds(job.Parameter, text, text, st.none() | text), max_size=3).map(tuple),
    ),
    parameters=st.dictionaries(text, text, max_size=3),
    snapshot=st.builds(job.SnapshotRef, text, st.integers(0, 2**40), text),
    environment=st.builds(job.EnvironmentRef),
    resources=st.builds(job.Resources, st.none() | st.floats(0.1, 64), st.none() | st.integers(1, 2**40)),
    limits=st.builds(job.Limits, st.none() | st.floats(1, 1e6)),
    retry=st.builds(job.Retry, st.integers(1, 9), st.just(("oom",)), st.lists(st.integers(1, 255)).map(tuple)),
    env_vars=st.dictionaries(text, text, max_size=3),
    outputs=st.lists(text, max_size=3).map(tuple),
    register_model=st.none() | st.just({"name": "m", "tags": {"a": "b"}}),
    options=st.just({"namespace": "x", "tolerations": [{"key": "gpu"}]}),
)


@settings(deadline=None)
@given(specs)
def test_a_spec_survives_the_way_there(spec):
    assert envelope.load(envelope.dump(spec)) == spec


@settings(deadline=None)
@given(specs)
def test_equal_specs_give_equal_bytes(spec):
    assert envelope.dump(spec) == envelope.dump(envelope.load(envelope.dump(spec)))


@settings(deadline=None)
@given(specs)
def test_a_compressed_one_says_the_same(spec):
    text = envelope.dump(spec)
    assert envelope.load(envelope.compressed(text)) == spec
    assert envelope.compressed(text) == envelope.compressed(text)


def test_a_bomb_is_refused():
    with pytest.raises(JobError, match="cannot be read"):
        envelope.load(envelope.compressed(" " * (envelope.MAX_BYTES + 1)))


def minimal() -> dict:
    spec = job.JobSpec(
        job.RunRef(), "s", "p", job.EntryPoint("main", "x"), {}, job.SnapshotRef("sha256:0", 0), job.EnvironmentRef()
    )
    return json.loads(envelope.dump(spec))


def test_fields_of_a_newer_release_are_ignored_and_missing_ones_have_their_default():
    document = minimal()
    document["spec"]["invented_later"] = 1
    document["spec"]["run"]["invented_later"] = 1
    del document["spec"]["limits"], document["spec"]["outputs"]
    read = envelope.load(json.dumps(document))
    assert read.limits == job.Limits()
    assert read.outputs == ("outputs",)


def test_another_version_is_refused_by_number():
    document = minimal()
    document["version"] = 99
    with pytest.raises(JobError, match="99"):
        envelope.load(json.dumps(document))


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'{"version": 1}', b'{"version": 1, "spec": 3}', b"\xff", b"\x1f\x8b\x08broken"],
)
def test_a_damaged_envelope_is_a_job_error(raw):
    with pytest.raises(JobError):
        envelope.load(raw)
