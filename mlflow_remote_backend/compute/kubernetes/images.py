"""Image names -> the same images by digest, so that what was checked is what runs, whoever moves a tag meanwhile.

Asked of the image's registry as this machine reaches it, by the distribution API. A name without a registry's host is
left to the nodes: only they know which registry they mean by it. So is one whose registry is out of reach from here,
or wants credentials that Docker's configuration file does not hold.
"""

from __future__ import annotations

import base64
import json
import os
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import requests

TIMEOUT_S = (2.0, 5.0)
_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Pinned:
    """``image``: by digest where that is known, else as it was. ``trouble``: why it is not, for people."""

    image: str
    trouble: str = ""


@dataclass(frozen=True)
class ImageName:
    """``host`` empty: the nodes' default registry."""

    host: str
    repository: str
    tag: str
    digest: str

    @classmethod
    def parse(cls, image: str) -> ImageName:
        name, _, digest = image.partition("@")
        first, slash, rest = name.partition("/")
        is_host = bool(slash) and ("." in first or ":" in first or first == "localhost")
        host, path = (first, rest) if is_host else ("", name)
        head, _, last = path.rpartition("/")
        base, _, tag = last.partition(":")
        return cls(host, f"{head}/{base}" if head else base, tag or "latest", digest)


def pin(image: str, environ: Mapping[str, str] = os.environ) -> Pinned:
    """The image by digest. Blocks for some seconds at most; raises nothing."""
    name = ImageName.parse(image)
    if name.digest or not name.host:
        return Pinned(image)
    import requests

    try:
        with requests.Session() as session:
            digest = _ask(session, name, environ)
    except (requests.RequestException, ValueError, KeyError) as error:
        return Pinned(image, f"its registry does not tell its digest ({type(error).__name__}: {error})")
    if not _DIGEST.fullmatch(digest):
        return Pinned(image, digest or "its registry does not tell its digest")
    return Pinned(f"{name.host}/{name.repository}@{digest}")


def _ask(session: requests.Session, name: ImageName, environ: Mapping[str, str]) -> str:
    """The digest, or what the registry said instead."""
    url = f"{_scheme(name.host)}://{name.host}/v2/{name.repository}/manifests/{name.tag}"
    headers = {"Accept": ", ".join(_TYPES)}
    answer = session.head(url, headers=headers, timeout=TIMEOUT_S, allow_redirects=True)
    if answer.status_code == 401:
        headers["Authorization"] = _authorization(session, answer.headers.get("WWW-Authenticate", ""), name, environ)
        answer = session.head(url, headers=headers, timeout=TIMEOUT_S, allow_redirects=True)
    if not answer.ok:
        return f"its registry answers HTTP {answer.status_code} {answer.reason}"
    return str(answer.headers.get("Docker-Content-Digest", ""))


def _scheme(host: str) -> str:
    """Registries on this machine speak plain HTTP, as Docker takes for granted too."""
    name = host.partition(":")[0]
    return "http" if name == "localhost" or name.startswith("127.") else "https"


def _authorization(session: requests.Session, challenge: str, name: ImageName, environ: Mapping[str, str]) -> str:
    """The header that answers the registry's challenge: credentials, or a token got with them (or without any)."""
    credentials = _credentials(name.host, environ)
    basic = "Basic " + base64.b64encode(credentials.encode()).decode() if credentials else ""
    if challenge.lower().startswith("basic"):
        return basic
    fields = dict(_CHALLENGE.findall(challenge))
    realm = fields["realm"]
    trusted = urllib.parse.urlsplit(realm).scheme == "https" or _scheme(name.host) == "http"
    query = {"service": fields.get("service", ""), "scope": f"repository:{name.repository}:pull"}
    headers = {"Authorization": basic} if basic and trusted else {}
    answer = session.get(realm, params=query, headers=headers, timeout=TIMEOUT_S)
    answer.raise_for_status()
    token = answer.json()
    return f"Bearer {token.get('token') or token['access_token']}"


def _credentials(host: str, environ: Mapping[str, str]) -> str:
    """``user:password`` as ``docker login`` stored it in its file; empty where it is kept elsewhere."""
    folder = environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker")
    try:
        stored = json.loads((Path(folder) / "config.json").read_text()).get("auths") or {}
        return base64.b64decode(stored[host].get("auth") or "").decode()
    except (OSError, ValueError, KeyError, AttributeError, UnicodeDecodeError):
        return ""
