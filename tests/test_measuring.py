"""Calibrating and measuring on tiny models of several architectures, against plain references."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from secateur.metrics_dsl.parser import parse_metric
from secateur.metrics_dsl.published import PUBLISHED
from secateur.search.core.candidate import Candidate, uniform
from secateur.testing import EVALUATOR_CHECKS, FakeEvaluator
from secateur.workers.calibrate.calibration import CalibrationRequest, calibrate
from secateur.workers.calibrate.documents import TextError
from secateur.workers.calibrate.folder import Calibration, CalibrationError
from secateur.workers.calibrate.gradients import keep_states
from secateur.workers.calibrate.text import draw_sequences
from secateur.workers.measure.local_evaluator import LocalEvaluator
from secateur.workers.measure.prefix_cache import Prefix, Prefixes
from secateur.workers.measure.score_summary import tail_exponent
from secateur.workers.measure.windows import some_tokens
from secateur.workers.measure.worker import Device
from secateur.workers.model.decoder import Decoder, oriented, weight_matrix
from secateur.workers.model.errors import ModelError
from secateur.workers.model.load import load_model
from support import save_model, small_request, tiny_config


def inputs_of(decoder, ids):
    """What each layer is fed, (tokens, columns) in double precision, by an ordinary forward pass."""
    found = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, a, i=i: found.__setitem__(i, a[0].flatten(0, -2).double())
        )
        for i, module in enumerate(decoder.modules)
    ]
    with torch.no_grad():
        decoder.model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(scope="module")
def dense(tiny_calibration):
    return Decoder(load_model(tiny_calibration.model_source)[0])


@pytest.fixture(scope="module")
def inputs(tiny_calibration, dense):
    return inputs_of(dense, tiny_calibration.tokens("statistics"))


def statistics(calibration):
    return {
        i: s
        for block in range(len({x.block for x in calibration.layers}))
        for i, s in calibration.block(block).items()
    }


def gradients_of(dense, ids):
    """Root mean squares over sequences of what one backward pass gives, (rows, columns) each."""
    sums = [torch.zeros(layer.rows, layer.columns) for layer in dense.layers]
    for sequence in ids:
        dense.model.requires_grad_(True)
        dense.model.zero_grad()
        logits = dense.model(input_ids=sequence[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], sequence[1:]).backward()
        for total, module in zip(sums, dense.modules, strict=True):
            total += oriented(module, module.weight.grad).square()
    dense.model.requires_grad_(False)
    return [(total / len(ids)).sqrt() for total in sums]


class TestStatistics:
    def test_leaves_are_what_the_language_says(self, tiny_calibration, dense, inputs):
        for i, found in statistics(tiny_calibration).items():
            x, weights = inputs[i], weight_matrix(dense.modules[i]).double()
            gram = x.T @ x / len(x)
            damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
            expected = {
                "X": x.square().mean(0).sqrt(),
                "M": x.mean(0),
                "V": x.var(0),
                "D": torch.linalg.inv(damped).diagonal(),
                "Y": (x @ weights.T).square().mean(0).sqrt(),
            }
            assert torch.allclose(found.gram.double(), gram, rtol=1e-5, atol=1e-6)
            for name, value in expected.items():
                assert torch.allclose(found.leaves[name].flatten().double(), value, rtol=1e-4, atol=1e-5), (
                    name
                )

    def test_gradients_are_the_root_mean_square_over_sequences(self, tiny_calibration, dense):
        expected = gradients_of(dense, tiny_calibration.tokens("statistics"))
        for i, found in statistics(tiny_calibration).items():
            assert torch.allclose(found.leaves["G"], expected[i], rtol=1e-3, atol=1e-7)

    def test_layers_fed_by_one_tensor_share_a_gram_matrix(self, tiny_calibration):
        grams = [entry.gram for entry in tiny_calibration.entries[:7]]
        kinds = [layer.kind for layer in tiny_calibration.layers[:7]]
        shared = dict(zip(kinds, grams, strict=True))
        assert shared["q_proj"] == shared["k_proj"] == shared["v_proj"]
        assert shared["gate_proj"] == shared["up_proj"]
        assert len(set(grams)) == 4

    def test_parts_are_disjoint_and_described(self, tiny_calibration):
        windows = [
            tuple(row.tolist())
            for part in ("statistics", "selection", "holdout")
            for row in tiny_calibration.tokens(part)
        ]
        assert len(set(windows)) == len(windows) == 8 + 2 + 2
        described = tiny_calibration.manifest["parts"]["holdout"]
        assert described["sequences"] == 2
        assert len(described["sha256"]) == 64
        assert tiny_calibration.manifest["versions"]["torch"]


@pytest.mark.parametrize("check", EVALUATOR_CHECKS)
def test_the_local_evaluator_and_the_fake_one_keep_the_contract(check, tiny_evaluator):
    for evaluator in (tiny_evaluator, FakeEvaluator()):
        EVALUATOR_CHECKS[check](evaluator)


class TestErrors:
    @pytest.mark.parametrize("group", ["row", "layer"])
    def test_the_gram_error_is_the_output_error(self, tiny_evaluator, dense, inputs, group):
        candidate = uniform(parse_metric("abs(W) * X"), tiny_evaluator.layers, 0.5, group)
        (found,) = tiny_evaluator.measure([candidate], "layer")
        for i, held in enumerate(tiny_evaluator.worker.shard.held):
            weights = weight_matrix(dense.modules[i]).double()
            pruned = weights * ~held.mask(candidate, "unstructured")
            direct = ((weights - pruned) @ inputs[i].T).square().sum() / (
                weights @ inputs[i].T
            ).square().sum()
            assert found.layer_errors[i] == pytest.approx(float(direct), rel=1e-5)

    def test_screening_all_rows_is_the_layer_stage(self, tiny_calibration):
        evaluator = LocalEvaluator(tiny_calibration, rows=10_000)
        for group in ("row", "layer"):
            candidates = [uniform(p.expression, evaluator.layers, 0.6, group) for p in PUBLISHED.values()]
            screen, layer = (evaluator.measure(candidates, stage) for stage in ("screen", "layer"))
            assert [m.layer_errors for m in screen] == [m.layer_errors for m in layer]
            assert [m.fingerprint for m in screen] == [m.fingerprint for m in layer]
        evaluator.close()

    def test_different_masks_have_different_fingerprints(self, tiny_evaluator):
        texts = ("abs(W)", "abs(W) * X", "G", "square(W) * V", "W")
        candidates = [uniform(parse_metric(t), tiny_evaluator.layers, 0.5) for t in texts]
        prints = {m.fingerprint for m in tiny_evaluator.measure(candidates, "screen")}
        assert len(prints) == len(texts)

    def test_the_sparsity_is_counted_and_never_above_the_target(self, tiny_evaluator):
        for sparsity in (0.0, 0.33, 0.5, 0.99):
            candidate = uniform(parse_metric("abs(W)"), tiny_evaluator.layers, sparsity)
            weights = sum(layer.size for layer in tiny_evaluator.layers)
            removed = sum(layer.rows * int(layer.columns * sparsity) for layer in tiny_evaluator.layers)
            for stage in ("screen", "layer", "model"):
                (found,) = tiny_evaluator.measure([candidate], stage)
                assert found.values["sparsity"] == pytest.approx(removed / weights)
                assert found.values["sparsity"] <= sparsity


class TestTheModelStage:
    def reference(self, dense, ids, candidate, evaluator):
        """Prune a copy for real, run it whole, and compute every figure by its definition."""
        with torch.no_grad():
            before = dense.model(input_ids=ids, output_hidden_states=True)
            kept = [module.weight.detach().clone() for module in dense.modules]
            for held, module in zip(evaluator.worker.shard.held, dense.modules, strict=True):
                module.weight[held.mask(candidate, "unstructured")] = 0
            after = dense.model(input_ids=ids, output_hidden_states=True)
            for weight, module in zip(kept, dense.modules, strict=True):
                module.weight.copy_(weight)
        p, q = (out.logits.double().log_softmax(-1) for out in (before, after))
        nll = -q[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        one, two = before.hidden_states[-1].double(), after.hidden_states[-1].double()
        return {
            "kl": float((p.exp() * (p - q)).sum(-1).mean()),
            "perplexity": math.exp(float(nll)),
            "model_error": float((one - two).square().sum() / one.square().sum()),
        }

    @pytest.mark.parametrize("part", ["selection", "holdout"])
    def test_figures_equal_those_of_a_model_pruned_for_real(
        self, tiny_evaluator, tiny_calibration, dense, part
    ):
        candidate = uniform(parse_metric("abs(W) * X"), tiny_evaluator.layers, 0.5)
        (found,) = tiny_evaluator.measure([candidate], "model", part)
        expected = self.reference(dense, tiny_calibration.tokens(part), candidate, tiny_evaluator)
        for name, value in expected.items():
            assert found.values[name] == pytest.approx(value, rel=1e-4), name

    def test_an_unpruned_model_does_not_diverge(self, tiny_evaluator):
        candidate = uniform(parse_metric("abs(W)"), tiny_evaluator.layers, 0.0)
        (found,) = tiny_evaluator.measure([candidate], "model")
        assert found.values["kl"] == pytest.approx(0, abs=1e-6)
        assert found.values["model_error"] == 0

    def test_the_dense_weights_are_back_afterwards(self, tiny_evaluator):
        before = tiny_evaluator.worker.decoder.fingerprints()
        tiny_evaluator.measure([uniform(parse_metric("W"), tiny_evaluator.layers, 0.9)], "model")
        assert tiny_evaluator.worker.decoder.fingerprints() == before

    def test_probabilities_that_are_not_kept_give_the_same(
        self, tiny_calibration, tiny_evaluator, monkeypatch
    ):
        monkeypatch.setattr("secateur.workers.measure.dense_reference.PROBABILITY_BYTES", 0)
        evaluator = LocalEvaluator(tiny_calibration)
        candidate = uniform(parse_metric("abs(W)"), evaluator.layers, 0.5)
        kl = [e.measure([candidate], "model")[0].values["kl"] for e in (evaluator, tiny_evaluator)]
        assert kl[0] == pytest.approx(kl[1], rel=1e-5)
        evaluator.close()

    def test_ratios_may_differ_by_layer(self, tiny_evaluator):
        ratios = tuple(0.1 + 0.02 * i for i in range(len(tiny_evaluator.layers)))
        (found,) = tiny_evaluator.measure([Candidate(parse_metric("abs(W) * X"), ratios)], "model")
        removed = sum(x.rows * int(x.columns * r) for x, r in zip(tiny_evaluator.layers, ratios, strict=True))
        assert found.values["sparsity"] == pytest.approx(removed / sum(x.size for x in tiny_evaluator.layers))


def ramped(evaluator, text="abs(W) * X", *, until=3, by=0.1):
    """A candidate whose first ``until`` blocks have the ratio 0.5 and the others more."""
    ratios = tuple(0.5 + by * (layer.block >= until) for layer in evaluator.layers)
    return Candidate(parse_metric(text), ratios)


class TestSharing:
    """What is kept from one candidate for the next changes no figure."""

    def test_candidates_that_begin_alike_share_hidden_states_exactly(self, tiny_calibration):
        keeping, plain = LocalEvaluator(tiny_calibration), LocalEvaluator(tiny_calibration, reuse=False)
        candidates = [ramped(keeping, until=until, by=by) for until in (2, 1, 2, 0) for by in (0.1, 0.2)]
        found = keeping.measure(candidates, "model")
        expected = plain.measure(candidates, "model")
        assert [(m.values, m.parts) for m in found] == [(m.values, m.parts) for m in expected]
        assert plain.worker.prefixes is None
        # of 3 blocks: 2 after the first, of which the fifth candidate is a repeat
        assert keeping.worker.prefixes.reused == 0 + 2 + 1 + 1 + 3 + 3 + 0 + 0
        assert keeping.worker.prefixes.blocks == 3 * len(candidates)

    def test_other_tokens_and_other_metrics_share_nothing(self, tiny_calibration):
        evaluator = LocalEvaluator(tiny_calibration)
        evaluator.measure([ramped(evaluator)], "model")
        evaluator.measure([ramped(evaluator)], "model", "holdout")
        evaluator.measure([ramped(evaluator)], "model", "selection", 64)
        evaluator.measure([ramped(evaluator, "abs(W)")], "model")
        assert evaluator.worker.prefixes.reused == 0
        evaluator.measure([ramped(evaluator, "square(W)")], "model")  # orders as abs(W) does
        assert evaluator.worker.prefixes.reused == 3

    def test_states_beyond_the_room_are_dropped_oldest_first(self, tiny_evaluator):
        states = [torch.zeros(1, 8, 32)]  # a kilobyte
        prefixes = Prefixes(tiny_evaluator.layers, kept_bytes=9 * 1024)
        first, second = ramped(tiny_evaluator, until=2), ramped(tiny_evaluator, until=0)
        for candidate in (first, second, ramped(tiny_evaluator, until=0, by=0.2), ramped(tiny_evaluator)):
            for block in (1, 2, 3):
                prefixes.keep(candidate, "t", Prefix(block, states, 0))
        assert prefixes.longest(second, "t", range(3)).block == 3
        assert prefixes._bytes <= 9 * 1024

    def test_the_order_of_scores_is_kept_from_the_third_candidate_on(self, tiny_calibration):
        evaluator = LocalEvaluator(tiny_calibration, reuse=False)
        fresh = LocalEvaluator(tiny_calibration, reuse=False)
        for group in ("row", "layer"):
            candidates = [
                Candidate(parse_metric("abs(W) * X"), (ratio,) * len(evaluator.layers), group)
                for ratio in (0.3, 0.4, 0.5, 0.6)
            ]
            found = evaluator.measure(candidates, "model")
            assert len(evaluator.worker.shard.held[0].orders) == (1 if group == "row" else 2)
            for candidate, measured in zip(candidates, found, strict=True):
                fresh.worker.shard._uses.clear()
                assert fresh.measure([candidate], "model")[0].values == measured.values
        assert not fresh.worker.shard.held[0].orders


class TestRungs:
    def test_a_rung_reads_the_beginnings_of_all_sequences(self):
        ids = torch.arange(8 * 512).reshape(8, 512)
        assert torch.equal(some_tokens(ids, 0), ids)
        assert torch.equal(some_tokens(ids, 10**9), ids)
        assert torch.equal(some_tokens(ids, 1024), ids[:, :128])
        assert torch.equal(some_tokens(ids, 2048), ids[:, :256])
        assert torch.equal(some_tokens(ids, 256), ids[:2, :128])  # no shorter than 128 tokens

    def test_a_rung_is_the_model_stage_on_those_tokens(self, tiny_evaluator, tiny_calibration):
        candidate = uniform(parse_metric("abs(W) * X"), tiny_evaluator.layers, 0.5)
        (found,) = tiny_evaluator.measure([candidate], "model", "selection", 64)
        (whole,) = tiny_evaluator.measure([candidate], "model")
        assert (found.tokens, whole.tokens) == (64, 128)
        assert found.values["kl"] == pytest.approx(whole.parts[0], rel=1e-5)
        assert np.mean(whole.parts) == pytest.approx(whole.values["kl"], rel=1e-6)


class TestSummaries:
    def test_equal_plain_formulas(self, tiny_evaluator, tiny_calibration, dense):
        metric = parse_metric("abs(W) * X")
        names = ("mean", "variance", "log_variance", "maximum", "norm", "outliers_3", "quantiles")
        found = tiny_evaluator.summarise(metric, names)
        for block in range(3):
            scores = [
                weight_matrix(dense.modules[i]).abs() * statistics.leaves["X"]
                for i, statistics in tiny_calibration.block(block).items()
            ]
            every = torch.cat([s.flatten() for s in scores]).double()
            assert found["mean"][block] == pytest.approx(float(every.mean()))
            assert found["variance"][block] == pytest.approx(float(every.var(correction=0)))
            logs = every[every > 0].log()
            assert found["log_variance"][block] == pytest.approx(float(logs.var(correction=0)), rel=1e-5)
            assert found["maximum"][block] == pytest.approx(float(every.max()))
            assert found["norm"][block] == pytest.approx(float(every.square().mean().sqrt()))
            outliers = (every > 3 * every.mean()).double().mean()
            assert found["outliers_3"][block] == pytest.approx(float(outliers))
        assert found["quantiles"].shape == (len(tiny_evaluator.layers), 1025)
        assert (np.diff(found["quantiles"], axis=1) >= 0).all()

    def test_the_tail_is_that_of_a_power_law(self):
        """Squared singular values i**-2 have the density exponent 1.5."""
        values = torch.arange(1, 2001, dtype=torch.float64) ** -1.0
        assert tail_exponent(torch.diag(values)) == pytest.approx(1.5, abs=0.25)
        assert tail_exponent(torch.eye(8)) == 0.0


class TestFailures:
    def test_scores_that_are_not_finite_are_a_failure_with_a_reason(self, tiny_evaluator):
        texts = ("exp(exp(99 + abs(W)))", "exp(80 + W) * exp(80 + G) + W", "abs(W) * X")
        candidates = [uniform(parse_metric(t), tiny_evaluator.layers, 0.5) for t in texts]
        for stage in ("screen", "layer", "model"):
            found = tiny_evaluator.measure(candidates, stage)
            assert "not finite" in found[1].failure
            assert not found[1].values
            assert not found[2].failure

    def test_the_wrong_number_of_ratios_is_refused(self, tiny_evaluator):
        with pytest.raises(ValueError, match="expected 21 ratios"):
            tiny_evaluator.measure([Candidate(parse_metric("W"), (0.5,))], "screen")


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_patterns_are_measured_like_any_mask(tiny_calibration, pattern):
    evaluator = LocalEvaluator(tiny_calibration, pattern=pattern)
    share = int(pattern[0]) / 4
    candidate = uniform(parse_metric("abs(W) * X"), evaluator.layers, share)
    for stage in ("screen", "layer", "model"):
        assert evaluator.measure([candidate], stage)[0].values["sparsity"] == share
    evaluator.close()


def architectures():
    from transformers import GemmaConfig, GPT2Config, GPTNeoXConfig, OPTConfig, PhiConfig, Qwen2Config

    sizes = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {**sizes, "intermediate_size": 48, "num_key_value_heads": 2}
    return {
        "gpt2": GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=256),
        "opt": OPTConfig(
            **sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256, dropout=0.1
        ),
        "neox": GPTNeoXConfig(**sizes, intermediate_size=48),
        "qwen2": Qwen2Config(**wide),
        "gemma": GemmaConfig(**wide, head_dim=8),
        "phi": PhiConfig(**{**wide, "num_key_value_heads": 4}),
    }


@pytest.mark.parametrize("name", ["gpt2", "opt", "neox", "qwen2", "gemma", "phi"])
def test_every_decoder_is_measured_alike(name, tmp_path, text_file):
    """Blocks, layers and arguments are found, biases and transposed weights are taken into account."""
    model = save_model(architectures()[name], tmp_path / "model")
    calibration = calibrate(small_request(model, text_file, tokens=128), tmp_path / "calibration")
    assert {layer.block for layer in calibration.layers} == {0, 1}
    assert not any("lm_head" in layer.name or "embed" in layer.name for layer in calibration.layers)
    evaluator = LocalEvaluator(calibration)
    dense = Decoder(load_model(str(model))[0])
    found = inputs_of(dense, calibration.tokens("statistics"))
    gradients = gradients_of(dense, calibration.tokens("statistics"))
    for i, s in statistics(calibration).items():
        assert torch.allclose(s.leaves["G"], gradients[i], rtol=1e-3, atol=1e-7)
        with torch.no_grad():
            outputs = dense.modules[i](found[i].float()).double()
        assert torch.allclose(
            s.leaves["Y"].flatten().double(), outputs.square().mean(0).sqrt(), rtol=1e-3, atol=1e-5
        )
    candidate = uniform(parse_metric("abs(W) * X + G"), evaluator.layers, 0.5)
    (measured,) = evaluator.measure([candidate], "model")
    ids = calibration.tokens("selection")
    with torch.no_grad():
        before = dense.model(input_ids=ids).logits.double().log_softmax(-1)
        for held, module in zip(evaluator.worker.shard.held, dense.modules, strict=True):
            weight_matrix(module)[held.mask(candidate, "unstructured")] = 0
        after = dense.model(input_ids=ids).logits.double().log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert measured.values["kl"] == pytest.approx(kl, rel=1e-3)
    evaluator.close()


def test_weights_tied_between_layers_are_not_pruned(tiny_model):
    model, _ = load_model(str(tiny_model))
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    decoder = Decoder(model)
    names = {layer.name for layer in decoder.layers}
    assert not {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"} & names
    assert len(names) == 21 - 2
    assert "model.layers.0.mlp.up_proj.weight" in {one.name for one in decoder.stays_dense}


def test_16_bit_floats_are_close_to_32(tiny_calibration, tiny_evaluator):
    half = LocalEvaluator(tiny_calibration, device=Device(dtype="bfloat16"))
    candidate = uniform(parse_metric("abs(W) * X"), half.layers, 0.5)
    for stage in ("layer", "model"):
        one, two = (e.measure([candidate], stage)[0].values for e in (half, tiny_evaluator))
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=0.1), name
    half.close()


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(str(tiny_model))


class TestText:
    def test_all_forms_of_one_text_give_the_same_tokens(self, model, tmp_path, text_file):
        import pyarrow
        import pyarrow.parquet

        documents = text_file.read_text().split("\n\n")
        lines = "".join(json.dumps({"text": d}) + "\n" for d in documents)
        (tmp_path / "a.txt").write_text("\n\n".join(documents))
        (tmp_path / "a.jsonl").write_text(lines)
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet")
        drawn = [
            draw_sequences(str(tmp_path / f"a.{suffix}"), *model, 10, 32, seed=1)
            for suffix in ("txt", "jsonl", "jsonl.gz", "parquet")
        ]
        assert all(torch.equal(ids, drawn[0]) for ids in drawn)
        assert not torch.equal(drawn[0], draw_sequences(str(tmp_path / "a.txt"), *model, 10, 32, seed=2))

    def test_the_model_writes_its_own(self, model):
        one = draw_sequences("self", *model, 3, 16, seed=5)
        state = torch.get_rng_state()
        two = draw_sequences("self", *model, 3, 16, seed=5)
        assert torch.equal(one, two)
        assert torch.equal(torch.get_rng_state(), state)
        assert one.shape == (3, 16)
        assert not torch.equal(one, draw_sequences("self", *model, 3, 16, seed=6))
        assert not set(one.flatten().tolist()) & set(model[1].all_special_ids)

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("a.txt", b"too short", "expected at least 320 tokens"),
            ("a.txt", b"\xff\xfe\x00", "expected text in UTF-8"),
            ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "in line 2"),
            ("a.jsonl", b"not json\n", "in line 1"),
            ("a.jsonl.gz", b"not gzip", "cannot be read as JSON lines"),
            ("a.parquet", b"not parquet", "cannot be read as Parquet"),
            ("a.csv", b"", "expected the text self"),
        ],
    )
    def test_a_text_that_cannot_serve_is_refused(self, model, tmp_path, name, content, says):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TextError, match=r"expected|cannot") as caught:
            draw_sequences(str(tmp_path / name), *model, 10, 32, seed=0)
        assert says in str(caught.value)

    def test_a_missing_file_is_named(self, model):
        with pytest.raises(TextError, match=r"nowhere\.txt: not found"):
            draw_sequences("/nowhere.txt", *model, 1, 8, seed=0)


class TestFolders:
    def test_without_gradients_there_is_no_G(self, tiny_model, text_file, tmp_path):
        calibration = calibrate(small_request(tiny_model, text_file, gradients=False), tmp_path / "c")
        assert "G" not in calibration.leaves
        evaluator = LocalEvaluator(calibration)
        (found,) = evaluator.measure([uniform(parse_metric("W * G"), evaluator.layers, 0.5)], "screen")
        assert "needs G" in found.failure
        evaluator.close()

    def test_nothing_is_left_of_a_calibration_that_fails(self, tiny_model, tmp_path):
        (tmp_path / "short.txt").write_text("short")
        with pytest.raises(TextError):
            calibrate(small_request(tiny_model, tmp_path / "short.txt"), tmp_path / "c")
        assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]

    def test_an_existing_folder_is_not_overwritten(self, tiny_calibration, tiny_model, text_file):
        with pytest.raises(CalibrationError, match="which exists"):
            calibrate(small_request(tiny_model, text_file), tiny_calibration.folder)

    def test_an_incomplete_folder_is_refused(self, tiny_calibration, tmp_path):
        import shutil

        shutil.copytree(tiny_calibration.folder, tmp_path / "c")
        (tmp_path / "c" / "block-001.safetensors").unlink()
        with pytest.raises(CalibrationError, match=r"incomplete: block-001\.safetensors is missing"):
            Calibration(tmp_path / "c")

    def test_a_calibration_of_another_model_is_refused(self, tiny_calibration, tmp_path):
        deeper = save_model(tiny_config(num_hidden_layers=2), tmp_path / "deeper")
        with pytest.raises(CalibrationError, match="other layers"):
            LocalEvaluator(tiny_calibration, model=str(deeper))
        torch.manual_seed(0)
        other = save_model(tiny_config(), tmp_path / "other")
        from safetensors.torch import load_file, save_file

        file = other / "model.safetensors"
        weights = {name: tensor + 0.01 for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(CalibrationError, match="other weights"):
            LocalEvaluator(tiny_calibration, model=str(other))

    @pytest.mark.parametrize("source", ["/nowhere/model", "./nowhere", "nowhere.gguf", "a/b/c"])
    def test_a_missing_model_is_named(self, source):
        with pytest.raises(ModelError, match="expected an existing model folder"):
            load_model(source)

    def test_a_folder_without_a_model_is_refused(self, tmp_path):
        with pytest.raises(ModelError, match=r"with a config\.json"):
            load_model(str(tmp_path))

    def test_a_model_without_decoder_blocks_is_refused(self):
        with pytest.raises(ModelError, match="list of blocks"):
            Decoder(torch.nn.Sequential(torch.nn.Linear(2, 2)))

    @pytest.mark.parametrize("changes", [{"tokens": 0}, {"sequence_length": 4}, {"holdout_tokens": -5}])
    def test_sizes_that_make_no_sense_are_refused(self, changes):
        with pytest.raises(ValueError, match="expected"):
            CalibrationRequest("model", **changes)


def test_what_a_killed_calibration_left_is_named(tiny_model, text_file, tmp_path):
    left = tmp_path / ".c.0123abcd.partial"
    left.mkdir()
    said = []
    calibrate(small_request(tiny_model, text_file, gradients=False), tmp_path / "c", said.append)
    assert said[0].startswith(f"{left} was left by a command that was killed")
    assert left.is_dir()


def test_blocks_that_leave_keys_and_values_for_each_other_are_refused(text_file, tmp_path):
    from transformers import Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_kv_shared_layers=2, layer_types=["full_attention"] * 4,
        vocab_size_per_layer_input=260, hidden_size_per_layer_input=8,
    )  # fmt: skip
    model = save_model(config, tmp_path / "model")
    with pytest.raises(ModelError, match="got some that share shared_kv_states; this architecture"):
        calibrate(small_request(model, text_file, gradients=False), tmp_path / "c")


def test_hidden_states_of_another_type_are_refused_for_gradients():
    with pytest.raises(ModelError, match=r"got torch\.float32 after torch\.bfloat16; try --dtype float32"):
        keep_states(torch.zeros(2, 1, 4, 8, dtype=torch.bfloat16), 1, [torch.zeros(1, 4, 8)])
