"""Calibration text: token ids from the model itself, from local files or from a hub data set."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...metrics_dsl.errors import SecateurError
from ...search.core.reading import parse_json

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_CHARACTERS_PER_TOKEN = 100  # reading stops once there is this much text for each token wanted


class TextError(SecateurError):
    """A text source that cannot be read or is too short."""


def draw_sequences(source: str, model: Any, tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """Return token ids (count, length) of disjoint sequences in random order.

    Args:
        source: ``self``, a .txt, .jsonl, .jsonl.gz or .parquet file, or ``hub:NAME[:CONFIG[:SPLIT]]``.
        model: The dense model, which writes the text of ``self``.
        tokenizer: Its tokenizer, which reads all other text.
        count: Number of sequences.
        length: Tokens per sequence.
        seed: Seed of sampling and order.

    Raises:
        TextError: When the source cannot be read or holds fewer tokens.
    """
    if source == "self":
        return write_own(model, tokenizer, count, length, seed)
    text = read_text(source, count * length * _CHARACTERS_PER_TOKEN)
    # Tokenised whole and without special tokens: windows start anywhere in it.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // length
    if available < count:
        raise TextError(
            f"expected at least {count * length} tokens, {count} sequences of {length}, "
            f"got {len(ids)} from {source}; give more text or ask for fewer tokens"
        )
    windows = torch.tensor(ids[: available * length]).reshape(available, length)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


@torch.no_grad()
def write_own(model: Any, tokenizer: Any, count: int, length: int, seed: int, batch: int = 32) -> Tensor:
    """Return sequences sampled from the model itself, (count, length), at temperature 1.

    Each starts from a token drawn from the vocabulary (as in data-free quantisation, LLM-QAT, Liu et
    al. 2023), which spreads the subjects, and goes on past what would end a text.
    """
    device = next(model.parameters()).device
    special = set(getattr(tokenizer, "all_special_ids", ()))
    size = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    ordinary = torch.tensor([i for i in range(size) if i not in special])
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # generate() draws from torch's global generator
        torch.manual_seed(seed)
        first = ordinary[torch.randint(len(ordinary), (count, 1))]
        pieces = [
            model.generate(
                start.to(device),
                attention_mask=torch.ones_like(start).to(device),
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=length - 1, min_new_tokens=length - 1,
                suppress_tokens=sorted(special) or None, pad_token_id=0,
            ).cpu()
            for start in first.split(batch)
        ]  # fmt: skip
    return torch.cat(pieces)


def read_text(source: str, characters: int | None = None) -> str:
    """Return the text of a source, documents joined by an empty line: at least so long, or all of it."""
    parts: list[str] = []
    total = 0
    for document in _documents(source, characters):
        parts.append(document)
        total += len(document)
        if characters is not None and total >= characters:
            break
    return "\n\n".join(parts)


def check_source(source: str) -> None:
    """Check a source before a model is loaded for it.

    Raises:
        TextError: When it is no source, or a file that is not there.
    """
    if source != "self":
        _documents(source, 0)


def _documents(source: str, characters: int | None) -> Iterator[str]:
    if source.startswith("hub:"):
        return _hub(source)
    path = Path(source).expanduser()
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    readers: dict[str, Callable[[Path], Iterator[str]]] = {
        ".txt": lambda p: _plain(p, characters),
        ".jsonl": _json_lines,
        ".jsonl.gz": _json_lines,
        ".parquet": _parquet,
    }
    if suffix not in readers:
        raise TextError(
            f"expected the text self, hub:NAME or a file ending in {', '.join(_SUFFIXES)}; got {source!r}"
        )
    if not path.is_file():
        raise TextError(f"expected a text file, got {source}: not found")
    return readers[suffix](path)


def _plain(path: Path, characters: int | None) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file.read(characters)
    except UnicodeDecodeError as error:
        raise TextError(f"expected text in UTF-8, got other bytes in {path} ({error.reason})") from None


def _json_lines(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        text = parse_json(line, str(path), TextError).field("text").text()
                    except TextError:
                        raise TextError(
                            f'expected a JSON object with "text" on each line, got another in line '
                            f"{number} of {path}"
                        ) from None
                    yield text
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise TextError(f"{path} cannot be read as JSON lines: {error}") from None


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{path} cannot be read as Parquet: {error}") from None
    if "text" not in file.schema_arrow.names:
        raise TextError(f'expected a column "text", got {file.schema_arrow.names} in {path}')
    for batch in file.iter_batches(columns=["text"]):
        yield from (str(value) for value in batch.column(0).to_pylist() if value is not None)


def _hub(source: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise TextError("hub data sets need the package datasets: pip install datasets") from None
    name, config, split = [*source.removeprefix("hub:").split(":"), "", ""][:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            yield str(row["text"])
    except Exception as error:  # whatever a server, a loader or a missing column raises
        reason = " ".join(str(error).split())[:200]
        raise TextError(f"the data set {name!r} cannot be read: {reason}") from error
