"""Inputs -> a request's body; a server's answer -> predictions or the server's own complaint. And one HTTP request."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ..errors import ComputeError, RequestError
from .spec import Answer

JSON = "application/json"
UNAUTHORIZED = 401


def body_of(inputs: Any) -> bytes:
    """The scoring server's JSON of a DataFrame, an array, a list, a mapping or JSON text.

    A mapping that has one of the server's own fields (``dataframe_split``, ``inputs``, …) goes as it is, as does one
    that has ``messages`` or ``input`` (chat models); any other is taken for the ``inputs``. Raises RequestError.
    """
    try:
        return json.dumps(_payload(inputs), default=_plain).encode()
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"The inputs, a {type(inputs).__name__}, cannot be sent.",
            words=str(error),
            hint="Give a DataFrame, an array, a list, a mapping, or JSON text of what the scoring server takes.",
        ) from error


_FIELDS = frozenset({"dataframe_split", "dataframe_records", "instances", "inputs", "messages", "input", "prompt"})


def _payload(inputs: Any) -> Any:
    if isinstance(inputs, (str, bytes)):
        return json.loads(inputs)
    if hasattr(inputs, "to_dict") and hasattr(inputs, "columns"):
        if list(inputs.columns) in _READ_FROM_FILES:
            return _as_it_was(inputs)
        split = inputs.to_dict(orient="split")
        return {"dataframe_split": {"columns": split["columns"], "data": split["data"]}}
    if isinstance(inputs, Mapping):
        return dict(inputs) if _FIELDS & set(inputs) else {"inputs": dict(inputs)}
    if hasattr(inputs, "to_frame"):
        return _payload(inputs.to_frame())
    return {"inputs": inputs}


#: ``mlflow deployments predict -I FILE`` reads every file as a table, one with the server's own fields too.
_READ_FROM_FILES = (["dataframe_split"], ["dataframe_records"])


def _as_it_was(table: Any) -> dict[str, Any]:
    """``{"dataframe_split": {"columns": …}}`` as pandas reads it: a row for each inner key."""
    field = table.columns[0]
    column = table[field]
    return {field: list(column) if field == "dataframe_records" else column.to_dict()}


def _plain(value: Any) -> Any:
    """numpy's arrays and scalars, and times, as JSON has them; bytes as the scoring server has them, in base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    for name in ("tolist", "isoformat"):
        if hasattr(value, name):
            return getattr(value, name)()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def predictions(answer: Answer, name: str) -> Any:
    """MLflow's PredictionsResponse. Raises RequestError with the server's words: it refused the inputs."""
    from mlflow.deployments import PredictionsResponse

    if answer.status == 200:
        document = json.loads(answer.body)
        if isinstance(document, dict) and "predictions" not in document:
            return PredictionsResponse(document)  # a chat model's answer has a form of its own
        return PredictionsResponse.from_json(answer.body)
    raise RequestError(
        f"Deployment {name} refused the request (HTTP {answer.status}).",
        words=complaint(answer.body),
        hint=_HINTS.get(answer.status, ""),
    )


_HINTS = {
    400: "Compare the inputs with the model's signature: mlflow-remote describe shows it.",
    401: "Its token is not the one that this client knows.",
    504: "One request may take as long as the deployment's timeout says.",
}


def complaint(body: bytes) -> str:
    """What the server says in an error, without its traceback."""
    text = body.decode(errors="replace")
    try:
        document = json.loads(text)
    except ValueError:
        return text[:2000]
    if isinstance(document, dict) and document.get("message"):
        return str(document["message"])[:4000]
    return text[:2000]


def url_of(host: str, port: int | str) -> str:
    """Where a server that is bound to the address is reached from its own machine."""
    reached = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def ask(
    url: str, path: str, *, body: bytes | None = None, content_type: str = JSON, token: str = "", timeout_s: float = 60
) -> Answer:
    """One request to a server, without proxies. Raises a transient ComputeError: it did not answer."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    headers = {"Content-Type": content_type, **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        connection.request("GET" if body is None else "POST", parts.path + path, body, headers)
        response = connection.getresponse()
        return Answer(response.status, response.read(), response.getheader("Content-Type", ""))
    except (OSError, http.client.HTTPException) as error:
        raise ComputeError(f"{url} did not answer.", words=str(error), transient=True) from error
    finally:
        connection.close()
