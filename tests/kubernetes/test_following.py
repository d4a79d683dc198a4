"""Following a job over an API that fails in every way a real one does: nothing is lost, nothing shown twice."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faultproxy
import pytest
from faultproxy import FaultProxy
from namespaces import Namespace, until

from mlflow_remote_backend.compute import from_handle
from mlflow_remote_backend.compute.base import JobHandle
from mlflow_remote_backend.compute.kubernetes import objects
from mlflow_remote_backend.errors import ComputeError, Detached
from mlflow_remote_backend.submitted_run import RemoteExecutionException, attach
from mlflow_remote_backend.testing import Projects, ended, stored_log

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

LOG = r"/log\?"
WATCH = r"[?&]watch=true"


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The API server as this process reaches it from here on."""
    with FaultProxy(Path(os.environ["KUBECONFIG"])).running() as proxy:
        monkeypatch.setenv("KUBECONFIG", str(proxy.client_config(tmp_path)))
        yield proxy


def counting(lines: int, pause_s: float) -> str:
    return f"i=0; while [ $i -lt {lines} ]; do echo line $i; i=$((i+1)); sleep {pause_s}; done"


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def wait(projects: Projects, script: str, **config: Any) -> Any:
    run = projects.submit(projects.make(script), stream_output=True, **config)
    run.wait()
    return run


def expected(lines: int) -> list[str]:
    return [f"line {i}" for i in range(lines)]


# -------------------------------------------------------------------------------------------------------- the log


@pytest.mark.parametrize(
    "fault",
    [faultproxy.cut(4_000), faultproxy.end(4_000), faultproxy.cut(1), faultproxy.reset, faultproxy.status(500)],
    ids=["cut off", "ended early", "cut at once", "reset", "500"],
)
def test_a_log_stream_that_breaks_again_and_again_shows_each_line_once(
    projects: Projects, proxy: FaultProxy, capsys: pytest.CaptureFixture[str], fault: faultproxy.Fault
) -> None:
    proxy.fail("GET", LOG, fault, times=12)
    run = wait(projects, counting(1000, 0.002))
    assert run.get_status() == "FINISHED"
    assert shown(capsys) == expected(1000)
    assert stored_log(run.run_id).decode().splitlines() == expected(1000)
    assert proxy.count("GET", LOG) > 2


def test_a_log_stream_that_is_cut_every_moment_is_taken_up_at_once(
    projects: Projects, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stream that brought something is no failure: the next one does not wait longer for it."""
    proxy.fail("GET", LOG, faultproxy.cut_after_s(0.3), times=None)
    run = wait(projects, counting(500, 0.02))
    assert shown(capsys) == expected(500)
    assert stored_log(run.run_id).decode().splitlines() == expected(500)
    assert proxy.count("GET", LOG) > 12


def test_a_silent_log_stream_does_not_hide_the_end(
    projects: Projects, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half-open: the stream stays open and says nothing; the other witnesses tell of the end."""
    proxy.fail("GET", LOG, faultproxy.stall(4000), times=None)
    run = wait(projects, counting(300, 0.01))
    assert run.get_status() == "FINISHED"
    assert shown(capsys) == expected(300)


@pytest.mark.parametrize(
    "text",
    [
        "unable to retrieve container logs for containerd://0123",
        "failed to create fsnotify watcher: too many open files",
        "rpc error: code = NotFound desc = an error occurred when try to find container",
    ],
)
def test_what_the_kubelet_says_is_not_shown_as_output(
    projects: Projects, proxy: FaultProxy, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    proxy.fail("GET", LOG, faultproxy.said_by_the_kubelet(text), times=3)
    run = wait(projects, counting(50, 0.02))
    assert shown(capsys) == expected(50)
    assert stored_log(run.run_id).decode().splitlines() == expected(50)


def test_without_the_right_to_read_logs_the_stored_one_is_shown(
    projects: Projects, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.fail("GET", LOG, faultproxy.status(403, reason="Forbidden"), times=None)
    wait(projects, counting(50, 0.01))
    assert shown(capsys) == expected(50)
    assert proxy.count("GET", LOG) <= 2


def test_a_log_far_larger_than_what_the_kubelet_keeps_is_whole(
    projects: Projects, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    """40 MB in a second or two: the kubelet rotates the sidecar's log under the reader, who comes late."""
    proxy.fail("GET", LOG, faultproxy.cut(300_000), times=20)
    run = wait(projects, "seq 1 400000 | sed 's/$/ " + "x" * 90 + "/'")
    lines = [f"{i} {'x' * 90}" for i in range(1, 400_001)]
    assert stored_log(run.run_id).decode().splitlines() == lines
    assert shown(capsys) == lines


# -------------------------------------------------------------------------------------------------------- the state


@pytest.mark.parametrize(
    "fault",
    [
        faultproxy.watch_error,
        faultproxy.status(410, reason="Expired"),
        faultproxy.cut(10),
        faultproxy.end(0),
        faultproxy.malformed,
        faultproxy.reset,
        faultproxy.status(504),
    ],
    ids=["ERROR event", "410", "cut off", "ends at once", "malformed", "reset", "504"],
)
def test_watches_that_end_change_nothing(projects: Projects, proxy: FaultProxy, fault: faultproxy.Fault) -> None:
    proxy.fail("GET", WATCH, fault, times=None)
    run = wait(projects, "sleep 3; exit 4")
    view = run.view()
    assert (view.status, view.tag("exit_code"), view.tag("reason")) == ("FAILED", "4", "USER_ERROR")
    assert proxy.count("GET", WATCH) > 1


def test_a_silent_watch_does_not_hide_the_end(projects: Projects, proxy: FaultProxy) -> None:
    proxy.fail("GET", WATCH, faultproxy.stall(0), times=None)
    proxy.fail("GET", LOG, faultproxy.status(403, reason="Forbidden"), times=None)
    run = wait(projects, "sleep 2; exit 4")
    assert run.view().tag("exit_code") == "4"


def test_an_api_server_that_is_away_ends_nothing(
    projects: Projects, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything fails for a while, as in a restart of the control plane; the run is never called failed."""
    run = projects.submit(projects.make(counting(100, 0.05)), stream_output=True)
    done: list[bool] = []
    waiter = threading.Thread(target=lambda: done.append(run.wait()))
    waiter.start()
    try:
        until(lambda: proxy.count("GET", LOG), what="the log is followed")
        proxy.fail("*", ".", faultproxy.reset, times=None)
        threading.Event().wait(6)
        assert (
            not run._tracking.view(run.run_id).tag("finalized") or run._tracking.view(run.run_id).status == "FINISHED"
        )
    finally:
        proxy.heal()
        waiter.join(60)
    assert done == [True]
    assert shown(capsys) == expected(100)


def test_a_loaded_server_is_given_the_time_it_asks_for(projects: Projects, proxy: FaultProxy) -> None:
    proxy.fail("POST", "/jobs$", faultproxy.status(429, retry_after_s=1), times=2)
    proxy.fail("*", "/secrets$", faultproxy.status(429, retry_after_s=1), times=1)
    assert projects.run("exit 0").status == "FINISHED"


# -------------------------------------------------------------------------------------------------------- the login


def test_an_expired_login_is_renewed_once_without_a_word(projects: Projects, proxy: FaultProxy) -> None:
    run = projects.submit(projects.make("sleep 1; exit 0"))
    proxy.fail("GET", ".", faultproxy.status(401, reason="Unauthorized"), times=1)
    assert ended(run).status == "FINISHED"


def test_a_login_that_stays_expired_detaches_and_the_run_goes_on(
    projects: Projects, proxy: FaultProxy, namespace: Namespace
) -> None:
    run = projects.submit(projects.make("sleep 8; echo still here"))
    proxy.fail("*", ".", faultproxy.status(401, reason="Unauthorized", message="Unauthorized"), times=None)
    with pytest.raises(RemoteExecutionException) as caught:
        run.wait()
    assert isinstance(caught.value.__cause__, Detached)
    assert f"mlflow-remote attach {run.run_id}" in str(caught.value)
    proxy.heal()
    assert objects.name(namespace.job(run.run_id))
    assert ended(run).status == "FINISHED"
    assert stored_log(run.run_id) == b"still here\n"


# -------------------------------------------------------------------------------------------------------- elsewhere


def test_another_machine_without_a_kubeconfig_sees_everything(
    projects: Projects, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = projects.submit(projects.make(counting(40, 0.05)))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    elsewhere = attach(run.run_id)
    assert list(elsewhere.logs(follow=True)) == expected(40)
    assert elsewhere.get_status() == "FINISHED"


def test_commands_on_another_machine_follow_and_cancel(
    projects: Projects, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workdir: Path, mlflow_remote: Any
) -> None:
    """By the stored parts and by tag: no kubeconfig is there."""
    run = projects.submit(projects.make(counting(20, 0.1)))
    waiting = projects.submit(
        projects.make("trap 'echo saved; exit 0' TERM; echo started; while :; do sleep 0.1; done")
    )
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    followed = mlflow_remote("logs", "-f", run.run_id)
    assert followed.returncode == 0, followed.stderr
    assert followed.stdout.splitlines() == expected(20)
    cancelled = mlflow_remote("cancel", waiting.run_id)
    assert cancelled.returncode == 0, cancelled.stderr
    view = ended(attach(waiting.run_id), 60)
    assert (view.status, view.tag("reason")) == ("KILLED", "CANCELLED")
    log = stored_log(waiting.run_id)  # the shell may tell of what it had started
    assert log.startswith(b"started\n")
    assert log.endswith(b"saved\n")


def test_a_handle_of_another_cluster_is_not_followed_here(projects: Projects) -> None:
    run = projects.submit(projects.make("exit 0"))
    url = ended(run).tag("handle").partition("?")[0] + "?context=other&server=https%3A%2F%2Fother.example.com"
    with pytest.raises(ComputeError, match=r"other\.example\.com"):
        from_handle(JobHandle(url)).status(JobHandle(url))


def test_the_command_follows_and_exits_as_the_run_does(
    projects: Projects, workdir: Path, proxy: FaultProxy, mlflow_remote: Any
) -> None:
    run = projects.submit(projects.make(counting(200, 0.01) + "; exit 3"))
    proxy.fail("GET", LOG, faultproxy.cut(2000), times=5)
    result = mlflow_remote("attach", run.run_id)
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines() == expected(200)
