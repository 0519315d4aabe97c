"""The training loop: read rows in order, step, evaluate, checkpoint, resume exactly.

Several processes (torchrun) share each step's rows and add up their gradients; process 0 writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F

from model.checkpoint import load_decoder, load_tokenizer, save_model, weight_files, write_atomically
from model.config import ModelConfig, TrainingConfig
from model.decoder import Decoder, Layer
from model.errors import ModelError, TaleloomError
from model.evaluation.loss import bits_per_byte
from model.training.data import PreparedData
from model.training.optimizer import Optimizer
from model.training.patterns import Patterns
from model.training.twins import (
    LIKELIHOOD_SHARE,
    WRITTEN_SHARE,
    TwinStream,
    TwinText,
    choice_accuracy,
    choice_loss,
    padded,
    read_twins,
)

N_HELD_OUT = 100  # stories scored at each evaluation
TEACHER_SHARE = 0.9  # of the loss, where there are teachers: what they say instead of the text
TWINS_PER_STEP = 40
TWINS_WEIGHT = 0.12  # of their mean loss beside the text's; it falls to a half in the second half of the run
N_HELD_OUT_DRAWN = 300  # twins drawn from held-out patterns to be judged by, the same in all runs
# Parts of the run: until when the drawn twins are the easiest, and from when they are of all patterns.
EASIEST_UNTIL, ALL_FROM = 0.2, 0.6
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def padded_targets(rows: np.ndarray, pad: int) -> np.ndarray:
    """What is to be predicted after each token of rows [n, context + 1] but the last; -100 where that is padding."""
    return np.where(rows[:, 1:] == pad, -100, rows[:, 1:])


def summed_loss(decoder: Decoder, inputs_bt: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, in bfloat16 where that is safe, summed over the targets that are not -100."""
    with torch.autocast(inputs_bt.device.type, torch.bfloat16):
        logits_btv = decoder(inputs_bt)
    return F.cross_entropy(logits_btv.float().flatten(0, 1), targets_bt.flatten(), reduction="sum")


def distilled_loss(
    decoder: Decoder, teachers: Sequence[Decoder], share: float, inputs_bt: torch.Tensor, targets_bt: torch.Tensor
) -> torch.Tensor:
    """As `summed_loss`, but `share` of it is the cross-entropy to the teachers' mean distribution instead of the text.

    Knowledge distillation (Hinton et al. 2015, section 2, at temperature 1): the pupil is shown all likely words
    instead of one, and can get better than its teachers where text is short (docs/training.md has figures).
    """
    with torch.autocast(inputs_bt.device.type, torch.bfloat16):
        logits_btv = decoder(inputs_bt)
        with torch.no_grad():
            taught = [teacher(inputs_bt).float().softmax(-1) for teacher in teachers]
    log_probs_btv = logits_btv.float().log_softmax(-1)
    hard = F.nll_loss(log_probs_btv.flatten(0, 1), targets_bt.flatten(), reduction="sum")
    soft_bt = -(sum(taught) / len(teachers) * log_probs_btv).sum(-1)
    return (1 - share) * hard + share * (soft_bt * (targets_bt >= 0)).sum()


def add_gradients(
    loss: Loss, rows: np.ndarray, targets: np.ndarray, chosen: list[int], rows_per_pass: int, device: torch.device
) -> torch.Tensor:
    """Add up the chosen rows' gradients, some at a time; returns their share of the mean loss over all targets."""
    n_targets = max(1, int((targets >= 0).sum()))
    total = torch.zeros((), device=device)
    for i in range(0, len(chosen), rows_per_pass):
        some = chosen[i : i + rows_per_pass]
        inputs_bt = torch.from_numpy(rows[some, :-1]).to(device)
        targets_bt = torch.from_numpy(targets[some]).to(device)
        mean = loss(inputs_bt, targets_bt) / n_targets
        mean.backward()
        total += mean.detach()
    return total


def save_checkpoint(path: Path, decoder: Decoder, optimizer: Optimizer, metadata: dict[str, str]) -> None:
    """Write what a run needs to go on: weights, the optimizer's state, and what `metadata` says."""
    tensors = {f"model.{name}": w for name, w in decoder.state_dict().items() if name != "lm_head.weight"}
    if not decoder.config.tie_word_embeddings:
        tensors["model.lm_head.weight"] = decoder.lm_head.weight
    tensors |= {f"optimizer.{name}": w for name, w in optimizer.state().items()}
    tensors = {name: w.detach().cpu().contiguous() for name, w in tensors.items()}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_checkpoint(path: Path, decoder: Decoder, optimizer: Optimizer, identity: dict[str, str]) -> dict[str, str]:
    """Take back what `save_checkpoint` wrote; returns its metadata.

    Raises:
        ModelError: it is damaged, or its metadata differ from `identity`: it belongs to another run.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is damaged ({error}). Delete it to start again.") from error
    # A checkpoint from before there were teachers, or twins, had none.
    changed = [name for name, value in identity.items() if metadata.get(name, "[]") != value]
    if changed:
        raise ModelError(
            f"{path.parent} holds a run with other settings ({', '.join(changed)}). Choose another folder."
        )
    weights = {k.removeprefix("model."): w for k, w in tensors.items() if k.startswith("model.")}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    decoder.load_state_dict(weights)
    optimizer.load_state({k.removeprefix("optimizer."): w for k, w in tensors.items() if k.startswith("optimizer.")})
    return metadata


def trim_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop what was written after `step`, or only half, and return the rest: a resumed run writes it anew."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a kill can leave half a line
                if (record := json.loads(line))["step"] <= step:
                    kept.append(record)
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


class TrainingRun:
    """One run in its folder: checkpoint.safetensors, metrics.jsonl, and the finished model in `model/`.

    `report` receives a dict per step: step, steps, loss, lr_scale, tokens_per_second, eta_s and, when evaluated, what
    `evaluate` finds. `initial` is a model folder whose weights the run starts from, instead of random ones;
    `teachers` are model folders to learn from beside the text, with the same tokenizer; the loss is then a mixture (see
    distilled_loss) and does not compare with a run's without them. `twins` and `patterns`
    are files of endings to choose between at each step (see twins.py, patterns.py); `choice_loss` is reported then.
    """

    def __init__(
        self,
        folder: Path,
        data: PreparedData,
        model_config: ModelConfig,
        config: TrainingConfig,
        device: str = "cpu",
        report: Callable[[dict[str, Any]], None] = lambda _: None,
        initial: Path | None = None,
        teachers: Sequence[Path] = (),
        twins: Path | None = None,
        patterns: Path | None = None,
    ):
        self.folder, self.data, self.config, self.report = Path(folder), data, config, report
        self.rank = int(os.environ.get("RANK", 0))
        self.n_processes = int(os.environ.get("WORLD_SIZE", 1))
        if self.n_processes > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if config.rows_per_step % self.n_processes:
            raise TaleloomError(
                f"{config.rows_per_step} rows per step cannot be shared by {self.n_processes} processes."
            )
        torch.manual_seed(config.seed)
        self.decoder = Decoder(model_config) if initial is None else load_decoder(initial)
        if self.decoder.config != model_config:
            raise TaleloomError(f"{initial} has another shape than the model to be trained.")
        self.decoder.to(self.device)
        for layer in self.decoder.model.layers:
            assert isinstance(layer, Layer)
            layer.dropout = config.dropout
        loss = partial(summed_loss, self.decoder)
        if teachers:
            loss = partial(distilled_loss, self.decoder, [self._teacher(t) for t in teachers], TEACHER_SHARE)
        self._taught_by = sorted(hashlib.sha256(f.read_bytes()).hexdigest() for t in teachers for f in weight_files(t))
        choice = partial(choice_loss, self.decoder)
        self._loss: Loss = torch.compile(loss) if config.compile else loss
        self._choice_loss = torch.compile(choice, dynamic=False) if config.compile else choice
        self.optimizer = Optimizer(self.decoder, config.muon_lr, config.adamw_lr, config.weight_decay)
        self.n_steps = min(len(data.rows) // config.rows_per_step, config.max_steps or 2**62)
        if not self.n_steps:
            raise TaleloomError(f"The data fills {len(data.rows)} rows, less than one step of {config.rows_per_step}.")
        self.step = 0
        files = [path for path in (twins, patterns) if path]
        self._twins_read: list[Any] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        if files:
            self._twins_read += [TWINS_PER_STEP, TWINS_WEIGHT, LIKELIHOOD_SHARE, WRITTEN_SHARE, EASIEST_UNTIL, ALL_FROM]
        self._held_out_twins: dict[str, list[TwinText]] = {}
        if twins:
            self._held_out_twins["held_out_choices"] = read_twins(twins, held_out=True)
        if patterns:
            rng, judged = random.Random(0), Patterns(patterns, held_out=True)
            self._held_out_twins["held_out_drawn_choices"] = [judged.draw(rng) for _ in range(N_HELD_OUT_DRAWN)]
        self._twins = self._twin_stream(twins, patterns) if files else None

    def _twin_stream(self, twins: Path | None, patterns: Path | None) -> TwinStream:
        learnt = Patterns(patterns) if patterns else None

        def draw(rng: random.Random, done: float) -> TwinText:
            assert learnt
            return learnt.draw(rng, min(1.0, max(0.0, (done - EASIEST_UNTIL) / (ALL_FROM - EASIEST_UNTIL))))

        return TwinStream(
            read_twins(twins) if twins else [],
            draw if learnt else None,
            self.data.tokenizer,
            TWINS_PER_STEP,
            self.n_steps,
            self.data.context,
            self.config.seed,
        )

    def _teacher(self, folder: Path) -> Decoder:
        decoder = load_decoder(folder, str(self.device))
        if load_tokenizer(folder, decoder.config).serialized != self.data.tokenizer.serialized:
            raise TaleloomError(f"{folder} cannot teach here: its tokenizer is not the one that the data is made with.")
        if decoder.config.vocab_size != self.decoder.config.vocab_size:
            raise TaleloomError(f"{folder} cannot teach here: its vocabulary has another size than the pupil's.")
        if decoder.config.max_position_embeddings < self.data.context:
            raise TaleloomError(f"{folder} cannot teach here: its context is shorter than the data's.")
        return decoder.eval().requires_grad_(False)

    def run(self) -> Decoder:
        """Train to the end, from the last checkpoint where there is one; returns the decoder, saved in `model/`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.decoder.train()
        while self.step < self.n_steps:
            started = time.perf_counter()
            scale = self.config.lr_scale(self.step, self.n_steps)
            if self.config.dropout:
                torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # the same after a resumption
            loss, choice, grad_norm = self._gradients()
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise TaleloomError(
                    f"The loss at step {self.step} is not a number. Resume with a lower learning rate; "
                    "the last checkpoint is good."
                )
            self.optimizer.step(scale)
            self.step += 1
            seconds = time.perf_counter() - started
            record = {
                "step": self.step,
                "steps": self.n_steps,
                "loss": loss,
                "grad_norm": grad_norm,
                "lr_scale": scale,
                "tokens_per_second": self.config.rows_per_step * self.data.context / seconds,
                "eta_s": (self.n_steps - self.step) * seconds,
            }
            if self._twins:
                record["choice_loss"] = choice
            last = self.step == self.n_steps
            if self.rank == 0 and (last or self.step % self.config.eval_every == 0):
                record |= self.evaluate()
            if self.rank == 0:
                with (self.folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
                self.report(record)
            if self.rank == 0 and (last or self.step % self.config.save_every == 0):
                self._save()
        if self.rank == 0:
            save_model(self.folder / "model", self.decoder, self.data.tokenizer)
        return self.decoder.eval()

    def _gradients(self) -> tuple[float, float, float]:
        """Accumulate the step's clipped gradients; returns the loss in nats per token, the twins' in nats per choice,
        and the norm before clipping."""
        config = self.config
        first = self.step * config.rows_per_step
        rows = np.asarray(self.data.rows[first : first + config.rows_per_step], np.int64)
        targets = padded_targets(rows, self.data.tokenizer.pad_id)
        mine = range(self.rank, len(rows), self.n_processes)
        total = add_gradients(self._loss, rows, targets, list(mine), config.rows_per_pass, self.device)
        choice = self._choice_gradients(self._twins) if self._twins else torch.zeros((), device=self.device)
        if self.n_processes > 1:
            dist.all_reduce(total)
            dist.all_reduce(choice)
            for parameter in self.decoder.parameters():
                dist.all_reduce(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), config.max_grad_norm)
        return total.item(), choice.item(), norm.item()

    def _choice_gradients(self, twins: TwinStream) -> torch.Tensor:
        """Add the gradients of this process's part of the step's twins; returns its part of their mean choice loss."""
        choices, length = twins.step(self.step)
        # A twin's two beginnings stay together.
        mine = [choice for i, choice in enumerate(choices) if i // 2 % self.n_processes == self.rank]
        weight = TWINS_WEIGHT * min(1.0, 1.5 - self.step / self.n_steps)
        per_pass = max(1, self.config.rows_per_pass * self.data.context // length)  # as many tokens as of stories
        total = torch.zeros((), device=self.device)
        for i in range(0, len(mine), per_pass):
            loss, choice = self._choice_loss(*padded(mine[i : i + per_pass], length, self.device))
            (weight / len(choices) * loss).backward()
            total += choice / len(choices)
        return total

    def evaluate(self) -> dict[str, float]:
        """Bits per byte on held-out stories, and the share of right choices of held-out twins, where there are any."""
        scores = {}
        self.decoder.eval()
        if self.data.held_out:
            texts = [row["text"] for row in self.data.held_out[:: max(1, len(self.data.held_out) // N_HELD_OUT)]]
            with torch.autocast(self.device.type, torch.bfloat16):
                found = bits_per_byte(self.decoder, self.data.tokenizer, texts)
            scores["held_out_bits_per_byte"] = found["bits_per_byte"]
        for name, twins in self._held_out_twins.items():
            if (share := choice_accuracy(self.decoder, twins, self.data.tokenizer)) is not None:
                scores[name] = share
        self.decoder.train()
        return scores

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _identity(self) -> dict[str, str]:
        """What must not change between a checkpoint and its resumption."""
        # The rates may change: that is how a run that diverged is rescued.
        free: dict[str, Any] = dict.fromkeys(("rows_per_pass", "eval_every", "save_every"), 1)
        fixed = dataclasses.asdict(dataclasses.replace(self.config, **free, muon_lr=0.0, adamw_lr=0.0))
        if not fixed["dropout"]:
            del fixed["dropout"]  # as in checkpoints from before there was any
        return {
            "model": json.dumps(dataclasses.asdict(self.decoder.config)),
            "training": json.dumps(fixed),
            "rows": str(self.data.rows.shape),
            "teachers": json.dumps(self._taught_by),
            "twins": json.dumps(self._twins_read),
        }

    def _save(self) -> None:
        save_checkpoint(self._checkpoint, self.decoder, self.optimizer, {"step": str(self.step), **self._identity()})

    def _resume(self) -> None:
        """Continue from the checkpoint, less metrics written after it; raises ModelError when it is another run's."""
        if self._checkpoint.is_file():
            metadata = load_checkpoint(self._checkpoint, self.decoder, self.optimizer, self._identity())
            self.step = int(metadata["step"])
        if self.rank == 0:
            trim_metrics(self.folder / "metrics.jsonl", self.step)
