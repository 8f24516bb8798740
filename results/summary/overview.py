"""Overviews: a run summed up for pictures and pages, from its archive alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from ...metrics_dsl.operators import LEAVES, OPERATORS
from ...search.core import defaults
from ...search.core.candidate import Layer
from ...search.core.coverage import Coverage
from ..archive.archive import Archive
from ..archive.front import DECIDED, best_of, front, hypervolume, non_dominated
from ..archive.run_folder import RunFolder

UNITS = ("candidates", "tokens", "seconds")  # in which a budget is given and a search's cost is counted
_METRIC_SPACES = ("tree", "meta")
_STEPS = 200  # moments at which the hypervolume is worked out


class Overview:
    """What a run searched, found and spent.

    Args:
        archive: Open for reading; see ``Archive.reading`` where it is being written.

    Raises:
        SecateurError: For objectives or metrics that this process does not know; it names their plugin.
    """

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self.folder = archive.folder
        self.rows = archive.frame()
        self.objectives: list[str] = self.rows.attrs.get("objectives", ["kl", "size"])
        self.front = front(self.rows, self.objectives)
        self.holdout = archive.holdout_parts()
        self.counts = archive.counts()
        self.settings = RunFolder(archive.folder).settings()
        self.baselines = self.rows[self.rows["baseline"].notna()]
        is_decided = self.rows["status"].isin(DECIDED)
        self.decided = self.rows[is_decided & np.isfinite(self.rows[self.objectives]).all(axis=1)]
        if archive.fact("plugins"):
            for text in self.decided["metric"].unique():
                archive.metric(text)  # says at once which plugin is missing

    def fact(self, name: str, default: Any = None) -> Any:
        """Return a fact about the run."""
        return self._archive.fact(name, default)

    @property
    def is_interval(self) -> bool:
        """Whether the run searched an interval of sparsities; the least KL is then the least sparsity's."""
        return "density" in self.objectives

    @property
    def best(self) -> int | None:
        """Index of the row to show first: the front's best, of an interval the front's middle."""
        if self.front.empty:
            return None
        return int(self.front.index[len(self.front) // 2 if self.is_interval else 0])

    @property
    def best_published(self) -> pd.Series | None:
        """The published rule that what was found is compared with; None before one is measured."""
        return best_of(self.baselines, self.objectives)

    @cached_property
    def layers(self) -> list[Layer]:
        """The prunable layers in model order; none where the run did not note them."""
        return [Layer(**layer) for layer in self.fact("layers", [])]

    @cached_property
    def card(self) -> dict[str, Any]:
        """Where model and text come from, and on what machine; empty where the run did not note it."""
        return dict(self.fact("card", {}))

    @cached_property
    def coverage(self) -> Coverage | None:
        """What sparsities are counted over; None where the run did not note it."""
        return self._archive.coverage

    def target(self, ratios: Sequence[float]) -> float:
        """Return the sparsity that ratios ask for; whole weights per row may come to a little less."""
        sizes = [layer.size for layer in self.layers]
        return sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True)) / sum(sizes)

    @property
    def searched(self) -> str:
        """One sentence on what was searched and how."""
        own = self.settings
        if not own:
            return "The run folder has no run.toml, so what was searched is not known."
        spaces = str(own.get("space", "tree")).split("+")
        kinds = ["metrics" if name in _METRIC_SPACES else "layerwise ratios" for name in spaces]
        given = "" if "metrics" in kinds else f" of the metric {own.get('metric', 'wanda')}"
        if "layerwise ratios" not in kinds and own.get("allocation"):
            given = f" at the ratios of {own['allocation']}"
        sparsity = own.get("sparsity", defaults.SPARSITY)
        ends = sparsity if isinstance(sparsity, list) else [sparsity]
        at = " to ".join(f"{100 * end:.4g}\N{NO-BREAK SPACE}%" for end in ends)
        pattern = "" if own.get("pattern") == "unstructured" else f", pattern {own.get('pattern')}"
        objectives = " and ".join(self.objectives).replace("_", " ")
        return (
            f"The searcher {own.get('searcher')} looked for {' and '.join(kinds)} (space {own.get('space')})"
            f"{given} that remove {at} of the weights{pattern}; weights compete within a {own.get('group')}, "
            f"and {objectives} {'is' if len(self.objectives) == 1 else 'are'} minimised."
        )

    def costs(self) -> pd.DataFrame:
        """Return what the run had spent after each row: candidates, tokens, seconds; aliases are free."""
        is_new = self.rows["alias_of"].isna()
        spent = self.rows[["tokens", "seconds"]].astype(float).where(is_new, 0.0)
        return spent.assign(candidates=is_new.astype(float)).cumsum()[list(UNITS)]

    def history(self) -> pd.DataFrame:
        """Return the rows that improved the first objective: its value and what had been spent by then."""
        first = self.objectives[0]
        values = self.decided[first]
        improved = values[values < values.cummin().shift(fill_value=np.inf)]
        found: pd.DataFrame = self.costs().loc[improved.index]
        return found.assign(best=improved)

    def hypervolume(self) -> pd.DataFrame:
        """Return how much of the box that the final front spans was dominated, over what had been spent.

        Values are shares of the box, widened by a tenth so that the front's ends count too.
        """
        costs = self.costs()
        found = pd.DataFrame(columns=[*UNITS, "hypervolume"], dtype=float)
        if len(self.objectives) < 2 or len(self.front) < 2:
            return found
        ends = self.front[self.objectives].to_numpy(dtype=float)
        low, width = ends.min(axis=0), ends.max(axis=0) - ends.min(axis=0)
        points = (self.decided[self.objectives].to_numpy(dtype=float) - low) / np.where(width > 0, width, 1.0)
        reference = [1.1] * len(self.objectives)
        kept = np.empty((0, len(self.objectives)))
        pieces = np.array_split(np.arange(len(points)), min(_STEPS, len(points)))
        volumes = []
        for piece in pieces:
            kept = np.vstack([kept, points[piece]])
            kept = kept[non_dominated(kept)]
            volumes.append(hypervolume(kept, reference) / 1.1 ** len(self.objectives))
        last = self.decided.index[[piece[-1] for piece in pieces]]
        spent: pd.DataFrame = costs.loc[last]
        return spent.assign(hypervolume=volumes)

    def vectors(self, indices: Sequence[int], column: str = "ratios") -> dict[int, tuple[float, ...]]:
        """Return ``ratios``, ``layer_errors`` or ``sensitivities`` of some rows, in model order."""
        keys = list(self.rows["key"].iloc[list(indices)])
        found = self._archive.numbers([column], keys)
        return dict(zip(map(int, indices), (numbers for (numbers,) in found), strict=True))

    def sensitivities(self) -> tuple[int, tuple[float, ...]] | None:
        """Return the best row whose sensitivities are known, and these in model order."""
        known = [key for (key,) in self._archive.rows("SELECT key FROM by_layer WHERE sensitivities != x''")]
        rows = self.decided[self.decided["key"].isin(known)]
        if rows.empty:
            return None
        best = int(rows[self.objectives[0]].idxmin())
        return best, self.vectors([best], "sensitivities")[best]

    def use(self) -> pd.DataFrame:
        """Return how many metrics use each leaf and operator: name, meaning, best, every.

        Shares, 0 to 1: of all fully measured metrics, and of their best quarter by the first objective.
        """
        measured = self.decided.sort_values(self.objectives[0], kind="stable").drop_duplicates("metric")
        metrics = [self._archive.metric(text) for text in measured["metric"]]
        counts = [metric.operators | metric.leaves for metric in metrics]
        quarter = counts[: max(1, len(counts) // 4)]
        every, best = (Counter(word for words in some for word in words) for some in (counts, quarter))
        meanings = {n: leaf.meaning for n, leaf in LEAVES.items()} | {
            n: operator.meaning for n, operator in OPERATORS.items()
        }
        records = [
            (OPERATORS[name].symbol or name if name in OPERATORS else name, meanings[name],
             best[name] / len(quarter), every[name] / len(counts))
            for name in meanings if every[name]
        ]  # fmt: skip
        return pd.DataFrame.from_records(records, columns=["name", "meaning", "best", "every"])

    def funnel(self) -> pd.DataFrame:
        """Return how many distinct candidates ended at each stage with each status, and their aliases."""
        counts = pd.DataFrame.from_dict(self.counts.by_stage(), orient="index").rename_axis("stage")
        return counts.loc[:, counts.any()]

    def failures(self) -> pd.Series:
        """Return the reasons why distinct candidates failed, with counts, the most frequent first."""
        return self.rows.loc[self.rows["alias_of"].isna(), "failure"].dropna().value_counts()
