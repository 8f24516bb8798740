"""The same search on the workers of a Ray cluster: equal figures, whatever dies."""

import contextlib
import gc
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from itertools import combinations, pairwise

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur import Listener, run_search
from secateur.metrics_dsl.parser import parse_metric
from secateur.metrics_dsl.published import PUBLISHED
from secateur.results.archive.archive import Archive
from secateur.results.archive.database import ArchiveError
from secateur.search.core.candidate import Candidate, Layer, uniform
from secateur.search.settings import SearchSettings
from secateur.workers.calibrate.folder import CalibrationError
from secateur.workers.cluster.ray_evaluator import RayEvaluator
from secateur.workers.cluster.settings import Cluster
from secateur.workers.measure.messages import Window
from secateur.workers.measure.partition import split_blocks
from secateur.workers.measure.worker import Device, Worker, WorkerError, WorkerOptions
from secateur.workers.model import load_blocks
from support import assert_same_facts, count, facts, in_process, wait_for

CLUSTERS = {"one": (1, 1), "two": (2, 1), "split": (2, 2)}  # workers, shards


@pytest.fixture(scope="module")
def ray_session():
    """One Ray session for this file: what is `--ray local` joins it."""
    from secateur import Cluster

    Cluster("local").set_environment()
    from secateur.workers.cluster.connection import connected

    with connected("local"):
        yield
    # Ray leaves the handles of its processes behind; collected later they would warn in somebody else's test.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def evaluator_on(calibration, workers, shards=1, **options):
    options = WorkerOptions(device=Device("cpu", threads=1), **options)
    return RayEvaluator(calibration, Cluster("local", workers, shards), options)


def measured(evaluator, candidates):
    """Everything that can be measured, without seconds and names."""
    calls = [("screen", "selection", 0), ("layer", "selection", 0), ("model", "selection", 0),
             ("model", "selection", 64), ("model", "holdout", 0)]  # fmt: skip
    found = {call: evaluator.measure(candidates, *call) for call in calls}
    few = [c for c in candidates if c.group == "row"][:2]
    found["sensitivity"] = evaluator.measure(few, "sensitivity", "statistics", 128)
    return {
        call: [(m.values, m.layer_errors, m.parts, m.fingerprint, m.tokens, m.failure, m.sensitivities)
               for m in ms]
        for call, ms in found.items()
    }  # fmt: skip


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_measures_what_one_process_does(ray_session, tiny_calibration, tiny_evaluator, name):
    layers = tiny_evaluator.layers
    rng = np.random.default_rng(0)
    candidates = [uniform(p.expression, layers, 0.6) for p in PUBLISHED.values()]
    candidates += [Candidate(parse_metric("abs(W) * X"), tuple(rng.uniform(0.3, 0.8, len(layers))), group)
                   for group in ("row", "layer")]  # fmt: skip
    candidates.append(uniform(parse_metric("exp(W * 1e30)"), layers, 0.5))  # fails
    evaluator = evaluator_on(tiny_calibration, *CLUSTERS[name])
    try:
        assert measured(evaluator, candidates) == measured(tiny_evaluator, candidates)
        for metric in ("abs(W) * X", "exp(W * 1e30)"):
            sums = []
            for each in (tiny_evaluator, evaluator):
                try:
                    sums.append(each.summarise(parse_metric(metric), ("mean", "outliers_5", "quantiles")))
                except ValueError as error:
                    sums.append(str(error))
            if isinstance(sums[0], str):
                assert sums[0] == sums[1]
            else:
                assert all(np.array_equal(sums[0][r], sums[1][r]) for r in sums[0])
        assert evaluator.measure([], "screen") == []
        (found,) = evaluator.measure(candidates[:1], "screen")
        assert found.attempts == 1
        assert len(found.worker.split("+")) == CLUSTERS[name][1]
        assert all(int(one.rpartition(":")[2]) for one in found.worker.split("+"))
    finally:
        evaluator.close()


SEARCHES = {
    "metrics": {"budget": 60, "batch": 8, "sparsity": 0.5},
    "ratios": {"space": "layer", "metric": "wanda", "searcher": "descent", "sparsity": 0.6, "budget": 60,
               "rungs": "64"},
    "both": {"space": "tree+curve", "objectives": "kl", "sparsity": 0.6, "budget": 64, "rungs": "64"},
}  # fmt: skip


def settings_of(calibration, name):
    return SearchSettings.read({"calibration": calibration.folder, "seed": 5, "threads": 1, **SEARCHES[name]})


@pytest.fixture(scope="module")
def local_runs(tiny_calibration, tmp_path_factory):
    folders = {}
    for name in SEARCHES:
        folders[name] = tmp_path_factory.mktemp("local") / name
        run_search(settings_of(tiny_calibration, name), folders[name])
    return folders


@pytest.mark.parametrize(
    ("name", "search"),
    [("one", "metrics"), ("two", "metrics"), ("two", "ratios"), ("two", "both"), ("split", "both")],
)
def test_one_seed_gives_one_archive(ray_session, tiny_calibration, local_runs, tmp_path, search, name):
    workers, shards = CLUSTERS[name]
    for attempt in range(3):  # a worker that starts late on a busy machine may find nothing left to do
        archive = run_search(
            settings_of(tiny_calibration, search),
            tmp_path / f"run-{attempt}",
            None,
            Cluster("local", workers, shards),
        )
        assert_same_facts(facts(archive.folder), facts(local_runs[search]))
        rows = archive.frame()
        assert rows["worker"].notna().all()
        assert (rows["attempts"] == 1).all()
        names = {one for row in rows["worker"] for one in row.split("+")}
        if len(names) == workers:
            break
    assert len(names) == workers
    assert Archive(local_runs[search]).frame()["worker"].isna().all()


def test_workers_killed_at_random_lose_nothing(ray_session, tiny_calibration, tmp_path):
    """200 candidates, some workers killed: each measured once, the archive as if nothing had been."""
    wanted = SearchSettings.read(
        {"calibration": tiny_calibration.folder, "seed": 3, "threads": 1, "budget": 200, "batch": 16}
    )
    run_search(wanted, tmp_path / "undisturbed")
    is_over, killed = threading.Event(), []
    rng = random.Random(0)

    def kill():
        """Kill one of those that have measured something, after every 70 measurements."""
        while not is_over.wait(0.02):
            with contextlib.suppress(ArchiveError, sqlite3.Error), Archive(tmp_path / "run") as archive:
                counts = dict(archive.rows("SELECT worker, count(*) FROM measurements GROUP BY worker"))
                pids = [int(name.rpartition(":")[2]) for name in counts]
                at_work = [pid for pid in pids if psutil.pid_exists(pid)]
                if at_work and sum(counts.values()) >= 70 * (len(killed) + 1):
                    killed.append(rng.choice(at_work))
                    os.kill(killed[-1], signal.SIGKILL)

    lines = []
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run_search(wanted, tmp_path / "run", Listener(report=lines.append), Cluster("local", 2))
    finally:
        is_over.set()
        killer.join()
    assert len(killed) >= 3
    assert any("is lost" in line for line in lines)
    assert_same_facts(facts(tmp_path / "run"), facts(tmp_path / "undisturbed"))
    query = "SELECT key, stage, part, of_tokens FROM measurements"
    once = Archive(tmp_path / "run").rows(query)
    assert len(once) == len(set(once))
    assert set(once) == set(Archive(tmp_path / "undisturbed").rows(query))


NODES = """
import sys, threading, time
from ray.cluster_utils import Cluster as Machines
from secateur import run_search, Listener
from secateur.results.archive.archive import Archive
from secateur.results.archive.database import ArchiveError
from secateur.search.settings import SearchSettings
from secateur.workers.cluster.settings import Cluster

machines = Machines(initialize_head=True, connect=False, head_node_args={"num_cpus": 1})
second = machines.add_node(num_cpus=1)
import ray
ray.init(address=machines.address, log_to_driver=False, logging_level="ERROR")

def kill():
    while True:
        time.sleep(0.2)
        try:
            with Archive(sys.argv[2]) as archive:
                done = archive.rows("SELECT count(DISTINCT worker), count(*) FROM measurements")[0]
        except Exception:
            continue
        if done[0] == 2 and done[1] > 40:
            machines.remove_node(second, allow_graceful=False)
            print("KILLED", flush=True)
            time.sleep(3)
            machines.add_node(num_cpus=1)
            print("BACK", flush=True)
            return

threading.Thread(target=kill, daemon=True).start()
settings = SearchSettings.load(__import__("pathlib").Path(sys.argv[1]))
run_search(settings, sys.argv[2], Listener(report=lambda text: print(text, flush=True)), Cluster("auto", 2))
print("ENDED", flush=True)
ray.shutdown()
machines.shutdown()
"""


def quick_deaths(place):
    """The environment of a cluster of its own, whose dead nodes are noticed within seconds."""
    return os.environ | {
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3",
        "RAY_TMPDIR": place,
    }  # fmt: skip


def test_a_lost_node_loses_nothing(tiny_calibration, tmp_path, short_place):
    wanted = SearchSettings.read(
        {"calibration": tiny_calibration.folder, "seed": 3, "threads": 1, "budget": 150, "batch": 16}
    )
    run_search(wanted, tmp_path / "undisturbed")
    result = subprocess.run(
        [sys.executable, "-c", NODES, tmp_path / "undisturbed" / "run.toml", tmp_path / "run"],
        env=quick_deaths(short_place), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "KILLED" in result.stdout, result.stdout + result.stderr
    assert "ENDED" in result.stdout, result.stdout + result.stderr
    assert_same_facts(facts(tmp_path / "run"), facts(tmp_path / "undisturbed"))


@pytest.fixture
def short_place():
    """A place for temporary files whose name leaves room for those of Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="st-", dir="/tmp") as folder:
        yield folder


def start_on_ray(wanted, out, place):
    command = [
        sys.executable, "-m", "secateur", "search", str(wanted.calibration), "--seed", "5", "--threads", "1",
        "--budget", "60", "--batch", "8", "--ray", "local", "--workers", "2", "--out", str(out),
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": place}
    )


@pytest.fixture(scope="module")
def helpers():
    """Processes of Ray whose driver is dead: the last two end a minute later, when other tests have run."""
    found = []
    yield found
    _, alive = psutil.wait_procs(found, timeout=120)
    assert not alive


def test_a_killed_driver_is_resumed_on_a_fresh_cluster(
    tiny_calibration, tmp_path, local_runs, short_place, helpers
):
    process = start_on_ray(settings_of(tiny_calibration, "metrics"), tmp_path / "run", short_place)
    assert wait_for(lambda: process.poll() is None, tmp_path / "run", 30)
    helpers += psutil.Process(process.pid).children(recursive=True)
    (folder,) = os.listdir(short_place)
    assert os.stat(f"{short_place}/{folder}").st_mode & 0o077 == 0  # nobody else looks in
    process.kill()
    process.communicate()
    before = count(tmp_path / "run")
    assert before < count(local_runs["metrics"])
    result = subprocess.run(
        [sys.executable, "-m", "secateur", "resume", tmp_path / "run", "--ray", "local", "--workers", "1"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"TMPDIR": short_place},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert_same_facts(facts(tmp_path / "run"), facts(local_runs["metrics"]))
    assert os.listdir(short_place) == []  # what the killed one left is swept


def test_a_terminated_driver_ends_in_order(tiny_calibration, tmp_path, local_runs, short_place):
    process = start_on_ray(settings_of(tiny_calibration, "metrics"), tmp_path / "run", short_place)
    assert wait_for(lambda: process.poll() is None, tmp_path / "run", 30)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"continue with: secateur resume {tmp_path / 'run'} --ray local" in errors
    assert "Traceback" not in errors
    assert os.listdir(short_place) == []
    known = facts(local_runs["metrics"])
    found = facts(tmp_path / "run")
    assert_same_facts(found, known[: len(found)])


LATE = """
import sys, time
from secateur.workers.cluster.settings import Cluster
Cluster().set_environment()  # before Ray is imported, as a search does
import ray._private.node as node, ray._private.services as services
from secateur.cli.main import main
def none_yet(*_args, **_options): raise RuntimeError("not there yet")
class Hurried:
    def __getattr__(self, name): return getattr(time, name)
    def monotonic(self): return 30 * time.monotonic()
node.time, services.get_node = Hurried(), none_yet
sys.argv[0] = "secateur"
main()
"""


def test_a_ray_that_does_not_start_in_time_is_a_sentence(tiny_calibration, tmp_path, short_place):
    words = ("search", tiny_calibration.folder, "--ray", "local", "--workers", "1", "--out", tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", LATE, *map(str, words)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"TMPDIR": short_place},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Ray did not start on this machine" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(short_place) == []
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if short_place in " ".join(p.info["cmdline"] or ())
    ]
    assert not (tmp_path / "run").exists()


# What goes wrong with one call -------------------------------------------------------------------


def ship_this_file():
    """Actors cannot import a test file: its classes travel whole."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Odd:
    """An actor that does to a call what its items say."""

    def __init__(self, folder):
        self.folder = folder

    def ready(self):
        return f"here:{os.getpid()}"

    def work(self, items):
        from secateur.workers.cluster.dispatch import Exhausted

        for item in items:
            with open(f"{self.folder}/{item}", "a") as file:
                file.write(f"{os.getpid()}\n")
        if 13 in items:
            os._exit(1)
        if 7 in items:
            time.sleep(1000)
        if 5 in items:
            raise RuntimeError("no such kernel\nfor this shape")
        if len(items) > 2 or 3 in items:
            return Exhausted("out of memory")
        return [item * item for item in items]


class OddTeam:
    def __init__(self, folder):
        self.name, self.depth, self.folder = "odd", 2, folder
        self.make()

    def make(self):
        import ray

        self.actor = ray.remote(Odd).options(num_cpus=0.1, max_restarts=-1).remote(str(self.folder))

    def prepare(self):
        return self.actor.ready.remote()

    def work(self, items):
        return self.actor.work.remote(items)

    def forget(self):
        pass

    def renew(self):
        self.stop()
        self.make()

    def stop(self):
        import ray

        ray.kill(self.actor)


def test_a_call_that_kills_hangs_raises_or_is_too_large_fails_alone(ray_session, tmp_path):
    from secateur.workers.cluster.dispatch import Dispatcher

    ship_this_file()
    dispatcher = Dispatcher([OddTeam(tmp_path), OddTeam(tmp_path)], timeout=8, patience=120)
    answers = list(dispatcher.run(lambda team, items: team.work(items), 40, 8))
    dispatcher.stop()
    items = sorted(item for answer in answers for item in answer.items)
    assert items == list(range(40))
    values = {i: v for a in answers if not a.failure for i, v in zip(a.items, a.value, strict=True)}
    assert values == {i: i * i for i in range(40) if i not in (3, 5, 7, 13)}
    failures = {a.items[0]: a for a in answers if a.failure}
    assert sorted(failures) == [3, 5, 7, 13]
    assert failures[3].failure == "out of memory"
    assert "no answer within the time-out of 8 seconds" in failures[7].failure
    assert "RuntimeError: no such kernel" in failures[5].failure
    assert failures[13].failure.startswith(f"given up after {failures[13].attempts} attempts")
    killed = (tmp_path / "13").read_text().split()
    assert len(set(killed)) >= 2  # it has taken two workers with it, by its own doing
    assert not any(len(a.items) > 2 for a in answers)


class Broken(Odd):
    """Raises whatever it is asked, as a process does whose GPU has failed, until it is made anew."""

    def work(self, items):
        if not os.path.exists(f"{self.folder}/renewed"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().work(items)


class BrokenTeam(OddTeam):
    def make(self):
        import ray

        self.actor = ray.remote(Broken).options(num_cpus=0.1, max_restarts=-1).remote(str(self.folder))

    def renew(self):
        (self.folder / "renewed").touch()
        super().renew()


def test_a_worker_that_is_broken_does_not_fail_the_candidates(ray_session, tmp_path):
    from secateur.workers.cluster.dispatch import Dispatcher

    ship_this_file()
    notes = []
    teams = [OddTeam(tmp_path), BrokenTeam(tmp_path)]
    dispatcher = Dispatcher(teams, timeout=60, patience=60, report=notes.append)
    dispatcher.wait(2)
    answers = list(dispatcher.run(lambda team, items: team.work(items), 3))
    dispatcher.stop()
    assert sorted(i for a in answers for i in a.items) == [0, 1, 2]
    assert not any(a.failure for a in answers)
    assert len(notes) == 1
    assert "RuntimeError: CUDA error" in notes[0]


def test_what_a_device_has_no_memory_for_is_tried_again_and_then_told(
    ray_session, tiny_calibration, tiny_evaluator, monkeypatch
):
    import torch
    from secateur.workers.cluster.actor import Actor, text_of
    from secateur.workers.cluster.dispatch import Exhausted

    actor = Actor(str(tiny_calibration.folder), WorkerOptions(device=Device("cpu", threads=1)))
    actor.prepare()
    candidate = uniform(parse_metric("abs(W) * X"), tiny_evaluator.layers, 0.5)
    real, left = actor._worker.errors, [1]

    def short_of_memory(candidates, stage):
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return real(candidates, stage)

    monkeypatch.setattr(actor._worker, "errors", short_of_memory)
    (found,) = actor.layers([text_of(candidate)], "layer")
    assert found.values == tiny_evaluator.measure([candidate], "layer")[0].values
    left[0] = 2
    answer = actor.layers([text_of(candidate)], "layer")
    assert isinstance(answer, Exhausted)
    assert "ran out of the device's memory: tried to allocate 2 GiB" in answer.reason
    assert actor.layers([text_of(candidate)], "layer", answer) == answer  # of the shard before
    assert actor.model(text_of(candidate), Window("selection", 0), answer) == answer


def test_workers_that_never_come_are_a_sentence(ray_session, tmp_path):
    from secateur.workers.cluster.dispatch import Dispatcher

    ship_this_file()

    class Nowhere(OddTeam):
        def make(self):
            import ray

            self.actor = ray.remote(Odd).options(num_cpus=64).remote("")

    dispatcher = Dispatcher([Nowhere(tmp_path)], timeout=3, patience=2)
    with pytest.raises(WorkerError, match="expected workers within 2 seconds, got none of 1"):
        dispatcher.wait()
    dispatcher.stop()


# What cannot be done -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--workers", "3", "--shards", "2"),
            "whole copies of a model of 2 shards, got 3; choose --workers 2",
        ),
        (("--workers", "0"), "expected at least 1 worker, or auto, got 0"),
        (("--workers", "many"), "expected a whole number or auto for workers, got 'many'"),
        (("--workers", "64"), "expected a cluster with room for 64 workers"),
        (("--workers", "4", "--shards", "4", "--cpus-per-worker", "0.1"), "at most 3 shards, one a block"),
        (("--workers", "1", "--device", "cuda"), "expected GPUs for the device cuda"),
        (("--timeout", "0"), "expected a time-out above 0 seconds"),
        (("--cpus-per-worker", "nan"), "finite number of CPUs above 0 per worker, got nan"),
        (("--gpus-per-worker", "-1"), "finite number of GPUs of 0 or more per worker, got -1"),
        (("--ray", "ray://head:10001"), "expected --ray local, auto or HOST:PORT, got 'ray://head:10001'"),
        (
            ("--workers", "1", "--gpus-per-worker", "1.5", "--device", "auto"),
            "a part of one GPU or whole ones",
        ),
    ],
)
def test_what_a_cluster_cannot_do_is_a_sentence(ray_session, tiny_calibration, tmp_path, options, sentence):
    result = in_process(
        "search", tiny_calibration.folder, "--ray", "local", *options, "--out", tmp_path / "run"
    )
    assert result.returncode == 2
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2
    assert not (tmp_path / "run" / "archive.sqlite").exists()


def test_an_address_where_nothing_listens_is_told_at_once(monkeypatch, tmp_path):
    from secateur.workers.cluster.connection import _check_there

    began = time.monotonic()
    with pytest.raises(
        WorkerError, match=r"no Ray cluster at 127\.0\.0\.1:1: Connection refused; start one with"
    ):
        _check_there("127.0.0.1:1")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:2\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(WorkerError, match=r"no Ray cluster at 127\.0\.0\.1:2"):
        _check_there("auto")
    for odd in ("a..b:1", f"{'x' * 70}:1", "a\nb:1"):
        with pytest.raises(WorkerError, match=r"^there is no Ray cluster at [^\n]+; start one with"):
            _check_there(odd)
    (tmp_path / "ray" / "ray_current_cluster").write_bytes(b"\xff:3")  # whoever can write there wrote
    with pytest.raises(WorkerError, match=r"no Ray cluster at .*:3"):
        _check_there("auto")
    assert time.monotonic() - began < 5


def test_options_of_workers_want_a_cluster(tiny_calibration, tmp_path):
    result = in_process("search", tiny_calibration.folder, "--workers", "2", "--out", tmp_path / "run")
    assert result.returncode == 2
    assert "expected --ray local, auto or an address" in result.stderr


def test_a_node_that_does_not_see_the_calibration_is_named(ray_session, tiny_calibration, monkeypatch):
    from secateur.workers.cluster import connection

    ship_this_file()
    here, real = os.getpid(), connection.look_around

    def elsewhere(folder, model):
        return real(folder, model) if os.getpid() == here else view["there"]

    model = tiny_calibration.model_source
    digest, _, versions = real(str(tiny_calibration.folder), model)
    monkeypatch.setattr(connection, "look_around", elsewhere)
    view = {}
    for view["there"], sentence in (
        (("", False, versions), r"calibration .* on every node, got none on 127\.0\.0\.1; put it where"),
        (("0" * 64, True, versions), "calibration .* on every node, got another one on"),
        ((digest, False, versions), "expected the model .* on every node, got none on"),
    ):
        with pytest.raises(CalibrationError, match=sentence):
            connection.check_nodes(tiny_calibration, model, 1, 0, print)
    view["there"] = digest, True, versions | {"torch": "1.0"}
    lines = []
    connection.check_nodes(tiny_calibration, model, 1, 0, lines.append)
    assert lines == ["the node 127.0.0.1 has torch 1.0: its figures may differ in the last digits"]


@pytest.mark.parametrize("where", ["files", "memory"])
def test_a_worker_of_some_blocks_holds_no_others(tiny_calibration, tiny_evaluator, monkeypatch, where):
    if where == "memory":  # of a model whose files hold its blocks in another form
        monkeypatch.setattr(load_blocks, "decoder_in_files", lambda *_, **_options: None)
    first, last = (Worker(tiny_calibration, blocks=blocks) for blocks in (range(2), range(2, 3)))
    for worker in (first, last):
        for index, block in enumerate(worker.decoder.blocks):
            assert all(p.is_meta == (index not in worker.blocks) for p in block.parameters())
    candidate = uniform(parse_metric("abs(W) * X"), tiny_evaluator.layers, 0.5)
    window = Window("selection", 0)
    passed, dense = (first.forward(c, window, None) for c in (candidate, None))
    whole = tiny_evaluator.measure([candidate], "model")[0]
    assert last.model(candidate, window, passed, dense).values == whole.values
    for worker in (first, last):
        worker.close()


# How blocks are split ------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.data())
def test_blocks_are_split_as_evenly_as_can_be(sizes, data):
    shards = data.draw(st.integers(1, len(sizes)))
    layers = [Layer(f"{b}", b, "q", size, 8) for b, size in enumerate(sizes)]
    found = split_blocks(layers, shards, 1 + max(layer.block for layer in layers))
    assert [b for held in found for b in held] == list(range(len(sizes)))
    assert len(found) == shards
    assert all(found)

    def load(cuts):
        ends = (0, *cuts, len(sizes))
        return max(sum(sizes[a:b]) for a, b in pairwise(ends))

    best = min(load(cuts) for cuts in combinations(range(1, len(sizes)), shards - 1))
    assert max(sum(sizes[b] for b in held) for held in found) == best
