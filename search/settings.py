"""The settings of a run: what the command line, a TOML file and Python all pass."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..metrics_dsl.parser import did_you_mean
from .candidate import Stage, parse_pattern
from .objectives import look_up, look_up_objectives
from .searchers import SEARCHERS


class SettingsError(ValueError):
    """Settings that cannot be used; the message says which, what was expected and what came."""


class SearchSettings(BaseModel):
    """What a run searches, on what, and for how long."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calibration: Path
    searcher: str = "gp"
    sparsity: float = Field(default=0.5, ge=0, lt=1)
    pattern: str = "unstructured"
    group: Literal["row", "layer"] = "row"
    objectives: tuple[str, ...] = ("kl", "size")
    budget: int = Field(default=200, ge=1)
    seed: int = Field(default=0, ge=0)
    batch: int = Field(default=16, ge=1)
    promote: float = Field(default=0.25, gt=0, le=1)
    stage: Stage = "model"
    seeding: bool = True
    max_size: int = Field(default=20, ge=3, le=100)
    model: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = Field(default=0, ge=0)

    @field_validator("calibration")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        """Keep a place that is the same from everywhere, for a run may be resumed from elsewhere."""
        return path.expanduser().absolute()

    @field_validator("model")
    @classmethod
    def _absolute_if_local(cls, source: str | None) -> str | None:
        local = source is not None and Path(source).expanduser().exists()
        return str(Path(source).expanduser().absolute()) if source and local else source

    @field_validator("searcher")
    @classmethod
    def _known_searcher(cls, name: str) -> str:
        look_up(SEARCHERS, name, "a searcher")
        return name

    @field_validator("objectives", mode="before")
    @classmethod
    def _known_objectives(cls, names: Any) -> tuple[str, ...]:
        parts = names.split(",") if isinstance(names, str) else list(names)
        return tuple(o.name for o in look_up_objectives([str(part).strip() for part in parts]))

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_pattern(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Take the sparsity from a pattern N:M, and refuse another one beside it."""
        counts = parse_pattern(str(values.get("pattern", "unstructured")))
        if counts is None:
            return values
        share = counts[0] / counts[1]
        if values.get("sparsity") not in (None, share):
            raise ValueError(
                f"expected the sparsity {share:g}, which the pattern {values['pattern']} has, got "
                f"{values['sparsity']}; leave it out"
            )
        return {**values, "sparsity": share}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Return the settings of a mapping; what is None is left at its default.

        Raises:
            SettingsError: For an unknown name or a value that cannot be used.
        """
        try:
            return cls(**{name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise SettingsError(_sentence(error, cls)) from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the settings saved in a run folder's ``run.toml``."""
        try:
            return cls.read(tomllib.loads(path.read_text())["search"])
        except (KeyError, tomllib.TOMLDecodeError) as error:
            raise SettingsError(f"{path} cannot be read as settings of a run: {error}") from None

    def to_toml(self) -> str:
        """Return the text of a TOML file with all settings."""
        values = self.model_dump(mode="json", exclude_none=True)
        # Strings, numbers, booleans and lists of strings are written alike in JSON and TOML.
        return "[search]\n" + "".join(f"{n} = {json.dumps(v)}\n" for n, v in values.items())


def _sentence(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {name!r}{did_you_mean(name, model.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{name}: {message}" if name else message
    if first["type"] == "missing":
        return f"the setting {name!r} is missing"
    return f"{name}: {message[0].lower()}{message[1:]}, got {first['input']!r}"


def read_section(path: Path, section: str) -> dict[str, Any]:
    """Return a section of a TOML file as a dictionary.

    Raises:
        SettingsError: When the file is missing, is not TOML or lacks the section.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"expected a TOML file, got {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None
    if not isinstance(content.get(section), dict):
        raise SettingsError(f"expected a section [{section}] in {path}, got {sorted(content)}")
    return dict(content[section])
