"""Models: loading any causal language model, wherever it comes from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...metrics_dsl.errors import SecateurError
from ...search.core.reading import read_json
from ...search.core.requests import check_device, check_dtype


class ModelError(SecateurError):
    """A model that cannot be loaded or has no prunable decoder blocks."""


def choose_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is CUDA where there is one.

    Raises:
        ModelError: When the device does not exist here.
    """
    check_device(name, ModelError)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"expected a device of this machine, got {name!r}; use --device cpu")
    return device


def choose_dtype(name: str) -> torch.dtype:
    """Return the floating type of a name, ``float32`` or ``bfloat16``."""
    check_dtype(name, ModelError)
    return torch.float32 if name == "float32" else torch.bfloat16


def load_model(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Return a causal language model in evaluation mode, and its tokenizer.

    Args:
        source: A local folder, a ``.gguf`` file, or a name on the model hub.
        dtype: Floating type of the weights.
        device: Where the model is put; the CPU if left out.
        trust_remote_code: Allow code that the model's author ships to run here.

    Raises:
        ModelError: When there is no such model or transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, options = _place(source)
    options["trust_remote_code"] = trust_remote_code
    with _transformers(source):
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ModelError(f"expected finite weights, got some that are not in {name} of {source}")
    model.requires_grad_(False)
    return model.eval().to(device or torch.device("cpu")), tokenizer


def empty_model(source: str, dtype: torch.dtype) -> tuple[nn.Module, Any, list[Path]] | None:
    """Return a model without weights, its tokenizer and its safetensors files, those of the hub brought here.

    Parameters are on the meta device, buffers on the CPU as transformers computes them.

    Returns:
        None for a model that only transformers can load from its files: a ``.gguf`` file, a quantised one,
        an adapter, one of other files.

    Raises:
        ModelError: When there is no such model, or one of its files is missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    place, options = _place(source)
    if options:
        return None
    with _transformers(source):
        paths = _weight_files(place)
        if not paths or _cached(place, "adapter_config.json"):
            return None
        config = AutoConfig.from_pretrained(place)
        if any(getattr(config, name, None) for name in ("quantization_config", "transformers_weights")):
            return None
        tokenizer = AutoTokenizer.from_pretrained(place)
        # torch's annotation says nothing of what such a hook returns.
        handle = register_module_parameter_registration_hook(_emptied)  # type: ignore[arg-type]
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        finally:
            handle.remove()
        if _cached(place, "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(place)
    if dtype != torch.float32 and getattr(model, "_keep_in_fp32_modules_strict", None):
        return None  # transformers knows which of them
    return model.eval(), tokenizer, paths


def _emptied(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Return a parameter without memory, on the device meta, to be registered instead of the given one.

    One that is on meta already is returned itself, so that parameters that are tied stay one.
    """
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _weight_files(place: str) -> list[Path]:
    """Return the safetensors files of a folder or hub name, none where it has others.

    Raises:
        ModelError: When one of several is missing.
    """
    if (single := _cached(place, "model.safetensors")) is not None:
        return [single]
    index = _cached(place, "model.safetensors.index.json")
    if index is None:
        return []
    given = read_json(index, "an index of weights as JSON", ModelError).field("weight_map")
    names = sorted({name.text() for name in given.members().values()})
    paths = {name: _cached(place, name) for name in names}
    if missing := [name for name, path in paths.items() if path is None]:
        raise ModelError(
            f"expected the {len(names)} files that {index} names, got none named {missing[0]}; bring the "
            "model here again"
        )
    return [path for path in paths.values() if path is not None]


def _cached(place: str, name: str) -> Path | None:
    """Return a file of a folder or hub name, brought here; None if it has none of that name."""
    from transformers.utils import cached_file

    try:
        found = cached_file(place, name)
    except OSError:
        return None
    return None if found is None else Path(found)


def _place(source: str) -> tuple[str, dict[str, Any]]:
    """Return the folder or hub name of a source, and further options of transformers.

    Raises:
        ModelError: When it is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"expected a model folder, a .gguf file or a hub name, got the file {path}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"expected a model folder with a config.json, got {path} without one")
        return str(path), {}
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith(".gguf"):
        raise ModelError(f"expected an existing model folder or .gguf file, got {source}: not found")
    return source, {}


@contextmanager
def _transformers(source: str) -> Iterator[None]:
    """Let transformers load a model; what it raises becomes a sentence."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"transformers cannot load the model {source!r}: {reason}") from error


def model_of_config(source: str, dtype: torch.dtype) -> nn.Module:
    """Return a causal language model made of its configuration alone, with whatever weights torch gives it.

    Inside a fake tensor mode that takes no memory. No weights are read: a ``.gguf`` file gives its metadata.

    Args:
        source: A local folder, a ``config.json`` or ``.gguf`` file, or a name on the model hub.
        dtype: Floating type of the weights.

    Raises:
        ModelError: When there is no such configuration or transformers does not know the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    path = Path(source).expanduser()
    if not path.exists() and (source.startswith((".", "/", "~")) or source.endswith((".json", ".gguf"))):
        raise ModelError(
            f"expected a folder, a config.json or .gguf file or a hub name, got {source}: not found"
        )
    logging.set_verbosity_error()
    is_gguf = path.is_file() and path.suffix == ".gguf"
    options = {"gguf_file": path.name} if is_gguf else {}
    try:
        config = AutoConfig.from_pretrained(
            str(path.parent if is_gguf else path if path.exists() else source), **options
        )
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"transformers cannot read the configuration of {source!r}: {reason}") from error
    return model.requires_grad_(False).eval()


def check_length(model: nn.Module, length: int) -> None:
    """Check that a model can read sequences of so many tokens.

    Raises:
        ModelError: When it cannot.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise ModelError(
            f"expected sequences of at most {longest} tokens, which the model can read, got {length}"
        )


def stored_dtype(source: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """Return the floating type of a model's files; 32 bits for a ``.gguf`` file, which holds several."""
    from transformers import AutoConfig

    if source.endswith(".gguf"):
        return torch.float32
    path = Path(source).expanduser()
    config = AutoConfig.from_pretrained(
        str(path) if path.is_dir() else source, trust_remote_code=trust_remote_code
    )
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def save_dense_copy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model that was read from a quantised file as an ordinary folder, so it loads fast.

    transformers refuses to save a model that remembers a GGUF file; the weights are dense already.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    copy = type(model)(model.config).to(model.dtype)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_reference(source: str) -> str:
    """Return a source that means the same from every folder: local paths made absolute."""
    path = Path(source).expanduser()
    return os.fspath(path.resolve()) if path.exists() else source


def accelerator() -> str:
    """Return the name of the GPU that ``auto`` would choose, empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
