"""The command line. Each command is a thin function; heavy libraries are imported when it runs."""

from __future__ import annotations

import os
import platform
import signal
import sys
import traceback
from typing import Annotated, NoReturn

import typer

# Importing the modules adds their commands; help lists them in this order.
from .. import __version__
from ..metrics_dsl.errors import SecateurError

from . import plan, search, results, report, prune, export, jobs  # isort: skip
from .options import app

__all__ = [
    "app",
    "export",
    "jobs",
    "main",
    "plan",
    "prune",
    "report",
    "results",
    "search",
]


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _reason(error: Exception) -> str:
    import sqlite3

    from ..search.core.files import named

    if isinstance(error, OSError) and error.filename and error.strerror:
        place = named(str(error.filename))
        return f"cannot use {place}: {error.strerror.lower()}; choose another place or make room"
    if isinstance(error, OSError) and error.strerror:
        return f"the disk cannot be used: {error.strerror.lower()}; choose another place or make room"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, sqlite3.Error):
        return f"the archive cannot be used: {text}; what it holds is safe, make room and resume the run"
    return text


def main() -> NoReturn:
    """Run the command line.

    A user's mistake is one line on standard error and exit code 2; anything else that goes wrong is a bug,
    shown as one, and exit code 1.
    """
    import sqlite3

    from typer.exceptions import TyperException

    # Both end a run in the same orderly way, within seconds. Not by raising the one from the other: a job
    # of a Ray cluster is born with SIGINT blocked, and would never hear of it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries do not belong between our lines
    try:
        code = app(standalone_mode=False)
    except TyperException as error:  # options that typer itself refuses
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message(), err=True)
            sys.exit(2)
        typer.echo(f"secateur: {error.format_message().rstrip('.')}; see --help", err=True)
        sys.exit(2)
    except (SecateurError, OSError, sqlite3.Error) as error:
        if os.environ.get("SECATEUR_TRACEBACK"):
            raise
        typer.echo(f"secateur: {_reason(error)}", err=True)
        sys.exit(2)
    except Exception as error:
        # By name, for the libraries that they come from are not imported here.
        advice = {
            "OutOfMemoryError": "the device ran out of memory; use --dtype bfloat16, shorter sequences or "
            "--device cpu",
            "SafetensorError": f"a file cannot be written or read ({_reason(error)}); choose another "
            "place or make room",
        }.get(type(error).__name__)
        if advice is None:
            traceback.print_exc()
            typer.echo(
                f"secateur: this is a bug, not a mistake of yours: please report it with the lines above and "
                f"the command (secateur {__version__}, Python {platform.python_version()})",
                err=True,
            )
            sys.exit(1)
        if os.environ.get("SECATEUR_TRACEBACK"):
            raise
        typer.echo(f"secateur: {advice}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("secateur: interrupted", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
