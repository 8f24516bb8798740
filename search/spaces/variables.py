"""Variables: the numbers and choices that a searcher varies beside, or instead of, a metric's tree."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...metrics_dsl.expression import Expression


@dataclass(frozen=True)
class Variable:
    """A number in [low, high], or one of some choices, whose value is its position.

    Attributes:
        name: What it is called in messages.
        low: Least value.
        high: Largest value.
        choices: Names of the choices; none for a number.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    choices: tuple[str, ...] = ()

    def clip(self, value: float) -> float:
        """Return the nearest value that is allowed."""
        if self.choices:
            return float(max(0, min(len(self.choices) - 1, round(value))))
        return max(self.low, min(self.high, value))

    def draw(self, rng: random.Random) -> float:
        """Return a value, each as likely."""
        return float(rng.randrange(len(self.choices))) if self.choices else rng.uniform(self.low, self.high)


class Encoding(NamedTuple):
    """What a searcher varies: a metric's tree, if trees are searched, and a value of each variable."""

    tree: Expression | None
    values: tuple[float, ...] = ()


Values = tuple[float, ...]


def draw(variables: Sequence[Variable], rng: random.Random) -> Values:
    """Return a random value of each variable."""
    return tuple(variable.draw(rng) for variable in variables)


def mutate(variables: Sequence[Variable], values: Values, rng: random.Random, scale: float) -> Values:
    """Return values of which one to a third have moved, by a normal step of ``scale`` times the range."""
    count = rng.randint(1, max(1, len(variables) // 3))
    changed = list(values)
    for i in rng.sample(range(len(variables)), count):
        variable = variables[i]
        if variable.choices:
            changed[i] = variable.draw(rng)
        else:
            changed[i] = variable.clip(values[i] + rng.gauss(0, scale) * (variable.high - variable.low))
    return tuple(changed)


def blend(variables: Sequence[Variable], first: Values, second: Values, rng: random.Random) -> Values:
    """Return values between, or a little beyond, those of two parents; a choice is one parent's."""
    share = rng.uniform(-0.25, 1.25)
    return tuple(
        rng.choice((a, b)) if variable.choices else variable.clip(a + share * (b - a))
        for variable, a, b in zip(variables, first, second, strict=True)
    )
