"""Checkpoints that are read part by part, by `load_shards` or by transformers' own loader."""

import os
import threading
import time
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import sparsespec_compile as ss
from sparsespec_compile.errors import ConfigError, ParallelPlanError, ShardedModelError
from sparsespec_compile.passes.compat import loads_by_distributed_config

from ..passes.families import tiny
from ..support.models import left_padded
from ..support.ranks import run_ranks

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="transformers loads parts with accelerate")

EVEN = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
FEW = {**EVEN, "num_key_value_heads": 1}


def text_of(model):
    input_ids, mask = left_padded(3, 30)
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=2, min_budget=8, budget_ratio=0.01))
    return fast.generate(input_ids, attention_mask=mask, max_new_tokens=30, do_sample=False)


def by_load_shards(rank, size, folders):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    texts = []
    for folder in folders:
        model = ss.load_shards(folder, dtype=torch.float32)
        texts.append(text_of(model))
        with pytest.raises(ShardedModelError):
            model(torch.tensor([[1, 2]]))
    return texts


def by_transformers(rank, size, folder, whole, refused):
    """By its own loader; `whole` are modules that it shall leave whole. Also what another such model is refused for."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))

    def load(path):
        if not loads_by_distributed_config():
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, tp_plan="auto")
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(tp_size=size, tp_plan=dict.fromkeys(whole, "replicate") or None)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=config)

    text = text_of(load(folder))
    with pytest.raises(ParallelPlanError) as caught:
        text_of(load(refused))
    return text, str(caught.value)


def saved(folder, family, settings):
    model = tiny(family, **settings)
    model.save_pretrained(folder, max_shard_size="40KB")
    return text_of(model)


@pytest.mark.slow
def test_a_checkpoint_that_ranks_load_part_by_part_gives_the_same_text(tmp_path):
    cases = {
        "llama": {**EVEN, "vocab_size": 160},
        "qwen2": FEW,
        "qwen3_moe": EVEN,
        "gemma3_text": {**EVEN, "tie_word_embeddings": True},
    }
    expected = [saved(tmp_path / family, family, settings) for family, settings in cases.items()]
    for texts in run_ranks(by_load_shards, 2, [tmp_path / family for family in cases], timeout=500):
        for text, alone in zip(texts, expected, strict=True):
            assert torch.equal(text, alone)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [("model.embed_tokens", "lm_head"), ()])
def test_a_model_that_transformers_has_loaded_in_parts_is_taken(tmp_path, whole):
    expected = saved(tmp_path / "even", "qwen3", EVEN)
    saved(tmp_path / "few", "qwen3", FEW)
    for text, refusal in run_ranks(by_transformers, 2, tmp_path / "even", whole, tmp_path / "few", timeout=500):
        assert torch.equal(text, expected)
        assert "k_proj" in refusal
        assert "load_shards" in refusal


def memory_while_loading(rank, size, folder):
    """MiB of anonymous memory that loading takes at most and leaves, and of this rank's parameters."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    small = folder / "small"
    ss.load_shards(small, dtype=torch.float32)  # imports what loading needs
    before, peak, done = _anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        model = ss.load_shards(folder / "large", dtype=torch.float32)
    finally:
        done.set()
        thread.join()
    dist.barrier()
    held = sum(parameter.nbytes for parameter in model.parameters())
    return (peak - before) / 2**20, held / 2**20


def _anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_a_rank_holds_its_part_and_a_layer_while_it_loads(tmp_path):
    wide = {**EVEN, "hidden_size": 512, "intermediate_size": 2048, "head_dim": 64}
    saved(tmp_path / "small", "llama", EVEN)
    model = tiny("llama", **wide, num_hidden_layers=16, vocab_size=16384)
    model.save_pretrained(tmp_path / "large", max_shard_size="64MB")
    whole = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters()) / 2**20
    del model
    for peak, held in run_ranks(memory_while_loading, 2, tmp_path, timeout=300):
        assert held < 0.51 * whole
        assert peak < held + layer + 8, (peak, held, layer, whole)


def test_loading_in_parts_needs_ranks(tmp_path):
    with pytest.raises(ConfigError, match="torchrun"):
        ss.load_shards(tmp_path)
