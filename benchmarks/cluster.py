"""What workers add: candidates per second on one and two of them, and what handing out a candidate costs.

    .venv/bin/python benchmarks/cluster.py runs/smollm2-calibration

Workers have one CPU and one thread each. The first table needs a machine with two idle cores, for a worker
reads all weights of the model for each candidate: what two of them share is the memory's bandwidth.
"""

import os
import sys
import time

from secateur import PUBLISHED, Calibration, Cluster, Device, RayEvaluator, WorkerOptions, uniform

STAGES = {"screen": 288, "layer": 16, "model": 12}  # candidates measured at each
EMPTY = {1: 50, 2: 100, 8: 400, 64: 2560}  # workers: candidates of 0.1 seconds


def candidates(evaluator, count):
    """Wanda at as many sparsities: each another candidate, none with hidden states in common."""
    metric = PUBLISHED["wanda"].expression
    return [uniform(metric, evaluator.layers, 0.4 + 0.3 * i / count) for i in range(count)]


def throughput(calibration):
    print(f"{'workers':>8}" + "".join(f"{stage:>12}" for stage in STAGES) + "   candidates per second")
    rates = {}
    for workers in (1, 2):
        options = WorkerOptions(device=Device("cpu", threads=1), reuse=False)
        evaluator = RayEvaluator(calibration, Cluster("local", workers), options)
        evaluator.wait(workers)
        for stage, count in STAGES.items():
            chosen = candidates(evaluator, count)
            evaluator.measure(chosen[: 4 * workers], stage)  # the dense model's outputs, on each worker
            start = time.perf_counter()
            found = evaluator.measure(chosen, stage)
            rates[stage, workers] = count / (time.perf_counter() - start)
            assert not any(m.failure for m in found)
            assert len({m.worker for m in found}) == workers
        evaluator.close()
        print(f"{workers:>8}" + "".join(f"{rates[stage, workers]:>12.3f}" for stage in STAGES))
    print(f"{'gain':>8}" + "".join(f"{rates[stage, 2] / rates[stage, 1]:>12.2f}" for stage in STAGES))


class Empty:
    """An actor that does nothing for a while."""

    def ready(self):
        """Return its name."""
        return f"empty:{os.getpid()}"

    def work(self, items, seconds):
        """Take some seconds over items."""
        time.sleep(seconds)
        return items


class EmptyTeam:
    """A team of one such actor."""

    def __init__(self):
        import ray

        self.name, self.depth = "empty", 2
        self.actor = ray.remote(Empty).options(num_cpus=0).remote()

    def prepare(self):
        """Return a reference to its name."""
        return self.actor.ready.remote()

    def stop(self):
        """End the actor."""
        import ray

        ray.kill(self.actor)


def overhead():
    from secateur import Dispatcher, connected

    print(f"{'workers':>8}{'us a candidate':>16}{'efficiency at 0.1 s':>22}")
    with connected("local"):
        for workers, count in EMPTY.items():
            dispatcher = Dispatcher([EmptyTeam() for _ in range(workers)], timeout=60, patience=600)
            dispatcher.wait(workers)
            times = {}
            for seconds in (0.0, 0.1):
                start = time.perf_counter()
                answers = list(dispatcher.run(lambda t, i, s=seconds: t.actor.work.remote(i, s), count))
                times[seconds] = time.perf_counter() - start
                assert len(answers) == count
            dispatcher.stop()
            efficiency = 0.1 * count / workers / times[0.1]
            print(f"{workers:>8}{1e6 * times[0.0] / count:>16.0f}{efficiency:>22.1%}", flush=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    Cluster("local").set_environment()
    overhead()
    if len(sys.argv) > 1:
        throughput(Calibration(sys.argv[1]))
