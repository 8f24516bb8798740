"""Runs: what a search has found, for reading, drawing, taking elsewhere and going on with."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..metrics_dsl.errors import SecateurError
from ..metrics_dsl.plugins import use_plugin
from ..results.archive.archive import Archive
from ..results.archive.database import ArchiveError
from ..results.archive.run_folder import RunFolder
from ..search.core.candidate import Candidate, Trial
from ..search.settings import SearchSettings

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

    from ..results.archive.frame import Where
    from ..workers.cluster.settings import Cluster
    from .search_run import Listener


class Run:
    """One run: what it has found so far, and what can be done with it, also while it goes on.

    Nothing is held open: a run may be read from several threads, and be pickled, as its path.

    Args:
        folder: The run folder.

    Raises:
        ArchiveError: When it holds no run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.archive().close()

    def __reduce__(self) -> tuple[type[Run], tuple[str]]:
        return Run, (str(self.folder.absolute()),)

    def archive(self) -> Archive:
        """Open the archive for reading; the caller closes it, and uses it in one thread."""
        return Archive(self.folder)

    # Reading ------------------------------------------------------------------------------------

    @property
    def settings(self) -> SearchSettings:
        """What the run searches."""
        return SearchSettings.load(RunFolder(self.folder).settings_file)

    @property
    def objectives(self) -> list[str]:
        """Names of what the run minimises."""
        with self.archive() as archive:
            return archive.objectives

    @property
    def verdict(self) -> str:
        """One sentence: whether anything found beats the best published rule on holdout."""
        from ..results.summary.table import verdict

        with self.archive() as archive, archive.reading():
            return verdict(archive.frame(), archive.front(), archive.holdout_parts())

    def frame(self, where: Where = None, stage: str | None = None) -> pandas.DataFrame:
        """Return one row a candidate in the order told; see ``Archive.frame``."""
        with self.archive() as archive:
            return archive.frame(where, stage)

    def front(self, objectives: Sequence[str] | str | None = None, where: Where = None) -> pandas.DataFrame:
        """Return the non-dominated rows, by the first objective; see ``Archive.front``."""
        with self.archive() as archive:
            return archive.front(objectives, where)

    def best(self, by: str = "kl", where: Where = None) -> pandas.Series:
        """Return the row with the least value of a column among those measured to the end."""
        with self.archive() as archive:
            return archive.best(by, where)

    def history(self, reference: Sequence[float] | None = None) -> pandas.DataFrame:
        """Return what had been found for what cost, one row a candidate."""
        with self.archive() as archive:
            return archive.history(reference)

    def layers(self, keys: Sequence[str] | str | None = None) -> pandas.DataFrame:
        """Return one row a layer of some candidates, by default the front's: ratio, error, sensitivity."""
        with self.archive() as archive:
            return archive.layers(keys)

    def baselines(self) -> pandas.DataFrame:
        """Return the rows of published rules, by the first objective."""
        with self.archive() as archive:
            return archive.baselines()

    def hypervolume(self, reference: Sequence[float] | None = None) -> float:
        """Return the volume that the front dominates, up to a reference or the largest values measured."""
        with self.archive() as archive:
            return archive.hypervolume(reference)

    def trials(self) -> list[Trial]:
        """Return all trials in the order told, as a searcher is told them."""
        with self.archive() as archive:
            return archive.trials()

    def candidate(self, key: str = "best") -> Candidate:
        """Return a candidate by its key, the beginning of it, its published name, or ``best``.

        Raises:
            ArchiveError: When none or more than one is meant.
        """
        from ..results.archive.keys import whole_key

        with self.archive() as archive:
            return archive.candidate(whole_key(archive, key))

    # Showing ------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        from ..results.summary.table import report

        with self.archive() as archive, archive.reading():
            return report(archive)

    def _repr_html_(self) -> str:
        from ..results.summary.table import report_html

        with self.archive() as archive, archive.reading():
            return report_html(archive)

    def plot(self, kind: str = "front", ax: Axes | None = None) -> Axes:
        """Draw one picture of the run with matplotlib.

        Args:
            kind: ``front``, ``history`` or ``ratios``.
            ax: Where to draw; axes of a new figure if left out.

        Raises:
            SecateurError: For an unknown kind, or when the run has nothing to draw yet.
        """
        from ..results.report.plot import draw

        with self.archive() as archive, archive.reading():
            return draw(archive, kind, ax)

    # Taking away --------------------------------------------------------------------------------

    def report(self, path: str | Path) -> Path:
        """Write the run's report: one HTML file that opens offline."""
        from .reporting import report

        return report(self, path)

    def export(self, key: str = "best", *, to: str, out: str | Path, **options: Any) -> Path:
        """Write a candidate in another form; see ``secateur.export``, which writes whole runs too."""
        from .exchange import export

        return export(self.folder, key, to=to, out=out, **options)

    def prune(self, out: str | Path, key: str = "best", *, model: str = "", **options: Any) -> dict[str, Any]:
        """Prune a model by a candidate of the run, by default the run's own model; see ``secateur.prune``.

        Raises:
            SecateurError: When the run does not say what model it was run on, or as ``secateur.prune``.
        """
        from .prune_model import prune

        with self.archive() as archive:
            source = model or archive.fact("card", {}).get("model")
        if not source:
            raise SecateurError(f"expected model=..., for {self.folder} does not say what it was run on")
        return prune(source, out, candidate=f"{self.folder}:{key}", **options)

    def resume(
        self,
        *,
        budget: int | str | None = None,
        calibration: str | Path | None = None,
        model: str | None = None,
        listener: Listener | None = None,
        cluster: Cluster | None = None,
    ) -> Run:
        """Go on with the run, for longer where a larger budget is given; see ``secateur.resume``."""
        runs = _resume(RunFolder(self.folder), listener, cluster, budget, calibration, model)
        return runs.runs[0]


class Runs(Sequence[Run]):
    """Several runs, whose frames come as one with a column ``run`` in front."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: Any) -> Any:
        return Runs(self.runs[index]) if isinstance(index, slice) else self.runs[index]

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self.runs))

    def frame(self, where: Where = None, stage: str | None = None) -> pandas.DataFrame:
        """Return the rows of all runs."""
        return self._joined(lambda run: run.frame(where, stage))

    def front(self, objectives: Sequence[str] | str | None = None, where: Where = None) -> pandas.DataFrame:
        """Return each run's own front; ``frame().pareto.front(...)`` is the front of all together."""
        return self._joined(lambda run: run.front(objectives, where))

    def best(self, by: str = "kl", where: Where = None) -> pandas.DataFrame:
        """Return each run's row with the least value of a column."""
        return self._joined(lambda run: run.best(by, where).to_frame().T)

    def layers(self, keys: Sequence[str] | None = None) -> pandas.DataFrame:
        """Return the layers of candidates, of each run's front if no keys are given."""
        return self._joined(lambda run: run.layers(keys))

    def history(self, reference: Sequence[float] | None = None) -> pandas.DataFrame:
        """Return what each run had found for what cost."""
        return self._joined(lambda run: run.history(reference))

    def baselines(self) -> pandas.DataFrame:
        """Return the published rules of each run."""
        return self._joined(lambda run: run.baselines())

    def _joined(self, read: Callable[[Run], pandas.DataFrame]) -> pandas.DataFrame:
        from ..results.archive.frame import joined

        return joined({str(run.folder): read(run) for run in self.runs})


def open_run(folder: str | Path) -> Run:
    """Open a run for reading, also while it is being written.

    Raises:
        ArchiveError: When the folder holds no run.
    """
    from ..results.archive import pareto  # noqa: F401 (registers DataFrame.pareto)

    return Run(folder)


def open_many(folders: str | Path | Sequence[str | Path]) -> Runs:
    """Open several runs: a pattern such as ``runs/*`` or a list of folders; one of seeds is all its runs.

    Raises:
        ArchiveError: When there is none.
    """
    wanted = [folders] if isinstance(folders, str | Path) else folders
    found: list[Path] = []
    for pattern in map(str, wanted):
        for place in sorted(map(Path, glob.glob(pattern))) or [Path(pattern)]:
            folder = RunFolder(place)
            found += [run.path for run in ((folder,) if folder.is_run else folder.seeds) if run.has_archive]
    if not found:
        raise ArchiveError(f"expected run folders, got {', '.join(map(str, wanted))}, where there is none")
    return Runs([open_run(folder) for folder in dict.fromkeys(found)])


def run_search(
    calibration: str | Path | SearchSettings,
    out: str | Path,
    listener: Listener | None = None,
    cluster: Cluster | None = None,
    **settings: Any,
) -> Run:
    """Run a search to its end.

    A run folder that holds the same run is continued: what it has measured is not measured again.

    Args:
        calibration: The calibration folder; or all settings, as ``SearchSettings``.
        out: The run folder.
        listener: Told how the run goes.
        cluster: Measure on the workers of a Ray cluster; None measures in this process.
        settings: Settings by name, as ``SearchSettings`` describes them.

    Raises:
        SecateurError: When settings, calibration, model or run folder do not fit; nothing is written.
        KeyboardInterrupt: When interrupted; all that was measured is in the archive.
    """
    from .search_run import Listener, search_all

    chosen = _settings(calibration, settings)
    search_all({Path(out): chosen}, listener or Listener(), cluster, is_resumed=False)
    return open_run(out)


def run_seeds(
    calibration: str | Path | SearchSettings,
    out: str | Path,
    seeds: int,
    listener: Listener | None = None,
    cluster: Cluster | None = None,
    **settings: Any,
) -> Runs:
    """Run a search once for each of some seeds, the model loaded once.

    The seeds follow on the settings' own; the run folders are ``seed-0`` and so on in ``out``.

    Raises:
        SecateurError: As ``run_search``.
    """
    from .search_run import Listener, search_all

    chosen = _settings(calibration, settings)
    folder = RunFolder(Path(out))
    if seeds < 1:
        raise SecateurError(f"expected at least 1 seed, got {seeds}")
    if folder.is_run:
        raise SecateurError(f"expected a folder for runs of several seeds, got {out}, which is a run itself")
    for run in folder.seeds:
        there = SearchSettings.load(run.settings_file)
        if there.model_copy(update={"seed": chosen.seed}) != chosen:
            raise SecateurError(
                f"expected runs of one configuration in {out}, got {run.path} with another one; choose "
                "another --out"
            )
    listener = listener or Listener()
    if chosen.searcher == "descent" and seeds > 1:
        listener.report(
            "descent takes the same way whatever its seed, until it is stuck: seeds that agree say nothing "
            "of how certain its figures are"
        )
    each = range(chosen.seed, chosen.seed + seeds)
    runs = {folder.of_seed(seed).path: chosen.model_copy(update={"seed": seed}) for seed in each}
    search_all(runs, listener, cluster, is_resumed=False)
    return Runs([open_run(path) for path in runs])


def resume(
    folder: str | Path | Run,
    listener: Listener | None = None,
    cluster: Cluster | None = None,
    *,
    budget: int | str | None = None,
    calibration: str | Path | None = None,
    model: str | None = None,
    plugins: Sequence[str | Path] = (),
) -> Run | Runs:
    """Continue a run from its archive: what is missing, and more where a larger budget is given.

    A folder of seeds is continued seed by seed; the runs of all are returned. Workers may be others than
    before.

    Args:
        folder: The run folder, or the run.
        listener: Told how the run goes.
        cluster: As for ``run_search``.
        budget: How long the whole run is to be, instead of what it was begun with; a finished one goes on.
        calibration: Where the calibration folder is now, if it was moved; its hashes are checked.
        model: Where the model is now, if the calibration's own place does not hold any more.
        plugins: The files of the plugins that the run was begun with; their hashes are checked.

    Raises:
        SecateurError: When the folder holds no run, or its calibration or model is another one.
    """
    place = RunFolder(folder.folder if isinstance(folder, Run) else Path(folder))
    runs = _resume(place, listener, cluster, budget, calibration, model, plugins)
    return runs if place.seeds else runs.runs[0]


def _resume(
    place: RunFolder,
    listener: Listener | None,
    cluster: Cluster | None,
    budget: int | str | None,
    calibration: str | Path | None,
    model: str | None,
    plugins: Sequence[str | Path] = (),
) -> Runs:
    from .run_claim import continued
    from .search_run import Listener, search_all

    for path in plugins:
        use_plugin(path)
    changes = {
        "budget": budget,
        "calibration": calibration,
        "model": model,
        "plugins": tuple(plugins) or None,
    }
    runs = {run.path: continued(run, **changes) for run in place.seeds or (place,)}
    search_all(runs, listener or Listener(), cluster, is_resumed=True)
    return Runs([open_run(path) for path in runs])


def _settings(calibration: str | Path | SearchSettings, given: dict[str, Any]) -> SearchSettings:
    named = calibration.plugins if isinstance(calibration, SearchSettings) else given.get("plugins", ())
    for path in [named] if isinstance(named, str | Path) else named:
        use_plugin(path)
    if not isinstance(calibration, SearchSettings):
        return SearchSettings.read({"calibration": calibration, **given})
    if given:
        raise SecateurError(
            f"expected settings as SearchSettings or by name, got both ({', '.join(given)} by name); use "
            "settings.model_copy(update=...)"
        )
    return calibration
