"""What a project declares, read in every spelling, and refused with its file and line where it cannot be locked."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_remote_backend.config.options import EnvironmentOptions as ConfigOptions
from mlflow_remote_backend.environment import credentials, requirements, spec
from mlflow_remote_backend.errors import EnvironmentError_

THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def conda(folder: Path, text: str, manager: str | None = None, **options: object) -> spec.EnvSpec:
    (folder / "conda.yaml").write_text(text)
    return spec.load(folder, "conda", "conda.yaml", manager, spec.EnvironmentOptions(**options))  # type: ignore[arg-type]


def python(folder: Path, text: str, manager: str | None = None) -> spec.EnvSpec:
    (folder / "python_env.yaml").write_text(text)
    return spec.load(folder, "python", "python_env.yaml", manager)


CONDA = """
channels: [conda-forge, private]
dependencies:
  - python=3.11
  - NumPy >= 2
  - pip
  - pip:
      - Scikit_Learn>=1.5
      - six
variables:
  GREETING: hello
"""


# ---------------------------------------------------------------------------------------------- managers


def test_a_conda_project_is_conda_by_default(tmp_path: Path) -> None:
    loaded = conda(tmp_path, CONDA)
    assert (loaded.manager, loaded.kind) == ("conda", "conda-lock")
    assert loaded.channels == ("conda-forge", "private")
    assert loaded.conda == ("python=3.11", "NumPy >= 2", "pip")
    assert loaded.packages.requirements == ("scikit-learn>=1.5", "six")
    assert loaded.env_vars == {"GREETING": "hello"}
    assert loaded.warnings == ()


@pytest.mark.parametrize("manager", [None, "virtualenv", "uv"])
def test_the_variables_of_a_conda_yaml_are_the_programs_whatever_makes_its_environment(
    tmp_path: Path, manager: str | None
) -> None:
    assert conda(tmp_path, CONDA, manager).env_vars == {"GREETING": "hello"}


@pytest.mark.parametrize("manager", ["virtualenv", "uv"])
def test_a_conda_project_in_a_venv_keeps_its_python_parts_and_names_what_it_drops(tmp_path: Path, manager: str) -> None:
    loaded = conda(tmp_path, CONDA, manager)
    assert (loaded.manager, loaded.kind, loaded.python) == (manager, "requirements", "3.11")
    assert {"scikit-learn>=1.5", "six", "pip"} <= set(loaded.packages.requirements)
    assert loaded.conda == ()
    (warning,) = loaded.warnings
    assert "NumPy >= 2" in warning
    assert manager in warning


@pytest.mark.parametrize(
    ("spelled", "version"),
    [("python=3.9.18=h955ad1f_0", "3.9.18"), ("conda-forge::python=3.10", "3.10"), ("python=3.9.*=*_cpython", "3.9")],
)
def test_a_venv_has_the_python_that_is_named_whatever_its_build_and_channel(
    tmp_path: Path, spelled: str, version: str
) -> None:
    assert conda(tmp_path, f"dependencies: ['{spelled}', pip=24.0=py_0]", "uv").python == version


@pytest.mark.parametrize("manager", ["virtualenv", "uv"])
def test_a_major_version_alone_is_refused(tmp_path: Path, manager: str) -> None:
    with pytest.raises(EnvironmentError_, match="'3' is no single Python version"):
        python(tmp_path, "python: 3", manager)


@pytest.mark.parametrize("spelled", ["python", "python<3.12", "python!=3.9", "python=3", "python>=3.9,<3.12"])
def test_a_venv_needs_one_python_version(tmp_path: Path, spelled: str) -> None:
    with pytest.raises(EnvironmentError_, match="no single Python version"):
        conda(tmp_path, f"dependencies: ['{spelled}']", "virtualenv")


def test_a_python_project_is_a_virtualenv_by_default_with_what_virtualenv_puts_there(tmp_path: Path) -> None:
    loaded = python(tmp_path, "python: '3.11.7'\nbuild_dependencies: [setuptools==70]\ndependencies: [six]\n")
    assert (loaded.manager, loaded.kind, loaded.python) == ("virtualenv", "requirements", "3.11.7")
    assert loaded.packages.requirements == ("setuptools==70", "six")
    assert loaded.seeds == ("pip",)


def test_a_python_project_under_uv_has_nothing_but_what_it_names(tmp_path: Path) -> None:
    assert python(tmp_path, "dependencies: [six]", "uv").seeds == ()


def test_a_python_project_under_conda_takes_python_from_a_channel(tmp_path: Path) -> None:
    loaded = python(tmp_path, "python: 3.10\nbuild_dependencies: [pip]\ndependencies: [six]", "conda")
    assert (loaded.kind, loaded.conda) == ("conda-lock", ("python=3.10", "pip"))
    assert loaded.packages.requirements == ("six",)


def test_python_3_10_unquoted_is_not_3_1(tmp_path: Path) -> None:
    assert python(tmp_path, "python: 3.10").python == "3.10"


def test_docker_and_local_lock_nothing(tmp_path: Path) -> None:
    assert spec.load(tmp_path, "docker", None, "conda").manager == "docker"
    assert conda(tmp_path, CONDA, "local").kind == ""


def test_a_project_that_declares_nothing_uses_what_is_there_unless_told(tmp_path: Path) -> None:
    assert spec.load(tmp_path, "python_env", None).manager == "local"
    assert spec.load(tmp_path, None, None, "virtualenv").python == THIS_PYTHON
    assert spec.load(tmp_path, None, None, "conda").conda == (f"python={THIS_PYTHON}", "pip")


def test_an_unknown_manager_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentError_, match=r"(?s)'pipenv'.*conda, virtualenv, uv, local"):
        spec.load(tmp_path, None, None, "pipenv")


def test_the_options_of_the_backend_config_are_understood(tmp_path: Path) -> None:
    (tmp_path / "python_env.yaml").write_text("dependencies: [six]")
    options = ConfigOptions(frozen=True, index_url="https://index.example/simple")
    loaded = spec.load(tmp_path, "python", "python_env.yaml", None, options)
    assert loaded.options == spec.EnvironmentOptions(frozen=True, index_url=("https://index.example/simple",))


# ---------------------------------------------------------------------------------------------- requirements


def test_requirement_files_are_expanded_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "requirements.txt").write_text(
        "# a comment\nsix == 1.16 \\\n   ; python_version >= '3'   # why\n\n-r more/base.txt\n--pre\n"
    )
    (tmp_path / "more/base.txt").write_text("-c limits.txt\nidna>=3\n--extra-index-url=https://index.example/simple\n")
    (tmp_path / "more/limits.txt").write_text("urllib3<2\n")
    loaded = python(tmp_path, "dependencies: ['-r requirements.txt', 'Requests[SOCKS, security]~=2.0']", "uv").packages
    assert loaded.requirements == (
        'six==1.16; python_version >= "3"',
        "idna>=3",
        "requests[SOCKS,security]~=2.0",
    )
    assert loaded.constraints == ("urllib3<2",)
    assert loaded.index_options == ("--extra-index-url https://index.example/simple",)
    assert loaded.build_options == ("--pre",)


def test_digests_stay_with_their_requirement(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text(f"six==1.16 --hash=sha256:{'a' * 64} \\\n  --hash=sha256:{'b' * 64}\n")
    loaded = python(tmp_path, "dependencies: [-r r.txt]", "uv")
    assert loaded.packages.pins == {"six==1.16": (f"sha256:{'a' * 64}", f"sha256:{'b' * 64}")}
    assert loaded.hashed


@pytest.mark.parametrize(
    "line",
    ["-e .", "--editable=src", ".", "./pkg", "../pkg", "/opt/pkg", "pkg.whl", "thing @ file:///opt/thing", "a/b"],
)
def test_local_packages_are_refused_with_their_place(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.txt").write_text(f"six\n{line}\n")
    with pytest.raises(EnvironmentError_, match=r"r\.txt, line 2.*local folder") as refused:
        python(tmp_path, "dependencies: [-r r.txt]")
    assert "PYTHONPATH" in refused.value.hint


GIT = "git+https://host.example/r.git@v1"


@pytest.mark.parametrize(
    ("line", "requirement"),
    [
        (f"{GIT}#egg=Thing", f"thing @ {GIT}"),
        (f"{GIT}#egg=thing&subdirectory=python", f"thing @ {GIT}#subdirectory=python"),
        (f"{GIT}#subdirectory=python&egg=thing[more]", f"thing[more] @ {GIT}#subdirectory=python"),
        (f"{GIT}#egg=thing ; python_version < '3.9'", f'thing @ {GIT} ; python_version < "3.9"'),
        (f"-e {GIT}#egg=thing", f"thing @ {GIT}"),
        (GIT, GIT),
    ],
)
def test_a_bare_url_keeps_all_that_it_says(tmp_path: Path, line: str, requirement: str) -> None:
    (tmp_path / "r.txt").write_text(f"{line}\n")
    assert python(tmp_path, "dependencies: [-r r.txt]").packages.requirements == (requirement,)


def test_requirements_that_powershell_wrote_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_bytes("six\r\nidna\r\n".encode("utf-16"))
    assert python(tmp_path, "dependencies: [-r r.txt]").packages.requirements == ("six", "idna")


def test_a_file_on_a_server_is_not_looked_for_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentError_, match=r"names a file on a server.*\n.*Download it"):
        python(tmp_path, "dependencies: [-c https://host.example/constraints.txt]")


@pytest.mark.parametrize("line", ["six==", "six =>1", "--no-such-option 1", "a b c", "six; nonsense == 3"])
def test_nonsense_is_refused_with_its_place(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.txt").write_text(f"{line}\n")
    with pytest.raises(EnvironmentError_, match=r"r\.txt, line 1"):
        python(tmp_path, "dependencies: [-r r.txt]")


def test_a_file_that_includes_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("-r b.txt\n")
    (tmp_path / "b.txt").write_text("-r a.txt\n")
    with pytest.raises(EnvironmentError_, match=r"a\.txt -> b\.txt -> a\.txt"):
        python(tmp_path, "dependencies: [-r a.txt]")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentError_, match=r"(?s)nowhere\.txt cannot be read.*relative to the file"):
        python(tmp_path, "dependencies: [-r nowhere.txt]")


@pytest.mark.parametrize("data", [b"\xff\xfe\x00six", b"six\x00==1", b"\xff" * 10])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "r.txt").write_bytes(data)
    with pytest.raises(EnvironmentError_):
        python(tmp_path, "dependencies: [-r r.txt]")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "r.txt").open("wb") as stream:
        stream.truncate(requirements.MAX_FILE_BYTES + 1)
    with pytest.raises(EnvironmentError_, match="no list of requirements"):
        python(tmp_path, "dependencies: [-r r.txt]")


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(EnvironmentError_):
        expanded = requirements.expand_text(text, folder=Path("/nonexistent"), where="r.txt")
        assert all(line == line.strip() and "\n" not in line for line in expanded.requirements)


# ---------------------------------------------------------------------------------------------- hostile documents


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be a mapping"),
        ("- a\n- b", "must be a mapping"),
        ("dependencies: yes", "must be a list"),
        ("dependencies: [[a]]", "is no dependency"),
        ("dependencies: [{npm: [left-pad]}]", "is no dependency"),
        ("dependencies: ['https://host.example/linux-64/a-1-0.tar.bz2']", "single package file"),
        ("dependencies: ['$(touch x)']", "no conda package"),
        ("dependencies: ['--channel=evil']", "no conda package"),
        ("dependencies: [a]\nvariables: [x]", "variables must map"),
        ("channels: {a: b}", "must be a list of texts"),
        ("a: [", "cannot be read"),
        ("a: !!python/object/apply:os.system [touch x]", None),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "alias"),
    ],
)
def test_hostile_conda_files_are_refused(tmp_path: Path, text: str, says: str | None) -> None:
    if says is None:
        assert conda(tmp_path, text).conda == ()
    else:
        with pytest.raises(EnvironmentError_, match=says):
            conda(tmp_path, text)
    assert not list(tmp_path.glob("x"))


def test_deep_nesting_is_an_error_and_no_crash(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentError_):
        conda(tmp_path, "a: " + "[" * 100_000)


def test_a_python_version_is_a_version(tmp_path: Path) -> None:
    for wrong in ("'>=3.9'", "[3]", "three", "'3.11; rm'"):
        with pytest.raises(EnvironmentError_, match="python must be a version"):
            python(tmp_path, f"python: {wrong}")


# ---------------------------------------------------------------------------------------------- credentials

LITERAL = [
    "https://user:word@host.example/simple",
    "https://token@host.example/simple",
    "https://${USER}:word@host.example/x",
    "https://token:@host.example/simple",
    "https://host.example/t/sometoken/channel",
    "ssh://git:word@host.example/x",
]


@pytest.mark.parametrize("url", LITERAL)
def test_literal_credentials_are_seen_and_never_shown(url: str) -> None:
    assert credentials.has_literal(url)
    for hidden in ("word@", "token@", "token:@", "sometoken"):
        assert hidden not in credentials.redact(f"error for {url}: no")
        assert hidden not in credentials.strip(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://host.example/a@b",
        "https://${U}:${P}@host.example/simple",
        "https://$U:$P@host.example/x",
        "https://reader:$P@host.example/x",
        "git+ssh://git@host.example/x.git",
        "https://host.example/?mail=a@b",
        "https://host.example/t/${TOKEN}/channel",
    ],
)
def test_what_is_no_literal_credential_passes(url: str) -> None:
    assert not credentials.has_literal(url)


@pytest.mark.parametrize("url", LITERAL[:2])
@pytest.mark.parametrize(
    "text",
    [
        "dependencies: ['--index-url {url}']",
        "dependencies: ['--extra-index-url={url}', six]",
        "dependencies: ['thing @ {url}/thing-1.tar.gz']",
        "dependencies: ['git+{url}/thing.git@main']",
        "dependencies: ['-e git+{url}/thing.git@main#egg=thing']",
        "dependencies: ['-r {url}/r.txt']",
        "dependencies: ['--unknown {url}']",
        "dependencies: ['--find-links \"{url}']",
    ],
)
def test_literal_credentials_in_requirements_are_refused_and_not_repeated(tmp_path: Path, text: str, url: str) -> None:
    with pytest.raises(EnvironmentError_, match="holds a credential") as refused:
        python(tmp_path, text.format(url=url))
    assert "word" not in str(refused.value)
    assert "token@" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "git+https://${TOKEN}@host.example/thing.git@main",
        "git+https://reader:$TOKEN@host.example/thing.git@main",
        "https://host.example/thing-1-py3-none-any.whl?token=${TOKEN}",
    ],
)
def test_a_variable_whose_value_would_stand_in_the_lock_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(EnvironmentError_, match=r"holds a credential.*(?s:.*)netrc"):
        python(tmp_path, f"dependencies: ['thing @ {url}']")


def test_values_of_variables_are_quoted_into_a_url() -> None:
    url = credentials.expand("https://${U}:$P@host.example/x", {"U": "a@b", "P": "p/w#?"})
    assert url == "https://a%40b:p%2Fw%23%3F@host.example/x"


# ---------------------------------------------------------------------------------------------- identity


def test_order_and_spelling_do_not_change_the_declaration(tmp_path: Path) -> None:
    one = conda(tmp_path, "channels: [c]\ndependencies: [python=3.11, 'numpy >= 2', {pip: [six, 'Idna >= 3']}]")
    two = conda(tmp_path, "dependencies: [{pip: ['idna>=3', six]}, NumPy>=2, pip, python=3.11]\nchannels: [c]\nname: x")
    assert one.declaration_key() == two.declaration_key()


@pytest.mark.parametrize(
    "changed",
    [
        "channels: [d]\ndependencies: [python=3.11, numpy>=2]",
        "channels: [c, d]\ndependencies: [python=3.11, numpy>=2]",
        "channels: [c]\ndependencies: [python=3.12, numpy>=2]",
        "channels: [c]\ndependencies: [python=3.11, numpy>2]",
        "channels: [c]\ndependencies: [python=3.11, numpy>=2, {pip: [six]}]",
    ],
)
def test_another_content_is_another_declaration(tmp_path: Path, changed: str) -> None:
    one = conda(tmp_path, "channels: [c]\ndependencies: [python=3.11, numpy>=2]")
    assert conda(tmp_path, changed).declaration_key() != one.declaration_key()


def test_mirrors_do_not_change_the_declaration(tmp_path: Path) -> None:
    plain = conda(tmp_path, CONDA)
    mirrored = conda(tmp_path, CONDA, channel_alias="https://mirror.example", index_url=("https://index.example",))
    assert plain.declaration_key() == mirrored.declaration_key()


def test_a_project_without_channels_uses_conda_forge_and_says_so(tmp_path: Path) -> None:
    loaded = conda(tmp_path, "dependencies: [python]")
    assert loaded.channels == ("conda-forge",)
    assert "names no channel" in loaded.warnings[0]
