"""Before the first request: which steps run, so that what compiles and times itself does so then."""

import pytest

from sparsespec_compile.runtime.build import first_runs
from sparsespec_compile.runtime.device.inputs import InputSizes


@pytest.mark.parametrize(
    ("slots", "rows", "logits", "expected"),
    [
        (64, 2880, 832, [(251, 250), (2880, 832)]),
        (64, 2112, 64, [(251, 63), (2112, 64)]),
        (2, 40, 18, [(40, 18)]),
    ],
)
def test_block_sizes_are_timed_on_a_decoding_step(slots, rows, logits, expected):
    """Rows, rows with logits and slots differ in the first one, so that no compiler takes two of them for one size."""
    sizes = InputSizes(slots=slots, rows=rows, logits=logits, request_pages=4, updates=8)
    assert first_runs(sizes) == expected
