"""On a GPU: masks of equal scores are those of the CPU bit for bit, and figures the same up to rounding."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from secateur import run_search
from secateur.metrics_dsl.parser import parse_metric
from secateur.metrics_dsl.published import PUBLISHED
from secateur.results.archive.archive import Archive
from secateur.search.core.candidate import Candidate, uniform
from secateur.search.settings import SearchSettings
from secateur.service.prune_model import PruneRequest, prune
from secateur.workers.calibrate.calibration import calibrate
from secateur.workers.measure.local_evaluator import LocalEvaluator
from secateur.workers.measure.masks import below, packed, ranks, removed
from secateur.workers.measure.worker import Device
from secateur.workers.prune.repair import REPAIRS
from support import assert_same_facts, facts, small_request

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

WANDA = PUBLISHED["wanda"].expression


@pytest.fixture(scope="module")
def on_gpu(tiny_calibration):
    evaluator = LocalEvaluator(tiny_calibration, device=Device("cuda"))
    yield evaluator
    evaluator.close()


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize(("rows", "columns"), [(3, 7), (64, 576), (40, 40000)])
@pytest.mark.parametrize("levels", [2, 50, 0])
def test_masks_are_those_of_the_cpu(rows, columns, levels, group):
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    if levels:  # many equal scores
        scores = (scores * levels).round() / levels
    places = ranks(scores, group)
    assert torch.equal(ranks(scores.cuda(), group).cpu(), places)
    for ratio in (0.0, 0.01, 0.5, 0.77):
        wanted = removed(scores, ratio, group)
        assert torch.equal(removed(scores.cuda(), ratio, group).cpu(), wanted)
        assert torch.equal(below(places.cuda(), ratio, group).cpu(), wanted)
        assert packed(wanted.cuda()) == packed(wanted)


@pytest.mark.parametrize("pattern", ["2:4", "3:8", "40:64"])
def test_patterns_are_those_of_the_cpu(pattern):
    scores = (torch.randn(32, 256, generator=torch.Generator().manual_seed(0)) * 4).round()
    wanted = removed(scores, 0.5, "row", pattern)
    assert torch.equal(removed(scores.cuda(), 0.5, "row", pattern).cpu(), wanted)


def test_statistics_are_those_of_the_cpu(tiny_model, tiny_calibration, text_file, tmp_path):
    found = calibrate(replace(small_request(tiny_model, text_file), device="cuda"), tmp_path / "calibration")
    for block in range(3):
        for index, own in tiny_calibration.block(block).items():
            other = found.block(block)[index]
            pairs = {"H": (own.gram, other.gram), "energy": (own.energy, other.energy)}
            pairs |= {name: (leaf, other.leaves[name]) for name, leaf in own.leaves.items()}
            for name, (mine, its) in pairs.items():
                scale = float(mine.abs().max())
                assert torch.allclose(mine, its, rtol=1e-3, atol=1e-4 * scale), name


@pytest.mark.parametrize("stage", ["screen", "layer", "model", "sensitivity"])
def test_figures_are_those_of_the_cpu(tiny_evaluator, on_gpu, stage):
    layers = tiny_evaluator.layers
    rng = np.random.default_rng(0)
    candidates = [uniform(p.expression, layers, 0.6) for p in PUBLISHED.values()]
    candidates += [Candidate(WANDA, tuple(rng.uniform(0.3, 0.8, len(layers))), group)
                   for group in ("row", "layer")]  # fmt: skip
    if stage == "sensitivity":
        candidates = candidates[-2:]
    part = "statistics" if stage == "sensitivity" else "selection"
    pairs = zip(
        tiny_evaluator.measure(candidates, stage, part), on_gpu.measure(candidates, stage, part), strict=True
    )
    for mine, its in pairs:
        assert its.failure == mine.failure
        assert its.tokens == mine.tokens
        assert its.layer_errors == pytest.approx(mine.layer_errors, rel=1e-3)
        assert its.sensitivities == pytest.approx(mine.sensitivities, rel=1e-2, abs=1e-4)
        assert its.values == pytest.approx(mine.values, rel=1e-3, abs=1e-5)


def test_failures_are_those_of_the_cpu(tiny_evaluator, on_gpu):
    wrong = uniform(parse_metric("exp(80 + W) * exp(80 + G) + W"), tiny_evaluator.layers, 0.5)
    for stage in ("screen", "layer", "model"):
        (mine,), (its,) = (e.measure([wrong], stage) for e in (tiny_evaluator, on_gpu))
        assert its.failure == mine.failure != ""


def test_reductions_are_those_of_the_cpu(tiny_evaluator, on_gpu):
    names = ("mean", "log_variance", "maximum", "norm", "outliers_5", "tail", "quantiles")
    mine, its = (e.summarise(WANDA, names) for e in (tiny_evaluator, on_gpu))
    for name in names:
        assert its[name] == pytest.approx(mine[name], rel=1e-4)


SEARCHES = {
    "metrics": {"budget": 60, "batch": 8, "sparsity": 0.5},
    "ratios": {"space": "layer", "metric": "wanda", "searcher": "descent", "sparsity": 0.6, "budget": 60,
               "rungs": "64"},
    "both": {"space": "tree+curve", "objectives": "kl", "sparsity": 0.6, "budget": 50, "rungs": "64"},
    "pattern": {"pattern": "2:4", "budget": 40, "batch": 8},
    "bfloat16": {"budget": 40, "batch": 8, "sparsity": 0.5, "dtype": "bfloat16"},
}  # fmt: skip


@pytest.mark.parametrize("name", SEARCHES)
def test_one_seed_gives_one_archive(tiny_calibration, tmp_path, name):
    wanted = SearchSettings.read(
        {"calibration": tiny_calibration.folder, "seed": 5, "device": "cuda", **SEARCHES[name]}
    )
    for folder in ("one", "other"):
        run_search(wanted, tmp_path / folder)
    assert_same_facts(facts(tmp_path / "one"), facts(tmp_path / "other"))
    assert Archive(tmp_path / "one").fact("card")["accelerator"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("statistics", ["one-shot", "sequential"])
def test_pruning_is_that_of_the_cpu(tiny_model, text_file, tmp_path, statistics, repair):
    made = {}
    for device in ("cpu", "cuda"):
        request = PruneRequest(
            model=str(tiny_model), sparsity=0.5, text=str(text_file), tokens=512,
            sequence_length=64, statistics=statistics, repair=repair, device=device,
        )  # fmt: skip
        prune(request, tmp_path / device)
        made[device] = load_file(tmp_path / device / "model.safetensors")
    mine, its = made["cpu"], made["cuda"]
    assert mine.keys() == its.keys()
    for name, weights in mine.items():
        same = (weights == 0) == (its[name] == 0)
        assert same.float().mean() > 0.999, name  # near ties may fall otherwise
        assert torch.allclose(weights[same], its[name][same], rtol=1e-2, atol=1e-3), name
