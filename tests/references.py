"""Published procedures written down plainly, to compare with."""

import contextlib

import torch
from torch import nn


def linear_layers(block):
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def matrix(module):
    weight = module.weight.data
    return weight.T if type(module).__name__ == "Conv1D" else weight


class _CaughtError(Exception):
    pass


def wanda_reference(model, blocks, sequences, ratio):
    """Prune as Wanda's release does, sequence by sequence with hooks; return the zeros, block by block.

    Its running mean of squared norms is kept in double precision, for two ways to add up floats would order
    near ties differently.
    """
    caught = []

    def catch(_module, args, kwargs):
        caught.append((args, kwargs))
        raise _CaughtError

    hook = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sequence in sequences:
        with contextlib.suppress(_CaughtError):
            model(input_ids=sequence[None], use_cache=False)
    hook.remove()
    inputs = [args[0] for args, _ in caught]

    def run(block, j):
        args, kwargs = caught[j]
        output = block(inputs[j], *args[1:], **kwargs)
        return output[0] if isinstance(output, tuple) else output

    zeros = []
    for block in blocks:
        layers = linear_layers(block)
        squares = {name: torch.zeros(matrix(m).shape[1], dtype=torch.float64) for name, m in layers.items()}
        seen = dict.fromkeys(layers, 0)

        def add(name, x, squares=squares, seen=seen):
            norm = x.reshape(-1, x.shape[-1]).double().square().sum(0)
            squares[name] = (squares[name] * seen[name] + norm) / (seen[name] + 1)
            seen[name] += 1

        hooks = [
            m.register_forward_hook(lambda _m, args, _out, name=name, add=add: add(name, args[0]))
            for name, m in layers.items()
        ]
        for j in range(len(inputs)):
            run(block, j)
        for hook in hooks:
            hook.remove()
        found = {}
        for name, module in layers.items():
            weights = matrix(module)
            scores = weights.abs() * squares[name].sqrt().float()[None]
            order = scores.sort(dim=1, stable=True).indices[:, : int(weights.shape[1] * ratio)]
            found[name] = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, order, True)
            weights[found[name]] = 0
        zeros.append(found)
        inputs = [run(block, j) for j in range(len(inputs))]
    return zeros


def surgeon(weights, removed, gram):
    """Optimal brain surgery column by column, each with the inverse of what is left of H, in 64 bits."""
    w, h = weights.double().clone(), gram.double().clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        error = w[:, j] * removed[:, j] / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0][None]
        w[removed[:, j], j] = 0
    return w


def sparsegpt_reference(weights, removed, gram, block=128):
    """Update weights as SparseGPT's release does, rows by columns in blocks, under a given mask."""
    w, h = weights.clone(), gram.clone()
    columns = w.shape[1]
    diagonal = torch.arange(columns)
    h[diagonal, diagonal] += 0.01 * torch.diag(h).mean()
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        w1, u1 = w[:, first:last].clone(), inverse[first:last, first:last]
        q1, errors = torch.zeros_like(w1), torch.zeros_like(w1)
        for i in range(last - first):
            q = w1[:, i].clone()
            q[removed[:, first + i]] = 0
            q1[:, i] = q
            error = (w1[:, i] - q) / u1[i, i]
            w1[:, i:] -= error[:, None] @ u1[i, i:][None]
            errors[:, i] = error
        w[:, first:last] = q1
        w[:, last:] -= errors @ inverse[first:last, last:]
    return w
