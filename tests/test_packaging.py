"""A wheel: built from what is tracked, installed in an environment of its own, and used there."""

import json
import os
import subprocess
import sys
import zipfile

from exported import make_run
from support import ROOT


def test_it_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tops = ("cli", "metrics_dsl", "results", "search", "service", "testing", "workers")
    ours = {
        name for name in tracked.stdout.split() if name.split("/")[0] in tops or name.endswith("py.typed")
    }
    ours |= {name for name in tracked.stdout.split() if "/" not in name and name.endswith(".py")}
    assert names == {f"secateur/{name}" for name in ours if (ROOT / name).is_file()}
    assert len(names) > 140


def test_it_reports_and_exports(installed, tmp_path):
    run = tmp_path / "run"
    make_run(run)
    done = installed("report", run, "-o", tmp_path / "a.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")
    for form, name in (("json", "best.json"), ("python", "best.py")):
        done = installed("export", run, "best", "--to", form, "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "best.json").read_text())["format"] == "secateur.candidate"


def test_it_stages_itself_for_a_job(installed, tmp_path):
    (tmp_path / "search.toml").write_text('[search]\ncalibration = "/shared/cal"\nout = "/shared/run"\n')
    code = (
        "import sys; from pathlib import Path; from secateur import Submission\n"
        "stage = Path(sys.argv[1]) / 'stage'; stage.mkdir()\n"
        "Submission.read(Path(sys.argv[1]) / 'search.toml').stage(stage)"
    )
    done = installed("-c", code, tmp_path, module="")
    assert done.returncode == 0, done.stderr
    code = (
        "import secateur.cli.main, secateur; print(secateur.__file__); import secateur.results.report.report"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "stage", capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == str(tmp_path / "stage" / "secateur" / "__init__.py"), done.stderr
