"""The pruned model's folder: an ordinary checkpoint with zeros, and ``secateur.json`` beside it.

A folder appears whole or not at all: it is written under another name, read back as its user will read it,
brought to the disk and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...metrics_dsl.errors import SecateurError
from ...search.core.candidate import parse_pattern
from ...search.core.files import Output, check_place, whole
from ..model.decoder import Decoder, oriented, weight_matrix, weight_of
from ..model.errors import ModelError, transformers_writing
from ..model.weights import WeightFiles
from .pruning import PrunedLayer
from .read_back import Sample

RECORD = "secateur.json"
_SHARD_BYTES = 1 << 27  # small blocks are gathered until they are so many, to be one file


class CheckpointError(SecateurError):
    """A folder that cannot be written, or that does not hold what was meant."""


_FOLDER = Output("a new or empty folder", over_empty=True, is_lasting=True, error=CheckpointError)


def check_new(out: str | Path) -> Path:
    """Return the path of a folder that can be written.

    Raises:
        CheckpointError: When it exists and is not empty, or there is no right to make it.
    """
    target = check_place(out, _FOLDER)
    place = next(p for p in target.parents if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise CheckpointError(f"expected a folder that can be written for --out, got {target}")
    return target


class Checkpoint:
    """A pruned model's folder while it is written, under another name until ``finish`` gives it its own.

    A model that is read block by block is written so too, in shards of one block or several; transformers
    writes a model that is held in memory. Left without ``finish``, nothing stays behind.

    Args:
        out: The folder to write, new or empty.
        decoder: The model.
        pattern: What its layers must have once they are pruned, ``unstructured`` or ``N:M``.
        dtype: Floating type to write; that of the model in memory if left out.

    Raises:
        CheckpointError: When the folder is taken.
    """

    def __init__(
        self, out: str | Path, decoder: Decoder, pattern: str, dtype: torch.dtype | None = None
    ) -> None:
        self._target = check_new(out)
        self._opened = ExitStack()
        self._decoder = decoder
        self._counts = parse_pattern(pattern)
        self._dtype = dtype
        names = (f"{layer.name}.weight" for layer in decoder.layers)
        self._modules = dict(zip(names, decoder.modules, strict=True))
        self._waiting: dict[str, Tensor] = {}  # of pruned blocks, for the next shard
        self._shards: list[tuple[Path, dict[str, int]]] = []  # with the bytes of each tensor in it
        self._read_back = 0

    def __enter__(self) -> Checkpoint:
        self._partial = self._opened.enter_context(whole(self._target, _FOLDER))
        self._partial.mkdir()
        self._sample = Sample(self._decoder)
        return self

    def __exit__(self, *raised: Any) -> None:
        if raised[0] is None:  # left without ``finish`` is as if something had gone wrong
            raised = GeneratorExit, GeneratorExit(), None
        self._opened.__exit__(*raised)

    def add(self, block: int, layers: Sequence[PrunedLayer]) -> list[PrunedLayer]:
        """Bring a pruned block, whose weights are in memory, to the type that is written.

        Returns:
            What was done to its layers, with the zeros that they have in that type.

        Raises:
            CheckpointError: When a shard is full and what was written of it is not what is in memory.
        """
        module = self._decoder.blocks[block]
        place, pruned = f"{self._decoder.prefix}.{block}.", {f"{p.layer.name}.weight" for p in layers}
        for name in [name for name in self._modules if name.startswith(place) and name not in pruned]:
            del self._modules[name]  # it stayed dense
        self._sample.run(block)
        if self._dtype is not None:  # zeros stay zeros in any type, and the smallest weights may join them
            module.to(self._dtype)
        if self._decoder.weights.in_files:
            name = f"{self._decoder.prefix}.{block}"
            own = {f"{name}.{tensor}": value.cpu() for tensor, value in module.state_dict().items()}
            self._waiting |= own
            if _bytes(self._waiting) + _bytes(own) > _SHARD_BYTES:  # with another such block
                path = self._partial / f"{len(self._shards) + 1}.safetensors"
                save_file(self._waiting, path, metadata={"format": "pt"})
                self._shards.append((path, self._check(path, self._waiting)))
                self._waiting = {}
        zeros = (int((weight_matrix(self._modules[f"{p.layer.name}.weight"]) == 0).sum()) for p in layers)
        return [replace(p, zeros=count) for p, count in zip(layers, zeros, strict=True)]

    def finish(
        self,
        tokenizer: Any,
        layers: Sequence[PrunedLayer],
        record: dict[str, Any],
        *,
        beside: Sequence[Path] = (),
        trust_remote_code: bool = False,
    ) -> dict[str, Any]:
        """Write what is not written yet, read it back, give the folder its name and return its record.

        The model in memory may lose its weights: it is not needed any more.

        Args:
            tokenizer: The model's tokenizer.
            layers: What was done to its layers, in model order.
            record: What ``secateur.json`` says of where the model comes from.
            beside: Files of the dense model that go with the pruned one as they are.
            trust_remote_code: Allow code that comes with the model.

        Raises:
            CheckpointError: When what was written is not what is in memory, or does not load as that.
            ModelError: When transformers cannot write the model.
            OSError: When the disk is full or fails.
        """
        partial = self._partial
        model: Any = self._decoder.model
        expected = self._sample.logits()
        if self._dtype is not None:
            model.to(self._dtype)
        if self._decoder.weights.in_files:
            self._save_rest(model)
        else:
            with transformers_writing():
                model.save_pretrained(partial)
            weights = {name: weight_of(module).data for name, module in self._modules.items()}
            for path in partial.glob("*.safetensors"):
                self._check(path, weights)
        with transformers_writing():
            tokenizer.save_pretrained(partial)
        for path in beside:
            shutil.copyfile(path, partial / path.name)
        sizes = _sizes(partial, self._decoder, layers)
        written = weight_of(self._decoder.modules[0]).dtype if self._dtype is None else self._dtype
        try:
            compared = self._sample.compare(partial, expected, written, trust_remote_code=trust_remote_code)
        except ModelError as error:
            reason = str(error).replace(str(partial), str(self._target))
            raise CheckpointError(f"what was written does not load, so nothing is kept: {reason}") from None
        said = {**record, **sizes, "read_back": self._read_back, "loaded_back": compared}
        (partial / RECORD).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        self._opened.close()
        return said

    def _save_rest(self, model: Any) -> None:
        """Write what lies outside the blocks with what waits; give the shards their names."""
        blocks = f"{self._decoder.prefix}."
        rest = {name: t for name, t in model.state_dict().items() if not name.startswith(blocks)}
        rest |= self._waiting
        # transformers would give tensors the names that it knows from older files, but those of this model
        # have the names of its files.
        with transformers_writing():
            model.save_pretrained(self._partial, state_dict=dict(rest), save_original_format=False)
        last = self._partial / "model.safetensors"
        self._shards.append((last, self._check(last, rest)))
        count = len(self._shards)
        if count == 1:
            return
        where: dict[str, str] = {}
        for number, (path, sizes) in enumerate(self._shards, 1):
            name = f"model-{number:05}-of-{count:05}.safetensors"
            path.rename(path.with_name(name))
            where |= dict.fromkeys(sizes, name)
        total = sum(sum(sizes.values()) for _, sizes in self._shards)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (self._partial / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=1) + "\n", encoding="utf-8"
        )

    def _check(self, path: Path, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Check weights as they stand in a file, where they do; return the bytes of each of its tensors.

        Raises:
            CheckpointError: When they are others, or lack the pattern.
        """
        sizes = {}
        files = WeightFiles([path])
        for name in files.shapes:
            stored, module = files.stored(name), self._modules.get(name)
            sizes[name] = stored.nbytes
            if name not in weights:
                continue
            if not torch.equal(stored, weights[name].cpu()):
                raise CheckpointError(f"{name} was not written to {path.name} as it is in memory")
            if module is None:
                continue
            self._read_back += 1
            if self._counts and not _has_pattern(oriented(module, stored), *self._counts):
                raise CheckpointError(
                    f"expected {self._counts[0]} zeros in each group of {self._counts[1]} inputs, got fewer "
                    f"in {name}"
                )
        return sizes


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _has_pattern(weights: Tensor, n: int, m: int) -> bool:
    """Return whether every m consecutive inputs have at least n zeros."""
    rows, columns = weights.shape
    return bool(((weights.reshape(rows, columns // m, m) == 0).sum(-1) >= n).all())


def _sizes(folder: Path, decoder: Decoder, layers: Sequence[PrunedLayer]) -> dict[str, Any]:
    """Return the achieved sparsity and sizes in bytes.

    The packed size is what a bitmask and the kept values of the pruned layers would take, and the rest as it
    is: no file of that size is written.
    """
    dense = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    width = weight_of(decoder.modules[0]).element_size()
    weights = sum(p.layer.size for p in layers)
    zeros = sum(p.zeros for p in layers)
    saved = zeros * width - sum(-(-p.layer.size // 8) for p in layers)
    return {
        "zeros": zeros, "prunable_weights": weights, "sparsity": zeros / weights, "dense_bytes": dense,
        "theoretical_packed_bytes": dense - saved,
    }  # fmt: skip
