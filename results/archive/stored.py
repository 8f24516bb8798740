"""What an archive holds, checked as it is read: it may come from anyone, or from a disk that failed."""

from __future__ import annotations

import contextlib
import json
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...search.core.candidate import STAGES, Layer, Measurement, Stage, parse_pattern
from ...search.core.coverage import Coverage
from ...search.core.reading import Given, parse_json
from .database import ArchiveError

SCHEMA = 5
# What tables and fronts read stands in rows of some 300 bytes; the numbers of each layer, ten times as long,
# stand apart, so that a hundred thousand candidates are read in a second.
FIGURES = ("kl", "kl_rung", "layer_error", "model_error", "perplexity", "sparsity")
_STORED = ", ".join(
    f"{name} REAL GENERATED ALWAYS AS (json_extract(\"values\", '$.{name}')) STORED" for name in FIGURES
)
TABLES = f"""
PRAGMA user_version = {SCHEMA};
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE measurements (
    key TEXT NOT NULL, stage TEXT NOT NULL, part TEXT NOT NULL, of_tokens INTEGER NOT NULL,
    "values" TEXT NOT NULL, seconds REAL NOT NULL, failure TEXT NOT NULL, fingerprint TEXT NOT NULL,
    tokens INTEGER NOT NULL, worker TEXT NOT NULL, attempts INTEGER NOT NULL,
    layer_errors BLOB NOT NULL, parts BLOB NOT NULL, sensitivities BLOB NOT NULL,
    PRIMARY KEY (key, stage, part, of_tokens));
CREATE INDEX holdout ON measurements (key) WHERE part = 'holdout';
CREATE TABLE trials (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, status TEXT NOT NULL, alias_of TEXT NOT NULL,
    metric TEXT NOT NULL, "group" TEXT NOT NULL, size INTEGER NOT NULL, ratio_min REAL, ratio_max REAL,
    stage TEXT NOT NULL, "values" TEXT NOT NULL, seconds REAL NOT NULL, failure TEXT NOT NULL,
    fingerprint TEXT NOT NULL, tokens INTEGER NOT NULL, worker TEXT NOT NULL, attempts INTEGER NOT NULL,
    {_STORED});
CREATE TABLE by_layer (
    key TEXT PRIMARY KEY, ratios BLOB NOT NULL, layer_errors BLOB NOT NULL, parts BLOB NOT NULL,
    sensitivities BLOB NOT NULL);
"""
_LARGEST = 2**53  # of whole numbers, which other programs hold exactly up to here
_STATUS = ("measured", "rejected", "alias", "failed")


def floats(blob: Any, what: str) -> tuple[float, ...]:
    """Return the numbers of a cell.

    Raises:
        ArchiveError: When it holds no numbers of 8 bytes, or one that is not finite.
    """
    if not isinstance(blob, bytes) or len(blob) % 8:
        raise ArchiveError(f"expected numbers of 8 bytes for {what}, got {_shown(blob)}")
    found = tuple(array("d", blob))
    if not _are_finite(found):
        raise ArchiveError(f"expected finite numbers for {what}, got others")
    return found


def _are_finite(numbers: Sequence[float]) -> bool:
    """Whether all are: a sum tells, and is quick, but for numbers whose sum is too large for one."""
    return math.isfinite(sum(numbers)) or all(map(math.isfinite, numbers))


def values(text: Any, what: str) -> dict[str, float]:
    """Return the values of a measurement by name.

    Raises:
        ArchiveError: When a cell holds anything else.
    """
    with contextlib.suppress(ValueError, TypeError, RecursionError):  # the rule, a hundred thousand times
        found = json.loads(text)
        if type(found) is dict and all(type(v) is float and math.isfinite(v) for v in found.values()):
            return found
    if not isinstance(text, str):
        raise ArchiveError(f"expected JSON for {what}, got {_shown(text)}")
    given = parse_json(text, what, ArchiveError)
    for value in given.members("values by name").values():
        value.number()
    return dict(given.value)


def fact(name: str, text: Any, what: str) -> Any:
    """Return a fact, which is of the form that it was kept in.

    Raises:
        ArchiveError: When it is of another.
    """
    if not isinstance(text, str):
        raise ArchiveError(f"expected JSON for {what}, got {_shown(text)}")
    given = parse_json(text, what, ArchiveError)
    if name in FACTS:
        FACTS[name](given)
    return given.value


def _shown(value: Any) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else f"{str(value)[:40]!r}"


def blob(values: Sequence[float]) -> bytes:
    """Return numbers as a cell.

    Raises:
        ArchiveError: When one is not finite, as an evaluator of somebody else's may have it: such a cell
            could not be read again.
    """
    if not _are_finite(values):
        raise ArchiveError("expected finite numbers from an evaluator, got others")
    return array("d", values).tobytes()


def figures(m: Measurement) -> tuple[Any, ...]:
    """Return the cells of a measurement that are short."""
    values = json.dumps(dict(m.values), allow_nan=False)
    return values, m.seconds, m.failure, m.fingerprint, m.tokens, m.worker, m.attempts


def numbers(m: Measurement) -> tuple[bytes, ...]:
    """Return the cells of a measurement that hold numbers of each layer."""
    return blob(m.layer_errors), blob(m.parts), blob(m.sensitivities)


# Facts -----------------------------------------------------------------------------------------


def _texts(given: Given) -> None:
    for entry in given.entries("a list of texts"):
        entry.text()


def _named_texts(given: Given) -> None:
    for member in given.members().values():
        member.text()


def _objectives(given: Given) -> None:
    _texts(given)
    if not given.value or len(set(given.value)) < len(given.value):
        raise given.refused("objectives, each once")


def _pattern(given: Given) -> None:
    parse_pattern(given.text())


def _layers(given: Given) -> None:
    found = [Layer.read(entry) for entry in given.entries("a list of layers")]
    if len({layer.name for layer in found}) < len(found):
        raise given.refused("layers with names of their own")
    for entry, layer in zip(given.entries(), found, strict=True):
        if {*entry.members()} != {*vars(layer)} or max(layer.size, layer.block) > _LARGEST:
            raise entry.refused("a layer")


def _plugins(given: Given) -> None:
    for entry in given.entries("a list of plugins"):
        entry.field("name").text()
        entry.field("sha256" if "sha256" in entry.members() else "version").text()


def _race(given: Given) -> None:
    parts = given.entries("rungs and tokens")
    if len(parts) != 2:
        raise given.refused("rungs and tokens")
    for tokens in parts[0].entries("a list of tokens"):
        tokens.count(1)
    parts[1].count()


def _cut(given: Given) -> None:
    if given.value is not None:
        given.field("rows").count()
        given.field("budget").text()


def _card(given: Given) -> None:
    members = given.members()
    for name in ("model", "text", "weights", "python", "machine", "accelerator"):
        if name in members:
            members[name].text()
    for name in ("calibrated_with", "versions"):
        if name in members:
            _named_texts(members[name])
    for part in given.field("parts", {}).members().values():
        for name in ("sequences", "length"):
            if part.field(name).count(1) > _LARGEST:
                raise part.field(name).refused("a number of tokens")
        part.field("sha256", "").text()


FACTS: Mapping[str, Callable[[Given], object]] = {
    "baselines": _named_texts,
    "calibration": Given.text,
    "card": _card,
    "coverage": Coverage.read,
    "cut": _cut,
    "has_ended": Given.flag,
    "layers": _layers,
    "objectives": _objectives,
    "pattern": _pattern,
    "plugins": _plugins,
    "race": _race,
    "settings": Given.members,
    "starts": _texts,
    "versions": _named_texts,
}


# Rows ------------------------------------------------------------------------------------------

_TEXT = "typeof({0}) != 'text'"
_COUNT = f"typeof({{0}}) != 'integer' OR NOT {{0}} BETWEEN 0 AND {_LARGEST}"
_FIGURE = "typeof({0}) NOT IN ('real', 'integer', 'null') OR abs({0}) > 1.7976931348623157e308"
_WRONG = {
    "number": _COUNT, "key": _TEXT, "alias_of": _TEXT, "metric": _TEXT, "group": _TEXT, "size": _COUNT,
    "ratio_min": _FIGURE, "ratio_max": _FIGURE, "values": _TEXT, "failure": _TEXT, "fingerprint": _TEXT,
    "seconds": f"{_FIGURE} OR NOT {{0}} >= 0", "tokens": _COUNT, "worker": _TEXT, "attempts": _COUNT,
    "status": f"{{0}} NOT IN {_STATUS}", "stage": f"{{0}} NOT IN {STAGES}",
}  # fmt: skip


def wrong_trials() -> str:
    """Return a query for the first trial with a cell that we never write: its number, and the column.

    SQLite holds anything in any column, and looks itself far faster than we would.
    """
    wrong = {f'"{name}"': test for name, test in {**_WRONG, **dict.fromkeys(FIGURES, _FIGURE)}.items()}
    tests = {name: f"({test.format(name)})" for name, test in wrong.items()}
    which = " ".join(f"WHEN {test} THEN '{name}'" for name, test in tests.items())
    return f"SELECT number, CASE {which} END FROM trials WHERE {' OR '.join(tests.values())} LIMIT 1"


def measurement(stage: Stage, row: Sequence[Any], what: str) -> Measurement:
    """Return a measurement from its cells, in the order of its columns.

    Raises:
        ArchiveError: When a cell holds what none of ours does.
    """
    text, seconds, failure, fingerprint, tokens, worker, attempts, *blobs = row
    known = values(text, what)
    for cell in (failure, fingerprint, worker):
        if type(cell) is not str:
            raise ArchiveError(f"expected texts for {what}, got {_shown(cell)}")
    for cell, kinds in ((seconds, (float, int)), (tokens, (int,)), (attempts, (int,))):
        if type(cell) not in kinds or not 0 <= cell <= _LARGEST:
            raise ArchiveError(f"expected what measuring took for {what}, got {_shown(cell)}")
    errors, parts, sensitivities = (floats(blob, what) for blob in blobs)
    return Measurement(
        stage, errors, known, seconds, failure, fingerprint, tokens, parts, sensitivities, worker, attempts
    )
