"""Several runs: opened together, searched with several seeds, and continued."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..metrics_dsl.errors import SecateurError
from ..results.archive.database import ArchiveError
from ..results.archive.run_folder import HasFolder, RunFolder, folder_of
from ..search.core.requests import check_count
from ..search.settings import SearchSettings
from .run import Run, continue_runs, open_run, settings_of

if TYPE_CHECKING:
    import pandas

    from ..results.archive.frame import Where
    from ..workers.cluster.settings import Cluster
    from .search_run import Listener

_MOST_SEEDS = 10_000


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

    def layers(self, keys: Sequence[str] | str | None = None) -> pandas.DataFrame:
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


def run_seeds(
    calibration: str | Path | HasFolder | SearchSettings,
    out: str | Path,
    seeds: int,
    listener: Listener | None = None,
    cluster: Cluster | None = None,
    *,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Runs:
    """Run a search once for each of some seeds, the model loaded once.

    The seeds follow on the settings' own; the run folders are ``seed-0`` and so on in ``out``.

    Args:
        calibration: As for ``run_search``.
        out: The folder of all runs.
        seeds: How many runs.
        listener: Told how the runs go.
        cluster: As for ``run_search``.
        trust_remote_code: As for ``run_search``.
        settings: Settings by name, as ``SearchSettings`` describes them.

    Raises:
        SecateurError: As ``run_search``.
    """
    from .run_claim import removed_if_it_fails, same_run
    from .search_run import Listener, search_all

    chosen = settings_of(calibration, settings)
    folder = RunFolder(Path(out))
    check_count("at least 1 seed", seeds, 1, _MOST_SEEDS)
    if folder.is_run:
        raise SecateurError(f"expected a folder for runs of several seeds, got {out}, which is a run itself")
    folder.check_links()
    for run in folder.seeds:
        if {*same_run(chosen, SearchSettings.load(run.settings_file))} - {"seed"}:
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
    with removed_if_it_fails(map(RunFolder, runs)):
        search_all(runs, listener, cluster, is_resumed=False, trust_remote_code=trust_remote_code)
    return Runs([open_run(path) for path in runs])


def resume(
    folder: str | Path | HasFolder,
    listener: Listener | None = None,
    cluster: Cluster | None = None,
    *,
    budget: int | str | None = None,
    calibration: str | Path | None = None,
    model: str | None = None,
    plugins: Sequence[str | Path] = (),
    trust_remote_code: bool = False,
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
        trust_remote_code: Allow code that comes with the model; no calibration, run or file can say so.

    Raises:
        SecateurError: When the folder holds no run, or its calibration or model is another one.
    """
    place = RunFolder(folder_of(folder))
    place.check_links()
    found = continue_runs(
        place.seeds or (place,), listener, cluster, budget, calibration, model, plugins, trust_remote_code
    )
    return Runs(found) if place.seeds else found[0]
