"""Models: loading any causal language model whole, or its skeleton, wherever it comes from."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...search.core.files import expanded
from ...search.core.requests import check_device, check_dtype
from .source import ModelError, ModelSource, check_config, check_kind, find_model

# One of them is there wherever there is a tokenizer.
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


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
    try:
        torch.ones(1, device=device).item()  # the device meta holds no numbers, and others need a package
    except (RuntimeError, NotImplementedError, AssertionError, ImportError):
        raise ModelError(f"expected a device that computes here, got {name!r}; use --device cpu") from None
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

    All its weights are in the files and the files have no others, but for what transformers derives or knows
    to leave out. A quantised model whose weights can be had in floating point has them, and forgets the rest.

    Args:
        source: A local folder, a ``.gguf`` file, or a name on the model hub.
        dtype: Floating type of the weights.
        device: Where the model is put; the CPU if left out.
        trust_remote_code: Allow code that the model's author ships to run here.

    Raises:
        ModelError: When there is no such model, transformers cannot load it, or weights are missing, unknown
            or not finite.
    """
    from transformers import AutoModelForCausalLM

    found = find_model(source)
    config = _config(found, trust_remote_code)
    tokenizer = _tokenizer(found, trust_remote_code)
    is_quantised = getattr(config, "quantization_config", None) is not None
    if not (found.gguf or is_quantised or trust_remote_code):
        check_weights(found)  # before memory is taken
    with _transformers(source):
        model, report = AutoModelForCausalLM.from_pretrained(
            found.place,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **found.options,
        )
    _check_report(type(model).__name__, report, source)
    if is_quantised:
        _forget_quantiser(model, dtype)
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
        one of other files.

    Raises:
        ModelError: When there is no such model, or its files lack a weight or have another.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    found = find_model(source)
    paths = [] if found.gguf else found.weight_files()
    if not paths:
        return None
    config = _config(found, trust_remote_code=False)
    if any(getattr(config, name, None) for name in ("quantization_config", "transformers_weights")):
        return None
    tokenizer = _tokenizer(found, trust_remote_code=False)
    check_weights(found)
    with _transformers(source):
        # torch's annotation says nothing of what such a hook returns.
        handle = register_module_parameter_registration_hook(_emptied)  # type: ignore[arg-type]
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        finally:
            handle.remove()
        if found.file("generation_config.json") is not None:
            model.generation_config = GenerationConfig.from_pretrained(found.place)
    if dtype != torch.float32 and getattr(model, "_keep_in_fp32_modules_strict", None):
        return None  # transformers knows which of them
    return model.eval(), tokenizer, paths


def check_weights(found: ModelSource) -> None:
    """Check that a model's files hold its weights and no others, reading none and taking no memory for them.

    Raises:
        ModelError: When they do not.
    """
    from transformers import AutoModelForCausalLM

    with _transformers(found.given):
        model, report = AutoModelForCausalLM.from_pretrained(
            found.place, device_map="meta", trust_remote_code=False, output_loading_info=True
        )
    _check_report(type(model).__name__, report, found.given)


def _check_report(kind: str, report: Mapping[str, Any], source: str) -> None:
    """Check what transformers says of a load.

    Raises:
        ModelError: When a weight is missing or unknown, or has another shape.
    """
    missing, unknown = (sorted(map(str, report[name])) for name in ("missing_keys", "unexpected_keys"))
    if missing:
        besides = f", and {_named(unknown)}, which it does not have" if unknown else ""
        raise ModelError(
            f"expected the files of {source} to hold every weight of a {kind}, got none for {_named(missing)}"
            f"{besides}: it would run on random numbers; give the whole model with its own config.json"
        )
    if unknown:
        raise ModelError(
            f"expected the files of {source} to hold only weights of a {kind}, got {_named(unknown)}, which "
            "would be lost; give the model with its own config.json"
        )
    if odd := [*map(str, report["mismatched_keys"]), *map(str, report["error_msgs"])]:
        raise ModelError(f"expected the weights of a {kind} in {source}, got others: {_in_one_line(odd[0])}")


def _named(names: Collection[str]) -> str:
    first = next(iter(names))
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def _config(found: ModelSource, trust_remote_code: bool) -> Any:
    """Return a model's configuration as transformers has it.

    Raises:
        ModelError: When it cannot be read, or is not one of a model that writes text alone.
    """
    from transformers import AutoConfig

    with _transformers(found.given):
        config = AutoConfig.from_pretrained(found.place, trust_remote_code=trust_remote_code, **found.options)
    check_kind(config, found.given)
    return config


def _tokenizer(found: ModelSource, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if not (found.gguf or any(found.file(name) is not None for name in _TOKENIZERS)):
        raise ModelError(
            f"expected a tokenizer beside the model {found.given}, got none; copy tokenizer.json and "
            "tokenizer_config.json of the model that it was made from"
        )
    with _transformers(found.given, "the tokenizer of the model"):
        tokenizer = AutoTokenizer.from_pretrained(
            found.place, trust_remote_code=trust_remote_code, **found.options
        )
        if not len(tokenizer):
            raise ModelError(f"expected a tokenizer beside {found.given}, got one without tokens")
    return tokenizer


def _forget_quantiser(model: Any, dtype: torch.dtype) -> None:
    """Make a model that was quantised in its files one that never was.

    Raises:
        ModelError: When some of its weights are no floating-point numbers that can be computed with.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(
                f"expected weights that transformers makes floating-point, got {parameter.dtype} in {name}; "
                "give the model that it was quantised from"
            )
    model.to(dtype)
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False
    model._weight_conversions = None  # they lead back to the quantiser's tensors


def _emptied(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Return a parameter without memory, on the device meta, to be registered instead of the given one.

    One that is on meta already is returned itself, so that parameters that are tied stay one.
    """
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


@contextmanager
def _transformers(source: str, what: str = "the model") -> Iterator[None]:
    """Let transformers read a model's files, without a word of its own; what it raises becomes a sentence."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # whatever damaged or hostile files make of it
        reason = _in_one_line(str(error) or type(error).__name__)
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"expected a model that needs no code of its own, got {source} with some; give "
                "--trust-remote-code in this call if you trust its authors"
            ) from None
        raise ModelError(f"transformers cannot load {what} {source!r}: {reason}") from error
    finally:
        logging.set_verbosity(before)


def _in_one_line(text: str) -> str:
    return " ".join(text.split())[:300]


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

    path = expanded(source, ModelError)
    if path.suffix == ".json":
        check_config(path)
        with _transformers(source):
            config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        check_kind(config, source)
    else:
        config = _config(find_model(source), trust_remote_code=False)
    with _transformers(source):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
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
    """Return the floating type of a model's files; 32 bits for a ``.gguf`` file, which holds several.

    Raises:
        ModelError: When there is no such model.
    """
    found = find_model(source)
    if found.gguf:
        return torch.float32
    config = _config(found, trust_remote_code)
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
    path = expanded(source, ModelError)
    return os.fspath(path.resolve()) if path.exists() else source


def accelerator() -> str:
    """Return the name of the GPU that ``auto`` would choose, empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
