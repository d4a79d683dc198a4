"""What means "this machine" to whoever asks, and so somebody else in a container. Standard library only."""

from __future__ import annotations

import ipaddress
import urllib.parse
from collections.abc import Mapping


def is_loopback(host: str) -> bool:
    """Whether the host means "this machine" to whoever asks. ``0.0.0.0`` does, on Linux."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def loopback_proxies(variables: Mapping[str, str]) -> list[str]:
    """Names of the proxy variables that point at this machine's loopback."""
    proxies = {name: value for name, value in variables.items() if name.lower() in ("http_proxy", "https_proxy")}
    return [name for name, value in proxies.items() if is_loopback(_host(value))]


def _host(proxy: str) -> str:
    """Of a proxy's address, with or without a scheme; empty where it is none."""
    try:
        return urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}").hostname or ""
    except ValueError:
        return ""
