"""Commands that read runs: fronts, comparisons, the language."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    FORCE,
    JSON,
    PLUGINS,
    RUN,
    command,
    next_step,
    print_comparison,
    print_json,
    print_run,
    rule_of,
)
from .sections import LOOK, TAKE_AWAY, USUAL
from .terminal import show


@command(LOOK, example="secateur front runs/a --objectives kl,size")
def front(
    run: Annotated[Path, RUN],
    objectives: Annotated[
        str | None,
        typer.Option(help="What to minimise; the run's own if left out.", rich_help_panel=USUAL),
    ] = None,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print a run's front and baselines, also while it runs."""
    from ..service.run import open_run

    names = [name.strip() for name in objectives.split(",")] if objectives else None
    print_run(open_run(run), names, as_json)
    if not as_json:
        next_step("export", run, rule_of(run), "--to", "json", "-o", "best.json")


@command(LOOK, example="secateur watch runs/a")
def watch(
    run: Annotated[Path, typer.Argument(help="A run folder, or a job's id.", show_default=False)],
    once: Annotated[
        bool, typer.Option("--once", help="Print how it stands and end.", rich_help_panel=USUAL)
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(help="The job server that knows a job that waits.", rich_help_panel=USUAL),
    ] = None,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Watch a run until it ends; off a terminal, how it stands.

    Any machine that sees its folder will do. A job that is pending is waited for.
    """
    from rich.console import Console

    from ..results.terminal.watch import Watch
    from ..results.terminal.watch_text import follow, plain, record
    from ..service.jobs import wait_for_run

    console = Console()
    is_live = not (once or as_json) and console.is_terminal
    folder, pending = wait_for_run(run, address, show if is_live else None)
    if pending is not None:
        if as_json:
            print_json({"run": str(folder), "state": pending.state, "job": pending.id})
        else:
            show(f"{folder}: {pending.state}, the job {pending.id} waits for its cluster")
        return
    seen = Watch(folder)
    if as_json:
        print_json(record(seen.look()))
        return
    if not is_live:
        show(plain(seen.look()))
    else:
        with contextlib.suppress(KeyboardInterrupt):  # the run goes on
            follow(seen, console)
    next_step("front", folder)


@command(TAKE_AWAY, example="secateur snapshot runs/a --out a.parquet")
def snapshot(
    run: Annotated[Path, RUN],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="The Parquet file to write; an older one is replaced.",
            show_default=False,
            rich_help_panel=USUAL,
        ),
    ],
    force: Annotated[bool, FORCE] = False,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write a run's candidates as one Parquet file."""
    from ..service.reporting import snapshot as write

    path = write(run, out, force=force)
    if as_json:
        print_json({"snapshot": str(path), "bytes": path.stat().st_size})
        return
    show(f"{path}: {path.stat().st_size:,} bytes; pandas.read_parquet reads it")
    next_step("report", run, "-o", "report.html")


@command(LOOK, "compare", example="secateur compare runs/gp runs/tpe")
def compare_runs(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of seeds.", show_default=False)],
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Compare runs: what they found, for what cost."""
    from ..results.archive.run_folder import RunFolder

    print_comparison(runs, as_json)
    if not as_json:
        next_step("front", RunFolder(runs[0]).runs()[0].path)


@command(LOOK, example="secateur metrics --language")
def metrics(
    language: Annotated[
        bool, typer.Option("--language", help="Print leaves and operators.", rich_help_panel=USUAL)
    ] = False,
    allocations: Annotated[
        bool, typer.Option("--allocations", help="Print the published allocations.", rich_help_panel=USUAL)
    ] = False,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print the published metrics, or the metric language."""
    from ..metrics_dsl.operators import LEAVES, OPERATORS
    from ..metrics_dsl.plugins import fill
    from ..metrics_dsl.published import PUBLISHED

    fill(LEAVES, OPERATORS, PUBLISHED)  # with what installed packages add
    if allocations:
        from ..search.spaces.allocation import ALLOCATIONS

        fill(ALLOCATIONS)
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
        show("  ".join(f"{v:{w}}" for v, w in zip(row.values(), widths, strict=True)).rstrip())
    next_step("measure", "CALIBRATION", "wanda", *(("--allocation", "owl") if allocations else ()))
