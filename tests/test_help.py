"""What a newcomer is told: help in groups and sections, and after each command the next one."""

import re
import shlex

import pytest
from exported import make_run
from secateur.cli.main import app
from secateur.cli.sections import (
    CLUSTER,
    HOW,
    JOBS,
    LOOK,
    MACHINE,
    OUTPUT,
    PREPARE,
    SEARCH,
    SEARCHED,
    TAKE_AWAY,
    USUAL,
)
from support import in_process

NAMES = [command.name or command.callback.__name__ for command in app.registered_commands]


def headings(text):
    return re.findall(r"^(\S[^:\n]*):$", text, re.MULTILINE)


def test_commands_stand_in_groups_and_none_is_cut_short():
    text = in_process("--help").stdout
    assert headings(text) == ["Options", PREPARE, SEARCH, LOOK, TAKE_AWAY, JOBS]
    assert "..." not in text.partition("\n")[2]
    for name in NAMES:
        assert re.search(rf"^  {name} +\S", text, re.MULTILINE), name


def test_options_of_a_search_stand_in_sections_the_usual_ones_first():
    text = in_process("search", "--help").stdout
    assert headings(text) == ["Arguments", USUAL, SEARCHED, HOW, MACHINE, CLUSTER, OUTPUT]
    usual = text[text.index(USUAL) : text.index(SEARCHED)]
    for option in ("--out", "--sparsity", "--space", "--searcher", "--objectives", "--budget", "--config"):
        assert option in usual


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_short_help_and_ends_in_an_example(name):
    short, long = in_process(name, "-h").stdout, in_process(name, "--help").stdout
    assert short == long
    assert "  -h, --help " in long
    assert f"Example: secateur {name}" in " ".join(long.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(shell, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = in_process("--show-completion", shell)
    assert done.returncode == 0
    assert "secateur" in done.stdout.lower()


class TestTheNextStep:
    @pytest.fixture
    def run(self, tmp_path):
        folder = tmp_path / "run"
        make_run(folder)
        return folder

    def steps(self, *arguments):
        """The commands that a command names, each of which must exist with the options it shows."""
        done = in_process(*arguments)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("next: secateur ")]
        assert lines, arguments
        assert done.stderr.splitlines()[-1] == lines[-1]
        for line in lines:
            name, *words = shlex.split(line.removeprefix("next: secateur "))
            shown = in_process(name, "--help").stdout
            assert all(word in shown for word in words if word.startswith("-")), line
        return lines

    def test_of_looking_at_a_run(self, run, tmp_path):
        for arguments in (("front", run), ("watch", run), ("compare", run), ("metrics",),
                          ("metrics", "--language"), ("metrics", "--allocations"),
                          ("report", run, "-o", tmp_path / "a.html"),
                          ("plot", run, "-o", tmp_path / "a.svg"),
                          ("snapshot", run, "-o", tmp_path / "a.parquet")):  # fmt: skip
            assert self.steps(*arguments)

    def test_of_taking_a_rule_away_is_pruning_by_it(self, run, tmp_path):
        (line,) = self.steps("export", run, "best", "--to", "json", "-o", tmp_path / "best.json")
        assert line == f"next: secateur prune MODEL -o pruned --candidate {run}:best"
        self.steps("export", run, "--to", "csv", "-o", tmp_path / "a.csv")
        self.steps("export", run, "best", "--to", "pruner-zero", "-o", tmp_path / "tree.json")
        (line,) = self.steps("import", tmp_path / "tree.json")
        assert line.startswith("next: secateur measure CALIBRATION ")

    def test_of_a_search_from_the_model_on(self, tiny_model, text_file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        cal, run = tmp_path / "cal", tmp_path / "run"
        sizes = ("--tokens", 256, "--sequence-length", 64)
        self.steps("plan", tiny_model, "--gpus", 1)
        parts = ("--selection-tokens", 64, "--holdout-tokens", 64)
        (line,) = self.steps("calibrate", tiny_model, "--text", text_file, *sizes, *parts, "--out", cal)
        assert line == f"next: secateur search {cal} --sparsity 0.6 --out runs/a"
        self.steps("measure", cal, "wanda", "--stage", "screen")
        lines = self.steps("search", cal, "--budget", 12, "--out", run)
        (prune,) = [line for line in lines if "--candidate" in line]
        self.steps("resume", run, "--budget", 14)
        lines = self.steps(*shlex.split(prune.removeprefix("next: secateur ")))  # as it is printed
        assert lines == [f"next: secateur evaluate pruned --text {text_file} --against {tiny_model}"]
        self.steps("evaluate", "pruned", "--text", text_file, "--window", 64, "--windows", 1)

    def test_is_left_out_where_a_program_reads(self, run):
        assert in_process("front", run, "--json").stderr == ""
