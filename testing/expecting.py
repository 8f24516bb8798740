"""How contracts say what is wrong."""

from __future__ import annotations


def expect(holds: object, sentence: str) -> None:
    """Check something.

    Raises:
        AssertionError: With the sentence, when it does not hold.
    """
    if not holds:
        raise AssertionError(sentence)
