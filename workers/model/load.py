"""Models: loading any causal language model, wherever it comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...search.core.files import expanded
from ...search.core.requests import check_device, check_dtype
from .config import is_quantised, read_config
from .errors import ModelError, transformers_reading, transformers_writing
from .gguf import check_all_read
from .limits import check_memory, check_size
from .loading_report import check_report, open_without_weights
from .model_files import ModelFiles, find_model


def choose_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is CUDA where there is one.

    Raises:
        ModelError: When the device does not exist here.
    """
    check_device(name, ModelError)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    there = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if there and there.type == device.type else device.type == "cpu"
    if (device.index or 0) >= count:
        raise ModelError(f"expected a device of this machine, got {name!r}; use --device cpu")
    return device


def choose_dtype(name: str) -> torch.dtype:
    """Return the floating type of a name, ``float32`` or ``bfloat16``.

    Raises:
        ModelError: For another name.
    """
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
    from transformers import AutoModelForCausalLM

    files = find_model(source)
    # Of a .gguf file, transformers reads all for its configuration alone, and again to load it.
    config = None if files.gguf else read_config(files, trust_remote_code=trust_remote_code)
    tokenizer = _tokenizer(files, trust_remote_code=trust_remote_code)
    if config is not None:
        empty = open_without_weights(files, config, dtype, trust_remote_code=trust_remote_code)
        check_memory([*empty.parameters(), *empty.buffers()], source)
        del empty
    with transformers_reading(source):
        model, found = AutoModelForCausalLM.from_pretrained(
            files.place, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code, **files.options,
        )  # fmt: skip
    check_report(model, found, source)
    if files.gguf:
        check_all_read(model, files.gguf)
    if config is None or is_quantised(config):
        _make_ordinary(model, dtype, source)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ModelError(
                f"expected finite weights, got some that are not in {name} of {source}; bring the model here "
                "again"
            )
    model.requires_grad_(False)
    with transformers_reading(source):  # a device may be too small
        return model.eval().to(device or torch.device("cpu")), tokenizer


def empty_model(
    source: str, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> tuple[nn.Module, Any, list[Path]] | None:
    """Return a model without weights, its tokenizer and its safetensors files, those of the hub brought here.

    Parameters are on the meta device, buffers on the CPU as transformers computes them.

    Returns:
        None for a model that only transformers can load from its files: a ``.gguf`` file, a quantised one,
        one of other files, or one that comes with code.

    Raises:
        ModelError: When there is no such model, or a file or tensor is missing or not the model's.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    if trust_remote_code or source.endswith(".gguf"):
        return None
    files = find_model(source)
    config = read_config(files, trust_remote_code=False)
    paths = files.weights()
    if not paths or is_quantised(config) or getattr(config, "transformers_weights", None):
        return None
    tokenizer = _tokenizer(files, trust_remote_code=False)
    check_memory(open_without_weights(files, config, dtype, trust_remote_code=False).buffers(), source)
    with transformers_reading(source):
        # torch's annotation says nothing of what such a hook returns.
        handle = register_module_parameter_registration_hook(_emptied)  # type: ignore[arg-type]
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        finally:
            handle.remove()
        if files.find("generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(files.place, **files.options)
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


def _tokenizer(files: ModelFiles, *, trust_remote_code: bool) -> Any:
    """Return a model's tokenizer.

    Raises:
        ModelError: When there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    if files.gguf is None and not files.has_tokenizer():
        raise ModelError(
            f"expected a tokenizer beside the model, got {files.source} without one; copy that of the model "
            "that it was made from (tokenizer.json and what goes with it)"
        )
    with transformers_reading(files.source):
        return AutoTokenizer.from_pretrained(
            files.place, trust_remote_code=trust_remote_code, **files.options
        )


def _make_ordinary(model: Any, dtype: torch.dtype, source: str) -> None:
    """Make a model whose files were quantised one like others: all weights of one type, and no quantiser.

    Raises:
        ModelError: When weights are left that are no floating numbers of 16 bits or more.
    """
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise ModelError(
                f"expected ordinary weights, got {source} with {name} in {weight.dtype}; give the model that "
                "it was made from"
            )
    model.hf_quantizer = None
    model.is_quantized = False
    for config in (model.config, model.config.get_text_config(decoder=True)):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for weight in model.parameters():
        if weight.dtype != torch.float32:  # those are what transformers keeps so, whatever is asked
            weight.data = weight.data.to(dtype)
    # What is written has the names of the model's own tensors: those of its files are of what was packed.
    model._weight_conversions = None


def model_of_config(source: str, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """Return a causal language model made of its configuration alone, with whatever weights torch gives it.

    Inside a fake tensor mode that takes no memory. No weights are read: a ``.gguf`` file gives its metadata.

    Args:
        source: A local folder, a ``config.json`` or ``.gguf`` file, or a name on the model hub.
        dtype: Floating type of the weights.
        trust_remote_code: Allow code that the model's author ships to run here.

    Raises:
        ModelError: When there is no such configuration or transformers does not know the model.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(find_model(source, may_be_config=True), trust_remote_code=trust_remote_code)
    with transformers_reading(source):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    check_size(model, source)
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
    if source.endswith(".gguf"):
        return torch.float32
    config = read_config(find_model(source), trust_remote_code=trust_remote_code)
    stored = config.dtype
    is_usable = isinstance(stored, torch.dtype) and stored.is_floating_point and stored.itemsize > 1
    return stored if is_usable else torch.float32


def processor_files(source: str) -> list[Path]:
    """Return the files of a model that say how images and sound are brought into it.

    Raises:
        ModelError: When there is no such model.
    """
    return [] if source.endswith(".gguf") else find_model(source).processor()


def save_dense_copy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model that was read from a quantised file as an ordinary folder, so it loads fast."""
    with transformers_writing():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def model_reference(source: str) -> str:
    """Return a source that means the same from every folder: local paths made absolute."""
    path = expanded(source, ModelError)
    return os.fspath(path.resolve()) if path.exists() else source


def accelerator() -> str:
    """Return the name of the GPU that ``auto`` would choose, empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
