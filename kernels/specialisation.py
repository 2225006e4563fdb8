"""Arguments that attention and scoring are not compiled anew for.

A kernel is compiled for each pattern of divisible sizes and addresses, which takes seconds. Those of q, k, v and kv
decide how wide loads are; the others change with every step or layer, and nothing hangs on them. Names that a kernel
does not have are ignored.
"""

ANY_VALUE = (
    "requests",
    "rows",
    "kv_heads",
    "page_units",
    "stride_table",
    "stride_score_slot",
    "stride_score_head",
    "stride_pillar_request",
    "stride_pillar_head",
    "window",
)
ANY_ADDRESS = (
    "scores",
    "counters",
    "request_mode",
    "row_start",
    "row_count",
    "cached_length",
    "page_table",
    "score_rows",
    "score_slot",
    "pillar_count",
    "recent_start",
    "pillar_index",
)
