"""From files to rows: reading, cleaning, ideas, packing."""

import json
import random

import numpy as np
import pytest

from model.errors import InputError
from model.jobs.task import ORIGINALS
from model.training.data import (
    PreparedData,
    Source,
    clean,
    is_held_out,
    pack,
    prepare,
    read_recipe,
    read_rows,
    resolve_sources,
    token_pieces,
)
from model.training.ideas import hero, idea_for, key_words
from model.worlds.world import expand, read_worlds


def test_clean_keeps_the_story_and_drops_what_surrounds_it():
    text = 'The River\'s Secret\n\nA  swan  swam.\r\n\r\n"Oh!" she said.\n\nHow would you like the story to continue?'
    assert clean(text) == 'A swan swam.\n"Oh!" she said.'
    assert clean("One line only") == "One line only"


def test_the_stories_written_for_the_recipe_lie_clean():
    """So whoever reads them need not clean them, which took several times as long as reading them."""
    written = sorted(ORIGINALS.parent.glob("*.parquet"))
    assert ORIGINALS in written
    assert all(clean(row["text"]) == row["text"] for path in written for row in read_rows(path))


def test_packing_keeps_every_sequence_whole_and_once():
    rng = random.Random(0)
    sequences = [[i] * rng.randint(1, 30) for i in range(1, 800)]
    rows = list(pack(iter(sequences), 30, pad=0))
    assert all(len(row) == 30 for row in rows)
    found = {}
    for row in rows:
        for token in row:
            found[token] = found.get(token, 0) + 1
    padding = found.pop(0, 0)
    assert found == {sequence[0]: len(sequence) for sequence in sequences}
    assert padding < 0.05 * sum(map(len, rows))


def test_a_long_story_is_cut_at_paragraphs_and_nothing_is_lost(tokenizer, stories):
    text = "\n".join(stories[:20])
    pieces = token_pieces(text, "an idea", tokenizer, row_length=400)
    assert len(pieces) > 1 and all(len(piece) <= 400 for piece in pieces)
    assert "".join(tokenizer.decode(piece) for piece in pieces) == text
    assert all(tokenizer.decode(piece).endswith("\n") for piece in pieces[:-1])
    assert pieces[0][0] == tokenizer.bos_id and pieces[-1][-1] == tokenizer.eos_id
    specials = {tokenizer.idea_id, tokenizer.bos_id}
    assert not specials & {token for piece in pieces[1:] for token in piece}, (
        "a story begins once, and no idea is cut off"
    )


def test_an_idea_goes_before_a_story_that_fits(tokenizer):
    (piece,) = token_pieces("Mia found a key.", "a key", tokenizer, row_length=100)
    assert piece == [*tokenizer.encode_idea("a key"), *tokenizer.encode("Mia found a key."), tokenizer.eos_id]


def test_ideas_come_from_what_a_row_has():
    rng = random.Random(0)
    story = 'Once upon a time, there was a little girl named Lily. She had a kite. The kite flew. "My kite!" said Lily.'
    assert idea_for({"prompt": "a lost kite", "kind": "idea"}, story, random.Random(1)) == "a lost kite"
    assert idea_for({"prompt": "Tell the tale called `Sky Pirates`."}, story, rng) == "Sky Pirates"
    fable = "Create a fable\n- Main Character: a empathetic ladybug\n- Setting: a farmland where our story unfolds"
    assert idea_for({"prompt": fable}, story, rng).startswith("an empathetic ladybug")
    assert {idea_for({}, story, random.Random(seed)) for seed in range(50)} >= {"a little girl named Lily"}
    assert hero(story) == "a little girl named Lily"
    assert key_words(story, 3) == ["kite"]
    assert idea_for({}, "Hm.", rng) is None


def test_preparing_writes_what_opening_reads(jsonl, tmp_path, stories):
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    rows.append({"text": "He was drunk and had a gun."})
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = prepare([(Source("s", epochs=2, idea_share=0.5), [jsonl])], tmp_path / "data", 512, 320)
    data = PreparedData.open(tmp_path / "data")
    assert summary["sources"]["s"]["unsuitable"] == 1
    assert data.rows.shape == (summary["rows"], 513) and data.rows.dtype == np.uint16
    text = data.tokenizer.decode(int(token) for token in data.rows.ravel())
    kept = [clean(story) for story in stories[:60] if not is_held_out(clean(story))]
    endings = [story[-30:] for story in kept]
    assert all(text.count(ending) >= 2 for ending in endings), "each story is read in each epoch"
    assert not any(row["text"] in text for row in data.held_out)
    assert "drunk" not in text
    assert (data.rows == data.tokenizer.idea_id).any()


def test_preparing_twice_gives_the_same_rows(jsonl, tmp_path):
    source = Source("s", epochs=1.5, anneal_epochs=1)
    for name in ("a", "b"):
        prepare([(source, [jsonl])], tmp_path / name, 64, 320, seed=3)
    assert (tmp_path / "a/rows.bin").read_bytes() == (tmp_path / "b/rows.bin").read_bytes()


def test_a_source_read_in_part_is_spread_over_the_whole_stage(tmp_path, stories):
    """What was read 0.2 times stood mostly after all else, where the learning rate is low."""
    for name, mark in (("often", "?"), ("seldom", "!")):
        marked = [{"text": text.replace(".", mark)} for text in stories]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    sources = [
        (Source("often", epochs=1.6, idea_share=0), [tmp_path / "often.jsonl"]),
        (Source("seldom", epochs=0.2, idea_share=0), [tmp_path / "seldom.jsonl"]),
    ]
    prepare(sources, tmp_path, 64, 320)
    data = PreparedData.open(tmp_path)
    texts = [data.tokenizer.decode(token for token in row if token != data.tokenizer.pad_id) for row in data.rows]
    for mark in "?!":
        places = [i / len(texts) for i, text in enumerate(texts) for _ in range(text.count(mark))]
        counts = np.histogram(places, 4, (0, 1))[0] / len(places)
        assert counts.min() > 0.15 and counts.max() < 0.35, counts


def test_every_kind_of_file_is_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_text("One.<|endoftext|>Two.")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["One.", "Two."], "n": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')
    for suffix in ("txt", "parquet", "jsonl"):
        assert [row["text"] for row in read_rows(tmp_path / f"a.{suffix}")] == ["One.", "Two."]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n{oops\n', "line 2"),
        ("a.jsonl", '{"words": 1}\n', "line 1 has no 'text'"),
        ("a.jsonl", "", "no story"),
        ("a.docx", "x", "Use .jsonl, .txt or .parquet"),
        ("a.toml", "[[source]]\nepochz = 1\n", "cannot be used"),
        ("a.toml", "", "names no"),
        ("a.parquet", "not parquet", "cannot be read"),
        ("a.jsonl", '{"text": null}\n', "line 1 has no 'text'"),
        ("a.jsonl", "[" * 100_000, "line 1 is no JSON"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        prepare(resolve_sources([str(path)], pull=lambda repo: []), tmp_path / "data", 64, 320)


def test_odd_bytes_and_blank_lines_lose_no_story(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n\n{"text": "half \\ud800 pair"}\n')
    assert [row["text"] for row in read_rows(path)] == ["caf\ufffd", "half ? pair"]
    (tmp_path / "a.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    assert [row["text"] for row in read_rows(tmp_path / "a.txt")] == ["One.", "Two."]


def test_a_missing_file_and_half_prepared_data_are_named(tmp_path):
    with pytest.raises(InputError, match="no file"):
        list(read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="no complete training data"):
        PreparedData.open(tmp_path)


def test_the_bundled_recipe_reads(tmp_path):
    from model.config import CHECKOUT

    sources = read_recipe(CHECKOUT / "model/training/taleloom.toml")
    assert {source.path for source in sources} >= {"tinystories-train.jsonl", "taleloom-stories.jsonl"}
    assert not any("valid" in source.path or "pirate" in source.path for source in sources)


def test_story_worlds_are_a_source_and_never_held_out(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[[source]]\nworlds = 150\nidea_share = 1.0\n")
    sources = resolve_sources([str(recipe)], pull=lambda repo: [])
    stories = [story["text"] for story in expand(read_worlds(), 150, 1)]
    summary = prepare(sources, tmp_path / "data", 512, 400, validation={"itself": stories[:10], "other": ["x y z"]})
    assert summary["sources"]["story worlds"]["kept"] > 90 and summary["held_out"] == 0
    assert summary["contamination"]["itself"]["exact"] == 10 and summary["contamination"]["other"]["exact"] == 0


def test_a_recipe_finds_its_files_at_the_root_and_beside_itself(tmp_path):
    """Stories that come with the project stand beside the recipe; those of others where --data-root says."""
    root = tmp_path / "root"
    root.mkdir()
    for place in (root / "theirs.txt", tmp_path / "ours.txt"):
        place.write_text("A fox.")
    recipe = tmp_path / "r.toml"
    recipe.write_text("".join(f'[[source]]\npath = "{name}.txt"\n' for name in ("theirs", "ours", "nobodys")))
    paths = [path for _, [path] in resolve_sources([str(recipe)], lambda repo: [], root)]
    assert paths == [root / "theirs.txt", tmp_path / "ours.txt", root / "nobodys.txt"]
