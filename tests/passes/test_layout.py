"""Which layers share a page table, and where each lies in the pages of its group."""

import itertools

import pytest

from sparsespec_compile.passes.layout import AttentionLayer, KVLayout


def layout(*layers, page_size=16):
    """Layers of (window, KV heads, head dimension); a negative window is that of chunks."""
    return KVLayout(
        tuple(
            AttentionLayer(number, 2 * heads, heads, dim, dim, 1.0, abs(window), 0.0, window < 0)
            for number, (window, heads, dim) in enumerate(layers)
        ),
        page_size,
    )


SLIDING, FULL = (512, 1, 256), (0, 1, 256)
GEMMA3_1B = [FULL if number % 6 == 5 else SLIDING for number in range(26)]
CASES = {
    "llama: no window": ([(0, 8, 128)] * 32, [(0, 32)]),
    "mistral: one window everywhere": ([(4096, 8, 128)] * 32, [(4096, 32)]),
    "gemma 2: every other layer": ([(4096, 4, 256), (0, 4, 256)] * 13, [(0, 13), (4096, 13)]),
    "gemma 3 1b: 4 full, 22 windowed": (GEMMA3_1B, [(0, 4), *[(512, 4)] * 5, (512, 2)]),
    "more full than windowed": ([(0, 8, 64)] * 3 + [(128, 8, 64)], [(0, 3), (128, 1)]),
    "unlike heads": (
        [(0, 2, 64), (128, 1, 64), (128, 1, 64), (128, 2, 64), (128, 1, 32)],
        [(0, 1), (128, 2), (128, 1), (128, 1)],
    ),
    "a windowed layer larger than all full ones": (
        [(0, 1, 64), (128, 4, 64), (128, 1, 64)],
        [(0, 1), (128, 1), (128, 1)],
    ),
    "two windows and full": (
        [(0, 1, 64), (64, 1, 64), (128, 1, 64), (64, 1, 64)],
        [(0, 1), (64, 1), (64, 1), (128, 1)],
    ),
    "llama 4: chunks in three of four": ([(-8192, 8, 128)] * 3 + [(0, 8, 128)], [(0, 1), *[(-8192, 1)] * 3]),
    "a window and chunks alike": ([(64, 1, 64), (-64, 1, 64), (64, 1, 64), (-64, 1, 64)], [(64, 2), (-64, 2)]),
    "two windows alone": ([(64, 1, 64), (128, 1, 64), (64, 1, 64), (128, 1, 64)], [(64, 2), (128, 2)]),
    "two windows alone, unlike": ([(64, 1, 64), (128, 1, 64), (64, 1, 64)], [(64, 1), (64, 1), (128, 1)]),
}


@pytest.mark.parametrize("name", CASES)
def test_groups(name):
    layers, expected = CASES[name]
    found = layout(*layers)
    signed = [(-group.window if group.chunked else group.window, len(group.layers)) for group in found.groups]
    assert signed == expected
    assert sorted(itertools.chain(*(group.layers for group in found.groups))) == list(range(len(layers)))
    for number, group in enumerate(found.groups):
        assert list(group.layers) == sorted(group.layers)
        assert all(found.group_of(index) == number for index in group.layers)
        layers = [found.layers[index] for index in group.layers]
        assert {(layer.window, layer.chunked) for layer in layers} == {(group.window, group.chunked)}


@pytest.mark.parametrize("name", CASES)
def test_the_layers_of_a_group_lie_side_by_side_in_its_pages(name):
    found = layout(*CASES[name][0])
    ends = []
    for group in found.groups:
        end = 0
        for index in group.layers:
            assert found.page_offset(index) == end
            end += found.page_elements(index)
        ends.append(end)
    assert found.elements_per_page == max(ends)


def test_the_pool_of_gemma_3s_shape_takes_a_page_of_four_layers_for_each_group():
    found = layout(*GEMMA3_1B)
    assert found.elements_per_page == 4 * 16 * 512
    assert len(found.groups) == 7
    assert found.pages_for(512) == 32
    assert found.pages_for(513) == 33


def test_one_kind_of_layer_is_laid_out_as_one_run():
    found = layout(*[(0, 2, 64)] * 3)
    assert [found.page_offset(index) for index in range(3)] == [0, 4096, 8192]
    assert found.elements_per_page == 3 * 4096
