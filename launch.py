"""One run from its settings to its holdout figures: the pieces of the four folders put together."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .metrics_dsl.published import PUBLISHED
from .results.archive import Archive, ArchiveError
from .results.memory import RememberingEvaluator
from .search.candidate import Candidate, Stage, Trial, uniform
from .search.loop import Funnel, run
from .search.objectives import look_up_objectives
from .search.protocols import Evaluator
from .search.searchers import Opening, Problem, build_searcher
from .search.settings import SearchSettings, SettingsError
from .search.space import MetricSpace
from .workers.local import Device, LocalEvaluator
from .workers.statistics import Calibration


@dataclass
class Listener:
    """What a run reports while it goes on.

    Attributes:
        line: Called with a sentence on each step.
        step: Called with (stage, done, total) within a batch.
        batch: Called with the archive and a batch's new trials.
    """

    line: Callable[[str], None] = lambda _text: None
    step: Callable[[Stage, int, int], None] = lambda _stage, _done, _total: None
    batch: Callable[[Archive, list[Trial]], None] = lambda _archive, _trials: None


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
    listener = listener or Listener()
    folder = Path(out)
    calibration = Calibration(settings.calibration)
    _funnel(settings, [])  # checks that the stages know the objectives
    _check_folder(settings, folder)
    evaluator = _evaluator(settings, calibration)
    try:
        _save(settings, folder)
        with Archive(folder, write=True) as archive:
            _claim(archive, settings, calibration)
            weights = sum(layer.size for layer in evaluator.layers)
            listener.line(
                f"searching on {calibration.folder}: {len(evaluator.layers)} layers, {weights:,} weights"
            )
            _search(settings, evaluator, archive, listener)
    finally:
        evaluator.close()
    return Archive(folder)


def resume(folder: str | Path, listener: Listener | None = None) -> Archive:
    """Continue a run from its archive, or measure what is missing of its holdout figures.

    Raises:
        ValueError: When the folder holds no run or its calibration has changed.
    """
    path = Path(folder) / "run.toml"
    if not path.is_file():
        raise ArchiveError(f"expected a run folder, got {folder} without run.toml")
    return run_search(SearchSettings.load(path), folder, listener)


def _evaluator(settings: SearchSettings, calibration: Calibration) -> Evaluator:
    return LocalEvaluator(
        calibration,
        pattern=settings.pattern,
        device=Device(settings.device, settings.dtype, settings.threads),
        model=settings.model,
    )


def _search(settings: SearchSettings, evaluator: Evaluator, archive: Archive, listener: Listener) -> None:
    remembering = RememberingEvaluator(evaluator, archive, listener.step)

    def complete(metric: object) -> Candidate:
        return uniform(metric, evaluator.layers, settings.sparsity, settings.group)  # type: ignore[arg-type]

    baselines = {
        name: complete(published.expression)
        for name, published in PUBLISHED.items()
        if published.expression.leaves <= evaluator.leaves
    }
    archive.note(baselines={c.key: name for name, c in baselines.items()})
    space = MetricSpace(evaluator.leaves, settings.group, settings.max_size)
    problem = Problem(space, complete, look_up_objectives(settings.objectives))
    searcher = Opening(
        build_searcher(settings.searcher, problem, settings.seed),
        list(baselines.values()),
        tell=settings.seeding,
    )
    funnel = _funnel(settings, [c.key for c in baselines.values()])
    for trials in run(searcher, remembering, funnel, settings.budget):
        archive.add(trials)
        listener.batch(archive, trials)
    _measure_holdout(settings, remembering, archive, listener)


def _funnel(settings: SearchSettings, always: list[str]) -> Funnel:
    objectives = look_up_objectives(settings.objectives)
    return Funnel(objectives, settings.batch, settings.promote, settings.stage, frozenset(always))


def _measure_holdout(
    settings: SearchSettings, evaluator: Evaluator, archive: Archive, listener: Listener
) -> None:
    """Measure the front and the baselines on tokens that the search never saw."""
    if settings.stage != "model":
        return
    rows = archive.frame()
    wanted = {*archive.front()["key"], *rows.loc[rows["baseline"].notna(), "key"]}
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
        if changed:
            raise SettingsError(
                f"{folder} holds a run with another configuration ({'; '.join(changed)}); choose "
                f"another --out, or continue that run with `secateur resume {folder}`"
            )
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        raise SettingsError(f"expected a folder that can be written for --out, got {folder}")
    if not path.is_file() and folder.exists() and any(p.name != "run.partial" for p in folder.iterdir()):
        raise SettingsError(f"expected a new or empty run folder, got {folder} with other files in it")


def _claim(archive: Archive, settings: SearchSettings, calibration: Calibration) -> None:
    """Bind the archive to settings and calibration."""
    facts = {name: calibration.manifest[name] for name in ("parts", "gradients", "layers")}
    facts["weights"] = calibration.manifest["model"]["weights"]
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if archive.fact("calibration", identity) != identity:
        raise ArchiveError(
            f"{archive.folder} was measured on another calibration than {calibration.folder}; its "
            "figures cannot be continued: choose another --out"
        )
    archive.note(
        calibration=identity,
        objectives=list(settings.objectives),
        versions={name: version(name) for name in ("secateur", "torch", "deap", "transformers")},
    )


def _save(settings: SearchSettings, folder: Path) -> None:
    """Write the settings before anything else: a folder that has them can be resumed."""
    path = folder / "run.toml"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(settings.to_toml())
        partial.replace(path)
