"""Twins: two beginnings and two endings, each ending right after one beginning and wrong after the other.

A story's tokens mostly follow from the few before them; few depend on which of two things somebody still has. Twins
are made of such tokens alone, and are learnt by choosing between the two endings, as cloze asks. They are written out
in a file, or drawn from patterns (patterns.py).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.decoder import Decoder
from model.errors import InputError
from model.tokenizer import Tokenizer

LENGTHS = (32, 48, 64)  # tokens that the choices of a step are padded to
HELD_OUT_ONE_IN = 12
CHOICES_PER_PASS = 128
STEPS_PER_BLOCK = 16  # twins are sorted by length within so many steps, so that little is padded
# Of the loss: how likely the right ending is among all tokens, beside the choice between the two.
LIKELIHOOD_SHARE = 0.3
WRITTEN_SHARE = 0.3  # of a block's twins, where there are drawn ones too
MOST_TOO_LONG = 1000  # twins drawn in a row, before there seem to be none that fit

TwinText = tuple[str, str, str, str]  # beginning, its ending, other beginning, its ending
Draw = Callable[[random.Random, float], TwinText]


class Choice(NamedTuple):
    """Tokens up to where the two endings part, and the token of each that comes next."""

    tokens: list[int]
    right: int
    wrong: int


def is_held_out(text: str) -> bool:
    """Whether what begins so is judged by instead of learnt: decided by the text itself, so it never moves."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) % HELD_OUT_ONE_IN == 0


def read_twins(path: Path, held_out: bool = False) -> list[TwinText]:
    """The twins of a file that are held out, or those that are not: lines of four fields with tabs between.

    Raises:
        InputError: the file is missing, or a line has not four fields.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise InputError(f"The twins in {path} cannot be read: {error}") from error
    twins = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match line.split("\t"):
            case [begin_1, end_1, begin_2, end_2] if begin_1 and end_1 and begin_2 and end_2:
                if is_held_out(begin_1) == held_out:
                    twins.append((begin_1, end_1, begin_2, end_2))
            case _:
                raise InputError(f"{path}, line {number}: give four fields with tabs between them.")
    return twins


def choices(twin: TwinText, tokenizer: Tokenizer, length: int = LENGTHS[-1]) -> tuple[Choice, Choice] | None:
    """The choice after each of the beginnings; None where one is of more than `length` tokens or nothing parts them."""
    end_1, end_2 = (tokenizer.encode(f" {end}.") for end in (twin[1], twin[3]))
    shared = next((i for i, (a, b) in enumerate(zip(end_1, end_2, strict=False)) if a != b), None)
    if shared is None:
        return None
    begin_1, begin_2 = (tokenizer.encode_opening(begin) + end_1[:shared] for begin in (twin[0], twin[2]))
    if max(len(begin_1), len(begin_2)) > length:
        return None
    return Choice(begin_1, end_1[shared], end_2[shared]), Choice(begin_2, end_2[shared], end_1[shared])


def padded(found: Sequence[Choice], length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [n, length], and of each row the last token's place, the right and the wrong next token [n]."""
    tokens_nl = np.zeros((len(found), length), np.int64)
    for row_l, choice in zip(tokens_nl, found, strict=True):
        row_l[: len(choice.tokens)] = choice.tokens
    ends_3n = np.array([(len(c.tokens) - 1, c.right, c.wrong) for c in found]).T
    last_n, right_n, wrong_n = torch.from_numpy(np.ascontiguousarray(ends_3n)).to(device)
    return torch.from_numpy(tokens_nl).to(device), last_n, right_n, wrong_n


class TwinStream:
    """The choices of each step, decided by seed and step alone: written twins, all of them once an epoch, and drawn."""

    def __init__(
        self,
        written: Sequence[TwinText],
        draw: Draw | None,
        tokenizer: Tokenizer,
        per_step: int,
        n_steps: int,
        length: int,
        seed: int,
    ):
        """`draw` makes a twin from a random generator and the run's progress from 0 to 1.

        Raises:
            InputError: no written twin is of at most `length` tokens, and there is no `draw`.
        """
        self._lengths = [n for n in LENGTHS if n < length] + [min(length, LENGTHS[-1])]
        self._tokenizer, self._draw, self._n_steps, self._seed = tokenizer, draw, n_steps, seed
        self._written = [found for twin in written if (found := choices(twin, tokenizer, self._lengths[-1]))]
        if not self._written and not draw:
            raise InputError(
                f"There are no twins of at most {self._lengths[-1]} tokens with different endings to learn."
            )
        self._per_step = per_step
        self._n_written = 0 if not self._written else round(WRITTEN_SHARE * per_step) if draw else per_step
        self._block: tuple[int, list[list[Choice]]] = (-1, [])

    def step(self, step: int) -> tuple[list[Choice], int]:
        """The choices of a step, twin by twin, and a length that none exceeds.

        Raises:
            InputError: no twin that is drawn is short enough.
        """
        block, place = divmod(step, STEPS_PER_BLOCK)
        if self._block[0] != block:
            self._block = block, self._steps(block)
        found = self._block[1][place]
        longest = max(len(choice.tokens) for choice in found)
        return found, next(length for length in self._lengths if length >= longest)

    def _steps(self, block: int) -> list[list[Choice]]:
        rng = random.Random(f"{self._seed} {block}")
        n_written = self._n_written * STEPS_PER_BLOCK
        twins = [self._written[i] for i in self._places(block * n_written, n_written)]
        n_too_long = 0
        while len(twins) < self._per_step * STEPS_PER_BLOCK:
            assert self._draw
            drawn = self._draw(rng, block * STEPS_PER_BLOCK / self._n_steps)
            if found := choices(drawn, self._tokenizer, self._lengths[-1]):
                twins.append(found)
            n_too_long = 0 if found else n_too_long + 1
            if n_too_long == MOST_TOO_LONG:
                raise InputError(
                    f"No twin that is drawn is of at most {self._lengths[-1]} tokens with different endings."
                )
        twins.sort(key=lambda pair: max(len(choice.tokens) for choice in pair))
        steps = [
            [choice for pair in twins[i : i + self._per_step] for choice in pair]
            for i in range(0, len(twins), self._per_step)
        ]
        rng.shuffle(steps)
        return steps

    def _places(self, first: int, n: int) -> list[int]:
        """Where the `first`th written twin to be read is, and those after it; each epoch has an order of its own."""
        read = [divmod(number, len(self._written)) for number in range(first, first + n)]
        orders = {
            epoch: np.random.default_rng([self._seed % 2**32, epoch]).permutation(len(self._written))
            for epoch in {epoch for epoch, _ in read}
        }
        return [int(orders[epoch][i]) for epoch, i in read]


def _logits(decoder: Decoder, tokens_nl: Tensor, last_n: Tensor) -> Tensor:
    """Logits [n, v] for the token after each row's last; in float32, as bfloat16 has ties."""
    with torch.autocast(tokens_nl.device.type, torch.bfloat16):
        hidden_nd = decoder.model(tokens_nl)[torch.arange(len(tokens_nl), device=tokens_nl.device), last_n]
    return decoder.lm_head(hidden_nd.float())


def choice_loss(
    decoder: Decoder, tokens_nl: Tensor, last_n: Tensor, right_n: Tensor, wrong_n: Tensor
) -> tuple[Tensor, Tensor]:
    """Summed loss in nats, and the part of it that is -log of the right ending's share of both endings' probability."""
    logits_nv = _logits(decoder, tokens_nl, last_n)
    right, wrong = (logits_nv.gather(1, n[:, None])[:, 0] for n in (right_n, wrong_n))
    choice = F.softplus(wrong - right).sum()
    return choice + LIKELIHOOD_SHARE * F.cross_entropy(logits_nv, right_n, reduction="sum"), choice.detach()


@torch.inference_mode()
def choice_accuracy(decoder: Decoder, twins: Sequence[TwinText], tokenizer: Tokenizer) -> float | None:
    """Share of beginnings after which the right ending is likelier where the two part; None where there are none."""
    length = min(LENGTHS[-1], decoder.config.max_position_embeddings)
    found = [choice for twin in twins for choice in choices(twin, tokenizer, length) or ()]
    found.sort(key=lambda choice: len(choice.tokens))
    n_right = 0
    for i in range(0, len(found), CHOICES_PER_PASS):
        some = found[i : i + CHOICES_PER_PASS]
        tokens_nl, last_n, right_n, wrong_n = padded(some, len(some[-1].tokens), decoder.lm_head.weight.device)
        logits_nv = _logits(decoder, tokens_nl, last_n)
        n_right += int((logits_nv.gather(1, right_n[:, None]) > logits_nv.gather(1, wrong_n[:, None])).sum())
    return n_right / len(found) if found else None
