"""Which workers of which cluster a search uses."""

from __future__ import annotations

import math
import os
import re
import secrets
from dataclasses import dataclass

from ...metrics_dsl.errors import SecateurError
from ...search.core import defaults
from ...search.core.requests import check_count, shown

_MOST = 1_000_000  # workers, shards, and CPUs and GPUs of one: more is a slip of the finger
_LONGEST = 1e9  # seconds
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?"


@dataclass(frozen=True)
class Cluster:
    """Which workers to use, and where.

    Attributes:
        address: ``local`` starts Ray on this machine, ``auto`` joins the cluster it is part of,
            anything else is a cluster's address.
        workers: How many actors; None for as many as the cluster has room for.
        shards: Actors that share one copy of the model.
        gpus: GPUs per worker, parts allowed; None for one where the cluster has GPUs.
        cpus: CPUs per worker.
        timeout: Seconds after which a call is taken for hung.
    """

    address: str = "local"
    workers: int | None = None
    shards: int = defaults.SHARDS
    gpus: float | None = None
    cpus: float = defaults.CPUS_PER_WORKER
    timeout: float = defaults.TIMEOUT

    def __post_init__(self) -> None:
        if self.address not in ("local", "auto") and not _is_address(self.address):
            raise SecateurError(f"expected --ray local, auto or HOST:PORT, got {shown(self.address)}")
        if self.workers is not None:
            check_count("at least 1 worker, or auto", self.workers, 1, _MOST)
        check_count("at least 1 shard", self.shards, 1, _MOST)
        if self.workers is not None and self.workers % self.shards:
            raise SecateurError(
                f"expected workers in whole copies of a model of {self.shards} shards, got {self.workers}; "
                f"choose --workers {max(1, self.workers // self.shards) * self.shards}"
            )
        if not (math.isfinite(self.cpus) and 1e-4 <= self.cpus <= _MOST):
            raise SecateurError(f"expected a finite number of CPUs above 0 per worker, got {self.cpus:g}")
        if self.gpus is not None and not (self.gpus == 0 or 1e-4 <= self.gpus <= _MOST):
            raise SecateurError(
                f"expected a finite number of GPUs of 0 or more per worker, got {self.gpus:g}"
            )
        if not 0 < self.timeout <= _LONGEST:
            raise SecateurError(f"expected a time-out above 0 seconds, got {self.timeout}")

    def set_environment(self) -> None:
        """Set what Ray reads when it is imported; what the user has set stays.

        A cluster that is started here listens on the loopback address alone, and to nobody without a token.
        """
        wanted = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_BACKEND_LOG_LEVEL": "fatal",  # what its C++ parts say in passing: we say what went wrong
        }
        if self.address == "local":
            wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            if "RAY_AUTH_MODE" not in os.environ:
                wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        for name, value in wanted.items():
            os.environ.setdefault(name, value)


def _is_address(text: str) -> bool:
    found = re.fullmatch(rf"{_HOST}:([0-9]{{1,5}})", text)
    return found is not None and 0 < int(found[1]) < 65536
