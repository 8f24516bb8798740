"""Masks against a plain reference: a stable sort of each group."""

import math

import pytest
import torch
from exported import record
from hypothesis import given
from hypothesis import strategies as st
from secateur.results.export.python_file import mask_function
from secateur.search.core.candidate import Layer, count_removed, parse_pattern
from secateur.workers.measure.masks import _kth_smallest, below, ranks, removed


def by_sorting(scores, ratio, group, pattern="unstructured"):
    """The definition, word for word: sort, remove the first; equal scores keep their order."""
    rows, columns = scores.shape
    counts = parse_pattern(pattern)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if counts:
        n, m = counts
        for row in range(rows):
            for start in range(0, columns - columns % m, m):
                order = scores[row, start : start + m].argsort(stable=True)
                mask[row, start + order[:n]] = True
        return mask
    flat = scores.reshape(1, -1) if group == "layer" else scores
    for row in range(flat.shape[0]):
        order = flat[row].argsort(stable=True)
        mask.view(flat.shape)[row, order[: int(flat.shape[1] * ratio)]] = True
    return mask


@given(
    st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 40), st.floats(0, 0.999),
    st.sampled_from(["row", "layer"]), st.integers(1, 50),
)  # fmt: skip
def test_masks_equal_a_stable_sort(seed, rows, columns, ratio, group, levels):
    """Few levels make many ties; the count removed is exact all the same."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels, (rows, columns), generator=draw).float()
    mask = removed(scores, ratio, group)
    assert torch.equal(mask, by_sorting(scores, ratio, group))
    if group == "row":
        assert (mask.sum(1) == int(columns * ratio)).all()


GROUPS_AND_PATTERNS = (("row", "unstructured"), ("layer", "unstructured"), ("row", "2:4"), ("layer", "3:7"))
EXPORTED = {}  # the function of an exported file, which states the rule by itself
for group_, pattern_ in GROUPS_AND_PATTERNS:
    module = {}
    exec(mask_function(record("abs(W)", group=group_, pattern=pattern_)), {"torch": torch}, module)  # noqa: S102
    EXPORTED[group_, pattern_] = module["mask"]


def by_counting(rows, columns, ratio, group, pattern):
    """Whole numbers that are not above the share of what competes, in each group."""
    if counts := parse_pattern(pattern):
        return sum(counts[0] for _ in range(rows) for _ in range(counts[1], columns + 1, counts[1]))
    size = columns if group == "row" else rows * columns
    each = sum(number <= size * ratio for number in range(1, size + 1))
    return each * (rows if group == "row" else 1)


@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(0, 40), st.floats(0, 0.999), st.integers(-2, 2),
    st.sampled_from(GROUPS_AND_PATTERNS),
)  # fmt: skip
def test_what_is_counted_is_what_every_mask_removes(rows, columns, part, ratio, away, kind):
    """At ratios of whole weights too, and at the numbers next to them."""
    near = part / columns
    for _ in range(abs(away)):
        near = math.nextafter(near, away)
    for at in (ratio, *([near] if 0 <= near < 1 else [])):
        count = count_removed(Layer("a", 0, "a", rows, columns), at, *kind)
        assert count == by_counting(rows, columns, at, *kind)
        scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(part))
        assert count == int(removed(scores, at, *kind).sum())
        assert count == int(EXPORTED[kind](scores, at).sum())
        if kind[1] == "unstructured":
            assert count == int(below(ranks(scores, kind[0]), at, kind[0]).sum())


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 40), st.sampled_from(["row", "layer"]))
def test_one_order_gives_the_masks_of_all_ratios(seed, rows, columns, group):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, columns, generator=draw) * 10 ** torch.randint(-20, 20, (1,), generator=draw)
    scores[scores > 1] = 0.0
    scores[:, ::3] = -0.0  # equal to 0, and of another sign in its bits
    places = ranks(scores, group)
    for ratio in (0.0, 0.2, 0.5, 0.77, 0.999):
        assert torch.equal(below(places, ratio, group), removed(scores, ratio, group))


def test_an_order_of_more_columns_than_16_bits_hold():
    scores = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(below(ranks(scores, "row"), 0.9, "row"), removed(scores, 0.9, "row"))


@given(
    st.integers(0, 2**32),
    st.integers(1, 5),
    st.integers(1, 50),
    st.sampled_from(["2:4", "1:4", "5:8", "3:7", "20:40"]),
)
def test_patterns_equal_a_stable_sort(seed, rows, columns, pattern):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (rows, columns), generator=draw).float()
    assert torch.equal(removed(scores, 0.5, "row", pattern), by_sorting(scores, 0.5, "row", pattern))


def test_all_equal_scores_lose_the_first_columns():
    assert removed(torch.zeros(2, 5), 0.5, "row").tolist() == [[True, True, False, False, False]] * 2


def test_ratio_zero_removes_nothing():
    assert not removed(torch.randn(3, 7), 0.0, "layer").any()


def test_scores_that_are_not_contiguous_and_negative_zero_are_fine():
    scores = torch.tensor([[0.0, -0.0, 1.0], [3.0, 2.0, 1.0]]).T
    assert torch.equal(removed(scores, 0.5, "row"), by_sorting(scores, 0.5, "row"))


def test_both_ways_to_the_threshold_agree():
    scores = torch.randn(50, 33)
    for count in (1, 16, 33):
        assert torch.equal(_kth_smallest(scores, count), scores.kthvalue(count, 1, keepdim=True).values)


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "2-4", "structured", "", "-1:4"])
def test_a_wrong_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="expected the pattern unstructured or N:M"):
        parse_pattern(pattern)
