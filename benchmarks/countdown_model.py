"""The embedded Countdown model and its held-out puzzles, for benchmarks that need real reasoning without a download."""

import sys
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from countdown.puzzles import puzzles  # noqa: E402

FOLDER = EXAMPLES / "countdown" / "model"


def load(device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER)


def held_out_prompts(tokenizer: PreTrainedTokenizerBase, count: int, device: str, seed: int = 1) -> dict[str, Tensor]:
    """The first `count` held-out puzzles as a left-padded batch: input_ids and attention_mask, int64 [count, width]."""
    prompts = [puzzle.prompt for puzzle in islice(puzzles(seed, held_out=True), count)]
    batch = tokenizer(prompts, padding=True, return_tensors="pt").to(device)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
