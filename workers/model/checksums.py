"""Checksums: whether a model is still the one that something is known about, to the last weight."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
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
        blocks: Hash of each block's tensors, in order; empty for one that was not there.
        rest: Hash of those outside the blocks.
        config: What its configuration says.
    """

    blocks: tuple[str, ...]
    rest: str
    config: dict[str, Any]

    @classmethod
    def of(cls, decoder: Decoder) -> Checksums:
        """Return those of a model; of its blocks those that are held, one in memory at a time."""
        blocks = []
        for index, block in enumerate(decoder.blocks):
            if decoder.held is not None and index not in decoder.held:
                blocks.append("")
                continue
            with decoder.weights.of(index):
                blocks.append(_hash(block.state_dict()))
        place = f"{decoder.prefix}."
        rest = {name: t for name, t in decoder.model.state_dict().items() if not name.startswith(place)}
        config: Any = decoder.model.config
        says = _plain(config.to_dict())
        if type(config).__module__.startswith("transformers_modules"):
            says.pop("model_type", None)  # code that comes with a model may call itself what it likes
        return cls(tuple(blocks), _hash(rest), says)

    @classmethod
    def read(cls, given: Given) -> Checksums:
        """Return what a file says.

        Raises:
            SecateurError: When something is missing or of another type.
        """
        config = given.field("config")
        config.members()
        blocks = tuple(one.text() for one in given.field("blocks").entries())
        return cls(blocks, given.field("rest").text(), config.value)

    def other_in(self, found: Checksums) -> str:
        """Return what is other in a model that was found, in words; empty for nothing."""
        if len(self.blocks) != len(found.blocks):
            return "blocks"
        for index, (known, here) in enumerate(zip(self.blocks, found.blocks, strict=True)):
            if known and here and known != here:
                return f"weights in block {index}"
        if self.rest != found.rest:
            return "weights outside its blocks"
        name = _other(self.config, found.config)
        return f"{name} in its configuration" if name else ""


def _hash(tensors: Mapping[str, Any]) -> str:
    """Return a hash of tensors: their names, shapes, some values as they are, and a sum that has all."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):  # what a module keeps besides, whatever it is
            continue
        flat = tensor.detach().reshape(-1)
        total = torch.zeros((), dtype=torch.int64, device=flat.device)
        for piece in flat.split(_PIECE):
            total += _bits(piece).sum(dtype=torch.int64)
        some = _bits(flat[:: max(1, flat.numel() // 64)])
        found.update(f"{name} {tuple(tensor.shape)} {int(total)} {some.tolist()}\n".encode())
    return found.hexdigest()


def _bits(tensor: Tensor) -> Tensor:
    """Return numbers that are alike in whatever floating type a model is loaded."""
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
