"""Snapshots: a run as one Parquet file, for notebooks on other machines and for object stores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd

from ...search.core.files import Output, whole
from .archive import Archive

# Among what the file says of its table; who reads and writes it with pandas does not keep this.
_MARK = {b"secateur": b"snapshot"}


def _is_snapshot(file: BinaryIO) -> bool:
    import pyarrow
    from pyarrow import parquet

    try:
        found: Mapping[bytes, bytes] = parquet.read_metadata(file).metadata or {}
    except (pyarrow.ArrowException, ValueError, OSError):  # whatever is no Parquet file
        return False
    return _MARK.items() <= found.items()


_SNAPSHOT = Output("a file to write, new or an earlier snapshot", replaces=_is_snapshot)


def snapshot(archive: Archive, out: str | Path, *, force: bool = False) -> Path:
    """Write a run's frame, with columns ``ratios`` and ``layer_errors`` of lists, and return the file's path.

    The file is the old one or the new one at any moment, never a part. With ``force`` it takes the place of
    any file that is of no run or calibration.

    Raises:
        SecateurError: When the path cannot become a file or holds something else.
    """
    import pyarrow
    from pyarrow import parquet

    with whole(out, replace(_SNAPSHOT, force=force), archive.folder) as place:
        with archive.reading():
            rows = archive.frame()
            numbers = archive.numbers(("ratios", "layer_errors"), list(rows["key"]))
        for i, name in enumerate(("ratios", "layer_errors")):
            lists = [np.asarray(row[i], dtype=np.float64) for row in numbers]
            rows[name] = pd.Series(lists, index=rows.index, dtype="object")
        table = pyarrow.Table.from_pandas(rows, preserve_index=False)
        said = {**(table.schema.metadata or {}), b"PANDAS_ATTRS": json.dumps(rows.attrs).encode(), **_MARK}
        parquet.write_table(table.replace_schema_metadata(said), place)
    return Path(out).resolve()
