"""The loop: ask, leave out what is known, measure by stages, tell. The only one there is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..metrics_dsl.errors import SecateurError
from .core import defaults
from .core.budget import Budget
from .core.candidate import STAGES, Candidate, Measurement, Stage, Trial
from .core.objectives import RUNG, Objective, point
from .core.protocols import Evaluator, Searcher
from .core.selection import best_first

# Between metrics whose screen errors differ by less (as a share), KL at 60 % on SmolLM2-135M does not
# follow the error: it ranges over 4 % with no trend.
INDIFFERENCE = 0.04
PATIENCE = 20  # batches that cost nothing, for nothing is new or all fails, before a search ends


@dataclass(frozen=True)
class Funnel:
    """Successive halving: how candidates pass from cheap measurements to the stage that decides.

    Args:
        objectives: What the search minimises.
        batch: Candidates asked for at a time; a searcher learns between batches.
        promote: Share of a batch's candidates that goes on from the screen and from each rung.
        last: The stage that decides.
        always: Keys of candidates that are promoted whatever is found (baselines).
        screen: Errors within this share of each other are alike to the screen; without a screen, None.
        rungs: Tokens of the model stage that candidates race on, growing, before all of them.
        sensitivity: Tokens on which the best of a batch is asked for its sensitivities; 0 asks none.
    """

    objectives: Sequence[Objective]
    batch: int = defaults.BATCH
    promote: float = defaults.PROMOTE
    last: Stage = "model"
    always: frozenset[str] = field(default=frozenset(), repr=False)
    screen: float | None = INDIFFERENCE
    rungs: tuple[int, ...] = ()
    sensitivity: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise SecateurError(f"expected a batch of at least 1, got {self.batch}")
        if not 0 < self.promote <= 1:
            raise SecateurError(f"expected a promoted share in (0, 1], got {self.promote}")
        if self.last not in STAGES:
            raise SecateurError(f"expected a last stage among {', '.join(STAGES)}, got {self.last!r}")
        if list(self.rungs) != sorted({n for n in self.rungs if n > 0}):
            raise SecateurError(f"expected growing numbers of tokens for the rungs, got {list(self.rungs)}")
        if self.rungs and self.last != "model":
            raise SecateurError(f"expected rungs with the stage model alone, got the stage {self.last!r}")
        names = [objective.name for objective in self.objectives]
        if self.screen is None and self.last == "model" and "layer_error" in names:
            raise SecateurError(
                "expected objectives of the model stage where ratios or sparsities differ, got layer_error, "
                "which does not compare between them; add --stage layer to minimise it all the same"
            )
        for objective in self.objectives:
            if STAGES.index(objective.stage) > STAGES.index(self.last):
                raise SecateurError(
                    f"expected objectives that the stage {self.last!r} measures, got "
                    f"{objective.name!r}, which needs the stage {objective.stage!r}"
                )

    @property
    def first(self) -> Stage:
        """The stage that every candidate goes through."""
        return "screen" if self.screen is not None else self.last

    def choose(self, screened: Sequence[Trial]) -> set[str]:
        """Return the keys of the candidates that the screen promotes.

        Of metrics with the same ratios the least screen errors win; between allocations errors do not
        tell, so every one of them promotes its share. Errors that are alike say nothing about the model and
        are taken in the order of their keys, which is as good as chance. Taking them in the order of the
        error would promote nothing but copies of the metric with the least.
        """
        errors = {t.candidate.key: t.measurement.values["layer_error"] for t in screened}
        if self.last == "screen" or self.screen is None:
            return set(errors)
        alike = self.screen
        chosen = set(errors) & self.always
        by_ratios: dict[tuple[float, ...], list[str]] = {}
        for trial in screened:
            if trial.candidate.key not in chosen:
                by_ratios.setdefault(trial.candidate.ratios, []).append(trial.candidate.key)
        for waiting in by_ratios.values():
            least = min(errors[key] for key in waiting) or 1.0
            waiting.sort(key=lambda key: (int(math.log(max(errors[key] / least, 1.0)) / alike), key))
            chosen |= set(waiting[: math.ceil(self.promote * len(waiting))])
        return chosen

    def promote_on_rung(self, raced: Sequence[Trial]) -> set[str]:
        """Return the keys of the candidates that a rung promotes: the best by the objectives on it."""
        chosen = {t.candidate.key for t in raced} & self.always
        known = [(p, key) for p, key in self._points(raced) if key not in chosen]
        order = best_first([p for p, _ in known])[: math.ceil(self.promote * len(known))]
        return chosen | {known[i][1] for i in order}

    def least(self, trials: Sequence[Trial]) -> str:
        """Return the key of the trial with the least first objective, empty for none."""
        return min(self._points(trials), default=((), ""))[1]

    def _points(self, trials: Sequence[Trial]) -> list[tuple[tuple[float, ...], str]]:
        """Return the objectives and the key of each trial that has them, in the order of keys."""
        points = {t.candidate.key: point(replace(t, status="measured"), self.objectives) for t in trials}
        return [(p, key) for key, p in sorted(points.items()) if p is not None]


def run(
    searcher: Searcher, evaluator: Evaluator, funnel: Funnel, budget: Budget | int
) -> Iterator[list[Trial]]:
    """Search until the budget is spent or nothing new is proposed.

    Yields one list of new trials a batch, in the order asked. A candidate whose masks are known, by its
    order form or by the fingerprint of its masks, shares the earlier measurement as an alias, which
    does not count against the budget; one that was asked before is told again and not yielded.

    The loop keeps no state outside its arguments: run again with an evaluator that remembers, it
    repeats itself, which is how a search is resumed.

    Raises:
        SecateurError: When none of the first candidates that were measured to the end has an objective.
    """
    budget = Budget(budget) if isinstance(budget, int) else budget
    known: dict[str, Trial] = {}
    originals: dict[object, str] = {}  # order key or fingerprint -> key of the candidate measured
    spent, idle = 0.0, 0
    while spent < budget.amount and idle < PATIENCE:
        asked = searcher.ask(budget.next_batch(spent, funnel.batch))
        if not asked:
            return
        fresh = {c.key: c for c in asked if c.key not in known}
        trials = _measure(list(fresh.values()), evaluator, funnel, known, originals)
        if not any(trial.status == "measured" for trial in known.values()):
            _check_objectives([trial for trial in trials if trial.status == "measured"], funnel)
        known.update((trial.candidate.key, trial) for trial in trials)
        searcher.tell([known[candidate.key] for candidate in asked])
        if trials:
            yield trials
        cost = budget.cost(trials)
        spent += cost
        idle = 0 if cost else idle + 1


def _check_objectives(measured: Sequence[Trial], funnel: Funnel) -> None:
    """Refuse an objective that what is measured does not hold: its front would stay empty."""
    for objective in funnel.objectives:
        if measured and all(objective.value(trial) is None for trial in measured):
            known = ", ".join(sorted(measured[0].measurement.values))
            layers = "errors of all layers" if measured[0].measurement.layer_errors else "no errors of layers"
            raise SecateurError(
                f"expected the objective {objective.name} to have a value once the stage {funnel.last} has "
                f"measured {known} and {layers}, got none for any of {len(measured)} candidates"
            )


def _measure(
    candidates: Sequence[Candidate],
    evaluator: Evaluator,
    funnel: Funnel,
    known: dict[str, Trial],
    originals: dict[object, str],
) -> list[Trial]:
    """Return the trials of candidates not seen before, in order."""
    alias: dict[str, str] = {}
    going_on: list[Trial] = []
    for candidate in candidates:
        original = originals.setdefault(candidate.order_key, candidate.key)
        if original == candidate.key:
            going_on.append(Trial(candidate, Measurement(funnel.first), "rejected"))
        else:
            alias[candidate.key] = original
    done: dict[str, Trial] = {}
    if funnel.screen is not None:
        screened = _stage(going_on, evaluator, "screen", done)
        distinct = []
        for trial in screened:
            original = originals.setdefault(trial.measurement.fingerprint, trial.candidate.key)
            if original == trial.candidate.key:
                distinct.append(trial)
            else:
                alias[trial.candidate.key] = original
        promoted = funnel.choose(distinct)
        going_on = [trial for trial in distinct if trial.candidate.key in promoted]
    for tokens in funnel.rungs:
        raced = _stage(going_on, evaluator, "model", done, tokens)
        promoted = funnel.promote_on_rung(raced)
        going_on = [done[t.candidate.key] for t in raced if t.candidate.key in promoted]
    if funnel.last != "screen":
        going_on = _stage(going_on, evaluator, funnel.last, done)
    done.update((t.candidate.key, replace(t, status="measured")) for t in going_on)
    if funnel.sensitivity and (key := funnel.least(going_on)):
        done[key] = _with_sensitivities(done[key], evaluator, funnel.sensitivity)
    for candidate in candidates:
        if candidate.key in alias:
            original = alias[candidate.key]
            original = alias.get(original, original)  # found equal by order, then by its masks
            source = known.get(original) or done[original]
            original = source.alias_of or original
            status = "alias" if source.status in ("measured", "alias") else source.status
            done[candidate.key] = Trial(candidate, source.measurement, status, original)
    return [done[candidate.key] for candidate in candidates]


def _stage(
    trials: Sequence[Trial], evaluator: Evaluator, stage: Stage, done: dict[str, Trial], tokens: int = 0
) -> list[Trial]:
    """Measure at one stage; keep all as rejected or failed in ``done`` and return those without failure.

    What is returned has the stage's own figures under their own names; of a rung, what is kept has them
    under the rung's.
    """
    found = evaluator.measure([trial.candidate for trial in trials], stage, "selection", tokens)
    result = []
    for before, measurement in zip(trials, found, strict=True):
        joined = _joined(before.measurement, measurement, is_rung=tokens > 0)
        trial = Trial(before.candidate, joined, "failed" if joined.failure else "rejected")
        done[trial.candidate.key] = trial
        if not joined.failure:
            own = replace(joined, values={**joined.values, **measurement.values})
            result.append(replace(trial, measurement=own) if tokens else trial)
    return result


def _with_sensitivities(trial: Trial, evaluator: Evaluator, tokens: int) -> Trial:
    """Return a trial with its sensitivities; if they cannot be found it stays as it is, but for the cost."""
    (found,) = evaluator.measure([trial.candidate], "sensitivity", "statistics", tokens)
    before = trial.measurement
    measurement = replace(
        before,
        seconds=before.seconds + found.seconds,
        tokens=before.tokens + found.tokens,
        sensitivities=found.sensitivities,
        attempts=max(found.attempts, before.attempts),
    )
    return replace(trial, measurement=measurement)


def _joined(before: Measurement, found: Measurement, *, is_rung: bool) -> Measurement:
    """Return what two stages found out about one candidate; names say what is of the first rung."""
    own = ("kl", "perplexity", "model_error")
    values = dict(found.values)
    if is_rung:
        values = {f"{n}{RUNG}" if n in own else n: v for n, v in values.items()}
        values = {n: v for n, v in values.items() if not (n.endswith(RUNG) and n in before.values)}
    return replace(
        found,
        layer_errors=found.layer_errors or before.layer_errors,
        values={} if found.failure else {**before.values, **values},
        seconds=found.seconds + before.seconds,
        tokens=found.tokens + before.tokens,
        parts=() if is_rung else found.parts,
        fingerprint=found.fingerprint or before.fingerprint,
        attempts=max(found.attempts, before.attempts),
    )
