"""What the compiler found out about a model's attention, and how that shapes the KV pool.

Plain data, no FX: the compiler writes it, the runtime allocates its pool and score buffers from it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionLayer:
    """One attention site of the model, in the order in which a forward pass meets it.

    Attributes:
        layer: number of the site, 0 for the first one that a forward pass meets.
        q_heads, kv_heads: query heads and KV heads; query head h reads KV head `h // (q_heads // kv_heads)`.
        key_dim, value_dim: elements of one head's key (and query) and of one head's value.
        scale: factor on the query-key products.
        window: 0 = every earlier position is visible; w > 0 = position p sees p - w + 1 .. p.
        softcap: 0.0 = none; c > 0 = scores become `c * tanh(score / c)` before the softmax.
    """

    layer: int
    q_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int
    softcap: float

    def elements_per_token(self) -> int:
        """Elements that one token's keys and values take in this layer."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class KVLayout:
    """Where each layer's keys, values and scores lie.

    The pool is one tensor `[pages, elements_per_page]`: a page holds `page_size` tokens of every layer, so that one
    page moves in one copy. Within a page, layer i is `pool[:, page_offset(i) : page_offset(i) + page_elements(i)]`,
    seen as `[pages, kv_heads, page_size, key_dim + value_dim]` with a token's key and value side by side. Scores and
    pillar indices hold the KV heads of all layers one after the other: layer i has `[:, head_offset(i) :
    head_offset(i) + kv_heads]`.
    """

    layers: tuple[AttentionLayer, ...]
    page_size: int

    @property
    def elements_per_page(self) -> int:
        """Elements of one page over all layers."""
        return self.page_offset(len(self.layers))

    @property
    def total_kv_heads(self) -> int:
        """KV heads of all layers together."""
        return self.head_offset(len(self.layers))

    @property
    def largest_group(self) -> int:
        """Query heads of a KV head, in the layer that has most."""
        return max(layer.q_heads // layer.kv_heads for layer in self.layers)

    def page_elements(self, index: int) -> int:
        """Elements that layer `index` has in each page."""
        return self.page_size * self.layers[index].elements_per_token()

    def page_offset(self, index: int) -> int:
        """First element of layer `index` within a page."""
        return sum(self.page_elements(i) for i in range(index))

    def head_offset(self, index: int) -> int:
        """First KV head of layer `index` among those of all layers."""
        return sum(layer.kv_heads for layer in self.layers[:index])
