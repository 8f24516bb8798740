"""Objectives: numbers to minimise, computed from a trial."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.plugins import fill, guarded, open_table
from .candidate import STAGES, Stage, Trial

T = TypeVar("T")


@dataclass(frozen=True)
class Objective:
    """A number to minimise.

    Attributes:
        name: The name in settings and columns.
        stage: The earliest stage that knows it.
        value: Reads it from a trial; None while the trial lacks the measurement it needs.
        meaning: What it is, with its unit.
        unit: For headings, where the name alone does not say it.
    """

    name: str
    stage: Stage
    value: Callable[[Trial], float | None]
    meaning: str
    unit: str = ""

    @property
    def title(self) -> str:
        """What tables and pictures call it."""
        words = self.name.replace("_", " ")
        return f"{words}, {self.unit}" if self.unit else words


def _measured(name: str, stage: Stage, meaning: str) -> Objective:
    return Objective(name, stage, lambda trial: trial.measurement.values.get(name), meaning)


def density(sparsity: ArrayLike) -> NDArray[np.float64]:
    """Return the share of weights that stays, rounded to four places.

    Ratios are rounded to whole columns, so that candidates of one sparsity differ a little further down;
    such a difference must not make one better than another.
    """
    found: NDArray[np.float64] = np.round(1 - np.asarray(sparsity, dtype=np.float64), 4)
    return found


def _density(trial: Trial) -> float | None:
    sparsity = trial.measurement.values.get("sparsity")
    return None if sparsity is None else float(density(sparsity))


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        _measured("kl", "model", "divergence of the pruned from the dense model's next-token distribution, "
                        "nats per token"),
        _measured("layer_error", "screen", "relative squared error of the layers' outputs, mean over layers"),
        _measured("model_error", "model", "relative squared error of the final hidden states"),
        _measured("perplexity", "model", "exp of the mean negative log-likelihood per token"),
        Objective("density", "screen", _density, "fraction of weights that stay, to four places"),
        Objective("size", "screen", lambda trial: float(trial.candidate.metric.size), "nodes of the metric"),
        Objective("seconds", "screen", lambda trial: trial.measurement.seconds, "time that measuring took"),
    )
}  # fmt: skip


RUNG = "_rung"  # ends the names of what was measured on some of the selection tokens
# Columns of a run's table that are no objectives.
_TAKEN = (
    "key", "status", "stage", "metric", "group", "sparsity", "ratio_min", "ratio_max", "kl_holdout",
    "kl_holdout_error", "kl_rung", "tokens", "worker", "attempts", "baseline", "alias_of", "failure",
    "run", "number", "candidates", "best", "hypervolume", "ratios", "layer_errors",
)  # fmt: skip


def _admitted(objective: Objective, origin: str) -> Objective:
    """Return an objective of somebody else's, checked, with a function whose failures are sentences."""
    name = objective.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name.endswith(RUNG) or name in _TAKEN:
        raise SecateurError(
            f"expected an objective's name in small letters, such as worst_layer, that is no other column "
            f"of a run's table, got {name!r}"
        )
    if objective.stage not in STAGES:
        raise SecateurError(f"expected a stage of {name} among {', '.join(STAGES)}, got {objective.stage!r}")

    def value(trial: Trial) -> float | None:
        if STAGES.index(trial.measurement.stage) < STAGES.index(objective.stage):
            return None
        found = objective.value(trial)
        number = math.nan if found is None else float(found)
        return number if math.isfinite(number) else None  # no front compares what is not finite

    return replace(objective, value=guarded(value, f"the objective {name} of {origin}"))


open_table(OBJECTIVES, Objective, "an objective", "objectives", _admitted)


def look_up(table: Mapping[str, T], name: str, what: str) -> T:
    """Return an entry of a table, of an installed package's too.

    Raises:
        SecateurError: For an unknown name, with the nearest known one.
    """
    if name not in table:
        fill(table)
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "choose one of these"
    raise SecateurError(f"expected {what} among {', '.join(table)}; got {name!r}: {hint}")


def look_up_objectives(names: Iterable[str]) -> list[Objective]:
    """Return the objectives of the names, at least one and each once.

    Raises:
        SecateurError: For an unknown or repeated name, or none at all.
    """
    found = [look_up(OBJECTIVES, name, "an objective") for name in names]
    if not found or len({o.name for o in found}) != len(found):
        raise SecateurError(f"expected different objectives such as kl,size; got {[o.name for o in found]}")
    return found


def rung_point(trial: Trial, objectives: Sequence[Objective]) -> tuple[float, ...] | None:
    """Return a trial's objective values on the tokens of its first rung if there was one, or None.

    All candidates of a race have them, those that it rejected too; they do not compare with values on
    all tokens.
    """
    if trial.measurement.failure:
        return None
    found = trial.measurement.values
    values = {**found, **{n.removesuffix(RUNG): v for n, v in found.items() if n.endswith(RUNG)}}
    measurement = replace(trial.measurement, values=values)
    return point(replace(trial, measurement=measurement, status="measured"), objectives)


def raced_point(trial: Trial, objectives: Sequence[Objective]) -> tuple[float, ...] | None:
    """Return a trial's values on its first rung, which a race's losers have too, or those of ``point``."""
    has_raced = any(name.endswith(RUNG) for name in trial.measurement.values)
    return rung_point(trial, objectives) if has_raced else point(trial, objectives)


def point(trial: Trial, objectives: Sequence[Objective]) -> tuple[float, ...] | None:
    """Return the trial's objective values, or None if it was rejected or lacks one."""
    if trial.measurement.failure or trial.status == "rejected":
        return None
    values = [objective.value(trial) for objective in objectives]
    if any(value is None for value in values):
        return None
    return tuple(float(value) for value in values if value is not None)
