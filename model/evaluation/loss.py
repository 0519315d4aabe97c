"""How well a decoder predicts text: bits per byte, which compares models whatever their tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from model.decoder import Decoder
from model.errors import InputError
from model.tokenizer import Tokenizer


@torch.inference_mode()
def bits_per_byte(
    decoder: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    tokens_per_pass: int = 8192,
    progress: Callable[[int, int], None] | None = None,
    logits: Callable[[list[int]], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Summed negative log-likelihood of every story's tokens and its end token, over the UTF-8 bytes of the raw text.

    Each story is scored alone from the begin token. Beyond the context, windows advance by half of it, so every token
    is predicted from at least half a context.

    Args:
        logits: another engine's logits [t, v] after each token of a text, to score instead of the decoder's own.

    Returns:
        bits_per_byte, perplexity (per token), bytes, tokens, stories.

    Raises:
        InputError: there is no text.
    """
    n_bytes = sum(len(text.encode()) for text in texts)
    if not n_bytes:
        raise InputError("There is no text to evaluate on.")
    context = decoder.config.max_position_embeddings
    device = decoder.lm_head.weight.device
    windows: list[tuple[list[int], int]] = []  # tokens, and how many of its predictions an earlier window made
    for text in texts:
        tokens = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        done = 0
        while done < len(tokens) - 1:
            start = 0 if done == 0 else done - context // 2
            window = tokens[start : start + context + 1]
            windows.append((window, done - start))
            done = start + len(window) - 1
    windows.sort(key=lambda window: -len(window[0]))  # longest first, so the first of a pass tells its size
    nats, n_tokens, n_done = 0.0, 0, 0
    while n_done < len(windows):
        size = max(1, tokens_per_pass // len(windows[n_done][0]))
        batch = windows[n_done : n_done + size]
        length = max(len(tokens) for tokens, _ in batch) - 1
        inputs_bt = torch.zeros(len(batch), length, dtype=torch.long)
        targets_bt = torch.full((len(batch), length), -100)
        for i, (window, skip) in enumerate(batch):
            inputs_bt[i, : len(window) - 1] = torch.tensor(window[:-1])
            targets_bt[i, skip : len(window) - 1] = torch.tensor(window[skip + 1 :])
        if logits:
            logits_btv = torch.stack([torch.from_numpy(logits(tokens)) for tokens in inputs_bt.tolist()])
        else:
            logits_btv = decoder(inputs_bt.to(device)).float()
        losses = F.cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten().to(logits_btv.device), reduction="sum")
        nats += losses.item()
        n_tokens += int((targets_bt >= 0).sum())
        n_done += len(batch)
        if progress:
            progress(n_done, len(windows))
    return {
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "perplexity": math.exp(nats / n_tokens),
        "bytes": n_bytes,
        "tokens": n_tokens,
        "stories": len(texts),
    }


def decoder_logits(decoder: Decoder) -> Callable[[list[int]], np.ndarray]:
    """The decoder as a function from tokens to logits [t, v] after each, in float32."""

    @torch.inference_mode()
    def logits(tokens: list[int]) -> np.ndarray:
        tokens_bt = torch.tensor([tokens], device=decoder.lm_head.weight.device)
        return decoder(tokens_bt)[0].float().cpu().numpy()

    return logits
