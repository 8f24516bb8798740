"""Requests by name: plain keyword arguments become a request, and help shows them all."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.parser import did_you_mean

# More is a slip of the finger: refused before memory is taken for it.
MOST_TOKENS = 100_000_000  # of a text
LONGEST_SEQUENCE = 1 << 24  # tokens
MOST_SEED = 2**63 - 1
MOST_THREADS = 1024
DTYPES = ("float32", "bfloat16")

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def request_of(kind: type[T], first: T | Any, options: dict[str, Any]) -> T:
    """Return the request that a first argument and options by name make; a request stays what it is.

    Args:
        kind: A dataclass.
        first: A request, or the value of the dataclass's first field.
        options: Values of the other fields.

    Raises:
        SecateurError: For an unknown option, or options beside a request.
    """
    if isinstance(first, kind):
        if options:
            raise SecateurError(
                f"expected a {kind.__name__} or options by name, got both ({', '.join(options)})"
            )
        return first
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in names[1:]:
            raise SecateurError(f"unknown option {name!r}{did_you_mean(name, names[1:])}")
    made: T = kind(**{names[0]: str(first)}, **options)
    return made


def check_count(
    expected: str, value: Any, least: int, most: int, error: type[SecateurError] = SecateurError
) -> None:
    """Check that an option is a whole number within bounds.

    Args:
        expected: What it should be, such as "at least 1 token of statistics".
        value: What came.
        least: The least that is one.
        most: The most that can be meant.
        error: What is raised.

    Raises:
        SecateurError: As ``error``.
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not (is_whole and least <= value <= most):
        is_large = is_whole and value > most
        raise error(f"expected {expected}{f' and at most {most:,}' if is_large else ''}, got {shown(value)}")


def check_device(name: Any, error: type[SecateurError] = SecateurError) -> None:
    """Check that a name is one of a device on which models are run; whether it is here is known later.

    Raises:
        SecateurError: As ``error``.
    """
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:[0-9]{1,4})?", name):
        raise error(f"expected the device auto, cpu, cuda, cuda:N, mps or xpu, got {shown(name)}")


def check_dtype(name: Any, error: type[SecateurError] = SecateurError) -> None:
    """Check that a name is one of a floating type in which models are run.

    Raises:
        SecateurError: As ``error``.
    """
    if name not in DTYPES:
        raise error(f"expected the type float32 or bfloat16, got {shown(name)}")


def shown(value: Any) -> str:
    """Return a value as a message quotes it, shortened."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "an integer of thousands of digits"
    except RecursionError:
        text = "something nested too deeply"
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-80:]}"


def takes(kind: type) -> Callable[[F], F]:
    """Show the fields of a request as the keyword arguments of a function that takes ``**options``."""

    def shown(function: F) -> F:
        own = inspect.signature(function)
        kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=p.default, annotation=p.annotation
            )
            for name, p in list(inspect.signature(kind).parameters.items())[1:]
            if name not in own.parameters
        ]
        function.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
        meanings = inspect.getdoc(kind) or ""
        function.__doc__ = f"{inspect.getdoc(function)}\n\n{kind.__name__}: {meanings}"
        return function

    return shown
