"""What the engine does on a CPU and nowhere else."""

import torch

import sparsespec_compile as ss

from .support.models import tiny


def test_one_request_decodes_in_rows_of_one(monkeypatch):
    """A product of two rows takes twice the time of one."""
    fast = ss.optimize(tiny("llama"), ss.SpecConfig(draft_tokens=0))
    rows, forward = [], fast._engine.target.forward

    def counted(input_ids, *others):
        rows.append(input_ids.shape[1])
        return forward(input_ids, *others)

    object.__setattr__(fast._engine.target, "forward", counted)
    fast.generate(torch.tensor([[3, 1, 4, 1, 5]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert rows[0] == 5
    assert set(rows[1:]) == {1}
