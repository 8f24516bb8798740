"""All commands: importing their modules adds them to the application, in the order of its help."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__

from . import plan, search, results, report, prune, export, jobs  # isort: skip
from .options import app
from .terminal import show

__all__ = ["app", "export", "jobs", "plan", "prune", "report", "results", "search"]


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        show(__version__)
        raise typer.Exit
