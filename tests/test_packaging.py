"""What the package promises as a package: light imports, one door for each library, clean by its tools."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import mlflow_remote_backend
from mlflow_remote_backend import config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlflow_remote_backend"
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"mlflow", "kubernetes", "docker", "rattler", "conda_lock", "pandas", "numpy", "sqlalchemy"}

#: What import-linter cannot say, because it sees no further than the first name of a foreign package.
DOORS = {
    "mlflow.projects": {"project.py", "backend.py", "submitted_run.py", "runner/prepare.py"},
    "MlflowClient": {"tracking.py", "runner/"},
}


# ---------------------------------------------------------------------------------------------- imports


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after ``code``."""
    report = "; import sys, json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not modules_after("import mlflow_remote_backend") & HEAVY


def test_the_commands_help_loads_nothing_heavy() -> None:
    code = (
        "import contextlib, io, sys\n"
        "from mlflow_remote_backend.cli import main\n"
        "sys.argv = ['mlflow-remote', '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()\n"
        "pass"
    )
    assert not modules_after(code) & HEAVY


@pytest.mark.parametrize("name", mlflow_remote_backend.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(mlflow_remote_backend, name) is not None


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each absolute import of a module as (module, name): ``import a.b`` is (a.b, "")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def imports_of(file: Path) -> list[tuple[str, str]]:
    return list(imported(ast.parse(file.read_text())))


def within(file: Path, places: set[str]) -> bool:
    relative = file.relative_to(PACKAGE).as_posix()
    return any(relative == place or (place.endswith("/") and relative.startswith(place)) for place in places)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_each_library_is_entered_by_its_door(file: Path) -> None:
    for module, name in imports_of(file):
        path = f"{module}.{name}"
        if path.startswith("mlflow.projects.") or module == "mlflow.projects":
            assert within(file, DOORS["mlflow.projects"]), f"{path} outside its door"
        if "MlflowClient" in path:
            assert within(file, DOORS["MlflowClient"]), f"{path} outside its door"
        private = any(part.startswith("_") and part != "__version__" for part in path.split("."))
        assert not (module.partition(".")[0] == "mlflow" and private), f"{path} is private to MLflow"


@pytest.mark.parametrize("name", ["runner/execute.py", "deployment/server/keeper.py", "deployment/server/ask.py"])
def test_what_runs_in_the_users_image_needs_the_standard_library_only(name: str) -> None:
    tree = ast.parse((PACKAGE / name).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert {module.partition(".")[0] for module, _ in imported(tree)} <= set(sys.stdlib_module_names)


# ---------------------------------------------------------------------------------------------- tools


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["importlinter.cli", "lint_imports_command"], id="import-linter"),
        pytest.param(["ruff", "check", "."], id="ruff"),
        pytest.param(["mypy"], id="mypy"),
    ],
)
def test_clean_by(command: list[str]) -> None:
    program = [sys.executable, "-m", *command]
    if command[0] == "importlinter.cli":  # it has no __main__
        program = [sys.executable, "-c", f"from {command[0]} import {command[1]} as main; main()"]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr


# ---------------------------------------------------------------------------------------------- what is shipped


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves its ``build`` folder in the sources and reads it the next time."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--use-pep517", "--no-deps", "--wheel-dir", str(source)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return next(source.glob("*.whl"))


@pytest.mark.registry
def test_the_wheel_holds_everything_the_package_reads(wheel: Path) -> None:
    shipped = set(zipfile.ZipFile(wheel).namelist())
    needed = {file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in (".pyc", ".pyo")}
    assert {file.relative_to(ROOT).as_posix() for file in needed} <= shipped
    assert [name for name in shipped if name.endswith("LICENSE")]
    assert not [name for name in shipped if name.startswith(("tests/", "benchmarks/", "sample_project/"))]


@pytest.mark.registry
def test_the_wheel_declares_its_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    declared = re.findall(r"^([\w-]+) = ([\w.]+):(\w+)$", text, flags=re.MULTILINE)
    assert ("remote", "mlflow_remote_backend.backend", "RemoteBackend") in declared
    for _, module, attribute in declared:
        assert callable(getattr(importlib.import_module(module), attribute))


def test_the_changelog_knows_this_version() -> None:
    assert f"## {mlflow_remote_backend.__version__}" in (ROOT / "CHANGELOG.md").read_text()


PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file) if file else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that the page's headings make, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def examples(language: str) -> list[object]:
    """The fenced blocks in ``language`` of all pages."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in PAGES
        for number, block in enumerate(fence.findall(page.read_text()))
    ]


@pytest.mark.parametrize("text", examples("yaml"))
def test_a_named_compute_in_the_docs_is_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "mlflow-remote.yaml").write_text(text)
    for name, described in yaml.safe_load(text).get("computes", {}).items():
        parsed = config.parse({"COMPUTE": name}, project_dir=tmp_path, environ={"HOME": str(tmp_path)})
        assert (parsed.compute_name, parsed.compute) == (name, described["compute"])


@pytest.mark.parametrize("text", examples("json"))
def test_a_backend_config_in_the_docs_is_one(text: str, tmp_path: Path) -> None:
    environ = dict.fromkeys(json.loads(text).get("pass_env", []), "x") | {"HOME": str(tmp_path)}
    assert config.parse(text, project_dir=tmp_path, environ=environ).compute


def test_the_readme_gives_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    run = "pip install . && mlflow run sample_project --backend remote --env-manager local -P alpha=0.3"
    assert run in readme
    assert "pip install '.[test]' && pytest" in readme


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {file.parent for file in SOURCES}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_module_is_named_for_nothing() -> None:
    assert not {"utils", "util", "helpers", "common", "manager", "misc"} & {file.stem for file in SOURCES}
