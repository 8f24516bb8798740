"""The real model, SmolLM2-135M-Instruct, once from end to end."""

import json
import math

import numpy as np
import pytest
import torch
from references import sparsegpt_reference, wanda_reference
from secateur.metrics_dsl.parser import parse_metric
from secateur.metrics_dsl.published import PUBLISHED
from secateur.results.archive.archive import Archive
from secateur.search.core.candidate import Candidate, uniform
from secateur.search.spaces.ratios import sizes
from secateur.service.prune_model import PruneRequest, prune
from secateur.workers.calibrate.text import draw_sequences
from secateur.workers.measure.local_evaluator import LocalEvaluator
from secateur.workers.measure.masks import removed
from secateur.workers.model.decoder import Decoder, weight_matrix
from secateur.workers.model.load import load_model
from secateur.workers.prune.evaluation import figures
from secateur.workers.prune.pruning import Pruner
from secateur.workers.prune.repair import REPAIRS
from support import in_process

pytestmark = pytest.mark.model

WANDA = PUBLISHED["wanda"].expression


def by_formula(name, leaf):
    """Scores as the papers' formulas give them, in plain torch and in this project's units."""
    w, x, v, d, g = (leaf[n] for n in "WXVDG")
    a = w.abs()
    relative = a / a.sum(0, keepdim=True) + a / a.sum(1, keepdim=True)
    norms = (w * w).sum(0, keepdim=True).sqrt(), (w * w).sum(1, keepdim=True).sqrt()
    return {
        "magnitude": lambda: a,
        "wanda": lambda: a * x,
        "ria-1": lambda: relative * x,
        "ria": lambda: relative * x.sqrt(),
        "stade": lambda: w * w * v,
        "gblm": lambda: a * (x + 25 * g),
        "pruner-zero": lambda: w * w * ((g - g.min()) / (g.max() - g.min())),
        "sparsegpt": lambda: w * w / d,
        "lognorm": lambda: torch.log1p(a / norms[1] + a / norms[0]) * x.sqrt(),
        "wanda++": lambda: a * (x + 2.21 * g),
    }[name]()


def by_sorting(scores, ratio, group):
    """Remove the first of a stable sort."""
    flat = scores if group == "row" else scores.reshape(1, -1)
    order = flat.sort(dim=1, stable=True).indices[:, : int(flat.shape[1] * ratio)]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True).reshape(scores.shape)


@pytest.mark.parametrize("name", PUBLISHED)
def test_masks_of_published_metrics_equal_their_formulas_bit_for_bit(real_evaluator, name):
    metric = PUBLISHED[name].expression
    for group in ("row", "layer"):
        candidate = uniform(metric, real_evaluator.layers, 0.6, group)
        for held in real_evaluator.worker.shard.held[:: 7 * 5 + 1] + real_evaluator.worker.shard.held[-7:]:
            expected = by_sorting(by_formula(name, held.leaves), 0.6, group)
            assert torch.equal(held.mask(candidate, "unstructured"), expected), held.layer.name


def test_the_gram_error_is_the_output_error_in_double_precision(real_evaluator, real_calibration):
    """On the statistics tokens themselves, for every layer of some blocks."""
    decoder: Decoder = real_evaluator.worker.decoder
    layers = {i: h for i, h in enumerate(real_evaluator.worker.shard.held) if h.layer.block % 4 == 1}
    fed = {i: [] for i in layers}
    hooks = [
        decoder.modules[i].register_forward_pre_hook(
            lambda _m, a, i=i: fed[i].append(a[0].flatten(0, -2).double())
        )
        for i in layers
    ]
    with torch.no_grad():
        for sequence in real_calibration.tokens("statistics").split(4):
            decoder.model(input_ids=sequence)
    for hook in hooks:
        hook.remove()
    candidates = [uniform(parse_metric(t), real_evaluator.layers, 0.6) for t in ("abs(W) * X", "abs(W)")]
    for candidate, found in zip(candidates, real_evaluator.measure(candidates, "layer"), strict=True):
        for i, held in layers.items():
            x, weights = torch.cat(fed[i]), held.weights.double()
            difference = weights * held.mask(candidate, "unstructured")
            direct = (x @ difference.T).square().sum() / (x @ weights.T).square().sum()
            assert found.layer_errors[i] == pytest.approx(float(direct), rel=1e-5), held.layer.name


def test_screening_all_rows_is_the_layer_stage(real_calibration, real_evaluator):
    evaluator = LocalEvaluator(real_calibration, rows=1 << 20)
    candidate = uniform(parse_metric("abs(W) * X"), evaluator.layers, 0.6)
    (screen,) = evaluator.measure([candidate], "screen")
    (layer,) = real_evaluator.measure([candidate], "layer")
    assert screen.layer_errors == layer.layer_errors
    assert screen.fingerprint == layer.fingerprint
    evaluator.close()


def test_figures_are_those_of_a_model_pruned_for_real(real_evaluator, real_calibration):
    model, _ = load_model(real_calibration.model_source)
    dense = Decoder(model)
    ids = real_calibration.tokens("holdout")
    candidate = uniform(parse_metric("abs(W) * X"), real_evaluator.layers, 0.6)
    (found,) = real_evaluator.measure([candidate], "model", "holdout")
    with torch.no_grad():
        before = model(input_ids=ids).logits.double().log_softmax(-1)
        for held, module in zip(real_evaluator.worker.shard.held, dense.modules, strict=True):
            scores = by_formula("wanda", held.leaves)
            weight_matrix(module)[removed(scores, 0.6, "row")] = 0
        after = model(input_ids=ids).logits.double().log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    nll = float(-after[:, :-1].gather(-1, ids[:, 1:, None]).mean())
    zeros = sum(int((weight_matrix(m) == 0).sum()) for m in dense.modules) / sum(x.size for x in dense.layers)
    assert found.values["kl"] == pytest.approx(kl, rel=1e-4)
    assert found.values["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert found.values["sparsity"] == pytest.approx(zeros, abs=1e-3)  # some weights were 0 before


def test_the_calibration_describes_itself(real_calibration):
    manifest = real_calibration.manifest
    assert len(real_calibration.layers) == 210
    assert sum(layer.size for layer in real_calibration.layers) == 106_168_320
    assert manifest["text"] == "self"
    assert (real_calibration.folder / "model" / "model.safetensors").is_file()  # GGUF is read once


def test_a_search_from_the_command_line_beats_magnitude_and_resumes(real_calibration, tmp_path):
    run = tmp_path / "run"
    done = in_process(
        "search", real_calibration.folder, "--sparsity", 0.6, "--budget", 16, "--batch", 6, "--out", run
    )
    assert done.returncode == 0, done.stderr
    frame = Archive(run).frame()
    front = Archive(run).front()
    kl = frame.set_index("baseline")["kl_holdout"]
    assert front["kl_holdout"].min() <= kl["wanda"] < kl["magnitude"]
    assert (frame["sparsity"].dropna() - 0.5991).abs().max() < 1e-3
    again = in_process("resume", run, "--json")
    assert len(json.loads(again.stdout)["front"]) == len(front)


def test_searched_ratios_hold_the_sparsity_and_beat_even_ones(real_calibration, tmp_path):
    run = tmp_path / "run"
    done = in_process(
        "search", real_calibration.folder, "--space", "curve", "--searcher", "evolution", "--sparsity", 0.6,
        "--rungs", 128, "--batch", 8, "--budget", 41, "--out", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    frame = Archive(run).frame()
    found = frame[frame["baseline"].isna()]
    assert len(found)
    assert (found["sparsity"] - 0.6).abs().max() < 2e-4
    measured = frame[frame["status"] == "measured"].set_index("baseline")["kl"]
    assert {"wanda", "wanda + owl", "wanda + dlp", "wanda + alpha", "wanda + dsa"} <= set(measured.index)
    assert measured.min() < 0.95 * measured["wanda"]
    # what an allocation's ratios remove is what its name says, rounded down as published
    even = frame[frame["baseline"] == "wanda"].iloc[0]
    assert (even["ratio_min"], even["ratio_max"]) == (0.6, 0.6)


def test_patterns_work_the_same_way(real_calibration):
    done = in_process("measure", real_calibration.folder, "wanda", "--pattern", "2:4", "--json")
    assert json.loads(done.stdout)["sparsity"] == 0.5


def test_text_files_work_the_same_way(real_calibration, text_file, tmp_path):
    sizes = ("--tokens", 256, "--selection-tokens", 128, "--holdout-tokens", 128, "--sequence-length", 128)
    model = real_calibration.folder / "model"
    done = in_process(
        "calibrate", model, "--text", text_file, *sizes, "--no-gradients", "--out", tmp_path / "c", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = in_process("measure", tmp_path / "c", "wanda", "--sparsity", 0.5, "--json")
    assert json.loads(found.stdout)["kl"] > 0


def test_sensitivities_predict_differences_of_kl(real_evaluator):
    """With central differences along the steepest way, which is the one that a search takes."""
    layers, weights = real_evaluator.layers, sizes(real_evaluator.layers)
    (found,) = real_evaluator.measure([uniform(WANDA, layers, 0.6)], "sensitivity", "selection")
    slopes = np.array(found.sensitivities)
    way = -(slopes / weights - slopes.sum() / weights.sum())
    way = way / np.abs(way).max()
    way = way - way @ weights / weights.sum()
    kl = []
    for sign in (1, -1):
        ratios = tuple(np.clip(0.6 + sign * 0.1 * way, 0, 0.95))
        (measured,) = real_evaluator.measure([Candidate(WANDA, ratios)], "model", "selection")
        kl.append(measured.values["kl"])
    assert kl[0] < kl[1]
    assert float(slopes @ way) == pytest.approx((kl[0] - kl[1]) / 0.2, rel=0.15)


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """Python's own manual, 465,000 characters that come with it."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("prose") / "topics.txt"
    path.write_text("\n\n".join(topics.values()))
    return path


@pytest.fixture(scope="module")
def source(real_calibration):
    """The calibration's folder of the dequantised weights, which loads ten times as fast."""
    return real_calibration.model_source


def test_sequential_wanda_is_the_published_procedure_bit_for_bit(source, prose, tmp_path):
    request = PruneRequest(
        source, sparsity=0.5, text=str(prose), tokens=1024, sequence_length=256, device="cpu",
        statistics="sequential",
    )  # fmt: skip
    record = prune(request, tmp_path / "out")
    assert record["read_back"] == 210
    assert record["sparsity"] == pytest.approx(0.5, abs=1e-4)
    reference, tokenizer = load_model(source)
    ids = draw_sequences(str(prose), reference, tokenizer, 4, 256, 0)
    with torch.no_grad():
        wanda_reference(reference, Decoder(reference).blocks, ids, 0.5)
    pruned = Decoder(load_model(str(tmp_path / "out"))[0])
    for layer, ours, theirs in zip(pruned.layers, pruned.modules, Decoder(reference).modules, strict=True):
        assert torch.equal(ours.weight, theirs.weight), layer.name


def test_obs_helps_at_every_sparsity_and_is_sparsegpt_s_update(source, prose):
    model, tokenizer = load_model(source)
    decoder = Decoder(model)
    ids = draw_sequences(str(prose), model, tokenizer, 10, 256, 0)
    statistics, holdout = ids[:8], ids[8:]
    pruner = Pruner(decoder, statistics)
    held, hidden = [], pruner._entering()
    with torch.no_grad():  # one pass for all that is compared: statistics are one-shot
        for block in range(len(decoder.blocks)):
            hidden, found = pruner._measured(block, hidden, WANDA)
            held += found

    def perplexity(ratio, update):
        weights = {}
        for h in held:
            mask = h.mask(uniform(WANDA, decoder.layers, ratio), "unstructured")
            weights[h.index] = update(h.weights, mask, h.gram, h.leaves["M"].flatten())
            assert not weights[h.index][mask].any()
        with decoder.with_weights(weights):
            return figures(model, holdout)["perplexity"]

    found = {
        (ratio, name): perplexity(ratio, lambda *a, name=name: REPAIRS[name](*a).weights)
        for ratio in (0.5, 0.6, 0.7)
        for name in ("none", "obs")
    }
    for ratio in (0.5, 0.6, 0.7):
        assert found[ratio, "obs"] < found[ratio, "none"], found
    reference = perplexity(0.6, lambda w, mask, gram, _mean: sparsegpt_reference(w, mask, gram))
    assert found[0.6, "obs"] == pytest.approx(reference, rel=0.01)
