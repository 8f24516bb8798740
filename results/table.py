"""Tables and verdicts for people: a run's rows in plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

# Column -> (heading, format)
TABLE: Mapping[str, tuple[str, str]] = {
    "kl": ("kl", "{:.4f}"),
    "kl_holdout": ("kl holdout", "{:.4f}"),
    "perplexity": ("perplexity", "{:.1f}"),
    "size": ("size", "{:d}"),
    "sparsity": ("zeros", "{:.2%}"),
    "baseline": ("published as", "{}"),
    "metric": ("metric", "{}"),
}


_MORE = {"layer_error": "{:.5f}", "model_error": "{:.4f}", "seconds": "{:.2f}"}


def columns_for(objectives: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the columns of a table, the objectives that are not among them first."""
    more = {name: (name.replace("_", " "), _MORE[name]) for name in objectives if name not in TABLE}
    return {**more, **TABLE}


def table(rows: pd.DataFrame, columns: Mapping[str, tuple[str, str]] = TABLE) -> str:
    """Return rows as aligned text; a missing value is a dash."""
    if rows.empty:
        return "(none)"
    shown = [
        [heading, *("-" if pd.isna(value) else form.format(value) for value in rows[name])]
        for name, (heading, form) in columns.items()
    ]
    aligned = []
    for name, column in zip(columns, shown, strict=True):
        width = max(map(len, column))
        numeric = name not in ("metric", "baseline")
        aligned.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def verdict(rows: pd.DataFrame, front: pd.DataFrame) -> str:
    """Return one sentence: whether anything found beats the best published metric on holdout."""
    published = rows[rows["baseline"].notna() & rows["kl_holdout"].notna()]
    found = front[front["baseline"].isna() & front["kl_holdout"].notna()]
    if published.empty:
        return "No published metric has been measured on holdout tokens yet."
    best = published.nsmallest(1, "kl_holdout").iloc[0]
    if found.empty:
        return f"Nothing was found that is not published; the best of those is {best['baseline']}."
    mine = found.nsmallest(1, "kl").iloc[0]  # chosen before the holdout is looked at
    change = mine["kl_holdout"] / best["kl_holdout"] - 1
    word = "beats" if change < 0 else "does not beat"
    return (
        f"The best metric found, `{mine['metric']}`, {word} the best published one, {best['baseline']}, "
        f"on holdout: KL {mine['kl_holdout']:.4f} against {best['kl_holdout']:.4f} ({change:+.1%})."
    )
