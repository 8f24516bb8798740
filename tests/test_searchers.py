"""The table of searchers: what its rows say is what settings, constructors, help and the README hold to."""

import inspect
import re
import shlex
import subprocess
import sys

import pytest
import secateur
from secateur.metrics_dsl.errors import SecateurError
from secateur.search.core import defaults
from secateur.search.core.objectives import look_up_objectives
from secateur.search.loop import Funnel, run
from secateur.search.searchers.table import SEARCHERS, build_searcher
from secateur.search.settings import SearchSettings
from secateur.search.spaces.problem import FixedRatios, Problem
from secateur.search.spaces.ratio_space import RATIO_SPACES
from secateur.search.spaces.varied import METRIC_SPACES, SPACES
from support import ROOT, FakeEvaluator
from test_search import DENSE, LAYERS, problem  # of every space, on the fake evaluator

# What each searcher can search, said once more and without the table.
NUMBERS = {"curve", "block", "layer", "ramp", "owl", "dlp", "dsa", "alpha"}
ONE_NUMBER = NUMBERS - {"curve", "block", "layer"}
CHOICES = {"meta", "feature", "meta+layer", "meta+ramp"}
TREES = {"tree", "tree+curve", "tree+feature"}
EXPECTED = {
    "descent": NUMBERS,
    "gp": NUMBERS | CHOICES | TREES,
    "nsga3": NUMBERS | CHOICES,
    "tpe": NUMBERS | CHOICES,
    "evolution": NUMBERS | CHOICES,
    "cma": NUMBERS,
    "random": NUMBERS | CHOICES | TREES,
    "grid": ONE_NUMBER,
}
EACH = [(name, space) for name in SEARCHERS for space in sorted(NUMBERS | CHOICES | TREES)]


def read(**values):
    return SearchSettings.read({"calibration": "x", **values})


def test_every_searcher_says_what_it_does():
    assert set(SEARCHERS) == set(EXPECTED)
    for name, row in SEARCHERS.items():
        assert row.name == name
        assert row.meaning
        assert row.can.least_batch <= row.can.batch <= (row.can.most_batch or row.can.batch)


@pytest.mark.parametrize(("name", "space"), EACH)
def test_a_searcher_takes_the_spaces_of_its_row_and_refuses_all_others(name, space):
    """From settings and from Python alike."""
    wanted = problem(space=space)
    if space in EXPECTED[name]:
        assert SEARCHERS[name].can.can_vary(wanted.varied)
        assert read(searcher=name, space=space, objectives="kl").searcher == name
        can = SEARCHERS[name].can
        funnel = Funnel(wanted.objectives, can.batch, screen=None, sensitivity=100 * (name == "descent"))
        trials = [
            t for batch in run(build_searcher(name, wanted, 0), FakeEvaluator(), funnel, 20) for t in batch
        ]
        assert len(trials) > 8  # one number has few that differ by a column
    else:
        with pytest.raises(SecateurError, match=r"^expected .*got|^expected a given metric"):
            build_searcher(name, wanted, 0)
        with pytest.raises(SecateurError, match=r"^expected .*got"):
            read(searcher=name, space=space, objectives="kl")


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize(
    ("objectives", "refused_by"),
    [
        ("kl", ()),
        ("kl,perplexity", ("cma",)),
        ("perplexity", ("descent",)),
        ("perplexity,kl", ("descent", "cma")),
    ],
)
def test_a_searcher_takes_the_objectives_of_its_row(name, objectives, refused_by):
    space, says = "ramp" if name == "grid" else "curve", "expected one objective for|the objective kl first"
    if name in refused_by:
        with pytest.raises(SecateurError, match=says):
            read(searcher=name, space=space, objectives=objectives)
        with pytest.raises(SecateurError, match=says):
            build_searcher(name, problem(objectives, space=space), 0)
    else:
        assert read(searcher=name, space=space, objectives=objectives)
        assert build_searcher(name, problem(objectives, space=space), 0)


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_searcher_takes_the_batches_of_its_row(name):
    can, space = SEARCHERS[name].can, "ramp"
    assert read(searcher=name, space=space).batch_size == can.batch
    assert read(searcher=name, space=space, batch=can.least_batch)
    if can.least_batch > 1:
        with pytest.raises(SecateurError, match=f"batches of at least {can.least_batch} for"):
            read(searcher=name, space=space, batch=can.least_batch - 1)
    if can.most_batch:
        with pytest.raises(SecateurError, match=f"batches of at most {can.most_batch} for"):
            read(searcher=name, space=space, batch=can.most_batch + 1)


# Who uses sensitivities where: among choices they lead nowhere, and gp has no way over an interval.
DESCENDING = {
    ("layer", 0.6): {"descent", "gp"},
    ("layer", "0.3:0.7"): {"descent"},
    ("tree+layer", 0.6): {"gp"},
    ("tree+layer", "0.3:0.7"): set(),
    ("meta+layer", 0.6): {"gp"},
    ("feature", 0.6): set(),
    ("tree", 0.6): set(),
}


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize(("space", "sparsity"), DESCENDING)
def test_sensitivities_are_for_those_that_use_them(name, space, sparsity):
    wanted = {"searcher": name, "space": space, "sparsity": sparsity}
    if name in DESCENDING[space, sparsity]:
        assert read(**wanted, sensitivity=512).descends
        assert read(**wanted).descends
    else:
        with pytest.raises(SecateurError, match="expected"):
            read(**wanted, sensitivity=512)


def test_descent_needs_sensitivities_and_gp_does_not():
    assert read(searcher="gp", space="layer", sensitivity=0).sensitivity == 0
    with pytest.raises(SecateurError, match="expected tokens for the sensitivities that descent follows"):
        read(searcher="descent", space="layer", sensitivity=0)


@pytest.mark.parametrize("name", SEARCHERS)
def test_phases_are_for_those_that_take_turns(name):
    if SEARCHERS[name].can.phases:
        assert read(searcher=name, space="tree+curve", phase=2).phase == 2
    else:
        with pytest.raises(SecateurError, match="expected the searcher gp for phases"):
            read(searcher=name, space="tree+curve", phase=2)


@pytest.mark.parametrize("space", SPACES)
def test_the_table_of_spaces_says_what_varies_in_each(space):
    assert set(SPACES) == {*METRIC_SPACES, *RATIO_SPACES}
    assert problem(space=space).varied == set(SPACES[space])


def test_an_interval_of_sparsities_is_one_number_more():
    interval = (0.3, 0.7)
    assert problem("kl,density", space="ramp", sparsity=interval).varied == {"numbers"}
    assert problem("kl,density", space="tree", sparsity=interval).varied == {"trees", "one number"}


@pytest.mark.parametrize("name", [name for name in SEARCHERS if name != "random"])
def test_one_given_rule_is_nothing_to_search(name):
    nothing = Problem(DENSE.metric, FixedRatios(LAYERS), look_up_objectives(["kl"]))
    with pytest.raises(SecateurError, match=r"got one given rule|expected a given metric"):
        build_searcher(name, nothing, 0)


class TestTheOneThatIsChosen:
    @pytest.mark.parametrize(
        ("asked", "name"),
        [
            ({}, "gp"),
            ({"space": "meta"}, "gp"),
            ({"space": "tree+layer"}, "gp"),
            ({"space": "layer"}, "descent"),
            ({"space": "layer", "sparsity": "0.3:0.75"}, "descent"),
            ({"space": "curve", "objectives": "kl,perplexity"}, "descent"),
            ({"space": "block", "sensitivity": 512}, "descent"),
            ({"space": "layer", "objectives": "perplexity"}, "gp"),
            ({"space": "layer", "objectives": "layer_error", "stage": "layer"}, "gp"),
            ({"space": "layer", "batch": 16}, "gp"),
            ({"space": "layer", "sensitivity": 0}, "gp"),
            ({"space": "feature"}, "gp"),
            ({"space": "ramp"}, "gp"),
            ({"allocation": "owl"}, "gp"),
            ({"pattern": "2:4"}, "gp"),
        ],
    )
    def test_fits_what_is_searched(self, asked, name):
        settings = read(**asked)
        assert settings.searcher == name
        assert settings.chosen.startswith(f"the searcher is {name}, chosen for the space {settings.space}; ")
        assert read(searcher="auto", **asked) == settings

    def test_says_what_keeps_descent_from_ratios(self):
        assert "(descent cannot: expected batches of at most 4 for" in read(space="layer", batch=16).chosen
        assert "descent" not in read(space="ramp").chosen

    def test_is_saved_by_its_name_and_no_choice_any_more(self, tmp_path):
        settings = read(space="layer", sparsity=0.6)
        (tmp_path / "run.toml").write_text(settings.to_toml())
        assert 'searcher = "descent"' in settings.to_toml()
        saved = SearchSettings.load(tmp_path / "run.toml")
        assert saved == settings
        assert saved.chosen == ""
        assert read(searcher="descent", space="layer").chosen == ""
        assert settings.model_copy(update={"seed": 4}).chosen == settings.chosen

    def test_contradictions_are_told_as_ever(self):
        with pytest.raises(SecateurError, match="a pattern fixes every ratio"):
            read(space="layer", pattern="2:4")


class Alternating:
    """Somebody else's searcher, of two numbers' ends."""

    def __init__(self, problem):
        self.problem = problem

    def ask(self, count):
        from secateur.search.spaces.variables import Encoding

        ends = [[(v.low, v.high)[i % 2] for v in self.problem.variables] for i in range(count)]
        return [self.problem.candidate(Encoding(None, tuple(values))) for values in ends]

    def tell(self, trials):
        pass


def test_a_row_of_somebody_else_is_held_to_what_it_says(monkeypatch):
    can = secateur.Abilities(("numbers",), "one", most_batch=2, batch=2)
    mine = secateur.SearcherRow("ends", lambda problem, _seed, _batch: Alternating(problem), "ends", can)
    monkeypatch.setitem(SEARCHERS, "ends", mine)
    assert read(searcher="ends", space="curve").batch_size == 2
    assert len(build_searcher("ends", problem(space="curve"), 0).ask(4)) == 4
    for asked, says in (
        ({"space": "tree"}, "a searcher of trees (gp, random) for the space tree, got 'ends'"),
        ({"space": "meta"}, "a space of numbers alone, such as curve, for the searcher ends, got meta"),
        ({"space": "curve", "batch": 3}, "batches of at most 2 for the searcher ends, got 3"),
        ({"space": "curve", "objectives": "kl,perplexity"}, "one objective for the searcher ends"),
    ):
        with pytest.raises(SecateurError, match="expected") as caught:
            read(searcher="ends", **asked)
        assert says in str(caught.value)
    plain = secateur.SearcherRow("plain", mine.build, "anything")
    monkeypatch.setitem(SEARCHERS, "plain", plain)
    assert read(searcher="plain", space="tree+feature").row is plain


class TestDocuments:
    def rows(self):
        """The README's table of searchers, made from the rows."""
        anything = secateur.Abilities().searches
        for row in SEARCHERS.values():
            varies = "anything" if row.can.searches == anything else ", ".join(row.can.searches)
            yield f"| `{row.name}` | {row.meaning} | {varies} | {row.can.objectives} |"

    def test_the_readme_has_the_rows_of_the_table(self):
        text = (ROOT / "README.md").read_text()
        _, after = text.split(
            "| `--searcher` | what it does | what varies | objectives |\n|---|---|---|---|\n"
        )
        assert after.split("\n\n")[0].splitlines() == list(self.rows())

    def test_searches_of_the_readme_have_settings_that_fit(self):
        text = (ROOT / "README.md").read_text()
        chosen = {}
        for command in re.findall(r"^\$ secateur search cal (.+)$", text, re.MULTILINE):
            words = shlex.split(command)
            if "--plugin" in words:
                continue  # its names are those of the reader's own file
            options = {a[2:].replace("-", "_"): b for a, b in zip(words[::2], words[1::2], strict=True)}
            asked = {name: value for name, value in options.items() if name in SearchSettings.model_fields}
            chosen[options["out"]] = read(**asked).searcher
        assert chosen["runs/a"] == chosen["runs/d"] == chosen["runs/f"] == "gp"
        assert chosen["runs/c"] == chosen["runs/e"] == "descent"

    def test_help_of_search_names_all_searchers_and_imports_none(self):
        code = (
            "import sys; sys.argv = ['secateur', 'search', '--help']\n"
            "from secateur.cli.main import main\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "print(sorted({'torch', 'numpy', 'deap', 'pymoo', 'optuna', 'pandas'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        *text, heavy = done.stdout.splitlines()
        assert heavy == "[]"
        said = " ".join(" ".join(text).split())
        for row in SEARCHERS.values():
            assert f"{row.name}: {row.meaning}" in said
        assert "16, or 4 for descent" in said


def test_defaults_are_the_same_from_python_and_on_the_command_line():
    from secateur.cli.plan import plan
    from secateur.cli.prune import evaluate, prune
    from secateur.cli.search import calibrate, resume, search
    from secateur.workers.cluster.settings import Cluster

    def of(call):
        return {name: p.default for name, p in inspect.signature(call).parameters.items()}

    for command, request in (
        (calibrate, secateur.CalibrationRequest),
        (plan, secateur.CalibrationRequest),
        (prune, secateur.PruneRequest),
        (evaluate, secateur.EvaluationRequest),
        (search, Cluster),
        (resume, Cluster),
    ):
        own, wanted = of(command), of(request)
        for name in set(own) & set(wanted) - {"workers", "text", "tasks"}:  # these are words there
            assert own[name] == wanted[name], (command, name)
    assert of(plan)["budget"] == read().budget == defaults.BUDGET
    assert of(Funnel)["batch"] == read().batch_size == defaults.BATCH
    assert of(Funnel)["promote"] == read().promote == defaults.PROMOTE
    assert of(search)["cpus_per_worker"] == Cluster().cpus
    assert read().sparsity == defaults.SPARSITY
