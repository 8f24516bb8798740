"""Defaults: the numbers that are taken where nothing is said, for Python, TOML and the command line."""

from __future__ import annotations

from typing import Final

SEED: Final = 0

# A search.
SPARSITY: Final = 0.5
BUDGET: Final = 200  # candidates
BATCH: Final = 16  # candidates asked for at a time; a searcher's row may say another number
PROMOTE: Final = 0.25  # share of a batch that passes the screen, and each rung
RUNG_PART: Final = 4  # ratios race on one part in so many of the selection tokens first
MAX_SIZE: Final = 20  # nodes of a metric

# A calibration: tokens of its parts and of a sequence.
TOKENS: Final = 8192
SELECTION_TOKENS: Final = 2048
HOLDOUT_TOKENS: Final = 4096
SEQUENCE_LENGTH: Final = 512

# An evaluation.
WINDOW: Final = 1024  # tokens

# Workers.
THREADS: Final = 0  # of a CPU; 0 for all cores
SHARDS: Final = 1
CPUS_PER_WORKER: Final = 1.0
TIMEOUT: Final = 1800.0  # seconds
