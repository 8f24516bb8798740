"""Genetic programming over metrics and ratios, with DEAP's typed trees and their variation.

``Expression`` stays the truth: expressions are turned into DEAP's prefix lists to be varied and back.
The population keeps the best measured metrics in their order form; what the screen rejected or what
failed is learned from by not being a parent.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

from deap import gp

from ...metrics_dsl.expression import MAX_EXPONENT, Expression, MetricError, constant
from ...metrics_dsl.operators import COLUMN, FULL, LEAVES, OPERATORS, ROW, SCALAR, Shape
from ..core.candidate import Candidate, Trial
from ..core.objectives import raced_point
from ..core.selection import best_first
from ..spaces.metric_space import EXPONENTS, MetricSpace, replace_at, walk
from ..spaces.problem import Problem
from ..spaces.variables import Encoding, Values, blend, draw, mutate
from .abilities import GP
from .descent import descent_at_one_sparsity

# DEAP chooses among types in the order of a set, which for classes differs between processes: numbers
# are types that hash alike everywhere.
_TYPES: dict[Shape, int] = {FULL: 0, COLUMN: 1, ROW: 2, SCALAR: 3}
_CROSSOVER, _SUBTREE, _NODE = 0.35, 0.15, 0.15  # the rest moves a number
_STEPS = 4  # of descent in a batch, where sensitivities are known
_BOTH = 0.1  # of the other children there, the share whose ratios vary beside the tree
_DEAP = threading.Lock()  # one searcher at a time has DEAP draw from its generator
_SEEDS = 3  # published rules that are asked again, the best first, where ratios descend from them


class _Member(NamedTuple):
    encoding: Encoding
    point: tuple[float, ...]


class GeneticProgramming:
    """Evolves metrics, and ratios beside them: children come from crossover or one mutation.

    The population is in order of selection: by value with one objective, by non-dominated rank and
    then crowding distance (NSGA-II) with several. Survivors are its head, parents win tournaments.

    Args:
        problem: What is searched: trees, numbers beside them, or numbers alone.
        seed: Seed of the searcher's own generators.
        population: Most members that are kept as possible parents.

    Raises:
        SecateurError: When there is nothing to search.
    """

    def __init__(self, problem: Problem, *, seed: int, population: int = 20) -> None:
        GP.check("gp", problem)
        self._problem = problem
        self._rng = random.Random(seed)
        self._population_size = population
        self._population: list[_Member] = []
        self._waiting = [*problem.seeds, *problem.starts]
        self._asked: dict[str, Encoding] = {}
        self._known: set[Encoding] = set()
        self._batches = 0
        self._descent = descent_at_one_sparsity(problem, random.Random(f"walk {seed}"))
        self._primitives = _primitive_set(problem.trees) if problem.trees else None
        self._deap_rng = random.Random(seed)

    def ask(self, count: int) -> list[Candidate]:
        """Return steps of descent, where ratios descend, and beside them the seeds, then children."""
        candidates = []
        with self._deap_random():
            asked = self._steps(count)
            room = count - len(asked)
            seeds, self._waiting = self._waiting[:room], self._waiting[room:]
            asked += seeds or [self._new() for _ in range(room)]
            for encoding in asked:
                self._known.add(encoding)
                candidate = self._problem.candidate(encoding)
                self._asked[candidate.key] = encoding
                candidates.append(candidate)
        self._batches += 1
        return candidates

    def tell(self, trials: Sequence[Trial]) -> None:
        """Let the trials compete with the population: by the tokens they raced on, where they did."""
        members = {member.encoding: member for member in self._population}
        self._choose_seeds(trials)
        if self._descent:
            self._descent.tell(trials)
        for trial in trials:
            values = raced_point(trial, self._problem.objectives)
            encoding = self._encoding(trial.candidate)
            if values is None or encoding is None or encoding in members:
                continue
            self._known.add(encoding)
            members[encoding] = _Member(encoding, values)
        found = list(members.values())
        order = best_first([member.point for member in found])
        self._population = [found[i] for i in order[: self._population_size]]

    def _choose_seeds(self, trials: Sequence[Trial]) -> None:
        """Where ratios descend, keep the best of the published rules, and all metrics at its ratios.

        The others would be a detour: descent leads away from any of them.
        """
        if self._descent is None or self._asked or not self._waiting:
            return
        sparsity = self._problem.sparsity
        assert isinstance(sparsity, float)
        found: list[tuple[tuple[float, ...], Encoding]] = []
        for trial in trials:
            values = raced_point(trial, self._problem.objectives)
            encoding = self._problem.encoding(trial.candidate.metric, trial.candidate.ratios, sparsity)
            if values is not None and encoding in self._waiting:
                found.append((values, encoding))
        if found:
            order = best_first([values for values, _ in found])
            best = [found[i][1] for i in order]
            with_its_ratios = [self._joined(encoding, best[0]) for encoding in best]
            starts = [self._joined(encoding, best[0]) for encoding in self._problem.starts]
            self._waiting = list(dict.fromkeys([*best[:_SEEDS], *with_its_ratios, *starts]))

    def _joined(self, of_metric: Encoding, of_ratios: Encoding) -> Encoding:
        """Return the metric of one encoding with the ratios of another."""
        count = len(self._problem.metric_variables)
        return Encoding(of_metric.tree, (*of_metric.values[:count], *of_ratios.values[count:]))

    def _encoding(self, candidate: Candidate) -> Encoding | None:
        """Return the encoding of what was asked here, or of a rule that an encoding stands for exactly."""
        asked = self._asked.get(candidate.key)
        if asked is None and self._problem.is_exact:
            sparsity = self._problem.sparsity
            assert isinstance(sparsity, float)
            return self._problem.encoding(candidate.metric, candidate.ratios, sparsity)
        trees = self._problem.trees
        if asked is None or asked.tree is None or trees is None:
            return asked
        tree = trees.simplest(asked.tree)
        return None if tree is None else Encoding(tree, asked.values)

    def _steps(self, count: int) -> list[Encoding]:
        """Return steps of descent in the ratios, for the best metric so far, where their turn is."""
        room = min(_STEPS, count // 2 or self._batches % 2)
        if not (self._descent and room and self._descends and self._turn()[1]):
            return []
        # The seeds stand in order until they have been asked.
        best = self._waiting[0] if self._waiting else min(self._population, key=lambda m: m.point).encoding
        of_metric = best.values[: len(self._problem.metric_variables)]
        return [Encoding(best.tree, (*of_metric, *values)) for values in self._descent.ask(room)]

    @property
    def _descends(self) -> bool:
        return self._descent is not None and self._descent.begun and bool(self._population or self._waiting)

    def _new(self) -> Encoding:
        """Return an encoding not proposed before if a few attempts find one."""
        encoding = self._draw()
        for _ in range(20):
            if len(self._population) >= 4 and self._rng.random() < 0.95:
                child = self._child()
                if child is None:
                    continue
                encoding = child
            else:
                encoding = self._draw()
            if encoding not in self._known:
                break
        return encoding

    def _draw(self) -> Encoding:
        trees = self._problem.trees
        return Encoding(trees.draw(self._rng) if trees else None, draw(self._problem.variables, self._rng))

    def _child(self) -> Encoding | None:
        first, second = self._parent().encoding, self._parent().encoding
        vary_tree, vary_values = self._turn()
        if vary_tree and vary_values:
            kind = self._rng.random()
            # Where ratios descend their steps come beside the children.
            share = (1.0, _BOTH) if self._descends else (0.6, 0.6)
            vary_tree, vary_values = kind < share[0], kind > 1 - share[1]
        if self._descends:
            # What ratios are worth hardly depends on the metric: the best ones serve all, and metrics with
            # the same ratios can be screened against each other.
            best = min(self._population, key=lambda member: member.point).encoding
            first = best if self._problem.trees and not vary_tree else self._joined(first, best)
        tree, values = first
        if vary_tree:
            tree = self._vary_tree(first, second)
            if tree is None:
                return None
        if vary_values:
            values = self._vary_values(first, second)
        return Encoding(tree, values)

    def _vary_values(self, first: Encoding, second: Encoding) -> Values:
        variables = self._problem.variables
        if self._rng.random() < 0.5:
            return blend(variables, first.values, second.values, self._rng)
        return mutate(variables, first.values, self._rng, 10 ** self._rng.uniform(-2, -0.5))

    def _turn(self) -> tuple[bool, bool]:
        """Return whether trees, and whether numbers may be varied in this batch."""
        if self._problem.phase and self._problem.trees and self._problem.variables:
            is_tree = self._batches // self._problem.phase % 2 == 0
            return is_tree, not is_tree
        return self._problem.trees is not None, bool(self._problem.variables)

    def _vary_tree(self, first: Encoding, second: Encoding) -> Expression | None:
        trees = self._problem.trees
        assert trees is not None
        assert first.tree is not None
        assert second.tree is not None
        try:
            return trees.simplest(self._child_tree(first.tree, second.tree, self._rng.random()))
        except MetricError:  # too deep, or a number left its range
            return None

    def _child_tree(self, first: Expression, second: Expression, kind: float) -> Expression:
        tree = gp.PrimitiveTree(_nodes(first))
        if kind < _CROSSOVER:
            child, _ = gp.cxOnePoint(tree, gp.PrimitiveTree(_nodes(second)))
        elif (kind := kind - _CROSSOVER) < _SUBTREE:
            (child,) = gp.mutUniform(tree, self._subtree, self._primitives)
        elif kind - _SUBTREE < _NODE:
            (child,) = gp.mutNodeReplacement(tree, self._primitives)
        else:
            return self._move_number(first) or self._child_tree(first, second, _CROSSOVER)
        return _expression(iter(child))

    def _parent(self) -> _Member:
        """Return the winner of a tournament of four.

        Half of them go by the order of selection, in which the population stands, half by the first
        objective: one end of a front in size is short and poor, and makes poor parents.
        """
        entrants = self._rng.sample(range(len(self._population)), 4)
        if self._rng.random() < 0.5:
            return self._population[min(entrants)]
        return min((self._population[i] for i in entrants), key=lambda member: member.point)

    def _move_number(self, metric: Expression) -> Expression | None:
        """Scale one constant, shift one exponent, or raise one factor to a new exponent; None without any."""
        nodes = walk(metric)
        numbers = [i for i, node in enumerate(nodes) if node.value is not None]
        assert self._problem.trees is not None
        if not self._problem.trees.allows("pow"):
            if not numbers:
                return None
        elif not numbers or self._rng.random() < 0.5:
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
        trees = self._problem.trees
        assert trees is not None
        return _nodes(trees.tree(self._rng, shape, self._rng.randint(1, 3)))

    @contextmanager
    def _deap_random(self) -> Iterator[None]:
        """Have DEAP draw from this searcher's generator.

        DEAP draws from the module ``random``, as other threads do, such as Ray's; so not that one's state but
        the name that DEAP knows it by is another's meanwhile.
        """
        with _DEAP:
            outside, gp.random = gp.random, self._deap_rng
            try:
                yield
            finally:
                gp.random = outside


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
    for operator in (o for o in OPERATORS.values() if space.allows(o.name)):
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
