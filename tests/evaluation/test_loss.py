"""Bits per byte against its definition."""

import math

import pytest
import torch

from model.engine.cpu_backend import CpuBackend
from model.errors import InputError
from model.evaluation.loss import bits_per_byte


@torch.inference_mode()
def bits_by_definition(decoder, tokenizer, text):
    """Each token's surprise, one forward pass a token; beyond the context from the window that the rule names."""
    tokens = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    context, half = decoder.config.max_position_embeddings, decoder.config.max_position_embeddings // 2
    bits = 0.0
    for i in range(1, len(tokens)):
        start = 0 if i <= context else ((i - context - 1) // half + 1) * half
        logits = decoder(torch.tensor([tokens[start:i]]))[0, -1]
        bits -= logits.double().log_softmax(-1)[tokens[i]].item() / math.log(2)
    return bits


def test_it_is_the_sum_over_stories_scored_alone(tiny_decoder, tokenizer, stories):
    texts = [stories[0], "Ünï 👻", stories[1] + "\n" + stories[2] + "\n" + stories[3], "x"]
    assert any(len(tokenizer.encode(text)) > 2 * tiny_decoder.config.max_position_embeddings for text in texts)
    expected = sum(bits_by_definition(tiny_decoder, tokenizer, text) for text in texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    scores = bits_per_byte(tiny_decoder, tokenizer, texts, tokens_per_pass=200)
    assert scores["bits_per_byte"] == pytest.approx(expected / n_bytes, rel=1e-4)
    assert scores["bytes"] == n_bytes and scores["stories"] == 4
    assert scores["tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert scores["perplexity"] == pytest.approx(2 ** (expected / scores["tokens"]), rel=1e-3)


def test_one_empty_story_does_not_put_thousands_into_one_pass(tiny_decoder, tokenizer, stories, monkeypatch):
    sizes = []
    forward = tiny_decoder.forward
    monkeypatch.setattr(
        tiny_decoder, "forward", lambda tokens_bt: sizes.append(tokens_bt.numel()) or forward(tokens_bt)
    )
    bits_per_byte(tiny_decoder, tokenizer, ["", *stories[:100]], tokens_per_pass=500)
    assert max(sizes) <= 500


def test_no_text_is_refused(tiny_decoder, tokenizer):
    with pytest.raises(InputError, match="no text"):
        bits_per_byte(tiny_decoder, tokenizer, ["", ""])


def test_another_engines_logits_are_scored_alike(tiny_decoder, tokenizer, stories):
    weights = {name: weight.numpy() for name, weight in tiny_decoder.state_dict().items()}
    backend = CpuBackend(tiny_decoder.config, weights, n_slots=1, int8=False)
    expected = bits_per_byte(tiny_decoder, tokenizer, stories[:6])
    found = bits_per_byte(tiny_decoder, tokenizer, stories[:6], logits=backend.logits)
    assert found == pytest.approx(expected, rel=1e-5)
