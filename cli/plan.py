"""The command that plans: memory and time of a search, before anything is downloaded."""

from __future__ import annotations

from typing import Annotated

import typer

from ..search.core import defaults
from .options import CODE, DTYPE, JSON, SEQUENCE_LENGTH, THREADS, TOKENS, command, next_step, print_json
from .sections import HOW, MACHINE, PREPARE, USUAL
from .terminal import show


@command(PREPARE, example="secateur plan meta-llama/Llama-3.1-8B --gpus 8 --gpu-memory 80GiB --budget 2000")
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub name, folder, config.json or .gguf file; no weights are read.", show_default=False
        ),
    ],
    gpus: Annotated[
        int, typer.Option(help="GPUs; 0 plans for this machine's CPU.", rich_help_panel=MACHINE)
    ] = 1,
    gpu: Annotated[
        str, typer.Option(help="a100, h100, h200, l4, l40s or rtx4090.", rich_help_panel=MACHINE)
    ] = "h100",
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of each, such as 40GiB; what its kind has if left out.", rich_help_panel=MACHINE
        ),
    ] = None,
    budget: Annotated[
        int, typer.Option(help="Candidates of the search.", rich_help_panel=USUAL)
    ] = defaults.BUDGET,
    tokens: Annotated[int, TOKENS] = defaults.TOKENS,
    selection_tokens: Annotated[
        int, typer.Option(help="Tokens that candidates are measured on.", rich_help_panel=USUAL)
    ] = defaults.SELECTION_TOKENS,
    holdout_tokens: Annotated[
        int, typer.Option(help="Tokens for final figures only.", rich_help_panel=USUAL)
    ] = defaults.HOLDOUT_TOKENS,
    sequence_length: Annotated[int, SEQUENCE_LENGTH] = defaults.SEQUENCE_LENGTH,
    gradients: Annotated[
        bool, typer.Option(help="Compute the leaf G (a backward pass).", rich_help_panel=HOW)
    ] = True,
    dtype: Annotated[str, DTYPE] = "float32",
    threads: Annotated[int, THREADS] = defaults.THREADS,
    trust_remote_code: Annotated[bool, CODE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Say what memory and time a search would need.

    It reads the model's configuration alone: no weights are downloaded.
    """
    from ..service.plan_search import plan as make

    found = make(
        model, gpus=gpus, gpu=gpu, gpu_memory=gpu_memory, budget=budget, tokens=tokens,
        selection_tokens=selection_tokens, holdout_tokens=holdout_tokens, sequence_length=sequence_length,
        gradients=gradients, dtype=dtype, threads=threads, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        print_json(found.record())
        return
    show(str(found))
    next_step("calibrate", model, "--text", "FILE", "--out", "cal")
