"""secateur: search for the rules by which a large language model is pruned."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it; no name is that of a folder, which would hide it once the folder
# has been imported. Nothing is imported before it is asked for, so that
# `import secateur` and `secateur --help` stay fast on a machine where torch takes seconds.
_HOMES = {
    "Abilities": "search.searchers.abilities",
    "Archive": "results.archive.archive",
    "Calibration": "workers.calibrate.folder",
    "Candidate": "search.core.candidate",
    "EXPORTERS": "results.export.exporters",
    "EvaluationRequest": "workers.prune.evaluation",
    "Expression": "metrics_dsl.expression",
    "LocalEvaluator": "workers.measure.local_evaluator",
    "Measurement": "search.core.candidate",
    "Objective": "search.core.objectives",
    "PUBLISHED": "metrics_dsl.published",
    "PruneRequest": "service.prune_model",
    "SEARCHERS": "search.searchers.table",
    "SearchSettings": "search.settings",
    "SearcherRow": "search.searchers.table",
    "Trial": "search.core.candidate",
    "CalibrationRequest": "workers.calibrate.calibration",
    "calibrate": "workers.calibrate.calibration",
    "apply_masks": "results.export.masks_file",
    "canonical": "metrics_dsl.canonical",
    "export": "results.export.exporters",
    "evaluate": "workers.prune.evaluation",
    "order_form": "metrics_dsl.order",
    "open": "results.archive.runs",
    "open_many": "results.archive.runs",
    "parse": "metrics_dsl.parser",
    "parse_metric": "metrics_dsl.parser",
    "read_masks": "results.export.masks_file",
    "prune": "service.prune_model",
    "resume": "service.search_run",
    "run": "search.loop",
    "run_search": "service.search_run",
    "score": "metrics_dsl.score",
    "uniform": "search.core.candidate",
    # What plugins are written with.
    "ALLOCATIONS": "search.spaces.allocation",
    "Allocation": "search.spaces.allocation",
    "Dense": "search.spaces.allocation",
    "COLUMN": "metrics_dsl.operators",
    "FULL": "metrics_dsl.operators",
    "ROW": "metrics_dsl.operators",
    "SCALAR": "metrics_dsl.operators",
    "Shape": "metrics_dsl.operators",
    "LEAVES": "metrics_dsl.operators",
    "Leaf": "metrics_dsl.operators",
    "OPERATORS": "metrics_dsl.operators",
    "Operator": "metrics_dsl.operators",
    "CandidateRecord": "results.export.candidate_record",
    "ExportError": "results.export.candidate_record",
    "Encoding": "search.spaces.variables",
    "Problem": "search.spaces.problem",
    "Evaluator": "search.core.protocols",
    "Searcher": "search.core.protocols",
    "Exporter": "results.export.exporters",
    "Layer": "search.core.candidate",
    "OBJECTIVES": "search.core.objectives",
    "Plugin": "metrics_dsl.plugins",
    "PluginError": "metrics_dsl.plugins",
    "Published": "metrics_dsl.published",
    "REPAIRS": "workers.prune.repair",
    "Repair": "workers.prune.repair",
    "Repaired": "workers.prune.repair",
    "SecateurError": "metrics_dsl.errors",
    "spread": "search.spaces.allocation",
    "use_plugin": "metrics_dsl.plugins",
}

_CALLED = {"open": "open_run"}  # names that would hide a builtin where they are defined

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    found = getattr(import_module(f".{_HOMES[name]}", __name__), _CALLED.get(name, name))
    if name.isupper():  # a table that is asked for holds what installed packages add to it
        import_module(".metrics_dsl.plugins", __name__).fill(found)
    return found


def __dir__() -> list[str]:
    return __all__
