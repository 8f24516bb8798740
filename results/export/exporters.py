"""The table of exporters: what a run or one of its candidates can be written as."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.plugins import guarded, open_table
from ...search.core.files import Output, whole
from ...search.core.objectives import look_up
from ..archive.archive import Archive
from .candidate_json import write_json
from .candidate_record import CandidateRecord, ExportError, find
from .csv_table import write_csv
from .evopress import write_evopress
from .formula import write_latex, write_sympy
from .llm_compressor import write_llm_compressor
from .masks_file import write_masks
from .optuna_study import write_optuna
from .pruner_zero import write_pruner_zero
from .python_file import in_a_line, write_python

if TYPE_CHECKING:
    from torch import Tensor


EXPORT = Output(makes_parents=False, error=ExportError)


@dataclass(frozen=True)
class Exporter:
    """One form that results can take.

    Attributes:
        name: The name on the command line.
        suffix: How its files end; empty for a folder.
        subject: What is written: one ``candidate``, a whole ``run``, or the ``masks`` of a candidate.
        meaning: What it is, and for whom.
        write: Called with a ``CandidateRecord`` or an ``Archive``, for masks also with (name, kept) of each
            layer, and last with the path, which does not exist yet.
    """

    name: str
    suffix: str
    subject: Literal["candidate", "run", "masks"]
    meaning: str
    write: Callable[..., None]


def _write_text(record: CandidateRecord, path: Path) -> None:
    needed = [f"# needs {in_a_line(n['name'])}, sha256 {n['sha256']}" if "sha256" in n
              else f"# needs the package {in_a_line(n['name'])} {in_a_line(n['version'])}"
              for n in record.needed_plugins]  # fmt: skip
    path.write_text("\n".join([str(record.candidate.metric), *needed]) + "\n", encoding="utf-8")


EXPORTERS: dict[str, Exporter] = {
    exporter.name: exporter
    for exporter in (
        Exporter("text", ".txt", "candidate", "the metric as one line of the metric language", _write_text),
        Exporter("json", ".json", "candidate",
                 "metric, group, pattern and a ratio a layer, with figures and provenance", write_json),
        Exporter("python", ".py", "candidate",
                 "scores and masks as a file that needs torch alone, with the same masks bit for bit",
                 write_python),
        Exporter("sympy", ".txt", "candidate", "the metric as text that sympy.sympify reads", write_sympy),
        Exporter("latex", ".tex", "candidate", "the metric as a formula with indices", write_latex),
        Exporter("pruner-zero", ".json", "candidate", "the metric as a tree of Pruner-Zero",
                 write_pruner_zero),
        Exporter("llm-compressor", "", "candidate",
                 "a folder with a recipe for llm-compressor, and a modifier for metrics other than Wanda's",
                 write_llm_compressor),
        Exporter("evopress", "", "candidate", "a folder with the ratios as levels of EvoPress",
                 write_evopress),
        Exporter("masks", ".safetensors", "masks", "the masks, a bit per weight, 1 for what is kept",
                 write_masks),
        Exporter("csv", ".csv", "run", "the best metric of each size, in the columns of PySR", write_csv),
        Exporter("optuna", ".log", "run", "all candidates as an Optuna study in a journal file",
                 write_optuna),
    )
}  # fmt: skip


def _admitted(exporter: Exporter, origin: str) -> Exporter:
    """Return an exporter of somebody else's, checked, with a function whose failures are sentences."""
    if exporter.subject not in ("candidate", "run", "masks") or exporter.suffix[:1] not in ("", "."):
        raise ExportError(
            f"expected the subject candidate, run or masks and a suffix such as .txt for the exporter "
            f"{exporter.name}, got {exporter.subject!r} and {exporter.suffix!r}"
        )
    what = f"the exporter {exporter.name} of {origin}"
    passing = (SecateurError, OSError)  # errors of the disk are told as everywhere
    return replace(exporter, write=guarded(exporter.write, what, ExportError, passing))


open_table(EXPORTERS, Exporter, "an exporter", "exporters", _admitted)


def export(
    run: str | Path | Archive,
    key: str = "",
    *,
    to: str,
    out: str | Path,
    masks: Iterable[tuple[str, Tensor]] | None = None,
    force: bool = False,
) -> Path:
    """Write a run, or one of its candidates, in another form.

    Args:
        run: A run folder, or its archive.
        key: The candidate's key, the beginning of it, or ``best``; empty for what is of the whole run.
        to: A name of ``EXPORTERS``.
        out: The file or folder to write, which must not exist. A folder's name ends in no ``.txt`` or the
            like, unless a ``/`` follows.
        masks: For ``masks`` alone: each layer's name and which of its weights are kept, (rows, columns)
            bool, as ``LocalEvaluator.masks`` computes them.
        force: Replace a file that is there, unless it is of a run or a calibration; never a folder.

    Returns:
        The file or folder that was written.

    Raises:
        ExportError: When the form cannot represent the candidate, or ``out`` exists or names a file where
            the form is a folder, or a folder where it is a file; nothing is written.
        SecateurError: For an unknown exporter.
    """
    exporter = look_up(EXPORTERS, to, "an exporter")
    if exporter.subject == "run" and key:
        raise ExportError(f"{to} is of the whole run and takes no key, got {key!r}")
    if exporter.subject != "run" and not key:
        raise ExportError(f"{to} is of one candidate: expected its key, or best")
    if exporter.subject == "masks" and masks is None:
        raise ExportError("expected masks=..., which LocalEvaluator.masks computes from the model")
    _check_name(exporter, out)
    with contextlib.ExitStack() as opened:
        archive = run if isinstance(run, Archive) else opened.enter_context(Archive(run))
        with whole(out, replace(EXPORT, force=force) if exporter.suffix else EXPORT) as path:
            if exporter.subject == "run":
                exporter.write(archive, path)
            elif exporter.subject == "masks":
                exporter.write(find(archive, key), masks, path)
            else:
                exporter.write(find(archive, key), path)
    return Path(out)


def _check_name(exporter: Exporter, out: str | Path) -> None:
    """Refuse a file's name for a form that is a folder, and a folder's for one that is a file."""
    path, is_folder = Path(out), str(out).endswith("/")
    if not exporter.suffix and not is_folder and path.suffix[1:].isalpha():
        raise ExportError(
            f"expected a folder's name for {exporter.name}, got {out}, which ends like a file; leave "
            f"{path.suffix} out"
        )
    if exporter.suffix and (is_folder or path.is_dir()):
        raise ExportError(
            f"expected a file's name for {exporter.name}, got the folder {out}; name a file in it, such as "
            f"{path / f'best{exporter.suffix}'}"
        )
