"""Genetic programming over metrics, with DEAP's typed trees, variation and selection.

``Expression`` stays the truth: expressions are turned into DEAP's prefix lists to be varied and back.
The population keeps the best measured metrics in their order form; what the screen rejected or what
failed is learned from by not being a parent.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
from deap import base, gp, tools

from ..metrics_dsl.expression import MAX_EXPONENT, Expression, MetricError, constant
from ..metrics_dsl.operators import COLUMN, FULL, LEAVES, OPERATORS, ROW, SCALAR, Shape
from .candidate import Candidate, Trial
from .objectives import Objective, point
from .space import EXPONENTS, MetricSpace, replace_at, walk

# DEAP chooses among types in the order of a set, which for classes differs between processes: numbers
# are types that hash alike everywhere.
_TYPES: dict[Shape, int] = {FULL: 0, COLUMN: 1, ROW: 2, SCALAR: 3}
_CROSSOVER, _SUBTREE, _NODE = 0.35, 0.15, 0.15  # the rest moves a number


class _Tree(gp.PrimitiveTree):  # type: ignore[misc]  # DEAP has no types
    """A DEAP tree with its fitness; a class of our own, for ``creator`` is global to the process."""

    def __init__(self, metric: Expression, fitness: base.Fitness) -> None:
        super().__init__(_nodes(metric))
        self.metric = metric
        self.fitness = fitness


class GeneticProgramming:
    """Evolves metrics: parents win tournaments, children come from crossover or one mutation.

    The population is in order of selection: by value with one objective, by non-dominated rank and
    then crowding distance (NSGA-II) with several. Survivors are its head, parents win tournaments.

    Args:
        space: The metrics that may be proposed.
        complete: Turns a metric into a candidate.
        objectives: What to minimise.
        seed: Seed of the searcher's own generators.
        population: Most metrics that are kept as possible parents.
    """

    def __init__(
        self,
        space: MetricSpace,
        complete: Callable[[Expression], Candidate],
        objectives: Sequence[Objective],
        *,
        seed: int,
        population: int = 20,
    ) -> None:
        self._space = space
        self._complete = complete
        self._objectives = list(objectives)
        self._rng = random.Random(seed)
        self._population_size = population
        self._population: list[_Tree] = []
        self._known: set[str] = set()
        self._rejected: set[str] = set()
        self._primitives = _primitive_set(space)
        weights = (-1.0,) * len(self._objectives)  # DEAP maximises
        self._fitness = type("Fitness", (base.Fitness,), {"weights": weights})
        self._states = (random.Random(seed).getstate(), np.random.RandomState(seed).get_state())

    def ask(self, count: int) -> list[Candidate]:
        """Return ``count`` children of the population, or random metrics while it is too small."""
        metrics: list[Expression] = []
        with self._deap_random():
            for _ in range(count):
                metrics.append(self._new_metric(metrics))
        return [self._complete(metric) for metric in metrics]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Let the fully measured trials compete with the population."""
        with self._deap_random():
            members = {tree.metric: tree for tree in self._population}
            for trial in trials:
                self._known.add(str(trial.candidate.metric))
                if trial.status == "rejected":
                    self._rejected.add(trial.candidate.key)
                if trial.alias_of in self._rejected:
                    continue
                values = point(trial, self._objectives)
                metric = self._space.simplest(trial.candidate.metric)
                if values is None or metric is None or metric in members:
                    continue
                self._known.add(str(metric))
                members[metric] = _Tree(metric, self._fitness(values))
            trees = list(members.values())
            fronts = tools.sortNondominated(trees, self._population_size) if trees else []
            for front in fronts:
                tools.emo.assignCrowdingDist(front)
                front.sort(key=lambda tree: -tree.fitness.crowding_dist)
            self._population = [tree for front in fronts for tree in front][: self._population_size]

    def _new_metric(self, asked: Sequence[Expression]) -> Expression:
        """Return a metric not proposed before if a few attempts find one."""
        metric = self._space.draw(self._rng)
        for _ in range(20):
            if len(self._population) >= 4 and self._rng.random() < 0.95:
                child = self._vary()
                if child is None:
                    continue
                metric = child
            else:
                metric = self._space.draw(self._rng)
            if str(metric) not in self._known and metric not in asked:
                break
        return metric

    def _vary(self) -> Expression | None:
        first, second = (self._parent() for _ in range(2))
        kind = self._rng.random()
        try:
            return self._space.simplest(self._child(first, second, kind))
        except MetricError:  # too deep, or a number left its range
            return None

    def _child(self, first: _Tree, second: _Tree, kind: float) -> Expression:
        if kind < _CROSSOVER:
            child, _ = gp.cxOnePoint(gp.PrimitiveTree(first), gp.PrimitiveTree(second))
        elif (kind := kind - _CROSSOVER) < _SUBTREE:
            (child,) = gp.mutUniform(gp.PrimitiveTree(first), self._subtree, self._primitives)
        elif kind - _SUBTREE < _NODE:
            (child,) = gp.mutNodeReplacement(gp.PrimitiveTree(first), self._primitives)
        else:
            return self._move_number(first.metric)
        return _expression(iter(child))

    def _parent(self) -> _Tree:
        """Return the winner of a tournament of four.

        Half of them go by the order of selection, in which the population stands, half by the first
        objective: one end of a front in size is short and poor, and makes poor parents.
        """
        entrants = self._rng.sample(range(len(self._population)), 4)
        if self._rng.random() < 0.5:
            return self._population[min(entrants)]
        return min((self._population[i] for i in entrants), key=lambda tree: tree.fitness.values)

    def _move_number(self, metric: Expression) -> Expression:
        """Scale one constant, shift one exponent, or raise one factor to a new exponent."""
        nodes = walk(metric)
        numbers = [i for i, node in enumerate(nodes) if node.value is not None]
        if not numbers or self._rng.random() < 0.5:
            places = [i for i, node in enumerate(nodes) if node.op != "const"]
            exponent = round(math.exp(self._rng.gauss(0, 0.4)), 2)
            return replace_at(metric, self._rng.choice(places), lambda e: Expression("pow", (e,), exponent))

        def move(node: Expression) -> Expression:
            assert node.value is not None
            if node.op == "const":
                return constant(float(f"{node.value * math.exp(self._rng.gauss(0, 0.7)):.2g}"))
            value = round(node.value + self._rng.gauss(0, 0.3), 2)
            value = max(-MAX_EXPONENT, min(MAX_EXPONENT, value))
            return Expression(node.op, node.args, value or 0.1)

        return replace_at(metric, self._rng.choice(numbers), move)

    def _subtree(self, pset: Any, type_: int) -> list[Any]:
        shape = next(s for s, t in _TYPES.items() if t == type_)
        return _nodes(self._space.tree(self._rng, shape, self._rng.randint(1, 3)))

    @contextmanager
    def _deap_random(self) -> Iterator[None]:
        """Run DEAP on this searcher's own state of the global generators that DEAP draws from."""
        outside = random.getstate(), np.random.get_state()
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
        try:
            yield
        finally:
            self._states = random.getstate(), np.random.get_state()
            random.setstate(outside[0])
            np.random.set_state(outside[1])


# Between expressions and DEAP's nodes --------------------------------------------------------------


def _name(op: str, value: float | None) -> str:
    return op if value is None else f"{op}:{value!r}"


def _nodes(metric: Expression) -> list[Any]:
    return [_node(e) for e in walk(metric)]


def _node(e: Expression) -> Any:
    name = _name(e.op, e.value)
    if e.args:
        return gp.Primitive(name, [_TYPES[arg.shape] for arg in e.args], _TYPES[e.shape])
    return gp.Terminal(name, True, _TYPES[e.shape])


def _expression(nodes: Iterator[Any]) -> Expression:
    node = next(nodes)
    op, _, value = str(node.name).partition(":")
    args = tuple(_expression(nodes) for _ in range(node.arity))
    return Expression(op, args, float(value) if value else None)


def _primitive_set(space: MetricSpace) -> Any:
    """Return DEAP's table of nodes by type, from which node replacement draws."""
    primitives = gp.PrimitiveSetTyped("metric", [], _TYPES[FULL])
    for shape, type_ in _TYPES.items():
        for leaf in (n for n in LEAVES if n in space.leaves and LEAVES[n].shape == shape):
            primitives.terminals[type_].append(gp.Terminal(leaf, True, type_))
    for value in (0.1, 0.5, 1.0, 2.0, 10.0):
        primitives.terminals[_TYPES[SCALAR]].append(_node(constant(value)))
    for operator in OPERATORS.values():
        for shapes in product(_TYPES, repeat=operator.arity):
            try:
                result = operator.shape(*shapes)
            except ValueError:
                continue
            for exponent in EXPONENTS if operator.name == "pow" else (None,):
                node = gp.Primitive(
                    _name(operator.name, exponent), [_TYPES[s] for s in shapes], _TYPES[result]
                )
                primitives.primitives[_TYPES[result]].append(node)
    return primitives
