"""Models: loading any causal language model, wherever it comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn


class ModelError(ValueError):
    """A model that cannot be loaded or has no prunable decoder blocks."""


def choose_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is CUDA where there is one.

    Raises:
        ModelError: When the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"expected a device such as auto, cpu or cuda:0, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"expected a device of this machine, got {name!r}; use --device cpu")
    return device


def choose_dtype(name: str) -> torch.dtype:
    """Return the floating type of a name, ``float32`` or ``bfloat16``."""
    if name not in ("float32", "bfloat16"):
        raise ModelError(f"expected the type float32 or bfloat16, got {name!r}")
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
    from transformers.utils import logging

    path = Path(source).expanduser()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"expected a model folder, a .gguf file or a hub name, got the file {path}")
        place, options["gguf_file"] = str(path.parent), path.name
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"expected a model folder with a config.json, got {path} without one")
        place = str(path)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith(".gguf"):
        raise ModelError(f"expected an existing model folder or .gguf file, got {source}: not found")
    else:
        place = source
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"transformers cannot load the model {source!r}: {reason}") from error
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ModelError(f"expected finite weights, got some that are not in {name} of {source}")
    model.requires_grad_(False)
    return model.eval().to(device or torch.device("cpu")), tokenizer


def empty_model(source: str, dtype: torch.dtype) -> nn.Module:
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
