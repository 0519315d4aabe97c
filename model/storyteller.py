"""The one door: load a storyteller, ask for a story, read it as it grows, stop it, continue it.

Plain data crosses it: text, numbers, iterators. Torch is imported only where there is a GPU to use.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

from model.checkpoint import load_tokenizer, read_config, read_weights
from model.config import ModelConfig, SamplingParams
from model.drafts import N_DRAFTS, score
from model.engine.request import FinishReason, Request
from model.errors import BusyError, InputError, TaleloomError
from model.find import choose_device, find_model, say_nothing
from model.prompt import Mode, guess_mode, plain_text
from model.tokenizer import Tokenizer

log = logging.getLogger(__name__)
MAX_PROMPT_CHARACTERS = 20_000
N_SLOTS = 64  # stories written at the same time
DRAFTING_S = 0.5  # at most, before a story begins
DRAFT_S_PER_WEIGHT, USUAL_TOKENS = 1e-11, 320  # for each token, in a batch, on one CPU core
N_REMEMBERED = 500  # stories that can be found again by their id


def _ignore_token(_: int) -> None:
    pass


class Story:
    """A story that is being told, or has been. Iterate it for pieces of text; `text` is all there is so far.

    Any number of threads may read it; iterating waits for text, everything else answers at once.
    """

    def __init__(
        self,
        storyteller: Storyteller,
        prompt: str,
        mode: Mode,
        params: SamplingParams,
        visitor: str | None,
        pace: float | None,
        seeds: Sequence[int],
    ):
        self.id = uuid.uuid4().hex[:12]
        self.prompt, self.mode, self.params, self.visitor = prompt, mode, params, visitor
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._storyteller = storyteller
        self._grown = threading.Condition()
        self._pieces: list[str] = []
        self._decoder = storyteller.tokenizer.stream_decoder()
        self._started_s: float | None = None
        self._seconds = 0.0  # spent writing, before the present stretch
        tokenizer = storyteller.tokenizer
        plain = plain_text(prompt)
        ids = tokenizer.encode_idea(plain) if mode == "idea" else tokenizer.encode_opening(plain)
        n_kept = len(ids) if mode == "idea" else 1
        self._request = Request(ids, params, n_kept, self._on_token, self._on_finish, pace=pace)
        # A draft is written at full speed, only to choose a seed: told again with it, the story is the same.
        self._drafts = [
            Request(ids, replace(params, seed=seed), n_kept, _ignore_token, partial(self._on_draft_finish, i))
            for i, seed in enumerate(seeds)
        ]
        self._draft_ends: dict[int, FinishReason] = {}

    def begin(self) -> None:
        """Hand the story, or its drafts first, to the engine. Raises BusyError when too many are waiting."""
        engine = self._storyteller.engine
        if not self._drafts:
            engine.submit(self._request)
            return
        engine.submit(self._drafts[0])
        for draft in self._drafts[1:]:
            engine.submit(draft, accepted=True)

    # On the engine's thread.

    def _on_draft_finish(self, number: int, reason: FinishReason, error: str | None) -> None:
        self._draft_ends[number] = reason
        if len(self._draft_ends) < len(self._drafts):
            return
        whole = [i for i, end in self._draft_ends.items() if end in (FinishReason.STOP, FinishReason.LENGTH)]
        if whole:
            try:
                best = max(sorted(whole), key=self._draft_score)
            except Exception:  # a story must come all the same
                log.exception("the drafts could not be compared")
                best = min(whole)
            self.params = self._request.params = self._drafts[best].params
        self._drafts = []
        try:
            self._storyteller.engine.submit(self._request, accepted=True)
        except TaleloomError:  # the engine was closed meanwhile
            self._on_finish(FinishReason.CANCELLED, None)

    def _draft_score(self, number: int) -> float:
        text = self._storyteller.tokenizer.decode(self._drafts[number].generated)
        return score(self.prompt, text, ended=self._draft_ends[number] is FinishReason.STOP)

    def _on_token(self, token: int) -> None:
        piece = self._decoder.push(token)
        with self._grown:
            self._started_s = self._started_s or time.monotonic()
            self._pieces.append(piece)
            self._grown.notify_all()

    def _on_finish(self, reason: FinishReason, error: str | None) -> None:
        with self._grown:
            if self._started_s is not None:
                self._seconds += time.monotonic() - self._started_s
                self._started_s = None
            if reason is not FinishReason.LENGTH:
                self._pieces.append(self._decoder.finish())
            self.finish_reason, self.error = reason, error
            self._grown.notify_all()

    # For readers.

    def __iter__(self) -> Iterator[str]:
        """Pieces of new text (the opening is not repeated) until the story ends; leaving the loop early stops it."""
        n_read, done = 0, False
        try:
            while True:
                with self._grown:
                    while n_read == len(self._pieces) and self.finish_reason is None:
                        self._grown.wait()
                    new, done = "".join(self._pieces[n_read:]), self.finish_reason is not None
                    n_read = len(self._pieces)
                if new:
                    yield new
                if done:
                    return
        finally:
            if not done:
                self.stop()

    @property
    def continuation(self) -> str:
        """What the storyteller wrote."""
        with self._grown:
            return "".join(self._pieces)

    @property
    def text(self) -> str:
        """The whole story so far: an opening is part of it, an idea is not."""
        return self.prompt + self.continuation if self.mode == "opening" else self.continuation

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None

    @property
    def n_tokens(self) -> int:
        """Tokens written so far."""
        return len(self._request.generated)

    @property
    def n_forgotten_tokens(self) -> int:
        """Oldest tokens that slid out of the storyteller's context."""
        return self._request.n_forgotten

    @property
    def seconds(self) -> float:
        """Time spent writing, from the first token."""
        with self._grown:
            running = time.monotonic() - self._started_s if self._started_s is not None else 0.0
            return self._seconds + running

    @property
    def tokens_per_second(self) -> float:
        """Speed at which the text came; 0 before the second token."""
        seconds = self.seconds
        return (self.n_tokens - 1) / seconds if self.n_tokens > 1 and seconds > 0 else 0.0

    @property
    def possible_tokens_per_second(self) -> float:
        """Speed without a pace: tokens over the time spent in this story's steps; 0 before the first token."""
        return self.n_tokens / self._request.busy_s if self.n_tokens and self._request.busy_s > 0 else 0.0

    @property
    def place_in_queue(self) -> int:
        """1 when this story is the next to begin, 0 when it has begun."""
        drafting = self._drafts  # the engine's thread may empty it
        return self._storyteller.engine.place_in_queue(drafting[0] if drafting else self._request)

    def stop(self) -> None:
        """End the story where it is; its text stays. Harmless when it has ended."""
        if self.finish_reason is None:
            for request in (self._request, *self._drafts):
                self._storyteller.engine.cancel(request)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; whether it came in time."""
        with self._grown:
            return self._grown.wait_for(lambda: self.finish_reason is not None, timeout_s)

    def extend(self, max_tokens: int) -> None:
        """Go on after the length limit with up to `max_tokens` more: the story a larger limit would have given.

        Raises:
            InputError: the story did not end at its length limit.
            BusyError: too many stories are waiting, or this visitor has too many running.
        """
        SamplingParams(max_tokens=max_tokens)  # checks the number
        with self._grown:  # two readers may press Continue at once
            if self.finish_reason is not FinishReason.LENGTH:
                raise InputError("Only a story that stopped at its length limit can be continued.")
            self._request.max_tokens = len(self._request.generated) + max_tokens
            self._request.cancelled.clear()  # a stop may have come too late
            self.finish_reason = None
        try:
            self._storyteller.resume(self)
        except BaseException:
            with self._grown:
                self.finish_reason = FinishReason.LENGTH
                self._grown.notify_all()  # somebody may be waiting by now
            raise

    def summary(self) -> dict[str, Any]:
        """Plain facts, as `taleloom tell --json` prints them."""
        return {
            "text": self.text,
            "prompt": self.prompt,
            "seed": self.params.seed,
            "tokens": self.n_tokens,
            "finish_reason": self.finish_reason.value if self.finish_reason else None,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.tokens_per_second, 1),
        }


class Storyteller:
    """A loaded model with its engine. Use as a context manager, or call `close`."""

    def __init__(self, name: str, config: ModelConfig, tokenizer: Tokenizer, backend: Any, n_slots: int, device: str):
        from model.engine.engine import Engine

        self.name, self.config, self.tokenizer, self.device = name, config, tokenizer, device
        self.backend = backend
        self.engine = Engine(backend, tokenizer.eos_id, n_slots)
        self.max_running_per_visitor: int | None = None
        self._stories: dict[str, Story] = {}  # oldest first
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str | None = None,
        device: str = "auto",
        n_slots: int = N_SLOTS,
        progress: Callable[[str], None] = say_nothing,
        folders: bool = True,
    ) -> Storyteller:
        """Open a storyteller: None for the bundled one, a folder, a Hub id (REPO[@revision]) or a name of one's own.

        Args:
            folders: whether `model` may be a folder (see find_model).

        Raises:
            ModelError: it cannot be found, or its folder is damaged, of another kind, or holds a pickle.
            InputError: the device is not there.
        """
        folder = find_model(model, progress, folders)
        config = read_config(folder)
        tokenizer = load_tokenizer(folder, config)
        backend: Any = None
        if choose_device(device) == "cuda":
            from model.checkpoint import load_decoder
            from model.engine.torch_backend import TorchBackend

            try:
                backend = TorchBackend(load_decoder(folder, "cuda"), n_slots, tokenizer.vocab_size)
                backend.warm_up()
            except RuntimeError as error:  # torch's, for a driver or a GPU that it does not suit
                if device == "cuda":
                    raise InputError(f"CUDA does not work here ({error}). Use --device cpu.") from error
                log.warning("CUDA does not work here, so stories are written on the CPU: %s", error)
                backend = None
        device = "cuda" if backend else "cpu"
        if not backend:
            from model.engine.cpu_backend import CpuBackend

            backend = CpuBackend(config, read_weights(folder, config), n_slots, tokenizer.vocab_size)
        return cls(model or "bundled", config, tokenizer, backend, n_slots, device)

    @property
    def knows_ideas(self) -> bool:
        """Whether it was trained to turn an idea into a story; otherwise every prompt is an opening."""
        return self.tokenizer.knows_ideas

    def count_tokens(self, text: str) -> int:
        """How many tokens a text takes of the context."""
        return len(self.tokenizer.encode(text))

    def tell(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        mode: Mode | None = None,
        visitor: str | None = None,
        pace: float | None = None,
        n_drafts: int = N_DRAFTS,
        seeds: Sequence[int] = (),
    ) -> Story:
        """Begin a story and return at once; it grows on the engine's thread.

        Without a seed several are tried, unseen, and the one whose story keeps best to the prompt is taken
        (model/drafts.py). It is the story's seed: given again, it tells the same story.

        Args:
            prompt: an opening, which the story continues word for word, or an idea for one.
            mode: which of the two; None guesses (see guess_mode).
            n_drafts: how many seeds to try at most; fewer when many stories are running. 1 takes the first.
            seeds: try just these, whatever n_drafts says.
            visitor: whoever asks, when `max_running_per_visitor` limits how many stories one may have running.
            pace: tokens a second at most, for a reader who follows along; None is as fast as it goes.

        Raises:
            InputError: the prompt is empty, too long, or an idea is asked of a model that knows none.
            BusyError: too many stories are waiting, or this visitor has too many running.
        """
        params = params or SamplingParams()
        if params.seed is None and not seeds:
            n_tried = max(1, min(n_drafts, self.engine.n_free // 2, self._affordable_drafts(params.max_tokens)))
            seeds = [secrets.randbelow(2**31) for _ in range(n_tried)]
        if seeds:
            params = replace(params, seed=seeds[0])
        mode = mode or (guess_mode(prompt) if self.knows_ideas else "opening")
        if mode == "idea" and not self.knows_ideas:
            raise InputError("This storyteller was not trained on ideas. Give it the opening of a story.")
        prompt = prompt.strip()
        self._check_prompt(prompt, mode)
        story = Story(self, prompt, mode, params, visitor, pace, seeds if len(seeds) > 1 else ())
        with self._lock:
            self._check_visitor(visitor)
            story.begin()
            self._stories[story.id] = story
            done = [story_id for story_id, story in self._stories.items() if story.is_done]
            for story_id in done[: max(0, len(self._stories) - N_REMEMBERED)]:
                del self._stories[story_id]
        return story

    def _affordable_drafts(self, max_tokens: int) -> int:
        """How many drafts need not be waited for long: the larger the model, the fewer."""
        draft_s = DRAFT_S_PER_WEIGHT * self.config.n_parameters * min(max_tokens, USUAL_TOKENS)
        return int(DRAFTING_S / draft_s)

    def _check_prompt(self, prompt: str, mode: Mode) -> None:
        if not prompt.strip():
            raise InputError("The prompt is empty. Type an idea or the opening of a story.")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise InputError(
                f"The prompt has {len(prompt):,} characters; {MAX_PROMPT_CHARACTERS:,} are the most. Shorten it."
            )
        # An idea must stay in view for the whole story; of a long opening the oldest part may slide out.
        n_tokens, limit = self.count_tokens(plain_text(prompt)), self.config.max_position_embeddings // 4
        if mode == "idea" and n_tokens > limit:
            raise InputError(
                f"The idea has {n_tokens} tokens; {limit} are the most. Shorten it, or use it as an opening."
            )

    def resume(self, story: Story) -> None:
        """Give a story back to the engine; for Story.extend."""
        with self._lock:
            self._check_visitor(story.visitor, story)
            self.engine.submit(story._request)
            self._stories[story.id] = story  # it may have been forgotten

    def _check_visitor(self, visitor: str | None, resumed: Story | None = None) -> None:
        """Raises BusyError when this visitor has as many stories running as one may have."""
        if visitor is None or self.max_running_per_visitor is None:
            return
        told = (story for story in self._stories.values() if story.visitor == visitor and story is not resumed)
        n_running = sum(not story.is_done for story in told)
        if n_running >= self.max_running_per_visitor:
            raise BusyError(f"{n_running} of your stories are still being told. Wait for one to end, or stop it.")

    def story(self, story_id: str) -> Story | None:
        """A story told earlier by this storyteller, or None when it is unknown or forgotten."""
        with self._lock:
            return self._stories.get(story_id)

    def close(self) -> None:
        """Stop every story and the engine; harmless when closed."""
        self.engine.close()

    def retire(self) -> None:
        """Take no more stories and return at once; the engine ends with the last that is being told."""
        self.engine.retire()

    def __enter__(self) -> Storyteller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
