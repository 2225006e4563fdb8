"""The ops of the project: schemas, fakes and the constants callers need. No implementation is imported here.

Sizes: T packed rows (tokens) of a step, R of them with logits, V tokens of the vocabulary, B request slots, Hq query
heads, Hkv KV heads, G = Hq / Hkv, Dk and Dv the head dimensions of keys and values, P logical pages of a request, C
rows of the score buffer, S positions for which scores can be kept, M pillars that can be kept.

``sparsespec::attention_site(q, k, v, scale, window, softcap, chunked, layer, sinks) -> [1, T, Hq, Dv]``
    What capture leaves in the graph at each attention layer. q [1, Hq, T, Dk], k [1, Hkv, T, Dk], v [1, Hkv, T, Dv].
    Run eagerly it is causal attention over the T rows as one sequence, so that a captured graph can be compared with
    the model it came from. ``layer`` only names the layer; ``sinks`` are those of ``dual_mode_attention``.

``sparsespec::dual_mode_attention(q, k, v, kv, scores, *STEP_TENSORS, pillar_index, scale, window, softcap, chunked,``
``sinks) -> [T, Hq, Dv]``
    Drafting, verifying and prefilling rows in one call (paper: fused draft and verify attention).
    q [T, Hq, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv]: any strides with a unit last one, one dtype with kv.
    kv [pages, Hkv, page_size, Dk + Dv]: this layer's view of the pool, the key and value of a token side by side.
    scores [C, Hkv, S] float32 (or float64 with float64 inputs): this layer's view of the score buffer.
    pillar_index [B, Hkv, M] int32: this layer's view of the pillars, logical positions below recent_start.
    sinks [Hq] of any floating dtype, contiguous, or None: a logit of each query head that every row sees besides those
    of its keys, with a value of 0. It enters the softmax as it is, without scale and soft-cap; -inf is none.
    The step tensors, int32, are described at StepTensors.

    1. The K/V of every row of every request is written to kv at its position. An IDLE request has no rows, whatever
       its row_count says; rows of no request write nothing and give zeros.
       Where an element of a value is not finite, 0 is written for it, and NaN for at least one element of the token's
       key: rows that read the token are not finite, and nothing of it reaches the others. A softmax weight of 0 would
       not keep it from them, since 0 times NaN is NaN. For that reason every value that kv holds below cached_length
       must be finite. Scores that such rows enter are unspecified.
    2. VERIFY and PREFILL rows at position p read every position of max(0, p - window + 1) .. p or, chunked, of
       p // window * window .. p. DRAFT rows read pillar_index[b, h, :pillar_count[b]] and recent_start[b] .. p, both
       cut by the window. With pillar_count 0 and recent_start 0 that is full attention. window 0 means no window, and
       then nothing is chunked; softcap c > 0 turns a logit x into c * tanh(x / c) before the softmax, softcap 0 leaves
       it.
    3. For a VERIFY or PREFILL request with s = score_rows[b] > 0 and end = cached_length[b] + row_count[b],
       scores[score_slot[b], h, j] for j < end - s becomes the mean, over the last s rows and the G query heads of KV
       head h, of how much a row looks at position j (paper: PillarAttn); 0 where the window hides j. Nothing else in
       scores changes.
       For PREFILL that is the probability of j. For VERIFY it is min(1, exp(x_j - n)), with x_j the row's logit of j
       and n the log-sum-exp of its sink and of its logits over recent_start[b] .. p and the first of its pillars: as
       many as make MEASURING_POSITIONS together, MEASURING_PILLARS at least. The first tokens of a text and what was
       read last hold most of a softmax's sum; where they hold all of it n is the full log-sum-exp, as it is exactly
       with pillar_count 0 and recent_start 0. And n is known soon, before the pass over the cache, so that this one
       pass gives output and scores. The paper's kernel divides by the full sum instead.
       Any number of rows may be scored, but scores of a VERIFY request cost next to nothing only if all its rows are,
       or its last scored_rows_at_most(G): more take passes of their own over all keys, and with fewer the request
       reads its keys and values once for every score_rows[b] of its rows.
    Logits, softmax and scores are computed in float32, or in float64 for float64 inputs.
    Required of the values, which are not checked since that would wait for the device: requests do not share rows;
    positions stay inside the reserved pages; score_rows <= row_count; end - score_rows <= S;
    0 <= score_slot < C where scores are written, no two requests with one slot; 0 <= recent_start <= cached_length;
    0 <= pillar_count <= M; the pillars of a request and head are distinct.

``sparsespec::select_pillars(scores, score_slot, scored_length, budget, pillar_index, pillar_count) -> ()``
    scores [C, H, S] float32, H the KV heads of all layers one after the other; score_slot [B] int32, the row of scores
    that belongs to a request; scored_length [B] int32, the number of leading valid scores (at most S), -1 to leave the
    pillars of a request as they are, whose score_slot is then not read; budget [B] int32, 0 or more; pillar_index
    [B, H, M] int32 and pillar_count [B] int32 are written. For a request with n = scored_length[b] >= 0:
    count = min(budget[b], n, M) positions with the highest scores are kept, the lower position winning a tie; they are
    written in ascending order, and pillar_count[b] becomes count. Entries past count are not written, and not read by
    anyone. Scores are ordered as floating-point numbers (0.0 and -0.0 are equal; a NaN ranks by its bit pattern).

``sparsespec::propose_ngrams(tokens, length, wanted, most) -> ()``
    tokens [at least B, N] int64, a text in each row, ids below 2**31, is written; length [B] int32, the position of a
    text's newest token, 0 where there is no text; wanted [B] int32, how many tokens to propose, 0 to leave a row alone;
    most, an upper bound of it. For a row with wanted[b] > 0 a place is looked up: a position before the newest token of
    the text itself or of one of the other B texts. The tokens behind the place are written to positions length[b] + 1
    and on, wanted[b] of them, as far as the row goes; behind the end of a text its last length - place tokens repeat.
    The text's last NGRAM_TOKENS tokens are compared with those up to the place, one by one at the same distance.
    The text's newest token must be equal, or the one before it. Equal tokens count up to the first three unequal
    ones in a row, and a text's start ends the comparison. So a place may differ in single tokens, such as the number
    of a line, and even in the newest. Places are taken in this order:
    1. the last NGRAM_SUFFIX tokens are equal;
    2. at least NGRAM_EQUAL tokens are equal;
    3. more of the last tokens are equal, up to the first unequal one: the longest suffix.
    Among places of 1, and of 2, come first those with more equal tokens, then those in the text itself; among suffixes
    of one length those in the text itself, then those with more equal tokens. Then come the latest position and the
    first text. Without a place the newest token repeats.

``sparsespec::halved_product(x, weight) -> [2, ..., N]``
    x [..., K], weight [N, K] contiguous, K even, one dtype: two tensors whose sum is ``x @ weight.T``, each rounded to
    the dtype. Up to ``products.library.FEW_ROWS`` rows they are the products of the first and of the second half of K;
    beyond, the product and zeros.

``sparsespec::experts_site(x, choice, weight, up, down, up_bias, down_bias, activation, alpha, limit, shift,``
``interleaved, transposed) -> [T, H]``
    What capture leaves in the graph at each layer of experts: ``experts`` below, but that with ``transposed`` up is
    [E, H, U] and down [E, I, H], as some families keep them.

``sparsespec::experts(x, choice, weight, up, down, up_bias, down_bias, activation, alpha, limit, shift, interleaved)``
``-> [T, H]``
    Of E experts each row takes the K that choice [T, K] int32 or int64 names, with weight [T, K] of any floating-point
    dtype: ``out[t] = sum over k of weight[t, k] * expert[choice[t, k]](x[t])``. A choice outside of 0 .. E - 1 adds
    nothing. x [T, H]; up [E, U, H] and down [E, H, I] with one of the last two strides 1; up_bias [E, U] and down_bias
    [E, H] contiguous, or None; one dtype but for weight. Experts with a gate have U = 2 I: the first I columns of
    ``p = x @ up[e].T + up_bias[e]`` are the gate g and the others u; interleaved, these are columns 0, 2, .. and
    1, 3, ... With ``limit`` l > 0, g becomes min(g, l) and u becomes min(max(u, -l), l). Then h = act(g) * (u + shift).
    Experts without a gate have U = I, and h = act(p). act is a name of ACTIVATIONS; ``alpha`` is read by "swish"
    alone. An expert gives ``h @ down[e].T + down_bias[e]``.
    On CUDA products are summed up in float32, h is rounded to the dtype, and the sum over k runs in float32 in the
    order of k, rounded once: equal calls give equal bits, whatever the other rows choose. Nothing waits for the host.
    On CPU every step is rounded to the dtype, as transformers' own experts are (its ``grouped_mm``).

``sparsespec::quantised_product(x, weight, scale) -> [..., N]``
    x [..., K] float16, bfloat16 or float32, K even; weight [N, K] int8 or float8_e4m3fn, contiguous, in pairs; scale
    [N] float32: the product ``x @ (unpaired(weight) * scale[:, None]).T`` in x's dtype. Sums are float32 and weights
    enter them exactly, so the result is rounded like a product with 16-bit weights, of which it reads half the bytes.
    In pairs means that the weights of a row lie as ``w[0], w[K / 2], w[1], w[K / 2 + 1], ...``: 16 bits then hold
    weights of both halves of K, and matrix instructions take 16 bits as they are loaded. It pays for few rows: on an
    H200 up to 64, beyond which widening the weights takes longer than reading twice as many bytes (benchmarks/LOG.md).

``sparsespec::fp8_product(x, weight) -> [..., N]``
    x [..., K] and weight [N, K] float8_e4m3fn, contiguous, K and N multiples of 16: the product ``x @ weight.T`` in
    bfloat16. Values are multiplied as they are, in 8 bits, and summed
    up by float32 with the fewer bits that matrix instructions for 8 bits keep. There are no scales: the reader
    multiplies by those of rows and columns, and a compiler fuses that with what else the reader does. On CUDA only from
    compute capability 8.9 on.

``sparsespec::quantise_rows(weight, out_weight, out_scale, paired=True) -> ()``
    weight [N, K] float16, bfloat16 or float32, K even, rows of any stride; out_weight [N, K] int8 or float8_e4m3fn
    contiguous and out_scale [N] float32 are written: in each row unpaired(out_weight) * out_scale, or out_weight *
    out_scale where it shall not lie in pairs, is the nearest to weight of what a scale of largest magnitude /
    ``LARGEST[dtype]`` gives. A weight that is not finite counts as 0, and so does a row whose magnitudes are all below
    SMALLEST, whose scale becomes 0.

``sparsespec::all_reduce(x, group) -> [...]``
    x of any shape, float16, bfloat16 or float32 (float64 on CPUs too); group, the name of a process group. The sum of
    the x of all ranks of the group, of equal shapes and dtypes, in the dtype; x stays as it is. Every element is the
    same number on all ranks. The name "" is that of a group of this rank alone. All ranks must make the same calls in
    the same order; ranks may be any time apart. On CUDA a call outside of a graph must have had as many elements before
    one is captured: it makes the buffer that ranks exchange through (``products.collectives``).

``sparsespec::all_gather(x, group, ranks) -> [ranks, ...]``
    x of any shape and dtype, contiguous: the x of all ranks of the group, of equal shapes, in their order. ranks is how
    many they are. What holds for calls of ``all_reduce`` holds for these.

``sparsespec::embed_part(weight, ids, first_token) -> [..., H]``
    weight [N, H], the embeddings of the tokens first_token and on; ids [...] int64: the embeddings of these tokens, and
    zeros for those that weight does not hold.

``sparsespec::draw_tokens(logits, temperature, top_k, top_p, min_p, seed, position) -> [R]``
    logits [R, V] float16, bfloat16 or float32, computed in float32; temperature, top_p, min_p [R] float32; top_k, seed
    and position [R] int64. Gives int64 [R]: for each row the token with the highest x + noise among those kept, the
    lowest token winning a tie, where x = logit / temperature. A row of temperature 0 takes its highest logit, whatever
    else it says. Filters apply one after the other; a token is kept if
    1. top_k k > 0: fewer than k tokens have a larger x;
    2. top_p p < 1: of the probability of the tokens kept so far, those with a larger x have less than p; the most
       likely token stays in any case;
    3. min_p m > 0: x >= max(x) + log(m).
    So tokens of equal x stay or go together. The noise is standard Gumbel noise, the token's own word of Philox4x32-10
    keyed by the seed and counted by (token // 4, position) (``reference.sampling.philox``): a row's token is a function
    of its logits and settings, whoever else is in the call. Probabilities are those of float32 rounding: where the mass
    at a token differs from p by less than that, either side is right.

``sparsespec::draw_part(logits, temperature, seed, position, first_token) -> ([R], [R])``
    Of ``draw_tokens`` without filters, what a part of the vocabulary can say: logits [R, V] are those of the tokens
    first_token, a multiple of 4, and on. Gives the highest x + noise of each row, float32, and its token in the whole
    vocabulary, int64; the lowest token among equals. Over parts that make up the vocabulary, the token of the highest
    sum, the lowest of equal ones, is the one that ``draw_tokens`` gives: its sums are the same numbers.

``sparsespec::process_logits(logits, tokens, slot, position, settings, drafts, ngrams) -> [R, V]``
    logits [R, V] float16, bfloat16 or float32; tokens [at least B, N] int64, a text in each row; slot [R] int64, whose
    text a row of logits continues; position [R] int64 >= 1: it stands behind tokens[slot, :position], drafts among
    them; settings [B, PROCESSING_WIDTH] int32, of each slot, whose columns PROCESSING names; rows of slots from B on
    are padding. The positions of a slot's rows differ by fewer than drafts. ngrams: whether any slot has an n-gram
    size. Gives float32 [R, V]: the logits after what the slot asks for, one after the other, as transformers'
    processors do it:
    1. rules of a finite value v: the rule's token gets v more. No two such rules of a slot are of one token.
    2. repetition r: a token of the text gets x / r for a logit x >= 0, and x * r below 0.
    3. frequency f and presence p: a token that occurs c > 0 times behind the first ``prompt`` tokens gets x - f * c,
       then x - p.
    4. n-gram size n > 0: a token that would repeat a sequence of n tokens of the text gets -inf.
    5. rules of the value -inf: the rule's token gets -inf.
    A rule holds at first <= position < until, behind its RULE_PREFIX tokens, of which -1 stands for any.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from .errors import KernelInputError, KernelUnavailableError, SparseSpecError

__all__ = [
    "ACTIVATIONS",
    "LARGEST",
    "MEASURING_PILLARS",
    "MEASURING_POSITIONS",
    "MOST_NGRAM",
    "NGRAM_EQUAL",
    "NGRAM_SUFFIX",
    "NGRAM_TOKENS",
    "PROCESSING",
    "PROCESSING_HEAD",
    "PROCESSING_WIDTH",
    "QUANTISED_DTYPES",
    "RULES",
    "RULE_PREFIX",
    "RULE_WIDTH",
    "SCORED_PAIRS",
    "SMALLEST",
    "STEP_TENSORS",
    "AttentionCall",
    "AttentionSettings",
    "ExpertsCall",
    "ExpertsSettings",
    "KernelInputError",
    "KernelUnavailableError",
    "Mode",
    "SiteCall",
    "SparseSpecError",
    "StepTensors",
    "all_gather",
    "all_reduce",
    "attention_site",
    "draw_part",
    "draw_tokens",
    "dual_mode_attention",
    "embed_part",
    "experts",
    "experts_site",
    "first_visible",
    "fp8_product",
    "halved_product",
    "process_logits",
    "propose_ngrams",
    "quantise_rows",
    "quantised_product",
    "scored_rows_at_most",
    "select_pillars",
    "unpaired",
]


class Mode(IntEnum):
    """What a request does in a step."""

    IDLE = 0
    """No rows."""
    DRAFT = 1
    """Rows that read the pillars and everything since the last verification."""
    VERIFY = 2
    """Rows that read everything: the drafts and the last accepted token."""
    PREFILL = 3
    """Rows that read everything: a chunk of the prompt."""


class StepTensors(NamedTuple):
    """The int32 tensors that describe a step to every layer alike, in the order the op takes them.

    Attributes:
        request_mode: [B], a Mode (not called mode: torch keeps that argument name of an op for itself).
        row_start: [B], first packed row.
        row_count: [B], rows, 0 for none.
        cached_length: [B], tokens in the pool before this step, so row row_start + i stands at position
            cached_length + i.
        page_table: [B, P], physical page of each logical page, -1 past the reserved ones (never read).
        score_rows: [B], number of trailing rows whose attention is given out.
        score_slot: [B], the row of scores that is written for a request with score_rows > 0, not read otherwise.
        pillar_count: [B], valid entries of pillar_index, alike for all layers and heads.
        recent_start: [B], first position that draft rows read densely.
    """

    request_mode: Tensor
    row_start: Tensor
    row_count: Tensor
    cached_length: Tensor
    page_table: Tensor
    score_rows: Tensor
    score_slot: Tensor
    pillar_count: Tensor
    recent_start: Tensor


STEP_TENSORS = StepTensors._fields


class AttentionSettings(NamedTuple):
    """What a layer's attention is, beside its tensors.

    Attributes:
        scale: factor on the query-key products.
        window: positions that a row sees at most, its own the last of them; 0 = all.
        softcap: of logits; 0 = none.
        chunked: whether the window stays where it is for `window` rows and then jumps, or slides with each row.
    """

    scale: float
    window: int
    softcap: float
    chunked: bool = False

    @classmethod
    def of(cls, layer: object) -> "AttentionSettings":
        """Those of a description of a layer, which has attributes of these names."""
        return cls(*(getattr(layer, name) for name in cls._fields))


class SiteCall(NamedTuple):
    """The arguments of ``attention_site`` by name. Schema, fake and readers are made from it; see AttentionCall."""

    q: Tensor
    k: Tensor
    v: Tensor
    settings: AttentionSettings
    layer: int
    sinks: Tensor | None = None

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "SiteCall":
        """The call with these arguments, in the op's order; nodes of a graph or anything else may stand for tensors."""
        end = _TENSORS_OF_SITE + len(AttentionSettings._fields)
        settings = AttentionSettings(*arguments[_TENSORS_OF_SITE:end])
        fields: list[Any] = [*arguments[:_TENSORS_OF_SITE], settings, *arguments[end:]]
        return cls(*fields)

    def arguments(self) -> tuple[Any, ...]:
        """The op's arguments, in order."""
        before, after = self[:_TENSORS_OF_SITE], self[_TENSORS_OF_SITE + 1 :]
        return (*before, *self.settings, *after)


class AttentionCall(NamedTuple):
    """The arguments of ``dual_mode_attention`` by name: the one place that knows their order.

    The op's schema is made from these annotations, and its fake, its implementations, the passes and the warm-up read
    and write calls through it. A new tensor (``Tensor | None`` for an optional one) or setting is one line here.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kv: Tensor
    scores: Tensor
    step: StepTensors
    pillar_index: Tensor
    settings: AttentionSettings
    sinks: Tensor | None = None

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "AttentionCall":
        """The call with these arguments, in the op's order; nodes of a graph or anything else may stand for tensors."""
        step_end = _TENSORS_OF_LAYER + len(STEP_TENSORS)
        settings = step_end + 1
        end = settings + len(AttentionSettings._fields)
        fields: list[Any] = [
            *arguments[:_TENSORS_OF_LAYER],
            StepTensors(*arguments[_TENSORS_OF_LAYER:step_end]),
            arguments[step_end],
            AttentionSettings(*arguments[settings:end]),
            *arguments[end:],
        ]
        return cls(*fields)

    def arguments(self) -> tuple[Any, ...]:
        """The op's arguments, in order."""
        before, after = self[:_TENSORS_OF_LAYER], self[_TENSORS_OF_LAYER + 3 :]
        return (*before, *self.step, self.pillar_index, *self.settings, *after)


ACTIVATIONS = ("silu", "swish", "gelu", "gelu_tanh", "relu", "relu2")
"""What experts apply: x sigmoid(x); x sigmoid(alpha x); x Phi(x); the same by tanh; max(x, 0); its square."""


class ExpertsSettings(NamedTuple):
    """What experts are, beside their tensors; see ``experts``.

    Attributes:
        activation: of ACTIVATIONS.
        alpha: of "swish"; 0 with others.
        limit: of gate and up, 0 = none.
        shift: added to up.
        interleaved: whether the columns of gate and up lie in turn.
    """

    activation: str
    alpha: float = 0.0
    limit: float = 0.0
    shift: float = 0.0
    interleaved: bool = False


class ExpertsCall(NamedTuple):
    """The arguments of ``experts`` by name, and the first of ``experts_site``."""

    x: Tensor
    choice: Tensor
    weight: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    settings: ExpertsSettings

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "ExpertsCall":
        """The call with these arguments, in the op's order; nodes of a graph or anything else may stand for tensors."""
        tensors = cls._fields.index("settings")
        end = tensors + len(ExpertsSettings._fields)
        fields: list[Any] = [*arguments[:tensors], ExpertsSettings(*arguments[tensors:end])]
        return cls(*fields)

    def arguments(self) -> tuple[Any, ...]:
        """The op's arguments, in order."""
        return (*self[:-1], *self.settings)


def first_visible(position: Any, window: int, chunked: bool) -> Any:
    """The first position that a row sees, below 0 where a sliding window begins before the text.

    Args:
        position: of the row; a number, or integers of torch or numpy.
        window, chunked: as in `AttentionSettings`.
    """
    if chunked:
        return position // window * window
    return position - window + 1 if window else 0


_TENSORS_OF_SITE = SiteCall._fields.index("settings")
_TENSORS_OF_LAYER = AttentionCall._fields.index("step")

_WRITTEN = {"kv": "Tensor(a!)", "scores": "Tensor(b!)"}
"""Arguments that are written, as a schema declares them."""


def _schema(call: type) -> str:
    """The arguments of an op as a schema lists them, one after the other."""
    kinds = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool", str: "str"}
    declared = []
    for name, kind in get_type_hints(call).items():
        if hasattr(kind, "_fields"):
            declared.append(_schema(kind))
        else:
            declared.append(f"{_WRITTEN.get(name, kinds[kind])} {name}")
    return ", ".join(declared)


SCORED_PAIRS = 64
"""(Row, query head of one KV head) pairs of a verification that the GPU kernel takes at a time, in 16-bit dtypes."""

MEASURING_POSITIONS = 128
MEASURING_PILLARS = 8
"""What scores of a verification are measured by: everything from recent_start on and the first pillars, so many
positions together, but so many pillars at least."""


NGRAM_TOKENS = 24
"""Tokens at the end of a text that are compared with those up to a place."""

NGRAM_SUFFIX, NGRAM_EQUAL = 6, 10
"""Equal tokens that make a place better than others: at the very end, or among all that are compared."""


PROCESSING = ("repetition", "presence", "frequency", "ngram", "prompt")
"""Columns of the settings of `process_logits`: three float32, then two int32. Rules begin at column PROCESSING_HEAD: a
token, a value float32, first and until, and RULE_PREFIX tokens. A rule whose until is 0 never holds."""

PROCESSING_HEAD = 8
RULES = 320
"""Of a slot. OpenAI's logit_bias has up to 300 entries."""
RULE_PREFIX = 5
RULE_WIDTH = 4 + RULE_PREFIX
PROCESSING_WIDTH = PROCESSING_HEAD + RULES * RULE_WIDTH
MOST_NGRAM = 8
"""The largest n-gram size: each token of one is a pass over the text."""


QUANTISED_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""The kinds of 8-bit weights."""

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest magnitude of an 8-bit weight. Both signs have the same, so -128 is not used."""


SMALLEST = 2.0**-100
"""A row of weights whose magnitudes are all below it counts as zeros: units of it would have no exact scale."""


def scored_rows_at_most(group: int) -> int:
    """Trailing rows of a verification whose scores come out of the pass that attends, at least 1.

    More rows may be scored; a verification of more rows also reads its keys and values once for each so many.

    Args:
        group: query heads of a KV head, G >= 1; of a model whose layers differ the largest.
    """
    return max(1, SCORED_PAIRS // group)


_TAGS = (torch.Tag.pt2_compliant_tag,)

torch.library.define("sparsespec::attention_site", f"({_schema(SiteCall)}) -> Tensor", tags=_TAGS)
torch.library.define("sparsespec::dual_mode_attention", f"({_schema(AttentionCall)}) -> Tensor", tags=_TAGS)
torch.library.define(
    "sparsespec::select_pillars",
    "(Tensor scores, Tensor score_slot, Tensor scored_length, Tensor budget, Tensor(a!) pillar_index, "
    "Tensor(b!) pillar_count) -> ()",
    tags=_TAGS,
)
torch.library.define(
    "sparsespec::propose_ngrams", "(Tensor(a!) tokens, Tensor length, Tensor wanted, int most) -> ()", tags=_TAGS
)
torch.library.define("sparsespec::halved_product", "(Tensor x, Tensor weight) -> Tensor", tags=_TAGS)
torch.library.define("sparsespec::experts", f"({_schema(ExpertsCall)}) -> Tensor", tags=_TAGS)
torch.library.define("sparsespec::experts_site", f"({_schema(ExpertsCall)}, bool transposed) -> Tensor", tags=_TAGS)
torch.library.define("sparsespec::quantised_product", "(Tensor x, Tensor weight, Tensor scale) -> Tensor", tags=_TAGS)
torch.library.define("sparsespec::fp8_product", "(Tensor x, Tensor weight) -> Tensor", tags=_TAGS)
torch.library.define(
    "sparsespec::quantise_rows",
    "(Tensor weight, Tensor(a!) out_weight, Tensor(b!) out_scale, bool paired=True) -> ()",
    tags=_TAGS,
)
torch.library.define("sparsespec::all_reduce", "(Tensor x, str group) -> Tensor", tags=_TAGS)
torch.library.define("sparsespec::all_gather", "(Tensor x, str group, int ranks) -> Tensor", tags=_TAGS)
torch.library.define("sparsespec::embed_part", "(Tensor weight, Tensor ids, int first_token) -> Tensor", tags=_TAGS)
torch.library.define(
    "sparsespec::draw_tokens",
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor position) "
    "-> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "sparsespec::draw_part",
    "(Tensor logits, Tensor temperature, Tensor seed, Tensor position, int first_token) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "sparsespec::process_logits",
    "(Tensor logits, Tensor tokens, Tensor slot, Tensor position, Tensor settings, int drafts, bool ngrams) -> Tensor",
    tags=_TAGS,
)

attention_site = torch.ops.sparsespec.attention_site.default
dual_mode_attention = torch.ops.sparsespec.dual_mode_attention.default
select_pillars = torch.ops.sparsespec.select_pillars.default
propose_ngrams = torch.ops.sparsespec.propose_ngrams.default
draw_tokens = torch.ops.sparsespec.draw_tokens.default
draw_part = torch.ops.sparsespec.draw_part.default
process_logits = torch.ops.sparsespec.process_logits.default
halved_product = torch.ops.sparsespec.halved_product.default
experts = torch.ops.sparsespec.experts.default
experts_site = torch.ops.sparsespec.experts_site.default
quantised_product = torch.ops.sparsespec.quantised_product.default
fp8_product = torch.ops.sparsespec.fp8_product.default
all_reduce = torch.ops.sparsespec.all_reduce.default
all_gather = torch.ops.sparsespec.all_gather.default
embed_part = torch.ops.sparsespec.embed_part.default


def quantise_rows(weight: Tensor, kind: str, out_weight: Tensor, out_scale: Tensor, paired: bool = True) -> None:
    """Write the 8-bit form of a weight into tensors that are there; see ``sparsespec::quantise_rows`` above.

    Args:
        weight: [N, K].
        kind: of QUANTISED_DTYPES; out_weight has its dtype.
        out_weight: [N, K].
        out_scale: [N] float32.
        paired: whether out_weight lies in pairs, as `quantised_product` takes it, or as weight does.

    Raises:
        KernelInputError: the arguments do not fit each other.
        KernelUnavailableError: a device whose kernels cannot write this kind.
    """
    if QUANTISED_DTYPES.get(kind) != out_weight.dtype:
        raise KernelInputError(
            f"the kind of 8-bit weights is {kind!r} and out_weight is {out_weight.dtype}; allowed: "
            + ", ".join(f"{name!r} with {dtype}" for name, dtype in QUANTISED_DTYPES.items())
        )
    torch.ops.sparsespec.quantise_rows(weight, out_weight, out_scale, paired)


def unpaired(weight: Tensor) -> Tensor:
    """An 8-bit weight [N, K] in the order of its inputs, from the pairs that the ops keep it in."""
    rows, inner = weight.shape
    return weight.view(rows, inner // 2, 2).transpose(1, 2).reshape(rows, inner)


@torch.library.register_fake("sparsespec::attention_site")
def _attention_site_fake(*arguments: Any) -> Tensor:
    call = SiteCall.of(arguments)
    batch, q_heads, rows, _ = call.q.shape
    return call.q.new_empty(batch, rows, q_heads, call.v.shape[-1])


@torch.library.register_fake("sparsespec::dual_mode_attention")
def _dual_mode_attention_fake(*arguments: Any) -> Tensor:
    call = AttentionCall.of(arguments)
    rows, q_heads, _ = call.q.shape
    return call.q.new_empty(rows, q_heads, call.v.shape[-1])


@torch.library.register_fake("sparsespec::select_pillars")
def _select_pillars_fake(
    scores: Tensor,
    score_slot: Tensor,
    scored_length: Tensor,
    budget: Tensor,
    pillar_index: Tensor,
    pillar_count: Tensor,
) -> None:
    return None


@torch.library.register_fake("sparsespec::propose_ngrams")
def _propose_ngrams_fake(tokens: Tensor, length: Tensor, wanted: Tensor, most: int) -> None:
    return None


@torch.library.register_fake("sparsespec::halved_product")
def _halved_product_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(2, *x.shape[:-1], weight.shape[0])


@torch.library.register_fake("sparsespec::experts")
@torch.library.register_fake("sparsespec::experts_site")
def _experts_fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("sparsespec::quantised_product")
def _quantised_product_fake(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("sparsespec::fp8_product")
def _fp8_product_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.bfloat16)


@torch.library.register_fake("sparsespec::quantise_rows")
def _quantise_rows_fake(weight: Tensor, out_weight: Tensor, out_scale: Tensor, paired: bool = True) -> None:
    return None


@torch.library.register_fake("sparsespec::all_reduce")
def _all_reduce_fake(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("sparsespec::all_gather")
def _all_gather_fake(x: Tensor, group: str, ranks: int) -> Tensor:
    return x.new_empty(ranks, *x.shape)


@torch.library.register_fake("sparsespec::embed_part")
def _embed_part_fake(weight: Tensor, ids: Tensor, first_token: int) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


@torch.library.register_fake("sparsespec::draw_tokens")
def _draw_tokens_fake(logits: Tensor, *rest: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@torch.library.register_fake("sparsespec::draw_part")
def _draw_part_fake(logits: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.int64)


@torch.library.register_fake("sparsespec::process_logits")
def _process_logits_fake(logits: Tensor, *rest: object) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)
