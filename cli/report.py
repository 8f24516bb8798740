"""Commands that draw runs: the report and single pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import JSON, RUN, app, print_json


@app.command(epilog="Example: secateur report runs/a -o a.html")
def report(
    run: Annotated[Path, RUN],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The HTML file to write; an older one is replaced.")
    ] = Path("report.html"),
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write a run's report: one HTML file that opens offline, also while the run goes on."""
    from ..results.archive.archive import Archive
    from ..results.report.report import write_report

    with Archive(run) as archive:
        written = write_report(archive, out)
    size = written.stat().st_size
    if as_json:
        print_json({"run": str(run), "report": str(written), "bytes": size})
    else:
        typer.echo(f"{written}: {size / 1000:.0f} kB, opens offline")


@app.command(epilog="Example: secateur plot runs/a --kind front -o front.svg")
def plot(
    run: Annotated[Path, RUN],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The .svg, .png or .pdf file to write.", show_default=False),
    ],
    kind: Annotated[str, typer.Option(help="front, history or ratios.")] = "front",
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Draw one picture of a run for a paper or slides."""
    from ..results.archive.archive import Archive
    from ..results.report.plot import write_plot

    with Archive(run) as archive:
        written = write_plot(archive, kind, out)
    if as_json:
        print_json({"run": str(run), "kind": kind, "plot": str(written), "bytes": written.stat().st_size})
    else:
        typer.echo(str(written))
