"""Held-out clips share neither sentence nor speaker with the training where that is cheap, and little is lost in any case."""

import time

import datasets
import numpy as np
import pytest

from csm_nb.corpora.split import split_rows
from csm_nb.recipe import TrainingError
from csm_nb.text.sentences import VALIDATION_CLIPS, make_sentences, split_of


def make_rows(count, speaker, text):
    """`count` rows with the speaker and the sentence that the functions say for the row's number."""
    return [{"speaker_id": f"p{speaker(i):04d}", "text": spell(text(i))} for i in range(count)]


def spell(number):
    """A sentence of its own for a number; in letters, as sentences.split_of looks at words alone."""
    return "setning " + "".join(chr(ord("a") + int(digit)) for digit in str(number))


def count_shared(train, held, key):
    return len({row[key] for row in train} & {row[key] for row in held})


def test_many_speakers_with_shared_sentences_keep_nearly_all():
    sentences = np.random.default_rng(0).integers(10_000, size=270_000)
    rows = make_rows(270_000, lambda i: i // 300, lambda i: sentences[i])
    train, held, how = split_rows(rows)
    assert len(train) > 0.98 * len(rows) and len(held) == VALIDATION_CLIPS
    assert count_shared(train, held, "text") == count_shared(train, held, "speaker_id") == 0
    assert "1 held-out speaker of 900" in how and f"{len(rows) - len(train) - len(held)} of 270000 clips are left out" in how


def test_when_everybody_reads_the_same_sentences_some_are_held_out_and_nothing_is_lost():
    rows = make_rows(1000, lambda i: i // 50, lambda i: i % 50)
    train, held, how = split_rows(rows)
    assert (len(train), len(held)) == (900, 100) and count_shared(train, held, "text") == 0
    assert "speakers are on both sides: to hold them out too would leave out 180 of 1000 clips" in how


@pytest.mark.parametrize(("count", "speaker", "text", "kept", "shared"), [
    (200, lambda i: 0, lambda i: i, 180, "speaker_id"),  # one speaker
    (450, lambda i: i // 50, lambda i: i % 50, 405, "speaker_id"),  # nine
    (10, lambda i: i, lambda i: i, 9, ""),  # ten speakers, a sentence each
    (10, lambda i: i, lambda i: 0, 9, "text"),  # all the same sentence
    (2, lambda i: 0, lambda i: i, 1, "speaker_id"), (2, lambda i: i, lambda i: 0, 1, "text"),
    (12, lambda i: 0, lambda i: i, 10, "speaker_id"),  # the smallest profile
    (1000, lambda i: i // 50, lambda i: i, 900, ""),  # everybody has sentences of their own
    (10_000, lambda i: i // 10, lambda i: i % 10, 9880, "text"),  # few sentences, each of a thousand: a speaker costs less
    (10_180, lambda i: 0 if i < 10_000 else i % 9 + 1, lambda i: i, 10_052, "speaker_id"),  # nearly all by one speaker
    (5000, lambda i: i // 2, lambda i: i, 4872, ""),  # two clips per speaker
    (20_000, lambda i: i, lambda i: i, 19_872, ""),  # one
])
def test_a_split_shares_only_what_it_must_and_says_so(count, speaker, text, kept, shared):
    train, held, how = split_rows(make_rows(count, speaker, text))
    assert len(train) == kept and 1 <= len(held) <= VALIDATION_CLIPS
    for key in ("speaker_id", "text"):
        assert (count_shared(train, held, key) > 0) == (key == shared), how
    assert (shared == "text") == ("sentences are on both sides" in how)
    assert "test" not in {split_of(row["text"]) for row in held}


@pytest.mark.parametrize("rows", [[], make_rows(1, int, int), make_rows(300, lambda i: 0, lambda i: 0),
                                  make_rows(10_000, lambda i: 0, lambda i: i % 2)], ids=["none", "one", "one sentence", "two"])
def test_what_can_not_be_split_at_the_cost_of_a_tenth_is_refused_with_what_to_do(rows):
    with pytest.raises(TrainingError, match=f"{len(rows)} clips? of .* can not be split.*a tenth.*Give more clips"):
        split_rows(rows)


def test_a_split_follows_from_the_rows_and_the_seed_in_whatever_order_they_are():
    rows = make_rows(600, lambda i: i // 40, lambda i: i % 200)
    held = [{(row["speaker_id"], row["text"]) for row in split_rows(given, seed=seed)[1]}
            for given, seed in ((rows, 0), (rows, 0), (rows[::-1], 0), (rows, 1))]
    assert held[0] == held[1] == held[2] != held[3]


@pytest.mark.parametrize("speakers", [1, 4])
def test_where_clips_are_added_those_held_out_leave_only_for_new_ones(speakers):
    for before, after in ((800, 850), (800, 1000), (2000, 2500)):
        rows = make_rows(after, lambda i: i % speakers, lambda i: i)
        held = [{(row["speaker_id"], row["text"]) for row in split_rows(given)[1]} for given in (rows[:before], rows)]
        old = {(row["speaker_id"], row["text"]) for row in rows[:before]}
        assert len(held[0] - held[1]) <= len(held[1] - old) and len(held[0] & held[1]) >= 0.7 * len(held[0])


def test_where_speakers_are_added_those_held_out_stay_but_for_few():
    rows = make_rows(6000, lambda i: i // 20, lambda i: i)
    held = [{row["speaker_id"] for row in split_rows(rows[: 20 * speakers])[1]} for speakers in range(200, 300, 10)]
    moved = [len(before - after) for before, after in zip(held, held[1:], strict=False)]
    assert max(moved) <= 2 and sum(moved) <= len(held)  # of seven: as many as new ones come before


def test_two_spellings_of_the_same_words_are_one_sentence():
    texts = ["Hei, du!", "hei du", "HEI DU.", "På fjellet", "pa\u030a fjellet", "1905", "1906"]
    train, held, _ = split_rows([{"speaker_id": "0", "text": text} for text in texts])
    sides = {row["text"]: side for side, rows in (("train", train), ("held", held)) for row in rows}
    assert len({sides[text] for text in texts[:3]}) == len({sides[text] for text in texts[3:5]}) == 1 and len(held) == 1


@pytest.mark.parametrize("speakers", [1, 30])
def test_what_04_reads_is_not_held_out_and_what_was_spoken_to_be_held_out_is(speakers):
    texts = make_sentences("no", 250) + make_sentences("no", 27, split="validation") + make_sentences("no", 25, split="test")
    rows = [{"speaker_id": str(i % speakers), "text": text} for i, text in enumerate(texts)]
    train, held, _ = split_rows(rows)
    assert not [row for row in held if split_of(row["text"]) == "test"]
    if speakers == 1:
        assert not [row for row in train if split_of(row["text"]) == "validation"]


def test_clips_too_long_for_a_row_are_held_out_last():
    rows = [row | {"codes": np.zeros((400 if i % 3 else 50, 8), np.uint16)}
            for i, row in enumerate(make_rows(12, lambda i: 0, lambda i: i))]
    for seed in range(5):
        assert {len(row["codes"]) for row in split_rows(rows, 320, seed)[1]} == {50}


def test_a_million_rows_are_split_in_seconds():
    count = 10**6
    rows = datasets.Dataset.from_dict({"text": [spell(i % 700_000) for i in range(count)],
                                       "speaker_id": [str(i % 3000) for i in range(count)]})
    start = time.monotonic()
    train, held, _ = split_rows(rows)
    assert time.monotonic() - start < 30 and isinstance(train, datasets.Dataset)
    assert len(held) == VALIDATION_CLIPS and len(train) > 0.99 * count
