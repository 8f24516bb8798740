"""A candidate as JSON: everything that a tool needs to prune by it, and where it comes from.

``candidate.schema.json`` beside this file describes the format for other programs; version 1 keeps its
meaning. A file that says ``uniform`` has a rule for any model: one ratio for all layers, which are listed
with it nonetheless, as those that it was found on.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.expression import MetricError
from ...metrics_dsl.parser import parse_metric
from ...metrics_dsl.plugins import lacking
from ...search.core import reading
from ...search.core.candidate import Candidate, Layer
from .candidate_record import CandidateRecord, ExportError

FORMAT = "secateur.candidate"
VERSION = 1
SCHEMA = Path(__file__).with_name("candidate.schema.json")


def to_json(record: CandidateRecord) -> dict[str, Any]:
    """Return what the file holds."""
    candidate = record.candidate
    needed = record.needed_plugins
    return {
        "format": FORMAT,
        "version": VERSION,
        "metric": str(candidate.metric),
        "group": candidate.group,
        "pattern": record.pattern,
        "sparsity": record.sparsity,
        **({} if candidate.shared_ratio is None else {"uniform": candidate.shared_ratio}),
        "layers": [
            {**asdict(layer), "ratio": ratio}
            for layer, ratio in zip(record.layers, candidate.ratios, strict=True)
        ],
        "figures": dict(record.figures),
        "provenance": {**record.provenance, **({"plugins": needed} if needed else {})},
    }


def write_json(record: CandidateRecord, path: Path) -> None:
    """Write the file."""
    try:
        text = json.dumps(to_json(record), indent=1, allow_nan=False)
    except ValueError:
        raise ExportError(
            f"expected numbers in what is noted of {record.candidate.key}, got NaN or infinity"
        ) from None
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> CandidateRecord:
    """Return what ``write_json`` wrote: an equal candidate.

    Raises:
        ExportError: As ``read_claim``.
    """
    return read_claim(path)[0]


def read_claim(path: Path) -> tuple[CandidateRecord, bool]:
    """Return what ``write_json`` wrote, and whether it says that its ratio is good for any model.

    Equal ratios alone do not say so: a file that somebody else wrote may list some layers of a model.

    Raises:
        ExportError: When the file is not of this format or of a later version, or what it says does not
            fit together.
    """
    given = reading.read_json(path, "a candidate's JSON file", ExportError)
    content = given.members(f"a file of the format {FORMAT}")
    if "format" not in content or content["format"].value != FORMAT:
        raise ExportError(f"expected a file of the format {FORMAT}, got {path} without it")
    if (version := given.field("version").count()) != VERSION:
        raise ExportError(
            f"expected version {VERSION} of {FORMAT}, got {version} in {path}; read it with the release that "
            "wrote it"
        )
    rows = given.field("layers").entries()
    layers = tuple(map(Layer.read, rows))
    if not layers:
        raise given.field("layers").refused("at least one layer")
    if len(first := {x.name: i for i, x in reversed([*enumerate(layers)])}) < len(layers):
        again = next(i for i, x in enumerate(layers) if first[x.name] != i)
        raise rows[again].field("name").refused("each layer once")
    ratios = tuple(row.field("ratio").ratio() for row in rows)
    metric, group, pattern = (given.field(name).text() for name in ("metric", "group", "pattern"))
    figures = {name: value.number() for name, value in given.field("figures", {}).members().items()}
    provenance = {name: value.value for name, value in given.field("provenance", {}).members().items()}
    is_uniform = "uniform" in content
    if is_uniform and {content["uniform"].ratio()} != set(ratios):
        raise content["uniform"].refused("the ratio that all layers have")
    try:
        candidate = Candidate(parse_metric(metric), ratios, group)
        return CandidateRecord(candidate, layers, pattern, figures, provenance), is_uniform
    except SecateurError as error:
        if isinstance(error, MetricError) and (found := _lacking(provenance)):
            raise ExportError(f"the metric in {path} needs {found} ({error})") from None
        raise ExportError(f"{path} is no complete candidate: {error}") from None


def _lacking(provenance: Any) -> str:
    """Return which plugins a file names that this process does not use; nothing if it cannot be read."""
    try:
        return lacking(provenance["plugins"])
    except (KeyError, TypeError, AttributeError):
        return ""
