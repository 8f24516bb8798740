"""One plugin from a file through everything: a local run, two Ray workers, resume, front, report, export.

Each command is a process of its own, as it is for a user: what a plugin adds stays in its process.
"""

import json
import os
import sqlite3
import sys
from pathlib import Path

import pytest
from support import ROOT, secateur

PLUGIN = ROOT / "examples" / "plugin.py"
SEARCH = (
    "--plugin", PLUGIN, "--searcher", "climber", "--objectives", "kl,worst_layer", "--sparsity", 0.5,
    "--start-from", "cbrt(abs(W)) * sqrt(K)", "--batch", 4, "--seed", 3, "--threads", 1, "--promote", 1,
)  # fmt: skip


def rows(run):
    """What the archive says of each candidate, but for who measured it and how long that took."""
    with sqlite3.connect(f"file:{run}/archive.sqlite?mode=ro", uri=True) as db:
        found = db.execute(
            'SELECT key, status, metric, stage, "values", failure, fingerprint FROM trials ORDER BY number'
        ).fetchall()
    return found


@pytest.fixture(scope="module")
def run(tiny_calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin") / "run"
    done = secateur("search", tiny_calibration.folder, *SEARCH, "--budget", 16, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "worst layer" in done.stdout  # the objective is a column of the front
    return folder


def test_the_leaf_and_the_operator_are_measured(run):
    (first,) = [row for row in rows(run) if row[2] == "cbrt(abs(W)) * sqrt(K)"]
    assert first[1] in ("measured", "alias")
    assert json.loads(first[4])["kl"] > 0


def test_the_run_notes_which_file_it_was(run):
    import hashlib

    with sqlite3.connect(run / "archive.sqlite") as db:
        ((noted,),) = db.execute("SELECT value FROM facts WHERE name = 'plugins'").fetchall()
    sha256 = hashlib.sha256(PLUGIN.read_bytes()).hexdigest()
    assert json.loads(noted) == [{"name": "plugin.py", "sha256": sha256}]


def test_it_is_resumed_to_the_run_that_two_ray_workers_make_of_the_whole_budget(
    run, tiny_calibration, tmp_path
):
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    ray = ("--ray", "local", "--workers", 2)
    whole = secateur(
        "search", tiny_calibration.folder, *SEARCH, *ray, "--budget", 22, "--out", tmp_path / "whole",
        env=environment,
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    done = secateur("resume", run, "--budget", 22, "--plugin", PLUGIN)
    assert done.returncode == 0, done.stderr
    assert rows(run) == rows(tmp_path / "whole")
    assert len(rows(run)) >= 22


@pytest.mark.parametrize(
    "command",
    [("front",), ("report", "-o", "out.html"), ("resume",), ("export", "best", "--to", "text", "-o", "o")],
)
def test_nothing_runs_because_the_run_names_it(run, tmp_path, command):
    name, *others = command
    done = secateur(name, run, *others, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "was made with the plugin plugin.py (sha256" in done.stderr
    assert "give --plugin FILE.py" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_plugin_that_a_run_was_begun_without_would_change_its_course(tiny_calibration, tmp_path):
    done = secateur(
        "search", tiny_calibration.folder, "--budget", 12, "--threads", 1, "--out", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    before = rows(tmp_path / "run")
    done = secateur("resume", tmp_path / "run", "--budget", 20, "--plugin", PLUGIN)
    assert done.returncode == 2
    assert "was begun without plugin.py, which would change its course" in done.stderr
    assert rows(tmp_path / "run") == before


def test_another_file_of_that_name_is_not_the_plugin(run, tmp_path):
    (tmp_path / "plugin.py").write_text(PLUGIN.read_text() + "\n# changed\n")
    done = secateur("resume", run, "--plugin", tmp_path / "plugin.py")
    assert done.returncode == 2
    assert "was made with the plugin plugin.py (sha256" in done.stderr


def test_it_is_looked_at_and_taken_away(run, tmp_path):
    with_plugin = ("--plugin", PLUGIN)
    done = secateur("front", run, *with_plugin, "--json")
    assert json.loads(done.stdout)["objectives"] == ["kl", "worst_layer"]
    assert all(row["worst_layer"] > 0 for row in json.loads(done.stdout)["front"])
    assert secateur("report", run, *with_plugin, "-o", tmp_path / "a.html").returncode == 0
    assert "worst layer" in (tmp_path / "a.html").read_text()
    assert secateur("plot", run, *with_plugin, "-o", tmp_path / "a.svg").returncode == 0
    done = secateur("export", run, "best", "--to", "ratios-tsv", *with_plugin, "-o", tmp_path / "a.tsv")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "a.tsv").read_text().splitlines()) == 21
    done = secateur("export", run, "best", "--to", "json", *with_plugin, "-o", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    code = (
        "import sys, secateur; secateur.use_plugin(sys.argv[1]); run = secateur.open(sys.argv[2]); "
        "print(run.front()[['kl', 'worst_layer']].notna().all().all(), run.settings.searcher)"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code, PLUGIN, run], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "climber"], done.stderr


def test_a_config_names_it_too(tiny_calibration, tmp_path):
    (tmp_path / "s.toml").write_text(
        f'[search]\nplugins = ["{PLUGIN}"]\nstart_from = ["cbrt(abs(W)) * X"]\nbudget = 12\n'
        'searcher = "climber"\n'
        'operators = ["cbrt", "mul", "abs"]\nleaves = "W,X,K"\nseed = 1\nstage = "screen"\n'
        'objectives = ["worst_layer", "size"]\nthreads = 1\n'
    )
    done = secateur(
        "search", tiny_calibration.folder, "--config", tmp_path / "s.toml", "--out", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    found = [row[2] for row in rows(tmp_path / "run")]
    assert "cbrt(abs(W)) * X" in found


def test_a_search_starts_from_what_another_found(run, tiny_calibration, tmp_path):
    options = ("--plugin", PLUGIN, "--start-from", run, "--budget", 16, "--seed", 9, "--threads", 1)
    done = secateur("search", tiny_calibration.folder, *options, "--out", tmp_path / "next")
    assert done.returncode == 0, done.stderr
    before = json.loads(secateur("front", run, "--plugin", PLUGIN, "--json").stdout)["front"]
    with sqlite3.connect(tmp_path / "next" / "archive.sqlite") as db:
        ((noted,),) = db.execute("SELECT value FROM facts WHERE name = 'starts'").fetchall()
    assert set(json.loads(noted)) == {row["metric"] for row in before}
    assert Path(run).is_dir()
