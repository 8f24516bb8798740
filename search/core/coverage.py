"""Coverage: which part of a model's block weights a rule can prune at all, and what stays dense."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from .reading import Given

LEAST_SHARE = 0.9  # of the block weights; below, a sparsity says little of the whole model
_SHOWN = 3
_MOST_WEIGHTS = 10**14  # of any model


@dataclass(frozen=True)
class StaysDense:
    """A parameter of two or more dimensions inside the blocks that no rule prunes.

    Attributes:
        name: Its full name in the model.
        shape: Its shape.
        why: Why no rule prunes it, as words that follow on its name.
    """

    name: str
    shape: tuple[int, ...]
    why: str

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        """Its name within a block, without numbers: alike parameters of all blocks have one kind."""
        own = re.sub(r"^.*?\.\d+\.", "", self.name).removesuffix(".weight")
        return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", own)


@dataclass(frozen=True)
class Coverage:
    """What a sparsity is counted over, beside all weights of the blocks.

    Attributes:
        prunable: Weights of the prunable layers.
        in_blocks: Weights of all parameters of two or more dimensions in the blocks.
        stays_dense: Those parameters that are no prunable layer's.
    """

    prunable: int
    in_blocks: int
    stays_dense: tuple[StaysDense, ...]

    @classmethod
    def read(cls, given: Given) -> Coverage | None:
        """Return what ``record`` made, among whatever else an object holds; None for an older one without.

        Raises:
            SecateurError: When something is of another type, or more is prunable than there is.
        """
        if given.field("block_weights", None).value is None:
            return None
        prunable = given.field("prunable_weights").count(1, _MOST_WEIGHTS)
        in_blocks = given.field("block_weights")
        dense = tuple(
            StaysDense(
                _printable(row.field("name")),
                tuple(size.count(0, _MOST_WEIGHTS) for size in row.field("shape").entries()),
                _printable(row.field("why")),
            )
            for row in given.field("stays_dense").entries()
        )
        if in_blocks.count(1) != prunable + sum(one.weights for one in dense):
            raise in_blocks.refused("as many weights as are prunable or stay dense")
        return cls(prunable, in_blocks.count(), dense)

    def record(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "prunable_weights": self.prunable,
            "block_weights": self.in_blocks,
            "stays_dense": [
                {"name": one.name, "shape": list(one.shape), "why": one.why} for one in self.stays_dense
            ],
        }

    @property
    def share(self) -> float:
        """Which part of the block weights is prunable, in (0, 1]."""
        return self.prunable / self.in_blocks

    @property
    def in_words(self) -> str:
        """What a sparsity is counted over, in words."""
        part = f"{percent(self.share)} of the {self.in_blocks:,} block weights"
        kinds = list(self.reasons())
        if not kinds:
            return part
        more = f" and {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else ""
        return f"{part}: {', '.join(kinds[:_SHOWN])}{more} stay{'s' * (len(kinds) == 1)} dense"

    @property
    def warning(self) -> str:
        """A sentence where so much stays dense that a sparsity says little of the model; else empty."""
        if self.share >= LEAST_SHARE:
            return ""
        return f"warning: every sparsity is counted over {self.in_words}"

    def reasons(self) -> dict[str, str]:
        """Return why each kind of parameter stays dense, the largest first, with its share of the weights."""
        sizes: Counter[str] = Counter()
        found: dict[str, dict[str, None]] = {}
        for one in self.stays_dense:
            sizes[one.kind] += one.weights
            found.setdefault(one.kind, {})[one.why] = None
        return {
            kind: f"{' or '.join(found[kind])} ({percent(size / self.in_blocks)})"
            for kind, size in sizes.most_common()
        }


def _printable(given: Given) -> str:
    text = given.text()
    if not text.isprintable():  # it is printed as it is
        raise given.refused("a text without control characters")
    return text


def percent(share: float) -> str:
    """Return a share in words; less than all is never 100%."""
    text = f"{100 * share:.3g}%"
    return "nearly 100%" if text == "100%" and share < 1 else text
