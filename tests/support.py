"""What several test files use: the command line in a process, small models, archives."""

import contextlib
import io
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import torch
from secateur.results.archive.archive import Archive
from secateur.testing import FakeEvaluator
from secateur.workers.calibrate.calibration import CalibrationRequest

__all__ = ["ROOT", "FakeEvaluator"]  # the latter is public and known from here too

ROOT = Path(__file__).resolve().parent.parent


def secateur(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "secateur", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def in_process(*arguments: object) -> subprocess.CompletedProcess:
    """Run the command line in this process: the same result without the seconds of a new one."""
    from secateur.cli.main import main

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["secateur", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def tiny_config(**changes):
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def save_model(config, folder: Path) -> Path:
    """Write a random model of a configuration, with a tokenizer that knows bytes."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.15)  # large enough that blocks do something
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer that knows bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )


def small_request(model: Path, text: object, **changes) -> CalibrationRequest:
    sizes = {"tokens": 512, "selection_tokens": 128, "holdout_tokens": 128, "sequence_length": 64}
    return CalibrationRequest(str(model), text=str(text), device="cpu", **{**sizes, **changes})


def count(folder, table="measurements"):
    """Rows of a table while the search writes it."""
    try:
        with closing(sqlite3.connect(f"file:{folder}/archive.sqlite?mode=ro", uri=True)) as db:
            return db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def wait_for(is_running, folder, rows):
    """Wait until a run has measured so much; whether it still runs then."""
    deadline = time.monotonic() + 120
    while count(folder) < rows and is_running():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return is_running()


def facts(folder):
    """Rows without their times."""
    return [
        (t.candidate, t.status, t.alias_of, t.measurement.stage, t.measurement.layer_errors,
         dict(t.measurement.values), t.measurement.failure, t.measurement.fingerprint, t.measurement.parts,
         t.measurement.tokens, t.measurement.sensitivities)
        for t in Archive(folder).trials()
    ]  # fmt: skip


def assert_same_facts(found, expected):
    """Two runs have the same rows; where not, say shortly which is the first that differs."""
    for number, (one, other) in enumerate(zip(found, expected, strict=False)):
        assert one == other, f"row {number} of {len(found)} differs"
    assert len(found) == len(expected), f"{len(found)} rows, {len(expected)} expected"
