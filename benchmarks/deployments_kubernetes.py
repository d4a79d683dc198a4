"""An update on Kubernetes under 50 requests a second: no failed request.

    python benchmarks/deployments_kubernetes.py TARGET MODEL_URI [--rate 50] [--replicas 1] [--updates 2]

TARGET is a named compute's URI (remote:/cluster). The model is served, updated to itself --updates times under load,
and removed. Requests go through the API server's proxy of the Service, each at its own time whatever becomes of the
others, so a stall shows as latency and not as fewer requests; they go on for 10 s after each update, while the old pods
end. The bar is 0 failed requests; how long they took is printed beside it, and for some seconds before the updates.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # not this folder, where kubernetes.py would pass for the client

from mlflow.deployments import get_deploy_client  # noqa: E402

from mlflow_remote_backend.deployment import config  # noqa: E402
from mlflow_remote_backend.deployment.kubernetes.target import KubernetesTarget  # noqa: E402
from mlflow_remote_backend.deployment.spec import DeploymentSpec  # noqa: E402

NAME = f"benchmark-{os.getpid()}"
AFTER_S = 10.0
MOST_AT_ONCE = 200


class Load:
    """Requests at a fixed rate in a block. ``answers``: seconds that each took, and its status or what went wrong."""

    def __init__(self, where: KubernetesTarget, spec: DeploymentSpec, body: bytes, rate_per_s: float) -> None:
        self._ask = lambda: where.ask_service(spec, "/invocations", body, timeout_s=60.0)
        self._rate_per_s = rate_per_s
        self._stop = threading.Event()
        self.answers: list[tuple[float, object]] = []

    def _one(self, due: float) -> None:
        try:
            status: object = self._ask().status
        except Exception as error:  # noqa: BLE001  whatever it is, it is a request that failed
            status = repr(error)
        self.answers.append((time.monotonic() - due, status))

    def _run(self) -> None:
        with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
            due = time.monotonic()
            while not self._stop.is_set():
                pool.submit(self._one, due)
                due += 1 / self._rate_per_s
                time.sleep(max(0.0, due - time.monotonic()))

    def __enter__(self) -> Load:
        self._thread = threading.Thread(target=self._run)
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._began

    def report(self, what: str) -> int:
        failed = [status for _, status in self.answers if status != 200]
        took = sorted(seconds for seconds, _ in self.answers)
        half, most = took[len(took) // 2], took[int(len(took) * 0.99)]
        rate = len(took) / self.seconds
        print(
            f"{what:<10} {len(took):>6} requests ({rate:.1f}/s)  {len(failed)} failed  "
            f"median {half * 1000:.0f} ms  99% {most * 1000:.0f} ms",
            *failed[:5],
            sep="\n  ",
            flush=True,
        )
        return len(failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target")
    parser.add_argument("model")
    parser.add_argument("--inputs", default='{"dataframe_split": {"columns": ["x"], "data": [[0.0]]}}')
    parser.add_argument("--rate", type=float, default=50)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--updates", type=int, default=2)
    options = parser.parse_args()
    client = get_deploy_client(options.target)
    made = config.parse({}, target=options.target.partition(":/")[2])
    where = KubernetesTarget.from_options(made.run.options())
    client.create_deployment(NAME, options.model, config={"replicas": options.replicas})
    try:
        status = where.status(NAME)
        assert status is not None
        load = (where, status.spec, options.inputs.encode(), options.rate)
        failed = 0
        with Load(*load) as before:
            time.sleep(AFTER_S)
        failed += before.report("before")
        for number in range(options.updates):
            with Load(*load) as during:
                client.update_deployment(NAME, config={"description": f"update {number}"})
                time.sleep(AFTER_S)
            failed += during.report(f"update {number + 1}")
        print(f"failed requests: {failed} (bar: 0)")
    finally:
        client.delete_deployment(NAME)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
