"""Rules to apply: a metric's text or name, a candidate of a run, or a file that holds one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.expression import Expression
from ...metrics_dsl.published import read_metric
from ...search.core.candidate import Layer
from ...search.core.reading import read_json as read_object
from ..archive.archive import Archive
from ..archive.keys import whole_key
from .candidate_json import read_json


class RuleError(SecateurError):
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
        stays_dense: Parameters that this run left dense.
    """

    source: str
    metric: Expression
    group: str | None = None
    pattern: str | None = None
    ratios: tuple[float, ...] | None = None
    names: tuple[str, ...] | None = None
    run: Path | None = None
    stays_dense: frozenset[str] = frozenset()


def read_rule(text: str) -> Rule:
    """Return the rule that a text names.

    Args:
        text: A metric or the name of a published one, ``FILE.json``, or ``RUN:KEY`` with the first characters
            of a candidate's key, or ``RUN:best``.

    Raises:
        MetricError: For text that is no metric.
        ExportError: When the file is no candidate.
        ArchiveError: When there is no run, or it has no such key.
    """
    if text.endswith(".json") or _place(text).is_file():
        return _from_file(_place(text))
    run, colon, key = text.rpartition(":")
    if colon:  # no metric has one
        return _from_run(run, key)
    return Rule("metric", read_metric(text))


def _place(text: str) -> Path:
    """Return what a text is as a path; a metric may begin as one whose home folder nobody knows."""
    return Path(os.path.expanduser(text))


def read_starts(texts: Sequence[str]) -> list[Expression]:
    """Return the metrics that a search is to begin with, each once, in the order given.

    Args:
        texts: As for ``read_rule``, or run folders, which stand for the metrics on their fronts.

    Raises:
        MetricError: For text that is no metric.
        ExportError: When a file is no candidate.
        ArchiveError: When there is no run, or it has no such key.
    """
    found: list[Expression] = []
    for text in texts:
        if _place(text).is_dir():
            with Archive(_place(text)) as archive:
                found += [archive.metric(metric) for metric in archive.front()["metric"]]
        else:
            found.append(read_rule(text).metric)
    return list(dict.fromkeys(found))


def read_ratios(path: Path) -> dict[str, float]:
    """Return ratios by layer name from a candidate's file, or from a JSON object of names and ratios.

    Raises:
        RuleError: When the file is neither.
    """
    wanted = 'a candidate or an object such as {"model.layers.0.mlp.up_proj": 0.6}'
    content = read_object(path, error=RuleError).members(wanted)
    if "layers" not in content:
        return {name: ratio.ratio() for name, ratio in content.items()}
    rows = content["layers"].entries()
    found = {row.field("name").text(): row.field("ratio").ratio() for row in rows}
    if len(found) != len(rows):
        raise RuleError(f"expected a ratio for each layer in {path}, got two for one of them")
    return found


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
    found = read_json(path)
    candidate, names = found.candidate, tuple(layer.name for layer in found.layers)
    return Rule(str(path), candidate.metric, candidate.group, found.pattern, candidate.ratios, names)


def _from_run(run: str, key: str) -> Rule:
    with Archive(run) as archive:
        candidate = archive.candidate(whole_key(archive, key))
        pattern = str(archive.fact("pattern", "unstructured"))
        names = [layer["name"] for layer in archive.fact("layers", [])]
        coverage = archive.coverage
    return Rule(
        f"{run}:{candidate.key}", candidate.metric, candidate.group, pattern, candidate.ratios,
        tuple(names) or None, Path(run),
        frozenset(one.name for one in coverage.stays_dense) if coverage else frozenset(),
    )  # fmt: skip
