"""The attention layers of a model, and the layout of its KV pool.

Plain data, no FX: the compiler writes it, and the runtime allocates its pool and score buffers by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class AttentionLayer:
    """One attention site of the model, in the order in which a forward pass meets it.

    Attributes:
        layer: number of the site, 0 for the first one that a forward pass meets.
        q_heads, kv_heads: query heads and KV heads; query head h reads KV head `h // (q_heads // kv_heads)`.
        key_dim, value_dim: elements of one head's key (and query) and of one head's value.
        scale: factor on the query-key products.
        window: 0 = every earlier position is visible; w > 0 = position p sees p - w + 1 .. p, or what is chunked.
        softcap: 0.0 = none; c > 0 = scores become `c * tanh(score / c)` before the softmax.
        chunked: whether position p sees p // window * window .. p.
    """

    layer: int
    q_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int
    softcap: float
    chunked: bool = False

    def elements_per_token(self) -> int:
        """Elements that one token's keys and values take in this layer."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share a page table.

    Attributes:
        layers: their numbers, ascending.
        window, chunked: of every one of them; window 0 = none.
    """

    layers: tuple[int, ...]
    window: int
    chunked: bool = False


@dataclass(frozen=True)
class KVLayout:
    """Where each layer's keys, values and scores lie.

    The pool is one tensor `[pages, elements_per_page]`. A page belongs to one group of layers and holds `page_size`
    tokens of each of them, so that it moves in one copy. Within a page of its group, layer i is
    `pool[:, page_offset(i) : page_offset(i) + page_elements(i)]`, seen as `[pages, kv_heads, page_size, key_dim +
    value_dim]` with a token's key and value side by side. The rest of a smaller group's page is unused. Each group has
    its own page table, so that pages behind a window can be freed while other layers keep theirs.

    Scores and pillar indices hold the KV heads of all layers one after the other: layer i has
    `[:, head_offset(i) : head_offset(i) + kv_heads]`.

    Attributes:
        layers: in the order of the forward pass; `layers[i].layer` is i.
        page_size: tokens of a page.
    """

    layers: tuple[AttentionLayer, ...]
    page_size: int

    @cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The groups of layers, those without a window first.

        Layers without a window are one group. Those with one window are as few groups as take no more elements a token
        than that group does, or, where every layer has a window, than the smallest window's layers together: pages of
        different groups are then about equally full. Layers of different windows, or of a window and of chunks, share
        no group.
        """
        kinds: dict[tuple[int, bool], list[int]] = {}
        for index, layer in enumerate(self.layers):
            kinds.setdefault((layer.window, layer.chunked), []).append(index)
        sizes = {kind: sum(map(self._elements, layers)) for kind, layers in kinds.items()}
        most = sizes.get((0, False), min(sizes.values(), default=0))
        ordered = sorted(kinds, key=lambda kind: kind[0] > 0)
        parts = [(kind, part) for kind in ordered for part in self._parts(kinds[kind], most)]
        return tuple(LayerGroup(tuple(part), *kind) for kind, part in parts)

    @cached_property
    def _group_of(self) -> tuple[int, ...]:
        number = {index: number for number, group in enumerate(self.groups) for index in group.layers}
        return tuple(number[index] for index in range(len(self.layers)))

    def group_of(self, index: int) -> int:
        """Number of the group that layer `index` belongs to."""
        return self._group_of[index]

    @cached_property
    def elements_per_page(self) -> int:
        """Elements of a page: those of the largest group."""
        return max((sum(map(self.page_elements, group.layers)) for group in self.groups), default=0)

    def pages_for(self, tokens: int) -> int:
        """Pages of one group that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

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
        """First element of layer `index` within a page of its group."""
        return sum(self.page_elements(i) for i in self.groups[self.group_of(index)].layers if i < index)

    def head_offset(self, index: int) -> int:
        """First KV head of layer `index` among those of all layers."""
        return sum(layer.kv_heads for layer in self.layers[:index])

    def _elements(self, index: int) -> int:
        return self.layers[index].elements_per_token()

    def _parts(self, indices: list[int], most: int) -> list[list[int]]:
        """Runs of `indices` of at most `most` elements a token each, or of one layer that has more."""
        parts: list[list[int]] = []
        taken = 0
        for index in indices:
            if not parts or taken + self._elements(index) > most:
                parts.append([])
                taken = 0
            parts[-1].append(index)
            taken += self._elements(index)
        return parts
