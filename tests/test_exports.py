"""Exports: one contract for the whole table, and each form read back or compared with what it stands for."""

import ast
import csv
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jsonschema
import optuna
import pytest
import secateur
import torch
from exported import LAYERS, all_metrics, make_run, random_metrics, record, scored, statistics
from secateur.metrics_dsl.operators import EXP_LIMIT, OPERATORS
from secateur.metrics_dsl.parser import parse
from secateur.metrics_dsl.published import PUBLISHED
from secateur.metrics_dsl.score import score
from secateur.results.archive.archive import Archive
from secateur.results.archive.database import ArchiveError
from secateur.results.export.candidate_json import SCHEMA, read_json, to_json
from secateur.results.export.candidate_record import ExportError, find
from secateur.results.export.evopress import Levels, read_levels, to_levels, to_ratios
from secateur.results.export.exporters import EXPORTERS, Exporter, export
from secateur.results.export.formula import to_latex, to_sympy
from secateur.results.export.masks_file import apply_masks, read_masks, write_masks
from secateur.results.export.python_file import to_python, write_python
from secateur.search.core.candidate import Layer, Measurement, Trial, uniform
from secateur.testing import EXPORTER_CHECKS
from secateur.testing.exporters import some_masks
from secateur.workers.measure.masks import removed
from support import in_process


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, and its trials."""
    folder = tmp_path_factory.mktemp("exports") / "run"
    return folder, make_run(folder)


def write(run, name, out):
    subject = EXPORTERS[name].subject
    key = "" if subject == "run" else "best"
    return export(run, key, to=name, out=out, masks=some_masks() if subject == "masks" else None)


@pytest.mark.parametrize("name", EXPORTERS)
class TestContract:
    @pytest.mark.parametrize("check", EXPORTER_CHECKS)
    def test_it_keeps_the_contract(self, check, name):
        assert EXPORTERS[name].name == name
        if (check, name) == ("repeatability", "optuna"):
            pytest.skip("a journal has the name of its writer in it")
        EXPORTER_CHECKS[check](EXPORTERS[name])

    def test_it_writes_what_its_suffix_says_and_nothing_else(self, name, run, tmp_path):
        out = write(run[0], name, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert out.is_dir() == (EXPORTERS[name].suffix == "")

    def test_what_exists_is_left_alone(self, name, run, tmp_path):
        out = tmp_path / "out"
        out.write_text("mine")
        with pytest.raises(ExportError, match="which exists"):
            write(run[0], name, out)
        assert out.read_text() == "mine"
        assert len(list(tmp_path.iterdir())) == 1

    def test_the_help_names_it(self, name):
        assert name in "".join(in_process("export", "--help").stdout.split())  # lines break at hyphens

    def test_the_command_line_writes_it(self, name, run, tmp_path):
        key = [] if EXPORTERS[name].subject == "run" else ["best"]
        done = in_process("export", run[0], *key, "--to", name, "-o", tmp_path / "out")
        if name == "masks":  # the made-up run has no model
            assert done.returncode == 2
            assert "run.toml" in done.stderr
            assert not list(tmp_path.iterdir())
        else:
            assert done.returncode == 0
            assert re.fullmatch(r"next: secateur .+\n", done.stderr)
            assert EXPORTERS[name].meaning in done.stdout


class TestMistakes:
    def refused(self, *arguments):
        done = in_process("export", *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("secateur: ")
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    def test_unknown_names_are_answered_with_near_ones(self, run, tmp_path):
        folder, trials = run
        key, out = trials[0].candidate.key, tmp_path / "out"
        wrong = key[:-3] + "xyz"
        assert key in self.refused(folder, wrong, "--to", "text", "-o", out)
        assert "did you mean 'python'" in self.refused(folder, key, "--to", "pyton", "-o", out)
        assert "expected its key, or best" in self.refused(folder, "--to", "text", "-o", out)
        assert "takes no key" in self.refused(folder, key, "--to", "csv", "-o", out)
        assert "make its folder first" in self.refused(folder, key, "--to", "text", "-o", out / "deep")
        assert not list(tmp_path.iterdir())

    def test_a_key_may_be_cut_short_as_long_as_it_is_one(self, run, tmp_path):
        folder, trials = run
        keys = [t.candidate.key for t in trials]
        with Archive(folder) as archive:
            for key in keys:
                short = next(key[:n] for n in range(1, 17) if sum(k.startswith(key[:n]) for k in keys) == 1)
                assert find(archive, short).candidate.key == key
            shared = next((k[0] for k in keys if sum(o[0] == k[0] for o in keys) > 1), None)
            if shared:
                with pytest.raises(ArchiveError, match="give more of it"):
                    find(archive, shared)
            assert find(archive, "best").candidate == trials[0].candidate

    def test_a_published_rule_is_known_by_its_name(self, tmp_path):
        trials = make_run(tmp_path / "run")
        with Archive(tmp_path / "run", write=True) as archive:
            archive.keep(baselines={trials[1].candidate.key: "wanda + owl", "0" * 16: "wanda + dlp"})
            assert find(archive, "wanda + owl").candidate == trials[1].candidate
            with pytest.raises(ArchiveError, match=r"the nearest are wanda \+ owl$"):
                find(archive, "wanda + owls")
            with pytest.raises(ArchiveError, match=r"has the name 'wanda \+ dlp'"):  # not measured yet
                find(archive, "wanda + dlp")

    def test_over_sparsities_none_is_best(self, tmp_path):
        trials = make_run(tmp_path / "run")
        with Archive(tmp_path / "run", write=True) as archive:
            archive.keep(objectives=["kl", "density"])
            with pytest.raises(ArchiveError, match="expected a key, got best: over the sparsities"):
                find(archive, "best")
            assert find(archive, trials[0].candidate.key[:6]).candidate == trials[0].candidate

    def test_a_run_without_layers_says_how_to_add_them(self, tmp_path):
        make_run(tmp_path / "run")
        with Archive(tmp_path / "run", write=True) as archive:
            archive._db.execute("DELETE FROM facts WHERE name = 'layers'")
        assert "secateur resume" in self.refused(
            tmp_path / "run", "best", "--to", "json", "-o", tmp_path / "o"
        )

    def test_a_run_where_nothing_is_measured_has_no_best(self, tmp_path):
        Archive(tmp_path / "run", write=True).close()
        assert "no best one" in self.refused(tmp_path / "run", "best", "--to", "text", "-o", tmp_path / "o")
        assert "nothing to write" in self.refused(tmp_path / "run", "--to", "csv", "-o", tmp_path / "o")

    def test_a_failure_midway_leaves_nothing(self, run, tmp_path, monkeypatch):
        def fail(_record, path):
            path.mkdir()
            (path / "half").write_text("x")
            raise OSError("no space")

        monkeypatch.setitem(EXPORTERS, "text", Exporter("text", "", "candidate", "", fail))
        with pytest.raises(OSError, match="no space"):
            export(run[0], "best", to="text", out=tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_what_a_form_cannot_say_is_one_sentence(self, run, tmp_path):
        folder, trials = run
        key = trials[4].candidate.key  # square(W) * X**1.2 * G
        for name, reason in (("pruner-zero", "exponent 1.2"), ("llm-compressor", "cannot compute G")):
            assert reason in self.refused(folder, key, "--to", name, "-o", tmp_path / "out")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "form", [name for name, form in EXPORTERS.items() if form.subject == "candidate"]
    )
    def test_a_folder_takes_no_files_name_and_a_file_no_folders(self, form, run, tmp_path):
        there = tmp_path / "there"
        there.mkdir()
        is_folder = not EXPORTERS[form].suffix
        wrong = (
            [f"{tmp_path}/levels.txt", tmp_path / "a.b.yaml"] if is_folder else [there, f"{tmp_path}/new/"]
        )
        for out in wrong:
            reason = (
                "ends like a file; leave" if is_folder else f"name a file in it, such as {out}".rstrip("/")
            )
            with pytest.raises(
                ExportError, match=f"expected a (folder|file)'s name for {form}, got .*{reason}"
            ):
                export(run[0], "best", to=form, out=out)
        assert list(tmp_path.iterdir()) == [there]

    def test_a_folder_may_have_a_version_or_say_that_it_is_one(self, run, tmp_path):
        for name in ("levels-0.6", "llama-3.2-1B", "best.v2", "odd.txt/"):
            assert export(run[0], "best", to="evopress", out=f"{tmp_path}/{name}").is_dir()

    def test_masks_of_other_layers_are_refused(self, run, tmp_path):
        for masks, reason in ((some_masks()[1:], "12 layers, got 11"), ([("x", torch.ones(2, 2))], "for x")):
            with pytest.raises(ExportError, match=reason):
                export(run[0], "best", to="masks", out=tmp_path / "out", masks=masks)
        with pytest.raises(ExportError, match="expected masks="):
            export(run[0], "best", to="masks", out=tmp_path / "out")
        assert not list(tmp_path.iterdir())


# Python ----------------------------------------------------------------------------------------

RUNNER = """
import sys
sys.path.append(sys.argv[1])
sys.modules["secateur"] = None  # a plain install would lie beside torch
try:
    import secateur
    raise SystemExit("secateur can be imported")
except ImportError:
    pass
import torch
from pathlib import Path
folder = Path(sys.argv[2])
leaves = torch.load(folder / "leaves.pt", weights_only=True)
found = {}
for path in sorted(folder.glob("*.py")):
    module = {}
    exec(compile(path.read_text(), path, "exec"), module)
    names = module["scores"].__code__.co_varnames[: module["scores"].__code__.co_argcount]
    scores = module["scores"](*(leaves[name] for name in names))
    found[path.stem] = [module["mask"](scores, ratio) for ratio in (0.0, 0.37, 0.5, 0.96)]
torch.save(found, folder / "masks.pt")
"""


def every_operator():
    """Metrics in which each operator stands where no order form can drop it."""
    return [parse(f"G + X * {name}({'W, 3' if name == 'pow' else 'W'})") if OPERATORS[name].arity == 1
            else parse(f"G + X * (W {OPERATORS[name].symbol} M)") for name in OPERATORS]  # fmt: skip


@pytest.mark.parametrize(
    ("group", "pattern"), [("row", "unstructured"), ("layer", "unstructured"), ("row", "2:4")]
)
def test_python_files_make_our_masks_bit_for_bit_without_us(group, pattern, tmp_path):
    leaves, wanted = statistics(), {}
    torch.save(leaves, tmp_path / "leaves.pt")
    for number, metric in enumerate([*every_operator(), *all_metrics(group)]):
        scores = scored(metric, group, leaves)
        if scores is not None:
            text = to_python(record(metric, group=group, pattern=pattern))
            (tmp_path / f"m{number}.py").write_text(text)
            wanted[f"m{number}"] = [removed(scores, r, group, pattern) for r in (0.0, 0.37, 0.5, 0.96)]
    assert len(wanted) > 200
    site = Path(torch.__file__).parent.parent
    command = [sys.executable, "-I", "-S", "-c", RUNNER, site, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "masks.pt", weights_only=True)
    assert found.keys() == wanted.keys()
    for name, masks in wanted.items():
        for got, expected in zip(found[name], masks, strict=True):
            assert torch.equal(got, expected), (tmp_path / f"{name}.py").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_python_files_take_the_leaves_that_the_metric_names_and_explain_them(name):
    metric = PUBLISHED[name].expression
    tree = ast.parse(to_python(record(metric)))
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert [alias.name for node in imports for alias in node.names] == ["torch"]
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {argument.arg for argument in functions["scores"].args.args} == metric.leaves
    text = ast.get_docstring(functions["scores"])
    assert all(f"\n    {leaf}  (" in text for leaf in metric.leaves)
    assert all(ast.get_docstring(function) for function in functions.values())
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"eval", "exec", "getattr", "__import__"}


# Formulas --------------------------------------------------------------------------------------


def value_of(node, leaves):
    """The value of a sympy expression, from its own definitions and our reductions."""
    kind, args = type(node).__name__, [value_of(arg, leaves) for arg in node.args]
    if node.is_Symbol:
        return leaves[str(node)]
    if node.is_number and not node.args:
        return torch.tensor([[float(node)]], dtype=torch.float64)
    if kind in ("Add", "Mul"):
        total = args[0]
        for other in args[1:]:
            total = total + other if kind == "Add" else total * other
        return total
    plain = {"Pow": lambda a, b: a**b, "Abs": torch.abs, "log": torch.log, "exp": torch.exp,
             "tanh": torch.tanh, "Min": torch.minimum}  # fmt: skip
    if kind in plain:
        return plain[kind](*args)
    operator = OPERATORS[kind]
    return operator.compute(args[0], *(operator.statistics(args[0]) if operator.statistics else ()))


@pytest.mark.parametrize("metric", [*(p.text for p in PUBLISHED.values()), *map(str, random_metrics(60))])
def test_sympy_reads_its_text_back_to_the_same_values(metric, tmp_path):
    import sympy

    EXPORTERS["sympy"].write(record(metric), tmp_path / "out")
    read = sympy.sympify((tmp_path / "out").read_text())
    assert str(read) == str(sympy.sympify(str(read)))
    leaves = {name: leaf + 0.25 * (leaf == 0) for name, leaf in statistics(dtype=torch.float64).items()}
    ours = score(parse(metric), leaves)
    for form in (read, to_sympy(parse(metric))):
        theirs = value_of(form, leaves).expand(ours.shape)
        finite = ours.isfinite() & theirs.isfinite()
        torch.testing.assert_close(theirs[finite], ours[finite], rtol=1e-7, atol=1e-12)


def test_latex_is_the_notation_of_the_field():
    assert to_latex(parse("abs(W) * X")) == r"\left| W_{ij} \right| \cdot \Vert X_{j} \Vert"
    ria = r"\frac{\left| W_{ij} \right|}{\sum_{i'} \left| W_{i'j} \right|}"
    assert to_latex(parse("abs(W) / col_sum(abs(W))")) == ria
    nested = to_latex(parse("W * all_sum(W / row_norm(W))"))
    assert r"\sum_{i', j'} \left( \frac{W_{i'j'}}{\sqrt{\sum_{j''} W_{i'j''}^2}} \right)" in nested
    assert to_latex(parse("W * exp(M)")).endswith(
        rf"\exp\left( \min\left( \mu_{{j}}, {EXP_LIMIT:g} \right) \right)"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_latex_is_read_by_matplotlib():
    from matplotlib.mathtext import MathTextParser

    parser = MathTextParser("path")
    for metric in [*every_operator(), *all_metrics("row")[:60]]:
        parser.parse(f"$S_{{ij}} = {to_latex(metric)}$")


# JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_json_follows_its_schema_and_reads_back_equal(pattern, tmp_path):
    ratios = tuple(0.1 + i / 17 for i in range(len(LAYERS)))
    for metric in all_metrics("layer")[:40]:
        made = record(metric, ratios, "layer", pattern, figures={"kl": 0.1}, provenance={"run": "a"})
        path = tmp_path / f"{made.candidate.key}.json"
        EXPORTERS["json"].write(made, path)
        jsonschema.validate(json.loads(path.read_text()), json.loads(SCHEMA.read_text()))
        assert read_json(path) == made
        assert read_json(path).candidate.key == made.candidate.key


def test_the_schema_refuses_what_is_not_a_candidate():
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    validator.check_schema(validator.schema)
    good = to_json(record("abs(W) * X"))
    assert validator.is_valid(good)
    layer = good["layers"][0]
    for wrong in ({"version": 2}, {"group": "cell"}, {"pattern": "some"}, {"layers": []}, {"more": 1},
                  {"layers": [{**layer, "ratio": 1.0}]}, {"figures": {"kl": "low"}}):  # fmt: skip
        assert not validator.is_valid({**good, **wrong})


def test_json_that_cannot_be_read_is_one_sentence(tmp_path):
    good = to_json(record("abs(W) * X"))
    no_metric = {k: v for k, v in good.items() if k != "metric"}
    path = tmp_path / "c.json"
    for content, reason in (("{", "cannot be read as JSON"), ("[]", "format secateur.candidate"),
                            (json.dumps({**good, "version": 2}), "version 1 of"),
                            (json.dumps(no_metric), "'metric' is missing"),
                            (json.dumps({**good, "metric": "abs(W"}), "never closed")):  # fmt: skip
        path.write_text(content)
        with pytest.raises(ExportError, match=reason):
            read_json(path)


def test_removed_weights_are_counted_as_masks_count_them():
    draw = torch.Generator().manual_seed(0)
    layers = (Layer("a", 0, "a", 6, 20), Layer("b", 0, "b", 5, 12))
    for group, pattern in (("row", "unstructured"), ("layer", "unstructured"), ("row", "1:4")):
        made = record("abs(W) * X", (0.33, 0.71), group, pattern, layers)
        masks = [removed(torch.randn(layer.rows, layer.columns, generator=draw), ratio, group, pattern)
                 for layer, ratio in zip(layers, made.candidate.ratios, strict=True)]  # fmt: skip
        assert made.removed == tuple(int(mask.sum()) for mask in masks)
        assert made.sparsity == sum(made.removed) / 180


# EvoPress --------------------------------------------------------------------------------------


def as_evopress_reads(path):
    """The loop of its loader: every line is a layer."""
    found = {}
    for line in path.read_text().splitlines():
        name, level = line.split(":")
        found[name.strip(" ")] = int(level)
    return found


def test_levels_of_evopress_come_back(tmp_path):
    sizes = {"q": 4096, "k": 1024, "up": 11008}
    layers = [Layer(f"model.layers.{b}.{k}", b, k, rows, 4096) for b in range(3) for k, rows in sizes.items()]
    levels = dict(zip((layer.name for layer in layers), (1, -1, 2, 0, 1, -4, 3, -2, 0), strict=True))
    text = "\n".join(f"{name}: {level}" for name, level in levels.items())
    (tmp_path / "theirs.txt").write_text(text + "\n")
    ratios = to_ratios(read_levels(tmp_path / "theirs.txt", 0.5), layers)
    assert ratios[0] == 0.5 + 1e6 / 4096**2
    made = record("square(W) / D", ratios, layers=layers)
    EXPORTERS["evopress"].write(made, tmp_path / "out")
    assert as_evopress_reads(tmp_path / "out" / "levels.txt") == levels
    read = read_levels(tmp_path / "out")
    assert (read.sparsity, read.weights_diff, read.metric) == (0.5, 1e6, "square(W) / D")
    assert to_ratios(read, layers) == pytest.approx(ratios, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_ratios_that_are_no_levels_are_rounded_and_keep_the_sparsity(seed):
    draw = torch.Generator().manual_seed(seed)
    layers = [Layer(f"l{i}", i, "l", 512 * (1 + i % 3), 1024) for i in range(12)]
    ratios = tuple((0.3 + 0.5 * torch.rand(12, generator=draw)).tolist())
    found = to_levels(record("abs(W)", ratios, layers=layers))
    back = to_ratios(found, layers)
    assert sum(found.levels.values()) == 0
    assert max(map(abs, found.levels.values())) <= 130
    assert max(abs(a - b) for a, b in zip(back, ratios, strict=True)) == pytest.approx(found.error)
    assert found.error < 0.01
    weighted = sum(r * layer.size for r, layer in zip(back, layers, strict=True))
    assert weighted / sum(layer.size for layer in layers) == pytest.approx(found.sparsity, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_levels_never_leave_the_range_of_ratios(seed):
    draw = torch.Generator().manual_seed(seed)
    layers = [Layer(f"l{i}", i, "l", 512 * (1 + i % 3), 1024) for i in range(12)]
    ratios = tuple((torch.rand(12, generator=draw) ** 4 * 0.95).tolist())  # many near 0
    found = to_levels(record("abs(W)", ratios, layers=layers))
    assert sum(found.levels.values()) == 0
    assert all(0 <= ratio < 1 for ratio in to_ratios(found, layers))


def test_even_ratios_are_level_0():
    assert set(to_levels(record("abs(W)", 0.6)).levels.values()) == {0}
    with pytest.raises(ExportError, match="leaves no ratio"):
        to_levels(record("abs(W)", 0.5, pattern="2:4"))


def test_levels_that_make_no_sense_are_refused(tmp_path):
    path = tmp_path / "levels.txt"
    for content, reason in (("a 1", "in line 1"), ("a: x", "in line 1"), ("", "does not hold levels")):
        path.write_text(content)
        with pytest.raises(ExportError, match=reason):
            read_levels(path, 0.5)
    path.write_text("a: 1\n")
    with pytest.raises(ExportError, match="--sparsity"):
        read_levels(path)
    with pytest.raises(ExportError, match="is in one of them alone"):
        to_ratios(read_levels(path, 0.5), LAYERS)
    with pytest.raises(ExportError, match="outside"):
        to_ratios(Levels({"a": 3}, 0.5, 1e6), [Layer("a", 0, "a", 100, 100)])


# Runs ------------------------------------------------------------------------------------------


def test_optuna_reads_every_trial(run, tmp_path):
    folder, trials = run
    export(folder, to="optuna", out=tmp_path / "run.log")
    journal = optuna.storages.journal.JournalFileBackend(str(tmp_path / "run.log"))
    study = optuna.load_study(study_name="run", storage=optuna.storages.JournalStorage(journal))
    assert study.metric_names == ["kl", "size"]
    assert [t.user_attrs["key"] for t in study.trials] == [t.candidate.key for t in trials]
    states = [t.state.name for t in study.trials]
    assert states == ["COMPLETE"] * 5 + ["PRUNED", "FAIL"]
    assert study.trials[0].values == [0.5, 4.0]
    attributes = study.trials[0].user_attrs
    assert attributes["metric"] == "abs(W) * X"
    assert attributes["published_as"] == "wanda"
    assert attributes["ratios"].startswith("25.0% to 75.0%")
    assert study.trials[2].user_attrs["alias_of"] == trials[1].candidate.key
    assert study.trials[6].user_attrs["failure"] == "not finite"
    assert {t.number for t in study.best_trials} == {0, 1}


def test_csv_has_the_best_metric_of_each_size(run, tmp_path):
    with Archive(run[0]) as archive:
        secateur.export(archive, to="csv", out=tmp_path / "hall_of_fame.csv")
        assert archive.fact("objectives")  # still open
    with (tmp_path / "hall_of_fame.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["Complexity", "Loss", "Equation"]
    assert [(row["Complexity"], row["Loss"]) for row in rows] == [("2", "2.0"), ("4", "0.5"), ("8", "0.75")]
    assert all(str(parse(row["Equation"])) == row["Equation"] for row in rows)


# Masks -----------------------------------------------------------------------------------------


def test_masks_are_packed_as_documented_and_read_back(tmp_path):
    from safetensors.numpy import load_file

    layers = (Layer("a", 0, "a", 2, 11),)
    kept = torch.zeros(2, 11, dtype=torch.bool)
    kept[0, [0, 3, 8]] = True
    kept[1, 10] = True
    write_masks(record("abs(W)", layers=layers), [("a", kept)], tmp_path / "m.safetensors")
    packed = load_file(tmp_path / "m.safetensors")["a"]
    assert packed.tolist() == [[0b1001, 0b1], [0, 0b100]]
    assert torch.equal(read_masks(tmp_path / "m.safetensors")["a"], kept)
    (tmp_path / "x").write_text("no masks")
    with pytest.raises(ExportError, match="cannot be read as masks"):
        read_masks(tmp_path / "x")


def test_masks_prune_a_model_that_stores_weights_either_way(tmp_path):
    from transformers.pytorch_utils import Conv1D

    model = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 4), "b": Conv1D(5, 3)})
    masks = {"a": torch.rand(4, 6) > 0.5, "b": torch.rand(5, 3) > 0.5}
    with pytest.raises(ExportError, match="with the layer c"):
        apply_masks(model, {**masks, "c": masks["a"]})
    with pytest.raises(ExportError, match="expected a weight of"):
        apply_masks(model, {"a": masks["a"], "b": masks["a"]})
    assert not hasattr(model["a"], "weight_mask")
    apply_masks(model, masks)
    assert torch.equal(model["a"].weight != 0, masks["a"])
    assert torch.equal(model["b"].weight.T != 0, masks["b"])


def test_the_command_writes_the_evaluators_masks(tiny_calibration, tiny_model, tiny_evaluator, tmp_path):
    """A real run from search to masks in the model: what is removed is what was measured."""
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    searched = in_process(
        "search", tiny_calibration.folder, "--searcher", "random", "--sparsity", "0.6", "--budget", "14",
        "--batch", "14", "--stage", "screen", "--objectives", "layer_error,size", "--out", run,
    )  # fmt: skip
    assert searched.returncode == 0, searched.stderr
    path = tmp_path / "masks.safetensors"
    done = in_process("export", run, "best", "--to", "masks", "-o", path, "--json")
    assert (done.returncode, json.loads(done.stdout)["to"]) == (0, "masks")
    with Archive(run) as archive:
        best = find(archive, "best")
    assert best.layers == tuple(tiny_calibration.layers)
    masks = read_masks(path)
    for name, kept in tiny_evaluator.masks(best.candidate):
        assert torch.equal(masks[name], kept)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    apply_masks(model, masks)
    modules = dict(model.named_modules())
    zeros = tuple(int((modules[layer.name].weight == 0).sum()) for layer in best.layers)
    assert zeros == best.removed
    assert best.figures["sparsity"] == pytest.approx(best.sparsity)


def test_other_searches_become_candidates_for_a_models_layers(run, tmp_path):
    tree = tmp_path / "best_tree.json"
    tree.write_text('{"data": "mul", "left": {"data": "sqr", "left": {"data": "W"}}, "right": {"data": "X"}}')
    printed = in_process("import", tree)
    assert printed.stdout == "square(abs(W)) * square(X)\n"
    assert json.loads(in_process("import", tree, "--json").stdout) == {"metric": printed.stdout.strip()}
    assert "give --layers" in in_process("import", tree, "-o", tmp_path / "c.json").stderr
    assert (
        "give --sparsity" in in_process("import", tree, "-o", tmp_path / "c.json", "--layers", run[0]).stderr
    )
    done = in_process("import", tree, "-o", tmp_path / "c.json", "--layers", run[0], "--sparsity", 0.5)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "c.json").candidate.ratios == (0.5,) * len(LAYERS)
    export(run[0], "best", to="evopress", out=tmp_path / "levels")
    done = in_process("import", tmp_path / "levels", "-o", tmp_path / "d.json", "--layers", run[0])
    assert done.returncode == 0, done.stderr
    read = read_json(tmp_path / "d.json")
    assert str(read.candidate.metric) == "abs(W) * X"
    assert read.candidate.ratios == pytest.approx(run[1][0].candidate.ratios, abs=0.02)
    assert read.sparsity == pytest.approx(to_levels(find(Archive(run[0]), "best")).sparsity, abs=0.002)


@pytest.mark.parametrize("name", ['a"""+print("out")+"""', "x\\Users", "line\nbreak"])
def test_a_runs_name_cannot_end_the_docstring_of_a_python_file(name, tmp_path, capsys):
    made = record("abs(W) * X", provenance={"run": name, "calibration": "c" * 64})
    write_python(made, tmp_path / "rule.py")
    runpy.run_path(str(tmp_path / "rule.py"))
    assert capsys.readouterr().out == ""


def test_a_run_that_is_being_written_becomes_a_study(tmp_path, monkeypatch):
    """Rows that are committed between two reads are in the study wholly or not at all."""
    folder = tmp_path / "run"
    make_run(folder)
    late = uniform(parse("W * X * V"), LAYERS, 0.5)
    found = Measurement("model", (), {"kl": 9.0, "sparsity": 0.5})
    frame = Archive.frame

    def frame_and_commit(self, *arguments):
        rows = frame(self, *arguments)
        with Archive(folder, write=True) as writer:
            writer.add([Trial(late, found, "measured")])
        return rows

    monkeypatch.setattr(Archive, "frame", frame_and_commit)
    export(folder, to="optuna", out=tmp_path / "study.log")
    assert (tmp_path / "study.log").is_file()
