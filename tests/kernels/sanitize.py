"""A small step and a selection on a GPU, for compute-sanitizer to watch: split units, all modes, scores both ways."""

import torch

from sparsespec_compile.kernels.ops import Mode, dual_mode_attention, select_pillars
from sparsespec_compile.kernels.workload import Heads, Work, make_step

HEADS = Heads(8, 2, 64, 64)

WORK = [
    Work(Mode.DRAFT, 700, pillars=200),
    Work(Mode.VERIFY, 5000, 9, 250, True),
    Work(Mode.PREFILL, 64, 30, 0, True),
    Work(Mode.PREFILL, 0, 150),
    Work(Mode.VERIFY, 900),
]


def main() -> None:
    device = torch.device("cuda", 0)
    step = make_step(HEADS, WORK, device)
    dual_mode_attention(*step.arguments())
    lengths = [work.cached if work.scored else -1 for work in WORK]
    scored, budget = (torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, [250] * len(WORK)))
    tensors = step.tensors
    select_pillars(
        tensors["scores"], tensors["score_slot"], scored, budget, tensors["pillar_index"], tensors["pillar_count"]
    )
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
