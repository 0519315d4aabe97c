"""What stories are worth before a fine-tune starts: counts, warnings, and what it will take. Knows nothing of torch."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sentencepiece

from model.config import FineTuneSettings
from model.errors import InputError
from model.intake_formats import DEFAULT_LIMITS, Limits
from model.intake_rows import Intake
from model.text import words
from model.tokenizer import Tokenizer
from model.training.contamination import contamination
from model.training.data import pack, token_pieces

# Common in any English prose, and in no other language together.
FUNCTION_WORDS = frozenset(
    """the and of to a i in it is was my he she they you we that his her their with for on at but not so then when what
    him them there this from into out up all had have are were be as""".split()
)
ENGLISH_SHARE = 0.25  # of all words; English stories have about 0.4 of these, other languages at most 0.1
MIN_WORDS_TO_JUDGE = 30
MAX_UNKNOWN_SHARE = 0.02
SHORT_STORY_TOKENS, FEW_TOKENS = 20, 2_000
LEAKED_SHARE = 0.05  # of the held-out stories, when they are nearly the same as some trained on

# Of a fine-tune's process, measured on a CPU with weights of 8.3 M; see `estimate`.
PROCESS_MB = 600  # what an evaluation needs at once is in it
FULL_BYTES, LORA_BYTES = 34, 17  # per weight: itself, gradient, optimizer's state, and a checkpoint being written
ACTIVATION_BYTES = 60  # per token in memory at once, times the square root of the number of weights
FULL_FILE_BYTES, LORA_FILE_BYTES = 9, 5
MODEL_FILE_BYTES = 2
FORWARD_SHARE = 1 / 3  # of a training step's work
N_SCORED = 100, 20, 100  # stories at an evaluation, at most: held out, trained on, original


@dataclass(frozen=True)
class Check:
    """Numbers about stories. Tokens are of the text alone; `n_rows`: sequences as training packs them."""

    n_stories: int
    n_train: int
    n_test: int
    n_tokens: int  # of the stories to train on
    shortest: int  # tokens of a story, of all
    median: int
    longest: int
    n_too_long: int  # for the context: cut at paragraph ends
    n_rows: int  # that one epoch fills
    context: int
    unknown_share: float  # of the tokens: single bytes of characters that are not in the vocabulary
    duplicates: int  # stories that came before
    english_share: float  # of the words: common English function words
    looks_english: bool
    contamination: dict[str, Any] | None  # how much of `held_out` the stories hold; None when nothing was given
    n_leaked: int  # held-out own stories that are nearly the same as some trained on
    warnings: list[str]


@dataclass(frozen=True)
class Estimate:
    """What a fine-tune will take at most; early stopping makes it less."""

    n_steps: int
    seconds: float
    memory_mb: float
    checkpoint_mb: float  # on disk: the job's checkpoint, its best storyteller and a copy of the one it began from


def check(
    intake: Intake,
    tokenizer: Tokenizer,
    held_out: Sequence[str] = (),
    *,
    context: int = 512,
    limits: Limits = DEFAULT_LIMITS,
) -> Check:
    """Measure what was read, for a storyteller with this tokenizer and context.

    Args:
        held_out: texts by which forgetting is judged; they must not be among those trained on.

    Raises:
        InputError: more tokens to train on than `limits` allow.
    """
    rows = intake.rows
    lengths, n_tokens, n_unknown, n_too_long, n_words, n_common = [], 0, 0, 0, 0, 0
    pieces: list[list[int]] = []
    unknown = _byte_ids(tokenizer)
    for row in rows:
        tokens = tokenizer.encode(row["text"])
        lengths.append(len(tokens))
        n_unknown += sum(token in unknown for token in tokens)
        n_too_long += len(tokens) + 2 > context + 1
        its_words = words(row["text"])
        n_words += len(its_words)
        n_common += sum(word in FUNCTION_WORDS for word in its_words)
        if row["split"] == "train":
            n_tokens += len(tokens)
            pieces += token_pieces(row["text"], row["prompt"], tokenizer, context + 1)
    if limits.max_tokens is not None and n_tokens > limits.max_tokens:
        raise InputError(
            f"The stories to train on have {n_tokens:,} tokens; {limits.max_tokens:,} are the most here. Give fewer."
        )
    train = [row["text"] for row in rows if row["split"] == "train"]
    test = [row["text"] for row in rows if row["split"] == "test"]
    english_share = n_common / max(1, n_words)
    found = contamination(train, held_out) if held_out else None
    result = Check(
        n_stories=len(rows),
        n_train=len(train),
        n_test=len(test),
        n_tokens=n_tokens,
        shortest=min(lengths),
        median=round(statistics.median(lengths)),
        longest=max(lengths),
        n_too_long=n_too_long,
        n_rows=sum(1 for _ in pack(pieces, context + 1, tokenizer.pad_id)),
        context=context,
        unknown_share=n_unknown / max(1, sum(lengths)),
        duplicates=sum(count - 1 for count in Counter(row["text"] for row in rows).values()),
        english_share=english_share,
        looks_english=english_share >= ENGLISH_SHARE or n_words < MIN_WORDS_TO_JUDGE,
        contamination=found,
        n_leaked=contamination(train, test)["near"] if test else 0,
        warnings=[],
    )
    result.warnings.extend(_warnings(result))
    return result


def _byte_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that spell a single byte, for characters that have no piece of their own."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.serialized)
    return frozenset(token for token in range(tokenizer.vocab_size) if processor.IsByte(token))


def _warnings(found: Check) -> list[str]:
    warnings = []
    if found.median < SHORT_STORY_TOKENS:
        warnings.append(
            f"Half of the stories have {found.median:,} tokens or fewer: too short to learn how a story goes. "
            "Whole stories of 100 words and more teach best."
        )
    if found.n_tokens < FEW_TOKENS:
        warnings.append(
            f"There are only {found.n_tokens:,} tokens to learn from, so it will soon know them by heart. Ten stories "
            "or more teach a style better."
        )
    if found.n_too_long:
        warnings.append(
            f"{found.n_too_long:,} of {found.n_stories:,} stories are longer than the {found.context:,} tokens the "
            "storyteller sees at once. Training cuts them at paragraph ends, and uses their prompts not at all."
        )
    if found.duplicates:
        warnings.append(f"{found.duplicates:,} stories come more than once, and will be learned more than the others.")
    if found.unknown_share > MAX_UNKNOWN_SHARE:
        warnings.append(
            f"{found.unknown_share:.0%} of the tokens spell characters the storyteller does not know (other scripts, "
            "accents, symbols). It learns these slowly."
        )
    if not found.looks_english:
        warnings.append("This does not look like English, the only language the storyteller knows. Expect little.")
    if found.contamination and (n := max(found.contamination["exact"], found.contamination["near"])):
        warnings.append(
            f"{n:,} of the {found.contamination['stories']:,} stories by which forgetting is measured are among "
            "yours, so that measure will look better than it is."
        )
    if found.n_leaked > LEAKED_SHARE * found.n_test:
        warnings.append(
            f"{found.n_leaked:,} of the {found.n_test:,} held-out stories are nearly the same as some that are trained "
            "on, so their score will look better than it is."
        )
    return warnings


def estimate(check: Check, settings: FineTuneSettings, tokens_per_second: float, n_parameters: int) -> Estimate:
    """What a fine-tune of these stories will take, at most.

    - steps = epochs x rows of an epoch / own rows of a step (rows_per_step less the replayed share), up to max_steps;
    - seconds = what the steps and the evaluations read / `tokens_per_second`, where reading to score costs a third of
      reading to learn; telling the test ideas is not in it;
    - memory = 600 MB + 34 bytes a weight (LoRA: 17) + 60 bytes x sqrt(n_parameters) for each token in one pass,
      above the peaks measured with weights of 8.3 M (823 MB with one row in a pass, 967 to 1,205 with four);
    - disk = 9 bytes a weight (LoRA: 5) for the checkpoint, 2 each for the best storyteller and the base's copy.

    Args:
        tokens_per_second: of training, padding counted, as measured on this machine.
        n_parameters: weights of the storyteller.
    """
    own_rows_per_step = settings.rows_per_step * (1 - settings.replay_share)
    n_steps = max(1, math.ceil(settings.epochs * check.n_rows / own_rows_per_step))
    n_steps = min(n_steps, settings.max_steps or n_steps)
    n_read = n_steps * settings.rows_per_step * (check.context + 1)
    n_stories = min(check.n_test, N_SCORED[0]) + min(check.n_train, N_SCORED[1]) + N_SCORED[2]
    n_scored = (min(settings.evaluations, n_steps) + 1) * n_stories * min(check.median + 2, check.context + 1)
    rows_at_once = min(settings.rows_per_pass, settings.rows_per_step)
    lora = settings.method == "lora"
    activations = rows_at_once * (check.context + 1) * ACTIVATION_BYTES * math.sqrt(n_parameters)
    weights = n_parameters * (LORA_BYTES if lora else FULL_BYTES)
    files = n_parameters * ((LORA_FILE_BYTES if lora else FULL_FILE_BYTES) + 2 * MODEL_FILE_BYTES)
    return Estimate(
        n_steps=n_steps,
        seconds=(n_read + FORWARD_SHARE * n_scored) / max(1e-9, tokens_per_second),
        memory_mb=PROCESS_MB + (weights + activations) / 1e6,
        checkpoint_mb=files / 1e6,
    )
