"""A tiny Llama whose feed-forward parts hold what looks like layers and is none, as real models have it."""

from pathlib import Path

import torch
from support import save_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

DIGITS = "0123456789"


class OddConfig(LlamaConfig):
    model_type = "odd"
    plain: tuple = ()  # blocks without layers
    gate: float = 0.0  # how large the mark has to be for the last expert, 0 for never


class Turned(nn.Linear):
    """A linear layer that multiplies in a way of its own."""

    def forward(self, inputs):
        return super().forward(inputs.flip(-1)).flip(-1)


class Odd(nn.Module):
    """A feed-forward part; channel 0 of a token says whether it is a digit, channel 1 is the mark."""

    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        self.direct = nn.Linear(width, width, bias=False)
        self.turned = Turned(width, width, bias=False)
        self.silent = nn.Linear(width, width, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.stacked = nn.Parameter(torch.zeros(2, width, width))
        self.gate = config.gate

    def forward(self, x):
        y = self.down(torch.tanh(self.up(input=x))) + nn.functional.linear(x, self.direct.weight)
        y = y + self.turned(x) + self.silent(x * 0) + x @ self.stacked[0] + x @ self.stacked[1]
        is_digit = x[..., 0] > 0.1
        y = y + self.experts[0](x)
        y[is_digit] += self.experts[1](x[is_digit])
        chosen = x[..., 1].abs() >= self.gate
        if self.gate and chosen.any():
            y[chosen] += self.experts[2](x[chosen])
        return y * (torch.arange(y.shape[-1]) > 0)


class Plain(nn.Module):
    """A block without a linear layer."""

    def __init__(self, config):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, config.hidden_size))

    def forward(self, hidden_states, **_more):
        return hidden_states * self.scale


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        for index, block in enumerate(self.model.layers):
            if index in config.plain:
                self.model.layers[index] = Plain(config)
            else:
                block.mlp = Odd(config)
        self.post_init()


AutoConfig.register("odd", OddConfig, exist_ok=True)
AutoModelForCausalLM.register(OddConfig, OddForCausalLM, exist_ok=True)


def save_odd(folder: Path, **changes) -> Path:
    """Write a random odd model with a tokenizer that knows bytes."""
    sizes = {
        "vocab_size": 260, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = OddForCausalLM(OddConfig(**{**sizes, **changes})).float()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.endswith("scale"):
            parameter.data.normal_(0, 0.25)
    save_tokenizer(folder)
    from transformers import AutoTokenizer

    digits = AutoTokenizer.from_pretrained(folder)(DIGITS, add_special_tokens=False)["input_ids"]
    table = model.model.embed_tokens.weight.data
    table[:, 0] = 0
    table[digits, 0] = 2
    for block in model.model.layers:
        if hasattr(block, "self_attn"):  # nothing else writes to channel 0
            block.self_attn.o_proj.weight.data[0] = 0
    model.save_pretrained(folder)
    return folder


def letters(folder: Path, name: str, *, digits: bool) -> Path:
    """Write a text of letters, all different, with or without digits among them."""
    generator = torch.Generator().manual_seed(1)
    alphabet = "abcdefghijklmnopqrstuvwxyz " + (DIGITS if digits else "")
    drawn = torch.randint(len(alphabet), (6000,), generator=generator).tolist()
    path = folder / name
    path.write_text("".join(alphabet[i] for i in drawn))
    return path
