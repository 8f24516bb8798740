"""Contracts: what searchers, evaluators, exporters and other rows are held to, the package's own and yours.

Each ``check_...`` raises an ``AssertionError`` with a sentence on what is wrong. ``FakeEvaluator`` measures
by a formula, at once and without a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "EVALUATOR_CHECKS": "evaluators",
    "EXPORTER_CHECKS": "exporters",
    "FakeEvaluator": "fake",
    "LAYERS": "fake",
    "SEARCHER_CHECKS": "searchers",
    "check_allocation": "rows",
    "check_evaluator": "evaluators",
    "check_exporter": "exporters",
    "check_leaf": "words",
    "check_objective": "rows",
    "check_operator": "words",
    "check_repair": "rows",
    "check_searcher": "searchers",
    "problem": "fake",
    "small_run": "exporters",
    "told": "fake",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur.testing' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
