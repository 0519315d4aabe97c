"""Runs the decoder for the engine with torch: on CUDA in bfloat16 with captured decode steps, on a CPU the same code in
float32 and kernel by kernel, where the tests hold it against the decoder.

A step of a small model on a GPU takes as long as its kernels are many. So a step has its inputs in one buffer, which is
uploaded in one copy, and ends with the sampled tokens in the same buffer, which are the inputs of the step to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import SamplingParams
from model.decoder import Decoder
from model.engine.joined_decoder import JoinedDecoder
from model.engine.kv_cache import KVCache, RowsView
from model.engine.request import Feed, Request, uniform_noise
from model.errors import ModelError
from model.sampling import Settings, draw, penalise_repetition, settle

PREFILL_TOKENS = {"cpu": 128, "cuda": 8192}  # prompt tokens in one step
LEAST_READ = 128  # positions that attention reads, or a power of two times as many

# Rows of the inputs, one column a slot; from TEMPERATURE on their eight bytes are a float64.
TOKEN, POSITION, LAST, TEMPERATURE, TOP_P, MIN_P, PENALTY, NOISE = range(8)


@dataclass
class Flight:
    """A decode step under way: for which stories, and which of the two buffers its result comes in."""

    requests: list[Request]
    slots: list[int]
    positions: list[int]
    tokens: list[int] | None  # that go in; None until the step before has landed
    turn: int

    @property
    def asks(self) -> tuple[list[Request], list[int], list[int], list[int] | None]:
        return self.requests, self.slots, self.positions, self.tokens


class TorchBackend:
    """Cache and forward passes for `n_slots` stories at once.

    Args:
        n_ids: tokens that stand for text; some models are padded beyond them.
        dtype: of weights and cache; None is bfloat16 on CUDA, float32 on a CPU.
        capture: whether decode steps become CUDA graphs; None is where there is CUDA.
        look_ahead: whether to start a step before it is asked for, on the guess that the same stories go on, so that
            the device works while Python hands out tokens; None is where there is CUDA.
    """

    def __init__(
        self,
        decoder: Decoder,
        n_slots: int,
        n_ids: int | None = None,
        dtype: torch.dtype | None = None,
        capture: bool | None = None,
        look_ahead: bool | None = None,
    ):
        self.device = decoder.lm_head.weight.device
        self._on_cuda = self.device.type == "cuda"
        dtype = dtype or (torch.bfloat16 if self._on_cuda else torch.float32)
        self.context = decoder.config.max_position_embeddings
        self.prefill_tokens = PREFILL_TOKENS[self.device.type]
        self._n_slots, self._n_ids = n_slots, n_ids or decoder.config.vocab_size
        self.joined = JoinedDecoder(decoder, self._n_ids, dtype)
        self.cache = KVCache(decoder.config, n_slots, self.device, dtype)
        self._look_ahead = self._on_cuda if look_ahead is None else look_ahead
        self._ahead: Flight | None = None

        self._host = np.zeros((8, n_slots), np.int64)
        self._host_floats = self._host.view(np.float64)
        self._host_floats[TEMPERATURE] = self._host_floats[PENALTY] = 1  # also where no story is
        self._host_seen_bv = torch.zeros((n_slots, self._n_ids), dtype=torch.bool, pin_memory=self._on_cuda)
        self._inputs = torch.from_numpy(self._host).to(self.device, copy=True)
        self._seen_bv = torch.zeros_like(self._host_seen_bv, device=self.device)
        # What copies run through while Python goes on: two buffers in turn.
        self._staged = [torch.zeros((8, n_slots), dtype=torch.int64, pin_memory=self._on_cuda) for _ in range(2)]
        self._results = [torch.zeros(n_slots, dtype=torch.int64, pin_memory=self._on_cuda) for _ in range(2)]
        self._landed = [torch.cuda.Event() for _ in range(2)] if self._on_cuda else None
        self._turn = 0
        self._settled: list[SamplingParams | None] = [None] * n_slots  # whose settings stand in the slot's column
        self._seeds = np.zeros(n_slots, np.uint64)

        self._graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if (self._on_cuda if capture is None else capture) else None

    def warm_up(self) -> None:
        """Let the libraries set themselves up, and capture the step of a first story."""
        request = Request([0, 0], SamplingParams(seed=0), 0, lambda _: None, lambda *_: None, slot=0)
        self.step([Feed(request, request.prompt)])
        request.n_cached = 2
        self.step([Feed(request, [0])])

    @torch.inference_mode()
    def step(self, feeds: Sequence[Feed]) -> list[int]:
        """Read each story's tokens into its slot; returns the next token of those that want one, in order.

        Raises:
            ModelError: the weights give no numbers.
        """
        requests = [feed.request for feed in feeds]
        self._settle([r for r in requests if self._settled[_slot(r)] is not r.params])
        penalised = [r for r in requests if r.params.repetition_penalty != 1]
        if penalised:
            self._mark_seen(penalised)
        if all(feed.wants_next and len(feed.tokens) == 1 for feed in feeds):
            return self._write(requests, [feed.tokens[0] for feed in feeds], bool(penalised))
        return self._read(feeds, bool(penalised))

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], slot: int = 0, start: int = 0) -> Tensor:
        """Read tokens into a slot from position `start` on; returns the logits [t, v] after each."""
        end = start + len(tokens)
        tokens_bt, positions_bt = self._upload(np.array([[tokens], [range(start, end)]]))
        view = RowsView(self.cache, slice(slot, slot + 1), positions_bt, self._n_read(end))
        return self.joined.logits(self.joined.hidden(tokens_bt, view)[0])

    def _settle(self, requests: list[Request]) -> None:
        """Note the settings of stories that are new in their slots."""
        if not requests:
            return
        slots, params = [_slot(r) for r in requests], [r.params for r in requests]
        settings = settle(
            [p.temperature for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            self._n_ids,
        )
        self._host[LAST, slots] = settings.last_b.numpy()
        self._host_floats[TEMPERATURE, slots] = settings.temperature_b.numpy()
        self._host_floats[TOP_P, slots] = settings.top_p_b.numpy()
        self._host_floats[MIN_P, slots] = settings.min_p_b.numpy()
        self._host_floats[PENALTY, slots] = [p.repetition_penalty for p in params]
        self._seeds[slots] = [p.seed or 0 for p in params]
        for slot, p in zip(slots, params, strict=True):
            self._settled[slot] = p

    def _mark_seen(self, requests: list[Request]) -> None:
        """Upload which tokens stand in the stories with a repetition penalty; for others the mask changes nothing."""
        host_seen_bv = self._host_seen_bv.numpy()
        for request in requests:
            host_seen_bv[request.slot] = False
            host_seen_bv[request.slot, request.window] = True
        n_rows = max(_slot(r) for r in requests) + 1
        self._seen_bv[:n_rows].copy_(self._host_seen_bv[:n_rows], non_blocking=True)

    def _noise(self, requests: list[Request], slots: list[int], n_ahead: int = 0) -> np.ndarray:
        """Request.noise of all at once, `n_ahead` tokens further on."""
        n_tokens = np.array([len(r.prompt) + len(r.generated) + n_ahead for r in requests], np.uint64)
        seeds: Any = self._seeds[slots]
        noise: Any = uniform_noise(seeds, n_tokens)  # type: ignore[arg-type]  # plain arithmetic, so arrays will do
        return noise

    # Decode: stories that lack only their newest token in the cache.

    def _write(self, requests: list[Request], tokens: list[int], penalised: bool) -> list[int]:
        slots, positions = [_slot(r) for r in requests], [r.n_cached for r in requests]
        flight, self._ahead = self._ahead, None
        if flight is None or flight.asks != (requests, slots, positions, tokens):
            flight = self._launch(requests, slots, tokens, penalised)
        ahead = None
        # A penalty wants to know the token that is still under way; who keeps a pace is in no hurry.
        if self._look_ahead and not penalised and not any(r.pace for r in requests):
            ahead = self._launch(requests, slots, None, penalised=False)
        if self._landed:
            self._landed[flight.turn].synchronize()
        next_tokens: list[int] = self._results[flight.turn].numpy()[slots].tolist()
        if ahead:
            ahead.tokens = next_tokens
            self._ahead = ahead
        return next_tokens

    def _launch(self, requests: list[Request], slots: list[int], tokens: list[int] | None, penalised: bool) -> Flight:
        """Start a step without waiting for it; with None for tokens, the one after the step under way."""
        n_ahead = int(tokens is None)
        positions = [r.n_cached + n_ahead for r in requests]
        assert max(positions) < self.context + n_ahead, "the device does not check bounds"
        self._turn = turn = 1 - self._turn
        if self._landed:
            self._landed[turn].synchronize()  # a step that nobody waited for may still be reading this buffer
        self._host[POSITION] = self.cache.scratch
        self._host[POSITION, slots] = positions
        self._host_floats[NOISE, slots] = self._noise(requests, slots, n_ahead)
        if tokens is not None:
            self._host[TOKEN, slots] = tokens
        first = TOKEN if tokens is not None else POSITION  # the step before leaves its tokens where they are needed
        self._staged[turn].numpy()[:] = self._host
        self._inputs[first:].copy_(self._staged[turn][first:], non_blocking=True)
        n_rows = min(1 << max(slots).bit_length(), self._n_slots)
        self._run(n_rows, self._n_read(max(positions) + 1), penalised)
        self._results[turn].copy_(self._inputs[TOKEN], non_blocking=True)
        if self._landed:
            self._landed[turn].record()
        return Flight(requests, slots, positions, tokens, turn)

    def _n_read(self, n_filled: int) -> int:
        """How far attention reads: few different lengths, so that few graphs are needed."""
        return min(max(LEAST_READ, 1 << (n_filled - 1).bit_length()), self.context)

    def _run(self, n_rows: int, n_read: int, penalised: bool) -> None:
        if self._pool is None:
            self._decode(n_rows, n_read, penalised)
            return
        graph = self._graphs.get((n_rows, n_read, penalised))
        if graph is None:
            graph = self._graphs[n_rows, n_read, penalised] = self._captured(n_rows, n_read, penalised)
        graph.replay()

    def _captured(self, n_rows: int, n_read: int, penalised: bool) -> torch.cuda.CUDAGraph:
        # A rehearsal, in which libraries set themselves up. What it writes is written again, but for the tokens.
        tokens_b = self._inputs[TOKEN].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._decode(n_rows, n_read, penalised)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do on the device must not spoil the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._decode(n_rows, n_read, penalised)
        self._inputs[TOKEN] = tokens_b
        return graph

    def _decode(self, n_rows: int, n_read: int, penalised: bool) -> None:
        """One step of the first rows of the cache, from the inputs on the device to the tokens there."""
        inputs = self._inputs[:, :n_rows]
        view = RowsView(self.cache, slice(0, n_rows), inputs[POSITION].unsqueeze(1), n_read)
        x_bd = self.joined.hidden(inputs[TOKEN].unsqueeze(1), view)[:, -1]
        inputs[TOKEN] = self._draw(x_bd, inputs, self._seen_bv[:n_rows] if penalised else None)

    def _draw(self, x_bd: Tensor, inputs: Tensor, seen_bv: Tensor | None) -> Tensor:
        """Sample a token after each; `inputs` are those columns that belong to them."""
        floats = inputs.view(torch.float64)
        logits_bv = self.joined.logits(x_bd)
        if seen_bv is not None:
            logits_bv = penalise_repetition(logits_bv, seen_bv, floats[PENALTY])
        settings = Settings(floats[TEMPERATURE], inputs[LAST], floats[TOP_P], floats[MIN_P])
        return draw(logits_bv, settings, floats[NOISE])

    # Prefill: prompts, or parts of them, of any lengths.

    def _read(self, feeds: Sequence[Feed], penalised: bool) -> list[int]:
        """Rows of like length share a pass, so that padding stays within `prefill_tokens`."""
        if self._ahead and not {feed.request.slot for feed in feeds}.isdisjoint(self._ahead.slots):
            self._ahead = None  # what it has written is about to be overwritten
        order = sorted(range(len(feeds)), key=lambda i: -len(feeds[i].tokens))
        wanting = [i for i in order if feeds[i].wants_next]
        drawn = []
        while order:
            n_rows = max(1, self.prefill_tokens // len(feeds[order[0]].tokens))
            group, order = order[:n_rows], order[n_rows:]
            drawn.append(self._read_together([feeds[i] for i in group], penalised))
        tokens = dict(zip(wanting, torch.cat(drawn).tolist(), strict=True))
        if -1 in tokens.values():
            raise ModelError("The model's weights give no numbers. Choose another model.")
        return [tokens[i] for i in sorted(wanting)]

    def _read_together(self, feeds: list[Feed], penalised: bool) -> Tensor:
        """One pass over some prompts, padded on the right; returns the next tokens of those that want one.

        -1 stands for a token that could not be drawn for want of numbers.
        """
        n_longest = max(len(feed.tokens) for feed in feeds)
        tokens_and_positions = np.zeros((2, len(feeds), n_longest), np.int64)
        tokens_and_positions[1] = self.cache.scratch
        for i, feed in enumerate(feeds):
            n, start = len(feed.tokens), feed.request.n_cached
            tokens_and_positions[:, i, :n] = feed.tokens, range(start, start + n)
        tokens_bt, positions_bt = self._upload(tokens_and_positions)
        slots_b = self._upload(np.array([feed.request.slot for feed in feeds]))
        n_filled = max(feed.request.n_cached + len(feed.tokens) for feed in feeds)
        assert n_filled <= self.context, "the device does not check bounds"
        x_btd = self.joined.hidden(tokens_bt, RowsView(self.cache, slots_b, positions_bt, self._n_read(n_filled)))

        wanting = [i for i, feed in enumerate(feeds) if feed.wants_next]
        if not wanting:
            return slots_b[:0]
        requests = [feeds[i].request for i in wanting]
        slots = [_slot(r) for r in requests]
        inputs = self._host[:, slots]
        inputs.view(np.float64)[NOISE] = self._noise(requests, slots)
        ends = self._upload(np.array([wanting, [len(feeds[i].tokens) - 1 for i in wanting]]))
        seen_bv = self._seen_bv[slots_b[ends[0]]] if penalised else None
        x_bd = x_btd[ends[0], ends[1]]
        return torch.where(x_bd.isfinite().all(-1), self._draw(x_bd, self._upload(inputs), seen_bv), -1)

    def _upload(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self._on_cuda else tensor


def _slot(request: Request) -> int:
    assert request.slot is not None
    return request.slot
