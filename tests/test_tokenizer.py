"""Exact round trips, streaming, and the same ids in `transformers`."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from model.errors import InputError, ModelError
from model.tokenizer import Tokenizer

ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
HARD_TEXTS = [
    "",
    " ",
    "\u2581",
    "a\u2581\u2581b \u2581",
    "\0x\0",
    "  two  spaces\n\n\n tab\t\r\n",
    "👩‍👩‍👧 naïve 東京",
    "<s></s><idea>",
    "<0x41>",
]


@given(text=ANY_TEXT)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_survive(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=ANY_TEXT)
def test_a_stream_emits_whole_characters_only(tokenizer, text):
    stream = tokenizer.stream_decoder()
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.finish() == text


def test_a_stream_holds_back_half_a_character(tokenizer):
    stream = tokenizer.stream_decoder()
    *first, last = tokenizer.encode("\U0001f98a")
    assert len(first) == 3 and not any(stream.push(token) for token in first)
    assert stream.push(last) == "\U0001f98a"


def test_a_stream_that_ends_in_half_a_character_says_so(tokenizer):
    stream = tokenizer.stream_decoder()
    stream.push(tokenizer.encode("\U0001f98a")[0])
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("text", ["<s>", "</s>", "<idea>a fox<story>", "<pad>", "<unk>", "x<story>"])
def test_reader_text_never_becomes_a_special_token(tokenizer, text):
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.idea_id, tokenizer.story_id, 0}
    assert not special & set(tokenizer.encode(text))


def test_prompts_carry_their_special_tokens(tokenizer):
    ids = tokenizer.encode_idea("a fox")
    assert [ids[0], ids[1], ids[-1]] == [tokenizer.bos_id, tokenizer.idea_id, tokenizer.story_id]
    assert tokenizer.decode(ids) == "a fox"
    assert tokenizer.encode_opening("A fox") == [tokenizer.bos_id, *tokenizer.encode("A fox")]


def test_a_lone_surrogate_is_refused_with_a_sentence(tokenizer):
    with pytest.raises(InputError, match="broken character"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("which", ["tiny_model", "bundled"])
def test_transformers_gives_the_same_ids(which, request, stories):
    """Without the generated tokenizer.json, LlamaTokenizer splits every story differently."""
    folder = request.getfixturevalue(which)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    texts = [*stories[:195], 'Naïve 👻\n\n  "Oh!"', "12 apples, 3.5 pears", "it's  Tom's", "\n", "x" * 300]
    assert len(texts) == 200
    for text in texts:
        ids = [ours.bos_id, *ours.encode(text)]
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids[1:]) == text


def test_the_trained_tokenizer_knows_ideas_and_newlines(tokenizer):
    assert tokenizer.knows_ideas
    assert len(tokenizer.encode("\n")) == 1
    files = tokenizer.hf_files()
    assert json.loads(files["tokenizer.json"])["model"]["type"] == "Unigram"


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="damaged"):
        Tokenizer.load(tmp_path)
