"""One story being generated, as the engine sees it: tokens, settings, state. Knows nothing of torch or text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from model.config import SamplingParams

MASK_64 = 2**64 - 1


def _mix(z: int) -> int:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): every input bit moves every output bit."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    return z ^ (z >> 31)


def uniform_noise(seed: int, position: int) -> float:
    """A uniform number in [0, 1), 53 bits, that depends on nothing but the seed and the position in the story."""
    golden = 0x9E3779B97F4A7C15
    return (_mix((_mix((seed + golden) & MASK_64) + (position + 1) * golden) & MASK_64) >> 11) * 2.0**-53


class FinishReason(StrEnum):
    """Why a story ended."""

    STOP = "stop"  # the model wrote its end token
    LENGTH = "length"  # max_tokens reached; it can be continued
    CANCELLED = "cancelled"  # the reader stopped it
    ERROR = "error"


@dataclass(eq=False)
class Request:
    """Tokens go in as `prompt`, come out through `on_token`, one call a token, then `on_finish` once.

    Both callbacks run on the engine's thread and must not block.
    """

    prompt: list[int]
    params: SamplingParams
    n_kept: int  # leading tokens that stay when the oldest text slides out of the context (begin token, idea)
    on_token: Callable[[int], None]
    on_finish: Callable[[FinishReason, str | None], None]
    generated: list[int] = field(default_factory=list)
    max_tokens: int = 0
    pace: float | None = None  # tokens a second at most; None is as fast as it goes
    n_forgotten: int = 0  # oldest tokens after n_kept that no longer fit the context
    cancelled: threading.Event = field(default_factory=threading.Event)

    # The engine's own: where the story stands in the cache.
    slot: int | None = None
    n_cached: int = 0
    due_s: float = 0.0  # when the next token may be written, on the monotonic clock
    busy_s: float = 0.0  # spent in steps that this story took part in

    def __post_init__(self) -> None:
        self.max_tokens = self.max_tokens or self.params.max_tokens
        assert self.params.seed is not None, "the seed is drawn before a story starts"

    @property
    def noise(self) -> float:
        """The luck of the next token: one uniform number per (seed, position), whoever else is being served."""
        assert self.params.seed is not None
        return uniform_noise(self.params.seed, len(self.prompt) + len(self.generated))

    @property
    def is_reading(self) -> bool:
        """Whether more than the newest token is missing in the cache."""
        return not self.generated or self.n_window - self.n_cached > 1

    @property
    def n_window(self) -> int:
        """How many tokens the model looks at."""
        return len(self.prompt) + len(self.generated) - self.n_forgotten

    @property
    def window(self) -> list[int]:
        """The tokens the model looks at: everything, less what slid out."""
        tokens = self.prompt + self.generated
        return tokens[: self.n_kept] + tokens[self.n_kept + self.n_forgotten :]

    def slide(self, context: int) -> None:
        """Let the oldest text go until half of the context beyond the kept tokens is free again.

        A no-op while the newest token still has room. The rule looks at token counts alone, so a story that was
        interrupted and continued slides at the same places.
        """
        room = context - self.n_kept
        assert room > 1, "what is kept must leave room for text"
        while self.n_window > context:
            self.n_forgotten += room - room // 2
            self.n_cached = 0


class Feed(NamedTuple):
    """What one story brings to a step: tokens to read at positions `request.n_cached` and on."""

    request: Request
    tokens: Sequence[int]
    wants_next: bool = True  # whether to sample the token after the last one; False while more of the prompt follows
