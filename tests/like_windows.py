"""This process with what a Windows machine lacks taken away, as far as that can be had on another system.

Imported before this package, and after the libraries that look at the system while they are loaded. What stays as it
is here: paths, the file system, processes.
"""

import os
import signal
import subprocess
import sys
import types

import click  # noqa: F401
import docker  # noqa: F401
import kubernetes  # noqa: F401
import mlflow.cli
import mlflow.deployments
import mlflow.projects  # noqa: F401

MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
FUNCTIONS = ("fchmod", "fork", "getgid", "geteuid", "getuid", "killpg", "mkfifo", "pread", "setsid")
CONSTANTS = ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK")
SIGNALS = ("SIGALRM", "SIGBUS", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "SIGUSR2", "pthread_sigmask")


def _msvcrt() -> types.ModuleType:
    """Windows' module, as far as it locks files."""
    import fcntl

    def locking(descriptor: int, mode: int, size: int) -> None:
        assert (mode, size) in ((2, 1), (0, 1))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if mode else fcntl.LOCK_UN)
        except BlockingIOError as error:
            raise PermissionError(*error.args) from None

    made = types.ModuleType("msvcrt")
    made.LK_NBLCK, made.LK_UNLCK, made.locking = 2, 0, locking
    return made


class _Missing:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


assert "mlflow_remote_backend" not in sys.modules
sys.modules["msvcrt"] = _msvcrt()
for each in MODULES:
    sys.modules.pop(each, None)
sys.meta_path.insert(0, _Missing())
subprocess.signal = types.SimpleNamespace(**vars(signal))  # it must go on as on this system
for owner, names in ((os, (*FUNCTIONS, *CONSTANTS)), (signal, SIGNALS)):
    for each in names:
        if hasattr(owner, each):
            delattr(owner, each)
os.environ.setdefault("USERNAME", "ada")
sys.platform = "win32"
