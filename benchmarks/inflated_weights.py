r"""Weights of a large Qwen3 model that computes what a small one computes.

With d, D the small and the large hidden size, e, E = g e the head sizes, r = sqrt(d / D):

**Residual stream.** Dimensions 0..d-1 carry s x, with x the small model's stream and s a power of two. The rest is
zero, except the last, which carries a constant a > 0. Nothing but the embedding writes that one, and no layer that
matters reads it (its weight in their norms is 0). Over D dimensions the mean of squares is
(s^2 d mean(x^2) + a^2) / D, so
    s x / sqrt((s^2 d mean(x^2) + a^2) / D + eps) = x / sqrt(mean(x^2) + eps) / r
exactly when a^2 = eps (s^2 d - D). The norms' weights take the factor r, eps stays, and s is the smallest power of two
that makes a real.

**Heads.** Rotary frequencies are theta^(-2 i / e) for i < e / 2 in the small, theta^(-2 j / E) in the large model: with
the same theta they coincide at j = g i, as do the halves that are rotated together, (i, i + e / 2) and (j, j + E / 2).
Each dimension of a small query or key is copied to the g dimensions j = g i .. g i + g - 1 of its half, which leaves
the mean of squares, and so the norm, as it is. The query norm's weight is 0 at the copies, which drops them from the
scores, and has the factor sqrt(g) elsewhere, for the attention scale is 1 / sqrt(E) instead of 1 / sqrt(e).
A small KV head is copied as often as its query heads need places. Places left over in its group repeat query heads of
that group, their output unused, so that scores averaged over a group remain scores of the trained model.

**Padded vocabulary.** Logits of tokens that the small model does not have read the constant, a positive number, with a
large negative weight. Its weight in the last norm is tiny, so that nothing above float32 rounding is added to the
logits of the other tokens, whose rows hold noise there, or a where embeddings are tied.

**Layers and units.** Layers of the small model come first. Those behind it have output projections of zero, which makes
them exact identities. What does not reach a live output is random instead of zero (projections of dead heads, layers
and units, columns that meet zeros), so that it costs what trained weights cost.
"""

import math
import zlib

import torch
from inflated_shape import Shape, check_fit, kv_copies, qwen3_config, shape_of
from torch import Tensor
from transformers import PreTrainedModel

NOISE = 0.02
"""Standard deviation of the weights that do not matter, about that of trained ones."""

CONSTANT_GAIN = 2.0**-40
"""Weight of the constant dimension in the last norm."""

PADDED_WEIGHT = -(2.0**90)
"""Weight of the constant dimension in the logits of padded tokens: logits of about -1e12."""


class InflatedWeights:
    """Makes the weights of the large model, one tensor at a time.

    Args:
        small: the Qwen3 model to inflate.
        target: the shape of the large one.
        dtype, device: of the tensors that are made.
        seed: of the random weights; the function computed does not depend on it.

    Raises:
        InflateError: the target cannot hold the small model.
    """

    def __init__(
        self, small: PreTrainedModel, target: Shape, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> None:
        config = qwen3_config(small)
        self.source = shape_of(config)
        check_fit(self.source, target)
        self.target, self.dtype, self.device, self.seed = target, dtype, torch.device(device), seed
        self._small = {name: tensor.detach().to(device, torch.float64) for name, tensor in small.state_dict().items()}
        ratio = target.hidden / self.source.hidden
        self._norm_factor = ratio**-0.5
        self._scale = 2.0 ** (math.floor(math.log2(ratio) / 2) + 1)
        eps = config.rms_norm_eps
        self._constant = math.sqrt(eps * (self._scale**2 * self.source.hidden - target.hidden))

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """The parameter called `name`, which has shape `shape` in the large model."""
        parts = name.split(".")
        kind = parts[-2]
        dead = parts[1] == "layers" and int(parts[2]) >= self.source.layers
        if kind.endswith("norm"):
            weight = torch.ones(shape, dtype=self.dtype, device=self.device)
        elif kind in ("o_proj", "down_proj"):
            weight = torch.zeros(shape, dtype=self.dtype, device=self.device)
        else:
            weight = self._noise(name, shape)
        if not dead:
            getattr(self, f"_{kind}")(weight, self._small[name])
        return weight

    def _noise(self, name: str, shape: torch.Size) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()) ^ self.seed)
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0.0, NOISE, generator=generator)

    def _embed_tokens(self, weight: Tensor, small: Tensor) -> None:
        live = weight[: len(small)]
        live.zero_()
        live[:, : self.source.hidden] = (small * self._scale).to(live)
        live[:, -1] = self._constant
        if self.target.tied:
            weight[len(small) :, -1] = PADDED_WEIGHT

    def _lm_head(self, weight: Tensor, small: Tensor) -> None:
        weight[: len(small), : self.source.hidden] = small.to(weight)
        weight[len(small) :, -1] = PADDED_WEIGHT

    def _norm(self, weight: Tensor, small: Tensor) -> None:
        tied_scale = self._scale if self.target.tied else 1.0  # the tied output projection is the scaled embedding
        weight[: self.source.hidden] = (small * (self._norm_factor / tied_scale)).to(weight)
        weight[-1] = CONSTANT_GAIN

    def _input_layernorm(self, weight: Tensor, small: Tensor) -> None:
        weight[: self.source.hidden] = (small * self._norm_factor).to(weight)
        weight[-1] = 0.0

    _post_attention_layernorm = _input_layernorm

    def _gate_proj(self, weight: Tensor, small: Tensor) -> None:
        weight[: self.source.mlp, : self.source.hidden] = small.to(weight)

    _up_proj = _gate_proj

    def _down_proj(self, weight: Tensor, small: Tensor) -> None:
        weight[: self.source.hidden, : self.source.mlp] = (small * self._scale).to(weight)

    def _q_proj(self, weight: Tensor, small: Tensor) -> None:
        self._place_heads(weight, small, [head for group in self._query_groups() for head in group], spread=True)

    def _k_proj(self, weight: Tensor, small: Tensor) -> None:
        self._place_heads(weight, small, self._kv_sources(), spread=True)

    def _v_proj(self, weight: Tensor, small: Tensor) -> None:
        self._place_heads(weight, small, self._kv_sources(), spread=False)

    def _place_heads(self, weight: Tensor, small: Tensor, sources: list[int], spread: bool) -> None:
        """Head i of `weight` becomes head `sources[i]` of `small`, its dimensions spread as rotation demands."""
        heads = weight.view(-1, self.target.head_dim, weight.shape[1])
        small_heads = small.view(-1, self.source.head_dim, small.shape[1])
        for place, source in enumerate(sources):
            rows = small_heads[source][self._dimensions()] if spread else small_heads[source]
            heads[place, : len(rows), : self.source.hidden] = rows.to(weight)

    def _o_proj(self, weight: Tensor, small: Tensor) -> None:
        places = [head for group in self._query_groups() for head in group]
        for head in range(self.source.heads):
            start, small_start = places.index(head) * self.target.head_dim, head * self.source.head_dim
            block = small[:, small_start : small_start + self.source.head_dim] * self._scale
            weight[: self.source.hidden, start : start + self.source.head_dim] = block.to(weight)

    def _q_norm(self, weight: Tensor, small: Tensor) -> None:
        spacing = self.target.head_dim // self.source.head_dim
        weight.zero_()
        weight[::spacing] = (small * math.sqrt(spacing)).to(weight)

    def _k_norm(self, weight: Tensor, small: Tensor) -> None:
        weight.copy_(small[self._dimensions()])

    def _dimensions(self) -> Tensor:
        """For each dimension of a large head, the dimension of the small head that it copies."""
        spacing = self.target.head_dim // self.source.head_dim
        return torch.arange(self.target.head_dim, device=self.device) // spacing

    def _kv_sources(self) -> list[int]:
        """For each large KV head that is live, the small KV head that it copies."""
        copies = kv_copies(self.source, self.target)
        return [head for head in range(self.source.kv_heads) for _ in range(copies)]

    def _query_groups(self) -> list[list[int]]:
        """For each large KV head that is live, the small query heads that read it, one for each place."""
        group, places = (shape.heads // shape.kv_heads for shape in (self.source, self.target))
        copies = kv_copies(self.source, self.target)
        return [
            [kv_head * group + (copy * places + place) % group for place in range(places)]
            for kv_head in range(self.source.kv_heads)
            for copy in range(copies)
        ]
