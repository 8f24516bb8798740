"""Runs: opening one or several for reading."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from . import pareto
from .archive import Archive
from .database import ArchiveError
from .frame import Where

__all__ = ["Runs", "open_many", "open_run", "pareto"]


def open_run(folder: str | Path) -> Archive:
    """Open a run for reading, also while it is being written.

    Raises:
        ArchiveError: When the folder holds no run.
    """
    return Archive(folder)


def open_many(folders: str | Path | Sequence[str | Path]) -> Runs:
    """Open several runs: a pattern such as ``runs/*`` or a list of folders; one of seeds is all its runs.

    Raises:
        ArchiveError: When there is none.
    """
    wanted = [folders] if isinstance(folders, str | Path) else folders
    found: list[Path] = []
    for pattern in map(str, wanted):
        places = sorted(map(Path, glob.glob(pattern))) or [Path(pattern)]
        for place in places:
            seeds = sorted(place.glob("seed-*/archive.sqlite"), key=lambda p: (len(str(p)), p))
            is_run = (place / "archive.sqlite").is_file()
            found += [place] if is_run else [path.parent for path in seeds]
    if not found:
        raise ArchiveError(f"expected run folders, got {', '.join(map(str, wanted))}, where there is none")
    return Runs([Archive(folder) for folder in dict.fromkeys(found)])


class Runs:
    """Several runs, whose frames come as one with a column ``run`` in front."""

    def __init__(self, archives: Sequence[Archive]) -> None:
        self.archives = list(archives)

    def __len__(self) -> int:
        return len(self.archives)

    def __iter__(self) -> Iterator[Archive]:
        return iter(self.archives)

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all runs."""
        for archive in self.archives:
            archive.close()

    def frame(self, where: Where = None, stage: str | None = None) -> pd.DataFrame:
        """Return the rows of all runs."""
        return self._joined(lambda archive: archive.frame(where, stage))

    def front(self, objectives: Sequence[str] | str | None = None, where: Where = None) -> pd.DataFrame:
        """Return each run's own front; ``frame().pareto.front(...)`` is the front of all together."""
        return self._joined(lambda archive: archive.front(objectives, where))

    def best(self, by: str = "kl", where: Where = None) -> pd.DataFrame:
        """Return each run's row with the least value of a column."""
        return self._joined(lambda archive: archive.best(by, where).to_frame().T)

    def layers(self, keys: Sequence[str] | None = None) -> pd.DataFrame:
        """Return the layers of candidates, of each run's front if no keys are given."""
        return self._joined(lambda archive: archive.layers(keys))

    def history(self, reference: Sequence[float] | None = None) -> pd.DataFrame:
        """Return what each run had found for what cost."""
        return self._joined(lambda archive: archive.history(reference))

    def baselines(self) -> pd.DataFrame:
        """Return the published rules of each run."""
        return self._joined(lambda archive: archive.baselines())

    def _joined(self, read: Callable[[Archive], pd.DataFrame]) -> pd.DataFrame:
        parts = []
        for archive in self.archives:
            rows = read(archive)
            rows.insert(0, "run", pd.Series(str(archive.folder), index=rows.index, dtype="str"))
            parts.append(rows)
        result = pd.concat(parts, ignore_index=True)
        result.attrs = {**parts[0].attrs, "run": [str(archive.folder) for archive in self.archives]}
        return result
