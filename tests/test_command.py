"""An entry point and its parameters become the command line that MLflow would run, and never one that it would not."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_remote_backend.errors import ProjectError
from mlflow_remote_backend.job import EntryPoint, Parameter
from mlflow_remote_backend.runner import command

HOSTILE = [
    "",
    " ",
    "a b",
    "'",
    '"',
    "''",
    '""',
    "it's",
    '"quoted"',
    "$(touch PWNED)",
    "`touch PWNED`",
    "; touch PWNED",
    "&& touch PWNED",
    "| touch PWNED",
    "& touch PWNED &",
    "> PWNED",
    "< /etc/passwd",
    "$HOME",
    "${HOME}",
    "$((1+1))",
    "\\",
    "\\\\",
    "\\n",
    "\n",
    "a\nb",
    "\n\n",
    "\r",
    "\t",
    "-",
    "--",
    "-rf",
    "--alpha=1",
    "-P",
    "#comment",
    "!",
    "!!",
    "~",
    "~root",
    "*",
    "?",
    "[a-z]",
    "{a,b}",
    "{x}",
    "{",
    "}",
    "{{}}",
    "{0}",
    "%s",
    "%n%n",
    "😀",
    "e\u0301",
    "\u202emoc.live\u202c",
    "\ufeff",
    "\x1b[31m",
    "\x01",
    "\x7f",
    "a" * 100_000,
    "' ; touch PWNED ; '",
    "'$(touch PWNED)'",
    '"; touch PWNED; "',
    "x'\"$(touch PWNED)\"'",
    "NaN",
    "EOF\ntouch PWNED",
]


def entry(template: str, *names: str) -> EntryPoint:
    return EntryPoint("main", template, tuple(Parameter(name) for name in names))


def run(line: str, folder) -> list[bytes]:
    """The arguments as a program that bash starts gets them."""
    program = 'import os, sys; sys.stdout.buffer.write(b"\\0".join(os.fsencode(a) for a in sys.argv[1:]) + b"\\0")'
    shown = line.replace("PROGRAM", f"python3 -I -c {shlex.quote(program)}", 1)
    done = subprocess.run(["bash", "-c", shown], cwd=folder, capture_output=True, check=True)
    return done.stdout.split(b"\0")[:-1]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_value_arrives_byte_equal_and_executes_nothing(value, tmp_path):
    extra = value[:1000]
    line = command.render(entry("PROGRAM {p}", "p"), {"p": value}, {"extra": extra})
    assert run(line, tmp_path) == [value.encode(), b"--extra", extra.encode()]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [key for key in HOSTILE if key and len(key) < 1000], ids=repr)
def test_a_hostile_name_of_an_extra_parameter_executes_nothing(key, tmp_path):
    line = command.render(entry("PROGRAM"), {}, {key: "v"})
    assert run(line, tmp_path)[-1] == b"v"
    assert list(tmp_path.iterdir()) == []


def test_there_are_at_least_sixty_hostile_values():
    assert len(set(HOSTILE)) >= 60


@settings(deadline=None)
@given(
    declared=st.dictionaries(st.sampled_from("abc"), st.text(), min_size=3),
    # names that need no quotes: not every MLflow 3 quotes the others; we always do
    extra=st.dictionaries(st.from_regex(r"[A-Za-z0-9_.-]{2,9}", fullmatch=True), st.text()),
)
def test_the_command_equals_the_one_that_mlflow_computes(declared, extra):
    from mlflow.projects.utils import load_project

    template = "python x.py --a {a} {b} | tee ${{HOME}}/{c}.log"
    ours = entry(template, "a", "b", "c")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "MLproject").write_text(
            "entry_points:\n  main:\n    parameters: {a: string, b: {type: float}, c: {type: string, default: z}}\n"
            f"    command: {template!r}\n"
        )
        theirs = load_project(folder).get_entry_point("main")
    values = {**declared, **extra}
    if any("\0" in text for pair in values.items() for text in pair):
        with pytest.raises(ProjectError, match="NUL"):
            command.render(ours, declared, extra)
        return
    assert command.render(ours, *command.values_of(ours, values)) == theirs.compute_command(values, None)


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ('echo "{p}"', "$(touch PWNED)"),
        ('echo "{p}"', "`touch PWNED`"),
        ('echo "{p}"', '"; touch PWNED; "'),
        ('echo "{p}"', "\\"),
        ("echo '{p}'", "; touch PWNED"),
        ("echo '{p}'", "a b"),
        ("bash -c 'echo {p}'", "$(touch PWNED)"),
        ('bash -c "echo {p}"', "$(touch PWNED)"),
        ("echo `echo {p}`", "`touch PWNED`"),
        ("cat <<EOF\n{p}\nEOF", "$(touch PWNED)"),
        ('echo "a"\'b\'"{p}"', "$(touch PWNED)"),
        ('echo \\" "{p}"', "$(touch PWNED)"),
    ],
)
def test_a_value_that_would_leave_the_templates_own_quotes_is_refused(template, value):
    with pytest.raises(ProjectError, match=r"inside .*(quotes|backticks|here-document)"):
        command.render(entry(template, "p"), {"p": value}, {})


@pytest.mark.parametrize(
    ("template", "value", "expected"),
    [
        ('PROGRAM "{p}"', "0.5", [b"0.5"]),
        ("PROGRAM '{p}'", "data/train.csv", [b"data/train.csv"]),
        ('PROGRAM "a" {p}', "$(x)", [b"a", b"$(x)"]),
        ("PROGRAM 'a' {p} \"b\"", "; x", [b"a", b"; x", b"b"]),
        ("PROGRAM \\' {p}", "$(x)", [b"'", b"$(x)"]),
    ],
)
def test_harmless_values_and_unquoted_placeholders_pass(template, value, expected, tmp_path):
    assert run(command.render(entry(template, "p"), {"p": value}, {}), tmp_path) == expected


@settings(deadline=None)
@given(value=st.text(alphabet=st.sampled_from("ab '\"$`\\();|&<>\n#!{}~*?"), max_size=12))
@pytest.mark.parametrize("template", ['printf %s "{p}"', "printf %s '{p}'", 'bash -c "printf %s {p}"', "printf %s {p}"])
def test_whatever_is_let_through_runs_nothing_but_the_templates_program(template, value, tmp_path_factory):
    try:
        line = command.render(entry(template, "p"), {"p": value}, {})
    except ProjectError:
        return
    folder = tmp_path_factory.getbasetemp() / "run-nothing"
    folder.mkdir(exist_ok=True)
    trace = subprocess.run(["bash", "-xc", line], cwd=folder, capture_output=True, text=True, check=False).stderr
    started = [each for each in trace.splitlines() if each.startswith("+")]
    assert all(each.lstrip("+ ").startswith(("printf", "bash")) for each in started), trace
    assert len(started) == 1, trace
    assert list(folder.iterdir()) == []


def test_a_nul_byte_is_refused_and_named():
    with pytest.raises(ProjectError, match="'p' has a NUL byte"):
        command.render(entry("x {p}", "p"), {"p": "a\0b"}, {})


def test_a_command_too_long_for_any_program_is_refused_with_its_size():
    with pytest.raises(ProjectError, match="bytes long"):
        command.render(entry("x {p}", "p"), {"p": "a" * command.MAX_COMMAND_BYTES}, {})


def test_the_longest_command_that_is_let_through_can_be_run(tmp_path):
    room = command.MAX_COMMAND_BYTES - len("printf %s ")
    line = command.render(entry("printf %s {p}", "p"), {"p": "a" * room}, {})
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert len(done.stdout) == room


@pytest.mark.parametrize("template", ["x {q}", "x {", "x {0}", "x {p.nothing}", "x {p!z}"])
def test_a_broken_template_is_an_error_that_names_the_entry_point(template):
    with pytest.raises(ProjectError, match="'main' is not a valid template"):
        command.render(entry(template, "p"), {"p": "1"}, {})


def test_missing_parameters_are_named_and_defaults_filled_in():
    point = EntryPoint("main", "x", (Parameter("a"), Parameter("b", "float", "0.5"), Parameter("c")))
    with pytest.raises(ProjectError, match="'a', 'c'"):
        command.values_of(point, {})
    assert command.values_of(point, {"a": "1", "c": "2", "z": "9"}) == ({"a": "1", "b": "0.5", "c": "2"}, {"z": "9"})
