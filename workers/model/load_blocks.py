"""Decoders loaded whole, block by block, or in part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .decoder import Decoder
from .load import empty_model, load_model
from .weights import WeightFiles, fill


def decoder_in_files(
    source: str, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False
) -> tuple[Decoder, Any] | None:
    """Return a decoder whose blocks are read when they run, and its tokenizer.

    Returns:
        None where the model's files do not hold its blocks as it has them, and for code that comes with it.

    Raises:
        ModelError: When there is no such model, or a file or tensor is missing or not the model's.
    """
    found = empty_model(source, dtype, trust_remote_code=trust_remote_code)
    if found is None:
        return None
    model, tokenizer, paths = found
    decoder = Decoder(model)
    weights = fill(model, decoder.blocks, decoder.prefix, WeightFiles(paths), device)
    if weights is None:
        return None
    decoder.weights = weights
    return decoder, tokenizer


def load_blocks(
    source: str, blocks: range | None, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool
) -> Decoder:
    """Return a decoder that holds some blocks next to each other, all for None.

    No others are read where the model's files hold them as it has them; elsewhere the whole model passes
    through the CPU's memory, never through a GPU's. What lies outside the blocks is always held.

    Raises:
        ModelError: When the model cannot be loaded.
    """
    if blocks is None:
        model, _ = load_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return Decoder(model)
    found = decoder_in_files(source, dtype, device, trust_remote_code=trust_remote_code)
    if found is not None:
        decoder, _ = found
        decoder.weights.keep(blocks)
    else:
        model, _ = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code)
        decoder = Decoder(model)
        for index, block in enumerate(decoder.blocks):
            for module in block.modules() if index not in blocks else ():
                for name, weight in module._parameters.items():
                    if weight is not None:
                        module._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)
        decoder.model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    decoder.held = blocks
    return decoder
