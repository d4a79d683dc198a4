"""What the supervisor does with a container: everything comes home, whatever happens to it."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.docker


def test_log_outputs_and_exit_code_come_home(make_job) -> None:
    job = make_job("echo hello; mkdir -p outputs/deep; echo result > outputs/deep/file; exit 3")
    record = job.run()
    assert (record.exit_code, record.error) == (3, None)
    assert job.log() == b"hello\n"
    assert job.output("deep/file") == b"result\n"
