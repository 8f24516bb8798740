"""Snapshots: a run as one Parquet file, for notebooks on other machines and for object stores."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from .archive import Archive


def snapshot(archive: Archive, out: str | Path) -> Path:
    """Write a run's frame, with columns ``ratios`` and ``layer_errors`` of lists, and return the file's path.

    The file is the old one or the new one at any moment, never a part.

    Raises:
        ValueError: When the path is a folder.
    """
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"expected a file to write, got the folder {path}")
    with archive.reading():
        rows = archive.frame()
        blobs = archive.rows(
            "SELECT ratios, layer_errors FROM trials JOIN by_layer USING (key) ORDER BY number"
        )
    for name, column in zip(("ratios", "layer_errors"), zip(*blobs, strict=True), strict=False):
        lists = [np.frombuffer(blob, dtype=np.float64) for blob in column]
        rows[name] = pd.Series(lists, index=rows.index, dtype="object")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        rows.to_parquet(partial, index=False)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path
