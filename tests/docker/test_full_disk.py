"""An engine whose disk is full, whoever filled it: a job waits for room, says so, and ends for its lack in the end."""

from __future__ import annotations

import os
import subprocess

import pytest
from own_engine import own_engine, why_not

from mlflow_remote_backend.compute.docker import tail
from mlflow_remote_backend.errors import JobError
from mlflow_remote_backend.job import Limits, Reason
from mlflow_remote_backend.runner.verdict import classify

pytestmark = [pytest.mark.docker, pytest.mark.skipif(bool(why_not()), reason=why_not())]

DISK_BYTES = 24 << 20


@pytest.fixture(scope="module")
def options(tmp_path_factory, shell_image):
    """Of a job on an engine with a small disk."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "data").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder / "data"], check=True)
    try:
        with own_engine(folder) as made:
            made.load(shell_image)
            yield {"base_url": made.url, "network": "none"}
    finally:
        subprocess.run(["umount", "-l", folder / "data"], capture_output=True)


def test_a_project_that_does_not_fit_is_refused(make_job, options, shell_image) -> None:
    job = make_job("true", image=shell_image, files={"big": os.urandom(DISK_BYTES)}, options=options)
    with pytest.raises(JobError, match="disk is full") as failed:
        job.start()
    assert failed.value.code == "VOLUME"


@pytest.mark.parametrize("filler", ["> outputs/f", ""])
def test_a_program_that_fills_the_disk_is_waited_for_and_then_ended_by_name(
    make_job, options, shell_image, until, filler
) -> None:
    command = f"echo before; head -c {2 * DISK_BYTES} /dev/zero {filler}; echo after"
    job = make_job(command, image=shell_image, options=options, limits=Limits(finalize_timeout_s=2.0))
    running = job.start()
    until(lambda: "disk is full" in str(job.folder.said().get("detail")))
    record = job.end(running)
    verdict = classify(record, None, None, cancel_requested=False)
    assert verdict.reason is Reason.VOLUME
    assert "disk is full" in verdict.message
    assert job.log().startswith(b"before\n")


def test_a_program_goes_on_when_there_is_room_again(make_job, options, shell_image, until) -> None:
    command = f"echo before; head -c {2 * DISK_BYTES} /dev/zero > /big; rm -f /big; echo after"
    job = make_job(command, image=shell_image, options=options)
    assert job.run().exit_code == 0
    assert b"before\n" in job.log()
    assert job.log().endswith(b"after\n")


def test_room_is_told_as_it_is(tmp_path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        assert tail.has_room(str(tmp_path))
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "big").write_bytes(bytes(1 << 20))
        assert not tail.has_room(str(tmp_path))
        (tmp_path / "big").unlink()
        assert tail.has_room(str(tmp_path))
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_outputs_that_do_not_fit_on_this_machine_leave_room_for_the_verdict(make_job, shell_image, tmp_path) -> None:
    (tmp_path / "state").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path / "state"], check=True)
    try:
        command = "head -c 8000000 /dev/urandom > outputs/big"
        job = make_job(command, image=shell_image, outputs=("outputs",), limits=Limits(finalize_timeout_s=1.0))
        record = job.run()
        assert (record.exit_code, record.error["code"]) == (0, "FINALIZE_INCOMPLETE")
        assert "No space left" in record.error["message"]
    finally:
        subprocess.run(["umount", "-l", tmp_path / "state"], check=True)
