"""Masks as packed bits in a safetensors file: one bit per weight, 1 for what is kept.

Each layer is a tensor uint8 (rows, ceil(columns / 8)); bits are little-endian within a byte, so column 0 is
the lowest bit of the first byte, and the bits after the last column are 0. The file's metadata has one entry,
``secateur``: JSON with the columns of each layer and where the masks come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...search.core.reading import check_file, parse_json
from .candidate_record import CandidateRecord, ExportError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "secateur.masks"
VERSION = 1


def write_masks(record: CandidateRecord, masks: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write the masks of a candidate.

    Args:
        record: The candidate.
        masks: Each layer's name and which of its weights are kept, (rows, columns) bool.
        path: The file.

    Raises:
        ExportError: When the masks are not those of the record's layers.
    """
    from safetensors.numpy import save_file

    wanted = {layer.name: (layer.rows, layer.columns) for layer in record.layers}
    packed: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
    removed = 0
    for name, kept in masks:
        if wanted.get(name) != tuple(kept.shape):
            raise ExportError(f"expected a mask of {wanted.get(name)} for {name}, got {tuple(kept.shape)}")
        removed += kept.numel() - int(kept.count_nonzero())
        packed[name] = np.packbits(kept.cpu().numpy(), axis=1, bitorder="little")
    if len(packed) != len(wanted):
        raise ExportError(f"expected the masks of {len(wanted)} layers, got {len(packed)}")
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "columns": {layer.name: layer.columns for layer in record.layers},
        "key": record.candidate.key,
        "metric": str(record.candidate.metric),
        "pattern": record.pattern,
        "group": record.candidate.group,
        "sparsity": removed / sum(layer.size for layer in record.layers),
        "calibration": record.provenance.get("calibration"),
        **({"plugins": record.needed_plugins} if record.needed_plugins else {}),
    }
    # One entry, for safetensors writes several in an order that changes from file to file.
    save_file(packed, path, {"secateur": json.dumps(metadata)})


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """Return which weights of each layer are kept, (rows, columns) bool, by layer name.

    Raises:
        ExportError: When the file holds no masks of ours.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    check_file(Path(path), "a file of masks", ExportError)
    try:
        with safe_open(path, framework="np") as file:
            given = parse_json(
                (file.metadata() or {}).get("secateur", "{}"), f"metadata of {path}", ExportError
            )
            version = given.field("version", 0)
            if given.field("format", "").value != FORMAT or version.count() != VERSION:
                raise ExportError(f"expected a file of {FORMAT}, version {VERSION}, got {path} without it")
            found = {}
            for name, columns in given.field("columns").members().items():
                stored, count = file.get_slice(name), columns.count(1)
                shape = stored.get_shape()  # before memory is taken for it
                if stored.get_dtype() != "U8" or len(shape) != 2 or shape[1] != -(-count // 8):
                    what = f"{stored.get_dtype()} {tuple(shape)}"
                    raise ExportError(f"expected bits of {count} columns for {name}, got {what} in {path}")
                packed = file.get_tensor(name)
                bits = np.unpackbits(packed, axis=1, count=count, bitorder="little")
                found[name] = torch.from_numpy(bits.astype(bool))
            return found
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} cannot be read as masks: {error}") from None


def _stored(module: Any, name: str, kept: Any, model: Any) -> Tensor:
    """Return a mask as its layer stores the weight.

    Raises:
        ExportError: When there is no such layer or mask, or they do not fit.
    """
    import torch

    if module is None:
        raise ExportError(f"expected a model with the layer {name}, got {type(model).__name__} without it")
    if not isinstance(kept, torch.Tensor) or kept.dtype != torch.bool or kept.ndim != 2:
        what = f"{kept.dtype} {tuple(kept.shape)}" if isinstance(kept, torch.Tensor) else type(kept).__name__
        raise ExportError(f"expected a mask of torch.bool (rows, columns) for {name}, got {what}")
    # Pruned once already, the dense weight is another parameter.
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight", own.get("weight_orig"))
    if weight is None or not weight.is_floating_point():
        raise ExportError(f"expected a layer with a weight of its own at {name}, got {type(module).__name__}")
    # GPT-2's Conv1D stores its weight transposed.
    mask = kept.T if type(module).__name__ == "Conv1D" else kept
    if weight.shape != mask.shape:
        raise ExportError(f"expected a weight of {tuple(mask.shape)} in {name}, got {tuple(weight.shape)}")
    return mask


def apply_masks(model: Any, masks: Mapping[str, Tensor]) -> None:
    """Prune the layers of a torch model in place, through ``torch.nn.utils.prune.custom_from_mask``.

    The dense weights stay in ``weight_orig`` until ``torch.nn.utils.prune.remove`` makes the zeros permanent.

    Args:
        model: A ``torch.nn.Module`` with the layers that the masks name.
        masks: Which weights are kept, (rows, columns) = (outputs, inputs) bool, by layer name.

    Raises:
        ExportError: When the model lacks a layer or has one of another shape, or a mask is none; nothing is
            pruned.
    """
    from torch.nn.utils import prune

    modules = dict(model.named_modules())
    stored = {name: _stored(modules.get(name), name, kept, model) for name, kept in masks.items()}
    for name, mask in stored.items():
        weight = modules[name].weight
        prune.custom_from_mask(modules[name], "weight", mask.to(weight.device, weight.dtype))
