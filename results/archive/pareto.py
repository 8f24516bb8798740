"""The accessor ``DataFrame.pareto``: fronts of anybody's table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ...metrics_dsl.errors import SecateurError
from .front import hypervolume, non_dominated


@pd.api.extensions.register_dataframe_accessor("pareto")
class Pareto:
    """Non-dominated rows of a DataFrame: ``rows.pareto.front(minimize=["kl", "density"])``.

    Registered when runs are opened with ``secateur.open``, and by ``import secateur.results.pareto``.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        self._rows = rows

    def front(self, minimize: Sequence[str] | str = (), maximize: Sequence[str] | str = ()) -> pd.DataFrame:
        """Return the rows that no other dominates, in their order; of equal ones the first.

        Rows without a finite number in each column are left out.

        Raises:
            SecateurError: For a column that is missing or no number, or for no columns at all.
        """
        return self._rows[non_dominated(self._points(minimize, maximize))]

    def hypervolume(
        self,
        reference: Sequence[float],
        minimize: Sequence[str] | str = (),
        maximize: Sequence[str] | str = (),
    ) -> float:
        """Return the volume that the rows dominate, up to a reference in the order of the columns.

        Raises:
            SecateurError: As ``front``, or for a reference of another length.
        """
        points = self._points(minimize, maximize)
        least = len(_listed(minimize))
        signs = np.where(np.arange(points.shape[1]) < least, 1.0, -1.0)
        if len(reference) != points.shape[1]:
            raise SecateurError(f"expected a reference of {points.shape[1]} numbers, got {len(reference)}")
        return hypervolume(points, list(signs * np.asarray(reference, dtype=float)))

    def _points(self, minimize: Sequence[str] | str, maximize: Sequence[str] | str) -> np.ndarray:
        least, most = _listed(minimize), _listed(maximize)
        missing = [name for name in (*least, *most) if name not in self._rows.columns]
        if missing or not (least or most):
            raise SecateurError(
                f"expected columns to minimize or maximize among {', '.join(map(str, self._rows.columns))}, "
                f"got {missing[0] if missing else 'none'}"
            )
        try:
            return np.column_stack(
                [self._rows[name].to_numpy(dtype=float, na_value=np.nan) for name in least]
                + [-self._rows[name].to_numpy(dtype=float, na_value=np.nan) for name in most]
            )
        except (TypeError, ValueError):
            raise SecateurError(f"expected columns of numbers, got {', '.join((*least, *most))}") from None


def _listed(names: Sequence[str] | str) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
