"""What the published rules cost that a run measures first, and whether its budget can pay for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..search.baselines import Baseline
from ..search.core.budget import Budget
from ..search.core.candidate import Candidate
from ..search.core.protocols import Evaluator
from ..search.settings import SearchSettings
from ..search.toml import SettingsError
from ..workers.measure.sensitivity import FORWARD_PASSES
from ..workers.measure.windows import tokens_per_rung


@dataclass(frozen=True)
class Race:
    """On how many tokens candidates race, and the best of a batch is asked for its sensitivities.

    Attributes:
        rungs: Tokens of the model stage before all of them, growing.
        sensitivity: Tokens; 0 where nobody asks.
    """

    rungs: tuple[int, ...]
    sensitivity: int


@dataclass(frozen=True)
class BaselineCost:
    """The cost of a run's published rules on one calibration.

    Attributes:
        evaluator: Measures two of them where a budget is in seconds.
        selection: Sequences and tokens per sequence of the selection part.
        race: Tokens of rungs and sensitivities.
    """

    evaluator: Evaluator
    selection: tuple[int, int]
    race: Race

    def check(self, settings: SearchSettings, baselines: Sequence[Baseline]) -> str:
        """Return a sentence on what the rules cost, at most: equal masks are not measured twice.

        Raises:
            SettingsError: When the budget cannot pay for them, with the smallest that can.
        """
        budget = Budget.parse(settings.budget)
        distinct: dict[object, tuple[Candidate, bool]] = {}
        for rule in baselines:
            candidate = Candidate(rule.metric, rule.ratios, settings.group)
            distinct.setdefault(candidate.order_key, (candidate, rule.is_one))
        rules = [candidate for candidate, _ in distinct.values()]
        always = sum(is_one for _, is_one in distinct.values())
        tokens = self._tokens(len(rules), always, settings.promote) if settings.stage == "model" else 0
        cost = {"candidates": float(len(rules)), "tokens": float(tokens)}
        about = ""
        if budget.unit == "seconds":
            cost["seconds"], about = self._seconds(rules, settings, tokens), "about "
        needed = math.ceil(cost[budget.unit])
        if needed > budget.amount:
            raise SettingsError(
                f"expected a budget that pays for the {len(rules)} published rules that are measured first, "
                f"got {budget.in_words}; the smallest that does is {about}--budget "
                f"{Budget(needed, budget.unit)}, and a search needs more"
            )
        about_seconds = f" and about {cost['seconds']:,.0f} seconds" if cost.get("seconds") else ""
        costs = f", on at most {tokens:,} tokens{about_seconds}," if tokens else f"{about_seconds},"
        left = "; nothing of it is left to search with: give a larger --budget"
        return (
            f"{len(rules)} published rules are measured first{costs} and count towards the budget of "
            f"{budget.in_words}{left if needed == budget.amount else ''}"
        )

    def _tokens(self, rules: int, always: int, promote: float) -> int:
        """Return the most tokens that rules run through pruned models; some of them win every race."""
        going_on, others, total = rules, rules - always, 0
        for rung in self.race.rungs:
            total += going_on * tokens_per_rung(*self.selection, rung)
            others = math.ceil(promote * others)
            going_on = always + others
        return total + going_on * math.prod(self.selection) + FORWARD_PASSES * self.race.sensitivity

    def _seconds(self, rules: Sequence[Candidate], settings: SearchSettings, tokens: int) -> float:
        """Return about how long the rules take, from two of them; 0 where both fail and nothing is known."""
        rung = self.race.rungs[0] if self.race.rungs else 0
        found = self.evaluator.measure(rules[:2], settings.stage, "selection", rung)
        known = [m for m in found if not m.failure]
        if settings.stage == "model":
            return tokens * min((m.seconds / m.tokens for m in known if m.tokens), default=0.0)
        return len(rules) * min((m.seconds for m in known), default=0.0)
