"""A static KV cache: one row per slot, filled to a position of its own. Letters as in model/decoder.py."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Keys and values of every layer for `n_slots` stories, allocated once: two tensors [layer, b, g, s, k]."""

    def __init__(self, config: ModelConfig, n_slots: int, device: str | torch.device = "cpu"):
        shape = (
            config.num_hidden_layers,
            n_slots,
            config.num_key_value_heads,
            config.max_position_embeddings,
            config.head_dim,
        )
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)

    def view(self, slots: list[int], starts: list[int], n_new: int) -> RowsView:
        """A view for one forward pass: `n_new` tokens each for the given slots, from the given start positions."""
        return RowsView(self, slots, starts, n_new)


class RowsView:
    """Some rows of the cache, for one forward pass (the decoder's CacheView).

    Attention reads only up to the longest of these rows; shorter ones are masked.
    """

    def __init__(self, cache: KVCache, slots: list[int], starts: list[int], n_new: int):
        device = cache.keys.device
        self._cache = cache
        self._slots_b = torch.tensor(slots, device=device)
        self.positions_bt = torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(n_new, device=device)
        self._n_filled = max(starts) + n_new
        # One row, the common case, is read in place; several are gathered.
        self._rows = slice(slots[0], slots[0] + 1) if len(slots) == 1 else self._slots_b
        all_equal = len(set(starts)) == 1
        if all_equal and n_new == 1:
            self.mask_b1ts = None
        else:
            position_s = torch.arange(self._n_filled, device=device)
            self.mask_b1ts = (position_s <= self.positions_bt.unsqueeze(-1)).unsqueeze(1)

    def extend(self, layer: int, k_bgtk: Tensor, v_bgtk: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values at their rows' positions; return all filled ones, [b, g, s, k] each."""
        keys_bgsk, values_bgsk = self._cache.keys[layer], self._cache.values[layer]
        # Advanced indices around a slice put their axes first: [b, t, g, k].
        keys_bgsk[self._slots_b[:, None], :, self.positions_bt] = k_bgtk.transpose(1, 2)
        values_bgsk[self._slots_b[:, None], :, self.positions_bt] = v_bgtk.transpose(1, 2)
        return keys_bgsk[self._rows, :, : self._n_filled], values_bgsk[self._rows, :, : self._n_filled]
