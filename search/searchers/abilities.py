"""Abilities: what a searcher can search. The table of searchers and their constructors read the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...metrics_dsl.errors import SecateurError
from ..core import defaults
from ..spaces.varied import Varied

if TYPE_CHECKING:
    from ..spaces.problem import Problem


@dataclass(frozen=True)
class Abilities:
    """What a searcher can search, and how; what is left out can be anything.

    Attributes:
        searches: What it can vary. Who varies numbers varies one number too.
        objectives: How many it minimises, or that KL has to come first.
        sensitivities: Whether it uses them: ``can`` says where there are any, at one sparsity; ``needs`` says
            that it searches nothing else, at one sparsity or over an interval.
        phases: Whether it can vary metrics and ratios in turn.
        batch: Candidates asked for at a time if nothing is said.
        least_batch: The fewest it can learn from.
        most_batch: The most it has proposals for; None for any number.
        batch_reason: Why, as the end of a sentence: "which learns from their ranks".
    """

    searches: tuple[Varied, ...] = ("trees", "choices", "numbers")
    objectives: Literal["any number", "one", "kl first"] = "any number"
    sensitivities: Literal["no", "can", "needs"] = "no"
    phases: bool = False
    batch: int = defaults.BATCH
    least_batch: int = 1
    most_batch: int | None = None
    batch_reason: str = ""

    def can_vary(self, varied: frozenset[Varied]) -> bool:
        """Return whether all that varies in a problem can be varied."""
        own = {*self.searches, "one number"} if "numbers" in self.searches else set(self.searches)
        return varied <= own

    def check(self, searcher: str, problem: Problem) -> None:
        """Check that a searcher can represent a problem.

        Raises:
            SecateurError: When there is nothing to search, something that it cannot vary, or more objectives
                than it takes.
        """
        if not problem.varied:
            raise SecateurError("expected metrics or ratios to search, got one given rule; choose a --space")
        if not self.can_vary(problem.varied):
            raise SecateurError(
                f"expected {' or '.join(self.searches)} to search for the searcher {searcher}, got "
                f"{' and '.join(sorted(problem.varied))}; choose another --searcher or --space"
            )
        if self.objectives == "one" and len(problem.objectives) > 1:
            raise SecateurError(
                f"expected one objective for the searcher {searcher}, got "
                f"{','.join(o.name for o in problem.objectives)}; choose another --searcher for several"
            )


ANYTHING = Abilities()
_WITHOUT_TREES: tuple[Varied, ...] = ("choices", "numbers")

DESCENT = Abilities(
    ("numbers",), "kl first", "needs", batch=4, most_batch=4,
    batch_reason="which tries three lengths of a step and the mean of its path",
)  # fmt: skip
GP = Abilities(sensitivities="can", phases=True)
NSGA3 = Abilities(_WITHOUT_TREES)
TPE = Abilities(_WITHOUT_TREES)
EVOLUTION = Abilities(_WITHOUT_TREES)
# A generation is the mean, and at least four samples to rank.
CMA = Abilities(("numbers",), "one", least_batch=5, batch_reason="which learns from their ranks")
GRID = Abilities(("one number",))
