"""Settings as frozen dataclasses: the decoder's shape, how to sample, how to train. Knows nothing of torch."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import InputError, ModelError

CHECKOUT = Path(__file__).resolve().parent.parent
MIN_CONTEXT, MAX_CONTEXT = 32, 2048  # tokens, of a model from elsewhere
BUNDLED_WEIGHTS = CHECKOUT / "weights"

# What each choice field of ModelConfig may say; model/decoder.py holds the matching modules.
DECODER_CHOICES = {
    "norm": ("rmsnorm",),
    "position": ("rope",),
    "mlp": ("swiglu",),
    "attention": ("softmax",),
}


def user_home() -> Path:
    """The folder of the user's own models and caches: TALELOOM_HOME, else where the platform keeps such data."""
    if home := os.environ.get("TALELOOM_HOME"):
        return Path(home).expanduser()
    import platformdirs  # here, so that training runs on machines that have torch and little else

    return Path(platformdirs.user_data_dir("taleloom"))


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. Field names are Hugging Face Llama's, so config.json opens in `transformers` as it is.

    Raises ValueError naming field, value and alternatives when a field cannot be.
    """

    vocab_size: int = 4096
    hidden_size: int = 320
    intermediate_size: int = 896
    num_hidden_layers: int = 6
    num_attention_heads: int = 10
    num_key_value_heads: int = 5
    head_dim: int = 32
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    norm: str = "rmsnorm"
    position: str = "rope"
    mlp: str = "swiglu"
    attention: str = "softmax"

    def __post_init__(self) -> None:
        for name, allowed in DECODER_CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"ModelConfig.{name} is {value!r}; it can be one of {', '.join(allowed)}")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"ModelConfig.{name} is {value!r}; it must be a whole number of at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"ModelConfig.num_key_value_heads is {self.num_key_value_heads}; "
                f"it must divide num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig.head_dim is {self.head_dim}; rotary positions need an even number")

    @classmethod
    def from_hf(cls, fields: dict[str, Any]) -> ModelConfig:
        """Read a Hugging Face `config.json`.

        Raises:
            ModelError: it is no Llama-style decoder, or it asks for something this decoder does not do.
        """
        kind = fields.get("model_type")
        if kind != "llama":
            raise ModelError(f"This model is of type {kind!r}. Taleloom opens Llama-style models (model_type 'llama').")
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ModelError("config.json does not describe a model Taleloom can build: odd rotary settings.")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        unsupported = {
            "rope_type": rope_type != "default",
            "attention_bias": bool(fields.get("attention_bias")),
            "mlp_bias": bool(fields.get("mlp_bias")),
            "hidden_act": fields.get("hidden_act", "silu") != "silu",
        }
        if any(unsupported.values()):
            names = ", ".join(name for name, bad in unsupported.items() if bad)
            raise ModelError(f"This Llama model uses settings that Taleloom's decoder does not have: {names}.")
        try:
            known = {f.name: fields[f.name] for f in dataclasses.fields(cls) if fields.get(f.name) is not None}
            known["rope_theta"] = float(rope.get("rope_theta", fields.get("rope_theta", 10000.0)))
            n_heads = fields["num_attention_heads"]
            known.setdefault("num_key_value_heads", n_heads)
            known.setdefault("head_dim", fields["hidden_size"] // n_heads)
            known.setdefault("tie_word_embeddings", False)
            # Longer contexts than stories need would only cost memory: the cache is allocated whole.
            known["max_position_embeddings"] = min(known["max_position_embeddings"], MAX_CONTEXT)
            config = cls(**known)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ModelError(f"config.json does not describe a model Taleloom can build: {error}") from error
        if config.max_position_embeddings < MIN_CONTEXT:
            raise ModelError(f"The model's context is {config.max_position_embeddings} tokens, too few for a story.")
        return config

    def to_hf(self) -> dict[str, Any]:
        """The same settings as a Hugging Face `config.json` for `LlamaForCausalLM`."""
        fields = dataclasses.asdict(self)
        theta = fields.pop("rope_theta")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **fields,
            # transformers 5 reads rope_parameters, older releases and other engines read rope_theta.
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "float16",
            "torch_dtype": "float16",
        }

    @property
    def n_parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        width, head = self.hidden_size, self.head_dim
        attention = width * head * 2 * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * width * self.intermediate_size + 2 * width
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + width


@dataclass(frozen=True)
class SamplingParams:
    """How to pick each next token.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those filters off; repetition_penalty 1 does too.
    A seed of None is replaced by a drawn one when a story starts, so that every story can be told again.

    Raises InputError with a sentence for the reader when a value cannot be used.
    """

    max_tokens: int = 320
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    seed: int | None = None

    MAX_TOKENS_LIMIT = 4096
    SEED_LIMIT = 2**63

    def __post_init__(self) -> None:
        self._check_whole("max_tokens", 1, self.MAX_TOKENS_LIMIT)
        self._check_whole("top_k", 0, 1_000_000)
        self._check_number("temperature", 0.0, 10.0)
        if 0 < self.temperature < 0.01:
            raise InputError("temperature is too close to 0. Use 0 for the likeliest words, or a number from 0.01.")
        self._check_number("top_p", 0.0, 1.0)
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("repetition_penalty", 0.1, 10.0)
        if self.top_p == 0:
            raise InputError("top_p is 0, which leaves no word to choose from. Use a number above 0, up to 1.")
        if self.seed is not None:
            self._check_whole("seed", 0, self.SEED_LIMIT - 1)

    def _check_whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InputError(f"{name} is {value!r}. Use a whole number from {low} to {high}.")

    def _check_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not low <= value <= high:
            raise InputError(f"{name} is {value!r}. Use a number from {low:g} to {high:g}.")


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. Learning rates follow a warm-up, a constant stretch and a linear decay to zero."""

    rows_per_step: int = 16  # sequences of `context` tokens behind one optimizer step, over all processes
    rows_per_pass: int = 8  # sequences in one forward pass; fewer means gradient accumulation
    muon_lr: float = 0.008  # for matrices; update RMS as AdamW's
    adamw_lr: float = 0.003  # for embeddings and norm gains
    weight_decay: float = 0.1
    dropout: float = 0.0  # of what each layer adds
    warmup_steps: int = 50
    decay_fraction: float = 0.3
    max_grad_norm: float = 1.0
    seed: int = 1
    max_steps: int | None = None  # None reads the prepared data once, in its order
    eval_every: int = 200
    save_every: int = 100
    compile: bool = False  # torch.compile the step: a minute at the start, then a third faster on a CPU

    def lr_scale(self, step: int, n_steps: int) -> float:
        """Multiplier of the learning rates at `step` (from 0) of `n_steps`."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay = (n_steps - step) / max(1.0, self.decay_fraction * n_steps)
        return min(warmup, decay, 1.0)


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class FineTuneSettings:
    """How a storyteller learns a reader's own stories; see model/training/finetune.py.

    Raises InputError with a sentence for the reader when a value cannot be used.
    """

    method: str = "full"  # "full": every weight; "lora": low-rank additions (Hu et al. 2021), merged at the end
    epochs: float = 12.0  # times the own stories are read, at most
    max_steps: int | None = None  # optimizer steps at most
    learning_rate: float = 0.0004  # Muon's for matrices; AdamW's is a third of it, with LoRA four times
    schedule: str = "linear"  # after the warm-up: "linear" or "cosine" down to zero, or "constant"
    warmup_share: float = 0.05
    rows_per_step: int = 4  # sequences behind one optimizer step
    rows_per_pass: int = 4  # sequences in memory at once; fewer means gradient accumulation
    weight_decay: float = 0.1
    dropout: float = 0.1  # of what each layer adds
    replay_share: float = 0.5  # part of what is read that is the original stories, against forgetting
    frozen_layers: int = 0  # the lowest ones
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = LORA_TARGETS
    evaluations: int = 10  # over the whole run: held-out loss, the test ideas told again
    patience: int = 3  # evaluations without a better held-out loss before it ends; 0 never does
    seed: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        self._check_choice("method", ("full", "lora"))
        self._check_choice("schedule", ("linear", "cosine", "constant"))
        self._check_number("epochs", 0.1, 1000)
        self._check_number("learning_rate", 1e-6, 0.1)
        for name in ("warmup_share", "dropout", "replay_share"):
            self._check_number(name, 0, 0.9)
        self._check_number("weight_decay", 0, 10)
        self._check_number("lora_alpha", 0, 1024)
        for name, low, high in (
            *((("max_steps", 1, 10_000_000),) if self.max_steps is not None else ()),
            ("rows_per_step", 1, 256),
            ("rows_per_pass", 1, 256),
            ("frozen_layers", 0, 1000),
            ("lora_rank", 0, 256),
            ("evaluations", 1, 200),
            ("patience", 0, 200),
            ("seed", 0, 2**31 - 1),
        ):
            self._check_number(name, low, high)
            if not isinstance(getattr(self, name), int):
                raise InputError(f"{name} is {getattr(self, name)!r}. Use a whole number.")
        unknown = set(self.lora_targets) - set(LORA_TARGETS)
        if unknown or not self.lora_targets:
            raise InputError(f"lora_targets can hold {', '.join(LORA_TARGETS)}, and at least one of them.")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise InputError(f"{name} is {getattr(self, name)!r}. It can be {' or '.join(allowed)}.")

    def _check_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not low <= value <= high:
            raise InputError(f"{name} is {value!r}. Use a number from {low:g} to {high:g}.")


# What the fine-tune page and `taleloom finetune --preset` offer by name. However many stories there are, two CPU cores
# take about 3, 25 and 140 minutes for that many steps.
FINE_TUNE_PRESETS = {
    "quick": FineTuneSettings(epochs=10, max_steps=200, evaluations=6),
    "good": FineTuneSettings(epochs=20, max_steps=1_500, evaluations=12),
    "thorough": FineTuneSettings(epochs=60, max_steps=9_000, evaluations=24, patience=6),
}


@dataclass(frozen=True)
class TrainingLimits:
    """What visitors may ask of training. None is no limit; days are the last 24 hours, deleted jobs counted.

    Raises InputError when a value cannot be used.
    """

    mode: str = "open"  # "off": nobody trains; "limited": within LIMITED; "open": for one's own machine
    max_upload_mb: int = 50
    max_job_tokens: int | None = None  # of the stories to train on
    max_job_steps: int | None = None
    max_rows_per_step: int | None = None
    max_rows_per_pass: int | None = None
    max_evaluations: int | None = None
    max_jobs_per_visitor: int | None = None  # a day
    max_jobs_per_day: int | None = None  # of all visitors
    max_queue: int | None = None  # jobs that wait
    disk_quota_mb: int | None = None  # of all jobs, storytellers and downloads together
    sign_in: bool = False  # only visitors who are signed in

    def __post_init__(self) -> None:
        if self.mode not in ("off", "limited", "open"):
            raise InputError(f"TALELOOM_TRAINING is {self.mode!r}. It can be off, limited or open.")
        for name, value in dataclasses.asdict(self).items():
            if name not in ("mode", "sign_in") and value is not None and (not isinstance(value, int) or value < 0):
                raise InputError(f"{name} is {value!r}. Use a whole number of at least 0.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> TrainingLimits:
        """TALELOOM_TRAINING (on a Space it is off unless asked for), TALELOOM_TRAINING_SIGN_IN=1 and one variable a
        number, such as TALELOOM_MAX_UPLOAD_MB; empty ones count as unset.

        Raises:
            InputError: a variable holds something else than it can.
        """
        mode = environment.get("TALELOOM_TRAINING") or ("off" if environment.get("SPACE_ID") else "open")
        values: dict[str, Any] = dict(LIMITED) if mode == "limited" else {}
        for field in dataclasses.fields(cls):
            name = f"TALELOOM_{field.name.upper()}"
            if field.name not in ("mode", "sign_in") and (value := environment.get(name)):
                if not value.isdecimal():
                    raise InputError(f"{name} is {value!r}. Use a whole number of at least 0.")
                values[field.name] = int(value)
        sign_in = environment.get("TALELOOM_TRAINING_SIGN_IN", "").lower() in ("1", "true", "yes", "on")
        return cls(mode=mode, sign_in=sign_in, **values)


# With two shared cores a job of so many steps takes some five minutes with the presets' rows, ten with the most.
LIMITED = {
    "max_upload_mb": 5,
    "max_job_tokens": 500_000,
    "max_job_steps": 500,
    "max_rows_per_step": 8,
    "max_rows_per_pass": 8,
    "max_evaluations": 20,
    "max_jobs_per_visitor": 3,
    "max_jobs_per_day": 50,
    "max_queue": 5,
    "disk_quota_mb": 10_000,
}
