"""What counts as a layer, what stays dense and why, and where that is told."""

import json
import re
import shutil

import pytest
import secateur
import torch
from odd_model import letters, save_odd
from safetensors.torch import load_file
from secateur.metrics_dsl.errors import SecateurError
from secateur.metrics_dsl.published import PUBLISHED
from secateur.results.archive.archive import Archive
from secateur.results.export.rule_source import RuleError
from secateur.search.core.candidate import Candidate, Layer, uniform
from secateur.search.core.coverage import Coverage, StaysDense, percent
from secateur.search.core.reading import Given
from secateur.workers.calibrate.calibration import calibrate
from secateur.workers.calibrate.folder import Calibration
from secateur.workers.measure.local_evaluator import LocalEvaluator
from secateur.workers.measure.partition import split_blocks
from secateur.workers.model.decoder import Decoder
from secateur.workers.model.load import load_model
from secateur.workers.plan.model_sizes import outline
from secateur.workers.prune.pruning import Pruner
from support import in_process, save_model, small_request
from torch import nn

WANDA = PUBLISHED["wanda"].expression
SIZES = {"tokens": 512, "sequence_length": 64, "device": "cpu"}
SMALL = ("--tokens", 512, "--sequence-length", 64, "--device", "cpu")
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "up", "down", "experts.0"]
WHY = {
    "direct": "is not called: its weight is used directly, or no token of the text reaches it",
    "turned": "belongs to Turned with a forward or weights of its own kind",
    "silent": "gets inputs that are all 0 on the text",
    "experts.1": "is reached by no token of the text",
    "experts.2": "is not called: its weight is used directly, or no token of the text reaches it",
    "stacked": "belongs to Odd, which is no linear layer",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    letters(folder, "letters.txt", digits=False)
    letters(folder, "digits.txt", digits=True)
    save_odd(folder / "model")
    for text in ("letters", "digits"):
        calibrate(small_request(folder / "model", folder / f"{text}.txt"), folder / text)
        settings = {"space": "layer", "searcher": "random", "budget": 60, "threads": 1}
        secateur.run_search(folder / text, out=folder / f"run-{text}", sparsity=0.5, **settings)
    return folder


def own(name):
    """Return a layer's name within the attention or the feed-forward part of its block."""
    return name.split(".", 3)[3].split(".", 1)[1].removesuffix(".weight")


def changed(dense, pruned):
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, pruned))
    assert before.keys() == after.keys()
    return {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}


class TestLayers:
    def test_are_what_tokens_reach_through_a_linear_forward(self, place):
        calibration = Calibration(place / "letters")
        assert [own(layer.name) for layer in calibration.layers] == LAYERS * 2
        assert {own(one.name): one.why for one in calibration.coverage.stays_dense} == WHY
        digits = Calibration(place / "digits")
        assert [own(layer.name) for layer in digits.layers] == [*LAYERS, "experts.1"] * 2

    @pytest.mark.parametrize("text", ["letters", "digits"])
    def test_were_called_with_tokens_each(self, place, text):
        calibration = Calibration(place / text)
        model, _ = load_model(str(place / "model"))
        modules, seen = dict(model.named_modules()), dict.fromkeys((x.name for x in calibration.layers), 0)
        for name in seen:
            modules[name].register_forward_pre_hook(
                lambda _m, args, more, n=name: seen.update(
                    {n: seen[n] + int((args[0] if args else more["input"]).count_nonzero())}
                ),
                with_kwargs=True,
            )
        with torch.no_grad():
            model(input_ids=calibration.tokens("statistics"))
        assert all(seen.values())

    def test_have_their_share_of_the_block_weights_by_a_plain_count(self, place):
        coverage = Calibration(place / "letters").coverage
        blocks = load_model(str(place / "model"))[0].model.layers
        assert coverage.in_blocks == sum(p.numel() for p in blocks.parameters() if p.ndim >= 2)
        modules = dict(blocks.named_modules())
        assert coverage.prunable == sum(
            modules[f"{block}.{part}.{name}"].weight.numel()
            for block in range(2)
            for name in LAYERS
            for part in ["self_attn" if "_proj" in name else "mlp"]
        )

    def test_are_those_of_the_calibration_for_whoever_measures(self, place):
        calibration = Calibration(place / "letters")
        evaluator = LocalEvaluator(calibration)
        assert evaluator.layers == calibration.layers
        candidate = uniform(WANDA, evaluator.layers, 0.5)
        assert [name for name, _ in evaluator.masks(candidate)] == [x.name for x in calibration.layers]
        (found,) = evaluator.measure([candidate], "layer")
        assert all(error > 0 for error in found.layer_errors)
        evaluator.close()

    @pytest.mark.parametrize("statistics", ["one-shot", "sequential"])
    def test_alone_change_when_a_model_is_pruned(self, place, tmp_path, statistics):
        text = str(place / "letters.txt")
        record = secateur.prune(
            place / "model", tmp_path / "out", text=text, sparsity=0.5, statistics=statistics, **SIZES
        )
        layers = {layer["name"] for layer in record["layers"]}
        assert layers == {layer.name for layer in Calibration(place / "letters").layers}
        assert changed(place / "model", tmp_path / "out") == layers
        assert {own(one["name"]): one["why"] for one in record["model"]["stays_dense"]} == WHY
        assert all(layer["output_error"] > 0 for layer in record["layers"])

    def test_of_a_rule_of_a_run_are_that_runs(self, place, tmp_path):
        rule, model = f"{place}/run-letters:best", place / "model"
        for text in ("letters", "digits"):
            record = secateur.prune(
                model, tmp_path / text, candidate=rule, text=f"{place}/{text}.txt", **SIZES
            )
            assert changed(model, tmp_path / text) <= {x.name for x in Calibration(place / "letters").layers}
            assert len(record["layers"]) == 14
        why = {own(one["name"]): one["why"] for one in record["model"]["stays_dense"]}
        assert why["experts.1"].startswith("has no ratio in ")

    def test_of_a_rule_are_not_pruned_by_a_text_that_tells_nothing_of_one(self, place, tmp_path):
        rule = f"{place}/run-digits:best"
        with pytest.raises(RuleError, match=r"layers\.0\.mlp\.experts\.1, which is reached by no token"):
            secateur.prune(
                place / "model", tmp_path / "out", candidate=rule, text=f"{place}/letters.txt", **SIZES
            )
        assert not (tmp_path / "out").exists()

    def test_that_pruned_blocks_keep_tokens_from_stay_dense(self, place, tmp_path):
        model, tokenizer = load_model(str(save_odd(tmp_path / "model", gate=1e-9)))
        ids = tokenizer((place / "letters.txt").read_text(), return_tensors="pt")["input_ids"][:, :256]
        ids = ids.view(4, 64)
        first, last = (block.mlp for block in model.model.layers)
        for writer in (model.model.layers[0].self_attn.o_proj, first.direct, *first.experts):
            writer.weight.data[1] = 0  # the mark is what the layer ``down`` makes of a token
        first.turned.weight.data[-2] = first.stacked.data[:, :, 1] = model.model.embed_tokens.weight.data[
            :, 1
        ] = 0
        marks = []
        handle = last.register_forward_pre_hook(lambda _m, args: marks.append(args[0][..., 1].abs().max()))
        model(input_ids=ids)
        handle.remove()
        first.gate, last.gate = 0, 0.9 * float(marks[0])
        decoder = Decoder(model)
        dense = last.experts[2].weight.clone()
        pruner = Pruner(decoder, ids)
        name = "model.layers.1.mlp.experts.2"
        assert name in {layer.name for layer in decoder.layers}
        candidate = uniform(WANDA, decoder.layers, 0.99)
        done = pruner.prune(candidate, statistics="sequential")
        assert [p.layer for p in done] == decoder.layers
        assert name not in {p.layer.name for p in done}
        assert torch.equal(last.experts[2].weight, dense)
        assert f"{name}.weight" in {one.name for one in decoder.stays_dense}


class TestMamba:
    """A model of transformers' own that uses a layer's weight without calling it."""

    def test_keeps_the_weights_that_it_uses_directly(self, place, tmp_path):
        from transformers import MambaConfig

        config = MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4)
        model, text = save_model(config, tmp_path / "model"), place / "letters.txt"
        calibration = calibrate(small_request(model, text), tmp_path / "cal")
        kinds = {"in_proj", "x_proj", "out_proj"}
        assert {layer.kind for layer in calibration.layers} == kinds
        secateur.prune(model, tmp_path / "out", text=str(text), sparsity=0.5, **SIZES)
        assert {name.rpartition(".")[2] for name in changed(model, tmp_path / "out")} == kinds
        sketch = outline(str(model), tokens=512, length=64, gradients=True)
        assert list(sketch.layers) == calibration.layers


class TestModules:
    @pytest.fixture
    def model(self, tiny_model):
        return load_model(str(tiny_model))[0]

    def names(self, model):
        return {layer.name for layer in Decoder(model).layers}

    def test_with_a_forward_or_weight_of_their_own_kind_are_no_layers(self, model):
        class Conv1D(nn.Linear):
            def forward(self, x):
                return x @ self.weight.T

        mlp = model.model.layers[0].mlp
        mlp.up_proj.forward = lambda x: x  # as hooks of other libraries do it
        mlp.gate_proj = Conv1D(32, 48, bias=False)
        nn.utils.parametrizations.orthogonal(mlp.down_proj)
        decoder = Decoder(model)
        left = {one.name: one.why for one in decoder.stays_dense}
        assert len(decoder.layers) == 21 - 3
        assert all(".0.mlp." in name for name in left)
        assert len(left) == 3

    def test_that_stand_in_several_blocks_are_no_layers(self, model):
        model.model.layers[2].mlp.up_proj = model.model.layers[0].mlp.up_proj
        assert len(self.names(model)) == 21 - 2
        coverage = Decoder(model).coverage
        plain = sum(p.numel() for p in model.model.layers.parameters() if p.ndim >= 2)
        assert coverage.in_blocks == plain

    def test_of_usual_models_are_all_of_their_block_weights(self, model, tmp_path):
        from transformers import GPT2Config

        gpt2 = save_model(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4), tmp_path / "gpt2")
        for each in (model, load_model(str(gpt2))[0]):
            assert Decoder(each).coverage.share == 1
            assert not Decoder(each).stays_dense


@pytest.fixture(scope="module")
def calibration(place):
    """Of a model whose first, third and last blocks have no linear layer."""
    save_odd(place / "plain", num_hidden_layers=5, plain=(0, 2, 4))
    return calibrate(small_request(place / "plain", place / "letters.txt"), place / "plain-cal")


class TestBlocksWithoutLayers:
    def test_do_not_shift_what_others_get(self, calibration):
        assert {layer.block for layer in calibration.layers} == {1, 3}
        assert calibration.blocks == 5
        found = secateur.measure(calibration.folder, "wanda", sparsity=0.5, allocation="owl")
        assert found["sparsity"] == pytest.approx(0.5, abs=0.03)

    def test_are_run_and_kept_states_are_those_of_their_ratios(self, calibration):
        candidates = [
            Candidate(WANDA, tuple(r if x.block == 1 else 0.5 for x in calibration.layers))
            for r in (0.2, 0.8)
        ]
        found = []
        for reuse in (True, False):
            evaluator = LocalEvaluator(calibration, reuse=reuse)
            found.append([m.values for m in evaluator.measure(candidates, "model")])
            (slopes,) = evaluator.measure(candidates[:1], "sensitivity", "statistics")
            assert len(slopes.sensitivities) == len(calibration.layers)
            evaluator.close()
        assert found[0] == found[1]
        assert found[0][0]["kl"] < found[0][1]["kl"]

    def test_go_to_shards_with_those_beside_them(self, calibration):
        assert split_blocks(calibration.layers, 2, calibration.blocks) == [range(3), range(3, 5)]
        with pytest.raises(secateur.SecateurError, match="expected at most 2 shards"):
            split_blocks([Layer("a", 1, "a", 2, 2), Layer("b", 3, "b", 2, 2)], 3, 5)


class TestWhatIsTold:
    def test_calibrating_prints_the_share_and_every_reason(self, place, tmp_path):
        done = in_process(
            "calibrate", place / "model", "--text", place / "letters.txt", *SMALL, "--selection-tokens", 64,
            "--holdout-tokens", 64, "--out", tmp_path / "cal",
        )  # fmt: skip
        coverage = Calibration(tmp_path / "cal").coverage
        share = percent(coverage.share)
        assert (
            f"counted over {share} of the {coverage.in_blocks:,} block weights: mlp.stacked, " in done.stdout
        )
        for name, why in WHY.items():
            assert any(
                line.startswith(f"    mlp.{name.replace('.1', '.*').replace('.2', '.*')} ") and why in line
                for line in done.stdout.splitlines()
            )
        assert f"warning: every sparsity is counted over {share} of the" in done.stderr

    def test_pruning_prints_the_share(self, place, tmp_path):
        done = in_process(
            "prune", place / "model", "--text", place / "letters.txt", *SMALL, "--sparsity", 0.5, "--out",
            tmp_path / "out",
        )  # fmt: skip
        coverage = Calibration(place / "letters").coverage
        assert re.search(rf"  50\.\d\d% of {re.escape(coverage.in_words)}\n", done.stdout)
        assert coverage.warning in done.stderr

    def test_a_front_and_a_report_warn_first(self, place, tmp_path):
        coverage = Calibration(place / "letters").coverage
        shown = in_process("front", place / "run-letters").stdout
        assert shown.splitlines()[0] == coverage.warning
        record = json.loads(in_process("front", place / "run-letters", "--json").stdout)
        assert {name: record[name] for name in coverage.record()} == coverage.record()
        secateur.open(place / "run-letters").report(tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert f'<p class="warning">{coverage.warning}' in page
        assert page.index('class="warning"') < page.index("<main")
        assert WHY["silent"] in page

    def test_usual_models_are_told_to_be_covered(self, tiny_calibration):
        covered = tiny_calibration.coverage
        assert covered.in_words == f"100% of the {covered.in_blocks:,} block weights"
        assert not covered.warning

    @pytest.mark.parametrize(
        "changes",
        [
            {"prunable_weights": 10**400}, {"block_weights": 10**400}, {"block_weights": 1},
            {"stays_dense": [{"name": "a", "shape": [10**9] * 50, "why": "is large"}]},
            {"stays_dense": [{"name": "a", "shape": [10**400], "why": "is large"}]},
        ],
    )  # fmt: skip
    def test_a_record_that_does_not_add_up_is_refused(self, changes, tiny_calibration):
        record = {**tiny_calibration.coverage.record(), **changes}
        with pytest.raises(SecateurError, match=r"^expected .*(weights|number)"):
            Coverage.read(Given(record, "a run", SecateurError))

    def test_older_calibrations_and_runs_say_nothing(self, place, tmp_path):
        shutil.copytree(place / "letters", tmp_path / "cal")
        path = tmp_path / "cal" / "manifest.json"
        manifest = json.loads(path.read_text())
        for name in ("block_weights", "prunable_weights", "blocks"):
            del manifest["model"][name]
        manifest["model"]["stays_dense"] = ["model.layers.0.mlp.stacked"]
        manifest["format"] = 3
        path.write_text(json.dumps(manifest))
        assert Calibration(tmp_path / "cal").coverage is None
        shutil.copytree(place / "run-letters", tmp_path / "run")
        with Archive(tmp_path / "run", write=True) as archive:
            archive.keep(coverage={})
        with Archive(tmp_path / "run") as archive:
            assert archive.coverage is None
        assert "block weights" not in in_process("front", tmp_path / "run").stdout

    def test_a_record_comes_back_as_it_was(self):
        rest = (StaysDense("model.layers.0.a.experts.3.up.weight", (2, 3), "is one"),)
        coverage = Coverage(94, 100, rest)
        given = Given({"else": 1, **coverage.record()}, "a file", secateur.SecateurError)
        assert Coverage.read(given) == coverage
        assert coverage.in_words == "94% of the 100 block weights: a.experts.*.up stays dense"
        assert percent(0.99999) == "nearly 100%"

    @pytest.mark.parametrize(
        "wrong",
        [
            {"block_weights": 2},
            {"stays_dense": 3},
            {"prunable_weights": "94"},
            {"prunable_weights": 0},
            {"stays_dense": [{"name": "\x1b[2J", "shape": [1], "why": "is one"}]},
            {"stays_dense": [{"name": "a", "shape": [-1], "why": "is one"}]},
        ],
    )
    def test_a_record_that_cannot_be_is_refused(self, wrong):
        given = Given({**Coverage(94, 100, ()).record(), **wrong}, "a file", secateur.SecateurError)
        with pytest.raises(secateur.SecateurError, match="in a file"):
            Coverage.read(given)
