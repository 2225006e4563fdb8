"""What a user would otherwise call, on the same shapes.

SDPA has no page table: it gets contiguous copies of equal length, its best case, with the step's rows at the end, and
without causal mask among the rows of a verification. Where lengths differ it is left out. FlexAttention reads pages of
128 tokens, its block size, all of them visible. FlashInfer is measured where it can be imported. Draws stand beside
torch's argmax, which is what greedy ones take, and eager sampling by sorting, which draws all rows from one generator.
"""

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.kernels.tuning.measure import Call, Heads, Step, Work

FLEX_PAGE = 128
WORKSPACE_BYTES = 512 * 2**20


class PeerUnavailableError(RuntimeError):
    """A peer cannot be measured on this case or machine; the text says why."""


def _alike(step: Step) -> Work:
    """What all requests of the step do."""
    if len(set(step.work)) != 1:
        raise PeerUnavailableError("requests differ")
    return step.work[0]


def _contiguous(heads: Heads, requests: int, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Hq, rows, Dk], k [B, Hkv, length, Dk] and v [B, Hkv, length, Dv]."""
    made = torch.randn(requests, heads.q_heads, rows, heads.key_dim, device="cuda", dtype=heads.dtype)
    keys = torch.randn(requests, heads.kv_heads, length, heads.key_dim, device="cuda", dtype=heads.dtype)
    values = torch.randn(requests, heads.kv_heads, length, heads.value_dim, device="cuda", dtype=heads.dtype)
    return made, keys, values


def _sdpa(backend: SDPBackend, step: Step) -> Call:
    work = _alike(step)
    prefill = work.mode == Mode.PREFILL
    length = work.tokens_read() + work.rows
    q, k, v = _contiguous(step.heads, len(step.work), work.rows, length)

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=prefill, enable_gqa=True)

    return call


def sdpa_flash(step: Step) -> Call:
    """FlashAttention 2 as torch ships it; for drafts on tokens that somebody else has gathered."""
    return _sdpa(SDPBackend.FLASH_ATTENTION, step)


def sdpa_cudnn(step: Step) -> Call:
    """cuDNN's attention as torch calls it."""
    return _sdpa(SDPBackend.CUDNN_ATTENTION, step)


def flex_paged(step: Step) -> Call:
    """FlexAttention over a paged cache [1, Hkv, pages * 128, D], its block mask holding the page table."""
    work, heads, requests = _alike(step), step.heads, len(step.work)
    pages = work.cached // FLEX_PAGE
    if not pages:
        raise PeerUnavailableError("contexts are shorter than a block")
    _, k, v = _contiguous(heads, 1, 1, requests * pages * FLEX_PAGE)
    q = torch.randn(requests, heads.q_heads, work.rows, heads.key_dim, device="cuda", dtype=heads.dtype)
    table = torch.zeros(requests, 1, 1, requests * pages, dtype=torch.int32, device="cuda")
    table[..., :pages] = torch.randperm(requests * pages, device="cuda").int().view(requests, 1, 1, pages)
    count = torch.full((requests, 1, 1), pages, dtype=torch.int32, device="cuda")
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(count),
        torch.zeros_like(table),
        count,
        table,
        BLOCK_SIZE=FLEX_PAGE,
        seq_lengths=(work.rows, k.shape[2]),
    )
    torch._dynamo.reset()  # or dynamo gives up compiling after a few shapes
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def flashinfer(step: Step) -> Call:
    """FlashInfer's paged decode, for several rows its paged prefill; for drafts page 1 and one list over all heads."""
    library = _flashinfer()
    work, heads, requests = _alike(step), step.heads, len(step.work)
    page_size = 1 if work.mode == Mode.DRAFT else heads.page_size
    length = work.tokens_read() + work.rows
    pages = -(-length // page_size)
    cache = _flashinfer_cache(heads, requests * pages, page_size)
    start = torch.arange(requests + 1, dtype=torch.int32, device="cuda") * pages
    table = torch.randperm(requests * pages, device="cuda").int()
    last = torch.full((requests,), length - (pages - 1) * page_size, dtype=torch.int32, device="cuda")
    q = torch.randn(requests * work.rows, heads.q_heads, heads.key_dim, device="cuda", dtype=heads.dtype)
    shape = (heads.q_heads, heads.kv_heads, heads.key_dim, page_size)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")  # zero at its first use, or undefined
    dtypes = {"q_data_type": heads.dtype, "kv_data_type": heads.dtype}
    if work.rows == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(start, table, last, *shape, **dtypes)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        rows = torch.arange(requests + 1, dtype=torch.int32, device="cuda") * work.rows
        wrapper.plan(rows, start, table, last, *shape, causal=True, **dtypes)
    out = torch.empty_like(q)  # without one, prefill fills its own with zeros first
    return lambda: wrapper.run(q, cache, out=out)


def flashinfer_mixed(step: Step) -> Call:
    """FlashInfer's BatchAttention: drafts and verifications in one launch, page 1, one list over all heads."""
    library, heads = _flashinfer(), step.heads
    lengths = torch.tensor([item.tokens_read() + item.rows for item in step.work], dtype=torch.int32)
    rows = torch.tensor([item.rows for item in step.work], dtype=torch.int32)
    start, row_start = (torch.nn.functional.pad(x.cumsum(0), (1, 0)).int().cuda() for x in (lengths, rows))
    tokens = int(lengths.sum())
    cache = _flashinfer_cache(heads, tokens, 1)
    q = torch.randn(int(rows.sum()), heads.q_heads, heads.key_dim, device="cuda", dtype=heads.dtype)
    wrapper = library.BatchAttention(kv_layout="NHD")
    table = torch.randperm(tokens, device="cuda").int()
    shape = (heads.q_heads, heads.kv_heads, heads.key_dim, heads.value_dim, 1)
    options = {"causal": True, "q_data_type": heads.dtype, "kv_data_type": heads.dtype}
    wrapper.plan(row_start, start, table, lengths.cuda(), *shape, **options)
    return lambda: wrapper.run(q, cache, logits_soft_cap=0.0)


def _flashinfer():
    if importlib.util.find_spec("flashinfer") is None:
        raise PeerUnavailableError("flashinfer is not installed: pip install flashinfer-python")
    return importlib.import_module("flashinfer")


def _flashinfer_cache(heads: Heads, pages: int, page_size: int) -> Tensor:
    return torch.randn(pages, 2, page_size, heads.kv_heads, heads.key_dim, device="cuda", dtype=heads.dtype)


PEERS: dict[str, Callable[[Step], Call]] = {
    "sdpa flash": sdpa_flash,
    "sdpa cudnn": sdpa_cudnn,
    "sdpa gathered": sdpa_flash,
    "flex paged": flex_paged,
    "flashinfer": flashinfer,
    "flashinfer mixed": flashinfer_mixed,
}


def versions() -> dict[str, str]:
    """Of FlashInfer where it is installed; the other peers come with torch."""
    try:
        return {"flashinfer": version("flashinfer-python")}
    except PackageNotFoundError:
        return {}


def argmax(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What drawing greedily takes in torch: the least that any draw reads."""
    return logits.argmax(dim=-1)


def sorted_draw(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Sampling as HuggingFace's warpers and `torch.multinomial` do it, in eager torch; it has no seed for each row."""
    scaled = logits.float() / temperature
    if top_k:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1.0:
        ordered, index = scaled.sort(dim=-1)
        dropped = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
        scaled = scaled.masked_fill(dropped.scatter(1, index, dropped), float("-inf"))
    return torch.multinomial(scaled.softmax(dim=-1), 1)[:, 0]


DRAW_PEERS: dict[str, Callable[[Tensor, float, int, float], Tensor]] = {
    "torch argmax": argmax,
    "torch sort and multinomial": sorted_draw,
}
