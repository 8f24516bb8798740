"""Planning: memory and time of a search from a model's configuration, before anything is downloaded."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from ..metrics_dsl.errors import SecateurError
from ..search.core import defaults
from ..search.core.requests import MOST_THREADS, check_count, check_dtype, shown
from ..workers.calibrate.calibration import CalibrationRequest
from ..workers.model.load import accelerator, choose_device
from ..workers.plan.model_sizes import Outline, outline
from ..workers.plan.plan import Machine, Plan, Tokens, make_plan, ways_to_fit
from ..workers.plan.rates import GPUS, Rates, measure_rates, rates_of

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip

# More is a slip of the finger.
_MOST_GPUS = 1_000_000
_MOST_CANDIDATES = 10**12
_MOST_BYTES = 1 << 50


@dataclass(frozen=True)
class SearchPlan:
    """What a search would need of memory and time; as text it is a page for people.

    Attributes:
        model: The model that was asked for.
        sizes: The model's layers and what they hold.
        machine: What it was planned for.
        plan: Memory, shards and seconds.
        rates: How fast the machine is, and how that is known.
        budget: Candidates of the search.
        ways_to_fit: Changes of options with which it would fit, where it does not.
        devices: The machine in words.
    """

    model: str
    sizes: Outline
    machine: Machine
    plan: Plan
    rates: Rates
    budget: int
    ways_to_fit: tuple[str, ...]
    devices: str

    @property
    def fits(self) -> bool:
        """Whether the search fits the machine."""
        return self.plan.fits

    @property
    def hours(self) -> dict[str, float]:
        """Hours that the budget lasts, of a search for metrics and of one for ratios."""
        return {space: self.plan.hours(self.budget, space) for space in ("metrics", "ratios")}

    @property
    def verdict(self) -> str:
        """One sentence: whether it fits, and if not what would."""
        made, memory = self.plan, _size(self.machine.memory)
        if not made.fits:
            ways = ", ".join(self.ways_to_fit)
            advice = f"any of these would: {ways}" if ways else "no single change of options would"
            return (
                f"It does not fit: over {self.devices} a worker needs {_size(made.peak)} of {memory}; "
                f"{advice}."
            )
        idle = self.machine.count - made.replicas * len(made.shards)
        return (
            f"It fits: {len(made.shards)} shard{'s' * (len(made.shards) > 1)} x {_copies(made)} on "
            f"{self.devices}, {_size(made.peak)} of {memory} on the fullest"
            f"{f'; {idle} idle' if idle else ''}."
        )

    def record(self) -> dict[str, Any]:
        """Return everything by name, as JSON can hold it."""
        sizes, made = self.sizes, self.plan
        return {
            "model": self.model, "parameters": sizes.size, "prunable": sum(x.size for x in sizes.layers),
            "layers": len(sizes.layers), "blocks": len(sizes.weights), "dtype": self.machine.dtype,
            "inputs": sizes.inputs[0], "kept_as_tokens": sizes.inputs[1], "fits": made.fits,
            "verdict": self.verdict, "ways_to_fit": list(self.ways_to_fit),
            "shards": [[b.start, b.stop] for b in made.shards], "replicas": made.replicas,
            "worker_bytes": {**made.memory, "total": made.peak}, "memory_bytes": self.machine.memory,
            "calibration_bytes": made.calibration, "seconds_per_candidate": made.seconds,
            "seconds_of_the_slowest_shard": made.pace, "rates": vars(self.rates), "budget": self.budget,
            "hours": self.hours,
        }  # fmt: skip

    def __str__(self) -> str:
        sizes, made = self.sizes, self.plan
        inputs, as_tokens = sizes.inputs
        lines = [
            f"{self.model}: {sizes.size:,} parameters, {sum(x.size for x in sizes.layers):,} of them "
            f"prunable in {len(sizes.layers)} linear layers of {len(sizes.weights)} blocks, "
            f"{self.machine.dtype}",
            self.verdict,
        ]
        if len(made.shards) > 1:
            lines.append("blocks: " + ", ".join(f"{b.start}-{b.stop - 1}" for b in made.shards))
        lines += ["", "memory of the fullest worker"]
        lines += [f"  {name:20} {_size(count):>12}" for name, count in made.memory.items()]
        lines += [f"  {'in all':20} {_size(made.peak):>12}"]
        lines += [f"calibration on disk    {_size(made.calibration):>12}"]
        if as_tokens:
            lines.append(
                f"  {as_tokens} of {inputs} inputs are kept as tokens, which are fewer than their columns"
            )
        lines += ["", f"seconds per candidate (rates: {self.rates.source})"]
        lines += [f"  {stage:20} {seconds:12.3f}" for stage, seconds in made.seconds.items()]
        lines += ["", f"{self.budget} candidates on {_copies(made)}, at the default shares that go on"]
        lines += [f"  a search of {space:8} {value:12.2f} hours" for space, value in self.hours.items()]
        return "\n".join(lines)


def plan(
    model: str,
    *,
    gpus: int = 1,
    gpu: str = "h100",
    gpu_memory: str | None = None,
    budget: int = defaults.BUDGET,
    tokens: int = defaults.TOKENS,
    selection_tokens: int = defaults.SELECTION_TOKENS,
    holdout_tokens: int = defaults.HOLDOUT_TOKENS,
    sequence_length: int = defaults.SEQUENCE_LENGTH,
    gradients: bool = True,
    dtype: str = "float32",
    threads: int = defaults.THREADS,
    trust_remote_code: bool = False,
) -> SearchPlan:
    """Say what a search would need of memory and time, from the model's configuration alone.

    Args:
        model: Hub name, folder, ``config.json`` or ``.gguf`` file; no weights are read.
        gpus: GPUs; 0 plans for this machine's CPU, and measures it.
        gpu: A name of ``GPUS``.
        gpu_memory: Memory of each, such as ``40GiB``; what its kind has if left out.
        budget: Candidates of the search.
        tokens: Tokens of statistics.
        selection_tokens: Tokens that candidates are measured on.
        holdout_tokens: Tokens for final figures only.
        sequence_length: Tokens per sequence.
        gradients: Whether the leaf ``G`` is computed.
        dtype: ``float32`` or ``bfloat16``.
        threads: CPU threads; 0 uses all cores.
        trust_remote_code: Allow code that comes with the model.

    Raises:
        SecateurError: For options that cannot be used, or a model whose configuration cannot be read.
    """
    check_count("GPUs of at least 0", gpus, 0, _MOST_GPUS)
    check_count("threads of at least 0", threads, 0, MOST_THREADS)
    check_count("a budget of at least 1 candidate", budget, 1, _MOST_CANDIDATES)
    given = None if gpu_memory is None else _bytes(gpu_memory)
    check_dtype(dtype)
    request = CalibrationRequest(
        model, "self", tokens, selection_tokens, holdout_tokens, sequence_length, gradients=gradients
    )
    statistics, selection, holdout = (n * sequence_length for n in request.sequences().values())
    counts = Tokens(statistics, selection, holdout, sequence_length)
    if gpus:
        rates = rates_of(gpu, dtype)
        machine = Machine("cuda", gpus, given or GPUS[gpu][3] << 30, 1, dtype)

    def observe(statistics: int = counts.statistics, gradients: bool = gradients) -> Outline:
        return outline(
            model, tokens=statistics, length=sequence_length, gradients=gradients,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip

    found = observe()
    if not gpus:
        cores = threads or len(os.sched_getaffinity(0))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        machine = Machine("cpu", 1, memory, cores, dtype)
        rates = measure_rates(found.layers, choose_device("cpu"), dtype, threads)
    elif gpu in re.split("[^a-z0-9]+", accelerator().lower()):
        rates = measure_rates(found.layers, choose_device("cuda"), dtype)
    made = make_plan(found, machine, counts, rates)
    ways = [] if made.fits else ways_to_fit(found, machine, counts, rates, observe)
    devices = f"{gpus} {gpu}" if gpus else f"this CPU ({machine.threads} threads)"
    return SearchPlan(model, found, machine, made, rates, budget, tuple(ways), devices)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    count = float(found[1]) if found else 0.0
    unit = found[2].upper() if found else ""
    if not found or unit not in _UNITS or not 0 < count * _UNITS[unit] <= _MOST_BYTES:
        raise SecateurError(f"expected a size of memory such as 80GiB, got {shown(text)}")
    if not found[2]:
        raise SecateurError(
            f"expected a size of memory with its unit, such as {found[1]}GiB, got {shown(text)}"
        )
    return int(count * _UNITS[unit])


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _copies(made: Plan) -> str:
    return f"{made.replicas} cop{'ies' if made.replicas > 1 else 'y'}"
