"""Run folders: whether a folder is a run or holds runs of several seeds, and where their files are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.plugins import lacking
from ...search.core.files import OF_A_RUN, check_name, expanded
from ...search.core.reading import read_toml
from .database import ArchiveError, BeginningError, is_locked

SETTINGS, ARCHIVE, LOCK = OF_A_RUN[0], OF_A_RUN[1], OF_A_RUN[-1]
_SEEDS = "seed-*"


@dataclass(frozen=True)
class RunFolder:
    """A folder that is a run, holds the runs of several seeds, or neither.

    Args:
        path: The folder, which need not exist.

    Raises:
        ArchiveError: For a path that cannot be written down in the files that tell of the run.
    """

    path: Path

    def __post_init__(self) -> None:
        check_name(self.path, "a run folder", ArchiveError)
        object.__setattr__(self, "path", expanded(self.path, ArchiveError))

    @property
    def settings_file(self) -> Path:
        """The TOML file with the run's settings, which is written before anything is measured."""
        return self.path / SETTINGS

    @property
    def archive_file(self) -> Path:
        """The SQLite file with everything the run has measured."""
        return self.path / ARCHIVE

    @property
    def lock_file(self) -> Path:
        """The file that the process writing the run holds, and that says which one it is."""
        return self.path / LOCK

    @property
    def is_run(self) -> bool:
        """Whether it holds a run's settings or archive."""
        return self.settings_file.is_file() or self.archive_file.is_file()

    @property
    def has_archive(self) -> bool:
        """Whether there is anything to read."""
        return self.archive_file.is_file()

    @property
    def seeds(self) -> tuple[RunFolder, ...]:
        """The runs of several seeds that it holds, in the order of seeds; none where it is a run itself."""
        if self.is_run:
            return ()
        inside = (p for p in self.path.glob(_SEEDS) if RunFolder(p).is_run)
        return tuple(RunFolder(p) for p in sorted(inside, key=lambda p: (len(p.name), p.name)))

    def check_links(self) -> None:
        """Check that the folders of its seeds are its own, before they are written.

        Raises:
            ArchiveError: For one that is a link, which may lead to someone else's.
        """
        for place in self.path.glob(_SEEDS):
            if place.is_symlink():
                raise ArchiveError(f"expected a folder of the run, got {place}, which is a link; remove it")

    def of_seed(self, seed: int) -> RunFolder:
        """Return the folder of one of several seeds, whether it exists or not."""
        return RunFolder(self.path / _SEEDS.replace("*", str(seed)))

    @property
    def of_several(self) -> Path:
        """The folder that is named for the run: that of all seeds, where it is one of several."""
        whole = self.path.absolute()
        return whole.parent if whole.name.startswith(_SEEDS.removesuffix("*")) else whole

    def runs(self) -> tuple[RunFolder, ...]:
        """Return the run that it is, or those of its seeds.

        Raises:
            ArchiveError: When it holds none.
        """
        if not (found := (self,) if self.is_run else self.seeds):
            raise self.missing()
        return found

    def settings(self) -> dict[str, Any]:
        """Return what the run's file of settings says, unchecked; nothing where there is none."""
        if not self.settings_file.is_file():
            return {}
        return read_toml(self.settings_file, "search", ArchiveError)

    def missing(self) -> ArchiveError:
        """Return what is wrong with a folder that holds no archive of its own."""
        if self.seeds:
            return ArchiveError(
                f"expected one run, got {self.path} with runs of {len(self.seeds)} seeds; name one, such as "
                f"{self.seeds[0].path}, or compare them with `secateur compare {self.path}`"
            )
        if self.settings_file.is_file():
            return self.beginning()
        return ArchiveError(
            f"expected a run folder with an archive, got {self.path} without one; runs are made by "
            "`secateur search`"
        )

    def beginning(self) -> BeginningError:
        """Return what is wrong with a run that has written nothing yet."""
        if is_locked(self.lock_file):
            return BeginningError(f"the run in {self.path} is just beginning; try again in a moment")
        wal = self.archive_file.with_name(f"{self.archive_file.name}-wal").name
        return BeginningError(
            f"the run in {self.path} holds nothing and nobody writes it: its writer ended before it measured "
            f"anything, or it was copied without {wal}; copy all of its files, or begin with "
            f"`secateur resume {self.path}`"
        )


class HasFolder(Protocol):
    """What knows its run folder: a run, or its archive."""

    @property
    def folder(self) -> Path:
        """The run folder."""


def folder_of(run: str | Path | HasFolder) -> Path:
    """Return the folder of a run that is given as a path, or as an object that knows it.

    Raises:
        ArchiveError: When it is neither.
    """
    if isinstance(run, str | Path):
        return Path(run)
    if not hasattr(run, "folder"):
        raise ArchiveError(f"expected a run or the path of its folder, got {run!r}")
    return run.folder


def explained(folder: Path, noted: Iterable[Mapping[str, str]], error: SecateurError) -> SecateurError:
    """Return what is wrong with reading a run, worded by the plugins that it notes and this process lacks."""
    found = lacking(noted)
    return ArchiveError(f"{folder} was made with {found} ({error})") if found else error
