"""Frames: the rows of an archive as plain DataFrames, with documented columns."""

from __future__ import annotations

import io
import statistics
import tokenize
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ...metrics_dsl.errors import SecateurError
from ...search.core.candidate import STAGES
from ...search.core.objectives import OBJECTIVES, Objective, density, look_up
from . import stored
from .database import ArchiveError
from .run_folder import explained
from .stored import FIGURES

if TYPE_CHECKING:
    from .store import Store

Where = str | Callable[[pd.DataFrame], Any] | None
# Column -> what it holds; text that is missing is NaN, as everywhere in pandas.
COLUMNS = {
    "key": "stable identifier of the candidate",
    "status": "measured, rejected (by the screen or a rung), alias (of a measured candidate) or failed; that "
    "of a rejected or failed one is its aliases' too",
    "stage": "the last stage it went through: screen, layer or model",
    "metric": "the pruning metric",
    "group": "the weights that compete with each other",
    "size": "nodes of the metric",
    "sparsity": "fraction of the prunable weights removed, counted from the masks",
    "density": "fraction that stays, to four places",
    "ratio_min": "least ratio of a layer",
    "ratio_max": "largest ratio of a layer",
    "kl": "divergence from the dense model on selection tokens, nats per token",
    "kl_holdout": "the same on holdout tokens, which no search sees",
    "kl_holdout_error": "standard error of kl_holdout, from its disjoint sequences",
    "kl_rung": "kl on the few tokens of the first rung; what a rung rejected has no other",
    "layer_error": "relative squared error of the layers' outputs, mean over layers",
    "model_error": "relative squared error of the final hidden states on selection tokens",
    "perplexity": "on selection tokens",
    "seconds": "time that measuring took",
    "tokens": "tokens run through the pruned model for it",
    "worker": "where its last stage was measured on a cluster, else missing",
    "attempts": "most times that a stage was begun: more than 1 where it was begun again",
    "baseline": "name of the published rule, else missing",
    "alias_of": "key of the candidate whose masks and measurement it shares, else missing",
    "failure": "why there is no measurement, else missing",
}
LAYER_COLUMNS = {
    "key": "the candidate",
    "layer": "full name of the linear layer",
    "block": "number of its decoder block",
    "kind": "role of the layer in its block, such as q_proj",
    "ratio": "fraction of its weights that is removed",
    "error": "relative squared error of its output; missing where layers were not measured",
    "sensitivity": "change of kl with its ratio, nats per token; missing where it was not asked for",
}
UNITS = {
    "kl": "nats per token", "kl_holdout": "nats per token", "kl_holdout_error": "nats per token",
    "kl_rung": "nats per token", "seconds": "seconds", "tokens": "tokens", "size": "nodes",
    "sparsity": "fraction", "density": "fraction", "ratio_min": "fraction", "ratio_max": "fraction",
}  # fmt: skip
# What a condition may ask of a column.
_ASKED = (
    "str", "contains", "startswith", "endswith", "match", "fullmatch", "len", "lower", "upper", "count",
    "isna", "notna", "isnull", "notnull", "isin", "between", "abs", "round", "duplicated",
    "min", "max", "mean", "median", "quantile", "rank", "index",
)  # fmt: skip
_TEXT = ("key", "status", "stage", "metric", "group", "worker", "baseline", "alias_of", "failure")
_STORED = ("key", "status", "stage", "metric", "group", "size", "seconds", "failure", "alias_of", "tokens",
           "worker", "attempts",
           "ratio_min", "ratio_max", *FIGURES)  # fmt: skip


def frame(store: Store, numbers: Sequence[int] | None = None, objectives: Sequence[str] = ()) -> pd.DataFrame:
    """Return one row a candidate in the order told, with the columns of ``COLUMNS``.

    Objectives that others have added follow: the run's, and those that are asked for. ``attrs`` hold the run,
    its objectives, pattern, units and versions. With ``numbers`` only those rows come.

    Raises:
        SecateurError: For an objective that is not known, or a plugin that is not in use.
    """
    with store.reading():
        names = dict.fromkeys(n for n in (*store.objectives, *objectives) if n not in COLUMNS)
        added = {name: look_up_of_run(store, name) for name in names}
        worked_out = {name: values_of(store, objective) for name, objective in added.items()}
        among = "" if numbers is None else f" WHERE number IN ({', '.join(map(str, numbers))})"
        wanted = ", ".join(f'"{name}"' for name in _STORED)
        rows = store.rows(f"SELECT {wanted} FROM trials{among} ORDER BY number")
        held = store.rows(
            "SELECT key, \"values\", parts FROM measurements WHERE part = 'holdout' AND stage = 'model'"
        )
        facts = {name: store.fact(name) for name in ("objectives", "pattern", "versions", "baselines")}
    columns: dict[str, Any] = dict(zip(_STORED, zip(*rows, strict=True), strict=True)) if rows else {}
    columns["density"] = density(pd.Series(columns.get("sparsity", ()), dtype="float64"))
    originals = [a or key for a, key in zip(columns.get("alias_of", ()), columns.get("key", ()), strict=True)]
    what = f"holdout figures in {store.folder}"
    kl = {key: stored.values(text, what).get("kl") for key, text, _ in held}
    errors = {key: standard_error(stored.floats(parts, what)) for key, _, parts in held}
    columns["kl_holdout"] = list(map(kl.get, originals))
    columns["kl_holdout_error"] = list(map(errors.get, originals))
    columns["baseline"] = list(map((facts.pop("baselines") or {}).get, columns.get("key", ())))
    for name in ("failure", "alias_of", "worker"):
        columns[name] = [text or None for text in columns.get(name, ())]
    for name, values in worked_out.items():
        columns[name] = values if numbers is None else [values[n - 1] for n in sorted(numbers)]
    types = {name: "str" if name in _TEXT else "float64" for name in (*COLUMNS, *added)}
    types |= {"size": "int64", "tokens": "int64", "attempts": "int64"}
    try:
        result = pd.DataFrame({name: pd.Series(columns.get(name, ()), dtype=types[name]) for name in types})
    except (TypeError, ValueError, OverflowError) as error:
        raise ArchiveError(f"the rows of {store.folder} cannot be read: {error}") from None
    result.attrs = {name: value for name, value in facts.items() if value is not None}
    units = UNITS | {name: objective.unit for name, objective in added.items() if objective.unit}
    result.attrs |= {"run": str(store.folder), "units": units}
    return result


# Objectives that others have added ---------------------------------------------------------------


def look_up_of_run(store: Store, name: str) -> Objective:
    """Return an objective of a run.

    Raises:
        SecateurError: For an unknown one; it says which plugin the run needs.
    """
    try:
        return look_up(OBJECTIVES, name, "an objective")
    except SecateurError as error:
        raise explained(store.folder, store.fact("plugins", []), error) from None


def values_of(store: Store, objective: Objective) -> list[float | None]:
    """Return an objective's value of each trial in the order told, None for what lacks it.

    Values are kept for as long as the store is open, by what a row says of its trial.
    """
    known = store.worked_out.setdefault(objective.name, {})
    marks = store.rows("SELECT key, status, stage, tokens, seconds FROM trials ORDER BY number")
    first = next((i for i, mark in enumerate(marks) if mark not in known), len(marks))
    new = store.trials(after=first) if first < len(marks) else []
    for mark, trial in zip(marks[first:], new, strict=True):
        known[mark] = None if trial.measurement.failure else objective.value(trial)
    return [known[mark] for mark in marks]


# Rows of a frame ---------------------------------------------------------------------------------


def chosen(rows: pd.DataFrame, where: Where, stage: str | None = None) -> pd.DataFrame:
    """Return the rows that a condition chooses.

    Args:
        rows: A frame.
        where: A text for ``DataFrame.query`` such as ``"sparsity > 0.5"``, a function of the frame that
            returns a boolean for each row, or None for all.
        stage: The last stage that rows went through, or None for any.

    Raises:
        SecateurError: For an unknown stage, or a condition that cannot be read.
    """
    if stage is not None:
        if stage not in STAGES:
            raise SecateurError(f"expected a stage among {', '.join(STAGES)}, got {stage!r}")
        rows = rows[rows["stage"] == stage]
    if where is None:
        return rows
    if callable(where):
        return rows[where(rows)]
    try:
        _check_condition(where)
        return rows.query(where, local_dict={}, global_dict={})
    except Exception as error:  # whatever pandas makes of a text it cannot read
        raise SecateurError(
            f'expected a condition on columns such as "sparsity > 0.5", got {where!r}: {error}'
        ) from None


def _check_condition(where: str) -> None:
    """Refuse what a condition on columns does not need: pandas would run code, or write a file.

    Raises:
        ValueError: For a variable of ours, or an attribute that is not among ``_ASKED``.
    """
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(where).readline):
        if token.string == "@" or (before == "." and token.string not in _ASKED):
            raise ValueError(f"{before}{token.string} has no place in a condition; give a function instead")
        before = token.string


def layers(store: Store, keys: Sequence[str]) -> pd.DataFrame:
    """Return one row a layer of some candidates, with the columns of ``LAYER_COLUMNS``.

    Raises:
        SecateurError: When the run does not know its layers' names, as those of earlier releases.
    """
    known = store.fact("layers")
    if known is None:
        raise SecateurError(f"{store.folder} was written by a release that did not keep the layers' names")
    parts = []
    for key, numbers in zip(
        keys, store.numbers(("ratios", "layer_errors", "sensitivities"), keys), strict=True
    ):
        ratios, errors, slopes = (np.asarray(row, dtype=np.float64) for row in numbers)
        if len(ratios) != len(known) or any(len(row) not in (0, len(known)) for row in (errors, slopes)):
            raise ArchiveError(
                f"expected a number for each of {len(known)} layers of candidate {key}, got others in "
                f"{store.folder}"
            )
        missing = np.full(len(ratios), np.nan)
        parts.append(pd.DataFrame({
            "key": pd.Series([key] * len(ratios), dtype="str"),
            "layer": pd.Series([layer["name"] for layer in known], dtype="str"),
            "block": [layer["block"] for layer in known],
            "kind": pd.Series([layer["kind"] for layer in known], dtype="str"),
            "ratio": ratios,
            "error": errors if len(errors) else missing,
            "sensitivity": slopes if len(slopes) else missing,
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(LAYER_COLUMNS))


def joined(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the frames of several runs as one, with a column ``run`` in front that names each row's."""
    parts = [rows.assign(run=pd.Series(name, index=rows.index, dtype="str")) for name, rows in frames.items()]
    result = pd.concat([rows[["run", *rows.columns[:-1]]] for rows in parts], ignore_index=True)
    result.attrs = {**next(iter(frames.values())).attrs, "run": list(frames)}
    return result


def holdout_parts(store: Store) -> dict[str, tuple[float, ...]]:
    """Return the KL of each holdout sequence, nats per token, by key of what has been measured there."""
    query = "SELECT key, parts FROM measurements WHERE part = 'holdout' AND stage = 'model' AND failure = ''"
    what = f"holdout figures in {store.folder}"
    return {key: stored.floats(parts, what) for key, parts in store.rows(query)}


def standard_error(parts: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent figures, None for fewer than two."""
    return statistics.stdev(parts) / len(parts) ** 0.5 if len(parts) > 1 else None
