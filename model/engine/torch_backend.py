"""Runs the decoder for the engine with torch: the GPU path, and the reference for the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoder import Decoder
from model.engine.kv_cache import KVCache
from model.engine.request import Request
from model.sampling import sample


class TorchBackend:
    """Cache and forward passes for `n_slots` stories at once."""

    def __init__(self, decoder: Decoder, n_slots: int, n_ids: int | None = None):
        self.decoder = decoder.eval()
        self.device = decoder.lm_head.weight.device
        self.context = decoder.config.max_position_embeddings
        self.cache = KVCache(decoder.config, n_slots, self.device)
        self._n_ids = n_ids or decoder.config.vocab_size  # tokens that stand for text; some models are padded
        # For the repetition penalty: which tokens stand in each slot's story.
        self._seen_bv = torch.zeros(n_slots, self._n_ids, dtype=torch.bool, device=self.device)

    @torch.inference_mode()
    def prefill(self, request: Request, tokens: Sequence[int], start: int) -> Tensor:
        """Read `tokens` into the request's slot from position `start`; returns logits [1, v] after the last."""
        assert request.slot is not None
        if start == 0:
            self._seen_bv[request.slot] = False
        tokens_bt = torch.tensor([tokens], device=self.device)
        self._seen_bv[request.slot, tokens_bt[0]] = True
        return self.decoder.next_logits(tokens_bt, self.cache.view([request.slot], [start], len(tokens)))

    @torch.inference_mode()
    def decode(self, requests: Sequence[Request]) -> Tensor:
        """One step for stories that lack only their newest token in the cache; returns logits [b, v]."""
        slots = [request.slot for request in requests if request.slot is not None]
        tokens_bt = torch.tensor([[request.generated[-1]] for request in requests], device=self.device)
        self._seen_bv[slots, tokens_bt[:, 0]] = True
        return self.decoder.next_logits(tokens_bt, self.cache.view(slots, [r.n_cached for r in requests], 1))

    @torch.inference_mode()
    def sample(self, requests: Sequence[Request], logits_bv: Tensor) -> list[int]:
        """The next token of each request, by its own settings and noise."""
        params = [request.params for request in requests]
        slots = [request.slot for request in requests if request.slot is not None]
        ids_b = sample(
            logits_bv[:, : self._n_ids],
            self._seen_bv[slots],
            temperature=[p.temperature for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            repetition_penalty=[p.repetition_penalty for p in params],
            noise=[request.noise for request in requests],
        )
        return ids_b.tolist()
