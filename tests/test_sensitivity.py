"""Sensitivities: derivatives of KL by ratios, against differences and on several architectures."""

import numpy as np
import pytest
import torch
from secateur.metrics_dsl.parser import parse_metric
from secateur.search.core.candidate import Candidate, uniform
from secateur.search.searchers.descent import MarginalCosts
from secateur.search.spaces.ratios import sizes
from secateur.workers.calibrate.calibration import calibrate
from secateur.workers.measure.local_evaluator import LocalEvaluator
from secateur.workers.measure.masks import below, ranks, soft_mask
from secateur.workers.measure.windows import count_windows, window_of
from support import save_model, small_request, tiny_config

WANDA = parse_metric("abs(W) * X")


class TestBlurredMasks:
    @pytest.mark.parametrize("group", ["row", "layer"])
    def test_become_masks_as_the_edge_narrows(self, group):
        order = ranks(torch.rand(6, 50, generator=torch.Generator().manual_seed(0)), group)
        for ratio in (0.2, 0.5, 0.9):
            soft = soft_mask(order, torch.tensor(ratio), group, 1e-6)
            assert torch.equal(soft < 0.5, below(order, ratio, group))
            wide = soft_mask(order, torch.tensor(ratio), group, 0.1)
            assert float(wide.mean()) == pytest.approx(1 - ratio, abs=1e-6)

    def test_grow_linearly_within_the_edge(self):
        order = torch.arange(10)[None]
        # the edge is at place 5, four places wide, and a weight stands in the middle of its place
        expected = [0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1]
        assert soft_mask(order, torch.tensor(0.5), "row", 0.2)[0].tolist() == pytest.approx(expected)


def test_windows_cover_a_part_once():
    ids = torch.arange(6 * 300).reshape(6, 300)
    count = count_windows(*ids.shape, 512)
    windows = [window_of(ids, 512, number) for number in range(count)]
    assert {w.numel() for w in windows} == {512}
    found = torch.cat([w.flatten() for w in windows])
    assert len(found) == len(found.unique())
    assert count == 2  # four sequences of 128 tokens at two places; two sequences are left over
    assert torch.equal(window_of(ids, 6 * 300, 0), ids)


def test_marginal_costs_are_by_weight_and_move_the_costly_down():
    from support import FakeEvaluator

    layers = FakeEvaluator.layers
    costs = MarginalCosts(layers)
    assert not costs.known
    costs.learn([layer.size * (2.0 if layer.kind == "v" else 1.0) for layer in layers])
    moved = costs.move([0.5] * len(layers), 0.05, 0.5)
    assert np.average(moved, weights=sizes(layers)) == pytest.approx(0.5)
    by_kind = {layer.kind: moved[i] for i, layer in enumerate(layers)}
    assert by_kind["v"] < 0.5 < by_kind["q"] == pytest.approx(by_kind["up"])
    costs.learn([-1.0] * len(layers))  # pruning helps everywhere: noise
    assert costs.move([0.5] * len(layers), 0.05, 0.5) == pytest.approx(moved)


def falls(evaluator, group="row", metric=WANDA):
    """KL before and after steps of descent, on the tokens that the steps come from."""
    candidate = uniform(metric, evaluator.layers, 0.6, group)
    kl = []
    for _ in range(3):
        (found,) = evaluator.measure([candidate], "model", "statistics")
        kl.append(found.values["kl"])
        (found,) = evaluator.measure([candidate], "sensitivity", "statistics")
        assert found.failure == ""
        costs = MarginalCosts(evaluator.layers)
        costs.learn(found.sensitivities)
        moved = costs.move(candidate.ratios, 0.05, 0.6)
        candidate = Candidate(candidate.metric, tuple(map(float, moved)), group)
    return kl


@pytest.mark.parametrize("group", ["row", "layer"])
def test_steps_along_them_lower_kl(tiny_evaluator, group):
    before, *_, after = falls(tiny_evaluator, group)
    assert after < 0.9 * before


def _architectures():
    from transformers import GPT2Config, GPTNeoXConfig, MixtralConfig, Qwen3Config

    small = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return {
        "gpt2": GPT2Config(vocab_size=260, n_embd=32, n_layer=3, n_head=4, n_positions=128),
        "neox": GPTNeoXConfig(**small, intermediate_size=48, max_position_embeddings=128),
        "qwen3": Qwen3Config(**small, intermediate_size=48, num_key_value_heads=2, head_dim=8),
        "mixtral": MixtralConfig(**small, intermediate_size=48, num_key_value_heads=2, num_local_experts=3),
        "untied": tiny_config(tie_word_embeddings=False),
    }


@pytest.mark.parametrize("name", ["gpt2", "neox", "qwen3", "mixtral", "untied"])
def test_every_architecture_has_them(name, text_file, tmp_path):
    model = save_model(_architectures()[name], tmp_path / "model")
    evaluator = LocalEvaluator(calibrate(small_request(model, text_file), tmp_path / "calibration"))
    before, *_, after = falls(evaluator)
    assert after < before
    evaluator.close()


def test_a_metric_without_finite_scores_is_a_failure(tiny_evaluator):
    metric = parse_metric("exp(80 + W) * exp(80 + G) + W")
    (found,) = tiny_evaluator.measure(
        [uniform(metric, tiny_evaluator.layers, 0.5)], "sensitivity", "statistics"
    )
    assert "not finite" in found.failure
    assert found.sensitivities == ()


def test_the_dense_weights_are_as_before(tiny_evaluator):
    before = tiny_evaluator.worker.decoder.fingerprints()
    candidate = uniform(WANDA, tiny_evaluator.layers, 0.5)
    first = tiny_evaluator.measure([candidate], "sensitivity", "statistics", 128)
    assert tiny_evaluator.measure([candidate], "sensitivity", "statistics", 128)[0].sensitivities == (
        first[0].sensitivities
    )
    assert first[0].tokens == 4 * 128
    assert tiny_evaluator.worker.decoder.fingerprints() == before
    assert not any(p.requires_grad for p in tiny_evaluator.worker.decoder.model.parameters())
