"""The weights that come with the repository: small enough, in the right form, and able to tell a story."""

import json
import re

import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.checkpoint import load_decoder, load_tokenizer, read_config
from model.config import SamplingParams
from model.evaluation.loss import bits_per_byte
from model.storyteller import Storyteller
from model.tokenizer import Tokenizer

GOLDEN_PROMPT = "Once upon a time, there was a little"
GOLDEN_TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play with her toys and eat yummy food. One "
    "day, she found a big, red ball in her room. She was so happy and wanted to play with it"
)

# Written for this test; a model that learned to tell stories predicts them well (an untrained one needs 3 bits).
FRESH_STORIES = [
    "Once upon a time, there was a small duck named Dot. Dot wanted to swim in the big pond, but she was scared. "
    'Her mom said, "I will swim with you." They went into the water together. Dot was not scared any more. '
    "She was happy and splashed all day.",
    "Tom had a blue ball. One day, the ball rolled into the street. Tom did not run after it. He asked his dad for "
    'help. Dad got the ball and said, "You were very careful, Tom." Tom felt proud.',
]


@pytest.fixture(scope="module")
def storyteller():
    with Storyteller.load(device="cpu") as storyteller:
        yield storyteller


def test_size_and_form(bundled):
    weights = load_file(bundled / "model.safetensors")  # safetensors' numpy reader: no bfloat16
    assert {str(array.dtype) for array in weights.values()} == {"float16"}
    config = read_config(bundled)
    assert config.n_parameters == sum(array.size for array in weights.values()) <= 11_500_000
    assert config.max_position_embeddings >= 512
    assert sum(path.stat().st_size for path in bundled.iterdir()) <= 24e6
    generation = json.loads((bundled / "generation_config.json").read_text())
    assert generation["do_sample"] and generation["eos_token_id"] == 2


def test_the_model_card_says_what_its_licences_ask(bundled):
    card = (bundled / "README.md").read_text()
    assert card.startswith("---\n") and "Built with Llama" in card and "Llama-Taleloom" in card
    assert "CDLA" in card and "ATTRIBUTION.md" in card
    assert (bundled / "ATTRIBUTION.md").is_file()


def test_greedy_text_is_golden(storyteller):
    """A change in tokenizer, decoder, cache or engine shows here first."""
    params = SamplingParams(max_tokens=40, temperature=0, repetition_penalty=1.0, seed=0)
    story = storyteller.tell(GOLDEN_PROMPT, params, mode="opening")
    assert story.wait(60) and story.text == GOLDEN_TEXT


def test_transformers_opens_the_folder_and_goes_on_the_same(bundled):
    """From text to text, as the model card shows it, against the float32 decoder."""
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    model = AutoModelForCausalLM.from_pretrained(bundled, dtype="float32")
    inputs = tokenizer(GOLDEN_PROMPT, return_tensors="pt")
    theirs = model.generate(**inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=40)[0]
    ours = inputs.input_ids
    decoder = load_decoder(bundled)
    with torch.inference_mode():
        while ours.shape[1] < len(theirs):
            ours = torch.cat([ours, decoder(ours)[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.decode(theirs) == tokenizer.decode(ours[0])
    assert tokenizer("<idea>a shy fox<story>").input_ids == Tokenizer.load(bundled).encode_idea("a shy fox")


def test_it_predicts_stories_it_never_saw(bundled):
    decoder = load_decoder(bundled)
    scores = bits_per_byte(decoder, load_tokenizer(bundled, decoder.config), FRESH_STORIES)
    assert scores["bits_per_byte"] < 0.9


def test_an_idea_becomes_a_story_about_it(storyteller):
    story = storyteller.tell("a dragon who is afraid of fire", SamplingParams(seed=7), mode="idea")
    assert story.wait(60)
    assert len(re.findall(r"\b[Dd]ragon", story.text)) >= 2
    assert len(story.text.split()) >= 40 and story.finish_reason in ("stop", "length")


def test_most_stories_end_by_themselves(storyteller):
    params = [SamplingParams(max_tokens=500, seed=seed) for seed in range(10)]
    stories = [storyteller.tell("a lost kitten", p, mode="idea") for p in params]
    assert all(story.wait(120) for story in stories)
    assert sum(story.finish_reason == "stop" for story in stories) >= 7
    assert len({story.text for story in stories}) == 10
