"""Exports of a run that somebody else made: whatever its texts are, they stay texts."""

import ast
import csv
import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import yaml
from exported import LAYERS, make_run, record
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from secateur.metrics_dsl.expression import Expression
from secateur.metrics_dsl.operators import LEAVES
from secateur.results.archive.archive import Archive
from secateur.results.archive.database import ArchiveError
from secateur.results.export.candidate_json import read_json
from secateur.results.export.candidate_record import ExportError, find
from secateur.results.export.evopress import WEIGHTS_DIFF, read_levels, to_levels, to_ratios, write_evopress
from secateur.results.export.exporters import EXPORTERS, export
from secateur.results.export.formula import write_latex
from secateur.results.export.llm_compressor import to_modifier, to_recipe
from secateur.results.export.masks_file import apply_masks, read_masks
from secateur.results.export.python_file import docstring, quoted, to_python
from secateur.search.core.candidate import parse_pattern
from support import in_process

# What ends a text, a line or a comment somewhere, or is no text that UTF-8 can write.
PIECES = (
    '"""', "'''", '"', "'", "\\", "\n", "\r", "\0", "\x1b[31m", "\x85", "\u2028", "\ud800", "\U0001f600",
    "{}", "{0}", "%s", "#", "- a: !!python/object/apply:os.system [id]", "open('pwned', 'w')", "\\N{DASH}",
    "*/", "}", "=1+1", "@SUM(A1)", " ", "é",
)  # fmt: skip
TEXTS = st.text(max_size=12) | st.lists(st.sampled_from(PIECES) | st.characters(), max_size=6).map("".join)
NAMES = st.lists(TEXTS, min_size=len(LAYERS), max_size=len(LAYERS), unique=True)


def hostile(names, texts, metric="abs(W) * X"):
    """A record as an archive may hold it, with such names of layers and such facts."""
    layers = [replace(layer, name=name, kind=name) for layer, name in zip(LAYERS, names, strict=True)]
    first, second, third = texts
    return record(
        metric, layers=layers, figures={first: 0.5}, provenance={"run": second, "calibration": third}
    )


def shape(source):
    """What a Python file does: its tree with every text and number left out."""

    class Blank(ast.NodeTransformer):
        def visit_Constant(self, node):
            return ast.Constant(type(node.value).__name__)

    return ast.dump(Blank().visit(ast.parse(source)))


@given(NAMES, st.tuples(TEXTS, TEXTS, TEXTS), st.sampled_from(["abs(W) * X", "zscore(W) / D + Y**0.5"]))
def test_exported_python_says_the_names_and_does_nothing_more(names, texts, metric):
    source = to_python(hostile(names, texts, metric))
    source.encode()  # it can be written
    assert shape(source) == shape(to_python(record(metric)))
    (ratios,) = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    assert list(ast.literal_eval(ratios)) == names


@given(TEXTS)
def test_a_text_is_read_as_it_is_between_three_quotes_and_between_one(text):
    assert ast.literal_eval(docstring(text)) == text
    assert ast.literal_eval(quoted(text)) == text
    assert quoted(text).isascii()
    assert yaml.safe_load(quoted(text)) == text


@given(NAMES)
def test_a_recipe_is_read_with_the_names_that_the_layers_have(names):
    found = yaml.safe_load(to_recipe(hostile(names, ("", "", "")), "WandaPruningModifier"))
    (modifier,) = found["prune_stage"]["prune_modifiers"].items()
    assert modifier[0] == "WandaPruningModifier"
    assert modifier[1]["targets"] == names
    assert list(found) == ["prune_stage"]


@given(NAMES, st.tuples(TEXTS, TEXTS, TEXTS))
def test_a_modifier_does_the_same_whatever_the_names_are(names, texts):
    assert shape(to_modifier(hostile(names, texts, "W * M"))) == shape(to_modifier(record("W * M")))


@given(names=NAMES | st.just([f"a.{i}-b" for i in range(len(LAYERS))]))
def test_levels_have_a_line_a_layer_or_are_refused(names, tmp_path_factory):
    made = hostile(names, ("", "", ""))
    folder = tmp_path_factory.mktemp("levels") / "out"
    if all(re.fullmatch(r"[\w.-]+", name) for name in names):
        write_evopress(made, folder)
        assert to_ratios(read_levels(folder), made.layers) == made.candidate.ratios
        return
    with pytest.raises(ExportError, match="cannot stand in one"):
        write_evopress(made, folder)
    assert not folder.exists()


@given(names=NAMES, texts=st.tuples(TEXTS, TEXTS, TEXTS))
def test_json_of_such_a_run_is_read_back_or_refused(names, texts, tmp_path_factory):
    made = hostile(names, texts)
    path = tmp_path_factory.mktemp("json") / "c.json"
    EXPORTERS["json"].write(made, path)
    try:
        assert read_json(path) == made
    except ExportError as refusal:
        assert "half of a character" in str(refusal)  # noqa: PT017


@given(meaning=TEXTS)
def test_what_a_leaf_of_somebody_elses_means_stays_in_its_comment(meaning, tmp_path_factory):
    LEAVES["Xx"] = replace(LEAVES["X"], name="Xx", meaning=meaning)
    try:
        metric = Expression("mul", (Expression("W"), Expression("Xx")))
        path = tmp_path_factory.mktemp("latex") / "a.tex"
        write_latex(record(metric), path)
        lines = re.split(r"[\r\n]", path.read_text(encoding="utf-8"))
        assert [line[:1] for line in lines if line] == ["%", "%", "S"]
        assert shape(to_python(record(metric))).replace("Xx", "X") == shape(to_python(record("W * X")))
    finally:
        del LEAVES["Xx"]


class TestAnArchive:
    @pytest.fixture
    def run(self, tmp_path):
        """A run whose facts are whatever somebody wrote, in a folder whose name is another's words."""
        folder = tmp_path / 'ré"""\n#'
        make_run(folder)
        nasty = "".join(PIECES).replace("\ud800", "")
        layers = [asdict(layer) | {"name": f"{nasty}{i}", "kind": nasty} for i, layer in enumerate(LAYERS)]
        with Archive(folder, write=True) as archive:
            names = {key: f"{name}{nasty}" for key, name in archive.fact("baselines").items()}
            archive.keep(layers=layers, calibration=nasty, versions={nasty: nasty}, baselines=names)
        return folder

    @pytest.mark.parametrize("name", ["json", "python", "llm-compressor", "csv", "optuna", "text", "latex"])
    def test_is_exported_with_its_texts_as_texts(self, name, run, tmp_path):
        out = tmp_path / f"out{EXPORTERS[name].suffix}"
        export(run, "" if EXPORTERS[name].subject == "run" else "best", to=name, out=out)
        with Archive(run) as archive:
            names = [layer["name"] for layer in archive.fact("layers")]
            metrics = set(archive.frame()["metric"])
        if name == "json":
            assert [layer.name for layer in read_json(out).layers] == names
        elif name == "python":
            done = subprocess.run([sys.executable, out], capture_output=True, cwd=tmp_path, check=False)
            assert done.returncode == 0, done.stderr
            assert not (tmp_path / "pwned").exists()
        elif name == "llm-compressor":
            recipe = yaml.safe_load((out / "recipe.yaml").read_text())
            assert next(iter(recipe["prune_stage"]["prune_modifiers"].values()))["targets"] == names
            assert list(json.loads((out / "sparsity.json").read_text())) == names
        elif name == "csv":
            with out.open(newline="") as file:
                rows = list(csv.DictReader(file))
            assert {row["Equation"] for row in rows} <= metrics
        elif name == "optuna":
            assert all(json.loads(line) for line in out.read_text().splitlines())

    def test_of_other_types_is_a_sentence(self, tmp_path):
        make_run(tmp_path)
        for wrong in (3, "layers", [3], [{}], [{**asdict(LAYERS[0]), "rows": 10**18}], {"a": 1}):
            with Archive(tmp_path, write=True) as archive:
                archive.keep(layers=wrong)
            with (
                pytest.raises(ArchiveError, match=r"the fact layers in .*|is missing"),
                Archive(tmp_path) as archive,
            ):
                find(archive, "best")


def test_digits_of_other_scripts_are_no_numbers(tmp_path):
    with pytest.raises(ValueError, match="expected the pattern"):
        parse_pattern("٢:٤")
    (tmp_path / "l.txt").write_text("a: ٣\n", encoding="utf-8")
    with pytest.raises(ExportError, match="expected lines"):
        read_levels(tmp_path / "l.txt", 0.5)


class TestLevels:
    @pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
    def test_of_no_weights_are_refused(self, wrong, tmp_path):
        (tmp_path / "levels.txt").write_text("a: 1\n")
        with pytest.raises(ExportError, match="more than 0 weights a level"):
            read_levels(tmp_path, 0.5, wrong)
        (tmp_path / "levels.json").write_text(json.dumps({"sparsity": 0.5, "weights_diff": wrong}))
        with pytest.raises(ExportError, match=r"at weights_diff in .*levels\.json$"):
            read_levels(tmp_path)

    def test_of_one_layer_twice_and_sparsities_that_are_none_are_refused(self, tmp_path):
        (tmp_path / "levels.txt").write_text("a: 1\n\na: 2\n")
        with pytest.raises(ExportError, match="another of a in line 2"):
            read_levels(tmp_path, 0.5)
        for sparsity in (1.0, -0.1, float("nan")):
            with pytest.raises(ExportError, match=r"expected a sparsity in \[0, 1\)"):
                read_levels(tmp_path, sparsity)
        (tmp_path / "levels.txt").write_text("a-b.c: 0\n")
        assert read_levels(tmp_path, 0.5).weights_diff == WEIGHTS_DIFF
        assert to_levels(record("W")).levels.keys() == {layer.name for layer in LAYERS}


class TestMasks:
    @pytest.mark.parametrize("columns", [0, -3, 10**12, 10**400, 3.5, True, "8", None, [8], 7 * 8 + 1])
    def test_of_columns_that_the_bits_do_not_have_are_refused(self, columns, tmp_path):
        about = {"format": "secateur.masks", "version": 1, "columns": {"a": columns}}
        save_file({"a": np.ones((2, 7), np.uint8)}, tmp_path / "m", {"secateur": json.dumps(about)})
        with pytest.raises(ExportError, match=r"metadata of|expected bits of"):
            read_masks(tmp_path / "m")

    @pytest.mark.parametrize("version", [True, 1.0, "1", 2, None])
    def test_of_another_version_are_refused(self, version, tmp_path):
        about = {"format": "secateur.masks", "version": version, "columns": {"a": 8}}
        save_file({"a": np.ones((2, 1), np.uint8)}, tmp_path / "m", {"secateur": json.dumps(about)})
        with pytest.raises(ExportError):
            read_masks(tmp_path / "m")

    @pytest.mark.parametrize(
        "bad",
        [
            [[True]], None, 3, "mask", np.ones((4, 8), bool), torch.ones(4, 8),
            torch.ones(32, dtype=torch.bool), torch.ones(8, 4, dtype=torch.bool),
            torch.ones(4, 8, 1, dtype=torch.bool),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("place", ["1", "2", "3", "9", ""])
    def test_that_do_not_fit_change_nothing(self, place, bad):
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 4), torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Embedding(4, 9)
        )
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ExportError):
            apply_masks(model, {"0": torch.ones(4, 8, dtype=torch.bool), place: bad})
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_may_be_applied_one_after_another(self):
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        half = torch.arange(8).expand(4, 8)
        apply_masks(model, {"0": half < 6})
        apply_masks(model, {"0": half > 1})
        assert torch.equal(model[0].weight != 0, (half < 6) & (half > 1))


def test_a_home_of_nobody_is_a_file_that_is_not_there(tiny_model, tmp_path):
    for option in ("--candidate", "--ratios"):
        done = in_process("prune", tiny_model, option, "~nosuchuser/c.json", "--out", tmp_path / "out")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "no such file" in done.stderr


def test_a_long_metric_is_no_name_of_a_file(tmp_path):
    from secateur.results.export.rule_source import read_rule, read_starts

    metric = " + ".join(f"abs(W) * {i}.5" for i in range(1, 40))
    assert len(metric) > 300
    assert read_rule(metric).metric == read_starts([metric])[0]


def test_the_commands_of_a_report_are_words_of_a_shell(tmp_path):
    from secateur.results.report.page_data import commands
    from secateur.results.summary.overview import Overview

    folder = tmp_path / "a $(touch pwned) 'b'"
    make_run(folder)
    with Archive(folder, write=True) as archive:
        archive.keep(card={"model": "m; touch pwned", "text": "`id`"})
    with Archive(folder) as archive:
        words = shlex.split(commands(Overview(archive), "best")["prune"])
    assert words == ["secateur", "prune", "m; touch pwned", "--candidate", f"{folder}:best", "-o", "pruned"]
