"""Tools that read our exports, run for real: each in an environment of its own, made on first use."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing

import pytest
from exported import make_run
from safetensors.torch import load_file, save_file
from secateur.metrics_dsl.parser import parse
from secateur.results.export.candidate_record import CandidateRecord
from secateur.results.export.exporters import export
from secateur.results.export.llm_compressor import TRIED, write_llm_compressor
from secateur.search.core.candidate import Candidate
from secateur.workers.measure.local_evaluator import LocalEvaluator
from support import ROOT

pytestmark = pytest.mark.consumer

# What the modifier can compute, all of it.
METRIC = "abs(W) * (X + 0.5 * sqrt(V) + abs(M)) / sqrt(D) / row_sum(abs(W)) + 0.01 * abs(W) * Y"


def environment(name, *requirements):
    """The Python of a virtual environment under .cache with these requirements."""
    folder = ROOT / ".cache" / f"{name}-venv"
    python, done = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(requirements)
    if not (done.is_file() and done.read_text() == wanted):
        if os.environ.get("SECATEUR_OFFLINE") == "1":
            pytest.skip(f"SECATEUR_OFFLINE=1, and {folder} has not been made")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for requirement in requirements:  # one by one: the first says which torch the others find
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
            subprocess.run(pip, check=True, env=clean())
        done.write_text(wanted)
    return python


def clean(**more):
    """Our environment without what would let secateur be imported, and without a hub."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1", **more}


@pytest.fixture(scope="module")
def llm_compressor():
    return environment("llmcompressor", "torch==2.13.0", f"llmcompressor=={TRIED}")


@pytest.fixture(scope="module")
def optuna_dashboard():
    return environment("optuna-dashboard", "optuna-dashboard")


ONESHOT = """
import importlib.util, os, sys
from pathlib import Path
import datasets, torch
from llmcompressor import oneshot
from safetensors.torch import load_file, save_file

model, work = sys.argv[1], Path(sys.argv[2])
rows = load_file(work / "tokens.safetensors")["ids"].tolist()
data = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
for folder in sorted(work.glob("*/recipe.yaml")):
    os.chdir(folder.parent)
    if Path("modifier.py").is_file():
        spec = importlib.util.spec_from_file_location("modifier", "modifier.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    pruned = oneshot(
        model=model, dataset=data, recipe="recipe.yaml", num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]), shuffle_calibration_samples=False, pipeline="basic", output_dir="pruned",
    )
    kept = {name: (m.weight != 0) for name, m in pruned.named_modules() if isinstance(m, torch.nn.Linear)}
    save_file(kept, "kept.safetensors")
"""


def test_llm_compressor_prunes_by_our_recipes(llm_compressor, tiny_calibration, tiny_model, tmp_path):
    """Each recipe through oneshot on the tokens of our statistics: the same zeros, layer by layer."""
    layers = tuple(tiny_calibration.layers)
    uneven = tuple(0.2 + 0.6 * i / (len(layers) - 1) for i in range(len(layers)))
    half = (0.5,) * len(layers)
    records = {
        "wanda": CandidateRecord(Candidate(parse("abs(W) * X"), uneven), layers),
        "searched": CandidateRecord(Candidate(parse(METRIC), uneven), layers),
        "layerwise": CandidateRecord(Candidate(parse("abs(W) * X**1.2"), uneven, "layer"), layers),
        "wanda-2-4": CandidateRecord(Candidate(parse("abs(W) * X"), half), layers, "2:4"),
        "searched-1-4": CandidateRecord(Candidate(parse("abs(W) * V"), (0.25,) * len(layers)), layers, "1:4"),
    }
    for name, record in records.items():
        write_llm_compressor(record, tmp_path / name)
        assert (tmp_path / name / "modifier.py").is_file() == ("wanda" not in name)
    save_file({"ids": tiny_calibration.tokens("statistics")}, tmp_path / "tokens.safetensors")
    command = [llm_compressor, "-c", ONESHOT, tiny_model, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=clean(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for name, record in records.items():
        kept = load_file(tmp_path / name / "kept.safetensors")
        zeros = tuple(int((~kept[layer.name]).sum()) for layer in layers)
        assert zeros == record.removed, name
        assert bool(kept["lm_head"].all())
        evaluator = LocalEvaluator(tiny_calibration, pattern=record.pattern)
        ours = dict(evaluator.masks(record.candidate))
        evaluator.close()
        same = sum(int((ours[layer.name] == kept[layer.name]).sum()) for layer in layers)
        total = sum(layer.size for layer in layers)
        print(
            f"{name}: {sum(zeros) / total:.2%} zeros in llm-compressor, {same / total:.3%} of masks as ours"
        )
        assert same / total > 0.999, name
        assert json.loads((tmp_path / name / "sparsity.json").read_text()) == {
            layer.name: ratio for layer, ratio in zip(layers, record.candidate.ratios, strict=True)
        }
    saved = load_file(tmp_path / "wanda" / "pruned" / "model.safetensors")
    assert int((saved[f"{layers[0].name}.weight"] == 0).sum()) == records["wanda"].removed[0]


def test_optuna_dashboard_lists_our_trials(optuna_dashboard, tmp_path):
    trials = make_run(tmp_path / "run")
    export(tmp_path / "run", to="optuna", out=tmp_path / "run.log")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        optuna_dashboard.with_name("optuna-dashboard"), tmp_path / "run.log",
        "--host", "127.0.0.1", "--port", str(port), "--server", "wsgiref",
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean())
    try:
        assert get(port, "/dashboard/").startswith(b"<!DOCTYPE html>")
        (study,) = json.loads(get(port, "/api/studies"))["study_summaries"]
        assert study["study_name"] == "run"
        found = json.loads(get(port, f"/api/studies/{study['study_id']}"))
    finally:
        server.terminate()
        server.wait(20)
    print([(t["number"], t["state"], t.get("values")) for t in found["trials"]])
    assert found["objective_names"] == ["kl", "size"]
    assert [trial["state"] for trial in found["trials"]] == ["Complete"] * 5 + ["Pruned", "Fail"]
    attributes = {a["key"]: a["value"] for a in found["trials"][0]["user_attrs"]}
    assert attributes["key"] == trials[0].candidate.key
    assert attributes["metric"] == "abs(W) * X"


def get(port, path):
    """What a server answers with 200, once it is there."""
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
                assert answer.status == 200
                return answer.read()
        except ConnectionError:
            time.sleep(0.2)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.2)
    raise AssertionError("the server did not start")
