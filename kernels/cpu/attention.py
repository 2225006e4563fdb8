"""``dual_mode_attention`` on a CPU, tested against ``kernels.reference``, which says what it computes.

- A row that sees a whole stretch of positions, and a prompt, take torch's fused attention; of a prompt the cached
  positions and its own rows apart, so that no mask is needed, joined by their log-sum-exps.
- Verifications and what the fused kernel does not know (soft-caps, sinks, values of another width than keys) take
  explicit logits.
- Values in the pool are finite (see ``kernels.ops``), so that hidden ones, whose weight is 0, add nothing. Keys may be
  NaN: logits of hidden keys are replaced, never added to.

Float64 inputs are computed in float64, everything else in float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..checks import check_attention
from ..ops import MEASURING_PILLARS, MEASURING_POSITIONS, AttentionCall, Mode, first_visible
from ..reference.attention import as_kept, as_logits, softmax_beside
from .plan import Pages, Request, SparseRows, StepPlan, kinds, plan_of

_ROW_BLOCK = 512
"""Rows of a request computed at once where logits or a mask are needed."""

_FEW_ROWS = 16
"""Rows up to which explicit logits take no longer than the fused kernel's two calls and their join."""

_in_order: set[tuple] = set()
_MOST_KINDS = 4096
"""Kinds of calls that were found to be in order, and how many are remembered: they differ by their numbers of rows."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
"""torch's fused attention; unlike the public function it also gives the log-sum-exps. It takes grouped heads."""


class _Layer(NamedTuple):
    """The tensors and settings of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv: Tensor
    plan: StepPlan
    pillar_index: Tensor
    scale: float
    window: int
    softcap: float
    chunked: bool
    sinks: Tensor | None

    @property
    def fused(self) -> bool:
        """Whether the fused kernel knows this kind of attention."""
        return not self.softcap and self.sinks is None and self.k.shape[2] == self.v.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def first_seen(self, position: int) -> int:
        """The first position that the window leaves a row."""
        return max(0, first_visible(position, self.window, self.chunked))


def dual_mode_attention(*arguments: Any) -> Tensor:
    """Drafting, verifying and prefilling rows in one call; see ``kernels.ops``."""
    call = AttentionCall.of(arguments)
    q, k, v, kv, scores, step, pillar_index, settings, sinks = call
    plan = plan_of(step)
    _check(call, plan)
    _write(k, v, kv, plan)
    layer = _Layer(q, k, v, kv, plan, pillar_index, *settings, sinks)
    make = q.new_empty if plan.covered == q.shape[0] else q.new_zeros
    out = make((q.shape[0], q.shape[1], v.shape[2]))
    sparse = plan.sparse_rows(settings.window, settings.chunked)
    if sparse is not None:
        out.index_copy_(0, sparse.row, _sparse(layer, sparse))
    for request in plan.requests:
        if request.mode == Mode.DRAFT:
            if not request.sparse:
                out[request.rows] = _draft(layer, request)
        else:
            out[request.rows] = _dense(layer, request, scores)
    return out


def _check(call: AttentionCall, plan: StepPlan) -> None:
    """``check_attention``, once for calls alike."""
    tensors = (call.q, call.k, call.v, call.kv, call.scores, call.pillar_index, call.sinks)
    looked_at = (call.settings, kinds(tensor for tensor in tensors if tensor is not None), plan.kinds)
    if looked_at not in _in_order:
        check_attention(call)
        if len(_in_order) >= _MOST_KINDS:
            _in_order.clear()
        _in_order.add(looked_at)


def _write(k: Tensor, v: Tensor, kv: Tensor, plan: StepPlan) -> None:
    """Write the K/V of every row that belongs to a request at its position."""
    k, v = as_kept(k, v)
    if plan.covered == 1:  # ten microseconds less than the general way, in every layer of every token
        (request,) = plan.requests
        page, place = divmod(request.cached, kv.shape[2])
        row = request.first
        into = kv.select(0, plan.physical(request.slot, page)).select(1, place)
        into.copy_(torch.cat((k.select(0, row), v.select(0, row)), 1))
        return
    pages, places, rows = plan.written(kv.shape[2])
    kv.transpose(1, 2).index_put_((pages, places), torch.cat((k[rows], v[rows]), 2))


def _is_finite(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()  # both are NaN where any element is
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _tokens(layer: _Layer, request: Request, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Keys [Hkv, n, Dk] and values [Hkv, n, Dv] of positions ``first`` .. ``end - 1`` of the pool."""
    kv, page_size = layer.kv, layer.kv.shape[2]
    base = first // page_size
    pages: Pages = layer.plan.pages(request.slot, base, -(-end // page_size))
    selected = kv[pages] if isinstance(pages, slice) else kv.index_select(0, pages)
    token = selected.transpose(0, 1).flatten(1, 2).narrow(1, first - base * page_size, end - first).to(layer.dtype)
    key_dim = layer.k.shape[2]
    return token.narrow(2, 0, key_dim), token.narrow(2, key_dim, layer.v.shape[2])


def _dense(layer: _Layer, request: Request, scores: Tensor) -> Tensor:
    """Rows [r, Hq, Dv] over every position the window leaves them; writes the scores that are asked for."""
    q, scored = layer.q[request.rows], request.scored
    first = layer.first_seen(request.cached)
    keys, values = _tokens(layer, request, first, request.end)
    if request.row_count == 1 and not scored:
        return _single(layer, q, keys, values)
    logits = None
    if request.row_count > _FEW_ROWS:
        out = _long(layer, request, keys, values)
    else:
        logits = _logits(layer, q, keys, first, request.cached)
        out = _weighted(softmax_beside(layer.sinks, logits), values, layer.q.dtype)
    if scored:
        if logits is None or scored < request.row_count:
            logits = _logits(layer, q[request.row_count - scored :], keys, first, request.end - scored)
        _write_scores(layer, request, logits, scores)
    return out


def _prompt(layer: _Layer, request: Request, keys: Tensor, values: Tensor) -> Tensor:
    """Rows [r, Hq, D] over keys and values [Hkv, cached + r, D]: all that is cached and, causally, each other."""
    cached, settings = request.cached, {"scale": layer.scale}
    q = layer.q[request.rows].to(layer.dtype).transpose(0, 1)[None]
    out, total = _flash(q, keys[None, :, cached:], values[None, :, cached:], 0.0, True, **settings)
    if cached:
        earlier, earlier_total = _flash(q, keys[None, :, :cached], values[None, :, :cached], 0.0, False, **settings)
        out = torch.lerp(earlier, out, torch.sigmoid(total - earlier_total)[..., None].to(out.dtype))
    return out[0].transpose(0, 1).to(layer.q.dtype)


def _long(layer: _Layer, request: Request, keys: Tensor, values: Tensor) -> Tensor:
    """Rows [r, Hq, Dv] over keys and values from the first position on that the window leaves the first row."""
    first = layer.first_seen(request.cached)
    if layer.fused and not layer.window:
        return _prompt(layer, request, keys, values)
    masked = layer.fused and _is_finite(keys)  # a mask is added to the logits of hidden keys
    blocks = []
    for low in range(0, request.row_count, _ROW_BLOCK):
        high = min(low + _ROW_BLOCK, request.row_count)
        position = request.cached + low
        seen = slice(layer.first_seen(position) - first, request.cached + high - first)
        q = layer.q[request.first + low : request.first + high]
        if masked:
            blocks.append(_masked(layer, q, keys[:, seen], values[:, seen], position))
        else:
            logits = _logits(layer, q, keys[:, seen], first + seen.start, position)
            blocks.append(_weighted(softmax_beside(layer.sinks, logits), values[:, seen], layer.q.dtype))
    return torch.cat(blocks)


def _masked(layer: _Layer, q: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
    """Rows q [r, Hq, D], the first at ``position``, over keys and values [Hkv, n, D] up to the last row's."""
    end = position + q.shape[0]
    visible = _visible(layer, range(position, end), range(end - keys.shape[1], end))
    out = scaled_dot_product_attention(
        q.to(layer.dtype).transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=visible,
        scale=layer.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).to(q.dtype)


def _single(layer: _Layer, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """A row [1, Hq, Dk] that sees every key [Hkv, n, Dk]: the query heads of a KV head are taken for rows of it."""
    grouped = q.to(layer.dtype).reshape(keys.shape[0], -1, q.shape[2])
    if layer.fused:
        out = scaled_dot_product_attention(grouped[None], keys[None], values[None], scale=layer.scale)
        return out.view(1, -1, values.shape[2]).to(q.dtype)
    logits = _capped(layer, torch.bmm(grouped * layer.scale, keys.transpose(1, 2)))
    return _weighted(softmax_beside(layer.sinks, logits[:, :, None]), values, q.dtype)


def _draft(layer: _Layer, request: Request) -> Tensor:
    """Rows [r, Hq, Dv] of a draft that reads one stretch: no pillars, or every position before the recent ones."""
    rows = []
    for nth in range(request.row_count):
        position = request.cached + nth
        first = max(0 if request.pillars else request.recent, layer.first_seen(position))
        row = request.first + nth
        rows.append(_single(layer, layer.q[row : row + 1], *_tokens(layer, request, first, position + 1)))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _sparse(layer: _Layer, rows: SparseRows) -> Tensor:
    """Rows [B, Hq, Dv] over their pillars and recent positions, both cut by the window."""
    kv, page_size, key_dim = layer.kv, layer.kv.shape[2], layer.k.shape[2]
    pillar = layer.pillar_index.index_select(0, rows.slot).narrow(2, 0, rows.not_pillar.shape[2])
    not_pillar = rows.not_pillar
    if layer.window:
        not_pillar = not_pillar | (pillar < first_visible(rows.position, layer.window, layer.chunked))
    pillar = torch.where(not_pillar, rows.position, pillar)
    at = torch.cat((pillar, rows.recent.expand(-1, kv.shape[1], -1)), 2)
    page = layer.plan.page_table[rows.slot[:, None, None], at // page_size]
    token = kv[page, torch.arange(kv.shape[1], device="cpu")[:, None], at % page_size].to(layer.dtype)
    keys, values = token.narrow(3, 0, key_dim), token.narrow(3, key_dim, layer.v.shape[2])
    q = layer.q.index_select(0, rows.row).to(layer.dtype).unflatten(1, (kv.shape[1], -1))
    heads = not_pillar.shape[1]
    visible = ~torch.cat((not_pillar, rows.not_recent.expand(-1, heads, -1)), 2)[:, :, None]
    if layer.fused:
        out = scaled_dot_product_attention(q, keys, values, attn_mask=visible, scale=layer.scale)
    else:
        logits = _capped(layer, q * layer.scale @ keys.transpose(2, 3))
        logits = logits.masked_fill_(~visible, -math.inf)
        out = softmax_beside(layer.sinks, logits[:, :, :, None])[:, :, :, 0] @ values
    return out.flatten(1, 2).to(layer.q.dtype)


def _logits(layer: _Layer, q: Tensor, keys: Tensor, first: int, position: int) -> Tensor:
    """Logits [Hkv, G, r, n] of rows q [r, Hq, Dk], the first at ``position``, and keys [Hkv, n, Dk] from ``first`` on.

    -inf where a key is hidden.
    """
    rows, _, key_dim = q.shape
    kv_heads, length, _ = keys.shape
    grouped = (q.to(layer.dtype) * layer.scale).view(rows, kv_heads, -1, key_dim).permute(1, 2, 0, 3)
    logits = _capped(layer, torch.bmm(grouped.reshape(kv_heads, -1, key_dim), keys.transpose(1, 2)))
    logits = logits.view(kv_heads, -1, rows, length)
    beginning = first if layer.window else position + 1  # without a window every row sees what is before the first
    if beginning < first + length:
        hidden = ~_visible(layer, range(position, position + rows), range(beginning, first + length))
        logits[..., beginning - first :].masked_fill_(hidden, -math.inf)
    return logits


def _visible(layer: _Layer, rows: range, keys: range) -> Tensor:
    """Which keys, at the positions of one range, rows at those of the other see: bool [rows, keys]."""
    row = torch.arange(rows.start, rows.stop, device="cpu")[:, None]
    key = torch.arange(keys.start, keys.stop, device="cpu")
    visible = key <= row
    return visible & (key >= first_visible(row, layer.window, layer.chunked)) if layer.window else visible


def _capped(layer: _Layer, logits: Tensor) -> Tensor:
    return torch.tanh(logits / layer.softcap) * layer.softcap if layer.softcap else logits


def _weighted(probability: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [r, Hq, Dv] of probabilities [Hkv, G, r, n] and values [Hkv, n, Dv]."""
    kv_heads, group, rows, length = probability.shape
    out = torch.bmm(probability.reshape(kv_heads, group * rows, length), values).view(kv_heads, group, rows, -1)
    return out.permute(2, 0, 1, 3).reshape(rows, kv_heads * group, -1).to(dtype)


def _write_scores(layer: _Layer, request: Request, logits: Tensor, scores: Tensor) -> None:
    """How much the scored rows, whose logits [Hkv, G, s, n] end at the last row, look at each position before them."""
    end, scored = request.end, request.scored
    base = end - logits.shape[3]
    before = logits[..., : logits.shape[3] - scored]
    if request.mode == Mode.PREFILL:
        total = logits.logsumexp(-1, keepdim=True)
    else:
        total = _measure(layer, request, logits, base)
    if layer.sinks is not None:
        total = total.logaddexp(as_logits(layer.sinks, total))
    into = scores[request.score_slot]
    into[:, :base] = 0
    into[:, base : end - scored] = (before - total).exp_().clamp_(max=1.0).mean((1, 2))


def _measure(layer: _Layer, request: Request, logits: Tensor, base: int) -> Tensor:
    """Log-sum-exp [Hkv, G, s, 1] over the recent positions and the first pillars."""
    recent = max(request.recent, base)
    seen = logits[..., recent - base :]
    room = max(MEASURING_POSITIONS - (request.end - request.recent), MEASURING_PILLARS)
    pillar = layer.pillar_index[request.slot, :, : min(request.pillars, room)].long() - base
    if pillar.shape[1]:
        at = pillar.clamp(min=0)[:, None, None].expand(*logits.shape[:3], -1)
        chosen = logits.gather(3, at)
        if base:  # what lies before the gathered positions is hidden from all rows
            chosen = chosen.masked_fill((pillar < 0)[:, None, None], -math.inf)
        seen = torch.cat((chosen, seen), 3)
    return seen.logsumexp(-1, keepdim=True)
