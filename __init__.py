"""secateur: search for the rules by which a large language model is pruned.

A search in Python, from a model to a pruned one:

    import secateur

    secateur.calibrate("model", "cal", text="wiki.txt")
    run = secateur.run_search("cal", "runs/a", sparsity=0.6, budget=200)
    run                       # the verdict and the front
    run.frame()               # a DataFrame, one row a candidate
    run.prune("pruned", text="wiki.txt")

What people ask for is a function: ``calibrate``, ``run_search``, ``run_seeds``, ``resume``, ``open``,
``open_many``, ``measure``, ``plan``, ``compare``, ``report``, ``plot``, ``snapshot``, ``export``,
``import_rule``, ``prune``, ``evaluate``, ``submit``. ``SearchSettings`` describes every setting of a search.
``run`` is the loop itself, for those who bring a searcher or an evaluator of their own. Every error that a
user can mend is a ``SecateurError``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it; no name is that of a folder, which would hide it once the folder
# has been imported. Nothing is imported before it is asked for, so that
# `import secateur` and `secateur --help` stay fast on a machine where torch takes seconds.
_HOMES = {
    "ALLOCATIONS": "search.spaces.allocation",
    "Abilities": "search.searchers.abilities",
    "Allocation": "search.spaces.allocation",
    "Archive": "results.archive.archive",
    "ArchiveError": "results.archive.database",
    "BeginningError": "results.archive.database",
    "Budget": "search.core.budget",
    "COLUMN": "metrics_dsl.operators",
    "Calibration": "workers.calibrate.folder",
    "CalibrationError": "workers.calibrate.folder",
    "CalibrationRequest": "workers.calibrate.calibration",
    "Candidate": "search.core.candidate",
    "CandidateRecord": "results.export.candidate_record",
    "CheckpointError": "workers.prune.checkpoint",
    "Cluster": "workers.cluster.settings",
    "Decoder": "workers.model.decoder",
    "Dense": "search.spaces.allocation",
    "Device": "workers.measure.worker",
    "Dispatcher": "workers.cluster.dispatch",
    "EXPORTERS": "results.export.exporters",
    "Encoding": "search.spaces.variables",
    "EvaluationError": "workers.prune.evaluation",
    "EvaluationRequest": "workers.prune.evaluation",
    "Evaluator": "search.core.protocols",
    "ExportError": "results.export.candidate_record",
    "Exporter": "results.export.exporters",
    "Expression": "metrics_dsl.expression",
    "FULL": "metrics_dsl.operators",
    "Funnel": "search.loop",
    "Job": "service.jobs",
    "JobError": "service.jobs",
    "JobServer": "service.jobs",
    "LEAVES": "metrics_dsl.operators",
    "Layer": "search.core.candidate",
    "Leaf": "metrics_dsl.operators",
    "Listener": "service.search_run",
    "LocalEvaluator": "workers.measure.local_evaluator",
    "Machine": "workers.plan.plan",
    "Measurement": "search.core.candidate",
    "MetricError": "metrics_dsl.expression",
    "ModelError": "workers.model.errors",
    "OBJECTIVES": "search.core.objectives",
    "OPERATORS": "metrics_dsl.operators",
    "Objective": "search.core.objectives",
    "Operator": "metrics_dsl.operators",
    "PUBLISHED": "metrics_dsl.published",
    "Plugin": "metrics_dsl.plugins",
    "PluginError": "metrics_dsl.plugins",
    "Problem": "search.spaces.problem",
    "PruneRequest": "service.prune_model",
    "PruningError": "workers.prune.pruning",
    "Published": "metrics_dsl.published",
    "REPAIRS": "workers.prune.repair",
    "ROW": "metrics_dsl.operators",
    "RateError": "workers.plan.rates",
    "RayEvaluator": "workers.cluster.ray_evaluator",
    "RememberingEvaluator": "results.archive.remembering",
    "Repair": "workers.prune.repair",
    "RepairError": "workers.prune.repair",
    "Repaired": "workers.prune.repair",
    "RuleError": "results.export.rule_source",
    "Run": "service.run",
    "Runs": "service.runs",
    "SCALAR": "metrics_dsl.operators",
    "SEARCHERS": "search.searchers.table",
    "ScoreError": "workers.measure.shard",
    "SearchPlan": "service.plan_search",
    "SearchSettings": "search.settings",
    "Searcher": "search.core.protocols",
    "SearcherRow": "search.searchers.table",
    "SecateurError": "metrics_dsl.errors",
    "SettingsError": "search.toml",
    "Shape": "metrics_dsl.operators",
    "Submission": "service.submission",
    "TextError": "workers.calibrate.documents",
    "Tokens": "workers.plan.plan",
    "Trial": "search.core.candidate",
    "WorkerError": "workers.measure.worker",
    "WorkerOptions": "workers.measure.worker",
    "apply_masks": "results.export.masks_file",
    "build_searcher": "search.searchers.table",
    "calibrate": "service.measure_rule",
    "canonical": "metrics_dsl.canonical",
    "compare": "service.reporting",
    "connected": "workers.cluster.connection",
    "evaluate": "service.prune_model",
    "export": "service.exchange",
    "import_rule": "service.exchange",
    "make_plan": "workers.plan.plan",
    "measure": "service.measure_rule",
    "measure_rates": "workers.plan.rates",
    "open": "service.run",
    "open_many": "service.runs",
    "order_form": "metrics_dsl.order",
    "outline": "workers.plan.model_sizes",
    "parse": "metrics_dsl.parser",
    "plan": "service.plan_search",
    "plot": "service.reporting",
    "prune": "service.prune_model",
    "read_masks": "results.export.masks_file",
    "report": "service.reporting",
    "resume": "service.runs",
    "run": "search.loop",
    "run_search": "service.run",
    "run_seeds": "service.runs",
    "score": "metrics_dsl.score",
    "snapshot": "service.reporting",
    "spread": "search.spaces.allocation",
    "submit": "service.jobs",
    "tokens_per_step": "workers.measure.windows",
    "uniform": "search.core.candidate",
    "use_plugin": "metrics_dsl.plugins",
    "weight_matrix": "workers.model.decoder",
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
