"""From logits to the next token with torch: pure functions with per-row settings and noise (see engine/request.py).

Shapes: b row, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def penalise_repetition(logits_bv: Tensor, seen_bv: Tensor, penalty_b: Tensor) -> Tensor:
    """Make tokens that occurred before less likely (Keskar et al. 2019, CTRL, section 4.1); 1 changes nothing."""
    penalty_b1 = penalty_b.unsqueeze(1)
    penalised_bv = torch.where(logits_bv > 0, logits_bv / penalty_b1, logits_bv * penalty_b1)
    return torch.where(seen_bv, penalised_bv, logits_bv)


def next_token_probabilities(
    logits_bv: Tensor, temperature_b: Tensor, top_k_b: Tensor, top_p_b: Tensor, min_p_b: Tensor
) -> tuple[Tensor, Tensor]:
    """The distribution each row is sampled from, most likely token first.

    Filters apply in the order temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024); the most
    likely token always stays. A temperature of 0 leaves it alone. top_k 0, top_p 1 and min_p 0 keep everything.

    Returns:
        probabilities [b, v], descending, 0 where filtered out, summing to 1; and their token ids [b, v].
    """
    greedy_b1 = (temperature_b == 0).unsqueeze(1)
    warm_b1 = torch.where(temperature_b == 0, 1.0, temperature_b).unsqueeze(1)
    sorted_bv, ids_bv = torch.sort(logits_bv.double(), dim=-1, descending=True, stable=True)
    probabilities_bv = torch.softmax(sorted_bv / warm_b1, dim=-1)
    rank_v = torch.arange(logits_bv.shape[1], device=logits_bv.device)
    keep_bv = (rank_v < top_k_b.unsqueeze(1)) | (top_k_b == 0).unsqueeze(1)
    probabilities_bv = torch.where(keep_bv, probabilities_bv, 0.0)
    probabilities_bv = probabilities_bv / probabilities_bv.sum(-1, keepdim=True)
    mass_before_bv = probabilities_bv.cumsum(-1) - probabilities_bv
    keep_bv = (mass_before_bv < top_p_b.unsqueeze(1)) | (top_p_b >= 1).unsqueeze(1)
    keep_bv &= probabilities_bv >= min_p_b.unsqueeze(1) * probabilities_bv[:, :1]
    keep_bv = torch.where(greedy_b1, rank_v == 0, keep_bv | (rank_v == 0))
    probabilities_bv = torch.where(keep_bv, probabilities_bv, 0.0)
    return probabilities_bv / probabilities_bv.sum(-1, keepdim=True), ids_bv


def pick(probabilities_bv: Tensor, ids_bv: Tensor, noise_b: Tensor) -> Tensor:
    """Sample each row by inverting its cumulative distribution at the row's noise; returns token ids [b]."""
    cumulative_bv = probabilities_bv.cumsum(-1)
    n_below_b = (cumulative_bv <= noise_b.unsqueeze(1)).sum(-1)
    # Rounding may leave the total just under 1; and what is no number must not become an index.
    last_b = ((probabilities_bv > 0).sum(-1) - 1).clamp(min=0)
    return ids_bv.gather(1, torch.minimum(n_below_b, last_b).unsqueeze(1)).squeeze(1)


def sample(
    logits_bv: Tensor,
    seen_bv: Tensor,
    *,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    repetition_penalty: Sequence[float],
    noise: Sequence[float],
) -> Tensor:
    """Pick the next token of every row with that row's settings and noise; returns ids [b].

    `seen_bv` marks the tokens that stand in the row already (for the repetition penalty).
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_bv.device)

    logits_bv = penalise_repetition(logits_bv.double(), seen_bv, column(repetition_penalty))
    probabilities_bv, ids_bv = next_token_probabilities(
        logits_bv, column(temperature), column(top_k), column(top_p), column(min_p)
    )
    return pick(probabilities_bv, ids_bv, column(noise))
