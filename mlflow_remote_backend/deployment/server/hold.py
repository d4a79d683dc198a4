"""Hold a deployment against other changes for as long as stdin is open. Standard library only.

python3 -I -S hold.py FOLDER     says ``held``, and ends when stdin does; or ``busy``, at once: somebody else holds it

Whoever dies closes its connection, and the kernel lets go: no lock outlives its holder.
"""

from __future__ import annotations

import fcntl
import os
import sys


def main(folder: str) -> int:
    lock = os.open(os.path.join(folder, "changing"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("busy", flush=True)
        return 1
    print("held", flush=True)
    sys.stdin.buffer.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
