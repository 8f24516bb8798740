"""The contracts of objectives, allocations and repairs."""

from __future__ import annotations

import math

import numpy as np

from ..metrics_dsl.parser import parse
from ..search.core.candidate import Measurement, Trial, uniform
from ..search.core.objectives import OBJECTIVES, Objective, look_up, point
from ..search.spaces.allocation import ALLOCATIONS, Allocation
from .expecting import expect
from .fake import DENSE, LAYERS, FakeEvaluator


def check_objective(objective: str | Objective) -> None:
    """Hold an objective to having a finite value once its stage is measured, and none of what failed."""
    row = objective if isinstance(objective, Objective) else look_up(OBJECTIVES, objective, "an objective")
    expect(row.meaning, f"expected {row.name} to say what it means")
    candidate = uniform(parse("abs(W)"), LAYERS, 0.5)
    (found,) = FakeEvaluator().measure([candidate], "model")
    values = {point(Trial(candidate, found, "measured"), [row]) for _ in range(2)}
    expect(None not in values, f"expected {row.name} to have a value of a candidate that was measured")
    expect(len(values) == 1, f"expected {row.name} to have one value of one trial, got {values}")
    ((value,),) = values  # type: ignore[misc]
    expect(math.isfinite(value), f"expected {row.name} to be finite, got {value}")
    failed = Trial(candidate, Measurement("screen", failure="no"), "failed")
    expect(point(failed, [row]) is None, f"expected {row.name} to have no value of a candidate that failed")


def check_allocation(allocation: str | Allocation) -> None:
    """Hold an allocation to a ratio a layer in [0, 1) that together remove what is asked for."""
    row = (
        allocation
        if isinstance(allocation, Allocation)
        else look_up(ALLOCATIONS, allocation, "an allocation")
    )
    for sparsity in (0.3, 0.5, 0.7):
        found = row.variants(DENSE, sparsity)
        expect(found, f"expected ratios of {row.name}, got none")
        for label, ratios in found.items():
            expect(len(ratios) == len(LAYERS), f"expected a ratio a layer of {label}, got {len(ratios)}")
            expect(all(0 <= r < 1 for r in ratios), f"expected ratios in [0, 1) of {label}, got {ratios}")
            removed = float(np.average(ratios, weights=[layer.size for layer in LAYERS]))
            expect(abs(removed - sparsity) <= 0.01, f"{label} was to remove {sparsity:g}, got {removed:.4g}")
        expect(len(found) > 1 or row.name in found, f"expected the variant {row.name}, got {list(found)}")


def check_repair(repair: str | object) -> None:
    """Hold a repair to finite weights of the layer's shape in which what was removed stays removed."""
    import torch

    from ..workers.prune.repair import REPAIRS, Repair

    row = repair if isinstance(repair, Repair) else look_up(REPAIRS, str(repair), "a repair")
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(24, 32, generator=draw)
    inputs = torch.randn(96, 32, generator=draw) + 0.3
    gram, before = inputs.T @ inputs / len(inputs), weights.clone()
    for share in (0.0, 0.5, 0.9):
        removed = torch.rand(24, 32, generator=draw) < share
        new, shift = row(weights, removed, gram, inputs.mean(0))
        expect(
            new.shape == weights.shape, f"expected weights of {tuple(weights.shape)}, got {tuple(new.shape)}"
        )
        expect(bool(new.isfinite().all()), f"expected {row.name} to give finite weights")
        expect(not bool(new[removed].count_nonzero()), f"expected {row.name} to leave what is removed at 0")
        expect(
            shift is None or tuple(shift.shape) == (24,), f"expected a number a row as shift of {row.name}"
        )
        expect(torch.equal(weights, before), f"expected {row.name} to leave the dense weights as they are")
