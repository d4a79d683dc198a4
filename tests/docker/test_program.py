"""What the supervisor does with a container: everything comes home, whatever happens to either."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import random
import socket
import tarfile
import threading

import pytest
from engine_proxy import EngineProxy, engine_proxy

from mlflow_remote_backend.compute.docker import mirror, request
from mlflow_remote_backend.compute.docker.engine import Connection, Endpoint, Engine
from mlflow_remote_backend.compute.docker.watch import ContainerRun, remove
from mlflow_remote_backend.errors import ComputeError, ConfigError, JobError
from mlflow_remote_backend.job import Limits, Reason, Resources
from mlflow_remote_backend.runner.spool import Spool
from mlflow_remote_backend.runner.supervise import Start
from mlflow_remote_backend.runner.verdict import classify

pytestmark = pytest.mark.docker

CHATTER = r"""
import os, sys, time
seed, count = int(sys.argv[1]), int(sys.argv[2])
import random
source = random.Random(seed)
for number in range(count):
    stream = source.choice((1, 2))
    size = source.choice((0, 1, 100, 5000, 70000))
    data = b"%d:" % number + source.randbytes(size) + source.choice((b"\n", b"\r", b""))
    while data:
        data = data[os.write(stream, data):]
    if source.random() < 0.02:
        time.sleep(0.02)
"""


def chatter(seed: int, count: int) -> bytes:
    """What CHATTER writes."""
    source = random.Random(seed)
    written = bytearray()
    for number in range(count):
        source.choice((1, 2))
        size = source.choice((0, 1, 100, 5000, 70000))
        written += b"%d:" % number + source.randbytes(size) + source.choice((b"\n", b"\r", b""))
        source.random()
    return bytes(written)


@pytest.fixture
def proxy():
    with engine_proxy() as made:
        yield made


# -- everything comes home


def test_log_outputs_and_exit_code_come_home(make_job) -> None:
    job = make_job("echo hello; mkdir -p outputs/deep; echo result > outputs/deep/file; exit 3")
    record = job.run()
    assert (record.exit_code, record.error) == (3, None)
    assert job.log() == b"hello\n"
    assert job.output("deep/file") == b"result\n"


def test_an_image_without_python_is_as_good(make_job, shell_image) -> None:
    command = "printf 'a\\000b\\377\\r'; echo err >&2; mkdir -p outputs; echo r > outputs/f; exit 4"
    job = make_job(command, image=shell_image)
    record = job.run()
    assert (record.exit_code, record.error) == (4, None)
    assert job.log() == b"a\0b\xff\rerr\n"
    assert job.output("f") == b"r\n"


def test_hostile_bytes_of_both_streams_arrive_in_order(make_job) -> None:
    job = make_job("python3 chatter.py 7 800", files={"chatter.py": CHATTER})
    assert job.run().exit_code == 0
    assert job.log() == chatter(7, 800)


def test_one_line_of_100_megabytes_arrives_whole(make_job) -> None:
    job = make_job('python3 -c "import os; [os.write(1, bytes([65 + n % 26]) * 1048576) for n in range(100)]"')
    assert job.run().exit_code == 0
    expected = hashlib.sha256(b"".join(bytes([65 + n % 26]) * 1048576 for n in range(100))).hexdigest()
    assert hashlib.sha256(job.log()).hexdigest() == expected


def test_what_is_safe_here_does_not_fill_the_container(make_job, engine, until) -> None:
    job = make_job("python3 -c \"import os; [os.write(1, b'x' * 1048576) for n in range(60)]\"; sleep 60")
    running = job.start()
    until(lambda: len(job.log()) == 60 * 1048576)
    listing = in_container(engine, job.name, ["ls", f"{request.SPOOL}/log"])
    assert len(listing.split()) <= 4
    running.stop(0)
    job.end(running)


def test_the_log_is_seen_while_the_program_runs(make_job, until) -> None:
    job = make_job("echo first; while [ ! -e stop ]; do sleep 0.1; done")
    running = job.start()
    until(lambda: job.log() == b"first\n")
    assert running.alive()
    running.stop(0)
    job.end(running)


def test_links_in_outputs_stay_inside_and_devices_stay_behind(make_job) -> None:
    job = make_job(
        "cd outputs && echo a > real && ln -s real inside && ln -s /etc/passwd outside && ln -s ../../../x climb"
        " && mkfifo pipe && ln real hard && mkdir empty && printf x > \"$(printf 'odd\\n\\377name')\""
    )
    assert job.run().exit_code == 0
    outputs = job.folder.work / "outputs"
    assert os.readlink(outputs / "inside") == "real"
    assert (outputs / "hard").read_bytes() == b"a\n"
    assert sorted(map(os.fsencode, os.listdir(outputs))) == [b"empty", b"hard", b"inside", b"odd\n\xffname", b"real"]


@pytest.mark.parametrize("outputs", [("outputs", "outputs/deep"), ("outputs/deep", "outputs")], ids=str)
def test_outputs_that_came_with_the_project_are_no_outputs_of_the_run(make_job, outputs) -> None:
    files = {f"{folder}/{name}": "old" for folder in ("outputs", "outputs/deep") for name in ("same", "changed")}
    command = "echo new > outputs/new; echo new > outputs/changed; cp -p MLproject outputs; cat outputs/deep/same"
    job = make_job(command, files=files, outputs=outputs)
    assert job.run().exit_code == 0
    assert job.log() == b"old"
    found = (each for each in (job.folder.work / "outputs").rglob("*") if each.is_file())
    assert sorted(each.name for each in found) == ["MLproject", "changed", "new"]


def test_outputs_belong_to_the_caller(make_job) -> None:
    job = make_job("id -u; mkdir -p outputs; touch outputs/f", options={"user": "1234:4321"})
    assert job.run().exit_code == 0
    assert job.log() == b"1234\n"
    assert (job.folder.work / "outputs/f").stat().st_uid == os.getuid()


# -- what keeps it from starting


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"image": "mlflow-remote-test/never:1", "pull": "never"}, "IMAGE_PULL", "never"),
        ({"args": {"mount": "type=bind,src=/no/such/folder,dst=/x"}}, "VOLUME", "/no/such/folder"),
        ({"args": {"cpuset-cpus": "4096"}}, "CONTAINER_CONFIG", "4096"),
        ({"user": "no-such-user"}, "CONTAINER_CONFIG", "no-such-user"),
    ],
)
def test_a_container_that_cannot_start_says_why_and_leaves_nothing(make_job, options, code, words) -> None:
    job = make_job("true", options=options)
    with pytest.raises(JobError) as failed:
        job.start()
    assert failed.value.code == code
    assert words in str(failed.value)


def test_an_image_without_a_shell_is_named(make_job, client, engine) -> None:
    client.import_image_from_data(tar_of(file=b"nothing"), "mlflow-remote-test/bare", "1")
    job = make_job("true", image="mlflow-remote-test/bare:1")
    with pytest.raises(JobError, match="no /bin/sh") as failed:
        job.start()
    assert failed.value.code == "CONTAINER_CONFIG"
    engine.remove_image("mlflow-remote-test/bare:1")


def test_a_cancel_while_the_image_is_pulled_is_not_waited_for(make_job) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        job = make_job("true", image=f"127.0.0.1:{silent.getsockname()[1]}/never/answers:1")
        assert job.prepare().failed is None
        Spool(job.folder.spool).request_cancel()
        with pytest.raises(JobError) as failed:
            job.program.start(job.spec, job.folder, Start(job.environ))
    assert failed.value.code == "CANCELLED"


# -- what the program finds


def test_a_program_under_an_unknown_user_finds_a_home_and_a_name(make_job) -> None:
    script = """
import getpass, os, tempfile
names = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TMPDIR")
assert all(os.environ[name] for name in names), os.environ
getpass.getuser()
open(os.path.join(os.path.expanduser("~"), "file"), "w").close()
tempfile.TemporaryFile().close()
os.makedirs(os.environ["MPLCONFIGDIR"])
"""
    job = make_job("python3 main.py", files={"main.py": script}, options={"user": "54321:54321"})
    record = job.run()
    assert record.exit_code == 0, job.log()


def test_the_project_is_where_mlflow_has_it_and_its_own_users(make_job) -> None:
    job = make_job("pwd; stat -c %u . MLproject sub/x; touch new", files={"sub/x": ""}, options={"user": "777:778"})
    assert job.run().exit_code == 0, job.log()
    assert job.log().split() == [b"/mlflow/projects/code", b"777", b"777", b"777"]


def test_secrets_reach_the_program_and_nothing_else(make_job, engine, until) -> None:
    secret = "s3cret'\n$(x)\"" + "é" * 50_000
    files = {
        "main.py": "import os, time\nprint(len(os.environ['TOKEN']), flush=True)\n"
        "assert os.environ['TOKEN'].endswith('é')\nwhile not os.path.exists('stop'): time.sleep(0.05)"
    }
    job = make_job("python3 main.py", files=files, secrets={"TOKEN": secret}, env_vars={"OPEN": "literal-value"})
    running = job.start()
    until(lambda: job.log() == f"{len(secret)}\n".encode())
    inspected = json.dumps(engine.inspect(job.name))
    assert "s3cret" not in inspected
    assert "literal-value" not in inspected
    running.stop(0)
    job.end(running)


def test_the_program_has_no_capability_and_gets_none(make_job) -> None:
    job = make_job("grep -E 'Cap(Eff|Prm|Bnd)|NoNewPrivs' /proc/self/status", options={"user": "0:0"})
    assert job.run().exit_code == 0
    values = dict(line.split(":\t") for line in job.log().decode().splitlines())
    assert {values[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
    assert values["NoNewPrivs"] == "1"


def test_capabilities_are_kept_on_demand(make_job) -> None:
    job = make_job("grep CapBnd /proc/self/status", options={"user": "0:0", "capabilities": ["CHOWN"]})
    assert job.run().exit_code == 0
    assert job.log() == b"CapBnd:\t0000000000000001\n"


def test_the_images_entrypoint_wraps_the_program(make_job, image_with) -> None:
    image = image_with("wrapped", Entrypoint=["/usr/bin/env", "WRAPPED=yes"])
    job = make_job("echo $WRAPPED 'two  words'; exit 5", image=image)
    assert job.run().exit_code == 5
    assert job.log() == b"yes two  words\n"


@pytest.mark.parametrize(
    "entrypoint",
    [["/bin/sh", "-c"], ["env", "bash", "--norc", "-ec"], ["/bin/bash", "-eo", "pipefail", "-c"]],
    ids=str,
)
def test_a_shell_as_entrypoint_runs_the_programs_line(make_job, image_with, entrypoint) -> None:
    job = make_job("echo 'two  words'; exit 5", image=image_with("shell", Entrypoint=entrypoint))
    assert job.run().exit_code == 5
    assert job.log() == b"two  words\n"


@pytest.mark.parametrize("shell", [["/bin/sh", "-c"], ["/bin/bash", "-o", "pipefail", "-c"]], ids=str)
def test_an_entrypoint_that_would_ignore_the_program_is_refused(make_job, image_with, shell) -> None:
    job = make_job("exit 5", image=image_with("ignores", Entrypoint=[*shell, "true"]))
    with pytest.raises(JobError, match="ignores") as failed:
        job.start()
    assert failed.value.code == "CONTAINER_CONFIG"


def test_a_shell_that_hands_its_arguments_on_wraps_the_program(make_job, image_with) -> None:
    entrypoint = ["/bin/sh", "-c", 'WRAPPED=yes exec "$@"', "--"]
    job = make_job("echo $WRAPPED", image=image_with("hands-on", Entrypoint=entrypoint))
    assert job.run().exit_code == 0
    assert job.log() == b"yes\n"


def test_an_entrypoint_that_is_not_there_is_named(make_job, image_with) -> None:
    image = image_with("no-entrypoint", Entrypoint=["/no/such/program"])
    record = make_job("true", image=image).run()
    verdict = classify(record, None, None, cancel_requested=False)
    assert verdict.reason is not Reason.OK
    assert "/no/such/program" in verdict.message + verdict.words


def test_a_user_that_the_image_made_is_kept(make_job, image_with) -> None:
    image = image_with("user", User="nobody")
    job = make_job("id -un; touch new outputs/f", image=image)
    assert job.run().exit_code == 0, job.log()
    assert job.log() == b"nobody\n"


def test_docker_env_variables_and_volumes_are_honoured(make_job, tmp_path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "in").write_text("from outside")
    docker_env = {
        "image": "ignored",
        "environment": [["LITERAL", "a value"], "COPIED"],
        "volumes": [f"{shared}:/rw", f"{shared}:/ro:ro", "~/in-home:/home-mount"],
    }
    home = tmp_path / "home"
    (home / "in-home").mkdir(parents=True)
    command = 'echo "$LITERAL|$COPIED"; cat /rw/in; echo x > /rw/out; test -d /home-mount; echo y > /ro/out'
    job = make_job(command, docker_env=docker_env, environ={"COPIED": "mine", "HOME": str(home)})
    record = job.run()
    assert record.exit_code != 0  # the last write
    assert job.log().startswith(b"a value|mine\nfrom outside")
    assert b"ead-only" in job.log()
    assert (shared / "out").read_text() == "x\n"
    assert (shared / "out").stat().st_uid == os.getuid()


# -- limits and ends


def test_cancelling_keeps_the_grace_period_and_the_last_words(make_job, until) -> None:
    job = make_job("trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.1; done")
    running = job.start()
    until(lambda: job.log() == b"ready\n")
    running.stop(30)
    record = job.end(running)
    assert (record.stopped_by, record.exit_code) == ("cancel", 9)
    assert job.log().endswith(b"bye\n")


def test_a_program_that_ignores_sigterm_is_killed_after_its_grace_period(make_job, until) -> None:
    job = make_job("trap '' TERM; echo ready; while :; do sleep 0.1; done", limits=Limits(grace_period_s=0.5))
    running = job.start()
    until(lambda: job.log() == b"ready\n")
    running.stop(0.5)
    record = job.end(running)
    assert (record.stopped_by, record.killed) == ("cancel", True)


def test_a_cancel_that_the_engine_did_not_hear_is_said_again(make_job, until, monkeypatch) -> None:
    job = make_job("trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.1; done")
    running = job.start()
    until(lambda: job.log() == b"ready\n")
    copy_in, away = Engine.copy_in, [True]

    def away_at_first(*args: object) -> None:
        if away and away.pop():
            raise ComputeError("The Docker engine does not answer.", transient=True)
        copy_in(*args)

    monkeypatch.setattr(Engine, "copy_in", away_at_first)
    running.stop(30)
    record = job.end(running)
    assert (record.stopped_by, record.exit_code) == ("cancel", 9)


def test_a_container_that_takes_no_cancel_is_killed(make_job, engine, until, monkeypatch) -> None:
    monkeypatch.setattr("mlflow_remote_backend.compute.docker.watch.STOP_MARGIN_S", 0.2)
    command = "echo ready; sleep 2; rm -rf ../.mlflow-remote/spool; touch gone; sleep 600"
    job = make_job(command, limits=Limits(grace_period_s=0.5), outputs=())
    running = job.start()
    until(lambda: "gone" in in_container(engine, job.name, ["ls", request.WORK]))
    Spool(job.folder.spool).request_cancel()
    assert job.end(running).error["code"] == "CANCELLED"


def test_a_timeout_ends_the_program(make_job) -> None:
    record = make_job("sleep 60", limits=Limits(timeout_s=0.5)).run()
    assert record.timed_out


def test_too_much_memory_is_an_oom_kill(make_job) -> None:
    job = make_job("python3 -c 'x = bytearray(400 << 20)'", resources=Resources(memory_bytes=64 << 20))
    record = job.run()
    assert record.exit_code == 137
    assert record.oom_kills


def test_a_container_killed_from_outside_says_so(make_job, engine, until) -> None:
    job = make_job("echo before; sleep 60")
    running = job.start()
    until(lambda: job.log() == b"before\n")
    engine.kill(job.name)
    record = job.end(running)
    assert record.error is not None
    assert record.error["code"] == "KILLED_BY_SYSTEM"
    assert "SIGKILL" in record.error["message"]


def test_a_container_stopped_from_outside_ends_by_sigterm(make_job, engine, until) -> None:
    job = make_job("echo before; exec sleep 60")
    running = job.start()
    until(lambda: job.log() == b"before\n")
    engine.kill(job.name, "SIGTERM")
    record = job.end(running)
    assert (record.stopped_by, record.exit_code, record.error) == ("signal", 143, None)


def test_a_removed_container_loses_neither_log_nor_outputs(make_job, engine, until) -> None:
    job = make_job("echo before; echo r > outputs/f; sleep 60")
    running = job.start()
    until(lambda: job.log() == b"before\n")
    engine.remove(job.name)
    record = job.end(running)
    assert record.error is not None
    assert record.error["code"] == "JOB_DELETED"
    assert job.log() == b"before\n"
    assert job.output("f") == b"r\n"


def test_a_paused_container_is_waited_for(make_job, engine, until, client, monkeypatch) -> None:
    monkeypatch.setattr(mirror, "SILENCE_S", 2.0)
    job = make_job("echo before; while [ ! -e stop ]; do sleep 0.1; done; echo after")
    running = job.start()
    until(lambda: job.log() == b"before\n")
    client.pause(job.name)
    until(lambda: "docker unpause" in str(job.folder.said().get("detail")))
    assert running.alive()
    engine.unpause(job.name)
    exec_in(engine, job.name, ["touch", f"{request.WORK}/stop"])
    record = job.end(running)
    assert (record.exit_code, job.log()) == (0, b"before\nafter\n")


def test_a_paused_container_can_be_cancelled(make_job, client, until) -> None:
    job = make_job("echo before; sleep 60")
    running = job.start()
    until(lambda: job.log() == b"before\n")
    client.pause(job.name)
    running.stop(0)
    record = job.end(running)
    assert record.stopped_by == "cancel"


# -- a bad connection


def test_a_connection_that_breaks_again_and_again_loses_and_repeats_nothing(make_job, proxy, until) -> None:
    expected = chatter(3, 2500)
    job = make_job("python3 chatter.py 3 2500", files={"chatter.py": CHATTER}, options={"base_url": proxy.url})
    running = job.start()
    for part in range(1, 13):
        until(lambda part=part: len(job.log()) >= len(expected) * part // 16)
        proxy.cut()
    assert job.end(running).exit_code == 0
    assert job.log() == expected


def test_a_connection_that_falls_silent_is_made_anew(make_job, proxy: EngineProxy, until, monkeypatch) -> None:
    monkeypatch.setattr(mirror, "SILENCE_S", 2.0)
    job = make_job("echo before; while [ ! -e stop ]; do sleep 0.1; done; echo after", options={"base_url": proxy.url})
    running = job.start()
    until(lambda: job.log() == b"before\n")
    before = proxy.connections
    proxy.freeze()
    until(lambda: proxy.connections > before)
    proxy.thaw()
    stop_file(job)
    assert job.end(running).exit_code == 0
    assert job.log() == b"before\nafter\n"


def test_an_engine_that_goes_away_and_comes_back_is_waited_for(make_job, proxy: EngineProxy, until) -> None:
    job = make_job("echo before; while [ ! -e stop ]; do sleep 0.1; done; echo after", options={"base_url": proxy.url})
    running = job.start()
    until(lambda: job.log() == b"before\n")
    proxy.refuse()
    until(lambda: "no contact" in str(job.folder.said().get("detail")))
    assert running.alive()
    stop_file(job)
    proxy.accept()
    assert job.end(running).exit_code == 0
    assert job.log() == b"before\nafter\n"


def test_an_engine_whose_tls_files_are_away_is_waited_for(make_job, engine, monkeypatch) -> None:
    job = make_job("sleep 1")
    with monkeypatch.context() as patch:
        patch.setattr(ContainerRun, "_watch", lambda self: None)
        job.start()
    away = [True]

    def connect() -> Engine:
        if away and away.pop():
            raise ConfigError("The Docker engine's TLS files cannot be used.")
        return engine

    record = job.end(ContainerRun(connect, job.spec, job.folder, engine.inspect(job.name)["Id"]))
    assert (record.exit_code, record.error) == (0, None)


def test_a_cancelled_job_whose_engine_never_comes_back_is_given_up(make_job, proxy, engine, until, monkeypatch) -> None:
    monkeypatch.setattr("mlflow_remote_backend.compute.docker.watch.STOP_MARGIN_S", 0.2)
    monkeypatch.setattr("mlflow_remote_backend.compute.docker.watch.GIVE_UP_S", 0.2)
    job = make_job("echo before; sleep 60", options={"base_url": proxy.url})
    running = job.start()
    until(lambda: job.log() == b"before\n")
    proxy.refuse()
    running.stop(0)
    until(lambda: not running.alive())
    proxy.accept()
    record = job.end(running)
    assert record.error is not None
    assert record.error["code"] == "CANCELLED"
    assert "may still run" in record.error["message"]


@pytest.mark.parametrize("step", ["connect", "create", "copy_in", "attach_input", "start", "send"])
def test_an_engine_that_goes_away_while_the_program_is_started_is_waited_for(make_job, monkeypatch, step) -> None:
    owner = Connection if step == "send" else Engine
    original = getattr(owner, step)
    away = [False, True, True] if step == "connect" else [True]  # or right after it has done what it was asked

    def once_away(*args: object) -> object:
        if step == "connect" and away and away.pop():
            raise ComputeError("The Docker engine does not answer.", transient=True)
        if step == "send" and away and away.pop():
            raise BrokenPipeError("cut off")
        done = original(*args)
        if away and away.pop():
            raise ComputeError("The Docker engine does not answer.", transient=True)
        return done

    monkeypatch.setattr(owner, step, once_away)
    job = make_job("echo once; exit 4", secrets={"TOKEN": "x"})
    assert job.run().exit_code == 4
    assert job.log() == b"once\n"


def test_an_engine_that_stays_away_fails_the_start_by_name(make_job, monkeypatch) -> None:
    away = ComputeError("The Docker engine does not answer.", transient=True)
    monkeypatch.setattr(Engine, "connect", lambda *args: (_ for _ in ()).throw(away))
    job = make_job("true", limits=Limits(start_timeout_s=0.1))
    with pytest.raises(JobError, match="does not answer") as failed:
        job.start()
    assert failed.value.code == "START_TIMEOUT"


# -- a supervisor that dies


def test_a_second_supervisor_takes_over_where_the_first_one_stopped(make_job, until) -> None:
    job = make_job("echo before; while [ ! -e stop ]; do sleep 0.1; done; echo after; echo r > outputs/f; exit 6")
    first = multiprocessing.get_context("fork").Process(target=lambda: (job.start(), threading.Event().wait()))
    first.start()
    until(lambda: job.log() == b"before\n")
    first.kill()
    first.join()
    second = job.program.find(job.spec, job.folder)
    assert isinstance(second, ContainerRun)
    stop_file(job)
    record = job.end(second)
    assert (record.exit_code, job.log()) == (6, b"before\nafter\n")
    assert job.output("f") == b"r\n"


@pytest.mark.parametrize("step", ["create", "start"])
def test_a_supervisor_that_died_before_the_start_leaves_nothing(make_job, engine, until, monkeypatch, step) -> None:
    job = make_job("echo never")
    original = Engine.create

    def die(*args: object) -> None:
        if step == "create":
            original(*args)
        raise SystemExit("killed here")

    monkeypatch.setattr(Engine, step, die)
    monkeypatch.setattr("mlflow_remote_backend.compute.docker.program.remove", lambda *args: None)
    with pytest.raises(SystemExit):
        job.start()
    monkeypatch.undo()
    assert engine.inspect(job.name) is not None
    job.folder.count_recovery()
    second = job.program.find(job.spec, job.folder)
    until(lambda: not second.alive())
    second.collect()
    second.collect()
    spool = Spool(job.folder.spool)
    verdict = classify(spool.exit(), spool.vitals(), spool.prepared(), cancel_requested=False)
    assert verdict.reason is Reason.KILLED_BY_SYSTEM
    assert job.log() == b""


def test_a_supervisor_that_died_while_it_made_the_environment_leaves_no_builder(make_job, engine, python_image) -> None:
    job = make_job("echo never")
    image = engine.image(python_image)["Id"]
    engine.create(f"{job.name}{request.BUILDER}", {"Image": image, "Labels": request.labels(job.spec)})
    job.folder.count_recovery()
    second = job.program.find(job.spec, job.folder)
    assert not second.alive()
    second.collect()
    assert engine.inspect(f"{job.name}{request.BUILDER}") is None


def test_a_supervisor_that_died_before_the_removal_leaves_nothing(make_job, engine, monkeypatch) -> None:
    job = make_job("echo done")
    monkeypatch.setattr("mlflow_remote_backend.compute.docker.watch.remove", lambda *args: None)
    assert job.run().exit_code == 0
    assert engine.inspect(job.name) is not None
    again = job.program.find(job.spec, job.folder)
    assert not again.alive()
    again.collect()
    assert engine.inspect(job.name) is None


def test_a_job_whose_engine_is_away_can_be_cancelled_by_a_second_supervisor(
    make_job, proxy, until, monkeypatch
) -> None:
    monkeypatch.setattr("mlflow_remote_backend.compute.docker.watch.STOP_MARGIN_S", 0.2)
    monkeypatch.setattr("mlflow_remote_backend.compute.docker.watch.GIVE_UP_S", 0.2)
    job = make_job("echo before; sleep 60", options={"base_url": proxy.url}, limits=Limits(grace_period_s=0))
    first = multiprocessing.get_context("fork").Process(target=lambda: (job.start(), threading.Event().wait()))
    first.start()
    until(lambda: job.log() == b"before\n")
    first.kill()
    first.join()
    proxy.refuse()
    second = job.program.find(job.spec, job.folder)
    assert second.alive()
    Spool(job.folder.spool).request_cancel()
    until(lambda: not second.alive())
    proxy.accept()
    record = job.end(second)
    assert record.error["code"] == "CANCELLED"
    remove(Engine.connect(Endpoint.from_options({}, os.environ)), job.name)


def test_secrets_that_were_cut_off_start_no_program(make_job, monkeypatch) -> None:
    job = make_job("echo never", secrets={"TOKEN": "x" * 1000})
    whole = Connection.send
    monkeypatch.setattr(Connection, "send", lambda self, data: whole(self, data[: len(data) // 2]))
    record = job.run()
    assert record.error["code"] == "BOOTSTRAP"
    assert job.log() == b""


def test_a_read_only_root_is_enough(make_job) -> None:
    job = make_job("echo r > outputs/f; touch /x", options={"args": {"read-only": True}, "user": "1000:1000"})
    assert job.run().exit_code == 1
    assert b"ead-only" in job.log()
    assert job.output("f") == b"r\n"


# -- helpers


def stop_file(job) -> None:
    exec_in(Engine.connect(Endpoint.from_options({}, os.environ)), job.name, ["touch", f"{request.WORK}/stop"])


def exec_in(engine, container: str, argv: list[str]) -> None:
    in_container(engine, container, argv)


def in_container(engine, container: str, argv: list[str]) -> str:
    connection = engine.exec(container, argv)
    try:
        return b"".join(data for _, data in connection.frames(30)).decode()
    finally:
        connection.close()


def tar_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
