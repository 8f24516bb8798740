"""Planning from a configuration alone: bytes as calibration writes them, verdicts, mistakes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from secateur.workers.calibrate.calibration import calibrate
from secateur.workers.model.decoder import Decoder
from secateur.workers.model.load import load_model
from secateur.workers.plan.model_sizes import outline
from secateur.workers.plan.plan import Machine, Tokens, make_plan, memory_of, ways_to_fit
from secateur.workers.plan.rates import GPUS, RateError, measure_rates, quadratic_operations, rates_of
from support import ROOT, in_process, save_model, small_request, tiny_config

CONFIGS = ROOT / "docs" / "configs"
TOKENS = Tokens(512, 128, 128, 64)


@pytest.fixture(scope="module")
def bare(tiny_model, tmp_path_factory):
    """A folder with a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(tiny_model / "config.json", folder)
    return folder


@pytest.fixture(scope="module")
def sketch(bare):
    return outline(str(bare), tokens=512, length=64, gradients=True)


def bytes_of(calibration):
    """Bytes of the tensors in each block's files."""
    blocks = sorted({layer.block for layer in calibration.layers})
    files = [sorted(calibration.folder.glob(f"*-{block:03d}.safetensors")) for block in blocks]
    return [sum(t.nbytes for file in own for t in load_file(file).values()) for own in files]


class TestOutlines:
    def test_statistics_are_as_large_as_calibration_writes_them(self, sketch, tiny_calibration):
        assert list(sketch.statistics) == bytes_of(tiny_calibration)
        assert sketch.layers == tiny_calibration.layers
        assert sketch.inputs == tiny_calibration.inputs == (12, 0)

    @pytest.mark.parametrize("gradients", [True, False])
    def test_so_are_those_with_inputs_kept_as_tokens(self, text_file, tmp_path, gradients):
        model = save_model(tiny_config(intermediate_size=160), tmp_path / "model")
        request = small_request(model, text_file, tokens=40, sequence_length=8, gradients=gradients)
        calibration = calibrate(request, tmp_path / "c")
        found = outline(str(model), tokens=40, length=8, gradients=gradients)
        assert list(found.statistics) == bytes_of(calibration)
        assert found.inputs == calibration.inputs == (12, 3)
        pairs = zip(calibration.layers, calibration.entries, strict=True)
        assert list(found.kept) == [entry.tokens or layer.columns for layer, entry in pairs]

    def test_weights_are_those_of_the_model(self, sketch, tiny_model):
        model, _ = load_model(str(tiny_model))
        assert sketch.size == sum(p.numel() for p in model.parameters())
        blocks = Decoder(model).blocks
        assert list(sketch.weights) == [sum(p.numel() for p in block.parameters()) for block in blocks]
        assert (sketch.vocabulary, sketch.width) == (260, 32)

    def test_transposed_layers_and_experts_are_outlined(self, tmp_path):
        from transformers import GPT2Config, MixtralConfig

        GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path / "gpt2")
        found = outline(str(tmp_path / "gpt2"), tokens=64, length=32, gradients=False)
        assert [x.kind for x in found.layers[:4]] == ["c_attn", "c_proj", "c_fc", "c_proj"]
        assert found.kept[3] == 64  # tokens, fewer than 128 columns
        MixtralConfig(
            vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1,
        ).save_pretrained(tmp_path / "moe")  # fmt: skip
        experts = outline(str(tmp_path / "moe"), tokens=64, length=32, gradients=False)
        prunable = sum(x.size for x in experts.layers) / 2
        assert experts.active[0] == prunable + (experts.weights[0] - prunable) / 4


class TestPlans:
    def test_a_model_is_split_where_it_does_not_fit_on_one(self, sketch):
        rates = rates_of("h100", "float32")
        whole = memory_of(sketch, Machine("cuda", 3, 0), TOKENS, range(3))
        half = memory_of(sketch, Machine("cuda", 3, 0), TOKENS, range(2))
        assert whole["statistics"] == sum(sketch.statistics)
        assert whole["weights"] == 4 * sketch.size
        assert half["dense probabilities"] == 0  # the last shard alone compares
        large = make_plan(sketch, Machine("cuda", 7, 10**12), TOKENS, rates)
        assert (large.fits, large.replicas, list(large.shards)) == (True, 7, [range(3)])
        less = sum(whole.values()) - 1
        split = make_plan(sketch, Machine("cuda", 7, less), TOKENS, rates)
        assert (split.fits, split.replicas, len(split.shards)) == (True, 3, 2)
        assert split.pace["layer"] < split.seconds["layer"] == pytest.approx(large.seconds["layer"])
        assert not make_plan(sketch, Machine("cuda", 7, 10**6), TOKENS, rates).fits

    def test_hours_follow_the_funnel(self, sketch):
        plan = make_plan(sketch, Machine("cuda", 2, 10**12), TOKENS, rates_of("a100", "bfloat16"))
        screen, model = plan.pace["screen"], plan.pace["model"]
        assert plan.hours(7200, "metrics") == pytest.approx(screen + model / 4)
        assert plan.hours(7200, "ratios") == pytest.approx(model / 2)

    def test_what_would_fit_is_said(self, sketch, bare):
        machine = Machine(
            "cuda", 1, sum(memory_of(sketch, Machine("cuda", 1, 0), TOKENS, range(3)).values()) - 1
        )

        def observe(statistics=512, gradients=True):
            return outline(str(bare), tokens=statistics, length=64, gradients=gradients)

        ways = ways_to_fit(sketch, machine, TOKENS, rates_of("h100", "float32"), observe)
        assert ways == ["--gpus 2", "--dtype bfloat16", "--no-gradients"]
        wide = outline(str(bare), tokens=16, length=8, gradients=False)
        assert sum(wide.statistics) < sum(sketch.statistics) / 3

    def test_rates_are_measured_here_and_known_of_gpus(self, sketch):
        found = measure_rates(sketch.layers, torch.device("cpu"), "float32", torch.get_num_threads())
        numbers = [value for name, value in vars(found).items() if name != "source"]
        assert min(numbers) > 0
        assert "measured" in found.source
        for gpu in GPUS:
            assert "not measured" in rates_of(gpu, "bfloat16").source
        with pytest.raises(RateError, match="expected a GPU among"):
            rates_of("h1000", "float32")

    def test_tokens_cost_what_they_are(self):
        assert quadratic_operations(8, 1000, 100, "cpu") == 2 * 8 * 100 * 1000
        assert quadratic_operations(8, 1000, 1000, "cpu") == 8 * 1000 * 1192


class TestTheCommand:
    def test_it_prints_a_plan_without_weights(self, bare):
        done = in_process("plan", bare, "--gpus", 2, "--budget", 100)
        assert done.returncode == 0, done.stderr
        assert "It fits: 1 shard x 2 copies on 2 h100" in done.stdout
        assert "not measured: datasheet of the h100" in done.stdout
        assert "of 80.00 GiB on the fullest" in done.stdout
        other = in_process("plan", bare, "--gpu", "rtx4090")
        assert "of 24.00 GiB on the fullest" in other.stdout
        for word in ("statistics", "calibration on disk", "screen", "sensitivity", "hours"):
            assert word in done.stdout

    def test_this_machine_is_measured(self, bare):
        found = json.loads(in_process("plan", bare / "config.json", "--gpus", 0, "--json").stdout)
        assert found["fits"]
        assert found["rates"]["source"].startswith("measured on this machine")
        assert set(found["seconds_per_candidate"]) == {"screen", "layer", "model", "sensitivity"}
        assert found["worker_bytes"]["total"] == sum(
            v for n, v in found["worker_bytes"].items() if n != "total"
        )

    @pytest.mark.parametrize(("name", "parameters"), [("8b", 8_030_261_248), ("70b", 70_553_706_496)])
    def test_large_models_are_planned_from_their_configurations(self, name, parameters):
        model = CONFIGS / f"llama-3.1-{name}.json"
        done = in_process("plan", model, "--gpus", 8, "--dtype", "bfloat16", "--json")
        found = json.loads(done.stdout)
        assert found["parameters"] == parameters
        assert (found["kept_as_tokens"], found["fits"]) == ((32, True) if name == "8b" else (80, False))
        assert "--no-gradients" in found["ways_to_fit"] or found["fits"]

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--gpu", "h1000"), "expected a GPU among"),
            (("--gpu-memory", "much"), "expected a size of memory such as 80GiB, got 'much'"),
            (("--gpus", -1), "expected GPUs of at least 0, got -1"),
            (("--dtype", "int8"), "float32 or bfloat16"),
            (("--tokens", 0), "at least 1 token"),
            (("--sequence-length", 4096), "expected sequences of at most 2048 tokens"),
        ],
    )
    def test_a_mistake_is_one_sentence(self, bare, arguments, says):
        done = in_process("plan", bare, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert says in done.stderr

    @pytest.mark.parametrize("source", ["/nowhere/model", "nowhere.json", "nobody/nothing"])
    def test_a_missing_configuration_is_named(self, source):
        done = in_process("plan", source)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert source in done.stderr

    def test_a_model_that_is_no_decoder_is_refused(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "t5"}')
        done = in_process("plan", tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_commands_of_the_document_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [
        line.split()[2:]
        for line in (ROOT / "docs" / "planning.md").read_text().splitlines()
        if line.startswith("$ secateur plan docs/")
    ]
    assert len(commands) == 4
    verdicts = [in_process(*command, "--json") for command in commands]
    assert [json.loads(done.stdout)["fits"] for done in verdicts] == [True, True, False, True]
