"""Commands that read runs: fronts, comparisons, the language."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from .options import JSON, RUN, app, print_comparison, print_json, print_report


@app.command(epilog="Example: secateur front runs/a --objectives kl,size")
def front(
    run: Annotated[Path, RUN],
    objectives: Annotated[
        str | None, typer.Option(help="What to minimise; the run's own if left out.")
    ] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print a run's front and baselines, also while it runs."""
    from ..results.archive.archive import Archive

    names = [name.strip() for name in objectives.split(",")] if objectives else None
    with Archive(run) as archive:
        print_report(archive, names, as_json)


@app.command(epilog="Example: secateur watch runs/a")
def watch(
    run: Annotated[Path, RUN],
    once: Annotated[bool, typer.Option("--once", help="Print how it stands and end.")] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Watch a run, from any machine that sees its folder, until it ends; off a terminal, how it stands."""
    from rich.console import Console

    from ..results.terminal.watch import Watch
    from ..results.terminal.watch_text import follow, plain, record

    console = Console()
    seen = Watch(run)
    if as_json:
        print_json(record(seen.look()))
    elif once or not console.is_terminal:
        typer.echo(plain(seen.look()))
    else:
        with contextlib.suppress(KeyboardInterrupt):  # the run goes on
            follow(seen, console)


@app.command(epilog="Example: secateur snapshot runs/a --out a.parquet")
def snapshot(
    run: Annotated[Path, RUN],
    out: Annotated[Path, typer.Option("--out", "-o", help="The Parquet file to write.", show_default=False)],
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write a run's candidates as one Parquet file, also while it runs."""
    from ..results.archive.archive import Archive
    from ..results.archive.snapshot import snapshot as write

    with Archive(run) as archive:
        path = write(archive, out)
    if as_json:
        print_json({"snapshot": str(path), "bytes": path.stat().st_size})
    else:
        typer.echo(f"{path}: {path.stat().st_size:,} bytes")


@app.command("compare", epilog="Example: secateur compare runs/gp runs/tpe")
def compare_runs(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of seeds.", show_default=False)],
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Compare runs on one calibration: what they found, for what cost."""
    from ..results.summary.compare import open_runs

    print_comparison(open_runs(runs), as_json)


@app.command(epilog="Example: secateur metrics --language")
def metrics(
    language: Annotated[bool, typer.Option("--language", help="Print leaves and operators instead.")] = False,
    allocations: Annotated[
        bool, typer.Option("--allocations", help="Print the published allocations instead.")
    ] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print the published metrics, or the language they are written in."""
    from ..metrics_dsl.operators import LEAVES, OPERATORS
    from ..metrics_dsl.published import PUBLISHED

    if allocations:
        from ..search.spaces.allocation import ALLOCATIONS

        rows = [{"name": a.name, "meaning": a.meaning, "source": a.source} for a in ALLOCATIONS.values()]
    elif language:
        rows = [{"name": leaf.name, "shape": str(leaf.shape), "meaning": f"{leaf.meaning} [{leaf.unit}]"}
                for leaf in LEAVES.values()]  # fmt: skip
        rows += [{"name": o.name, "shape": o.symbol, "meaning": o.meaning} for o in OPERATORS.values()]
    else:
        rows = [{"name": p.name, "metric": p.text, "group": p.group,
                 "source": f"{p.source} ({p.note})" if p.note else p.source}
                for p in PUBLISHED.values()]  # fmt: skip
    if as_json:
        print_json(rows)
        return
    widths = [max(len(row[column]) for row in rows) for column in rows[0]]
    for row in rows:
        typer.echo("  ".join(f"{v:{w}}" for v, w in zip(row.values(), widths, strict=True)).rstrip())
