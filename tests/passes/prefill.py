"""Runs a compiled model on whole prompts, packed one after the other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import STEP_TENSORS, Mode
from sparsespec_compile.passes.layout import KVLayout
from sparsespec_compile.passes.pipeline import CompiledModel

PAGES_PER_REQUEST = 4
SCORED = 64
PILLARS = 5


@dataclass
class Step:
    """A step's inputs, in the order in which the compiled graph takes them."""

    inputs: tuple[Tensor, ...]

    @property
    def pool(self) -> Tensor:
        return self.inputs[3]

    @property
    def scores(self) -> Tensor:
        return self.inputs[4]


def prefill_step(layout: KVLayout, sequences: list[Tensor], slots: int = 3, dtype: torch.dtype = torch.float32) -> Step:
    """One step that prefills each sequence whole, in the first of `slots` request slots; logits of every row."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32)
    used = slice(0, len(sequences))
    step = {name: torch.zeros(slots, dtype=torch.int32) for name in STEP_TENSORS}
    step[STEP_TENSORS[0]][used] = Mode.PREFILL
    step["row_start"][used] = lengths.cumsum(0) - lengths
    step["row_count"][used] = lengths
    step["score_rows"][used] = 2
    step["score_slot"][used] = torch.arange(len(sequences), dtype=torch.int32)
    pages = len(layout.groups) * slots * PAGES_PER_REQUEST
    step["page_table"] = torch.arange(pages, dtype=torch.int32).view(-1, slots, PAGES_PER_REQUEST).flip(0, 1)
    heads = layout.total_kv_heads
    return Step(
        (
            torch.cat(sequences)[None],
            torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None],
            torch.arange(int(lengths.sum())),
            torch.zeros(pages, layout.elements_per_page, dtype=dtype),
            torch.zeros(slots, heads, SCORED),
            torch.zeros(slots, heads, PILLARS, dtype=torch.int32),
            *step.values(),
        )
    )


def prefill(compiled: CompiledModel, sequences: list[Tensor], slots: int = 3) -> list[Tensor]:
    """Logits of each sequence, `[tokens, vocabulary]`, from one packed call of the compiled graph."""
    step = prefill_step(compiled.layout, sequences, slots)
    with torch.no_grad():
        packed = compiled.graph_module(*step.inputs)
    return list(packed[0].split([len(sequence) for sequence in sequences]))
