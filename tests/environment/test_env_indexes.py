"""Which index is asked: the settings of pip and uv, in their order, with credentials taken out and kept apart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlflow_remote_backend import config, submission
from mlflow_remote_backend.environment import indexes
from mlflow_remote_backend.errors import EnvironmentError_
from mlflow_remote_backend.job import EnvironmentRef

PASSWORD = "s3" + "cret/+"
QUOTED = "s3" + "cret%2F%2B"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own folder of settings, where pip and uv look."""
    monkeypatch.delenv("PIP_CONFIG_FILE")
    monkeypatch.setenv("XDG_CONFIG_DIRS", os.devnull)
    folder = Path(os.environ["XDG_CONFIG_HOME"])
    for name in ("pip", "uv"):
        (folder / name).mkdir(parents=True)
    return folder


def test_nothing_configured_is_uvs_default() -> None:
    assert indexes.choose((), ()) == ()


def test_the_backend_config_stands_over_everything(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings / "pip/pip.conf").write_text("[global]\nindex-url = https://pip.example/simple\n")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://uv.example/simple")
    assert indexes.choose(("https://a.example/simple", "https://$T@b.example/simple"), ("--index-url x",)) == (
        "--index-url https://a.example/simple",
        "--extra-index-url https://${T}@b.example/simple",
    )


def test_pips_file_is_read_with_its_sections_and_spellings(settings: Path) -> None:
    (settings / "pip/pip.conf").write_text(
        "[global]\nindex_url = https://one.example/simple\nfind-links =\n    /opt/a\n    /opt/b\ntimeout = 3\n"
        "[install]\nindex-url = https://two.example/simple\ntrusted-host = two.example\n[list]\nindex-url = no\n"
    )
    lines = indexes.choose((), ())
    assert "--index-url https://two.example/simple" in lines
    assert "--find-links /opt/a" in lines
    assert "--find-links /opt/b" in lines
    assert "--trusted-host two.example" in lines
    assert lines[-1] == indexes.LIKE_PIP


def test_pips_variables_stand_over_its_files(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings / "pip/pip.conf").write_text("[global]\nindex-url = https://file.example/simple\n")
    monkeypatch.setenv("PIP_INDEX_URL", "https://variable.example/simple")
    assert "--index-url https://variable.example/simple" in indexes.choose((), ())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_INDEX_URL")
    assert indexes.choose((), ()) == ()


@pytest.mark.parametrize("text", ["no section = 1", "[global\nindex-url=x", "\0", "[global]\nindex-url"])
def test_a_damaged_file_of_pip_says_nothing(settings: Path, text: str) -> None:
    (settings / "pip/pip.conf").write_text(text)
    assert not any(line.endswith("index-url x") for line in indexes.choose((), ()))


def test_uvs_file_stands_over_pips(settings: Path) -> None:
    (settings / "pip/pip.conf").write_text("[global]\nindex-url = https://pip.example/simple\n")
    (settings / "uv/uv.toml").write_text(
        '[[index]]\nurl = "https://inner.example/simple"\n'
        '[[index]]\nurl = "https://main.example/simple"\ndefault = true\n'
    )
    assert indexes.choose((), ()) == (
        "--index-url https://main.example/simple",
        "--extra-index-url https://inner.example/simple",
    )


@pytest.mark.parametrize("text", ["[[index", "index = 3", "find-links = 7", 'pip = "x"'])
def test_a_damaged_file_of_uv_says_nothing(settings: Path, text: str) -> None:
    (settings / "uv/uv.toml").write_text(text)
    assert isinstance(indexes.choose((), ()), tuple)


def test_literal_credentials_become_names_whose_values_are_found_again(
    settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_INDEX", f"inner=https://tok{'en'}@inner.example/simple")
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"https://reader:{QUOTED}@main.example/simple")
    lines = indexes.choose((), ())
    assert PASSWORD not in str(lines)
    assert QUOTED not in str(lines)
    assert set(indexes.secrets(lines).values()) == {"reader", PASSWORD, "token"}
    assert indexes.expand(lines, indexes.secrets(lines)) == (
        f"--index-url https://reader:{QUOTED}@main.example/simple",
        "--extra-index-url https://token@inner.example/simple",
    )


@pytest.mark.parametrize(("compute", "travels"), [("kubernetes", True), ("local", False)])
def test_credentials_travel_to_whoever_makes_the_environment_elsewhere(
    settings: Path, monkeypatch: pytest.MonkeyPatch, compute: str, travels: bool
) -> None:
    (settings / "pip/pip.conf").write_text(f"[global]\nindex-url = https://reader:{QUOTED}@pip.example/simple\n")
    monkeypatch.setenv("CHANNEL_TOKEN", "a-token")
    channels = ("private https://conda.example/t/${CHANNEL_TOKEN}/private",)
    ref = EnvironmentRef("conda", indexes=indexes.choose((), ()), channels=channels)
    chosen = config.parse({"compute": compute}, project_dir=settings, environ={})
    secrets = submission.secrets_of(chosen, {}, ref)
    assert secrets.program == {}
    assert set(secrets.runner.values()) == ({"reader", PASSWORD, "a-token"} if travels else set())


@pytest.mark.parametrize("place", ["variable", "file"])
def test_credentials_that_uv_looks_for_by_an_indexs_name_are_named(
    settings: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "variable":
        monkeypatch.setenv("UV_DEFAULT_INDEX", "my-corp=https://main.example/simple")
    else:
        table = '[[index]]\nname = "my-corp"\nurl = "https://main.example/simple"\ndefault = true\n'
        (settings / "uv/uv.toml").write_text(table)
    monkeypatch.setenv("UV_INDEX_MY_CORP_USERNAME", "reader")
    monkeypatch.setenv("UV_INDEX_MY_CORP_PASSWORD", PASSWORD)
    lines = indexes.choose((), ())
    assert lines == (
        "--index-url https://${UV_INDEX_MY_CORP_USERNAME}:${UV_INDEX_MY_CORP_PASSWORD}@main.example/simple",
    )
    assert indexes.expand(lines, indexes.secrets(lines)) == (
        f"--index-url https://reader:{QUOTED}@main.example/simple",
    )


def test_values_that_arrive_as_secrets_are_enough(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings / "pip/pip.conf").write_text(f"[global]\nindex-url = https://reader:{QUOTED}@pip.example/simple\n")
    lines = indexes.choose((), ())
    values = indexes.secrets(lines)
    (settings / "pip/pip.conf").unlink()  # as where the job runs
    with pytest.raises(EnvironmentError_, match="MLFLOW_REMOTE_INDEX"):
        indexes.secrets(lines)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert indexes.secrets(lines) == values


@pytest.mark.parametrize(
    ("name", "options", "place"),
    [
        ("conda-forge", {}, "conda-forge"),
        ("conda-forge", {"alias": "https://mirror.example/api/"}, "https://mirror.example/api/conda-forge"),
        ("conda-forge", {"mapping": {"conda-forge": "https://$T@m.example/cf"}}, "https://${T}@m.example/cf"),
        ("conda-forge", {"mapping": {"conda-forge": "cf"}, "alias": "https://m.example"}, "https://m.example/cf"),
        ("https://c.example/x/", {"alias": "https://mirror.example"}, "https://c.example/x"),
        ("https://c.example/x", {"mapping": {"https://c.example/x": "https://m.example/x"}}, "https://m.example/x"),
        ("./local", {}, "file:///project/local"),
        ("/srv/channel", {}, "file:///srv/channel"),
    ],
)
def test_where_a_channel_is_found(name: str, options: dict[str, object], place: str) -> None:
    given = {"alias": "", "mapping": {}, **options}
    assert indexes.channel_url(name, folder=Path("/project"), **given) == place  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["https://a:b" + "@c.example/x", "https://c.example/t/tok" + "en/x"])
def test_a_channel_with_a_literal_credential_is_refused(name: str) -> None:
    with pytest.raises(EnvironmentError_, match="holds a credential") as refused:
        indexes.channel_url(name, folder=Path(), alias="", mapping={})
    assert "a:b" not in str(refused.value)
    assert "token" not in str(refused.value)


def test_certificates_follow_the_settings(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    (settings / "pip/pip.conf").write_text("[global]\ncert = /company/ca.pem\n")
    assert indexes.certificates() == "/company/ca.pem"
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/other/ca.pem")
    assert indexes.certificates() == "/other/ca.pem"
