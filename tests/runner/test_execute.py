"""execute.py and execute.sh: every byte, every signal, the exit code. The first half holds for both twins."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from execution import PYTHON, Starter

from mlflow_remote_backend.job import Reason
from mlflow_remote_backend.runner import execute as execute_module
from mlflow_remote_backend.runner.spool import SEGMENT_BYTES, Command, Spool, kill_orphans, secrets_script
from mlflow_remote_backend.runner.verdict import classify

# ------------------------------------------------------------------------------------------------------------- bytes


def test_the_log_is_the_output_byte_for_byte(execute: Starter) -> None:
    payload = b"plain\n\x00\x01\xff\xfe invalid \xc3\x28\r50%\r100%\n\x1b]0;title\x07 no final newline"
    (execute.folder / "payload").write_bytes(payload)
    _, log = execute.run("cat payload")
    assert log == payload


def test_both_streams_keep_their_order(execute: Starter) -> None:
    _, log = execute.run("i=0; while [ $i -lt 300 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done")
    assert log == b"".join(b"out %d\nerr %d\n" % (i, i) for i in range(300))


def test_a_line_of_100_mb_is_kept_whole(execute: Starter) -> None:
    size = 100_000_000
    execution = execute(f"head -c {size} /dev/zero | tr '\\0' x")
    execution.wait()
    digest = hashlib.sha256()
    for piece in execution.spool.log.chunks(0, execution.spool.log.size()):
        digest.update(piece)
    assert execution.spool.log.size() == size
    assert digest.hexdigest() == hashlib.sha256(b"x" * size).hexdigest()


def test_a_silent_program_has_an_empty_log(execute: Starter) -> None:
    ended, log = execute.run("exit 0")
    assert (ended.exit_code, log) == (0, b"")


def test_what_is_beyond_the_log_limit_is_left_out_and_the_program_goes_on(execute: Starter) -> None:
    ended, log = execute.run("head -c 3000000 /dev/zero; echo the end; exit 3", log_limit_bytes=100_000)
    assert log.startswith(b"\0" * 100_000)
    assert len(log) < 200_000
    assert ended.exit_code == 3


def test_with_tee_stdout_has_the_log_too(execute: Starter) -> None:
    execution = execute("seq 100000; echo error >&2", options=("--tee",), popen={"stdout": subprocess.PIPE})
    shown = execution.process.stdout.read()  # type: ignore[union-attr]
    execution.wait()
    assert shown == execution.log()
    assert len(shown) == 588_895 + len("error\n")


# --------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize("code", [0, 1, 2, 126, 127, 255])
def test_the_exit_code_is_the_programs(execute: Starter, code: int) -> None:
    ended, _ = execute.run(f"exit {code}")
    assert (ended.exit_code, ended.stopped_by, ended.error) == (code, None, None)


@pytest.mark.parametrize("name", ["SEGV", "ABRT", "KILL", "TERM"])
def test_death_by_a_signal_is_128_and_its_number(execute: Starter, name: str) -> None:
    ended, _ = execute.run(f"kill -{name} $$")
    assert ended.exit_code == 128 + getattr(signal, f"SIG{name}")
    assert ended.stopped_by is None, "nobody but the program itself had sent it"


def test_a_command_that_does_not_exist_is_127(execute: Starter) -> None:
    ended, _ = execute.run(argv=("no-such-program", "x"))
    assert ended.exit_code == 127


def test_a_command_that_cannot_be_executed_is_126(execute: Starter) -> None:
    (execute.folder / "data").write_text("no program")
    ended, _ = execute.run(argv=(str(execute.folder / "data"),))
    assert ended.exit_code == 126


def test_a_working_folder_that_does_not_exist_is_126(execute: Starter) -> None:
    ended, _ = execute.run("echo never", cwd=str(execute.folder / "missing"))
    assert ended.exit_code == 126


def test_an_image_without_bash_gets_the_fallback(execute: Starter) -> None:
    ended, log = execute.run(argv=("no-bash-here", "-c", "x"), fallback_argv=("sh", "-c", "echo by sh; exit 4"))
    assert (ended.exit_code, log) == (4, b"by sh\n")


# ------------------------------------------------------------------------------------------------ what it is given


def test_stdin_is_empty(execute: Starter) -> None:
    _, log = execute.run("wc -c")
    assert log.strip() == b"0"


def test_variables_arrive_as_they_are(execute: Starter) -> None:
    hostile = 'it\'s "me" $HOME `id` $(id) \\ \n two lines ünï 🦀 \udcff'
    env = {"HOSTILE": hostile, "EMPTY": "", "odd.name-x": "odd value"}
    _, log = execute.run("env -0", env=env, env_remove=("HOME",))
    given = dict(each.split(b"=", 1) for each in log.split(b"\0") if b"=" in each)
    assert given[b"HOSTILE"] == hostile.encode("utf-8", "surrogateescape")
    assert given[b"EMPTY"] == b""
    assert given[b"odd.name-x"] == b"odd value"
    assert b"HOME" not in given
    assert b"PATH" in given, "what is there is inherited"


def test_arguments_arrive_as_they_are(execute: Starter) -> None:
    words = ("", " ", "it's", '"', "$HOME", "`id`", "a\nb", "-n", "ünï", "*")
    _, log = execute.run(argv=("printf", "%s\\0", *words))
    assert log.split(b"\0")[:-1] == [word.encode() for word in words]


def test_secrets_come_by_stdin_and_stand_in_no_file(execute: Starter) -> None:
    secret = 's3cret "it\'s" ' + "x" * 20
    python = execute.interpreter[-1].endswith(".py")
    text = json.dumps({"TOKEN": secret}) if python else secrets_script({"TOKEN": secret})
    execution = execute('printf %s "$TOKEN" | wc -c', options=("--env-stdin",), popen={"stdin": subprocess.PIPE})
    execution.process.stdin.write(text.encode())  # type: ignore[union-attr]
    execution.process.stdin.close()  # type: ignore[union-attr]
    execution.wait()
    assert execution.log().strip() == str(len(secret)).encode()
    assert not [p for p in execution.spool.path.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


# ------------------------------------------------------------------------------------------------------------ signals

SAVING = "trap 'echo saving; sleep 0.3; echo saved; exit 7' TERM; echo started; while :; do sleep 0.05; done"
STUBBORN = "trap '' TERM; echo started; while :; do sleep 0.05; done"


def test_sigterm_reaches_the_program_which_has_time_to_save(execute: Starter) -> None:
    execution = execute(SAVING)
    execution.until_log_has(b"started")
    execution.process.terminate()
    ended = execution.wait()
    assert (ended.exit_code, ended.stopped_by, ended.killed) == (7, "signal", False)
    assert [each["signal"] for each in ended.signals] == [signal.SIGTERM]
    assert execution.log().endswith(b"saving\nsaved\n")


def test_who_ignores_sigterm_is_killed_after_the_grace_period(execute: Starter) -> None:
    execution = execute(STUBBORN, grace_period_s=1)
    execution.until_log_has(b"started")
    execution.process.terminate()
    ended = execution.wait()
    assert (ended.exit_code, ended.stopped_by, ended.killed) == (137, "signal", True)


def test_a_cancel_file_stops_the_program(execute: Starter) -> None:
    execution = execute(SAVING)
    execution.until_log_has(b"started")
    execution.spool.request_cancel()
    ended = execution.wait()
    assert (ended.exit_code, ended.stopped_by) == (7, "cancel")
    assert execution.log().endswith(b"saved\n")


def test_a_program_cancelled_before_its_start_never_starts(execute: Starter) -> None:
    spool = Spool.create(execute.folder / "spool-0")
    spool.request_cancel()
    ended, log = execute.run("touch started; echo started")
    assert ended.error is not None
    assert ended.error["code"] == "CANCELLED"
    assert (ended.stopped_by, log) == ("cancel", b"")
    assert not (execute.folder / "started").exists()


def test_a_timeout_stops_the_program(execute: Starter) -> None:
    ended, log = execute.run(SAVING, timeout_s=1)
    assert (ended.exit_code, ended.stopped_by, ended.timed_out) == (7, "timeout", True)
    assert log.endswith(b"saved\n")


def test_the_grace_period_is_also_that_of_children_whose_shell_is_gone(execute: Starter) -> None:
    (execute.folder / "train.sh").write_text(SAVING)
    execution = execute("bash train.sh; echo never", grace_period_s=20)  # bash dies of SIGTERM at once
    execution.until_log_has(b"started")
    execution.process.terminate()
    ended = execution.wait()
    assert ended.exit_code in (143, 7)
    assert b"saved\n" in execution.log()


@pytest.mark.parametrize("name", ["HUP", "USR1", "USR2"])
def test_other_signals_are_passed_on(execute: Starter, name: str) -> None:
    execution = execute(f"trap 'echo got {name}; exit 5' {name}; echo started; while :; do sleep 0.05; done")
    execution.until_log_has(b"started")
    execution.process.send_signal(getattr(signal, f"SIG{name}"))
    ended = execution.wait()
    assert (ended.exit_code, ended.stopped_by) == (5, None)
    assert execution.log().endswith(f"got {name}\n".encode())


# --------------------------------------------------------------------------------------------- what is left behind


def test_a_grandchild_that_holds_the_pipe_does_not_hold_the_run(execute: Starter) -> None:
    ended, log = execute.run("(sleep 0.5; echo late; sleep 3600) & echo started; exit 0")
    assert (ended.exit_code, log) == (0, b"started\nlate\n")


def test_a_timeout_after_the_end_is_too_late_to_count(execute: Starter) -> None:
    execution = execute("sleep 3600 & echo started; exit 3", timeout_s=1)
    execution.until_log_has(b"started")
    ended = execution.wait()
    assert (ended.exit_code, ended.stopped_by, ended.timed_out) == (3, None, False)


def test_a_silent_grandchild_is_ended_too(execute: Starter) -> None:
    ended, _ = execute.run("sleep 3600 >/dev/null 2>&1 & exit 0")
    assert ended.exit_code == 0  # the fixture looks for what is left


# ------------------------------------------------------------------------------------------------- execute.py alone


def test_segments_are_full_but_for_the_last(execute_py: Starter) -> None:
    execution = execute_py(f"head -c {2 * SEGMENT_BYTES + 5} /dev/zero")
    execution.wait()
    sizes = [path.stat().st_size for path in sorted((execution.spool.path / "log").iterdir())]
    assert sizes == [SEGMENT_BYTES, SEGMENT_BYTES, 5]
    assert execute_module.SEGMENT_BYTES == SEGMENT_BYTES


def test_it_needs_nothing_of_ours_and_little_of_pythons_library() -> None:
    result = subprocess.run(
        [*PYTHON[:-1], "-X", "importtime", PYTHON[-1]], capture_output=True, text=True, cwd="/"
    )  # without a spool it ends at once, its imports done
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")}
    assert {"json", "signal", "select"} <= loaded
    assert not loaded & {"subprocess", "asyncio", "typing", "dataclasses", "threading", "logging", "mlflow", "site"}


def test_beyond_a_log_limit_the_end_is_kept_and_the_gap_is_counted(execute_py: Starter) -> None:
    ended, log = execute_py.run("head -c 1000000 /dev/zero | tr '\\0' x; echo the end", log_limit_bytes=100_000)
    gap = re.search(rb"\n\[\.\.\. (\d+) bytes left out here: log_limit \.\.\.\]\n", log)
    assert gap
    assert log.endswith(b"xthe end\n")
    assert len(log) - len(gap.group()) + int(gap.group(1)) == 1_000_000 + len("the end\n")
    assert ended.log_cut_bytes == 1_000_000 + len("the end\n") - 100_000


def test_a_stdout_that_nobody_reads_does_not_hold_the_log(execute_py: Starter) -> None:
    execution = execute_py(
        "head -c 20000000 /dev/zero; echo written", options=("--tee",), popen={"stdout": subprocess.PIPE}
    )
    execution.until_log_has(b"written")
    shown = execution.process.stdout.read()  # type: ignore[union-attr]
    execution.wait()
    assert shown == execution.log(), "and who comes late still gets all of it"


def test_a_stdout_that_is_closed_does_not_end_the_program(execute_py: Starter) -> None:
    execution = execute_py("echo one; read -t 0.5; echo two", options=("--tee",), popen={"stdout": subprocess.PIPE})
    execution.process.stdout.close()  # type: ignore[union-attr]
    assert execution.wait().exit_code == 0
    assert execution.log() == b"one\ntwo\n"


def test_a_disk_that_takes_no_more_makes_the_program_wait_and_loses_nothing(
    execute_py: Starter, until: Callable[..., Any]
) -> None:
    """A file size limit refuses writes as a full disk does, and can be lifted from outside while the process runs."""
    execution = execute_py(
        "ulimit -Sf unlimited; head -c 5000000 /dev/urandom > data; cat data; touch written",
        popen={"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))},
    )
    until(lambda: (vitals := execution.spool.vitals()) and vitals.log_blocked)
    assert execution.process.poll() is None
    assert not (execute_py.folder / "written").exists()
    resource.prlimit(execution.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert execution.wait().exit_code == 0
    assert execution.log() == (execute_py.folder / "data").read_bytes()


def test_an_execute_that_starts_never_passes_for_a_dead_one(execute: Starter) -> None:
    """An observer may look at any moment: between the lock's file and the lock there must be none."""
    for _ in range(10):
        execution = execute("exit 0")
        while (lives := execution.spool.execute_lives()) is None:
            assert execution.process.poll() is None
        assert lives or execution.spool.exit() is not None  # its record comes before its lock is released
        execution.wait()


def test_when_execute_is_killed_its_lock_tells_and_the_log_has_all_until_then(
    execute_py: Starter, until: Callable[..., Any]
) -> None:
    execution = execute_py("seq 1000; echo started; sleep 3600")
    execution.until_log_has(b"started")
    assert execution.spool.execute_lives() is True
    execution.kill()
    assert execution.spool.execute_lives() is False
    assert execution.spool.exit() is None
    assert execution.log() == b"".join(b"%d\n" % i for i in range(1, 1001)) + b"started\n"
    started = execution.spool.started()
    assert started is not None
    kill_orphans(started)
    until(lambda: not _session_members(started.pid))


@pytest.mark.parametrize("name", ["python -m mlflow_remote_backend.runner.supervise", "sleep"])
def test_when_execute_is_killed_daemons_of_its_program_are_found_and_a_job_that_it_submitted_is_spared(
    execute_py: Starter, until: Callable[..., Any], name: str
) -> None:
    execution = execute_py(f"setsid bash -c 'echo $$; exec -a \"{name}\" sleep 3600' & sleep 3600")
    until(lambda: execution.log().endswith(b"\n"))
    daemon = int(execution.log())
    until(lambda: name.encode() in Path(f"/proc/{daemon}/cmdline").read_bytes())
    execution.kill()
    started = execution.spool.started()
    assert started is not None
    kill_orphans(started)
    until(lambda: not _session_members(started.pid))
    if name == "sleep":
        until(lambda: not _session_members(daemon))
    else:
        assert _session_members(daemon)
        os.kill(daemon, signal.SIGKILL)


def test_what_the_supervisor_of_a_submitted_job_has_started_is_spared_too(
    execute_py: Starter, until: Callable[..., Any], tmp_path: Path
) -> None:
    """Such as the tool that makes the job's environment, which has a session of its own."""
    (tmp_path / "supervisor").write_text("setsid bash -c 'echo $$; sleep 3600; true'\ntrue\n")
    name = f"{tmp_path}/supervisor mlflow_remote_backend.runner.supervise"
    execution = execute_py(f"setsid bash {name} & sleep 3600")
    until(lambda: execution.log().endswith(b"\n"))
    tool = int(execution.log())
    until(lambda: len(_session_members(tool)) == 2)
    execution.kill()
    started = execution.spool.started()
    assert started is not None
    kill_orphans(started)
    until(lambda: not _session_members(started.pid))
    assert len(_session_members(tool)) == 2
    parent = int(Path(f"/proc/{tool}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    os.killpg(tool, signal.SIGKILL)


def _session_members(session: int) -> list[str]:
    found = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if " Z" not in line]


def test_orphans_of_another_program_are_let_alone(execute_py: Starter) -> None:
    execution = execute_py("echo started; sleep 3600")
    execution.until_log_has(b"started")
    started = execution.spool.started()
    assert started is not None
    kill_orphans(type(started)(pid=started.pid, token="another"))
    assert execution.process.poll() is None
    assert _session_members(started.pid)
    execution.process.terminate()
    execution.wait()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="subreapers are Linux's")
def test_a_daemon_that_left_the_session_is_ended_too(execute_py: Starter) -> None:
    ended, _ = execute_py.run("setsid sh -c 'sleep 3600 & sleep 3600' >/dev/null 2>&1 & exit 0")
    assert ended.exit_code == 0  # the fixture looks for what is left


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="subreapers are Linux's")
def test_the_supervisor_of_a_job_that_the_program_submitted_goes_on(execute_py: Starter, tmp_path: Path) -> None:
    (tmp_path / "supervisor.py").write_text(
        "import os, time\n"
        "open('/proc/self/comm', 'w').write('mlflow-remote')\n"
        "open('pid', 'w').write(str(os.getpid()))\n"
        "time.sleep(3600)\n"
    )
    execute_py.run(f"setsid {sys.executable} supervisor.py >/dev/null 2>&1 & while [ ! -s pid ]; do sleep 0.05; done")
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)
    os.kill(pid, signal.SIGKILL)


def test_as_process_1_it_reaps_what_it_inherits(execute_py: Starter) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("no PID namespaces here")
    execute_py.interpreter = (*unshare, *PYTHON)
    ended, log = execute_py.run(
        "for i in 1 2 3 4 5; do (sleep 0.1 & exec true) & done; sleep 0.5; ps -o stat= -e | grep -c Z; echo end"
    )
    assert ended.exit_code == 0
    assert log.split() == [b"0", b"end"]


def test_vitals_tell_the_memory_of_the_program(execute_py: Starter, until: Callable[..., Any]) -> None:
    if not execute_module.Memory(None).folder:
        pytest.skip("no memory cgroup can be read here")
    execution = execute_py("sleep 3600", memory_limit_hint=123 << 40)
    vitals = until(execution.spool.vitals)
    assert vitals.memory_bytes > 0
    assert vitals.memory_limit_bytes
    assert vitals.oom_kills == 0
    execution.process.terminate()
    assert execution.wait().memory_peak_bytes


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"memory.current": "5000", "memory.max": "max", "memory.stat": "active_file 1000\ninactive_file 500\n"},
            (3500, None),
        ),
        ({"memory.current": "5000", "memory.max": "9000", "memory.stat": ""}, (5000, 9000)),
        ({"memory.current": "garbage", "memory.max": "", "memory.stat": "x"}, (None, None)),
    ],
)
def test_memory_is_read_without_what_the_kernel_would_give_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: tuple[int | None, int | None]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "memory.events").write_text("low 0\noom 1\noom_kill 0\n")
    monkeypatch.setattr(execute_module.Memory, "_find", staticmethod(lambda: (str(tmp_path), 2)))
    memory = execute_module.Memory(None)
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    limit = execute_module._number(files["memory.max"])
    assert (memory.use(), limit, memory.kills()) == (*expected, 2)


def test_a_tty_of_progress_bars_and_a_flood_together_are_exact(execute_py: Starter) -> None:
    program = (
        "import os, threading\n"
        "def flood(letter):\n"
        "    for _ in range(2000): os.write(1, letter * 1000 + b'\\n')\n"
        "threads = [threading.Thread(target=flood, args=(each,)) for each in (b'a', b'b', b'c')]\n"
        "[each.start() for each in threads]; [each.join() for each in threads]\n"
        "os._exit(0)\n"
    )
    ended, log = execute_py.run(argv=(sys.executable, "-c", program))
    assert ended.exit_code == 0
    lines = log.split(b"\n")[:-1]
    assert sorted(lines) == [letter * 1000 for letter in (b"a", b"b", b"c") for _ in range(2000)]


def test_a_broken_command_is_no_start(execute_py: Starter) -> None:
    ended, _ = execute_py.run(argv=("bash", "-c", "nul \0 byte"))
    assert ended.error is not None
    assert ended.error["code"] == "BOOTSTRAP"
    assert ended.exit_code == 126


def test_the_command_holds_what_the_twins_need(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "spool")
    command = Command(("bash", "-c", "x"), cwd="/", env={"A": "b"}, timeout_s=3.5, fallback_argv=("sh",))
    spool.write_command(command)
    assert spool.command() == command
    assert oct((tmp_path / "spool").stat().st_mode & 0o777) == "0o700"


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A memory cgroup with a limit of 64 MiB, without swap where that can be said. Skips where none can be made."""
    parent, version = execute_module.Memory._find()
    folder = Path(parent, f"mlflow-remote-test-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).write_text(str(64 << 20))
    except OSError as error:
        if folder.exists():
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    with contextlib.suppress(OSError):
        swap, limit = ("memory.swap.max", "0") if version == 2 else ("memory.memsw.limit_in_bytes", str(64 << 20))
        (folder / swap).write_text(limit)
    yield folder
    deadline = time.monotonic() + 10
    while (folder / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    folder.rmdir()


def test_a_program_over_the_memory_limit_is_known_as_such(execute_py: Starter, memory_cgroup: Path) -> None:
    procs = memory_cgroup / "cgroup.procs"
    execution = execute_py(
        argv=(sys.executable, "-c", "x = bytearray(300 << 20)"),
        popen={"preexec_fn": lambda: procs.write_text(str(os.getpid()))},
    )
    ended = execution.wait()
    assert (ended.exit_code, ended.signal) == (137, signal.SIGKILL)
    assert ended.oom_kills == 1
    assert ended.memory_limit_bytes == 64 << 20
    verdict = classify(ended, None, None, cancel_requested=False)
    assert verdict.reason is Reason.OOM
    assert "64 MiB" in verdict.message
