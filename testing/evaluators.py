"""The contract of evaluators, one check a promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np

from ..metrics_dsl.operators import FULL, LEAVES
from ..metrics_dsl.parser import parse
from ..metrics_dsl.published import PUBLISHED
from ..search.core.candidate import STAGES, Candidate, Measurement, uniform
from ..search.core.protocols import Evaluator
from .expecting import expect


def _asked(evaluator: Evaluator, sparsity: float = 0.6) -> list[Candidate]:
    known = [p.expression for p in PUBLISHED.values() if p.expression.leaves <= evaluator.leaves]
    return [uniform(metric, evaluator.layers, sparsity) for metric in known]


def _figures(m: Measurement) -> tuple[Any, ...]:
    return m.stage, m.layer_errors, dict(m.values), m.fingerprint, m.failure


def _order(evaluator: Evaluator) -> None:
    """Every candidate has a measurement of the stage, in order, and is reported once."""
    for stage in STAGES:
        asked = _asked(evaluator)
        told_of: list[tuple[Candidate, Measurement]] = []
        found = evaluator.measure(asked, stage, done=told_of.extend)
        expect(
            [m.stage for m in found] == [stage] * len(asked), f"expected a measurement of {stage} for each"
        )
        reported = {c.key: m for c, m in told_of}
        expect(len(told_of) == len(asked), f"expected each candidate to be reported once, got {len(told_of)}")
        same = all(_figures(reported[c.key]) == _figures(m) for c, m in zip(asked, found, strict=True))
        expect(same, "expected what is reported to be what is returned, in the order asked")


def _company(evaluator: Evaluator) -> None:
    """What is measured of a candidate does not depend on its companions."""
    asked = _asked(evaluator)
    for stage in STAGES[:2]:
        together = evaluator.measure(asked, stage)
        alone = [evaluator.measure([c], stage)[0] for c in asked]
        same = all(_figures(a) == _figures(b) for a, b in zip(together, alone, strict=True))
        expect(same, f"expected the figures of {stage} to be those of a candidate measured alone")


def _sparsity(evaluator: Evaluator) -> None:
    """The sparsity is counted, and never above what was asked for."""
    for sparsity, stage in product((0.0, 0.33, 0.5, 0.99), STAGES):
        (found,) = evaluator.measure(_asked(evaluator, sparsity)[:1], stage)
        got = found.values.get("sparsity", -1.0)
        expect(
            -1e-9 <= got <= sparsity + 1e-9, f"expected a counted sparsity of {sparsity} at most, got {got}"
        )


def _mistakes(evaluator: Evaluator) -> None:
    """A candidate's mistake is a sentence in its measurement, and its companions are measured."""
    asked = [uniform(parse(t), evaluator.layers, 0.5) for t in ("exp(80 + W) * exp(80 + X) + W", "abs(W)")]
    for stage in STAGES:
        first, second = evaluator.measure(asked, stage)
        expect(first.failure and not first.values, "expected a failure of scores that are not finite")
        expect(
            second.values and not second.failure, f"expected figures beside a failure, got {second.failure}"
        )
    try:
        evaluator.measure([Candidate(parse("W"), (0.5,) * (len(evaluator.layers) + 1))], "screen")
    except ValueError:
        return
    raise AssertionError("expected the wrong number of ratios to be refused with a ValueError")


def _summaries(evaluator: Evaluator) -> None:
    """Summaries have one number a block, and quantiles of each layer ascend."""
    blocks = len({layer.block for layer in evaluator.layers})
    found = evaluator.summarise(parse("abs(W)"), ["mean", "outliers_5", "quantiles"])
    for name in ("mean", "outliers_5"):
        expect(
            found[name].shape == (blocks,), f"expected {blocks} numbers of {name}, got {found[name].shape}"
        )
    quantiles = found["quantiles"]
    expect(len(quantiles) == len(evaluator.layers), "expected a row of quantiles a layer")
    expect((np.diff(quantiles, axis=1) >= 0).all(), "expected quantiles that ascend")


EVALUATOR_CHECKS: Mapping[str, Callable[[Evaluator], None]] = {
    "order": _order,
    "company": _company,
    "sparsity": _sparsity,
    "mistakes": _mistakes,
    "summaries": _summaries,
}


def check_evaluator(make: Callable[[], Evaluator]) -> None:
    """Hold an evaluator to the contract; it is closed in the end."""
    evaluator = make()
    try:
        expect(evaluator.layers, "expected layers to prune, got none")
        expect(
            any(LEAVES[n].shape == FULL for n in evaluator.leaves), "expected a leaf that tells weights apart"
        )
        for check in EVALUATOR_CHECKS.values():
            check(evaluator)
    finally:
        evaluator.close()
