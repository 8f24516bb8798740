"""Faults by real signals: a killed or interrupted search loses nothing and repeats nothing."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from secateur.results.archive.archive import Archive
from support import assert_same_facts, count, facts, in_process, secateur, wait_for

SEARCH = ("--sparsity", "0.5", "--budget", "60", "--batch", "8", "--seed", "7")

# A process that is killed needs no ending of its own: it is forked from one that has imported everything.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload([
    "secateur.service.search_run", "secateur.search.searchers.gp", "secateur.search.searchers.nsga3",
    "secateur.search.searchers.tpe", "typer.main",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
])  # fmt: skip


def start(*words):
    """Start a command in a process of its own, to be killed."""
    process = forks.Process(target=in_process, args=tuple(map(str, words)), daemon=True)
    process.start()
    return process


def kill(process):
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tiny_calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = in_process("search", tiny_calibration.folder, *SEARCH, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def measurements(folder):
    """What was measured, in the order in which it was recorded, with its times."""
    return Archive(folder).rows("SELECT rowid, key, stage, part, seconds FROM measurements ORDER BY rowid")


def test_a_run_killed_three_times_equals_the_undisturbed_one(tiny_calibration, tmp_path, undisturbed):
    folder = tmp_path / "run"
    seen = []
    command = ("search", tiny_calibration.folder, *SEARCH, "--out", folder)
    for rows in (5, 30, 70):
        process = start(*command)
        assert wait_for(process.is_alive, folder, rows)
        kill(process)
        recorded = measurements(folder)
        assert recorded[: len(seen)] == seen  # nothing is measured a second time: times would differ
        seen = recorded
        command = ("resume", folder)
    assert in_process(*command).returncode == 0
    assert measurements(folder)[: len(seen)] == seen
    assert_same_facts(facts(folder), facts(undisturbed))
    assert len(measurements(folder)) == len(measurements(undisturbed))


@pytest.mark.parametrize(
    ("searcher", "space", "sparsity"),
    [("gp", "tree+curve", "0.6"), ("nsga3", "curve", "0.6"), ("tpe", "curve", "0.6"),
     ("evolution", "layer", "0.6"), ("cma", "curve", "0.6"), ("descent", "layer", "0.6"),
     ("descent", "layer", "0.3:0.75"), ("random", "meta+block", "0.6"), ("grid", "ramp", "0.6")],
)  # fmt: skip
def test_every_searcher_continues_where_it_was_killed(tiny_calibration, tmp_path, searcher, space, sparsity):
    objectives, budget = ("kl,density", "200") if ":" in sparsity else ("kl", "80")
    options = ("--searcher", searcher, "--space", space, "--objectives", objectives, "--sparsity", sparsity,
               "--rungs", "64", "--budget", budget,
               "--batch", "4" if searcher == "descent" else "8")  # fmt: skip
    undisturbed = in_process("search", tiny_calibration.folder, *options, "--out", tmp_path / "whole")
    assert undisturbed.returncode == 0, undisturbed.stderr
    published = set(Archive(tmp_path / "whole").baselines()["key"])
    whole = [key not in published for _, key, *_ in measurements(tmp_path / "whole")]
    rows = (whole.index(True) + len(whole)) // 2  # midway through what the searcher itself proposed
    process = start("search", tiny_calibration.folder, *options, "--out", tmp_path / "killed")
    assert wait_for(process.is_alive, tmp_path / "killed", rows)
    kill(process)
    seen = measurements(tmp_path / "killed")
    assert rows <= len(seen) < len(whole)
    assert Archive(tmp_path / "killed").frame()["baseline"].isna().any()
    assert in_process("resume", tmp_path / "killed").returncode == 0
    assert measurements(tmp_path / "killed")[: len(seen)] == seen
    assert_same_facts(facts(tmp_path / "killed"), facts(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_soon_and_keeps_what_was_measured(tiny_calibration, tmp_path, undisturbed, number):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "secateur", "search", tiny_calibration.folder, *SEARCH, "--out", folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: process.poll() is None, folder, 20)
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - began < 3
    assert process.returncode == 130
    assert f"continue with: secateur resume {folder}" in errors
    assert "Traceback" not in errors
    assert count(folder) >= 20
    assert in_process("resume", folder).returncode == 0
    assert_same_facts(facts(folder), facts(undisturbed))


def test_one_seed_gives_one_run_in_every_process(tiny_calibration, tmp_path, undisturbed):
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    done = secateur("search", tiny_calibration.folder, *SEARCH, "--out", tmp_path / "run", env=environment)
    assert done.returncode == 0
    assert_same_facts(facts(tmp_path / "run"), facts(undisturbed))


def test_a_changed_calibration_cannot_continue_a_run(
    tiny_calibration, tiny_model, text_file, tmp_path, undisturbed
):
    import shutil

    from secateur.workers.calibrate.calibration import calibrate
    from support import small_request

    calibrate(small_request(tiny_model, text_file, seed=9), tmp_path / "other")
    shutil.copytree(undisturbed, tmp_path / "run")
    file = tmp_path / "run" / "run.toml"
    file.write_text(file.read_text().replace(str(tiny_calibration.folder), str(tmp_path / "other")))
    done = in_process("resume", tmp_path / "run")
    assert done.returncode == 2
    assert "was measured on another calibration" in done.stderr


def test_changed_settings_cannot_continue_a_run(tmp_path, undisturbed):
    import shutil

    shutil.copytree(undisturbed, tmp_path / "run")
    file = tmp_path / "run" / "run.toml"
    before = file.read_text()
    for old, new in (("seed = 7", "seed = 1"), ("sparsity = 0.5", "sparsity = 0.6")):
        assert old in before
        file.write_text(before.replace(old, new))
        done = in_process("resume", tmp_path / "run", "--budget", 1000)
        assert done.returncode == 2
        assert f"expected {old} in " in done.stderr
