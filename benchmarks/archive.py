"""What reading a run of 100,000 candidates costs, and reading one that is being written.

    .venv/bin/python benchmarks/archive.py [FOLDER]

Prints a Markdown table; benchmarks/archive.md holds one with its machine and commit.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import secateur
from secateur import Archive, Candidate, Measurement, Trial, parse, snapshot

CANDIDATES, LAYERS, BATCH = 100_000, 210, 1_000


def write(folder: Path) -> float:
    """Write a run of the size of SmolLM2-135M's, a batch a transaction; return the seconds."""
    rng = np.random.default_rng(0)
    metric, seconds = parse("abs(W) * X"), 0.0
    with Archive(folder, write=True) as archive:
        layers = [{"name": f"layer {i}", "block": i // 7, "kind": f"kind {i % 7}", "rows": 64, "columns": 64}
                  for i in range(LAYERS)]  # fmt: skip
        archive.keep(objectives=["kl", "density"], baselines={}, layers=layers)
        for start in range(0, CANDIDATES, BATCH):
            ratios = rng.uniform(0.3, 0.7, (BATCH, LAYERS))
            trials = []
            for row in ratios:
                sparsity = float(row.mean())
                values = {"kl": float(rng.gamma(2.0) + sparsity), "sparsity": sparsity, "perplexity": 9.0}
                found = Measurement("model", (), values, 1.0, "", f"{start}", 2048)
                trials.append(Trial(Candidate(metric, tuple(row.tolist())), found, "measured"))
            began = time.perf_counter()
            archive.add(trials)
            seconds += time.perf_counter() - began
    return seconds


def best_of(work: Callable[[], object], times: int = 5) -> float:
    """Return the least seconds of some runs."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def main() -> None:
    """Write a run if there is none, and read it in every way."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "run"
    written = None if (folder / "archive.sqlite").is_file() else write(folder)
    archive = secateur.open(folder)
    size = (folder / "archive.sqlite").stat().st_size
    print(f"{CANDIDATES:,} candidates of {LAYERS} layers, {size / 1e6:.0f} MB\n")
    print("| what | seconds |\n|---|---|")
    if written is not None:
        print(f"| `add`, {BATCH} a transaction | {written:.2f} in all |")
    rows = archive.frame()
    for name, work in {
        "`frame()`": archive.frame,
        "`front()`": archive.front,
        "`frame().pareto.front(...)`, of a frame at hand": lambda: rows.pareto.front(["kl", "density"]),
        "`history()`": archive.history,
        "`best()`": archive.best,
        "`layers()` of the front": archive.layers,
        "`secateur snapshot`": lambda: snapshot(archive, folder / "snapshot.parquet"),
    }.items():
        print(f"| {name} | {best_of(work):.3f} |", flush=True)


if __name__ == "__main__":
    main()
