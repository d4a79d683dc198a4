"""Bring an artifact to where the job runs.

The usual case, an artifact store proxied by the tracking server, is one HTTP GET by the standard library: importing
MLflow costs more than a second of every start. Everything else (s3:, gs:, wasbs:, databricks, authentication plugins)
goes through MLflow's own download.
"""

from __future__ import annotations

import base64
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from ..errors import JobError

PATIENCE_S = 120.0  # how long a server that does not answer is tried again before the job gives up
TIMEOUT_S = 30.0
_AUTH_STATUS = (401, 403)


def fetch(uri: str, target: Path, tracking_uri: str, environ: Mapping[str, str]) -> None:
    """Write the artifact at ``uri`` to the file ``target``. Blocks; tries again for PATIENCE_S while nothing answers.

    Raises JobError: TRACKING_UNREACHABLE, TRACKING_AUTH, or SNAPSHOT_CORRUPT where the artifact does not exist.
    """
    parsed = urllib.parse.urlsplit(uri)
    if parsed.scheme in ("", "file"):
        _copy(Path(urllib.request.url2pathname(parsed.path) if parsed.scheme else uri), target)
    elif _proxied(uri, tracking_uri, environ):
        _fetch_http(artifact_url(uri, tracking_uri), target, environ)
    else:
        _fetch_by_mlflow(uri, target)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise JobError(f"Artifact {source} cannot be read here.", words=str(error), code="SNAPSHOT_CORRUPT") from error


def _proxied(uri: str, tracking_uri: str, environ: Mapping[str, str]) -> bool:
    scheme, host = urllib.parse.urlsplit(uri)[:2]
    if scheme != "mlflow-artifacts" or environ.get("MLFLOW_TRACKING_AUTH"):
        return False
    return bool(host) or urllib.parse.urlsplit(tracking_uri).scheme in ("http", "https")


def artifact_url(uri: str, tracking_uri: str) -> str:
    """The proxy's URL of an ``mlflow-artifacts:`` URI (MLflow: server/handlers.py, ``/mlflow-artifacts/artifacts``)."""
    artifact = urllib.parse.urlsplit(uri)
    server = urllib.parse.urlsplit(tracking_uri)
    scheme = server.scheme if server.scheme in ("http", "https") else "http"
    host, prefix = (artifact.netloc, "") if artifact.netloc else (server.netloc.rpartition("@")[2], server.path)
    path = urllib.parse.quote(urllib.parse.unquote(artifact.path.lstrip("/")))
    return f"{scheme}://{host}{prefix.rstrip('/')}/api/2.0/mlflow-artifacts/artifacts/{path}"


def _fetch_http(url: str, target: Path, environ: Mapping[str, str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    pause_s = 0.5
    while True:
        try:
            return _get(url, target, environ)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise _refused(url, error) from error
            words = f"HTTP {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            words = str(getattr(error, "reason", error))
        if time.monotonic() + pause_s > deadline:
            raise JobError(
                f"The tracking server does not answer from where the job runs: {url}",
                words=words,
                hint="Set tracking_uri in backend_config to an address that the job can reach.",
                code="TRACKING_UNREACHABLE",
            )
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, 10.0)


def _refused(url: str, error: urllib.error.HTTPError) -> JobError:
    auth = error.code in _AUTH_STATUS
    return JobError(
        f"The tracking server refuses the artifact {url}",
        words=f"HTTP {error.code} {error.reason}",
        hint="Check the tracking credentials that the job was given." if auth else "It may have been deleted.",
        code="TRACKING_AUTH" if auth else "SNAPSHOT_CORRUPT",
    )


def _get(url: str, target: Path, environ: Mapping[str, str]) -> None:
    request = urllib.request.Request(url, headers=_headers(environ))
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=_tls(url, environ)) as response:
        with target.open("wb") as out:
            shutil.copyfileobj(response, out, 1 << 20)
        expected = response.headers.get("Content-Length")
        if expected is not None and target.stat().st_size != int(expected):
            raise OSError(f"the connection ended after {target.stat().st_size} of {expected} bytes")


def _headers(environ: Mapping[str, str]) -> dict[str, str]:
    user, password = environ.get("MLFLOW_TRACKING_USERNAME"), environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    token = environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _tls(url: str, environ: Mapping[str, str]) -> ssl.SSLContext | None:
    if not url.startswith("https:"):
        return None
    bundle = environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or environ.get("REQUESTS_CA_BUNDLE")
    context = ssl.create_default_context(cafile=bundle) if bundle else ssl.create_default_context()
    if environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _fetch_by_mlflow(uri: str, target: Path) -> None:
    from mlflow.artifacts import download_artifacts

    folder = target.parent / (target.name + ".download")
    folder.mkdir()
    try:
        os.replace(download_artifacts(artifact_uri=uri, dst_path=str(folder)), target)
    except Exception as error:  # each artifact store raises what its own client library raises
        raise JobError(
            f"Artifact {uri} cannot be fetched where the job runs.",
            words=f"{type(error).__name__}: {error}",
            hint="The job needs the store's credentials, and its runner the store's client library: "
            "`mlflow-remote image build --with boto3` makes a runner image with that of S3.",
            code="TRACKING_UNREACHABLE",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
