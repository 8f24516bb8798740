"""One run from its settings to its holdout figures: the pieces of the four folders put together."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path

from .results.archive import Archive, ArchiveError
from .results.compare import incumbents
from .results.memory import RememberingEvaluator
from .search.budget import Budget
from .search.candidate import Candidate, Stage, Trial
from .search.configuration import SettingsError
from .search.loop import run
from .search.meta import MetaSpace
from .search.opening import Opening, build_funnel, build_problem, check_leaves
from .search.protocols import Evaluator
from .search.searchers import build_searcher
from .search.settings import DESCENDING, SearchSettings
from .workers.local import Device, LocalEvaluator
from .workers.reference import SHORTEST, len_of_rung
from .workers.statistics import Calibration

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


def run_search(settings: SearchSettings, out: str | Path, listener: Listener | None = None) -> Archive:
    """Run a search to its end and return its archive, open for reading.

    A run folder that holds the same run is continued: what it has measured is not measured again.

    Args:
        settings: What to search.
        out: The run folder.
        listener: Told how the run goes.

    Raises:
        ValueError: When settings, calibration, model or run folder do not fit; nothing is written.
        KeyboardInterrupt: When interrupted; all that was measured is in the archive.
    """
    folder = Path(out)
    _run_all({folder: settings}, listener or Listener())
    return Archive(folder)


def run_seeds(
    settings: SearchSettings, out: str | Path, seeds: int, listener: Listener | None = None
) -> list[Archive]:
    """Run a search once for each of some seeds, the model loaded once, and return their archives.

    The seeds follow on the settings' own; the run folders are ``seed-0`` and so on in ``out``.

    Raises:
        ValueError: As ``run_search``.
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
    each = range(settings.seed, settings.seed + seeds)
    runs = {Path(out) / f"seed-{seed}": settings.model_copy(update={"seed": seed}) for seed in each}
    _run_all(runs, listener or Listener())
    return [Archive(folder) for folder in runs]


def _run_all(runs: dict[Path, SearchSettings], listener: Listener) -> None:
    """Run searches that differ in folder and seed alone; each takes over what those before it measured."""
    settings = next(iter(runs.values()))
    calibration = Calibration(settings.calibration)
    parts = {name: (p["sequences"], p["length"]) for name, p in calibration.manifest["parts"].items()}
    rungs = _rungs(settings, *parts["selection"])
    sensitivity = _sensitivity(settings, math.prod(parts["statistics"]))
    check_leaves(settings, calibration.leaves)
    build_funnel(settings, [], rungs)  # checks that the stages know the objectives
    for folder, own in runs.items():
        _check_folder(own, folder)
    evaluator = _evaluator(settings, calibration)
    before: list[Path] = []
    try:
        for folder, own in runs.items():
            _save(own, folder)
            listener.begin(own)
            with Archive(folder, write=True) as archive, contextlib.ExitStack() as opened:
                _claim(archive, own, calibration, listener)
                weights = sum(layer.size for layer in evaluator.layers)
                listener.line(
                    f"searching on {calibration.folder}: {len(evaluator.layers)} layers, {weights:,} weights"
                )
                earlier = [opened.enter_context(Archive(other)) for other in before]
                remembering = RememberingEvaluator(evaluator, archive, listener.step, earlier)
                _search(own, remembering, archive, rungs, sensitivity, listener)
                before.append(folder)
                if evaluator.prefixes and evaluator.prefixes.reused:
                    share = evaluator.prefixes.reused / evaluator.prefixes.blocks
                    listener.line(f"{share:.0%} of the blocks were not run again: their states were known")
    finally:
        evaluator.close()


def resume(folder: str | Path, listener: Listener | None = None) -> Archive | list[Archive]:
    """Continue a run from its archive, or measure what is missing of its holdout figures.

    A folder of seeds is continued seed by seed; the archives of all are returned.

    Raises:
        ValueError: When the folder holds no run or its calibration has changed.
    """
    path = Path(folder) / "run.toml"
    seeds = sorted(Path(folder).glob("seed-*/run.toml"))
    if seeds and not path.is_file():
        _run_all({p.parent: SearchSettings.load(p) for p in seeds}, listener or Listener())
        return [Archive(p.parent) for p in seeds]
    if not path.is_file():
        raise ArchiveError(f"expected a run folder, got {folder} without run.toml; see `secateur search`")
    return run_search(SearchSettings.load(path), folder, listener)


def _evaluator(settings: SearchSettings, calibration: Calibration) -> LocalEvaluator:
    return LocalEvaluator(
        calibration,
        pattern=settings.pattern,
        device=Device(settings.device, settings.dtype, settings.threads),
        model=settings.model,
        reuse=settings.reuse,
    )


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
    searcher = Opening(
        build_searcher(settings.searcher, problem, settings.seed, settings.batch),
        list(opening.values()),
        tell=settings.seeding,
    )
    always = [opening[b.name].key for b in baselines if b.is_one]
    funnel = build_funnel(settings, always, rungs, sensitivity)
    budget, spent = Budget.parse(settings.budget), 0.0
    if budget.unit == "candidates" and budget.amount <= len(opening):
        listener.line(
            f"the {len(opening)} published rules take the whole budget of {budget.amount:.0f} candidates: "
            "nothing is left to search; give a larger --budget"
        )
    for trials in run(searcher, evaluator, funnel, budget):
        archive.add(trials)
        spent += budget.cost(trials)
        listener.batch(archive, trials)
    if spent < budget.amount:
        listener.line(
            f"nothing new was proposed any more: the search ended after {spent:.0f} of {budget.amount:.0f} "
            f"{budget.unit}"
        )
    _measure_holdout(settings, evaluator, archive, listener)


def _rungs(settings: SearchSettings, sequences: int, length: int) -> tuple[int, ...]:
    """Return the rungs to race on: the settings', or a quarter of the tokens where ratios are searched.

    Raises:
        SettingsError: For a rung that is not shorter than the selection tokens.
    """
    tokens = sequences * length
    if settings.rungs is not None:
        found = [len_of_rung(sequences, length, count) for count in settings.rungs]
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
    return (tokens // 4,)


def _sensitivity(settings: SearchSettings, tokens: int) -> int:
    """Return on how many of the statistics tokens sensitivities are found: a quarter if nothing is said."""
    if settings.sensitivity is not None:
        return settings.sensitivity
    return max(1, tokens // 4) if settings.can_descend and settings.searcher in DESCENDING else 0


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
    trials = [t for t in archive.trials() if t.candidate.key in wanted and t.status != "failed"]
    originals = {t.alias_of or t.candidate.key for t in trials}
    chosen = [t.candidate for t in archive.trials() if t.candidate.key in originals]
    listener.line(f"measuring {len(chosen)} candidates on holdout tokens")
    evaluator.measure(chosen, "model", "holdout")


# Run folders ------------------------------------------------------------------------------------


def _check_folder(settings: SearchSettings, folder: Path) -> None:
    """Refuse a folder that holds something else than this very run, or that is being written."""
    path = folder / "run.toml"
    if (folder / "archive.sqlite").is_file():
        Archive(folder, write=True).close()
    if path.is_file():
        there = SearchSettings.load(path)
        mine = settings.model_dump(mode="json")
        other = there.model_dump(mode="json")
        changed = [
            f"{name} = {other[name]!r} there, {mine[name]!r} here"
            for name in mine
            if mine[name] != other[name]
        ]
        if changed and _has_measured(folder):
            raise SettingsError(
                f"{folder} holds a run with another configuration ({'; '.join(changed)}); choose "
                f"another --out, or continue that run with `secateur resume {folder}`"
            )
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        raise SettingsError(f"expected a folder that can be written for --out, got {folder}")
    if not path.is_file() and folder.exists() and any(p.name != "run.partial" for p in folder.iterdir()):
        raise SettingsError(f"expected a new or empty run folder, got {folder} with other files in it")


def _has_measured(folder: Path) -> bool:
    if not (folder / "archive.sqlite").is_file():
        return False
    with Archive(folder) as archive:
        return bool(archive.rows("SELECT 1 FROM measurements LIMIT 1"))


def _claim(archive: Archive, settings: SearchSettings, calibration: Calibration, listener: Listener) -> None:
    """Bind the archive to settings and calibration."""
    facts = {name: calibration.manifest[name] for name in ("parts", "gradients", "layers")}
    facts["weights"] = calibration.manifest["model"]["weights"]
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if archive.fact("calibration", identity) != identity:
        raise ArchiveError(
            f"{archive.folder} was measured on another calibration than {calibration.folder}; its "
            "figures cannot be continued: choose another --out"
        )
    names = ("secateur", "torch", "transformers", "numpy", "deap", "pymoo", "optuna", "moocore")
    versions = {name: version(name) for name in names}
    began = archive.fact("versions", versions)
    changed = [
        f"{name} {began[name]}, now {versions[name]}"
        for name in versions
        if began.get(name) != versions[name]
    ]
    if changed:
        listener.line(
            f"the run was begun with other versions and may take another course: {'; '.join(changed)}"
        )
    layers = [astuple(layer) for layer in calibration.layers]  # what exports need to name the ratios
    archive.note(
        calibration=identity, objectives=list(settings.objectives), pattern=settings.pattern, versions=began,
        layers=layers,
    )  # fmt: skip


def _save(settings: SearchSettings, folder: Path) -> None:
    """Write the settings before anything else: a folder that has them can be resumed."""
    path = folder / "run.toml"
    if not path.is_file() or SearchSettings.load(path) != settings:  # a run that measured nothing is nobody's
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("archive.sqlite*"):
            file.unlink()
        partial = path.with_suffix(".partial")
        partial.write_text(settings.to_toml())
        partial.replace(path)
