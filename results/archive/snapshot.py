"""Snapshots: a run as one Parquet file, for notebooks on other machines and for object stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ..files import check_file, replace_file
from .archive import Archive


def snapshot(archive: Archive, out: str | Path) -> Path:
    """Write a run's frame, with columns ``ratios`` and ``layer_errors`` of lists, and return the file's path.

    The file is the old one or the new one at any moment, never a part.

    Raises:
        SecateurError: When the path is a folder.
    """
    check_file(out)
    with archive.reading():
        rows = archive.frame()
        blobs = archive.rows(
            "SELECT ratios, layer_errors FROM trials JOIN by_layer USING (key) ORDER BY number"
        )
    for name, column in zip(("ratios", "layer_errors"), zip(*blobs, strict=True), strict=False):
        lists = [np.frombuffer(blob, dtype=np.float64) for blob in column]
        rows[name] = pd.Series(lists, index=rows.index, dtype="object")
    return replace_file(out, rows.to_parquet(index=False))
