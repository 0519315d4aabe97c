"""Cloze against a scorer whose answers are known, and the likelihood against a direct computation."""

import numpy as np
import pytest
import torch

from model.checkpoint import load_tokenizer, read_config
from model.evaluation.cloze import ClozePair, cloze, log_likelihood, read_pairs
from model.evaluation.loss import decoder_logits


def likes(tokenizer, word):
    """Logits that hold every token of one word likely, whatever came before."""
    favourites = tokenizer.encode(word)

    def logits(tokens):
        logits_tv = np.zeros((len(tokens), tokenizer.vocab_size), np.float32)
        logits_tv[:, favourites] = 5.0
        return logits_tv

    return logits


def test_likelihood_is_the_sum_of_the_continuations_log_probabilities(tiny_decoder, tokenizer):
    context, continuation = tokenizer.encode_opening("Mia found"), tokenizer.encode(" a red kite.")
    expected, tokens = 0.0, list(context)
    for token in continuation:
        with torch.inference_mode():
            expected += tiny_decoder(torch.tensor([tokens]))[0, -1].double().log_softmax(-1)[token].item()
        tokens.append(token)
    assert log_likelihood(decoder_logits(tiny_decoder), context, continuation) == pytest.approx(expected, rel=1e-5)


def test_a_model_without_context_is_right_half_the_time(bundled):
    tokenizer = load_tokenizer(bundled, read_config(bundled))
    pairs = [pair for pair in read_pairs() if {pair.right, pair.wrong} == {" water.", " stones."}]
    assert len(pairs) == 2
    scores = cloze(pairs, tokenizer, likes(tokenizer, " water"))
    assert (scores["accuracy"], scores["pairs"], scores["topics"]) == (0.5, 2, {"cause_and_effect": 0.5})
    assert len(scores["missed"]) == 1 and scores["missed"][0].endswith("stones. / water.")
    assert cloze(pairs, tokenizer, likes(tokenizer, "zz"))["accuracy"] == 0  # a tie is no answer


def test_only_ends_of_one_length_count(tokenizer):
    pairs = [ClozePair("x", "Mia found", " an egg.", " an egg. an egg."), ClozePair("x", "Mia", " hid.", " hid.")]
    scores = cloze(pairs, tokenizer, likes(tokenizer, " egg"))
    assert (scores["pairs"], scores["pairs_left_out"]) == (1, 1)


def test_the_pairs_suit_the_bundled_tokenizer(bundled):
    tokenizer = load_tokenizer(bundled, read_config(bundled))
    pairs = read_pairs()
    equal = [pair for pair in pairs if len(tokenizer.encode(pair.right)) == len(tokenizer.encode(pair.wrong))]
    assert len(pairs) >= 120 and len(equal) >= 160
    assert len({(pair.context, pair.right) for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.right != pair.wrong
        for end in (pair.right, pair.wrong):  # context and end are encoded apart, so they must split apart
            whole = tokenizer.encode(pair.context + end)
            assert whole == tokenizer.encode(pair.context) + tokenizer.encode(end), pair


def test_words_are_right_as_often_as_wrong():
    pairs = read_pairs()
    assert sorted(pair.right for pair in pairs) == sorted(pair.wrong for pair in pairs)
