"""Frames and fronts: the archive as plain DataFrames."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..search.objectives import look_up_objectives

if TYPE_CHECKING:
    from .archive import Archive

# Column -> what it holds; text that is missing is NaN, as everywhere in pandas.
COLUMNS = {
    "key": "stable identifier of the candidate",
    "status": "measured, rejected (by the screen), alias (of a candidate with the same masks) or failed",
    "stage": "the last stage it went through: screen, layer or model",
    "metric": "the pruning metric",
    "group": "the weights that compete with each other",
    "size": "nodes of the metric",
    "sparsity": "fraction of the prunable weights removed, counted from the masks",
    "kl": "divergence from the dense model on selection tokens, nats per token",
    "kl_holdout": "the same on holdout tokens, which no search sees",
    "layer_error": "relative squared error of the layers' outputs, mean over layers",
    "model_error": "relative squared error of the final hidden states on selection tokens",
    "perplexity": "on selection tokens",
    "seconds": "time that measuring took",
    "baseline": "name of the published metric, else missing",
    "failure": "why there is no measurement, else missing",
}
_TEXT = ("key", "status", "stage", "metric", "group", "baseline", "failure")


def frame(archive: Archive) -> pd.DataFrame:
    """Return one row a candidate in the order told, with the columns of ``COLUMNS``."""
    rows = archive.rows(
        'SELECT key, status, stage, metric, "group", size, "values", seconds, failure, alias_of '
        "FROM trials ORDER BY number"
    )
    holdout = {
        key: json.loads(values).get("kl")
        for key, values in archive.rows(
            "SELECT key, \"values\" FROM measurements WHERE part = 'holdout' AND stage = 'model'"
        )
    }
    baselines = archive.fact("baselines", {})
    records = []
    for key, status, stage, metric, group, size, text, seconds, failure, alias_of in rows:
        values = json.loads(text)
        records.append(
            {
                **values,
                "key": key, "status": status, "stage": stage, "metric": metric, "group": group,
                "size": size, "seconds": seconds, "failure": failure or None,
                "kl_holdout": holdout.get(alias_of or key), "baseline": baselines.get(key),
            }
        )  # fmt: skip
    undecided = {key for key, status, *_ in rows if status in ("rejected", "failed")}
    aliases = {key for key, *_, alias_of in rows if alias_of in undecided}
    result = pd.DataFrame.from_records(records, columns=list(COLUMNS))
    types = {name: "str" if name in _TEXT else "float64" for name in COLUMNS} | {"size": "int64"}
    result = result.astype(types)
    result.attrs = {"run": str(archive.folder), "objectives": archive.fact("objectives", [])}
    # An alias of a rejected candidate shares its screen's figures, which do not decide.
    result.attrs["undecided"] = sorted(aliases)
    return result


def front(rows: pd.DataFrame, objectives: Sequence[str]) -> pd.DataFrame:
    """Return the non-dominated rows of a frame, sorted by the first objective.

    Rows without a finite value of each objective are left out; of equal ones the first stays.

    Args:
        rows: A frame of an archive.
        objectives: Columns to minimise.

    Raises:
        ValueError: For an unknown objective.
    """
    import moocore

    names = [objective.name for objective in look_up_objectives(objectives)]
    measured = rows[rows["status"].isin(["measured", "alias"])]
    measured = measured[~measured["key"].isin(rows.attrs.get("undecided", []))]
    points = measured[names].to_numpy(dtype=float)
    finite = np.isfinite(points).all(axis=1)  # moocore ranks NaN as if it were a number
    result: pd.DataFrame = measured.loc[finite]
    if finite.any():
        result = result.loc[moocore.is_nondominated(points[finite])].sort_values(names, kind="stable")
    result.attrs = {**rows.attrs, "objectives": names}
    return result
