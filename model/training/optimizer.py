"""Muon for the layers' matrices, AdamW for embeddings and gains; their state as plain tensors for safetensors."""

from __future__ import annotations

import torch
from torch import Tensor

from model.decoder import Decoder


class Optimizer:
    """The two optimizers behind one step.

    Muon (Jordan 2024) orthogonalises each matrix's momentum; torch's own implementation is used, with updates scaled
    to AdamW's RMS (Liu et al. 2025, "Muon is scalable for LLM training") so that one weight decay serves both.
    """

    def __init__(self, decoder: Decoder, muon_lr: float, adamw_lr: float, weight_decay: float):
        """Of `decoder`, what requires a gradient. A muon_lr of 0 leaves the matrices to AdamW too."""
        matrices = [p for p in decoder.model.layers.parameters() if p.dim() == 2 and p.requires_grad and muon_lr]
        taken = {id(p) for p in matrices}
        others = [p for p in decoder.parameters() if id(p) not in taken and p.requires_grad]
        decayed = [p for p in others if p.dim() == 2]
        gains = [p for p in others if p.dim() < 2]
        self._parts: dict[str, tuple[torch.optim.Optimizer, float]] = {}
        if matrices:
            muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._parts["muon"] = muon, muon_lr
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
