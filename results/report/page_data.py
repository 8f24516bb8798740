"""What the page's script knows of a run: figures of the candidates in its pictures, and ratios."""

from __future__ import annotations

import math
import shlex
from typing import Any

from ..summary.overview import Overview
from .tables import figures, ratios_text, shown

_POINTS = 1500  # candidates with figures in the page; beyond them the front alone is complete
_LONGEST = 120  # characters of a metric that is not in a table
_ANY = "@KEY@"  # stands for a key in the page's commands, and needs no quotes in a shell
_RATIO_BYTES = 150_000  # ratios in the page


class PageData:
    """The rows of a run that its page has figures of: the best, the front, published rules, others evenly.

    Args:
        view: The run.

    Attributes:
        chosen: Indices of the rows; a row's place in this list is its number in the page.
        ids: Index of a row -> that number.
        thinned: What captions say on points that are not there or show no figures; may be empty.
        ratios: Ratios of as many of the rows as there is room for, by index.
    """

    def __init__(self, view: Overview) -> None:
        self._view = view
        self.chosen = self._choose()
        self.ids = {index: i for i, index in enumerate(self.chosen)}
        self.thinned = self._thinned()
        self.ratios = self._ratios()

    def content(self) -> dict[str, Any]:
        """Return columns of the chosen rows as texts, and ratios in thousandths."""
        view, ids = self._view, self.ids
        rows = view.rows.loc[self.chosen]
        metrics = list(dict.fromkeys(rows["metric"]))
        places = {text: i for i, text in enumerate(metrics)}
        columns = {
            heading: [shown(value, form) for value in rows[name]]
            for name, (heading, form) in figures(view).items()
        }
        columns["ratios"] = [ratios_text(row) for _, row in rows.iterrows()]
        even = {i: each[0] for i, each in self.ratios.items() if max(each) - min(each) < 1e-9}
        uneven = {i: each for i, each in self.ratios.items() if i not in even}
        return {
            "metrics": [text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..." for text in metrics],
            "key": list(rows["key"]),
            "metric": [places[text] for text in rows["metric"]],
            "columns": columns,
            "ratios": {ids[i]: round(1000 * ratio) for i, ratio in even.items()}
            | {ids[i]: [round(1000 * r) for r in each] for i, each in uneven.items()},
            "middle": {ids[i]: round(1000 * view.target(each), 1) for i, each in uneven.items()},
            "sparsity": [None if math.isnan(s) else round(1000 * s, 1) for s in rows["sparsity"]],
            "selected": None if view.best is None else ids[view.best],
            "front": [ids[i] for i in view.front.index if i in ids],
            "commands": commands(view, _ANY),
        }

    def _choose(self) -> list[int]:
        view = self._view
        best = [] if view.best is None else [view.best]
        found = (*view.front.index, *view.baselines.index, *view.history().index)
        first = best + _evenly(
            list(dict.fromkeys(int(i) for i in found if i not in best)), _POINTS - len(best)
        )
        others = [int(i) for i in view.decided.index.difference(first)]
        return first + _evenly(others, _POINTS - len(first))

    def _thinned(self) -> str:
        missing = self._view.decided.index.difference(self.chosen)
        silent = int(missing.isin(self._view.front.index).sum())
        words = [f"{len(missing) - silent:,} points are left out of the picture, none of the front."]
        words += [f"{silent:,} points of the front are drawn without figures."] if silent else []
        return " ".join(words) if len(missing) else ""

    def _ratios(self) -> dict[int, tuple[float, ...]]:
        layers = self._view.layers
        room = max(1, _RATIO_BYTES // (4 * len(layers))) if layers else 0
        found = self._view.vectors(self.chosen[:room])
        return {i: each for i, each in found.items() if len(each) == len(layers)}


def commands(view: Overview, key: str) -> dict[str, str]:
    """Return what to type to use a candidate."""
    run = shlex.quote(str(view.folder))
    model = shlex.quote(str(view.card.get("model", "MODEL")))
    candidate = shlex.quote(f"{view.folder}:{key}")
    return {
        "export": f"secateur export {run} {key} --to python -o metric.py",
        "prune": f"secateur prune {model} --candidate {candidate} -o pruned",
    }


def _evenly(items: list[int], count: int) -> list[int]:
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]
