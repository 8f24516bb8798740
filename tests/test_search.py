"""Searchers and the loop: one behaviour for every searcher, and what the loop promises."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from secateur.metrics_dsl.operators import LEAVES
from secateur.metrics_dsl.order import order_form
from secateur.metrics_dsl.parser import parse
from secateur.metrics_dsl.published import PUBLISHED
from secateur.metrics_dsl.score import score
from secateur.search.baselines import BaselinesFirst
from secateur.search.core.budget import Budget
from secateur.search.core.candidate import Candidate, Measurement, Trial, uniform
from secateur.search.core.objectives import OBJECTIVES, look_up_objectives, point
from secateur.search.loop import PATIENCE, Funnel, run
from secateur.search.searchers.descent import _visits
from secateur.search.searchers.table import SEARCHERS, build_searcher
from secateur.search.spaces.ratio_space import RATIO_SPACES
from secateur.search.spaces.variables import Encoding
from secateur.testing import LAYERS, SEARCHER_CHECKS, FakeEvaluator, problem, told
from secateur.testing.fake import DENSE

SPACES = ("tree", "meta", "curve", "block", "layer", "feature", "ramp", "owl", "tree+curve", "meta+layer")
__all__ = ["DENSE", "LAYERS", "problem"]


def complete(metric):
    return uniform(metric, LAYERS, 0.5)


def can(searcher, space):
    """Whether a searcher can represent a space."""
    if searcher == "grid":
        return space in ("ramp", "owl", "dlp", "dsa", "alpha")
    if searcher == "cma":
        return not {"tree", "meta", "feature"} & set(space.split("+"))
    if searcher == "descent":
        return space in ("curve", "block", "layer", "ramp", "owl")
    return "tree" not in space or searcher in ("gp", "random")


PAIRS = [(searcher, space) for searcher in SEARCHERS for space in SPACES if can(searcher, space)]


def funnel(**changes):
    return Funnel(**{"objectives": look_up_objectives(["kl", "size"]), "batch": 8, **changes})


def search(name, seed=0, budget=60, evaluator=None, **changes):
    baselines = [complete(p.expression) for p in PUBLISHED.values()]
    searcher = BaselinesFirst(build_searcher(name, problem(), seed), baselines, seeds_searcher=True)
    evaluator = evaluator or FakeEvaluator()
    return [t for batch in run(searcher, evaluator, funnel(**changes), budget) for t in batch]


@pytest.mark.parametrize("check", SEARCHER_CHECKS)
@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_every_searcher_keeps_the_contract_on_every_space(check, name, space):
    SEARCHER_CHECKS[check](SEARCHERS[name], space)


@pytest.mark.parametrize(("name", "space"), [pair for pair in PAIRS if pair[0] != "grid"])
def test_another_seed_gives_another_search(name, space):
    first, second = (told(build_searcher(name, problem(space=space), seed)) for seed in (3, 4))
    assert first != second


@pytest.mark.parametrize("name", ["nsga3", "tpe", "evolution", "cma", "grid"])
def test_a_searcher_of_numbers_refuses_trees(name):
    with pytest.raises(ValueError, match=r"expected .*(trees|numbers)"):
        build_searcher(name, problem(), 0)


@pytest.mark.parametrize("space", ["tree", "tree+layer", "meta", "feature", "meta+layer"])
def test_descent_refuses_what_has_no_slope(space):
    with pytest.raises(ValueError, match=r"expected a given metric, .* a space of ratios such as layer"):
        build_searcher("descent", problem(space=space), 0)
    with pytest.raises(ValueError, match="the objective kl first"):
        build_searcher("descent", problem("density,kl", space="layer", sparsity=(0.3, 0.7)), 0)


@pytest.mark.parametrize("name", ["gp", "nsga3", "tpe", "evolution", "cma", "descent"])
def test_seeds_are_asked_first(name):
    given = [
        Encoding(None, tuple(0.01 * i for _ in RATIO_SPACES["curve"](DENSE).variables)) for i in range(3)
    ]
    wanted = problem(space="curve", seeds=given)
    asked = build_searcher(name, wanted, 0).ask(3)
    assert [c.key for c in asked] == [wanted.candidate(encoding).key for encoding in given]


@pytest.mark.parametrize("name", ["gp", "nsga3", "tpe", "evolution", "cma", "descent"])
def test_ratios_are_found_better_than_by_chance(name):
    def best(searcher):
        sensitivity = 100 if searcher in ("descent", "gp") else 0
        funnel_ = Funnel(look_up_objectives(["kl"]), 8, screen=None, sensitivity=sensitivity)
        batches = run(
            build_searcher(searcher, problem("kl", space="curve"), 0), FakeEvaluator(), funnel_, 240
        )
        return min(t.measurement.values["kl"] for batch in batches for t in batch)

    assert best(name) < best("random")


@pytest.mark.parametrize(("batch", "told"), [(16, 16), (16, 7), (8, 16)])
def test_cma_learns_whatever_fails_and_however_few_are_told_at_a_time(batch, told):
    class Failing(FakeEvaluator):
        def _one(self, c, stage):
            found = super()._one(c, stage)
            return found if int(c.key, 16) % 3 else Measurement(stage, failure="a worker was lost")

    def best(searcher):
        wanted = Funnel(look_up_objectives(["kl"]), told, screen=None)
        trials = [t for b in run(searcher, Failing(), wanted, 400) for t in b]
        assert any(t.status == "failed" for t in trials)
        return min(t.measurement.values["kl"] for t in trials if t.status == "measured")

    least = 0.5 * (3 + len("abs(W) * X") / 100 + 0.5)  # the ratios that grow with depth as the formula wants
    found = best(build_searcher("cma", problem("kl", space="curve"), 0, batch))
    assert found - least < 0.005  # by chance 0.02


class TestDescent:
    """On a formula whose best ratios are known: they grow with depth."""

    def search(self, name="descent", space="layer", budget=120, **changes):
        fake = FakeEvaluator()
        wanted = Funnel(look_up_objectives(["kl"]), 8, sensitivity=100, screen=None, **changes)
        trials = [
            t for b in run(build_searcher(name, problem(space=space), 0), fake, wanted, budget) for t in b
        ]
        return fake, trials

    def test_comes_to_the_ratios_that_are_best(self):
        _, trials = self.search()
        best = min(trials, key=lambda t: t.measurement.values["kl"]).candidate
        for layer, ratio in zip(LAYERS, best.ratios, strict=True):
            assert ratio == pytest.approx(0.5 + 0.1 * (layer.block - 1.5), abs=0.05)

    def test_asks_for_the_sensitivities_of_the_best_of_a_batch_alone(self):
        fake, trials = self.search(budget=40)
        asked = [key for key, stage, *_ in fake.measured if stage == "sensitivity"]
        assert len(asked) == len(set(asked))
        known = {t.candidate.key for t in trials if t.measurement.sensitivities}
        assert known == set(asked)
        assert all(part == "statistics" for _, stage, part, _ in fake.measured if stage == "sensitivity")
        assert next(t for t in trials if t.candidate.key in known).measurement.tokens == 500

    def test_the_least_kl_is_asked_for_them_whatever_else_is_minimised(self):
        fake, objectives = FakeEvaluator(), look_up_objectives(["kl", "size"])
        wanted = Funnel(objectives, 8, screen=None, sensitivity=100, promote=1.0)
        searcher = build_searcher("gp", problem("kl,size", space="tree+layer", leaves="WX"), 0)
        for batch in run(searcher, fake, wanted, 60):
            decided = [t for t in batch if t.status == "measured"]
            asked = [t for t in decided if t.measurement.sensitivities]
            assert len(asked) == bool(decided)
            least = min((t.measurement.values["kl"] for t in decided), default=None)
            assert [t.measurement.values["kl"] for t in asked] == [least] * len(asked)

    def test_sensitivities_teach_once(self):
        """What is told again, or as an alias, is no new estimate."""
        searcher = build_searcher("gp", problem(space="tree+layer", leaves="WX"), 0)
        (candidate,) = searcher.ask(1)[:1]
        slopes = tuple(range(1, 1 + len(LAYERS)))
        found = Measurement("model", (), {"kl": 1.0, "sparsity": 0.5}, sensitivities=slopes)
        searcher.tell([Trial(candidate, found, "measured")])
        before = searcher._descent._costs._weight
        alias = Candidate(parse("2 * X * abs(W)"), candidate.ratios)
        searcher.tell([Trial(candidate, found, "measured"), Trial(alias, found, "alias", candidate.key)])
        assert searcher._descent._costs._weight == before > 0

    def test_goes_on_where_sensitivities_fail(self):
        class Broken(FakeEvaluator):
            def _one(self, c, stage):
                if stage == "sensitivity":
                    return Measurement(stage, failure="no gradient")
                return super()._one(c, stage)

        wanted = Funnel(look_up_objectives(["kl"]), 8, sensitivity=100, screen=None)
        searcher = build_searcher("descent", problem(space="layer"), 0)
        trials = [t for b in run(searcher, Broken(), wanted, 10) for t in b]
        assert {t.status for t in trials} == {"measured"}
        assert len(trials) == 10

    def test_metrics_that_vary_beside_ratios_share_the_best_ratios(self):
        searcher = build_searcher("gp", problem(space="tree+layer", leaves="WX"), 0)
        told(searcher, rounds=4, count=10)
        asked = searcher.ask(20)
        common = max({c.ratios for c in asked}, key=[c.ratios for c in asked].count)
        assert sum(c.ratios == common for c in asked) >= 5
        assert len({c.metric for c in asked if c.ratios == common}) >= 4


class TestDescentOverAnInterval:
    """On the same formula: the best KL at each sparsity is known."""

    def search(self, name, budget, seed=0):
        wanted = problem("kl,density", space="layer", sparsity=(0.3, 0.75))
        sensitivity = 100 if name == "descent" else 0
        funnel_ = Funnel(wanted.objectives, 4, screen=None, rungs=(50,), sensitivity=sensitivity)
        batches = run(build_searcher(name, wanted, seed), FakeEvaluator(), funnel_, budget)
        return [t for batch in batches for t in batch]

    def excess(self, trials):
        """How far KL is above the best at a candidate's own sparsity, by sparsity."""
        found = {}
        for t in trials:
            if t.status == "measured":
                sparsity = t.measurement.values["sparsity"]
                least = (abs(t.candidate.metric.size - 7) + len(str(t.candidate.metric)) / 100 + sparsity) / 2
                over = t.measurement.values["kl"] - least
                found[round(sparsity, 3)] = min(over, found.get(round(sparsity, 3), over))
        return found

    def test_visits_every_sparsity_up_and_down(self):
        visits = _visits(0.3, 0.75)
        for half in (visits[:16], visits[16:]):
            assert sorted(half) == pytest.approx(np.linspace(0.3, 0.75, 16))
        assert visits[:6] == [0.3, 0.39, 0.48, 0.57, 0.66, 0.75]
        assert max(abs(a - b) for a, b in pairwise([*visits, visits[0]])) < 0.1

    def test_comes_to_the_best_at_each(self):
        found = self.excess(self.search("descent", 160))
        assert sorted(found)[0] == pytest.approx(0.3, abs=2e-3)
        assert sorted(found)[-1] == pytest.approx(0.75, abs=2e-3)
        assert len(found) >= 16
        assert max(found.values()) < 0.005

    def test_a_batch_has_one_sparsity_and_its_least_kl_is_asked_for_sensitivities(self):
        wanted = problem("kl,density", space="layer", sparsity=(0.3, 0.75))
        funnel_ = Funnel(wanted.objectives, 4, screen=None, sensitivity=100)
        visited = []
        for batch in run(build_searcher("descent", wanted, 0), FakeEvaluator(), funnel_, 60):
            points = [point(t, wanted.objectives) for t in batch]
            (asked,) = [i for i, t in enumerate(batch) if t.measurement.sensitivities]
            assert points[asked] == min(points)
            assert len({density for _, density in points}) == 1
            visited.append(round(1 - points[asked][1], 4))
        assert visited[1:15] == pytest.approx(_visits(0.3, 0.75)[:14], abs=1e-3)

    def test_a_sparsity_where_nothing_is_learned_is_tried_again_and_left_in_the_end(self):
        wanted = problem("kl,density", space="layer", sparsity=(0.3, 0.75))
        searcher = build_searcher("descent", wanted, 0)
        told(searcher, rounds=2, count=4)
        sparsities = []
        for _ in range(7):
            asked = searcher.ask(4)
            sparsities.append(round(float(np.average(asked[0].ratios, weights=[x.size for x in LAYERS])), 2))
            searcher.tell([Trial(c, Measurement("model", failure="broken"), "failed") for c in asked])
        assert sparsities == [0.39] * 3 + [0.48] * 3 + [0.57]


def test_the_screen_compares_metrics_with_the_same_ratios_alone():
    evaluator, wanted = FakeEvaluator(), Funnel(look_up_objectives(["kl"]), 8, promote=0.25)
    metrics = [parse(t) for t in ("abs(W)", "abs(W) * X", "square(W) / D", "abs(W) * Y")]
    ratios = [0.5] * 4 + [0.3, 0.6, 0.7]
    asked = [uniform(m, LAYERS, r) for m, r in zip(metrics + metrics[:3], ratios, strict=True)]
    found = evaluator.measure(asked, "screen")
    chosen = wanted.choose([Trial(c, m, "rejected") for c, m in zip(asked, found, strict=True)])
    assert len(chosen & {c.key for c in asked[:4]}) == 1
    assert chosen >= {c.key for c in asked[4:]}


def test_phases_vary_trees_and_ratios_in_turn():
    searcher = build_searcher("gp", problem("kl", space="tree+curve", phase=1), 0)
    told(searcher, rounds=3)
    kinds = [searcher._turn()]
    searcher.ask(1)
    kinds.append(searcher._turn())
    assert sorted(kinds) == [(False, True), (True, False)]


def test_a_grid_halves_its_steps():
    searcher = build_searcher("grid", problem("kl", space="ramp"), 0)
    slopes = [c.ratios[-1] - c.ratios[0] for c in searcher.ask(5)]
    assert slopes[0] < slopes[3] < slopes[2] < slopes[4] < slopes[1]


class Hidden(FakeEvaluator):
    """The better a metric orders a random layer's weights as a hidden metric does, the lower its kl."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.layer = {
            name: torch.rand((16, 1)[not leaf.shape.rows], (64, 1)[not leaf.shape.columns], generator=draw)
            for name, leaf in LEAVES.items()
        }

    def ranks(self, metric):
        return score(metric, self.layer).expand(16, 64).argsort(1).argsort(1).float()

    def _one(self, c, stage):
        distance = (self.ranks(c.metric) - self.ranks(parse("abs(W) * X**1.5 * sqrt(V)"))).abs().mean().item()
        values = {"layer_error": distance, "kl": distance, "sparsity": 0.5}
        return Measurement(stage, (), values, 0.01, fingerprint=c.key)


def test_gp_finds_a_hidden_metric_better_than_random_search_does():
    best = {}
    for name in ("gp", "random"):
        runs = [search(name, seed, 200, Hidden(), objectives=look_up_objectives(["kl"])) for seed in range(3)]
        best[name] = [min(t.measurement.values["kl"] for t in r if t.status == "measured") for r in runs]
    assert max(best["gp"]) < min(best["random"])


def test_gp_proposes_the_simplest_form_of_an_order_and_hardly_repeats():
    searcher = build_searcher("gp", problem(), 1)
    metrics = []
    for _ in range(6):
        batch = searcher.ask(20)
        metrics += [c.metric for c in batch]
        found = FakeEvaluator().measure(batch, "model")
        searcher.tell([Trial(c, m, "measured") for c, m in zip(batch, found, strict=True) if not m.failure])
    assert all(order_form(m, "row") == m for m in metrics)
    assert len(set(metrics)) > 0.9 * len(metrics)


def test_gp_takes_no_parents_from_what_was_rejected():
    searcher = build_searcher("gp", problem("layer_error,size"), 1)
    asked = [complete(parse(t)) for t in ("abs(W) * X", "square(W) * square(X)")]
    found = Measurement("screen", (), {"layer_error": 0.1})
    searcher.tell([Trial(asked[0], found, "rejected"), Trial(asked[1], found, "rejected", asked[0].key)])
    assert searcher._population == []


class TestTheLoop:
    def test_measures_each_candidate_once_and_tells_every_one_asked(self):
        fake, told_keys = FakeEvaluator(), []
        repeat = [complete(parse("abs(W)")), complete(parse("abs(W) * X"))]

        class Repeating:
            def ask(self, _count):
                return repeat

            def tell(self, trials):
                told_keys.extend(t.candidate.key for t in trials)

        trials = [t for batch in run(Repeating(), fake, funnel(), 10) for t in batch]
        assert [t.candidate for t in trials] == repeat
        assert len(fake.measured) == len(set(fake.measured))
        assert told_keys == [c.key for c in repeat] * (PATIENCE + 1)

    def test_budget_counts_distinct_candidates(self):
        trials = search("gp", budget=50)
        spent = [t for t in trials if t.status != "alias"]
        assert 50 <= len(spent) < 50 + 10
        assert len({t.candidate.key for t in trials}) == len(trials)

    def test_promotes_the_share_with_the_least_error_and_all_baselines(self):
        keys = frozenset(complete(p.expression).key for p in PUBLISHED.values())
        fake = FakeEvaluator()
        trials = search("random", evaluator=fake, always=keys, promote=0.25)
        for trial in trials:
            if trial.candidate.key in keys:
                assert trial.status in ("measured", "alias")
        rest = [t for t in trials if t.candidate.key not in keys and t.status in ("measured", "rejected")]
        measured = [t for t in rest if t.status == "measured"]
        assert 0.2 < len(measured) / len(rest) < 0.5
        assert all(t.measurement.stage == "screen" for t in rest if t.status == "rejected")

    def test_a_failure_is_a_row_with_a_reason(self):
        failed = [t for t in search("random", budget=150) if t.status == "failed"]
        assert failed
        for trial in failed:
            assert trial.measurement.failure
            assert point(trial, look_up_objectives(["kl"])) is None

    def test_candidates_of_one_order_are_aliases(self):
        fake = FakeEvaluator()
        asked = [complete(parse(t)) for t in ("abs(W) * X", "square(W) * square(X)", "2 * abs(X * W)")]

        class Once:
            def ask(self, _count):
                return asked

            def tell(self, _trials):
                pass

        trials = next(run(Once(), fake, funnel(promote=1.0), 3))
        assert [t.status for t in trials] == ["measured", "alias", "alias"]
        assert {t.alias_of for t in trials[1:]} == {asked[0].key}
        assert trials[2].measurement == trials[0].measurement
        assert {key for key, *_ in fake.measured} == {asked[0].key}

    def test_equal_masks_are_aliases_too(self):
        class SameMasks(FakeEvaluator):
            def _one(self, c, stage):
                m = super()._one(c, stage)
                return Measurement(m.stage, m.layer_errors, m.values, m.seconds, m.failure, "same")

        fake = SameMasks()
        trials = search("random", budget=3, evaluator=fake, batch=16)
        assert [t.status for t in trials if t.status != "failed"].count("measured") == 1
        assert sum(stage == "model" for _, stage, *_ in fake.measured) == 1

    def test_a_search_with_nothing_new_ends(self):
        class Empty:
            def ask(self, _count):
                return []

        assert list(run(Empty(), FakeEvaluator(), funnel(), 5)) == []

    def test_screening_alone_can_decide(self):
        trials = search("gp", last="screen", objectives=look_up_objectives(["layer_error", "size"]))
        assert {t.status for t in trials} <= {"measured", "alias", "failed"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 0}, "batch of at least 1"),
        ({"promote": 0.0}, "promoted share in (0, 1]"),
        ({"promote": 1.5}, "promoted share in (0, 1]"),
        ({"last": "full"}, "last stage among screen, layer, model"),
        ({"last": "layer"}, "'kl', which needs the stage 'model'"),
    ],
)
def test_a_wrong_funnel_is_refused(changes, says):
    with pytest.raises(ValueError, match="expected") as caught:
        funnel(**changes)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_reads_a_measured_trial_and_no_failed_one(name):
    candidate = complete(parse("abs(W)"))
    (found,) = FakeEvaluator().measure([candidate], "model")
    assert point(Trial(candidate, found, "measured"), [OBJECTIVES[name]]) is not None
    failed = Trial(candidate, Measurement("screen", failure="no"), "failed")
    assert point(failed, [OBJECTIVES[name]]) is None


@pytest.mark.parametrize("names", [["kll"], [], ["kl", "kl"]])
def test_wrong_objectives_are_refused(names):
    with pytest.raises(ValueError, match="expected"):
        look_up_objectives(names)


class TestRacing:
    def race(self, **changes):
        fake = FakeEvaluator()
        searcher = build_searcher("random", problem("kl", space="curve"), 0)
        wanted = Funnel(look_up_objectives(["kl"]), 16, screen=None, rungs=(10, 50), **changes)
        return fake, [t for batch in run(searcher, fake, wanted, 16) for t in batch]

    def test_the_best_of_each_rung_go_on_to_more_tokens(self):
        fake, trials = self.race()
        runs = {tokens: [key for key, _, _, n in fake.measured if n == tokens] for tokens in (10, 50, 0)}
        assert [len(keys) for keys in runs.values()] == [16, 4, 1]
        by_kl = sorted(trials, key=lambda t: t.measurement.values["kl_rung"])
        assert {t.candidate.key for t in by_kl[:4]} == set(runs[50])
        assert [t.status for t in by_kl] == ["measured"] + ["rejected"] * 15

    def test_what_a_rung_rejected_has_figures_of_the_rung_alone(self):
        _, trials = self.race()
        rejected = [t for t in trials if t.status == "rejected"]
        assert all(set(t.measurement.values) >= {"kl_rung", "sparsity"} for t in rejected)
        assert not any("kl" in t.measurement.values for t in rejected)
        assert point(rejected[0], look_up_objectives(["kl"])) is None

    def test_tokens_and_seconds_add_up_over_the_rungs(self):
        _, trials = self.race()
        measured = next(t.measurement for t in trials if t.status == "measured")
        assert measured.tokens == 300
        assert measured.seconds == pytest.approx(0.03)

    def test_baselines_are_measured_to_the_end(self):
        keys = frozenset(c.key for c in build_searcher("random", problem("kl", space="curve"), 0).ask(16))
        _, trials = self.race(always=keys)
        assert {t.status for t in trials} == {"measured"}


class TestBudgets:
    @pytest.mark.parametrize(
        ("text", "amount", "unit"),
        [("400", 400, "candidates"), (7, 7, "candidates"), ("2Mtokens", 2e6, "tokens"),
         ("1.5k tokens", 1500, "tokens"), ("1800s", 1800, "seconds"), ("30min", 1800, "seconds")],
    )  # fmt: skip
    def test_are_read_from_text(self, text, amount, unit):
        assert Budget.parse(text) == Budget(amount, unit)

    @pytest.mark.parametrize("text", ["", "-3", "0", "2.5", "many", "3 days", "1e3"])
    def test_that_cannot_be_read_are_refused(self, text):
        with pytest.raises(ValueError, match="expected a budget of candidates such as 400"):
            Budget.parse(text)

    def test_of_tokens_and_seconds_end_a_search(self):
        for text, least in (("2000tokens", 20), ("1s", 100)):
            searcher = build_searcher("random", problem("kl", space="curve"), 0)
            wanted = Funnel(look_up_objectives(["kl"]), 8, screen=None)
            trials = [t for b in run(searcher, FakeEvaluator(), wanted, Budget.parse(text)) for t in b]
            assert least <= len(trials) < least + 8


@pytest.mark.parametrize("ratios", [(1.0, 0.5), (-0.1, 0.5), (float("nan"), 0.5)])
def test_a_candidate_has_ratios_in_range(ratios):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        Candidate(parse("abs(W)"), ratios)


@pytest.mark.parametrize("group", ["block", "model", "rows"])
def test_a_candidate_has_a_group_that_can_be_measured(group):
    with pytest.raises(ValueError, match=f"expected a group among row, layer, got '{group}'"):
        Candidate(parse("W"), (0.5,), group)


def test_a_key_is_the_same_in_every_process():
    assert Candidate(parse("abs(W) * X"), (0.5, 0.5)).key == "a6420fb272925e52"
