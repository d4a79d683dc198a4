"""One request to the server of this machine, for a client that cannot reach its port. Standard library only.

python3 -I -S ask.py PORT        a line of JSON on stdin: {"path", "size", "content_type", "token", "timeout_s"},
                                 then the body; the answer goes to stdout the same way: {"status", "size", …}
"""

from __future__ import annotations

import http.client
import json
import sys


def main(port: int) -> int:
    asked = json.loads(sys.stdin.buffer.readline())
    body = sys.stdin.buffer.read(asked["size"]) or None
    headers = {"Content-Type": asked["content_type"]}
    if asked["token"]:
        headers["Authorization"] = "Bearer " + asked["token"]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=asked["timeout_s"])
    try:
        connection.request("POST" if body else "GET", asked["path"], body, headers)
        response = connection.getresponse()
        content = response.read()
        said = {"status": response.status, "content_type": response.getheader("Content-Type", "")}
    except (OSError, http.client.HTTPException) as error:
        said, content = {"status": 0, "error": str(error)}, b""
    sys.stdout.buffer.write(json.dumps({**said, "size": len(content)}).encode() + b"\n" + content)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
