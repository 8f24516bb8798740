"""Sensitivities: how KL changes with each layer's ratio, all of them from one backward pass.

A mask is a step function of its ratio, which has no derivative of use. With the edge of the mask blurred,
the model's output is smooth in the ratios, and what gradients flow back to them says which layers would
be pruned more cheaply. The relaxation is that of differentiable pruning thresholds (such as DSA, Ning et al.
2020, and BESA, Xu et al. 2024); here it serves a search: nothing is trained, and candidates are always
measured with whole masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..search.candidate import Candidate
from .decoder import Decoder
from .reference import Reference
from .shard import Shard

# Half of the blurred edge, as a share of the group. Against differences of KL over 2 to 15 points of ratio
# on SmolLM2-135M at 60 %, derivatives are right to a few percent.
BAND = 0.05
FORWARD_PASSES = 4  # what it costs: forwards, forwards again a block at a time, and backwards for two


def sensitivities(
    decoder: Decoder, shard: Shard, reference: Reference, candidate: Candidate
) -> tuple[float, ...]:
    """Return the change of KL with each layer's ratio, nats per token, (layers,) in model order.

    Of the forward pass no more than the hidden states before each block are kept; each block runs again
    on its way back, a batch at a time, so that a model needs the memory of one block's gradients on a batch.

    Raises:
        ScoreError: When scores are not finite.
    """
    states = [[batch.hidden for batch in reference.batches]]
    with torch.no_grad():
        for block in range(len(decoder.blocks)):
            weights, _ = shard.masked_weights(candidate, block)
            with decoder.with_weights(weights):
                after = [
                    decoder.run_block(block, batch, hidden)
                    for batch, hidden in zip(reference.batches, states[-1], strict=True)
                ]
            states.append(after)
    gradients = reference.gradients(decoder, states.pop())
    found = [0.0] * len(decoder.layers)
    for block in reversed(range(len(decoder.blocks))):
        ratios = {h.index: torch.tensor(candidate.ratios[h.index], device=decoder.device)
                  .requires_grad_(True) for h in shard.of_block(block)}  # fmt: skip
        with torch.enable_grad():
            blurred = shard.blurred_weights(candidate, block, ratios, BAND)
        before = []
        for batch, hidden, gradient in zip(reference.batches, states.pop(), gradients, strict=True):
            hidden = hidden.detach().requires_grad_(block > 0)
            with torch.enable_grad():
                output = decoder.run_block_with(block, batch, hidden, blurred)
            inputs: list[Tensor] = [*ratios.values(), *([hidden] if block else [])]
            # A layer without a part in the output, such as an expert that no token reached, has no gradient.
            result = torch.autograd.grad(output, inputs, gradient, retain_graph=True, allow_unused=True)
            for index, value in zip(ratios, result, strict=False):
                found[index] += 0.0 if value is None else float(value)
            if block:
                own = result[-1]
                before.append(torch.zeros_like(hidden) if own is None else own)
        gradients = before
    return tuple(found)
