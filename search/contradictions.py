"""Contradictions: settings that exclude each other or would be without effect, and what a searcher cannot do.

Two tables of conditions with the sentences that say so. Of several that hold the first is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .core.budget import Budget
from .core.candidate import Stage
from .searchers.abilities import Abilities
from .searchers.table import SEARCHERS, SearcherRow
from .spaces.varied import SPACES, Varied, together


class Asked(Protocol):
    """What is read of settings."""

    space: str
    metric: str | None
    allocation: str | None
    sparsity: float | tuple[float, float]
    pattern: str
    objectives: tuple[str, ...]
    budget: int | str
    batch: int | None
    sensitivity: int | None
    phase: int
    stage: Stage

    @property
    def metric_space(self) -> str:
        """The space of metrics, or nothing."""

    @property
    def ratio_space(self) -> str:
        """The space of ratios, or nothing."""


# What holds of settings that contradict themselves, and the sentence, which is formatted with them.
_OF_ANY: tuple[tuple[Callable[[Asked], object], str], ...] = (
    (
        lambda asked: asked.metric is not None and asked.metric_space,
        "expected a given metric or a space of metrics, got both ({asked.metric} and {asked.metric_space}); "
        "leave one out, or search the metric's ratios with --space layer",
    ),
    (
        lambda asked: asked.allocation is not None and asked.ratio_space,
        "expected a given allocation or a space of ratios, got both ({asked.allocation} and "
        "{asked.ratio_space}); leave one out",
    ),
    (
        lambda asked: asked.pattern != "unstructured" and (asked.ratio_space or asked.allocation),
        "expected the pattern unstructured where ratios differ between layers, got {asked.pattern}: a "
        "pattern fixes every ratio",
    ),
    (
        lambda asked: is_interval(asked) and "density" not in asked.objectives,
        "expected density among the objectives of an interval of sparsities, got {objectives}: the least "
        "sparsity would win; add --objectives kl,density",
    ),
    (
        lambda asked: "density" in asked.objectives and not is_interval(asked),
        "expected an interval of sparsities such as 0.3:0.75 for the objective density, got "
        "{asked.sparsity}, which every candidate has",
    ),
    (
        lambda asked: "size" in asked.objectives and not asked.metric_space,
        "expected objectives that differ between candidates, got size with a given metric",
    ),
    (
        lambda asked: asked.stage != "model" and Budget.parse(asked.budget).unit == "tokens",
        "expected a budget of candidates or seconds for the stage {asked.stage}, which runs no tokens, got "
        "{asked.budget}",
    ),
    (
        lambda asked: asked.phase and not (asked.metric_space == "tree" and asked.ratio_space),
        "expected trees and ratios to take turns in phases, got the space {asked.space!r}; leave --phase out",
    ),
)

# What holds of settings that a searcher cannot follow, and the sentence.
_OF_A_SEARCHER: tuple[tuple[Callable[[Asked, Abilities], object], str], ...] = (
    (
        lambda asked, can: asked.phase and not can.phases,
        "expected the searcher {phasing} for phases, got {name!r}",
    ),
    (
        lambda asked, can: asked.metric_space == "tree" and "trees" not in can.searches,
        "expected a searcher of trees ({of_trees}) for the space {asked.space}, got {name!r}, which varies "
        "{searches}; choose another --searcher or --space",
    ),
    (
        lambda asked, can: can.sensitivities == "needs" and not (
            can.can_vary(varied(asked)) and descends(asked, can)
        ),
        "expected a given metric, the objective kl first, the stage model and a space of ratios such as "
        "layer, not feature, for the searcher {name}, got the space {asked.space}, objectives {objectives} "
        "and the stage {asked.stage}; --searcher gp descends in ratios while metrics vary",
    ),
    (
        lambda asked, can: asked.sensitivity and not descends(asked, can),
        "expected a searcher that uses sensitivities ({descending}) on ratios, gp at one sparsity, got "
        "{name!r} on {asked.space} at {asked.sparsity}; leave --sensitivity out",
    ),
    (
        lambda asked, can: asked.sensitivity == 0 and can.sensitivities == "needs",
        "expected tokens for the sensitivities that {name} follows, got 0",
    ),
    (
        lambda asked, can: can.searches == ("one number",) and not can.can_vary(varied(asked)),
        "expected a space of one number ({one_number}) and one sparsity for the searcher {name}, got the "
        "space {asked.space} and the sparsity {asked.sparsity}",
    ),
    (
        lambda asked, can: not can.can_vary(varied(asked)),
        "expected a space of {searches} alone, such as {example}, for the searcher {name}, got "
        "{asked.space}{interval}",
    ),
    (
        lambda asked, can: can.most_batch and (asked.batch or can.batch) > can.most_batch,
        "expected batches of at most {can.most_batch} for the searcher {name}{reason}, got {asked.batch}",
    ),
    (
        lambda asked, can: (asked.batch or can.batch) < can.least_batch,
        "expected batches of at least {can.least_batch} for the searcher {name}{reason}, got {asked.batch}",
    ),
    (
        lambda asked, can: can.objectives == "one" and len(asked.objectives) > 1,
        "expected one objective for the searcher {name}, got {objectives}; choose another --searcher for "
        "several, such as nsga3",
    ),
    (
        lambda asked, can: can.objectives == "kl first" and asked.objectives[0] != "kl",
        "expected the objective kl first for the searcher {name}, got {objectives}",
    ),
)  # fmt: skip


def is_interval(asked: Asked) -> bool:
    """Return whether sparsities are searched too."""
    return isinstance(asked.sparsity, tuple)


def varied(asked: Asked) -> frozenset[Varied]:
    """Return what a searcher has to vary."""
    own: tuple[Varied, ...] = ("one number",) if is_interval(asked) else ()
    return together([*(part for name in asked.space.split("+") for part in SPACES[name]), *own])


def descends(asked: Asked, can: Abilities) -> bool:
    """Return whether a searcher uses how KL changes with each ratio: it leads nowhere among choices."""
    return (
        (can.sensitivities == "needs" or (can.sensitivities == "can" and not is_interval(asked)))
        and asked.ratio_space != ""
        and "choices" not in SPACES[asked.ratio_space]
        and asked.stage == "model"
        and asked.objectives[0] == "kl"
    )


def contradiction(asked: Asked) -> str:
    """Return a sentence on what contradicts itself whoever searches; nothing if all fits."""
    for holds, text in _OF_ANY:
        if holds(asked):
            return text.format(asked=asked, objectives=",".join(asked.objectives))
    return ""


def objection(asked: Asked, row: SearcherRow) -> str:
    """Return a sentence on why a searcher cannot do what is asked; nothing if it can."""
    can = row.can
    text = next((text for holds, text in _OF_A_SEARCHER if holds(asked, can)), "")
    return text.format(
        asked=asked,
        can=can,
        name=row.name,
        objectives=",".join(asked.objectives),
        reason=f", {can.batch_reason}" if can.batch_reason else "",
        searches=" and ".join(can.searches),
        interval=" over an interval of sparsities" if is_interval(asked) else "",
        example=next((name for name, parts in SPACES.items() if can.can_vary(together(parts))), "none"),
        one_number=", ".join(name for name, parts in SPACES.items() if parts == ("one number",)),
        of_trees=_names(lambda other: "trees" in other.searches),
        phasing=_names(lambda other: other.phases),
        descending=_names(lambda other: other.sensitivities != "no"),
    )


def choose(asked: Asked) -> tuple[str, str]:
    """Return the searcher that is best for what is asked, and a sentence on why it was chosen.

    Descent, which a backward pass shows the way, for several numbers of a given metric's ratios; genetic
    programming for all else.
    """
    why = f"chosen for the space {asked.space}; --searcher names another"
    if "numbers" not in SPACES[asked.ratio_space or "tree"] or asked.metric_space:
        return "gp", f"the searcher is gp, {why}"
    if against := objection(asked, SEARCHERS["descent"]):
        return "gp", f"the searcher is gp, {why} (descent cannot: {against})"
    return "descent", f"the searcher is descent, {why}"


def _names(which: Callable[[Abilities], bool]) -> str:
    return ", ".join(name for name, row in SEARCHERS.items() if which(row.can))
