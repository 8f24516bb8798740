"""Masks: which weights are removed, given scores, a ratio and the group that competes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.order import GROUPS
from ...search.core.candidate import group_size, parse_pattern, removed_of

_GATHER = sum(1 << 9 * i for i in range(8)) - (1 << 64)  # as a signed number of 64 bits


def removed(scores: Tensor, ratio: float, group: str, pattern: str = "unstructured") -> Tensor:
    """Return which weights to remove, (rows, columns) bool: those with the smallest scores.

    As many as ``count_removed`` says: of each row for the group ``row``, of all for the group ``layer``, and
    N of every M consecutive columns for a pattern ``N:M`` (columns that do not fill a last group of M stay).
    Of equal scores the one that comes first is removed.

    Args:
        scores: (rows, columns), finite.
        ratio: Fraction to remove, in [0, 1). For a pattern it is N / M.
        group: ``row`` or ``layer``; of no effect for a pattern, where M columns compete.
        pattern: ``unstructured`` or ``N:M``.
    """
    rows, columns = scores.shape
    counts = parse_pattern(pattern)
    if counts is not None:
        n, m = counts
        whole = columns - columns % m
        groups = scores[:, :whole].reshape(-1, m)
        result = torch.zeros_like(scores, dtype=torch.bool)
        result[:, :whole] = _smallest_of_few(groups, n).reshape(rows, whole)
        return result
    if group not in GROUPS:
        raise SecateurError(f"expected the group row or layer, got {group!r}: not measured yet")
    size = group_size(rows, columns, group)
    return _smallest(scores.reshape(-1, size), removed_of(size, ratio)).reshape(rows, columns)


def ranks(scores: Tensor, group: str) -> Tensor:
    """Return each weight's place in the ascending order of its group, (rows, columns), whole numbers.

    ``below(ranks, ratio, group)`` is ``removed(scores, ratio, group)`` at any ratio. Of equal scores the
    one that comes first has the lower place.
    """
    flat = scores.float().reshape(1, -1) if group == "layer" else scores.float()
    columns = flat.shape[1]
    result = torch.empty(flat.shape, dtype=torch.int16 if columns < 1 << 15 else torch.int32)
    if scores.device.type != "cpu":
        order = flat.argsort(dim=1, stable=True)
        places = torch.arange(columns, device=order.device).expand_as(order)
        inverse = torch.empty_like(order).scatter_(1, order, places)
        return inverse.to(result.dtype).reshape(scores.shape)
    # NumPy sorts 64-bit numbers with vector instructions, ten times as fast as it finds a stable order
    # of floats: the upper half is the float, mapped to a number of the same order, the lower its place.
    step = max(1, (1 << 20) // columns)
    found = result.numpy()
    numbers = np.arange(columns, dtype=found.dtype)[None]
    for start in range(0, len(flat), step):
        bits = (flat[start : start + step] + 0.0).contiguous().numpy().view(np.uint32)
        ordered = np.where(bits >> 31, ~bits, bits | 0x80000000).astype(np.uint64)
        keys = ordered << np.uint64(32) | np.arange(columns, dtype=np.uint64)
        keys.sort(axis=1)
        positions = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        np.put_along_axis(found[start : start + step], positions, numbers, axis=1)
    return result.reshape(scores.shape)


def below(ranks: Tensor, ratio: float, group: str) -> Tensor:
    """Return which weights to remove from their places in the order, (rows, columns) bool."""
    rows, columns = ranks.shape
    return ranks < removed_of(group_size(rows, columns, group), ratio)


def packed(mask: Tensor) -> memoryview:
    """Return the bits of a mask in reading order, eight a byte from the highest; zeros fill the last byte."""
    if mask.device.type == "cpu":
        return np.packbits(mask.numpy()).data
    # On the device, so that an eighth of the bytes goes to the host: eight bytes of 0 or 1 are one number,
    # and times this constant the byte i of it arrives at the bit 63 - i, with no carries between them.
    eights = pad(mask.reshape(-1).view(torch.uint8), (0, -mask.numel() % 8)).view(torch.int64)
    return (eights * _GATHER).bitwise_right_shift_(56).to(torch.uint8).cpu().numpy().data


def soft_mask(ranks: Tensor, ratio: Tensor, group: str, half_width: float) -> Tensor:
    """Return how much of each weight is kept, (rows, columns) from 0 to 1: a mask with a soft edge.

    Weights whose place is within ``half_width`` of the ratio's, as a share of their group, are kept in part,
    the more the higher they stand. So what a model does becomes a smooth function of the ratio.

    Args:
        ranks: Places in the order of scores, (rows, columns).
        ratio: The ratio, a number as a tensor; gradients flow back to it.
        group: ``row`` or ``layer``.
        half_width: Half of the edge's width, as a share of the group.
    """
    rows, columns = ranks.shape
    size = group_size(rows, columns, group)
    return ((ranks + (0.5 + half_width * size - size * ratio)) / (2 * half_width * size)).clamp(0, 1)


def _smallest(scores: Tensor, count: int) -> Tensor:
    """Return where the ``count`` smallest of each row are, the first of equals, as bool."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = _kth_smallest(scores, count)
    result = scores <= limit
    surplus = _counts(result) > count
    if bool(surplus.any()):  # ties at the limit: take them in order of position
        tied = scores[surplus]
        below = tied < limit[surplus]
        equal = tied == limit[surplus]
        room = count - below.sum(1, keepdim=True)
        result[surplus] = below | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
    return result


def _counts(mask: Tensor) -> Tensor:
    """Return the number of True in each row, (rows,)."""
    if mask.device.type == "cpu":  # NumPy sums bytes four times as fast as torch counts bools
        return torch.from_numpy(mask.numpy().view(np.uint8).sum(1, dtype=np.int32))
    return mask.sum(1)


def _smallest_of_few(scores: Tensor, count: int) -> Tensor:
    """Return the same as ``_smallest`` for very many, very short rows, by counting who comes before."""
    width = scores.shape[1]
    if width > 32:
        return _smallest(scores, count)
    columns = scores.T.contiguous()
    before = torch.zeros(columns.shape, dtype=torch.uint8, device=scores.device)
    for i in range(width):
        for j in range(i + 1, width):
            first = columns[i] <= columns[j]
            before[j] += first
            before[i] += ~first
    return (before < count).T


def _kth_smallest(scores: Tensor, count: int) -> Tensor:
    """Return the count-th smallest of each row, (rows, 1).

    NumPy's partition uses vector instructions and is 5 to 10 times as fast on the CPU as torch's
    kthvalue, which also degenerates on inputs with many equal values.
    """
    if scores.device.type == "cpu":
        array = np.partition(scores.contiguous().numpy(), count - 1, axis=1)
        return torch.from_numpy(np.ascontiguousarray(array[:, count - 1 : count]))
    # kthvalue gives each row to one block of threads, which takes 300 times as long on a single long row.
    return scores.topk(count, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
