"""What is seen of a run as text: once, on a terminal again and again, or for other programs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..summary.overview import Overview
from ..summary.printable import printable
from ..summary.table import columns_for, table, verdict
from .progress import duration
from .watch import Look, Watch, budget_of

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

SILENCE = 180.0  # seconds without a measurement from which on there is "no news"
PAUSE = 2.0  # seconds between looks
_PROSE = "verdict"  # the heading of what may be broken into lines
_MOST_ROWS = 12  # of a front, and of failures half as many


def follow(watch: Watch, console: Console, pause: float = PAUSE) -> Look:
    """Show a run on a terminal until it is over, every ``pause`` seconds; return the last look.

    Raises:
        KeyboardInterrupt: When who looks has seen enough.
    """
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            look = watch.look()
            live.update(_rendered(look), refresh=True)
            if look.is_over:
                return look
            # Of a large archive reading takes a second; looking should not keep the machine busy.
            time.sleep(max(pause, 10 * (time.monotonic() - began)))


def plain(look: Look) -> str:
    """Return a look as text."""
    return "\n\n".join(f"{heading}\n{text}" for heading, text in sections(look))


def record(look: Look) -> dict[str, Any]:
    """Return a look as what JSON can hold, without its front, which `secateur front --json` prints."""
    overview = look.overview
    budget, spent = budget_of(overview) if overview else (None, 0.0)
    return {
        "run": str(look.folder),
        "state": look.state,
        "spent": spent,
        "budget": budget.amount if budget else None,
        "unit": budget.unit if budget else "candidates",
        "silence": look.silence,
        "objectives": overview.objectives if overview else [],
        **{n: _short(row, look) for n, row in zip(("best", "published"), look.best, strict=True)},
        "workers": [] if look.workers is None else look.workers.to_dict("records"),
        "funnel": overview.funnel().to_dict("index") if overview else {},
        "failures": overview.failures().to_dict() if overview else {},
    }


def _short(row: Any, look: Look) -> dict[str, Any] | None:
    if row is None or look.overview is None:
        return None
    names = ("key", "metric", *look.overview.objectives)
    return {name: row[name].item() if hasattr(row[name], "item") else row[name] for name in names}


def _rendered(look: Look) -> Any:
    """Return a look as what rich shows; lines that are too long for the terminal are cut."""
    from rich.console import Group
    from rich.text import Text

    parts = []
    for heading, text in ((h, printable(t)) for h, t in sections(look)):
        is_table = heading != _PROSE
        parts += [
            Text(printable(heading), style="bold", no_wrap=True, overflow="ellipsis"),
            Text(f"{text}\n", no_wrap=is_table, overflow="ellipsis" if is_table else "fold"),
        ]
    return Group(*parts)


def sections(look: Look) -> Iterator[tuple[str, str]]:
    """Yield what there is to say of a look: headings and lines of text."""
    yield f"{look.folder}{f', {look.of_seeds}' if look.of_seeds else ''}", _headline(look)
    overview = look.overview
    if overview is None or look.workers is None or look.workers.empty:
        return
    if look.state == "left":
        yield "continue", f"secateur resume {look.folder}"
    yield "workers", _of_workers(look.workers, look)
    if overview.rows.empty:
        return
    yield _of_best(look, overview)
    front = overview.front
    columns = {
        "key": ("key", "{:.8}"),
        **{name: columns_for(overview.objectives)[name] for name in overview.objectives},
        **{name: columns_for([])[name] for name in ("kl_holdout", "baseline", "metric")},
    }
    more = f"\nand {len(front) - _MOST_ROWS} more" if len(front) > _MOST_ROWS else ""
    yield f"front ({', '.join(overview.objectives)})", table(front[:_MOST_ROWS], columns) + more
    funnel = overview.funnel().reset_index()
    yield (
        f"funnel  {overview.counts}",
        table(funnel, {"stage": ("stage", "{}"), **{s: (s, "{:d}") for s in funnel.columns[1:]}}),
    )
    failures = overview.failures()
    if len(failures):
        most = failures[: _MOST_ROWS // 2]
        yield "failures", "\n".join(f"{count:5d}  {reason}" for reason, count in most.items())
    if repeated := int(look.workers["repeated"].sum()):
        yield "attempts", f"{repeated} measurements were begun again, most for a worker was lost"


def _headline(look: Look) -> str:
    state = {
        "beginning": "beginning", "running": "running", "holdout": "measuring on holdout tokens",
        "left": "left by the process that wrote it",
        "ended": "ended",
    }[look.state]  # fmt: skip
    if look.overview is None:
        return state if look.state == "running" else f"{state}  nothing measured yet"
    budget, spent = budget_of(look.overview)
    of_budget = f" of {budget.amount:,.0f} {budget.unit}" if budget else " candidates"
    parts = [state, f"{spent:,.0f}{of_budget}"]
    if look.rate is not None and not look.is_over:
        parts.append(f"{look.rate:.3g} measurements/s")
    if look.silence is None:
        parts.append("nothing measured yet")
    elif not look.is_over:
        ago = duration(look.silence)
        parts.append(f"no news for {ago}" if look.silence > SILENCE else f"last measurement {ago} ago")
    return "  ".join(parts)


def _of_best(look: Look, overview: Overview) -> tuple[str, str]:
    if overview.is_interval or look.state == "ended":
        return _PROSE, verdict(overview.rows, overview.front, overview.holdout)
    first, (new, published) = overview.objectives[0], look.best
    name = first.replace("_", " ")
    lines = []
    if new is not None:
        is_compared = published is not None and published[first]
        change = f"{new[first] / published[first] - 1:+.1%}" if is_compared else "found"
        lines.append(f"{name} {new[first]:.4f}  {change:9}  {new['metric']}")
    if published is not None:
        lines.append(f"{name} {published[first]:.4f}  published  {published['baseline']}")
    return "best", "\n".join(lines) or "nothing measured to the end"


def _of_workers(workers: pd.DataFrame, look: Look) -> str:
    rows = workers.assign(each=workers["seconds"] / workers["measurements"])
    columns = {"worker": ("worker", "{}"), "measurements": ("measurements", "{:d}")}
    if look.lately and not look.is_over:
        columns["lately"] = (f"last {duration(look.lately)}", "{:d}")
    columns |= {"seconds": ("seconds", "{:,.1f}"), "each": ("each", "{:.2f}")}
    return table(rows, columns)
