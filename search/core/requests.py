"""Requests by name: plain keyword arguments become a request, and help shows them all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.parser import did_you_mean

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
