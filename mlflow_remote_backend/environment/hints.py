"""What to do next, by what a solver or an installer says. Standard library only."""

from __future__ import annotations

import re

INDEX = (
    "The packages come from the index that pip or uv is configured with; another one is named by environment.index_url "
    "in the backend config."
)
CHANNEL = (
    "Channels are named in conda.yaml; where they are found can be set in the backend config: environment."
    "channel_alias for all names, environment.channel_map for single ones, environment.channels to use others."
)

CACHE = "The folder must be writable; MLFLOW_REMOTE_CACHE names another one."

# words of their own: async-timeout and dnspython are packages
_UNREACHABLE = (
    r"(?<![\w-])(?:[Cc]onnect(?:ion|ing)?|[Tt]imed? ?out|dns)(?![\w-])|Connect(?:ion)?Error"
    r"|resolve host|error sending request|unreachable|[Ff]ailed to fetch|NetworkError"
)


def _status(codes: str) -> str:
    """A pattern for HTTP status codes as tools write them, and not for the same digits in a URL or a digest."""
    return rf"(?<![\w:./-])(?:{codes})(?![\w./-])"


_DISK = "Make room, or put the cache elsewhere with MLFLOW_REMOTE_CACHE; mlflow-remote env prune removes what is old."
HASH = "The file is not the one that was locked. If its publisher replaced it, lock anew: mlflow-remote lock."
_TABLE: tuple[tuple[str, str], ...] = (
    (r"No space left|ENOSPC|Disk quota", _DISK),
    (r"[Hh]ash(es)? mismatch|sha256 mismatch|[Hh]ashes? (do|does) not match", HASH),
    (
        rf"{_status('401|403')}|[Uu]nauthorized|[Aa]uthentication|could not read Username|denied \(publickey",
        "Credentials are taken from ~/.netrc, a keyring, or variables named in the URL: https://${USER}:${PASSWORD}@…",
    ),
    (r"[Cc]ertificate|UnknownIssuer|self.signed", "Name your company's certificates in SSL_CERT_FILE."),
    (r"Bad CRC|[Ff]ailed to extract|invalid [Zz]ip|corrupt", "The file is damaged, on its way or where it is kept. "),
    (
        r"No module named|ModuleNotFoundError|build[ _]backend|backend\.build",
        "A package that must be built needs its build tools in the lock: add them to build_dependencies "
        "(python_env.yaml) or to pip (conda.yaml).",
    ),
    (
        rf"{_status('404')}|could not find subdir|could not be found in channel|repository '.*' not found",
        "There is no such thing at that address. ",
    ),
    (
        _UNREACHABLE,
        "The server did not answer. Check the network and the proxy settings. ",
    ),
    (
        r"requires-python|Python.?[<>=]|current Python|python_abi|requested Python",
        "Ask for another Python version or for other versions of these packages.",
    ),
    (
        r"cannot be installed because|conflict",
        "Loosen one of the versions named above; a package may also be missing for this platform, or be misspelt. ",
    ),
    (
        r"was not found in the package registry|there are no versions|No candidates were found|in the provided package",
        "Check the spelling of the name and the version; it may also not be published for this platform. ",
    ),
    (r"No solution found|unsatisfiable|is incompatible", "Loosen one of the versions named above."),
    (
        r"no wheels? with a matching|no matching platform|has no usable wheels|only has wheels for",
        "The package is not published for this platform; choose another version, or take it from a conda channel.",
    ),
)


def is_unreachable(words: str) -> bool:
    """Whether a tool complains that a file or a server is not to be had, and not about what it got."""
    return bool(
        re.search(rf"{_UNREACHABLE}|{_status('401|403|404')}|[Nn]ot [Ff]ound|No such file", words)
    ) and not re.search(r"[Hh]ash(es)? mismatch", words)


def for_words(words: str, general: str) -> str:
    """The hint for another program's words; ``general`` is added where it says where the packages come from."""
    for pattern, hint in _TABLE:
        if re.search(pattern, words):
            return f"{hint}{general}" if hint.endswith(" ") else hint
    return general
