"""Rules to apply: a metric's text or name, a candidate of a run, or a file that holds one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..metrics_dsl.expression import Expression
from ..metrics_dsl.published import read_metric
from ..search.candidate import Candidate, Layer
from .archive import Archive

FORMAT = "secateur.candidate"
VERSION = 1
_NEAREST = 3  # keys that are named where the asked one is unknown


class RuleError(ValueError):
    """A rule that cannot be read, or that belongs to another model."""


@dataclass(frozen=True)
class Rule:
    """A pruning rule as it was given.

    Attributes:
        source: Where it comes from: ``metric``, a file, or a run and a key.
        metric: Gives every weight a score.
        group: The weights that compete; None where nothing is said.
        pattern: ``unstructured`` or ``N:M``; None where nothing is said.
        ratios: One ratio a layer in model order; None for a metric alone.
        names: The layers' names in the same order; None where they are not known.
        run: The run that the rule was found in; None for others.
    """

    source: str
    metric: Expression
    group: str | None = None
    pattern: str | None = None
    ratios: tuple[float, ...] | None = None
    names: tuple[str, ...] | None = None
    run: Path | None = None


def read_rule(text: str) -> Rule:
    """Return the rule that a text names.

    Args:
        text: A metric or the name of a published one, ``FILE.json``, or ``RUN:KEY`` with the first characters
            of a candidate's key.

    Raises:
        MetricError: For text that is no metric.
        RuleError: When the file is no candidate or the run has no such key.
        ArchiveError: When there is no run.
    """
    if text.endswith(".json"):
        return _from_file(Path(text).expanduser())
    run, colon, key = text.rpartition(":")
    if colon:  # no metric has one
        return _from_run(run, key)
    return Rule("metric", read_metric(text))


def read_ratios(path: Path) -> dict[str, float]:
    """Return ratios by layer name from a candidate's file, or from a JSON object of names and ratios.

    Raises:
        RuleError: When the file is neither.
    """
    content = _object(path)
    try:
        if "layers" in content:
            return _ratios(content["layers"])
        return {str(name): _number(ratio) for name, ratio in content.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise RuleError(
            f'expected a candidate or an object such as {{"model.layers.0.mlp.up_proj": 0.6}} in {path}, got '
            f"another one ({_reason(error)})"
        ) from None


def ratios_of(names: Mapping[str, float] | Rule, layers: Sequence[Layer], source: str) -> tuple[float, ...]:
    """Return the ratios in the order of a model's layers.

    Args:
        names: Ratios by layer name, or a rule that has ratios; without names its order is the model's.
        layers: The model's prunable layers.
        source: What the ratios come from, for messages.

    Raises:
        RuleError: When the layers are not the model's.
    """
    if isinstance(names, Rule):
        ratios = names.ratios or ()
        if names.names is None or len(set(names.names)) != len(ratios):
            if len(ratios) != len(layers):
                raise RuleError(_of_another_model(source, len(ratios), layers))
            return ratios
        names = dict(zip(names.names, ratios, strict=True))
    if len(names) != len(layers):
        raise RuleError(_of_another_model(source, len(names), layers))
    missing = [layer.name for layer in layers if layer.name not in names]
    if missing:
        raise RuleError(
            f"expected a ratio for each layer of the model, got none for {missing[0]} ({len(missing)} of "
            f"{len(layers)}) in {source}: it belongs to another model"
        )
    return tuple(names[layer.name] for layer in layers)


def _of_another_model(source: str, count: int, layers: Sequence[Layer]) -> str:
    return (
        f"expected ratios for the model's {len(layers)} linear layers, got {count} in {source}: it "
        "belongs to another model"
    )


def _from_file(path: Path) -> Rule:
    content = _object(path)
    try:
        if content.get("format", FORMAT) != FORMAT or int(content.get("version", VERSION)) > VERSION:
            raise ValueError(f"format {content.get('format')!r}, version {content.get('version')!r}")
        named = _ratios(content["layers"])
        candidate = Candidate(
            read_metric(content["metric"]), tuple(named.values()), content.get("group", "row")
        )
        pattern = str(content.get("pattern", "unstructured"))
    except (KeyError, TypeError, ValueError) as error:
        raise RuleError(
            f"expected a candidate as `secateur export` writes it in {path}, got something else "
            f"({_reason(error)})"
        ) from None
    return Rule(str(path), candidate.metric, candidate.group, pattern, candidate.ratios, tuple(named))


def _from_run(run: str, key: str) -> Rule:
    with Archive(run) as archive:
        candidates = {trial.candidate.key: trial.candidate for trial in archive.trials()}
        pattern = str(archive.fact("pattern", "unstructured"))
    found = [known for known in candidates if known.startswith(key)] if key else []
    if len(found) == 1:
        candidate = candidates[found[0]]
        return Rule(
            f"{run}:{found[0]}", candidate.metric, candidate.group, pattern, candidate.ratios, run=Path(run)
        )
    if found:
        named = ", ".join(found[:_NEAREST])
        raise RuleError(
            f"expected one candidate of {run}, got {len(found)} whose keys begin with {key!r}: {named}"
        )
    near = difflib.get_close_matches(key, candidates, n=_NEAREST, cutoff=0.0)
    raise RuleError(
        f"expected the key of a candidate of {run}, got {key!r}; "
        + (f"the nearest are {', '.join(near)}" if near else "the run has none yet")
    )


def _ratios(entries: Any) -> dict[str, float]:
    found = {str(entry["name"]): _number(entry["ratio"]) for entry in entries}
    if len(found) != len(entries):
        raise ValueError("two layers have one name")
    return found


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"expected ratios in [0, 1), got {value!r}")
    return float(value)


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RuleError(
            f"expected a JSON file, got {path}: {(error.strerror or 'unreadable').lower()}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RuleError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RuleError(f"expected a JSON object in {path}, got {type(content).__name__}")
    return content


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
