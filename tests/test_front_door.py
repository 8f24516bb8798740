"""The front door: what a person asks for from Python, as plain functions and one Run."""

import ast
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest
import secateur
from secateur.results.terminal.progress import Progress
from secateur.search.baselines import build_problem
from secateur.search.core.budget import Budget
from secateur.service.baseline_cost import Race
from secateur.service.search_run import _search
from secateur.testing import FakeEvaluator
from support import ROOT, assert_same_facts, facts, in_process

SEARCH = {"sparsity": 0.5, "batch": 8, "seed": 3, "threads": 1}


def search(calibration, out, **settings):
    return secateur.run_search(calibration.folder, out, **{**SEARCH, **settings})


@pytest.fixture(scope="module")
def run(tiny_calibration, tmp_path_factory):
    return search(tiny_calibration, tmp_path_factory.mktemp("front-door") / "run", budget=22)


class TestExamples:
    def test_go_from_a_model_to_a_pruned_one(self, tiny_model, tmp_path_factory, tmp_path):
        text_file = tmp_path_factory.mktemp("prose") / "prose.txt"
        text_file.write_text((ROOT / "README.md").read_text())
        script = ROOT / "examples" / "search.py"
        assert len(script.read_text().splitlines()) <= 25
        command = [sys.executable, "-W", "error::ResourceWarning", script, tiny_model, text_file, tmp_path]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "published rules not on the front" in done.stdout
        assert re.search(r"^KL \d\.\d{4}, perplexity \d+\.\d$", done.stdout, re.MULTILINE)
        written = {"calibration", "run", "front.svg", "report.html", "pruned"}
        assert {path.name for path in tmp_path.iterdir()} == written

    @pytest.mark.parametrize("folder", ["examples", "benchmarks", "docs"])
    def test_import_public_names_alone(self, folder):
        blocks = {path: path.read_text() for path in (ROOT / folder).rglob("*.py")}
        for path in (ROOT / folder).rglob("*.md"):
            found = re.findall(r"```python\n(.+?)```", path.read_text(), re.DOTALL)
            blocks |= {f"{path}:{i}": block for i, block in enumerate(found)}
        for place, code in blocks.items():
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "secateur":
                    assert node.module == "secateur", place
                    assert not [alias.name for alias in node.names if alias.name.startswith("_")], place
                elif isinstance(node, ast.Import):
                    assert not [a.name for a in node.names if a.name.startswith("secateur.")], place
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    assert not (node.value.id == "secateur" and node.attr.startswith("_")), place


class TestARun:
    def test_shows_its_verdict_and_its_front(self, run):
        assert run.verdict in repr(run)
        assert f"front of {run.folder}" in repr(run)
        html = run._repr_html_()
        assert html.count("<table") == 1
        assert f"{run.front()['kl'].min():.4f}"[:5] in html

    def test_gives_what_its_archive_gives(self, run):
        with run.archive() as archive:
            pd.testing.assert_frame_equal(run.frame(), archive.frame())
            pd.testing.assert_frame_equal(run.front(), archive.front())
            pd.testing.assert_frame_equal(run.history(), archive.history())
            pd.testing.assert_frame_equal(run.layers(), archive.layers())
            assert run.best()["key"] == archive.best()["key"]
            assert run.candidate("best") == archive.candidate(run.best()["key"])
        assert run.settings.budget == 22

    def test_is_opened_with_with_as_files_are(self, run):
        with secateur.open(run.folder) as opened:
            pd.testing.assert_frame_equal(opened.frame(), run.frame())

    def test_is_read_by_two_threads_at_once(self, run):
        expected, failures = run.frame(), []

        def read():
            try:
                for _ in range(5):
                    pd.testing.assert_frame_equal(run.frame(), expected)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_is_pickled_as_its_path(self, run, monkeypatch, tmp_path):
        monkeypatch.chdir(run.folder.parent)
        content = pickle.dumps(secateur.open(run.folder.name))
        monkeypatch.chdir(tmp_path)
        assert len(content) < 500
        again = pickle.loads(content)  # noqa: S301 (it is ours)
        pd.testing.assert_frame_equal(again.frame(), run.frame())

    def test_that_cannot_be_read_is_shown_all_the_same(self, run, monkeypatch):
        def broken(*_):
            raise secateur.ArchiveError("was made with the plugin a.py")

        monkeypatch.setattr("secateur.results.summary.table.report", broken)
        assert repr(run) == f"Run({str(run.folder)!r}): was made with the plugin a.py"

    def test_is_drawn_on_axes_of_anybody(self, run):
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure

        for kind in ("front", "history", "ratios"):
            axes = Figure().subplots()
            assert run.plot(kind, ax=axes) is axes
        assert isinstance(run.plot(), Axes)
        with pytest.raises(secateur.SecateurError, match="a kind of plot"):
            run.plot("pie")

    def test_is_reported_exported_and_pruned_by(self, run, tiny_model, text_file, tmp_path):
        assert run.report(tmp_path / "a.html").stat().st_size > 10_000
        written = run.export(to="text", out=tmp_path / "a.txt")
        assert written.read_text().strip() == run.best()["metric"]
        assert run.export(to="csv", out=tmp_path / "a.csv").read_text().startswith("Complexity,Loss,Equation")
        found = run.prune(tmp_path / "pruned", text=str(text_file), tokens=256, sequence_length=64)
        assert found["key"] == run.best()["key"]

    def test_of_several_comes_as_one_frame(self, run, tiny_calibration, tmp_path):
        runs = secateur.run_seeds(tiny_calibration.folder, tmp_path / "seeds", 2, budget=12, **SEARCH)
        assert [one.folder.name for one in runs] == ["seed-3", "seed-4"]
        rows = runs.frame()
        assert rows.columns[0] == "run"
        assert len(rows) == sum(len(one.frame()) for one in runs)
        found = secateur.compare([tmp_path / "seeds", run])
        assert len(found.attrs["verdicts"]) >= 1


class TestGoingOn:
    @pytest.mark.parametrize(
        ("budgets", "settings"),
        [
            ((40, 80), {"searcher": "gp", "objectives": "kl,size"}),
            ((62, 90), {"searcher": "tpe", "space": "curve", "objectives": "kl"}),
            ((62, 90), {"searcher": "descent", "space": "layer", "objectives": "kl", "batch": 4}),
        ],
        ids=["gp", "tpe", "descent"],
    )
    def test_a_finished_run_with_a_larger_budget_is_the_run_of_that_budget(
        self, tiny_calibration, tmp_path, budgets, settings
    ):
        # The first budget ends in the middle of a batch, which the larger one tells again, whole.
        short = search(tiny_calibration, tmp_path / "run", budget=budgets[0], **settings)
        first = short.frame()["key"].tolist()
        longer = short.resume(budget=budgets[1])
        whole = search(tiny_calibration, tmp_path / "whole", budget=budgets[1], **settings)
        assert_same_facts(facts(longer.folder), facts(whole.folder))
        whole_batches = len(first) - 8
        assert longer.frame()["key"].tolist()[:whole_batches] == first[:whole_batches]
        assert longer.settings == whole.settings
        assert len(longer.frame()) > len(first)

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("budgets", [(22, 40), (37, 60), (40, 80), (22, 25, 40), (18, 26, 34)])
    def test_so_it_is_whatever_the_budgets_cut(self, tmp_path, seed, budgets):
        """On an evaluator that measures by a formula, through the loop and the archive of a real run."""

        def run_on(folder, budget):
            settings = secateur.SearchSettings(
                calibration=tmp_path, searcher="gp", objectives="kl,size", budget=budget, batch=8, seed=seed
            )
            evaluator = FakeEvaluator()
            with secateur.Archive(folder, write=True) as archive:
                archive.keep(objectives=["kl", "size"])
                remembering = secateur.RememberingEvaluator(evaluator, archive)
                _search(settings, remembering, archive, build_problem(settings, evaluator), Race((), 0),
                        secateur.Listener())  # fmt: skip
            return facts(folder)

        for budget in budgets:
            found = run_on(tmp_path / "run", budget)
        assert found == run_on(tmp_path / "whole", budgets[-1])

    def test_a_run_killed_while_it_is_made_longer_loses_no_row(self, tiny_calibration, tmp_path):
        run = search(tiny_calibration, tmp_path / "run", budget=22)
        longer = run.resume(budget=40)
        before = facts(longer.folder)
        counts = []
        listener = secateur.Listener(batch=lambda archive, _trials: counts.append(len(archive.frame())))
        assert_same_facts(facts(longer.resume(listener=listener).folder), before)
        assert set(counts) == {len(before)}  # nothing was taken back while it was told again

    @pytest.mark.parametrize(
        ("budget", "reason"),
        [
            (5, "no less than what the run has spent, 22, got 5 candidates"),
            ("1800s", "a budget in candidates"),
        ],
    )
    def test_a_budget_that_was_spent_or_is_of_another_unit_is_refused(self, run, budget, reason):
        with pytest.raises(secateur.SettingsError, match=reason):
            run.resume(budget=budget)

    def test_all_seeds_are_made_longer_although_the_first_is_interrupted(self, tiny_calibration, tmp_path):
        secateur.run_seeds(tiny_calibration.folder, tmp_path / "seeds", 2, budget=12, **SEARCH)

        def interrupt(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            secateur.resume(tmp_path / "seeds", secateur.Listener(batch=interrupt), budget=16)
        runs = secateur.resume(tmp_path / "seeds")
        assert [run.settings.budget for run in runs] == [16, 16]
        assert all(run.frame()["alias_of"].isna().sum() == 16 for run in runs)

    def test_a_budget_of_tokens_that_the_last_batch_went_beyond_may_be_given_again(
        self, tiny_calibration, tmp_path
    ):
        run = search(tiny_calibration, tmp_path / "run", budget="3000tokens")
        assert run.frame()["tokens"].sum() > 3000
        before = facts(run.folder)
        assert_same_facts(facts(run.resume(budget="3000tokens").folder), before)

    def test_an_archive_that_a_kill_left_empty_is_begun_again(self, run, tmp_path):
        shutil.copytree(run.folder, tmp_path / "run")
        for file in (tmp_path / "run").glob("archive.sqlite*"):
            file.unlink()
        (tmp_path / "run" / "archive.sqlite").touch()
        assert_same_facts(facts(secateur.resume(tmp_path / "run").folder), facts(run.folder))

    @pytest.mark.parametrize("name", ["archive.sqlite", "archive.sqlite-wal", "writer.lock", "run.toml"])
    def test_no_output_takes_the_place_of_a_file_of_a_run(self, run, tmp_path, name):
        shutil.copytree(run.folder, tmp_path / "run")
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        for write in (secateur.snapshot, secateur.report):
            with pytest.raises(secateur.SecateurError, match="is a file of the run in"):
                write(run, tmp_path / "run" / name)
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before

    def test_a_run_that_is_being_written_is_not_resumed(self, run, tmp_path):
        shutil.copytree(run.folder, tmp_path / "run")
        with (
            secateur.Archive(tmp_path / "run", write=True),
            pytest.raises(secateur.ArchiveError, match="is being written by process"),
        ):
            secateur.resume(tmp_path / "run", budget=40)

    def test_nothing_is_measured_twice_for_it(self, tiny_calibration, tmp_path):
        run = search(tiny_calibration, tmp_path / "run", budget=22)
        query = "SELECT key, stage, part, of_tokens, seconds FROM measurements"
        with run.archive() as archive:
            before = set(archive.rows(query))
        with run.resume(budget=40).archive() as archive:
            assert before < set(archive.rows(query))

    def test_a_run_and_its_calibration_that_were_moved_go_on_with_one_option(
        self, tiny_calibration, tmp_path
    ):
        shutil.copytree(tiny_calibration.folder, tmp_path / "cal")
        run = secateur.run_search(tmp_path / "cal", tmp_path / "run", budget=22, **SEARCH)
        before = facts(run.folder)
        (tmp_path / "cal").rename(tmp_path / "moved")
        run.folder.rename(tmp_path / "elsewhere")
        refused = in_process("resume", tmp_path / "elsewhere")
        assert refused.returncode == 2
        assert "give its place with --calibration" in refused.stderr
        done = in_process("resume", tmp_path / "elsewhere", "--calibration", tmp_path / "moved")
        assert done.returncode == 0, done.stderr
        assert_same_facts(facts(tmp_path / "elsewhere"), before)
        again = secateur.resume(tmp_path / "elsewhere", budget=24)  # it knows the place by now
        assert again.settings.calibration == tmp_path / "moved"

    def test_another_calibration_is_refused_and_changes_nothing(self, run, tiny_model, text_file, tmp_path):
        shutil.copytree(run.folder, tmp_path / "run")
        options = {"tokens": 256, "selection_tokens": 64, "holdout_tokens": 64, "sequence_length": 64}
        secateur.calibrate(tiny_model, tmp_path / "other", text=str(text_file), device="cpu", **options)
        before = (tmp_path / "run" / "run.toml").read_text()
        with pytest.raises(secateur.ArchiveError, match="was measured on another calibration"):
            secateur.resume(tmp_path / "run", calibration=tmp_path / "other")
        assert (tmp_path / "run" / "run.toml").read_text() == before


class TestTheOpening:
    @pytest.mark.parametrize(
        ("budget", "smallest"),
        [("4", r"--budget \d+,"), ("200tokens", r"--budget \d+tokens,"), ("0.001s", r"about --budget \d+s,")],
    )
    @pytest.mark.parametrize("sparsity", ["0.5", "0.3:0.6"])
    def test_that_a_budget_cannot_pay_for_is_told_before_it_is_measured(
        self, tiny_calibration, tmp_path, budget, smallest, sparsity
    ):
        done = in_process(
            "search", tiny_calibration.folder, "--space", "curve", "--searcher", "nsga3", "--threads", 1,
            "--sparsity", sparsity, "--budget", budget, "--out", tmp_path / "run",
        )  # fmt: skip
        assert done.returncode == 2
        assert "published rules that are measured first" in done.stderr
        (text,) = re.findall(smallest, done.stderr)
        if budget == "0.001s":
            return  # times differ from run to run
        enough = re.search(r"--budget (\w+),", text)[1]
        amount = Budget.parse(enough)
        less = str(Budget(amount.amount - 1, amount.unit))
        with pytest.raises(secateur.SettingsError, match="the smallest that does"):
            secateur.run_search(
                tiny_calibration.folder, tmp_path / "less", space="curve", searcher="nsga3",
                sparsity=sparsity, budget=less, threads=1,
            )  # fmt: skip
        assert not (tmp_path / "less").exists()
        # The smallest that is named is enough, and nothing of what a search costs is hidden in it.
        run = secateur.run_search(
            tiny_calibration.folder, tmp_path / "enough", space="curve", searcher="nsga3", sparsity=sparsity,
            budget=enough, threads=1,
        )  # fmt: skip
        spent = run.frame().assign(candidates=1).loc[lambda rows: rows["alias_of"].isna()]
        assert spent[Budget.parse(enough).unit].sum() <= Budget.parse(enough).amount

    def test_is_announced_with_its_cost(self, tiny_calibration, tmp_path):
        lines = []
        search(
            tiny_calibration, tmp_path / "run", space="layer", searcher="descent", budget="100ktokens",
            objectives="kl", batch=4, listener=secateur.Listener(report=lines.append),
        )  # fmt: skip
        (line,) = [line for line in lines if "are measured first" in line]
        assert re.search(r"^\d+ published rules are measured first, on at most [\d,]+ tokens", line)


class TestMistakes:
    def test_of_a_user_are_one_sentence(self):
        done = in_process("front", "no-such-run")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr

    def test_of_the_package_are_shown_as_bugs(self, run, monkeypatch):
        def broken(*_):
            raise ValueError("shapes (3,4) and (5,) not aligned")

        monkeypatch.setattr("secateur.results.archive.archive.Archive.front", broken)
        done = in_process("front", run.folder)
        assert done.returncode == 1
        assert "Traceback (most recent call last)" in done.stderr
        assert "please report" in done.stderr.splitlines()[-1]

    def test_every_error_of_ours_is_a_secateur_error(self):
        errors = [getattr(secateur, name) for name in secateur.__all__ if name.endswith("Error")]
        assert len(errors) >= 16
        assert all(issubclass(error, secateur.SecateurError) for error in errors)

    def test_options_by_name_are_checked(self, tmp_path):
        with pytest.raises(secateur.SecateurError, match="did you mean 'tokens'"):
            secateur.calibrate("model", tmp_path / "cal", token=8)
        with pytest.raises(secateur.SecateurError, match="did you mean 'sparsity'"):
            secateur.run_search(tmp_path, tmp_path / "run", sparsty=0.5)


class TestHelp:
    def test_describes_every_setting_of_a_search(self):
        text = secateur.SearchSettings.__doc__
        for name in secateur.SearchSettings.model_fields:
            assert re.search(rf"^ +{name}: [A-Z`]", text, re.MULTILINE), name

    def test_shows_every_option_of_a_function(self):
        import inspect

        for function, request in (
            (secateur.calibrate, secateur.CalibrationRequest),
            (secateur.prune, secateur.PruneRequest),
            (secateur.evaluate, secateur.EvaluationRequest),
        ):
            shown = inspect.signature(function).parameters
            for name, parameter in inspect.signature(request).parameters.items():
                assert shown[name].default == parameter.default, name
                assert re.search(rf"^ +{name}: ", function.__doc__, re.MULTILINE), name

    def test_names_every_function_of_the_front_door(self):
        commands = (
            "calibrate run_search resume measure prune evaluate plan compare report plot snapshot export"
        )
        for command in (*commands.split(), "import_rule", "submit"):
            assert f"``{command}``" in secateur.__doc__
            assert getattr(secateur, command).__doc__.splitlines()[0].endswith(".")


class TestProgress:
    def test_appears_with_the_time_whenever_nothing_was_said_for_a_while(self):
        lines = []
        progress = Progress(lines.append, silence=0.05)
        progress.report("loading the model")
        time.sleep(0.3)
        progress.stop()
        told = len(lines)
        assert lines[0] == "loading the model"
        assert told >= 3
        assert re.fullmatch(r"\d\d:\d\d:\d\d  loading the model", lines[1])
        time.sleep(0.2)
        assert len(lines) == told  # nothing comes after the end
