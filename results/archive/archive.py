"""The archive of a run: the store with all that people ask of it, as DataFrames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...metrics_dsl.errors import SecateurError
from ...search.core.coverage import Coverage
from ...search.core.reading import Given
from .database import ArchiveError
from .keys import whole_key
from .store import Store

if TYPE_CHECKING:
    import pandas

    from .frame import Where


class Archive(Store):
    """The archive in a run folder, for reading also while the run goes on.

    Args:
        folder: The run folder.
        write: Open for writing, which makes the file if needed and locks out other writers.

    Raises:
        ArchiveError: When there is no archive, it cannot be read, or another process is writing it.
    """

    @property
    def coverage(self) -> Coverage | None:
        """What the run's sparsities are counted over; None where an older run did not note it."""
        noted = self.fact("coverage", {})
        return Coverage.read(Given(noted, str(self.folder), ArchiveError, "the fact coverage"))

    def frame(self, where: Where = None, stage: str | None = None) -> pandas.DataFrame:
        """Return one row a candidate in the order told, as in ``frame.COLUMNS``.

        Args:
            where: A text for ``DataFrame.query``, or a function of the frame; all rows if left out.
            stage: The last stage that rows went through; any if left out.

        Raises:
            SecateurError: For a condition or stage that cannot be read.
        """
        from .frame import chosen, frame  # imports pandas

        return chosen(frame(self), where, stage)

    def front(self, objectives: Sequence[str] | str | None = None, where: Where = None) -> pandas.DataFrame:
        """Return the non-dominated rows of ``frame(where)``, by the first objective.

        Args:
            objectives: Columns to minimise; the run's own if left out.
            where: As for ``frame``.

        Raises:
            SecateurError: For an unknown objective, or a condition that cannot be read.
        """
        from .frame import chosen, frame
        from .front import front, front_of_store, names_of

        names = names_of(objectives or self.objectives, self)
        if where is None:
            return front_of_store(self, names)
        return front(chosen(frame(self, objectives=names), where), names)

    def best(self, by: str = "kl", where: Where = None) -> pandas.Series:
        """Return the row with the least value of a column among those measured to the end.

        Of equal ones the run's objectives decide.

        Raises:
            SecateurError: For an unknown column, or when no row has a value.
        """
        from .front import best_of

        rows = self.frame(where)
        if by not in rows or rows[by].dtype.kind not in "fi":
            raise SecateurError(f"expected a column of numbers such as kl, got {by!r}")
        best = best_of(rows, list(dict.fromkeys((by, *self.objectives))))
        if best is None:
            raise SecateurError(f"no candidate of {self.folder} has been measured for {by!r} yet")
        return best

    def layers(self, keys: Sequence[str] | str | None = None) -> pandas.DataFrame:
        """Return one row a layer of some candidates, by default the front's: ``frame.LAYER_COLUMNS``."""
        from .frame import layers

        if keys is None:
            return layers(self, list(self.front()["key"]))
        return layers(self, [whole_key(self, key) for key in ([keys] if isinstance(keys, str) else keys)])

    def history(self, reference: Sequence[float] | None = None) -> pandas.DataFrame:
        """Return what had been found for what cost, one row a candidate, as in ``front.HISTORY_COLUMNS``."""
        from .front import history

        return history(self.frame(), self.objectives, reference)

    def hypervolume(self, reference: Sequence[float] | None = None) -> float:
        """Return the volume that the front dominates, up to a reference or else the largest values measured.

        Raises:
            SecateurError: For a reference with another number of objectives than the run has.
        """
        from .front import hypervolume, reference_of

        rows, names = self.front(), self.objectives
        end = reference if reference is not None else reference_of(self.frame(), names)
        return hypervolume(rows[names].to_numpy(dtype=float), end)

    def baselines(self) -> pandas.DataFrame:
        """Return the rows of published rules, by the first objective."""
        rows = self.frame()
        return rows[rows["baseline"].notna()].sort_values(self.objectives[0], kind="stable")

    def holdout_parts(self) -> dict[str, tuple[float, ...]]:
        """Return the KL of each holdout sequence, nats per token, by key of what was measured there."""
        from .frame import holdout_parts

        return holdout_parts(self)
