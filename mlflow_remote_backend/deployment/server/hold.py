"""Hold a deployment against other changes for as long as stdin is open. Standard library only.

python3 -I -S hold.py FOLDER     reads a line, says ``held``, and ends when stdin does; or says ``busy`` and ends:
                                 somebody else holds it

It does not speak first: what comes together with the engine's own answer is lost on Docker's SDK. Whoever
dies closes its connection, and the kernel lets go: no lock outlives its holder.
"""

from __future__ import annotations

import fcntl
import os
import sys


def main(folder: str) -> int:
    sys.stdin.buffer.readline()
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
