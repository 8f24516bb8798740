"""The archive: what is written is there, in order, whatever reads, writes or dies meanwhile."""

import contextlib
import math
import sqlite3
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import secateur
from secateur.metrics_dsl.parser import parse
from secateur.results.archive.archive import Archive
from secateur.results.archive.database import ArchiveError
from secateur.results.archive.frame import COLUMNS
from secateur.results.archive.remembering import RememberingEvaluator
from secateur.results.summary.table import table, verdict
from secateur.search.core.candidate import Candidate, Measurement, Trial, uniform
from support import ROOT, FakeEvaluator

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
        archive.keep(objectives=["kl", "size"], baselines={first.candidate.key: "wanda"})
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
        with pytest.raises(ArchiveError, match="expected an archive of version 5, got version 99"):
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


@pytest.mark.parametrize(("sequences", "student"), [(2, 12.7062), (4, 3.1824), (12, 2.2010), (101, 1.9840)])
def test_the_verdict_has_the_interval_of_student(sequences, student, run):
    folder, trials = run
    published, found = trials[1].candidate, trials[0].candidate
    differences = np.random.default_rng(0).normal(-0.1, 0.1, sequences)
    with Archive(folder, write=True) as archive:
        archive.keep(baselines={published.key: "magnitude"})
        archive._db.execute("DELETE FROM measurements")
        for candidate, parts in ((published, np.full(sequences, 2.0)), (found, 2 + differences)):
            held = Measurement("model", (), {"kl": float(parts.mean())}, 2.0, parts=tuple(parts))
            archive.record([(candidate, held)], "holdout")
        rows, front, holdout = archive.frame(), archive.front(), archive.holdout_parts()
    middle, reach = differences.mean(), student * differences.std(ddof=1) / sequences**0.5
    interval = f"95 % interval of the difference {middle - reach:+.4f} to {middle + reach:+.4f}"
    assert interval in verdict(rows, front, holdout)


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
            def _one(self, c, stage):
                if len(self.measured) == 4:
                    raise KeyboardInterrupt
                return super()._one(c, stage)

        with Archive(tmp_path, write=True) as archive:
            with pytest.raises(KeyboardInterrupt):
                RememberingEvaluator(Interrupted(), archive).measure(candidates, "model")
            assert [archive.recall(c.key, "model", "selection") is not None for c in candidates] == [
                True, True, True, False, False,
            ]  # fmt: skip


class TestQueries:
    def test_rows_are_chosen_by_a_text_a_function_or_a_stage(self, run):
        archive = Archive(run[0])
        assert archive.frame("kl < 1 and status == 'measured'")["kl"].tolist() == [0.5, 0.75]
        assert len(archive.frame(lambda rows: rows["size"] > 4)) == len(archive.frame("size > 4"))
        assert archive.frame(stage="screen")["status"].tolist() == ["failed", "rejected"]
        assert archive.front(where="metric != 'abs(W) * X'")["kl"].tolist() == [0.5, 2.0]  # the alias is left
        with pytest.raises(ValueError, match="expected a condition on columns"):
            archive.frame("no such column > 3")
        with pytest.raises(ValueError, match="expected a stage among screen, layer, model"):
            archive.frame(stage="full")

    def test_the_best_row_by_any_column(self, run):
        archive = Archive(run[0])
        assert archive.best()["metric"] == "abs(W) * X"
        assert archive.best("size")["metric"] == "abs(W)"
        assert archive.best(where="size > 4")["kl"] == 0.5
        with pytest.raises(ValueError, match="expected a column of numbers such as kl, got 'metric'"):
            archive.best("metric")
        with pytest.raises(ValueError, match=r"no candidate of .* has been measured for 'perplexity'"):
            archive.best("perplexity")

    def test_the_front_of_the_archive_is_that_of_its_frame(self, run):
        from secateur.results.archive.front import front

        archive = Archive(run[0])
        for names in (["kl", "size"], ["kl"], ["size", "density"], ["seconds", "kl"]):
            pd.testing.assert_frame_equal(archive.front(names), front(archive.frame(), names))

    def test_layers_are_tidy(self, run):
        folder, _ = run
        with pytest.raises(ValueError, match="did not keep the layers' names"):
            Archive(folder).layers()
        layers = [
            {"name": layer.name, "block": layer.block, "kind": layer.kind, "rows": 1, "columns": 1}
            for layer in FakeEvaluator.layers
        ]
        slopes = tuple(range(len(layers)))
        errors = tuple(0.1 * i for i in range(len(layers)))
        candidate = uniform(parse("G"), FakeEvaluator.layers, 0.25)
        found = Measurement("model", errors, {"kl": 9.0}, sensitivities=slopes)
        with Archive(folder, write=True) as archive:
            archive.keep(layers=layers)
            archive.add([Trial(candidate, found, "measured")])
        tidy = Archive(folder).layers(candidate.key)
        assert list(tidy.columns) == ["key", "layer", "block", "kind", "ratio", "error", "sensitivity"]
        assert tidy["layer"].tolist() == [layer.name for layer in FakeEvaluator.layers]
        assert tidy["ratio"].tolist() == [0.25] * len(layers)
        assert tidy["error"].tolist() == list(errors)
        assert tidy["sensitivity"].tolist() == list(slopes)
        assert set(tidy["kind"]) == {"q", "v", "up"}

    def test_history_grows_and_ends_at_the_hypervolume(self, run):
        archive = Archive(run[0])
        history = archive.history([3.0, 10.0])
        assert history["best"].tolist() == [0.5] * 6
        assert history["candidates"].tolist() == [1, 2, 3, 3, 4, 5]  # an alias costs nothing
        assert history["seconds"].tolist() == [1.5, 3.0, 3.0, 3.0, 4.5, 4.5]
        assert history["hypervolume"].is_monotonic_increasing
        # boxes up to (3, 10) from (0.5, 4) and (2, 2), which overlap in 1 x 6
        assert archive.hypervolume([3.0, 10.0]) == pytest.approx(2.5 * 6 + 1.0 * 8 - 1.0 * 6)
        assert history["hypervolume"].iloc[-1] == pytest.approx(archive.hypervolume([3.0, 10.0]))
        assert archive.hypervolume() >= 0
        with pytest.raises(ValueError, match="expected a reference of 2 numbers"):
            archive.hypervolume([1.0])

    def test_baselines_are_the_published_rows(self, run):
        assert Archive(run[0]).baselines()["baseline"].tolist() == ["wanda"]

    def test_frames_say_where_they_come_from(self, run):
        frame = Archive(run[0]).frame()
        assert frame.attrs["run"] == str(run[0])
        assert frame.attrs["units"]["kl"] == "nats per token"

    def test_several_runs_come_as_one_frame(self, run, tmp_path):
        folder, _ = run
        runs = secateur.open_many([folder, folder])
        assert len(runs) == 1
        for number in (0, 1):
            with Archive(tmp_path / f"many/seed-{number}", write=True) as archive:
                archive.keep(objectives=["kl"])
                archive.add([trial("abs(W)", 1.0 + number)])
        for pattern in (tmp_path / "many", tmp_path / "many" / "*"):
            rows = secateur.open_many(pattern).frame()
            assert rows["run"].str[-6:].tolist() == ["seed-0", "seed-1"]
            assert rows.pareto.front(minimize="kl")["kl"].tolist() == [1.0]
        assert secateur.open_many(tmp_path / "many").front()["kl"].tolist() == [1.0, 2.0]
        with pytest.raises(ArchiveError, match=r"expected run folders, got .*nothing"):
            secateur.open_many(tmp_path / "nothing")

    def test_a_snapshot_is_one_parquet_file(self, run, tmp_path):
        from secateur.results.archive.snapshot import snapshot

        folder, trials = run
        path = snapshot(Archive(folder), tmp_path / "out" / "a.parquet")
        rows = pd.read_parquet(path)
        frame = Archive(folder).frame()
        pd.testing.assert_frame_equal(rows[list(COLUMNS)], frame, check_dtype=False)
        assert rows.attrs["objectives"] == ["kl", "size"]
        assert rows["ratios"][0].tolist() == list(trials[0].candidate.ratios)
        assert [p.name for p in path.parent.iterdir()] == ["a.parquet"]
        with pytest.raises(ValueError, match="got the folder"):
            snapshot(Archive(folder), tmp_path)
        link = tmp_path / "link.parquet"
        link.symlink_to(path)
        older = path.read_bytes()
        path.write_bytes(b"PAR1 of another kind")
        with pytest.raises(ValueError, match="holds something else"):
            snapshot(Archive(folder), link)
        path.write_bytes(older)
        snapshot(Archive(folder), link)
        assert link.is_symlink()
        assert len(pd.read_parquet(path)) == len(rows)


class TestTheAccessor:
    rows = pd.DataFrame({"a": [1.0, 2.0, 3.0, 2.0, np.nan], "b": [3, 2, 1, 3, 0], "c": list("vwxyz")})

    def test_returns_the_rows_that_nothing_dominates(self):
        assert self.rows.pareto.front(minimize=["a", "b"])["c"].tolist() == ["v", "w", "x"]
        assert self.rows.pareto.front("a", maximize="b")["c"].tolist() == ["v"]
        assert self.rows.pareto.front(maximize=["a", "b"])["c"].tolist() == ["x", "y"]

    def test_measures_volumes(self):
        assert self.rows.pareto.hypervolume([3, 3], ["a", "b"]) == pytest.approx(1.0)
        assert self.rows.pareto.hypervolume([3, 1], "a", "b") == pytest.approx(4.0)

    @pytest.mark.parametrize("names", [[], ["d"], ["c"]])
    def test_refuses_what_it_cannot_compare(self, names):
        with pytest.raises(ValueError, match="expected columns"):
            self.rows.pareto.front(names)


def test_a_hundred_thousand_candidates_are_read_whole(tmp_path):
    """Speed is measured in benchmarks/archive.py; here the answer is what counts."""
    metric = parse("abs(W) * X")
    rng = np.random.default_rng(0)
    kl, ratios = rng.gamma(2.0, size=100_000), rng.uniform(0.3, 0.7, size=(100_000, 3))
    with Archive(tmp_path, write=True) as archive:
        archive.keep(objectives=["kl", "density"])
        trials = [
            Trial(
                Candidate(metric, tuple(row)),
                Measurement("model", (), {"kl": value, "sparsity": float(row.mean())}, 1.0),
                "measured",
            )
            for value, row in zip(kl, ratios, strict=True)
        ]
        archive.add(trials)
    archive = secateur.open(tmp_path)  # which registers the accessor
    rows = archive.frame()
    assert len(rows) == 100_000
    expected = rows.pareto.front(["kl", "density"]).sort_values("kl")
    assert archive.front()["key"].tolist() == expected["key"].tolist()


def test_a_reader_never_sees_a_torn_row(tmp_path):
    """A thousand times, while another process commits batches of eight."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from support import FakeEvaluator\n"
        "from secateur.metrics_dsl.parser import parse\n"
        "from secateur.results.archive.archive import Archive\n"
        "from secateur.search.core.candidate import Candidate, Measurement, Trial\n"
        "n = 0\n"
        "with Archive(sys.argv[1], write=True) as archive:\n"
        "    archive.keep(objectives=['kl'])\n"
        "    while True:\n"
        "        ratios = [((n + i) % 9973 / 10007, (n + i) / 1e6) for i in range(8)]\n"
        "        found = [Measurement('model', r, {'kl': r[0], 'sparsity': r[1]}, 1.0, '', '', 8, (), r)\n"
        "                 for r in ratios]\n"
        "        pairs = zip(ratios, found)\n"
        "        archive.add([Trial(Candidate(parse('W'), r), m, 'measured') for r, m in pairs])\n"
        "        n += 8\n"
        "        time.sleep(0.01)\n"  # else the reader reads ever more, and takes the longer
    )
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(ROOT / "tests")])
    try:
        archive, seen = None, 0
        while archive is None or archive.frame().empty:
            assert process.poll() is None
            with contextlib.suppress(ArchiveError):  # has not begun
                archive = archive or Archive(folder)
        for i in range(1000):
            if i % 50 == 0:
                trials = archive.trials()
                assert len(trials) % 8 == 0
                assert all(t.measurement.sensitivities == t.candidate.ratios for t in trials)
                front = archive.front()
                assert front["kl"].iloc[0] == front["ratio_min"].iloc[0]
            with archive.reading():
                (count,) = archive.rows("SELECT count(*) FROM trials")[0]
                (numbers,) = archive.rows("SELECT count(*) FROM by_layer")[0]
            assert count == numbers
            assert count % 8 == 0
            assert count >= seen
            seen = count
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
