"""Comparison of runs: what each found for what it cost, over seeds, with the spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..archive.archive import Archive
from ..archive.database import ArchiveError
from ..archive.front import best_of, front
from ..archive.run_folder import RunFolder

SHARES = (0.25, 0.5, 0.75, 1.0)
# Column -> what it holds.
COLUMNS = {
    "search": "the runs of one configuration, which differ in their seed",
    "seeds": "how many there are",
    "kl_holdout": "of the best candidate by the first objective, mean over seeds; missing where density is "
    "minimised, for that is the least sparse one",
    "spread": "standard deviation over seeds, missing for one; of the hypervolume where density is minimised",
    "published": "kl_holdout of the best published rule, chosen in the same way",
    "hypervolume": "share of the box that all fronts span, mean over seeds; missing for one objective",
    "candidates": "mean over seeds",
    "tokens": "run through pruned models, mean over seeds",
    "seconds": "of measuring, mean over seeds",
    **{f"at_{share:.0%}": "kl_holdout of the best after this share of the tokens" for share in SHARES[:-1]},
}


def open_runs(folders: Sequence[str | Path]) -> list[Archive]:
    """Return the archives of run folders; a folder of seeds stands for all of them.

    Raises:
        ArchiveError: When one holds no run.
    """
    found: list[Archive] = []
    for folder in map(Path, folders):
        found += [Archive(run.path) for run in RunFolder(folder).runs()]
    return found


def compare(runs: Sequence[Archive]) -> pd.DataFrame:
    """Return one row a configuration, the best first, with the columns of ``COLUMNS``.

    Raises:
        ArchiveError: When runs were measured on different calibrations or minimise different things.
    """
    runs = list({run.folder.resolve(): run for run in runs}.values())
    settings = {run.folder: RunFolder(run.folder).settings() for run in runs}
    for name in ("calibration", "objectives", "sparsity", "pattern"):
        # A calibration is what was measured, wherever its folder is.
        found = {str(run.fact(name, settings[run.folder].get(name))): run.folder for run in runs}
        if len(found) > 1:
            first, second, *_ = found.values()
            values = "" if name == "calibration" else f" ({' and '.join(list(found)[:2])})"
            raise ArchiveError(
                f"expected runs of the same {name}, got {first} and {second} with different ones{values}"
            )
    groups: dict[str, list[Archive]] = {}
    seen: dict[tuple[str, object], Archive] = {}
    copies = []
    for run in runs:
        own = sorted(
            (n, v) for n, v in settings[run.folder].items() if n not in ("seed", "calibration", "plugins")
        )
        seed = settings[run.folder].get("seed", str(run.folder))
        original = seen.setdefault((str(own), seed), run)
        if original is run:
            groups.setdefault(str(own), []).append(run)
        else:  # no further seed
            copies.append((str(run.folder), str(original.folder)))
    names = _names(groups)
    frames = {run.folder: run.frame() for run in runs}
    box = _box(list(frames.values()))
    rows = [_row(names[text], [frames[run.folder] for run in found], box) for text, found in groups.items()]
    result = pd.DataFrame.from_records(rows, columns=list(COLUMNS))
    covered = runs[0].coverage  # of all, for all were measured on one calibration
    counted = covered.warning or f"sparsity is counted over {covered.in_words}" if covered else ""
    result.attrs = {"objectives": runs[0].fact("objectives"), "copies": copies, "counted": counted}
    if "density" in result.attrs["objectives"]:  # the least KL is that of the least sparsity
        return result.sort_values("hypervolume", ascending=False, kind="stable", ignore_index=True)
    return result.sort_values("kl_holdout", kind="stable", ignore_index=True)


def verdicts(table: pd.DataFrame) -> list[str]:
    """Return a sentence on each configuration beside the best; differences inside the spread are ties.

    The spread is that of single runs, so a tie is what the next seed might turn round.
    """
    measure, what = ("kl_holdout", "lowest holdout KL of what each chose on selection tokens")
    if "density" in table.attrs["objectives"]:
        measure, what = "hypervolume", "largest hypervolume"
    known = table[table[measure].notna()]
    if known.empty:
        return ["No run has been measured on holdout tokens yet."]
    best = known.iloc[0]
    sentences = [f"{best['search']} has the {what}, {best[measure]:.4f}."]
    for copy, original in table.attrs["copies"]:
        sentences.append(f"{copy} has the settings and the seed of {original} and is left out.")
    for _, row in known.iloc[1:].iterrows():
        change = abs(row[measure] - best[measure])
        if not change:
            sentences.append(f"{row['search']} has the same.")
            continue
        share = f"{change:.4f} ({change / abs(best[measure]):.1%})" if best[measure] else f"{change:.4f}"
        if min(row["seeds"], best["seeds"]) < 2:
            one = " and ".join(r["search"] for r in (best, row) if r["seeds"] < 2)
            sentences.append(
                f"{row['search']} is behind by {share}; {one} ran with one seed, and --seeds 3 would tell if "
                "that is chance."
            )
            continue
        spread = math.hypot(row["spread"], best["spread"])
        if change <= spread:
            sentences.append(
                f"{row['search']} is a tie with it: {share} is inside the spread of {spread:.4f}."
            )
        else:
            sentences.append(f"{row['search']} is worse by {share}, more than the spread of {spread:.4f}.")
    costs = known["tokens"]
    if costs.max() > 1.1 * costs.min():
        sentences.append(
            f"Costs differ: from {costs.min():,.0f} to {costs.max():,.0f} tokens run through pruned models."
        )
    idle = known.loc[known["kl_holdout"] == known["published"], "search"]
    if len(idle):
        sentences.append(f"Nothing better than the published rules was found by {', '.join(idle)}.")
    if counted := table.attrs["counted"]:
        sentences.append(f"{counted[0].upper()}{counted[1:]}.")
    return sentences


def incumbents(rows: pd.DataFrame, objective: str, shares: Sequence[float] = SHARES) -> list[str]:
    """Return the keys of the best candidates after shares of the tokens that a run has measured.

    Tokens are the same in every run of one seed, which seconds are not.
    """
    if rows.empty:
        return []
    tokens = rows["tokens"].where(rows["alias_of"].isna(), 0).cumsum()
    decided = rows[rows["status"].eq("measured") & rows[objective].notna()]
    found = []
    for share in shares:
        so_far = decided[tokens[decided.index] <= share * tokens.iloc[-1]]
        if len(so_far):
            found.append(str(so_far.nsmallest(1, objective)["key"].iloc[0]))
        else:
            found.append("")
    return found


def _names(groups: dict[str, list[Archive]]) -> dict[str, str]:
    """Return a name of each group: its folder's, or of seeds their parent's."""
    folders = {text: RunFolder(found[0].folder).of_several for text, found in groups.items()}
    is_clear = len({folder.name for folder in folders.values()}) == len(folders)
    return {text: folder.name if is_clear else str(folder) for text, folder in folders.items()}


def _box(frames: Sequence[pd.DataFrame]) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the largest value of each objective on any front, (objectives,)."""
    names = frames[0].attrs["objectives"]
    points = pd.concat([front(rows, names)[names] for rows in frames])
    if points.empty:
        return np.zeros(len(names)), np.ones(len(names))
    return points.min().to_numpy(dtype=float), points.max().to_numpy(dtype=float)


def _row(name: str, frames: Sequence[pd.DataFrame], box: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    objectives = frames[0].attrs["objectives"]
    chosen = [_chosen(rows) for rows in frames]
    published = [_chosen(rows[rows["baseline"].notna()]) for rows in frames]
    costs = [rows[rows["alias_of"].isna()] for rows in frames]
    holdout = np.array([row["kl_holdout"] for row in chosen], dtype=float)
    volumes = [_hypervolume(rows, box) for rows in frames]
    compared = volumes if "density" in objectives else holdout
    spread = float(np.std(compared, ddof=1)) if len(frames) > 1 else math.nan
    record = {
        "search": name,
        "seeds": len(frames),
        "kl_holdout": float(holdout.mean()),
        "spread": spread,
        "published": _mean([float(row["kl_holdout"]) for row in published]),
        "hypervolume": _mean(volumes),
        "candidates": _mean([len(rows) for rows in costs]),
        "tokens": _mean([float(rows["tokens"].sum()) for rows in costs]),
        "seconds": _mean([float(rows["seconds"].sum()) for rows in costs]),
    }
    for i, share in enumerate(SHARES[:-1]):
        keys = [dict(enumerate(incumbents(rows, objectives[0]))).get(i, "") for rows in frames]
        found = [rows.loc[rows["key"] == key, "kl_holdout"] for rows, key in zip(frames, keys, strict=True)]
        known = [float(v.iloc[0]) if len(v) and "density" not in objectives else math.nan for v in found]
        record[f"at_{share:.0%}"] = _mean(known)
    return record


def _chosen(rows: pd.DataFrame) -> pd.Series:
    """Return the best row on selection tokens of those that have a holdout figure."""
    objectives = rows.attrs["objectives"]
    best = None if "density" in objectives else best_of(rows[rows["kl_holdout"].notna()], objectives)
    return pd.Series({"kl_holdout": math.nan}) if best is None else best


def _hypervolume(rows: pd.DataFrame, box: tuple[np.ndarray, np.ndarray]) -> float:
    import moocore

    names = rows.attrs["objectives"]
    if len(names) < 2:
        return math.nan
    low, high = box
    width = np.where(high > low, high - low, 1.0)
    points = (front(rows, names)[names].to_numpy(dtype=float) - low) / width
    if not len(points):
        return math.nan
    return float(moocore.hypervolume(points, ref=np.full(len(names), 1.1))) / 1.1 ** len(names)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(np.asarray(values, dtype=float))) if values else math.nan
