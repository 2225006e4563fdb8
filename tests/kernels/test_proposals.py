"""Drafts from the texts themselves: reference and Triton kernel against a search in Python, exactly."""

import pytest
import torch

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.errors import KernelInputError

WIDTH, SENTINEL = 2100, -7


def expected_of(texts, b, count, room):
    """What followed the best earlier occurrence of text b's longest suffix, or None where there is none."""
    text = texts[b]
    for n in range(min(ops.NGRAM_TOKENS, len(text)), 0, -1):
        places = [
            (source == b, end, -source)
            for source, other in enumerate(texts)
            for end in range(n - 1, len(other) - 1)
            if other[end - n + 1 : end + 1] == text[-n:]
        ]
        if places:
            _, end, source = max(places)
            longer = list(texts[-source])
            for nth in range(min(count, room)):
                longer.append(longer[end + 1 + nth])
            return longer[end + 1 : end + 1 + min(count, room)]
    return None


def texts():
    generator = torch.Generator().manual_seed(0)

    def random(length, tokens):
        return torch.randint(tokens, (length,), generator=generator).tolist()

    return [
        ([5], 4),
        ([5, 5], 4),
        ([1, 2, 3], 4),
        ([1, 2, 1], 4),
        ([1, 2, 3, 1, 2, 3], 7),
        ([9, 1, 2, 3, 4, 8, 2, 3, 4, 7, 1, 2, 3, 4], 3),
        ([4, 8, 4, 7, 3, 4], 2),
        ([], 0),
        ([50, 51], 3),  # of no token that occurs before: the next text has it
        ([60, 50, 51, 61, 62, 63], 4),
        ([61, 62, 99, 62, 63, 64, 62], 3),  # a longer suffix counts in the text below
        ([70, 71, 64, 62, 80], 3),  # whose end is near: its last period repeats
        ([80] * 3 + [81] + [80] * 2, 5),
        (random(1500, 2), 8),
        (random(1025, 3), 5),
        (random(1024, 40), 12),
        (random(2090, 300), 12),
        (random(2000, 10_000), 6),
        ([7] * 1300, 9),
        (random(WIDTH - 3, 5), 12),
        (random(WIDTH, 5), 12),
        (random(300, 4), 0),
        (random(300, 4), 50),
    ]


def run(propose, device):
    """Rows before, the expected rows and those that come out."""
    cases, most = texts(), 12
    tokens = torch.full((len(cases) + 1, WIDTH), SENTINEL, dtype=torch.int64)
    expected = tokens.clone()
    for row, (text, wanted) in enumerate(cases):
        tokens[row, : len(text)] = expected[row, : len(text)] = torch.tensor(text)
        proposed = (
            expected_of([text for text, _ in cases], row, min(wanted, most), WIDTH - len(text)) if wanted else None
        )
        for nth, token in enumerate(proposed or []):
            expected[row, len(text) + nth] = token
    length = torch.tensor([max(len(text) - 1, 0) for text, _ in cases], dtype=torch.int32, device=device)
    wanted = torch.tensor([wanted for _, wanted in cases], dtype=torch.int32, device=device)
    got = tokens.to(device)
    propose(got, length, wanted, most)
    return expected, got.cpu()


def test_reference():
    expected, got = run(ops.propose_ngrams, "cpu")
    assert torch.equal(got, expected)


def test_triton(device):
    from sparsespec_compile.kernels.drafting.ngrams import propose_ngrams

    expected, got = run(propose_ngrams, device)
    assert torch.equal(got, expected)


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
