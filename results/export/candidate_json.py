"""A candidate as JSON: everything that a tool needs to prune by it, and where it comes from.

``candidate.schema.json`` beside this file describes the format for other programs; version 1 keeps its
meaning.
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
        "layers": [
            {**asdict(layer), "ratio": ratio}
            for layer, ratio in zip(record.layers, candidate.ratios, strict=True)
        ],
        "figures": dict(record.figures),
        "provenance": {**record.provenance, **({"plugins": needed} if needed else {})},
    }


def write_json(record: CandidateRecord, path: Path) -> None:
    """Write the file."""
    path.write_text(json.dumps(to_json(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> CandidateRecord:
    """Return what ``write_json`` wrote: an equal candidate.

    Raises:
        ExportError: When the file is not of this format or of a later version.
    """
    given = reading.read_json(path, "a candidate's JSON file", ExportError)
    content = given.value if isinstance(given.value, dict) else {}
    if content.get("format") != FORMAT:
        raise ExportError(f"expected a file of the format {FORMAT}, got {path} without it")
    if content.get("version") != VERSION:
        raise ExportError(
            f"expected version {VERSION} of {FORMAT}, got {content.get('version')!r} in {path}; read it with "
            "the release that wrote it"
        )
    rows = given.field("layers").entries()
    layers = tuple(map(Layer.read, rows))
    ratios = tuple(row.field("ratio").ratio() for row in rows)
    metric, group, pattern = (given.field(name).text() for name in ("metric", "group", "pattern"))
    figures = {name: value.number() for name, value in given.field("figures", {}).members().items()}
    given.field("provenance", {}).members()
    try:
        candidate = Candidate(parse_metric(metric), ratios, group)
        return CandidateRecord(candidate, layers, pattern, figures, content.get("provenance", {}))
    except SecateurError as error:
        if isinstance(error, MetricError) and (found := _lacking(content.get("provenance"))):
            raise ExportError(f"the metric in {path} needs {found} ({error})") from None
        raise ExportError(f"{path} is no complete candidate: {error}") from None


def _lacking(provenance: Any) -> str:
    """Return which plugins a file names that this process does not use; nothing if it cannot be read."""
    try:
        return lacking(provenance["plugins"])
    except (KeyError, TypeError, AttributeError):
        return ""
