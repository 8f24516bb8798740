"""What tests of plugins share: a plugin from its text, a run without its service."""

import textwrap
from dataclasses import asdict

import torch
from secateur.metrics_dsl import plugins
from secateur.metrics_dsl.operators import LEAVES
from secateur.metrics_dsl.plugins import Plugin
from secateur.results.archive.archive import Archive
from secateur.results.archive.remembering import RememberingEvaluator
from secateur.search.baselines import BaselinesFirst, build_funnel, build_problem
from secateur.search.core.candidate import Candidate
from secateur.search.loop import run
from secateur.search.searchers.table import build_searcher
from secateur.search.settings import SearchSettings

CBRT = """
    from secateur import Operator
    SECATEUR = [Operator("cbrt", 1, "elementwise", "cube root", lambda x: x.sign() * x.abs().pow(1 / 3)%s)]
"""
LEAVES_OF_A_LAYER = {
    name: torch.randn(
        (24, 1)[not leaf.shape.rows], (32, 1)[not leaf.shape.columns],
        generator=torch.Generator().manual_seed(i),
    )
    for i, (name, leaf) in enumerate(LEAVES.items())
}  # fmt: skip


def plugin(text, name="mine.py"):
    return Plugin(name, textwrap.dedent(text))


def settings_of(folder="cal", **changes):
    return SearchSettings.read({"calibration": folder, "budget": 40, **changes})


def search_into(folder, evaluator, settings, starts=()):
    """A run without its service: the loop, the archive and what a run notes of itself."""
    folder.mkdir(exist_ok=True)
    (folder / "run.toml").write_text(settings.to_toml())
    with Archive(folder, write=True) as archive:
        wanted, baselines = build_problem(settings, evaluator, starts)
        opening = [Candidate(b.metric, b.ratios, settings.group) for b in baselines]
        archive.keep(
            objectives=list(settings.objectives), pattern="unstructured", plugins=plugins.notes(),
            layers=[asdict(layer) for layer in evaluator.layers], calibration="c", versions={"torch": "2"},
            baselines={c.key: b.name for c, b in zip(opening, baselines, strict=True)},
        )  # fmt: skip
        searcher = build_searcher(settings.searcher, wanted, settings.seed, settings.batch_size)
        searcher = BaselinesFirst(searcher, opening, seeds_searcher=settings.seeding)
        funnel = build_funnel(settings, [c.key for c in opening])
        remembering = RememberingEvaluator(evaluator, archive)
        for trials in run(searcher, remembering, funnel, settings.budget):
            archive.add(trials)
    return Archive(folder)
