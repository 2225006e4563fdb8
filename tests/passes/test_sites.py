"""Reading one attention call, and a mask function."""

import pytest
import torch

from sparsespec_compile.passes.capture.interface import IMPLEMENTATION
from sparsespec_compile.passes.capture.sites import SPAN, Window, causal_window, read_site
from sparsespec_compile.passes.errors import AttentionInterfaceError, UnsupportedAttentionError

from .families import tiny, tokens

NO_WINDOW = Window(0)


def read(window=NO_WINDOW, q=(1, 6, 5, 8), k=(1, 2, 5, 8), v=(1, 2, 5, 4), **options):
    return read_site(3, "layers.3", torch.zeros(q), torch.zeros(k), torch.zeros(v), window, options).layer


def test_a_plain_call():
    layer = read()
    assert (layer.layer, layer.q_heads, layer.kv_heads, layer.key_dim, layer.value_dim) == (3, 6, 2, 8, 4)
    assert (layer.scale, layer.window, layer.softcap) == (1 / 8**0.5, 0, 0.0)


def test_settings_and_harmless_options():
    layer = read(
        window=Window(7),
        scaling=0.25,
        softcap=30.0,
        sliding_window=7,
        dropout=0.0,
        is_causal=True,
        position_ids=torch.arange(5),
        s_aux=None,
        position_bias=None,
        use_cache=False,
    )
    assert (layer.scale, layer.window, layer.softcap) == (0.25, 7, 30.0)


def test_a_window_too_wide_for_a_mask_to_show_is_kept():
    assert read(sliding_window=SPAN).window == SPAN


def test_chunks_are_kept():
    layer = read(window=Window(7, chunked=True))
    assert (layer.window, layer.chunked) == (7, True)
    assert not read(window=Window(7), sliding_window=7).chunked


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"s_aux": torch.zeros(5)}, r"a tensor \(5,\).*sinks.*each of its 6 query heads"),
        ({"sinks": 3.0}, r"passes 3\.0.*sinks"),
        ({"position_bias": torch.zeros(1, 6, 5, 5)}, "position_bias.*bias"),
        ({"indices": torch.zeros(5)}, "indices.*selection"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"something_new": 4}, "something_new=4.*does not know"),
        ({"scaling": torch.ones(5)}, "scaling of type Tensor"),
        ({"sliding_window": 8}, "sliding_window=8.*window of 0"),
        ({"sliding_window": None, "window": Window(8)}, "sliding_window=0.*window of 8"),
        ({"sliding_window": 8, "window": None}, "sliding_window=8.*window of 0"),
        ({"sliding_window": 8, "window": Window(8, chunked=True)}, "sliding_window=8.*chunks of 8"),
        ({"is_causal": False, "window": None}, "is_causal=False.*later tokens"),
    ],
)
def test_what_the_op_does_not_apply_is_refused(options, named):
    with pytest.raises(UnsupportedAttentionError, match=named):
        read(**options)


@pytest.mark.parametrize(
    "shapes",
    [
        {"k": (1, 2, 6, 8), "v": (1, 2, 6, 4)},
        {"k": (1, 4, 5, 8)},
        {"q": (2, 6, 5, 8)},
        {"q": (6, 5, 8)},
        {"k": (1, 2, 5, 4)},
    ],
)
def test_shapes_that_are_not_self_attention_are_refused(shapes):
    with pytest.raises(AttentionInterfaceError, match=r"layers\.3 called attention with q"):
        read(**shapes)


def causal(b, h, q, k):
    return k <= q


@pytest.mark.parametrize("window", [1, 2, 7, 8192, SPAN - 1])
def test_sliding_windows_are_read_from_the_mask(window):
    assert causal_window(lambda b, h, q, k: (k <= q) & (k > q - window)) == Window(window)


@pytest.mark.parametrize("length", [2, 7, 64, 100, 8192, SPAN // 2, SPAN // 2 + 3, SPAN - 1])
def test_chunks_are_read_from_the_mask(length):
    assert causal_window(lambda b, h, q, k: (k <= q) & (k // length == q // length)) == Window(length, chunked=True)


def test_chunks_of_one_are_a_window_of_one():
    assert causal_window(lambda b, h, q, k: (k <= q) & (k == q)) == Window(1)


def test_a_causal_mask_has_no_window():
    assert causal_window(causal) == Window(0)
    assert causal_window(lambda b, h, q, k: (k <= q) & (k > q - SPAN)) == Window(0)


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, q, k: q >= 0,
        lambda b, h, q, k: k // 64 == q // 64,
        lambda b, h, q, k: (k <= q) & ((k + 5) // 100 == (q + 5) // 100),
        lambda b, h, q, k: (k <= q) & ((k // 100 == q // 100) | (k > q - 9)),
        lambda b, h, q, k: (k <= q) & (k // 100 == q // 100) & (k > q - 90),
        lambda b, h, q, k: (k <= q) & ((k // 100 == q // 100) | (k < 4)),
        lambda b, h, q, k: ((k <= q) & (k > q - 8)) | (k < 4),
        lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0),
        lambda b, h, q, k: (k <= q) | ((q < 3) & (k < 3)),
        lambda b, h, q, k: k < q,
        lambda b, h, q, k: k < 0,
        lambda b, h, q, k: torch.zeros(4, 4)[q, k],
        lambda b, h, q, k: (k <= q) & ((q < 1000) | (k > q - 9)),
    ],
)
def test_other_masks_are_neither(mask):
    assert causal_window(mask) is None


def test_the_capture_implementation_runs_in_captures_only():
    model = tiny("llama")
    model.config._attn_implementation = IMPLEMENTATION
    with pytest.raises(AttentionInterfaceError, match="outside a capture"):
        model(tokens(5)[None])
