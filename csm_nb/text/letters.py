"""Letters of a text: how many it has when it is read out, and which are of another script than its language's."""

import unicodedata
from functools import cache

from csm_nb.text.numbers import spell_numbers
from csm_nb.text.sentences import spell_alphabet

# Letters of what is read as words: a digit, a sign, a letter of an abbreviation. The longest numbers have 13.5 letters per
# digit (Polish 999,799; English 12, counted with num2words over ten languages), "double-v" and "per cento" have 8 and 9.
LETTERS_READ_OUT = 14


def count_letters(text: str) -> int:
    """Return how many letters `text` has when read out: digits, signs and the letters of abbreviations ("EU") count 14 each.

    Capitals side by side are taken for an abbreviation. That is too many for "1000" and for a shout, which only raises a cap.
    """
    read_out = sum(c.isnumeric() or c in "%&@§" or unicodedata.category(c) in ("Sc", "Sm", "So") for c in text)
    capitals = [run for run in "".join(c if c.isupper() else " " for c in text).split() if len(run) > 1]
    return len(text) + (LETTERS_READ_OUT - 1) * (read_out + sum(map(len, capitals)))


def count_fewest(text: str, language: str) -> int:
    """Return how few letters `text` can have when read out: its own, and those of its numbers in words; no signs, no spaces."""
    return sum(map(str.isalpha, spell_numbers(text, language)))


@cache
def _find_script(letter):
    """Return "LATIN", "CYRILLIC", "GREEK" ... by the letter's name; "" for signs that count as letters (1ª, µm, ˈ)."""
    return "" if letter in "ªºµ" or unicodedata.category(letter) == "Lm" else unicodedata.name(letter, "").split(" ")[0]


@cache
def _list_scripts(language):
    return frozenset(_find_script(letter) for letter in spell_alphabet(language) if letter.isalpha())


def list_foreign(text: str, language: str) -> list[str]:
    """Return the letters of `text`, in their order, that are of a script which the alphabet of `language` is not written in.

    A letter of the same script is none: names and loanwords have them (ü in Danish), and so have phonemes in IPA.
    """
    if text.isascii() and "LATIN" in _list_scripts(language):
        return []
    return [letter for letter in text if letter.isalpha() and _find_script(letter) not in _list_scripts(language) | {""}]
