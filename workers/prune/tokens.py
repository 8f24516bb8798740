"""The tokens that a model is pruned on: drawn from a text, or those that it was calibrated on before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..calibrate.documents import TextError
from ..calibrate.folder import Calibration, token_hash
from ..calibrate.manifest import PARTS
from ..calibrate.text import check_source, draw_sequences, vocabulary_of
from ..model.checksums import Checksums
from ..model.decoder import Decoder


@dataclass(frozen=True)
class PruningTokens:
    """Sequences of tokens that statistics come from.

    Attributes:
        source: The text, as for ``draw_sequences``.
        sequences: How many sequences.
        length: Tokens per sequence.
        seed: Seed of sampling and order.
        calibration: What a run was calibrated as, where the text is taken from it.
        is_same_model: Whether it was the same model that was calibrated. Its tokens are then taken as they
            are, if as many are wanted: neither the text is needed again, nor what the model wrote itself.
    """

    source: str
    sequences: int
    length: int
    seed: int
    calibration: Calibration | None = None
    is_same_model: bool = False

    @property
    def is_written(self) -> bool:
        """Whether the model has to write them."""
        return self.source == "self" and not self._is_kept

    @property
    def _is_kept(self) -> bool:
        return self._is_whole and self.is_same_model

    @property
    def _is_whole(self) -> bool:
        """Whether as many are wanted, drawn in the same way, as were calibrated on."""
        if self.calibration is None:
            return False
        there = (*self.calibration.shape("statistics"), self.calibration.manifest["seed"])
        return there == (self.sequences, self.length, self.seed)

    def other_in(self, decoder: Decoder) -> str:
        """Return what has changed in the model since it was calibrated, in words; empty for nothing known."""
        if self.calibration is None or not self.is_same_model or self.calibration.checksums is None:
            return ""
        return self.calibration.checksums.other_in(Checksums.of(decoder, self.calibration.checksums))

    def check(self) -> None:
        """Check the text before a model is loaded for it.

        Raises:
            TextError: When it is no source, or a file that is not there.
        """
        if self._is_kept:
            return
        try:
            check_source(self.source)
        except TextError as error:
            if self.calibration is None:
                raise
            why = f"which {self.calibration.folder} was made from ({error})"
            raise TextError(f"expected the text {self.source}, {why}; give --text FILE") from None

    def draw(self, decoder: Decoder, tokenizer: Any, report: Callable[[str], None]) -> Tensor:
        """Return the token ids, (sequences, length), and say where they come from.

        Raises:
            TextError: When the text cannot be read or is too short.
            CalibrationError: When the calibration does not hold what its manifest says, or the model cannot
                read it.
        """
        size = f"{self.sequences} sequences of {self.length} tokens"
        of = f", as the run's calibration {self.calibration.folder} was" if self.calibration else ""
        if self._is_kept:
            assert self.calibration is not None
            report(f"taking {size} from the run's calibration {self.calibration.folder}: {self._in_words}")
            return self.calibration.tokens("statistics", vocabulary_of(decoder.model))
        words = f"writing {size}" if self.is_written else f"reading {size} from {self.source}"
        report(words + of)
        if self.calibration is None or self.is_written or not self._is_whole:
            return self._drawn(decoder, tokenizer, self.sequences)
        # The parts of a calibration are drawn together: its statistics are the first of all sequences.
        total = sum(self.calibration.shape(part)[0] for part in PARTS)
        ids = self._drawn(decoder, tokenizer, total)[: self.sequences]
        if token_hash(ids) != self.calibration.manifest["parts"]["statistics"]["sha256"]:
            report(
                f"warning: {self.source} gives this model other tokens than {self.calibration.folder} has: "
                "its tokenizer is another, or the text has changed since"
            )
        return ids

    @property
    def _in_words(self) -> str:
        return "written by the model" if self.source == "self" else f"of {self.source}"

    def _drawn(self, decoder: Decoder, tokenizer: Any, count: int) -> Tensor:
        return draw_sequences(self.source, decoder.model, tokenizer, count, self.length, self.seed)
