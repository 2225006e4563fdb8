"""A small step, a selection and draws on a GPU, for compute-sanitizer to watch: split units, modes, scores, filters."""

import torch

from sparsespec_compile.kernels.ops import Mode, draw_tokens, dual_mode_attention, select_pillars
from sparsespec_compile.kernels.tuning.measure import Heads, Work, make_step

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
    _draw(device)
    torch.cuda.synchronize()


def _draw(device: torch.device) -> None:
    """Greedy, unfiltered, a few candidates, and filters that read the row once for each bit."""
    settings = ([0.0, 1.0, 0.7, 0.7, 1.0], [0, 0, 20, 3000, 0], [1.0, 1.0, 0.9, 0.9, 0.99], [0.0, 0.0, 0.1, 0.0, 0.0])
    heat, mass, share = (torch.tensor(settings[i], device=device) for i in (0, 2, 3))
    count, seed = (torch.tensor(x, device=device) for x in (settings[1], [1, 2, 3, 4, 5]))
    draw_tokens(torch.randn(5, 20011, device=device), heat, count, mass, share, seed, seed)


if __name__ == "__main__":
    main()
