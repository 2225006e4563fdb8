"""What ranks that share a model compute together: embeddings of which each holds some rows, sums over ranks, gathers.

Sums: on GPUs of one host that reach each other's memory, ranks exchange through symmetric memory: a buffer of each rank
that all others read and write. Nobody waits for a library's threads or copies, so a step of few rows takes half of
NCCL's time (benchmarks/LOG.md). NVLink multicast is not needed. Elsewhere the process group's own all-reduce runs:
NCCL's on CUDA, gloo's on CPUs.

Both can be captured in CUDA graphs, and wait for each other on the device: a rank that is early waits within its
kernel, and none overwrites what another still reads. On a rank, calls must follow each other in one stream.
"""

import socket
import threading

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from ..errors import KernelInputError


@torch.no_grad()
def embed_part(weight: Tensor, ids: Tensor, first_token: int) -> Tensor:
    """The embeddings of tokens, zeros for those that ``weight`` does not hold; see ``kernels.ops``.

    Raises:
        KernelInputError: the arguments do not fit each other.
    """
    if weight.dim() != 2 or not weight.shape[0]:
        raise KernelInputError(f"weight has shape {tuple(weight.shape)}; it must be [tokens, features], with a token")
    if ids.dtype != torch.int64 or first_token < 0:
        raise KernelInputError(
            f"ids are {ids.dtype} and first_token is {first_token}; they must be torch.int64, and 0 or more"
        )
    row = ids - first_token
    elsewhere = (row < 0) | (row >= weight.shape[0])
    found = torch.nn.functional.embedding(row.clamp(0, weight.shape[0] - 1), weight)
    return found.masked_fill_(elsewhere[..., None], 0)


ALONE = ""
"""Name of the group of one rank, which is no process group."""

ONE_SHOT_BYTES = 2**17
"""Up to so many every rank sums all of it. Beyond, each sums its share and hands it to the others, which moves less.
Two H200s, us in CUDA graphs, rows of 4,096 bfloat16: 2 and 16 rows in one shot 6.8 and 8.0, by NCCL 11.9 and 12.3; 64,
128 and 256 rows in two 7.6, 10.1 and 13.0, with about 2.5 for the copies, by NCCL 15.5, 20.0 and 32.9."""

_EXCHANGED = frozenset({torch.bfloat16, torch.float32})
"""Dtypes that torch's kernels on symmetric memory take."""

_ALIGNMENT = 16
"""Bytes; sizes of what is exchanged are multiples."""


@torch.no_grad()
def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks of ``group``; see ``kernels.ops``.

    Raises:
        KernelInputError: ``torch.distributed`` has no such group, or a graph is captured whose buffer was not made.
    """
    if group == ALONE:
        return x.clone(memory_format=torch.contiguous_format)
    processes = process_group(group)
    if x.is_cuda and x.dtype in _EXCHANGED and x.numel():
        elements = -(-x.numel() * x.itemsize // _ALIGNMENT) * _ALIGNMENT // x.itemsize
        buffer = _exchange_buffer(processes, elements, x)
        if buffer is not None:
            return _exchanged(x, buffer, elements, group)
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=processes)
    return total


def _exchanged(x: Tensor, buffer: Tensor, elements: int, group: str) -> Tensor:
    """The sum, by way of the first `elements` of the buffer."""
    ours = buffer[:elements]
    if x.numel() * x.itemsize <= ONE_SHOT_BYTES and x.numel() == elements and x.is_contiguous():
        total = x.new_empty(elements)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(ours, x.view(-1), "sum", group, total)
    else:
        ours[: x.numel()].view(x.shape).copy_(x)
        # In place and copied out: torch's variant with an output takes longer than both of them.
        total = torch.ops.symm_mem.two_shot_all_reduce_(ours, "sum", group).clone()
    return total[: x.numel()].view(x.shape)


_buffers: dict[tuple[str, torch.device, torch.dtype], list[Tensor]] = {}
"""By group, device and dtype, the latest last. The others are kept, as captured graphs may exchange through them."""

_reachable: dict[tuple[str, torch.device], bool] = {}
_MAKING = threading.Lock()


def _exchange_buffer(processes: dist.ProcessGroup, elements: int, x: Tensor) -> Tensor | None:
    """A buffer for `elements` like `x`; None where ranks cannot reach each other's memory. The first call makes it.

    That needs all ranks, and memory, so it cannot be done while a graph is captured.
    """
    key = (processes.group_name, x.device, x.dtype)
    made = _buffers.get(key)
    if made and len(made[-1]) >= elements:
        return made[-1]
    with _MAKING:
        if torch.cuda.is_current_stream_capturing():
            if _reachable.get(key[:2]) is False:
                return None
            raise KernelInputError(
                f"a step with sums of {elements} elements over ranks is captured, and none ran before that would have "
                "made the buffer that ranks exchange through; run a step of as many rows first"
            )
        if key[:2] not in _reachable:
            _reachable[key[:2]] = _all_reach_each_other(processes, x.device)
        if not _reachable[key[:2]]:
            return None
        with torch.inference_mode(False), torch.cuda.device(x.device):
            buffer = symmetric_memory.empty(elements, dtype=x.dtype, device=x.device)
            symmetric_memory.rendezvous(buffer, processes.group_name)
        _buffers.setdefault(key, []).append(buffer)
        return buffer


def _all_reach_each_other(processes: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the GPUs of all ranks are different ones of one host, and each reaches the others' memory."""
    mine = (_host(), str(torch.cuda.get_device_properties(device).uuid), device.index)
    everyone: list[tuple[str, str, int]] = [mine] * processes.size()
    dist.all_gather_object(everyone, mine, group=processes)
    hosts, chips, numbers = zip(*everyone, strict=True)
    if len(set(hosts)) > 1 or len(set(chips)) < len(chips):
        return False
    # Processes that see their own GPU alone have it under one number, and cannot ask for the others.
    others = set(numbers) - {device.index} if len(set(numbers)) == len(numbers) else set()
    ours = all(torch.cuda.can_device_access_peer(device, other) for other in others)
    verdicts = [ours] * processes.size()
    dist.all_gather_object(verdicts, ours, group=processes)
    return all(verdicts)


def _host() -> str:
    """What tells hosts apart: names need not."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of a name.

    Raises:
        KernelInputError: there is none, as before ``init_process_group`` or after ``destroy_process_group``.
    """
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # newer: a type of str
    except (RuntimeError, ValueError) as error:
        raise KernelInputError(
            f"torch.distributed has no process group {name!r}. Call torch.distributed.init_process_group() before the "
            "model is optimized, and destroy_process_group() only after the last generation."
        ) from error


_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The first is the newer name."""


@torch.no_grad()
def all_gather(x: Tensor, group: str, ranks: int) -> Tensor:
    """What all ranks of ``group`` have; see ``kernels.ops``.

    Raises:
        KernelInputError: ``torch.distributed`` has no such group, or not of so many ranks.
    """
    gathered = x.new_empty(ranks, *x.shape)
    if group == ALONE and ranks == 1:
        return gathered.copy_(x[None])
    processes = process_group(group)
    if processes.size() != ranks:
        raise KernelInputError(f"ranks is {ranks}; the process group {group!r} has {processes.size()}")
    _gather(gathered.view(-1), x.contiguous().view(-1), group=processes)  # gloo takes no other shapes
    return gathered
