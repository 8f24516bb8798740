"""Commands that draw runs: the report and single pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import FORCE, JSON, PLUGINS, RUN, command, next_step, print_json, rule_of
from .sections import LOOK, USUAL
from .terminal import show


@command(LOOK, example="secateur report runs/a -o a.html")
def report(
    run: Annotated[Path, RUN],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="The HTML file to write; an older one is replaced.",
            rich_help_panel=USUAL,
        ),
    ] = Path("report.html"),
    force: Annotated[bool, FORCE] = False,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write a run's report: one HTML file that opens offline."""
    from ..service.reporting import report as write

    written = write(run, out, force=force)
    size = written.stat().st_size
    if as_json:
        print_json({"run": str(run), "report": str(written), "bytes": size})
        return
    show(f"{written}: {size / 1000:.0f} kB, opens offline")
    next_step("export", run, rule_of(run), "--to", "json", "-o", "best.json")


@command(LOOK, example="secateur plot runs/a --kind front -o front.svg")
def plot(
    run: Annotated[Path, RUN],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="The .svg, .png or .pdf file to write; an older one is replaced.",
            show_default=False,
            rich_help_panel=USUAL,
        ),
    ],
    kind: Annotated[str, typer.Option(help="front, history or ratios.", rich_help_panel=USUAL)] = "front",
    force: Annotated[bool, FORCE] = False,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Draw one picture of a run, for a paper or slides."""
    from ..service.reporting import plot as write

    written = write(run, out, kind, force=force)
    if as_json:
        print_json({"run": str(run), "kind": kind, "plot": str(written), "bytes": written.stat().st_size})
        return
    show(str(written))
    next_step("report", run, "-o", "report.html")
