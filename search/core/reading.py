"""JSON and TOML that somebody gave us: read with limits, and what is wrong is a sentence that says where."""

from __future__ import annotations

import codecs
import json
import math
import re
import stat
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...metrics_dsl.errors import SecateurError

_MOST_BYTES = 1 << 26  # 64 MB; a model of 100,000 layers has 20 MB to say
_MOST_SETTINGS = 1 << 20  # bytes of TOML, which takes longest to read and is written by hand
_MOST_VALUES = 1 << 22  # in JSON; the same model has a fifth, and an empty list takes 64 bytes
_DEEPEST = 100  # a tree of Pruner-Zero has a level a node on its way down
_WORD = re.compile(r"[\w-]{1,60}")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Given:
    """A value that a file holds, with where it stands, for messages.

    Attributes:
        value: As JSON has it.
        source: The file.
        error: What is raised when the value is another than wanted.
        place: Its place in the file, such as ``layers[3].ratio``; empty for the whole.
    """

    value: Any
    source: str
    error: type[SecateurError]
    place: str = ""

    def refused(self, expected: str) -> SecateurError:
        """Return the error that says what was expected and what came."""
        where = f" at {self.place}" if self.place else ""
        return self.error(f"expected {expected}, got {_shown(self.value)}{where} in {self.source}")

    def members(self, expected: str = "an object") -> dict[str, Given]:
        """Return the members of an object."""
        if not isinstance(self.value, dict):
            raise self.refused(expected)
        return {name: self._part(value, _step(name)) for name, value in self.value.items()}

    def entries(self, expected: str = "a list") -> list[Given]:
        """Return the entries of a list."""
        if not isinstance(self.value, list):
            raise self.refused(expected)
        return [self._part(value, f"[{i}]") for i, value in enumerate(self.value)]

    def field(self, name: str, *default: Any) -> Given:
        """Return a member of an object; where it lacks one, the default if one is given."""
        if not isinstance(self.value, dict):
            raise self.refused("an object")
        if name not in self.value and not default:
            where = f" at {self.place}" if self.place else ""
            raise self.error(f"{name!r} is missing{where} in {self.source}")
        return self._part(self.value.get(name, *default), _step(name))

    def text(self, expected: str = "a text") -> str:
        """Return a text."""
        if not isinstance(self.value, str):
            raise self.refused(expected)
        return self.value

    def flag(self) -> bool:
        """Return true or false."""
        if not isinstance(self.value, bool):
            raise self.refused("true or false")
        return self.value

    def count(self, least: int = 0, most: int | None = None) -> int:
        """Return a whole number within bounds, both included."""
        is_whole = isinstance(self.value, int) and not isinstance(self.value, bool)
        if not is_whole or self.value < least:
            raise self.refused(f"a whole number of at least {least}")
        if most is not None and self.value > most:
            raise self.refused(f"a whole number of at most {most:,}")
        return int(self.value)

    def ratio(self) -> float:
        """Return a number in [0, 1)."""
        return self.number("ratios in [0, 1)", 0, 1)

    def number(self, expected: str = "a number", least: float = -math.inf, below: float = math.inf) -> float:
        """Return a finite number within bounds."""
        is_number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        try:
            found = float(self.value) if is_number else math.nan
        except OverflowError:
            found = math.nan
        if not (math.isfinite(found) and least <= found < below):
            raise self.refused(expected)
        return found

    def _part(self, value: Any, step: str) -> Given:
        return Given(value, self.source, self.error, f"{self.place}{step}".removeprefix("."))


def read_text(
    path: Path, expected: str, error: type[SecateurError] = SecateurError, most: int | None = None
) -> str:
    """Return the text of a file in UTF-8, without a byte order mark.

    Args:
        path: The file.
        expected: What it should be, such as "a TOML file".
        error: What is raised.
        most: How many bytes it may have, in whole megabytes; 64 MB if left out.

    Raises:
        SecateurError: As ``error``, when it is missing, no file, too large, or not in UTF-8.
    """
    check_file(path, expected, error)
    most = most or _MOST_BYTES
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as problem:
        raise error(f"expected {expected}, got {path}: {_reason(problem)}") from None
    if len(content) > most:
        raise error(f"expected {expected} of at most {most >> 20} MB, got {path} with more")
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise error(
            f"expected {expected} in UTF-8, got {path} with other bytes in line {line}; iconv -t UTF-8 "
            "makes it so"
        ) from None


def check_file(path: Path, expected: str, error: type[SecateurError] = SecateurError) -> None:
    """Check that there is a file: a pipe would keep who opens it waiting.

    Raises:
        SecateurError: As ``error``.
    """
    try:
        mode = path.stat().st_mode
    except OSError as problem:
        raise error(f"expected {expected}, got {path}: {_reason(problem)}") from None
    if not stat.S_ISREG(mode):
        what = f"the folder {path}" if stat.S_ISDIR(mode) else f"{path}, which is no file"
        raise error(f"expected {expected}, got {what}")


def read_json(path: Path, expected: str = "a JSON file", error: type[SecateurError] = SecateurError) -> Given:
    """Return what a JSON file holds.

    Raises:
        SecateurError: As ``error``, as ``read_text`` and ``parse_json`` do.
    """
    return parse_json(read_text(path, expected, error), str(path), error)


def parse_json(text: str, source: str, error: type[SecateurError] = SecateurError) -> Given:
    """Return what a text in JSON holds.

    No name stands twice in an object, no text has half of a character, nothing is nested 100 deep, and there
    are not millions of values.

    Raises:
        SecateurError: As ``error``, when it is no such text.
    """
    try:
        if text.count(",") >= _MOST_VALUES:  # before memory is taken for them
            raise ValueError(f"there are more than {_MOST_VALUES:,} values")
        value = json.loads(text, object_pairs_hook=_object)
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        _check_depth(value)
    except json.JSONDecodeError as problem:
        what = f"{problem.msg[0].lower()}{problem.msg[1:]} in line {problem.lineno}, column {problem.colno}"
    except UnicodeEncodeError:
        what = "a text has half of a character, which cannot be written"
    except RecursionError:
        what = _TOO_DEEP
    except ValueError as problem:  # too many values, a name twice, or a number with thousands of digits
        what = str(problem).partition(";")[0]
    else:
        return Given(value, source, error)
    raise error(f"{source} cannot be read as JSON: {what}")


def read_toml(path: Path, section: str, error: type[SecateurError] = SecateurError) -> dict[str, Any]:
    """Return a section of a TOML file as a dictionary.

    Raises:
        SecateurError: As ``error``, when the file is missing, is not TOML or lacks the section.
    """
    text = read_text(path, "a TOML file", error, _MOST_SETTINGS)
    try:
        content = tomllib.loads(text)
        _check_depth(content)
    except RecursionError:
        raise error(f"{path} is not valid TOML: {_TOO_DEEP}") from None
    except ValueError as problem:
        raise error(f"{path} is not valid TOML: {str(problem).partition(';')[0]}") from None
    if not isinstance(content.get(section), dict):
        raise error(f"expected a section [{section}] in {path}, got {sorted(content)}")
    return dict(content[section])


_TOO_DEEP = f"values are nested more than {_DEEPEST} deep"


def _check_depth(value: Any) -> None:
    """Check that values are not nested too deeply for what walks through them.

    Raises:
        RecursionError: When they are.
    """
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise RecursionError


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return found


def _step(name: str) -> str:
    """Return the step to a member of an object; a name with other characters than a word's is quoted."""
    return f".{name}" if _WORD.fullmatch(name) else f"[{_shown(name)}]"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _reason(problem: OSError) -> str:
    return (problem.strerror or "unreadable").lower()
