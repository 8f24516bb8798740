"""Configuration: TOML files, and one sentence for whatever is wrong with settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..metrics_dsl.errors import SecateurError
from ..metrics_dsl.parser import did_you_mean
from .core.reading import read_toml
from .core.requests import shown


class SettingsError(SecateurError):
    """Settings that cannot be used; the message says which, what was expected and what came."""


def number(value: Any) -> float:
    """Return a value as a number.

    Raises:
        SecateurError: When it is none.
    """
    try:
        if isinstance(value, str) and not value.isascii():  # digits of other scripts
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise SecateurError(f"expected a number, got {shown(value)}") from None


def parts(value: Any) -> list[Any]:
    """Return what a text with commas, or a list, consists of.

    Raises:
        SecateurError: When it is neither.
    """
    if isinstance(value, str):
        return value.split(",")
    if isinstance(value, list | tuple):
        return list(value)
    raise SecateurError(f"expected a text with commas or a list, got {shown(value)}")


def sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """Return what is wrong with settings in one sentence."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {name!r}{did_you_mean(name, model.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{name}: {message}" if name else message
    if first["type"] == "missing":
        return f"the setting {name!r} is missing"
    return f"{name}: {message[0].lower()}{message[1:]}, got {shown(first['input'])}"


def read_section(path: Path, section: str) -> dict[str, Any]:
    """Return a section of a TOML file as a dictionary.

    Raises:
        SettingsError: When the file is missing, is not TOML, lacks the section or lets code run.
    """
    found = read_toml(path, section, SettingsError)
    if "trust_remote_code" in found:
        raise SettingsError(
            f"expected no trust_remote_code in {path}, for no file can let code run; give --trust-remote-code"
        )
    return found
