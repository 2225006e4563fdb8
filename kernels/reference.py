"""Attention in plain torch: the oracle of the Triton kernels and the engine on CPU.

Each request gathers only what its rows read, once, and multiplies per KV head without copying keys for its query
heads. Float64 inputs are computed in float64, everything else in float32.
"""

import torch
from torch import Tensor

from .checks import check_attention, check_site
from .ops import STEP_TENSORS, Mode

_ROW_BLOCK = 512
"""Rows of a request computed at once: bounds the logits of a long prompt, and skips keys that none of them may see."""


def attention_site(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float, layer: int) -> Tensor:
    """Causal attention over T rows as one sequence; see ``kernels.ops``."""
    check_site(q, k, v, window, scale, softcap)
    rows = q.shape[2]
    positions = torch.arange(rows, device=q.device)
    blocks = [q.new_empty(0, q.shape[1], v.shape[3])]
    for low in range(0, rows, _ROW_BLOCK):
        high = min(low + _ROW_BLOCK, rows)
        visible = _visible(positions[low:high], positions[0 if window else low : high], window)
        block = q[0, :, low:high].transpose(0, 1)
        out, _ = _attend(block, k[0, :, :high], v[0, :, :high], visible, scale, softcap)
        blocks.append(out)
    return torch.cat(blocks)[None]


def dual_mode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    scores: Tensor,
    request_mode: Tensor,
    row_start: Tensor,
    row_count: Tensor,
    cached_length: Tensor,
    page_table: Tensor,
    score_rows: Tensor,
    pillar_count: Tensor,
    recent_start: Tensor,
    pillar_index: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Drafting, verifying and prefilling rows in one call; see ``kernels.ops``."""
    given = (request_mode, row_start, row_count, cached_length, page_table, score_rows, pillar_count, recent_start)
    step = dict(zip(STEP_TENSORS, given, strict=True))
    check_attention(q, k, v, kv, scores, step, pillar_index, (scale, window, softcap))
    _write_kv(k, v, kv, request_mode, row_start, row_count, cached_length, page_table)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lists = (
        t.tolist() for t in (request_mode, row_start, row_count, cached_length, score_rows, pillar_count, recent_start)
    )
    for b, (kind, first, count, cached, scored, pillars, recent) in enumerate(zip(*lists, strict=True)):
        if kind == Mode.IDLE or count == 0:
            continue
        rows = slice(first, first + count)
        if kind == Mode.DRAFT:
            out[rows] = _draft(
                q[rows], kv, page_table[b], pillar_index[b, :, :pillars], recent, cached, scale, window, softcap
            )
        else:
            out[rows] = _dense(q[rows], kv, page_table[b], scores[b], scored, cached, scale, window, softcap)
    return out


def _write_kv(
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    request_mode: Tensor,
    row_start: Tensor,
    row_count: Tensor,
    cached_length: Tensor,
    page_table: Tensor,
) -> None:
    """Write the K/V of every row that belongs to a request at its position."""
    counts = row_count.where(request_mode != Mode.IDLE, 0)
    owner = torch.repeat_interleave(counts).long()
    place = torch.arange(owner.shape[0], device=owner.device) - (counts.cumsum(0) - counts)[owner]
    row = row_start[owner] + place
    position = cached_length[owner] + place
    page_size, key_dim = kv.shape[2], k.shape[2]
    page = page_table[owner, position // page_size]
    tokens = kv.transpose(1, 2)
    tokens[..., :key_dim].index_put_((page, position % page_size), k[row])
    tokens[..., key_dim:].index_put_((page, position % page_size), v[row])


def _draft(
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    pillars: Tensor,
    recent_start: int,
    cached: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Rows [r, Hq, Dk] over pillars [Hkv, m] and positions recent_start .. cached + r - 1."""
    end = cached + q.shape[0]
    if window:
        recent_start = max(recent_start, cached - window + 1)
    recent = torch.arange(recent_start, end, device=q.device, dtype=torch.int32)
    position = torch.cat((pillars, recent.expand(pillars.shape[0], -1)), 1)
    head = torch.arange(kv.shape[1], device=q.device)[:, None]
    page_size = kv.shape[2]
    token = kv[pages[position // page_size], head, position % page_size]
    visible = None
    if window or q.shape[0] > 1:
        row_position = torch.arange(cached, end, device=q.device)
        visible = _visible(row_position, position[:, None, None], window)
    keys, values = token.split((q.shape[2], kv.shape[3] - q.shape[2]), 2)
    return _attend(q, keys, values, visible, scale, softcap)[0]


def _dense(
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    scores: Tensor,
    scored: int,
    cached: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Rows [r, Hq, Dk] over every position the window leaves them; writes scores [Hkv, S] if scored rows are wanted."""
    count = q.shape[0]
    end, page_size = cached + count, kv.shape[2]
    first_page = max(0, cached - window + 1) // page_size if window else 0
    base = first_page * page_size
    # Selecting along the first dimension copies the selected pages only; along any other, torch copies all of kv first.
    token = kv.index_select(0, pages[first_page : -(-end // page_size)]).transpose(0, 1).flatten(1, 2)
    keys, values = token.split((q.shape[2], kv.shape[3] - q.shape[2]), 2)
    position = torch.arange(base, end, device=q.device)
    total = torch.zeros(kv.shape[1], end - scored - base, dtype=_compute_dtype(q), device=q.device)
    blocks = []
    for low in range(0, count, _ROW_BLOCK):
        high = min(low + _ROW_BLOCK, count)
        seen = cached + high - base
        new = cached + low - base
        visible = _visible(position[new:seen], position[0 if window else new : seen], window)
        out, probability = _attend(q[low:high], keys[:, :seen], values[:, :seen], visible, scale, softcap)
        blocks.append(out)
        skipped = max(0, count - scored - low)
        if skipped < high - low:
            width = min(seen, total.shape[1])
            total[:, :width] += probability[:, :, skipped:, :width].sum((1, 2))
    if scored:
        scores[:, :base] = 0
        scores[:, base : end - scored] = total / (scored * (q.shape[1] // kv.shape[1]))
    return torch.cat(blocks)


def _visible(row: Tensor, key: Tensor, window: int) -> Tensor:
    """Which keys, at positions key [..., n], rows at positions row [r] see: [..., r, n]."""
    row = row[:, None]
    visible = key <= row
    return visible & (key > row - window) if window else visible


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of rows q [r, Hq, Dk] over keys [Hkv, n, Dk] and values [Hkv, n, Dv].

    ``visible`` [..., r, w] broadcasts to the last w keys of the logits [Hkv, G, r, n]: every row sees the keys before
    them. None means that every row sees every key.
    Returns the rows [r, Hq, Dv] in q's dtype and the probabilities [Hkv, G, r, n].
    """
    dtype = _compute_dtype(q)
    rows, q_heads, key_dim = q.shape
    kv_heads, length, value_dim = values.shape
    grouped = (q.to(dtype) * scale).view(rows, kv_heads, -1, key_dim).permute(1, 2, 0, 3)
    logits = torch.bmm(grouped.reshape(kv_heads, -1, key_dim), keys.to(dtype).transpose(1, 2))
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.view(kv_heads, q_heads // kv_heads, rows, length)
    if visible is not None:
        logits[..., length - visible.shape[-1] :].masked_fill_(~visible, float("-inf"))
    probability = logits.softmax(-1)
    out = torch.bmm(probability.view(kv_heads, -1, length), values.to(dtype))
    out = out.view(kv_heads, -1, rows, value_dim).permute(2, 0, 1, 3).reshape(rows, q_heads, value_dim)
    return out.to(q.dtype), probability


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
