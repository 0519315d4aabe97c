"""Muon for the layers' matrices, AdamW for embeddings and gains; their state as plain tensors for safetensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from model.decoder import Decoder


def orthogonalised(matrices_nrc: Tensor) -> Tensor:
    """Each matrix with its singular values brought near 1, in bfloat16, by five steps of a Newton-Schulz iteration.

    The coefficients are Jordan's (2024), chosen for speed: the values end between about 0.5 and 1.5.
    """
    x_nrc = matrices_nrc.bfloat16()
    tall = x_nrc.shape[1] > x_nrc.shape[2]
    if tall:
        x_nrc = x_nrc.mT
    x_nrc = x_nrc / x_nrc.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram_nrr = x_nrc @ x_nrc.mT
        polynomial_nrr = torch.baddbmm(gram_nrr, gram_nrr, gram_nrr, beta=-4.7750, alpha=2.0315)
        x_nrc = torch.baddbmm(x_nrc, polynomial_nrr, x_nrc, beta=3.4445)
    return x_nrc.mT if tall else x_nrc


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (Jordan 2024) and scaled to AdamW's RMS, so that one weight decay serves both
    (Liu et al. 2025, "Muon is scalable for LLM training").

    The same as `torch.optim.Muon`, but matrices of one shape go through it together: a step of the
    bundled shape is then some hundred larger operations instead of a thousand tiny ones.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for shape, matrices in alike.items():
                gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
                for matrix in matrices:
                    if not self.state[matrix]:
                        self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
                torch._foreach_lerp_(buffers, gradients, 1 - momentum)
                ahead = torch._foreach_lerp(gradients, buffers, momentum)
                updates_nrc = orthogonalised(torch.stack(ahead)).float()
                torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
                torch._foreach_add_(matrices, list(updates_nrc.unbind()), alpha=-0.2 * max(shape) ** 0.5 * lr)


class Optimizer:
    """The two optimizers behind one step."""

    def __init__(self, decoder: Decoder, muon_lr: float, adamw_lr: float, weight_decay: float):
        """Of `decoder`, what requires a gradient. A muon_lr of 0 leaves the matrices to AdamW too."""
        matrices = [p for p in decoder.model.layers.parameters() if p.dim() == 2 and p.requires_grad and muon_lr]
        taken = {id(p) for p in matrices}
        others = [p for p in decoder.parameters() if id(p) not in taken and p.requires_grad]
        decayed = [p for p in others if p.dim() == 2]
        gains = [p for p in others if p.dim() < 2]
        self._parts: dict[str, tuple[torch.optim.Optimizer, float]] = {}
        if matrices:
            self._parts["muon"] = Muon(matrices, muon_lr, weight_decay), muon_lr
        if others:
            adamw = torch.optim.AdamW(
                [{"params": decayed, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}],
                lr=adamw_lr,
                betas=(0.9, 0.95),
            )
            self._parts["adamw"] = adamw, adamw_lr

    def step(self, lr_scale: float) -> None:
        """Update the weights from their gradients at lr_scale times the configured rates, then clear the gradients."""
        for optimizer, lr in self._parts.values():
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Momentum and moments, keyed "muon.<parameter number>.<name>"."""
        return {
            f"{part}.{number}.{name}": value
            for part, (optimizer, _) in self._parts.items()
            for number, entries in optimizer.state_dict()["state"].items()
            for name, value in entries.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for part, (optimizer, _) in self._parts.items():
            whole = optimizer.state_dict()
            for key, value in state.items():
                owner, number, name = key.split(".", 2)
                if owner == part:
                    whole["state"].setdefault(int(number), {})[name] = value
            optimizer.load_state_dict(whole)
