"""Texts to calibrate on: what is read of which file, what parts share, what a model writes itself."""

import gzip
import json
import os
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
from secateur.workers.calibrate.calibration import CalibrationRequest, calibrate
from secateur.workers.calibrate.documents import TextError
from secateur.workers.calibrate.text import check_source, different, draw_sequences, read_text
from secateur.workers.model.load import load_model
from secateur.workers.prune.evaluation import EvaluationError, EvaluationRequest, evaluate
from support import ROOT, in_process, save_model, small_request, tiny_config

PROSE = (ROOT / "LICENSE").read_text(encoding="utf-8")
BOM = b"\xef\xbb\xbf"


def gz(content):
    """Compress without a time of day, so that one test has one name."""
    return gzip.compress(content, mtime=0)


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def column(values, kind=None):
    """Parquet with a column text."""
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.txt", "é\n\nö".encode(), "é\n\nö"),
        ("A.TXT", b"x", "x"),
        ("a.txt", BOM + b"x", "x"),
        ("a.txt.gz", gz(BOM + b"x"), "x"),
        ("a.Txt.GZ", gz(b"x") + gz(b"y"), "xy"),
        ("a.JSONL", BOM + lines("é", "y"), "é\n\ny"),
        ("a.jsonl.gz", gz(lines("x", None, "y")), "x\n\ny"),
        ("a.jsonl", b'\n{"text": null, "other": 3}\r\n  \n{"other": 3, "text": "x"}', "x"),
        ("a.Parquet", column(["x", None, "y"]), "x\n\ny"),
        ("a.parquet", column([None, None], "string"), ""),
        ("a.parquet", column(["x", "y", "x"], "large_string"), "x\n\ny\n\nx"),
        ("a.txt", b"", ""),
        ("a.jsonl.gz", b"", ""),
    ],
)
def test_what_is_read_of_a_file(name, content, found, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_text(str(tmp_path / name)) == found


def corrupt(content, place):
    return content[:place] + bytes(255 - byte for byte in content[place : place + 40]) + content[place + 40 :]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        *(
            ("a.jsonl", lines("x", None) + line, "in line 3 of")
            for line in (
                b'{"text": 5}', b'{"text": ["x"]}', b'{"text": NaN}', b"{}", b"[]", b"null", b'"x"', b"{",
                b"\0", b'{"text": "x", "text": "y"}', b'{"text": "\\ud800"}', b"[" * 100_000, b"9" * 5000,
            )
        ),
        ("a.jsonl", b'{"text": "\xff"}', "expected JSON lines in UTF-8"),
        ("a.txt", "é".encode("latin-1"), "expected text in UTF-8"),
        ("a.txt", "text".encode("utf-16"), "expected text in UTF-8"),
        ("a.txt.gz", gz(b"\xff"), "expected text in UTF-8"),
        ("a.txt.gz", b"text", "cannot be read as text: Not a gzipped file"),
        ("a.txt.gz", gz(b"text" * 999)[:-9], "cannot be read as text: Compressed file ended"),
        ("a.jsonl.gz", gz(lines("x"))[:-4], "cannot be read as JSON lines: Compressed file ended"),
        ("a.jsonl.gz", gz(lines("x"))[:-8] + b"12345678", "cannot be read as JSON lines: CRC"),
        ("a.txt.gz", corrupt(gz((bytes(range(256)) * 4).hex().encode()), 99), "cannot be read as text: "),
        ("a.parquet", column([1, 2]), r'expected texts in the column "text", got int64'),
        ("a.parquet", column([b"x"]), r'expected texts in the column "text", got binary'),
        ("a.parquet", column([{"a": "x"}]), r'expected texts in the column "text", got struct'),
        ("a.parquet", b"", "cannot be read as Parquet"),
        ("a.parquet", column([PROSE])[:-5], "cannot be read as Parquet"),
        ("a.parquet", corrupt(column([PROSE]), 2000), "cannot be read as Parquet"),
        ("a.gz", gz(b"x"), r"ending in \.txt, \.txt\.gz, \.jsonl"),
    ],
)  # fmt: skip
def test_what_is_not_text_is_refused(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=says) as caught:
        read_text(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_no_device_is_waited_for(name, tmp_path):
    path = tmp_path / name
    for make, says in (
        (os.mkfifo, "which is no file"), (os.mkdir, "got the folder"),
        (lambda p: p.symlink_to("/dev/zero"), "which is no file"), (lambda p: p.symlink_to(p), "not found"),
    ):  # fmt: skip
        make(path)
        for reader in (read_text, check_source):
            with pytest.raises(TextError, match=says):
                reader(str(path))
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", ["~nosuchuser/a.txt", "~nosuchuser", "a\0.txt", "\0"])
def test_a_path_that_leads_nowhere_is_refused(name):
    with pytest.raises(TextError, match=r"whose home folder nobody knows|a character of the code 0"):
        read_text(name)


def test_a_packed_file_is_looked_at_to_its_end_however_little_is_needed(tmp_path):
    packed = gz(lines(*["some text"] * 50_000))
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    assert read_text(str(tmp_path / "a.jsonl.gz"), 20) == "\n\n".join(["some text"] * 3)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(TextError, match="ended before the end-of-stream marker"):
        read_text(str(tmp_path / "a.jsonl.gz"), 20)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("filling", [b" ", b"\n"])
def test_a_file_that_unpacks_to_far_more_than_text_does_is_refused_before_memory_is_taken(
    name, filling, tmp_path, monkeypatch
):
    from secateur.workers.calibrate import documents

    monkeypatch.setattr(documents, "_UNPACKED", 1 << 18)
    monkeypatch.setattr(documents, "_LONGEST_LINE", 1 << 18)
    (tmp_path / name).write_bytes(gz(filling * (1 << 22)))  # to a thousandth
    tracemalloc.start()
    with pytest.raises(TextError, match=r"far more than text does|lines of less than|another in line 1 of"):
        read_text(str(tmp_path / name))
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(str(tiny_model))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


class Reader:
    """A tokenizer that gives some ids for any text, or fails."""

    all_special_ids = ()

    def __init__(self, *ids):
        self.ids = list(ids)

    def __len__(self):
        return len(self.ids)

    def __call__(self, text, **_options):
        return {"input_ids": (self.ids or [][0]) * 1000}


class TestTokenizersOfAnotherModel:
    @pytest.mark.parametrize("wrong", [260, 2**31, 2**70, -1])
    def test_ids_that_the_model_does_not_know_are_refused(self, wrong, model, text_file):
        with pytest.raises(TextError, match="expected token ids below 260, which the model knows, got"):
            draw_sequences(str(text_file), model[0], Reader(5, wrong), 4, 64, seed=0)

    def test_one_that_cannot_read_is_said_to(self, model, text_file):
        with pytest.raises(TextError, match=r"the model's tokenizer cannot read .*: list index out of range"):
            draw_sequences(str(text_file), model[0], Reader(), 4, 64, seed=0)

    def test_one_without_tokens_has_none_to_begin_with(self, model):
        with pytest.raises(TextError, match="expected a tokenizer with ordinary tokens"):
            draw_sequences("self", model[0], Reader(), 4, 64, seed=0)

    def test_a_model_is_compared_with_one_that_knows_the_same_tokens(self, tiny_model, text_file, tmp_path):
        other = save_model(tiny_config(vocab_size=300), tmp_path / "other")
        sizes = {"text": str(text_file), "window": 64, "windows": 1, "device": "cpu"}
        with pytest.raises(EvaluationError, match="expected a dense model with the vocabulary of"):
            evaluate(EvaluationRequest(str(other), against=str(tiny_model), **sizes))


class TestWindows:
    @pytest.mark.parametrize("length", [8, 16, 17, 24, 64, 100])
    @pytest.mark.parametrize(
        "phrase", ["x", "The cat sat. ", "abcdefghijklmnopqrstuvwxyz0123456789!?", PROSE[:150]]
    )
    def test_a_phrase_said_again_and_again_has_no_windows_to_divide(self, phrase, length, model, tmp_path):
        text = write(tmp_path / "a.txt", phrase * (20_000 // len(phrase)))
        with pytest.raises(
            TextError, match=r"sequences of \d+ tokens of different text, got \d+, which the other"
        ):
            draw_sequences(text, *model, 120, length, seed=0)

    def test_windows_of_ordinary_text_are_the_first_of_a_random_order(self, model, tmp_path):
        text = write(tmp_path / "a.txt", PROSE)
        ids = torch.tensor(model[1](PROSE, add_special_tokens=False)["input_ids"])
        windows = ids[: len(ids) // 64 * 64].reshape(-1, 64)
        for seed in range(3):
            order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
            assert torch.equal(draw_sequences(text, *model, 100, 64, seed), windows[order[:100]])

    @pytest.mark.parametrize(("shift", "got"), [(2, 1), (13, 1), (32, 2), (50, 1)])  # hundreds
    def test_no_window_has_most_of_its_text_in_others_where_all_of_it_stands_twice(
        self, shift, got, model, tmp_path
    ):
        text = write(tmp_path / "a.txt", f"{PROSE}{'-' * ((64 + shift - len(PROSE)) % 64)}{PROSE}")
        drawn = draw_sequences(text, *model, 150, 64, seed=0)
        runs = [{tuple(row[i : i + 16]) for i in range(49)} for row in drawn.tolist()]
        before = [set().union(*runs[:i]) for i in range(len(runs))]
        assert max(len(one & seen) for one, seen in zip(runs, before, strict=True)) <= 33
        with pytest.raises(TextError, match=rf"350 sequences of 64 tokens of different text, got {got}\d\d,"):
            draw_sequences(text, *model, 350, 64, seed=0)

    def test_more_windows_begin_with_those_of_fewer(self, model, text_file):
        many, few = (draw_sequences(str(text_file), *model, n, 64, seed=3) for n in (40, 7))
        assert torch.equal(many[:7], few)

    def test_equal_windows_count_once(self):
        windows = torch.arange(80).reshape(10, 8)
        twice = torch.cat([windows, windows])[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
        assert sorted(different(twice, 20).tolist()) == windows.tolist()

    def test_looking_for_them_takes_a_moment(self):
        windows = torch.randint(50_000, (2000, 512), generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        assert torch.equal(different(windows, 2000), windows)
        assert time.perf_counter() - start < 10

    def test_a_calibration_on_a_phrase_leaves_nothing(self, tiny_model, tmp_path):
        text = write(tmp_path / "a.txt", "All work and no play makes Jack a dull boy. " * 200)
        with pytest.raises(TextError, match="of different text"):
            calibrate(small_request(tiny_model, text), tmp_path / "c")
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


HOSTILE = {  # what a generation_config.json may say
    "repetition_penalty": 9.0, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "typical_p": 0.2,
    "num_beams": 3,
    "no_repeat_ngram_size": 2, "bad_words_ids": [[65], [66, 67]], "forced_eos_token_id": 5,
    "forced_bos_token_id": 6, "begin_suppress_tokens": [70], "suppress_tokens": list(range(30, 200)),
    "eos_token_id": [40, 41, 42], "num_return_sequences": 2, "min_length": 3, "max_length": 5,
    "do_sample": False, "cache_implementation": "static", "use_cache": False, "min_p": 0.5, "max_time": 0.001,
    "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "exponential_decay_length_penalty": [2, 3.0],
    "sequence_bias": [[[65], 50.0]], "guidance_scale": 3.0, "renormalize_logits": True,
    "remove_invalid_values": True, "encoder_repetition_penalty": 2.0, "length_penalty": 3.0,
    "watermarking_config": {"bias": 9.0}, "prompt_lookup_num_tokens": 3, "stop_strings": ["e"],
    "return_dict_in_generate": True, "output_scores": True, "pad_token_id": 7, "diversity_penalty": 1.0,
    "num_assistant_tokens": 4, "top_h": 0.1, "low_memory": True, "is_assistant": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def plainly(model):
    return draw_sequences("self", *model, 5, 24, seed=4)


class TestOwnText:
    @pytest.mark.parametrize("setting", HOSTILE)
    def test_no_generation_setting_of_the_model_has_a_say(self, setting, model, plainly):
        decoder, tokenizer = model
        before = decoder.generation_config
        decoder.generation_config = type(before)(**{"do_sample": True, setting: HOSTILE[setting]})
        own = decoder.generation_config
        try:
            assert torch.equal(draw_sequences("self", decoder, tokenizer, 5, 24, seed=4), plainly)
            assert decoder.generation_config is own
        finally:
            decoder.generation_config = before

    def test_nor_has_a_file_of_them(self, tiny_model, tmp_path, plainly):
        import shutil

        shutil.copytree(tiny_model, tmp_path / "model")
        names = ("repetition_penalty", "temperature", "top_k", "bad_words_ids", "eos_token_id", "max_length")
        wild = {"do_sample": True, **{name: HOSTILE[name] for name in names}}
        write(tmp_path / "model" / "generation_config.json", json.dumps(wild))
        wild_model = load_model(str(tmp_path / "model"))
        assert wild_model[0].generation_config.repetition_penalty == 9.0
        assert torch.equal(draw_sequences("self", *wild_model, 5, 24, seed=4), plainly)

    def test_the_ends_of_texts_by_the_models_configuration_are_not_written(self, tmp_path):
        ends = list(range(0, 250))
        wordy = load_model(str(save_model(tiny_config(eos_token_id=ends), tmp_path / "model")))
        written = draw_sequences("self", *wordy, 5, 24, seed=4)
        assert not set(written[:, 1:].flatten().tolist()) & set(ends)

    def test_a_model_that_writes_one_text_again_and_again_is_refused(self, tiny_model):
        decoder, tokenizer = load_model(str(tiny_model))
        for parameter in decoder.parameters():
            parameter.zero_()
        decoder.lm_head = torch.nn.Linear(32, 260)
        torch.nn.init.zeros_(decoder.lm_head.weight)
        decoder.lm_head.bias.data.zero_()[65] = 1e4
        with pytest.raises(TextError, match="different sequences of 8 tokens from the model, which"):
            draw_sequences("self", decoder, tokenizer, 300, 8, seed=0)


class TestAbsurdRequests:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens": 10**12}, "at least 1 token of statistics and at most 100,000,000"),
            ({"selection_tokens": 10**30}, "at least 1 token of selection and at most 100,000,000"),
            ({"sequence_length": 10**9}, "sequences of at least 8 tokens and at most 16,777,216"),
        ],
    )
    def test_are_refused_before_anything_is_loaded(self, changes, message):
        with pytest.raises(ValueError, match=rf"^expected {message}, got {max(changes.values())}$"):
            CalibrationRequest("no-model", **changes)

    def test_of_the_command_line_too(self, tmp_path, tiny_model):
        done = in_process("calibrate", tiny_model, "--out", tmp_path / "c", "--tokens", "1" + "0" * 40)
        assert done.returncode == 2
        assert done.stderr.startswith(
            "secateur: expected at least 1 token of statistics and at most 100,000,000, got 1"
        )
        assert done.stderr.count("\n") == 1

    def test_a_text_that_is_not_there_is_said_before_a_model_is_loaded(self, tmp_path):
        with pytest.raises(TextError, match=r"nowhere\.txt: not found"):
            calibrate(small_request(tmp_path / "no-model", tmp_path / "nowhere.txt"), tmp_path / "c")
        with pytest.raises(TextError, match=r"nowhere\.txt: not found"):
            evaluate(EvaluationRequest(str(tmp_path / "no-model"), text=str(tmp_path / "nowhere.txt")))


SEVERAL = """
import sys
from secateur.cli.main import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["secateur", *line.split()]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
"""


def test_all_files_are_utf8_whatever_the_locale(tiny_model, tmp_path):
    write(tmp_path / "a.txt", f"Straße, naïveté, 漢字 and 😀. {PROSE}")
    commands = (
        f"calibrate {tiny_model} --text a.txt --tokens 128 --selection-tokens 64 --holdout-tokens 64 "
        "--sequence-length 64 --out cal",
        "search cal --sparsity 0.5 --budget 12 --threads 1 --out run",
        "report run -o report.html",
        *(f"export run best --to {kind} -o out.{kind}" for kind in ("json", "latex", "python", "text")),
        "export run --to csv -o out.csv",
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL], input="\n".join(commands), cwd=tmp_path, env={**os.environ, **plain},
        capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    places = [place for place in tmp_path.rglob("*") if place.is_file()]
    written = [p for p in places if p.suffix != ".safetensors" and not p.name.startswith("archive.sqlite")]
    assert len(written) > 8
    for path in written:
        path.read_bytes().decode("utf-8")
    assert not (tmp_path / "report.html").read_text(encoding="utf-8").isascii()
