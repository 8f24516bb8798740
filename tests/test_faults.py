"""Faults by real signals: a killed or interrupted search loses nothing and repeats nothing."""

import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from secateur.results.archive import Archive
from support import in_process, secateur

SEARCH = ("--sparsity", "0.5", "--budget", "60", "--batch", "8", "--seed", "7")


def start(calibration, folder, options=SEARCH):
    """Start a search in a process of its own."""
    words = ("search", str(calibration.folder), *options, "--out", str(folder))
    command = [sys.executable, "-m", "secateur", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def count(folder, table="measurements"):
    """Rows of a table while the search writes it."""
    try:
        db = sqlite3.connect(f"file:{folder}/archive.sqlite?mode=ro", uri=True)
        return db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def wait_for(process, folder, rows):
    deadline = time.monotonic() + 120
    while count(folder) < rows and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process.poll() is None


def facts(folder):
    """Rows without their times."""
    return [
        (t.candidate, t.status, t.alias_of, t.measurement.stage, t.measurement.layer_errors,
         dict(t.measurement.values), t.measurement.failure, t.measurement.fingerprint)
        for t in Archive(folder).trials()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tiny_calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(tiny_calibration, folder)
    process.communicate()
    assert process.returncode == 0
    return folder


def measurements(folder):
    """What was measured, in the order in which it was recorded, with its times."""
    return Archive(folder).rows("SELECT rowid, key, stage, part, seconds FROM measurements ORDER BY rowid")


def test_a_run_killed_three_times_equals_the_undisturbed_one(tiny_calibration, tmp_path, undisturbed):
    folder = tmp_path / "run"
    seen = []
    process = start(tiny_calibration, folder)
    for rows in (5, 30, 70):
        assert wait_for(process, folder, rows)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        recorded = measurements(folder)
        assert recorded[: len(seen)] == seen  # nothing is measured a second time: times would differ
        seen = recorded
        process = subprocess.Popen(
            [sys.executable, "-m", "secateur", "resume", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    process.communicate()
    assert process.returncode == 0
    assert measurements(folder)[: len(seen)] == seen
    assert facts(folder) == facts(undisturbed)
    assert len(measurements(folder)) == len(measurements(undisturbed))


@pytest.mark.parametrize(
    ("searcher", "space"),
    [("gp", "tree+curve"), ("nsga3", "curve"), ("tpe", "curve"), ("evolution", "layer"), ("cma", "curve"),
     ("descent", "layer"),
     ("random", "meta+block"), ("grid", "ramp")],
)  # fmt: skip
def test_every_searcher_continues_where_it_was_killed(tiny_calibration, tmp_path, searcher, space):
    options = ("--searcher", searcher, "--space", space, "--objectives", "kl", "--sparsity", "0.6",
               "--rungs", "64", "--budget", "80",
               "--batch", "4" if searcher == "descent" else "8")  # fmt: skip
    undisturbed = in_process("search", tiny_calibration.folder, *options, "--out", tmp_path / "whole")
    assert undisturbed.returncode == 0, undisturbed.stderr
    process = start(tiny_calibration, tmp_path / "killed", options)
    assert wait_for(process, tmp_path / "killed", 60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    seen = measurements(tmp_path / "killed")
    assert 60 <= len(seen) < len(measurements(tmp_path / "whole"))
    assert in_process("resume", tmp_path / "killed").returncode == 0
    assert measurements(tmp_path / "killed")[: len(seen)] == seen
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_soon_and_keeps_what_was_measured(tiny_calibration, tmp_path, undisturbed, number):
    folder = tmp_path / "run"
    process = start(tiny_calibration, folder)
    assert wait_for(process, folder, 20)
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - began < 3
    assert process.returncode == 130
    assert f"continue with: secateur resume {folder}" in errors
    assert "Traceback" not in errors
    assert count(folder) >= 20
    assert secateur("resume", folder).returncode == 0
    assert facts(folder) == facts(undisturbed)


def test_one_seed_gives_one_run_in_every_process(tiny_calibration, tmp_path, undisturbed):
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    done = secateur("search", tiny_calibration.folder, *SEARCH, "--out", tmp_path / "run", env=environment)
    assert done.returncode == 0
    assert facts(tmp_path / "run") == facts(undisturbed)


def test_a_changed_calibration_cannot_continue_a_run(
    tiny_calibration, tiny_model, text_file, tmp_path, undisturbed
):
    import shutil

    from secateur.workers.calibration import calibrate
    from support import small_request

    calibrate(small_request(tiny_model, text_file, seed=9), tmp_path / "other")
    shutil.copytree(undisturbed, tmp_path / "run")
    file = tmp_path / "run" / "run.toml"
    file.write_text(file.read_text().replace(str(tiny_calibration.folder), str(tmp_path / "other")))
    done = secateur("resume", tmp_path / "run")
    assert done.returncode == 2
    assert "was measured on another calibration" in done.stderr
