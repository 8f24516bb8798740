"""The command line. Each command is a thin function; heavy libraries are imported when it runs."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any, NoReturn

from ..metrics_dsl.errors import SecateurError
from . import terminal


def __getattr__(name: str) -> Any:
    """Return the application, whose commands are imported when it is asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .commands import app

    return app


def _reason(error: BaseException) -> str:
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
    shown as one, and exit code 1. A signal ends a command in order, with exit code 130.
    """
    try:
        terminal.begin()  # from here on a signal may come
        code = _run()
    except KeyboardInterrupt:
        code = terminal.interrupted("secateur: interrupted")
    terminal.finish()
    if terminal.signals.has_come:  # Python would end itself by the signal, where it came inside an exec()
        atexit._run_exitfuncs()
        os._exit(code)
    sys.exit(code)


def _run() -> int:
    """Run a command and return its exit code.

    Raises:
        KeyboardInterrupt: When a signal ended it before it had anything to say on that.
    """
    import sqlite3

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries do not belong between our lines
    try:
        terminal.check_words(sys.argv[1:])
        code = _command()
        if code == 130 and not terminal.signals.is_told:  # typer makes this of it, without a word
            raise KeyboardInterrupt
        return code
    except SystemExit as stop:  # what typer makes of it
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:  # whoever read has seen enough
        return 1
    except (SecateurError, OSError, sqlite3.Error) as error:
        if os.environ.get("SECATEUR_TRACEBACK"):
            raise
        terminal.refuse(_reason(error))
        return 2
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            terminal.say(error.format_message())  # type: ignore[attr-defined]
            return 2
        if hasattr(error, "format_message"):  # options that typer itself refuses
            terminal.refuse(f"{error.format_message().rstrip('.')}; see --help")
            return 2
        if (advice := _advice(error)) and not os.environ.get("SECATEUR_TRACEBACK"):
            terminal.refuse(advice)
            return 2
        if advice:
            raise
        _tell_bug(error)
        return 1


def _command() -> int:
    """Run the command that was typed, without what libraries have to say in passing."""
    import logging
    import warnings

    from ..search.core.scratch import sweep
    from .commands import app

    sweep()  # what killed commands have left
    with warnings.catch_warnings():
        if not (sys.warnoptions or os.environ.get("SECATEUR_TRACEBACK")):
            warnings.showwarning = lambda *_args, **_kwargs: None
            logging.lastResort = logging.NullHandler()
        code = app(standalone_mode=False)
    return code if isinstance(code, int) else 0


def _advice(error: Exception) -> str:
    """Return what to do about an error that is neither a mistake nor a bug; empty for a bug.

    By name, for the libraries that they come from are not imported here.
    """
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return "the device ran out of memory; use --dtype bfloat16, shorter sequences or --device cpu"
    if kind == "MemoryError" or "DefaultCPUAllocator: can't allocate" in str(error):
        return "this machine ran out of memory; use --dtype bfloat16, fewer tokens or shorter sequences"
    if kind == "SafetensorError":
        return f"a file cannot be written or read ({_reason(error)}); choose another place or make room"
    return ""


def _tell_bug(error: Exception) -> None:
    import platform
    import traceback

    from .. import __version__

    terminal.say("".join(traceback.format_exception(error)).rstrip())
    terminal.say(
        f"secateur: this is a bug, not a mistake of yours: please report it with the lines above and "
        f"the command (secateur {__version__}, Python {platform.python_version()})"
    )
