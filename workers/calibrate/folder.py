"""The calibration folder: what calibration writes and measuring reads.

``manifest.json`` says what was calibrated on what, ``tokens.safetensors`` holds the token ids of the three
parts, and each decoder block has a file of statistics and, if wanted, one of gradients. A folder appears
whole or not at all: it is written under another name and renamed, its manifest last.

The manifest has size and SHA-256 of every file and one of its own content. Sizes are checked when the folder
is opened, a file's hash when the file is, once in a process: a worker reads only what it needs. Tensors are
checked besides against what the manifest says of layers and tokens, in folders of older formats too, which
have no hashes.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.operators import GRAM, LEAVES
from ...metrics_dsl.plugins import fill
from ...search.core.candidate import MOST_BLOCKS, Layer
from ...search.core.coverage import Coverage
from ...search.core.files import expanded
from ...search.core.reading import check_file, read_json
from ..model.checksums import Checksums
from .file_records import FileRecord
from .manifest import MANIFEST, PARTS, READABLE, Entry, check_layers, check_manifest, own_hash

_TOKENS = "tokens.safetensors"
_MODEL = "model"  # the dense copy of a quantised model
_LEAST = {"X": 0.0, "M": None, "V": 0.0, "D": None}  # of an input, and the least that a number of it can be


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
    save_file(tensors, folder / _TOKENS)


class Calibration:
    """A calibration folder opened for reading.

    Attributes:
        folder: Where it is.
        manifest: What was calibrated on what.
        layers: The prunable layers in model order.
        entries: What else the manifest says of each.
        coverage: Which part of the block weights they have; None where an older release calibrated.
        blocks: How many blocks the model has, with and without layers.
        checksums: What else tells the model from others; None where an older release calibrated.

    Raises:
        CalibrationError: When the folder is missing, incomplete or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = expanded(folder, CalibrationError)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise CalibrationError(
                f"expected a calibration folder, got {self.folder} without {MANIFEST}; "
                "make one with `secateur calibrate MODEL --out DIR`"
            )
        try:
            given = read_json(path, "a manifest as JSON", CalibrationError)
            if (version := given.field("format").count()) not in READABLE:
                known = f"{', '.join(map(str, READABLE[:-1]))} or {READABLE[-1]}"
                raise CalibrationError(f"expected calibration format {known}, got {version} in {path}")
            self._has_hashes = version > 3
            check_manifest(given)
            rows = given.field("layers")
            self.layers = list(map(Layer.read, rows.entries()))
            self.entries = list(map(Entry.read, rows.entries()))
            check_layers(self.layers, self.entries, rows)
            files = given.field("files").members() if self._has_hashes else {}
            self._files = {name: FileRecord.read(record) for name, record in files.items()}
            if self._has_hashes and given.field("sha256").text() != own_hash(given.value):
                raise CalibrationError(
                    f"expected {path} as calibration wrote it, got other content (the place of a model that "
                    "was moved is given with --model)"
                )
            self.coverage = Coverage.read(given.field("model"))
            sums = given.field("checksums", None)
            self.checksums = None if sums.value is None else Checksums.read(sums)
            least = max((layer.block + 1 for layer in self.layers), default=1)
            self.blocks = given.field("model").field("blocks", least).count(least, MOST_BLOCKS)
        except CalibrationError as error:
            raise CalibrationError(f"{error}; calibrate again") from None
        self.manifest: dict[str, Any] = given.value
        self.check_complete()
        for part in PARTS:
            self.tokens(part)

    def check_complete(self) -> None:
        """Check that all files are there, and have the sizes that they were written with.

        Raises:
            CalibrationError: When one is missing, has another size, or the model's copy has one more.
        """
        blocks = sorted({self.blocks - 1, *(layer.block for layer in self.layers)})
        names = [_TOKENS, *map(block_file, blocks)]
        if self._has_gradient_files:
            names += map(gradient_file, blocks)
        names += sorted({*self._files} - {*names})
        missing = [name for name in names if not (self.folder / name).exists()]
        if missing:
            raise CalibrationError(
                f"the calibration folder {self.folder} is incomplete: {missing[0]} is missing "
                f"({len(missing)} of {len(names)} files); calibrate again"
            )
        for name in names:
            self._check_file(name, by_size=True)
        copy = self.folder / _MODEL
        there = [copy, *copy.rglob("[!.]*")] if self._has_hashes and os.path.lexists(copy) else []
        known = {self.folder / n for name in self._files for n in (name, *map(str, PurePath(name).parents))}
        if more := [path for path in there if path not in known]:
            raise CalibrationError(
                f"expected only files that calibration wrote, which a model is loaded from, got {more[0]}; "
                "remove it or calibrate again"
            )

    def _check_file(self, name: str, *, by_size: bool = False) -> None:
        path = self.folder / name
        try:
            if not self._has_hashes:
                check_file(path, "a file that calibration wrote", CalibrationError)
            elif name not in self._files:
                raise CalibrationError(f"expected {name} among the files that {self.folder} lists, got none")
            elif by_size:
                self._files[name].check_size(path, CalibrationError)
            else:
                self._files[name].check(path, CalibrationError)
        except CalibrationError as error:
            raise CalibrationError(f"{error}; calibrate again") from None

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
        copy = self.folder / _MODEL
        has_copy = any(map(_of_model, self._files)) if self._has_hashes else copy.is_dir()
        return str(copy) if has_copy else str(self.manifest["model"]["source"])

    def checked_model(self) -> str:
        """Return ``model_source``; the files of a dense copy have been read and are as they were written.

        Raises:
            CalibrationError: When one is not.
        """
        for name in filter(_of_model, self._files):
            self._check_file(name)
        return self.model_source

    def shape(self, part: str) -> tuple[int, int]:
        """Return how many sequences of how many tokens a part has."""
        described = self.manifest["parts"][part]
        return int(described["sequences"]), int(described["length"])

    def tokens(self, part: str, vocabulary: int | None = None) -> Tensor:
        """Return the token ids of a part, (sequences, tokens).

        Args:
            part: One of ``PARTS``.
            vocabulary: How many token ids the model has, all of which are below it.

        Raises:
            CalibrationError: When they are not those that the model was calibrated on.
        """
        with self._open(_TOKENS) as file:
            ids = self._tensor(file, _TOKENS, part, self.shape(part), "I32", None)
        least, most = ids.aminmax()
        if token_hash(ids) != self.manifest["parts"][part]["sha256"]:
            wrong = "others"
        elif least < 0 or (vocabulary is not None and most >= vocabulary):
            wrong = f"ids from {int(least)} to {int(most)}, and a vocabulary of {vocabulary}"
        else:
            return ids.long()
        raise CalibrationError(
            f"expected the tokens that the manifest names as {part} in {self.folder / _TOKENS}, got {wrong}; "
            "calibrate again"
        )

    def block(self, index: int, device: torch.device | str = "cpu") -> dict[int, LayerStatistics]:
        """Return the statistics of a block's layers by position of the layer in the model.

        Raises:
            CalibrationError: When a file cannot be read, was changed, or lacks what its layers need.
        """
        wanted = [i for i, layer in enumerate(self.layers) if layer.block == index]
        result: dict[int, LayerStatistics] = {}
        name = block_file(index)
        with self._open(name) as file:
            shared: dict[str, Tensor] = {}

            def read(tensor: str, shape: tuple[int, ...], least: float | None, dtype: str = "F32") -> Tensor:
                if tensor not in shared:  # layers that share a Gram matrix share its memory
                    shared[tensor] = self._tensor(file, name, tensor, shape, dtype, least).to(device)
                return shared[tensor]

            for i in wanted:
                layer, entry = self.layers[i], self.entries[i]
                gram, columns = f"gram{entry.gram}", layer.columns
                tokens = columns if entry.tokens is None else entry.tokens
                leaves = {
                    leaf: read(f"{gram}/{leaf}", (columns,), least).reshape(1, -1)
                    for leaf, least in _LEAST.items()
                }
                leaves["Y"] = read(f"{layer.name}/Y", (layer.rows,), 0).reshape(-1, 1)
                energy = read(f"{layer.name}/energy", (layer.rows,), None, "F64")
                result[i] = LayerStatistics(read(f"{gram}/H", (tokens, columns), None), energy, leaves)
        if self.manifest["gradients"]:
            name = gradient_file(index) if self._has_gradient_files else name
            with self._open(name) as file:
                for i in wanted:
                    layer = self.layers[i]
                    shape = (layer.rows, layer.columns)
                    gradient = self._tensor(file, name, f"{layer.name}/G", shape, "F32", 0)
                    result[i].leaves["G"] = gradient.to(device)
        return result

    @property
    def _has_gradient_files(self) -> bool:
        return bool(self.manifest["gradients"]) and int(self.manifest["format"]) > 2

    def _open(self, name: str) -> Any:
        self._check_file(name)
        try:
            return safe_open(self.folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CalibrationError(
                f"{self.folder / name} cannot be read ({error}); calibrate again"
            ) from None

    def _tensor(
        self, file: Any, name: str, tensor: str, shape: tuple[int, ...], dtype: str, least: float | None
    ) -> Tensor:
        """Return a tensor of an open file, finite, of this shape and type, and no number below the least.

        No memory is taken for one of another shape.

        Raises:
            CalibrationError: When it is another.
        """
        try:
            there = file.get_slice(tensor)
            kind, size = there.get_dtype(), tuple(there.get_shape())
            found: Tensor | None = file.get_tensor(tensor) if (kind, size) == (dtype, shape) else None
        except SafetensorError:
            wrong = "none"
        else:
            if found is None:
                wrong = f"{kind} {size}"
            elif found.numel() == 0:  # inputs that no token reached
                return found
            else:
                low, high = map(float, found.aminmax())
                if math.isfinite(low) and math.isfinite(high) and (least is None or low >= least):
                    return found
                wrong = f"numbers from {low:g} to {high:g}"
        at_least = "" if least is None else f", {least:g} or more"
        raise CalibrationError(
            f"expected finite {dtype} {shape}{at_least} as {tensor} in {self.folder / name}, got {wrong}; "
            "calibrate again"
        )


def _of_model(name: str) -> bool:
    return name.startswith(f"{_MODEL}/")
