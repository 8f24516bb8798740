"""Planned against measured: each stage's seconds and the worker's memory, back to back.

    python benchmarks/plan.py runs/smollm2-calibration [cpu|cuda [float32|bfloat16]]

On a CPU with one thread and in processor seconds, which other programs on the machine disturb least; on a
GPU by the clock.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch
from secateur import (
    PUBLISHED,
    Calibration,
    Candidate,
    Device,
    LocalEvaluator,
    Machine,
    Tokens,
    make_plan,
    measure_rates,
    outline,
    tokens_per_step,
    uniform,
)


def best_of(times: int, work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return the least seconds of some runs after one that warms up."""
    work()
    found = []
    for _ in range(times):
        start = clock()
        work()
        found.append(clock() - start)
    return min(found)


def main() -> None:
    """Plan, measure, and print the table."""
    device, dtype = [*sys.argv[2:], *("cpu", "float32")[len(sys.argv) - 2 :]]
    clock = time.process_time if device == "cpu" else time.perf_counter
    time.perf_counter = clock  # rates are measured by it too
    calibration = Calibration(sys.argv[1])
    counts = {
        name: part["sequences"] * part["length"] for name, part in calibration.manifest["parts"].items()
    }
    length = calibration.manifest["parts"]["statistics"]["length"]
    tokens = Tokens(counts["statistics"], counts["selection"], counts["holdout"], length)
    sizes = outline(
        calibration.model_source,
        tokens=tokens.statistics,
        length=length,
        gradients=bool(calibration.manifest["gradients"]),
    )
    found = measure_rates(sizes.layers, torch.device(device), dtype, 1)
    plan = make_plan(sizes, Machine(device, 1, 1 << 40, dtype=dtype), tokens, found)
    start = time.perf_counter()
    evaluator = LocalEvaluator(calibration, device=Device(device, dtype, 1))
    print(f"{evaluator.accelerator or device}, {dtype}; loaded in {time.perf_counter() - start:.1f} s")
    layers = evaluator.layers
    published = [uniform(metric.expression, layers, 0.6) for metric in PUBLISHED.values()]
    wanda = uniform(PUBLISHED["wanda"].expression, layers, 0.6)
    own, many = tokens_per_step(tokens.statistics), len(published)
    # Ratios that begin differently: nothing of one candidate's way serves the next.
    fresh = iter([Candidate(wanda.metric, (r, *wanda.ratios[1:])) for r in (0.5, 0.55, 0.65, 0.7, 0.75)])
    measured = {
        "screen": best_of(2, lambda: evaluator.measure(published, "screen"), clock) / many,
        "layer": best_of(2, lambda: evaluator.measure([wanda], "layer"), clock),
        "model": best_of(1, lambda: evaluator.measure([next(fresh)], "model"), clock),
        "sensitivity": best_of(
            1, lambda: evaluator.measure([next(fresh)], "sensitivity", "statistics", own), clock
        ),
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":  # beside what torch holds, the driver and libraries hold some
        free, whole = torch.cuda.mem_get_info()
        peak = whole - free
    print(f"{'':12} {'planned':>9} {'measured':>9} {'planned / measured':>20}")
    for stage, seconds in measured.items():
        print(f"{stage:12} {plan.seconds[stage]:9.3f} {seconds:9.3f} {plan.seconds[stage] / seconds:20.2f}")
    print(f"{'memory, GiB':12} {plan.peak / 2**30:9.2f} {peak / 2**30:9.2f} {plan.peak / peak:20.2f}")
    evaluator.close()


if __name__ == "__main__":
    main()
