"""A candidate for llm-compressor: a recipe, and a modifier where its metric is not Wanda's.

Tried with llm-compressor 0.14.0.1. A list of sparsities belongs to the targets in the order in which the
model lists its modules, not in that of ``targets``; ours are in model order anyway. The modifier replaces two
methods of ``WandaPruningModifier``, ``calibrate_module`` and ``compress_modules``, and uses two of its
private names, ``_num_samples`` and ``_module_sparsities``.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...metrics_dsl.operators import LEAVES
from ...metrics_dsl.order import order_form
from ...metrics_dsl.parser import parse_metric
from .candidate_record import CandidateRecord, ExportError
from .python_file import helpers_for, mask_function, quoted, scores_function

TRIED = "0.14.0.1"
_NAME = "SecateurPruningModifier"
# How the modifier computes each leaf from the sums of a module's inputs.
_LEAVES = {
    "W": "weight",
    "X": "(sums.second / sums.tokens).sqrt()",
    "M": "sums.first / sums.tokens",
    "V": "(sums.second - sums.first**2 / sums.tokens).clamp(min=0) / max(sums.tokens - 1, 1)",
    "D": "inverse_diagonal(sums.gram / sums.tokens)",
    "Y": "outputs(module, weight, sums)",
}
_INVERSE = '''
def inverse_diagonal(gram):
    """Return the diagonal of the inverse of the Gram matrix, damped by 1 % of its mean diagonal."""
    damped = gram.double()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal.add_(0.01 * mean if mean > 0 else 1.0)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()


'''
_OUTPUTS = '''
def outputs(module, weight, sums):
    """Return the root-mean-square of a module's outputs, with its bias, (outputs,)."""
    square = ((weight @ (sums.gram / sums.tokens)) * weight).sum(1).double()
    if getattr(module, "bias", None) is not None:
        bias = module.bias.data.double()
        square += 2 * bias * (weight.double() @ (sums.first / sums.tokens)) + bias.square()
    return square.clamp(min=0).sqrt().float()


'''
_HEAD = '''"""The pruning metric `{metric}` for llm-compressor {tried}.

Found by secateur, key {key}. Importing this file makes the recipe beside it known:

    import modifier
    from llmcompressor import oneshot

    oneshot(model="path/of/the/model", dataset=..., recipe="recipe.yaml")
"""

import torch
from compressed_tensors.utils import align_module_device, update_offload_parameter
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from llmcompressor.utils.metric_logging import CompressionLogger
from pydantic import PrivateAttr


'''
_CLASS = '''class Sums:
    """Sums over the tokens that a module was fed."""

    def __init__(self, columns, device):
        self.tokens = 0
        self.first = torch.zeros(columns, dtype=torch.float64, device=device)
        self.second = torch.zeros_like(self.first)
        self.gram = torch.zeros({gram}, device=device)

    def add(self, inputs):
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(x)
        self.first += x.sum(0, dtype=torch.float64)
        self.second += x.double().square().sum(0){add_gram}


class {name}(WandaPruningModifier):
    """Removes the weights with the smallest scores of the metric above."""

    _sums: dict = PrivateAttr(default_factory=dict)

    def calibrate_module(self, module, args, _output):
        inputs = args[0]
        if module not in self._num_samples:
            self._num_samples[module] = 0
            self._sums[module] = Sums(inputs.shape[-1], inputs.device)
        self._sums[module].add(inputs)
        self._num_samples[module] += 1

    def compress_modules(self):
        for module in list(self._num_samples):
            with torch.no_grad(), align_module_device(module), CompressionLogger(module):
                sums, weight = self._sums.pop(module), module.weight.data.float()
                found = scores({arguments}
                )
                removed = mask(found, self._module_sparsities[module])
                pruned = module.weight.data.masked_fill(removed, 0)
            update_offload_parameter(module, "weight", pruned)
            del self._num_samples[module]


ModifierFactory.register("{name}", {name})
'''
_README = """# A pruning rule for llm-compressor

`{metric}`, compared by {group}, pattern {pattern}: {sparsity:.2%} of the weights of {count} linear layers.
Found by secateur, key {key}; tried with llm-compressor {tried}.

```python
{imports}from llmcompressor import oneshot

oneshot(model="path/of/the/model", dataset=..., recipe="recipe.yaml", output_dir="pruned")
```

- `recipe.yaml` has one sparsity for each layer, in the order in which the model lists its modules.
- `sparsity.json` has the same by name.
{more}
llm-compressor rounds each ratio down to whole weights per row, as secateur does. It scores on calibration
data of its own, so its masks agree with the search's as far as the data do; `pipeline="basic"` scores the
dense model throughout, as the search did, where its default lets pruned layers feed the next. What it writes
is a dense model with zeros.
"""


def is_wanda(record: CandidateRecord) -> bool:
    """Whether llm-compressor's own Wanda prunes the same weights."""
    candidate = record.candidate
    wanda = order_form(parse_metric("abs(W) * X"), candidate.group)
    by_row = candidate.group == "row" or record.pattern != "unstructured"
    return by_row and order_form(candidate.metric, candidate.group) == wanda


def to_recipe(record: CandidateRecord, modifier: str) -> str:
    """Return the recipe's text."""
    pairs = list(zip(record.layers, record.candidate.ratios, strict=True))
    structure = "0:0" if record.pattern == "unstructured" else record.pattern
    # A number in YAML 1.1 has a point, so 5e-05 would be text.
    ratios = ", ".join(repr(r) if "e" not in repr(r) else f"{r:.20f}" for _, r in pairs)
    targets = "\n".join(f"        - {quoted(layer.name)}" for layer, _ in pairs)
    return (
        f"# `{record.candidate.metric}`, secateur {record.candidate.key}\n"
        "# a sparsity for each target, in the order in which the model lists its modules\n"
        "prune_stage:\n"
        "  prune_modifiers:\n"
        f"    {modifier}:\n"
        f"      sparsity: [{ratios}]\n"
        f'      mask_structure: "{structure}"\n'
        f"      targets:\n{targets}\n"
    )


def to_modifier(record: CandidateRecord) -> str:
    """Return the modifier's source.

    Raises:
        ExportError: When the metric needs what llm-compressor does not compute.
    """
    metric = record.candidate.metric
    needed = order_form(metric, record.candidate.group).leaves | {"W"}
    if missing := [name for name in sorted(needed) if name not in _LEAVES]:
        raise ExportError(
            f"llm-compressor runs no backward pass and knows no leaves of plugins, so it cannot compute "
            f"{', '.join(missing)} of `{metric}`; export python or masks instead"
        )
    needs_gram = bool(needed & {"D", "Y"})
    scores = scores_function(record, needed)
    head = _HEAD.format(metric=metric, tried=TRIED, key=record.candidate.key)
    body = _CLASS.format(
        name=_NAME,
        gram="columns, columns" if needs_gram else "0",
        add_gram="\n        self.gram.addmm_(x.T, x)" if needs_gram else "",
        arguments="".join(f"\n                    {_LEAVES[n]}," for n in LEAVES if n in needed),
    )
    pieces = [helpers_for(scores), scores, mask_function(record)]
    functions = "\n\n".join(piece for piece in pieces if piece)
    return (
        head
        + functions
        + "\n\n"
        + (_INVERSE.lstrip() if "D" in needed else "")
        + (_OUTPUTS.lstrip() if "Y" in needed else "")
        + body
    )


def write_llm_compressor(record: CandidateRecord, path: Path) -> None:
    """Write the folder.

    Raises:
        ExportError: When llm-compressor cannot compute the metric.
    """
    candidate = record.candidate
    own = is_wanda(record)
    modifier = "" if own else to_modifier(record)
    path.mkdir()
    if modifier:
        (path / "modifier.py").write_text(modifier, encoding="utf-8")
    recipe = to_recipe(record, "WandaPruningModifier" if own else _NAME)
    (path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    ratios = {layer.name: r for layer, r in zip(record.layers, candidate.ratios, strict=True)}
    (path / "sparsity.json").write_text(json.dumps(ratios, indent=1) + "\n", encoding="utf-8")
    more = "" if own else "- `modifier.py` computes the metric; it must be imported, as above.\n"
    readme = _README.format(
        metric=candidate.metric, group=candidate.group, pattern=record.pattern, sparsity=record.sparsity,
        count=len(record.layers), key=candidate.key, tried=TRIED, more=more,
        imports="" if own else "import modifier  # the file in this folder\n",
    )  # fmt: skip
    (path / "README.md").write_text(readme, encoding="utf-8")
