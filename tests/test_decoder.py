"""The decoder against oracles: `transformers`, its own cache, and causality."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.checkpoint import load_decoder, load_tokenizer
from model.config import DECODER_CHOICES, ModelConfig
from model.decoder import ATTENTIONS, MLPS, NORMS, POSITIONS
from model.engine.kv_cache import KVCache


def hf_logits(folder, tokens_bt):
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return hf_model(tokens_bt).logits


@pytest.mark.parametrize("which", ["tiny_model", "bundled"])
def test_logits_equal_those_of_transformers(which, request, stories):
    folder = request.getfixturevalue(which)
    decoder = load_decoder(folder)
    config = decoder.config
    tokens = load_tokenizer(folder, config).encode_opening("\n".join(stories[:20]))  # a whole context of text
    tokens_bt = torch.tensor([tokens[: config.max_position_embeddings]])
    with torch.inference_mode():
        ours = decoder(tokens_bt)
    theirs = hf_logits(folder, tokens_bt)
    # Rounding grows with the logits: trained weights give some of 20.
    torch.testing.assert_close(ours, theirs, atol=2e-5 * max(1.0, theirs.abs().max().item()), rtol=0)


def test_parameter_count_is_the_config_s(tiny_decoder):
    assert sum(p.numel() for p in tiny_decoder.parameters()) == tiny_decoder.config.n_parameters


@torch.inference_mode()
def test_a_future_token_cannot_change_past_logits(tiny_decoder):
    tokens_bt = torch.randint(0, 300, (1, 30))
    changed_bt = tokens_bt.clone()
    changed_bt[0, 20:] = torch.randint(0, 300, (10,))
    before, after = tiny_decoder(tokens_bt), tiny_decoder(changed_bt)
    torch.testing.assert_close(before[:, :20], after[:, :20], atol=1e-5, rtol=0)
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@torch.inference_mode()
def test_cached_equals_uncached_in_chunks_and_steps(tiny_decoder):
    tokens_bt = torch.randint(0, 300, (1, 40))
    whole = tiny_decoder(tokens_bt)
    cache = KVCache(tiny_decoder.config, n_slots=3)
    pieces, start = [], 0
    for n in (17, 9, 1, 1, 12):  # chunked prefill and single steps
        pieces.append(tiny_decoder(tokens_bt[:, start : start + n], cache.view([1], [start], n)))
        start += n
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_batched_row_equals_the_row_alone(tiny_decoder):
    """Rows of different lengths share a step: shorter ones must not see what a longer one or an old story left."""
    cache = KVCache(tiny_decoder.config, n_slots=4)
    cache.keys.normal_()
    cache.values.normal_()
    lengths, slots = [5, 31, 12], [3, 0, 2]
    rows = [torch.randint(0, 300, (1, n + 1)) for n in lengths]
    for row, slot, n in zip(rows, slots, lengths, strict=True):
        tiny_decoder(row[:, :n], cache.view([slot], [0], n))
    newest_bt = torch.cat([row[:, -1:] for row in rows])
    together = tiny_decoder(newest_bt, cache.view(slots, lengths, 1))
    for i, row in enumerate(rows):
        torch.testing.assert_close(together[i], tiny_decoder(row)[0, -1:], atol=1e-4, rtol=0)


def test_every_choice_of_the_config_has_its_module():
    modules = {"norm": NORMS, "position": POSITIONS, "mlp": MLPS, "attention": ATTENTIONS}
    assert {name: tuple(table) for name, table in modules.items()} == DECODER_CHOICES


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm": "batchnorm"}, ["norm", "batchnorm", "rmsnorm"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
        ({"head_dim": 7}, ["head_dim", "7"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
    ],
)
def test_an_impossible_config_names_field_and_value(change, words):
    with pytest.raises(ValueError) as caught:
        ModelConfig(**change)
    assert all(word in str(caught.value) for word in words)
