"""What tests of exports share: records, a run with layers, statistics of a made-up layer."""

import random

import torch
from secateur.metrics_dsl.expression import MetricError
from secateur.metrics_dsl.operators import COLUMN, FULL, LEAVES, ROW
from secateur.metrics_dsl.order import order_form
from secateur.metrics_dsl.parser import parse
from secateur.metrics_dsl.published import PUBLISHED
from secateur.metrics_dsl.score import score
from secateur.results.export.candidate_record import CandidateRecord
from secateur.search.core.candidate import Candidate
from secateur.search.spaces.metric_space import MetricSpace
from secateur.testing import LAYERS
from secateur.testing import small_run as make_run

__all__ = ["LAYERS", "make_run"]
SHAPE = (24, 32)


def record(text, ratio=0.5, group="row", pattern="unstructured", layers=LAYERS, **facts):
    metric = parse(text) if isinstance(text, str) else text
    ratios = ratio if isinstance(ratio, tuple) else (ratio,) * len(layers)
    return CandidateRecord(Candidate(metric, ratios, group), tuple(layers), pattern, **facts)


def statistics(seed=0, dtype=torch.float32, shape=SHAPE):
    """Leaves of a layer: weights with ties and zeros, one input that is always 0."""
    draw = torch.Generator().manual_seed(seed)
    sizes = {FULL: shape, COLUMN: (1, shape[1]), ROW: (shape[0], 1)}
    found = {n: torch.randn(sizes[leaf.shape], generator=draw).to(dtype) for n, leaf in LEAVES.items()}
    found = {n: leaf.abs() if LEAVES[n].nonnegative else leaf for n, leaf in found.items()}
    found["W"][:, ::5] = found["W"][:, ::5].round()
    found["X"][0, 3] = 0.0
    return found


def random_metrics(count, leaves="WGXMVYD", group="row", seed=0):
    rng, space = random.Random(seed), MetricSpace(frozenset(leaves), group)
    return [space.draw(rng) for _ in range(count)]


def all_metrics(group):
    return [*(p.expression for p in PUBLISHED.values()), *random_metrics(200, group=group)]


def scored(metric, group, leaves):
    """The scores that the evaluator compares, or None where it refuses them."""
    rows, columns = leaves["W"].shape
    try:
        found = score(order_form(metric, group), leaves).expand(rows, columns)
    except MetricError:
        return None
    low, high = torch.aminmax(found)
    return found if bool((high - low).isfinite()) else None
