"""Snapshots: a run as one Parquet file, for notebooks on other machines and for object stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ...search.core.files import Output, whole
from .archive import Archive

_SNAPSHOT = Output("a file to write, new or a Parquet file", replaces=lambda head: head.startswith(b"PAR1"))


def snapshot(archive: Archive, out: str | Path) -> Path:
    """Write a run's frame, with columns ``ratios`` and ``layer_errors`` of lists, and return the file's path.

    The file is the old one or the new one at any moment, never a part.

    Raises:
        SecateurError: When the path cannot become a file or holds something else.
    """
    with whole(out, _SNAPSHOT, archive.folder) as place:
        with archive.reading():
            rows = archive.frame()
            blobs = archive.rows(
                "SELECT ratios, layer_errors FROM trials JOIN by_layer USING (key) ORDER BY number"
            )
        for name, column in zip(("ratios", "layer_errors"), zip(*blobs, strict=True), strict=False):
            lists = [np.frombuffer(blob, dtype=np.float64) for blob in column]
            rows[name] = pd.Series(lists, index=rows.index, dtype="object")
        rows.to_parquet(place, index=False)
    return Path(out).resolve()
