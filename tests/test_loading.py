"""Models loaded and written: never a wrong one in silence, and never code that nobody asked for."""

import contextlib
import json
import os
import shutil
import struct
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import secateur
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from secateur.metrics_dsl.errors import SecateurError
from secateur.service.prune_model import prune
from secateur.workers.calibrate.file_records import FileRecord
from secateur.workers.calibrate.manifest import own_hash
from secateur.workers.model.errors import ModelError
from secateur.workers.model.gguf import check_all_read
from secateur.workers.model.load import choose_device, load_model, model_of_config
from secateur.workers.model.load_blocks import decoder_in_files
from secateur.workers.model.model_files import find_model
from secateur.workers.prune.checkpoint import Checkpoint, CheckpointError
from support import in_process, save_model, save_tokenizer, tiny_config
from support import secateur as in_own_process

SMALL = {"tokens": 128, "sequence_length": 64, "device": "cpu"}


@pytest.fixture
def folder(tmp_path):
    """A tiny model whose head is its own, to be changed."""
    return save_model(tiny_config(tie_word_embeddings=False), tmp_path / "model")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def blocks(folder):
    return decoder_in_files(str(folder), torch.float32, torch.device("cpu"))


def refused(folder, *words):
    """Check that a model is refused alike however it is loaded."""
    sentences = set()
    for load in (blocks, lambda place: load_model(str(place))):
        with pytest.raises(ModelError) as error:
            load(folder)
        sentences.add(str(error.value))
    (sentence,) = sentences
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence


class TestReport:
    def test_a_weight_that_the_files_lack_is_refused_by_name(self, folder):
        edit_tensors(folder, lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
        refused(folder, "LlamaForCausalLM", "without lm_head.weight")

    def test_a_tensor_that_was_renamed_is_refused_by_both_names(self, folder):
        name = "model.layers.1.mlp.up_proj.weight"
        edit_tensors(folder, lambda t: {f"{n}x" if n == name else n: v for n, v in t.items()})
        refused(folder, f"without {name}", f"with {name}x")

    def test_a_tensor_that_the_model_does_not_know_is_refused(self, folder):
        edit_tensors(folder, lambda t: {**t, "model.layers.3.mlp.up_proj.weight": torch.zeros(2, 2)})
        refused(folder, "with model.layers.3.mlp.up_proj.weight, which that model does not have")

    def test_a_tensor_of_another_shape_is_refused(self, folder):
        edit(folder, intermediate_size=64)
        refused(folder, "mlp.down_proj.weight as (32, 48), not (32, 64)", "(9 in all)")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
    def test_numbers_that_are_no_weights_are_refused(self, dtype, folder):
        name = "model.layers.1.mlp.up_proj.weight"
        edit_tensors(folder, lambda t: {**t, name: t[name].to(dtype)})
        refused(folder, "expected ordinary weights", name)

    def test_a_model_type_of_another_family_is_refused(self, folder):
        edit(folder, model_type="bert")
        refused(folder, "one family", "bert", "llama")
        edit(folder, architectures=None)
        refused(folder, "BertLMHeadModel", "without")

    @pytest.mark.parametrize("is_same", [True, False])
    def test_a_tensor_that_two_files_have_differently_is_refused(self, is_same, folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        name = "model.layers.1.mlp.up_proj.weight"
        more = {name: tensors[name] + (0 if is_same else 1), "lm_head.weight": tensors.pop("lm_head.weight")}
        for shard, own in (("1.safetensors", tensors), ("2.safetensors", more)):
            save_file(own, folder / shard, metadata={"format": "pt"})
        shards = dict.fromkeys(tensors, "1.safetensors") | {"lm_head.weight": "2.safetensors"}
        index = {"metadata": {}, "weight_map": shards}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if is_same:
            assert blocks(folder)[0].layers
        else:
            refused(folder, name, "in 1.safetensors and another in 2.safetensors")

    def test_weights_that_are_tied_or_derived_pass(self, tmp_path):
        tied = save_model(tiny_config(), tmp_path / "tied")
        assert blocks(tied) is not None
        edit_tensors(
            tied,
            lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                       "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)},
        )  # fmt: skip
        assert blocks(tied) is not None
        load_model(str(tied))

    def test_weights_that_are_not_finite_are_refused_before_anything_is_told(
        self, folder, text_file, tmp_path
    ):
        def broken(tensors):
            tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = torch.inf
            return tensors

        edit_tensors(folder, broken)
        for command in (("calibrate", folder, "--out"), ("prune", folder, "-o")):
            done = in_process(*command, tmp_path / "out", "--text", text_file)
            assert done.returncode == 2
            (line,) = done.stderr.splitlines()
            assert "expected finite weights" in line
            assert "layers.2.mlp.up_proj" in line
            assert not (tmp_path / "out").exists()


class TestKinds:
    @pytest.mark.parametrize("has_base", [True, False])
    def test_an_adapter_is_refused_with_what_to_do(self, folder, has_base):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        if not has_base:
            (folder / "config.json").unlink()
        refused(folder, "adapter", "merge_and_unload")

    def test_an_adapter_beside_a_gguf_file_is_refused(self, tmp_path):
        path = tmp_path / "x.gguf"
        path.write_bytes(gguf(ALL, [("t", (32,), 0, 0)], data=b"\0" * 128))
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        with pytest.raises(ModelError, match="merge_and_unload"):
            find_model(str(path))

    @pytest.mark.parametrize(
        "method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "nosuch", None, 3]
    )
    def test_a_quantised_model_is_refused_in_words_of_our_own(self, folder, method):
        edit(folder, quantization_config={"quant_method": method, "bits": 4})
        refused(folder, "expected ordinary weights", "give the model that it was made from")

    def test_a_model_without_a_tokenizer_is_refused(self, folder):
        for path in folder.glob("tokenizer*"):
            path.unlink()
        refused(folder, "expected a tokenizer beside the model")

    def test_an_encoder_with_a_decoder_is_refused(self, tmp_path):
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        T5ForConditionalGeneration(T5Config(vocab_size=260, **sizes)).save_pretrained(tmp_path / "t5")
        save_tokenizer(tmp_path / "t5")
        refused(tmp_path / "t5", "an encoder with a decoder")

    @pytest.mark.parametrize("kind", ["qwen3_5", "llava", "llama4"])
    def test_a_model_that_sees_is_refused_where_that_would_be_lost(self, folder, kind):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        refused(folder, "a part for vision, which would be lost")

    def test_a_part_that_sees_is_not_left_out_of_a_model_for_text(self, tmp_path):
        from transformers import Qwen3_5TextConfig

        sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
                 "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                 "linear_value_head_dim": 8,
                 "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
        place = save_model(Qwen3_5TextConfig(**sizes), tmp_path / "model")
        load_model(str(place))
        edit_tensors(place, lambda t: {**t, "model.visual.blocks.0.norm1.weight": torch.ones(4)})
        refused(place, "with model.visual.blocks.0.norm1.weight, which would be lost")


class TestDequantised:
    def in_fp8(self, place):
        sizes = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}
        save_model(tiny_config(**sizes), place)

        def packed(tensors):
            found = {}
            for name, value in tensors.items():
                if "proj" in name:
                    scale = value.abs().max() / 448
                    found[name] = (value / scale).to(torch.float8_e4m3fn)
                    shape = [-(-size // 128) for size in value.shape]
                    found[f"{name}_scale_inv"] = torch.full(shape, float(scale))
                else:
                    found[name] = value.bfloat16()
            return found

        edit_tensors(place, packed)
        how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        edit(place, quantization_config=how, dtype="bfloat16")
        return place

    def in_mxfp4(self, place):
        from transformers import GptOssConfig

        config = GptOssConfig(
            vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=32,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        save_model(config, place)

        def packed(tensors):
            found, generator = {}, torch.Generator().manual_seed(0)
            for name, value in tensors.items():
                if name.endswith(("gate_up_proj", "down_proj")):
                    experts, inputs, outputs = value.shape
                    shape = (experts, outputs, inputs // 32)
                    found[f"{name}_blocks"] = torch.randint(
                        0, 255, (*shape, 16), dtype=torch.uint8, generator=generator
                    )
                    found[f"{name}_scales"] = torch.full(shape, 124, dtype=torch.uint8)
                else:
                    found[name] = value.bfloat16()
            return found

        edit_tensors(place, packed)
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        edit(place, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})
        return place

    @pytest.mark.parametrize("form", ["in_fp8", "in_mxfp4"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_it_is_pruned_into_an_ordinary_model(self, form, dtype, text_file, tmp_path):
        from transformers import AutoModelForCausalLM

        source = getattr(self, form)(tmp_path / "dense")
        record = prune(str(source), tmp_path / "out", text=str(text_file), dtype=dtype, **SMALL)
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(report.values())
        assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
        assert record["loaded_back"]["tokens"] == 16
        dense, _ = load_model(str(source))
        ids = torch.arange(8)[None]
        with torch.no_grad():
            before, after = (m.float()(ids).logits.log_softmax(-1) for m in (dense, model))
        assert (before - after).abs().mean() < 1.5  # half of the weights are gone, and no expert is random


class TestReadBack:
    @pytest.mark.parametrize("by_block", [True, False])
    def test_what_is_written_is_loaded_and_compared(self, by_block, folder, text_file, tmp_path):
        if not by_block:
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        record = prune(str(folder), tmp_path / "out", text=str(text_file), **SMALL)
        how = "read block by block" if by_block else "held in memory"
        assert record["model"]["weights"].startswith(how)
        assert record["loaded_back"]["model"] == "read block by block"
        assert record["loaded_back"]["difference"] < 1e-6

    @pytest.mark.parametrize("by_block", [True, False])
    @pytest.mark.parametrize("damage", ["weight", "name", "config"])
    def test_what_does_not_load_as_the_model_in_memory_is_not_kept(
        self, by_block, damage, folder, text_file, tmp_path, monkeypatch
    ):
        if not by_block:
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()

        def changed(tensors):
            head = tensors.pop("lm_head.weight")
            return {**tensors, "lm_head.weights" if damage == "name" else "lm_head.weight": head.flip(0)}

        sizes = Checkpoint.__init__.__globals__["_sizes"]

        def damaged(place, *others):  # called once all is written
            found = sizes(place, *others)
            if damage == "config":
                edit(place, rms_norm_eps=10.0)
            else:
                edit_tensors(place, changed)
            return found

        monkeypatch.setitem(Checkpoint.__init__.__globals__, "_sizes", damaged)
        with pytest.raises(CheckpointError, match=r"lm_head" if damage == "name" else "log-probabilities"):
            prune(str(folder), tmp_path / "out", text=str(text_file), **SMALL)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_a_file_that_somebody_writes_meanwhile_is_noticed(self, folder):
        decoder, _ = blocks(folder)
        with decoder.weights.of(0):
            pass
        edit_tensors(folder, lambda t: {name: weight + 1 for name, weight in t.items()})
        with pytest.raises(ModelError, match="has changed; start again"), decoder.weights.of(1):
            pass

    def test_what_transformers_cannot_write_is_a_sentence(self, folder, text_file, tmp_path, monkeypatch):
        def cannot(*_arguments, **_options):
            raise RuntimeError("tensors that are one\nare not declared")

        monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", cannot)
        with pytest.raises(ModelError, match="cannot write the model: tensors that are one are not declared"):
            prune(str(folder), tmp_path / "out", text=str(text_file), **SMALL)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
with open(os.environ["RAN"], "a") as file:
    file.write("ran")
class OwnConfig(LlamaConfig):
    model_type = "nobodys"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def bring_code(folder):
    """Make a model one that needs code of its own."""
    (folder / "own.py").write_text(CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit(folder, model_type="nobodys", architectures=["OwnForCausalLM"], auto_map=classes)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE + "def generate(*a, **k): pass\n")
    return folder


@pytest.fixture(scope="module")
def made(tiny_model, text_file, tmp_path_factory):
    """A calibration and a run with a model as everybody's, and one each that need code."""
    place = tmp_path_factory.mktemp("code")
    shutil.copytree(tiny_model, place / "model")
    own = bring_code(shutil.copytree(tiny_model, place / "own"))
    known = bring_code(shutil.copytree(tiny_model, place / "known"))
    edit(known, model_type="llama", architectures=["LlamaForCausalLM"])
    sizes = ("--tokens", 128, "--selection-tokens", 64, "--holdout-tokens", 64, "--sequence-length", 64)
    words = ("--text", text_file, "--device", "cpu", *sizes)
    done = in_process("calibrate", place / "model", *words, "--out", place / "cal")
    assert done.returncode == 0, done.stderr
    run = ("--sparsity", 0.5, "--budget", 12, "--device", "cpu", "--objectives", "kl,size")
    done = in_process("search", place / "cal", *run, "--out", place / "run")
    assert done.returncode == 0, done.stderr
    # The same, whose manifest says that code was allowed, and which brings some in its own copy.
    shutil.copytree(place / "cal", place / "owncal")
    shutil.copytree(own, place / "owncal" / "model")
    manifest = json.loads((place / "owncal" / "manifest.json").read_text())
    manifest["model"]["trust_remote_code"] = True
    for path in sorted((place / "owncal").rglob("model/**/*.*")):
        manifest["files"][path.relative_to(place / "owncal").as_posix()] = asdict(FileRecord.of(path))
    manifest["sha256"] = own_hash(manifest)
    (place / "owncal" / "manifest.json").write_text(json.dumps(manifest))
    return place


COMMANDS = {
    "plan": "plan own --gpus 1",
    "calibrate": "calibrate own --text TEXT --out new",
    "calibrate self": "calibrate own --out new",
    "prune": "prune own --text TEXT -o new",
    "evaluate": "evaluate own --text TEXT --window 64 --windows 1",
    "evaluate against": "evaluate model --against own --text TEXT --window 64 --windows 1",
    "measure model": "measure cal wanda --model own",
    "measure": "measure owncal wanda",
    "search model": "search cal --sparsity 0.5 --budget 4 --model own --out new",
    "search": "search owncal --sparsity 0.5 --budget 4 --out new",
    "resume model": "resume run --budget 16 --model own",
    "resume": "resume run --budget 16 --calibration owncal",
    "export": "export run best --to masks --model own -o new",
    "prune candidate": "prune own --candidate run:best --text TEXT -o new",
}


@contextlib.contextmanager
def answering_yes(monkeypatch):
    """Have standard input answer whatever is asked."""
    read, write = os.pipe()
    os.write(write, b"y\n" * 100)
    os.close(write)
    before = os.dup(0)
    os.dup2(read, 0)
    with os.fdopen(read) as answers:
        monkeypatch.setattr(sys, "stdin", answers)
        yield
    os.dup2(before, 0)
    os.close(before)


class TestForeignCode:
    """No load runs code that comes with a model, whatever is answered on standard input."""

    @pytest.mark.parametrize("name", COMMANDS)
    def test_it_is_refused_by_the_flags_name(self, name, made, text_file, monkeypatch):
        ran = made / "ran"
        monkeypatch.setenv("RAN", str(ran))
        monkeypatch.chdir(made)
        with answering_yes(monkeypatch):
            done = in_process(*COMMANDS[name].replace("TEXT", str(text_file)).split())
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert "--trust-remote-code" in line or name == "resume"  # whose folder is another than the run's
        assert not ran.exists()
        assert not (made / "new").exists()

    @pytest.mark.parametrize(
        "name", ["plan", "calibrate", "calibrate self", "prune", "evaluate", "measure model", "export"]
    )
    def test_what_lies_beside_a_model_that_transformers_knows_does_not_run(
        self, name, made, text_file, tmp_path, monkeypatch
    ):
        ran = made / "ran"
        monkeypatch.setenv("RAN", str(ran))
        monkeypatch.chdir(made)
        few = "--tokens 128 --selection-tokens 64 --holdout-tokens 64 --sequence-length 64"
        sizes = {"calibrate": few, "calibrate self": few, "prune": "--tokens 128 --sequence-length 64"}
        words = f"{COMMANDS[name]} {sizes.get(name, '')}".replace("TEXT", str(text_file))
        with answering_yes(monkeypatch):
            done = in_process(*words.replace("own", "known").replace("new", str(tmp_path / "new")).split())
        assert done.returncode in (0, 2), done.stderr
        assert not ran.exists()

    def test_a_worker_on_a_cluster_is_told_in_each_search(self, made, tmp_path, monkeypatch):
        from secateur.workers.cluster.actor import Actor

        monkeypatch.setenv("RAN", str(tmp_path / "ran"))
        for options in ({}, {"model": str(made / "own"), "trust_remote_code": False}):
            calibration = made / ("cal" if options else "owncal")
            with pytest.raises(SecateurError, match="--trust-remote-code"):
                Actor(str(calibration), options).prepare()
        assert not (tmp_path / "ran").exists()
        Actor(str(made / "cal"), {"model": str(made / "own"), "trust_remote_code": True}).prepare()
        assert (tmp_path / "ran").exists()

    def test_a_tokenizer_that_needs_code_is_refused_too(self, folder, tmp_path, monkeypatch):
        monkeypatch.setenv("RAN", str(tmp_path / "ran"))
        (folder / "own.py").write_text(CODE)
        path = folder / "tokenizer_config.json"
        own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
        with contextlib.suppress(ModelError):  # transformers may have a tokenizer of its own for the files
            load_model(str(folder))
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "name", ["attn_implementation", "_attn_implementation", "experts_implementation"]
    )
    @pytest.mark.parametrize("code", ["somebody/kernel", "flash_attention_2", {"": "somebody/kernel"}])
    def test_kernels_of_others_are_refused(self, name, code, folder):
        edit(folder, **{name: code})
        refused(folder, "--trust-remote-code")

    def test_with_the_flag_in_each_call_it_works(self, made, text_file, tmp_path, monkeypatch):
        monkeypatch.setenv("RAN", str(tmp_path / "ran"))
        flag = {"trust_remote_code": True}
        own = shutil.copytree(made / "own", tmp_path / "own")
        shutil.rmtree(own / "custom_generate")
        sizes = {"tokens": 128, "selection_tokens": 64, "holdout_tokens": 64, "sequence_length": 64}
        secateur.calibrate(own, tmp_path / "cal", text=str(text_file), device="cpu", **sizes, **flag)
        with pytest.raises(SecateurError, match="--trust-remote-code"):
            secateur.measure(tmp_path / "cal", "wanda")
        secateur.measure(tmp_path / "cal", "wanda", stage="layer", **flag)
        settings = {"sparsity": 0.5, "budget": 12, "objectives": "kl,size"}
        with pytest.raises(SecateurError, match="--trust-remote-code"):
            secateur.run_search(tmp_path / "cal", tmp_path / "run", **settings)
        run = secateur.run_search(tmp_path / "cal", tmp_path / "run", **settings, **flag)
        with pytest.raises(SecateurError, match="--trust-remote-code"):
            run.resume(budget=16)
        run.resume(budget=16, **flag)
        assert "trust" not in (tmp_path / "run" / "run.toml").read_text()
        with pytest.raises(SecateurError, match="--trust-remote-code"):
            run.export(to="masks", out=tmp_path / "masks")
        run.export(to="masks", out=tmp_path / "masks", **flag)
        record = secateur.prune(own, tmp_path / "out", text=str(text_file), **SMALL, **flag)
        assert record["loaded_back"]["difference"] < 1e-6
        assert (tmp_path / "ran").exists()


def test_threads_that_load_at_once_leave_the_process_as_it_was(tiny_model):
    def streams():
        return sys.stdout, sys.stderr, warnings.filters[:], warnings.showwarning

    before = streams()
    with ThreadPoolExecutor(4) as pool:
        for model, _ in pool.map(load_model, [str(tiny_model)] * 8):
            assert not model.training
    assert streams() == before


class TestPlaces:
    @pytest.mark.parametrize(
        "place", ["nowhere/", "./nowhere", "/nowhere/model", "a/b/c", "x.gguf", "~nosuchuser/model", "x\0y",
                  "with space", "http://127.0.0.1:9/x", "", "a" * 300, "\udcff"],
    )  # fmt: skip
    def test_what_is_not_there_is_called_missing(self, place, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for load in (load_model, lambda source: model_of_config(source, torch.float32)):
            with pytest.raises(ModelError, match=r"^expected .*, got "):
                load(place)

    def test_a_name_beside_a_folder_is_a_folder_that_is_missing(self, tmp_path, monkeypatch):
        (tmp_path / "models").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelError, match="got models/none: not found"):
            load_model("models/none")
        with pytest.raises(ModelError, match="there is no such folder here, and the model hub could not be"):
            load_model("others/none")

    def test_a_hub_that_does_not_answer_is_not_waited_for(self):
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
        start = time.monotonic()
        done = in_own_process("plan", "nobody/nothing", env=environment)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "there is no such folder here" in line
        assert time.monotonic() - start < 20  # most of it to start Python

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "anything"])
    def test_a_pipe_in_its_place_is_not_waited_for(self, name, folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        refused(folder, "pipe" if name != "config.json" else "config.json")

    def test_a_pipe_or_device_is_no_model(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for place in (tmp_path / "pipe", "/dev/null", "/dev/zero"):
            refused(place, "a pipe or device")

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "", "a/b", 3, None, []])
    def test_an_index_names_files_beside_it(self, name, folder):
        index = {"weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, "index.json")

    @pytest.mark.parametrize(
        "name", ["meta", "cuda:99", "mps", "xla", "nosuch", "cpu:7", "", "hpu", "cuda:-1"]
    )
    def test_a_device_that_is_not_here_is_refused(self, name):
        with pytest.raises(ModelError, match=r"expected (a|the) device"):
            choose_device(name)


WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=3), st.just([]), st.just({}),
    st.sampled_from([10**9, 2**31, 2**63, 10**30, -(10**9), "x", [1], {"a": 1}, [[]], "\x1b[31m"]),
)  # fmt: skip


class TestConfigurations:
    FIELDS = sorted(
        {*tiny_config().to_dict(), "quantization_config", "auto_map", "rope_scaling", "text_config",
         "num_experts", "vision_config", "transformers_weights", "attn_implementation", "torch_dtype",
         "n_layer"}
        - {"transformers_version", "_name_or_path"}
    )  # fmt: skip

    @settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        field=st.sampled_from(FIELDS), value=WRONG,
        inside=st.sampled_from([(), (), ("text_config",), ("rope_parameters",), ("text_config", "sub")]),
    )  # fmt: skip
    def test_whatever_stands_there_it_loads_or_is_refused_in_a_sentence(
        self, field, value, inside, tiny_model, tmp_path
    ):
        place = tmp_path / "model"
        shutil.copytree(tiny_model, place, dirs_exist_ok=True)
        for part in reversed(inside):
            field, value = part, {field: value}
        edit(place, **{field: value})
        start = time.monotonic()
        for load in (
            blocks,
            lambda source: load_model(str(source)),
            lambda s: model_of_config(str(s), torch.float32),
        ):
            try:
                load(place)
            except ModelError as error:
                sentence = str(error)
                assert sentence.isprintable(), sentence
                assert len(sentence) < 600
        assert time.monotonic() - start < 20

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("content", ["[]", "3", '{"a": 1, "a": 2}', "{", "\xff", "[" * 200000, '"x"', ""])
    def test_json_of_another_shape_is_refused_by_its_file(self, name, content, folder):
        (folder / name).write_bytes(content.encode("latin-1"))
        refused(folder, name)

    @pytest.mark.parametrize(
        "changes", [{"num_hidden_layers": 10**9}, {"n_layer": 5000}, {"hidden_size": 10**12},
                    {"vocab_size": 10**13}, {"text_config": {"num_hidden_layers": 10**9}},
                    {"num_labels": 10**9}, {"num_local_experts": 10**6}],
    )  # fmt: skip
    def test_sizes_beyond_all_models_are_refused_at_once(self, changes, folder):
        edit(folder, **changes)
        start = time.monotonic()
        refused(folder, "config.json")
        with pytest.raises(ModelError, match=r"config\.json"):
            model_of_config(str(folder), torch.float32)
        assert time.monotonic() - start < 5

    @pytest.mark.parametrize("name", ["return_dict", "output_attentions", "output_hidden_states"])
    def test_what_a_model_returns_is_not_for_it_to_say(self, name, folder, text_file, tmp_path):
        edit(folder, **{name: name != "return_dict"})
        for load in (blocks, lambda place: load_model(str(place))):
            load(folder)
        record = prune(str(folder), tmp_path / "out", text=str(text_file), **SMALL)
        assert record["loaded_back"]["difference"] < 1e-6

    def test_a_pickle_runs_nothing(self, folder, tmp_path):
        import pickle

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ModelError, match="transformers cannot load"):
            load_model(str(folder))
        torch.save(Evil(), folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match="transformers cannot load"):
            load_model(str(folder))
        assert not (tmp_path / "ran").exists()


def gguf(values=(), tensors=(), *, version=3, magic=b"GGUF", counts=None, data=b""):
    """Return the bytes of a file of values (name, kind, bytes) and tensors (name, sizes, type, offset)."""

    def text(name):
        return struct.pack("<Q", len(name)) + name.encode()

    header = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(values))))
    for name, kind, content in values:
        header += text(name) + struct.pack("<I", kind) + content
    for name, dimensions, kind, offset in tensors:
        header += text(name) + struct.pack("<I", len(dimensions))
        header += struct.pack(f"<{len(dimensions)}Q", *dimensions) + struct.pack("<IQ", kind, offset)
    return header + b"\0" * (-len(header) % 32) + data


FAMILY = ("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
BLOCKS = ("llama.block_count", 4, struct.pack("<I", 2))
WIDTH = ("llama.embedding_length", 4, struct.pack("<I", 32))
ALL = (FAMILY, BLOCKS, WIDTH)


class TestGguf:
    @pytest.mark.parametrize(
        ("content", "word"),
        [
            (b"", "gguf"), (b"GGUF", "ends within"), (gguf(ALL, magic=b"GGML"), "does not begin"),
            (gguf(ALL, version=1), "version"), (gguf(ALL, counts=(2**60, 3)), "promises"),
            (gguf(ALL, counts=(0, 2**60)), "promises"), (gguf([FAMILY]), "lacks llama.block_count"),
            (gguf([*ALL, ("x", 8, struct.pack("<Q", 2**62))]), "ends within"),
            (gguf([*ALL, ("x", 9, struct.pack("<IQ", 4, 2**40))]), "ends within"),
            (gguf([*ALL, ("x", 9, struct.pack("<IQ", 8, 2**40))]), "promises"),
            (gguf([*ALL, ("x", 9, struct.pack("<IQ", 9, 1))]), "list of values"),
            (gguf([*ALL, ("x", 99, b"")]), "unknown kind"),
            (gguf([FAMILY, WIDTH, ("llama.block_count", 10, struct.pack("<Q", 10**9))]), "blocks"),
            (gguf(ALL, [("t", (32, 10**9), 0, 0)], data=b"\0" * 64), "its tensors end at"),
            (gguf(ALL, [("t", (32,), 77, 0)], data=b"\0" * 64), "unknown type"),
            (gguf(ALL, [("t", (1,) * 9, 0, 0)]), "9 dimensions"),
            (gguf([*ALL, ("llama.rope.scaling.type", 8, struct.pack("<Q", 4) + b"yarn")]), r"\(yarn\)"),
        ],
    )  # fmt: skip
    def test_a_header_that_does_not_fit_its_file_is_refused(self, content, word, tmp_path):
        path = tmp_path / "x.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelError, match=word) as error:
            find_model(str(path))
        assert str(path) in str(error.value)

    def test_a_file_of_which_transformers_leaves_something_out_is_refused(self, tmp_path):
        path = tmp_path / "x.gguf"
        tensors = [("output.weight", (4, 8), 0, 0), ("rope_freqs.weight", (4,), 0, 128)]
        path.write_bytes(gguf(ALL, tensors, data=b"\0" * 160))
        check_all_read(torch.nn.Linear(6, 6, bias=False), path)
        with pytest.raises(ModelError, match=f"got {path}, where it leaves out 4 of 36 weights"):
            check_all_read(torch.nn.Linear(4, 8, bias=False), path)

    def test_a_file_cut_anywhere_is_refused(self, tmp_path):
        whole = gguf(ALL, [("t", (32,), 0, 0)], data=b"\0" * 128)
        path = tmp_path / "x.gguf"
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(ModelError):
                find_model(str(path))
        path.write_bytes(whole)
        assert find_model(str(path)).gguf == path
