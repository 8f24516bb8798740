"""Calibration text: token ids from the model itself, from local files or from a hub data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .documents import TextError, documents

_CHARACTERS_PER_TOKEN = 100  # reading stops once there is this much text for each token wanted
_RUN = 16  # tokens; windows of different text have few runs of so many in common
_MOST = 2 / 3


def draw_sequences(source: str, model: Any, tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """Return token ids (count, length) of sequences of different text, in random order.

    A sequence that repeats another one, as it is or shifted, is passed over: whatever parts the sequences are
    divided into, no part knows another's text.

    Args:
        source: ``self``, or a source of ``documents``.
        model: The dense model, which writes the text of ``self``.
        tokenizer: Its tokenizer, which reads all other text.
        count: Number of sequences.
        length: Tokens per sequence.
        seed: Seed of sampling and order.

    Raises:
        TextError: When the source cannot be read, or holds fewer tokens or too little text that differs.
    """
    if source == "self":
        return write_own(model, tokenizer, count, length, seed)
    # Tokenised whole and without special tokens: windows start anywhere in it.
    characters = count * length * _CHARACTERS_PER_TOKEN
    ids = read_ids(source, model, tokenizer, characters=characters, add_special_tokens=False)
    available = len(ids) // length
    if available < count:
        raise TextError(
            f"expected at least {count * length} tokens, {count} sequences of {length}, "
            f"got {len(ids)} from {source}; give more text or ask for fewer tokens"
        )
    windows = torch.tensor(ids[: available * length]).reshape(available, length)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    chosen = different(windows[order], count)
    if len(chosen) < count:
        raise TextError(
            f"expected {count} sequences of {length} tokens of different text, got {len(chosen)}, which the "
            f"other {available - len(chosen)} of {source} repeat; give more text or ask for fewer tokens"
        )
    return chosen


def different(windows: Tensor, count: int) -> Tensor:
    """Return the first windows, (count, length) or fewer, that do not repeat those before them.

    A window repeats others if most of its runs of 16 tokens stand in them, wherever they do: a phrase
    said again and again is the same text at every offset. Windows of 16 tokens or less repeat others that are
    equal.
    """
    length = windows.shape[1]
    run = min(_RUN, length)
    size = 4 * run
    seen: set[int] = set()
    chosen: list[int] = []
    for index, window in enumerate(windows.int().numpy()):
        if len(chosen) == count:
            break
        raw = window.tobytes()
        runs = [hash(raw[start : start + size]) for start in range(0, len(raw) - size + 1, 4)]
        if sum(one in seen for one in runs) <= _MOST * len(runs):
            chosen.append(index)
            seen.update(runs)
    return windows[chosen]


@torch.no_grad()
def write_own(model: Any, tokenizer: Any, count: int, length: int, seed: int, batch: int = 32) -> Tensor:
    """Return sequences sampled from the model itself, (count, length), at temperature 1.

    Each starts from a token drawn from the vocabulary (as in data-free quantisation, LLM-QAT, Liu et
    al. 2023), which spreads the subjects, and goes on past what would end a text. How the model's author
    generates text has no say in it.

    Raises:
        TextError: When one repeats another, or the tokenizer has no tokens to begin with.
    """
    device = next(model.parameters()).device
    special = set(getattr(tokenizer, "all_special_ids", ()))
    size = min(len(tokenizer), vocabulary_of(model))
    ordinary = torch.tensor([i for i in range(size) if i not in special])
    if len(ordinary) < 2:
        raise TextError(
            f"expected a tokenizer with ordinary tokens that the model knows, got {len(ordinary)}; copy that "
            "of the model that it was made from"
        )
    never = sorted(special | _ends(model.config))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _own_generation(model):  # generate() draws from the global generator
        torch.manual_seed(seed)
        first = ordinary[torch.randint(len(ordinary), (count, 1))]
        pieces = [
            model.generate(
                start.to(device),
                attention_mask=torch.ones_like(start).to(device),
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=length - 1, min_new_tokens=length - 1,
                suppress_tokens=never or None, pad_token_id=0,
            ).cpu()
            for start in first.split(batch)
        ]  # fmt: skip
    written = torch.cat(pieces)
    if len(different(written, count)) < count:
        raise TextError(
            f"expected {count} different sequences of {length} tokens from the model, which writes some of "
            "them again and again; give it a text to read with --text FILE"
        )
    return written


def _ends(config: Any) -> set[int]:
    """Return the tokens that end a text by a model's configuration, none of which is written."""
    found = getattr(config, "eos_token_id", None)
    return {
        end for end in (found if isinstance(found, list) else [found]) if isinstance(end, int) and end >= 0
    }


@contextmanager
def _own_generation(model: Any) -> Iterator[None]:
    """Let a model generate as it is told alone: whatever is left out is transformers' own default."""
    before = model.generation_config
    model.generation_config = type(before)()
    try:
        yield
    finally:
        model.generation_config = before


def read_text(source: str, characters: int | None = None) -> str:
    """Return the text of a source, documents joined by an empty line: at least so long, or all of it."""
    return "\n\n".join(documents(source, characters))


def read_ids(
    source: str, model: Any, tokenizer: Any, *, characters: int | None = None, add_special_tokens: bool = True
) -> list[int]:
    """Return the token ids of a source's text, all of which the model knows.

    Args:
        source: As for ``documents``.
        model: The model that is to read them.
        tokenizer: Its tokenizer.
        characters: How much text is wanted; None for all.
        add_special_tokens: Whether the tokenizer puts at the beginning what it does.

    Raises:
        TextError: When the source cannot be read, or the tokenizer is none of that model.
    """
    text = read_text(source, characters)
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    except Exception as error:  # whatever its files make of transformers
        reason = " ".join(str(error).split())[:200]
        raise TextError(f"the model's tokenizer cannot read {source}: {reason}") from error
    known = vocabulary_of(model)
    if ids and not 0 <= min(ids) <= max(ids) < known:
        raise TextError(
            f"expected token ids below {known}, which the model knows, got {max(ids)} from its tokenizer; "
            "copy the tokenizer of the model that it was made from"
        )
    return ids


def vocabulary_of(model: Any) -> int:
    """Return how many token ids a model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_source(source: str) -> None:
    """Check a source before a model is loaded for it.

    Raises:
        TextError: When it is no source, or a file that is not there.
    """
    if source != "self":
        documents(source)
