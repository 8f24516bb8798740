"""The evaluator on a Ray cluster: the model split over shards, and copied as often as there are workers.

Each worker is an actor that loads weights and statistics from the calibration folder by itself; what
travels is text, numbers and, where a model is split, the hidden states between its parts. A candidate's
figures are those of a local search: the same computation runs, whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...metrics_dsl.expression import Expression
from ...search.core.candidate import Candidate, Failure, Layer, Measurement, Part, Reduction, Stage
from ...search.core.protocols import Done, Summaries, ignore
from ..calibrate.folder import Calibration
from ..measure.messages import Window, check_candidates, window_of_candidate
from ..measure.partition import split_blocks
from ..measure.shard import ScoreError
from ..measure.worker import Device, WorkerError, WorkerOptions
from .settings import Cluster

if TYPE_CHECKING:
    from .actor_team import ModelTeam

_SETUP = 1800.0  # seconds within which a model is loaded
_TOGETHER: dict[Stage, int] = {"screen": 8, "layer": 2, "model": 1, "sensitivity": 1}  # candidates per call


class RayEvaluator:
    """Measures candidates on the workers of a Ray cluster.

    Args:
        calibration: Statistics and tokens of the model, in a folder that every node sees.
        cluster: Which workers to use.
        options: What the workers are made with; ``device`` and ``blocks`` are chosen for each.
        report: Called with a sentence on what becomes of the workers.

    Raises:
        WorkerError: When there is no such cluster, or it cannot do this.
        CalibrationError: When a node does not see the calibration.
    """

    def __init__(
        self,
        calibration: Calibration,
        cluster: Cluster,
        options: WorkerOptions,
        report: Callable[[str], None] = lambda _text: None,
    ) -> None:
        blocks = split_blocks(calibration.layers, cluster.shards, calibration.blocks)
        cluster.set_environment()
        from .actor_team import ModelTeam
        from .connection import accelerators, check_nodes, choose_workers, connected
        from .dispatch import Dispatcher

        self._calibration = calibration
        self._opened = ExitStack()
        try:
            self._opened.enter_context(connected(cluster.address))
            workers, gpus = choose_workers(cluster, options.get("device", Device()).name)
            model = options.get("model") or calibration.model_source
            check_nodes(calibration, model, cluster.cpus, gpus, report)
            self._accelerator = accelerators() if gpus else ""
            own = options.get("device", Device())
            device = replace(
                own, name="cuda" if gpus else "cpu", threads=own.threads or max(1, int(cluster.cpus))
            )
            folder = str(calibration.folder.absolute())
            each = [
                options | WorkerOptions(device=device, blocks=held if len(blocks) > 1 else None)
                for held in blocks
            ]
            self._teams = [
                ModelTeam(folder, each, cluster.cpus, gpus) for _ in range(workers // cluster.shards)
            ]
            self._dispatcher = Dispatcher(
                self._teams, timeout=cluster.timeout, patience=_SETUP, report=report
            )
            self._opened.callback(self._dispatcher.stop)
            split = f", the model split over {cluster.shards}" if cluster.shards > 1 else ""
            report(f"{workers} workers of {cluster.cpus:g} CPUs and {gpus:g} GPUs{split}")
            self._dispatcher.wait()
        except BaseException:
            self._opened.close()
            raise

    @property
    def layers(self) -> Sequence[Layer]:
        """The prunable layers in model order."""
        return self._calibration.layers

    @property
    def leaves(self) -> frozenset[str]:
        """The leaves that the calibration holds."""
        return self._calibration.leaves

    @property
    def accelerator(self) -> str:
        """The kinds of GPU that the cluster has, empty for none."""
        return self._accelerator

    @property
    def reused(self) -> tuple[int, int]:
        """Blocks whose hidden states were known, of how many that candidates went through."""
        pairs = self._dispatcher.ask(lambda team: team.reused())
        return sum(known for known, _ in pairs), sum(of_all for _, of_all in pairs)

    def measure(
        self,
        candidates: Sequence[Candidate],
        stage: Stage,
        part: Part = "selection",
        tokens: int = 0,
        done: Done = ignore,
    ) -> list[Measurement]:
        """Return a measurement of each candidate, in order, as ``LocalEvaluator`` does.

        A candidate that takes two workers with it, or keeps them busy beyond the time-out, is a failure.

        Raises:
            WorkerError: When all workers are lost.
        """
        check_candidates(candidates, self.layers)

        def begin(team: ModelTeam, items: list[int]) -> Any:
            chosen = [candidates[i] for i in items]
            if stage == "model":
                return team.model(chosen[0], Window(part, tokens))
            if stage == "sensitivity":
                window = window_of_candidate(chosen[0], part, tokens, self._calibration.shape(part))
                return team.sensitivity(chosen[0], window)
            return team.layers(chosen, stage)

        found: dict[int, Measurement] = {}
        each = max(1, -(-len(candidates) // (2 * len(self._teams))))  # so that all have something to do
        for answer in self._dispatcher.run(begin, len(candidates), min(each, _TOGETHER[stage])):
            measured = answer.value or [Failure(answer.failure).of(stage)] * len(answer.items)
            own = [replace(m, worker=answer.name, attempts=answer.attempts) for m in measured]
            done([(candidates[i], m) for i, m in zip(answer.items, own, strict=True)])
            found.update(zip(answer.items, own, strict=True))
        return [found[i] for i in range(len(candidates))]

    def summarise(self, metric: Expression, reductions: Sequence[Reduction]) -> Summaries:
        """Return reductions of a metric's scores on the dense model.

        Raises:
            ScoreError: When scores are not finite.
            WorkerError: When it cannot be done.
        """
        answers = list(self._dispatcher.run(lambda team, _items: team.summarise(metric, reductions), 1))
        answer = answers[0]
        if answer.failure:
            raise WorkerError(f"the scores of `{metric}` cannot be summed up: {answer.failure}")
        if isinstance(answer.value, Failure):
            raise ScoreError(answer.value.reason)
        found: Summaries = answer.value
        return found

    def wait(self, teams: int) -> None:
        """Wait until so many copies of the model are ready; a search begins with the first."""
        self._dispatcher.wait(teams)

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        self._opened.close()
