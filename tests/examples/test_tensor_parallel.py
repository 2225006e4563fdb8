"""The example for several ranks, on two processes of a CPU, and what one of them would write alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(ranks, *arguments):
    script = [str(ROOT / "examples" / "tensor_parallel.py"), "--device", "cpu", *arguments]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_ranks_share_the_embedded_model_and_write_what_one_writes():
    alone, shared = (run(ranks, "--max-new-tokens", "20") for ranks in (1, 2))
    parts = dict(re.findall(r"rank (\d) of 2: ([\d.]+) MiB, 4 query heads, 1 KV heads", shared))
    (whole,) = re.findall(r"rank 0 of 1: ([\d.]+) MiB, 8 query heads, 2 KV heads", alone)
    assert set(parts) == {"0", "1"}
    assert all(float(part) < 0.6 * float(whole) for part in parts.values())
    texts = [[line for line in out.splitlines() if line and "rank" not in line] for out in (alone, shared)]
    assert sum(line.startswith("solve ") for line in texts[0]) == 4
    assert texts[0][:-1] == texts[1][:-1]
    assert texts[1][-1].startswith("accepted of 8 drafts")
