"""Twins: two beginnings and two endings, each ending right after one beginning and wrong after the other.

A story's tokens mostly follow from the few before them; few depend on which of two things somebody still has. Twins
are made of such tokens alone, and are learnt by choosing between the two endings, as cloze asks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model.decoder import Decoder
from model.errors import InputError
from model.tokenizer import Tokenizer

LENGTH = 64  # tokens of a beginning with its ending, at most
HELD_OUT_ONE_IN = 12
ROWS_PER_PASS = 128


def is_held_out(beginning: str) -> bool:
    """Whether twins that begin so are judged by instead of learnt: decided by the text itself, so it never moves."""
    return int(hashlib.sha256(beginning.encode()).hexdigest()[:6], 16) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Twins:
    """Tokenised twins.

    `rows_nrl` [n, 4, length] holds each beginning with its right and its wrong ending, padded; `targets_nrl`
    [n, 4, length - 1] what is to be predicted after each token but the last, -100 before the ending and after it.
    """

    rows_nrl: np.ndarray
    targets_nrl: np.ndarray

    @classmethod
    def read(cls, path: Path, tokenizer: Tokenizer, length: int = LENGTH, held_out: bool = False) -> Twins:
        """Read lines of four fields with tabs between: beginning, its ending, other beginning, its ending.

        Those with more than `length` tokens are left out, and those that are held out; or all that are not.

        Raises:
            InputError: the file is missing, a line has not four fields, or none is left to learn.
        """
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            raise InputError(f"The twins in {path} cannot be read: {error}") from error
        rows, targets = [], []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            fields = line.split("\t")
            if len(fields) != 4 or not all(fields):
                raise InputError(f"{path}, line {number}: give four fields with tabs between them.")
            begin_1, end_1, begin_2, end_2 = fields
            if is_held_out(begin_1) != held_out:
                continue
            pairs = [(begin_1, end_1), (begin_1, end_2), (begin_2, end_2), (begin_2, end_1)]
            parts = [(tokenizer.encode_opening(begin), tokenizer.encode(f" {end}.")) for begin, end in pairs]
            if max(len(begin) + len(end) for begin, end in parts) > length:
                continue
            row_rl = np.full((4, length), tokenizer.pad_id, np.int64)
            target_rl = np.full((4, length - 1), -100, np.int64)
            for r, (begin, end) in enumerate(parts):
                row_rl[r, : len(begin) + len(end)] = [*begin, *end]
                target_rl[r, len(begin) - 1 : len(begin) + len(end) - 1] = end
            rows.append(row_rl)
            targets.append(target_rl)
        if not rows and not held_out:
            raise InputError(f"{path} holds no twins of at most {length} tokens to learn.")
        shape = (len(rows), 4, length)
        return cls(np.array(rows).reshape(shape), np.array(targets).reshape(*shape[:2], length - 1))

    def batch(self, step: int, n_twins: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [4 n_twins, length] and targets of a step; each epoch goes through all twins in another random order."""
        numbers = np.arange(step * n_twins, (step + 1) * n_twins)
        epochs, places = np.divmod(numbers, len(self.rows_nrl))
        orders = {
            e: np.random.default_rng([seed % 2**32, e]).permutation(len(self.rows_nrl)) for e in np.unique(epochs)
        }
        chosen = [orders[e][i] for e, i in zip(epochs, places, strict=True)]
        return np.concatenate(self.rows_nrl[chosen]), np.concatenate(self.targets_nrl[chosen])


def _nats_of_endings(decoder: Decoder, inputs_bt: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
    """-log p of each row's ending [b]: its targets that are not -100."""
    with torch.autocast(inputs_bt.device.type, torch.bfloat16):
        logits_btv = decoder(inputs_bt)
    nats = F.cross_entropy(logits_btv.float().flatten(0, 1), targets_bt.flatten(), reduction="none")
    return nats.view(targets_bt.shape).sum(1)


def choice_loss(decoder: Decoder, inputs_bt: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
    """-log of the right ending's share of both endings' probability, in nats, summed over pairs (right, wrong)."""
    nats_b = _nats_of_endings(decoder, inputs_bt, targets_bt)
    return F.softplus(nats_b[::2] - nats_b[1::2]).sum()


@torch.inference_mode()
def choice_accuracy(decoder: Decoder, twins: Twins) -> float | None:
    """Share of pairs whose right ending is likelier, of those with equally many tokens, as cloze does.

    None where there is no such pair.
    """
    rows = twins.rows_nrl.reshape(-1, twins.rows_nrl.shape[-1])
    targets = twins.targets_nrl.reshape(-1, twins.targets_nrl.shape[-1])
    device = decoder.lm_head.weight.device
    found: list[bool] = []
    for i in range(0, len(rows), ROWS_PER_PASS):
        inputs_bt = torch.from_numpy(rows[i : i + ROWS_PER_PASS, :-1]).to(device)
        targets_bt = torch.from_numpy(targets[i : i + ROWS_PER_PASS]).to(device)
        nats_b = _nats_of_endings(decoder, inputs_bt, targets_bt)
        n_tokens_b = (targets_bt >= 0).sum(1)
        alike = n_tokens_b[::2] == n_tokens_b[1::2]
        found += (nats_b[::2] < nats_b[1::2])[alike].tolist()
    return sum(found) / len(found) if found else None
