"""Pictures of the report: front, history, stages against each other, ratios over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ...search.core.objectives import OBJECTIVES
from ..summary.overview import UNITS, Overview
from .html import Markup, element, joined
from .svg import Axis, Chart, axis, depth_ticks, legend_mark

_UNITS = {
    "candidates": "candidates measured, duplicates left out",
    "tokens": "tokens run through pruned models",
    "seconds": "seconds of measuring",
}
_NAMES = {
    "kl": "KL, nats per token",
    "layer_error": "layer error, relative",
    "model_error": "model error, relative",
    "density": "density",
    "size": "size, nodes of the metric",
    "seconds": "seconds of measuring",
}
_Key = tuple[tuple[str, ...], str]  # of a legend: marks, one on the other, and their meaning
_FOUND: tuple[_Key, ...] = ((("dots other",), "candidates found"), (("dots published",), "published rules"))
_LINE_AND_DOTS = ("line front", "dots front")
_WIDE, _SIDE, _LINE = 1080, 96, 26  # of the map: its cells, its words, one row


class Pictures:
    """The pictures of a run.

    Args:
        view: The run.
        ids: Index of a row -> its place in the page's data, for the rows that pictures show.
        thinned: A sentence for captions on points that were left out, or empty.
    """

    def __init__(self, view: Overview, ids: Mapping[int, int], thinned: str) -> None:
        self._view, self._ids, self._thinned = view, ids, thinned

    def front(self) -> Markup:
        """Return the front, one picture for each objective beside the first; of one objective its course."""
        view = self._view
        first, *others = view.objectives
        if not others:
            course = self._course(first)
            return self._figure(course, *_FOUND, (("dots front",), "best"), (("line front",), "best so far"))
        charts = [(name.replace("_", " "), self._pair(name, first)) for name in others]
        picture = charts[0][1] if len(charts) == 1 else switch("front-axis", "against", charts)
        legend: list[_Key] = [*_FOUND, (_LINE_AND_DOTS, "front")]
        if view.front.index.isin(view.baselines.index).any():
            legend.append((("dots front published",), "published rules on the front"))
        return self._figure(picture, *legend)

    def _pair(self, across: str, up: str) -> Markup:
        view = self._view
        points, best = self._points(view.decided, across, up), view.front[[across, up]]
        both = pd.concat([points, best])
        chart = Chart(axis(_name(across), both[across]), axis(_name(up), both[up]))
        published = points.index.isin(view.baselines.index)
        order = best.sort_values(across, kind="stable")
        self._dots(chart, "other", points[~published & ~points.index.isin(best.index)], across, up)
        chart.steps("front", order[across], np.minimum.accumulate(order[up].to_numpy(dtype=float)))
        is_on = points.index.isin(best.index)
        self._dots(chart, "published", points[published & ~is_on], across, up)
        self._dots(chart, "front", best[~best.index.isin(view.baselines.index)], across, up)
        self._dots(chart, "front published", best[best.index.isin(view.baselines.index)], across, up)
        return chart.svg(
            f"Front of {len(best)} candidates: {_name(up)} against {_name(across)}, among "
            f"{len(view.decided)} measured; the table of the front has the figures."
        )

    def _course(self, name: str) -> Markup:
        view = self._view
        rows = view.decided.assign(number=view.decided.index + 1)
        points = self._points(rows, "number", name)
        chart = Chart(
            axis("number of the candidate", [0, len(view.rows)], whole=True), axis(_name(name), rows[name])
        )
        best = view.history()["best"]
        published = points.index.isin(view.baselines.index)
        self._dots(chart, "other", points[~published], "number", name)
        if len(best):
            chart.steps("front", [*best.index + 1, len(view.rows)], [*best, best.iloc[-1]])
        self._dots(chart, "published", points[published], "number", name)
        own = points[points.index.isin(view.front.index)]
        self._dots(chart, "front", own, "number", name)
        return chart.svg(
            f"{_name(name)} of {len(rows)} measured candidates in the order told; the line: the best so far."
        )

    def history(self) -> Markup | None:
        """Return the best value, or of an interval the hypervolume, over what the search spent."""
        view = self._view
        volumes = view.hypervolume()
        if view.is_interval and volumes.empty:
            return None
        parts = []
        if not view.is_interval:
            charts = [(unit, self._over_cost(unit)) for unit in UNITS]
            legend: list[_Key] = [(_LINE_AND_DOTS, "best so far")]
            if self._level() is not None:
                legend.append((("level published",), "best published rule"))
            parts.append(self._figure(switch("best-cost", "over", charts), *legend))
        if not volumes.empty:
            charts = [(unit, self._volume(volumes, unit)) for unit in UNITS]
            picture = switch("volume-cost", "over", charts)
            parts.append(self._figure(picture, (("line front",), "hypervolume"), note=(
                "Dominated share of the box between the final front's ends, the box widened by a tenth."
            )))  # fmt: skip
        return joined(*parts)

    def _level(self) -> float | None:
        best = self._view.best_published
        return None if best is None else float(best[self._view.objectives[0]])

    def _over_cost(self, unit: str) -> Markup:
        view, level = self._view, self._level()
        first = view.objectives[0]
        history, total = view.history(), float(view.costs()[unit].max())
        levels = [] if level is None else [level]
        chart = Chart(
            axis(_UNITS[unit], [total], whole=True), axis(_name(first), [*history["best"], *levels])
        )
        if level is not None:
            chart.level("published", level, "best published")
        if len(history):
            chart.steps("front", [*history[unit], total], [*history["best"], history["best"].iloc[-1]])
            known = history[history.index.isin(list(self._ids))]
            chart.dots("front", known[unit], known["best"], [self._ids[i] for i in known.index])
        return chart.svg(f"Best {_name(first)} so far over {_UNITS[unit]}.")

    def _volume(self, volumes: pd.DataFrame, unit: str) -> Markup:
        chart = Chart(axis(_UNITS[unit], volumes[unit], whole=True), Axis("hypervolume", 0.0, 1.0))
        chart.steps("front", volumes[unit], volumes["hypervolume"])
        return chart.svg(f"Hypervolume over {_UNITS[unit]}.")

    def agreement(self) -> Markup | None:
        """Return how what was cheap to measure orders the candidates that were measured fully."""
        view = self._view
        rows = view.decided
        labels = {"layer_error": _NAMES["layer_error"], "kl_rung": "KL on the few tokens of a rung"}
        pairs = {cheap: rows[rows[cheap].notna() & rows["kl"].notna()] for cheap in labels}
        enough = [cheap for cheap, known in pairs.items() if len(known) >= 3]
        if not enough:
            return None
        cheap = enough[0]
        known, label = pairs[cheap], labels[cheap]
        points = self._points(known, cheap, "kl")
        chart = Chart(axis(label, known[cheap]), axis(_NAMES["kl"], known["kl"]))
        published = points.index.isin(view.baselines.index)
        self._dots(chart, "other", points[~published], cheap, "kl")
        self._dots(chart, "published", points[published], cheap, "kl")
        rank = known[cheap].rank().corr(known["kl"].rank())
        note = (
            f"Rank correlation {rank:.2f} over the {len(known):,} candidates that have both; those that the "
            f"{'screen' if cheap == 'layer_error' else 'rung'} rejected have no KL on all tokens."
        )
        picture = chart.svg(f"{_NAMES['kl']} against {label}; rank correlation {rank:.2f}.")
        return self._figure(picture, *_FOUND, note=note)

    def heat(self, ratios: Sequence[float]) -> Markup:
        """Return the ratios of a row as a map, which the page's script fills anew for another row."""
        middle = self._view.target(ratios)
        reach = max(max((abs(r - middle) for r in ratios), default=0.0), 0.02)
        cells = [(f"{ratio:.1%} removed", round((ratio - middle) / reach, 2)) for ratio in ratios]
        return self._map(cells, "Ratios of the selected rule by type of layer and decoder block", "cells")

    def sensitivities(self, values: Sequence[float]) -> Markup:
        """Return how KL changes with each layer's ratio as a map."""
        reach = max(map(abs, values)) or 1.0
        cells = [(f"{value:.3g} nats per token and unit of ratio", value / reach) for value in values]
        return self._map(cells, "Sensitivity of KL by type of layer and decoder block", None)

    def _map(self, values: Sequence[tuple[str, float]], description: str, name: str | None) -> Markup:
        """Return a map, type of layer by depth, of a text and a number from -1 to 1 for each layer."""
        layers = self._view.layers
        kinds, blocks = list(dict.fromkeys(x.kind for x in layers)), sorted({x.block for x in layers})
        step = min(max(_WIDE // len(blocks), 12), 44)
        cells = []
        for layer, (text, number) in zip(layers, values, strict=True):
            cells.append(
                element(
                    "rect",
                    element("title", f"{layer.name}: {text}"),
                    x=_SIDE + blocks.index(layer.block) * step,
                    y=4 + kinds.index(layer.kind) * _LINE,
                    width=step - 2,
                    height=_LINE - 2,
                    class_="more" if number > 0 else "less" if number < 0 else None,
                    fill_opacity=f"{abs(number):.2f}",
                )
            )
        bottom, width = 4 + len(kinds) * _LINE, max(_SIDE + len(blocks) * step + 4, 260)
        texts = [
            element("text", kind, x=_SIDE - 8, y=21 + i * _LINE, class_="end") for i, kind in enumerate(kinds)
        ]
        texts += [
            element("text", blocks[i], x=_SIDE + i * step + step / 2 - 1, y=bottom + 18, class_="middle")
            for i in depth_ticks(len(blocks))
        ]
        texts.append(element("text", "decoder block", x=_SIDE, y=bottom + 40, class_="label"))
        return element(
            "svg",
            *texts,
            element("g", *cells, id=name),
            viewBox=f"0 0 {width} {bottom + 48}",
            class_="heat wide" if width > 560 else "heat",
            role="img",
            width=width,
            aria_label=description,
        )

    def _points(self, rows: pd.DataFrame, across: str, up: str) -> pd.DataFrame:
        return rows.loc[rows.index.isin(list(self._ids)), [across, up]]

    def _dots(self, chart: Chart, kind: str, rows: pd.DataFrame, across: str, up: str) -> None:
        known = rows[rows.index.isin(list(self._ids))]
        unknown = rows.drop(known.index)  # of a very long front some have no figures in the page
        chart.dots(kind, unknown[across], unknown[up])
        chart.dots(kind, known[across], known[up], [self._ids[i] for i in known.index])

    def _figure(self, picture: Markup, *legend: _Key, note: str = "") -> Markup:
        """Return a picture with its legend and a note."""
        keys = [element("span", legend_mark(*marks), meaning, class_="legend") for marks, meaning in legend]
        has_thinned = any("dots other" in marks for marks, _ in legend)
        text = " ".join(part for part in (note, self._thinned if has_thinned else "") if part)
        return element(
            "figure", picture, element("figcaption", *keys, element("span", text) if text else None)
        )


def switch(name: str, label: str, panels: Sequence[tuple[str, Markup]]) -> Markup:
    """Return panels of which one shows at a time; it works without a script."""
    heads: list[Markup] = [element("span", label, class_="soft")]
    for i, (title, _) in enumerate(panels):
        heads.append(element("input", type="radio", name=name, id=f"{name}-{i}", checked=i == 0))
        heads.append(element("label", title, for_=f"{name}-{i}"))
    bodies = [element("div", body, class_="panel") for _, body in panels]
    return element("div", *heads, *bodies, class_="switch")


def _name(objective: str) -> str:
    return _NAMES.get(objective, OBJECTIVES[objective].title if objective in OBJECTIVES else objective)
