"""Attention in plain torch: the oracle of the Triton kernels and of ``kernels.cpu``.

Each request gathers only what its rows read, once, and multiplies per KV head without copying keys for its query
heads. Float64 inputs are computed in float64, everything else in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import check_attention, check_site
from ..ops import (
    MEASURING_PILLARS,
    MEASURING_POSITIONS,
    AttentionCall,
    AttentionSettings,
    Mode,
    SiteCall,
    StepTensors,
    first_visible,
)

_ROW_BLOCK = 512
"""Rows of a request computed at once: bounds the logits of a long prompt, and skips keys that none of them may see."""


def attention_site(*arguments: Any) -> Tensor:
    """Causal attention over T rows as one sequence; see ``kernels.ops``."""
    call = SiteCall.of(arguments)
    check_site(call)
    q, settings = call.q, call.settings
    k, v = as_kept(call.k, call.v)
    rows = q.shape[2]
    positions = torch.arange(rows, device=q.device)
    blocks = [q.new_empty(0, q.shape[1], v.shape[3])]
    for low in range(0, rows, _ROW_BLOCK):
        high = min(low + _ROW_BLOCK, rows)
        visible = _visible(positions[low:high], positions[0 if settings.window else low : high], settings)
        block = q[0, :, low:high].transpose(0, 1)
        out, _ = _attend(block, k[0, :, :high], v[0, :, :high], visible, settings, call.sinks)
        blocks.append(out)
    return torch.cat(blocks)[None]


def dual_mode_attention(*arguments: Any) -> Tensor:
    """Drafting, verifying and prefilling rows in one call; see ``kernels.ops``."""
    call = AttentionCall.of(arguments)
    check_attention(call)
    q, k, v, kv, scores, step, pillar_index, settings, sinks = call
    page_table = step.page_table
    _write_kv(k, v, kv, step)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lists = (tensor.tolist() for name, tensor in step._asdict().items() if name != "page_table")
    requests = enumerate(zip(*lists, strict=True))
    for b, (kind, first, count, cached, scored, slot, pillars, recent) in requests:
        if kind == Mode.IDLE or count == 0:
            continue
        rows = slice(first, first + count)
        draft = (pillar_index[b, :, :pillars], recent)
        if kind == Mode.DRAFT:
            out[rows] = _draft(q[rows], kv, page_table[b], *draft, cached, settings, sinks)
        else:
            out[rows], logits = _dense(q[rows], kv, page_table[b], cached, scored, settings, sinks)
            if scored:
                room = max(MEASURING_POSITIONS - (cached + count - recent), MEASURING_PILLARS)
                measure = None if kind == Mode.PREFILL else (pillar_index[b, :, : min(pillars, room)], recent)
                _write_scores(logits, measure, sinks, scores[slot], cached + count)
    return out


def _write_kv(k: Tensor, v: Tensor, kv: Tensor, step: StepTensors) -> None:
    """Write the K/V of every row that belongs to a request at its position."""
    k, v = as_kept(k, v)
    counts = step.row_count.where(step.request_mode != Mode.IDLE, 0)
    owner = torch.repeat_interleave(counts).long()
    place = torch.arange(owner.shape[0], device=owner.device) - (counts.cumsum(0) - counts)[owner]
    row = step.row_start[owner] + place
    position = step.cached_length[owner] + place
    page_size, key_dim = kv.shape[2], k.shape[2]
    page = step.page_table[owner, position // page_size]
    tokens = kv.transpose(1, 2)
    tokens[..., :key_dim].index_put_((page, position % page_size), k[row])
    tokens[..., key_dim:].index_put_((page, position % page_size), v[row])


def as_kept(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as the pool keeps them: values are finite, and a NaN key stands for one that was not."""
    # A sum that is finite says it of every element, and takes one pass. A sum that overflows costs the pass below.
    if math.isfinite(v.sum().item()):
        return k, v
    finite = v.isfinite()
    return k.masked_fill(~finite.all(-1, keepdim=True), torch.nan), v.where(finite, 0)


def _draft(
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    pillars: Tensor,
    recent_start: int,
    cached: int,
    settings: AttentionSettings,
    sinks: Tensor | None,
) -> Tensor:
    """Rows [r, Hq, Dk] over pillars [Hkv, m] and positions recent_start .. cached + r - 1."""
    end = cached + q.shape[0]
    recent_start = max(recent_start, _first_visible(cached, settings))
    recent = torch.arange(recent_start, end, device=q.device, dtype=torch.int32)
    position = torch.cat((pillars, recent.expand(pillars.shape[0], -1)), 1)
    head = torch.arange(kv.shape[1], device=q.device)[:, None]
    page_size = kv.shape[2]
    token = kv[pages[position // page_size], head, position % page_size]
    visible = None
    if settings.window or q.shape[0] > 1:
        row_position = torch.arange(cached, end, device=q.device)
        visible = _visible(row_position, position[:, None, None], settings)
    keys, values = token.split((q.shape[2], kv.shape[3] - q.shape[2]), 2)
    return _attend(q, keys, values, visible, settings, sinks)[0]


def _dense(
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    cached: int,
    scored: int,
    settings: AttentionSettings,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Rows [r, Hq, Dk] over every position the window leaves them.

    Returns the rows [r, Hq, Dv] and the logits [Hkv, G, scored, n] of the last ``scored`` of them, of the n positions
    up to the last row from the page on in which the window of the first row begins; -inf where they are hidden.
    """
    count = q.shape[0]
    end, page_size = cached + count, kv.shape[2]
    base = _first_visible(cached, settings) // page_size * page_size
    # Selecting along the first dimension copies the selected pages only; along any other, torch copies all of kv first.
    token = kv.index_select(0, pages[base // page_size : -(-end // page_size)]).transpose(0, 1).flatten(1, 2)
    keys, values = token.split((q.shape[2], kv.shape[3] - q.shape[2]), 2)
    position = torch.arange(base, end, device=q.device)
    blocks = []
    kept = []
    for low in range(0, count, _ROW_BLOCK):
        high = min(low + _ROW_BLOCK, count)
        seen = cached + high - base
        new = cached + low - base
        visible = _visible(position[new:seen], position[0 if settings.window else new : seen], settings)
        out, logits = _attend(q[low:high], keys[:, :seen], values[:, :seen], visible, settings, sinks)
        blocks.append(out)
        unscored = max(0, count - scored - low)
        if unscored < high - low:
            hidden = (0, end - base - seen)
            kept.append(torch.nn.functional.pad(logits[:, :, unscored:], hidden, value=float("-inf")))
    return torch.cat(blocks), torch.cat(kept, 2) if kept else q.new_empty(0)


def _first_visible(position: int, settings: AttentionSettings) -> int:
    """First position that a row sees."""
    return max(0, first_visible(position, settings.window, settings.chunked))


def _write_scores(
    logits: Tensor, measure: tuple[Tensor, int] | None, sinks: Tensor | None, scores: Tensor, end: int
) -> None:
    """Mean attention of scored rows [Hkv, G, s, n], the last n positions before ``end``, into scores [Hkv, S].

    ``measure`` is (pillars [Hkv, m], recent_start): looks are then measured by those pillars and everything from
    recent_start on. None measures them by everything a row sees. Sinks measure in any case.
    """
    base = end - logits.shape[3]
    seen = logits
    if measure is not None:
        pillars, recent = measure
        read = torch.arange(base, end, device=logits.device).expand(logits.shape[0], -1) >= recent
        place = pillars.long() - base
        # What lies before the gathered positions is hidden from all rows; its mark goes to a place that is cut off.
        beyond = logits.shape[3]
        read = torch.nn.functional.pad(read, (0, 1)).scatter_(1, place.where(place >= 0, beyond), True)[:, :beyond]
        seen = logits.masked_fill(~read[:, None, None], float("-inf"))
    total = seen.logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = total.logaddexp(as_logits(sinks, total))
    scored_end = end - logits.shape[2]
    weight = (logits[..., : scored_end - base] - total).exp().clamp(max=1.0)
    scores[:, :base] = 0
    scores[:, base:scored_end] = weight.mean((1, 2))


def _visible(row: Tensor, key: Tensor, settings: AttentionSettings) -> Tensor:
    """Which keys, at positions key [..., n], rows at positions row [r] see: [..., r, n]."""
    row = row[:, None]
    visible = key <= row
    return visible & (key >= first_visible(row, settings.window, settings.chunked)) if settings.window else visible


def as_logits(sinks: Tensor, logits: Tensor) -> Tensor:
    """Sinks [Hq] as one more logit [Hkv, G, 1, 1] of each row of logits [..., Hkv, G, r, n], in their dtype."""
    return sinks.to(logits.dtype).view(*logits.shape[-4:-2], 1, 1)


def softmax_beside(sinks: Tensor | None, logits: Tensor) -> Tensor:
    """The probabilities of keys with these logits [..., Hkv, G, r, n], of which sinks [Hq] take a share."""
    if sinks is None:
        return logits.softmax(-1)
    beside = as_logits(sinks, logits).expand(*logits.shape[:-1], 1)
    return torch.cat((logits, beside), -1).softmax(-1)[..., :-1]


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    settings: AttentionSettings,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of rows q [r, Hq, Dk] over keys [Hkv, n, Dk], values [Hkv, n, Dv] and sinks [Hq].

    ``visible`` [..., r, w] broadcasts to the last w keys of the logits [Hkv, G, r, n]: every row sees the keys before
    them. None means that every row sees every key.
    Returns the rows [r, Hq, Dv] in q's dtype and the logits [Hkv, G, r, n], -inf where they are not visible.
    """
    dtype = _compute_dtype(q)
    rows, q_heads, key_dim = q.shape
    kv_heads, length, value_dim = values.shape
    grouped = (q.to(dtype) * settings.scale).view(rows, kv_heads, -1, key_dim).permute(1, 2, 0, 3)
    logits = torch.bmm(grouped.reshape(kv_heads, -1, key_dim), keys.to(dtype).transpose(1, 2))
    if settings.softcap:
        logits = torch.tanh(logits / settings.softcap) * settings.softcap
    logits = logits.view(kv_heads, q_heads // kv_heads, rows, length)
    if visible is not None:
        logits[..., length - visible.shape[-1] :].masked_fill_(~visible, float("-inf"))
    probability = softmax_beside(sinks, logits)
    out = torch.bmm(probability.reshape(kv_heads, -1, length), values.to(dtype))
    out = out.view(kv_heads, -1, rows, value_dim).permute(2, 0, 1, 3).reshape(rows, q_heads, value_dim)
    return out.to(q.dtype), logits


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
