"""Rules to apply: a metric's text or name, a candidate of a run, or a file that holds one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.expression import Expression
from ...metrics_dsl.published import read_metric
from ...search.core.candidate import Layer
from ...search.core.reading import Given, read_json
from ..archive.archive import Archive
from ..archive.keys import whole_key
from ..archive.run_folder import RunFolder
from .candidate_json import read_claim


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
        names: The layers' names in the same order; None where they are not known, or do not matter.
        shapes: Their (rows, columns) by name, where these are known.
        uniform: The ratio that all layers of any model get; None where it is one model's, or nothing is said.
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
    uniform: float | None = None
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def read_rule(text: str) -> Rule:
    """Return the rule that a text names.

    Args:
        text: A metric or the name of a published one, ``FILE.json``, or ``RUN:KEY`` with the first characters
            of a candidate's key, or ``RUN:best``.

    Raises:
        MetricError: For text that is no metric.
        ExportError: When the file is no candidate.
        RuleError: For a run without a key.
        ArchiveError: When there is no run, or it has no such key.
    """
    path = _place(text)
    if text.endswith(".json") or _is(Path.is_file, path):
        return _from_file(path)
    run, colon, key = text.rpartition(":")
    if colon:  # no metric has one
        return _from_run(run, key)
    if _is(Path.is_dir, path) and RunFolder(path).is_run:
        raise RuleError(f"expected a candidate, got the run {text}; give {text}:best or {text}:KEY")
    return Rule("metric", read_metric(text))


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
        if _is(Path.is_dir, folder := _place(text)):
            with Archive(folder) as archive:
                found += [archive.metric(metric) for metric in archive.front()["metric"]]
        else:
            found.append(read_rule(text).metric)
    return list(dict.fromkeys(found))


def read_ratios(file: str | Path) -> dict[str, float]:
    """Return ratios by layer name from a candidate's file, or from a JSON object of names and ratios.

    Raises:
        RuleError: When the file is neither.
    """
    path = _place(file)
    wanted = 'a candidate or an object such as {"model.layers.0.mlp.up_proj": 0.6}'
    content = read_json(path, error=RuleError).members(wanted)
    if not content:
        raise RuleError(f"expected {wanted}, got an empty object in {path}")
    if "layers" not in content:
        return {name: ratio.ratio() for name, ratio in content.items()}
    rows = content["layers"].entries()
    found = {row.field("name").text(): row.field("ratio").ratio() for row in rows}
    if len(found) != len(rows):
        raise RuleError(f"expected a ratio for each layer in {path}, got two for one of them")
    if not found:
        raise content["layers"].refused(wanted)
    return found


def ratios_of(names: Mapping[str, float] | Rule, layers: Sequence[Layer], source: str) -> tuple[float, ...]:
    """Return the ratios in the order of a model's layers.

    Args:
        names: Ratios by layer name, or a rule that has ratios; without names its order is the model's, and a
            uniform one goes to any layers.
        layers: The model's prunable layers.
        source: What the ratios come from, for messages.

    Raises:
        RuleError: When the layers are not the model's; it says what takes the metric to them.
    """

    def of_another(expected: str) -> RuleError:
        return RuleError(f"expected {expected} in {source}: it belongs to another model; {advice}")

    advice = "--sparsity S in its place gives every layer the same ratio"
    if isinstance(names, Rule):
        advice = "--sparsity S takes its metric alone, which goes to any"
        if names.uniform is not None:
            return (names.uniform,) * len(layers)
        ratios = names.ratios or ()
        if names.names is None or len(set(names.names)) != len(ratios):
            if len(ratios) != len(layers):
                raise of_another(f"ratios for the model's {len(layers)} linear layers, got {len(ratios)}")
            return ratios
        for layer in layers:
            if (own := (layer.rows, layer.columns)) != (known := names.shapes.get(layer.name, own)):
                raise of_another(f"{layer.name} to have {known} weights, got {own}, by the ratios")
        names = dict(zip(names.names, ratios, strict=True))
    if len(names) != len(layers):
        raise of_another(f"ratios for the model's {len(layers)} linear layers, got {len(names)}")
    missing = [layer.name for layer in layers if layer.name not in names]
    if missing:
        raise of_another(
            f"a ratio for each layer of the model, got none for {missing[0]} "
            f"({len(missing)} of {len(layers)})"
        )
    return tuple(names[layer.name] for layer in layers)


def _place(text: str | Path) -> Path:
    return Path(os.path.expanduser(text))  # as it is where nobody knows that home: a metric may begin so


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    """Whether a path is a file or folder; a long metric is no name that one can have."""
    try:
        return kind(path)
    except OSError:
        return False


def _from_file(path: Path) -> Rule:
    found, is_uniform = read_claim(path)
    candidate, names = found.candidate, tuple(layer.name for layer in found.layers)
    return Rule(
        str(path), candidate.metric, candidate.group, found.pattern, candidate.ratios,
        None if is_uniform else names, uniform=candidate.shared_ratio if is_uniform else None,
        shapes={layer.name: (layer.rows, layer.columns) for layer in found.layers},
    )  # fmt: skip


def _from_run(run: str, key: str) -> Rule:
    with Archive(_place(run)) as archive:
        candidate = archive.candidate(whole_key(archive, key))
        pattern = str(archive.fact("pattern", "unstructured"))
        noted = Given(archive.fact("layers", []), f"the layers of {run}", RuleError).entries()
        names = tuple(layer.field("name").text() for layer in noted)
        coverage = archive.coverage
    return Rule(
        f"{run}:{candidate.key}", candidate.metric, candidate.group, pattern, candidate.ratios,
        names if names and candidate.shared_ratio is None else None, _place(run),
        frozenset(one.name for one in coverage.stays_dense) if coverage else frozenset(),
        candidate.shared_ratio,
    )  # fmt: skip
