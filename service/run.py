"""Runs: what a search has found, for reading, drawing, taking elsewhere and going on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..metrics_dsl.errors import SecateurError
from ..metrics_dsl.plugins import use_plugin
from ..results.archive.archive import Archive
from ..results.archive.run_folder import HasFolder, RunFolder, folder_of
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

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: ``with secateur.open(RUN) as run`` reads well, and nothing is held open."""

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
        from ..results.archive import pareto  # noqa: F401 (registers DataFrame.pareto)

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

        try:
            with self.archive() as archive, archive.reading():
                return report(archive)
        except SecateurError as error:  # a plugin is missing, say: what is shown must not fail
            return f"Run({str(self.folder)!r}): {error}"

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

    def report(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the run's report: one HTML file that opens offline."""
        from .reporting import report

        return report(self, path, force=force)

    def export(self, key: str | None = None, *, to: str, out: str | Path, **options: Any) -> Path:
        """Write a candidate, by default the best, or the whole run; see ``secateur.export``."""
        from ..results.export.exporters import EXPORTERS
        from .exchange import export

        is_whole = to in EXPORTERS and EXPORTERS[to].subject == "run"
        chosen = key if key is not None else "" if is_whole else "best"
        return export(self.folder, chosen, to=to, out=out, **options)

    def prune(self, out: str | Path, key: str = "best", *, model: str = "", **options: Any) -> dict[str, Any]:
        """Prune a model by a candidate of the run, by default the run's own model; see ``secateur.prune``.

        Raises:
            SecateurError: When the run does not say what model it was run on, or as ``secateur.prune``.
        """
        from .prune_model import prune

        with self.archive() as archive:
            source = model or self.settings.model or archive.fact("card", {}).get("model")
        if not source:
            raise SecateurError(f"expected model=..., for {self.folder} does not say what it was run on")
        return prune(source, out, candidate=f"{self.folder}:{key}", **options)

    def resume(
        self,
        *,
        budget: int | str | None = None,
        calibration: str | Path | None = None,
        model: str | None = None,
        plugins: Sequence[str | Path] = (),
        trust_remote_code: bool = False,
        listener: Listener | None = None,
        cluster: Cluster | None = None,
    ) -> Run:
        """Go on with the run, for longer where a larger budget is given; see ``secateur.resume``."""
        folder = RunFolder(self.folder)
        (found,) = continue_runs(
            (folder,), listener, cluster, budget, calibration, model, plugins, trust_remote_code
        )
        return found


def open_run(folder: str | Path) -> Run:
    """Open a run for reading, also while it is being written.

    Raises:
        ArchiveError: When the folder holds no run.
    """
    return Run(folder)


def run_search(
    calibration: str | Path | HasFolder | SearchSettings,
    out: str | Path,
    listener: Listener | None = None,
    cluster: Cluster | None = None,
    *,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Run:
    """Run a search to its end.

    A run folder that holds the same run is continued: what it has measured is not measured again.

    Args:
        calibration: The calibration, or its folder; or all settings, as ``SearchSettings``.
        out: The run folder.
        listener: Told how the run goes.
        cluster: Measure on the workers of a Ray cluster; None measures in this process.
        trust_remote_code: Allow code that comes with the model; no calibration, run or file can say so.
        settings: Settings by name, as ``SearchSettings`` describes them.

    Raises:
        SecateurError: When settings, calibration, model or run folder do not fit; nothing is written.
        KeyboardInterrupt: When interrupted; all that was measured is in the archive.
    """
    from .run_claim import removed_if_it_fails
    from .search_run import Listener, search_all

    chosen = settings_of(calibration, settings)
    with removed_if_it_fails([RunFolder(Path(out))]):
        search_all(
            {Path(out): chosen},
            listener or Listener(),
            cluster,
            is_resumed=False,
            trust_remote_code=trust_remote_code,
        )
    return open_run(out)


def continue_runs(
    folders: Sequence[RunFolder],
    listener: Listener | None,
    cluster: Cluster | None,
    budget: int | str | None,
    calibration: str | Path | None,
    model: str | None,
    plugins: Sequence[str | Path],
    trust_remote_code: bool,
) -> list[Run]:
    """Continue runs that differ in their seed alone."""
    from .run_claim import continued
    from .search_run import Listener, search_all

    named = (plugins,) if isinstance(plugins, str | Path) else tuple(plugins)
    for path in named:
        use_plugin(path)
    changes = {"budget": budget, "calibration": calibration, "model": model, "plugins": named or None}
    runs = {folder.path: continued(folder, **changes) for folder in folders}
    search_all(runs, listener or Listener(), cluster, is_resumed=True, trust_remote_code=trust_remote_code)
    return [open_run(path) for path in runs]


def settings_of(
    calibration: str | Path | HasFolder | SearchSettings, given: dict[str, Any]
) -> SearchSettings:
    """Return the settings of a search, given whole or by name; the plugins that they name are used.

    Raises:
        SecateurError: For settings that cannot be used, or both ways at once.
    """
    named = calibration.plugins if isinstance(calibration, SearchSettings) else given.get("plugins", ())
    for path in [named] if isinstance(named, str | Path) else named:
        use_plugin(path)
    if not isinstance(calibration, SearchSettings):
        return SearchSettings.read({"calibration": folder_of(calibration), **given})
    if given:
        raise SecateurError(
            f"expected settings as SearchSettings or by name, got both ({', '.join(given)} by name); use "
            "settings.model_copy(update=...)"
        )
    return calibration
