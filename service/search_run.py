"""Searches from their settings to their holdout figures: the pieces of all folders put together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..metrics_dsl.expression import Expression
from ..results.archive.archive import Archive
from ..results.archive.remembering import RememberingEvaluator
from ..results.archive.run_folder import RunFolder
from ..results.export.rule_source import read_starts
from ..results.summary.compare import incumbents
from ..search.baselines import Baseline, BaselinesFirst, build_funnel, build_problem, check_leaves
from ..search.core import defaults
from ..search.core.budget import Budget
from ..search.core.candidate import Candidate, Stage, Trial
from ..search.core.protocols import Evaluator
from ..search.core.scratch import sweep
from ..search.loop import run
from ..search.searchers.table import build_searcher
from ..search.settings import SearchSettings
from ..search.spaces.optishear import MetaSpace
from ..search.spaces.problem import Problem
from ..search.toml import SettingsError
from ..workers.calibrate.folder import Calibration
from ..workers.cluster.ray_evaluator import RayEvaluator
from ..workers.cluster.settings import Cluster
from ..workers.measure.local_evaluator import LocalEvaluator
from ..workers.measure.windows import SHORTEST, tokens_per_rung, tokens_per_step
from ..workers.measure.worker import Device, WorkerOptions, check_code
from .baseline_cost import BaselineCost, Race
from .run_claim import (
    check_calibration,
    check_folder,
    check_plugins,
    claim,
    find_calibration,
    has_measured,
    save,
)

_FEWEST_TO_RACE = 1024  # selection tokens from which a quarter of them tells candidates apart


@dataclass
class Listener:
    """What a run reports while it goes on.

    Attributes:
        report: Called with a sentence on each step.
        step: Called with (stage, done, total) within a batch.
        batch: Called with the archive and a batch's new trials.
        begin: Called with the settings when a run begins, for each of several seeds.
    """

    report: Callable[[str], None] = lambda _text: None
    step: Callable[[Stage, int, int], None] = lambda _stage, _done, _total: None
    batch: Callable[[Archive, list[Trial]], None] = lambda _archive, _trials: None
    begin: Callable[[SearchSettings], None] = lambda _settings: None


def search_all(
    runs: Mapping[Path, SearchSettings],
    listener: Listener,
    cluster: Cluster | None,
    *,
    is_resumed: bool,
    trust_remote_code: bool = False,
) -> None:
    """Run searches that differ in folder and seed alone; each takes over what those before it measured.

    Args:
        runs: The settings by run folder.
        listener: Told how they go.
        cluster: Measure on the workers of a Ray cluster; None measures in this process.
        is_resumed: Whether settings may differ from those in the folders, as ``run_claim.CONTINUED`` says.
        trust_remote_code: Allow code that comes with the model; no file can say so.

    Raises:
        SecateurError: When settings, calibration, model or run folder do not fit; nothing is written.
        KeyboardInterrupt: When interrupted; all that was measured is in the archives.
    """
    sweep()  # what a killed search has left
    first, settings = next(iter(runs.items()))
    calibration = find_calibration(settings, first) if is_resumed else Calibration(settings.calibration)
    check_code(calibration, trust_remote_code=trust_remote_code)
    parts = {name: calibration.shape(name) for name in ("statistics", "selection")}
    race = Race(_rungs(settings, *parts["selection"]), _sensitivity(settings, math.prod(parts["statistics"])))
    check_leaves(settings, calibration.leaves)
    build_funnel(settings, [], race.rungs)  # checks that the stages know the objectives
    folders = {RunFolder(path): own for path, own in runs.items()}
    for folder, own in folders.items():
        check_folder(own, folder, is_resumed=is_resumed)
    starts = {folder: tuple(_starts(own, folder)) for folder, own in folders.items()}
    evaluator = _evaluator(settings, calibration, cluster, listener, trust_remote_code)
    before: list[Path] = []
    try:
        # Seeds do not change what is searched: scores of the dense model are summed up once for all of them.
        searched = {own: build_problem(settings, evaluator, own) for own in dict.fromkeys(starts.values())}
        announced = ""
        if not any(map(has_measured, folders)):
            _, baselines = next(iter(searched.values()))
            announced = BaselineCost(evaluator, parts["selection"], race).check(settings, baselines)
        for folder in filter(has_measured, folders):
            with Archive(folder.path) as archive:
                check_calibration(archive, calibration)
                check_plugins(archive)
        for folder, own in folders.items():  # all at first: what is interrupted is resumed with all its seeds
            save(own, folder)
        for folder, own in folders.items():
            listener.begin(own)
            if len(folders) > 1:
                listener.report(f"seed {own.seed}: {folder.path}")
            with Archive(folder.path, write=True) as archive, contextlib.ExitStack() as opened:
                spent_before = archive.fact("has_ended") and archive.counts()
                claim(archive, own, calibration, evaluator.accelerator, listener.report)
                archive.keep(starts=list(map(str, starts[folder])))
                weights = sum(layer.size for layer in evaluator.layers)
                listener.report(
                    f"searching on {calibration.folder}: {len(evaluator.layers)} layers, {weights:,} weights"
                )
                for sentence in filter(None, (own.chosen, announced)):
                    listener.report(sentence)
                # A release may choose other numbers of tokens: a run goes on with those it began with.
                rungs, sensitivity = archive.fact("race", (race.rungs, race.sensitivity))
                archive.keep(race=(rungs, sensitivity))
                earlier = [opened.enter_context(Archive(other)) for other in before]
                remembering = RememberingEvaluator(evaluator, archive, listener.step, earlier)
                _search(
                    own,
                    remembering,
                    archive,
                    searched[starts[folder]],
                    Race(tuple(rungs), sensitivity),
                    listener,
                )
                if spent_before and archive.counts() == spent_before:
                    listener.report("the run had ended and is as it was; a larger --budget makes it longer")
                before.append(folder.path)
                known, of_all = evaluator.reused
                if known > of_all / 100:
                    listener.report(
                        f"{known / of_all:.0%} of the blocks were not run again: their states were known"
                    )
    finally:
        evaluator.close()


def _evaluator(
    settings: SearchSettings,
    calibration: Calibration,
    cluster: Cluster | None,
    listener: Listener,
    trust_remote_code: bool,
) -> LocalEvaluator | RayEvaluator:
    options = WorkerOptions(
        pattern=settings.pattern,
        device=Device(settings.device, settings.dtype, settings.threads),
        model=settings.model,
        reuse=settings.reuse,
        trust_remote_code=trust_remote_code,
    )
    if cluster is not None:
        return RayEvaluator(calibration, cluster, options, listener.report)
    return LocalEvaluator(calibration, **options)


def _search(
    settings: SearchSettings,
    evaluator: Evaluator,
    archive: Archive,
    searched: tuple[Problem, list[Baseline]],
    race: Race,
    listener: Listener,
) -> None:
    problem, baselines = searched
    if isinstance(problem.metrics, MetaSpace):
        listener.report(
            f"meta: {problem.metrics.names} names are {problem.metrics.distinct} different metrics; the "
            "others are left out before anything is measured"
        )
    opening = {b.name: Candidate(b.metric, b.ratios, settings.group) for b in baselines}
    # Names of before stay: on other hardware a ratio may differ in its last digit, and so in its key.
    names = {c.key: name for name, c in opening.items()}
    archive.keep(baselines={**archive.fact("baselines", {}), **names})
    searcher = BaselinesFirst(
        build_searcher(settings.searcher, problem, settings.seed, settings.batch_size),
        list(opening.values()),
        seeds_searcher=settings.seeding,
    )
    always = [opening[b.name].key for b in baselines if b.is_one]
    funnel = build_funnel(settings, always, race.rungs, race.sensitivity)
    budget = Budget.parse(settings.budget)
    spent, told = 0.0, 0
    cut = _Cut(archive.fact("cut"), str(settings.budget))
    for trials in run(searcher, evaluator, funnel, budget):
        is_short = budget.next_batch(spent, funnel.batch) < funnel.batch
        archive.add(trials, **cut.add(told, is_short=is_short))
        spent, told = spent + budget.cost(trials), told + len(trials)
        listener.batch(archive, trials)
    if spent < budget.amount:
        listener.report(
            f"nothing new was proposed any more: the search ended after {spent:.0f} of {budget.amount:.0f} "
            f"{budget.unit}"
        )
    query = "SELECT failure FROM measurements WHERE stage = 'sensitivity' AND failure != ''"
    if failures := archive.rows(query):
        listener.report(f"{len(failures)} times no sensitivities were found: {failures[-1][0]}")
    _measure_holdout(settings, evaluator, archive, listener)
    archive.keep(has_ended=True)


class _Cut:
    """Where a budget of candidates cut a batch short.

    A batch is promoted as a whole. Where the budget has grown since, the batch that it had cut is told again,
    whole, with all that came after it: so that an extended run is the run that the larger budget would have
    made. Nothing is measured twice.

    Args:
        before: What an earlier session kept: the trials before the cut, and its budget; None for no cut.
        budget: The budget of this session.
    """

    def __init__(self, before: dict[str, Any] | None, budget: str) -> None:
        self._before = before if before and before["budget"] != budget else None
        self._budget = budget
        self._is_known = bool(before) and self._before is None

    def add(self, told: int, *, is_short: bool) -> dict[str, Any]:
        """Return what ``Store.add`` is told of the batch that follows on so many trials.

        What is kept of the cut changes in the transaction that makes it true.
        """
        found: dict[str, Any] = {}
        if self._before and self._before["rows"] == told:
            found = {"keep_first": told, "cut": None}
            self._before = None
        if is_short and not self._is_known:
            found["cut"] = {"rows": told, "budget": self._budget}
            self._is_known = True
        return found


def _starts(settings: SearchSettings, run: RunFolder) -> list[Expression]:
    """Return the metrics to start from: those that a run noted when it was begun, for sources go on too.

    Raises:
        SecateurError: For a source that is no metric, candidate or run, or has no metrics yet.
    """
    if settings.start_from and run.has_archive:
        with Archive(run.path) as archive:
            noted = archive.fact("starts")
            if noted is not None:
                return [archive.metric(text) for text in noted]
    found = read_starts(settings.start_from)
    if settings.start_from and not found:
        raise SettingsError(
            f"expected metrics to start from, got {', '.join(settings.start_from)} without any yet"
        )
    return found


def _rungs(settings: SearchSettings, sequences: int, length: int) -> tuple[int, ...]:
    """Return the rungs to race on: the settings', or a quarter of the tokens where ratios are searched.

    Raises:
        SettingsError: For a rung that is not shorter than the selection tokens.
    """
    tokens = sequences * length
    if settings.rungs is not None:
        found = [tokens_per_rung(sequences, length, count) for count in settings.rungs]
        if len({*found, tokens}) <= len(found):
            raise SettingsError(
                f"expected rungs that grow towards the {tokens} selection tokens, in pieces of at least "
                f"{SHORTEST} a sequence, got {found} tokens from {list(settings.rungs)}; calibrate with "
                "more --selection-tokens or leave --rungs out"
            )
        return settings.rungs
    is_metric_alone = not settings.ratio_space and not isinstance(settings.sparsity, tuple)
    if is_metric_alone or settings.stage != "model" or tokens < _FEWEST_TO_RACE:
        return ()
    return (tokens // defaults.RUNG_PART,)


def _sensitivity(settings: SearchSettings, tokens: int) -> int:
    """Return on how many of the statistics tokens sensitivities are found, none where nobody uses them."""
    if settings.sensitivity is not None:
        return settings.sensitivity
    return tokens_per_step(tokens) if settings.descends else 0


def _measure_holdout(
    settings: SearchSettings, evaluator: Evaluator, archive: Archive, listener: Listener
) -> None:
    """Measure the front and the baselines on tokens that the search never saw."""
    if settings.stage != "model":
        return
    rows = archive.frame()
    decided = rows["baseline"].notna() & rows["kl"].notna()
    so_far = incumbents(rows, settings.objectives[0])  # for the curve of quality over cost
    wanted = {*archive.front()["key"], *rows.loc[decided, "key"], *so_far}
    told = archive.trials()
    trials = [t for t in told if t.candidate.key in wanted and t.status != "failed"]
    originals = {t.alias_of or t.candidate.key for t in trials}
    chosen = [t.candidate for t in told if t.candidate.key in originals]
    new = [c for c in chosen if archive.recall(c.key, "model", "holdout") is None]
    if new:
        listener.report(f"measuring {len(new)} candidates on holdout tokens")
    evaluator.measure(chosen, "model", "holdout")
