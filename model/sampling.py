"""From logits to the next token with torch: pure functions with per-row settings and noise (see engine/request.py).

Shapes: b row, v vocabulary. `draw` is a fixed row of kernels without a look at any value, so that a CUDA graph can hold
it. Every filter keeps a prefix of the tokens, likeliest first: what is kept comes down to the rank of the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 1e-300  # of a min-p that is off: what has no probability at all is never kept


class Settings(NamedTuple):
    """What `draw` asks of each row, [b] each and one kind: no value means "off" (see `settle`)."""

    temperature_b: Tensor  # above 0
    last_b: Tensor  # rank of the last token that top-k keeps; whole, below v
    top_p_b: Tensor  # above 1 keeps everything
    min_p_b: Tensor  # above 0


Column = Sequence[float] | Tensor


def _column(values: Column, device: torch.device | None) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device=device)


def settle(
    temperature: Column,
    top_k: Column,
    top_p: Column,
    min_p: Column,
    n_tokens: int,
    device: torch.device | None = None,
) -> Settings:
    """Settings as SamplingParams has them, where temperature 0 is greedy and top_k 0 is off, as `draw` takes them."""
    temperature_b, top_k_b, top_p_b = (_column(values, device) for values in (temperature, top_k, top_p))
    last_b = torch.where(top_k_b == 0, n_tokens, top_k_b.clamp(max=n_tokens)).long() - 1
    return Settings(
        temperature_b=torch.where(temperature_b == 0, 1.0, temperature_b),
        last_b=torch.where(temperature_b == 0, 0, last_b),
        top_p_b=torch.where(top_p_b >= 1, 2.0, top_p_b),
        min_p_b=_column(min_p, device).clamp(min=LEAST),
    )


def penalise_repetition(logits_bv: Tensor, seen_bv: Tensor, penalty_b: Tensor) -> Tensor:
    """Make tokens that occurred before less likely (Keskar et al. 2019, CTRL, section 4.1); 1 changes nothing."""
    penalty_b1 = penalty_b.unsqueeze(1)
    penalised_bv = torch.where(logits_bv > 0, logits_bv / penalty_b1, logits_bv * penalty_b1)
    return torch.where(seen_bv, penalised_bv, logits_bv)


class Ranking(NamedTuple):
    """Each row's tokens, likeliest first (of equals the lower id), and how far down they are kept."""

    ids_bv: Tensor
    probabilities_bv: Tensor  # float64, before any filter
    cumulative_bv: Tensor
    last_b1: Tensor  # rank of the last token kept; the likeliest always is


def rank(logits_bv: Tensor, settings: Settings) -> Ranking:
    """Order the tokens and filter: temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024)."""
    temperature_b1, last_b1, top_p_b1, min_p_b1 = (column_b.unsqueeze(1) for column_b in settings)
    sorted_bv, ids_bv = torch.sort(logits_bv, dim=-1, descending=True, stable=True)
    probabilities_bv = torch.softmax(sorted_bv / temperature_b1, dim=-1, dtype=torch.float64)
    cumulative_bv = probabilities_bv.cumsum(-1)
    # Kept by top-p: tokens with less than p of what top-k leaves before them.
    mass_b1 = top_p_b1 * cumulative_bv.gather(1, last_b1)
    last_b1 = torch.minimum(last_b1, torch.searchsorted(cumulative_bv, mass_b1))
    least_b1 = min_p_b1 * probabilities_bv[:, :1]
    last_b1 = torch.minimum(last_b1, (probabilities_bv[:, 1:] >= least_b1).sum(-1, keepdim=True))
    return Ranking(ids_bv, probabilities_bv, cumulative_bv, last_b1)


def next_token_probabilities(
    logits_bv: Tensor, temperature: Column, top_k: Column, top_p: Column, min_p: Column
) -> tuple[Tensor, Tensor]:
    """The distribution each row is sampled from, most likely token first.

    Filters apply in the order temperature, top-k, top-p, min-p; the most likely token always stays. A temperature of 0
    leaves it alone. top_k 0, top_p 1 and min_p 0 keep everything.

    Returns:
        probabilities [b, v], descending, 0 where filtered out, summing to 1; and their token ids [b, v].
    """
    settings = settle(temperature, top_k, top_p, min_p, logits_bv.shape[1], logits_bv.device)
    ids_bv, probabilities_bv, cumulative_bv, last_b1 = rank(logits_bv, settings)
    rank_v = torch.arange(logits_bv.shape[1], device=logits_bv.device)
    kept_bv = torch.where(rank_v <= last_b1, probabilities_bv, 0.0)
    return kept_bv / cumulative_bv.gather(1, last_b1), ids_bv


def draw(logits_bv: Tensor, settings: Settings, noise_b: Tensor) -> Tensor:
    """Sample each row by inverting its cumulative distribution at the row's noise, in [0, 1); returns ids [b]."""
    ids_bv, _, cumulative_bv, last_b1 = rank(logits_bv, settings)
    target_b1 = noise_b.unsqueeze(1) * cumulative_bv.gather(1, last_b1)
    # Rounding may put the target at the very end; and what is no number must not become an index.
    rank_b1 = torch.minimum(torch.searchsorted(cumulative_bv, target_b1, right=True), last_b1)
    return ids_bv.gather(1, rank_b1).squeeze(1)


def sample(
    logits_bv: Tensor,
    seen_bv: Tensor,
    *,
    temperature: Column,
    top_k: Column,
    top_p: Column,
    min_p: Column,
    repetition_penalty: Column,
    noise: Column,
) -> Tensor:
    """Pick the next token of every row with that row's settings (as SamplingParams has them) and noise; ids [b].

    `seen_bv` marks the tokens that stand in the row already (for the repetition penalty).
    """
    penalty_b, noise_b = _column(repetition_penalty, logits_bv.device), _column(noise, logits_bv.device)
    settings = settle(temperature, top_k, top_p, min_p, logits_bv.shape[1], logits_bv.device)
    return draw(penalise_repetition(logits_bv.double(), seen_bv, penalty_b), settings, noise_b)
