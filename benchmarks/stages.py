"""What a candidate costs at each stage, beside the usual way and the machine's own limit.

    python benchmarks/stages.py runs/smollm2-calibration [cpu|cuda]

The usual way, once a candidate: all calibration tokens through the model for the activation norms, a
full sort of every row, then the perplexity. Both ways prune by Wanda and read the same tokens.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from secateur import PUBLISHED, Calibration, Decoder, Device, LocalEvaluator, uniform, weight_matrix


def best_of(times: int, work: Callable[[], object]) -> float:
    """Return the least seconds of some runs after one that warms up."""
    work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def machine(device: str) -> tuple[float, float]:
    """Return the measured limit: matrix product in FLOP/s, copying in bytes/s."""
    rows = 8192 if device == "cuda" else 2048
    a, b = torch.randn(rows, 1536, device=device), torch.randn(1536, 1536, device=device)
    product = best_of(5, lambda: _finish([a @ b for _ in range(10)])) / 10
    source, target = torch.randn(1 << 26, device=device), torch.empty(1 << 26, device=device)
    copy = best_of(5, lambda: _finish([target.copy_(source) for _ in range(10)])) / 10
    return 2 * rows * 1536 * 1536 / product, 2 * 4 * (1 << 26) / copy


def _finish(results: list[torch.Tensor]) -> None:
    if results[0].is_cuda:
        torch.cuda.synchronize()


@torch.no_grad()
def usual_way(decoder: Decoder, statistics: torch.Tensor, selection: torch.Tensor, ratio: float) -> float:
    """Prune by Wanda and return the perplexity, as published search code does for every trial."""
    statistics, selection = statistics.to(decoder.device), selection.to(decoder.device)
    norms = [torch.zeros(layer.columns, device=decoder.device) for layer in decoder.layers]

    def add(i: int, x: torch.Tensor) -> None:
        norms[i] += x.flatten(0, -2).square().sum(0)

    hooks = [
        m.register_forward_pre_hook(lambda _m, a, i=i: add(i, a[0])) for i, m in enumerate(decoder.modules)
    ]
    for sequence in statistics.split(1):
        decoder.model(input_ids=sequence)
    for hook in hooks:
        hook.remove()
    dense = [weight_matrix(module).clone() for module in decoder.modules]
    for norm, module in zip(norms, decoder.modules, strict=True):
        weights = weight_matrix(module)
        order = (weights.abs() * norm.sqrt()).sort(dim=1, stable=True).indices
        weights.scatter_(1, order[:, : int(weights.shape[1] * ratio)], 0.0)
    nll, count = 0.0, 0
    for sequence in selection.split(1):
        logits = decoder.model(input_ids=sequence).logits.log_softmax(-1)
        nll -= float(logits[:, :-1].gather(-1, sequence[:, 1:, None]).sum())
        count += sequence.numel() - 1
    for weights, module in zip(dense, decoder.modules, strict=True):
        weight_matrix(module).copy_(weights)
    return float(torch.tensor(nll / count).exp())


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return platform.machine()


def main() -> None:
    """Measure and print the table."""
    calibration = Calibration(sys.argv[1])
    device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    # Without reuse: the same candidate again would cost nothing.
    evaluator = LocalEvaluator(calibration, device=Device(device), reuse=False)
    layers = evaluator.layers
    flops, copying = machine(device)
    candidates = [uniform(p.expression, layers, 0.6) for p in PUBLISHED.values()]
    wanda = uniform(PUBLISHED["wanda"].expression, layers, 0.6)
    selection = calibration.tokens("selection")
    vocabulary = evaluator.worker.decoder.model.get_output_embeddings().weight
    # What cannot be avoided. Arithmetic: half a Gram product (H is symmetric), a forward pass. Bytes:
    # weights and Gram matrices read once a call, in 4 bytes each.
    held = evaluator.worker.shard.held
    gram_bytes = sum({h.gram.data_ptr(): 4 * h.gram.numel() for h in held}.values())
    sampled = [min(32, x.rows) for x in layers]
    forward = 2 * selection.numel() * (sum(x.size for x in layers) + vocabulary.numel())

    def form(rows: list[int]) -> int:
        return sum(r * x.columns * (x.columns + 192) for r, x in zip(rows, layers, strict=True))

    many = len(candidates)
    sampled_bytes = sum(4 * r * x.columns for r, x in zip(sampled, layers, strict=True))
    weight_bytes = sum(4 * x.size for x in layers)
    stages = {
        "screen": (
            best_of(3, lambda: evaluator.measure(candidates, "screen")) / many,
            form(sampled) / flops + (sampled_bytes + gram_bytes / many) / copying,
        ),
        "layer": (
            best_of(3, lambda: evaluator.measure([wanda], "layer")),
            form([x.rows for x in layers]) / flops + (weight_bytes + gram_bytes) / copying,
        ),
        "model": (
            best_of(3, lambda: evaluator.measure([wanda], "model")),
            forward / flops + (weight_bytes + 4 * vocabulary.numel()) / copying,
        ),
    }
    # Another ratio of a metric whose order is known: what a candidate of a ratio search costs.
    for ratio in (0.61, 0.62):
        evaluator.measure([uniform(wanda.metric, layers, ratio)], "model")
    again = iter([0.63, 0.64, 0.65, 0.66])
    stages["ratios"] = (
        best_of(3, lambda: evaluator.measure([uniform(wanda.metric, layers, next(again))], "model")),
        stages["model"][1],
    )
    searching = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device == "cuda":
        searching = torch.cuda.max_memory_reserved() / 2**30
    start = time.perf_counter()
    perplexity = usual_way(evaluator.worker.decoder, calibration.tokens("statistics"), selection, 0.6)
    usual = time.perf_counter() - start
    (measured,) = evaluator.measure([wanda], "model")
    print(
        f"{evaluator.accelerator or f'{_processor()}, {os.cpu_count()} cores'}, torch {torch.__version__}, "
        f"commit {_output('git', 'rev-parse', '--short', 'HEAD')}"
    )
    print(
        f"limit of the machine: {flops / 1e9:.0f} GFLOP/s in matrix products, {copying / 1e9:.1f} GB/s copied"
    )
    print(
        f"{len(layers)} layers, {sum(x.size for x in layers):,} weights, "
        f"{selection.numel()} selection tokens, float32\n"
    )
    print(f"{'stage':8} {'s/candidate':>12} {'per second':>11} {'share of limit':>15} {'x usual way':>12}")
    for name, (seconds, least) in stages.items():
        share = least / seconds
        print(f"{name:8} {seconds:12.3f} {1 / seconds:11.2f} {share:15.0%} {usual / seconds:11.1f}x")
    print(f"{'usual':8} {usual:12.3f} {1 / usual:11.2f}")
    print(
        f"\nperplexity of Wanda at 60 %: {perplexity:.3f} the usual way, "
        f"{measured.values['perplexity']:.3f} here"
    )
    print(f"peak memory while searching: {searching:.2f} GiB")
    help_seconds = best_of(5, lambda: _output(sys.executable, "-m", "secateur", "--help"))
    print(f"secateur --help: {help_seconds:.2f} s")
    evaluator.close()


if __name__ == "__main__":
    main()
