"""What every target must do, through MLflow's own interface. A target's test module subclasses :class:`TargetContract`
and has the fixtures ``client`` (whose deployments are deleted after the test), ``config`` (what each needs), and
``left`` (names of what is left where the target keeps deployments)."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from functools import partial

import pandas
import pytest
from mlflow.exceptions import MlflowException

from mlflow_remote_backend.deployment import calling
from mlflow_remote_backend.deployment.spec import Answer

NAME = f"mlr-test-{os.getpid()}"  # others may use the same engine or cluster
ONE = pandas.DataFrame({"x": [0.0]})

#: what the loader does -> what the message says, and the code
BROKEN = {
    "a file is missing": ("open(path + '/nothing-here')", "lacks a file", "USER_ERROR"),
    "an import fails": ("import no_such_module", "no_such_module", "ENVIRONMENT"),
    "it takes too long": ("time.sleep(600)", "start_timeout", "START_TIMEOUT"),
    "it ends the process": ("os._exit(7)", "exit code 7", "USER_ERROR"),
}


Ask = Callable[..., Answer]


def asked_at(url: str, path: str, body: bytes | None = None, token: str = "") -> Answer:
    return calling.ask(url, path, body=body, token=token, timeout_s=60)


class Load:
    """Requests one after the other, for the duration of a block; every answer is kept. ``where``: a server's URL, or
    what asks it."""

    def __init__(self, where: str | Ask) -> None:
        self.ask: Ask = where if callable(where) else partial(asked_at, where)
        self.answers: list[tuple[int, object]] = []
        self.answered_at: list[float] = []  # of those that succeeded
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self.ask("/invocations", calling.body_of(ONE))
                self.answers.append((answer.status, json.loads(answer.body)["predictions"]))
                self.answered_at.append(time.monotonic())
            except Exception as error:  # noqa: BLE001  whatever it is, it is a request that failed
                self.answers.append((0, repr(error)))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def longest_gap_s(self) -> float:
        return max(after - before for before, after in itertools.pairwise(self.answered_at))

    def until_more(self, count: int) -> None:
        wanted = len(self.answers) + count
        deadline = time.monotonic() + 60
        while len(self.answers) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(self.answers) >= wanted


class TargetContract:
    def ask(self, made: dict, path: str, body: bytes | None = None, token: str = "") -> Answer:
        """One request as the deployment's users send it."""
        return asked_at(made["url"], path, body, token)

    def test_train_register_deploy_predict_update_delete(self, trained, client, config, left, capfd):
        made = client.create_deployment(NAME, trained.model, config={**config, "tags": {"owner": "ada"}})
        assert (made["state"], made["model_version"], made["run_id"]) == ("ready", "diabetes/1", trained.run_id)
        assert made["flavor"] == "python_function"
        assert made["origin"]["mlflow_remote.run_id"] == trained.run_id
        shown = capfd.readouterr().err
        assert "loading the model" in shown
        assert "Application startup complete" in shown

        answer = client.predict(NAME, trained.data)
        assert list(answer["predictions"]) == pytest.approx(trained.predicted, rel=1e-9)
        split = trained.data.to_dict(orient="split")
        as_dict = client.predict(NAME, {"dataframe_split": {"columns": split["columns"], "data": split["data"]}})
        assert as_dict == answer == client.predict(NAME, json.dumps({"dataframe_split": split}))
        with pytest.raises(MlflowException, match="missing inputs"):
            client.predict(NAME, trained.data.drop(columns=["bmi"]))

        later = client.update_deployment(NAME, "models:/diabetes@champion", config={"workers": 2})
        assert (later["revision"], later["workers"], later["url"]) == (2, 2, made["url"])
        assert (later["tags"], later["model_uri"]) == ({"owner": "ada"}, "models:/diabetes@champion")
        assert client.predict(NAME, trained.data) == answer
        assert client.get_deployment(NAME)["revision"] == 2
        assert NAME in [each["name"] for each in client.list_deployments()]

        client.delete_deployment(NAME)
        client.delete_deployment(NAME)
        assert NAME not in [each["name"] for each in client.list_deployments()]
        assert not left()

    def test_an_update_under_load_fails_not_one_request_and_a_broken_one_changes_nothing(
        self, client, config, make_model
    ):
        made = client.create_deployment(NAME, make_model("first", predicts="1"), config=config)
        with Load(partial(self.ask, made)) as load:
            with pytest.raises(MlflowException, match="no such luck") as broken:
                client.update_deployment(NAME, make_model("broken", loads="raise RuntimeError('no such luck')"))
            assert client.get_deployment(NAME)["revision"] == 1
            client.update_deployment(NAME, make_model("second", predicts="2"))
            load.until_more(5)
        assert "Revision 1 still serves" in str(broken.value)
        assert {status for status, _ in load.answers} == {200}, load.answers
        assert [said for _, said in load.answers][-1] == [2]
        assert client.get_deployment(NAME)["revision"] == 2

    @pytest.mark.parametrize("how", BROKEN)
    def test_a_broken_model_is_diagnosed_and_leaves_nothing(self, client, config, make_model, left, how):
        loads, words, code = BROKEN[how]
        patience = "60s" if how != "it takes too long" else "3s"
        with pytest.raises(MlflowException, match=words) as failed:
            client.create_deployment(
                NAME, make_model("broken", loads=loads), config={**config, "start_timeout": patience}
            )
        assert failed.value.code == code
        assert "Nothing is left of it" in str(failed.value)
        assert not left()

    def test_a_slow_model_is_waited_for_and_a_taken_name_is_refused(self, client, config, make_model):
        slow = make_model("slow", loads="time.sleep(5)")
        client.create_deployment(NAME, slow, config=config)
        with pytest.raises(MlflowException, match=f"There is a deployment {NAME} on"):
            client.create_deployment(NAME, slow, config=config)
        assert client.predict(NAME, ONE)["predictions"] == [1]

    def test_the_token_is_wanted_shown_nowhere_and_outlives_an_update(self, client, config, make_model, monkeypatch):
        monkeypatch.setenv("THE_TOKEN", "s3cret-token")
        monkeypatch.setenv("PASSED", "s3cret-value")
        guarded = make_model("guarded", predicts="len(os.environ['PASSED'])")
        made = client.create_deployment(
            NAME, guarded, config={**config, "token_env": "THE_TOKEN", "pass_env": ["PASSED"]}
        )
        assert made["guarded"] is True
        body = calling.body_of(ONE)
        for token in ("", "wrong", "s3cret-toke"):
            assert self.ask(made, "/invocations", body, token).status == 401
        assert self.ask(made, "/openapi.json").status == 401
        assert self.ask(made, "/ping").status == 200
        assert client.predict(NAME, ONE)["predictions"] == [12]
        monkeypatch.delenv("THE_TOKEN")
        monkeypatch.delenv("PASSED")
        client.update_deployment(NAME, config={"description": "the secrets stay"})
        assert client.predict(NAME, ONE)["predictions"] == [12]
        assert self.ask(made, "/invocations", body).status == 401
        assert "s3cret" not in json.dumps(client.get_deployment(NAME))
