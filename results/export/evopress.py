"""Ratios as levels of EvoPress, and theirs as ratios.

EvoPress (IST-DASLab/EvoPress @ 50888a0) gives each linear layer a whole level; its ratio is

    sparsity + level * weights_diff / weights of the layer

so levels that add up to 0 keep the sparsity. ``levels.txt`` is what its ``--sparse_config_path`` reads: a
line ``name: level`` a layer and nothing else. Its reader takes every line for a layer, so what the levels
mean is in ``levels.json`` beside it. Its own defaults are steps of 1,000,000 weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...search.core.candidate import Layer
from ...search.core.reading import read_json, read_text
from .candidate_record import CandidateRecord, ExportError

WEIGHTS_DIFF = 1_000_000  # EvoPress's default
_TOLERANCE = 0.005  # a ratio may be rounded by half a percent of a layer before steps get finer
_NAME = r"[\w.-]+"
_LINE = re.compile(rf"\s*({_NAME})\s*:\s*([+-]?[0-9]{{1,15}})\s*")
_STEPS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Levels:
    """Levels of layers by name, with what they mean.

    Attributes:
        levels: A whole number a layer.
        sparsity: The ratio of level 0.
        weights_diff: Weights that one level removes more.
        error: Largest difference between a layer's ratio and its level's.
        metric: The metric that goes with them, if the file says.
    """

    levels: dict[str, int]
    sparsity: float
    weights_diff: float
    error: float = 0.0
    metric: str = ""


def to_levels(record: CandidateRecord) -> Levels:
    """Return the levels of a candidate: exact where its ratios are whole levels of some step.

    Else steps are chosen so that ratios are rounded by no more than half a percent if 128 levels can do
    that, and levels are shifted where rounding least favours them until they add up to 0.

    Raises:
        ExportError: For a pattern N:M, which has no ratios to choose, or a layer whose name is more than a
            word.
    """
    strange = [layer.name for layer in record.layers if not re.fullmatch(_NAME, layer.name)]
    if strange:
        raise ExportError(
            f"EvoPress has a line `name: level` for each layer, and {strange[0][:60]!r} cannot stand in one"
        )
    if record.pattern != "unstructured":
        raise ExportError(f"EvoPress has levels of ratios, and {record.pattern} leaves no ratio to choose")
    sizes = [layer.size for layer in record.layers]
    ratios = record.candidate.ratios
    sparsity = math.fsum(r * s for r, s in zip(ratios, sizes, strict=True)) / sum(sizes)
    moved = [(ratio - sparsity) * size for ratio, size in zip(ratios, sizes, strict=True)]  # weights
    furthest = max(map(abs, moved))
    step = float(math.gcd(*map(round, moved))) or float(WEIGHTS_DIFF)
    if furthest > _STEPS[-1] * step:
        for count in _STEPS:
            step = float(max(1, math.ceil(furthest / count)))
            if step / 2 <= _TOLERANCE * min(sizes):
                break
    lowest = [math.ceil(-sparsity * size / step) for size in sizes]
    highest = [math.ceil((1 - sparsity) * size / step) - 1 for size in sizes]
    levels = _balanced([m / step for m in moved], lowest, highest)
    found = [sparsity + level * step / size for level, size in zip(levels, sizes, strict=True)]
    error = max(abs(a - b) for a, b in zip(found, ratios, strict=True))
    names = [layer.name for layer in record.layers]
    by_name = dict(zip(names, levels, strict=True))
    return Levels(by_name, sparsity, step, error, str(record.candidate.metric))


def _balanced(exact: list[float], lowest: list[int], highest: list[int]) -> list[int]:
    """Round to whole numbers within bounds that add up to 0: no ratio leaves [0, 1)."""
    levels = [min(max(round(x), low), high) for x, low, high in zip(exact, lowest, highest, strict=True)]
    while surplus := sum(levels):
        step = 1 if surplus > 0 else -1
        movable = [i for i, n in enumerate(levels) if lowest[i] <= n - step <= highest[i]]
        # The one that rounding moved furthest that way goes back.
        levels[max(movable, key=lambda i: step * (levels[i] - exact[i]))] -= step
    return levels


def write_evopress(record: CandidateRecord, path: Path) -> None:
    """Write the folder."""
    found = to_levels(record)
    path.mkdir()
    lines = [f"{name}: {level}" for name, level in found.levels.items()]
    (path / "levels.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    meaning = {
        "format": "secateur.levels",
        "version": 1,
        "sparsity": found.sparsity,
        "weights_diff": found.weights_diff,
        "lowest": min(found.levels.values()),
        "highest": max(found.levels.values()),
        "largest_rounding_of_a_ratio": found.error,
        "metric": found.metric,
        "group": record.candidate.group,
        "key": record.candidate.key,
        **({"plugins": record.needed_plugins} if record.needed_plugins else {}),
        "meaning": "ratio = sparsity + level * weights_diff / (rows * columns); EvoPress's database is made "
        "with this sparsity and weights_diff, for levels from lowest to highest",
    }
    (path / "levels.json").write_text(json.dumps(meaning, indent=1) + "\n", encoding="utf-8")


def read_levels(path: Path, sparsity: float | None = None, weights_diff: float | None = None) -> Levels:
    """Return the levels of a folder that was exported, or of a file of EvoPress's.

    Args:
        path: The folder, or the text file; a ``levels.json`` beside that says what its levels mean.
        sparsity: The ratio of level 0, where no file says.
        weights_diff: Weights per level, where no file says; EvoPress's default if left out.

    Raises:
        ExportError: When the file is not of that form, or nobody says the sparsity.
    """
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ExportError(f"expected a sparsity in [0, 1), got {sparsity:g}")
    if weights_diff is not None and not 0 < weights_diff < math.inf:
        raise ExportError(f"expected more than 0 weights a level, got {weights_diff:g}; check --weights-diff")
    file = path / "levels.txt" if path.is_dir() else path
    lines = [line for line in read_text(file, "levels of EvoPress", ExportError).splitlines() if line.strip()]
    levels: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not (match := _LINE.fullmatch(line)):
            raise ExportError(f"expected lines `name: level`, got {line[:60]!r} in line {number} of {file}")
        if match[1] in levels:
            raise ExportError(
                f"expected one level a layer, got another of {match[1]} in line {number} of {file}"
            )
        levels[match[1]] = int(match[2])
    metric = ""
    if (beside := file.with_name("levels.json")).exists():
        known = read_json(beside, "what the levels mean as JSON", ExportError)
        sparsity = known.field("sparsity").ratio() if sparsity is None else sparsity
        if weights_diff is None:
            its = known.field("weights_diff", WEIGHTS_DIFF)
            weights_diff = its.number()
            if weights_diff <= 0:
                raise its.refused("more than 0 weights a level")
        metric = known.field("metric", "").text()
    if not levels or sparsity is None:
        lacks = "levels" if not levels else "the ratio of level 0: give it with --sparsity"
        raise ExportError(f"{file} does not hold {lacks}")
    return Levels(levels, sparsity, float(weights_diff or WEIGHTS_DIFF), metric=metric)


def to_ratios(levels: Levels, layers: Sequence[Layer]) -> tuple[float, ...]:
    """Return a ratio for each layer.

    Raises:
        ExportError: When the levels are those of other layers or a ratio leaves [0, 1).
    """
    if {layer.name for layer in layers} != set(levels.levels):
        differing = sorted({layer.name for layer in layers} ^ set(levels.levels))
        raise ExportError(
            f"expected levels of the same {len(layers)} layers, got {len(levels.levels)} levels; "
            f"{differing[0]} is in one of them alone"
        )
    ratios = []
    for layer in layers:
        ratio = levels.sparsity + levels.levels[layer.name] * levels.weights_diff / layer.size
        if not -1e-9 <= ratio < 1:
            raise ExportError(
                f"the level {levels.levels[layer.name]} of {layer.name} is a ratio of {ratio:.4g}, outside "
                "[0, 1): check --sparsity and --weights-diff"
            )
        ratios.append(max(0.0, ratio))
    return tuple(ratios)
