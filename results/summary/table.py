"""Tables and verdicts for people: a run's rows in plain text."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from ..archive.frame import standard_error
from .printable import printable

if TYPE_CHECKING:
    from ..archive.archive import Archive

# Column -> (heading, format)
TABLE: Mapping[str, tuple[str, str]] = {
    "kl": ("kl", "{:.4f}"),
    "kl_holdout": ("kl holdout", "{:.4f}"),
    "kl_holdout_error": ("+-", "{:.4f}"),
    "perplexity": ("perplexity", "{:.1f}"),
    "size": ("size", "{:d}"),
    "sparsity": ("zeros", "{:.2%}"),
    "ratios": ("ratios", "{}"),
    "baseline": ("published as", "{}"),
    "metric": ("metric", "{}"),
}
COMPARED: Mapping[str, tuple[str, str]] = {
    "search": ("search", "{}"),
    "seeds": ("seeds", "{:d}"),
    "kl_holdout": ("kl holdout", "{:.4f}"),
    "spread": ("+-", "{:.4f}"),
    "published": ("best published", "{:.4f}"),
    "hypervolume": ("hypervolume", "{:.4f}"),
    "candidates": ("candidates", "{:.0f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "seconds": ("seconds", "{:,.0f}"),
    "at_25%": ("after 25 %", "{:.4f}"),
    "at_50%": ("50 %", "{:.4f}"),
    "at_75%": ("75 %", "{:.4f}"),
}
_MORE = {
    "layer_error": "{:.5f}", "model_error": "{:.4f}", "seconds": "{:.2f}", "density": "{:.4f}",
}  # fmt: skip
_LEFT = ("search", "metric", "baseline", "key", "worker", "stage")


def columns_for(objectives: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the columns of a table, the objectives that are not among them first."""
    more = {n: (n.replace("_", " "), _MORE.get(n, "{:.4g}")) for n in objectives if n not in TABLE}
    return {**more, **TABLE}


def table(rows: pd.DataFrame, columns: Mapping[str, tuple[str, str]] = TABLE) -> str:
    """Return rows as aligned text; a missing value is a dash, a column without values is left out."""
    if rows.empty:
        return "(none)"
    columns = {name: column for name, column in columns.items() if rows[name].notna().any()}
    shown = [
        [heading, *("-" if pd.isna(v) else printable(form.format(v), keep="") for v in rows[name])]
        for name, (heading, form) in columns.items()
    ]
    aligned = []
    for name, column in zip(columns, shown, strict=True):
        width = max(map(len, column))
        aligned.append([cell.ljust(width) if name in _LEFT else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def report(archive: Archive, objectives: Sequence[str] | str | None = None) -> str:
    """Return a run's front, its baselines and the verdict as text."""
    best, rows = archive.front(objectives), archive.frame()
    names = best.attrs["objectives"]
    decided = rows[rows[names].notna().all(axis=1) & rows["status"].isin(["measured", "alias"])]
    if decided.empty and len(rows):
        stages = ", ".join(sorted(set(rows["stage"])))
        return f"No candidate of {archive.folder} has {' and '.join(names)}: it reached the stage {stages}."
    baselines = decided[decided["baseline"].notna() & ~decided["key"].isin(best["key"])]
    columns = {"key": ("key", "{:.8}"), **columns_for(names)}  # as much as other commands need
    return "\n".join([
        f"front of {archive.folder} ({', '.join(names)})",
        table(_with_ratios(best), columns),
        "",
        "published rules not on the front",
        table(_with_ratios(baselines.sort_values(names[0])), columns),
        "",
        verdict(rows, best, archive.holdout_parts()),
    ])  # fmt: skip


def report_html(archive: Archive) -> str:
    """Return the front and the verdict as HTML, for notebooks."""
    best, rows = archive.front(), archive.frame()
    shown = {name: heading for name, (heading, _) in columns_for(best.attrs["objectives"]).items()}
    front = best[[name for name in ("key", *shown) if name in best and best[name].notna().any()]]
    table_of_front = front.rename(columns=shown).to_html(index=False, border=0, na_rep="-")
    sentence = html.escape(verdict(rows, best, archive.holdout_parts()))
    return (
        f"<p>{html.escape(str(archive.folder))}: {len(rows)} candidates</p>{table_of_front}<p>{sentence}</p>"
    )


def _with_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Add a column of the least and largest ratio, where layers differ at all."""
    is_even = bool((rows["ratio_max"] - rows["ratio_min"] < 1e-9).all())
    pairs = zip(rows["ratio_min"], rows["ratio_max"], strict=True)
    shown = [None if is_even else f"{low:.0%}-{high:.0%}" for low, high in pairs]
    return rows.assign(ratios=pd.Series(shown, index=rows.index, dtype="object"))


def verdict(
    rows: pd.DataFrame, front: pd.DataFrame, holdout: Mapping[str, Sequence[float]] | None = None
) -> str:
    """Return one sentence: whether anything found beats the best published rule on holdout.

    With the holdout's parts the difference has an interval, of differences sequence by sequence: what both
    rules find hard falls out.
    """
    published = rows[rows["baseline"].notna() & rows["kl_holdout"].notna()]
    found = front[front["baseline"].isna() & front["kl_holdout"].notna()]
    if published.empty:
        stages = set(rows["stage"])
        if len(rows) and "model" not in stages:
            return "This run measured layers; `secateur measure` tells what a rule does to the model."
        return "No published rule has been measured on holdout tokens yet."
    if "density" in front.attrs.get("objectives", []):
        return _of_densities(published, front)
    best = published.nsmallest(1, "kl_holdout").iloc[0]
    if rows["baseline"].notna().all():
        return (
            f"The budget ended before anything was searched; the best published rule is {best['baseline']}."
        )
    if found.empty:
        return f"Nothing was found that is not published; the best of those is {best['baseline']}."
    mine = found.nsmallest(1, "kl").iloc[0]  # chosen before the holdout is looked at
    difference = mine["kl_holdout"] - best["kl_holdout"]
    word, margin = "beats" if difference < 0 else "does not beat", ""
    error, parts = _paired_error(mine, best, holdout or {})
    if error is None:
        word = "has a lower KL than" if difference < 0 else "has no lower KL than"
        margin = "; one holdout sequence cannot tell if that is chance"
    else:
        reach = errors_in_interval(parts) * error
        margin = f"; 95 % interval of the difference {difference - reach:+.4f} to {difference + reach:+.4f}"
        if abs(difference) <= reach:
            word = "cannot be told apart from"
    zeros = f"{mine['sparsity']:.1%} zeros against {best['sparsity']:.1%}, "
    if abs(mine["sparsity"] - best["sparsity"]) < 0.001:
        zeros = ""
    is_even = mine["ratio_max"] - mine["ratio_min"] < 1e-9
    ratios = "" if is_even else f" with ratios from {mine['ratio_min']:.0%} to {mine['ratio_max']:.0%}"
    change = difference / best["kl_holdout"]
    return (
        f"The best rule found, `{mine['metric']}`{ratios}, {word} the best published one, "
        f"{best['baseline']}, on holdout: {zeros}KL {mine['kl_holdout']:.4f} against "
        f"{best['kl_holdout']:.4f} ({change:+.1%}{margin})."
    )


def _of_densities(published: pd.DataFrame, front: pd.DataFrame) -> str:
    """Return how much of a front in density belongs to what was found."""
    own = front[front["baseline"].isna()]
    return (
        f"{len(own)} of the {len(front)} rules on the front are not published ones; its densities go from "
        f"{front['density'].min():.2f} to {front['density'].max():.2f}, and {len(published)} published rules "
        "were measured beside it."
    )


def _paired_error(
    mine: pd.Series, other: pd.Series, holdout: Mapping[str, Sequence[float]]
) -> tuple[float | None, int]:
    """Return the standard error of the difference sequence by sequence, and how many there are."""

    def parts(row: pd.Series) -> Sequence[float]:
        alias = row["alias_of"]
        return holdout.get(row["key"] if pd.isna(alias) else alias, ())

    first, second = parts(mine), parts(other)
    if len(first) != len(second):
        return None, 0
    return standard_error([a - b for a, b in zip(first, second, strict=True)]), len(first)


def errors_in_interval(parts: int) -> float:
    """Return how many standard errors a mean may differ by chance, 19 times in 20: Student's t.

    Args:
        parts: What the mean is of, at least 2.
    """
    from scipy.stats import t  # takes long

    return float(t.ppf(0.975, parts - 1))
