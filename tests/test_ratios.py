"""Ratios: budgets are held, published allocations are their formulas, spaces find their way back."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.metrics_dsl.published import PUBLISHED
from secateur.search.core.candidate import Layer
from secateur.search.spaces import allocation
from secateur.search.spaces.allocation import ALLOCATIONS, Dense
from secateur.search.spaces.optishear import MetaSpace
from secateur.search.spaces.ratio_space import RATIO_SPACES
from secateur.search.spaces.ratios import project, ratio_of, sizes, to_columns
from support import FakeEvaluator

LAYERS = FakeEvaluator.layers
DENSE = Dense(LAYERS, FakeEvaluator().summarise, PUBLISHED["wanda"].expression)


@st.composite
def models(draw):
    """Shapes of a decoder, with grouped-query attention and any width."""
    width = 16 * draw(st.integers(8, 64))
    inner = 16 * draw(st.integers(8, 160))
    values = width // draw(st.sampled_from([1, 2, 4, 8]))
    shapes = [(width, width), (values, width), (values, width), (inner, width), (width, inner)]
    blocks = draw(st.integers(2, 40))
    return [Layer(f"{b}.{i}", b, f"k{i}", r, c) for b in range(blocks) for i, (r, c) in enumerate(shapes)]


class TestTheBudget:
    @settings(max_examples=1000)
    @given(models(), st.floats(0.05, 0.9), st.floats(0, 0.05), st.integers(0, 2**32), st.floats(0.01, 2))
    def test_is_held_before_and_after_rounding(self, layers, sparsity, low, seed, width):
        weights = sizes(layers)
        wanted = sparsity + np.random.default_rng(seed).normal(0, width, len(layers))
        ratios = project(wanted, weights, sparsity, low)
        assert ratios @ weights / weights.sum() == pytest.approx(sparsity, abs=1e-12)
        assert (ratios >= low).all()
        assert (ratios <= max(0.95, (1 + sparsity) / 2)).all()
        rounded = to_columns(ratios, layers, sparsity)
        counts = [int(x.columns * r) for x, r in zip(layers, rounded, strict=True)]
        removed = sum(n * x.rows for n, x in zip(counts, layers, strict=True)) / weights.sum()
        coarsest = min(x.rows for x in layers) / weights.sum() / 2  # half a column of the smallest layer
        assert abs(removed - sparsity) <= max(2e-4, coarsest) + 1e-12
        moved = max(abs(n - r * x.columns) for n, r, x in zip(counts, ratios, layers, strict=True))
        assert moved < 2 + max(x.rows for x in layers) / min(x.rows for x in layers)

    def test_moves_all_ratios_alike_until_they_meet_a_bound(self):
        assert project([0.2, 0.4, 0.6], [1, 1, 1], 0.5) == pytest.approx([0.3, 0.5, 0.7])
        assert project([0.0, 0.5, 2.0], [1, 1, 2], 0.6) == pytest.approx([0.0, 0.5, 0.95])

    @pytest.mark.parametrize("bad", [[math.nan, 0.1], [math.inf, 0.1]])
    def test_refuses_ratios_that_are_no_numbers(self, bad):
        with pytest.raises(ValueError, match="expected finite ratios"):
            project(bad, [1, 1], 0.5)

    def test_a_ratio_removes_just_the_columns_it_stands_for(self):
        for columns in (7, 64, 100, 576, 1536, 4096):
            for count in range(columns):
                assert int(columns * ratio_of(count, columns)) == count


class TestClosedForms:
    """Against numbers worked out by hand."""

    def test_owl(self):
        # minmax: 0, 0.5, 1; times 2 * 0.08: 0, 0.08, 0.16; minus their mean 0.08
        assert allocation.owl([1, 2, 3], 0.7) == pytest.approx([0.78, 0.7, 0.62], abs=1e-9)

    def test_dlp(self):
        # 1 - I / sum: 0.9, 0.7, 0.4; minmax: 1, 0.6, 0; times 0.3: 0.3, 0.18, 0, mean 0.16
        assert allocation.dlp([1, 3, 6], 0.7) == pytest.approx([0.56, 0.68, 0.86], abs=1e-9)

    def test_dsa(self):
        # below tan(1) asin(atan(v)); beyond it pi / 2, where the authors' code puts 0
        low, high = math.asin(math.atan(0.5)), math.pi / 2
        middle = (math.asin(math.atan(1.0)) - low) / (high - low)
        extra = np.array([1.0, 1 - middle, 0.0]) * 0.16
        expected = 0.6 - (extra - extra.mean())
        assert allocation.dsa([0.5, 1.0, 9.0], 0.6) == pytest.approx(expected, abs=1e-9)

    def test_alpha_pruning(self):
        # factors 0.7, 1, 1.3 on weights 1, 1, 2: scaled by 4 / (0.7 + 1 + 2.6)
        expected = np.array([0.7, 1.0, 1.3]) * 0.5 * 4 / 4.3
        found = allocation.alpha_pruning([2, 3, 4], 0.5, weights=[1, 1, 2])
        assert found == pytest.approx(expected, abs=1e-9)

    def test_arithmetic_progression(self):
        assert allocation.arithmetic(4, 0.1, 0.5) == pytest.approx([0.35, 0.45, 0.55, 0.65], abs=1e-9)

    def test_slopes_of_the_paper(self):
        # 32 blocks at 70 %: steps of 0.002 up to 2 * 0.3 / 31 = 0.01935, nine a direction
        positive = [slope for slope in allocation.slopes(32, 0.7) if slope > 0]
        assert positive == pytest.approx([0.002 * i for i in range(1, 10)])
        assert allocation.slopes(1, 0.7) == []

    def test_mrp_levels_the_redundancy(self):
        # outlier shares 0.1, 0.2, 0.3: all with the same share of outliers left is density 1:2:3
        found = allocation.mrp([0.1, 0.2, 0.3], 0.6, step=1e-5)
        assert found == pytest.approx([0.8, 0.6, 0.4], abs=2e-5)

    def test_one_threshold_over_layers(self):
        # scores uniform on [0, 1] and on [0, 2]: below t are t and t / 2, together 0.6 at t = 0.8
        table = np.stack([np.linspace(0, 1, 1001), np.linspace(0, 2, 1001)])
        assert allocation.one_threshold(table, 0.6, [1, 1]) == pytest.approx([0.8, 0.4], abs=1e-9)
        # the first layer keeps its tenth
        assert allocation.one_threshold(table, 0.8, [1, 1]) == pytest.approx([0.9, 0.7], abs=1e-9)

    @pytest.mark.parametrize("form", [allocation.owl, allocation.dlp, allocation.dsa,
                                      allocation.alpha_pruning, allocation.mrp])  # fmt: skip
    def test_equal_blocks_are_treated_alike(self, form):
        for value in (0.0, 0.3, 7.0):
            assert form([min(value, 0.9)] * 5, 0.6) == pytest.approx([0.6] * 5, abs=1e-3)

    def test_ratios_that_leave_the_range_are_moved_into_it_together(self):
        found = allocation.owl([0, 1, 2, 3], 0.9, width=0.3)
        assert found.max() <= 0.99
        assert found.mean() == pytest.approx(0.9)


@pytest.mark.parametrize("name", ALLOCATIONS)
class TestEveryAllocation:
    def test_has_a_source_and_holds_the_sparsity(self, name):
        assert ALLOCATIONS[name].source
        assert ALLOCATIONS[name].meaning
        for sparsity in (0.3, 0.6, 0.9):
            variants = ALLOCATIONS[name].variants(DENSE, sparsity)
            assert variants
            for ratios in variants.values():
                assert len(ratios) == len(LAYERS)
                assert all(0 <= r < 1 for r in ratios)
                assert np.average(ratios, weights=sizes(LAYERS)) == pytest.approx(sparsity, abs=1e-9)

    def test_gives_one_rule_unless_it_has_a_number_to_choose(self, name):
        if name == "atp":
            with pytest.raises(ValueError, match="without a number to choose, got 'atp'"):
                ALLOCATIONS[name].ratios(DENSE, 0.6)
        else:
            assert ALLOCATIONS[name].variants(DENSE, 0.6) == {name: ALLOCATIONS[name].ratios(DENSE, 0.6)}


@pytest.mark.parametrize("name", RATIO_SPACES)
class TestEveryRatioSpace:
    def test_holds_the_sparsity_anywhere(self, name):
        space = RATIO_SPACES[name](DENSE)
        for share, sparsity in itertools.product((0.0, 0.3, 1.0), (0.3, 0.6, 0.75)):
            values = tuple(v.clip(v.low + share * (v.high - v.low)) for v in space.variables)
            ratios = space.ratios(values, sparsity)
            assert np.average(ratios, weights=sizes(LAYERS)) == pytest.approx(sparsity, abs=1e-3)
            assert all(0 <= r < 1 for r in ratios)

    def test_finds_the_values_of_its_own_ratios(self, name):
        space = RATIO_SPACES[name](DENSE)
        values = tuple(v.clip(v.low + 0.45 * (v.high - v.low)) for v in space.variables)
        ratios = space.ratios(values, 0.6)
        again = space.encode(ratios, 0.6)
        assert again is not None
        assert space.ratios(again, 0.6) == pytest.approx(ratios, abs=0.02)  # a column is 1 / 64

    def test_an_even_allocation_is_in_it(self, name):
        if name == "feature":
            return  # an even one is any feature at width 0
        space = RATIO_SPACES[name](DENSE)
        assert space.encode((0.6,) * len(LAYERS), 0.6) == pytest.approx((0.0,) * len(space.variables))


def test_a_curve_is_about_eleven_numbers():
    layers = [Layer(f"{b}.{k}", b, k, 64, 64) for b in range(5) for k in "qkvogud"]
    space = RATIO_SPACES["curve"](Dense(layers, FakeEvaluator().summarise, DENSE.metric))
    assert len(space.variables) == 11


@pytest.fixture(scope="module")
def family():
    return MetaSpace("row")


class TestTheMetaFamily:
    def test_collapses_2401_names(self, family):
        assert family.names == 7**4
        assert family.distinct == len(set(family._metrics.values()))
        assert 200 < family.distinct < 400

    def test_holds_wanda_magnitude_and_ria(self, family):
        choices = [v.choices.index for v in family.variables]

        def metric(*names):
            return family.metric(tuple(float(c(n)) for c, n in zip(choices, names, strict=True)))

        assert metric("none", "identity", "none", "identity") == PUBLISHED["wanda"].expression
        assert family.values(PUBLISHED["wanda"].expression) is not None
        relative = metric("relative", "identity", "none", "identity")
        assert str(relative) == "abs(W) * (1 / col_sum(abs(W)) + 1 / row_sum(abs(W))) * X"

    def test_different_metrics_differ_for_a_whole_layer_more_often(self, family):
        assert MetaSpace("layer").distinct > family.distinct
