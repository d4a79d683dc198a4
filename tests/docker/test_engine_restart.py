"""An engine that is stopped or killed under a running job: the truth, and everything that was written."""

from __future__ import annotations

import signal

import pytest
from own_engine import own_engine, why_not

from mlflow_remote_backend.job import Reason
from mlflow_remote_backend.runner.verdict import classify

pytestmark = [pytest.mark.docker, pytest.mark.skipif(bool(why_not()), reason=why_not())]


@pytest.fixture
def machine(tmp_path_factory, shell_image):
    with own_engine(tmp_path_factory.mktemp("engine")) as made:
        made.load(shell_image)
        yield made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restarted_engine_ends_the_job_and_loses_nothing(make_job, machine, shell_image, until, number) -> None:
    options = {"base_url": machine.url, "network": "none"}
    job = make_job("echo before; echo r > outputs/f; exec sleep 300", image=shell_image, options=options)
    running = job.start()
    until(lambda: job.log() == b"before\n")
    machine.stop(number)
    until(lambda: "no contact" in str(job.folder.said().get("detail")))
    assert running.alive()
    machine.start()
    record = job.end(running)
    verdict = classify(record, None, None, cancel_requested=False)
    assert verdict.reason in (Reason.TERMINATED, Reason.KILLED_BY_SYSTEM), verdict
    assert job.log() == b"before\n"
    assert job.output("f") == b"r\n"
