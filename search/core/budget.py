"""Budgets: how much a run may measure, in candidates, tokens or seconds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...metrics_dsl.errors import SecateurError
from .candidate import Trial

Unit = Literal["candidates", "tokens", "seconds"]
_MOST = 1e12  # of a unit: more is a slip of the finger
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Budget:
    """An amount of candidates, of tokens run through pruned models, or of seconds spent on measuring.

    All three are read from trials, so that a resumed run ends where an uninterrupted one does. Aliases
    cost nothing.
    """

    amount: float
    unit: Unit = "candidates"

    @classmethod
    def parse(cls, text: str | int) -> Budget:
        """Return the budget of ``400``, ``2Mtokens`` or ``1800s``.

        Raises:
            SecateurError: For anything else.
        """
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kMG]?)\s*tokens|(s|min|h))?\s*", str(text))
        number = float(found[1]) if found else 0.0
        if (
            found is None
            or not 0 < number < _MOST
            or (found[2] is None and not found[3] and number != int(number))
        ):
            raise SecateurError(
                "expected a budget of candidates such as 400, of tokens such as 2Mtokens, or of seconds "
                f"such as 1800s, got {text!r}"
            )
        if found[2] is not None:
            return cls(number * _FACTORS[found[2]], "tokens")
        if found[3]:
            return cls(number * {"s": 1, "min": 60, "h": 3600}[found[3]], "seconds")
        return cls(number)

    def __str__(self) -> str:
        """Return the text that ``parse`` reads back, such as ``400``, ``50000tokens`` or ``1800s``."""
        amount = str(int(self.amount)) if self.amount == int(self.amount) else repr(self.amount)
        return amount + {"candidates": "", "tokens": "tokens", "seconds": "s"}[self.unit]

    @property
    def in_words(self) -> str:
        """The amount with its unit, for people."""
        return f"{self.amount:,.0f} {self.unit}"

    def cost(self, trials: Sequence[Trial]) -> float:
        """Return what trials have used up, in the budget's unit."""
        counted = [trial.measurement for trial in trials if not trial.alias_of]
        if self.unit == "candidates":
            return float(len(counted))
        return float(sum(getattr(measurement, self.unit) for measurement in counted))

    def next_batch(self, spent: float, batch: int) -> int:
        """Return how many candidates to ask for: a batch, or what is left of a budget of candidates."""
        return min(batch, int(self.amount - spent)) if self.unit == "candidates" else batch
