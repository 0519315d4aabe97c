"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen matrix W is given a low-rank addition, W + (alpha / rank) B A."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.decoder import Decoder


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable addition; at first the addition is zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / max(1, rank)
        a = torch.randn(rank, base.in_features, generator=generator) / max(1, base.in_features) ** 0.5
        self.lora_a = nn.Parameter(a.to(base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.base(x_btd) + self.scale * F.linear(F.linear(x_btd, self.lora_a), self.lora_b)


def _linears(decoder: Decoder) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Each layer's linear maps: full name, the module that holds it, its name there, itself."""
    for name, module in list(decoder.model.layers.named_modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, LoraLinear) or (isinstance(child, nn.Linear) and not isinstance(module, LoraLinear)):
                yield f"model.layers.{name}.{child_name}", module, child_name, child


def add_lora(decoder: Decoder, rank: int, alpha: float, targets: Sequence[str], seed: int = 1) -> None:
    """Freeze the decoder, in place, and give the layers' matrices named in `targets` a trainable addition."""
    decoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for _, holder, name, linear in _linears(decoder):
        if name in targets and isinstance(linear, nn.Linear):
            setattr(holder, name, LoraLinear(linear, rank, alpha, generator))


@torch.no_grad()
def merge_lora(decoder: Decoder) -> None:
    """Work the additions into the matrices, in place: the same logits, the plain decoder's shape."""
    for _, holder, name, linear in _linears(decoder):
        if isinstance(linear, LoraLinear):
            linear.base.weight += linear.scale * linear.lora_b @ linear.lora_a
            setattr(holder, name, linear.base)
    decoder.requires_grad_(True)


def lora_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The additions by the names that the `peft` library gives them; empty without LoRA."""
    return {
        f"base_model.model.{name}.lora_{part.upper()}.weight": matrix.detach().cpu().contiguous()
        for name, _, _, linear in _linears(decoder)
        if isinstance(linear, LoraLinear)
        for part, matrix in (("a", linear.lora_a), ("b", linear.lora_b))
    }
