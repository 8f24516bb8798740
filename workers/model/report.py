"""Loading reports: which weights a model's files lack, and which of theirs the model does not know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from .errors import ModelError, told_by_transformers
from .files import ModelFiles

_SENSES = re.compile(r"(^|\.)(visual|vision|video|image|audio|speech)(_\w+)?\.")
# Computed from the configuration; older files hold them all the same.
_DERIVED = re.compile(
    r"(^|\.)((attn|attention|self_attn)\.(masked_)?bias|(rotary_emb\.)?inv_freq|position_ids)$"
)


def open_without_weights(
    files: ModelFiles, config: Any, dtype: torch.dtype, *, trust_remote_code: bool
) -> nn.Module:
    """Return a model on the meta device, opened as transformers opens its files, which fit it.

    Takes no memory for weights, so it comes before anything that does.

    Raises:
        ModelError: When a weight is missing, unknown or of another shape.
    """
    from transformers import AutoModelForCausalLM

    with told_by_transformers(files.source):
        model, found = AutoModelForCausalLM.from_pretrained(
            files.place, config=config, dtype=dtype, device_map="meta", output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code, **files.options,
        )  # fmt: skip
    check_report(model, found, files.source)
    _check_senses(model, files)
    return model  # type: ignore[no-any-return]


def check_report(model: nn.Module, found: Mapping[str, Any], source: str) -> None:
    """Check the report that transformers gives of a loading.

    Raises:
        ModelError: When a weight is missing, unknown or of another shape.
    """
    missing = sorted(found["missing_keys"])
    unknown = sorted(name for name in found["unexpected_keys"] if not _DERIVED.search(name))
    other = sorted(found["mismatched_keys"])
    wrong = [
        *(f"without {_shown(name)}" for name in missing[:1]),
        *(f"with {_shown(name)}, which that model does not have" for name in unknown[:1]),
        *(f"with {_shown(name)} as {tuple(there)}, not {tuple(own)}" for name, there, own in other[:1]),
        *(str(message) for message in found["error_msgs"][:1]),
    ]
    if wrong:
        count = len(missing) + len(unknown) + len(other)
        in_all = f" ({count} in all)" if count > len(wrong) else ""
        raise ModelError(
            f"expected the weights of {type(model).__name__}, got files of {source} {' and '.join(wrong)}"
            f"{in_all}; bring the model here again, or save it whole"
        )


def _check_senses(model: nn.Module, files: ModelFiles) -> None:
    """Check that no part for images or sound is left out, as transformers does where a class is for text.

    Raises:
        ModelError: When one is.
    """
    if any(map(_SENSES.search, model.state_dict())):
        return
    for path in files.weights():
        with safe_open(path, framework="pt") as file:
            found = [name for name in file.keys() if _SENSES.search(name)]  # noqa: SIM118 (no dictionary)
        if found:
            raise ModelError(
                f"expected a model of text alone, got files of {files.source} with {_shown(found[0])}, which "
                "would be lost; give a model of text alone"
            )


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 200 else repr(name[:200])
