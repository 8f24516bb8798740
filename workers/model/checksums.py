"""Checksums: whether a model is still the one that something is known about, to the last weight."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...search.core.reading import Given
from .decoder import Decoder

_PIECE = 1 << 22  # weights that are looked at together
# What a configuration says of files, training and generation: the model computes the same with another.
_OF_NO_EFFECT = re.compile(
    r"^_|dtype$|version$|architectures$|auto_map$|name_or_path$|quantization|_token_id$|label|use_cache$"
    r"|^(output|return)_|initializer|dropout"
)


@dataclass(frozen=True)
class Checksums:
    """What tells a model from others of the same layers.

    Attributes:
        dtype: The floating type that it was loaded in.
        exact: Hash of all bits of each block's tensors, in order, and of those outside the blocks; empty for
            a block that was not there.
        rounded: The same of what is alike in whatever floating type a model is loaded.
        config: What its configuration says.
    """

    dtype: str
    exact: tuple[str, ...]
    rounded: tuple[str, ...]
    config: dict[str, Any]

    @classmethod
    def of(cls, decoder: Decoder, known: Checksums | None = None) -> Checksums:
        """Return those of a model; of its blocks those that are held, one in memory at a time.

        Args:
            decoder: The model.
            known: What they are to be compared with, of which one kind will do; both are made if left out.
        """
        model: Any = decoder.model
        dtype = str(model.dtype).removeprefix("torch.")
        kinds = {"exact": _all_bits, "rounded": _rounded}
        if known is not None:
            del kinds["rounded" if known.dtype == dtype else "exact"]
        made: dict[str, list[str]] = {"exact": [], "rounded": []}
        for index, block in enumerate(decoder.blocks):
            is_held = decoder.held is None or index in decoder.held
            with decoder.weights.of(index) if is_held else nullcontext():
                for name, kind in kinds.items():
                    made[name].append(_hash(block.state_dict(), kind) if is_held else "")
        place = f"{decoder.prefix}."
        rest = {name: t for name, t in decoder.model.state_dict().items() if not name.startswith(place)}
        for name, kind in kinds.items():
            made[name].append(_hash(rest, kind))
        config: Any = decoder.model.config
        says = _plain(config.to_dict())
        if type(config).__module__.startswith("transformers_modules"):
            says.pop("model_type", None)  # code that comes with a model may call itself what it likes
        return cls(dtype, tuple(made["exact"]), tuple(made["rounded"]), says)

    @classmethod
    def read(cls, given: Given) -> Checksums:
        """Return what a file says.

        Raises:
            SecateurError: When something is missing or of another type.
        """
        config = given.field("config")
        config.members()
        exact, rounded = (
            tuple(one.text() for one in given.field(name).entries()) for name in ("exact", "rounded")
        )
        return cls(given.field("dtype").text(), exact, rounded, config.value)

    def other_in(self, found: Checksums) -> str:
        """Return what is other in a model that was found, in words; empty for nothing."""
        mine, there = (
            (self.exact, found.exact) if self.dtype == found.dtype else (self.rounded, found.rounded)
        )
        if len(mine) != len(there):
            return "blocks"
        for index, (known, here) in enumerate(zip(mine, there, strict=True)):
            if known and here and known != here:
                return f"weights in block {index}" if index < len(mine) - 1 else "weights outside its blocks"
        name = _other(self.config, found.config)
        return f"{name} in its configuration" if name else ""


def _hash(tensors: Mapping[str, Any], kind: Callable[[Tensor], bytes]) -> str:
    """Return a hash of tensors: their names, shapes and contents."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):  # a module may keep other things besides
            found.update(f"{name} {tuple(tensor.shape)}\n".encode())
            found.update(kind(tensor.detach()))
    return found.hexdigest()


def _all_bits(tensor: Tensor) -> bytes:
    """Return the hash of all that a tensor holds."""
    found = hashlib.sha256()
    for piece in tensor.reshape(-1).split(_PIECE):
        found.update(piece.contiguous().view(torch.uint8).cpu().numpy().data)
    return found.digest()


def _rounded(tensor: Tensor) -> bytes:
    """Return some values, rounded to the coarsest type that models are loaded in, and the sum of all."""
    flat = tensor.reshape(-1)
    total = sum(int(_bits(piece).sum(dtype=torch.int64)) for piece in flat.split(_PIECE))
    return f"{total} {_bits(flat[:: max(1, flat.numel() // 64)]).tolist()}".encode()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().view(torch.int16) if tensor.is_floating_point() else tensor


def _plain(value: Any) -> Any:
    """Return what of a configuration has an effect, as JSON has it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if not _OF_NO_EFFECT.search(str(k))}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def _other(known: Any, found: Any) -> str:
    """Return the name of what differs; what only one release of transformers knows does not."""
    for name in known.keys() & found.keys() if isinstance(known, dict) and isinstance(found, dict) else ():
        if inner := _other(known[name], found[name]):
            return name if inner == "." else f"{name}.{inner}"
    return "" if known == found or (isinstance(known, dict) and isinstance(found, dict)) else "."
