"""Extending: the document, the example and the choices of a search, through everything below the service."""

import gc
import re
import warnings

import pytest
import secateur
import torch
from plugged import CBRT, LEAVES_OF_A_LAYER, plugin, search_into, settings_of
from secateur import testing
from secateur.metrics_dsl import plugins
from secateur.metrics_dsl.errors import MetricError, SecateurError
from secateur.metrics_dsl.expression import Expression
from secateur.metrics_dsl.operators import COLUMN, LEAVES, OPERATORS
from secateur.metrics_dsl.order import order_form
from secateur.metrics_dsl.parser import parse
from secateur.metrics_dsl.plugins import Plugin, PluginError, read_plugin, use, used
from secateur.metrics_dsl.published import PUBLISHED, read_metric
from secateur.metrics_dsl.score import score
from secateur.results.archive.archive import Archive
from secateur.results.export.candidate_json import read_json
from secateur.results.export.candidate_record import ExportError
from secateur.results.export.exporters import EXPORTERS, export
from secateur.results.export.formula import to_latex, to_sympy
from secateur.results.export.python_file import to_python
from secateur.results.export.rule_source import read_starts
from secateur.results.report.report import write_report
from secateur.search.baselines import build_problem, check_leaves
from secateur.search.core.candidate import Trial, uniform
from secateur.search.searchers.table import SEARCHERS, build_searcher
from secateur.search.settings import SearchSettings
from secateur.search.spaces.allocation import ALLOCATIONS
from secateur.testing import FakeEvaluator, problem
from secateur.testing.fake import DENSE
from secateur.workers.cluster.ray_evaluator import RayEvaluator
from secateur.workers.cluster.settings import Cluster
from secateur.workers.measure.local_evaluator import LocalEvaluator
from secateur.workers.measure.worker import WorkerOptions
from secateur.workers.prune.pruning import Pruner
from support import ROOT

EXAMPLE = ROOT / "examples" / "plugin.py"
pytestmark = pytest.mark.usefixtures("own_tables")


# Choosing ---------------------------------------------------------------------------------------


class TestChoosing:
    @pytest.mark.parametrize("name", ["gp", "random"])
    @pytest.mark.parametrize(
        ("operators", "leaves"),
        [
            ("mul,abs,sqrt", "W,X"),
            (None, "G,X"),
            ("row_norm,div,abs", None),
            ("tanh", "W"),
            ("minmax,add", "W,M,Y"),
            ("pow,mul,abs", "W,X,D"),
        ],
    )
    def test_only_what_is_chosen_is_proposed(self, name, operators, leaves):
        settings = settings_of(searcher=name, operators=operators, leaves=leaves)
        wanted, baselines = build_problem(settings, FakeEvaluator())
        assert len(baselines) == len(PUBLISHED)  # they are measured all the same
        searcher = build_searcher(name, wanted, 0)
        fake = FakeEvaluator()
        metrics = set()
        for _ in range(6):
            asked = searcher.ask(12)
            found = zip(asked, fake.measure(asked, "model"), strict=True)
            searcher.tell([Trial(c, m, "measured") for c, m in found if not m.failure])
            metrics |= {c.metric for c in asked}
        for metric in metrics:
            assert not operators or metric.operators <= set(operators.split(","))
            assert not leaves or metric.leaves <= set(leaves.split(","))
        assert len(metrics) > 4 or operators == "tanh"

    def test_everything_is_what_nothing_is(self):
        every = settings_of(operators=list(OPERATORS), leaves=",".join(LEAVES))
        plain = settings_of()
        asked = []
        for settings in (every, plain):
            searcher = build_searcher("gp", build_problem(settings, FakeEvaluator())[0], 0)
            asked.append(testing.told(searcher))
        assert asked[0] == asked[1]

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"operators": "mull"}, "did you mean 'mul'"),
            ({"leaves": "W,Q"}, "expected a leaf among W, G"),
            ({"leaves": "X,Y"}, r"expected a leaf that tells all weights apart \(W, G\), got"),
            ({"operators": []}, "expected at least an operator, got none"),
            ({"operators": "mul", "space": "layer"}, "expected the space tree for operators"),
            ({"leaves": "W", "space": "meta"}, "expected the space tree for leaves"),
            ({"start_from": "abs(W)", "space": "layer"}, "expected the space tree for start_from"),
            ({"start_from": [""]}, "expected a metric, a file or a run to start from, got an empty text"),
        ],
    )
    def test_what_cannot_be_chosen_is_refused(self, changes, says):
        with pytest.raises(SecateurError, match=says):
            settings_of(**changes)

    def test_is_saved_in_one_order_and_left_out_where_nothing_is_chosen(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "run").mkdir()
        (tmp_path / "best.json").write_text("{}")
        settings = settings_of(
            operators="sqrt, mul",
            leaves="X,W",
            start_from=["abs(W)", "best.json", "run:best"],
            plugins="mine.py",
        )
        assert settings.operators == ("mul", "sqrt")
        assert settings.leaves == ("W", "X")
        assert settings.start_from == ("abs(W)", str(tmp_path / "best.json"), f"{tmp_path / 'run'}:best")
        assert settings.plugins == (tmp_path / "mine.py",)
        (tmp_path / "run.toml").write_text(settings.to_toml())
        assert SearchSettings.load(tmp_path / "run.toml") == settings
        assert "start_from" not in settings_of().to_toml()
        assert used() == ()

    def test_leaves_that_the_calibration_lacks_are_told(self):
        with pytest.raises(SecateurError, match=r"expected leaves that the calibration has \(W, X\), got G"):
            check_leaves(settings_of(leaves="W,G"), frozenset("WX"))

    @pytest.mark.parametrize("seeding", [True, False])
    @pytest.mark.parametrize("space", ["tree", "tree+layer"])
    @pytest.mark.parametrize("name", ["gp", "random"])
    def test_a_search_begins_with_what_it_is_given(self, name, space, seeding, tmp_path):
        starts = [parse("abs(W) * sqrt(V) * 2"), parse("square(W) * X / V")]
        settings = settings_of(searcher=name, space=space, seeding=seeding, budget=120)
        archive = search_into(tmp_path / "run", FakeEvaluator(), settings, starts)
        own = [row for _, row in archive.frame().iterrows() if not isinstance(row["baseline"], str)]
        first = [row["metric"] for row in own[: settings.batch_size]]
        assert {str(order_form(start, "row")) for start in starts} <= set(first)

    def test_starts_are_read_from_texts_files_and_runs(self, tmp_path):
        testing.small_run(tmp_path / "run")
        path = export(tmp_path / "run", "best", to="json", out=tmp_path / "best.json")
        texts = ["abs(W) * V", str(path), "wanda", str(tmp_path / "run"), f"{tmp_path / 'run'}:best"]
        with Archive(tmp_path / "run") as archive:
            front = list(archive.front()["metric"])
        expected = dict.fromkeys(["abs(W) * V", "abs(W) * X", *front])
        assert [str(metric) for metric in read_starts(texts)] == list(expected)
        with pytest.raises(SecateurError, match="expected a run folder with an archive"):
            read_starts([str(tmp_path)])
        with pytest.raises(MetricError):
            read_starts(["abs(W"])

    def test_a_start_outside_of_what_is_searched_is_refused(self):
        for changes in ({"leaves": "W,X"}, {"operators": "mul,abs"}, {"max_size": 3}):
            with pytest.raises(SecateurError, match=r"to start from, got `abs\(W\) / sqrt\(V\)`"):
                build_problem(settings_of(**changes), FakeEvaluator(), [parse("abs(W) / sqrt(V)")])


# All of it --------------------------------------------------------------------------------------


def blocks():
    """The plugins of the document, by their heading."""
    text = (ROOT / "docs" / "extending.md").read_text()
    return dict(re.findall(r"^## (.+?)\n.*?```python\n(.+?)```", text, re.DOTALL | re.MULTILINE))


CHECKS = {
    "An objective": ("check_objective", ["worst_layer"]),
    "An operator": ("check_operator", ["cbrt", "smaller"]),
    "A leaf": ("check_leaf", ["K"]),
    "An allocation": ("check_allocation", ["hourglass"]),
    "A searcher": ("check_searcher", ["halving"]),
    "A repair": ("check_repair", ["keep-magnitude"]),
    "An exporter": ("check_exporter", ["ratios-tsv"]),
}


@pytest.mark.parametrize("heading", [*CHECKS, "A published metric"])
def test_each_block_of_the_document_is_a_plugin_that_keeps_its_contract(heading):
    text = blocks()[heading]
    assert len(text.splitlines()) < 40
    use(Plugin("mine.py", text))
    check, names = CHECKS.get(heading, ("", []))
    for name in names:
        getattr(testing, check)(name)
    if heading == "A published metric":
        assert str(read_metric("ria-squared")) == PUBLISHED["ria-squared"].text


def test_documents_and_examples_know_public_names_alone():
    files = [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py"), ROOT / "README.md"]
    found = [line for path in files for line in path.read_text().splitlines()
             if re.match(r"\s*(from|import) secateur", line)]  # fmt: skip
    assert len(found) >= 10
    for line in found:
        assert re.match(r"\s*(import secateur$|from secateur import )", line), line
        names = [name.strip(" ()") for name in line.partition(" import ")[2].split(",")]
        assert all(name in (*secateur.__all__, "testing", "") for name in names), line


class TestTheExample:
    """Five rows in one file, through everything below the service."""

    def settings(self, calibration, **changes):
        return settings_of(
            calibration.folder, searcher="climber", objectives="kl,worst_layer,size", budget=32, batch=8,
            plugins=[EXAMPLE], **changes,
        )  # fmt: skip

    def test_every_row_keeps_its_contract(self):
        secateur.use_plugin(EXAMPLE)
        testing.check_objective("worst_layer")
        testing.check_operator("cbrt")
        testing.check_leaf("K")
        testing.check_searcher("climber")
        testing.check_exporter("ratios-tsv")
        assert [p.name for p in used()] == ["plugin.py"]

    def test_a_local_run_its_front_report_exports_and_resume(self, tiny_calibration, tmp_path):
        secateur.use_plugin(EXAMPLE)
        evaluator = LocalEvaluator(tiny_calibration)
        starts = [parse("cbrt(W) * sqrt(K) * W"), parse("abs(W) * K")]
        settings = self.settings(tiny_calibration)
        archive = search_into(tmp_path / "run", evaluator, settings, starts)
        rows = archive.frame()
        assert archive.fact("plugins") == [{"name": "plugin.py", "sha256": read_plugin(EXAMPLE).sha256}]
        assert {str(order_form(s, "row")) for s in starts} <= set(rows["metric"])
        assert not rows["failure"].notna().any()
        assert archive.front()["worst_layer"].notna().all()
        for missing_rows in (5, len(rows)):  # begun again after so many trials, or after none were told
            again = tmp_path / f"again-{missing_rows}"
            whole = search_into(again, evaluator, settings, starts)
            assert whole.frame()["key"].tolist() == rows["key"].tolist()
        resumed = search_into(tmp_path / "run", evaluator, settings, starts)  # measures nothing twice
        assert resumed.frame().equals(rows)
        assert "worst layer, relative" in write_report(archive, tmp_path / "report.html").read_text()
        key = rows.loc[rows["metric"].str.contains("K"), "key"].iloc[0]
        written = export(archive, key, to="ratios-tsv", out=tmp_path / "ratios.tsv").read_text()
        assert len(written.splitlines()) == len(evaluator.layers)
        found = read_json(export(archive, key, to="json", out=tmp_path / "one.json"))
        assert found.provenance["plugins"] == archive.fact("plugins")
        assert "# needs plugin.py" in export(archive, key, to="text", out=tmp_path / "one.txt").read_text()
        evaluator.close()

    def test_two_workers_measure_as_one_does(self, tiny_calibration, tmp_path):
        local = LocalEvaluator(tiny_calibration)
        before = Plugin("plugin.py", EXAMPLE.read_text())
        use(before)
        use(plugin("from secateur import Published\nSECATEUR = [Published('mine', 'abs(W) * K', 'row', '')]"))
        workers = RayEvaluator(tiny_calibration, Cluster(workers=2, cpus=0.5), WorkerOptions())
        try:
            workers.wait(2)
            texts = ("cbrt(W) * K * W", "abs(W) * sqrt(K)", "abs(W) * cbrt(X - M)", "mine")
            candidates = [uniform(read_metric(text), local.layers, 0.5) for text in texts]
            for stage in ("screen", "layer", "model"):
                one, two = (evaluator.measure(candidates, stage) for evaluator in (local, workers))
                for a, b in zip(one, two, strict=True):
                    assert (a.failure, a.layer_errors, a.values) == ("", b.layer_errors, b.values)
            assert {m.worker for m in two} != {""}
            for check in testing.EVALUATOR_CHECKS.values():
                check(workers)
            settings = self.settings(tiny_calibration)
            frames = [search_into(tmp_path / name, evaluator, settings).frame()
                      for name, evaluator in (("one", local), ("two", workers))]  # fmt: skip
            own = ["key", "status", "kl", "worst_layer"]
            assert frames[0][own].equals(frames[1][own])
        finally:
            workers.close()
            local.close()
            with warnings.catch_warnings():  # Ray leaves the handles of its processes behind
                warnings.simplefilter("ignore", ResourceWarning)
                del workers
                gc.collect()


class TestExports:
    def record(self, text):
        from exported import record

        return record(text)

    def test_code_computes_what_we_do(self):
        secateur.use_plugin(EXAMPLE)
        metric = parse("cbrt(abs(W) * cbrt(X - M) + cbrt(W)) * K + G")
        scope = {}
        exec(to_python(self.record(str(metric))), scope)  # noqa: S102 (our own export)
        leaves = {**LEAVES_OF_A_LAYER, "K": LEAVES_OF_A_LAYER["X"].abs()}
        function = scope["scores"]
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        found = function(*(leaves[name] for name in names))
        assert torch.equal(found, score(order_form(metric, "row"), leaves).expand(24, 32))
        assert "mean absolute product of an input feature" in to_python(self.record(str(metric)))

    def test_formulas_have_its_symbols_or_its_names(self):
        secateur.use_plugin(EXAMPLE)
        use(
            plugin(
                "from secateur import Operator\nSECATEUR = [Operator('min_of', 2, 'elementwise', '', min)]"
            )
        )
        assert to_latex(parse("cbrt(W) * K")) == r"\sqrt[3]{W_{ij}} \cdot \mathrm{K}_{j}"
        assert to_latex(parse("min_of(W, X)")).startswith(r"\operatorname{min\_of}\left( W_{ij}, ")
        assert str(to_sympy(parse("min_of(W, X) * K"))) == "K*min_of(W, X)"

    @pytest.mark.parametrize("to", ["python", "llm-compressor", "pruner-zero"])
    def test_what_cannot_say_an_operator_refuses_in_a_sentence(self, to, tmp_path):
        use(plugin(CBRT % ""))
        with pytest.raises(ExportError) as caught:
            EXPORTERS[to].write(self.record("abs(W) * cbrt(X)"), tmp_path / "out")
        assert "cbrt" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_candidate_whose_plugin_is_missing_says_which(self, tmp_path):
        mine = secateur.use_plugin(EXAMPLE)
        EXPORTERS["json"].write(self.record("abs(W) * cbrt(K)"), tmp_path / "one.json")
        for table, name in ((OPERATORS, "cbrt"), (LEAVES, "K")):
            del table[name]
        plugins._origins.clear()
        says = (
            rf"needs the plugin plugin.py \(sha256 {mine.sha256[:12]}\), which is not in use here; give --pl"
        )
        with pytest.raises(ExportError, match=says):
            read_json(tmp_path / "one.json")

    def test_a_run_whose_plugin_is_missing_says_which(self, tmp_path):
        mine = secateur.use_plugin(EXAMPLE)
        settings = settings_of(searcher="random", budget=12)
        search_into(tmp_path / "run", FakeEvaluator(), settings, [parse("cbrt(W) * X + V")])
        for table, name in ((OPERATORS, "cbrt"), (LEAVES, "K")):
            del table[name]
        plugins._origins.clear()
        archive = Archive(tmp_path / "run")
        rows = archive.frame()  # texts and figures need no plugin
        key = rows.loc[rows["metric"].str.contains("cbrt"), "key"].iloc[0]
        says = rf"was made with the plugin plugin.py \(sha256 {mine.sha256[:12]}\), which is not in use here"
        rule = f"{tmp_path / 'run'}:{key}"
        for read in (archive.trials, lambda: archive.candidate(key), lambda: read_starts([rule]),
                     lambda: write_report(archive, tmp_path / "report.html"),
                     lambda: export(archive, key, to="json", out=tmp_path / "one.json")):  # fmt: skip
            with pytest.raises(SecateurError, match=says):
                read()
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    def test_a_failure_of_an_exporter_is_a_sentence_and_leaves_nothing(self, tmp_path):
        use(
            plugin("""
            from secateur import Exporter
            def write(record, path):
                path.write_text("half")
                raise RuntimeError("no more")
            SECATEUR = [Exporter("mine", ".txt", "candidate", "half of what is asked for", write)]
        """)
        )
        testing.small_run(tmp_path / "run")
        with pytest.raises(
            ExportError, match=r"the exporter mine of the plugin mine.py fails in line 5 of mine.py"
        ):
            export(tmp_path / "run", "best", to="mine", out=tmp_path / "out.txt")
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


class TestOtherRows:
    @pytest.mark.parametrize(
        ("code", "says"),
        [
            ("{}", "expected one variant 'mine', got"),
            ("{'other': (0.3,) * len(dense.layers)}", "expected one variant 'mine', got"),
            ("{'mine': (0.5,)}", r"expected 12 ratios in \[0, 1\) of 'mine', one a layer, got 1"),
            ("{'mine': (1.0,) * len(dense.layers)}", "expected 12 ratios"),
            (
                "{'mine': (0.7,) * len(dense.layers)}",
                "expected ratios that remove 0.3 of the weights, got 0.7",
            ),
            ("dense.nothing", "the allocation mine of the plugin mine.py fails in line 2 of mine.py"),
        ],
    )
    def test_an_allocation_is_held_to_what_it_promises(self, code, says):
        use(plugin("from secateur import Allocation\n"
                   f"SECATEUR = [Allocation('mine', '', '', lambda dense, sparsity: {code})]"))  # fmt: skip
        with pytest.raises(SecateurError, match=says):
            ALLOCATIONS["mine"].variants(DENSE, 0.3)

    def test_an_allocation_is_a_baseline_and_can_be_given(self):
        use(Plugin("mine.py", blocks()["An allocation"]))
        _, baselines = build_problem(settings_of(space="layer", searcher="gp"), FakeEvaluator())
        assert "wanda + hourglass" in [b.name for b in baselines]
        wanted, _ = build_problem(settings_of(allocation="hourglass"), FakeEvaluator())
        ratios = build_searcher("gp", wanted, 0).ask(1)[0].ratios
        assert ratios[0] < ratios[5] > ratios[-1]

    def test_a_searcher_is_held_to_its_row_and_its_failures_are_sentences(self):
        use(
            plugin("""
            from secateur import Abilities, SearcherRow
            class Broken:
                def ask(self, count):
                    return [None] if count == 1 else 1 / 0
                def tell(self, trials):
                    pass
            can = Abilities(("numbers",))
            SECATEUR = [SearcherRow("broken", lambda p, seed, batch: Broken(), "breaks", can)]
        """)
        )
        with pytest.raises(SecateurError, match="for the searcher broken, got trees"):
            build_searcher("broken", problem(), 0)
        searcher = build_searcher("broken", problem(space="layer"), 0)
        with pytest.raises(
            PluginError, match=r"the searcher broken of the plugin mine.py fails in line 5 of mine.py"
        ):
            searcher.ask(2)
        with pytest.raises(
            SecateurError, match="expected candidates with 12 ratios, one a layer, got NoneType"
        ):
            searcher.ask(1)
        assert set(SEARCHERS) >= {"broken", "gp"}

    def test_a_repair_prunes_and_is_held_to_what_it_promises(self, tiny_calibration):
        from secateur.workers.model.decoder import Decoder
        from secateur.workers.model.load import load_model

        use(Plugin("mine.py", blocks()["A repair"]))
        use(plugin("""
            from secateur import Repair, Repaired
            SECATEUR = [Repair("nothing", "brings all back", lambda w, removed, gram, mean: Repaired(w))]
        """, "other.py"))  # fmt: skip
        candidate = uniform(parse("abs(W) * X"), tiny_calibration.layers, 0.5)

        def prune(repair):
            decoder = Decoder(load_model(tiny_calibration.model_source)[0])
            return Pruner(decoder, tiny_calibration.tokens("statistics")).prune(candidate, repair=repair)

        assert all(layer.zeros == layer.layer.size // 2 for layer in prune("keep-magnitude"))
        with pytest.raises(SecateurError, match=r"the repair nothing of the plugin other.py fails: expected"):
            prune("nothing")

    def test_a_published_metric_is_a_baseline(self):
        use(Plugin("mine.py", blocks()["A published metric"]))
        _, baselines = build_problem(settings_of(), FakeEvaluator())
        assert "ria-squared" in [b.name for b in baselines]


def test_expressions_of_the_language_know_their_words():
    assert Expression("W").operators == frozenset()
    assert parse("abs(W) * 2 + pow(X, 2)").operators == {"abs", "mul", "add", "pow"}
    assert LEAVES["X"].shape == COLUMN
