"""Commands that make pruned models and look at what they are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..metrics_dsl.errors import SecateurError
from ..search.core import defaults
from ..search.core.coverage import Coverage
from ..search.core.reading import Given
from .options import (
    CODE,
    CONFIG,
    DEVICE,
    DTYPE,
    JSON,
    PLUGINS,
    SEED,
    SEQUENCE_LENGTH,
    TEXT,
    TOKENS,
    command,
    next_step,
    print_json,
)  # fmt: skip
from .sections import LOOK, MACHINE, SEARCHED, TAKE_AWAY, USUAL
from .terminal import report_step, show


@command(
    TAKE_AWAY,
    example="secateur prune HuggingFaceTB/SmolLM2-135M --candidate wanda --sparsity 0.6 --out pruned",
)
def prune(
    model: Annotated[str, typer.Argument(help="Hub name, folder or .gguf file.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The folder to write.", show_default=False, rich_help_panel=USUAL),
    ],
    candidate: Annotated[
        str,
        typer.Option(help="A metric, a published one's name, FILE.json or RUN:KEY.", rich_help_panel=USUAL),
    ] = "wanda",
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Fraction of weights to remove, in [0, 1): takes the candidate's metric alone. Its own "
            f"ratios, or {defaults.SPARSITY:g}, if left out.",
            rich_help_panel=USUAL,
        ),
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            help="How the ratios differ: a published allocation or FILE.json; the candidate's own, or "
            "uniform, if left out.",
            rich_help_panel=USUAL,
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            help="The weights that compete, row or layer; row if nothing says it.", rich_help_panel=SEARCHED
        ),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M (N removed of M), such as 2:4.", rich_help_panel=SEARCHED)
    ] = None,
    text: Annotated[str | None, TEXT] = None,
    tokens: Annotated[int | None, TOKENS] = None,
    sequence_length: Annotated[int | None, SEQUENCE_LENGTH] = None,
    statistics: Annotated[
        str,
        typer.Option(
            help="one-shot (of the dense model) or sequential (behind pruned blocks).", rich_help_panel=USUAL
        ),
    ] = "one-shot",
    repair: Annotated[
        str,
        typer.Option(
            help="Make up for what is removed: none, obs (SparseGPT's update), bias or scale.",
            rich_help_panel=USUAL,
        ),
    ] = "none",
    seed: Annotated[int | None, SEED] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32 or bfloat16, to compute in and to write; 32 bits and the files' own if left out.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    device: Annotated[str, DEVICE] = "auto",
    trust_remote_code: Annotated[bool, CODE] = False,
    config: Annotated[Path | None, CONFIG] = None,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Prune a model into a folder that transformers loads.

    Text, tokens, sequence length and seed that are left out are those that a candidate's run was calibrated
    with, or calibrate's own for a candidate of no run.
    """
    from ..service.prune_model import prune as run

    found = run(
        model, out, report_step, candidate=candidate, sparsity=sparsity, ratios=ratios, group=group,
        pattern=pattern, text=text, tokens=tokens, sequence_length=sequence_length, statistics=statistics,
        repair=repair, seed=seed, dtype=dtype, device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        print_json({"folder": str(out), **found})
        return
    _print_pruned(out, found)
    read = found["text"]["source"]
    next_step("evaluate", out, "--text", "FILE" if read == "self" else read, "--against", model)


def _print_pruned(out: Path, found: dict[str, Any]) -> None:
    layers = found["layers"]
    covered = Coverage.read(Given(found["model"], str(out), SecateurError))
    error, of_mask = (
        sum(layer[name] for layer in layers) / len(layers)
        for name in ("output_error", "output_error_of_mask")
    )
    before = "" if found["repair"] == "none" else f"; {of_mask:.4f} without the repair {found['repair']}"
    show(f"{out}: {found['metric']}, group {found['group']}, pattern {found['pattern']}")
    show(
        f"  zeros {found['sparsity']:.2%} of {found['prunable_weights']:,} weights in {len(layers)} linear "
        f"layers; the model was {found['model']['weights']}"
    )
    if covered is not None:
        show(f"  {found['sparsity']:.2%} of {covered.in_words}")
    show(f"  relative squared error of the layers' outputs, mean: {error:.4f}{before}")
    if "biases_shifted" in found:
        shifted = found["biases_shifted"]
        show(
            f"  biases shifted in {shifted} of {len(layers)} layers"
            + ("" if shifted else ": the model's layers have none, the repair changed nothing")
        )
    show(
        f"  {found['dense_bytes']:,} bytes on disk, zeros included; in theory "
        f"{found['theoretical_packed_bytes']:,} (bitmask and kept values; no such file is written)"
    )
    show("  transformers and vLLM load it as a dense model: no faster without a sparse runtime")
    show("  errors of layers do not tell what the model has become: evaluate it")


@command(LOOK, example="secateur evaluate pruned --text wiki.txt --against HuggingFaceTB/SmolLM2-135M")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, hub name or .gguf file.", show_default=False)],
    text: Annotated[
        str | None,
        typer.Option(
            help="A file, hub:NAME or wikitext2; wikitext2 if neither text nor tasks are given.",
            rich_help_panel=USUAL,
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.", rich_help_panel=USUAL)] = defaults.WINDOW,
    windows: Annotated[
        int, typer.Option(help="Windows from the text's beginning; 0 for all.", rich_help_panel=USUAL)
    ] = 0,
    against: Annotated[
        str | None, typer.Option(help="The dense model, for KL.", rich_help_panel=USUAL)
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-eval, such as arc_easy,piqa.", rich_help_panel=USUAL)
    ] = "",
    dtype: Annotated[str, DTYPE] = "float32",
    device: Annotated[str, DEVICE] = "auto",
    trust_remote_code: Annotated[bool, CODE] = False,
    config: Annotated[Path | None, CONFIG] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print a model's perplexity, KL to the dense one, and tasks."""
    from ..service.prune_model import evaluate as run

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    source = text if text is not None else "" if names else "wikitext2"
    found = run(
        model, report_step, text=source, window=window, windows=windows, against=against, tasks=names,
        dtype=dtype, device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        print_json(found)
        return
    _print_figures(found)
    if against is None:
        next_step("evaluate", model, "--text", text or "wikitext2", "--against", "DENSE_MODEL")
    else:
        next_step("compare", "RUN", "ANOTHER_RUN")


def _print_figures(found: dict[str, Any]) -> None:
    show(found["model"])
    if "perplexity" in found:
        dense = f"; dense {found['dense_perplexity']:.4f}" if "kl" in found else ""
        show(f"  perplexity {found['perplexity']:.4f}{dense}")
        if "kl" in found:
            show(f"  kl {found['kl']:.6f} nats per token from {found['against']}")
        text = found["text"]
        bos = "once at the beginning" if text["bos"] else "not added"
        show(f"  on {text['source']}: {text['windows']} windows of {text['window']} of its "
                   f"{text['tokens_of_text']:,} tokens, documents {text['documents']}, BOS {bos}, sha256 "
                   f"{text['sha256']}")  # fmt: skip
    for task, values in found.get("tasks", {}).items():
        figures = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in values.items()
        )
        show(f"  {task}: {figures}")
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    show(f"  {found['dtype']} on {found['device']}; {versions}")
