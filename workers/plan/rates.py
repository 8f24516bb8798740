"""Rates: how fast a machine does what measuring a candidate is made of."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.order import order_form
from ...metrics_dsl.published import PUBLISHED
from ...metrics_dsl.score import Scorer
from ...search.core.candidate import Layer, uniform
from ..calibrate.folder import LayerStatistics
from ..calibrate.gram import quadratic_form
from ..measure.masks import packed, ranks, removed
from ..measure.shard import SCREEN_ROWS, HeldLayer, layers_at_a_time

# Rows and columns of what is measured; other layers are assumed to run as fast. On a GPU small ones do not:
# they take what their launches take, which count by themselves.
_SMALLEST = {"cpu": 1, "cuda": 2048}
_LARGEST = {"cpu": 2048, "cuda": 1 << 14}
_REPEATS = 5


class RateError(SecateurError):
    """A GPU whose rates are not known."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, all its cores together.

    Attributes:
        source: Where the numbers come from.
        products: Operations of matrix products in the type of the weights, two a multiplication.
        forms: The same of errors over all rows, in 32-bit floats.
        thin_forms: The same of errors over the rows that the screen samples.
        copied: Bytes that elementwise work reads and writes.
        scored: Weights scored, by Wanda's metric.
        selected: Weights among which those to remove are found.
        ordered: Weights put in order.
        digested: Weights whose mask is hashed.
        calls: Layers measured whose size is next to nothing: what calls cost and, on a GPU, launches.
    """

    source: str
    products: float
    forms: float
    thin_forms: float
    copied: float
    scored: float
    selected: float
    ordered: float
    digested: float
    calls: float


# Datasheets: TFLOP/s in 32 bits and in bfloat16 without sparsity, memory in GB/s and in GiB.
GPUS: dict[str, tuple[float, float, float, int]] = {
    "a100": (19.5, 312, 2039, 80),
    "h100": (67, 989, 3350, 80),
    "h200": (67, 989, 4800, 140),
    "l4": (30.3, 121, 300, 22),
    "l40s": (91.6, 362, 864, 45),
    "rtx4090": (82.6, 165, 1008, 24),
}
PRODUCT_EFFICIENCY, MEMORY_EFFICIENCY = 0.5, 0.7
# Bytes per weight: reads and writes of the kernels involved. Hashing is limited by the way to the host and
# the host itself, and a layer's kernels by their launches. All but the first were set by an H200.
_BYTES_SCORED, _BYTES_SELECTED, _BYTES_ORDERED = 24, 94, 270
_DIGESTED, _CALLS = 3.5e9, 1500.0


def rates_of(gpu: str, dtype: str) -> Rates:
    """Return the rates of a GPU from its datasheet, times what programs reach of it.

    Raises:
        RateError: When it is not in the table.
    """
    if gpu not in GPUS:
        raise RateError(f"expected a GPU among {', '.join(GPUS)}, got {gpu!r}")
    single, half, memory, _ = GPUS[gpu]
    products = 1e12 * PRODUCT_EFFICIENCY
    copied = 1e9 * memory * MEMORY_EFFICIENCY
    # Of few rows a product reads its matrix for little arithmetic.
    thin = min(products * single, copied / 4 * 2 * SCREEN_ROWS)
    return Rates(
        f"not measured: datasheet of the {gpu}, of which {PRODUCT_EFFICIENCY:.0%} of the arithmetic and "
        f"{MEMORY_EFFICIENCY:.0%} of the memory are assumed to be reached",
        products * (single if dtype == "float32" else half), products * single, thin, copied,
        copied / _BYTES_SCORED, copied / _BYTES_SELECTED, copied / _BYTES_ORDERED, _DIGESTED, _CALLS,
    )  # fmt: skip


@torch.no_grad()
def measure_rates(layers: Sequence[Layer], device: torch.device, dtype: str, threads: int = 0) -> Rates:
    """Return the rates of this machine on layers of a model's shapes, in a few seconds.

    Args:
        layers: The model's layers; each shape is measured once and counts for all that have it.
        device: Where to measure.
        dtype: ``float32`` or ``bfloat16``.
        threads: CPU threads; 0 for all cores.
    """
    if threads:
        torch.set_num_threads(threads)
    workers = layers_at_a_time(device.type, threads)
    tiny = _tiny_layer(device)
    wanda = uniform(PUBLISHED["wanda"].expression, [tiny.layer], 0.6)
    done: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:

        def each(work: Callable[[], object]) -> float:
            """Return the seconds that a piece of work costs when every thread does some."""
            return _least(lambda: list(pool.map(lambda _: work(), range(workers))), device) / workers

        for (rows, columns), count in Counter((x.rows, x.columns) for x in layers).items():
            for name, (amount, seconds) in _measured(rows, columns, device, dtype, each).items():
                done[name] += count * amount  # type: ignore[assignment]
                taken[name] += count * seconds  # type: ignore[assignment]
        calls = 1 / each(lambda: tiny.results([wanda], "unstructured", all_rows=False))
    found = {name: done[name] / taken[name] for name in done}
    return Rates(f"measured on this machine's {device.type}", calls=calls, **found)


def _measured(
    rows: int, columns: int, device: torch.device, dtype: str, each: Callable[[Callable[[], object]], float]
) -> dict[str, tuple[float, float]]:
    """Return how much of each kind of work a layer of a shape is, and the seconds it takes."""
    whole = rows * columns
    rows, columns = (max(_SMALLEST[device.type], min(n, _LARGEST[device.type])) for n in (rows, columns))
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    weights, gram = torch.randn(rows, columns, device=device), torch.randn(columns, columns, device=device)
    few, inputs = weights[:SCREEN_ROWS], torch.randn(1024, columns, device=device).to(kind)
    stored, norms = weights.to(kind).T, torch.rand(1, columns, device=device)
    scores = weights.abs() * norms
    mask = removed(scores, 0.6, "row")
    form = order_form(PUBLISHED["wanda"].expression, "row")
    size = weights.numel()
    operations = quadratic_operations(rows, columns, columns, device.type)

    def score() -> None:
        torch.aminmax(Scorer({"W": weights, "X": norms}).score(form))

    def digest() -> None:
        hashlib.blake2b(packed(mask), digest_size=16).digest()
        mask.count_nonzero()

    found = {
        "products": (2 * 1024 * size, _least(lambda: inputs @ stored, device)),
        "forms": (operations, each(lambda: quadratic_form(weights, gram))),
        "thin_forms": (operations * len(few) / rows, each(lambda: quadratic_form(few, gram))),
        "copied": (9 * size, each(lambda: weights * ~mask)),
        "scored": (size, each(score)),
        "selected": (size, each(lambda: removed(scores, 0.6, "row"))),
        "ordered": (size, each(lambda: ranks(scores, "row"))),
        "digested": (size, each(digest)),
    }
    # A layer of another size than what was measured counts as so many of it.
    return {name: (n * whole / size, seconds * whole / size) for name, (n, seconds) in found.items()}


def quadratic_operations(rows: int, columns: int, kept: int, device: str) -> int:
    """Return the operations of a layer's error, from Gram matrix (``kept`` is ``columns``) or tokens."""
    if kept < columns:
        return 2 * rows * kept * columns
    return rows * columns * (columns + min(columns, 192 if device == "cpu" else 2048))


def _tiny_layer(device: torch.device) -> HeldLayer:
    layer = Layer("tiny", 0, "tiny", SCREEN_ROWS, 16)
    leaves = {"X": torch.ones(1, 16, device=device)}
    energy = torch.ones(SCREEN_ROWS, dtype=torch.float64, device=device)
    statistics = LayerStatistics(torch.eye(16, device=device), energy, leaves)
    return HeldLayer(0, layer, torch.randn(SCREEN_ROWS, 16, device=device), statistics, SCREEN_ROWS)


def _least(work: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of some runs after one that warms up."""
    found = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])
