"""The house: who may import whom, what folders hold, and that the documents tell the truth."""

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
from secateur.search.core.versions import library_versions
from support import ROOT

TOP = ("cli", "metrics_dsl", "results", "search", "service", "testing", "workers")
FILES = sorted(path for folder in TOP for path in (ROOT / folder).rglob("*.py"))
# What a folder may import, itself and what lies inside the folder named included; faces come last.
CORE = ("metrics_dsl", "search/core")
ALLOWED = {
    "metrics_dsl": ["metrics_dsl"],
    "search/core": ["metrics_dsl"],
    "search/spaces": [*CORE],
    "search/searchers": [*CORE, "search/spaces"],
    "search": ["metrics_dsl", "search"],
    "workers/model": [*CORE],
    "workers/calibrate": [*CORE, "workers/model"],
    "workers/measure": [*CORE, "workers/model", "workers/calibrate"],
    **{f"workers/{name}": [*CORE, "workers/model", "workers/calibrate", "workers/measure"]
       for name in ("cluster", "prune", "plan")},
    "results": [*CORE],
    "results/archive": [*CORE],
    **{f"results/{name}": [*CORE, "results/archive"]
       for name in ("export", "summary")},
    "results/terminal": [*CORE, "results/archive", "results/summary"],
    "results/report": [*CORE, "results/archive", "results/summary", "results/export"],
    "service": ["metrics_dsl", "search", "workers", "results"],
    "testing": ["metrics_dsl", "search", "workers", "results"],
    "cli": ["metrics_dsl", "search", "workers", "results", "service"],
}  # fmt: skip
# Libraries that take long to import, or of which one file should know: where they may be imported.
HOMES = {
    "cma": {"search/searchers/cma.py"},
    "deap": {"search/searchers/gp.py"},
    "pandas": {
        "results/archive/frame.py",
        "results/archive/front.py",
        "results/archive/pareto.py",
        "service/run.py",
        "service/runs.py",
        "service/reporting.py",
        "results/archive/snapshot.py",
        "results/archive/archive.py",
        "results/summary/table.py",
        "results/summary/compare.py",
        "results/summary/overview.py",
        "results/report/report.py",
        "results/report/charts.py",
        "results/report/plot.py",
        "results/report/tables.py",
        "results/terminal/watch.py",
        "results/terminal/watch_text.py",
        "cli/options.py",
    },
    "transformers": {
        f"workers/model/{name}.py" for name in ("config", "errors", "load", "loading_report", "model_files")
    },
    "moocore": {"results/archive/front.py", "results/summary/compare.py", "search/core/selection.py"},
    "matplotlib": {"results/report/plot.py", "service/run.py"},
    "pymoo": {"search/searchers/nsga3.py"},
    "optuna": {"search/searchers/tpe.py", "results/export/optuna_study.py"},
    "ray": {
        "service/jobs.py",
        "workers/cluster/actor.py",
        "workers/cluster/connection.py",
        "workers/cluster/dispatch.py",
        "workers/cluster/actor_team.py",
    },
    "scipy": {"results/summary/table.py"},
    "sympy": {"results/export/formula.py"},
}


def modules():
    """Dotted name below the package -> file, of all files; a folder's own is that of its ``__init__``."""
    found = {}
    for path in (*FILES, ROOT / "__init__.py", ROOT / "__main__.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def outside_imports(path):
    """Names of the libraries that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def inside_imports(name):
    """Dotted names of our own modules that a module imports, wherever the import stands."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            yield whole if whole in MODULES else ".".join(base)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_text_is_read_and_written_in_utf8_whatever_the_locale(path):
    """Calls that open a file as text say in which encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        is_method = isinstance(node.func, ast.Attribute)
        words = {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
        mode = words & {"r", "w", "a", "x", "r+", "w+", "a+", "rb", "wb", "ab", "xb", "rb+", "wb+"}
        opens_text = name in ("open", "fdopen") and not any("b" in word for word in mode)
        if opens_text or name == "TextIOWrapper" or (is_method and name in ("read_text", "write_text")):
            own = ast.unparse(node.func) in ("os.open", "secateur.open")
            encoded = {keyword.arg for keyword in node.keywords} | words
            assert own or {"encoding", "utf-8"} & encoded, f"line {node.lineno}"


def test_all_files_are_looked_at():
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ours = {line for line in tracked.stdout.split() if line.split("/")[0] in TOP}
    assert ours <= {str(path.relative_to(ROOT)) for path in FILES}
    assert len(FILES) >= 135
    assert sum(len(list(inside_imports(name))) for name in MODULES) >= 500


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] in TOP])
def test_imports_go_one_way(name):
    assert not any(module.split(".")[0] == "secateur" for module in outside_imports(MODULES[name])), (
        "imports inside the package are relative"
    )
    folder = str(MODULES[name].parent.relative_to(ROOT))
    for imported in inside_imports(name):
        if not imported:
            continue  # the version
        place = imported.replace(".", "/")
        allowed = (folder, *ALLOWED[folder]) if "/" in folder else ALLOWED[folder]
        assert any(place == own or place.startswith(f"{own}/") for own in (*allowed, folder)), (
            f"{name} imports {imported}"
        )


def test_no_file_imports_itself_by_way_of_others():
    imported = {name: set(inside_imports(name)) & set(MODULES) - {"", name} for name in MODULES if name}
    while leaves := [name for name, own in imported.items() if not own & imported.keys()]:
        for name in leaves:
            del imported[name]
    assert not imported, f"these import each other in a circle: {sorted(imported)}"


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_have_one_home(library):
    for path in MODULES.values():
        if any(module.split(".")[0] == library for module in outside_imports(path)):
            assert str(path.relative_to(ROOT)) in HOMES[library]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_holds_one_noun(path):
    assert len(path.read_text().splitlines()) <= 400


def test_a_folder_holds_twelve_files_and_the_project_file_lists_all_folders():
    folders = {path.parent for path in FILES}
    for folder in folders:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 12, folder
        assert (folder / "__init__.py").is_file(), folder
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    named = {".".join(("secateur", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert set(tools["packages"]) == named | {"secateur"}


def test_every_public_name_is_there():
    for name in secateur.__all__:
        assert getattr(secateur, name) is not None
        assert name not in TOP  # a folder that is imported would hide it
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
    tree = readme[readme.index("## Where things are") :]
    folder, shown = "", set()
    for indent, name in re.findall(r"^( *)([\w/]+(?:\.py|/)) ", tree, re.MULTILINE):
        if name.endswith("/"):
            folder = (folder.split("/")[0] + "/" if indent else "") + name.rstrip("/")
        else:
            shown.add(f"{folder}/{name}")
    assert shown == {str(path.relative_to(ROOT)) for path in FILES if path.name != "__init__.py"}


def test_commands_of_the_documents_exist():
    from secateur.cli.main import app

    names = {c.name or c.callback.__name__: c.callback for c in app.registered_commands}
    text = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    commands = re.findall(r"^\$ secateur (.+)$", text, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        name, *arguments = shlex.split(command, comments=True)
        parameters = names[name].__annotations__
        for argument in arguments:
            if argument.startswith("--") and argument != "--json":
                option = argument[2:].partition("=")[0].removeprefix("no-").replace("-", "_")
                assert {"id": "name", "plugin": "plugins"}.get(option, option) in parameters, command


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


def test_files_that_documents_and_the_project_file_name_exist():
    places = (ROOT / "pyproject.toml", ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    named = [
        (p.name, n) for p in places for n in re.findall(rf"\b(?:{'|'.join(TOP)})/[\w/.]+\.\w+", p.read_text())
    ]
    assert len(named) > 20
    assert not [pair for pair in named if not (ROOT / pair[1]).is_file()]


def test_modules_import_on_their_own():
    for name in MODULES:
        if name and name != "__main__":
            import_module(f"secateur.{name}")


def test_no_file_has_marks_of_a_merge():
    found = subprocess.run(
        ["git", "grep", "-lE", "^(<<<<<<<|>>>>>>>) "], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout == ""


def test_a_library_that_is_not_installed_has_no_version():
    found = library_versions("python", "no-such-library", "torch")
    assert list(found) == ["python", "torch"]
    assert found["python"].startswith("3.")
