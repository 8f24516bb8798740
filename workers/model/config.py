"""Configurations: what a model is, and whether it is one that can be pruned as a whole."""

from __future__ import annotations

from typing import Any

from ...search.core.reading import Given
from .errors import ModelError, transformers_reading
from .limits import check_numbers
from .model_files import ModelFiles

_DEQUANTISED = ("fp8", "mxfp4")  # what transformers brings to ordinary weights on any machine
# What computes attention and experts with code that is here; others are on the hub, or are looked for there.
_OWN_KERNELS = (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
_SENSES = ("vision", "visual", "image", "video", "audio", "speech")


def read_config(files: ModelFiles, *, trust_remote_code: bool) -> Any:
    """Return a model's configuration, as transformers has it.

    Raises:
        ModelError: When it is none, needs code that is not asked for, or is that of a model whose parts
            would be dropped or misread.
    """
    from transformers import AutoConfig

    if (given := files.read("config.json")) is not None:
        _check(given, files.source)
    with transformers_reading(files.source):
        config = AutoConfig.from_pretrained(files.place, trust_remote_code=trust_remote_code, **files.options)
        if not trust_remote_code:
            _check_kernels(config, files.source)
        brought = getattr(config, "auto_map", None)
        if not (trust_remote_code and isinstance(brought, dict) and "AutoModelForCausalLM" in brought):
            _check_kind(config, files.source)
        for each in (config, config.get_text_config(decoder=True)):
            # What it returns is for who calls it to say.
            each.return_dict, each.output_attentions, each.output_hidden_states = True, False, False
            if isinstance(quantised := getattr(each, "quantization_config", None), dict):
                quantised["dequantize"] = True  # on a GPU too
    return config


def is_quantised(config: Any) -> bool:
    """Whether the files hold weights in a form of fewer bits."""
    configs = (config, config.get_text_config(decoder=True))
    return any(getattr(each, "quantization_config", None) for each in configs)


def _check(given: Given, source: str) -> None:
    """Check what ``config.json`` says before transformers believes it."""
    check_numbers(given)
    names = given.field("architectures", None)
    for each in names.entries("a list of names") if names.value is not None else ():
        each.text("the name of a class")
    for part in (given, *(part for part in given.members().values() if isinstance(part.value, dict))):
        quantised = part.field("quantization_config", None)
        if quantised.value is not None:
            method = quantised.field("quant_method", None).value
            if method not in _DEQUANTISED:
                what = method if isinstance(method, str) else "no known method"
                raise ModelError(
                    f"expected ordinary weights, got {source}, quantised by {what!r}; give the model that it "
                    "was made from"
                )
        for name in ("rope_parameters", "rope_scaling"):
            _check_rope(part.field(name, None))
        for name in ("dtype", "torch_dtype"):
            if not isinstance((dtype := part.field(name, None)).value, str | dict | None):
                raise dtype.refused("the name of a floating type")
    file = given.field("transformers_weights", None)
    if file.value is not None and ("/" in file.text() or "\\" in file.text()):
        raise file.refused("the name of a file beside it")


def _check_kernels(config: Any, source: str) -> None:
    """Check that a configuration and its parts name no kernels that would be fetched from elsewhere."""
    for name in ("attn_implementation", "experts_implementation"):
        code = getattr(config, f"_{name}", None)
        if code not in _OWN_KERNELS:
            raise ModelError(
                f"expected a model without code of others, got {source}, whose config.json has {name} "
                f"{code!r}; give --trust-remote-code to run it"
            )
    for part in getattr(config, "sub_configs", ()):
        if (own := getattr(config, part, None)) is not None:
            _check_kernels(own, source)


def _check_rope(given: Given) -> None:
    """Check how positions are turned: transformers goes on with some values that no model has."""
    if given.value is None:
        return
    if given.value == {} or not isinstance(given.value, dict):
        raise given.refused("the parameters of rotary positions, by name")
    for name, member in given.members().items():
        if isinstance(member.value, dict):  # of layers of one type
            _check_rope(member)
        elif name == "factor" and member.value is not None:
            member.number("a factor above 0", least=1e-6)


def _check_kind(config: Any, source: str) -> None:
    """Check that transformers has a class that reads all of a model, and writes one token after another."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = type(config)
    name = getattr(config, "model_type", "")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"expected a model that goes on with a text, got {source} ({name}), an encoder with a decoder, "
            "which cannot be pruned here; give one that is a decoder alone"
        )
    made = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    senses = [
        n for n in getattr(kind, "sub_configs", {}) if n.startswith(_SENSES) and getattr(config, n, None)
    ]
    if senses and (made is None or made.config_class is not kind):
        part = senses[0].partition("_")[0]
        raise ModelError(
            f"expected a model of text alone, got {source} ({name}) with a part for {part}, which would be "
            "lost; give a model of text alone"
        )
    if made is None:
        raise ModelError(
            f"expected a model that goes on with a text, got {source} ({name}), for which transformers has "
            "no such class"
        )
    _check_family(config, source)


def _check_family(config: Any, source: str) -> None:
    """Check that ``architectures`` are of the model's type: one of the two was changed."""
    import transformers

    kinds = {type(config), *(type(part) for part in vars(config).values())}
    types = {getattr(kind, "model_type", None) for kind in kinds}
    for name in getattr(config, "architectures", None) or ():
        if name.isidentifier() and name[0].isupper():
            own = getattr(getattr(transformers, name, None), "config_class", None)
            if own is not None and own.model_type not in types:
                raise ModelError(
                    f"expected a model of one family, got {source}, which is {config.model_type} by its "
                    f"model_type and {own.model_type} by its architectures; mend its config.json"
                )
