"""The report: one HTML file on a run, for reading offline and passing on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ...search.core.budget import Budget
from ...search.core.coverage import percent
from ...search.core.files import Output, whole
from ..archive.archive import Archive
from ..summary.overview import Overview
from ..summary.table import verdict
from .charts import Pictures
from .html import Markup, document, element, joined
from .page_data import PageData, commands
from .tables import candidates, compared, figures, funnel, pairs, ratios_text, shown, use

_BEST = 20  # rules in the table of a run with one objective
# How a page of ``html.document`` begins, by which an earlier report is known.
_MARK = re.compile(
    rb'<!DOCTYPE html>\s*<html lang="en"><head>(<meta [^<>]*>)*<meta name="generator" content="secateur">'
)
_REPORT = Output(
    "a file to write, new or an earlier report", replaces=lambda file: bool(_MARK.match(file.read(4096)))
)


def write_report(archive: Archive, path: str | Path, *, force: bool = False) -> Path:
    """Write the report of a run, also of one that is being written, replacing an earlier one in one step.

    With ``force`` it takes the place of any file that is of no run or calibration.

    Raises:
        SecateurError: When the path cannot become a file or holds something else.
    """
    with whole(path, replace(_REPORT, force=force), archive.folder) as place:
        with archive.reading():
            text = report_html(Overview(archive))
        place.write_bytes(text.encode())
    return Path(path).resolve()


def report_html(view: Overview) -> str:
    """Return the report as the text of an HTML file under a megabyte."""
    data = PageData(view)
    pictures = Pictures(view, data.ids, data.thinned)
    name = view.folder.resolve().name or str(view.folder)
    body = joined(
        _header(view, name),
        element(
            "main",
            _verdict(view),
            _section("front", _front_name(view).capitalize(), _front(view, pictures)),
            _section("ratios", "Ratios", _heat(view, pictures, data)),
            _section("course", "Course of the search", _course(pictures)),
            _section("parts", "What became of candidates", _parts(view)),
            _best(view, data.ids),
            _section("published", "Published rules", candidates(
                view, view.baselines.sort_values(view.objectives[0]), data.ids, "Measured in the same run.")),
            _section("card", "Run card", _card(view)),
        ),
        element("footer", "Written by secateur. This file makes no connections."),
        element("div", id="tip", role="status", hidden=True),
    )  # fmt: skip
    return document(f"{name} \N{EN DASH} secateur", body, data.content())


# Sections --------------------------------------------------------------------------------------


def _section(name: str, heading: str, *content: object) -> Markup:
    return element("section", element("h2", heading), *content, id=name, aria_label=heading)


def _header(view: Overview, name: str) -> Markup:
    card, settings, covered = view.card, view.settings, view.coverage
    facts = {
        "model": _source(card.get("model")),
        "text": _source(card.get("text")),
        "layers": f"{len(view.layers)} linear layers" if view.layers else None,
        "sparsity counts over": f"{percent(covered.share)} of the block weights" if covered else None,
        "seed": settings.get("seed"),
        "budget": settings.get("budget"),
        "state": _state(view),
    }
    shown_facts = [
        element("div", element("dt", term), element("dd", value))
        for term, value in facts.items()
        if value is not None
    ]
    links = ["front", "ratios", "course", "parts", "front-table", "published", "card"]
    words = {"front": _front_name(view), "parts": "candidates", "front-table": "rules"}
    nav = [element("a", words.get(link, link), href=f"#{link}") for link in links]
    return element(
        "header",
        element("p", "secateur run", class_="soft kicker"),
        element("h1", name),
        element("p", view.searched),
        element("p", covered.warning, class_="warning") if covered and covered.warning else None,
        element("dl", *shown_facts, class_="facts"),
        element("nav", *nav, aria_label="Sections"),
    )


def _front_name(view: Overview) -> str:
    return "front" if len(view.objectives) > 1 else "best rule"


def _source(place: str | None) -> str | None:
    """Return the last part of a path of this machine, which says enough; a hub name stays whole."""
    return Path(place).name if place and Path(place).is_absolute() else place


def _state(view: Overview) -> str:
    """Return how far the run is, and whether its holdout figures are there."""
    counts = view.counts
    done = f"{counts.candidates:,} candidates and {counts.aliases:,} aliases"
    if "budget" not in view.settings:
        return done
    budget = Budget.parse(view.settings["budget"])
    spent = float(view.costs()[budget.unit].max()) if len(view.rows) else 0.0
    text = f"{done}, {spent:,.0f} of {budget.amount:,.0f} {budget.unit} spent"
    is_model = view.settings.get("stage", "model") == "model"
    return f"{text}, no holdout figures yet" if is_model and not view.holdout else text


def _verdict(view: Overview) -> Markup:
    sentence = verdict(view.rows, view.front, view.holdout)
    found = view.front[view.front["baseline"].isna()]
    if view.holdout and len(found) and found["kl_holdout"].isna().all():  # published rules come first
        sentence = "No rule that was found has been measured on holdout tokens yet."
    parts = re.split(r"`([^`]*)`", sentence)  # metrics stand between backticks
    text = [element("code", part) if i % 2 else part for i, part in enumerate(parts)]
    picture = compared(view)
    return element(
        "section",
        element("h2", "Verdict"),
        element(
            "div", element("p", *text, class_="verdict"), picture, class_="pair even" if picture else None
        ),
        id="verdict",
        aria_label="Verdict",
    )


def _front(view: Overview, pictures: Pictures) -> Markup:
    if view.best is None:
        reached = ", ".join(sorted(set(view.rows["stage"])))
        why = (
            "Nothing has been measured yet."
            if view.rows.empty
            else f"No candidate has {' and '.join(view.objectives)}: the run reached the stage {reached}."
        )
        return element("p", why, class_="empty")
    row = _row(view, view.best)
    lines = {heading: shown(row[name], form) for name, (heading, form) in figures(view).items()}
    lines["ratios"] = ratios_text(row)
    terms = [
        element("div", element("dt", term), element("dd", value, data_figure=term))
        for term, value in lines.items()
    ]
    lines_to_type = [
        element("p", element("code", text, data_command=name), class_="command")
        for name, text in commands(view, str(row["key"])).items()
    ]
    panel = element(
        "div",
        element("h3", "Selected rule ", element("code", row["key"], data_figure="key")),
        element("p", element("code", row["metric"], data_figure="metric"), class_="metric"),
        element("dl", *terms, class_="figures"),
        *lines_to_type,
        element("p", "Select another one in the picture or in a table.", class_="soft script-only"),
        id="selected",
        aria_live="polite",
    )
    return element("div", pictures.front(), panel, class_="pair")


def _row(view: Overview, index: int) -> pd.Series:
    return view.rows.iloc[index]  # rows are numbered in the order told, from 0


def _heat(view: Overview, pictures: Pictures, data: PageData) -> Markup:
    if view.best is None or view.best not in data.ratios:
        why = (
            "No candidate to show yet."
            if view.best is None
            else "The archive does not name the layers of this run, so ratios have no place over depth."
        )
        return element("p", why, class_="empty")
    each, row = data.ratios[view.best], _row(view, view.best)
    count = len(data.ratios)
    more = "" if count >= len(data.chosen) else f" The file holds those of {count:,} candidates."
    return joined(
        element("p", "How much each layer of the selected rule loses beside the whole model: blue keeps "
                "more, orange loses more.", more, class_="soft"),
        _box(pictures.heat(each), "Ratios by layer"),
        element("p", element("span", class_="ramp"), element(
            "span", _spread(each, float(row["sparsity"])), id="spread"), class_="soft"),
        _sensitivities(view, pictures),
    )  # fmt: skip


def _sensitivities(view: Overview, pictures: Pictures) -> Markup | None:
    """Return the sensitivities of the best rule that has some, where the search followed them."""
    known = view.sensitivities()
    if known is None or len(known[1]) != len(view.layers):
        return None
    index, values = known
    row = _row(view, index)
    return joined(
        element("h3", "Sensitivity"),
        element("p", "How fast KL grows with each layer's ratio, in nats per token, for the rule ",
                element("code", row["key"]), ": orange layers cost the most. The search moved ratios by what "
                "a layer costs for each of its weights.", class_="soft"),
        _box(pictures.sensitivities(values), "Sensitivity by layer"),
    )  # fmt: skip


def _box(picture: Markup, label: str) -> Markup:
    return element("div", picture, class_="scroll", tabindex=0, role="region", aria_label=label)


def _spread(each: Sequence[float], sparsity: float) -> str:
    if max(each) - min(each) < 1e-9:
        return f"every layer loses {each[0]:.1%}"
    return f"from {min(each):.1%} to {max(each):.1%} removed, {sparsity:.1%} of the whole model"


def _course(pictures: Pictures) -> Markup:
    found = [part for part in (pictures.history(), pictures.agreement()) if part]
    return element("div", *found, class_="grid") if found else element("p", "Nothing yet.", class_="empty")


def _parts(view: Overview) -> Markup:
    if view.rows.empty:
        return element("p", "No candidate yet.", class_="empty")
    return element("div", element("div", funnel(view)), use(view), class_="grid")


def _best(view: Overview, ids: dict[int, int]) -> Markup:
    """Return the front as a table; of one objective, whose front is one rule, the best ones."""
    first = view.objectives[0].replace("_", " ")
    if len(view.objectives) > 1:
        table = candidates(view, view.front, ids, f"The front, by {first}.")
        return _section("front-table", "Every rule on the front", table)
    rows = view.decided.sort_values(view.objectives[0], kind="stable").head(_BEST)
    rows = rows[rows.index.isin(view.front.index) | rows.index.isin(list(ids))]
    return _section("front-table", "The best rules", candidates(view, rows, ids, f"By {first}."))


def _card(view: Overview) -> Markup:
    costs = view.costs()
    spent = {unit: f"{costs[unit].max() if len(costs) else 0:,.0f}" for unit in costs}
    versions = {**view.fact("versions", {}), **view.card.get("versions", {})}
    own: dict[str, Any] = {name: v for name, v in view.card.items() if name not in ("versions", "parts")}
    parts = view.card.get("parts", {})
    for name, part in parts.items():
        if isinstance(part, dict):
            own[f"{name} tokens"] = (
                f"{part.get('sequences')} x {part.get('length')}, sha256 {str(part.get('sha256'))[:16]}"
            )
    calibration = view.fact("calibration")
    if calibration:
        own["calibration, sha256"] = calibration
    missing = [n for n in ("model", "text", "machine") if n not in own]
    own = {name.replace("_", " "): _written(value) for name, value in own.items()}
    note = f"This run did not note its {', '.join(missing)}." if missing else ""
    settings = {name: _written(value) for name, value in view.settings.items()}
    return joined(
        element("div",
                element("div", pairs("Sources", own | {f"{u} spent": v for u, v in spent.items()}),
                        pairs("Versions", versions)),
                element("div", pairs("Settings, as in run.toml", settings), _dense(view)),
                class_="grid"),
        element("p", note, class_="soft") if note else None,
    )  # fmt: skip


def _dense(view: Overview) -> Markup | None:
    """Return what stays dense in the blocks, and why."""
    reasons = view.coverage.reasons() if view.coverage else {}
    return pairs("Stays dense, with its part of the block weights", reasons) if reasons else None


def _written(value: Any) -> str:
    """Return a fact as text: what it is if it is a text, pairs with commas, else as in JSON."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_written(one)}" for name, one in value.items())
    return value if isinstance(value, str) else json.dumps(value)
