"""The house: who may import whom, how long files are, and that the documents tell the truth."""

import ast
import re
import shlex
import subprocess
import tomllib
from importlib import import_module

import pytest
import secateur
from secateur.metrics_dsl.parser import parse_metric
from secateur.metrics_dsl.published import PUBLISHED
from support import ROOT

FOLDERS = ("metrics_dsl", "search", "workers", "results")
TOP = sorted(path for path in ROOT.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
ALLOWED = {
    "metrics_dsl": {"metrics_dsl"},
    "search": {"metrics_dsl", "search"},
    "workers": {"metrics_dsl", "search", "workers"},
    "results": {"metrics_dsl", "search", "results"},
}
# Of search, workers and results know the vocabulary only.
VOCABULARY = {"candidate", "objectives", "protocols", "budget"}
HOMES = {
    "deap": {"search/gp.py"},
    "pandas": {
        "results/frame.py",
        "results/front.py",
        "results/pareto.py",
        "results/runs.py",
        "results/snapshot.py",
        "results/table.py",
        "results/archive.py",
        "results/compare.py",
        "results/overview.py",
        "results/report.py",
        "results/report_charts.py",
        "results/report_tables.py",
        "results/watch.py",
        "results/watch_view.py",
        "cli_options.py",
    },
    "transformers": {"workers/model.py"},
    "moocore": {"results/front.py", "results/compare.py", "search/pareto.py"},
    "matplotlib": {"results/plot.py"},
    "pymoo": {"search/nsga3.py"},
    "optuna": {"search/tpe.py", "results/export_optuna.py"},
    "ray": {
        "jobs.py",
        "workers/actor.py",
        "workers/connection.py",
        "workers/dispatch.py",
        "workers/team.py",
    },
    "sympy": {"results/export_sympy.py"},
}


def imports(path):
    """(package, dots, module) of every import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_go_one_way(path):
    for level, module in imports(path):
        assert not module.startswith("secateur"), "imports inside the package are relative"
        if level == 2:
            folder, _, name = module.partition(".")
            assert folder in ALLOWED[path.parent.name], f"{path.name} imports {module}"
            if folder == "search" and path.parent.name != "search":
                assert name in VOCABULARY


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_have_one_home(library):
    for path in (*FILES, *TOP):
        if any(module.split(".")[0] == library and not level for level, module in imports(path)):
            assert str(path.relative_to(ROOT)) in HOMES[library]


@pytest.mark.parametrize("path", [*FILES, *TOP], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_file_holds_one_noun(path):
    assert len(path.read_text().splitlines()) <= 330


def test_every_public_name_is_there():
    for name in secateur.__all__:
        assert getattr(secateur, name) is not None
        assert name not in FOLDERS  # a folder that is imported would hide it
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = secateur.nothing


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_metric_has_text_group_and_source(name):
    metric = PUBLISHED[name]
    assert parse_metric(metric.text) == metric.expression
    assert str(metric.expression) == metric.text
    assert metric.group in ("row", "layer")
    assert re.search(r"arXiv \d{4}\.\d{5}|ICLR|ICME", metric.source)


def test_the_readme_shows_the_file_tree_that_exists():
    readme = (ROOT / "README.md").read_text()
    shown = set(re.findall(r"^ {2}(\w+\.py) ", readme, re.MULTILINE))
    real = {path.name for path in FILES if path.name != "__init__.py"}
    assert shown == real


def test_commands_of_the_documents_exist():
    from secateur import cli

    names = {c.name or c.callback.__name__: c.callback for c in cli.app.registered_commands}
    text = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    commands = re.findall(r"^\$ secateur (.+)$", text, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        name, *arguments = shlex.split(command, comments=True)
        parameters = names[name].__annotations__
        for argument in arguments:
            if argument.startswith("--") and argument != "--json":
                option = argument[2:].partition("=")[0].removeprefix("no-").replace("-", "_")
                assert {"id": "name"}.get(option, option) in parameters, command


def test_code_of_the_readme_runs_on_a_run(tiny_calibration, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.+?)```", readme, re.DOTALL)
    code = code.replace("runs/smollm2-calibration", str(tiny_calibration.folder))
    monkeypatch.chdir(tmp_path)
    exec(code.replace("budget=128", "budget=12"), {})  # noqa: S102 (the README is ours)


def test_extras_and_versions_agree_with_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == secateur.__version__
    pinned = {
        re.split(r"[=<>]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        assert re.split(r"[=<>\[]", requirement)[0] in pinned, requirement


def test_modules_import_on_their_own():
    for path in FILES:
        import_module(f"secateur.{path.parent.name}.{path.stem}".removesuffix(".__init__"))


def test_no_file_has_marks_of_a_merge():
    found = subprocess.run(
        ["git", "grep", "-lE", "^(<<<<<<<|>>>>>>>) "], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout == ""
