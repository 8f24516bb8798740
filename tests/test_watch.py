"""Watching a run: ended, going on, just begun or left, on terminals of any width and off them."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from secateur.metrics_dsl.parser import parse
from secateur.results.archive import database
from secateur.results.archive.archive import Archive
from secateur.results.archive.database import ArchiveError
from secateur.results.report.report import write_report
from secateur.results.summary.table import verdict
from secateur.results.terminal.progress import Progress
from secateur.results.terminal.watch import HERE, Watch
from secateur.results.terminal.watch_text import follow, plain, record
from secateur.search.core import files
from secateur.search.core.budget import Budget
from secateur.search.core.candidate import Candidate, Measurement, Trial
from support import in_process

SETTINGS = '[search]\ncalibration = "/nowhere"\nsparsity = 0.5\nobjectives = ["kl", "size"]\nbudget = {}\n'
SEARCH = ("--sparsity", "0.5", "--budget", "60", "--batch", "8", "--seed", "7")
TEXTS = ("abs(W)", "abs(W) * X", "W**0.9 * X", "abs(W) * (X + G)")


@pytest.fixture(scope="module")
def ended(tiny_calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch") / "run"
    assert in_process("search", tiny_calibration.folder, *SEARCH, "--out", folder).returncode == 0
    return folder


def write(folder, trials=(), measured=(), budget=8, owner=None, **facts):
    """Write a run by hand: its settings, an archive and who has written it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(SETTINGS.format(budget))
    with Archive(folder, write=True) as archive:
        archive.keep(
            objectives=["kl", "size"], baselines={trials[0].candidate.key: "magnitude"} if trials else {}
        )
        archive.keep(**facts)
        for pairs in measured:
            archive.record(pairs, "selection")
        archive.add(trials)
    (folder / "writer.lock").write_text(owner or f"process {os.getpid()} on {socket.gethostname()}")
    return folder


def trial(text, kl, worker="", attempts=1, failure=""):
    candidate = Candidate(parse(text), (0.5,))
    values = {} if failure else {"kl": kl, "sparsity": 0.5}
    found = Measurement(
        "model", values=values, seconds=2.0, failure=failure, worker=worker, attempts=attempts
    )
    return Trial(candidate, found, "failed" if failure else "measured")


def on_cluster(folder, **options):
    """A run whose measurements came from two workers, one of which had been lost before."""
    trials = [
        trial(TEXTS[0], 2.0, "10.0.0.1:7"),
        trial(TEXTS[1], 1.0, "10.0.0.2:8", attempts=2),
        trial(TEXTS[2], 0.9, "10.0.0.2:8"),
        trial(TEXTS[3], 0.0, "10.0.0.1:7", failure="the masked model gives no finite KL"),
    ]
    return write(folder, trials, [[(t.candidate, t.measurement)] for t in trials], **options)


def searching(calibration, folder):
    words = ("search", calibration.folder, *SEARCH, "--out", folder)
    command = [sys.executable, "-m", "secateur", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def age(folder, seconds):
    for path in folder.glob("archive.sqlite*"):
        os.utime(path, (time.time() - seconds,) * 2)


class TestARun:
    def test_that_has_ended_shows_front_verdict_workers_and_funnel(self, ended):
        look = Watch(ended).look()
        assert look.state == "ended"
        text = plain(look)
        assert "ended  60 of 60 candidates" in text
        assert "on holdout" in text  # the verdict
        assert f"{HERE} " in text
        assert "rejected" in text
        assert "measurement " not in text.splitlines()[1]
        for key, metric in Archive(ended).front()[["key", "metric"]].itertuples(index=False):
            assert key[:8] in text
            assert metric in text

    def test_of_a_cluster_shows_what_each_worker_did(self, tmp_path):
        watch = Watch(on_cluster(tmp_path / "run"))
        look = watch.look()
        assert look.state == "running"
        assert look.workers.set_index("worker")["measurements"].to_dict() == {
            "10.0.0.1:7": 2,
            "10.0.0.2:8": 2,
        }
        text = plain(look)
        assert "running  4 of 8 candidates  last measurement" in text
        assert "1 measurements were begun again" in text
        assert "    1  the masked model gives no finite KL" in text
        assert "kl 0.9000  -55.0%     W**0.9 * X\nkl 2.0000  published  magnitude" in text

    def test_that_goes_on_has_a_rate(self, tmp_path):
        folder = on_cluster(tmp_path / "run")
        watch = Watch(folder)
        assert watch.look().rate is None
        late = trial("square(W)", 3.0, "10.0.0.3:9")
        write(folder, [], [[(late.candidate, late.measurement)]])
        look = watch.look()
        assert look.rate > 0
        assert look.workers.set_index("worker")["lately"].to_dict() == {
            "10.0.0.1:7": 0, "10.0.0.2:8": 0, "10.0.0.3:9": 1,
        }  # fmt: skip
        assert "measurements/s" in plain(look)
        assert "last 0s" in plain(look)

    def test_that_is_silent_says_so(self, tmp_path):
        folder = on_cluster(tmp_path / "run")
        age(folder, 200)
        assert "no news for 3m20s" in plain(Watch(folder).look())
        assert "measurements/s" not in plain(Watch(folder).look())

    def test_with_its_budget_spent_measures_on_holdout_tokens(self, tmp_path):
        look = Watch(on_cluster(tmp_path / "run", budget=4)).look()
        assert look.state == "holdout"
        assert "measuring on holdout tokens  4 of 4" in plain(look)

    def test_that_its_process_has_left_says_how_to_go_on(self, tmp_path):
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        folder = on_cluster(tmp_path / "run", owner=f"process {process.pid} on {socket.gethostname()}")
        look = Watch(folder).look()
        assert look.is_over
        assert f"secateur resume {folder}" in plain(look)

    def test_of_another_machine_is_not_taken_for_left(self, tmp_path):
        assert Watch(on_cluster(tmp_path / "run", owner="process 1 on elsewhere")).look().state == "running"

    def test_that_is_just_beginning_is_waited_for(self, tmp_path):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "run.toml").write_text(SETTINGS.format(8))
        for _ in range(2):  # without an archive, then with an empty one
            look = Watch(folder).look()
            assert look.state == "beginning"
            assert plain(look) == f"{folder}\nbeginning  nothing measured yet"
            assert record(look)["state"] == "beginning"
            (folder / "archive.sqlite").touch()
        (folder / "archive.sqlite").unlink()
        look = Watch(write(folder)).look()
        assert plain(look) == f"{folder}\nrunning  0 of 8 candidates  nothing measured yet"

    def test_of_which_only_measurements_are_known_shows_the_workers(self, tmp_path):
        found = trial(TEXTS[0], 2.0)
        text = plain(Watch(write(tmp_path / "run", [], [[(found.candidate, found.measurement)]])).look())
        assert f"{HERE} " in text

    def test_of_several_seeds_shows_the_one_that_is_written(self, tmp_path):
        for seed in range(3):
            on_cluster(tmp_path / "run" / f"seed-{seed}", budget=4, has_ended=seed == 0)
            age(tmp_path / "run" / f"seed-{seed}", 100 if seed != 1 else 10)
        (tmp_path / "run" / "seed-2" / "archive.sqlite").unlink()
        look = Watch(tmp_path / "run").look()
        assert look.folder.name == "seed-1"
        assert "seed-1, seed 2 of 3" in plain(look)
        assert look.state == "holdout"

    def test_of_several_seeds_ends_with_the_last(self, tmp_path):
        for seed in range(2):
            on_cluster(tmp_path / "run" / f"seed-{seed}", budget=4, has_ended=True)
        assert Watch(tmp_path / "run").look().state == "ended"

    def test_is_not_an_empty_folder(self, tmp_path):
        with pytest.raises(ArchiveError, match="expected a run folder with an archive"):
            Watch(tmp_path)
        with pytest.raises(ArchiveError, match="expected a run folder with an archive"):
            Watch(tmp_path / "nowhere")

    def test_is_counted_alike_by_progress_watch_and_report(self, tmp_path):
        told = [
            trial("abs(W)", 2.0),
            replace(trial("W * X", 1.0), status="rejected"),
            trial("exp(W)", 0.0, failure="the masked model gives no finite KL"),
            trial("abs(W) * X", 1.5),
        ]
        alias = [2, 3, 2, 1]  # of each of them
        for i, count in enumerate(alias):
            for k in range(count):
                status = "alias" if told[i].status == "measured" else told[i].status
                same = Candidate(parse(f"{k + 2} * ({told[i].candidate.metric})"), (0.5,))
                told.append(Trial(same, told[i].measurement, status, told[i].candidate.key))
        measured = [(t.candidate, t.measurement) for t in told[: len(alias)]]
        folder, lines = write(tmp_path / "run", told, [measured], budget=4), []
        with Archive(folder) as archive:
            progress = Progress(lines.append)
            progress.begin(Budget(4))
            progress.step("screen", 1, 1)
            progress.batch(archive, told)
            page = write_report(archive, tmp_path / "report.html").read_text()
            assert archive.counts().aliases_of == {"measured": 3, "rejected": 3, "failed": 2}
        look = Watch(folder).look()
        counted = "rejected 1  aliases 8  failed 1"
        assert lines[0].startswith("4/4 candidates ")
        assert lines[0].endswith(counted)
        assert f"funnel  {counted}" in plain(look)
        assert record(look)["spent"] == 4
        assert record(look)["funnel"] == {"model": {"measured": 2, "alias": 8, "rejected": 1, "failed": 1}}
        assert record(look)["failures"] == {"the masked model gives no finite KL": 1}
        words = " ".join(re.sub(r"<[^>]*>", " ", page).split())
        for text in ("Where 4 candidates ended", "rejected at model 1 ", "alias at model 8 ",
                     "failed at model 1 ", "4 candidates and 8 aliases, 4 of 4 candidates spent",
                     "3 of measured, 3 of rejected, 2 of failed ones", "1 the masked model"):  # fmt: skip
            assert text in words

    def test_without_candidates_has_counts_of_none(self, tmp_path):
        look = Watch(write(tmp_path / "run")).look()
        assert record(look)["funnel"] == {}
        assert str(look.overview.counts) == "rejected 0  aliases 0  failed 0"


class TestAFileSystem:
    """Between machines no memory can be shared, and a journal in it would show each its own state."""

    def test_between_machines_has_a_journal_without_shared_memory(self, tmp_path, monkeypatch):
        monkeypatch.setattr(database, "is_between_machines", lambda _path: True)
        folder = on_cluster(tmp_path / "run")
        with Archive(folder, write=True) as archive:
            late = trial("square(W)", 3.0)
            archive.record([(late.candidate, late.measurement)], "selection")
            assert archive.rows("PRAGMA journal_mode") == [("truncate",)]
            assert not list(folder.glob("*-wal"))
            assert Watch(folder).look().workers["measurements"].sum() == 5

    @pytest.mark.parametrize(
        ("folder", "found"),
        [("/home/a", False), ("/shared/runs/a", True), ("/shared/local/a", False), ("/my disk/a", True),
         ("/bucket", True), ("/sharedness", False)],
    )  # fmt: skip
    def test_is_told_by_where_it_is_mounted(self, tmp_path, folder, found):
        mounts = tmp_path / "mounts"
        mounts.write_text(
            "/dev/sda / ext4 rw 0 0\nserver:/a /shared nfs4 rw 0 0\n/dev/sdb /shared/local xfs rw 0 0\n"
            "lustre /my\\040disk lustre rw 0 0\ns3 /bucket fuse.s3fs rw 0 0\n"
        )
        assert files.is_between_machines(Path(folder), mounts) == found
        assert not files.is_between_machines(Path(folder), tmp_path / "none")


class TestATerminal:
    @pytest.mark.parametrize("width", [60, 120])
    def test_shows_no_line_that_is_too_long(self, ended, width):
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=True, width=width, height=80, color_system=None)
        assert follow(Watch(ended), console).state == "ended"
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).splitlines()
        assert any("front (kl, size)" in line for line in lines)
        assert any("abs(W)" in line for line in lines)
        assert any("…" in line for line in lines) or width > 60
        with Archive(ended) as archive:  # a sentence is broken into lines, not cut
            words = verdict(archive.frame(), archive.front(), archive.holdout_parts())
        assert words in " ".join(map(str.strip, lines))
        assert max(map(cell_len, lines)) <= width

    def test_follows_a_run_of_another_process_to_its_end(self, tiny_calibration, tmp_path, ended):
        folder = tmp_path / "run"
        process = searching(tiny_calibration, folder)
        while not (folder / "run.toml").is_file():
            assert process.poll() is None
            time.sleep(0.01)
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=True, width=120, height=80, color_system=None)
        assert follow(Watch(folder), console, pause=0.05).state == "ended"
        assert process.wait(30) == 0  # nobody held it up
        assert "running" in shown.getvalue()
        times = ["seconds"]
        assert Archive(folder).frame().drop(columns=times).equals(Archive(ended).frame().drop(columns=times))

    def test_ends_with_a_run_that_is_killed(self, tiny_calibration, tmp_path):
        folder = tmp_path / "run"
        process = searching(tiny_calibration, folder)
        while not (folder / "writer.lock").is_file() or not (folder / "writer.lock").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        look = follow(Watch(folder), Console(file=io.StringIO(), force_terminal=True), pause=0.05)
        assert look.state == "left"


class TestTheCommand:
    def test_prints_plain_text_off_a_terminal(self, ended):
        done = in_process("watch", ended)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{ended}\nended  60 of 60")
        assert "\x1b" not in done.stdout
        assert "…" not in done.stdout
        assert in_process("watch", ended, "--once").stdout == done.stdout

    def test_prints_json(self, ended):
        found = json.loads(in_process("watch", ended, "--json").stdout)
        assert found["state"] == "ended"
        assert found["spent"] == found["budget"] == 60
        assert found["best"].keys() == found["published"].keys() == {"key", "metric", "kl", "size"}
        assert found["workers"][0]["worker"] == HERE
        assert found["funnel"]["model"]["measured"] > 0

    def test_refuses_what_is_no_run_in_one_line(self, tmp_path):
        done = in_process("watch", tmp_path)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


class TestAJobThatIsPending:
    """Ray has no way to hold a job back, so the answers of its server are made up here."""

    @pytest.fixture
    def job(self, tmp_path):
        from secateur import Job

        return Job("a-job", "pending", str(tmp_path / "run"), 1.0)

    def test_is_waited_for_until_it_has_begun(self, job, tmp_path, monkeypatch):
        from secateur.service import jobs

        class Server:
            def __init__(self, address):
                assert address == "http://head:8265"

            def jobs(self):
                return [job]

            def job(self, name):
                assert name == "a-job"
                (tmp_path / "run").mkdir()
                (tmp_path / "run" / "run.toml").write_text("[search]\n")
                return job

        monkeypatch.setattr(jobs, "JobServer", Server)
        monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
        lines = []
        for name in (Path("a-job"), tmp_path / "run"):
            assert jobs.wait_for_run(name, "http://head:8265", lines.append) == (tmp_path / "run", None)
        assert lines == ["waiting for the job a-job, which is pending"]

    def test_is_named_where_nobody_waits(self, job, tmp_path, monkeypatch):
        from secateur.service import jobs

        server = type("Server", (), {"__init__": lambda *_: None, "jobs": lambda _: [job]})
        monkeypatch.setattr(jobs, "JobServer", server)
        done = in_process("watch", tmp_path / "run", "--once", "--address", "http://head:8265")
        assert done.returncode == 0
        assert done.stdout == f"{tmp_path / 'run'}: pending, the job a-job waits for its cluster\n"

    def test_that_failed_before_it_began_is_told(self, job, tmp_path, monkeypatch):
        from dataclasses import replace

        from secateur.service import jobs

        failed = replace(job, state="failed", message="no such folder")
        server = type("Server", (), {"__init__": lambda *_: None, "jobs": lambda _: [failed]})
        monkeypatch.setattr(jobs, "JobServer", server)
        monkeypatch.setattr(jobs, "_PATIENCE", 0.0)
        done = in_process("watch", "a-job", "--address", "http://head:8265")
        assert done.returncode == 2
        assert "the job a-job has failed, but its run folder" in done.stderr
        assert "is not seen from here: no such folder" in done.stderr
