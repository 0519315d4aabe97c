"""What a reader typed: plain, and told apart."""

import pytest

from model.prompt import guess_mode, plain_text


def test_typographic_quotes_read_as_plain_ones():
    assert plain_text("“Oh!” — it’s…\r\n\r\nBen") == '"Oh!" - it\'s...\nBen'


@pytest.mark.parametrize(
    ("prompt", "mode"),
    [
        ("a dragon who is afraid of fire", "idea"),
        ("A dragon who is afraid of fire", "idea"),
        ("Tell me a story about a pirate.", "idea"),
        ("Use the words: kite, moon, string", "idea"),
        ("friends", "idea"),
        ("Once upon a time, a fox found", "opening"),
        ("There was a tall box in the kitchen.", "opening"),
        ('"There is a pancake on the ceiling," said Nadia', "opening"),
        ("The old swing tasted like honey.", "opening"),
        ("Mia ran. She did not look back", "opening"),
    ],
)
def test_ideas_and_openings_are_told_apart(prompt, mode):
    assert guess_mode(prompt) == mode
