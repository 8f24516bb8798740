"""Windows: which tokens of a part a measurement looks at."""

from __future__ import annotations

from torch import Tensor

SHORTEST = 128  # tokens of a sequence that a rung looks at
_MOST_OF_A_STEP = 2048


def some_tokens(ids: Tensor, count: int) -> Tensor:
    """Return about ``count`` of the tokens of a part, (sequences, tokens); all for 0.

    Every sequence gives as many of its first tokens: more texts tell candidates apart better than long
    ones do, and what a causal model makes of a beginning does not depend on the rest.
    """
    sequences, length = rung_shape(ids.shape[0], ids.shape[1], count)
    return ids[:sequences, :length]


def count_windows(sequences: int, length: int, count: int) -> int:
    """Return into how many windows of about ``count`` tokens a part (sequences, length) falls."""
    rows, columns = rung_shape(sequences, length, count)
    return (sequences // rows) * (length // columns)


def window_of(ids: Tensor, count: int, number: int) -> Tensor:
    """Return one of a part's windows, (sequences, tokens): pieces of as many sequences as there are."""
    rows, columns = rung_shape(ids.shape[0], ids.shape[1], count)
    column, row = divmod(number, ids.shape[0] // rows)
    return ids[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]


def tokens_per_rung(sequences: int, length: int, count: int) -> int:
    """Return how many tokens a rung of about ``count`` has."""
    rows, columns = rung_shape(sequences, length, count)
    return rows * columns


def tokens_per_step(tokens: int) -> int:
    """Return on how many of the statistics tokens sensitivities are found if nothing is said.

    An eighth, but not very many: more steps on few are worth more.
    """
    return min(max(1, tokens // 8), _MOST_OF_A_STEP)


def rung_shape(sequences: int, length: int, count: int) -> tuple[int, int]:
    """Return how many sequences and how many tokens of each a rung of about ``count`` tokens has."""
    if count <= 0 or count >= sequences * length:
        return sequences, length
    own = max(min(SHORTEST, length), -(-count // sequences))
    return max(1, round(count / own)), own
