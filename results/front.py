"""Frames and fronts: the archive as plain DataFrames."""

from __future__ import annotations

import json
import statistics
from array import array
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
    "status": "measured, rejected (by the screen or a rung), alias (of a measured candidate) or failed",
    "stage": "the last stage it went through: screen, layer or model",
    "metric": "the pruning metric",
    "group": "the weights that compete with each other",
    "size": "nodes of the metric",
    "sparsity": "fraction of the prunable weights removed, counted from the masks",
    "density": "fraction that stays",
    "ratio_min": "least ratio of a layer",
    "ratio_max": "largest ratio of a layer",
    "kl": "divergence from the dense model on selection tokens, nats per token",
    "kl_holdout": "the same on holdout tokens, which no search sees",
    "kl_holdout_error": "standard error of kl_holdout, from its disjoint sequences",
    "kl_rung": "kl on the few tokens of the last rung; what a rung rejected has no other",
    "layer_error": "relative squared error of the layers' outputs, mean over layers",
    "model_error": "relative squared error of the final hidden states on selection tokens",
    "perplexity": "on selection tokens",
    "seconds": "time that measuring took",
    "tokens": "tokens run through the pruned model for it",
    "baseline": "name of the published rule, else missing",
    "alias_of": "key of the candidate whose masks and measurement it shares, else missing",
    "failure": "why there is no measurement, else missing",
}
_TEXT = ("key", "status", "stage", "metric", "group", "baseline", "alias_of", "failure")


def frame(archive: Archive) -> pd.DataFrame:
    """Return one row a candidate in the order told, with the columns of ``COLUMNS``."""
    rows = archive.rows(
        'SELECT key, status, stage, metric, "group", size, "values", seconds, failure, alias_of, tokens, '
        "ratios FROM trials ORDER BY number"
    )
    query = "SELECT key, \"values\" FROM measurements WHERE part = 'holdout' AND stage = 'model'"
    of_holdout = {key: json.loads(values).get("kl") for key, values in archive.rows(query)}
    holdout = holdout_parts(archive)
    baselines = archive.fact("baselines", {})
    records = []
    for key, status, stage, metric, group, size, text, seconds, failure, alias_of, tokens, ratios in rows:
        values = json.loads(text)
        sparsity = values.get("sparsity")
        each = array("d", ratios)
        parts = holdout.get(alias_of or key, ())
        records.append(
            {
                **values,
                "key": key, "status": status, "stage": stage, "metric": metric, "group": group,
                "size": size, "seconds": seconds, "tokens": tokens, "failure": failure or None,
                "density": None if sparsity is None else 1 - sparsity,
                "ratio_min": min(each, default=None), "ratio_max": max(each, default=None),
                "kl_holdout": of_holdout.get(alias_of or key),
                "kl_holdout_error": standard_error(parts),
                "baseline": baselines.get(key), "alias_of": alias_of or None,
            }
        )  # fmt: skip
    result = pd.DataFrame.from_records(records, columns=list(COLUMNS))
    types = {name: "str" if name in _TEXT else "float64" for name in COLUMNS}
    result = result.astype(types | {"size": "int64", "tokens": "int64"})
    result.attrs = {
        name: archive.fact(name) for name in ("objectives", "pattern") if archive.fact(name) is not None
    }
    result.attrs["run"] = str(archive.folder)
    return result


def holdout_parts(archive: Archive) -> dict[str, tuple[float, ...]]:
    """Return the KL of each holdout sequence, nats per token, by key of what has been measured there."""
    query = "SELECT key, parts FROM measurements WHERE part = 'holdout' AND stage = 'model' AND failure = ''"
    return {key: tuple(array("d", parts)) for key, parts in archive.rows(query)}


def standard_error(parts: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent figures, None for fewer than two."""
    return statistics.stdev(parts) / len(parts) ** 0.5 if len(parts) > 1 else None


def front(rows: pd.DataFrame, objectives: Sequence[str] | str) -> pd.DataFrame:
    """Return the non-dominated rows of a frame, sorted by the first objective.

    Rows without a finite value of each objective are left out; of equal ones the first stays.

    Args:
        rows: A frame of an archive.
        objectives: Columns to minimise, as a list or separated by commas.

    Raises:
        ValueError: For an unknown objective.
    """
    import moocore

    if isinstance(objectives, str):
        objectives = [name.strip() for name in objectives.split(",")]
    names = [objective.name for objective in look_up_objectives(objectives)]
    measured = rows[rows["status"].isin(["measured", "alias"])]
    points = measured[names].to_numpy(dtype=float)
    finite = np.isfinite(points).all(axis=1)  # moocore ranks NaN as if it were a number
    result: pd.DataFrame = measured.loc[finite]
    if finite.any():
        result = result.loc[moocore.is_nondominated(points[finite])].sort_values(names, kind="stable")
    result.attrs = {**rows.attrs, "objectives": names}
    return result
