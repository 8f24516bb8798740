"""Plugins: rows from outside, from a file or a package, through everything that reads a table."""

import math
import re
import sys
import textwrap

import numpy as np
import pytest
import secateur
import torch
from matplotlib.figure import Figure
from plugged import CBRT, LEAVES_OF_A_LAYER, plugin, search_into, settings_of
from secateur import testing
from secateur.metrics_dsl import plugins
from secateur.metrics_dsl.canonical import canonical
from secateur.metrics_dsl.errors import MetricError, SecateurError
from secateur.metrics_dsl.operators import OPERATORS
from secateur.metrics_dsl.order import order_form
from secateur.metrics_dsl.parser import parse, parse_metric
from secateur.metrics_dsl.plugins import MOST_BYTES, Plugin, PluginError, read_plugin, use, used
from secateur.metrics_dsl.published import read_metric
from secateur.metrics_dsl.score import score
from secateur.results.archive.archive import Archive
from secateur.results.archive.snapshot import snapshot
from secateur.results.export.candidate_json import read_json
from secateur.results.export.exporters import export
from secateur.results.report.plot import PLOTS, write_plot
from secateur.results.report.report import write_report
from secateur.results.summary.compare import compare
from secateur.results.summary.overview import Overview
from secateur.results.summary.table import report
from secateur.search.core.candidate import Measurement, Trial, uniform
from secateur.search.core.objectives import OBJECTIVES, look_up_objectives, point
from secateur.search.searchers.table import build_searcher
from secateur.search.spaces.allocation import ALLOCATIONS
from secateur.testing import FakeEvaluator, problem
from secateur.workers.calibrate.folder import Calibration
from secateur.workers.measure.local_evaluator import LocalEvaluator
from secateur.workers.prune.pruning import Pruner
from secateur.workers.prune.repair import REPAIRS

pytestmark = pytest.mark.usefixtures("own_tables")


def refused(text, says, name="mine.py"):
    """A plugin is refused in one sentence and leaves nothing behind."""
    before = [dict(table.rows) for table in plugins._tables]
    with pytest.raises(PluginError) as caught:
        use(plugin(text, name))
    message = str(caught.value)
    assert re.search(says, message), message
    assert name in message
    assert "\n" not in message
    assert [dict(table.rows) for table in plugins._tables] == before
    assert used() == ()


class TestFiles:
    def test_a_file_is_read_and_not_run(self, tmp_path):
        path = tmp_path / "mine.py"
        path.write_bytes(b"\xef\xbb\xbfraise SystemExit('caf\xc3\xa9')\r\n")
        found = read_plugin(path)
        assert (found.name, found.text) == ("mine.py", "\ufeffraise SystemExit('café')\r\n")
        assert re.fullmatch("[0-9a-f]{64}", found.sha256)
        assert read_plugin(path) == found

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("mine.txt", b"", "expected a plugin as a Python file such as rules.py"),
            ("mine.py", None, "expected a plugin as a Python file"),
            ("mine.py", b"\xff", "expected a plugin in UTF-8, got another byte at 0"),
            ("mine.py", b"#" * (MOST_BYTES + 1), "expected a plugin of at most 256 KiB"),
        ],
    )
    def test_what_is_no_plugin_is_refused(self, tmp_path, name, content, says):
        path = tmp_path / name
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
        with pytest.raises(PluginError, match=says):
            read_plugin(path)

    def test_a_plugin_runs_once_a_process(self, capsys):
        text = "print('running')\n" + textwrap.dedent(CBRT % "")
        for _ in range(2):
            use(Plugin("mine.py", text))
        use(Plugin("copy.py", text))
        assert capsys.readouterr().out == "running\n"
        assert [p.name for p in used()] == ["mine.py"]

    def test_a_changed_file_needs_a_new_process(self):
        use(plugin(CBRT % ""))
        with pytest.raises(PluginError, match=r"which the plugin mine.py has; a changed file needs a new"):
            use(plugin(CBRT % ", order='increasing'"))

    def test_its_classes_are_like_those_of_any_module(self):
        use(plugin("from __future__ import annotations\nfrom dataclasses import dataclass\n"
                   "@dataclass\nclass A:\n    x: int = 1\nA()\n" + textwrap.dedent(CBRT % "")))  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("x = 1", "expected a list SECATEUR of rows in the plugin mine.py, got none"),
            ("SECATEUR = 5", "expected a list SECATEUR of rows .* got int 5"),
            ("SECATEUR = []", "expected a list SECATEUR of rows .* got list"),
            ("SECATEUR = [1]", "expected rows of Operator, Leaf, .* got int 1"),
            ("x = 1\ny = 1 / 0", "the plugin mine.py fails in line 2 of mine.py: ZeroDivisionError"),
            ("x = (", "the plugin mine.py fails in line 1: SyntaxError"),
            ("raise SystemExit(3)", "fails in line 1 of mine.py: SystemExit: 3"),
            ("import nothing_of_the_kind", "fails in line 1 of mine.py: ModuleNotFoundError"),
            ("def f():\n    raise ValueError('two\\nlines')\nf()", "of mine.py: ValueError: two lines"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_with_it_is_one_sentence_with_its_place(self, text, says):
        refused(text, says)

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ('Operator("sqrt", 1, "elementwise", "", abs)',
             "a name that is free for an operator, got 'sqrt', which the package secateur itself has"),
            ('Operator("Cube", 1, "elementwise", "", abs)', "in small letters, such as cube, got 'Cube'"),
            ('Operator("lambda", 1, "elementwise", "", abs)', "an operator's name"),
            ('Operator("a b", 1, "elementwise", "", abs)', "a name such as mine for an operator, got 'a b'"),
            ('Operator(7, 1, "elementwise", "", abs)', "expected a name such as mine for an operator, got 7"),
            ('Operator("cube", 1, "odd", "", abs)', "the kind of cube among elementwise, reduction"),
            ('Operator("cube", 1, "elementwise", "", abs, "up")', "its order among increasing"),
            ('Operator("cube", 4, "elementwise", "", abs)', "with 1 to 3 operands"),
            ('Operator("cube", 2, "elementwise", "", abs, "increasing")', "expected 1 operand for cube"),
            ('Operator("cube", 1, "elementwise", "", abs, symbol="#")', "called by name"),
            ('Operator("cube", 1, "normalisation", "", abs)', "expected statistics for a normalisation"),
            ('Operator("cube", 1, "reduction", "", abs, "increasing")', "no order for cube"),
            ('Operator("cube", 1, "elementwise", "", abs, shape=lambda x: 1 / 0)', "3 of mine.py: Zero"),
            ('Operator("cube", 1, "elementwise", "", abs, shape=lambda x: 3)', "cube to have a Shape"),
            ('Leaf("k", COLUMN, True, "", "", ("H",), abs)', "with a capital first, such as S, got 'k'"),
            ('Leaf("True", COLUMN, True, "", "", ("H",), abs)', "a leaf's name"),
            ('Leaf("H", COLUMN, True, "", "", ("H",), abs)', "a leaf's name"),
            ('Leaf("X", COLUMN, True, "", "", ("H",), abs)', "'X', which the package secateur itself has"),
            ('Leaf("K", COLUMN, True, "", "")', "a function compute for the leaf K"),
            ('Leaf("K", COLUMN, True, "", "", ("Z",), abs)', "K to need some of H, W, G, X, .*, got 'Z'"),
            ('Published("W", "abs(W)", "row", "")', "the name of a metric such as mine-2026, got 'W'"),
            ('Published("mine", "abs(Q)", "row", "")', "mine cannot be read: column 5: unknown leaf 'Q'"),
            ('Published("mine", "abs(W)", "block", "")', "the group row or layer"),
            ('Objective("kl", "model", abs, "")', "'kl', which the package secateur itself has"),
            ('Objective("status", "model", abs, "")', "no other column of a run's table, got 'status'"),
            ('Objective("my_rung", "model", abs, "")', "no other column"),
            ('Objective("mine", "never", abs, "")', "a stage of mine among screen"),
            ('Exporter("mine", "txt", "candidate", "", abs)', "a suffix such as .txt"),
            ('SearcherRow("auto", abs, "")', "another name than auto"),
            ('SearcherRow("gp", abs, "")', "'gp', which the package secateur itself has"),
        ],
    )  # fmt: skip
    def test_a_row_that_cannot_be_added_is_refused_with_all_of_its_file(self, row, says):
        names = "COLUMN, Exporter, Leaf, Objective, Operator, Published, SearcherRow"
        good = 'Operator("fine", 1, "elementwise", "x", abs)'
        refused(f"from secateur import {names}\nSECATEUR = [{good},\n{row}]", says)
        assert "fine" not in OPERATORS


class TestPackages:
    @pytest.fixture
    def install(self, tmp_path, monkeypatch):
        """Install a package whose one module has rows for three tables, and imports all that it wants."""
        text = """
            from secateur import Operator, Published, SearchSettings, SearcherRow, parse
            cbrt = Operator("cbrt", 1, "elementwise", "cube root", lambda x: x)
            metrics = [Published("other", "abs(W) * cbrt(X)", "row", "a package")]
            searcher = SearcherRow("other", None, "nothing")
        """
        (tmp_path / "others_rows.py").write_text(textwrap.dedent(text))
        about = tmp_path / "others-1.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.2\n")

        def install(**groups):
            points = "".join(f"[secateur.{group}]\nmine = {value}\n" for group, value in groups.items())
            (about / "entry_points.txt").write_text(points)
            monkeypatch.syspath_prepend(str(tmp_path))
            plugins._filled.clear()  # as in a new process
            plugins._entry_points.cache_clear()

        yield install
        sys.modules.pop("others_rows", None)
        plugins._entry_points.cache_clear()

    def test_add_rows_of_several_tables_from_one_module(self, install):
        install(operators="others_rows:cbrt", metrics="others_rows:metrics", searchers="others_rows:searcher")
        assert "others_rows" not in sys.modules
        assert str(read_metric("other")) == "abs(W) * cbrt(X)"
        assert secateur.PUBLISHED["other"].source == "a package"
        assert secateur.SEARCHERS["other"].meaning == "nothing"
        assert plugins.notes() == [{"name": "others", "version": "1.2"}]
        assert plugins.origin_of(OPERATORS, "cbrt") == "the package others"
        assert plugins.missing([{"name": "others", "version": "1.1"}]) == ["the package others 1.1"]

    @pytest.mark.parametrize(
        ("value", "says"),
        [
            ("nothing_of_the_kind:rows", "fails.*: ModuleNotFoundError"),
            ("others_rows:nothing", "fails.*: AttributeError"),
            ("others_rows:metrics", "to give an operator as Operator, got Published"),
        ],
    )
    def test_a_broken_one_is_one_sentence_with_package_and_group(self, install, value, says):
        install(operators=value)
        for _ in range(2):  # again to whoever asks again
            with pytest.raises(PluginError, match=says) as caught:
                parse("cbrt(W)")
            assert str(caught.value).startswith("the package others cannot be used: ")
            assert "secateur.operators" in str(caught.value)
            assert "mend or uninstall it" in str(caught.value)
        assert str(parse("abs(W)")) == "abs(W)"  # what needs it not works

    def test_of_this_machine_cost_little_to_look_for(self):
        import time

        plugins._filled.clear()
        start = time.perf_counter()
        plugins.fill(*(table.rows for table in plugins._tables))
        assert time.perf_counter() - start < 0.5


# Operators --------------------------------------------------------------------------------------


def ranks(metric):
    return score(metric, LEAVES_OF_A_LAYER).expand(24, 32).argsort(dim=1, stable=True)


class TestOperators:
    def test_are_read_and_written_with_any_number_of_operands(self):
        use(
            plugin("""
            from secateur import Operator
            SECATEUR = [
                Operator("least", 2, "elementwise", "", lambda x, y: x.minimum(y)),
                Operator("among", 3, "elementwise", "", lambda x, y, z: x.clamp(y, z)),
            ]
        """)
        )
        for text in ("least(W, X)", "among(W * X, -1, least(X, Y))", "abs(least(W, X + 1)) * X"):
            assert str(parse(text)) == text
            assert parse(str(parse(text))) == parse(text)
            assert canonical(canonical(parse(text))) == canonical(parse(text))
        with pytest.raises(MetricError, match="least takes 2 operand"):
            parse("least(W)")
        with pytest.raises(MetricError, match="did you mean 'least'"):
            parse("leest(W, X)")

    def test_of_which_nothing_is_known_stay_as_they_are(self):
        use(
            plugin("""
            from secateur import COLUMN, FULL, Operator, Shape
            SECATEUR = [
                Operator("odd", 1, "elementwise", "", lambda x: x + 1),
                Operator("row_least", 1, "reduction", "", lambda x: x.amin(1, keepdim=True),
                         shape=lambda x: Shape(x.rows, False)),
                Operator("soft", 1, "normalisation", "", lambda x, t: x / t, shape=lambda x: x,
                         statistics=lambda x: (x.abs().sum((0, 1), keepdim=True),)),
            ]
        """)
        )
        for text in (
            "odd(-2 * W)",
            "soft(2 * W + 1)",
            "odd(2) * W",
            "row_least(-3 * W) + W",
            "soft(minmax(W))",
        ):
            simple = canonical(parse(text))
            assert simple.operators - {"neg", "mul"} == parse(text).operators - {"neg", "mul"}, text
            before, after = (score(e, LEAVES_OF_A_LAYER).expand(24, 32) for e in (parse(text), simple))
            assert torch.allclose(before, after, rtol=1e-5)
            assert torch.equal(ranks(parse(text)), ranks(order_form(parse(text), "row"))), text

    @pytest.mark.parametrize(
        ("order", "compute", "metric", "form"),
        [
            ("increasing", "x.sign() * x.abs().sqrt()", "cbrt(W * X) * 3", "W * X"),
            ("decreasing", "-x.exp()", "cbrt(W)", "-W"),
            ("magnitude", "x.abs().exp()", "cbrt(W * X)", "abs(W) * X"),
            ("magnitude", "x.abs().exp()", "cbrt(W) * Y + col_norm(W)", None),
        ],
    )
    def test_state_what_they_do_to_order(self, order, compute, metric, form):
        use(
            plugin(f"""
            from secateur import Operator
            SECATEUR = [Operator("cbrt", 1, "elementwise", "", lambda x: {compute}, "{order}")]
        """)
        )
        if form is not None:
            assert str(order_form(parse(metric), "row")) == form
        testing.check_operator("cbrt")
        found = order_form(parse(metric), "row")
        assert order_form(found, "row") == found

    def test_state_their_sign_and_numbers(self):
        use(
            plugin("""
            from secateur import Operator
            SECATEUR = [Operator("cosh", 1, "elementwise", "", lambda x: x.cosh(), "magnitude",
                                 nonnegative=lambda signs, _: True, number=__import__("math").cosh)]
        """)
        )
        assert str(canonical(parse("abs(cosh(W))"))) == "cosh(W)"
        assert str(canonical(parse("cosh(0) * W"))) == "W"
        assert str(canonical(parse("sqrt(cosh(W)) ** 2"))) == "cosh(W)"
        assert parse("cosh(1000)") == canonical(parse("cosh(1000)"))  # too large for a number

    def test_a_wrong_row_does_not_keep_the_contract(self):
        wrong = {
            "order": Operator_("x.cos()", order="increasing"),
            "at least 0": Operator_("x - 1", nonnegative=lambda signs, _: True),
            "depends on other rows": Operator_("x - x.mean(0, keepdim=True)"),
            "as a number": Operator_("x + 1", number=lambda x: x),
            "the python of": Operator_("x + 1", python="{0} + 2"),
            "to have the shape": Operator_("x.sum()"),
        }
        for says, row in wrong.items():
            with pytest.raises(AssertionError, match=says):
                testing.check_operator(row)

    def test_a_failure_while_scoring_is_the_candidates(self, tiny_evaluator):
        use(
            plugin("""
            from secateur import Operator
            SECATEUR = [
                Operator("broken", 1, "elementwise", "", lambda x: x.nothing()),
                Operator("narrow", 1, "elementwise", "", lambda x: x[:1]),
            ]
        """)
        )
        metrics = [parse_metric(text) for text in ("broken(W) * X", "narrow(W) * X", "abs(W) * X")]
        candidates = [uniform(metric, tiny_evaluator.layers, 0.5) for metric in metrics]
        for stage in ("screen", "layer", "model"):
            first, second, third = tiny_evaluator.measure(candidates, stage)
            assert "operator broken of the plugin mine.py fails in line 4 of mine.py: Attr" in first.failure
            assert "operator narrow of the plugin mine.py fails: expected a tensor of" in second.failure
            assert not third.failure

    @pytest.mark.parametrize("name", ["gp", "random"])
    def test_are_searched(self, name):
        use(plugin(CBRT % ", 'increasing'"))
        searcher = build_searcher(name, problem(), 0)
        asked = [c for _ in range(4) for c in searcher.ask(40)]
        assert sum("cbrt" in c.metric.operators for c in asked) > 4


def Operator_(code, **known):
    from secateur import Operator

    return Operator("mine", 1, "elementwise", "", eval(f"lambda x: {code}"), **known)  # noqa: S307 (ours)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_keeps_the_contract(name):
    testing.check_operator(name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_keeps_the_contract(name):
    testing.check_objective(name)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_every_allocation_keeps_the_contract(name):
    testing.check_allocation(name)


@pytest.mark.parametrize("name", REPAIRS)
def test_every_repair_keeps_the_contract(name):
    testing.check_repair(name)


# Leaves -----------------------------------------------------------------------------------------


LEAF = """
    from secateur import COLUMN, FULL, ROW, Leaf
    SECATEUR = [Leaf("S", {shape}, True, "of a test", "-", needs={needs}, compute=lambda given: {code})]
"""


def use_leaf(code, shape="COLUMN", needs="V"):
    use(plugin(LEAF.format(code=code, shape=shape, needs=tuple(needs))))


class TestLeaves:
    def test_a_metric_with_one_is_measured_as_if_it_were_written_out(self, tiny_calibration):
        use_leaf('given["V"].sqrt()')
        evaluator = LocalEvaluator(tiny_calibration)
        assert evaluator.leaves == frozenset("WGXMVYDS")
        one, two = (
            uniform(parse_metric(text), evaluator.layers, 0.5) for text in ("abs(W) * S", "abs(W) * sqrt(V)")
        )
        for stage in ("screen", "layer", "model"):
            first, second = evaluator.measure([one, two], stage)
            assert (first.failure, first.values, first.layer_errors) == (
                "",
                second.values,
                second.layer_errors,
            )
        assert first.values
        means = [evaluator.summarise(c.metric, ["mean"])["mean"] for c in (one, two)]
        assert np.array_equal(*means)
        masks = [dict(evaluator.masks(c)) for c in (one, two)]
        assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
        evaluator.close()

    @pytest.mark.parametrize(
        ("code", "shape", "needs", "written"),
        [
            ('given["H"].diagonal().sqrt().reshape(1, -1)', "COLUMN", "H", "abs(W) * X"),
            ('given["W"].abs().mean(1, keepdim=True)', "ROW", "W", "W * row_mean(abs(W))"),
            ('given["G"] * given["Y"]', "FULL", "GY", "abs(W) * (G * Y)"),
        ],
    )
    def test_may_need_weights_gradients_and_the_gram_matrix(
        self, tiny_calibration, code, shape, needs, written
    ):
        use_leaf(code, shape, needs)
        evaluator = LocalEvaluator(tiny_calibration)
        text = written.replace("X", "S").replace("row_mean(abs(W))", "S").replace("(G * Y)", "S")
        for stage in ("screen", "layer"):
            first, second = (
                evaluator.measure([uniform(parse_metric(t), evaluator.layers, 0.5)], stage)[0]
                for t in (text, written)
            )
            assert first.layer_errors == pytest.approx(second.layer_errors, rel=1e-3), stage
            assert not first.failure
        evaluator.close()

    def test_a_model_is_pruned_by_one(self, tiny_calibration):
        from secateur.workers.model.decoder import Decoder
        from secateur.workers.model.load import load_model

        use_leaf('given["D"].rsqrt() * given["G"].mean(0, keepdim=True)', needs="DG")
        ids = tiny_calibration.tokens("statistics")
        done = []
        for text in ("abs(W) * S", "abs(W) * (D ** -0.5 * col_mean(G))"):
            pruner = Pruner(Decoder(load_model(tiny_calibration.model_source)[0]), ids)
            metric = parse_metric(text)
            mean = pruner.summarise(metric, ["mean"])["mean"]
            done.append((mean, pruner.prune(uniform(metric, tiny_calibration.layers, 0.5))))
        assert done[0][0] == pytest.approx(done[1][0], rel=1e-5)
        for one, two in zip(done[0][1], done[1][1], strict=True):
            assert (one.zeros, one.error) == (two.zeros, pytest.approx(two.error, rel=1e-3))

    @pytest.mark.parametrize(
        ("code", "needs", "says"),
        [
            ("given['V'][0]", "V", r"a tensor of \(1, 32\), as its shape \(1, columns\) says, got \(32,\)"),
            ("3.0", "V", "expected a tensor of .* got float"),
            ("given['V'] / 0", "V", "expected finite numbers"),
            ("-given['V'] - 1", "V", "expected numbers of 0 or more, as its row says, got -"),
            ("given['X']", "V", r"a leaf is computed from X, which is not among its needs \(V\)"),
            ("given['V'].nothing()", "V", "leaf S of the plugin mine.py fails in line 3 of mine.py: Attr"),
        ],
    )  # fmt: skip
    def test_that_are_not_what_their_row_says_are_a_failure_in_a_sentence(
        self, tiny_calibration, code, needs, says
    ):
        use_leaf(code, needs=needs)
        evaluator = LocalEvaluator(tiny_calibration)
        candidates = [uniform(parse_metric(t), evaluator.layers, 0.5) for t in ("abs(W) * S", "abs(W)")]
        for stage in ("screen", "layer", "model"):
            first, second = evaluator.measure(candidates, stage)
            assert re.search(says, first.failure), first.failure
            assert not second.failure
        with pytest.raises(AssertionError, match=says.replace("32", "[0-9]+")):
            testing.check_leaf("S")
        evaluator.close()

    def test_without_what_it_needs_there_is_none(self, tiny_calibration):
        use_leaf('given["G"]', "FULL", "G")
        calibration = Calibration(tiny_calibration.folder)
        assert "S" in calibration.leaves
        calibration.manifest["gradients"] = None
        assert "S" not in calibration.leaves

    def test_are_searched_by_trees_and_leave_the_meta_family_alone(self):
        before = testing.problem(space="meta").metrics
        use_leaf("1", "FULL")
        searcher = build_searcher("gp", problem(leaves="WXS"), 0)
        assert sum("S" in c.metric.leaves for c in searcher.ask(40)) > 4
        after = type(before)()
        assert after._metrics == before._metrics
        assert after.values(parse("abs(W) * S")) is None


# Objectives -------------------------------------------------------------------------------------


WORST = """
    from secateur import Objective
    def worst(trial):
        return max(trial.measurement.layer_errors, default=None)
    SECATEUR = [Objective("worst_layer", "screen", worst, "largest error of a layer", unit="relative")]
"""


class TestObjectives:
    def test_are_a_column_of_the_runs_that_minimise_them(self, tmp_path):
        use(plugin(WORST))
        settings = settings_of(objectives="kl,worst_layer,size")
        archive = search_into(tmp_path / "run", FakeEvaluator(), settings)
        rows = archive.frame()
        expected = {
            t.candidate.key: max(t.measurement.layer_errors, default=math.nan) for t in archive.trials()
        }
        assert dict(zip(rows["key"], rows["worst_layer"], strict=True)) == pytest.approx(
            expected, nan_ok=True
        )
        assert rows["worst_layer"].notna().sum() > 20
        assert rows.attrs["units"]["worst_layer"] == "relative"
        front = archive.front()
        assert len(front) > 1
        assert front.attrs["objectives"] == ["kl", "worst_layer", "size"]
        assert front.equals(archive.front("kl,worst_layer,size", where="kl > 0"))
        for other in ("worst_layer", "worst_layer,size"):
            assert (
                archive.front(other)["worst_layer"].iloc[0]
                == rows.loc[rows["kl"].notna(), "worst_layer"].min()
            )
        assert archive.hypervolume() > 0
        assert archive.history()["hypervolume"].iloc[-1] == pytest.approx(archive.hypervolume())
        assert archive.best("worst_layer")["worst_layer"] == rows.loc[rows["kl"].notna(), "worst_layer"].min()

    def test_are_known_while_a_run_is_written(self, tmp_path):
        use(plugin(WORST))
        trials = search_into(
            tmp_path / "run", FakeEvaluator(), settings_of(objectives="kl,worst_layer")
        ).trials()
        with Archive(tmp_path / "growing", write=True) as archive:
            archive.keep(objectives=["worst_layer"])
            for start in range(0, len(trials), 7):
                archive.add(trials[start : start + 7])
                known = [t for t in trials[: start + 7] if t.status in ("measured", "alias")]
                least = min((max(t.measurement.layer_errors) for t in known), default=None)
                front = archive.front()
                assert (front["worst_layer"].iloc[0] if len(front) else None) == least

    def test_have_their_place_in_reports_plots_tables_and_exports(self, tmp_path):
        import csv

        use(plugin(WORST))
        archive = search_into(tmp_path / "run", FakeEvaluator(), settings_of(objectives="worst_layer,kl"))
        assert "worst layer, relative" in write_report(archive, tmp_path / "report.html").read_text()
        for kind in ("front", "history"):
            axes = Figure().subplots()
            PLOTS[kind](Overview(archive), axes)
            assert "worst layer" in f"{axes.get_xlabel()} {axes.get_ylabel()}"
            assert write_plot(archive, kind, tmp_path / f"{kind}.svg").stat().st_size > 5000
        assert "worst layer" in report(archive).splitlines()[1]
        assert len(compare([archive])) == 1
        least = archive.front("worst_layer").iloc[0]
        export(archive, "best", to="json", out=tmp_path / "best.json")
        assert read_json(tmp_path / "best.json").figures["worst_layer"] == least["worst_layer"]
        with export(archive, to="csv", out=tmp_path / "run.csv").open() as file:
            assert min(float(row["Loss"]) for row in csv.DictReader(file)) == least["worst_layer"]
        export(archive, to="optuna", out=tmp_path / "run.log")
        import pandas as pd

        assert "worst_layer" in pd.read_parquet(snapshot(archive, tmp_path / "run.parquet"))

    def test_without_their_plugin_a_run_says_which_it_needs(self, tmp_path):
        mine = plugin(WORST)
        use(mine)
        search_into(tmp_path / "run", FakeEvaluator(), settings_of(objectives="kl,worst_layer"))
        del OBJECTIVES["worst_layer"]
        plugins._used.clear()
        plugins._origins.clear()
        archive = Archive(tmp_path / "run")
        for read in (archive.frame, archive.front, archive.history, lambda: archive.front("worst_layer")):
            with pytest.raises(SecateurError) as caught:
                read()
            assert f"was made with the plugin mine.py (sha256 {mine.sha256[:12]}), which is not" in str(
                caught.value
            )
        use(mine)
        assert len(archive.front())

    def test_take_no_name_of_another_column(self):
        from secateur.results.archive.frame import COLUMNS
        from secateur.results.archive.front import HISTORY_COLUMNS

        for name in {*COLUMNS, *HISTORY_COLUMNS, "run"}:
            refused(
                f"from secateur import Objective\nSECATEUR = [Objective('{name}', 'model', abs, '')]", name
            )

    def test_that_have_no_number_are_no_points(self):
        use(
            plugin("""
            from secateur import Objective
            SECATEUR = [Objective("infinite", "screen", lambda trial: float("inf"), ""),
                        Objective("late", "model", lambda trial: trial.measurement.values["kl"], ""),
                        Objective("broken", "screen", lambda trial: trial.nothing, ""),
                        Objective("text", "screen", lambda trial: "much", "")]
        """)
        )
        candidate = uniform(parse("abs(W)"), testing.LAYERS, 0.5)
        trials = {stage: Trial(candidate, FakeEvaluator().measure([candidate], stage)[0], "measured")
                  for stage in ("screen", "model")}  # fmt: skip
        assert point(trials["model"], look_up_objectives(["infinite"])) is None
        assert point(trials["screen"], look_up_objectives(["late"])) is None
        assert point(trials["model"], look_up_objectives(["late"]))
        for name in ("broken", "text"):
            with pytest.raises(PluginError, match=f"the objective {name} of the plugin mine.py fails"):
                point(trials["screen"], look_up_objectives([name]))
        failed = Trial(candidate, Measurement("screen", failure="no"), "failed")
        assert point(failed, look_up_objectives(["broken"])) is None

    def test_one_that_nothing_measured_has_ends_the_run_at_once(self, tmp_path):
        use(plugin(WORST))

        class WithoutLayers(FakeEvaluator):
            def _one(self, c, stage):
                found = super()._one(c, stage)
                return Measurement(
                    stage, (), found.values, fingerprint=found.fingerprint, failure=found.failure
                )

        with pytest.raises(
            SecateurError, match=r"expected the objective worst_layer to have a value .* no errors of"
        ):
            search_into(tmp_path / "run", WithoutLayers(), settings_of(objectives="kl,worst_layer"))
