"""The training loop: read rows in order, step, evaluate, checkpoint, resume exactly.

Several processes (torchrun) share each step's rows and add up their gradients; process 0 writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F

from model.checkpoint import load_decoder, save_model, write_atomically
from model.config import ModelConfig, TrainingConfig
from model.decoder import Decoder
from model.errors import ModelError, TaleloomError
from model.evaluation.loss import bits_per_byte
from model.training.data import PreparedData
from model.training.optimizer import Optimizer

N_HELD_OUT = 100  # stories scored at each evaluation


class TrainingRun:
    """One run in its folder: checkpoint.safetensors, metrics.jsonl, and the finished model in `model/`.

    `report` receives a dict per step: step, steps, loss, lr_scale, tokens_per_second, eta_s and, when evaluated,
    held_out_bits_per_byte. `initial` is a model folder whose weights the run starts from, instead of random ones.
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
        self._loss = torch.compile(self._summed_loss) if config.compile else self._summed_loss
        self.optimizer = Optimizer(self.decoder, config)
        self.n_steps = min(len(data.rows) // config.rows_per_step, config.max_steps or 2**62)
        if not self.n_steps:
            raise TaleloomError(f"The data fills {len(data.rows)} rows, less than one step of {config.rows_per_step}.")
        self.step = 0

    def run(self) -> Decoder:
        """Train to the end, from the last checkpoint where there is one; returns the decoder, saved in `model/`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.decoder.train()
        while self.step < self.n_steps:
            started = time.perf_counter()
            scale = self.config.lr_scale(self.step, self.n_steps)
            loss, grad_norm = self._gradients()
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
            last = self.step == self.n_steps
            if self.rank == 0 and (last or self.step % self.config.eval_every == 0) and self.data.held_out:
                record["held_out_bits_per_byte"] = self.evaluate()
            if self.rank == 0:
                with (self.folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
                self.report(record)
            if self.rank == 0 and (last or self.step % self.config.save_every == 0):
                self._save()
        if self.rank == 0:
            save_model(self.folder / "model", self.decoder, self.data.tokenizer)
        return self.decoder.eval()

    def _gradients(self) -> tuple[float, float]:
        """Accumulate the step's clipped gradients; returns the loss in nats per token and the norm before clipping."""
        config, pad = self.config, self.data.tokenizer.pad_id
        first = self.step * config.rows_per_step
        rows = np.asarray(self.data.rows[first : first + config.rows_per_step], np.int64)
        targets = np.where(rows[:, 1:] == pad, -100, rows[:, 1:])
        n_targets = int((targets >= 0).sum())
        total = torch.zeros((), device=self.device)
        mine = range(self.rank, len(rows), self.n_processes)
        for i in range(0, len(mine), config.rows_per_pass):
            chosen = list(mine[i : i + config.rows_per_pass])
            inputs_bt = torch.from_numpy(rows[chosen, :-1]).to(self.device)
            targets_bt = torch.from_numpy(targets[chosen]).to(self.device)
            loss = self._loss(inputs_bt, targets_bt) / n_targets
            loss.backward()
            total += loss.detach()
        if self.n_processes > 1:
            dist.all_reduce(total)
            for parameter in self.decoder.parameters():
                dist.all_reduce(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), config.max_grad_norm)
        return total.item(), norm.item()

    def _summed_loss(self, inputs_bt: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats, summed over the targets that are not padding (-100)."""
        with torch.autocast(self.device.type, torch.bfloat16):
            logits_btv = self.decoder(inputs_bt)
        return F.cross_entropy(logits_btv.float().flatten(0, 1), targets_bt.flatten(), reduction="sum")

    def evaluate(self) -> float:
        """Bits per byte on held-out stories."""
        texts = [row["text"] for row in self.data.held_out[:: max(1, len(self.data.held_out) // N_HELD_OUT)]]
        self.decoder.eval()
        with torch.autocast(self.device.type, torch.bfloat16):
            score = bits_per_byte(self.decoder, self.data.tokenizer, texts)["bits_per_byte"]
        self.decoder.train()
        return score

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _identity(self) -> dict[str, str]:
        """What must not change between a checkpoint and its resumption."""
        # The rates may change: that is how a run that diverged is rescued.
        free: dict[str, Any] = dict.fromkeys(("rows_per_pass", "eval_every", "save_every"), 1)
        fixed = dataclasses.replace(self.config, **free, muon_lr=0.0, adamw_lr=0.0)
        return {
            "model": json.dumps(dataclasses.asdict(self.decoder.config)),
            "training": json.dumps(dataclasses.asdict(fixed)),
            "rows": str(self.data.rows.shape),
        }

    def _save(self) -> None:
        tensors = {f"model.{name}": w for name, w in self.decoder.state_dict().items() if name != "lm_head.weight"}
        if not self.decoder.config.tie_word_embeddings:
            tensors["model.lm_head.weight"] = self.decoder.lm_head.weight
        tensors |= {f"optimizer.{name}": w for name, w in self.optimizer.state().items()}
        tensors = {name: w.detach().cpu().contiguous() for name, w in tensors.items()}
        metadata = {"step": str(self.step), **self._identity()}
        write_atomically(self._checkpoint, safetensors.torch.save(tensors, metadata))

    def _resume(self) -> None:
        """Continue from the checkpoint, less metrics written after it; raises ModelError when it is another run's."""
        metrics = self.folder / "metrics.jsonl"
        if self._checkpoint.is_file():
            try:
                with safetensors.safe_open(self._checkpoint, "pt") as file:
                    metadata = file.metadata()
                tensors = safetensors.torch.load_file(self._checkpoint)
            except safetensors.SafetensorError as error:
                raise ModelError(f"{self._checkpoint} is damaged ({error}). Delete it to start again.") from error
            changed = [name for name, value in self._identity().items() if metadata.get(name) != value]
            if changed:
                raise ModelError(
                    f"{self.folder} holds a run with other settings ({', '.join(changed)}). Choose another folder."
                )
            weights = {k.removeprefix("model."): w for k, w in tensors.items() if k.startswith("model.")}
            weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
            self.decoder.load_state_dict(weights)
            state = {k.removeprefix("optimizer."): w for k, w in tensors.items() if k.startswith("optimizer.")}
            self.optimizer.load_state(state)
            self.step = int(metadata["step"])
        if self.rank == 0 and metrics.exists():
            kept = []
            for line in metrics.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a kill can leave half a line
                    if json.loads(line)["step"] <= self.step:
                        kept.append(line + "\n")
            write_atomically(metrics, "".join(kept))
