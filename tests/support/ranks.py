"""Runs a function in several processes that form a gloo process group, and collects what they return."""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parents[2])
DIED, BEGAN = "died", "began"

STARTING = 600.0
"""Seconds within which all ranks must have begun."""

PRELOADED = [
    "sparsespec_compile",
    *(f"transformers.models.{name}" for name in ("gemma3", "llama", "qwen3", "qwen3_moe")),
]
"""What the server of processes imports, so that those that it forks need not."""


class RankError(AssertionError):
    """A rank raised, died or did not end in time; the text holds every rank's outcome."""


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(rank, size, *arguments)` in `size` processes that have joined a gloo group.

    They are forked from a server that has imported the package once, so that starting one takes little time.

    Args:
        function: defined at the top of a module that can be imported.
        size: of the group.
        arguments: can be pickled, as must be what the function returns.
        timeout: seconds for all of it, from when all ranks have begun; also that of each collective.

    Returns:
        What each rank returned, in order.

    Raises:
        RankError: a rank raised, died, or did not end in time. The others are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder, _root_on_path():
        processes, pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            store = os.path.join(folder, "store")
            process = context.Process(
                target=_run, args=(theirs, store, timeout, rank, size, function, arguments), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            outcomes = _collect(pipes, timeout)
        finally:
            for process in processes:
                process.join(0.2)
                if process.is_alive():
                    process.kill()
                process.join()
    failed = [
        f"rank {rank}: {f'{outcome}, exit code {process.exitcode}' if outcome is DIED else outcome}"
        for rank, (process, (good, outcome)) in enumerate(zip(processes, outcomes, strict=True))
        if not good
    ]
    if failed:
        raise RankError("\n".join(failed))
    return [outcome for _, outcome in outcomes]


def _collect(pipes: list[Connection], timeout: float) -> list[tuple[bool, Any]]:
    """What the ranks sent: whether it is a result, and the result or a text. Waits until all have ended.

    Each first says that it has begun: until all have, the server may still be importing, which does not count.
    """
    outcomes: dict[int, tuple[bool, Any]] = {}
    began: set[int] = set()
    deadline = time.monotonic() + STARTING
    while len(outcomes) < len(pipes) and time.monotonic() < deadline:
        open_ = [pipe for rank, pipe in enumerate(pipes) if rank not in outcomes]
        for pipe in wait(open_, max(deadline - time.monotonic(), 0)):
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                told = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                told = (False, DIED)
            if told != BEGAN:
                outcomes[rank] = told
                continue
            began.add(rank)
            if len(began) == len(pipes):
                deadline = time.monotonic() + timeout
    return [outcomes.get(rank, (False, "did not end in time")) for rank in range(len(pipes))]


def _run(pipe: Connection, store: str, timeout: float, rank: int, size: int, function: Any, arguments: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    pipe.send_bytes(pickle.dumps(BEGAN))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
        result = function(rank, size, *arguments)
    except BaseException:
        outcome = False, traceback.format_exc()
    else:
        outcome = True, result
    pipe.send_bytes(pickle.dumps(outcome))  # by value: a connection's own `send` hands tensors over in shared memory
    if outcome[0]:
        dist.destroy_process_group()


class _root_on_path:
    """The repository's root at the end of `sys.path`: children find the tests there, and what is installed before."""

    def __enter__(self) -> None:
        self.added = ROOT not in sys.path
        if self.added:
            sys.path.append(ROOT)

    def __exit__(self, *_: object) -> None:
        if self.added:
            sys.path.remove(ROOT)
