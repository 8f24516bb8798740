"""What tests of exports share: records, a run with layers, statistics of a made-up layer."""

import random
from dataclasses import asdict

import torch
from secateur.metrics_dsl.expression import MetricError
from secateur.metrics_dsl.operators import COLUMN, FULL, LEAVES, ROW
from secateur.metrics_dsl.order import order_form
from secateur.metrics_dsl.parser import parse
from secateur.metrics_dsl.published import PUBLISHED
from secateur.metrics_dsl.score import score
from secateur.results.archive.archive import Archive
from secateur.results.export.candidate_record import CandidateRecord
from secateur.search.core.candidate import Candidate, Measurement, Trial, uniform
from secateur.search.spaces.metric_space import MetricSpace
from support import FakeEvaluator

LAYERS = FakeEvaluator.layers
SHAPE = (24, 32)


def record(text, ratio=0.5, group="row", pattern="unstructured", layers=LAYERS, **facts):
    metric = parse(text) if isinstance(text, str) else text
    ratios = ratio if isinstance(ratio, tuple) else (ratio,) * len(layers)
    return CandidateRecord(Candidate(metric, ratios, group), tuple(layers), pattern, **facts)


def make_run(folder, layers=LAYERS):
    """A run with measured, alias, rejected and failed rows; its best one has uneven ratios."""
    ratios = tuple(0.25 + 0.5 * i / (len(layers) - 1) for i in range(len(layers)))
    best = Candidate(parse("abs(W) * X"), ratios)

    def trial(text, kl, status="measured", **facts):
        candidate = uniform(parse(text), layers, 0.5)
        return Trial(candidate, Measurement("model", (), {"kl": kl, "sparsity": 0.5}, 1.5), status, **facts)

    screened = Measurement("screen", (), {"layer_error": 3.0, "sparsity": 0.5})
    trials = [
        Trial(best, Measurement("model", (), {"kl": 0.5, "sparsity": 0.5}, 2.0, tokens=100), "measured"),
        trial("abs(W)", 2.0),
        trial("2 * abs(W)", 2.0, "alias", alias_of=trial("abs(W)", 2.0).candidate.key),
        trial("abs(W) * V", 0.75),
        trial("square(W) * X**1.2 * G", 0.75),
        Trial(uniform(parse("W"), layers, 0.5), screened, "rejected"),
        Trial(uniform(parse("exp(W)"), layers, 0.5), Measurement("screen", failure="not finite"), "failed"),
    ]
    with Archive(folder, write=True) as archive:
        archive.keep(
            objectives=["kl", "size"], baselines={best.key: "wanda"}, pattern="unstructured",
            layers=[asdict(layer) for layer in layers], calibration="c" * 64, versions={"torch": "2"},
        )  # fmt: skip
        archive.add(trials)
    return trials


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
