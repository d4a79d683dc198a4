"""100 runs submitted from one process, 8 at a time: none lost, none wrong, no process or folder left.

    python benchmarks/many_runs.py [RUNS] [AT_A_TIME]

Runs against a store of its own in a temporary folder. Prints a table; exits with 1 if a count is not what it must be.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT = """\
name: many
entry_points:
  main:
    parameters: {number: string}
    command: "echo run {number}; exit $(({number} % 3))"
"""
TOKEN = "MANY_RUNS_BENCHMARK"


def run(project: Path, number: int) -> list[str]:
    """Submit one, wait for its end, and return what is wrong with it."""
    import mlflow

    from mlflow_remote_backend.testing import stored_log

    submitted = mlflow.projects.run(
        str(project),
        parameters={"number": number},
        backend="remote",
        env_manager="local",
        synchronous=False,
        backend_config={"stream_output": False},
    )
    submitted.wait()
    view = submitted.view()
    wrong = []
    if view.status != ("FAILED" if number % 3 else "FINISHED") or view.tag("exit_code") != str(number % 3):
        wrong.append(f"run {number} is {view.status}, {view.tag('reason')}: {view.tag('message')}")
    try:
        log = stored_log(view.run_id)
    except Exception as error:  # noqa: BLE001 - the table shall be printed whatever is missing
        wrong.append(f"the log of run {number} cannot be read: {error}")
    else:
        if log != f"run {number}\n".encode():
            wrong.append(f"the log of run {number} is {log!r}")
    return wrong


def processes(token: str) -> int:
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += token.encode() in (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
    return found


def main(runs: int = 100, at_a_time: int = 8) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        token = f"{TOKEN}={folder}"
        os.environ.update(
            {TOKEN: str(folder), "XDG_STATE_HOME": str(folder / "state"), "MLFLOW_DISABLE_TELEMETRY": "true"}
        )
        import mlflow

        from mlflow_remote_backend.runner.run_folder import all_folders

        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        experiment = mlflow.create_experiment("many", artifact_location=str(folder / "artifacts"))
        mlflow.set_experiment(experiment_id=experiment)
        project = folder / "project"
        project.mkdir()
        (project / "MLproject").write_text(PROJECT)
        began = time.monotonic()
        with ThreadPoolExecutor(at_a_time) as pool:
            wrong = [each for found in pool.map(lambda number: run(project, number), range(runs)) for each in found]
        seconds = time.monotonic() - began
        deadline = time.monotonic() + 30
        while processes(token) and time.monotonic() < deadline:
            time.sleep(0.1)
        known = len(mlflow.search_runs([experiment], output_format="list", max_results=runs + 100))
        rows = {
            "runs known": (known, runs),
            "runs wrong": (len(wrong), 0),
            "processes left": (processes(token), 0),
            "run folders left": (len(list(all_folders())), 0),
        }
    print(f"{runs} runs, {at_a_time} at a time: {seconds:.0f} s, {seconds / runs:.2f} s each")
    for label, (found, expected) in rows.items():
        print(f"{label:<18} {found:>5}   expected {expected}")
    for each in wrong:
        print(each)
    return 0 if all(found == expected for found, expected in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
