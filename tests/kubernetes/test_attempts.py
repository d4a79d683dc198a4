"""Another attempt only where it was asked for, all of them in one run, one after the other."""

from __future__ import annotations

import pytest
from namespaces import Namespace, until

from mlflow_remote_backend.compute.kubernetes import objects
from mlflow_remote_backend.submitted_run import attach
from mlflow_remote_backend.testing import Projects, ended, stored_log

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]


def test_a_user_error_is_not_repeated(projects: Projects, namespace: Namespace) -> None:
    view = projects.run("echo tried; exit 3", retry={"max_attempts": 3, "on": ["disruption", "oom"]})
    assert (view.status, view.tag("exit_code"), view.tag("attempt")) == ("FAILED", "3", "0")
    assert stored_log(view.run_id) == b"tried\n"
    assert len(namespace.ours("pods")) == 1


def test_an_exit_code_that_was_named_is_repeated_until_it_works(
    projects: Projects, namespace: Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    script = 'echo attempt $MLFLOW_REMOTE_ATTEMPT; [ "$MLFLOW_REMOTE_ATTEMPT" = 1 ] || exit 17'
    run = projects.submit(
        projects.make(script), retry={"max_attempts": 3, "on": [{"exit_codes": [17]}]}, stream_output=True
    )
    assert run.wait() is True
    view = run.view()
    assert (view.status, view.tag("reason"), view.tag("attempt")) == ("FINISHED", "OK", "1")
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("attempt")] == [
        "attempt 0",
        "attempt 1",
    ]
    stored = [line for line in attach(run.run_id).logs() if line.startswith("attempt")]
    assert stored == ["attempt 0", "attempt 1"]


def test_the_last_attempts_end_is_the_runs(projects: Projects) -> None:
    view = projects.run("echo no; exit 17", retry={"max_attempts": 2, "on": [{"exit_codes": [17]}]})
    assert (view.status, view.tag("exit_code"), view.tag("attempt")) == ("FAILED", "17", "1")
    assert stored_log(view.run_id) == b"no\nno\n"


def test_a_disrupted_pod_is_repeated_where_asked_for(projects: Projects, namespace: Namespace) -> None:
    script = 'echo attempt $MLFLOW_REMOTE_ATTEMPT; [ "$MLFLOW_REMOTE_ATTEMPT" = 1 ] || sleep 600'
    run = projects.submit(projects.make(script), retry={"max_attempts": 2, "on": ["disruption"]}, grace_period="1s")
    until(lambda: "attempt 0" in list(run.logs()), what="the first attempt runs")
    pod = objects.name(namespace.pod(run.run_id))
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace.name}}
    namespace.api.create(f"{namespace.path('pods', pod)}/eviction", body)
    view = ended(run)
    assert (view.status, view.tag("attempt")) == ("FINISHED", "1")
    assert stored_log(run.run_id) == b"attempt 0\nattempt 1\n"
    assert list(attach(run.run_id).logs()) == ["attempt 0", "", "--- attempt 2 ---", "attempt 1"]


def test_a_long_attempt_takes_nothing_from_the_start_timeout_of_the_next(projects: Projects) -> None:
    script = '[ "$MLFLOW_REMOTE_ATTEMPT" = 1 ] || { sleep 25; exit 17; }'
    retry = {"max_attempts": 2, "on": [{"exit_codes": [17]}]}
    view = projects.run(script, retry=retry, start_timeout="20s")
    assert (view.status, view.tag("attempt")) == ("FINISHED", "1"), view.tag("message")


def test_an_out_of_memory_kill_is_repeated_where_asked_for(projects: Projects) -> None:
    script = 'echo attempt; [ "$MLFLOW_REMOTE_ATTEMPT" = 1 ] || exec tail /dev/zero'
    view = projects.run(script, retry={"max_attempts": 2, "on": ["oom"]}, resources={"memory": "64Mi"})
    assert (view.status, view.tag("attempt")) == ("FINISHED", "1")


def test_a_cancelled_run_is_not_repeated(projects: Projects, namespace: Namespace) -> None:
    run = projects.submit(
        projects.make("echo started; sleep 600"), retry={"max_attempts": 5, "on": ["disruption", "oom"]}
    )
    until(lambda: "started" in list(run.logs()), what="the program runs")
    run.cancel()
    assert ended(run).status == "KILLED"
    until(lambda: not namespace.ours("pods"), what="no pod is left")


def test_two_pods_never_run_at_once(projects: Projects, namespace: Namespace) -> None:
    """The replacement waits until the one that ends has ended."""
    script = """
    trap "sleep 3; echo late; exit 17" TERM
    echo attempt
    [ "$MLFLOW_REMOTE_ATTEMPT" = 1 ] || { sleep 600 & wait; }
    """
    run = projects.submit(projects.make(script), retry={"max_attempts": 2, "on": ["disruption"]})
    until(lambda: "attempt" in list(run.logs()), what="the first attempt runs")
    namespace.delete("pods", objects.name(namespace.pod(run.run_id)))
    seen = []

    def ended_while_counting() -> bool:
        seen.append(len([pod for pod in namespace.ours("pods") if not objects.ended(pod)]))
        return run._tracking.view(run.run_id).ended

    until(ended_while_counting, 90, "the run ends")
    assert max(seen) == 1
    assert stored_log(run.run_id) == b"attempt\nlate\nattempt\n"
