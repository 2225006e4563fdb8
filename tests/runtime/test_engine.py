"""The loop is lossless: whatever is drafted, the text is the one that decoding token by token gives."""

from dataclasses import replace

import pytest
import torch

from sparsespec_compile.errors import PoolTooSmallError
from sparsespec_compile.kernels.ops import Mode, scored_rows_at_most
from sparsespec_compile.runtime.host.request import Request

from ..support.toy import Toy, prompts, requests_of, run, state_of

LENGTHS = (1, 5, 23, 40)


@pytest.fixture(scope="module")
def toy():
    return Toy()


@pytest.mark.parametrize("draft_tokens", [0, 1, 4, 8])
@pytest.mark.parametrize("drafter", ["pillar", "window", "full", "ngram"])
def test_greedy_text_is_plain_decodings(toy, draft_tokens, drafter):
    requests = requests_of(LENGTHS, 60)
    texts = run(toy.engine(draft_tokens=draft_tokens, drafter=drafter, min_budget=4, page_size=4), requests)
    assert texts == [toy.decode(request) for request in requests]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.1, "top_k": 9, "top_p": 0.9},
    ],
)
def test_sampled_text_is_plain_decodings(toy, params):
    requests = requests_of(LENGTHS, 40, **params)
    texts = run(toy.engine(draft_tokens=4, min_budget=3), requests)
    assert texts == [toy.decode(request) for request in requests]


def test_sampled_text_does_not_depend_on_company(toy):
    engine = toy.engine(draft_tokens=5, min_budget=3, max_requests=3)
    together = run(engine, requests_of(LENGTHS, 30, temperature=0.9))
    alone = [run(engine, [request])[0] for request in requests_of(LENGTHS, 30, temperature=0.9)]
    assert together == alone


def test_sliding_windows():
    windowed = Toy(windows=(6, 0, 17))
    requests = requests_of(LENGTHS, 50)
    texts = run(windowed.engine(draft_tokens=4, min_budget=8, page_size=8), requests)
    assert texts == [windowed.decode(request) for request in requests]


@pytest.mark.parametrize("drafter", ["pillar", "window", "full", "ngram"])
@pytest.mark.parametrize("page_size", [1, 8])
def test_chunks(page_size, drafter):
    """Texts go over many starts, drafts and verifications lie on both sides of some, and pages are given back."""
    chunked = Toy(windows=(6, 0, 17), chunked=True)
    requests = requests_of(LENGTHS, 50)
    settings = {"draft_tokens": 4, "min_budget": 8, "page_size": page_size, "prefill_chunk": 7}
    engine = chunked.engine(drafter=drafter, pool_tokens=400, **settings)
    assert run(engine, requests) == [chunked.decode(request) for request in requests]


def test_statistics_of_chunks_count_what_rows_see():
    """Plain decoding from position 9 to 58, one row each: 0 layers without a window."""
    chunked = Toy(windows=(8,), chunked=True)
    engine = chunked.engine(draft_tokens=0, page_size=4)
    (request,) = requests_of((10,), 50)
    run(engine, [request])
    token = chunked.layout(4).layers[0].elements_per_token()
    assert engine.stats.kv_read == token * sum(position % 8 + 1 for position in range(10, 59))


@pytest.mark.parametrize("prefill_chunk", [1, 7, 64])
def test_chunked_prefill(toy, prefill_chunk):
    requests = requests_of(LENGTHS, 20)
    texts = run(toy.engine(draft_tokens=3, min_budget=4, prefill_chunk=prefill_chunk), requests)
    assert texts == [toy.decode(request) for request in requests]


def test_requests_wait_for_slots_and_pages(toy):
    requests = requests_of((3, 9, 30, 2, 17, 8), 25)
    engine = toy.engine(draft_tokens=4, min_budget=4, max_requests=2, page_size=4, pool_tokens=64)
    assert run(engine, requests) == [toy.decode(request) for request in requests]


def test_text_ends_with_its_stop_token_inside_an_accepted_block(toy):
    full = run(toy.engine(draft_tokens=0), requests_of(LENGTHS, 60))
    for place in (0, *range(20, 29)):  # the token of the prompt's pass, and every place of a cycle of 8
        stop = full[2][place]
        requests = requests_of(LENGTHS, 60, stop_tokens=[stop])
        texts = run(toy.engine(draft_tokens=8, drafter="full"), requests)
        assert texts == [toy.decode(request) for request in requests]
        assert texts[2][-1] == stop
        assert stop not in texts[2][:-1]


@pytest.mark.parametrize("new_tokens", range(1, 13))
def test_never_a_token_more_than_asked_for(toy, new_tokens):
    requests = requests_of(LENGTHS, new_tokens)
    texts = run(toy.engine(draft_tokens=8, drafter="full", page_size=1), requests)
    assert texts == [toy.decode(request) for request in requests]
    assert [len(text) for text in texts] == [new_tokens] * len(LENGTHS)


def test_garbage_in_the_pool_is_never_read(toy):
    engine = toy.engine(draft_tokens=4, min_budget=4, prefix_caching=False)
    first = run(engine, requests_of(LENGTHS, 30))
    state_of(engine).pool.fill_(float("nan"))
    state_of(engine).scores.fill_(float("nan"))
    assert run(engine, requests_of(LENGTHS, 30)) == first


def test_full_drafts_of_the_same_weights_are_all_accepted(toy):
    engine = toy.engine(draft_tokens=4, drafter="full")
    run(engine, requests_of((5, 6), 60))
    assert engine.stats.accepted_per_cycle == 4
    assert engine.stats.accepted_by_position == [1.0] * 4


def test_budgets_of_everything_accept_everything(toy):
    """Pillars on all scored positions and the tokens since are the whole cache: a gap or a shift would be rejected."""
    for drafter in ("pillar", "window"):
        engine = toy.engine(draft_tokens=6, drafter=drafter, min_budget=1000)
        run(engine, requests_of((1, 30, 50), 60))
        assert engine.stats.accepted_per_cycle == 6


def test_the_last_rows_of_long_verifications_choose_the_pillars(toy):
    """As many as the GPU kernel scores while it attends; drafts still read everything since the verification."""
    engine = toy.engine(draft_tokens=40, min_budget=4)
    forward, scored, verified = engine.target.forward, [], {}

    def spy(*inputs):
        mode, _, rows, cached, _, score_rows, _, _, recent = (tensor.tolist() for tensor in inputs[6:])
        scored.extend(zip(mode, rows, score_rows, strict=True))
        for slot, (kind, at) in enumerate(zip(mode, cached, strict=True)):
            if kind == Mode.DRAFT:
                assert recent[slot] <= verified[slot]
            elif rows[slot]:
                verified[slot] = at + (rows[slot] - score_rows[slot] if kind == Mode.PREFILL else 0)
        return forward(*inputs)

    engine.target = replace(engine.target, forward=spy)
    requests = requests_of((5, 60), 150)
    assert run(engine, requests) == [toy.decode(request) for request in requests]
    most = scored_rows_at_most(2)
    assert {(rows, score_rows) for kind, rows, score_rows in scored if kind == Mode.VERIFY} >= {(41, most)}
    assert all(score_rows == min(rows, most) for kind, rows, score_rows in scored if kind == Mode.VERIFY)
    assert {score_rows for kind, _, score_rows in scored if kind == Mode.PREFILL} == {5, 41}


def test_the_layer_with_most_query_heads_to_a_kv_head_decides_how_many_rows_are_scored(toy):
    engine = toy.engine(draft_tokens=40, min_budget=4)
    first, second = engine.target.layout.layers
    forward, scored = engine.target.forward, set()

    def spy(*inputs):
        scored.update(inputs[11][inputs[6] == Mode.VERIFY].tolist())
        return forward(*inputs)

    layers = (replace(first, q_heads=16 * first.kv_heads), second)  # this toy's attention asks nobody for its heads
    engine.target = replace(engine.target, forward=spy, layout=replace(engine.target.layout, layers=layers))
    run(engine, requests_of((5,), 90))
    assert max(scored) == scored_rows_at_most(16)


@pytest.mark.parametrize(("schedule", "together"), [("balanced", {2}), ("grouped", {0, 8})])
def test_requests_of_one_prompt_length_verify_as_the_schedule_says(toy, schedule, together):
    engine = toy.engine(draft_tokens=3, min_budget=4, schedule=schedule)
    verifying = []
    make_step = engine.target.forward

    def spy(*inputs):
        verifying.append(int((inputs[6] == 2).sum()))
        return make_step(*inputs)

    engine.target = replace(engine.target, forward=spy)
    run(engine, requests_of([5] * 8, 60))
    steady = verifying[8:40]
    assert set(steady) == together  # 8 requests over 4 phases, or over one


def test_stats_of_plain_decoding(toy):
    engine = toy.engine(draft_tokens=0)
    run(engine, requests_of(LENGTHS, 10))
    assert engine.stats.tokens == 40
    assert engine.stats.tokens_per_target_pass == 1
    assert engine.stats.kv_bytes_share == 1
    assert engine.stats.cycles == 0


def test_share_of_kv_bytes_is_what_the_op_is_asked_to_read(toy):
    """Counted a second time from the tensors that the op gets."""
    engine = toy.engine(draft_tokens=3, min_budget=4)
    read = []
    forward = engine.target.forward

    def spy(*inputs):
        mode, _, rows, cached, _, _, _, pillars, recent = inputs[6:]
        sparse = (pillars + cached + 1 - recent) * (mode == 1)
        dense = (cached + rows) * (mode == 2)
        read.append(int(((sparse + dense) * (rows > 0)).sum()))
        return forward(*inputs)

    engine.target = replace(engine.target, forward=spy)
    requests = requests_of((7, 30), 33)
    run(engine, requests)
    elements = sum(layer.elements_per_token() for layer in engine.target.layout.layers)
    assert engine.stats.kv_read == sum(read) * elements
    plain = sum(length + 1 for request in requests for length in range(len(request.prompt), request.max_length - 1))
    assert engine.stats.kv_read_plain == plain * elements


def test_request_larger_than_the_pool_is_refused_and_nothing_is_lost(toy):
    engine = toy.engine(draft_tokens=4, page_size=4, pool_tokens=32)
    with pytest.raises(PoolTooSmallError, match=r"33 tokens.* 9 pages.*holds 8.*pool_tokens"):
        run(engine, requests_of((13,), 20))
    assert run(engine, requests_of((12,), 20)) == [toy.decode(request) for request in requests_of((12,), 20)]


def test_closing_early_leaves_the_engine_usable(toy):
    engine = toy.engine(draft_tokens=4, min_budget=4, max_requests=2)
    iterator = engine.run(requests_of(LENGTHS, 50))
    next(iterator)
    iterator.close()
    requests = requests_of(LENGTHS, 20)
    assert run(engine, requests) == [toy.decode(request) for request in requests]


def test_an_exception_in_the_model_leaves_the_engine_usable(toy):
    engine = toy.engine(draft_tokens=4, min_budget=4)
    forward = engine.target.forward
    calls = []

    def failing(*inputs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return forward(*inputs)

    engine.target = replace(engine.target, forward=failing)
    with pytest.raises(KeyboardInterrupt):
        run(engine, requests_of(LENGTHS, 50))
    requests = requests_of(LENGTHS, 20)
    assert run(engine, requests) == [toy.decode(request) for request in requests]


def test_no_requests(toy):
    assert run(toy.engine(), []) == []


def test_output_is_yielded_as_it_becomes_final(toy):
    request = Request(prompts(9)[0], 30)
    pieces = [output.tokens for output in toy.engine(draft_tokens=4, min_budget=4).run([request])]
    assert [token for piece in pieces for token in piece] == request.output
    assert len(pieces[0]) == 1  # the prompt's own pass gives the first token
    assert all(1 <= len(piece) <= 5 for piece in pieces)


def test_greedy_and_sampled_requests_side_by_side(toy):
    mixed = requests_of(LENGTHS, 20) + requests_of(LENGTHS, 20, temperature=1.1)
    texts = run(toy.engine(draft_tokens=3, min_budget=4), mixed)
    assert texts == [toy.decode(request) for request in mixed]
    assert torch.tensor(texts[:4]).ne(torch.tensor(texts[4:])).any()
