"""Inputs kept as tokens, where these are fewer than columns: the same figures as from Gram matrices."""

import hashlib
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from secateur.metrics_dsl.parser import parse_metric
from secateur.metrics_dsl.published import PUBLISHED
from secateur.search.core.candidate import uniform
from secateur.workers.calibrate.calibration import calibrate
from secateur.workers.calibrate.folder import Calibration, CalibrationError
from secateur.workers.calibrate.gram import gram_matrix, is_root, output_energy, relative_error
from secateur.workers.calibrate.input_statistics import Observer, damped_inverse_diagonal
from secateur.workers.calibrate.manifest import write_manifest
from secateur.workers.measure.local_evaluator import LocalEvaluator
from secateur.workers.measure.worker import Device
from secateur.workers.model.decoder import Decoder
from secateur.workers.model.load import load_model
from secateur.workers.prune.pruning import Pruner
from secateur.workers.prune.repair import REPAIRS
from support import in_process, save_model, small_request, tiny_config


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    return save_model(tiny_config(intermediate_size=160), tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module", params=[8, 40], ids=["all", "down projections"])
def few(request, wide_model, text_file, tmp_path_factory):
    """A calibration on so few tokens that all inputs, or those of the wide layers, are kept as tokens."""
    sizes = {"tokens": request.param, "sequence_length": 8}
    return calibrate(small_request(wide_model, text_file, **sizes), tmp_path_factory.mktemp("few") / "cal")


@pytest.fixture
def with_grams(few, tmp_path):
    """The same calibration with a Gram matrix of every input."""
    folder = tmp_path / "grams"
    shutil.copytree(few.folder, folder)
    for file in folder.glob("block-*.safetensors"):
        tensors = load_file(file)
        save_file({n: gram_matrix(t) if n.endswith("/H") else t for n, t in tensors.items()}, file)
    write_manifest(folder, few.manifest, few.layers, [replace(entry, tokens=None) for entry in few.entries])
    return Calibration(folder)


def some_inputs(tokens, columns, seed=0):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) + 0.3


class TestRoots:
    def test_errors_are_those_of_the_gram_matrix(self):
        x, weights = some_inputs(40, 300), some_inputs(64, 300, seed=1)
        root, removed = x / 40**0.5, some_inputs(64, 300, seed=2) < 0.3
        gram = gram_matrix(root)
        assert is_root(root)
        assert not is_root(gram)
        direct = (weights.double() @ x.double().T).square().mean(1)
        for form in (root, gram):
            assert torch.allclose(output_energy(weights, form), direct, rtol=1e-5)
        errors = [relative_error(weights, removed, form, direct) for form in (root, gram)]
        lost = ((weights * removed).double() @ x.double().T).square().mean(1).sum()
        assert errors == pytest.approx([float(lost / direct.sum())] * 2, rel=1e-5)

    def test_so_is_the_diagonal_of_the_damped_inverse(self):
        root = some_inputs(40, 300) / 40**0.5
        found, expected = damped_inverse_diagonal(root), damped_inverse_diagonal(gram_matrix(root.double()))
        assert torch.allclose(found, expected, rtol=1e-9)
        nothing = torch.zeros(0, 8)  # an expert that no token reached
        assert torch.equal(damped_inverse_diagonal(nothing), torch.ones(8, dtype=torch.float64))
        assert damped_inverse_diagonal(torch.full((2, 8), torch.inf)).isnan().all()

    @pytest.mark.parametrize("name", REPAIRS)
    def test_so_are_repairs(self, name):
        x, weights = some_inputs(40, 160), some_inputs(24, 160, seed=1)
        root, removed = x / 40**0.5, some_inputs(24, 160, seed=2) < 0.3
        one, two = (REPAIRS[name](weights, removed, h, x.mean(0)) for h in (root, gram_matrix(root)))
        assert torch.allclose(one.weights, two.weights, rtol=1e-4, atol=1e-5)


class TestObserving:
    @pytest.mark.parametrize("pieces", [(3, 4), (12,), (7, 5, 4), (9, 2, 1)])
    def test_tokens_become_a_gram_matrix_when_they_are_as_many_as_columns(self, pieces):
        module = torch.nn.Linear(12, 4)
        observer = Observer({0: module})
        inputs = [some_inputs(n, 12, seed=n) for n in pieces]
        for x in inputs:
            with observer.watching():
                module(x)
        ((members, found),) = observer.finish()
        x = torch.cat(inputs).double()
        assert members == [0]
        assert found["H"].shape == ((len(x) if len(x) < 12 else 12), 12)
        assert torch.allclose(gram_matrix(found["H"]).double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6)

    def test_inputs_that_are_shared_at_times_are_added_up(self):
        one, two = torch.nn.Linear(12, 4), torch.nn.Linear(12, 4)
        observer = Observer({0: one, 1: two})
        both, own, later = some_inputs(14, 12), some_inputs(5, 12, seed=1), some_inputs(3, 12, seed=2)
        with observer.watching():
            one(both)
            two(both)
        with observer.watching():
            one(own)
            two(later)
        for members, found in observer.finish():
            x = torch.cat([both, own if members == [0] else later]).double()
            assert torch.allclose(found["H"].double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6)

    def test_a_layer_that_no_token_reached_has_no_error(self, tmp_path):
        ((_, found),) = Observer({0: torch.nn.Linear(12, 4)}).finish()
        save_file(found, tmp_path / "a.safetensors")
        root = load_file(tmp_path / "a.safetensors")["H"]
        assert root.shape == (0, 12)
        weights = torch.ones(4, 12)
        energy = output_energy(weights, root)
        assert relative_error(weights, weights > 0, root, energy) == 0


class TestCalibrations:
    def test_wide_inputs_are_kept_as_tokens(self, few):
        tokens = few.manifest["parts"]["statistics"]["sequences"] * 8
        for layer, entry in zip(few.layers, few.entries, strict=True):
            assert entry.tokens == (tokens if tokens < layer.columns else None)
            gram = few.block(layer.block)[few.layers.index(layer)].gram
            assert gram.shape == (min(tokens, layer.columns), layer.columns)
        assert few.inputs == ((12, 12) if tokens == 8 else (12, 3))

    @pytest.mark.parametrize("stage", ["screen", "layer"])
    def test_errors_are_those_from_gram_matrices(self, few, with_grams, stage):
        one, two = (LocalEvaluator(calibration, rows=8) for calibration in (few, with_grams))
        candidates = [uniform(p.expression, one.layers, 0.5) for p in PUBLISHED.values()]
        for found, expected in zip(
            one.measure(candidates, stage), two.measure(candidates, stage), strict=True
        ):
            assert found.layer_errors == pytest.approx(expected.layer_errors, rel=2e-5)
            assert found.fingerprint == expected.fingerprint
        one.close()
        two.close()

    def test_pruning_with_a_repair_measures_the_same(self, few, wide_model):
        decoder = Decoder(load_model(str(wide_model))[0])
        candidate = uniform(parse_metric("square(W) / D"), decoder.layers, 0.5)
        pruned = Pruner(decoder, few.tokens("statistics")).prune(candidate, repair="obs")
        evaluator = LocalEvaluator(few)
        (measured,) = evaluator.measure([candidate], "layer")
        assert [p.error for p in pruned] == pytest.approx(measured.layer_errors, rel=2e-3)
        assert sum(p.repaired for p in pruned) < sum(p.error for p in pruned)
        evaluator.close()

    def test_calibrate_says_so(self, wide_model, text_file, tmp_path):
        sizes = ("--tokens", 40, "--selection-tokens", 32, "--holdout-tokens", 32, "--sequence-length", 8)
        done = in_process("calibrate", wide_model, "--text", text_file, *sizes, "--out", tmp_path / "c")
        assert "3 of 12 inputs are kept as tokens, which are fewer than their columns\n" in done.stdout


class TestFormats:
    def test_another_format_is_refused(self, tiny_calibration, tmp_path):
        shutil.copytree(tiny_calibration.folder, tmp_path / "new")
        manifest = tmp_path / "new" / "manifest.json"
        manifest.write_text(re.sub(r'"format": \d+', '"format": 5', manifest.read_text()))
        with pytest.raises(CalibrationError, match="expected calibration format 2, 3 or 4, got 5"):
            Calibration(tmp_path / "new")

    def test_format_2_with_gradients_among_the_statistics_is_read(self, tiny_calibration, tmp_path):
        shutil.copytree(tiny_calibration.folder, tmp_path / "old")
        manifest = tmp_path / "old" / "manifest.json"
        manifest.write_text(re.sub(r'"format": \d+', '"format": 2', manifest.read_text()))
        for path in (tmp_path / "old").glob("gradients-*"):
            block = path.with_name(path.name.replace("gradients", "block"))
            save_file({**load_file(block), **load_file(path)}, block)
            path.unlink()
        old = Calibration(tmp_path / "old")
        for block in range(3):
            for i, expected in tiny_calibration.block(block).items():
                assert torch.equal(old.block(block)[i].leaves["G"], expected.leaves["G"])

    def test_the_first_layer_with_other_weights_is_named(self, tiny_calibration, tiny_model, tmp_path):
        shutil.copytree(tiny_model, tmp_path / "other")
        file = tmp_path / "other" / "model.safetensors"
        weights = load_file(file)
        weights["model.layers.1.mlp.up_proj.weight"] += 0.01
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(CalibrationError, match=r"other weights in model\.layers\.1\.mlp\.up_proj;"):
            LocalEvaluator(tiny_calibration, model=str(tmp_path / "other"))

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("model.norm.weight", "weights outside its blocks"),
            ("model.embed_tokens.weight", "weights outside its blocks"),
            ("model.layers.1.input_layernorm.weight", "weights in block 1"),
            ("model.layers.2.mlp.up_proj.weight", "weights in block 2"),
            ("rms_norm_eps", "rms_norm_eps in its configuration"),
            ("rope_theta", "rope_parameters.rope_theta in its configuration"),
        ],
    )
    def test_whatever_else_a_model_computes_with_has_to_be_as_it_was(
        self, name, says, tiny_calibration, tiny_model, tmp_path
    ):
        other = shutil.copytree(tiny_model, tmp_path / "other")
        weights, config = (
            load_file(other / "model.safetensors"),
            json.loads((other / "config.json").read_text()),
        )
        if name in weights:
            weights[name].view(torch.int32).view(-1)[-1] ^= 1  # the last bit of one number of all
        elif name in config:
            config[name] *= 2
        else:
            config["rope_parameters"][name] *= 2
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(CalibrationError, match=rf"got one with other {says}; calibrate this model"):
            LocalEvaluator(tiny_calibration, model=str(other))

    def test_what_a_model_does_not_compute_with_may_be_another(self, tiny_calibration, tiny_model, tmp_path):
        other = shutil.copytree(tiny_model, tmp_path / "other")
        weights, config = (
            load_file(other / "model.safetensors"),
            json.loads((other / "config.json").read_text()),
        )
        config |= {"dtype": "bfloat16", "use_cache": False, "pad_token_id": 3, "transformers_version": "4.0"}
        (other / "config.json").write_text(json.dumps(config))
        LocalEvaluator(tiny_calibration, model=str(other)).close()
        rounded = {name: weight.bfloat16() for name, weight in weights.items()}
        save_file(rounded, other / "model.safetensors", metadata={"format": "pt"})
        LocalEvaluator(tiny_calibration, model=str(other), device=Device("cpu", dtype="bfloat16")).close()
        with pytest.raises(CalibrationError, match="got one with other weights in block 0"):
            LocalEvaluator(tiny_calibration, model=str(other))

    def test_a_layers_hash_does_not_depend_on_the_others(self, tiny_calibration, tiny_evaluator):
        hashes = tiny_evaluator.worker.decoder.fingerprints()
        assert [entry.weights for entry in tiny_calibration.entries] == hashes
        assert len(set(hashes)) == len(hashes) == 21
        together = hashlib.sha256("".join(hashes).encode()).hexdigest()
        assert tiny_calibration.manifest["model"]["weights"] == together
