"""Plans: what a search would need of memory and time, from sizes and rates alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...search.core import defaults
from ..measure.dense_reference import PROBABILITY_BYTES, TOKENS_OF_LOGITS, TOKENS_PER_CALL
from ..measure.partition import split_blocks
from ..measure.prefix_cache import CHAINS, KEPT_BYTES
from ..measure.sensitivity import FORWARD_PASSES
from ..measure.shard import ORDER_BYTES, SCREEN_ROWS
from ..measure.windows import tokens_per_step
from .model_sizes import Outline
from .rates import Rates, quadratic_operations

_RUNTIME = {"cpu": 500 << 20, "cuda": 1 << 30}  # interpreter and libraries; a GPU's context and workspaces
_ALLOCATOR = 0.1  # of all else: what allocators hold and cannot give
# Bytes per weight while one layer is masked: its copy in 32 bits, scores, what selection moves, the mask; on
# a GPU selection also returns the scores and 64-bit places of those removed, at 75 %.
_MASKING = {"cpu": 4 + 4 + 4 + 4 + 1, "cuda": 4 + 4 + 4 + 4 + 1 + 9}
# Bytes per weight of a block on the way back: order, edge, its gradient, softly masked weights and theirs.
_SOFT_MASKS = 24
_PASSES_OF_LOGITS = 8  # over the vocabulary, to compare one token
_PASSES_OF_STATES = 3  # over a layer's inputs and outputs beside its product: norms, activations, residuals
_COPIES_OF_LOGITS = 4


@dataclass(frozen=True)
class Tokens:
    """Tokens of a calibration, each a multiple of ``length``, the tokens of a sequence."""

    statistics: int
    selection: int
    holdout: int
    length: int


@dataclass(frozen=True)
class Machine:
    """What there is: the kind of device, how many, bytes of each, CPU threads, type of the weights."""

    device: str
    count: int
    memory: int
    threads: int = 1
    dtype: str = "float32"

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class Plan:
    """One way to hold a model, and what a search costs there.

    Attributes:
        shards: The blocks of each worker of one copy of the model.
        replicas: Copies of the model.
        memory: Bytes by purpose on the worker that needs most.
        fits: Whether that is no more than a device has.
        calibration: Bytes of the calibration folder, without a copy of the model.
        seconds: Seconds per candidate by stage, on one copy.
        pace: The same for the slowest shard: what a copy takes when several candidates are on their way.
    """

    shards: Sequence[range]
    replicas: int
    memory: dict[str, int]
    fits: bool
    calibration: int
    seconds: dict[str, float]
    pace: dict[str, float]

    @property
    def peak(self) -> int:
        """Bytes on the worker that needs most."""
        return sum(self.memory.values())

    def hours(self, budget: int, space: str) -> float:
        """Return the hours that a budget of candidates takes.

        Args:
            budget: Candidates.
            space: ``metrics``, which are screened before the best quarter goes on, or ``ratios``, which race
                on a quarter of the tokens first: the defaults of a search.
        """
        first = self.pace["screen"] if space == "metrics" else self.pace["model"] / defaults.RUNG_PART
        return budget * (first + defaults.PROMOTE * self.pace["model"]) / self.replicas / 3600


def make_plan(outline: Outline, machine: Machine, tokens: Tokens, rates: Rates) -> Plan:
    """Return the plan with the fewest shards that fit, or with as many as there are devices."""
    most = min(machine.count, len({layer.block for layer in outline.layers}))
    for count in range(1, most + 1):
        shards = split_blocks(outline.layers, count, len(outline.weights))
        needed = [memory_of(outline, machine, tokens, blocks) for blocks in shards]
        memory = max(needed, key=lambda parts: sum(parts.values()))
        fits = sum(memory.values()) <= machine.memory
        if fits or count == most:
            break
    times = [seconds_of(outline, machine, tokens, rates, blocks) for blocks in shards]
    return Plan(
        shards,
        machine.count // count,
        memory,
        fits,
        sum(outline.statistics) + 4 * (tokens.statistics + tokens.selection + tokens.holdout),
        {stage: sum(own[stage] for own in times) for stage in times[0]},
        {stage: max(own[stage] for own in times) for stage in times[0]},
    )


def memory_of(outline: Outline, machine: Machine, tokens: Tokens, blocks: range) -> dict[str, int]:
    """Return the bytes that a worker with some blocks needs, by purpose."""
    width, states = machine.width, outline.width * machine.width
    layers = [layer for layer in outline.layers if layer.block in blocks]
    size = sum(layer.size for layer in layers)
    heaviest = max(outline.weights[block] for block in blocks)
    called = min(TOKENS_PER_CALL[machine.device], max(tokens.selection, tokens.length))
    widest = max(layer.rows + layer.columns for layer in layers)
    largest = max(layer.size for layer in layers)
    probabilities = min(4 * tokens.selection * outline.vocabulary, PROBABILITY_BYTES)
    logits = _COPIES_OF_LOGITS * 4 * TOKENS_OF_LOGITS[machine.device] * outline.vocabulary
    masking = _MASKING[machine.device] * largest * min(machine.threads, len(layers)) + width * heaviest
    running = 4 * called * widest * _PASSES_OF_STATES
    order = 2 * size
    chain = len(blocks) * tokens.selection * states
    is_last = blocks.stop == len(outline.weights)
    parts = {
        "weights": width * (sum(outline.weights[block] for block in blocks) + outline.outside),
        "statistics": sum(outline.statistics[block] for block in blocks),
        "sampled rows": sum(2 * 4 * min(SCREEN_ROWS, x.rows) * x.columns for x in layers),
        "orders of scores": ORDER_BYTES // order * order,
        "dense probabilities": probabilities if is_last else 0,
        "hidden states": 3 * tokens.selection * states + min(CHAINS * chain, KEPT_BYTES),
        "one block at work": max(
            masking + running,
            logits if is_last else 0,
            # Sensitivities keep what entered each block, and all that a block computes on its way back.
            len(blocks) * tokens_per_step(tokens.statistics) * states
            + _SOFT_MASKS * max(sum(x.size for x in layers if x.block == b) for b in blocks) + 2 * running,
        ),
        "libraries": _RUNTIME[machine.device],
    }  # fmt: skip
    return {**parts, "allocator": int(_ALLOCATOR * sum(parts.values()))}


def seconds_of(
    outline: Outline, machine: Machine, tokens: Tokens, rates: Rates, blocks: range
) -> dict[str, float]:
    """Return the seconds that a worker with some blocks takes for a candidate, by stage."""
    own = [(x, n) for x, n in zip(outline.layers, outline.kept, strict=True) if x.block in blocks]
    size = sum(layer.size for layer, _ in own)
    masking = size * (1 / rates.scored + 1 / rates.selected)

    def forms(rows: int | None) -> float:
        """Return the operations of errors over so many rows a layer, all for None."""
        return sum(
            quadratic_operations(min(rows or x.rows, x.rows), x.columns, n, machine.device) for x, n in own
        )

    def launches(masks: int, passes: int, count: int) -> float:
        """Return the seconds that a GPU's host takes to launch work, however small the work.

        Args:
            masks: Masks made of each layer.
            passes: Times that tokens go through the blocks.
            count: How many tokens.
        """
        if machine.device == "cpu":
            return 0.0
        calls = passes * len(blocks) * -(-count // TOKENS_PER_CALL[machine.device])
        if blocks.stop == len(outline.weights):
            calls += passes * -(-count // min(tokens.length, TOKENS_OF_LOGITS[machine.device]))
        return (masks * len(own) + calls) / rates.calls

    share = sum(min(SCREEN_ROWS, x.rows) * x.columns for x, _ in own) / size
    hashing = size / rates.digested
    applying = size * (4 + 1 + 4) / rates.copied
    found = tokens_per_step(tokens.statistics)
    return {
        "screen": share * (masking + hashing)
        + forms(SCREEN_ROWS) / rates.thin_forms
        + len(own) / rates.calls,
        "layer": masking + hashing + forms(None) / rates.forms + len(own) / rates.calls,
        "model": masking
        + applying
        + _running(outline, tokens, rates, blocks, tokens.selection)
        + launches(1, 1, tokens.selection),
        "sensitivity": masking
        + applying
        + size / rates.ordered
        + _SOFT_MASKS * size / rates.copied
        + FORWARD_PASSES * _running(outline, tokens, rates, blocks, found)
        + launches(2, FORWARD_PASSES, found),  # whole masks on the way there, soft ones on the way back
    }


def _running(outline: Outline, tokens: Tokens, rates: Rates, blocks: range, count: int) -> float:
    """Return the seconds of so many tokens through some blocks and, of the last, the comparison."""
    operations = sum(2 * outline.active[block] for block in blocks) * count
    operations += 2 * len(blocks) * count * tokens.length * outline.width  # attention looks back only
    touched = sum(4 * (x.rows + x.columns) for x in outline.layers if x.block in blocks)
    moved = _PASSES_OF_STATES * count * touched
    if blocks.stop == len(outline.weights):
        operations += 2 * count * outline.width * outline.vocabulary
        moved += _PASSES_OF_LOGITS * 4 * count * outline.vocabulary
    return operations / rates.products + moved / rates.copied


def ways_to_fit(
    outline: Outline, machine: Machine, tokens: Tokens, rates: Rates, observe: Callable[..., Outline]
) -> list[str]:
    """Return the changes of options that would each make a plan fit by itself.

    Args:
        outline: The model.
        machine: Where it does not fit.
        tokens: Tokens of the calibration.
        rates: Rates of the device.
        observe: Gives the outline with other ``statistics`` tokens, or with ``gradients`` or without.
    """

    def fits(model: Outline = outline, **changes: Any) -> bool:
        return make_plan(model, replace(machine, **changes), tokens, rates).fits

    counts = range(machine.count + 1, len(outline.weights) + 1) if machine.device == "cuda" else ()
    found = [f"--gpus {count}" for count in counts if fits(count=count)][:1]
    if machine.dtype == "float32" and fits(dtype="bfloat16"):
        found.append("--dtype bfloat16")
    if fits(observe(gradients=False)):
        found.append("--no-gradients")
    fewer = tokens.statistics // 2
    while fewer >= tokens.length:
        if fits(observe(statistics=fewer)):
            return [*found, f"--tokens {fewer}"]
        fewer //= 4
    return found
