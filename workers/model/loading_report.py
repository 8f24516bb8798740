"""Loading reports: which weights a model's files lack, and which of theirs the model does not know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from .config import is_quantised
from .errors import ModelError, transformers_reading
from .model_files import ModelFiles

_FLOATING = ("F64", "F32", "F16", "BF16")
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

    with transformers_reading(files.source):
        model, found = AutoModelForCausalLM.from_pretrained(
            files.place, config=config, dtype=dtype, device_map="meta", output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code, **files.options,
        )  # fmt: skip
    check_report(model, found, files.source)
    _check_tensors(model, files, is_quantised=is_quantised(config))
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


def _check_tensors(model: nn.Module, files: ModelFiles, *, is_quantised: bool) -> None:
    """Check what no report tells of the tensors in safetensors files.

    A part for images or sound is left out where transformers has a class for text, and whole numbers are
    taken for weights.

    Raises:
        ModelError: When that would be so.
    """
    state = model.state_dict()
    prefix = str(getattr(model, "base_model_prefix", ""))
    has_senses = any(map(_SENSES.search, state))
    places: dict[str, Path] = {}
    for path in files.weights():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                if _SENSES.search(name) and not has_senses:
                    raise ModelError(
                        f"expected a model of text alone, got files of {files.source} with {_shown(name)}, "
                        "which would be lost; give a model of text alone"
                    )
                own = state.get(name, state.get(f"{prefix}.{name}"))
                kind = file.get_slice(name).get_dtype()
                if _differ(name, places.setdefault(name, path), path):
                    raise ModelError(
                        f"expected each weight once, got files of {files.source} with one {_shown(name)} in "
                        f"{places[name].name} and another in {path.name}; bring the model here again"
                    )
                if own is not None and own.is_floating_point() and kind not in _FLOATING and not is_quantised:
                    raise ModelError(
                        f"expected ordinary weights, got files of {files.source} with {_shown(name)} in "
                        f"{kind}; give the model that it was made from"
                    )


def _differ(name: str, first: Path, second: Path) -> bool:
    """Return whether two files have different tensors of one name: which is read is up to who reads."""
    if first == second:
        return False
    with safe_open(first, framework="pt") as one, safe_open(second, framework="pt") as other:
        return not torch.equal(one.get_tensor(name), other.get_tensor(name))


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 200 else repr(name[:200])
