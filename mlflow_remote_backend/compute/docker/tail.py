"""Send the spool's log to stdout while it grows. Runs in the container, beside ``execute``.

    python -I -S tail.py SPOOL

One file, standard library only, Python 3.7 or newer. The protocol, which ``mirror.py`` speaks on the other side:

- stdin: first a line ``OFFSET GREETING``; nothing is sent before it. Later lines ``drop OFFSET``: what lies before is
  safe elsewhere, so whole segments before it may go. End of file: nobody listens any more.
- stdout: a line with the greeting, then the log's bytes from that offset, unchanged.
- stderr: each second lines ``NAME JSON``, small files of the spool as they are, and ``alive``, or ``full`` where the
  spool's disk has no room for more.

Ends when the program has ended and everything is sent, or with its container.
"""

import os
import select
import sys
import time

SEGMENT_BYTES = 8 * 1024 * 1024  # as in spool.py
READ_BYTES = 256 * 1024
POLL_S = 0.03
RECORDS_S = 1.0
ROOM_BYTES = 4096
RECORDS = ("started.json", "vitals.json")


def read(folder: str, offset: int) -> bytes:
    """Bytes of the log from ``offset``, at most to the end of their segment; empty if there are none yet."""
    try:
        descriptor = os.open(os.path.join(folder, "log", f"{offset // SEGMENT_BYTES:06d}"), os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.pread(descriptor, READ_BYTES, offset % SEGMENT_BYTES)
    finally:
        os.close(descriptor)


def drop_before(folder: str, offset: int) -> None:
    """Remove segments that lie wholly before ``offset``, from the newest of them down to the first that is gone."""
    segment = offset // SEGMENT_BYTES - 1
    while segment >= 0 and unlink(os.path.join(folder, "log", f"{segment:06d}")):
        segment -= 1


def unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def send(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def send_records(folder: str) -> None:
    for name in RECORDS:
        try:
            with open(os.path.join(folder, name), "rb") as file:
                text = file.read()
        except OSError:
            continue
        send(2, name.encode() + b" " + text.replace(b"\n", b" ") + b"\n")
    send(2, b"alive\n" if has_room(folder) else b"full\n")


def has_room(folder: str) -> bool:
    path = os.path.join(folder, ".room")
    try:
        with open(path, "wb", 0) as file:
            return file.write(bytes(ROOM_BYTES)) == ROOM_BYTES
    except OSError:
        return False
    finally:
        unlink(path)


def follow(folder: str, offset: int) -> None:
    asked = b""
    next_records = 0.0
    while True:
        ended = os.path.exists(os.path.join(folder, "exit.json"))  # looked at before reading: what comes is the rest
        data = read(folder, offset)
        if data:
            send(1, data)
            offset += len(data)
        elif ended:
            return
        now = time.monotonic()
        if now >= next_records:
            next_records = now + RECORDS_S
            send_records(folder)
        if select.select([0], [], [], 0 if data else POLL_S)[0]:
            told = os.read(0, 4096)
            if not told:
                return
            asked += told
            while b"\n" in asked:
                line, asked = asked.split(b"\n", 1)
                drop_before(folder, int(line.split()[1]))


def first_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit(0)
        line += byte
    return line


if __name__ == "__main__":
    start, greeting = first_line().split()
    send(1, greeting + b"\n")
    follow(sys.argv[1], int(start))
