"""The settings of a run: what the command line, a TOML file and Python all pass."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..metrics_dsl.errors import SecateurError
from ..metrics_dsl.expression import Expression
from ..metrics_dsl.operators import FULL, LEAVES, OPERATORS, Leaf, Operator
from ..metrics_dsl.order import Group
from ..metrics_dsl.parser import parse_metric
from ..metrics_dsl.published import PUBLISHED, read_metric
from .contradictions import choose, contradiction, descends, objection
from .core import defaults
from .core.budget import Budget
from .core.candidate import STAGES, Stage, parse_pattern
from .core.files import expanded
from .core.objectives import look_up, look_up_objectives
from .core.requests import MOST_THREADS, MOST_TOKENS, check_device, shown
from .searchers.table import AUTO, SEARCHERS, SearcherRow
from .spaces.allocation import ALLOCATIONS
from .spaces.varied import METRIC_SPACES, SPACES
from .toml import SettingsError, number, parts, read_section, sentence

_LEAST_RUNG = 8  # tokens: as many as the shortest sequence of a calibration


class SearchSettings(BaseModel):
    """What a run searches, on what, and for how long: the options of ``secateur search``, by the same names.

    Attributes:
        calibration: The calibration folder.
        searcher: A name of ``SEARCHERS``; ``auto`` takes the one that fits what is searched.
        space: What varies: a space of metrics (``tree``, ``meta``), one of ratios (``curve``, ``block``,
            ``layer``, ``feature``, ``ramp``, ``owl``, ``dlp``, ``dsa``, ``alpha``), or one of each, as
            ``tree+curve``.
        metric: The metric whose ratios are searched, as text or by a published name; Wanda if left out.
        allocation: The published ratios whose metric is searched; uniform if left out.
        sparsity: Fraction of weights to remove, in [0, 1), or an interval of which every candidate has its
            own.
        pattern: ``unstructured``, or ``N:M`` for N removed of M consecutive inputs.
        group: The weights that compete with each other, ``row`` or ``layer``.
        objectives: Names of ``OBJECTIVES``, all minimised; chosen for what is searched if left out.
        budget: Candidates (400), tokens run through pruned models (``2Mtokens``) or seconds of measuring
            (``1800s``).
        seed: Seed of the searcher.
        batch: Candidates asked for at a time; the searcher's own number if left out.
        promote: Share of a batch that passes the screen, and each rung.
        rungs: Tokens to race on before all of them, growing; chosen for what is searched if left out.
        sensitivity: Tokens on which the best of a batch tells how KL changes with each ratio; chosen if left
            out.
        phase: Batches for which metrics and ratios are varied in turn; 0 varies both.
        stage: The stage that decides: ``screen``, ``layer`` or ``model``.
        seeding: Whether the searcher learns from the published rules that are measured first.
        max_size: Most nodes of a metric.
        operators: What metrics may be made of; all operators if left out.
        leaves: The leaves that they may use; all that the calibration holds if left out.
        start_from: Metrics to begin with: texts, names of published ones, ``FILE.json``, ``RUN:KEY`` or run
            folders, which stand for their fronts.
        plugins: Files that add rows to the package's tables. They run when a search is started with them, and
            never because a run names them.
        reuse: Whether hidden states are kept for candidates that begin alike; no figure changes by it.
        model: Load the model from here instead of where it was calibrated.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32`` or ``bfloat16``.
        threads: CPU threads; 0 uses all cores.

    Raises:
        SettingsError: For an unknown name or a value that cannot be used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    calibration: Path
    searcher: str = AUTO  # a name once the settings are read
    space: str = "tree"
    metric: str | None = None
    allocation: str | None = None
    sparsity: float | tuple[float, float] = defaults.SPARSITY
    pattern: str = "unstructured"
    group: Group = "row"
    objectives: tuple[str, ...] = ()
    budget: int | str = defaults.BUDGET
    seed: int = Field(default=defaults.SEED, ge=0, lt=2**32)  # what NumPy and pymoo take
    batch: int | None = Field(default=None, ge=1, le=10_000)
    promote: float = Field(default=defaults.PROMOTE, gt=0, le=1)
    rungs: tuple[int, ...] | None = None
    sensitivity: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    phase: int = Field(default=0, ge=0, le=1_000_000)
    stage: Stage = "model"
    seeding: bool = True
    max_size: int = Field(default=defaults.MAX_SIZE, ge=3, le=100)
    operators: tuple[str, ...] | None = None  # what metrics may be made of; all if left out
    leaves: tuple[str, ...] | None = None
    start_from: tuple[str, ...] = ()  # metrics, candidates' files and runs to begin with
    plugins: tuple[Path, ...] = ()  # noted here, and used by whoever was asked to
    reuse: bool = True
    model: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = Field(default=defaults.THREADS, ge=0, le=MOST_THREADS)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(sentence(error, type(self))) from None

    @field_validator("calibration")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        """Keep a place that is the same from everywhere, for a run may be resumed from elsewhere."""
        return expanded(path).absolute()

    @field_validator("model")
    @classmethod
    def _absolute_if_local(cls, source: str | None) -> str | None:
        local = source is not None and expanded(source).exists()
        return str(expanded(source).absolute()) if source and local else source

    @field_validator("searcher")
    @classmethod
    def _known_searcher(cls, name: str) -> str:
        if name != AUTO:
            look_up(SEARCHERS, name, "a searcher")
        return name

    @field_validator("space")
    @classmethod
    def _known_space(cls, text: str) -> str:
        names = [name.strip() for name in text.split("+")]
        kinds = [name in METRIC_SPACES for name in names]
        for name in names:
            look_up(SPACES, name, "a space")
        if kinds.count(True) > 1 or kinds.count(False) > 1:
            raise SecateurError(f"expected at most one space of metrics and one of ratios, got {text!r}")
        return "+".join(sorted(names, key=lambda name: name not in METRIC_SPACES))

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, text: str | None) -> str | None:
        return None if text is None else (text if text in PUBLISHED else str(read_metric(text)))

    @field_validator("allocation")
    @classmethod
    def _known_allocation(cls, name: str | None) -> str | None:
        if name is not None:
            look_up(ALLOCATIONS, name, "an allocation")
            if name == "atp":
                raise SecateurError(
                    "expected an allocation without a number to choose, got 'atp'; search it: --space ramp"
                )
        return name

    @field_validator("sparsity", mode="before")
    @classmethod
    def _target_or_interval(cls, value: Any) -> Any:
        ends = re.split("[:,]", value) if isinstance(value, str) else value
        numbers = [number(end) for end in (ends if isinstance(ends, list | tuple) else [ends])]
        if not (
            1 <= len(numbers) <= 2 and all(0 <= n < 1 for n in numbers) and numbers == sorted(set(numbers))
        ):
            raise SecateurError(
                "expected a number in [0, 1) such as 0.6, or an interval from less to more such as "
                f"0.3:0.75, got {shown(value)}"
            )
        return numbers[0] if len(numbers) == 1 else tuple(numbers)

    @field_validator("device")
    @classmethod
    def _known_device(cls, name: str) -> str:
        check_device(name)
        return name

    @field_validator("stage")
    @classmethod
    def _deciding_stage(cls, name: Stage) -> Stage:
        look_up(dict.fromkeys(STAGES), name, "a stage")
        return name

    @field_validator("budget", mode="before")
    @classmethod
    def _readable_budget(cls, value: Any) -> int | str:
        budget = Budget.parse(value)
        return int(budget.amount) if budget.unit == "candidates" else str(value).strip()

    @field_validator("rungs", mode="before")
    @classmethod
    def _growing_rungs(cls, value: Any) -> Any:
        if value is None or (isinstance(value, str) and value.strip() in ("", "none")):
            return None if value is None else ()
        found = [number(n) for n in ([value] if isinstance(value, int) else parts(value))]
        is_growing = found == sorted(set(found)) and all(_LEAST_RUNG <= n <= MOST_TOKENS for n in found)
        if not is_growing:
            raise SecateurError(
                f"expected growing numbers of at least {_LEAST_RUNG} tokens such as 512 or 256,1024, or "
                f"none, got {shown(value)}"
            )
        return tuple(map(int, found))

    @field_validator("operators", "leaves", mode="before")
    @classmethod
    def _known_words(cls, value: Any, info: ValidationInfo) -> Any:
        """Read names separated by commas, each of the table, and put them in its order."""
        if value is None:
            return None
        table: Mapping[str, Leaf | Operator] = LEAVES if info.field_name == "leaves" else OPERATORS
        what = "a leaf" if info.field_name == "leaves" else "an operator"
        named = {look_up(table, str(part).strip(), what).name for part in parts(value)}
        if not named:
            raise SecateurError(f"expected at least {what}, got none; leave it out for all of them")
        if info.field_name == "leaves" and not any(LEAVES[name].shape == FULL for name in named):
            full = [name for name, leaf in LEAVES.items() if leaf.shape == FULL]
            raise SecateurError(
                f"expected a leaf that tells all weights apart ({', '.join(full)}), got {', '.join(named)}"
            )
        return tuple(name for name in table if name in named)

    @field_validator("start_from", "plugins", mode="before")
    @classmethod
    def _absolute_each(cls, values: Any, info: ValidationInfo) -> Any:
        """Keep places that are the same from everywhere; a metric is no place, RUN:KEY has one before it."""
        given = [values] if isinstance(values, str | Path) else parts(values)
        if info.field_name == "plugins":
            return tuple(expanded(value).absolute() for value in given)
        return tuple(_with_place(str(value).strip()) for value in given)

    @model_validator(mode="before")
    @classmethod
    def _in_utf8(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Refuse names of files in other bytes: they could not be saved with the settings."""
        for name, value in values.items():
            try:
                str(value).encode()
            except UnicodeEncodeError:
                raise SecateurError(f"expected {name} in UTF-8, got {shown(value)}") from None
            except (ValueError, RecursionError):
                raise SecateurError(f"expected another {name}, got {shown(value)}") from None
        return values

    @model_validator(mode="before")
    @classmethod
    def _objectives_of_space(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Minimise size too where metrics are searched, and density where sparsities are."""
        if values.get("objectives"):
            return values
        is_given = str(values.get("space", "tree")).split("+")[0].strip() not in METRIC_SPACES
        names = ("kl",) if is_given else ("kl", "size")
        is_interval = len(re.split("[:,]", str(values.get("sparsity", defaults.SPARSITY)))) > 1
        return {**values, "objectives": ("kl", "density") if is_interval else names}

    @field_validator("objectives", mode="before")
    @classmethod
    def _known_objectives(cls, names: Any) -> tuple[str, ...]:
        return tuple(o.name for o in look_up_objectives([str(part).strip() for part in parts(names)]))

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_pattern(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Take the sparsity from a pattern N:M, and refuse another one beside it."""
        counts = parse_pattern(str(values.get("pattern", "unstructured")))
        if counts is None:
            return values
        share = counts[0] / counts[1]
        given = values.get("sparsity")
        if given is not None and not _is_number(given, share):
            raise SecateurError(
                f"expected the sparsity {share:g}, which the pattern {values['pattern']} has, got "
                f"{values['sparsity']}; leave it out"
            )
        return {**values, "sparsity": share}

    @model_validator(mode="after")
    def _words_of_trees(self) -> Self:
        """Refuse what trees are made of, or begin with, where none are searched."""
        named = [n for n in ("operators", "leaves", "start_from") if getattr(self, n) not in (None, ())]
        if named and self.metric_space != "tree":
            raise SecateurError(
                f"expected the space tree for {' and '.join(named)}, which say what metrics are searched, "
                f"got the space {self.space}; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """Refuse what contradicts itself, or would be without effect; choose a searcher if none is named."""
        if self.searcher == AUTO:
            object.__setattr__(self, "searcher", choose(self)[0])  # a frozen model sets nothing itself
            self.model_fields_set.discard("searcher")
        if found := contradiction(self) or objection(self, self.row):
            raise SecateurError(found)
        return self

    @property
    def row(self) -> SearcherRow:
        """What the table says of the searcher."""
        return SEARCHERS[self.searcher]

    @property
    def chosen(self) -> str:
        """A sentence on which searcher was chosen and why; empty where it was named."""
        return "" if "searcher" in self.model_fields_set else choose(self)[1]

    @property
    def batch_size(self) -> int:
        """Candidates asked for at a time; the searcher's own number if nothing is said."""
        return self.batch or self.row.can.batch

    @property
    def descends(self) -> bool:
        """Whether the searcher uses the sensitivity of KL to each ratio."""
        return descends(self, self.row.can)

    @property
    def metric_space(self) -> str:
        """The space of metrics; empty when the metric is given."""
        first = self.space.split("+")[0]
        return first if first in METRIC_SPACES else ""

    @property
    def ratio_space(self) -> str:
        """The space of ratios; empty when they are given."""
        last = self.space.split("+")[-1]
        return "" if last in METRIC_SPACES else last

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Return the settings of a mapping; what is None is left at its default.

        Raises:
            SettingsError: For an unknown name or a value that cannot be used.
        """
        return cls(**{name: value for name, value in values.items() if value is not None})

    @property
    def given_metric(self) -> Expression:
        """The metric of a search for ratios; Wanda if none is given."""
        name = self.metric or "wanda"
        return PUBLISHED[name].expression if name in PUBLISHED else parse_metric(name)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the settings saved in a run folder's ``run.toml``.

        Raises:
            SettingsError: When the file is missing or holds no such settings.
        """
        section = read_section(path, "search")
        try:
            return cls.read(section)
        except SettingsError as error:
            raise SettingsError(f"{path}: {error}") from None

    def to_toml(self) -> str:
        """Return the text of a TOML file with all settings."""
        values = self.model_dump(mode="json", exclude_none=True)
        values = {n: v for n, v in values.items() if v or n not in ("start_from", "plugins")}
        # Strings, numbers, booleans and lists of strings are written alike in JSON and TOML, but for two:
        # TOML knows no pairs of surrogates, and takes "delete" as an escape alone.
        written = {n: json.dumps(v, ensure_ascii=False).replace("\x7f", "\\u007f") for n, v in values.items()}
        return "[search]\n" + "".join(f"{n} = {text}\n" for n, text in written.items())


def _with_place(text: str) -> str:
    """Return what to start from with its path absolute, if it has one that exists."""
    if not text:
        raise SecateurError("expected a metric, a file or a run to start from, got an empty text")
    run, colon, key = text.rpartition(":")
    place = Path(os.path.expanduser(run if colon else text))  # a metric may begin with ~, and is none
    return f"{place.absolute()}{colon}{key if colon else ''}" if place.exists() else text


def _is_number(value: Any, wanted: float) -> bool:
    try:
        return number(value) == wanted
    except ValueError:
        return False
