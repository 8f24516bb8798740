"""One run from its settings to its holdout figures: the pieces of the four folders put together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..results.archive.archive import Archive
from ..results.archive.database import ArchiveError
from ..results.archive.remembering import RememberingEvaluator
from ..results.summary.compare import incumbents
from ..search.baselines import BaselinesFirst, build_funnel, build_problem, check_leaves
from ..search.core import defaults
from ..search.core.budget import Budget
from ..search.core.candidate import Candidate, Stage, Trial
from ..search.core.protocols import Evaluator
from ..search.loop import run
from ..search.searchers.table import build_searcher
from ..search.settings import SearchSettings
from ..search.spaces.optishear import MetaSpace
from ..search.toml import SettingsError
from ..workers.calibrate.folder import Calibration
from ..workers.cluster.ray_evaluator import RayEvaluator
from ..workers.cluster.settings import Cluster
from ..workers.measure.local_evaluator import LocalEvaluator
from ..workers.measure.windows import SHORTEST, tokens_per_rung, tokens_per_step
from ..workers.measure.worker import Device, WorkerOptions
from .run_folder import check_folder, claim, save

_FEWEST_TO_RACE = 1024  # selection tokens from which a quarter of them tells candidates apart


@dataclass
class Listener:
    """What a run reports while it goes on.

    Attributes:
        line: Called with a sentence on each step.
        step: Called with (stage, done, total) within a batch.
        batch: Called with the archive and a batch's new trials.
        begin: Called with the settings when a run begins, for each of several seeds.
    """

    line: Callable[[str], None] = lambda _text: None
    step: Callable[[Stage, int, int], None] = lambda _stage, _done, _total: None
    batch: Callable[[Archive, list[Trial]], None] = lambda _archive, _trials: None
    begin: Callable[[SearchSettings], None] = lambda _settings: None


def run_search(
    settings: SearchSettings,
    out: str | Path,
    listener: Listener | None = None,
    cluster: Cluster | None = None,
) -> Archive:
    """Run a search to its end and return its archive, open for reading.

    A run folder that holds the same run is continued: what it has measured is not measured again.

    Args:
        settings: What to search.
        out: The run folder.
        listener: Told how the run goes.
        cluster: Measure on the workers of a Ray cluster; None measures in this process.

    Raises:
        SecateurError: When settings, calibration, model or run folder do not fit; nothing is written.
        KeyboardInterrupt: When interrupted; all that was measured is in the archive.
    """
    folder = Path(out)
    _run_all({folder: settings}, listener or Listener(), cluster)
    return Archive(folder)


def run_seeds(
    settings: SearchSettings,
    out: str | Path,
    seeds: int,
    listener: Listener | None = None,
    cluster: Cluster | None = None,
) -> list[Archive]:
    """Run a search once for each of some seeds, the model loaded once, and return their archives.

    The seeds follow on the settings' own; the run folders are ``seed-0`` and so on in ``out``.

    Raises:
        SecateurError: As ``run_search``.
    """
    if seeds < 1:
        raise SettingsError(f"expected at least 1 seed, got {seeds}")
    if (Path(out) / "run.toml").is_file():
        raise SettingsError(f"expected a folder for runs of several seeds, got {out}, which is a run itself")
    for path in Path(out).glob("seed-*/run.toml"):
        if SearchSettings.load(path).model_copy(update={"seed": settings.seed}) != settings:
            raise SettingsError(
                f"expected runs of one configuration in {out}, got {path.parent} with another one; choose "
                "another --out"
            )
    if settings.searcher == "descent" and seeds > 1:
        listener = listener or Listener()
        listener.line(
            "descent takes the same way whatever its seed, until it is stuck: seeds that agree say nothing "
            "of how certain its figures are"
        )
    each = range(settings.seed, settings.seed + seeds)
    runs = {Path(out) / f"seed-{seed}": settings.model_copy(update={"seed": seed}) for seed in each}
    _run_all(runs, listener or Listener(), cluster)
    return [Archive(folder) for folder in runs]


def _run_all(runs: dict[Path, SearchSettings], listener: Listener, cluster: Cluster | None) -> None:
    """Run searches that differ in folder and seed alone; each takes over what those before it measured."""
    settings = next(iter(runs.values()))
    calibration = Calibration(settings.calibration)
    parts = {name: (p["sequences"], p["length"]) for name, p in calibration.manifest["parts"].items()}
    rungs = _rungs(settings, *parts["selection"])
    sensitivity = _sensitivity(settings, math.prod(parts["statistics"]))
    check_leaves(settings, calibration.leaves)
    build_funnel(settings, [], rungs)  # checks that the stages know the objectives
    for folder, own in runs.items():
        check_folder(own, folder)
    evaluator = _evaluator(settings, calibration, cluster, listener)
    before: list[Path] = []
    try:
        for folder, own in runs.items():  # all at first: what is interrupted is resumed with all its seeds
            save(own, folder)
        for folder, own in runs.items():
            listener.begin(own)
            with Archive(folder, write=True) as archive, contextlib.ExitStack() as opened:
                claim(archive, own, calibration, evaluator.accelerator, listener.line)
                weights = sum(layer.size for layer in evaluator.layers)
                listener.line(
                    f"searching on {calibration.folder}: {len(evaluator.layers)} layers, {weights:,} weights"
                )
                if own.chosen:
                    listener.line(own.chosen)
                # A release may choose other numbers of tokens: a run goes on with those it began with.
                rungs, sensitivity = archive.fact("race", (list(rungs), sensitivity))
                archive.note(race=(rungs, sensitivity))
                earlier = [opened.enter_context(Archive(other)) for other in before]
                remembering = RememberingEvaluator(evaluator, archive, listener.step, earlier)
                _search(own, remembering, archive, tuple(rungs), sensitivity, listener)
                before.append(folder)
                known, of_all = evaluator.reused
                if known:
                    listener.line(
                        f"{known / of_all:.0%} of the blocks were not run again: their states were known"
                    )
    finally:
        evaluator.close()


def resume(
    folder: str | Path, listener: Listener | None = None, cluster: Cluster | None = None
) -> Archive | list[Archive]:
    """Continue a run from its archive, or measure what is missing of its holdout figures.

    A folder of seeds is continued seed by seed; the archives of all are returned.

    Raises:
        SecateurError: When the folder holds no run or its calibration has changed.
    """
    path = Path(folder) / "run.toml"
    seeds = sorted(Path(folder).glob("seed-*/run.toml"), key=lambda p: (len(str(p)), p))
    if seeds and not path.is_file():
        _run_all({p.parent: SearchSettings.load(p) for p in seeds}, listener or Listener(), cluster)
        return [Archive(p.parent) for p in seeds]
    if not path.is_file():
        raise ArchiveError(f"expected a run folder, got {folder} without run.toml; see `secateur search`")
    return run_search(SearchSettings.load(path), folder, listener, cluster)


def _evaluator(
    settings: SearchSettings, calibration: Calibration, cluster: Cluster | None, listener: Listener
) -> LocalEvaluator | RayEvaluator:
    options = WorkerOptions(
        pattern=settings.pattern,
        device=Device(settings.device, settings.dtype, settings.threads),
        model=settings.model,
        reuse=settings.reuse,
    )
    if cluster is not None:
        return RayEvaluator(calibration, cluster, options, listener.line)
    return LocalEvaluator(calibration, **options)


def _search(
    settings: SearchSettings,
    evaluator: Evaluator,
    archive: Archive,
    rungs: tuple[int, ...],
    sensitivity: int,
    listener: Listener,
) -> None:
    problem, baselines = build_problem(settings, evaluator)
    if isinstance(problem.metrics, MetaSpace):
        listener.line(
            f"meta: {problem.metrics.names} names are {problem.metrics.distinct} different metrics; the "
            "others are left out before anything is measured"
        )
    opening = {b.name: Candidate(b.metric, b.ratios, settings.group) for b in baselines}
    # Names of before stay: on other hardware a ratio may differ in its last digit, and so in its key.
    names = {c.key: name for name, c in opening.items()}
    archive.note(baselines={**archive.fact("baselines", {}), **names})
    searcher = BaselinesFirst(
        build_searcher(settings.searcher, problem, settings.seed, settings.batch_size),
        list(opening.values()),
        tell=settings.seeding,
    )
    always = [opening[b.name].key for b in baselines if b.is_one]
    funnel = build_funnel(settings, always, rungs, sensitivity)
    budget, spent = Budget.parse(settings.budget), 0.0
    if budget.unit == "candidates" and budget.amount <= len(opening):
        listener.line(_nothing_left(len(opening), budget))
    for batch, trials in enumerate(run(searcher, evaluator, funnel, budget)):
        archive.add(trials)
        spent += budget.cost(trials)
        listener.batch(archive, trials)
        if batch == 0 and budget.unit != "candidates" and spent >= budget.amount:
            listener.line(_nothing_left(len(opening), budget))
    if spent < budget.amount:
        listener.line(
            f"nothing new was proposed any more: the search ended after {spent:.0f} of {budget.amount:.0f} "
            f"{budget.unit}"
        )
    query = "SELECT failure FROM measurements WHERE stage = 'sensitivity' AND failure != ''"
    if failures := archive.rows(query):
        listener.line(f"{len(failures)} times no sensitivities were found: {failures[-1][0]}")
    _measure_holdout(settings, evaluator, archive, listener)
    archive.note(has_ended=True)


def _nothing_left(published: int, budget: Budget) -> str:
    return (
        f"the {published} published rules take the whole budget of {budget.amount:,.0f} {budget.unit}: "
        "nothing is left to search; give a larger --budget"
    )


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
    listener.line(f"measuring {len(chosen)} candidates on holdout tokens")
    evaluator.measure(chosen, "model", "holdout")
