"""The command line as a person meets it: results, help, and one line for every mistake."""

import contextlib
import errno
import json
import os
import re
import runpy
import subprocess
import sys
import time
import tomllib

import pytest
from secateur.cli.search import search
from secateur.results.archive.archive import Archive
from secateur.results.archive.database import ArchiveError
from secateur.results.archive.frame import COLUMNS
from secateur.results.archive.run_folder import RunFolder
from secateur.search.settings import SearchSettings
from secateur.service.run_claim import save
from secateur.service.submission import BESIDE
from support import ROOT, in_process, save_model, tiny_config

COMMANDS = ("calibrate", "measure", "search", "resume", "front", "compare", "snapshot", "report", "plot",
            "export", "import", "plan", "prune", "evaluate", "metrics", "watch", "submit", "status", "logs",
            "stop", "list")  # fmt: skip
SEARCH = ("--sparsity", 0.5, "--budget", 14, "--batch", 4, "--seed", 3)


@pytest.fixture(scope="module")
def run_folder(tiny_calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    done = in_process("search", tiny_calibration.folder, *SEARCH, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def refused(*arguments):
    """Run a command that has to fail in one line on standard error; return the line."""
    done = in_process(*arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_ends_its_help_with_an_example(self, command):
        done = in_process(command, "--help")
        assert done.returncode == 0
        assert f"Example: secateur {command}" in done.stdout

    def test_help_imports_no_heavy_library(self):
        code = (
            "import sys; sys.argv = ['secateur', '--help']\n"
            "from secateur.cli.main import main\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'deap', 'pymoo', 'optuna', 'ray', 'pandas', 'numpy'}\n"
            "print(sorted(heavy & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"

    def test_options_of_search_are_the_settings(self):
        """One name and one default, on the command line, in TOML and in Python."""
        import inspect

        parameters = inspect.signature(search).parameters
        assert set(SearchSettings.model_fields) == set(parameters) - {
            "config", "as_json", "trust_remote_code", *BESIDE  # the third no file can say
        }  # fmt: skip
        for name, field in SearchSettings.model_fields.items():
            default = parameters[name].default
            if name not in ("calibration", "sparsity", "objectives"):  # these depend on others
                # An option that may be repeated is None where it is not given.
                expected = ",".join(field.default) or None if field.default == () else field.default
                assert str(default) == str(expected), name


class TestResults:
    def test_a_search_prints_progress_front_baselines_and_a_verdict(self, run_folder):
        _, done = run_folder
        assert re.search(r"\d+/14 candidates  best kl [\d.]+  front \d+  .*left .*failed 0", done.stderr)
        assert "front of" in done.stdout
        assert "wanda" in done.stdout
        assert "kl holdout" in done.stdout
        assert re.search(r"beats? the best published one|Nothing was found", done.stdout)

    def test_its_archive_has_one_row_a_candidate(self, run_folder):
        frame = Archive(run_folder[0]).frame()
        assert list(frame.columns) == list(COLUMNS)
        assert frame["baseline"].notna().sum() == 10
        assert (frame["status"] != "alias").sum() >= 14
        assert frame.loc[frame["baseline"].notna(), "kl_holdout"].notna().all()
        assert Archive(run_folder[0]).front()["kl_holdout"].notna().all()

    def test_front_prints_json(self, run_folder):
        folder, _ = run_folder
        result = json.loads(in_process("front", folder, "--objectives", "perplexity", "--json").stdout)
        assert result["objectives"] == ["perplexity"]
        assert len(result["front"]) == 1
        assert len(result["baselines"]) == 10
        assert result["verdict"]

    def test_an_ended_run_resumes_to_the_same_and_measures_nothing(self, run_folder):
        folder, done = run_folder
        before = Archive(folder).trials()
        again = in_process("resume", folder)
        assert again.stdout == done.stdout
        assert Archive(folder).trials() == before

    def test_a_missing_holdout_is_measured_on_resume(self, run_folder):
        folder, done = run_folder
        with Archive(folder, write=True) as archive:
            archive._db.execute("DELETE FROM measurements WHERE part = 'holdout'")
        assert Archive(folder).frame()["kl_holdout"].isna().all()
        assert in_process("resume", folder).stdout == done.stdout

    def test_measure_prints_what_the_archive_holds(self, run_folder, tiny_calibration):
        done = in_process("measure", tiny_calibration.folder, "wanda", "--sparsity", 0.5, "--json")
        measured = json.loads(done.stdout)
        row = Archive(run_folder[0]).frame().set_index("baseline").loc["wanda"]
        assert measured["kl"] == row["kl"]
        assert measured["key"] == row["key"]

    def test_calibrate_prints_what_it_wrote(self, tiny_model, text_file, tmp_path):
        sizes = ("--tokens", 64, "--selection-tokens", 32, "--holdout-tokens", 32, "--sequence-length", 32)
        done = in_process(
            "calibrate", tiny_model, "--text", text_file, *sizes, "--out", tmp_path / "c", "--json"
        )
        assert json.loads(done.stdout)["parts"]["statistics"]["sequences"] == 2

    def test_metrics_are_listed_with_their_sources(self):
        rows = json.loads(in_process("metrics", "--json").stdout)
        assert {row["name"] for row in rows} >= {"magnitude", "wanda", "ria", "pruner-zero"}
        assert all(row["metric"] and row["source"] for row in rows)
        assert (
            "protected" in in_process("metrics", "--language").stdout
            or "0 where y = 0" in in_process("metrics", "--language").stdout
        )

    def test_settings_come_from_a_file_and_the_command_line_wins(self, tiny_calibration, tmp_path):
        file = tmp_path / "a.toml"
        file.write_text(
            '[search]\nsparsity = 0.25\nbudget = 11\nobjectives = ["layer_error", "size"]\nstage = "screen"\n'
        )
        done = in_process(
            "search", tiny_calibration.folder, "--config", file, "--budget", 12, "--out", tmp_path / "run"
        )
        assert done.returncode == 0, done.stderr
        saved = SearchSettings.load(tmp_path / "run" / "run.toml")
        assert (saved.sparsity, saved.budget, saved.objectives) == (0.25, 12, ("layer_error", "size"))

    def test_a_pattern_brings_its_sparsity(self, tiny_calibration, tmp_path):
        run = tmp_path / "run"
        done = in_process(
            "search", tiny_calibration.folder, "--pattern", "2:4", "--budget", 12, "--batch", 4, "--out", run
        )
        assert done.returncode == 0, done.stderr
        assert (Archive(run).frame()["sparsity"].dropna() == 0.5).all()

    def test_seeding_can_be_turned_off(self, tiny_calibration, tmp_path):
        texts = []
        for flag in ("--seeding", "--no-seeding"):
            run = tmp_path / flag
            assert (
                in_process(
                    "search", tiny_calibration.folder, *SEARCH[:-1], 3, "--budget", 24, flag, "--out", run
                ).returncode
                == 0
            )
            texts.append(Archive(run).frame()["metric"].tolist())
        assert texts[0] != texts[1]


RATIOS = ("--space", "curve", "--sparsity", 0.6, "--objectives", "kl", "--rungs", 64, "--batch", 6)


class TestRatios:
    def test_searched_ratios_stand_beside_every_published_allocation(self, tiny_calibration, tmp_path):
        run = tmp_path / "run"
        done = in_process(
            "search",
            tiny_calibration.folder,
            *RATIOS,
            "--searcher",
            "evolution",
            "--budget",
            60,
            "--out",
            run,
        )
        assert done.returncode == 0, done.stderr
        frame = Archive(run).frame()
        names = set(frame["baseline"].dropna())
        assert {"wanda", "wanda + owl", "wanda + dlp", "wanda + alpha", "wanda + dsa"} <= names
        assert {"wanda + mrp", "wanda + global"} <= names
        assert any(name.startswith("wanda + atp") for name in names)
        found = frame[frame["baseline"].isna() & frame["sparsity"].notna()]
        assert (found["sparsity"] - 0.6).abs().max() < 0.005  # layers of 32 columns
        assert frame.loc[frame["status"] == "rejected", "kl"].isna().all()
        assert frame.loc[frame["status"] == "rejected", "kl_rung"].notna().all()
        assert frame["kl_holdout_error"].notna().any()
        assert "ratios" in done.stdout
        assert "+-" in done.stdout

    def test_metric_and_ratios_are_searched_together(self, tiny_calibration, tmp_path):
        run = tmp_path / "run"
        options = ("--space", "tree+curve", "--phase", 1, "--sparsity", 0.6, "--objectives", "kl")
        done = in_process("search", tiny_calibration.folder, *options, "--budget", 90, "--out", run)
        assert done.returncode == 0, done.stderr
        found = Archive(run).frame().query("baseline.isna()")
        assert found["metric"].nunique() > 3
        assert (found["ratio_max"] - found["ratio_min"] > 0.01).any()

    def test_a_metric_is_searched_for_given_ratios(self, tiny_calibration, tmp_path):
        run = tmp_path / "run"
        options = ("--allocation", "owl", "--sparsity", 0.6, "--budget", 14, "--batch", 4)
        done = in_process("search", tiny_calibration.folder, *options, "--out", run)
        assert done.returncode == 0, done.stderr
        frame = Archive(run).frame()
        assert "wanda + owl" in set(frame["baseline"])
        assert len({trial.candidate.ratios for trial in Archive(run).trials()}) == 1

    def test_an_interval_gives_a_front_of_densities(self, tiny_calibration, tmp_path):
        run = tmp_path / "run"
        options = ("--space", "curve", "--sparsity", "0.3:0.75", "--objectives", "kl,density")
        done = in_process(
            "search", tiny_calibration.folder, *options, "--searcher", "nsga3", "--budget", 150, "--out", run
        )
        assert done.returncode == 0, done.stderr
        front = Archive(run).front()
        assert len(front) > 5
        assert front.sort_values("density")["kl"].is_monotonic_decreasing
        assert "rules on the front are not published ones" in done.stdout

    def test_a_search_for_ratios_takes_descent_by_itself_and_says_so(self, tiny_calibration, tmp_path):
        options = ("--space", "layer", "--sparsity", 0.6, "--rungs", 64, "--budget", 50)
        done = in_process("search", tiny_calibration.folder, *options, "--out", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        assert "the searcher is descent, chosen for the space layer; --searcher names another" in done.stderr
        assert SearchSettings.load(tmp_path / "run" / "run.toml").searcher == "descent"
        assert any(trial.measurement.sensitivities for trial in Archive(tmp_path / "run").trials())
        again = in_process("resume", tmp_path / "run")
        assert again.stdout == done.stdout
        assert "chosen" not in again.stderr

    def test_the_meta_family_says_how_many_metrics_it_has(self, tiny_calibration, tmp_path):
        options = ("--space", "meta", "--searcher", "tpe", "--objectives", "kl", "--budget", 24)
        done = in_process("search", tiny_calibration.folder, *options, "--out", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        assert re.search(r"2401 names are \d+ different metrics", done.stderr)

    def test_seeds_have_folders_of_their_own_and_are_compared(self, tiny_calibration, tmp_path):
        for searcher in ("random", "tpe"):
            done = in_process(
                "search", tiny_calibration.folder, *RATIOS, "--searcher", searcher, "--budget", "8ktokens",
                "--seeds", 2, "--out", tmp_path / searcher,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert {p.name for p in (tmp_path / searcher).iterdir()} == {"seed-0", "seed-1"}
        done = in_process("compare", tmp_path / "random", tmp_path / "tpe")
        assert done.returncode == 0, done.stderr
        assert re.search(r"has the lowest holdout KL of what each chose on selection tokens", done.stdout)
        assert re.search(r"\nSparsity is counted over 100% of the [\d,]+ block weights\.\n", done.stdout)
        assert re.search(r"is a tie with it|is worse by", done.stdout), done.stdout
        table = json.loads(in_process("compare", tmp_path / "random", tmp_path / "tpe", "--json").stdout)
        assert {row["search"] for row in table["searches"]} == {"random", "tpe"}
        for row in table["searches"]:
            assert row["seeds"] == 2
            assert 8000 <= row["tokens"] < 16_000
            assert row["spread"] >= 0

    def test_seeds_are_resumed_together_and_copies_are_no_seeds(self, tiny_calibration, tmp_path):
        import shutil

        out = tmp_path / "seeds"
        options = (*RATIOS, "--searcher", "random", "--budget", 50, "--seeds", 2, "--out", out)
        whole = in_process("search", tiny_calibration.folder, *options)
        assert whole.returncode == 0, whole.stderr
        shutil.rmtree(out / "seed-1")
        (out / "seed-1").mkdir()
        shutil.copy(out / "seed-0" / "run.toml", out / "seed-1")
        text = (out / "seed-1" / "run.toml").read_text().replace("seed = 0", "seed = 1")
        (out / "seed-1" / "run.toml").write_text(text)
        again = in_process("resume", out)
        assert again.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]
        shutil.copytree(out / "seed-0", out / "seed-9")
        assert json.loads(in_process("compare", out, "--json").stdout)["searches"][0]["seeds"] == 2
        assert "another one; choose" in refused(
            "search", tiny_calibration.folder, "--seeds", 2, "--budget", 99, "--out", out
        )

    def test_a_run_that_measured_nothing_is_replaced(self, tiny_calibration, tmp_path):
        run = tmp_path / "run"
        run.mkdir()
        settings = SearchSettings.read({"calibration": tiny_calibration.folder, "budget": 77})
        (run / "run.toml").write_text(settings.to_toml())
        Archive(run, write=True).close()
        done = in_process("search", tiny_calibration.folder, *SEARCH, "--out", run)
        assert done.returncode == 0, done.stderr
        assert SearchSettings.load(run / "run.toml").budget == 14

    @pytest.mark.parametrize("name", ["\N{EVERGREEN TREE}", 'a "b" \\ c', "\x7f", "\u2028\u0085 \t\n"])
    def test_its_settings_are_read_back_whatever_a_path_holds(self, name, tmp_path):
        settings = SearchSettings.read({"calibration": tmp_path / name, "objectives": "kl,size"})
        save(settings, RunFolder(tmp_path))
        assert SearchSettings.load(tmp_path / "run.toml") == settings
        there = tomllib.loads((tmp_path / "run.toml").read_bytes().decode("utf-8"))
        assert there["search"]["calibration"] == str(tmp_path / name)

    @pytest.mark.parametrize(("budget", "smallest"), [("8", "10"), ("500tokens", "1280tokens")])
    def test_a_budget_of_published_rules_alone_is_told(self, tiny_calibration, tmp_path, budget, smallest):
        options = ("search", tiny_calibration.folder, "--batch", 4, "--out", tmp_path / "run")
        assert f"the smallest that does is --budget {smallest}," in refused(*options, "--budget", budget)
        done = in_process(*options, "--budget", smallest)
        assert "10 published rules are measured first" in done.stderr
        assert "nothing of it is left to search with" in done.stderr
        assert "The budget ended before anything was searched" in done.stdout

    def test_a_search_that_finds_nothing_new_says_where_it_ended(self, tiny_calibration, tmp_path):
        options = ("--space", "ramp", "--searcher", "grid", "--sparsity", 0.6, "--budget", 5000)
        done = in_process("search", tiny_calibration.folder, *options, "--out", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        assert "nothing new was proposed any more: the search ended after" in done.stderr

    def test_runs_of_different_calibrations_are_not_compared(
        self, tiny_model, text_file, run_folder, tmp_path
    ):
        sizes = ("--tokens", 256, "--selection-tokens", 64, "--holdout-tokens", 64, "--sequence-length", 32)
        in_process("calibrate", tiny_model, "--text", text_file, *sizes, "--out", tmp_path / "c")
        in_process("search", tmp_path / "c", *SEARCH, "--out", tmp_path / "other")
        assert "runs of the same calibration" in refused("compare", run_folder[0], tmp_path / "other")

    def test_one_rule_is_measured_with_published_ratios(self, tiny_calibration):
        even, owl = (
            json.loads(in_process("measure", tiny_calibration.folder, "wanda", *options, "--json").stdout)
            for options in ((), ("--allocation", "owl"))
        )
        assert even["sparsity"] == pytest.approx(owl["sparsity"], abs=0.02)
        assert even["kl"] != owl["kl"]

    def test_a_front_that_nothing_is_on_says_why(self, tiny_calibration, tmp_path):
        run = tmp_path / "run"
        options = ("--stage", "screen", "--objectives", "layer_error,size", "--budget", 12)
        assert in_process("search", tiny_calibration.folder, *options, "--out", run).returncode == 0
        done = in_process("front", run, "--objectives", "kl")
        assert "has kl: it reached the stage screen" in done.stdout


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("measure", "CAL", "abs(W) * sqr(X)"), "unknown operator 'sqr'; did you mean 'sqrt'?"),
            (("measure", "CAL", "abs(Q)"), "unknown leaf 'Q'"),
            (("measure", "CAL", "(abs(W)"), "never closed"),
            (("measure", "CAL", "(" * 10_000 + "W"), "at most 2000 characters"),
            (("measure", "CAL", "row_sum(W)"), "expected a score of shape (rows, columns), got (rows, 1)"),
            (("measure", "CAL", "1e999 * W"), "expected a finite number"),
            (("measure", "CAL", "W", "--sparsity", "1"), "sparsity: expected a number in [0, 1)"),
            (
                ("measure", "CAL", "W", "--sparsity=-0.1"),
                "sparsity: expected a number in [0, 1)",
            ),
            (("measure", "CAL", "W", "--sparsity", "nan"), "sparsity"),
            (("measure", "CAL", "W", "--stage", "full"), "expected a stage among screen, layer, model"),
            (("measure", "CAL", "W", "--group", "block"), "group: input should be 'row' or 'layer'"),
            (("measure", "CAL", "W", "--pattern", "4:2"), "expected the pattern unstructured or N:M"),
            (("measure", "CAL", "W", "--pattern", "2:4", "--sparsity", "0.6"), "expected the sparsity 0.5"),
            (("measure", "CAL", "W", "--device", "cuda:7"), "expected a device of this machine"),
            (("measure", "CAL", "wnada"), "did you mean 'wanda'"),
            (
                ("measure", "CAL", "W", "--stage", "layer", "--part", "holdout"),
                "holdout with the stage model",
            ),
            (("measure", "CAL", "W", "--allocation", "owll"), "did you mean 'owl'"),
            (("measure", "CAL", "exp(80 + W) * exp(80 + G) + W"), "not finite in the layer"),
            (("measure", "/nowhere", "W"), "expected a calibration folder, got /nowhere"),
            (("search", "CAL", "--objectives", "kll", "--out", "OUT"), "did you mean 'kl'"),
            (("search", "CAL", "--objectives", "kl,kl", "--out", "OUT"), "expected different objectives"),
            (("search", "CAL", "--searcher", "gpp", "--out", "OUT"), "did you mean 'gp'"),
            (("search", "CAL", "--stage", "layer", "--out", "OUT"), "'kl', which needs the stage 'model'"),
            (
                ("search", "CAL", "--budget", "0", "--out", "OUT"),
                "budget: expected a budget of candidates such as 400",
            ),
            (("search", "CAL", "--max-size", "1", "--out", "OUT"), "max_size"),
            (("search", "CAL", "--space", "curv", "--out", "OUT"), "did you mean 'curve'"),
            (("search", "CAL", "--space", "curve+layer", "--out", "OUT"), "at most one space of metrics"),
            (("search", "CAL", "--space", "curve", "--metric", "abs(X)", "--out", "OUT"), "metric:"),
            (("search", "CAL", "--metric", "wanda", "--out", "OUT"), "a given metric or a space of metrics"),
            (("search", "CAL", "--space", "curve", "--allocation", "owl", "--out", "OUT"), "leave one out"),
            (("search", "CAL", "--allocation", "atp", "--out", "OUT"), "--space ramp"),
            (("search", "CAL", "--searcher", "tpe", "--out", "OUT"), "expected a searcher of trees"),
            (
                ("search", "CAL", "--searcher", "grid", "--space", "curve", "--out", "OUT"),
                "expected a space of one number",
            ),
            (
                (
                    "search",
                    "CAL",
                    "--searcher",
                    "cma",
                    "--space",
                    "curve",
                    "--objectives",
                    "kl,perplexity",
                    "--out",
                    "OUT",
                ),
                "expected one objective for the searcher cma",
            ),
            (("search", "CAL", "--space", "curve", "--pattern", "2:4", "--out", "OUT"), "fixes every ratio"),
            (
                ("search", "CAL", "--sparsity", "0.3:0.7", "--objectives", "kl", "--out", "OUT"),
                "expected density",
            ),
            (
                ("search", "CAL", "--sparsity", "0.7:0.3", "--out", "OUT"),
                "or an interval from less to more such as",
            ),
            (("search", "CAL", "--phase", "2", "--out", "OUT"), "take turns in phases"),
            (("search", "CAL", "--rungs", "64,32", "--out", "OUT"), "expected growing numbers"),
            (
                ("search", "CAL", "--rungs", "4096", "--out", "OUT"),
                "rungs that grow towards the 128",
            ),
            (("search", "CAL", "--seeds", "0", "--out", "OUT"), "expected at least 1 seed"),
            (("compare", "/nowhere"), "expected a run folder"),
            (("search", "CAL", "--model", "/nowhere", "--out", "OUT"), "got /nowhere: not found"),
            (("calibrate", "/nowhere", "--out", "OUT"), "got /nowhere: not found"),
            (("calibrate", "MODEL", "--text", "SHORT", "--out", "OUT"), "tokens, "),
            (("calibrate", "MODEL", "--tokens", "0", "--out", "OUT"), "expected at least 1 token"),
            (("resume", "/nowhere"), "expected a run folder"),
            (("front", "/nowhere"), "expected a run folder"),
            (("measure", "CAL", "W", "--sparsity", "abc"), "'--sparsity': Input should be a valid number"),
            (("measure", "CAL", "W", "--pattern", "2:5000"), "inputs divide by 5000"),
            (("measure", "CAL"), "Missing argument 'metric'"),
            (("unknown",), "No such command 'unknown'"),
        ],
    )
    def test_is_one_line_and_writes_nothing(self, arguments, says, tiny_calibration, tiny_model, tmp_path):
        (tmp_path / "short.txt").write_text("too short")
        places = {
            "CAL": tiny_calibration.folder, "MODEL": tiny_model,
            "OUT": tmp_path / "out", "SHORT": tmp_path / "short.txt",
        }  # fmt: skip
        line = refused(*(places.get(a, a) for a in arguments))
        assert says.lower() in line.lower()
        assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("[search]\nbudgett = 3\n", "unknown setting 'budgett' in"),
            ("[search]\nsparsity = 2\n", "sparsity"),
            ("[serach]\nbudget = 3\n", "expected a section [search]"),
            ("[search\n", "is not valid TOML"),
        ],
    )
    def test_in_a_settings_file_is_told_too(self, content, says, tiny_calibration, tmp_path):
        (tmp_path / "a.toml").write_text(content)
        line = refused(
            "search", tiny_calibration.folder, "--config", tmp_path / "a.toml", "--out", tmp_path / "run"
        )
        assert says in line
        assert not (tmp_path / "run").exists()

    def test_a_missing_settings_file_is_named(self, tiny_calibration, tmp_path):
        line = refused(
            "search", tiny_calibration.folder, "--config", tmp_path / "no.toml", "--out", tmp_path / "run"
        )
        assert "expected a TOML file" in line

    def test_a_run_folder_of_another_configuration_is_left_alone(self, run_folder, tiny_calibration):
        folder, _ = run_folder
        line = refused("search", tiny_calibration.folder, "--sparsity", 0.25, "--out", folder)
        assert "holds a run with another configuration" in line
        assert "sparsity = 0.5 there, 0.25 here" in line

    def test_a_folder_with_other_files_is_left_alone(self, tiny_calibration, tmp_path):
        (tmp_path / "thesis.tex").write_text("precious")
        assert "with other files in it" in refused("search", tiny_calibration.folder, "--out", tmp_path)

    def test_a_run_that_is_being_written_is_left_alone(self, run_folder):
        folder, _ = run_folder
        with Archive(folder, write=True):
            assert "is being written by process" in refused("resume", folder)

    def test_a_model_that_lost_its_blocks_is_told(self, tmp_path):
        from transformers import BertConfig, BertLMHeadModel

        BertLMHeadModel(
            BertConfig(
                num_hidden_layers=0, hidden_size=8, num_attention_heads=2, is_decoder=True, vocab_size=260
            )
        ).save_pretrained(tmp_path / "m")
        save_model(tiny_config(), tmp_path / "t")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "t" / name).rename(tmp_path / "m" / name)
        line = refused("calibrate", tmp_path / "m", "--out", tmp_path / "out")
        assert "expected a decoder with a list of blocks" in line

    @pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/self"), reason="needs Linux")
    def test_a_read_only_or_full_disk_is_told(self, tiny_calibration, tmp_path):
        line = refused(
            "search", tiny_calibration.folder, *SEARCH, "--out", "/proc/secateur-cannot-write-here"
        )
        assert "/proc/secateur-cannot-write-here" in line
        if os.path.exists("/dev/full"):
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "writer.lock").symlink_to("/dev/full")
            done = in_process("search", tiny_calibration.folder, *SEARCH, "--out", tmp_path / "run")
            assert done.returncode == 2


@pytest.mark.parametrize("name", ["smollm2.toml", "ratios.toml"])
def test_examples_have_valid_settings(name):
    sections = tomllib.loads((ROOT / "examples" / name).read_text())
    SearchSettings.read({**sections["search"], "calibration": "x"})
    from secateur.workers.calibrate.calibration import CalibrationRequest

    CalibrationRequest("x", **sections.get("calibrate", {}))


def test_the_notebook_reads_a_run_that_is_still_going(tiny_calibration, tmp_path):
    """examples/notebook.py beside a search in another process, as in a notebook."""
    words = ("search", str(tiny_calibration.folder), "--budget", "2000", "--out", str(tmp_path / "run"))
    process = subprocess.Popen(
        [sys.executable, "-m", "secateur", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(ArchiveError), Archive(tmp_path / "run") as archive:
                if len(archive.front()) and archive.frame()["baseline"].isna().any():
                    break
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / "notebook.py", tmp_path / "run", tmp_path / "out"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert process.poll() is None, "the run had ended before it was read"
    finally:
        process.kill()
        process.wait()
    assert "candidates so far" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"front.svg", "history.svg", "best.py"}
    scores = runpy.run_path(str(tmp_path / "out" / "best.py"))
    assert callable(scores["scores"])
    assert callable(scores["mask"])


def test_a_place_that_cannot_be_used_is_named_as_it_was_asked_for():
    from secateur.cli.main import _reason

    for place in ("/a/.my.cal.1f2e3d4c.partial/block-000.safetensors", "/a/my.cal/block-000.safetensors"):
        error = OSError(errno.ENOSPC, "No space left on device", place)
        assert _reason(error).startswith(
            "cannot use /a/my.cal/block-000.safetensors: no space left on device;"
        )
