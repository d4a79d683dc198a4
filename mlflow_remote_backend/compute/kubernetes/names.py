"""Names, labels and addresses of what we make in a cluster. Pure.

Identity is never lost: a run id or text that Kubernetes would refuse as a name or a label is replaced there by a digest
of itself, and stands whole in an annotation.
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from dataclasses import dataclass

from ...errors import ComputeError

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "mlflow-remote"
RUN_ID = "mlflow-remote/run-id"
SUBMISSION_ID = "mlflow-remote/submission-id"
ENVELOPE = "mlflow-remote/envelope"
SNAPSHOT = "mlflow-remote/snapshot"
LIMITS = "mlflow-remote/limits"
ATTEMPTS = "mlflow-remote/max-attempts"
VERSION = "mlflow-remote/version"
RELEASED = "mlflow-remote/released"  # set last: what lacks it and is suspended was never let go
TRACKING = "mlflow-remote/tracking"  # which tracking server, as a digest
QUEUE = "kueue.x-k8s.io/queue-name"
JOB_NAME = "batch.kubernetes.io/job-name"  # set on pods by Kubernetes since 1.27
JOB_UID = "batch.kubernetes.io/controller-uid"
ATTEMPT = "batch.kubernetes.io/job-index-failure-count"  # on pods of Jobs with backoffLimitPerIndex

#: A selector for everything of ours; narrowed by ``run_selector``.
SELECTOR = f"{MANAGED_BY}={MANAGER}"

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
#: A pod of an Indexed Job is called JOB-0-xxxxx, and its name is also a host name of at most 63 characters.
MAX_JOB_NAME = 54
MAX_LABEL = 63


def job_name(run_id: str) -> str:
    """The name of the run's Job and Secret: always the same for a run, so that submitting twice makes one Job."""
    name = f"mlr-{run_id}"
    if len(name) <= MAX_JOB_NAME and _NAME.fullmatch(name):
        return name
    return f"mlr-{_digest(run_id)}"


def secret_name(run_id: str, submission_id: str) -> str:
    """The name of the Job's Secret: nobody can take it before us, since the submission id is not known to others.

    So a Secret of that name is ours, and we need no right to read secrets.
    """
    return f"{job_name(run_id)}-{_digest(submission_id)[:8]}"


def without_userinfo(url: str) -> str:
    """A URL that may be shown."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def tracking_mark(uri: str) -> str:
    """Which tracking server a job belongs to: a digest, because an address can be a secret."""
    return hashlib.sha256(without_userinfo(uri).rstrip("/").encode()).hexdigest()[:16]


def label_value(text: str) -> str:
    """``text`` where Kubernetes takes it as a label's value, else a digest of it."""
    if len(text) <= MAX_LABEL and _LABEL.fullmatch(text):
        return text
    return _digest(text)


def run_selector(run_id: str) -> str:
    """The label selector of one run's objects. Safe for any text: what could break it out is replaced by its digest."""
    return f"{SELECTOR},{RUN_ID}={label_value(run_id)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:40]


@dataclass(frozen=True)
class Address:
    """A Job's place. How the submitter reached the cluster may be empty; ``authority``: see ``api.Login``."""

    namespace: str
    job: str
    context: str = ""
    server: str = ""
    authority: str = ""

    @property
    def url(self) -> str:
        """``kubernetes://NAMESPACE/JOB?context=…&server=…&authority=…``, percent-encoded."""
        pairs = (("context", self.context), ("server", self.server), ("authority", self.authority))
        query = urllib.parse.urlencode(
            {key: value for key, value in pairs if value},
            quote_via=urllib.parse.quote,
        )
        path = f"kubernetes://{urllib.parse.quote(self.namespace, safe='')}/{urllib.parse.quote(self.job, safe='')}"
        return f"{path}?{query}" if query else path

    @classmethod
    def parse(cls, url: str) -> Address:
        """The address in a handle. Raises ComputeError on anything but a handle of this compute."""
        parts = urllib.parse.urlsplit(url)
        namespace, job = urllib.parse.unquote(parts.netloc), urllib.parse.unquote(parts.path[1:])
        query = urllib.parse.parse_qs(parts.query)
        if parts.scheme != "kubernetes" or not _NAME.fullmatch(namespace) or not _NAME.fullmatch(job):
            raise ComputeError(
                f"{url!r} is not the handle of a Kubernetes job.",
                hint="A handle has the form kubernetes://NAMESPACE/JOB?context=CONTEXT&server=URL.",
            )
        return cls(namespace, job, *(query.get(key, [""])[0] for key in ("context", "server", "authority")))
