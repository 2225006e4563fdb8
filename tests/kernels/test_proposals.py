"""Drafts from the texts themselves: reference and Triton kernel against a search in Python, exactly."""

from functools import cache

import pytest
import torch

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.errors import KernelInputError

WIDTH, MOST, SENTINEL = 2100, 12, -7


def expected_of(texts, b, count):
    """What followed the place that is most like the end of text b."""
    text = texts[b]
    places = [
        (*rank, end, -source)
        for source, other in enumerate(texts)
        for end in range(len(other) - 1)
        if (rank := rank_of(other[max(end - 23, 0) : end + 1], text[-24:], source == b))
    ]
    *_, end, source = max(places, default=(len(text) - 2, -b))
    longer = list(texts[-source])
    for nth in range(count):
        longer.append(longer[end + 1 + nth])
    return longer[end + 1 : end + 1 + count]


def rank_of(before, end, own):
    """What orders places, of one behind the tokens `before`; None of what is no place for a text with this end."""
    if before[-1] != end[-1] and (len(before) == 1 or before[-2:-1] != end[-2:-1]):
        return None
    equal = [one == other for one, other in zip(reversed(before), reversed(end), strict=False)]
    suffix = [*equal, False].index(False)
    ends = (at for at in range(len(equal)) if not any(equal[at : at + 3]))
    count = sum(equal[: next(ends, None)])
    if suffix >= 6:
        return 7, count, own
    return (6, count, own) if count >= 10 else (suffix, own, count)


LINE = [*range(10, 22)]
NOTHING = 7, 7, 7
CASES = {
    "nothing is alike": ([[7]], NOTHING),
    "nothing is alike in several texts": ([[5, 7], [1, 2, 3]], NOTHING),
    "the longest suffix": ([[3, 1, 2, 50, 9, 2, 51, 3, 1, 2]], (50, 9, 2)),
    "the latest of several": ([[1, 50, 1, 51, 1, 52, 1]], (52, 1, 52)),
    "behind the end the last period repeats": ([[1, 2, 1, 2]], (1, 2, 1)),
    "a longer suffix in another text": ([[1, 2, 50, 2, 51, 1, 2, 3, 1, 2], [9, 3, 1, 2, 60, 61, 62]], (60, 61, 62)),
    "the same suffix in the text itself": ([[3, 1, 2, 50, 51, 3, 1, 2], [9, 8, 7, 6, 5, 3, 1, 2, 60]], (50, 51, 3)),
    "more equal tokens before it": ([[8, 3, 9, 2, 50, 51, 7, 3, 1, 2, 60, 8, 3, 6, 2]], (50, 51, 7)),
    "a line with another number": ([[*LINE, 90, 1, 2, 3, *LINE, 91]], (1, 2, 3)),
    "the number itself elsewhere": ([[*LINE, 90, 1, 2, 3, *LINE, 91], [91, 60, 91, 61]], (1, 2, 3)),
    "numbers within the line": (
        [[*LINE[:7], 80, 81, *LINE[7:], 90, 1, 2, 3, *LINE[:7], 84, 85, *LINE[7:], 91]],
        (1, 2, 3),
    ),
    "such a line in another text": ([[*LINE, 91], [*LINE, 90, 1, 2, 3]], (1, 2, 3)),
    "both texts have it": ([[*LINE, 90, 1, 2, 3, *LINE, 91], [8, 9, *LINE, 90, *[60] * 30]], (1, 2, 3)),
    "ten tokens of the line, and the number elsewhere": (
        [[*LINE[:10], 90, 1, 2, 3, *LINE[:10], 91], [91, 60]],
        (1, 2, 3),
    ),
    "nine tokens of the line": ([[*LINE[:9], 90, 1, 2, 3, *LINE[:9], 91]], (1, 2, 3)),
    "nine, and the number elsewhere": ([[*LINE[:9], 90, 1, 2, 3, *LINE[:9], 91], [91, 60, 60, 60]], (60, 60, 60)),
    "three differences in a row": (
        [[*LINE[:7], 80, 81, 82, *LINE[7:], 90, 1, 2, 3, *LINE[:7], 84, 85, 86, *LINE[7:], 91], [91, 60, 60, 60]],
        (60, 60, 60),
    ),
    "both of the last two differ": ([[*LINE, 80, 90, 1, 2, 3, *LINE, 81, 91], [91, 60, 60, 60]], (60, 60, 60)),
    "more equal tokens behind six last ones": (
        [[*LINE, 90, *LINE[:6], 1, 2, 3, *LINE, 91, *LINE[:6]], [91, *LINE[:6], 60, 61, 62]],
        (1, 2, 3),
    ),
    "six last tokens are better than a line": (
        [[*LINE, 1, 2, 3, 4, 5, 90, 50, 51, *LINE, 1, 2, 3, 4, 5, 91], [1, 2, 3, 4, 5, 91, 60, 61, 62]],
        (60, 61, 62),
    ),
    "six last tokens in the text itself": (
        [[*LINE[:6], 50, 51, 52, *LINE[:6]], [8, 9, 8, 9, *LINE[:6], 60, 61, 62]],
        (50, 51, 52),
    ),
    "five last tokens are not": (
        [[*LINE, 1, 2, 3, 4, 90, 50, 51, 52, *LINE, 1, 2, 3, 4, 91], [2, 3, 4, 91, 60, 61, 62]],
        (50, 51, 52),
    ),
    "the 24 last tokens count": (
        [[8] * 9 + [*LINE, *LINE, 1] + [9] * 9 + [*LINE, *LINE, 2] + [8] * 9 + [*LINE, *LINE]],
        (2, 8, 8),
    ),
}


def propose(op, texts, wanted, device="cpu", width=WIDTH):
    """Rows that a call leaves, the sentinel behind texts and proposals."""
    tokens = torch.full((len(texts) + 1, width), SENTINEL, dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
    length = torch.tensor([max(len(text) - 1, 0) for text in texts], dtype=torch.int32, device=device)
    got = tokens.to(device)
    op(got, length, torch.tensor(wanted, dtype=torch.int32, device=device), MOST)
    return got.cpu()


def check_cases(op, device="cpu"):
    for name, (texts, expected) in CASES.items():
        got = propose(op, texts, [3, *[0] * (len(texts) - 1)], device, width=120)
        newest = len(texts[0])
        assert tuple(got[0, newest : newest + 4].tolist()) == (*expected, SENTINEL), name
        assert expected_of(texts, 0, 3) == list(expected), name


def check_rows(op, device="cpu"):
    """Rows that are full, before some whose first tokens are compared: what stands before a row is not its text."""
    full = [*[0] * 9, 9]
    texts = [full, [6, 50, 8, 6, 60, 7, 9, 6], full, [5], [9, 5, 61, 8, 5, 62, 0]]
    texts += [[70, 50, 8, 70, 60, 7, 1, 1, 1, 69], [69, 70]]
    got = propose(op, texts, [0, 2, 0, 2, 0, 0, 2], device, width=10)
    assert got[1, 8:].tolist() == expected_of(texts, 1, 2) == [60, 7]
    assert got[3, 1:4].tolist() == [*expected_of(texts, 3, 2), SENTINEL] == [62, 0, SENTINEL]
    assert got[6, 2:4].tolist() == expected_of(texts, 6, 2) == [60, 7]


@cache
def many():
    """Texts, how many tokens each wants, and the rows that are to come out."""
    generator = torch.Generator().manual_seed(0)

    def random(length, tokens):
        return torch.randint(tokens, (length,), generator=generator).tolist()

    def noisy(period, length, tokens):
        """The same again and again, but for one token in eight."""
        text = torch.tensor(random(period, tokens)).repeat(length // period + 1)[:length]
        differs = torch.rand(length, generator=generator) < 1 / 8
        return torch.where(differs, torch.randint(tokens, (length,), generator=generator), text).tolist()

    cases = [
        ([5], 4),
        ([5, 5], 4),
        ([1, 2, 1], 4),
        ([], 0),
        ([80] * 3 + [81] + [80] * 2, 5),
        (latest := [*range(100, 2000)], 3),
        (random(1500, 2), 8),
        (random(1025, 3), 5),
        (random(1024, 40), 12),
        (random(2090, 300), 12),
        (random(2000, 10_000), 6),
        (noisy(21, 1030, 10_000), 12),
        (noisy(70, 1100, 300), 12),
        (noisy(23, 47, 300), 12),
        (noisy(24, 2047, 12), 12),
        ([7] * 1300, 9),
        (random(WIDTH - 3, 5), 12),
        (random(WIDTH, 5), 12),
        (random(300, 4), 0),
        (random(300, 4), 50),
    ]
    latest[10], latest[10 + 1024], latest[-1] = 99, 99, 99
    texts, wanted = [text for text, _ in cases], [count for _, count in cases]
    expected = torch.full((len(cases) + 1, WIDTH), SENTINEL, dtype=torch.int64)
    for row, text in enumerate(texts):
        count = min(wanted[row], MOST, WIDTH - len(text))
        longer = [*text, *(expected_of(texts, row, count) if count else [])]
        expected[row, : len(longer)] = torch.tensor(longer)
    return texts, wanted, expected


def test_reference():
    check_cases(ops.propose_ngrams)
    check_rows(ops.propose_ngrams)
    texts, wanted, expected = many()
    assert torch.equal(propose(ops.propose_ngrams, texts, wanted), expected)


def test_triton(device):
    from sparsespec_compile.kernels.drafting.ngrams import propose_ngrams

    check_cases(propose_ngrams, device)
    check_rows(propose_ngrams, device)
    texts, wanted, expected = many()
    assert torch.equal(propose(propose_ngrams, texts, wanted, device), expected)


@pytest.mark.parametrize("parts", [1, 2, 16])
def test_places_of_long_texts(parts, device, monkeypatch):
    """Places at the ends of what the kernel looks at, lists and ranks at a time, and of the parts of a text."""
    from sparsespec_compile.kernels.drafting import ngrams

    monkeypatch.setattr(ngrams, "_MOST_PARTS", parts)
    chunk, batch = ngrams._ROWS * ngrams._LANES, ngrams._BATCH
    text = [*range(100, 100 + 3 * chunk + 8)]

    def check(*texts):
        got = propose(ngrams.propose_ngrams, texts, [2] + [0] * (len(texts) - 1), device)
        newest = len(texts[0])
        assert got[0, newest : newest + 2].tolist() == expected_of(texts, 0, 2)

    for place in (0, 1, 22, chunk - 1, chunk, chunk + 22, 2 * chunk - 1, 2 * chunk, 3 * chunk, 3 * chunk + 5):
        ending = text[max(place - 23, 0) : place + 1]
        # Such places in the second text are worse by the first of their 24 tokens.
        check([*text, 5, *ending], [5, 5, 5, *ending[1:], 6, 7])
        if place:  # the newest token differs
            check([*text, 5, *ending[:-1], 4], [6] * 30)
        same = [6] * place + ending[-1:]
        for latest, first in ((place, place), (place, place - 1), (max(place - 1, 0), place)):
            check([ending[-1]], [*same[place - latest :], 7, 8], [*same[place - first :], 9, 10])
    for count in (batch - 1, batch, batch + 1, 2 * batch, 2 * batch + 1, chunk):
        listed = [one for nth in range(count) for one in (5, 200 + nth, 201 + nth)]
        check([*listed, 5])
        for best in (0, 1, count // 2, count - 1):
            check([*listed[: 3 * best], 4, *listed[3 * best :], 4, 5])
    check([5] * (2 * chunk + 1))
    check([7], [5] * chunk + [7] * (chunk + batch + 2) + [8])


def test_no_texts(device):
    from sparsespec_compile.kernels.drafting.ngrams import propose_ngrams

    none = torch.zeros(0, dtype=torch.int32, device=device)
    tokens = torch.full((1, 8), SENTINEL, device=device)
    for op in (propose_ngrams, ops.propose_ngrams):
        op(tokens, none, none, MOST)
    assert tokens.eq(SENTINEL).all()


@pytest.mark.parametrize("op", ["reference", "triton"])
@pytest.mark.parametrize("vocabulary", [2, 3, 6, 30])
def test_small_texts(op, vocabulary, device):
    from sparsespec_compile.kernels.drafting.ngrams import propose_ngrams

    generator = torch.Generator().manual_seed(vocabulary)
    for _ in range(4):
        lengths = torch.randint(1, 60, (4,), generator=generator).tolist()
        texts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
        texts[1] = [*texts[0], *texts[1]]
        where = "cpu" if op == "reference" else device
        got = propose(propose_ngrams if op == "triton" else ops.propose_ngrams, texts, [4] * 4, where, width=130)
        for row, text in enumerate(texts):
            assert got[row, len(text) : len(text) + 4].tolist() == expected_of(texts, row, 4)


def test_schema():
    tokens = torch.tensor([[1, 2, 1, 0, 0], [0, 0, 0, 0, 0]])
    length, wanted = torch.tensor([2], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    torch.library.opcheck(ops.propose_ngrams, (tokens, length, wanted, 2))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 5, dtype=torch.int32), "tokens are torch.int32"),
        (0, torch.zeros(0, 5, dtype=torch.int64), "tokens have 0 rows for 1 requests"),
        (1, torch.zeros(1, 1, dtype=torch.int32), "length"),
        (2, torch.zeros(2, dtype=torch.int32), "wanted"),
        (2, torch.zeros(1, dtype=torch.int64), "wanted"),
        (3, -1, "most is -1"),
    ],
)
def test_what_does_not_fit_is_refused(position, value, message):
    arguments = [torch.zeros(2, 5, dtype=torch.int64), *(torch.zeros(1, dtype=torch.int32) for _ in range(2)), 3]
    arguments[position] = value
    with pytest.raises(KernelInputError, match=message):
        ops.propose_ngrams(*arguments)
