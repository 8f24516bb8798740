"""The contract of searchers, one check a promise."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product

import numpy as np

from ..metrics_dsl.parser import parse, parse_metric
from ..search.core.candidate import Measurement, Trial
from ..search.core.objectives import look_up
from ..search.core.protocols import Searcher
from ..search.searchers.table import SEARCHERS, SearcherRow
from ..search.spaces.problem import FixedRatios, Problem
from ..search.spaces.varied import SPACES
from .expecting import expect
from .fake import LAYERS, problem, told


def _made(row: SearcherRow, wanted: Problem, seed: int = 0) -> Searcher:
    return row.build(wanted, seed, row.can.batch)


def _completeness(row: SearcherRow, space: str) -> None:
    """Proposals have a ratio a layer, hold the sparsity and use the leaves that there are."""
    sizes = [layer.size for layer in LAYERS]
    for candidate in _made(row, problem(leaves="WX", space=space)).ask(10):
        expect(len(candidate.ratios) == len(LAYERS), f"{row.name} proposed other than one ratio a layer")
        expect(candidate.metric.leaves <= set("WX"), f"{row.name} proposed a leaf that there is not")
        expect(
            parse_metric(str(candidate.metric)) == candidate.metric, f"{candidate.metric} does not read back"
        )
        removed = sum(r * size for r, size in zip(candidate.ratios, sizes, strict=True)) / sum(sizes)
        expect(abs(removed - 0.5) <= 1e-3, f"{row.name} was to remove 0.5 of the weights, got {removed:g}")


def _repeatability(row: SearcherRow, space: str) -> None:
    """One seed gives one search, whatever other threads draw from the global generators; these stay alone."""
    expected = told(_made(row, problem(space=space), 5))
    random.seed(99)
    np.random.seed(99)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    expect(told(_made(row, problem(space=space), 5)) == expected, f"{row.name} repeats no search of its seed")
    after = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    expect(after == before, f"{row.name} draws from the global generators")
    is_over = threading.Event()

    def draw() -> None:
        while not is_over.is_set():
            random.random()
            np.random.random()

    other = threading.Thread(target=draw)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # as often as can be, so that it happens within the few draws of a batch
    other.start()
    try:
        found = told(_made(row, problem(space=space), 5))
    finally:
        is_over.set()
        other.join()
        sys.setswitchinterval(interval)
    expect(found == expected, f"{row.name} draws from generators that other threads draw from")


def _endurance(row: SearcherRow, space: str) -> None:
    """It goes on after batches that failed or were rejected."""
    searcher = _made(row, problem(space=space))
    for status in ("failed", "rejected"):
        failure = "broken" if status == "failed" else ""
        searcher.tell([Trial(c, Measurement("screen", failure=failure), status) for c in searcher.ask(6)])
    expect(searcher.ask(3), f"{row.name} proposes nothing after failures and rejects")


def _objectives(row: SearcherRow, space: str) -> None:
    """It works with as many objectives as its row says."""
    if row.can.objectives != "one":
        for objectives in ("kl,size", "kl,size,perplexity,model_error"):
            wanted = problem(objectives, space=space)
            expect(told(_made(row, wanted), rounds=3), f"{row.name} proposes nothing for {objectives}")


def _interval(row: SearcherRow, space: str) -> None:
    """Sparsities are searched too where it can vary them beside the rest."""
    wanted = problem("kl,density", space=space, sparsity=(0.3, 0.75))
    one_at_a_time = row.can.sensitivities == "needs"
    if row.can.objectives == "one" or one_at_a_time or not row.can.can_vary(wanted.varied):
        return
    means = [float(np.mean(c.ratios)) for c in _made(row, wanted).ask(20)]
    spread = 0.25 < min(means) < 0.5 < max(means) < 0.8
    expect(
        spread, f"{row.name} was to cover sparsities 0.3 to 0.75, got {min(means):.2f} to {max(means):.2f}"
    )


def _starts(row: SearcherRow, space: str) -> None:
    """Of trees, what the user starts from is asked first."""
    plain = problem(space=space)
    if plain.trees is None:
        return
    ratios = FixedRatios(LAYERS).ratios((), 0.5)
    given = [plain.encoding(parse(text), ratios, 0.5) for text in ("abs(W) * sqrt(V)", "square(W) / D")]
    starts = [encoding for encoding in given if encoding is not None]
    asked = _made(row, replace(plain, starts=starts)).ask(8)
    expected = {plain.candidate(encoding).key for encoding in starts}
    expect({c.key for c in asked} >= expected, f"{row.name} does not ask for its problem's starts first")


SEARCHER_CHECKS: Mapping[str, Callable[[SearcherRow, str], None]] = {
    "completeness": _completeness,
    "repeatability": _repeatability,
    "endurance": _endurance,
    "objectives": _objectives,
    "interval": _interval,
    "starts": _starts,
}


def check_searcher(searcher: str | SearcherRow) -> None:
    """Hold a searcher to the contract on every space that its row says it can search."""
    row = searcher if isinstance(searcher, SearcherRow) else look_up(SEARCHERS, searcher, "a searcher")
    names = [
        name for name in (*SPACES, "tree+curve", "meta+layer") if row.can.can_vary(problem(space=name).varied)
    ]
    expect(names, f"the row of {row.name} says that it can search nothing")
    for space, check in product(names, SEARCHER_CHECKS.values()):
        check(row, space)
