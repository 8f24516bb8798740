"""Sensitivities: how KL changes with each layer's ratio, all of them from one backward pass.

A mask is a step function of its ratio, which has no derivative of use. Under a mask with a soft edge,
the model's output is smooth in the ratios, and what gradients flow back to them says which layers would
be pruned more cheaply. The relaxation is that of differentiable pruning thresholds (such as DSA, Ning et al.
2020, and BESA, Xu et al. 2024); here it serves a search: nothing is trained, and candidates are always
measured with whole masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...search.core.candidate import Candidate
from ..model.block_calls import Batch
from ..model.decoder import Decoder
from .shard import Shard

# Half of the soft edge, as a share of the group. Against differences of KL over 2 to 15 points of ratio
# on SmolLM2-135M at 60 %, derivatives are right to a few percent.
EDGE_HALF_WIDTH = 0.05
FORWARD_PASSES = 4  # what it costs: forwards, forwards again a block at a time, and backwards for two


def slopes_of_blocks(
    decoder: Decoder,
    shard: Shard,
    candidate: Candidate,
    blocks: range,
    batches: Sequence[Batch],
    entering: Sequence[Tensor],
    gradients_of: Callable[[list[Tensor]], list[Tensor]],
) -> tuple[dict[int, float], list[Tensor]]:
    """Return the change of KL with the ratio of each layer of some blocks, nats per token, by position.

    Of the forward pass no more than the hidden states before each block are kept; each block runs again
    on its way back, a batch at a time, so that a model needs the memory of one block's gradients on a batch.

    Args:
        decoder: The dense model.
        shard: Holds the blocks.
        candidate: How they are pruned.
        blocks: The blocks, next to each other.
        batches: The tokens.
        entering: Hidden states before the blocks, a batch each.
        gradients_of: Gives the gradient of kl by the hidden states behind the blocks, a batch each.

    Returns:
        The slopes, and the gradient by the hidden states before the blocks (none before the first).

    Raises:
        ScoreError: When scores are not finite.
    """
    states = [list(entering)]
    with torch.no_grad():
        for block in blocks:
            weights, _ = shard.masked_weights(candidate, block)
            with decoder.with_weights(weights):
                after = [
                    decoder.run_block(block, batch, hidden)
                    for batch, hidden in zip(batches, states[-1], strict=True)
                ]
            states.append(after)
    gradients = gradients_of(states.pop())
    found: dict[int, float] = {}
    for block in reversed(blocks):
        ratios = {h.index: torch.tensor(candidate.ratios[h.index], device=decoder.device)
                  .requires_grad_(True) for h in shard.of_block(block)}  # fmt: skip
        with torch.enable_grad():
            soft = shard.soft_weights(candidate, block, ratios, EDGE_HALF_WIDTH)
        before = []
        found.update(dict.fromkeys(ratios, 0.0))
        for batch, hidden, gradient in zip(batches, states.pop(), gradients, strict=True):
            hidden = hidden.detach().requires_grad_(block > 0)
            with torch.enable_grad():
                output = decoder.run_block_with(block, batch, hidden, soft)
            inputs: list[Tensor] = [*ratios.values(), *([hidden] if block else [])]
            if not inputs:  # a first block without layers
                continue
            # A layer without a part in the output, such as an expert that no token reached, has no gradient.
            result = torch.autograd.grad(output, inputs, gradient, retain_graph=True, allow_unused=True)
            for index, value in zip(ratios, result, strict=False):
                found[index] += 0.0 if value is None else float(value)
            if block:
                own = result[-1]
                before.append(torch.zeros_like(hidden) if own is None else own)
        gradients = before
    return found, gradients
