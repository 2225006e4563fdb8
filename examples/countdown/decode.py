"""Samples many texts at once, fast: one static KV cache, every row at the same position, one CUDA graph a stretch.

transformers' `generate` gives the same texts in distribution (and the same text where nothing is drawn, which a test
holds); for hundreds of texts of up to 16k tokens it would take too long.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, apply_rotary_pos_emb

STRETCH = 1024
"""The cache grows, and finished rows are dropped, after this many tokens."""
_LOOK_EVERY = 64


class _Decoder:
    """The rows still running, and everything that one step of them reads and writes."""

    def __init__(self, model: Qwen3ForCausalLM, prompts: list[list[int]], limit: int, temperature: float) -> None:
        config, self.model, self.temperature = model.config, model, temperature
        device = model.device
        self.tokens = torch.zeros(len(prompts), limit, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
        self.prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        positions = torch.arange(limit, device=device)[None]
        self.cos, self.sin = model.model.rotary_emb(model.lm_head.weight, positions)
        attention = model.model.layers[0].self_attn
        kv_heads = attention.k_proj.out_features // attention.head_dim
        shape = (config.num_hidden_layers, 2, len(prompts), kv_heads, 0, attention.head_dim)
        self.cache = torch.zeros(shape, dtype=model.dtype, device=device)

    def keep(self, rows: torch.Tensor, length: int) -> None:
        """Goes on with some of the rows and with room for `length` tokens."""
        self.tokens, self.prompt_lengths = self.tokens[rows], self.prompt_lengths[rows]
        self.finished = self.finished[rows]
        old = self.cache[:, :, rows]
        self.cache = old.new_zeros((*old.shape[:4], length, old.shape[5]))
        self.cache[:, :, :, :, : old.shape[4]] = old

    def step(self) -> None:
        """Reads the token at `position` of every row and writes the next one, unless the prompt has one there."""
        logits = self._logits().float()
        if self.temperature > 0:
            race = torch.softmax(logits / self.temperature, dim=-1) / torch.empty_like(logits).exponential_()
        else:
            race = logits
        after = self.position + 1
        given = self.tokens.index_select(1, after)[:, 0]
        new = torch.where(after < self.prompt_lengths, given, race.argmax(-1))
        self.tokens.index_copy_(1, after, new[:, None])
        self.finished |= new == self.model.config.eos_token_id
        self.position += 1

    def _logits(self) -> torch.Tensor:
        body = self.model.model
        hidden = body.embed_tokens(self.tokens.index_select(1, self.position))
        rotary = self.cos.index_select(1, self.position), self.sin.index_select(1, self.position)
        ahead = torch.arange(self.cache.shape[4], device=hidden.device) > self.position
        mask = torch.zeros_like(ahead, dtype=hidden.dtype).masked_fill(ahead, -torch.inf)[None, None, None]
        for layer, cache in zip(body.layers, self.cache, strict=True):
            hidden = hidden + self._attend(layer.self_attn, layer.input_layernorm(hidden), cache, rotary, mask)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(body.norm(hidden))[:, 0]

    def _attend(
        self,
        attention: Qwen3Attention,
        hidden: torch.Tensor,
        cache: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """One token a row against the cache: hidden [R, 1, hidden], cache [2, R, Hkv, length, D]."""
        keys, values = cache
        rows, kv_heads, _, size = keys.shape
        query = attention.q_norm(attention.q_proj(hidden).view(rows, 1, -1, size)).transpose(1, 2)
        key = attention.k_norm(attention.k_proj(hidden).view(rows, 1, -1, size)).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        keys.index_copy_(2, self.position, key)
        values.index_copy_(2, self.position, attention.v_proj(hidden).view(rows, kv_heads, 1, size))
        # The query heads that share a KV head pose as queries of it, so that its keys are read once for all of them.
        grouped = query.reshape(rows, kv_heads, -1, size)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=attention.scaling)
        return attention.o_proj(out.reshape(rows, 1, -1))


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph on its decoder's present tensors; the decoder is left one step further."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.inference_mode()
def sample(
    model: Qwen3ForCausalLM, prompts: list[list[int]], limit: int, temperature: float, seed: int
) -> list[list[int]]:
    """Continues every prompt until it ends or has `limit` tokens.

    Args:
        model: as `Qwen3ForCausalLM.from_pretrained` gives it, on the device that is to do the work.
        temperature: 0 takes the likeliest token.

    Returns:
        Prompt and continuation of each, up to and with the end token if it was reached.
    """
    torch.manual_seed(seed)
    decoder = _Decoder(model, prompts, limit, temperature)
    texts: list[list[int]] = [[] for _ in prompts]
    running = torch.arange(len(prompts))
    position = 0
    bar = tqdm(total=limit - 1, unit="step", mininterval=5)
    while len(running) and position < limit - 1:
        end = min(limit - 1, position + STRETCH)
        bar.set_postfix(running=len(running))
        bar.update(position - bar.n)
        decoder.keep((~decoder.finished).nonzero()[:, 0], position + STRETCH)
        step = decoder.step
        if model.device.type == "cuda":
            step, position = _captured(step), position + 1
        while position < end and not (position % _LOOK_EVERY == 0 and bool(decoder.finished.all())):
            step()
            position += 1
        over = decoder.finished.cpu() | (position == limit - 1)
        for row, text in zip(running[over].tolist(), decoder.tokens[over.to(model.device)].tolist(), strict=True):
            texts[row] = text
        running = running[~over]
    bar.close()
    end_token = model.config.eos_token_id
    return [text[: text.index(end_token) + 1] if end_token in text else text for text in texts]
