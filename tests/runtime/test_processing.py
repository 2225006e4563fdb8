"""Processed logits in a running engine: slots that change owners, late steps, captured ones and such as cannot be."""

import math

import pytest
import torch
from transformers.generation import logits_process as theirs

from sparsespec_compile.kernels.ops import draw_tokens
from sparsespec_compile.runtime.device.graphs import StepRunner
from sparsespec_compile.runtime.device.processing import Processing, RowProcessors, Rule
from sparsespec_compile.runtime.device.sampling import DrawParams, SamplingRows
from sparsespec_compile.runtime.device.step import Variant
from sparsespec_compile.runtime.host.request import Request

from ..support.adversary import AdversarialDevice
from ..support.toy import Toy, prompts, run

NEW_TOKENS = 24
PROMPTS = prompts(5, 9, 3, 14, 7, 4)
GREEDY, SAMPLED = DrawParams(), DrawParams(temperature=0.9, seed=5)


def nothing(ids, scores):
    return scores


def penalised(ids, scores):
    scores = theirs.RepetitionPenaltyLogitsProcessor(1.6)(ids, scores)
    scores = theirs.NoRepeatNGramLogitsProcessor(2)(ids, scores)
    return theirs.SuppressTokensLogitsProcessor([3])(ids, scores)


def every_third(ids, scores):
    scores = scores.clone()
    scores[:, int(ids[0, -1]) % 3 :: 3] = -math.inf
    return scores


PENALISED = Processing(repetition=1.6, ngram=2, rules=(Rule(3, -math.inf),))
KINDS = [(GREEDY, nothing), (GREEDY, penalised), (SAMPLED, every_third), (SAMPLED, penalised), (GREEDY, nothing)]
KINDS.append((GREEDY, every_third))


def requests():
    return [
        Request(
            prompt,
            NEW_TOKENS - 3 * nth,  # they leave their slots at different times
            params,
            processing=PENALISED if change is penalised else None,
            processors=RowProcessors((every_third,)) if change is every_third else None,
        )
        for nth, (prompt, (params, change)) in enumerate(zip(PROMPTS, KINDS, strict=True))
    ]


def decoded(toy, request, change):
    """Token by token, without cache, drafts and neighbours."""
    p = request.params
    rows = SamplingRows(*(torch.tensor([value]) for value in (p.temperature, p.top_k, p.top_p, p.min_p, p.seed)))
    text = list(request.prompt)
    while len(text) < request.max_length:
        scores = change(torch.tensor([text]), toy.logits(text)[None])
        text.append(int(draw_tokens(scores, *rows, torch.tensor([len(text)]))))
    return text[len(request.prompt) :]


@pytest.fixture(scope="module")
def toy():
    return Toy()


@pytest.fixture(scope="module")
def expected(toy):
    texts = [decoded(toy, request, change) for request, (_, change) in zip(requests(), KINDS, strict=True)]
    plain = [decoded(toy, request, nothing) for request in requests()]
    assert [text == other for text, other in zip(texts, plain, strict=True)] == [c is nothing for _, c in KINDS]
    return texts


@pytest.mark.parametrize(
    "settings",
    [
        {"draft_tokens": 4, "min_budget": 4},
        {"draft_tokens": 4, "min_budget": 4, "max_requests": 2},
        {"draft_tokens": 3, "drafter": "ngram", "max_requests": 3},
        {"draft_tokens": 0, "max_requests": 2},
        {"draft_tokens": 3, "min_budget": 4, "draft_weights": "int8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("captures", [False, True], ids=["as they are", "captured"])
def test_texts_are_those_of_decoding_token_by_token(toy, expected, settings, captures):
    engine = toy.engine(AdversarialDevice(3, captures=captures), budget_ratio=0.01, **settings)
    assert run(engine, requests()) == expected


def test_steps_whose_logits_go_through_functions_are_not_captured(toy):
    class Refuses:
        def capture(self, work, warm_ups):
            raise AssertionError("captured")

    step = toy.engine().capture(2, 64)._runner.step
    StepRunner(step, Refuses())(10, 10, Variant(), {0: RowProcessors((every_third,))})
    with pytest.raises(AssertionError, match="captured"):
        StepRunner(step, Refuses())(10, 10, Variant())


def test_only_iterations_that_need_it_process_logits(toy):
    step = toy.engine().capture(2, 64)._runner.step
    assert not step.variant([]).processed
    assert step.variant([], processing=[Processing(repetition=1.5)]) == Variant(
        promise=step.variant([]).promise, processed=True
    )
    assert step.variant([], processing=[Processing(), Processing(ngram=2)]).no_repeats


@pytest.mark.parametrize(
    ("processing", "fits"),
    [
        (Processing(ngram=8), True),
        (Processing(ngram=9), False),
        (Processing(rules=(Rule(3, 1.0), Rule(3, -math.inf), Rule(4, 2.0))), True),
        (Processing(rules=(Rule(3, 1.0), Rule(3, 2.0))), False),
        (Processing(rules=(Rule(3, -math.inf, prefix=(1,) * 6),)), False),
        (Processing(rules=tuple(Rule(token, -math.inf) for token in range(321))), False),
    ],
)
def test_what_the_op_can_do(processing, fits):
    assert processing.fits is fits
