"""The pruned model's folder: an ordinary checkpoint with zeros, and ``secateur.json`` beside it.

A folder appears whole or not at all: it is written under another name, read back, brought to the disk and
renamed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..search.candidate import parse_pattern
from .decoder import Decoder, oriented, weight_of
from .model import save_dense_copy
from .pruning import PrunedLayer
from .statistics import make_readable

RECORD = "secateur.json"


class CheckpointError(ValueError):
    """A folder that cannot be written, or that does not hold what was meant."""


def check_new(out: str | Path) -> Path:
    """Return the path of a folder that can be written.

    Raises:
        CheckpointError: When it exists and is not empty, or there is no right to make it.
    """
    target = Path(out).expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(
            f"expected a new or empty folder, got {target}, which exists; choose another --out"
        )
    place = next(p for p in target.absolute().parents if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise CheckpointError(f"expected a folder that can be written for --out, got {target}")
    return target


def write_checkpoint(
    out: str | Path,
    decoder: Decoder,
    tokenizer: Any,
    layers: Sequence[PrunedLayer],
    record: dict[str, Any],
    *,
    from_gguf: bool = False,
) -> dict[str, Any]:
    """Write a pruned model as a folder that transformers loads, and return its record with sizes.

    Args:
        out: The folder to write, new or empty.
        decoder: The pruned model.
        tokenizer: Its tokenizer.
        layers: What was done to its layers, in model order.
        record: What ``secateur.json`` says of where the model comes from.
        from_gguf: Whether the weights were read from a ``.gguf`` file.

    Raises:
        CheckpointError: When the folder is taken, or what was written is not what is in memory.
        OSError: When the disk is full or fails; nothing is left behind.
    """
    target = check_new(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        if from_gguf:
            save_dense_copy(decoder.model, tokenizer, partial)
        else:
            decoder.model.save_pretrained(partial)  # type: ignore[operator]
            tokenizer.save_pretrained(partial)
        read_back = _check_written(partial, decoder, layers, str(record["pattern"]))
        whole = {**record, **_sizes(partial, decoder, layers), "read_back": read_back}
        (partial / RECORD).write_text(json.dumps(whole, indent=1) + "\n")
        make_readable(partial)
        for path in (*partial.rglob("*"), partial):
            _to_disk(path)
        partial.rename(target)
        _to_disk(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return whole


def _check_written(folder: Path, decoder: Decoder, layers: Sequence[PrunedLayer], pattern: str) -> int:
    """Check layers as they stand in the files; return how many were found there under their own names."""
    counts = parse_pattern(pattern)
    found = 0
    wanted = {f"{p.layer.name}.weight": m for p, m in zip(layers, decoder.modules, strict=True)}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in set(file.keys()) & set(wanted):
                module, stored = wanted[name], file.get_tensor(name)
                found += 1
                if not torch.equal(stored, weight_of(module).data.cpu()):
                    raise CheckpointError(f"{name} was not written to {path.name} as it is in memory")
                if counts and not _has_pattern(oriented(module, stored), *counts):
                    raise CheckpointError(
                        f"expected {counts[0]} zeros in each group of {counts[1]} inputs, got fewer in {name}"
                    )
    return found


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


def _to_disk(path: Path) -> None:
    """Wait until the disk has what was written to a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
