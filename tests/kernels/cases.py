"""Builds steps for the attention op: requests at any phase, packed in any order, over a page pool full of NaN.

Everything the op must not read is poisoned: free pages, slots past a request's tokens, tokens that a draft has no
pillar for, pages hidden by the window, rows of no request, bytes of other layers, entries of the pillar index past its
count. Everything it must not write holds a sentinel.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import STEP_TENSORS, Mode

SENTINEL = -7.0
UNREADABLE = 2**30


@dataclass(frozen=True)
class Request:
    """One request slot. A draft reads ``pillars`` random positions a head below ``recent``, and all from there on."""

    mode: Mode
    cached: int = 0
    rows: int = 1
    score_rows: int = 0
    pillars: int = 0
    recent: int = 0

    @property
    def length(self) -> int:
        return 0 if self.mode == Mode.IDLE else self.cached + self.rows


@dataclass(frozen=True)
class Shape:
    """The attention layer. ``sinks`` is the mean of its query heads' sinks, which are normal; None = it has none."""

    q_heads: int = 4
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    page_size: int = 4
    window: int = 0
    softcap: float = 0.0
    scale: float = 0.25
    sinks: float | None = None
    chunked: bool = False

    def first_seen(self, position: int) -> int:
        """The first position that a row at ``position`` sees."""
        if self.chunked:
            return position - position % self.window
        return max(0, position - self.window + 1) if self.window else 0


@dataclass
class Case:
    """One call of the op and the dense tokens it was made from (history[b] [Hkv, length, Dk + Dv])."""

    shape: Shape
    requests: list[Request]
    tensors: dict[str, Tensor]
    history: list[Tensor]
    row_start: list[int]
    pool: Tensor = field(repr=False)

    def arguments(self) -> tuple[object, ...]:
        """The op's arguments, in order."""
        names = ("q", "k", "v", "kv", "scores", *STEP_TENSORS, "pillar_index")
        settings = (self.shape.scale, self.shape.window, self.shape.softcap, self.shape.chunked)
        return (*(self.tensors[name] for name in names), *settings, self.tensors.get("sinks"))

    def to(self, dtype: torch.dtype, device: str = "cpu", score_dtype: torch.dtype = torch.float32) -> "Case":
        """The same step with its floating-point tensors in another dtype; shares no memory with this one."""
        pool = self.pool.to(device=device, dtype=dtype, copy=True)
        moved = {
            name: tensor.to(device=device, dtype=dtype if name in ("q", "k", "v", "sinks") else tensor.dtype, copy=True)
            for name, tensor in self.tensors.items()
        }
        kv = self.tensors["kv"]
        moved["kv"] = pool.as_strided(kv.shape, kv.stride(), kv.storage_offset())
        scores = torch.full_like(self.tensors["scores"], SENTINEL, dtype=score_dtype, device=device)
        moved["scores"] = scores
        return Case(self.shape, self.requests, moved, self.history, self.row_start, pool)


def build(shape: Shape, requests: list[Request], dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """A random step. Values are exact in ``dtype``, so that every implementation starts from the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    width = shape.key_dim + shape.value_dim
    history = [_normal((shape.kv_heads, r.length, width), generator, dtype) for r in requests]
    table, pages = _page_table(shape, requests, generator)
    pool, kv = _pool(shape, pages, dtype)
    pillar_index = _pillar_index(shape, requests, generator)
    for b, request in enumerate(requests):
        readable = _readable(shape, request, pillar_index[b])
        for position in range(request.cached if request.length else 0):
            page = table[b, position // shape.page_size]
            token = history[b][:, position].where(readable[:, position, None], torch.nan)
            kv[page, :, position % shape.page_size] = token
    starts, total = _pack(requests, generator)
    tensors = {
        **_packed_rows(shape, requests, history, starts, total, generator, dtype),
        "kv": kv,
        "scores": torch.full((len(requests) + 2, shape.kv_heads, max(r.length for r in requests) + 3), SENTINEL),
        "page_table": table,
        "pillar_index": pillar_index,
        "row_start": _ints(starts),
        "request_mode": _ints([r.mode for r in requests]),
        "row_count": _ints([r.rows for r in requests]),
        "cached_length": _ints([r.cached for r in requests]),
        "score_rows": _ints([r.score_rows for r in requests]),
        "score_slot": _score_slot(requests, generator),
        "pillar_count": _ints([r.pillars for r in requests]),
        "recent_start": _ints([r.recent for r in requests]),
    }
    if shape.sinks is not None:
        tensors["sinks"] = _normal((shape.q_heads,), generator, dtype) + shape.sinks
    return Case(shape, requests, tensors, history, starts, pool)


def _readable(shape: Shape, request: Request, pillar_index: Tensor) -> Tensor:
    """Which cached tokens [Hkv, cached] the op may read: of the page in which a window begins, all."""
    position = torch.arange(request.cached)
    first = shape.first_seen(request.cached)
    if request.mode != Mode.DRAFT:
        return (position >= first // shape.page_size * shape.page_size).expand(shape.kv_heads, -1)
    pillar = torch.zeros(shape.kv_heads, request.cached, dtype=torch.bool)
    pillar.scatter_(1, pillar_index[:, : request.pillars].long(), True)
    return pillar | (position >= max(first, request.recent))


def _score_slot(requests: list[Request], generator: torch.Generator) -> Tensor:
    """Shuffled rows of a score buffer that has two more than there are requests; none where none is written."""
    slots = torch.randperm(len(requests) + 2, generator=generator).tolist()
    return _ints([UNREADABLE if r.mode < Mode.VERIFY or not r.score_rows else slots.pop() for r in requests])


def _ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _normal(size: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def _page_table(shape: Shape, requests: list[Request], generator: torch.Generator) -> tuple[Tensor, int]:
    """Shuffled physical pages, page 0 among them, -1 past the reserved ones; and the number of pages of the pool."""
    needed = [-(-r.length // shape.page_size) for r in requests]
    pages = sum(needed) + 3
    shuffled = torch.randperm(pages, generator=generator).tolist()
    table = torch.full((len(requests), max(needed) + 1), -1, dtype=torch.int32)
    for b, count in enumerate(needed):
        table[b, :count] = _ints([shuffled.pop() for _ in range(count)])
    return table, pages


def _pool(shape: Shape, pages: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A pool whose pages hold other layers before and after this one's [pages, Hkv, page_size, Dk + Dv]."""
    layer = shape.kv_heads * shape.page_size * (shape.key_dim + shape.value_dim)
    pool = torch.full((pages, layer + 64), torch.nan, dtype=dtype)
    kv = pool[:, 32 : 32 + layer].view(pages, shape.kv_heads, shape.page_size, shape.key_dim + shape.value_dim)
    return pool, kv


def _pack(requests: list[Request], generator: torch.Generator) -> tuple[list[int], int]:
    """First rows, in shuffled order and with rows of no request between, and the number of rows."""
    starts, row = [0] * len(requests), 1
    for b in torch.randperm(len(requests), generator=generator).tolist():
        starts[b] = row
        if requests[b].mode != Mode.IDLE:
            row += requests[b].rows + int(torch.randint(0, 2, (), generator=generator))
    return starts, row + 2


def _packed_rows(
    shape: Shape,
    requests: list[Request],
    history: list[Tensor],
    starts: list[int],
    total: int,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """q, k and v as slices of one fused projection; rows of no request are NaN."""
    heads = (shape.q_heads, shape.kv_heads, shape.kv_heads)
    dims = (shape.key_dim, shape.key_dim, shape.value_dim)
    sizes = [h * d for h, d in zip(heads, dims, strict=True)]
    fused = torch.full((total, sum(sizes)), torch.nan, dtype=dtype)
    parts = zip(fused.split(sizes, 1), heads, dims, strict=True)
    q, k, v = (part.unflatten(1, (h, d)) for part, h, d in parts)
    for b, request in enumerate(requests):
        if request.length:
            rows = slice(starts[b], starts[b] + request.rows)
            q[rows] = _normal((request.rows, shape.q_heads, shape.key_dim), generator, dtype)
            new = history[b][:, request.cached :].transpose(0, 1)
            k[rows], v[rows] = new[..., : shape.key_dim], new[..., shape.key_dim :]
    return {"q": q, "k": k, "v": v}


def _pillar_index(shape: Shape, requests: list[Request], generator: torch.Generator) -> Tensor:
    """Ascending positions below recent, each head its own; what follows the count may not be read."""
    most = max(r.pillars for r in requests) + 2
    index = torch.full((len(requests), shape.kv_heads, most), UNREADABLE, dtype=torch.int32)
    for b, request in enumerate(requests):
        for head in range(shape.kv_heads):
            chosen = torch.randperm(request.recent, generator=generator)[: request.pillars]
            index[b, head, : request.pillars] = chosen.sort().values.int()
    return index
