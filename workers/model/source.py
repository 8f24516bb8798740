"""Models that somebody named: found, and their files checked before transformers reads them.

transformers believes what a model's files say: it takes memory for any number of layers, runs code that
lies beside them if it is told to or if someone presses a key, and makes up weights that are missing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...metrics_dsl.errors import SecateurError
from ...search.core.files import expanded
from ...search.core.reading import Given, check_file, read_json
from .gguf_header import check_gguf

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
# Files of a model that hold JSON; each is an object.
_JSON = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
# Numbers of a configuration that memory is taken for, and what they can be in any model.
_LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks?)|depth")
_MOST_LAYERS = 10_000
_SIZES = re.compile(r"\w*(size|dim|heads?|experts?|width|hidden|rank|channels?|inner|embd|states?)|d_\w+")
_WIDEST = 1 << 24
_DENSE_AGAIN = (
    "fp8",
    "mxfp4",
)  # quantisers that transformers undoes as it loads, without other packages
_OTHER_SENSES = ("vision", "audio", "image", "video", "speech", "visual")


class ModelError(SecateurError):
    """A model that cannot be loaded or has no prunable decoder blocks."""


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        given: As it was named.
        place: Its folder, or its name on the hub.
        gguf: The name of its ``.gguf`` file in the folder; empty for another model.
    """

    given: str
    place: str
    gguf: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """What transformers has to be told besides the place."""
        return {"gguf_file": self.gguf} if self.gguf else {}

    def file(self, name: str) -> Path | None:
        """Return a file of the folder or hub name, brought here; None if it has none of that name."""
        if Path(self.place).is_dir():
            path = Path(self.place) / name
            return path if os.path.lexists(path) else None
        from transformers.utils import cached_file

        try:
            found = cached_file(self.place, name)
        except (OSError, ValueError):
            return None
        return None if found is None else Path(found)

    def weight_files(self) -> list[Path]:
        """Return the safetensors files, none where the model has others.

        Raises:
            ModelError: When one of several is missing, or the file that lists them is damaged.
        """
        if (single := self.file("model.safetensors")) is not None:
            check_file(single, "a safetensors file", ModelError)
            return [single]
        index = self.file("model.safetensors.index.json")
        if index is None:
            return []
        given = read_json(index, "an index of weights as JSON", ModelError).field("weight_map")
        for name, file in given.members().items():
            if Path(file.text()).name != file.text():
                raise file.refused(f"a file beside the index that has {name}")
        names = sorted({name.text() for name in given.members().values()})
        paths = {name: self.file(name) for name in names}
        if missing := [name for name, path in paths.items() if path is None]:
            raise ModelError(
                f"expected the {len(names)} files that {index} names, got none named {missing[0]}; bring the "
                "model here again"
            )
        found = [path for path in paths.values() if path is not None]
        for path in found:
            check_file(path, "a safetensors file", ModelError)
        return found


def find_model(source: str) -> ModelSource:
    """Return a model by its folder, ``.gguf`` file or name on the hub, its small files checked.

    Raises:
        ModelError: When there is none, it is an adapter, or what its files say cannot be.
    """
    path = expanded(source, ModelError)
    if os.path.lexists(path) and not path.is_dir():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"expected a model folder, a .gguf file or a hub name, got the file {path}")
        check_gguf(path, ModelError)
        return ModelSource(source, str(path.parent), path.name)
    found = ModelSource(source, str(path) if path.is_dir() else source)
    if (not path.is_dir() and _HUB_NAME.fullmatch(source) is None) or source.endswith(".gguf"):
        raise ModelError(f"expected an existing model folder or .gguf file, got {source}: not found")
    if found.file("adapter_config.json") is not None:
        raise ModelError(
            f"expected a model, got {source} with an adapter; merge it into the model that it was trained on "
            "(merge_and_unload() of peft) and save that"
        )
    config = found.file("config.json")
    if config is None:
        raise ModelError(
            f"expected a model folder with a config.json, got {path} without one"
            if path.is_dir()
            else f"expected a model folder, a .gguf file or a hub name, got {source!r}: there is no such "
            "folder, and the hub was not reached or knows no such model"
        )
    for name in _JSON:
        if (file := found.file(name)) is not None:
            read_json(file, "a JSON file of a model", ModelError).members()
    check_config(config)
    return found


def check_config(path: Path) -> None:
    """Check what a ``config.json`` says before memory is taken for it.

    Raises:
        ModelError: When it is no object, or a size is none that a model can have.
    """
    given = read_json(path, "a model's configuration as JSON", ModelError)
    given.members()
    given.field("model_type", "").text()
    quantiser = given.field("quantization_config", None)
    if quantiser.value is not None:
        method = quantiser.field("quant_method", "unknown").text()
        if method not in _DENSE_AGAIN:
            raise ModelError(
                f"expected a model of floating-point weights, got {path.parent} quantised by {method}; give "
                "the model that it was made from"
            )
    _check_sizes(given)


def _check_sizes(given: Given) -> None:
    """Check numbers by the name that they stand under, in objects and lists of any depth."""
    for name, value in given.members().items():
        inner = value.entries() if isinstance(value.value, list) else [value]
        for one in inner:
            if isinstance(one.value, Mapping):
                _check_sizes(one)
            elif isinstance(one.value, int | float) and not isinstance(one.value, bool):
                if _LAYERS.fullmatch(name):
                    one.count(0, _MOST_LAYERS)
                elif _SIZES.fullmatch(name) and isinstance(one.value, int) and one.value > _WIDEST:
                    raise one.refused(f"a size of at most {_WIDEST:,}")
                elif isinstance(one.value, int) and abs(one.value) > 1 << 53:
                    raise one.refused("a number of at most 16 digits")


def check_kind(config: Any, source: str) -> None:
    """Check that a model is one that only writes text, and that none of its parts would be lost.

    Args:
        config: Its configuration, as transformers has it.
        source: As it was named, for messages.

    Raises:
        ModelError: When it is another.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = str(getattr(config, "model_type", ""))
    senses = [n for n in getattr(config, "sub_configs", {}) if n.startswith(_OTHER_SENSES)]
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"expected a model that is a decoder alone, got {source} of the kind {kind}, with an encoder"
        )
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    loaded = None if known is None else (known[0] if isinstance(known, tuple) else known).__name__
    saved = list(getattr(config, "architectures", None) or [])
    if senses and (loaded is None or not loaded.endswith("ForConditionalGeneration")):
        raise ModelError(
            f"expected a model that reads text alone, got {source} of the kind {kind}, whose part for "
            f"{senses[0].partition('_')[0]} would be lost"
        )
    if loaded and saved and loaded not in saved and saved[0].endswith("ForConditionalGeneration"):
        raise ModelError(
            f"expected a model that reads text alone, got {source}, a {saved[0]}, of which {loaded} would "
            "keep only a part"
        )
    if loaded is None and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise ModelError(
            f"expected a causal language model, got {source} of the kind {kind or 'unknown'}, which "
            "transformers does not know as one"
        )
