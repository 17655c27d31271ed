"""Sentences end where a reader would stop, and no word is lost."""

import pytest

from csm_nb.text.breaks import split_sentences


@pytest.mark.parametrize(("language", "sentences"), [
    ("no", ["Jeg kommer kl. 14.30, f.eks. med toget.", "Den 17. mai er vi hjemme.", "Dr. Hansen bor der!", "Kommer du?"]),
    ("sv", ["Vi ses t.ex. på tisdag.", "Hon sa: ”Kom!”", "Det kostar 3.50 kr.", "Bl.a. därför gick J. S. Bach hem."]),
    ("da", ["Han kom den 12. marts.", "Det er bl.a. derfor.", "Nej…", "Og så gik hun."]),
    ("de", ["Das ist z. B. so.", "Am 3. Oktober ist frei.", "Prof. Weiß kam auch."]),
    ("fr", ["M. Dupont est là.", "« Venez ! »", "Il part."]),
    ("pl", ["To jest np. kot.", "Dr Nowak przyszedł.", "Tak?"]),
    ("en", ["Mr. Smith came at 10 a.m. and left.", "He said no!", "Why?"]),
])
def test_a_full_stop_ends_a_sentence_only_where_it_is_one(language, sentences):
    found = split_sentences(" ".join(sentences), language)
    assert [one.replace("\u00a0", " ") for one in found] == sentences


@pytest.mark.parametrize("text", ["", "   ", "\n\n", "Hei", "a" * 2000, "ord " * 500, "en, to; tre: fire " * 60, "!!! ??? ...",
                                  "Linje en\n\nLinje to uten punktum\n\nTre."])
def test_no_word_is_lost_and_no_part_is_too_long(text):
    parts = split_sentences(text, "no", 120)
    assert "".join("".join(parts).split()) == "".join(text.split()) and all(0 < len(part) <= 120 for part in parts)


def test_a_long_sentence_is_cut_at_its_clauses():
    text = "Den første delen er her, den andre delen kommer nå; den tredje delen er den siste av dem alle sammen."
    assert split_sentences(text, "no", 60) == [
        "Den første delen er her, den andre delen kommer nå;", "den tredje delen er den siste av dem alle sammen."]
