"""Readers' text: from bytes to characters, tidied to what a storyteller knows, split into stories. Reads no file."""

from __future__ import annotations

import codecs
import re
import unicodedata
from itertools import islice, pairwise

from model.errors import InputError

MAX_CONTROL_SHARE = 0.02  # of the characters; random bytes have about a tenth
BOMS = (  # UTF-32's first: its little-endian one begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
PLAIN = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"')
    | dict.fromkeys("\u00a0\u2007\u202f\u3000", " ")
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-")
    | dict.fromkeys("\r\x0b\x0c\x85\u2028\u2029", "\n")
    # Zero-width characters, soft hyphens and marks of the writing direction show nothing.
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u202a\u202b\u202c\u202d\u202e", "")
    | dict.fromkeys("\u2066\u2067\u2068\u2069", "")
    | {"\u2026": "..."}
)
SEPARATOR = re.compile(r"^[ \t]*(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:=[ \t]*){3,})$", re.MULTILINE)
HEADING = re.compile(r"^(#{1,6})[ \t]+\S.*$", re.MULTILINE)
UNDERLINED_HEADING = re.compile(r"(?:\A|(?<=\n\n))([^\s#>*-][^\n]{0,79})\n(?:={3,}|-{3,})[ \t]*(?=\n|\Z)")
WRAPPED_WIDTHS = range(50, 101)  # characters of the longest line of a text wrapped by hand or by an e-mail program
WRAPPED_SHARE = 0.9
N_JUDGED_LINES = 20_000


def decode(name: str, content: bytes) -> tuple[str, list[str]]:
    """The text of a file, with warnings: by its byte order mark, else UTF-8, else Windows-1252 line by line.

    Raises:
        InputError: it is empty or no text.
    """
    if not content:
        raise InputError(f"{name} is empty. Give a file with stories in it.")
    warnings = []
    encoding = next((encoding for bom, encoding in BOMS if content.startswith(bom)), None)
    if encoding:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is damaged, or no {encoding.upper()} text. Save it as UTF-8 text.") from error
    else:
        try:
            text = content.decode()
        except UnicodeDecodeError:
            # Line by line, so that a file made of several keeps the parts that are UTF-8.
            lines, n_other = [], 0
            for line in content.split(b"\n"):
                try:
                    lines.append(line.decode())
                except UnicodeDecodeError:
                    lines.append(_western(line))
                    n_other += 1
            text = "\n".join(lines)
            warnings.append(
                f"{n_other:,} {'line' if n_other == 1 else 'lines'} of {name} were read as Western European text "
                "(Windows-1252), as they are not UTF-8. If letters look wrong, save it as UTF-8."
            )
    check_is_text(name, text)
    return text, warnings


def _western(line: bytes) -> str:
    try:
        return line.decode("cp1252")
    except UnicodeDecodeError:
        return line.decode("latin-1")


def check_is_text(name: str, text: str) -> None:
    """Raises InputError when it holds NUL characters, or many other control characters."""
    if "\0" in text or len(CONTROL.findall(text)) > MAX_CONTROL_SHARE * len(text):
        raise InputError(f"{name} is no text. Save the stories as plain text (UTF-8) and try again.")


def tidy(text: str) -> str:
    """Plain quotes, spaces and dashes, letters in one form, "\\n" as the only line end, no broken characters."""
    text = text.encode(errors="replace").decode().replace("\r\n", "\n").translate(PLAIN)
    text = re.sub(r"(?<![ \t])[ \t]*[\u2014\u2015][ \t]*", " - ", text)
    return CONTROL.sub("", unicodedata.normalize("NFC", text))


def unwrap(text: str) -> str:
    """Join lines that were broken only for their width, as in old text files; verse and plain paragraphs stay.

    Such a line is one to which the first word of the next would not have been added without exceeding the width.
    """
    paragraphs = [paragraph.split("\n") for paragraph in re.split(r"\n[ \t]*\n", text)]
    pairs = (pair for lines in paragraphs for pair in pairwise(lines))
    broken = [
        (len(line.rstrip()), len(following.split(maxsplit=1)[0]))
        for line, following in islice(pairs, N_JUDGED_LINES)
        if line.strip() and following.strip() and not HEADING.match(line) and not SEPARATOR.match(following)
    ]
    if len(broken) < 3:
        return text
    width = sorted(length for length, _ in broken)[int(0.98 * (len(broken) - 1))]
    n_full = sum(length + 1 + word > width for length, word in broken)
    if width not in WRAPPED_WIDTHS or n_full < WRAPPED_SHARE * len(broken):
        return text
    joined = []
    for lines in paragraphs:
        out = lines[:1]
        for line in lines[1:]:
            if not (line.strip() and out[-1].strip()) or any(
                HEADING.match(part) or SEPARATOR.match(part) for part in (out[-1], line)
            ):
                out.append(line)
            else:
                out[-1] = f"{out[-1].rstrip()} {line.strip()}"
        joined.append("\n".join(out))
    return "\n\n".join(joined)


def plain_markdown(text: str) -> str:
    """Markdown without front matter, comments, pictures, links, quote marks and emphasis; headings begin with #."""
    text = re.sub(r"\A---\n(?:(?:[\w-]+:|[ \t]|- )[^\n]*\n)+---\n", "", text)
    text = UNDERLINED_HEADING.sub(r"# \1", text)
    text = re.sub(r"<!--[^>]{0,1000}-->", "", text)
    text = re.sub(r"!\[[^\[\]\n]*\]\([^()\n]*\)", "", text)
    text = re.sub(r"\[([^\[\]\n]*)\]\([^()\n]*\)", r"\1", text)
    text = re.sub(r"^[ \t]*>[ \t]?", "", text, flags=re.MULTILINE)
    return re.sub(r"(?<![\w*])(\*{1,3}|_{1,3})(?=[^\s*_])([^*_\n]+)\1(?![\w*])", r"\2", text)


def split_stories(text: str) -> list[str]:
    """The stories of one tidy text: at the first kind of border of which there is one.

    In this order: `<|endoftext|>`; lines of only ***, --- or ===; markdown headings (of the highest level there is
    more than once); two or more empty lines. Without any, the text is one story.
    """
    parts = [text]
    levels = sorted(len(match[1]) for match in HEADING.finditer(text))
    level = next((level for level in levels if levels.count(level) > 1), 0)
    for border in (
        r"<\|endoftext\|>",
        SEPARATOR.pattern,
        rf"^(?=#{{{level}}}[ \t]+\S)" if level else None,
        r"\n[ \t]*\n[ \t]*\n",
    ):
        if border:
            parts = [part.strip() for part in re.split(border, text, flags=re.MULTILINE)]
            # What holds headings only (the title of the book) is no story.
            parts = [part for part in parts if HEADING.sub("", part).strip()]
            if len(parts) > 1:
                break
    return [part for part in parts if part.strip()]


def cut(text: str, max_characters: int) -> list[str]:
    """A clean text in parts of at most so many characters, cut at paragraph ends, else after sentences or words."""
    parts, start = [], 0
    while len(text) - start > max_characters:
        window = text[start : start + max_characters]
        end = next(
            (i + 1 for mark in ("\n", ". ", " ") if (i := window.rfind(mark)) > max_characters // 2), len(window)
        )
        parts.append(window[:end].strip())
        start += end
    return [part for part in [*parts, text[start:].strip()] if part]
