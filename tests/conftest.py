"""Fixtures for all tests: a tiny tokenizer and random model, made once, and the bundled weights."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.checkpoint import save_model
from model.config import BUNDLED_WEIGHTS, ModelConfig
from model.decoder import Decoder
from model.tokenizer import Tokenizer

NAMES = ["Mia", "Tom", "the fox", "a small bear", "Grandma", "the old owl", "Ben", "a shy dragon"]
VERBS = ["found", "lost", "painted", "hid", "shared", "carried", "wanted", "dropped"]
THINGS = ["a red kite", "the warm bread", "a silver key", "a boat of leaves", "the moon", "two apples", "an egg"]
PLACES = ["in the garden", "by the sea", "under the bridge", "at home", "near the big tree", "on the hill"]


def make_stories(n: int, seed: int = 0) -> list[str]:
    """Little template stories: enough text to train a tiny tokenizer and model on."""
    rng = random.Random(seed)

    def sentence() -> str:
        who, verb, what, where = (rng.choice(words) for words in (NAMES, VERBS, THINGS, PLACES))
        return f"{who[0].upper()}{who[1:]} {verb} {what} {where}."

    return [
        " ".join(sentence() for _ in range(rng.randint(2, 4))) + "\n" + '"Oh!" said Ben. ' + sentence()
        for _ in range(n)
    ]


@pytest.fixture(scope="session")
def stories() -> list[str]:
    return make_stories(400)


@pytest.fixture(scope="session")
def tokenizer(stories: list[str]) -> Tokenizer:
    return Tokenizer.train(stories, 320)


@pytest.fixture(scope="session")
def tiny_config(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="session")
def tiny_decoder(tiny_config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(tiny_config).eval()
    with torch.no_grad():  # larger weights than a fresh model's, so that predictions differ
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return decoder


@pytest.fixture(scope="session")
def tiny_model(tiny_decoder: Decoder, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model folder with random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, tiny_decoder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def bundled() -> Path:
    return BUNDLED_WEIGHTS


@pytest.fixture
def jsonl(tmp_path: Path, stories: list[str]) -> Path:
    """A data set of 60 stories."""
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories[:60]))
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads may add in another order."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
