"""A candidate as JSON: everything that a tool needs to prune by it, and where it comes from.

``candidate.schema.json`` beside this file describes the format for other programs; version 1 keeps its
meaning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...metrics_dsl.errors import MetricError
from ...metrics_dsl.parser import parse_metric
from ...metrics_dsl.plugins import lacking
from ...search.core.candidate import Candidate, Layer
from .candidate_record import CandidateRecord, ExportError

FORMAT = "secateur.candidate"
VERSION = 1
SCHEMA = Path(__file__).with_name("candidate.schema.json")
_LAYER = {"name": str, "block": int, "kind": str, "rows": int, "columns": int}


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
            {**{name: getattr(layer, name) for name in _LAYER}, "ratio": ratio}
            for layer, ratio in zip(record.layers, candidate.ratios, strict=True)
        ],
        "figures": dict(record.figures),
        "provenance": {**record.provenance, **({"plugins": needed} if needed else {})},
    }


def write_json(record: CandidateRecord, path: Path) -> None:
    """Write the file."""
    path.write_text(json.dumps(to_json(record), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> CandidateRecord:
    """Return what ``write_json`` wrote: an equal candidate.

    Raises:
        ExportError: When the file is not of this format or of a later version.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        raise ExportError(f"expected a candidate's JSON file, got {path}: {reason}") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ExportError(f"expected a file of the format {FORMAT}, got {path} without it")
    if content.get("version") != VERSION:
        raise ExportError(
            f"expected version {VERSION} of {FORMAT}, got {content.get('version')!r} in {path}; read it with "
            "the release that wrote it"
        )
    try:
        layers = tuple(Layer(**{name: kind(row[name]) for name, kind in _LAYER.items()})
                       for row in content["layers"])  # fmt: skip
        ratios = tuple(float(row["ratio"]) for row in content["layers"])
        candidate = Candidate(parse_metric(content["metric"]), ratios, content["group"])
        figures = {name: float(value) for name, value in content.get("figures", {}).items()}
        return CandidateRecord(candidate, layers, content["pattern"], figures, content.get("provenance", {}))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, MetricError) and (found := _lacking(content.get("provenance"))):
            raise ExportError(f"the metric in {path} needs {found} ({error})") from None
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ExportError(f"{path} is no complete candidate: {reason}") from None


def _lacking(provenance: Any) -> str:
    """Return which plugins a file names that this process does not use; nothing if it cannot be read."""
    try:
        return lacking(provenance["plugins"])
    except (KeyError, TypeError, AttributeError):
        return ""
