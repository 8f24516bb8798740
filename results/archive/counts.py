"""Counts: what became of the candidates of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ...search.core.candidate import STAGES


@dataclass(frozen=True)
class Counts:
    """How many candidates a run has told, by what became of them.

    A candidate whose masks are those of an earlier one shares its measurement. It is counted as an alias
    alone, also where the earlier one was rejected or failed; the others are distinct.

    Attributes:
        distinct: (last stage, status) -> distinct candidates; the status is measured, rejected or failed.
        shared: The same of what aliases share -> aliases.
    """

    distinct: Counter[tuple[str, str]]
    shared: Counter[tuple[str, str]]

    @classmethod
    def of(cls, rows: Iterable[tuple[str, str, int, int]]) -> Counts:
        """Return the counts of rows of a stage, a status, whether it is of aliases, and a number."""
        found = cls(Counter(), Counter())
        for stage, status, is_alias, number in rows:
            known = found.shared if is_alias else found.distinct
            known[stage, "measured" if status == "alias" else status] += number
        return found

    def __str__(self) -> str:
        return f"rejected {self.rejected}  aliases {self.aliases}  failed {self.failed}"

    @property
    def candidates(self) -> int:
        """Distinct candidates, which a budget of candidates counts."""
        return self.distinct.total()

    @property
    def rejected(self) -> int:
        """Distinct candidates that the screen or a rung rejected."""
        return _with(self.distinct, "rejected")

    @property
    def failed(self) -> int:
        """Distinct candidates that could not be measured."""
        return _with(self.distinct, "failed")

    @property
    def aliases(self) -> int:
        """Candidates that share the measurement of an earlier one."""
        return self.shared.total()

    @property
    def aliases_of(self) -> dict[str, int]:
        """Aliases by the status of what they share, where there are any."""
        found = {status: _with(self.shared, status) for status in ("measured", "rejected", "failed")}
        return {status: number for status, number in found.items() if number}

    def by_stage(self) -> dict[str, dict[str, int]]:
        """Return distinct candidates by status, and aliases, of each stage that any ended at."""
        stages = [stage for stage in STAGES if any(stage == own for own, _ in self.distinct | self.shared)]
        return {
            stage: {
                "measured": self.distinct[stage, "measured"],
                "alias": sum(number for (own, _), number in self.shared.items() if own == stage),
                "rejected": self.distinct[stage, "rejected"],
                "failed": self.distinct[stage, "failed"],
            }
            for stage in stages
        }


def _with(counts: Counter[tuple[str, str]], status: str) -> int:
    return sum(number for (_, own), number in counts.items() if own == status)
