"""The decoder: a Llama-style transformer, top to bottom. The only nn.Modules of the project.

Shapes live in names: b row, t query time, s key time, d width, h heads, g key/value heads, k head size, f MLP width,
v vocabulary. Parameter names are those of `transformers.LlamaForCausalLM`, so checkpoints pass both ways unchanged.
Knows nothing of tokens' meaning, sampling or training.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


class CacheView(Protocol):
    """What attention needs of a KV cache for one forward pass over some of its rows (see engine/kv_cache.py)."""

    positions_bt: Tensor  # where each new token stands in its row
    mask_b1ts: Tensor  # added to the scores: 0 where a query may look, -inf elsewhere

    def extend(self, layer: int, new_bctk: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys, followed along the heads by the new values; return all filled ones, [b, g, s, k] each."""


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_btd: Tensor) -> Tensor:
        return F.rms_norm(x_btd.float(), self.weight.shape, self.weight.float(), self.eps).to(x_btd.dtype)


class RotaryPositions(nn.Module):
    """Rotary position embedding (Su et al. 2021) in Llama's half-split layout: dimension i turns with i + k/2."""

    cos_sk: Tensor
    sin_sk: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        k = config.head_dim
        inverse_frequency = config.rope_theta ** (-torch.arange(0, k, 2, dtype=torch.float64) / k)
        angles_sk = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float64), inverse_frequency)
        angles_sk = torch.cat([angles_sk, angles_sk], dim=-1)
        self.register_buffer("cos_sk", angles_sk.cos().float(), persistent=False)
        self.register_buffer("sin_sk", angles_sk.sin().float(), persistent=False)

    def forward(self, positions_bt: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the positions, [b, 1, t, k] each."""
        return self.cos_sk[positions_bt].unsqueeze(1), self.sin_sk[positions_bt].unsqueeze(1)


def rotate(x_bhtk: Tensor, cos_b1tk: Tensor, sin_b1tk: Tensor) -> Tensor:
    """Turn each query or key by its position."""
    first, second = x_bhtk.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_bhtk * cos_b1tk + turned * sin_b1tk).to(x_bhtk.dtype)


class SoftmaxAttention(nn.Module):
    """Causal scaled dot-product attention; with fewer key/value heads than heads it is grouped-query attention."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        d, k = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, k
        self.q_proj = nn.Linear(d, config.num_attention_heads * k, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * k, bias=False)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * k, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * k, d, bias=False)

    def forward(self, x_btd: Tensor, rotation: tuple[Tensor, Tensor], cache: CacheView | None) -> Tensor:
        b, t, _ = x_btd.shape
        q_bhtk = rotate(self.q_proj(x_btd).view(b, t, -1, self.head_dim).transpose(1, 2), *rotation)
        k_bgtk = rotate(self.k_proj(x_btd).view(b, t, -1, self.head_dim).transpose(1, 2), *rotation)
        v_bgtk = self.v_proj(x_btd).view(b, t, -1, self.head_dim).transpose(1, 2)
        grouped = q_bhtk.shape[1] != k_bgtk.shape[1]
        if cache is None:
            y_bhtk = F.scaled_dot_product_attention(q_bhtk, k_bgtk, v_bgtk, is_causal=True, enable_gqa=grouped)
        else:
            k_bgsk, v_bgsk = cache.extend(self.layer, torch.cat([k_bgtk, v_bgtk], dim=1))
            y_bhtk = F.scaled_dot_product_attention(
                q_bhtk, k_bgsk, v_bgsk, attn_mask=cache.mask_b1ts, enable_gqa=grouped
            )
        return self.o_proj(y_bhtk.transpose(1, 2).reshape(b, t, -1))


class SwiGLU(nn.Module):
    """Gated MLP with SiLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_btd)) * self.up_proj(x_btd))


# What the choice fields of ModelConfig stand for (config.DECODER_CHOICES lists the same names without torch).
NORMS = {"rmsnorm": RMSNorm}
POSITIONS = {"rope": RotaryPositions}
MLPS = {"swiglu": SwiGLU}
ATTENTIONS = {"softmax": SoftmaxAttention}


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        norm = NORMS[config.norm]
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ATTENTIONS[config.attention](config, layer)
        self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLPS[config.mlp](config)
        self.dropout: float = 0.0  # of what is added to x, while training (Srivastava et al. 2014); set by who trains

    def forward(self, x_btd: Tensor, rotation: tuple[Tensor, Tensor], cache: CacheView | None) -> Tensor:
        y_btd = self.self_attn(self.input_layernorm(x_btd), rotation, cache)
        x_btd = x_btd + F.dropout(y_btd, self.dropout, self.training)
        y_btd = self.mlp(self.post_attention_layernorm(x_btd))
        return x_btd + F.dropout(y_btd, self.dropout, self.training)


class Trunk(nn.Module):
    """Everything below the head: token embeddings, layers, final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm](config.hidden_size, config.rms_norm_eps)
        self.positions = POSITIONS[config.position](config)

    def forward(self, tokens_bt: Tensor, cache: CacheView | None = None) -> Tensor:
        if cache is None:
            positions_bt = torch.arange(tokens_bt.shape[1], device=tokens_bt.device).unsqueeze(0)
        else:
            positions_bt = cache.positions_bt
        rotation = self.positions(positions_bt)
        x_btd = self.embed_tokens(tokens_bt)
        for layer in self.layers:
            x_btd = layer(x_btd, rotation, cache)
        return self.norm(x_btd)


class Decoder(nn.Module):
    """The language model: tokens in, next-token logits out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._initialise()

    def _initialise(self) -> None:
        """Normal(0, 0.02), with the layers' output projections scaled down by depth (GPT-2's scheme)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * self.config.num_hidden_layers) ** -0.5 if deep else 1.0
            nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, tokens_bt: Tensor, cache: CacheView | None = None) -> Tensor:
        """Logits [b, t, v] for the token after each of `tokens_bt`.

        Without a cache every row starts at position 0 and attends causally; with one, the cache says where each token
        stands, keeps its keys and values, and masks.
        """
        return self.lm_head(self.model(tokens_bt, cache))
