"""The contract of exporters, one check a promise, on a small made-up run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..metrics_dsl.parser import parse
from ..results.archive.archive import Archive
from ..results.export.candidate_record import find
from ..results.export.exporters import EXPORTERS, Exporter
from ..search.core.candidate import Candidate, Layer, Measurement, Status, Trial, uniform
from ..search.core.objectives import look_up
from ..search.core.scratch import scratch
from .expecting import expect
from .fake import LAYERS


def small_run(folder: Path, layers: Sequence[Layer] = LAYERS) -> list[Trial]:
    """Write a run with measured, alias, rejected and failed rows; its best one has uneven ratios."""
    ratios = tuple(0.25 + 0.5 * i / (len(layers) - 1) for i in range(len(layers)))
    best = Candidate(parse("abs(W) * X"), ratios)

    def trial(text: str, kl: float, status: Status = "measured", alias_of: str = "") -> Trial:
        candidate = uniform(parse(text), layers, 0.5)
        found = Measurement("model", (), {"kl": kl, "sparsity": 0.5}, 1.5)
        return Trial(candidate, found, status, alias_of)

    screened = Measurement("screen", (), {"layer_error": 3.0, "sparsity": 0.5})
    trials = [
        Trial(best, Measurement("model", (), {"kl": 0.5, "sparsity": 0.5}, 2.0, tokens=100), "measured"),
        trial("abs(W)", 2.0),
        trial("2 * abs(W)", 2.0, "alias", alias_of=trial("abs(W)", 2.0).candidate.key),
        trial("abs(W) * V", 0.75),
        trial("square(W) * X**1.2 * G", 0.75),
        Trial(uniform(parse("W"), layers, 0.5), screened, "rejected"),
        Trial(uniform(parse("exp(W)"), layers, 0.5), Measurement("screen", failure="not finite"), "failed"),
    ]
    with Archive(folder, write=True) as archive:
        archive.keep(
            objectives=["kl", "size"], baselines={best.key: "wanda"}, pattern="unstructured",
            layers=[asdict(layer) for layer in layers], calibration="c" * 64, versions={"torch": "2"},
        )  # fmt: skip
        archive.add(trials)
    return trials


def some_masks(layers: Sequence[Layer] = LAYERS) -> list[tuple[str, Any]]:
    """Return random masks of some layers, as exporters of masks are given them."""
    import torch

    draw = torch.Generator().manual_seed(0)
    return [(layer.name, torch.rand(layer.rows, layer.columns, generator=draw) > 0.4) for layer in layers]


@contextmanager
def _written(exporter: Exporter) -> Iterator[Path]:
    """Give what an exporter writes of a small run, alone in its folder."""
    with scratch() as place:
        run, out = place / "run", place / "written" / "out"
        out.parent.mkdir()
        small_run(run)
        with Archive(run) as archive:
            if exporter.subject == "run":
                exporter.write(archive, out)
            elif exporter.subject == "masks":
                exporter.write(find(archive, "best"), some_masks(), out)
            else:
                exporter.write(find(archive, "best"), out)
        yield out


def _description(exporter: Exporter) -> None:
    """Its row says what it writes, in a few words that a help text can show."""
    expect(
        20 < len(exporter.meaning) < 110, f"expected a meaning of 20 to 110 characters: {exporter.meaning!r}"
    )
    expect(
        not exporter.meaning.endswith("."), f"expected a meaning without a full stop: {exporter.meaning!r}"
    )
    expect(exporter.suffix[:1] in ("", "."), f"expected a suffix such as .txt, got {exporter.suffix!r}")


def _place(exporter: Exporter) -> None:
    """It writes what its suffix says where it is told to, and nothing else."""
    with _written(exporter) as out:
        there = [path.name for path in out.parent.iterdir()]
        expect(there == ["out"], f"expected {exporter.name} to write what it was told, got {there}")
        kind = "a folder" if exporter.suffix == "" else "a file"
        expect(out.is_dir() == (exporter.suffix == ""), f"expected {exporter.name} to write {kind}")
        files = [out] if out.is_file() else list(out.iterdir())
        expect(
            files and all(path.stat().st_size for path in files),
            f"expected {exporter.name} to write something",
        )


def _repeatability(exporter: Exporter) -> None:
    """It writes the same bytes again."""
    with _written(exporter) as one, _written(exporter) as two:
        names = [sorted(p.relative_to(out) for p in out.rglob("*")) or [Path()] for out in (one, two)]
        same = names[0] == names[1] and all(
            (one / n).is_dir() or (one / n).read_bytes() == (two / n).read_bytes() for n in names[0]
        )
        expect(same, f"expected {exporter.name} to write the same bytes again")


EXPORTER_CHECKS: Mapping[str, Callable[[Exporter], None]] = {
    "description": _description,
    "place": _place,
    "repeatability": _repeatability,
}


def check_exporter(exporter: str | Exporter) -> None:
    """Hold an exporter to the contract."""
    row = exporter if isinstance(exporter, Exporter) else look_up(EXPORTERS, exporter, "an exporter")
    for check in EXPORTER_CHECKS.values():
        check(row)
