"""The calibration folder: what calibration writes and measuring reads.

``manifest.json`` says what was calibrated on what, ``tokens.safetensors`` holds the token ids of the three
parts, and each decoder block has a file of statistics and, if wanted, one of gradients. A folder appears
whole or not at all: it is written under another name and renamed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.operators import GRAM, LEAVES
from ...metrics_dsl.plugins import fill
from ...search.core.candidate import Layer
from ...search.core.coverage import Coverage
from ...search.core.reading import Given, read_json

FORMAT = 3
_READABLE = (2, FORMAT)  # 2 has gradients in the files of statistics
PARTS = ("statistics", "selection", "holdout")
_MANIFEST = "manifest.json"


class CalibrationError(SecateurError):
    """A calibration folder that is missing, incomplete or of another model or version."""


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer.

    Attributes:
        gram: Mean of x x' over tokens, (columns, columns), or its root where tokens are fewer than columns,
            (tokens, columns); shared by layers fed with the same tensor.
        energy: Mean square of each output without bias, (rows,), 64-bit.
        leaves: Leaves of the metric language but ``W``, two-dimensional; what others compute is not among
            them.
    """

    gram: Tensor
    energy: Tensor
    leaves: dict[str, Tensor]


def token_hash(ids: Tensor) -> str:
    """Return the SHA-256 of token ids, as 32-bit little-endian integers in reading order."""
    return hashlib.sha256(ids.to(torch.int32).cpu().numpy().astype("<i4").tobytes()).hexdigest()


def block_file(index: int) -> str:
    """Return the name of a block's file of statistics."""
    return f"block-{index:03d}.safetensors"


def gradient_file(index: int) -> str:
    """Return the name of a block's file of gradients."""
    return f"gradients-{index:03d}.safetensors"


def write_tokens(folder: Path, parts: dict[str, Tensor]) -> None:
    """Write the token ids of the parts, each (sequences, tokens)."""
    tensors = {name: ids.to(torch.int32).contiguous() for name, ids in parts.items()}
    save_file(tensors, folder / "tokens.safetensors")


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
            None if tokens.value is None else tokens.count(1),
            given.field("weights", "").text(),
        )


def _check(given: Given) -> None:
    """Check what a manifest says besides layers, as far as something depends on it."""
    given.field("gradients").flag()
    model = given.field("model")
    for name in ("source", "weights"):
        model.field(name).text()
    model.field("trust_remote_code", False).flag()
    for part in PARTS:
        for name in ("sequences", "length"):
            given.field("parts").field(part).field(name).count(1)


def write_manifest(folder: Path, manifest: dict[str, Any], layers: list[Layer], entries: list[Entry]) -> None:
    """Write the manifest, which makes the folder complete."""
    rows = [{**asdict(layer), **asdict(entry)} for layer, entry in zip(layers, entries, strict=True)]
    text = json.dumps({"format": FORMAT, **manifest, "layers": rows}, indent=1)
    (folder / _MANIFEST).write_text(text + "\n")


class Calibration:
    """A calibration folder opened for reading.

    Attributes:
        folder: Where it is.
        manifest: What was calibrated on what.
        layers: The prunable layers in model order.
        entries: What else the manifest says of each.
        coverage: Which part of the block weights they have; None where an older release calibrated.
        blocks: How many blocks the model has, with and without layers.

    Raises:
        CalibrationError: When the folder is missing or incomplete.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / _MANIFEST
        if not path.is_file():
            raise CalibrationError(
                f"expected a calibration folder, got {self.folder} without {_MANIFEST}; "
                "make one with `secateur calibrate MODEL --out DIR`"
            )
        try:
            given = read_json(path, "a manifest as JSON", CalibrationError)
            if (version := given.field("format").count()) not in _READABLE:
                known = " or ".join(map(str, _READABLE))
                raise CalibrationError(f"expected calibration format {known}, got {version} in {path}")
            _check(given)
            rows = given.field("layers").entries()
            self.layers = list(map(Layer.read, rows))
            self.entries = list(map(Entry.read, rows))
            self.coverage = Coverage.read(given.field("model"))
            least = max((layer.block + 1 for layer in self.layers), default=1)
            self.blocks = given.field("model").field("blocks", least).count(least)
        except CalibrationError as error:
            raise CalibrationError(f"{error}; calibrate again") from None
        self.manifest: dict[str, Any] = given.value
        self.check_complete()

    def check_complete(self) -> None:
        """Check that all files are there.

        Raises:
            CalibrationError: When one is missing.
        """
        blocks = sorted({self.blocks - 1, *(layer.block for layer in self.layers)})
        names = ["tokens.safetensors", *map(block_file, blocks)]
        if self._has_gradient_files:
            names += map(gradient_file, blocks)
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise CalibrationError(
                f"the calibration folder {self.folder} is incomplete: {missing[0]} is missing "
                f"({len(missing)} of {len(names)} files); calibrate again"
            )

    @property
    def leaves(self) -> frozenset[str]:
        """Names of the leaves that metrics may use on this calibration."""
        fill(LEAVES)
        held = {name for name, leaf in LEAVES.items() if leaf.compute is None}
        held -= set() if self.manifest["gradients"] else {"G"}
        computed = {n for n, leaf in LEAVES.items() if leaf.compute and {*leaf.needs} <= held | {GRAM}}
        return frozenset(held | computed)

    @property
    def inputs(self) -> tuple[int, int]:
        """How many inputs feed the layers, and how many of them are kept as tokens."""
        kept = {(x.block, e.gram): e.tokens for x, e in zip(self.layers, self.entries, strict=True)}
        return len(kept), sum(tokens is not None for tokens in kept.values())

    @property
    def model_source(self) -> str:
        """Where to load the model from: the folder's own dense copy, if there is one."""
        copy = self.folder / "model"
        return str(copy) if copy.is_dir() else str(self.manifest["model"]["source"])

    def shape(self, part: str) -> tuple[int, int]:
        """Return how many sequences of how many tokens a part has."""
        described = self.manifest["parts"][part]
        return int(described["sequences"]), int(described["length"])

    def tokens(self, part: str) -> Tensor:
        """Return the token ids of a part, (sequences, tokens)."""
        with self._open("tokens.safetensors") as file:
            return file.get_tensor(part).long()  # type: ignore[no-any-return]

    def block(self, index: int, device: torch.device | str = "cpu") -> dict[int, LayerStatistics]:
        """Return the statistics of a block's layers by position of the layer in the model."""
        wanted = [i for i, layer in enumerate(self.layers) if layer.block == index]
        result: dict[int, LayerStatistics] = {}
        with self._open(block_file(index)) as file:
            shared: dict[str, Tensor] = {}

            def read(name: str) -> Tensor:
                if name not in shared:  # layers that share a Gram matrix share its memory
                    shared[name] = file.get_tensor(name).to(device)
                return shared[name]

            for i in wanted:
                gram, layer = f"gram{self.entries[i].gram}", self.layers[i].name
                leaves = {leaf: read(f"{gram}/{leaf}").reshape(1, -1) for leaf in "XMVD"}
                leaves["Y"] = read(f"{layer}/Y").reshape(-1, 1)
                result[i] = LayerStatistics(read(f"{gram}/H"), read(f"{layer}/energy"), leaves)
        if self.manifest["gradients"]:
            name = gradient_file(index) if self._has_gradient_files else block_file(index)
            with self._open(name) as file:
                for i in wanted:
                    gradient = file.get_tensor(f"{self.layers[i].name}/G")
                    result[i].leaves["G"] = gradient.to(device)
        return result

    @property
    def _has_gradient_files(self) -> bool:
        return bool(self.manifest["gradients"]) and int(self.manifest["format"]) > 2

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CalibrationError(
                f"{self.folder / name} cannot be read ({error}); calibrate again"
            ) from None
