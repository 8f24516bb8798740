"""Tables of the report: the front, the published rules, what metrics are made of, the funnel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pandas as pd

from ...metrics_dsl.parser import parse
from ..export.formula import to_latex
from ..summary.overview import Overview
from ..summary.table import columns_for, errors_in_interval
from .html import Markup, element, joined
from .svg import axis, bar, interval, shares

_TABLE_BYTES = 300_000  # of one table of candidates, which keeps the page under a megabyte
_ROW_BYTES = 480  # of one row without its metric
_WITH_LATEX = 5  # times the length of a metric, for its text and its LaTeX
_REASON = 400  # characters of a failure
_COMPARED = 10  # published rules beside the best in the verdict's picture


def figures(view: Overview) -> dict[str, tuple[str, str]]:
    """Return the columns that the run has figures for: name -> (heading, format)."""
    columns = columns_for(view.objectives)
    return {
        n: c for n, c in columns.items() if n in view.rows and view.rows[n].notna().any() and n != "metric"
    }


def shown(value: Any, form: str) -> str:
    """Return a figure as text, what is missing as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\N{EN DASH}"
    return form.format(int(value) if form == "{:d}" else value)


def ratios_text(row: pd.Series) -> str:
    """Return the least and the largest ratio of a row, or the one that all layers share."""
    low, high = row["ratio_min"], row["ratio_max"]
    return f"{low:.0%}" if high - low < 1e-9 else f"{low:.0%}\N{EN DASH}{high:.0%}"


def candidates(view: Overview, rows: pd.DataFrame, ids: Mapping[int, int], caption: str) -> Markup:
    """Return a table of candidates that can be sorted, and whose rows can be selected.

    Args:
        view: The run.
        rows: Rows of its frame.
        ids: Index of a row -> its place in the page's data.
        caption: What the rows are.
    """
    if rows.empty:
        return element("p", "None yet.", class_="empty")
    columns = figures(view)
    note = ""
    most = int(_TABLE_BYTES // (_ROW_BYTES + _WITH_LATEX * rows["metric"].str.len().mean()))
    if len(rows) > most:
        note = f" {most:,} of {len(rows):,} are listed, evenly; Archive.frame() has them all."
        rows = rows.iloc[[round(i * (len(rows) - 1) / (most - 1)) for i in range(most)]]
    heads = [element("th", element("span", "selected", class_="hidden"), class_="pick", scope="col")]
    heads += [
        element("th", heading, scope="col", data_sort="text" if name == "baseline" else "number",
                class_=None if name == "baseline" else "number")
        for name, (heading, _) in columns.items()
    ]  # fmt: skip
    heads += [element("th", "ratios", scope="col", data_sort="number", class_="number")]
    heads += [element("th", text, scope="col", data_sort="text") for text in ("metric", "key")]
    heads += [element("th", "copy a command", scope="col", class_="copy")]
    body = []
    for index, row in rows.iterrows():
        own = ids.get(int(str(index)))
        pick = element(
            "input",
            type="radio",
            name="candidate",
            value=own,
            aria_label=f"select {row['key']}",
            disabled=own is None,
        )
        cells = [element("td", pick, class_="pick")]
        for name, (_, form) in columns.items():
            value = row[name]
            is_text = name == "baseline"
            cells.append(
                element("td", shown(value, form), class_=None if is_text else "number",
                        data_value=None if is_text or pd.isna(value) else f"{value:.9g}")
            )  # fmt: skip
        width = row["ratio_max"] - row["ratio_min"]
        cells.append(element("td", ratios_text(row), class_="number", data_value=f"{width:.6g}"))
        cells.append(element("td", element("code", row["metric"]), _latex(row["metric"]), class_="metric"))
        cells.append(element("td", element("code", row["key"])))
        cells.append(element("td", class_="copy"))
        body.append(element("tr", *cells, data_candidate=own))
    table = element(
        "table",
        element("caption", caption, note),
        element("thead", element("tr", *heads)),
        element("tbody", *body),
        class_="sortable",
    )
    return _box(table, caption)


@lru_cache(maxsize=4096)
def _latex(metric: str) -> Markup:
    """Return a metric's LaTeX behind a word to click on; runs of ratios have one metric in all rows."""
    text = element("code", to_latex(parse(metric)))
    return element("details", element("summary", "LaTeX"), text, class_="latex")


def compared(view: Overview) -> Markup | None:
    """Return the holdout KL of the best rule found beside the best published ones, with error bars.

    All are chosen on selection tokens, as the verdict's are.
    """
    published = view.baselines[view.baselines["kl_holdout"].notna()]
    found = view.front[view.front["baseline"].isna() & view.front["kl_holdout"].notna()]
    if published.empty or view.is_interval:
        return None
    best = [
        rows.sort_values(view.objectives, kind="stable").head(count)
        for rows, count in ((found, 1), (published, _COMPARED))
    ]
    chosen = [each for rows in best for each in rows.iterrows()]
    reaches = {index: _reach(view, row) for index, row in chosen}
    values = [row["kl_holdout"] for _, row in chosen]
    ends = [v + s * reach for v, reach in zip(values, reaches.values(), strict=True) for s in (-1, 1)]
    scale = axis("", [v for v in ends if v > 0] if min(values) > 0 else ends)
    lines = []
    for index, row in sorted(chosen, key=lambda item: float(item[1]["kl_holdout"])):
        is_own = pd.isna(row["baseline"])
        kind = "front" if is_own else "published"
        name = element("strong", "best found") if is_own else row["baseline"]
        lines.append(
            element(
                "tr",
                element("th", name, scope="row"),
                element("td", shown(row["kl_holdout"], "{:.4f}"), class_="number"),
                element(
                    "td",
                    "\N{PLUS-MINUS SIGN} ",
                    shown(row["kl_holdout_error"], "{:.4f}"),
                    class_="number soft",
                ),
                element("td", interval(scale, row["kl_holdout"], reaches[index], kind)),
                class_="own" if is_own else None,
            )
        )
    count = f"best {_COMPARED} of {len(published)}" if len(published) > _COMPARED else f"{len(published)}"
    caption = (
        "KL on holdout tokens, nats per token, \N{PLUS-MINUS SIGN} standard error; bars are 95 % "
        f"intervals of each figure alone. Published rules: {count}."
    )
    table = element("table", element("caption", caption), element("tbody", *lines), class_="intervals")
    return _box(table, "Holdout KL")


def _reach(view: Overview, row: pd.Series) -> float:
    """Return half the 95 % interval of a row's holdout KL; 0 where one sequence tells nothing of it."""
    parts = view.holdout.get(row["key"] if pd.isna(row["alias_of"]) else row["alias_of"], ())
    return errors_in_interval(len(parts)) * float(row["kl_holdout_error"]) if len(parts) > 1 else 0.0


def use(view: Overview) -> Markup | None:
    """Return which leaves and operators the measured metrics use; None where few metrics were tried."""
    rows = view.use()
    if rows.empty or view.decided["metric"].nunique() < 4:
        return None
    lines = [
        element(
            "tr",
            element("th", element("code", row["name"]), scope="row", title=row["meaning"]),
            element("td", f"{row['best']:.0%}", class_="number"),
            element("td", f"{row['every']:.0%}", class_="number soft"),
            element("td", shares(row["best"], row["every"])),
        )
        for _, row in rows.sort_values(["best", "every"], ascending=False, kind="stable").iterrows()
    ]
    heads = [element("th", text, scope="col", class_=c) for text, c in (
        ("word", None), ("best quarter", "number"), ("all", "number"), ("", None))]  # fmt: skip
    metrics = view.decided["metric"].nunique()
    caption = (
        "Share of metrics with each leaf and operator: the best quarter by "
        f"{view.objectives[0].replace('_', ' ')} (large dot) against all {metrics:,} measured ones (grey)."
    )
    table = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *heads)),
        element("tbody", *lines),
    )
    return _box(table, "Leaves and operators")


def funnel(view: Overview) -> Markup:
    """Return how many candidates ended at each stage, and why some failed."""
    counts = view.funnel()
    total = max(int(counts.to_numpy().sum()), 1)
    lines = []
    for stage in counts.index:
        for status in counts.columns:
            count = int(counts.loc[stage, status])
            if count:
                lines.append(
                    element(
                        "tr",
                        element("th", f"{status} at {stage}", scope="row"),
                        element("td", f"{count:,}", class_="number"),
                        element("td", f"{count / total:.0%}", class_="number soft"),
                        element("td", bar(count / total, str(status))),
                    )
                )
    caption = (
        f"Where {view.counts.candidates:,} candidates ended; the stage is the last that each went through."
    )
    if aliases := view.counts.aliases_of:
        those = ", ".join(f"{number:,} of {status}" for status, number in aliases.items())
        caption += f" Aliases ({those} ones) share the masks and the measurement of an earlier one."
    found = [_box(element("table", element("caption", caption), element("tbody", *lines)), "Funnel")]
    reasons = view.failures()
    if len(reasons):
        rows = [
            element(
                "tr",
                element("td", f"{count:,}", class_="number"),
                element("td", str(reason)[:_REASON], class_="wrap"),
            )
            for reason, count in reasons.head(20).items()
        ]
        more = f", the 20 most frequent of {len(reasons)}" if len(reasons) > 20 else ""
        table = element("table", element("caption", f"Why candidates failed{more}"), element("tbody", *rows))
        found.append(_box(table, "Failures"))
    else:
        found.append(element("p", "No candidate failed.", class_="soft"))
    return joined(*found)


def pairs(caption: str, values: Mapping[str, Any]) -> Markup:
    """Return a table of names and values."""
    rows = [
        element("tr", element("th", name, scope="row"), element("td", element("code", value), class_="wrap"))
        for name, value in values.items()
    ]
    return _box(element("table", element("caption", caption), element("tbody", *rows)), caption)


def _box(table: Markup, label: str) -> Markup:
    """Return a table in a box of its own, in which what is too wide scrolls."""
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)
