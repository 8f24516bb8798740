"""What varies in each space: trees, choices or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Varied = Literal["trees", "choices", "numbers", "one number"]

METRIC_SPACES: dict[str, tuple[Varied, ...]] = {"tree": ("trees",), "meta": ("choices",)}
SPACES: dict[str, tuple[Varied, ...]] = {
    **METRIC_SPACES,
    "curve": ("numbers",),
    "block": ("numbers",),
    "layer": ("numbers",),
    "feature": ("choices", "one number"),
    "ramp": ("one number",),
    "owl": ("one number",),
    "dlp": ("one number",),
    "dsa": ("one number",),
    "alpha": ("one number",),
}


def together(parts: Sequence[Varied]) -> frozenset[Varied]:
    """Return what varies in all parts; one number and another are numbers."""
    found = frozenset(parts)
    if parts.count("one number") > 1 or "numbers" in found:
        return found - {"one number"} | {"numbers"}
    return found
