"""Pruned models against plain references, as folders, and what is refused."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import secateur
import torch
from references import linear_layers, matrix, surgeon, wanda_reference
from safetensors.torch import load_file
from secateur.metrics_dsl.published import PUBLISHED
from secateur.results.archive.archive import Archive
from secateur.results.archive.database import ArchiveError
from secateur.results.export.rule_source import RuleError, read_rule
from secateur.search.core.candidate import Candidate, Measurement, Trial, uniform
from secateur.service.prune_model import PruneRequest, prune
from secateur.workers.calibrate.calibration import CalibrationRequest, calibrate, load_decoder
from secateur.workers.calibrate.text import draw_sequences
from secateur.workers.model.decoder import Decoder, weight_matrix
from secateur.workers.model.load import load_model
from secateur.workers.prune.checkpoint import Checkpoint, CheckpointError
from secateur.workers.prune.evaluation import EvaluationRequest, evaluate, figures
from secateur.workers.prune.pruning import Pruner, PruningError
from secateur.workers.prune.repair import REPAIRS
from support import in_process, save_model, small_request, tiny_config
from support import secateur as secateur_process

WANDA = PUBLISHED["wanda"].expression
SIZES = {"tokens": 512, "sequence_length": 64, "device": "cpu"}
SMALL = ("--tokens", 512, "--sequence-length", 64, "--device", "cpu")


def gpt2():
    from transformers import GPT2Config

    return GPT2Config(vocab_size=260, n_embd=32, n_layer=3, n_head=4, n_positions=128)


def qwen3():
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip


CONFIGS = {"llama": tiny_config, "gpt2": gpt2, "qwen3": qwen3}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder for each architecture; biases that transformers makes 0 are not 0."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, config in CONFIGS.items():
        made[name] = save_model(config(), folder / name)
        model, _ = load_model(str(made[name]))
        for number, (own, parameter) in enumerate(model.named_parameters()):
            if own.endswith("bias"):
                parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
        model.save_pretrained(made[name])
    return made


def request_of(model, text_file, **changes):
    return PruneRequest(str(model), **{**SIZES, "text": str(text_file), **changes})


def tokens_of(source, text_file, count=8, length=64):
    """Sequences of a file as pruning draws them, (count, length)."""
    model, tokenizer = load_model(str(source))
    return draw_sequences(str(text_file), model, tokenizer, count, length, 0)


def some_layer(rows=24, columns=160, tokens=400, seed=0):
    """Weights, removed ones, inputs that are correlated, their Gram matrix and mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    x = torch.randn(tokens, columns // 4, generator=generator) @ mixing / columns**0.5
    x += 0.2 * torch.randn(tokens, columns, generator=generator) + 0.1
    weights = torch.randn(rows, columns, generator=generator)
    scores = weights.abs() * x.square().mean(0).sqrt()
    removed = scores < scores.kthvalue(columns * 6 // 10, dim=1, keepdim=True).values
    return weights, removed, x, x.T @ x / len(x), x.mean(0)


class TestProcedure:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_sequential_wanda_is_the_published_procedure_bit_for_bit(self, models, text_file, name):
        ids = tokens_of(models[name], text_file)
        reference, _ = load_model(str(models[name]))
        with torch.no_grad():
            expected = wanda_reference(reference, Decoder(reference).blocks, ids, 0.5)
        decoder = Decoder(load_model(str(models[name]))[0])
        candidate = uniform(WANDA, decoder.layers, 0.5)
        pruned = Pruner(decoder, ids).prune(candidate, statistics="sequential")
        assert len(pruned) == len(decoder.layers) == sum(map(len, expected))
        for block, found in zip(decoder.blocks, expected, strict=True):
            for own, module in linear_layers(block).items():
                assert torch.equal(matrix(module) == 0, found[own]), own
        assert torch.equal(
            decoder.model(input_ids=ids).logits, reference(input_ids=ids).logits
        )  # what was kept is untouched

    def test_one_shot_prunes_as_the_evaluator_measures(self, tiny_evaluator, tiny_calibration):
        """Same statistics, same masks: what a search chose is what the folder holds."""
        decoder = Decoder(load_model(tiny_calibration.model_source)[0])
        for metric in ("square(W) * minmax(G)", "square(W) / D", "abs(W) * Y"):
            candidate = uniform(secateur.parse(metric), decoder.layers, 0.5, "layer")
            decoder = Decoder(load_model(tiny_calibration.model_source)[0])
            layers = Pruner(decoder, tiny_calibration.tokens("statistics")).prune(candidate)
            (measured,) = tiny_evaluator.measure([candidate], "layer")
            removed = sum(p.zeros for p in layers) / sum(p.layer.size for p in layers)
            assert removed == pytest.approx(measured.values["sparsity"], abs=1e-4)
            errors = [p.error for p in layers]
            assert errors == pytest.approx(measured.layer_errors, rel=2e-3)

    def test_sequential_statistics_see_the_pruned_blocks(self, models, text_file):
        ids = tokens_of(models["llama"], text_file)
        patterns = []
        for statistics in ("one-shot", "sequential"):
            decoder = Decoder(load_model(str(models["llama"]))[0])
            Pruner(decoder, ids).prune(uniform(WANDA, decoder.layers, 0.7), statistics=statistics)
            patterns.append([matrix(m) == 0 for m in decoder.modules])
        per_block = len(decoder.layers) // 3
        equal = [torch.equal(a, b) for a, b in zip(*patterns, strict=True)]
        assert all(equal[:per_block])
        assert not all(equal[per_block:])

    def test_allocations_are_those_of_the_dense_model(self, tiny_evaluator, tiny_calibration):
        decoder = Decoder(load_model(tiny_calibration.model_source)[0])
        pruner = Pruner(decoder, tiny_calibration.tokens("statistics"))
        for reductions in (("outliers_5", "mean"), ("quantiles", "log_variance")):
            expected = tiny_evaluator.summarise(WANDA, reductions)
            for name, values in pruner.summarise(WANDA, reductions).items():
                np.testing.assert_allclose(values, expected[name], rtol=1e-4)

    def test_a_rule_of_other_layers_is_refused(self, models, text_file):
        decoder = Decoder(load_model(str(models["llama"]))[0])
        pruner = Pruner(decoder, tokens_of(models["llama"], text_file, 1))
        with pytest.raises(PruningError, match="expected one ratio for each of the model's 21 layers, got 2"):
            pruner.prune(Candidate(WANDA, (0.5, 0.5)))
        with pytest.raises(PruningError, match="divide by 10"):
            pruner.prune(uniform(WANDA, decoder.layers, 0.5), pattern="5:10")


class TestRepair:
    @pytest.mark.parametrize("name", REPAIRS)
    def test_never_brings_a_weight_back_and_leaves_the_dense_ones_alone(self, name):
        weights, removed, _, gram, mean = some_layer()
        before = weights.clone()
        for stored in (weights, weights.T.contiguous().T):  # as Conv1D has them
            new, _ = REPAIRS[name](stored, removed, gram, mean)
            assert torch.equal(new == 0, removed)
            assert torch.equal(stored, before)

    @pytest.mark.parametrize("columns", [96, 128, 300])
    def test_obs_is_optimal_brain_surgery_column_by_column(self, columns):
        weights, removed, x, gram, mean = some_layer(columns=columns)
        new, shift = REPAIRS["obs"](weights, removed, gram, mean)
        assert shift is None
        expected = surgeon(weights, removed, gram)
        assert torch.allclose(new.double(), expected, rtol=1e-3, atol=1e-4)
        error = ((weights - new) @ x.T).square().sum()
        assert error < 0.8 * ((weights * removed) @ x.T).square().sum()

    def test_obs_lives_with_inputs_that_are_always_zero(self):
        weights, removed, _, gram, mean = some_layer()
        gram[7] = gram[:, 7] = 0
        new, _ = REPAIRS["obs"](weights, removed, gram, mean)
        assert new.isfinite().all()
        assert torch.equal(new == 0, removed)
        nothing = torch.zeros_like(gram)  # an expert that no token reached
        assert torch.equal(
            REPAIRS["obs"](weights, removed, nothing, mean).weights, weights.masked_fill(removed, 0)
        )

    def test_scale_is_the_least_squares_factor_of_each_row(self):
        weights, removed, x, gram, mean = some_layer()
        new, _ = REPAIRS["scale"](weights, removed, gram, mean)
        pruned = weights.masked_fill(removed, 0).double()
        for row in range(len(weights)):
            got, wanted = x.double() @ pruned[row], x.double() @ weights[row].double()
            factor = (got @ wanted) / (got @ got)
            assert torch.allclose(new[row].double(), factor * pruned[row], rtol=1e-4)

    def test_bias_keeps_the_mean_output(self, models, text_file):
        ids = tokens_of(models["gpt2"], text_file)
        dense, decoder = (Decoder(load_model(str(models["gpt2"]))[0]) for _ in range(2))
        layers = Pruner(decoder, ids).prune(uniform(WANDA, decoder.layers, 0.5), repair="bias")
        assert all(p.shifted for p in layers)
        fed = []
        hook = dense.modules[0].register_forward_pre_hook(lambda _m, args: fed.append(args[0]))
        dense.model(input_ids=ids)
        hook.remove()
        means = [module(fed[0]).mean((0, 1)) for module in (dense.modules[0], decoder.modules[0])]
        assert torch.allclose(*means, atol=1e-5)
        assert not torch.equal(dense.modules[0].bias, decoder.modules[0].bias)


class TestFolder:
    def test_keeps_the_type_of_the_models_own_files(self, models, text_file, tmp_path):
        from transformers import AutoModelForCausalLM

        model, tokenizer = load_model(str(models["llama"]))
        model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
        tokenizer.save_pretrained(tmp_path / "half")
        found = prune(request_of(tmp_path / "half", text_file, sparsity=0.5), tmp_path / "out")
        assert found["model"]["dtype"] == "bfloat16"
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
        sizes = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("half", "out")]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01)

    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_reloads_as_it_was_in_memory(self, models, text_file, tmp_path, monkeypatch, name, dtype):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        kept = []
        made = Pruner.prune

        def keep(self, *args, **kwargs):
            kept.append(self._decoder)
            return made(self, *args, **kwargs)

        monkeypatch.setattr(Pruner, "prune", keep)
        monkeypatch.setattr(
            "secateur.service.prune_model.whole_because", lambda *_: "this test looks at the model"
        )
        request = request_of(models[name], text_file, sparsity=0.6, dtype=dtype, repair="obs")
        record = prune(request, tmp_path / "out")
        assert not list(tmp_path.rglob("*.bin"))
        assert json.loads((tmp_path / "out" / "secateur.json").read_text()) == record
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.dtype == getattr(torch, dtype)
        decoder = kept[0]
        for own, value in decoder.model.state_dict().items():
            assert torch.equal(loaded.state_dict()[own], value), own
        again = Decoder(loaded)
        removed = [int((weight_matrix(m) == 0).sum()) for m in again.modules]
        assert removed == [layer["zeros"] for layer in record["layers"]]
        for layer, zeros in zip(again.layers, removed, strict=True):
            assert zeros == layer.rows * int(0.6 * layer.columns)
        assert record["read_back"] == len(record["layers"])
        tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        assert tied == bool(decoder.model.config.tie_word_embeddings)
        dense, _ = load_model(str(models[name]), dtype=getattr(torch, dtype))
        assert torch.equal(loaded.get_input_embeddings().weight, dense.get_input_embeddings().weight)
        assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 258

    def test_a_pattern_has_its_zeros_in_every_group(self, models, text_file, tmp_path):
        record = prune(request_of(models["gpt2"], text_file, pattern="2:4", repair="obs"), tmp_path / "out")
        decoder = Decoder(load_model(str(tmp_path / "out"))[0])
        for module in decoder.modules:
            groups = matrix(module).reshape(-1, 4)
            assert ((groups == 0).sum(1) == 2).all()
        assert record["sparsity"] == 0.5
        weight_matrix(decoder.modules[0])[0, :4] = 1.0
        decoder.model.save_pretrained(tmp_path / "broken")
        written = tmp_path / "broken" / "model.safetensors"
        weights = decoder.model.state_dict()
        with pytest.raises(CheckpointError, match="expected 2 zeros in each group of 4 inputs"):
            Checkpoint(tmp_path / "new", decoder, "2:4")._check(written, weights)
        decoder.modules[0].weight.data.add_(1)
        with pytest.raises(CheckpointError, match="not written"):
            Checkpoint(tmp_path / "new", decoder, "unstructured")._check(written, weights)

    def test_its_record_says_where_everything_comes_from(self, models, text_file, tmp_path):
        request = request_of(
            models["llama"], text_file, candidate="abs(W) * X**1.2", ratios="dlp", sparsity=0.6
        )
        record = prune(request, tmp_path / "out")
        assert record["metric"] == "abs(W) * X**1.2"
        assert (record["ratios"], record["group"], record["statistics"]) == ("dlp", "row", "one-shot")
        assert record["text"]["sequence_length"] == 64
        assert len(record["text"]["sha256"]) == 64
        assert record["versions"]["torch"] == torch.__version__
        ratios = [layer["ratio"] for layer in record["layers"]]
        assert len(set(ratios)) == 3  # one a block
        size = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
        assert record["dense_bytes"] == size
        weights, zeros = record["prunable_weights"], record["zeros"]
        assert record["theoretical_packed_bytes"] == size - 4 * zeros + weights // 8

    def test_the_command_prints_what_it_did_and_that_nothing_is_faster(self, models, text_file, tmp_path):
        arguments = ("--text", text_file, *SMALL)
        done = in_process("prune", models["llama"], *arguments, "--repair", "bias", "-o", tmp_path / "a")
        assert done.returncode == 0, done.stderr
        assert "zeros 50.00% of 23,040 weights in 21 linear layers; the model was read block" in done.stdout
        assert "biases shifted in 0 of 21 layers: the model's layers have none" in done.stdout
        assert "no faster without a sparse runtime" in done.stdout
        assert "in theory" in done.stdout
        done = in_process(
            "prune", models["gpt2"], *arguments, "--repair", "bias", "-o", tmp_path / "b", "--json"
        )
        assert json.loads(done.stdout)["biases_shifted"] == 12
        evaluated = in_process(
            "evaluate", tmp_path / "a", "--text", text_file, "--window", 64, "--windows", 3,
            "--against", models["llama"],
        )  # fmt: skip
        assert "nats per token" in evaluated.stdout
        assert "3 windows of 64" in evaluated.stdout


def tensors_of(folder):
    """All tensors of a folder's files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same_model(read, held):
    """Two folders hold the same tensors under the same names, and load without a word."""
    from transformers import AutoModelForCausalLM

    tensors = [tensors_of(folder) for folder in (read, held)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[1].items():
        assert tensors[0][name].dtype == value.dtype
        assert torch.equal(tensors[0][name], value), name
    for name in ("config.json", "generation_config.json"):
        assert (read / name).read_text() == (held / name).read_text()
    _, info = AutoModelForCausalLM.from_pretrained(read, output_loading_info=True)
    assert not any(info.values()), info


class TestBlockByBlock:
    @pytest.fixture
    def both_ways(self, text_file, tmp_path, monkeypatch):
        """Prunes a model read block by block and the same held in memory; returns the two folders."""

        def prune_both(model, **changes):
            request = request_of(model, text_file, **changes)
            folders = tmp_path / "read", tmp_path / "held"
            hows = [prune(request, folders[0])]
            with monkeypatch.context() as patched:
                patched.setattr("secateur.service.prune_model.whole_because", lambda *_: "this test compares")
                hows.append(prune(request, folders[1]))
            assert [x["model"].pop("weights") for x in hows] == ["read block by block", "held in memory"]
            for record in hows:
                del record["dense_bytes"], record["theoretical_packed_bytes"]  # headers of several files
            assert hows[0] == hows[1]
            return folders

        return prune_both

    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize(
        "changes",
        [
            {"statistics": "sequential", "repair": "obs", "sparsity": 0.6},
            {"repair": "bias", "dtype": "bfloat16", "pattern": "2:4"},
            {"ratios": "owl"},
            {"candidate": "square(W) * minmax(G)"},
        ],
        ids=["sequential", "bfloat16", "owl", "gradients"],
    )
    def test_writes_what_a_model_in_memory_becomes(self, models, both_ways, name, changes):
        read, held = both_ways(models[name], **changes)
        assert_same_model(read, held)
        assert not (read / "model.safetensors.index.json").exists()  # small ones are one file

    @pytest.mark.parametrize("name", CONFIGS)
    def test_shards_in_and_out(self, models, both_ways, tmp_path, monkeypatch, name):
        model, tokenizer = load_model(str(models[name]))
        with contextlib.redirect_stderr(io.StringIO()):
            model.to(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
        tokenizer.save_pretrained(tmp_path / "sharded")
        monkeypatch.setattr("secateur.workers.prune.checkpoint._SHARD_BYTES", 0)
        read, held = both_ways(tmp_path / "sharded", repair="scale")
        assert_same_model(read, held)
        index = json.loads((read / "model.safetensors.index.json").read_text())
        shards = sorted(p.name for p in read.glob("*.safetensors"))
        assert shards == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
        assert sorted(set(index["weight_map"].values())) == shards
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(read).values())

    def test_files_without_the_prefix_of_the_model_are_its_own(self, models, both_ways, tmp_path):
        from safetensors.torch import save_file

        bare = tmp_path / "bare"
        shutil.copytree(models["gpt2"], bare)
        tensors = {k.removeprefix("transformer."): v for k, v in tensors_of(bare).items()}
        save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
        assert_same_model(*both_ways(bare))

    @pytest.mark.parametrize("name", CONFIGS)
    def test_calibration_writes_what_it_does_of_a_model_in_memory(
        self, models, text_file, tmp_path, monkeypatch, name
    ):
        request = small_request(models[name], text_file)
        said = []
        calibrate(request, tmp_path / "read", said.append)
        monkeypatch.setattr(
            "secateur.workers.calibrate.calibration.whole_because", lambda _: "this test compares"
        )
        calibrate(request, tmp_path / "held", said.append)
        assert [x for x in said if "block by block" in x or "in memory" in x] == [
            "the model is read block by block", "the model is held in memory: this test compares",
        ]  # fmt: skip
        names = sorted(p.name for p in (tmp_path / "read").iterdir())
        assert len(names) == 2 + 2 * len(list((tmp_path / "read").glob("block-*")))
        for own in names:
            assert (tmp_path / "read" / own).read_bytes() == (tmp_path / "held" / own).read_bytes(), own

    def test_a_disk_without_room_for_hidden_states_is_one_sentence(
        self, models, text_file, tmp_path, monkeypatch
    ):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.posix_fallocate", full)
        sizes = ("--selection-tokens", 64, "--holdout-tokens", 64)
        done = in_process(
            "calibrate", models["llama"], "--text", text_file, *SMALL, *sizes, "--out", tmp_path / "c"
        )
        assert done.returncode == 2
        # 4 bytes x 512 tokens x 32 x (before 3 blocks and after the last)
        assert "hidden states of 512 tokens take 262,144 bytes; choose" in done.stderr.splitlines()[-1]
        assert not list(tmp_path.iterdir())

    def test_what_needs_the_whole_model_has_it_and_says_so(self, models, tmp_path):
        given = ("--text", "self", *SMALL)
        done = in_process("prune", models["llama"], *given, "-o", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert "held in memory: it writes its own text; with --text FILE" in done.stderr
        assert "the model was held in memory" in done.stdout

    def test_experts_that_transformers_fuses_are_held_in_memory(self, text_file, tmp_path):
        from transformers import AutoModelForCausalLM, MixtralConfig

        config = MixtralConfig(
            vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        )  # fmt: skip
        record = prune(request_of(save_model(config, tmp_path / "moe"), text_file), tmp_path / "out")
        assert record["model"]["weights"] == "held in memory"
        assert tensors_of(tmp_path / "moe").keys() == tensors_of(tmp_path / "out").keys()
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values()), info

    def test_a_hub_name_is_read_from_where_its_files_were_brought(self, models, text_file, tmp_path):
        place = tmp_path / "home" / "hub" / "models--someone--small"
        shutil.copytree(models["qwen3"], place / "snapshots" / ("a" * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("a" * 40)
        arguments = ("someone/small", "--text", text_file, *SMALL, "-o", tmp_path / "out")
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        done = secateur_process("prune", *arguments, env=environment)
        assert done.returncode == 0, done.stderr
        assert "the model was read block by block" in done.stdout

    def test_weights_are_there_only_while_they_are_asked_for(self, models):
        decoder, _ = load_decoder(
            CalibrationRequest(str(models["gpt2"]), sequence_length=64, device="cpu"), by_block=True
        )
        dense = Decoder(load_model(str(models["gpt2"]))[0])

        def present():
            return [not weight_matrix(module).is_meta for module in decoder.modules]

        assert not any(present())
        with decoder.weights.of(1):
            assert [layer.block == 1 for layer in decoder.layers] == present()
            with decoder.weights.of(1):
                weight_matrix(decoder.modules[4]).zero_()
            assert present()[4]  # who asked first has it still
        assert not any(present())
        ids = torch.arange(40).reshape(2, 20)
        assert torch.equal(decoder.model(input_ids=ids).logits, dense.model(input_ids=ids).logits)
        assert not any(present())

    def test_weights_that_are_not_finite_are_one_sentence(self, models, text_file, tmp_path):
        model, tokenizer = load_model(str(models["qwen3"]))
        model.model.layers[2].mlp.up_proj.weight.data[3, 3] = math.nan
        model.save_pretrained(tmp_path / "broken")
        tokenizer.save_pretrained(tmp_path / "broken")
        done = in_process("prune", tmp_path / "broken", "--text", text_file, *SMALL, "-o", tmp_path / "out")
        assert done.returncode == 2
        assert (
            "expected finite weights, got some that are not in model.layers.2.mlp.up_proj.weight"
            in (done.stderr.splitlines()[-1])
        )
        assert [p.name for p in tmp_path.iterdir()] == ["broken"]

    @pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
    def test_memory_is_that_of_a_block_and_not_of_the_model(self, models, text_file, tmp_path):
        """Most weights are fused experts, named in the files as in the model, which are not pruned: fast."""
        from transformers import AutoModelForCausalLM, MixtralConfig

        config = MixtralConfig(
            vocab_size=260, hidden_size=256, intermediate_size=2048, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=16,
        )  # fmt: skip
        wide = tmp_path / "wide"
        AutoModelForCausalLM.from_config(config).float().save_pretrained(wide, save_original_format=False)
        for path in models["llama"].glob("token*"):
            shutil.copy(path, wide)
        size = (wide / "model.safetensors").stat().st_size
        assert size > 600e6
        code = (
            "import re, sys\nfrom pathlib import Path\n"
            "from secateur import CalibrationRequest, PruneRequest, calibrate, prune\n"
            "def peak(model, out):\n"
            "    sizes = {'tokens': 64, 'sequence_length': 64, 'device': 'cpu'}\n"
            "    prune(PruneRequest(model, text=sys.argv[1], **sizes), out)\n"
            "    sizes |= {'selection_tokens': 64, 'holdout_tokens': 64}\n"
            "    calibrate(CalibrationRequest(model, sys.argv[1], **sizes), f'{out}-calibration')\n"
            "    status = Path('/proc/self/status').read_text()\n"
            "    return int(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1])\n"
            "first = peak(*sys.argv[2:4])\n"  # with all that is imported
            "print(1024 * (peak(*sys.argv[4:]) - first))"
        )
        arguments = (text_file, models["llama"], tmp_path / "first", wide, tmp_path / "out")
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(done.stdout) < 0.5 * size
        assert json.loads((tmp_path / "out" / "secateur.json").read_text())["dense_bytes"] > 600e6


def candidate_file(path, of_layers, **changes):
    """A candidate as the json exporter writes it, with keys that later versions may add."""
    content = {
        "format": "secateur.candidate", "version": 1, "metric": "abs(W) * X", "group": "row",
        "pattern": "unstructured", "key": "0", "later": {"more": 1},
        "layers": [
            {"name": x.name, "block": x.block, "kind": x.kind, "rows": x.rows, "columns": x.columns,
             "ratio": 0.25 + 0.125 * x.block, "more": 1}
            for x in of_layers
        ],
    }  # fmt: skip
    path.write_text(json.dumps({**content, **changes}))
    return path


@pytest.fixture(scope="module")
def layers(models):
    return Decoder(load_model(str(models["llama"]))[0]).layers


@pytest.fixture(scope="module")
def run_of_two(layers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trials = [
        Trial(Candidate(WANDA, (ratio,) * len(layers), "layer"), Measurement("screen"), "measured")
        for ratio in (0.25, 0.5)
    ]
    with Archive(folder, write=True) as archive:
        archive.add(trials)
        archive.keep(pattern="unstructured")
    return folder, [t.candidate for t in trials]


class TestRules:
    def test_a_file_is_applied_by_the_names_of_its_layers(self, models, layers, text_file, tmp_path):
        path = candidate_file(tmp_path / "c.json", layers[::-1])
        record = prune(request_of(models["llama"], text_file, candidate=str(path)), tmp_path / "out")
        assert [x["ratio"] for x in record["layers"]] == [0.25 + 0.125 * x.block for x in layers]
        for entry in record["layers"]:
            assert entry["zeros"] == entry["rows"] * int(entry["ratio"] * entry["columns"])
        ratios = prune(request_of(models["llama"], text_file, ratios=str(path)), tmp_path / "again")
        assert ratios["layers"] == record["layers"]
        plain = tmp_path / "plain.json"
        plain.write_text(json.dumps({x["name"]: x["ratio"] for x in record["layers"]}))
        third = prune(request_of(models["llama"], text_file, ratios=str(plain)), tmp_path / "third")
        assert third["layers"] == record["layers"]

    def test_a_key_of_a_run_is_applied(self, models, text_file, run_of_two, tmp_path):
        run, (_, second) = run_of_two
        record = prune(
            request_of(models["llama"], text_file, candidate=f"{run}:{second.key[:6]}"), tmp_path / "out"
        )
        assert record["key"] == second.key
        assert record["group"] == "layer"
        assert record["sparsity"] == pytest.approx(0.5, abs=1e-4)
        assert record["candidate"] == f"{run}:{second.key}"

    def test_a_run_on_another_model_is_refused(
        self, models, text_file, run_of_two, tiny_calibration, tmp_path
    ):
        """Where its layers have ratios of their own; one ratio for all goes to any model."""
        run, (first, _) = run_of_two
        second = replace(first, ratios=(*first.ratios[:-1], 0.5))
        settings = secateur.SearchSettings(calibration=tiny_calibration.folder, sparsity=0.5)
        copy = tmp_path / "run"
        shutil.copytree(run, copy)
        (copy / "run.toml").write_text(settings.to_toml())
        with Archive(copy, write=True) as archive:
            archive.add([Trial(second, Measurement("screen"), "measured")])
        candidate = f"{copy}:{second.key}"
        prune(request_of(models["llama"], text_file, candidate=candidate), tmp_path / "same")
        with pytest.raises(RuleError, match="or one with the same layers, got another"):
            prune(request_of(models["qwen3"], text_file, candidate=candidate), tmp_path / "other")
        assert not (tmp_path / "other").exists()

    def test_an_unknown_key_names_the_nearest(self, run_of_two):
        run, (first, second) = run_of_two
        with pytest.raises(ArchiveError, match=f"the nearest are .*{second.key}"):
            read_rule(f"{run}:{second.key[:-1]}_")
        with pytest.raises(ArchiveError, match=first.key):
            read_rule(f"{run}:")


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--sparsity", "1.5"), "expected a sparsity in [0, 1), got 1.5"),
            (("--sparsity", "nan"), "expected a sparsity in [0, 1), got nan"),
            (("--sparsity", "0.6", "--pattern", "2:4"), "which the pattern 2:4 has, got 0.6"),
            (("--pattern", "2:4", "--ratios", "owl"), "uniform ratios for the pattern 2:4"),
            (("--pattern", "5:10"), "divide by 10"),
            (("--statistics", "dense"), "one-shot, sequential"),
            (("--repair", "glue"), "obs"),
            (("--ratios", "awl"), "did you mean 'owl'?"),
            (("--ratios", "atp"), "expected an allocation without a number"),
            (("--ratios", "/nowhere.json"), "got /nowhere.json: no such file"),
            (("--group", "block"), "expected the group row or layer"),
            (("--candidate", "wandaa"), "wanda"),
            (("--candidate", "/nowhere:abc"), "expected a run folder"),
            (("--candidate", "/nowhere.json"), "got /nowhere.json: no such file"),
            (("--candidate", "OTHER"), "expected ratios for the model's 21 linear layers, got 5"),
            (("--candidate", "RENAMED"), "got none for model.layers.0.self_attn.q_proj"),
            (("--candidate", "BROKEN"), "expected ratios in [0, 1), got 2"),
            (("--candidate", "RUN:ffff_"), "the nearest are"),
            (
                ("--candidate", "GOOD", "--ratios", "owl"),
                "has different ones for its layers; give --sparsity",
            ),
            (("--candidate", "GOOD", "--group", "layer"), "leave --group out"),
            (("--text", "SHORT"), "expected at least 512 tokens"),
            (("--sequence-length", "100000"), "expected sequences of at most"),
        ],
    )
    def test_is_one_sentence_and_nothing_is_left_behind(
        self, arguments, says, models, layers, text_file, run_of_two, tmp_path
    ):
        names = tmp_path / "files"
        names.mkdir()
        broken = {"name": "a", "block": 0, "kind": "q", "rows": 1, "columns": 1, "ratio": 2}
        places = {
            "OTHER": candidate_file(names / "other.json", layers[:5]),
            "RENAMED": candidate_file(names / "renamed.json", [*layers[1:], replace(layers[0], name="x")]),
            "BROKEN": candidate_file(names / "broken.json", layers, layers=[broken]),
            "GOOD": candidate_file(names / "good.json", layers),
            "SHORT": names / "short.txt",
            "RUN:ffff_": f"{run_of_two[0]}:ffff_",
        }  # fmt: skip
        places["SHORT"].write_text("too short")
        given = [places.get(argument, argument) for argument in arguments]
        defaults = ("--text", text_file, *SMALL)
        place = tmp_path / "place"
        place.mkdir()
        done = in_process("prune", models["llama"], *defaults, *given, "-o", place / "deep" / "out")
        assert done.returncode == 2, done
        assert done.stdout == ""
        last = done.stderr.splitlines()[-1]
        assert last.startswith("secateur: ")
        assert says in last
        assert list(place.iterdir()) == []

    def test_a_folder_with_files_is_left_alone_before_anything_is_loaded(self, tmp_path):
        (tmp_path / "a").write_text("mine")
        done = in_process("prune", "/nowhere", "-o", tmp_path)
        assert done.returncode == 2
        assert "expected a new or empty folder" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["a"]

    def test_an_empty_folder_is_used(self, models, text_file, tmp_path):
        prune(request_of(models["llama"], text_file), tmp_path)
        assert (tmp_path / "secateur.json").is_file()

    def test_a_missing_shard_is_told(self, models, text_file, tmp_path):
        model, tokenizer = load_model(str(models["llama"]))
        with contextlib.redirect_stderr(io.StringIO()):
            model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
        tokenizer.save_pretrained(tmp_path / "sharded")
        shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
        assert len(shards) > 2
        record = prune(request_of(tmp_path / "sharded", text_file), tmp_path / "whole")
        assert record["read_back"] == 21
        shards[1].unlink()
        done = in_process("prune", tmp_path / "sharded", "--text", text_file, "-o", tmp_path / "out")
        assert done.returncode == 2
        assert f"got none named {shards[1].name}" in done.stderr.splitlines()[-1]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["sharded", "whole"]

    def test_a_full_disk_leaves_nothing(self, models, text_file, tmp_path, monkeypatch):
        def full(_path):
            raise OSError(28, "No space left on device", "out")

        monkeypatch.setattr("secateur.search.core.files.to_disk", full)
        done = in_process("prune", models["llama"], "--text", text_file, *SMALL, "-o", tmp_path / "out")
        assert done.returncode == 2
        assert "no space left" in done.stderr.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []

    def test_a_kill_while_writing_leaves_no_folder_of_that_name(self, models, text_file, tmp_path):
        code = (
            "import os, signal\n"
            "from secateur.cli.main import main\nfrom secateur.search.core import files\n"
            "files.to_disk = lambda _: os.kill(os.getpid(), signal.SIGKILL)\nmain()"
        )
        arguments = ("--text", text_file, *SMALL, "-o", tmp_path / "out")
        command = [sys.executable, "-c", code, "prune", str(models["llama"]), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".out.")
        assert left.name.endswith(".partial")


class TestEvaluation:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_perplexity_is_that_of_transformers_own_loss(self, models, text_file, name):
        ids = tokens_of(models[name], text_file, 6)
        model, _ = load_model(str(models[name]))
        with torch.no_grad():
            losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in ids]
        found = figures(model, ids)
        assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)

    def test_kl_is_the_mean_divergence_from_the_dense_model(self, models, text_file):
        ids = tokens_of(models["llama"], text_file, 4)
        dense, decoder = load_model(str(models["llama"]))[0], Decoder(load_model(str(models["llama"]))[0])
        assert figures(decoder.model, ids, dense)["kl"] == pytest.approx(0, abs=1e-9)
        Pruner(decoder, ids).prune(uniform(WANDA, decoder.layers, 0.6))
        with torch.no_grad():
            true, got = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (dense, decoder.model))
        expected = (true.exp() * (true - got)).sum(-1).mean()
        found = figures(decoder.model, ids, dense)
        assert found["kl"] == pytest.approx(float(expected), rel=1e-5)
        assert found["dense_perplexity"] == figures(dense, ids)["perplexity"]

    def test_windows_are_those_of_the_whole_file_and_said_so(self, models, text_file):
        request = EvaluationRequest(str(models["llama"]), str(text_file), window=512, device="cpu")
        found = evaluate(request)
        _, tokenizer = load_model(str(models["llama"]))
        ids = tokenizer(text_file.read_text())["input_ids"]
        about = found["text"]
        assert about["windows"] == len(ids) // 512
        assert about["tokens_of_text"] == len(ids)
        assert about["bos"] == (ids[0] == tokenizer.bos_token_id)
        windows = torch.tensor(ids[: len(ids) // 512 * 512]).reshape(-1, 512)
        assert about["sha256"] == secateur.workers.calibrate.folder.token_hash(windows)
        assert set(found["versions"]) == {"python", "secateur", "torch", "transformers"}
        assert found["dtype"] == "float32"

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--text", "/nowhere.txt"), "not found"),
            (("--text", "self"), "expected a text that no model wrote"),
            (("--window", "1"), "expected windows of at least 2 tokens"),
            (("--windows", "-1"), "expected a number of windows"),
            (("--windows", "100000"), "expected at least"),
            (("--window", "4096"), "expected sequences of at most 2048 tokens"),
            (("--against", "/nowhere"), "got /nowhere: not found"),
        ],
    )
    def test_a_mistake_is_one_sentence(self, models, text_file, arguments, says):
        done = in_process("evaluate", models["llama"], "--text", text_file, *arguments)
        assert done.returncode == 2, done
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1

    def test_a_package_or_a_hub_that_is_missing_is_a_sentence(self, models, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        done = in_process("evaluate", models["llama"], "--tasks", "piqa")
        assert done.returncode == 2
        assert done.stderr.startswith("secateur: tasks need the package lm-eval: pip install ")
        assert len(done.stderr.splitlines()) == 1
        monkeypatch.setitem(sys.modules, "datasets", None)
        done = in_process("evaluate", models["llama"])
        assert done.returncode == 2
        assert "pip install datasets" in done.stderr

    def test_tasks_are_run_by_lm_eval(self, models, monkeypatch):
        """A double of the two names that are used; the real library is no dependency of the tests."""
        import types

        asked = {}

        def simple_evaluate(**options):
            asked.update(options)
            return {
                "results": {"piqa": {"acc,none": 0.5, "alias": "piqa"}},
                "versions": {"piqa": 1.0}, "n-shot": {"piqa": 0},
            }  # fmt: skip

        adapter = types.ModuleType("lm_eval.models.huggingface")
        adapter.HFLM = lambda pretrained, tokenizer: (pretrained, tokenizer)
        package, middle = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.models")
        package.simple_evaluate, package.models, middle.huggingface = simple_evaluate, middle, adapter
        for module in (package, middle, adapter):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr("secateur.search.core.versions.version", lambda name: f"version of {name}")
        found = evaluate(EvaluationRequest(str(models["llama"]), text="", tasks=("piqa",), device="cpu"))
        assert found["tasks"] == {"piqa": {"acc,none": 0.5, "version": 1.0, "shots": 0}}
        assert asked["tasks"] == ["piqa"]
        assert found["versions"]["lm_eval"] == "version of lm_eval"
