"""A team: the actors that hold one copy of a model, a shard each, and answer calls together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...metrics_dsl.expression import Expression
from ...metrics_dsl.plugins import used
from ...search.core.candidate import Candidate, Reduction, Stage
from ..measure.messages import Window
from ..measure.worker import WorkerOptions
from .actor import Actor, text_of


class ModelTeam:
    """The actors of one copy of a model.

    Hidden states flow from one actor to the next as references: several candidates are on their way at
    once, and nothing but the last answer comes back here.

    Args:
        folder: The calibration folder.
        options: What each worker is made with.
        cpus: CPUs a worker.
        gpus: GPUs a worker.

    The plugins that are in use here are used there, from their text.
    """

    def __init__(self, folder: str, options: Sequence[WorkerOptions], cpus: float, gpus: float) -> None:
        self.name = "starting"
        self.depth = len(options) + 1  # a call in each shard, and one that has come meanwhile
        self._folder = folder
        self._options = options
        self._resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        self._group: Any = None
        self._actors: list[Any] = []
        self._dense: dict[Window, Any] = {}
        self._make()

    def prepare(self) -> Any:
        """Return a reference to the team's name, which is there once all have loaded their part."""
        self.forget()
        *others, last = self._actors
        return last.prepare.remote(*(actor.prepare.remote() for actor in others))

    def layers(self, candidates: Sequence[Candidate], stage: Stage) -> Any:
        """Return a reference to measurements of the screen or the layer stage."""
        texts = [text_of(candidate) for candidate in candidates]
        *others, last = self._actors
        return last.layers.remote(texts, stage, *(actor.errors.remote(texts, stage) for actor in others))

    def model(self, candidate: Candidate, window: Window) -> Any:
        """Return a reference to the measurement of the model stage, in a list."""
        text = text_of(candidate)
        entering = self._forward(text, window)[-1]
        return self._actors[-1].model.remote(text, window, entering, self._dense_of(window))

    def sensitivity(self, candidate: Candidate, window: Window) -> Any:
        """Return a reference to the measurement of the sensitivities, in a list."""
        text = text_of(candidate)
        entering = self._forward(text, window)
        dense = self._forward(None, window)[-1]
        leaving = None
        for actor, states in reversed(list(zip(self._actors[1:], entering[1:], strict=True))):
            leaving = actor.backward.remote(text, window, states, leaving, dense)
            dense = None  # only behind the last block are the two models compared
        return self._actors[0].sensitivity.remote(text, window, leaving)

    def summarise(self, metric: Expression, reductions: Sequence[Reduction]) -> Any:
        """Return a reference to reductions of a metric's scores, or to why there are none."""
        *others, last = self._actors
        parts = [actor.summarise.remote(str(metric), reductions) for actor in others]
        return last.summarise.remote(str(metric), reductions, *parts)

    def reused(self) -> list[Any]:
        """Return references to how many blocks each actor did not run again, of how many."""
        return [actor.reused.remote() for actor in self._actors]

    def forget(self) -> None:
        """Drop references to what the dense model does: they may be lost, or say that memory was short."""
        self._dense.clear()

    def renew(self) -> None:
        """End the actors and make new ones."""
        self.stop()
        self._make()

    def stop(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)

    def _make(self) -> None:
        placed: list[dict[str, Any]] = [{}] * len(self._options)
        if len(self._options) > 1:  # near each other, for what flows between them
            self._group = placement_group([self._resources] * len(self._options), strategy="PACK")
            places = (
                PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
                for index in range(len(self._options))
            )
            placed = [{"scheduling_strategy": place} for place in places]
        actor, plugins = ray.remote(Actor), [(plugin.name, plugin.text) for plugin in used()]
        self._actors = [
            actor.options(
                num_cpus=self._resources["CPU"],
                num_gpus=self._resources.get("GPU", 0),
                max_restarts=-1,  # a new process loads again by itself
                **where,
            ).remote(self._folder, options, plugins)
            for where, options in zip(placed, self._options, strict=True)
        ]

    def _forward(self, text: Any, window: Window) -> list[Any]:
        """Return references to what enters each shard; None for the first."""
        entering: list[Any] = [None]
        for actor in self._actors[:-1]:
            entering.append(actor.forward.remote(text, window, entering[-1]))
        return entering

    def _dense_of(self, window: Window) -> Any:
        if window not in self._dense:
            self._dense = {w: r for w, r in self._dense.items() if w.part == window.part}
            self._dense[window] = self._forward(None, window)[-1]
        return self._dense[window]
