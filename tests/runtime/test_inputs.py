"""How the inputs of a step lie in memory."""

import pytest
import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.device.inputs import InputPacker, InputSizes, PageUpdate, StepInputs, Work


@pytest.mark.parametrize("slots", [2, 3, 5, 64])
def test_fields_begin_where_compiled_code_takes_them_as_they_are(slots):
    """Inductor's code copies an input that does not begin at 16 bytes: once for each layer."""
    inputs = StepInputs(InputSizes(slots, rows=7, logits=5, request_pages=3, updates=9), torch.device("cpu"))
    views = {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    assert len(views) == 24
    assert [name for name, view in views.items() if view.storage_offset() % 4] == []


def test_page_table_entries_without_work():
    """As when all requests wait for pages to move."""
    packer = InputPacker(InputSizes(slots=3, rows=7, logits=5, request_pages=3, updates=2))
    assert packer.pack([], [PageUpdate(2, 1, 17)]) == (0, 0)
    assert packer._views["update_page"][0] == 17
    assert (packer._views["row_slot"] == -1).all()


def test_each_group_of_layers_has_page_tables_of_its_own():
    packer = InputPacker(InputSizes(slots=3, rows=7, logits=5, request_pages=4, updates=3))
    packer.pack([], [PageUpdate(2, 1, 17), PageUpdate(2, 1, 18, group=1), PageUpdate(0, 3, 19, group=2)])
    tables = torch.full((3, 4, 4), -1, dtype=torch.int32)
    tables.view(-1)[packer._views["update_at"].tolist()] = torch.from_numpy(packer._views["update_page"])
    assert {place: int(tables[place]) for place in ((0, 2, 1), (1, 2, 1), (2, 0, 3))} == {
        (0, 2, 1): 17,
        (1, 2, 1): 18,
        (2, 0, 3): 19,
    }
    assert int((tables >= 0).sum()) == 3


def test_what_is_packed_is_what_the_step_reads():
    sizes = InputSizes(slots=3, rows=7, logits=5, request_pages=3, updates=2)
    packer, inputs = InputPacker(sizes), StepInputs(sizes, torch.device("cpu"))
    work = [
        Work(2, Mode.VERIFY, rows=3, logits=3, scored=3),
        Work(0, Mode.PREFILL, rows=2, offset=4, tokens=[8, 9], logits=1),
    ]
    assert packer.pack(work, [PageUpdate(2, 1, 17)]) == (5, 4)
    inputs.flat.copy_(torch.from_numpy(packer.flat))
    assert inputs.mode.tolist() == [Mode.PREFILL, Mode.IDLE, Mode.VERIFY]
    assert inputs.row_start.tolist() == [3, 0, 0]
    assert inputs.rows.tolist() == [2, 0, 3]
    assert inputs.row_slot.tolist() == [2, 2, 2, 0, 0, -1, -1]
    assert inputs.row_place.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert inputs.row_token.tolist() == [-1, -1, -1, 8, 9, -1, -1]
    assert inputs.logit_rows.tolist() == [0, 1, 2, 4, -1]
    assert inputs.logit_start.tolist() == [3, 0, 0]
    assert inputs.update_at.tolist() == [2 * 3 + 1, 3 * 3]
    assert inputs.update_page[0] == 17


def test_scored_requests_take_score_slots_of_their_own():
    packer = InputPacker(InputSizes(slots=4, rows=9, logits=9, request_pages=3, updates=2))
    scored, drafting = Work(0, Mode.VERIFY, rows=2, logits=2, scored=2), Work(2, Mode.DRAFT, rows=1, logits=1)
    packer.pack([scored, drafting, scored._replace(slot=3), scored._replace(slot=1)], [])
    assert packer._views["score_slot"][[0, 3, 1]].tolist() == [0, 1, 2]
