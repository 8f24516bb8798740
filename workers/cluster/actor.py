"""What runs inside an actor of a Ray cluster: a worker, spoken to in text and arrays.

Nothing is loaded before it is asked for: an error in a constructor ends an actor for good, and one that has
been restarted loads again by itself.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray.util.metrics import Counter
from torch import Tensor

from ...metrics_dsl.expression import MetricError
from ...metrics_dsl.parser import parse
from ...metrics_dsl.plugins import Plugin, use
from ...search.core.candidate import Candidate, Failure, Measurement, Reduction, Stage
from ...search.core.protocols import Summaries
from ...search.core.versions import library_versions
from ..calibrate.folder import Calibration
from ..measure.messages import (
    BackwardState,
    ForwardState,
    LayerResults,
    Window,
    layer_measurement,
    sensitivity_measurement,
)
from ..measure.shard import ScoreError, all_or_failure
from ..measure.worker import Worker, WorkerOptions
from .dispatch import Exhausted

Text = tuple[str, tuple[float, ...], str]  # metric, ratios and group of a candidate
T = TypeVar("T")


def text_of(candidate: Candidate) -> Text:
    """Return a candidate as it travels."""
    return str(candidate.metric), candidate.ratios, candidate.group


def look_around(folder: str, model: str) -> tuple[str, bool, dict[str, str]]:
    """Return the hash of a calibration's manifest, whether a model is there, and versions, on this machine.

    The hash is empty where there is no such folder.
    """
    path = Path(folder) / "manifest.json"
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return digest, Path(model).exists(), library_versions("secateur", "torch", "transformers", "numpy")


class Actor:
    """A worker behind Ray.

    Args:
        folder: The calibration folder.
        options: What the worker is made with.
        plugins: Name and text of the plugins that metrics may need.
    """

    def __init__(self, folder: str, options: WorkerOptions, plugins: Sequence[tuple[str, str]] = ()) -> None:
        self._folder = folder
        self._options = options
        self._plugins = plugins
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._name = f"{address}:{os.getpid()}"
        self._worker: Worker | None = None
        self._measured = Counter("secateur_measurements", "Candidates measured.", ("stage", "worker"))
        self._busy = Counter("secateur_busy_seconds", "Time spent on measuring.", ("worker",))
        for counter in (self._measured, self._busy):
            counter.set_default_tags({"worker": self._name})

    def prepare(self, *names: str) -> str:
        """Load what is needed and return the names of those before and of this worker."""
        self._loaded()
        return "+".join((*names, self._name))

    def errors(self, texts: Sequence[Text], stage: Stage) -> tuple[list[LayerResults], float] | Exhausted:
        """Return the results of the layers held, and the seconds they took."""

        def work(worker: Worker) -> tuple[list[LayerResults], float]:
            start = time.perf_counter()
            return worker.errors([_candidate(text) for text in texts], stage), time.perf_counter() - start

        return self._with_memory(work)

    def layers(self, texts: Sequence[Text], stage: Stage, *before: Any) -> list[Measurement] | Exhausted:
        """Return measurements from the results of the shards before and its own."""
        own = self.errors(texts, stage)
        for part in (*before, own):
            if isinstance(part, Exhausted):
                return part
        parts = [*before, own]
        seconds = sum(taken for _, taken in parts) / len(texts)
        found = []
        for position in range(len(texts)):
            rows = all_or_failure(shard[position] for shard, _ in parts)
            results = rows if isinstance(rows, Failure) else [result for row in rows for result in row]
            found.append(layer_measurement(results, self._loaded().layers, stage, seconds))
        self._count(stage, found)
        return found

    def forward(self, text: Text | None, window: Window, entering: Any) -> ForwardState | Failure:
        """Run tokens through the blocks held."""
        candidate = None if text is None else _candidate(text)
        return self._with_memory(
            lambda worker: _packed(worker.forward(candidate, window, _unpacked(entering)))
        )

    def model(
        self, text: Text, window: Window, entering: Any = None, dense: Any = None
    ) -> list[Measurement] | Exhausted:
        """Return the measurement of the model stage; asked of the last shard."""
        dense = None if self._loaded().knows(window) else dense
        for other in (entering, dense):
            if isinstance(other, Exhausted):
                return other
        found = self._with_memory(
            lambda worker: [worker.model(_candidate(text), window, _unpacked(entering), _unpacked(dense))]
        )
        if not isinstance(found, Exhausted):
            self._count("model", found)
        return found

    def backward(
        self, text: Text, window: Window, entering: Any = None, leaving: Any = None, dense: Any = None
    ) -> BackwardState | Failure:
        """Return sensitivities of the layers held and behind them."""
        for other in (entering, leaving, dense):
            if isinstance(other, Failure):
                return other

        def work(worker: Worker) -> BackwardState | Failure:
            back = None if leaving is None else leaving._replace(gradients=_tensors(leaving.gradients))
            found = worker.backward(_candidate(text), window, _unpacked(entering), back, _unpacked(dense))
            if isinstance(found, Failure):
                return found
            behind = {} if leaving is None else leaving.of_layer
            return found._replace(of_layer=behind | found.of_layer, gradients=_arrays(found.gradients))

        return self._with_memory(work)

    def sensitivity(self, text: Text, window: Window, leaving: Any = None) -> list[Measurement] | Exhausted:
        """Return the measurement of the sensitivities; asked of the first shard."""
        found = self.backward(text, window, None, leaving)
        if isinstance(found, Exhausted):
            return found
        return [sensitivity_measurement(found, self._loaded().ids(window).numel())]

    def summarise(
        self, metric: str, reductions: Sequence[Reduction], *before: Summaries | Failure
    ) -> Summaries | Failure:
        """Return reductions of a metric's scores on the blocks before and those held."""
        try:
            own = self._loaded().summarise(parse(metric), reductions)
        except (ScoreError, MetricError) as error:
            return Failure(str(error))
        parts = all_or_failure((*before, own))
        if isinstance(parts, Failure):
            return parts
        return {name: np.concatenate([part[name] for part in parts]) for name in reductions}

    def reused(self) -> tuple[int, int]:
        """Return how many blocks were not run again, of how many."""
        return self._worker.reused if self._worker else (0, 0)

    def _loaded(self) -> Worker:
        """Return the worker; plugins are in use before any metric is read."""
        if self._worker is None:
            for name, text in self._plugins:
                use(Plugin(name, text))
            self._worker = Worker(Calibration(self._folder), **self._options)
        return self._worker

    def _with_memory(self, work: Callable[[Worker], T]) -> T | Exhausted:
        """Work; where the device's memory does not suffice, forget what can be had again and retry once."""
        worker = self._loaded()
        start = time.perf_counter()
        try:
            try:
                return work(worker)
            except torch.OutOfMemoryError:
                worker.forget()
            return work(worker)
        except torch.OutOfMemoryError as error:
            worker.forget()
            return Exhausted(f"worker {self._name} ran out of the device's memory: {str(error)[:200]}")
        finally:
            self._busy.inc(time.perf_counter() - start)

    def _count(self, stage: Stage, found: Sequence[Measurement]) -> None:
        self._measured.inc(len(found), {"stage": stage})


def _candidate(text: Text) -> Candidate:
    metric, ratios, group = text
    return Candidate(parse(metric), ratios, group)


def _arrays(tensors: Sequence[Tensor]) -> list[Any]:
    """Return tensors as arrays, which Ray keeps in shared memory; widening 16 bits loses nothing."""
    return [tensor.float().cpu().numpy() for tensor in tensors]


def _tensors(arrays: Sequence[Any]) -> list[Tensor]:
    return [torch.tensor(array) for array in arrays]  # a copy: what Ray shares must not be written


def _packed(passed: ForwardState | Failure) -> ForwardState | Failure:
    return passed if isinstance(passed, Failure) else passed._replace(hidden=_arrays(passed.hidden))


def _unpacked(passed: Any) -> Any:
    return passed._replace(hidden=_tensors(passed.hidden)) if isinstance(passed, ForwardState) else passed
