"""Which part of each weight a rank holds, by the model's own plan."""

import pytest
import torch

from sparsespec_compile.errors import ParallelPlanError
from sparsespec_compile.passes.parallel.division import Split, Summand, VocabularySplit
from sparsespec_compile.passes.parallel.plan import divisions
from sparsespec_compile.passes.parallel.shard import held, part_of, shard
from sparsespec_compile.passes.ranks import Ranks

from ..passes.families import tiny


def group(size):
    return [Ranks(rank, size, "") for rank in range(size)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "qwen3_moe", "deepseek_v3"])
def test_the_parts_of_all_ranks_are_the_whole(family):
    whole = dict(tiny(family).named_parameters())
    parts = []
    for ranks in group(2):
        model = tiny(family)
        part = shard(model, ranks)
        assert part_of(model) is part
        parts.append(dict(model.named_parameters()))
    for path, tensor in whole.items():
        division, held_by = part.divisions.get(path), [one[path] for one in parts]
        if division is None:
            assert all(torch.equal(one, tensor) for one in held_by), path
        elif isinstance(division, Summand):
            assert torch.equal(held_by[0] + held_by[1], tensor), path
        elif isinstance(division, VocabularySplit):  # filled up with zeros behind the last token
            assert torch.equal(torch.cat(held_by)[: len(tensor)], tensor), path
            assert not torch.cat(held_by)[len(tensor) :].any(), path
        elif division.copies > 1:
            assert all(torch.equal(one, tensor) for one in held_by), path
        else:
            blocks = [one.chunk(division.blocks, division.dim) for one in held_by]
            joined = [block for pieces in zip(*blocks, strict=True) for block in pieces]
            assert torch.equal(torch.cat(joined, division.dim), tensor), path
            assert all(one.untyped_storage().nbytes() == tensor.nbytes // 2 for one in held_by), path
    assert part.divisions


def test_what_packed_weights_and_few_kv_heads_give_to_each_rank():
    weight = torch.arange(12)[:, None]
    pieces = [held(weight, Split(0, blocks=2), ranks)[:, 0].tolist() for ranks in group(3)]
    assert pieces == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    pieces = [held(weight, Split(0, copies=2), ranks)[:, 0].tolist() for ranks in group(4)]
    assert pieces == [list(range(6)), list(range(6)), list(range(6, 12)), list(range(6, 12))]


def test_query_heads_go_with_the_kv_heads_that_they_read():
    """2 KV heads of 8 elements on 6 ranks, and 6 query heads: rank r has query head r, which reads KV head r // 3."""
    model = tiny("llama")
    found = divisions(model, Ranks(0, 6, ""))
    for ranks in group(6):
        assert found["model.layers.0.self_attn.q_proj.weight"].ranges(48, ranks) == [
            (8 * ranks.rank, 8 * ranks.rank + 8)
        ]
        start = ranks.rank // 3 * 8
        assert found["model.layers.0.self_attn.k_proj.weight"].ranges(16, ranks) == [(start, start + 8)]


@pytest.mark.parametrize(
    ("family", "settings", "size", "text"),
    [
        ("llama", {}, 4, "q_proj.weight gives 6 heads"),
        ("llama", {"num_attention_heads": 12, "num_key_value_heads": 3}, 2, "k_proj.weight gives 3 heads"),
        ("llama", {"intermediate_size": 97}, 2, "gate_proj.weight has 97 columns"),
        ("gpt2", {}, 2, "has no plan"),
        ("phi3", {}, 2, "splits no weight"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(family, settings, size, text):
    model = tiny(family, **settings)
    before = [parameter.shape for parameter in model.parameters()]
    with pytest.raises(ParallelPlanError, match=text):
        shard(model, Ranks(0, size, ""))
    assert [parameter.shape for parameter in model.parameters()] == before
    assert part_of(model) is None


def test_an_unknown_style_is_refused_by_name():
    model = tiny("llama")
    model._tp_plan = {**model.tp_plan, "model.layers.*.mlp.up_proj": "diagonal"}
    with pytest.raises(ParallelPlanError, match=r"layers\.0\.mlp\.up_proj\.weight by the style 'diagonal'"):
        shard(model, Ranks(0, 2, ""))
