"""What two texts are compared by: one plain form of both, and the error rate between them."""

import re
import unicodedata

import jiwer
import numpy as np

from csm_nb.clean import clean_text
from csm_nb.text.numbers import unify_numbers
from csm_nb.text.spoken import read_out

COMPARED = ("Before they are compared, texts lose case and punctuation, and every number, in digits or in words, takes one "
            "written form of its language (“7”, “sju” and “syv” are the same).")  # for the pages that show a CER


def normalise_text(text: str, language: str = "") -> str:
    """Return lowercase words only, composed Unicode, single spaces: what two texts are compared by.

    With a `language` it is as it is read out (spoken), numbers of one form each (numbers); without one digits stay. Letters keep
    their accents, also those that have no composed form; signs are plain (clean_text), and pairs of apostrophes that quote
    are no letters.
    """
    text = clean_text(text)
    if language:
        text = read_out(text, language)
    text = unicodedata.normalize("NFC", text.lower())
    text = re.sub(r"(?<!\w)'(\w[^']*\w)'(?!\w)", r" \1 ", text)
    kept = (letter if letter.isalnum() or letter == "'" or unicodedata.category(letter)[0] == "M" else " " for letter in text)
    words = [word for word in "".join(kept).split() if word.strip("'")]
    return unify_numbers(" ".join(words), language) if language else " ".join(words)


def character_error_rates(references, hypotheses, language: str) -> np.ndarray:
    """Return the character error rate of each pair after normalise_text; above 1 where more was heard than was said.

    `language` is that of the texts, for their numbers. Means take each at most as 1 (average_cer). Raises ValueError for a
    reference without letters.
    """
    rates = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        expected = normalise_text(reference, language)
        if not expected:
            raise ValueError(f"the reference {reference!r} has no letters; a character error rate is not defined")
        rates.append(jiwer.cer(expected, normalise_text(hypothesis, language)))
    return np.array(rates, dtype=float)
