"""The manifest of a calibration folder: what was calibrated on what, its layers, and records of its files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...search.core.candidate import Layer
from ...search.core.reading import Given
from .file_records import FileRecord

FORMAT = 4
READABLE = (2, 3, FORMAT)  # 2 has gradients in the files of statistics; 2 and 3 have no hashes
PARTS = ("statistics", "selection", "holdout")
MANIFEST = "manifest.json"
_MOST_TOKENS = 1 << 40  # of a part or a sequence: what no file holds is refused


@dataclass(frozen=True)
class Entry:
    """What the manifest says of a layer besides its name and shape.

    Attributes:
        gram: Number of its inputs within its block; layers fed with the same tensor share one.
        tokens: How many tokens of its inputs are kept in place of a Gram matrix, None for a Gram matrix.
        weights: Hash of its weights.
    """

    gram: int
    tokens: int | None = None
    weights: str = ""

    @classmethod
    def read(cls, given: Given) -> Entry:
        """Return what a manifest's row says."""
        tokens = given.field("tokens", None)
        return cls(
            given.field("gram").count(),
            None if tokens.value is None else tokens.count(),
            given.field("weights", "").text(),
        )


def check_manifest(given: Given) -> None:
    """Check what a manifest says besides layers and files, as far as something depends on it.

    Raises:
        SecateurError: As the file's error, when something is missing or of another type.
    """
    given.field("gradients").flag()
    given.field("text").text()
    given.field("seed").count()
    given.field("versions").members()
    model = given.field("model")
    for name in ("source", "weights"):
        model.field(name).text()
    model.field("trust_remote_code", False).flag()
    for part in PARTS:
        described = given.field("parts").field(part)
        for name in ("sequences", "length"):
            described.field(name).count(1, _MOST_TOKENS)
        described.field("sha256").text()


def check_layers(layers: list[Layer], entries: list[Entry], given: Given) -> None:
    """Check that layers fit each other.

    Raises:
        SecateurError: As the file's error, when there is none, one stands twice, or they do not fit.
    """
    seen: set[str] = set()
    inputs: dict[tuple[int, int], tuple[int, int | None]] = {}
    block = 0
    for layer, entry, row in zip(layers, entries, given.entries(), strict=True):
        if layer.name in seen:
            raise row.field("name").refused("each layer once")
        if layer.block < block:
            raise row.field("block").refused(f"layers in the order of their blocks, {block} or more")
        seen.add(layer.name)
        block = layer.block
        shared = (layer.columns, entry.tokens)
        if inputs.setdefault((block, entry.gram), shared) != shared:
            raise row.field("gram").refused("one shape for all layers that share an input")
    if not layers:
        raise given.refused("one layer or more")


def own_hash(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of what a manifest says, however it is laid out."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any], layers: list[Layer], entries: list[Entry]) -> None:
    """Write the manifest, which makes the folder complete; all other files are there."""
    rows = [{**asdict(layer), **asdict(entry)} for layer, entry in zip(layers, entries, strict=True)]
    files = {
        path.relative_to(folder).as_posix(): asdict(FileRecord.of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    content = {**manifest, "format": FORMAT, "layers": rows, "files": files}
    content["sha256"] = own_hash(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
