"""Teach a storyteller somebody's own stories: full fine-tuning or LoRA, with originals replayed against forgetting.

On originals it learns to say what the base says (Li and Hoiem 2016, "Learning without Forgetting"): measured, that
forgets half of what learning their text again does (docs/training.md).

Everything that is drawn comes from the seed and the step, so a run that was paused or killed goes on as if it had not
been: metrics after its last checkpoint are dropped and written anew.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch

from model.checkpoint import load_decoder, load_tokenizer, read_config, save_model, write_atomically
from model.config import FineTuneSettings
from model.decoder import Decoder, Layer
from model.errors import InputError, TaleloomError
from model.evaluation.loss import bits_per_byte
from model.training.data import pack, token_pieces
from model.training.ideas import idea_for
from model.training.loop import (
    add_gradients,
    distilled_loss,
    load_checkpoint,
    padded_targets,
    save_checkpoint,
    summed_loss,
    trim_metrics,
)
from model.training.lora import add_lora, lora_tensors, merge_lora
from model.training.optimizer import Optimizer

Outcome = Literal["done", "paused", "cancelled"]
Row = Mapping[str, Any]  # text, prompt, split
# Part of the own stories that are told from their prompt, or one made of them; the others begin as they are. Originals
# always do: half of all ideas would else go on being told in the old style.
IDEA_SHARE = 0.7
ADAMW_SHARE = 1 / 3  # of the learning rate: for embeddings and gains, beside Muon
LORA_SHARE = 4.0  # of the learning rate: for LoRA's matrices, which begin at zero
MAX_GRAD_NORM = 1.0
KEPT_SHARE = 1.0  # of the loss on originals: what the base says of them, instead of their text
N_REPLAYED = 4_000  # original stories to draw from: all are tokenised before the first step
N_SCORED = 100  # stories of each kind at an evaluation
SAVE_EVERY_S = 30.0


class RowStream:
    """Endless rows of tokens [context + 1] from stories: each epoch shuffled, a share told from their ideas, packed.

    Row i is the same in every process that asks for the rows in order.
    """

    def __init__(self, stories: Sequence[Row], tokenizer: Any, row_length: int, seed: int, idea_share: float):
        self._stories, self._tokenizer, self._row_length, self._seed = stories, tokenizer, row_length, seed
        self._idea_share = idea_share
        self._rows = self._generate()
        self.n_taken = 0
        self.epoch = 0

    def epoch_rows(self, epoch: int) -> list[list[int]]:
        """The rows of one epoch, in order."""
        rng = random.Random(f"{self._seed} {epoch}")
        order = rng.sample(range(len(self._stories)), len(self._stories))
        sequences: list[list[int]] = []
        for i in order:
            story = self._stories[i]
            told_from_idea = rng.random() < self._idea_share
            idea = (story.get("prompt") or idea_for({}, story["text"], rng)) if told_from_idea else None
            sequences += token_pieces(story["text"], idea, self._tokenizer, self._row_length)
        return list(pack(sequences, self._row_length, self._tokenizer.pad_id))

    def _generate(self) -> Iterator[list[int]]:
        while True:
            yield from self.epoch_rows(self.epoch)
            self.epoch += 1

    def take(self, n: int) -> list[list[int]]:
        self.n_taken += n
        return [next(self._rows) for _ in range(n)]

    def skip(self, n: int) -> None:
        self.n_taken += n
        for _ in range(n):
            next(self._rows)


class FineTune:
    """One fine-tune in its job's folder: checkpoint.safetensors, metrics.jsonl, samples.jsonl, best/.

    Args:
        base: model folder to start from.
        rows: own stories with text, prompt (or None) and split ("train", or "test" for held-out ones).
        originals: stories of the base's own training, to read along and to measure what is forgotten; split as `rows`.
        report: gets a record per step and per evaluation, as in metrics.jsonl.
        should_stop: asked before each step; "pause" keeps a checkpoint of this very step, "cancel" does not.
        tell: tells the test ideas with a decoder: list of {idea, seed, text}, for samples.jsonl.

    Raises:
        InputError: there is no story to train on, or no step would be made.
        ModelError: the base cannot be opened, or the checkpoint is damaged or another run's.
    """

    def __init__(
        self,
        folder: Path,
        base: Path,
        rows: Sequence[Row],
        settings: FineTuneSettings,
        originals: Sequence[Row] = (),
        device: str = "cpu",
        report: Callable[[dict[str, Any]], None] = lambda _: None,
        should_stop: Callable[[], Literal["pause", "cancel"] | None] = lambda: None,
        tell: Callable[[Decoder], list[dict[str, Any]]] | None = None,
    ):
        self.folder, self.settings, self.device = Path(folder), settings, torch.device(device)
        self.report, self.should_stop, self._tell = report, should_stop, tell
        self.tokenizer = load_tokenizer(base, read_config(base))
        self.decoder = load_decoder(base)
        row_length = self.decoder.config.max_position_embeddings + 1
        own = [row for row in rows if row["split"] == "train"]
        if not own:
            raise InputError("There is no story to train on. Give at least one.")
        replayed = [row for row in originals if row["split"] == "train"]
        replayed = replayed[:: math.ceil(len(replayed) / N_REPLAYED) or 1]
        self._scored = {"own": [r["text"] for r in rows if r["split"] == "test"][:N_SCORED]}
        self._scored["own_train"] = [row["text"] for row in own[:: max(1, len(own) // 20)]][:20]
        self._scored["original"] = [row["text"] for row in originals if row["split"] == "test"][:N_SCORED]
        self._own = RowStream(own, self.tokenizer, row_length, settings.seed, IDEA_SHARE)
        self._replayed = RowStream(replayed, self.tokenizer, row_length, settings.seed, 0.0) if replayed else None
        self._replay_share = settings.replay_share if replayed else 0.0
        self._prepare_decoder()
        self._own_loss = partial(summed_loss, self.decoder)
        self._kept_loss = self._own_loss
        if replayed:
            teacher = load_decoder(base, str(self.device)).eval().requires_grad_(False)
            self._kept_loss = partial(distilled_loss, self.decoder, [teacher], KEPT_SHARE)
        # LoRA's matrices take AdamW, as its authors did.
        lora = settings.method == "lora"
        self.optimizer = Optimizer(
            self.decoder,
            0.0 if lora else settings.learning_rate,
            settings.learning_rate * (LORA_SHARE if lora else ADAMW_SHARE),
            settings.weight_decay,
        )
        self.n_own_rows = len(self._own.epoch_rows(0))
        own_per_step = settings.rows_per_step * (1 - self._replay_share)
        self.n_steps = max(1, math.ceil(settings.epochs * self.n_own_rows / own_per_step))
        self.n_steps = min(self.n_steps, settings.max_steps or self.n_steps)
        n_evaluations = min(settings.evaluations, self.n_steps)
        self._evaluated_steps = {round(i * self.n_steps / n_evaluations) for i in range(n_evaluations + 1)}
        self.step = 0
        self._metrics: list[dict[str, Any]] = []
        self.stopped_because = ""

    def _prepare_decoder(self) -> None:
        settings, decoder = self.settings, self.decoder
        if settings.method == "lora":
            add_lora(decoder, settings.lora_rank, settings.lora_alpha, settings.lora_targets, settings.seed)
        n_layers = len(decoder.model.layers)
        if settings.frozen_layers:
            if settings.frozen_layers > n_layers:
                raise InputError(f"frozen_layers is {settings.frozen_layers}; this storyteller has {n_layers} layers.")
            decoder.model.embed_tokens.requires_grad_(False)
            for layer in decoder.model.layers[: settings.frozen_layers]:
                layer.requires_grad_(False)
        for layer in decoder.model.layers:
            assert isinstance(layer, Layer)
            layer.dropout = settings.dropout
        decoder.to(self.device)
        if not any(parameter.requires_grad for parameter in decoder.parameters()):
            raise InputError("Nothing would be trained: every layer is frozen, or the LoRA targets are in frozen ones.")

    # The run.

    def run(self) -> Outcome:
        """Train to the end, to the held-out loss' best, or until asked to stop; goes on from the checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        saved_s = time.monotonic()
        while True:
            if self.step in self._evaluated_steps and not self._is_evaluated(self.step):
                self._evaluate()
                self._save()
                saved_s = time.monotonic()
            if self._is_over():
                return "done"
            if wish := self.should_stop():
                if wish == "pause":
                    self._save()
                return "paused" if wish == "pause" else "cancelled"
            self._train_step()
            if time.monotonic() - saved_s > SAVE_EVERY_S:
                self._save()
                saved_s = time.monotonic()

    def _train_step(self) -> None:
        started_s = time.perf_counter()
        settings = self.settings
        share, step, n = self._replay_share, self.step, settings.rows_per_step
        n_replayed = math.floor((step + 1) * n * share) - math.floor(step * n * share)
        epoch = self._own.n_taken / self.n_own_rows
        taken = self._own.take(n - n_replayed) + (self._replayed.take(n_replayed) if self._replayed else [])
        rows = np.asarray(taken, np.int64)
        torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout's: the same after a resumption
        self.decoder.train()
        targets = padded_targets(rows, self.tokenizer.pad_id)
        n_own = n - n_replayed
        total = torch.zeros((), device=self.device)
        for loss, chosen in ((self._own_loss, range(n_own)), (self._kept_loss, range(n_own, n))):
            total += add_gradients(loss, rows, targets, list(chosen), settings.rows_per_pass, self.device)
        trained = [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        value = total.item()
        if not math.isfinite(value) or not math.isfinite(norm.item()):
            raise TaleloomError(
                f"The loss at step {step} is not a number, so nothing more can be learned. Try again with a lower "
                "learning rate."
            )
        scale = self.lr_scale(step)
        self.optimizer.step(scale)
        self.step += 1
        seconds = time.perf_counter() - started_s
        self._record(
            {
                "step": self.step,
                "steps": self.n_steps,
                "loss": value,
                "lr": settings.learning_rate * scale,
                "epoch": epoch,
                "tokens_per_second": rows.size / seconds,
                "eta_s": (self.n_steps - self.step) * seconds,
                "memory_mb": _peak_memory_mb(),
            }
        )

    def lr_scale(self, step: int) -> float:
        """Multiplier of the learning rate at `step`, from 0."""
        warmup_steps = max(1, round(self.settings.warmup_share * self.n_steps))
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, self.n_steps - warmup_steps)
        match self.settings.schedule:
            case "linear":
                return 1 - done
            case "cosine":
                return (1 + math.cos(math.pi * done)) / 2
        return 1.0

    # Looking at what was learned.

    def _evaluate(self) -> None:
        self.decoder.eval()
        record: dict[str, Any] = {"step": self.step, "steps": self.n_steps, "evaluation": True}
        with torch.autocast(self.device.type, torch.bfloat16):
            for name, texts in self._scored.items():
                if texts:
                    score = bits_per_byte(self.decoder, self.tokenizer, texts)["bits_per_byte"]
                    record[f"{name}_bits_per_byte"] = score
        judged = record.get("own_bits_per_byte")
        record["best"] = judged is None or judged < min((score for _, score in self._judged()), default=math.inf)
        plain = self.plain_decoder()
        if record["best"]:
            self._save_best(plain)
        if self._tell:
            sample = {"step": self.step, "stories": self._tell(plain)}
            with (self.folder / "samples.jsonl").open("a") as file:
                file.write(json.dumps(sample) + "\n")
        self._record(record)

    def _save_best(self, plain: Decoder) -> None:
        if any(parameter.abs().max() > torch.finfo(torch.float16).max for parameter in plain.parameters()):
            raise TaleloomError("The weights grew too large to be stored. Try again with a lower learning rate.")
        save_model(self.folder / "best", plain, self.tokenizer)
        if additions := lora_tensors(self.decoder):
            settings = self.settings
            adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": settings.lora_rank, "bias": "none"}
            adapter |= {"lora_alpha": settings.lora_alpha, "target_modules": list(settings.lora_targets)}
            write_atomically(self.folder / "best" / "adapter_config.json", json.dumps(adapter, indent=2))
            write_atomically(self.folder / "best" / "adapter_model.safetensors", safetensors.torch.save(additions))

    def plain_decoder(self) -> Decoder:
        """The decoder as it is now, additions merged, without dropout."""
        plain = self.decoder
        if self.settings.method == "lora":
            plain = copy.deepcopy(self.decoder)
            merge_lora(plain)
        return plain.eval()

    def _judged(self) -> list[tuple[int, float]]:
        """(step, held-out bits per byte) of the evaluations so far; without held-out stories there are none."""
        return [(m["step"], m["own_bits_per_byte"]) for m in self._metrics if "own_bits_per_byte" in m]

    def _is_evaluated(self, step: int) -> bool:
        return any(m.get("evaluation") and m["step"] == step for m in self._metrics)

    def _is_over(self) -> bool:
        if self.step >= self.n_steps:
            self.stopped_because = "It read everything as often as asked."
            return True
        judged, patience = self._judged(), self.settings.patience
        if patience and len(judged) > patience:
            best = min(range(len(judged)), key=lambda i: judged[i][1])
            if len(judged) - 1 - best >= patience:
                self.stopped_because = f"The held-out stories were not told better in {patience} evaluations."
                return True
        return False

    @property
    def best_step(self) -> int:
        """Where the model in best/ stands."""
        bests = [m["step"] for m in self._metrics if m.get("best")]
        return bests[-1] if bests else 0

    # Files.

    def _record(self, record: dict[str, Any]) -> None:
        self._metrics.append(record)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.report(record)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _identity(self) -> dict[str, str]:
        """What must not change between a checkpoint and its resumption."""
        fixed = dataclasses.replace(self.settings, rows_per_pass=1, patience=0)
        return {
            "model": json.dumps(dataclasses.asdict(self.decoder.config)),
            "settings": json.dumps(dataclasses.asdict(fixed)),
            "steps": str(self.n_steps),
        }

    def _save(self) -> None:
        for name in ("metrics.jsonl", "samples.jsonl"):  # a checkpoint must not outlive what led to it
            if (path := self.folder / name).exists():
                with path.open("ab") as file:
                    os.fsync(file.fileno())
        save_checkpoint(self._checkpoint, self.decoder, self.optimizer, {"step": str(self.step), **self._identity()})

    def _resume(self) -> None:
        if self._checkpoint.is_file():
            self.step = int(load_checkpoint(self._checkpoint, self.decoder, self.optimizer, self._identity())["step"])
        self._metrics = trim_metrics(self.folder / "metrics.jsonl", self.step)
        evaluated = {m["step"] for m in self._metrics if m.get("evaluation")}
        if not self._checkpoint.is_file():  # killed before the first one
            self._metrics, evaluated = [], set()
            write_atomically(self.folder / "metrics.jsonl", "")
        kept = [s for s in trim_metrics(self.folder / "samples.jsonl", self.step) if s["step"] in evaluated]
        write_atomically(self.folder / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in kept))
        share, n = self._replay_share, self.settings.rows_per_step
        n_replayed = math.floor(self.step * n * share)
        self._own.skip(self.step * n - n_replayed)
        if self._replayed:
            self._replayed.skip(n_replayed)


def _peak_memory_mb() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
