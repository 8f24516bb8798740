"""Outlines: the sizes of a model and of its calibration, without a weight of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...search.core.candidate import Layer
from ..calibrate.input_statistics import NEVER_CALLED, Observer
from ..model.decoder import Decoder
from ..model.errors import ModelError
from ..model.load import check_length, model_of_config

_LEAVES_OF_COLUMNS = 4  # X, M, V and D
_BYTES_OF_ROW = 8 + 4  # energy and Y


@dataclass(frozen=True)
class Outline:
    """What a plan has to know of a model.

    Attributes:
        layers: The prunable layers in model order.
        kept: For each, the rows of what is kept of its inputs: as many as columns for a Gram matrix, fewer
            for tokens.
        weights: Parameters of each block, prunable or not.
        active: Of these, what a token is multiplied with.
        statistics: Bytes of each block's statistics, on disk and on a worker.
        inputs: How many inputs feed the layers, and how many of them are kept as tokens.
        outside: Parameters outside the blocks, of which all workers have a copy.
        vocabulary: Tokens that the model tells apart.
        width: Length of a hidden state.
    """

    layers: Sequence[Layer]
    kept: Sequence[int]
    weights: Sequence[int]
    active: Sequence[float]
    statistics: Sequence[int]
    inputs: tuple[int, int]
    outside: int
    vocabulary: int
    width: int

    @property
    def size(self) -> int:
        """All parameters."""
        return sum(self.weights) + self.outside


def outline(
    source: str, *, tokens: int, length: int, gradients: bool, trust_remote_code: bool = False
) -> Outline:
    """Return the outline of a model and of its calibration.

    The model runs on tensors without data, and is observed as calibration does it.

    Args:
        source: As for ``model_of_config``.
        tokens: Tokens of statistics, a multiple of ``length``.
        length: Tokens per sequence.
        gradients: Whether the leaf G is calibrated.
        trust_remote_code: Allow code that comes with the model.

    Raises:
        ModelError: When the configuration cannot be read or the model cannot be measured.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    # What cannot run is said in one sentence, and not by torch.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with FakeTensorMode(), torch.no_grad():
        # Sizes are counted, and all kernels take this type.
        model = model_of_config(source, torch.bfloat16, trust_remote_code=trust_remote_code)
        check_length(model, length)
        try:
            return _observed(model, torch.zeros(tokens // length, length, dtype=torch.long), gradients)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"expected a model whose blocks run on tensors without data, got one that does not: {reason}"
            ) from error


def _observed(model: nn.Module, ids: torch.Tensor, gradients: bool) -> Outline:
    decoder = Decoder(model)
    share = _share_of_experts(model.config)
    batch = decoder.enter(ids)
    known: dict[str, list[tuple[list[int], torch.Size]]] = {}
    kept = {layer.name: 0 for layer in decoder.layers}
    uncalled: dict[str, str] = {}
    statistics, active, shared = [], [], []
    for index, block in enumerate(decoder.blocks):
        own = [i for i, layer in enumerate(decoder.layers) if layer.block == index]
        alike = f"{block} {len(own)}"
        if alike not in known:  # most models have one kind of block, or two
            observer = Observer({place: decoder.modules[i] for place, i in enumerate(own)})
            with observer.watching():
                decoder.run_block(index, batch, batch.hidden)
            found = observer.finish(inverse=False, without=observer.uncalled)
            known[alike] = [(members, s["H"].shape) for members, s in found]
        size = 0
        called = {own[place] for members, _ in known[alike] for place in members}
        uncalled |= {decoder.layers[i].name: NEVER_CALLED for i in own if i not in called}
        for members, (rows, columns) in known[alike]:
            shared.append(rows < columns)
            size += 4 * (rows + _LEAVES_OF_COLUMNS) * columns
            for i in (own[place] for place in members):
                layer = decoder.layers[i]
                kept[layer.name] = rows
                size += _BYTES_OF_ROW * layer.rows + (4 * layer.size if gradients else 0)
        statistics.append(size)
        prunable = sum(decoder.layers[i].size for i in called)
        active.append(prunable + share * (sum(p.numel() for p in block.parameters()) - prunable))
    decoder.leave_dense(uncalled)
    weights = [sum(p.numel() for p in block.parameters()) for block in decoder.blocks]
    head = model.get_output_embeddings()  # type: ignore[operator]
    outside = sum(p.numel() for p in model.parameters()) - sum(weights)
    return Outline(
        decoder.layers, [kept[layer.name] for layer in decoder.layers], weights, active, statistics,
        (len(shared), sum(shared)), outside,
        head.weight.shape[0], batch.hidden.shape[-1],
    )  # fmt: skip


def _share_of_experts(config: object) -> float:
    """Return which part of the weights that stay dense a token meets, by what configurations call it."""
    for total in ("num_local_experts", "num_experts", "n_routed_experts"):
        count = getattr(config, total, None)
        chosen = getattr(config, "num_experts_per_tok", None)
        if isinstance(count, int) and isinstance(chosen, int) and count:
            return chosen / count
    return 1.0
