"""A static KV cache: one row per slot, filled to a position of its own. Letters as in model/decoder.py, and c for the
keys' heads followed by the values' heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Keys and values of every layer for `n_slots` stories, allocated once: [layer, b, c, s, k].

    Behind the context every row has one position more, `scratch`: what is written there nobody ever reads. A row that
    takes no part in a step, and the padding behind a short prompt, stand there.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_slots: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        context, n_kv_heads = config.max_position_embeddings, config.num_key_value_heads
        self.scratch = context
        self.rows_lbcsk = torch.zeros(
            (config.num_hidden_layers, n_slots, 2 * n_kv_heads, context + 1, config.head_dim),
            device=device,
            dtype=dtype,
        )
        self.keys, self.values = self.rows_lbcsk.chunk(2, dim=2)
        self.row_numbers = torch.arange(n_slots, device=device)
        # What a token at position p may look at, as a term of its scores: one look-up a step makes the mask.
        self.mask_ps = torch.full((context + 1, context), -torch.inf, device=device).triu(1).to(dtype)

    def view(self, slots: list[int], starts: list[int], n_new: int) -> RowsView:
        """A view for one forward pass: `n_new` tokens each for the given slots, from the given start positions."""
        device = self.rows_lbcsk.device
        positions_bt = torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(n_new, device=device)
        return RowsView(self, torch.tensor(slots, device=device), positions_bt, max(starts) + n_new)


class RowsView:
    """Some rows of the cache, for one forward pass (the decoder's CacheView)."""

    def __init__(self, cache: KVCache, rows: slice | Tensor, positions_bt: Tensor, n_filled: int):
        """
        Args:
            rows: which; a slice is read in place, numbers [b] are gathered.
            positions_bt: where each new token stands in its row.
            n_filled: attention reads positions [0, n_filled); no row that matters is filled further.
        """
        self.positions_bt = positions_bt
        self.mask_b1ts = cache.mask_ps[:, :n_filled][positions_bt].unsqueeze(1)
        self._rows_lbcsk, self._rows, self._n_filled = cache.rows_lbcsk, rows, n_filled
        self._rows_b1 = (cache.row_numbers[rows] if isinstance(rows, slice) else rows).unsqueeze(1)

    def extend(self, layer: int, new_bctk: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values at their rows' positions; return all filled ones, [b, g, s, k] each."""
        rows_bcsk = self._rows_lbcsk[layer]
        # Advanced indices around a slice put their axes first: [b, t, c, k].
        rows_bcsk[self._rows_b1, :, self.positions_bt] = new_bctk.transpose(1, 2)
        keys_bgsk, values_bgsk = rows_bcsk[self._rows, :, : self._n_filled].chunk(2, dim=1)
        return keys_bgsk, values_bgsk
