"""The archive: what is written is there, in order, whatever reads, writes or dies meanwhile."""

import math
import sqlite3
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from secateur.metrics_dsl.parser import parse
from secateur.results.archive import Archive, ArchiveError
from secateur.results.frame import COLUMNS
from secateur.results.memory import RememberingEvaluator
from secateur.results.table import table, verdict
from secateur.search.candidate import Measurement, Trial, uniform
from support import FakeEvaluator

TEXTS = ("abs(W) * X", "abs(W)", "square(W) * G", "exp(W)", "W * X * V + G")


def trial(text, kl, status="measured", **values):
    candidate = uniform(parse(text), FakeEvaluator.layers, 0.5)
    found = Measurement("model", (0.25, 1 / 3), {"kl": kl, "sparsity": 0.5, **values}, 1.5, "", text)
    return Trial(candidate, found, status)


@pytest.fixture
def run(tmp_path):
    """A run with measured, failed, alias and rejected rows."""
    failed = uniform(parse("exp(W)"), FakeEvaluator.layers, 0.5)
    rejected = uniform(parse("W"), FakeEvaluator.layers, 0.5)
    first = trial("abs(W) * X", 0.5)
    alias = Trial(
        uniform(parse("2 * abs(W) * X"), FakeEvaluator.layers, 0.5),
        first.measurement,
        "alias",
        first.candidate.key,
    )
    trials = [
        first,
        trial("abs(W)", 2.0),
        Trial(failed, Measurement("screen", failure="scores are not finite"), "failed"),
        alias,
        trial("square(W) * G * X", 0.75),
        Trial(rejected, Measurement("screen", (), {"layer_error": 3.0, "sparsity": 0.5}), "rejected"),
    ]
    with Archive(tmp_path, write=True) as archive:
        archive.note(objectives=["kl", "size"], baselines={first.candidate.key: "wanda"})
        archive.add(trials)
        held = Measurement("model", (), {"kl": 0.625}, 2.0)
        archive.record([(first.candidate, held)], "holdout")
    return tmp_path, trials


def test_trials_come_back_exactly(run):
    folder, trials = run
    assert Archive(folder).trials() == trials


def test_the_frame_has_the_documented_columns_and_types(run):
    frame = Archive(run[0]).frame()
    assert list(frame.columns) == list(COLUMNS)
    assert frame["status"].tolist() == ["measured", "measured", "failed", "alias", "measured", "rejected"]
    assert isinstance(frame["metric"].dtype, pd.StringDtype)
    assert frame["size"].dtype == np.int64
    assert frame["kl"].dtype == np.float64
    assert frame["baseline"].tolist()[0] == "wanda"
    assert frame["baseline"].isna().sum() == 5
    assert frame["failure"].notna().tolist() == [False, False, True, False, False, False]
    assert frame.loc[[0, 3], "kl_holdout"].tolist() == [0.625, 0.625]
    assert frame.attrs["objectives"] == ["kl", "size"]


def test_the_front_is_non_dominated_and_finite(run):
    front = Archive(run[0]).front()
    assert front["metric"].tolist() == ["abs(W) * X", "abs(W)"]
    assert Archive(run[0]).front(["kl"])["metric"].tolist() == ["abs(W) * X"]
    assert Archive(run[0]).front(["perplexity"]).empty
    with pytest.raises(ValueError, match="did you mean 'size'"):
        Archive(run[0]).front(["sizes"])


def test_an_alias_of_a_rejected_candidate_is_not_on_the_front(run):
    folder, trials = run
    alias = uniform(parse("3 * W"), FakeEvaluator.layers, 0.5)
    with Archive(folder, write=True) as archive:
        archive.add([Trial(alias, trials[-1].measurement, "rejected", trials[-1].candidate.key)])
    assert Archive(folder).front(["layer_error", "size"]).empty


def test_adding_again_changes_nothing(run):
    folder, trials = run
    with Archive(folder, write=True) as archive:
        archive.add(trials)
    assert Archive(folder).trials() == trials


def test_an_empty_run_has_an_empty_front(tmp_path):
    Archive(tmp_path, write=True).close()
    archive = Archive(tmp_path)
    assert archive.frame().empty
    assert archive.front().empty
    assert table(archive.front()) == "(none)"
    assert "No published rule" in verdict(archive.frame(), archive.front())


def test_values_that_are_no_numbers_never_enter(tmp_path):
    with Archive(tmp_path, write=True) as archive, pytest.raises(ValueError, match="Out of range"):
        archive.add([trial("abs(W)", math.nan)])


def test_a_second_writer_is_told_who_writes(tmp_path):
    with Archive(tmp_path, write=True), pytest.raises(ArchiveError, match="is being written by process"):
        Archive(tmp_path, write=True)
    Archive(tmp_path, write=True).close()  # and is let in afterwards


def test_readers_work_while_it_is_written_and_see_whole_batches(run):
    folder, _ = run
    code = (
        "import sys, secateur; rows = secateur.Archive(sys.argv[1]).frame(); "
        "print(len(rows), secateur.Archive(sys.argv[1]).front()['kl'].min())"
    )
    with Archive(folder, write=True) as archive:
        archive.add([trial("W * G", 0.125)])
        archive._db.execute("BEGIN IMMEDIATE")  # a batch that is not committed yet
        archive._db.execute("DELETE FROM trials")
        read = subprocess.run(
            [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
        )
        archive._db.execute("ROLLBACK")
    assert read.stdout.split() == ["7", "0.125"]


def test_a_read_only_folder_can_be_read(run):
    folder, trials = run
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        assert len(Archive(folder).frame()) == len(trials)
    finally:
        folder.chmod(0o755)


def test_what_is_no_archive_is_said_to_be_none(tmp_path):
    with pytest.raises(ArchiveError, match="expected a run folder with an archive"):
        Archive(tmp_path)
    (tmp_path / "archive.sqlite").write_text("not a database, but long enough to look like a file" * 50)
    with pytest.raises(ArchiveError, match="is not an archive"):
        Archive(tmp_path)


def test_another_version_is_refused(tmp_path):
    Archive(tmp_path, write=True).close()
    db = sqlite3.connect(tmp_path / "archive.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.commit()
    for write in (False, True):
        with pytest.raises(ArchiveError, match="expected an archive of version 3, got version 99"):
            Archive(tmp_path, write=write)


def test_a_full_disk_is_an_error_and_loses_nothing(run):
    folder, trials = run
    with Archive(folder, write=True) as archive:
        pages = archive._db.execute("PRAGMA page_count").fetchone()[0]
        archive._db.execute(f"PRAGMA max_page_count = {pages}")  # what a full disk is to SQLite
        more = [trial(f"W * {i} * G", 1.0) for i in range(1, 400)]
        with pytest.raises(sqlite3.OperationalError, match="full"):
            archive.add(more)
    assert Archive(folder).trials() == trials


class TestRemembering:
    def test_measures_only_what_the_archive_does_not_know(self, tmp_path):
        candidates = [uniform(parse(t), FakeEvaluator.layers, 0.5) for t in TEXTS]
        with Archive(tmp_path, write=True) as archive:
            fake = FakeEvaluator()
            first = RememberingEvaluator(fake, archive).measure(candidates[:3], "screen")
            again = RememberingEvaluator(fake, archive).measure(candidates, "screen")
            held = RememberingEvaluator(fake, archive).measure(candidates[:1], "model", "holdout")
        assert again[:3] == first
        assert len(fake.measured) == len(set(fake.measured)) == len(TEXTS) + 1
        assert again[3].failure == "exp is not measured here"
        assert held[0].values["kl"] > 0

    def test_an_interrupt_keeps_what_is_done(self, tmp_path):
        candidates = [uniform(parse(f"W * {i} + G"), FakeEvaluator.layers, 0.5) for i in range(1, 6)]

        class Interrupted(FakeEvaluator):
            def measure(self, candidates, stage, part="selection", tokens=0):
                if len(self.measured) == 3:
                    raise KeyboardInterrupt
                return super().measure(candidates, stage, part)

        with Archive(tmp_path, write=True) as archive:
            with pytest.raises(KeyboardInterrupt):
                RememberingEvaluator(Interrupted(), archive).measure(candidates, "model")
            assert [archive.recall(c.key, "model", "selection") is not None for c in candidates] == [
                True, True, True, False, False,
            ]  # fmt: skip
