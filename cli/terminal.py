"""The terminal of a command: lines on it, streams that fail, signals that end it. Nothing is read from it.

It is imported before anything that takes time: a signal ends a command in order from its first moment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from ..metrics_dsl.errors import SecateurError
from ..metrics_dsl.printable import one_line, printable

HOLD = 5.0  # seconds that lines on progress wait: what is refused within them is one line
GRACE = 1.0  # seconds within which further signals belong to the first, such as a key held down
_RETRY = 0.05
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")


class OutputError(SecateurError):
    """A standard output that cannot be written."""


# Lines ---------------------------------------------------------------------------------------------


class _Held:
    """Lines on progress that wait until it is clear that a command is not refused."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._lines: list[str] | None = []  # None once they are told as they come

    def add(self, text: str) -> None:
        with self._lock:
            if self._lines is None:
                _write_error(text)
                return
            if not self._lines:
                timer = threading.Timer(HOLD, self.tell)
                timer.daemon = True
                timer.start()
            self._lines.append(text)

    def tell(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, None
            for line in lines or ():
                _write_error(line)

    def drop(self) -> None:
        with self._lock:
            self._lines = None


_held = _Held()


def show(text: str, end: str = "\n") -> None:
    """Print a result on standard output.

    Raises:
        OutputError: When it cannot be written.
        BrokenPipeError: When nobody reads it any more.
    """
    _held.tell()
    try:
        sys.stdout.write(printable(text) + end)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"expected room for what is printed, got none on standard output: {error.strerror}; send it "
            "elsewhere"
        ) from None


def say(text: str) -> None:
    """Print a line for people, on standard error."""
    _held.tell()
    _write_error(text)


def report_step(text: str) -> None:
    """Print a line on how a command goes, once it is clear that it is not refused."""
    _held.add(text)


def refuse(text: str) -> None:
    """Print the one line of a command that is refused."""
    _held.drop()
    _write_error(one_line(f"secateur: {text}"))


def interrupted(text: str) -> int:
    """Print what becomes of a command that a signal ended in order; return its exit code."""
    say(text)
    signals.is_told = True
    return 128 + signal.SIGINT


def _write_error(text: str) -> None:
    try:
        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()
    except OSError:  # nobody reads it any more: no reason to lose the work
        pass


# The beginning and the end -------------------------------------------------------------------------


def begin() -> None:
    """Make a process fit for a command: its streams, and what ends it."""
    global _held
    _held = _Held()
    signals.begin()
    for handle in (0, 1, 2):
        try:
            os.fstat(handle)
        except OSError:  # closed: a file that is opened must not become a standard stream
            os.open(os.devnull, os.O_RDWR)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # no question of a library is ever answered
    os.close(null)
    sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115 (it stays open)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def check_words(words: list[str]) -> None:
    """Check that the words of a command line are text, and that there is a folder to understand them in.

    Raises:
        SecateurError: When one has bytes that are none, or the folder: it could be written into no file. Or
            when the folder is gone, which libraries take badly.
    """
    try:
        here = os.getcwd()
    except OSError as error:
        raise SecateurError(
            f"expected a folder to work in, got one that is gone or cannot be entered "
            f"({(error.strerror or 'unreadable').lower()}); change into another"
        ) from None
    for word in (here, *words):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise SecateurError(
                f"expected a command line and paths in UTF-8, got '{one_line(word, 200)}'; rename it, or set "
                "PYTHONUTF8=1 where the locale is not UTF-8"
            ) from None


def finish() -> None:
    """Leave nothing to be written or interrupted while Python ends."""
    signals.finish()
    for stream, handle in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except (OSError, ValueError):  # what is left would be tried again, and told with a traceback
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, handle)
            os.close(null)


# Signals -------------------------------------------------------------------------------------------


class _Signals:
    """What ends a command: the first signal in order, one that comes a second later at once.

    In order means by KeyboardInterrupt, but never in the middle of an import, where libraries swallow it or
    are left half made.
    """

    def __init__(self) -> None:
        self.is_told = False  # that a command was ended
        self._number = 0  # of the first that came
        self._since = 0.0
        self._is_due = False

    @property
    def has_come(self) -> bool:
        """Whether a signal has come since the command began."""
        return bool(self._number)

    def begin(self) -> None:
        """Listen to the signals, but for SIGHUP where ``nohup`` has switched it off."""
        self.is_told, self._number, self._is_due = False, 0, False
        if threading.current_thread() is not threading.main_thread():
            return
        for name in _ENDING:
            number = getattr(signal, name)
            if name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        before = sys.unraisablehook

        def hook(what: Any) -> None:
            if issubclass(what.exc_type, KeyboardInterrupt):  # in a destructor, which cannot be ended
                self._is_due = True
                self._try_later()
            else:
                before(what)

        sys.unraisablehook = hook

    def finish(self) -> None:
        """End at once from now on, without a word."""
        self._is_due = False
        if threading.current_thread() is threading.main_thread():
            for name in _ENDING:
                if signal.getsignal(getattr(signal, name)) == self._on_signal:
                    signal.signal(getattr(signal, name), lambda number, _frame: os._exit(128 + number))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._number:
            self._number, self._since, self._is_due = number, now, True
        elif now - self._since >= GRACE:
            self._leave(number)
        self._end(frame)

    def _end(self, frame: FrameType | None) -> None:
        if not self._is_due:
            return
        if _is_importing(frame):
            self._try_later()
            return
        self._is_due = False
        raise KeyboardInterrupt

    def _try_later(self) -> None:
        signal.signal(signal.SIGALRM, lambda _number, frame: self._end(frame))
        signal.setitimer(signal.ITIMER_REAL, _RETRY)

    def _leave(self, number: int) -> NoReturn:
        os.write(2, b"secateur: ended at once\n")
        os._exit(128 + number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


signals = _Signals()
