"""What is measured, and what it is held to."""

from dataclasses import dataclass, replace

from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.kernels.tuning.measure import Heads, Work

READ_CEILING = 4.3e12
"""Bytes a second that the bars refer to: the fastest read seen on an H200 when they were set (FlashInfer decoding 64 x
8,192). cuDNN has reached 4.5e12 since."""

QWEN3_8B = Heads(32, 8, 128, 128)
QWEN3_1_7B = Heads(16, 8, 128, 128)
LLAMA_31_8B = Heads(32, 8, 128, 128)
QWEN25_7B = Heads(28, 4, 128, 128)
NARROW = Heads(32, 8, 64, 64)

ROWS = 9
"""Rows of a verification: 8 drafts and the token before them."""

PILLARS = 410
"""5% of 8,192."""


@dataclass(frozen=True)
class Bar:
    """What a case must reach; None where nothing is asked.

    Attributes:
        share: of the read ceiling, in bytes that no kernel can avoid.
        ms: milliseconds at most.
        against: a peer or another case, and the largest ratio of times to it.
    """

    share: float | None = None
    ms: float | None = None
    against: tuple[str, float] | None = None


@dataclass(frozen=True)
class Case:
    """An attention step.

    Attributes:
        name: unique.
        heads: the layer.
        work: what each request does.
        bar: what it is held to.
        peers: names of `peers.PEERS` to measure beside it.
        split: also measure drafts and other requests in two launches in turn.
    """

    name: str
    heads: Heads
    work: list[Work]
    bar: Bar = Bar()
    peers: tuple[str, ...] = ()
    split: bool = False


@dataclass(frozen=True)
class Selection:
    """Pillars of some requests, for all layers and heads, among the slots of a running batch."""

    name: str
    rows: int = 36 * 8
    slots: int = 64
    requests: int = 7
    length: int = 8192
    budget: int = PILLARS
    bar: Bar = Bar(ms=0.2)


@dataclass(frozen=True)
class Draw:
    """A token for each of some rows of bfloat16 logits, all with these settings.

    Attributes:
        name: unique.
        rows: with logits; 122 verify and draft for 64 requests.
        vocabulary: tokens; 151,936 are Qwen3's.
        temperature, top_k, top_p: as in `ops.draw_tokens`.
        bar: what it is held to.
    """

    name: str
    rows: int = 122
    vocabulary: int = 151936
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    bar: Bar = Bar()


DENSE_PEERS = ("sdpa flash", "sdpa cudnn", "flex paged", "flashinfer")

SDPA_PEERS = DENSE_PEERS[:2]
"""For layers beside the one that bars are set for: FlexAttention takes many seconds to compile for each."""


def verify(requests: int, cached: int, scored: bool = False) -> list[Work]:
    """Requests that verify 8 drafts."""
    return [Work(Mode.VERIFY, cached, ROWS, PILLARS if scored else 0, scored)] * requests


def decode(requests: int, cached: int) -> list[Work]:
    """Requests that decode plainly."""
    return [Work(Mode.VERIFY, cached)] * requests


def draft(requests: int, cached: int = 8192, pillars: int = PILLARS) -> list[Work]:
    """Requests that draft."""
    return [Work(Mode.DRAFT, cached, pillars=pillars)] * requests


def uneven(requests: int) -> list[Work]:
    """Verifications from 300 to 32,900 tokens, none a multiple of anything."""
    return [Work(Mode.VERIFY, 300 + (b * 7919) % 32600, ROWS) for b in range(requests)]


CASES: list[Case | Selection | Draw] = [
    Case("verify 64 x 8192", QWEN3_8B, verify(64, 8192), Bar(share=0.88), DENSE_PEERS),
    Case("verify 8 x 32768", QWEN3_8B, verify(8, 32768), Bar(share=0.80), DENSE_PEERS),
    Case("verify 256 x 1024", QWEN3_8B, verify(256, 1024), Bar(share=0.80), DENSE_PEERS),
    Case("decode 64 x 8192", QWEN3_8B, decode(64, 8192), Bar(share=0.93), DENSE_PEERS),
    Case("decode 8 x 32768", QWEN3_8B, decode(8, 32768), Bar(share=0.93), DENSE_PEERS),
    Case("draft 57 x 410 of 8192", QWEN3_8B, draft(57), Bar(share=0.57, ms=0.040), ("sdpa gathered", "flashinfer")),
    Case(
        "mixed 57 drafts + 7 verify",
        QWEN3_8B,
        draft(57) + verify(7, 8192),
        Bar(ms=0.105, against=("in turn", 1 / 1.2)),
        ("flashinfer mixed",),
        split=True,
    ),
    Case("mixed, scored", QWEN3_8B, draft(57) + verify(7, 8192, scored=True), split=True),
    Case("mixed 48 drafts + 16 verify, scored", QWEN3_8B, draft(48) + verify(16, 8192, scored=True), split=True),
    Case(
        "mixed 43 drafts + 21 verify of 1024, scored",
        QWEN3_8B,
        draft(43, 1024, 128) + verify(21, 1024, scored=True),
        split=True,
    ),
    Case("one verifying 8192, scored", QWEN3_8B, verify(1, 8192, scored=True)),
    Case("verify 64 x 8192, scored", QWEN3_8B, verify(64, 8192, scored=True), Bar(against=("verify 64 x 8192", 1.12))),
    Selection("select 36 layers x 8 heads x 7 of 8192"),
    Selection("select 36 layers x 8 heads x 16 of 8700", requests=16, length=8700, bar=Bar()),
    Draw("draw 122 x 151936, greedy", temperature=0.0),
    Draw("draw 122 x 151936"),
    Draw("draw 122 x 151936, top-k 20, top-p 0.95", top_k=20, top_p=0.95, bar=Bar(ms=0.3)),
    Draw("draw 122 x 151936, top-p 0.95", top_p=0.95),
    Case("prefill 1 x 8192", QWEN3_8B, [Work(Mode.PREFILL, 0, 8192)], Bar(against=("sdpa flash", 1.5)), SDPA_PEERS),
    Case("verify 64 x 8192, Qwen3-1.7B", QWEN3_1_7B, verify(64, 8192), Bar(), SDPA_PEERS),
    Case("verify 32 x 16384, Llama-3.1-8B", LLAMA_31_8B, verify(32, 16384), Bar(), SDPA_PEERS),
    Case("verify 64 x 8192, Qwen2.5-7B", QWEN25_7B, verify(64, 8192), Bar(), SDPA_PEERS),
    Case("verify 64 x 8192, 64-wide heads", NARROW, verify(64, 8192), Bar(), SDPA_PEERS),
    Case("draft 57 x 410 of 8192, Qwen2.5-7B", QWEN25_7B, draft(57), Bar(), ("sdpa gathered", "flashinfer")),
    Case("verify 64 x uneven", QWEN3_8B, uneven(64)),
    Case("one of 131072 beside 255 of 300", QWEN3_8B, verify(1, 131072) + verify(255, 300)),
]


def shrunk(case: Case | Selection | Draw, factor: int, most: int) -> Case | Selection | Draw:
    """A case of the same kind with lengths divided by ``factor`` and at most ``most`` requests of each mode."""
    if isinstance(case, Draw):
        return replace(case, rows=most, vocabulary=case.vocabulary // factor)
    if isinstance(case, Selection):
        return replace(
            case, rows=4, slots=4, requests=2, length=case.length // factor, budget=case.budget // factor + 1
        )
    work: list[Work] = []
    for item in case.work:
        if sum(kept.mode == item.mode for kept in work) < most:
            cached, rows = item.cached // factor, item.rows
            rows = rows // factor if item.mode == Mode.PREFILL else rows
            work.append(replace(item, cached=cached, rows=rows, pillars=item.pillars // factor))
    return replace(case, work=work)
