"""Attention from its definition: dense tokens, one row and one query head at a time, float64, no page table."""

import math

import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import Mode

from .cases import SENTINEL, Case, Request


def expected_output(case: Case) -> Tensor:
    """[T, Hq, Dv] in float64; rows of no request are zero."""
    out = torch.zeros(case.tensors["q"].shape[0], case.shape.q_heads, case.shape.value_dim, dtype=torch.float64)
    for b, request in enumerate(case.requests):
        for row in range(request.rows if request.length else 0):
            for head in range(case.shape.q_heads):
                group = head // (case.shape.q_heads // case.shape.kv_heads)
                seen = _seen(case, b, group, row)
                values = case.history[b][group, seen, case.shape.key_dim :].double()
                logits = torch.cat((_logits(case, b, head, row, seen), _sink(case, head)))
                out[case.row_start[b] + row, head] = logits.softmax(0)[: len(seen)] @ values
    return out


def expected_scores(case: Case) -> Tensor:
    """[C, Hkv, S] in float64; the sentinel where nothing may be written."""
    scores = torch.full(case.tensors["scores"].shape, SENTINEL, dtype=torch.float64)
    share = case.shape.q_heads // case.shape.kv_heads
    for b, request in enumerate(case.requests):
        if request.mode not in (Mode.VERIFY, Mode.PREFILL) or not request.score_rows:
            continue
        scored, verifies = request.length - request.score_rows, request.mode == Mode.VERIFY
        slot = case.tensors["score_slot"][b]
        scores[slot, :, :scored] = 0
        for row in range(request.rows - request.score_rows, request.rows):
            for head in range(case.shape.q_heads):
                seen = _seen(case, b, head // share, row)
                logits = _logits(case, b, head, row, seen)
                measure = _drafted(case, b, head // share, row, _measuring(request)) if verifies else seen
                total = torch.cat((_logits(case, b, head, row, measure), _sink(case, head))).logsumexp(0)
                for position, x in zip(seen, logits.tolist(), strict=True):
                    if position < scored:
                        looked = min(1.0, math.exp(x - total))
                        scores[slot, head // share, position] += looked / (share * request.score_rows)
    return scores


def expected_pool(case: Case) -> Tensor:
    """The whole pool with the new tokens in their places."""
    pool, shape = case.pool.clone(), case.shape
    kv = case.tensors["kv"]
    kv = pool.as_strided(kv.shape, kv.stride(), kv.storage_offset())
    for b, request in enumerate(case.requests):
        for position in range(request.cached, request.length):
            page = case.tensors["page_table"][b, position // shape.page_size]
            kv[page, :, position % shape.page_size] = case.history[b][:, position].to(kv.dtype)
    return pool


def _seen(case: Case, b: int, kv_head: int, row: int) -> list[int]:
    if case.requests[b].mode == Mode.DRAFT:
        return _drafted(case, b, kv_head, row)
    position = case.requests[b].cached + row
    return list(range(case.shape.first_seen(position), position + 1))


def _measuring(request: Request) -> int:
    """Pillars that scores are measured by: what recent positions leave of 128, at least 8."""
    return min(request.pillars, max(8, 128 - (request.length - request.recent)))


def _drafted(case: Case, b: int, kv_head: int, row: int, most: int | None = None) -> list[int]:
    """What a draft in the place of a row reads, with the first ``most`` pillars only."""
    request = case.requests[b]
    position = request.cached + row
    first = case.shape.first_seen(position)
    pillars = case.tensors["pillar_index"][b, kv_head, : request.pillars].tolist()[:most]
    return [p for p in (*pillars, *range(request.recent, position + 1)) if p >= first]


def _sink(case: Case, head: int) -> Tensor:
    """The sink of a query head [1], or none [0]."""
    if case.shape.sinks is None:
        return torch.empty(0, dtype=torch.float64)
    return case.tensors["sinks"][head : head + 1].double().cpu()


def _logits(case: Case, b: int, head: int, row: int, seen: list[int]) -> Tensor:
    shape = case.shape
    kv_head = head // (shape.q_heads // shape.kv_heads)
    query = case.tensors["q"][case.row_start[b] + row, head].double().cpu()
    logits = case.history[b][kv_head, seen, : shape.key_dim].double() @ query * shape.scale
    if shape.softcap:
        logits = torch.tensor(
            [shape.softcap * math.tanh(x / shape.softcap) for x in logits.tolist()], dtype=torch.float64
        )
    return logits
