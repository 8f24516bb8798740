"""Commands that carry results elsewhere and bring others' in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    CODE,
    DEVICE,
    DTYPE,
    FORCE,
    GROUP,
    JSON,
    MODEL,
    PLUGINS,
    RUN,
    THREADS,
    command,
    how_to_prune,
    next_step,
    print_json,
)
from .sections import PREPARE, SEARCHED, TAKE_AWAY, USUAL
from .terminal import show

_OUT = typer.Option(
    "--out",
    "-o",
    help="The file or folder to write; it must not exist.",
    show_default=False,
    rich_help_panel=USUAL,
)


@command(TAKE_AWAY, example="secateur export runs/a best --to python -o metric.py")
def export(
    run: Annotated[Path, RUN],
    out: Annotated[Path, _OUT],
    to: Annotated[
        str,
        typer.Option(
            help="A candidate: text, json, python, sympy, latex, pruner-zero, llm-compressor, evopress or "
            "masks. A run: csv or optuna.",
            show_default=False,
            rich_help_panel=USUAL,
        ),
    ],
    key: Annotated[
        str,
        typer.Argument(
            help="The candidate's key, its beginning, its published name, or best.", show_default=False
        ),
    ] = "",
    model: Annotated[str | None, MODEL] = None,
    device: Annotated[str | None, DEVICE] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    threads: Annotated[int | None, THREADS] = None,
    force: Annotated[bool, FORCE] = False,
    trust_remote_code: Annotated[bool, CODE] = False,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write a candidate, or a whole run, for other tools.

    The model is loaded for masks alone, as the run had it where no option says otherwise.
    """
    from ..results.export.exporters import EXPORTERS
    from ..service.exchange import export as write

    write(
        run, key, to=to, out=out, model=model, device=device, dtype=dtype, threads=threads, force=force,
        trust_remote_code=trust_remote_code or None,
    )  # fmt: skip
    if as_json:
        print_json({"run": str(run), "key": key, "to": to, "out": str(out)})
        return
    show(f"{out}: {EXPORTERS[to].meaning}")
    if key:
        next_step("prune", *how_to_prune(run), "--candidate", f"{run}:{key}")
    else:
        next_step("report", run, "-o", "report.html")


@command(PREPARE, "import", example="secateur import best_tree.json")
def import_file(
    file: Annotated[
        Path, typer.Argument(help="A tree of Pruner-Zero, or levels of EvoPress.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The candidate to write as JSON; a tree without is printed.",
            rich_help_panel=USUAL,
        ),
    ] = None,
    layers: Annotated[
        Path | None,
        typer.Option(
            help="The run or calibration folder of the model whose layers these are.", rich_help_panel=USUAL
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="The metric that goes with levels; wanda if left out.", rich_help_panel=SEARCHED),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="The ratio of all layers for a tree, of level 0 for levels.", rich_help_panel=SEARCHED
        ),
    ] = None,
    weights_diff: Annotated[
        float | None,
        typer.Option(
            help="Weights that a level removes more; 1,000,000 if left out.", rich_help_panel=SEARCHED
        ),
    ] = None,
    group: Annotated[str, GROUP] = "row",
    force: Annotated[bool, FORCE] = False,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Read a metric, or ratios, that another search found."""
    from ..metrics_dsl.expression import Expression
    from ..results.export.candidate_json import to_json
    from ..service.exchange import import_rule

    found = import_rule(
        file,
        out,
        layers=layers,
        metric=metric,
        sparsity=sparsity,
        weights_diff=weights_diff,
        group=group,
        force=force,
    )
    if isinstance(found, Expression):
        if as_json:
            print_json({"metric": str(found)})
            return
        show(str(found))
        next_step("measure", "CALIBRATION", found)
        return
    if as_json:
        print_json(to_json(found))
        return
    show(f"{out}: `{found.candidate.metric}`, {found.sparsity:.2%} of {len(found.layers)} layers' weights")
    next_step("prune", "MODEL", "--candidate", out, "-o", "pruned")
