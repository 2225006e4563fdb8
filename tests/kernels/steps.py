"""The steps and layers that every implementation of the attention op is tested on."""

from sparsespec_compile.kernels.ops import Mode

from .cases import Request, Shape

MIXED = [
    Request(Mode.DRAFT, cached=23, pillars=5, recent=17, score_rows=1),
    Request(Mode.VERIFY, cached=30, rows=5, score_rows=5, pillars=6, recent=25),
    Request(Mode.IDLE, cached=9, rows=3, score_rows=2, pillars=1, recent=4),
    Request(Mode.PREFILL, cached=8, rows=11, score_rows=4, recent=3),
    Request(Mode.DRAFT, cached=12),
    Request(Mode.PREFILL, rows=6),
    Request(Mode.VERIFY, cached=16, rows=1, score_rows=1),
    Request(Mode.DRAFT, cached=21, rows=3, pillars=4, recent=19),
    Request(Mode.VERIFY, cached=7, rows=2),
    Request(Mode.PREFILL, rows=3, score_rows=3),
    Request(Mode.DRAFT, rows=1),
    Request(Mode.DRAFT, cached=20, rows=0),
]
"""All modes: drafts with and without pillars and of several rows, prompts whole and in chunks, scores on and off, a
request with one token, rows that end on a page boundary; and entries left from an earlier phase, which the mode of the
request must override."""

LAYERS = {
    "gqa": Shape(),
    "heads of 1": Shape(q_heads=3, kv_heads=3, page_size=1),
    "groups of 7, page 16": Shape(q_heads=7, kv_heads=1, page_size=16),
    "window": Shape(window=6),
    "window of 1": Shape(window=1),
    "chunks": Shape(window=8, chunked=True),
    "chunks of 5, groups of 7, sinks": Shape(window=5, chunked=True, sinks=0.0, q_heads=7, kv_heads=1, page_size=16),
    "chunks of 1": Shape(window=1, chunked=True),
    "softcap": Shape(softcap=3.0, scale=1.0),
    "sharp": Shape(scale=1.5),
    "sinks": Shape(sinks=0.0),
    "sinks above all, window": Shape(sinks=9.0, window=6, q_heads=7, kv_heads=1),
    "sinks below all": Shape(sinks=-300.0, softcap=3.0, page_size=16),
    "unequal dims": Shape(key_dim=24, value_dim=5, window=9, softcap=5.0, page_size=16),
}
