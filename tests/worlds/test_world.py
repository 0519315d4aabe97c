"""Story worlds: what a file says is what is told; what it cannot mean is named."""

import json
import random

import pytest

from model.errors import InputError
from model.worlds.check import check
from model.worlds.world import World, expand, read_worlds

SMALL = """
title = "{hero} and {toy.a}"
ideas = ["a(n) {hero.kind} with {toy.a}"]
words = ["{toy}", "{hero.kind}", "wind"]
[cast]
hero = [
  { name = "Ann", kind = "owl", pronoun = "she", is = "bird" },
  { name = "Bo", kind = "dog", pronoun = "he" },
]
friend = [
  { name = "Ann", kind = "cat", pronoun = "she" },
  { name = "Cy", kind = "mole", pronoun = "it", says = "{hero.His} friend {friend} [laughed|sang]" },
]
[pick]
toy = [
  { name = "kite", a = "a kite", when = { hero = "!bird" } },
  { name = "egg", a = "an egg", when = { hero = "owl" } },
]
place = ["hill"]
[[beat]]
name = "first"
tellings = ["{hero} was a(n) {hero.kind}. {hero.He} had {toy.a} all to {hero.himself} on the {place}."]
[[beat]]
name = "turn"
paragraph = false
tellings = [
  { text = "It flew off.", when = { toy = "kite" }, set = { end = "gone" } },
  { text = "It broke.\\nOh!", when = { toy = "egg" }, set = { end = "broken" } },
]
[[beat]]
tellings = [
  { text = "Gone.", when = { end = "gone" } },
  { text = "It was {end}.", when = { end = ["broken", "gone"], toy = "egg" } },
]
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="small"):
        (tmp_path / f"{name}.toml").write_text(text)
        return tmp_path / f"{name}.toml"

    return write


def test_what_was_chosen_stays_chosen(write):
    world = World.read(write(SMALL))
    told = {}
    for seed in range(40):
        story = world.tell(seed)
        told[story["text"]] = story
    owl = "Ann was an owl. She had an egg all to herself on the hill. It broke.\nOh!\nIt was broken."
    dog = "Bo was a dog. He had a kite all to himself on the hill. It flew off.\nGone."
    assert set(told) == {owl, dog}
    assert told[dog]["title"] == "Bo and a kite"
    assert {story["prompt"] for story in map(world.tell, range(300)) if story["kind"] == "idea"} == {
        "an owl with an egg",
        "a dog with a kite",
    }


def test_a_seed_tells_the_same_story(write):
    path = write(SMALL)
    assert [World.read(path).tell(seed) for seed in range(20)] == [World.read(path).tell(seed) for seed in range(20)]


def test_prompts_of_words_name_words_of_the_story(write):
    stories = [story for story in map(World.read(write(SMALL)).tell, range(300)) if story["kind"] == "words"]
    assert 10 < len(stories) < 100
    for story in stories:
        asked = story["prompt"].removeprefix("Use the words: ").split(", ")
        assert asked == story["words"] and set(asked) <= {"kite", "egg", "owl", "dog", "wind"}


def test_no_two_of_the_cast_have_one_name_and_fields_hold_slots(write):
    text = SMALL.replace('kind = "cat", pronoun = "she"', 'kind = "cat", pronoun = "she", says = "{friend} slept"')
    world = World.read(write(text.replace("Gone.", "{friend.says}.").replace("It was {end}.", "{friend.says}.")))
    endings = {world.tell(seed)["text"].split("\n")[-1] for seed in range(100)}
    assert endings == {"Ann slept."} | {
        f"{his} friend Cy {did}." for his in ("Her", "His") for did in ("laughed", "sang")
    }
    owls = [text for seed in range(100) if (text := world.tell(seed)["text"]).startswith("Ann")]
    assert owls and not any(text.endswith("Ann slept.") for text in owls)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{toy.a} all", "{toi.a} all", "first: there is no {toi}"),
        ("{toy.a} all", "{toy.b} all", "{toy.b} is missing for kite, egg"),
        ('toy = "kite" }, set', 'toi = "kite" }, set', "when names 'toi'"),
        ('toy = "kite" }, set', 'toy = "kites" }, set', "toy is never 'kites'"),
        ('hero = "!bird"', 'friend = "!mole", place = "hill"', "when names 'place'"),
        ("It flew off.", "It flew [off.", "unbalanced"),
        ('set = { end = "gone" }', 'set = { toy = "egg" }', "set cannot change 'toy'"),
        ('pronoun = "he" }', 'pronoun = "they" }', "needs a kind and a pronoun"),
        ('words = ["{toy}", "{hero.kind}", "wind"]', "", "words should be"),
        ('title = "', 'titel = "', "unknown titel"),
        ("[pick]", "[pick]\nhero = ['x']", "in both"),
        ("[cast]", "[cast", "cannot be read"),
        ('place = ["hill"]', "place = [3]", "neither a text nor a table"),
        ('place = ["hill"]', 'place = "hill"', "a list of options"),
        ('when = { toy = "kite" }', "when = { toy = 1 }", "when should be"),
        ('when = { toy = "kite" }', "when = 1", "when should be"),
        ('set = { end = "gone" }', "set = { end = [1] }", "set should be"),
        ("paragraph = false", "pargraph = false", "unknown pargraph"),
    ],
)
def test_what_a_file_cannot_mean_is_named(write, old, new, words):
    assert old in SMALL
    with pytest.raises(InputError, match=words.replace("{", r"\{").replace("}", r"\}")):
        World.read(write(SMALL.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('hero = "!bird"', 'hero = ["!bird", "!dog"]'),  # no thing for the dog: told of the owl
        ('when = { end = "gone" }', 'when = { end = "gone", toy = "egg" }'),  # the kite has no end: told of the egg
    ],
)
def test_a_dead_end_is_left_for_another_way(write, old, new):
    world = World.read(write(SMALL.replace(old, new)))
    assert all("egg" in world.tell(seed)["text"] for seed in range(20))


def test_a_world_without_a_way_to_its_end_says_so(write):
    text = SMALL.replace('hero = "!bird"', 'hero = "owl"').replace(
        'toy = "egg" }, set', 'toy = "egg", hero = "dog" }, set'
    )
    with pytest.raises(InputError, match="finds no way"):
        World.read(write(text.replace('toy = "kite" }, set', 'toy = "kite", hero = "dog" }, set'))).tell(1)


def test_slots_that_refer_to_each_other_without_end_say_so(write):
    world = World.read(write(SMALL.replace('a = "a kite"', 'a = "{toy.a}"')))
    with pytest.raises(InputError, match="without end"):
        for seed in range(20):
            world.tell(seed)


def test_a_slot_told_before_it_is_set_says_so(write):
    world = World.read(write(SMALL.replace("all to {hero.himself}", "{end}")))
    with pytest.raises(InputError, match="nothing has set it yet"):
        world.tell(1)


def test_articles_follow_the_sound(write):
    kinds = {"owl": "an", "unicorn": "a", "umbrella": "an", "one-eyed cat": "a", "hour": "an", "European": "a"}
    kinds |= {"useful dog": "a", "unhappy dog": "an", "elf": "an", "bee": "a", "unimportant dog": "an", "ewe": "a"}
    for kind, article in kinds.items():
        world = World.read(write(SMALL.replace('"owl"', '"hen"').replace('kind = "dog"', f'kind = "{kind}"')))
        texts = " ".join(world.tell(seed)["text"] for seed in range(20))
        assert f"Bo was {article} {kind}." in texts, kind


def test_expand_repeats_nothing_and_ends_when_all_is_told(write):
    world = World.read(write(SMALL))
    stories = list(expand([world], 1000, seed=1))
    assert len(stories) == 2 and len({story["text"] for story in stories}) == 2


def test_the_checker_finds_what_a_reader_would(write):
    bad = SMALL.replace("It flew off.", 'the the kite said \\"yes. it was a old  kite .')
    bad = bad.replace(
        '{ text = "Gone."', '{ text = "Never told at all.", when = { hero = "owl", toy = "kite" } }, { text = "Gone."'
    )
    complaints = "\n".join(check(World.read(write(bad))))
    for what in (
        "a doubled word",
        "begins small",
        "an article",
        "punctuation",
        "open quotation",
        "never told",
        "different stories",
    ):
        assert what in complaints, what


@pytest.mark.parametrize("world", read_worlds(), ids=lambda world: world.name)
def test_the_bundled_worlds_have_nothing_to_complain_about(world):
    assert check(world) == []


def test_bundled_stories_name_what_was_asked_for_to_the_end():
    """The prompt's words are there so that a model learns to keep them: most stories end with one of them."""
    rng = random.Random(0)
    n_kept = n = 0
    for world in read_worlds():
        for _ in range(20):
            story = world.tell(rng.randrange(10**6))
            end = story["text"].lower()[-len(story["text"]) // 3 :]
            n += 1
            n_kept += any(word.lower() in end for word in story["words"])
            json.dumps(story)
    assert n_kept / n > 0.8
