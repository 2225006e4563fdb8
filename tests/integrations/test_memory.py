"""Memory between rollout and training."""

import gc

import pytest
import torch
from transformers import GenerationConfig

import sparsespec_compile as ss

from ..support.models import tiny

TURNS, EVERY = 200, 20
PROMPTS = [[3, 4, 5], [6, 7, 8]] * 8


@pytest.mark.slow
def test_rollouts_and_optimizer_steps_in_turn():
    """The process has the same memory after 40 turns and after 200."""
    process = pytest.importorskip("psutil", reason="needs '.[test]'").Process()
    model = tiny("qwen3", num_hidden_layers=1, initializer_range=0.05)
    installation = ss.install(model, ss.SpecConfig(draft_tokens=2, min_budget=8, memory_fraction=0.2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = GenerationConfig(do_sample=True, max_new_tokens=8)
    resident = []
    for turn in range(TURNS):
        outputs = model.generate_batch(PROMPTS, generation_config=settings)
        assert installation.fast.memory_plan is None
        ids = torch.tensor([output.prompt_ids + output.generated_tokens for output in outputs.values()])
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if turn % EVERY == EVERY - 1:
            gc.collect()
            resident.append(process.memory_info().rss)
    assert abs(resident[-1] - resident[1]) < 2 * 2**20, [size / 2**20 for size in resident]
