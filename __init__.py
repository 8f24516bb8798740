"""secateur: search for the rules by which a large language model is pruned."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it; no name is that of a folder, which would hide it once the folder
# has been imported. Nothing is imported before it is asked for, so that
# `import secateur` and `secateur --help` stay fast on a machine where torch takes seconds.
_HOMES = {
    "Archive": "results.archive",
    "Calibration": "workers.statistics",
    "Candidate": "search.candidate",
    "EXPORTERS": "results.exporters",
    "EvaluationRequest": "workers.evaluation",
    "Expression": "metrics_dsl.expression",
    "LocalEvaluator": "workers.local",
    "Measurement": "search.candidate",
    "Objective": "search.objectives",
    "PUBLISHED": "metrics_dsl.published",
    "PruneRequest": "apply",
    "SEARCHERS": "search.searchers",
    "SearchSettings": "search.settings",
    "Trial": "search.candidate",
    "calibrate": "workers.calibration",
    "apply_masks": "results.export_masks",
    "canonical": "metrics_dsl.canonical",
    "export": "results.exporters",
    "evaluate": "workers.evaluation",
    "order_form": "metrics_dsl.order",
    "open": "results.runs",
    "open_many": "results.runs",
    "parse": "metrics_dsl.parser",
    "parse_metric": "metrics_dsl.parser",
    "read_masks": "results.export_masks",
    "prune": "apply",
    "resume": "launch",
    "run": "search.loop",
    "run_search": "launch",
    "score": "metrics_dsl.score",
    "uniform": "search.candidate",
}

_CALLED = {"open": "open_run"}  # names that would hide a builtin where they are defined

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), _CALLED.get(name, name))


def __dir__() -> list[str]:
    return __all__
