"""A vocabulary that ranks share: the texts are those of one rank, and plain rows exchange a sum and a token alone."""

import math

import pytest
import torch

import sparsespec_compile as ss
from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.errors import KernelInputError
from sparsespec_compile.passes.parallel.division import VocabularySplit
from sparsespec_compile.passes.ranks import Ranks, VocabularyPart
from sparsespec_compile.runtime.device import sampling as drawing
from sparsespec_compile.runtime.device.sampling import SamplingRows

from ..support.models import VOCABULARY, left_padded, tiny
from ..support.ranks import run_ranks

SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "head_dim": 16}
PROMPTS = [row[mask.bool()].tolist() for row, mask in zip(*left_padded(3, 41, 17), strict=True)]

GREEDY = ss.SamplingParams(max_new_tokens=16)
PLAIN = ss.SamplingParams(max_new_tokens=16, temperature=1.3, seed=5)
TOP_K = ss.SamplingParams(max_new_tokens=16, temperature=0.9, top_k=9, seed=6)
TOP_P = ss.SamplingParams(max_new_tokens=16, temperature=1.5, top_p=0.8, min_p=0.01, seed=7)
LOGPROBS = ss.SamplingParams(max_new_tokens=16, temperature=0.8, seed=8, logprobs=True)
WHOLE = (TOP_K, TOP_P, LOGPROBS)
TIED = ("gemma3_text", {"tie_word_embeddings": True})
UNTIED = ("llama", {})


def texts(ranks, family, settings):
    """Texts and log-probabilities of each kind and of all kinds in a batch, and the sizes of what ranks exchanged."""
    model = tiny(family, **SHAPE, **settings)
    config = ss.SpecConfig(draft_tokens=3, min_budget=12, budget_ratio=0.01, max_length=128, tensor_parallel=ranks)
    fast = ss.optimize(model, config)
    exchanged = []

    def record(x, *rest):
        exchanged.append(x.shape[1] if x.dim() == 2 else 1)
        return ops.all_gather(x, *rest)

    drawing.all_gather = record
    runs = [[params] * 3 for params in (GREEDY, PLAIN, *WHOLE)] + [[PLAIN, TOP_K, LOGPROBS]]
    found = []
    for sampling in runs:
        exchanged.clear()
        written = [(one.token_ids, one.logprobs) for one in fast.generate_batch(PROMPTS, sampling)]
        found.append((written, sorted(set(exchanged))))
    return found, model.get_output_embeddings().weight.shape[0]


def on_rank(rank, size, families):
    return [texts(size, *family) for family in families]


def check(size, *families):
    part = VocabularyPart(Ranks(0, size, ""), VOCABULARY)
    expected = [texts(1, *family)[0] for family in families]
    for written_by_rank in run_ranks(on_rank, size, families, timeout=240):
        for (found, rows), alone in zip(written_by_rank, expected, strict=True):
            assert rows == part.length < VOCABULARY
            whole = [part.length]
            # Of drafts nobody reads log-probabilities.
            assert [sizes for _, sizes in found] == [[1], [1], whole, whole, [1, *whole], whole]
            for (written, _), (wanted, _) in zip(found, alone, strict=True):
                for (tokens, logprobs), (own_tokens, own_logprobs) in zip(written, wanted, strict=True):
                    assert tokens == own_tokens
                    assert logprobs == pytest.approx(own_logprobs, abs=1e-4)  # sums over ranks round in another order


@pytest.mark.slow
@pytest.mark.parametrize("family", [TIED, UNTIED], ids=("tied", "untied"))
def test_two_ranks_draw_what_one_draws(family):
    check(2, family)


@pytest.mark.slow
def test_four_ranks_draw_what_one_draws():
    check(4, TIED, UNTIED)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_draw_what_the_whole_draws(monkeypatch, size, whole):
    """Ranks one after the other in this process: the first round collects what they exchange."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(40, VOCABULARY, generator=generator)
    logits[::2] = (logits[::2] * 2).round() / 2  # ties
    filtered = torch.tensor([0, 5, 0, 60]).repeat(10) if whole else torch.zeros(40, dtype=torch.int64)
    temperature = torch.tensor([0.0, 0.7, 1.0, 30.0]).repeat(10)
    ones = torch.ones(40)
    settings = SamplingRows(temperature, filtered, ones, 0 * ones, torch.arange(40))
    position = torch.arange(40) * 1000
    width = VocabularyPart(Ranks(0, size, ""), VOCABULARY).length
    padded = torch.cat([logits, torch.full((40, size * width - VOCABULARY), math.inf)], dim=1)
    sent = {}

    def exchange(x, group, ranks):
        sent[rank] = x
        return torch.stack([sent.get(other, x) for other in range(ranks)])

    monkeypatch.setattr(drawing, "all_gather", exchange)
    for _ in range(2):
        found = []
        for rank in range(size):
            part = VocabularyPart(Ranks(rank, size, ""), VOCABULARY)
            own = padded[:, part.first : part.first + width]
            seen = drawing.whole_rows(own, part) if whole else own
            found.append((drawing.draw(seen, settings, position, part, whole), seen))
    expected = ops.draw_tokens(logits, *settings, position)
    for tokens, seen in found:
        assert torch.equal(tokens, expected)
        assert not whole or torch.equal(seen, logits)
    assert sent[0].shape == ((40, width) if whole else (40,))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("tokens", [40, 97, 151, 128256, 151936])
def test_parts_make_up_the_vocabulary(size, tokens):
    parts = [VocabularyPart(Ranks(rank, size, ""), tokens) for rank in range(size)]
    assert len({part.length for part in parts}) == 1
    if not parts[0].possible:
        assert parts[-1].held == 0
        return
    assert all(part.held > 0 and part.first % 4 == 0 for part in parts)
    assert [part.first for part in parts[1:]] == [part.first + part.held for part in parts[:-1]]
    assert parts[-1].first + parts[-1].held == tokens
    weight = torch.arange(tokens * 2.0).view(tokens, 2)
    held = [VocabularySplit(0, tokens=tokens).take(weight, (tokens, 2), part.ranks)[0] for part in parts]
    assert {len(rows) for rows in held} == {parts[0].length}
    assert torch.equal(torch.cat(held)[:tokens], weight)


def test_a_vocabulary_that_would_leave_a_rank_without_a_token_stays_whole():
    assert not VocabularyPart(Ranks(0, 4, ""), 24).possible
    assert VocabularyPart(Ranks(0, 4, ""), 25).possible


def test_keys_have_the_order_of_sums_and_the_lowest_token_among_equals():
    values = [-math.inf, -3.0, -1e-30, 0.0, 1e-30, 2.5, 2.5, 7.0, math.inf]
    tokens = [1, 2, 3, 4, 2**31 - 1, 9, 8, 0, 5]
    keys = drawing._key(torch.tensor(values), torch.tensor(tokens))
    assert keys.tolist() == sorted(keys.tolist())
    assert len(set(keys.tolist())) == len(keys)
    zeros = drawing._key(torch.tensor([-0.0, 0.0]), torch.tensor([3, 3]))
    assert zeros[0] == zeros[1]


def test_an_embedding_of_some_tokens_gives_zeros_for_the_others():
    weight = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    found = ops.embed_part(weight, torch.tensor([[7, 8, 9, 10]]), 8)
    assert found.nan_to_num(nan=-1.0).tolist() == [[[0, 0], [1, 2], [3, -1], [0, 0]]]
    torch.library.opcheck(ops.embed_part, (torch.randn(4, 2), torch.tensor([[7, 8]]), 8))
    with pytest.raises(KernelInputError, match=r"ids are torch\.int32"):
        ops.embed_part(weight, torch.zeros(1, dtype=torch.int32), 8)


def test_gathering_alone_and_from_groups_that_there_are_not():
    assert torch.equal(ops.all_gather(torch.arange(3), "", 1), torch.arange(3)[None])
    torch.library.opcheck(ops.all_gather, (torch.randn(3, 2), "", 1))
    with pytest.raises(KernelInputError, match="no process group 'nobody'"):
        ops.all_gather(torch.arange(3), "nobody", 2)
