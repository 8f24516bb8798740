"""A model of random weights, to measure speed and memory at sizes that are not at hand.

    python benchmarks/random_model.py docs/configs/llama-3.1-8b.json random-8b [cuda]

Writes a folder in bfloat16 with a tokenizer that knows bytes. What such a model says means nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from support import save_tokenizer


def main() -> None:
    """Write the model."""
    folder = Path(sys.argv[2])
    torch.manual_seed(0)
    with torch.device(sys.argv[3] if len(sys.argv) > 3 else "cpu"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(sys.argv[1]), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    save_tokenizer(folder)


if __name__ == "__main__":
    main()
