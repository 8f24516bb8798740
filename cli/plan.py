"""The command that plans: memory and time of a search, before anything is downloaded."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Annotated

import typer

from ..metrics_dsl.errors import SecateurError
from ..search.core import defaults
from .options import DTYPE, JSON, THREADS, app, print_json

if TYPE_CHECKING:
    from ..workers.plan.model_sizes import Outline

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in _UNITS or found[1].count(".") > 1 or not float(found[1]):
        raise SecateurError(f"expected a size of memory such as 80GiB, got {text!r}")
    if not found[2]:
        raise SecateurError(f"expected a size of memory with its unit, such as {found[1]}GiB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


@app.command(
    epilog="Example: secateur plan meta-llama/Llama-3.1-8B --gpus 8 --gpu-memory 80GiB --budget 2000"
)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub name, folder, config.json or .gguf file; no weights are read.", show_default=False
        ),
    ],
    gpus: Annotated[int, typer.Option(help="GPUs; 0 plans for this machine's CPU.")] = 1,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, l4, l40s or rtx4090.")] = "h100",
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of each, such as 40GiB; what its kind has if left out.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Candidates of the search.")] = defaults.BUDGET,
    tokens: Annotated[int, typer.Option(help="Tokens of statistics.")] = defaults.TOKENS,
    selection_tokens: Annotated[
        int, typer.Option(help="Tokens that candidates are measured on.")
    ] = defaults.SELECTION_TOKENS,
    holdout_tokens: Annotated[
        int, typer.Option(help="Tokens for final figures only.")
    ] = defaults.HOLDOUT_TOKENS,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sequence.")] = defaults.SEQUENCE_LENGTH,
    gradients: Annotated[bool, typer.Option(help="Compute the leaf G (a backward pass).")] = True,
    dtype: Annotated[str, DTYPE] = "float32",
    threads: Annotated[int, THREADS] = defaults.THREADS,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Say what a search would need of memory and time, from the model's configuration alone."""
    if gpus < 0 or budget < 1 or threads < 0:
        raise SecateurError(
            f"expected GPUs and threads of at least 0 and a budget of at least 1, got {gpus}, {threads} "
            f"and {budget}"
        )
    given = None if gpu_memory is None else _bytes(gpu_memory)
    from ..workers.calibrate.calibration import CalibrationRequest
    from ..workers.model.load import accelerator, choose_device, choose_dtype
    from ..workers.plan.model_sizes import outline
    from ..workers.plan.plan import Machine, Tokens, make_plan, ways_to_fit
    from ..workers.plan.rates import GPUS, measure_rates, rates_of

    choose_dtype(dtype)
    request = CalibrationRequest(
        model, "self", tokens, selection_tokens, holdout_tokens, sequence_length, gradients=gradients
    )
    statistics, selection, holdout = (n * sequence_length for n in request.sequences().values())
    counts = Tokens(statistics, selection, holdout, sequence_length)
    if gpus:
        rates = rates_of(gpu, dtype)
        memory = given or GPUS[gpu][3] << 30

    def observe(statistics: int = counts.statistics, gradients: bool = gradients) -> Outline:
        return outline(model, tokens=statistics, length=sequence_length, gradients=gradients)

    found = observe()
    if gpus:
        machine = Machine("cuda", gpus, memory, 1, dtype)
        if gpu in re.split("[^a-z0-9]+", accelerator().lower()):
            rates = measure_rates(found.layers, choose_device("cuda"), dtype)
    else:
        cores = threads or len(os.sched_getaffinity(0))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        machine = Machine("cpu", 1, memory, cores, dtype)
        rates = measure_rates(found.layers, choose_device("cpu"), dtype, threads)
    made = make_plan(found, machine, counts, rates)
    ways = [] if made.fits else ways_to_fit(found, machine, counts, rates, observe)
    hours = {space: made.hours(budget, space) for space in ("metrics", "ratios")}
    devices = f"{gpus} {gpu}" if gpus else f"this CPU ({machine.threads} threads)"
    idle = machine.count - made.replicas * len(made.shards)
    if made.fits:
        verdict = (
            f"It fits: {len(made.shards)} shard{'s' * (len(made.shards) > 1)} x {made.replicas} "
            f"cop{'ies' if made.replicas > 1 else 'y'} on {devices}, {_size(made.peak)} of "
            f"{_size(memory)} on the fullest{f'; {idle} idle' if idle else ''}."
        )
    else:
        advice = f"any of these would: {', '.join(ways)}" if ways else "no single change of options would"
        verdict = (
            f"It does not fit: over {devices} a worker needs {_size(made.peak)} of {_size(memory)}; {advice}."
        )
    if as_json:
        print_json({
            "model": model, "parameters": found.size, "prunable": sum(x.size for x in found.layers),
            "layers": len(found.layers), "blocks": len(found.weights), "dtype": dtype,
            "inputs": found.inputs[0], "kept_as_tokens": found.inputs[1], "fits": made.fits,
            "verdict": verdict, "ways_to_fit": ways,
            "shards": [[b.start, b.stop] for b in made.shards], "replicas": made.replicas,
            "worker_bytes": {**made.memory, "total": made.peak}, "memory_bytes": memory,
            "calibration_bytes": made.calibration, "seconds_a_candidate": made.seconds,
            "seconds_of_the_slowest_shard": made.pace, "rates": vars(rates), "budget": budget, "hours": hours,
        })  # fmt: skip
        return
    inputs, as_tokens = found.inputs
    typer.echo(
        f"{model}: {found.size:,} parameters, {sum(x.size for x in found.layers):,} of them prunable in "
        f"{len(found.layers)} linear layers of {len(found.weights)} blocks, {dtype}"
    )
    typer.echo(verdict)
    if len(made.shards) > 1:
        typer.echo("blocks: " + ", ".join(f"{b.start}-{b.stop - 1}" for b in made.shards))
    typer.echo("\nmemory of the fullest worker")
    for name, count in made.memory.items():
        typer.echo(f"  {name:20} {_size(count):>12}")
    typer.echo(f"  {'in all':20} {_size(made.peak):>12}")
    typer.echo(f"calibration on disk    {_size(made.calibration):>12}")
    if as_tokens:
        typer.echo(f"  {as_tokens} of {inputs} inputs are kept as tokens, which are fewer than their columns")
    typer.echo(f"\nseconds a candidate (rates: {rates.source})")
    for stage, seconds in made.seconds.items():
        typer.echo(f"  {stage:20} {seconds:12.3f}")
    copies = f"{made.replicas} cop{'ies' if made.replicas > 1 else 'y'}"
    typer.echo(f"\n{budget} candidates on {copies}, at the default shares that go on")
    for space, value in hours.items():
        typer.echo(f"  a search of {space:8} {value:12.2f} hours")
