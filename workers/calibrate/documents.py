"""Documents: the texts of a local file or a hub data set, one by one, read as they are or refused."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

from ...metrics_dsl.errors import SecateurError
from ...search.core.files import expanded
from ...search.core.reading import Given, check_file, parse_json

_PIECE = 1 << 20  # characters of a text file that are read at a time
_LONGEST_LINE = 1 << 26  # characters of a document as JSON
_EXPANDS = 100  # times its size that a packed file may become; text seldom becomes 20 times
_UNPACKED = 1 << 26  # bytes that any packed file may become
_READ_TO_END = 1 << 30  # bytes of a packed file up to which its check sum, at its end, is looked at


class TextError(SecateurError):
    """A text source that cannot be read or is too short."""


def documents(source: str, characters: int | None = None) -> Iterator[str]:
    """Return the documents of a source; a text file is one.

    The source is looked at now and read as the documents are asked for.

    Args:
        source: A file whose name ends as one of ``READERS`` in any case, or ``hub:NAME[:CONFIG[:SPLIT]]``.
        characters: How much is wanted: no document follows once there is that much, and a text file is read
            no further; None for all.

    Raises:
        TextError: When it is no such source, or not what its name says.
    """
    if source.startswith("hub:"):
        return _first(_hub(source), characters)
    path = expanded(source, TextError)
    name = path.name.lower()
    reader = next((read for suffix, read in READERS.items() if name.endswith(suffix)), None)
    if reader is None:
        raise TextError(
            f"expected the text self, hub:NAME or a file ending in {', '.join(READERS)}; got {source!r}"
        )
    if not path.exists():
        raise TextError(f"expected a text file, got {source}: not found")
    check_file(path, "a text file", TextError)
    return reader(path, characters)


def _plain(path: Path, characters: int | None) -> Iterator[str]:
    parts: list[str] = []
    wanted = characters
    with _opened(path, "text") as file:
        while piece := file.read(_PIECE if wanted is None else min(_PIECE, wanted)):
            parts.append(piece)
            wanted = None if wanted is None else wanted - len(piece)
    yield "".join(parts)


def _json_lines(path: Path, characters: int | None) -> Iterator[str]:
    with _opened(path, "JSON lines") as file:
        yield from _first(_texts_of_lines(file, path), characters)


def _texts_of_lines(file: IO[str], path: Path) -> Iterator[str]:
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        try:
            if len(line) == _LONGEST_LINE:
                raise TextError
            found = parse_json(line, "", TextError).field("text") if line.strip() else None
            text = None if found is None or found.value is None else found.text()
        except TextError:
            raise TextError(
                f'expected a JSON object with a text, or null, as "text" on each line, got another in line '
                f"{number} of {path}"
            ) from None
        if text is not None:
            yield text


def _first(texts: Iterator[str], characters: int | None) -> Iterator[str]:
    """Yield texts until there are so many characters, or all."""
    total = 0
    for text in texts:
        yield text
        total += len(text)
        if characters is not None and total >= characters:
            return


def _parquet(path: Path, characters: int | None) -> Iterator[str]:
    yield from _first(_texts_of_column(path), characters)


def _texts_of_column(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with closing(pyarrow.parquet.ParquetFile(path)) as file:
            schema = file.schema_arrow
            if "text" not in schema.names:
                raise TextError(f'expected a column "text", got {schema.names} in {path}')
            kind = schema.types[schema.names.index("text")]
            if not _is_text(kind):
                raise TextError(f'expected texts in the column "text", got {kind} in {path}')
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for value in batch.column(0):
                    if (text := value.as_py()) is not None:
                        yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TextError(f"{path} cannot be read as Parquet: {reason}") from None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _hub(source: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise TextError("hub data sets need the package datasets: pip install datasets") from None
    name, config, split = [*source.removeprefix("hub:").split(":"), "", ""][:3]
    try:
        for row in load_dataset(name, config or None, split=split or "train", streaming=True):
            if (text := row["text"]) is not None:
                yield Given(text, f"the data set {name!r}", TextError, "text").text()
    except TextError:
        raise
    except Exception as error:  # whatever a server, a loader or a missing column raises
        reason = " ".join(str(error).split())[:200]
        raise TextError(f"the data set {name!r} cannot be read: {reason}") from error


READERS: dict[str, Callable[[Path, int | None], Iterator[str]]] = {  # by how a file's name ends
    ".txt": _plain,
    ".txt.gz": _plain,
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".parquet": _parquet,
}


@contextmanager
def _opened(path: Path, what: str) -> Iterator[IO[str]]:
    """Open a file of UTF-8, packed or not; whatever it turns out not to be becomes a sentence.

    A packed file is read to its end, where its check sum is, unless it is very large.
    """
    try:
        with path.open("rb") as file:
            packed = _Unpacked(path, file) if path.suffix.lower() == ".gz" else None
            with io.TextIOWrapper(
                io.BufferedReader(packed) if packed else file, encoding="utf-8-sig"
            ) as lines:
                yield lines
                if packed and path.stat().st_size <= _READ_TO_END:
                    while packed.read(_PIECE):
                        pass
    except UnicodeDecodeError as error:
        raise TextError(f"expected {what} in UTF-8, got other bytes in {path} ({error.reason})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TextError(f"{path} cannot be read as {what}: {error}") from None


class _Unpacked(io.RawIOBase):
    """What a packed file holds; one that holds absurdly much is refused on the way."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._inside = gzip.GzipFile(fileobj=file)
        self._left = max(_EXPANDS * path.stat().st_size, _UNPACKED)

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        count = self._inside.readinto(room)
        self._left -= count
        if self._left < 0:
            raise TextError(
                f"expected a packed text, got {self._path}, which unpacks to far more than text does"
            )
        return count
