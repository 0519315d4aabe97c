"""The decoder's forward pass for the torch backend, in fewer and larger pieces: on a GPU every kernel costs.

The weights are joined and the gains of the norms folded into them. Letters as in model/decoder.py, n = b * t.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.config import ModelConfig
from model.decoder import Decoder
from model.engine.kv_cache import RowsView

# Without a choice of ours torch may take cuDNN, which plans anew for every shape, or repeat the keys for each head.
MASKED_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class JoinedLayer:
    """One layer's matrices [out, in]. Heads of a group stand apart: h counts (head in the group, group)."""

    heads: Tensor  # queries, keys, values; then the same with each head's halves swapped and the second negated
    out: Tensor
    gate_up: Tensor
    down: Tensor


class JoinedDecoder:
    """The weights and the forward pass, over rows of a cache.

    The rotation x * cos + turned(x) * sin takes two kernels when `turned(x)` comes out of the same product as x. Values
    turn by nothing. The head stays in float32: rounded logits would tie.
    """

    def __init__(self, decoder: Decoder, n_ids: int, dtype: torch.dtype):
        config, self.dtype = decoder.config, dtype
        self.eps, self.head_dim = config.rms_norm_eps, config.head_dim
        self.n_groups, self.n_heads = config.num_key_value_heads, config.num_attention_heads
        weights = {name: weight.detach().float() for name, weight in decoder.state_dict().items()}
        self.embed_vd = weights["model.embed_tokens.weight"].to(dtype)
        self.head_vd = (weights["lm_head.weight"] * weights["model.norm.weight"])[:n_ids].contiguous()
        self.layers = [self._join(config, weights, f"model.layers.{i}") for i in range(config.num_hidden_layers)]
        self.rotation_p2hk = self._rotation(decoder)

    def _join(self, config: ModelConfig, weights: dict[str, Tensor], layer: str) -> JoinedLayer:
        k, g, d = self.head_dim, self.n_groups, config.hidden_size

        def take(name: str) -> Tensor:
            return weights[f"{layer}.{name}.weight"]

        q_hkd = take("self_attn.q_proj").view(g, -1, k, d).transpose(0, 1).reshape(-1, k, d)
        kv = [take(f"self_attn.{name}_proj").view(g, k, d) for name in "kv"]
        heads_hkd = torch.cat([q_hkd, *kv])
        first, second = heads_hkd.chunk(2, dim=1)
        heads_2hkd = torch.stack([heads_hkd, torch.cat([-second, first], dim=1)])
        out = take("self_attn.o_proj").view(d, g, -1, k).transpose(1, 2).reshape(d, -1)
        gate_up = torch.cat([take("mlp.gate_proj"), take("mlp.up_proj")])
        return JoinedLayer(
            heads=(heads_2hkd.view(-1, d) * take("input_layernorm")).to(self.dtype),
            out=out.to(self.dtype),
            gate_up=(gate_up * take("post_attention_layernorm")).to(self.dtype),
            down=take("mlp.down_proj").to(self.dtype),
        )

    def _rotation(self, decoder: Decoder) -> Tensor:
        """Cosines and sines for all heads at every position, the scratch one included; float32."""
        positions = decoder.model.positions
        n, n_turned = len(positions.cos_sk), self.n_heads + self.n_groups
        rotation_p2hk = positions.cos_sk.new_zeros(n + 1, 2, n_turned + self.n_groups, self.head_dim)
        rotation_p2hk[:, 0] = 1
        rotation_p2hk[:n, 0, :n_turned] = positions.cos_sk.unsqueeze(1)
        rotation_p2hk[:n, 1, :n_turned] = positions.sin_sk.unsqueeze(1)
        return rotation_p2hk

    def hidden(self, tokens_bt: Tensor, view: RowsView) -> Tensor:
        """What the last layer leaves for each token, [b, t, d]."""
        b, t = tokens_bt.shape
        n_turns = self.n_heads // self.n_groups
        x_nd = F.embedding(tokens_bt.flatten(), self.embed_vd)
        cos_bthk, sin_bthk = self.rotation_p2hk[view.positions_bt].unbind(2)
        # A group's heads take turns along time (u = t * turns): attention kernels that take a mask know no groups.
        mask_b1us = view.mask_b1ts.unsqueeze(3).expand(-1, -1, -1, n_turns, -1).reshape(b, 1, t * n_turns, -1)
        with sdpa_kernel(MASKED_ATTENTION) if x_nd.is_cuda else contextlib.nullcontext():
            for layer, weights in enumerate(self.layers):
                both_bt2hk = F.linear(self._normed(x_nd), weights.heads).view(b, t, 2, -1, self.head_dim)
                plain_bthk, turned_bthk = both_bt2hk.unbind(2)
                heads_bthk = x_nd.new_empty(plain_bthk.shape)
                torch.addcmul(plain_bthk * cos_bthk, turned_bthk, sin_bthk, out=heads_bthk)
                q_bthk, kv_btck = heads_bthk.tensor_split([self.n_heads], dim=2)
                q_bguk = q_bthk.reshape(b, t * n_turns, self.n_groups, -1).transpose(1, 2)
                k_bgsk, v_bgsk = view.extend(layer, kv_btck.transpose(1, 2))
                y_bguk = F.scaled_dot_product_attention(q_bguk, k_bgsk, v_bgsk, attn_mask=mask_b1us)
                x_nd.addmm_(y_bguk.transpose(1, 2).reshape(b * t, -1), weights.out.t())
                gate_nf, up_nf = F.linear(self._normed(x_nd), weights.gate_up).chunk(2, dim=-1)
                x_nd.addmm_(F.silu(gate_nf).mul_(up_nf), weights.down.t())
        return x_nd.view(b, t, -1)

    def _normed(self, x_nd: Tensor) -> Tensor:
        """RMSNorm less its gain; computed in float32 whatever x is."""
        return F.rms_norm(x_nd, x_nd.shape[1:], eps=self.eps)

    def logits(self, x_nd: Tensor) -> Tensor:
        """Float32 logits [n, v] of the tokens that stand for text."""
        return F.linear(self._normed(x_nd.float()), self.head_vd)
