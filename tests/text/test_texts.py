"""Sentences are their language's, distinct and repeatable, and no split, seed or count trains a test sentence."""

import subprocess
import sys
from collections import Counter

import pytest

from csm_nb.languages import LANGUAGES
from csm_nb.text.sentences import (
    SENTENCES_DIR,
    SPLITS,
    VALIDATION_CLIPS,
    _sentences_by_template,
    count_sentences,
    draw_prompts,
    make_sentences,
    normalise_sentence,
    read_templates,
    split_of,
)

PUNCTUATION = set(".?,¿")


def all_sentences(code, split=None):
    lists = _sentences_by_template(code)
    return [s for name in ([split] if split else SPLITS) for part in lists[name] for s in part]


@pytest.mark.parametrize("code", LANGUAGES)
def test_sentences_are_spelled_with_the_letters_of_their_alphabet(code):
    letters = set(read_templates(code)[0])
    for sentence in (*all_sentences(code), *LANGUAGES[code].probes):
        assert set(sentence.lower()) - PUNCTUATION <= letters, sentence


@pytest.mark.parametrize("code", LANGUAGES)
def test_sentences_are_many_short_and_distinct(code):
    sentences = all_sentences(code)
    assert len({normalise_sentence(s) for s in sentences}) == len(sentences) >= 5000
    for sentence in sentences:
        assert 10 <= len(sentence) <= 40 and 2 <= len(sentence.replace(" ?", "?").split()) <= 6
        assert sentence[-1] in ".?" and sentence.lstrip("¿")[0].isupper()
        assert "  " not in sentence and "{" not in sentence


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_thousand_sentences_use_the_whole_vocabulary_of_at_least_150_words(code):
    words = Counter(word for s in make_sentences(code, 2000) for word in normalise_sentence(s).split())
    assert len(words) >= 150
    assert len(words) >= 0.95 * len({word for s in all_sentences(code) for word in normalise_sentence(s).split()})
    assert words.most_common(1)[0][1] <= 2000


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_template_is_drawn_from(code):
    parts = _sentences_by_template(code)["train"]
    drawn = set(make_sentences(code, 600))
    assert all(drawn.intersection(part) for part in parts)


@pytest.mark.parametrize("code", LANGUAGES)
def test_train_and_held_out_never_meet_under_any_seed(code):
    train = {normalise_sentence(s) for seed in range(5) for s in make_sentences(code, 2000, seed)}
    held_out = {split: {normalise_sentence(s) for seed in range(5, 9) for s in make_sentences(code, 150, seed, split)}
                for split in ("validation", "test")}
    assert train.isdisjoint(held_out["validation"] | held_out["test"]) and held_out["validation"].isdisjoint(held_out["test"])
    assert all({split_of(s) for s in part} == {name} for name, part in (held_out | {"train": train}).items())


def test_nothing_trained_in_one_language_is_held_out_in_another():
    train, validation, test = ({s for code in LANGUAGES for s in all_sentences(code, split)} for split in SPLITS)
    assert train.isdisjoint(validation | test) and validation.isdisjoint(test)


def test_probes_are_never_among_the_sentences():
    probes = {normalise_sentence(probe) for language in LANGUAGES.values() for probe in language.probes}
    for code in LANGUAGES:
        assert probes.isdisjoint(map(normalise_sentence, all_sentences(code)))


def test_a_probe_that_the_templates_could_make_is_left_out(monkeypatch):
    sentence = make_sentences("da", 1)[0]
    with monkeypatch.context() as patch:
        patch.setitem(LANGUAGES, "zz", type("Row", (), {"probes": (sentence.upper(),)}))
        lists = _sentences_by_template.__wrapped__("da")
    assert sentence not in {s for parts in lists.values() for part in parts for s in part}
    assert sentence in all_sentences("da")


@pytest.mark.parametrize("code", LANGUAGES)
def test_one_sentence_in_twenty_each_is_for_validation_and_for_tests(code):
    for split in ("validation", "test"):
        assert 0.04 < len(all_sentences(code, split)) / len(all_sentences(code)) < 0.06


def test_case_and_punctuation_do_not_carry_a_sentence_across_the_split():
    for sentence in make_sentences("fr", 300) + make_sentences("pl", 100, 0, "test"):
        variants = (sentence.upper(), sentence.rstrip(" .?"), sentence.replace(" ", "  "), f"¿{sentence}!")
        assert {split_of(variant) for variant in variants} == {split_of(sentence)}


def test_composed_and_decomposed_letters_are_one_sentence():
    composed, decomposed = "P\u00e5 \u00f8en.", "Pa\u030a \u00f8en."
    assert split_of(composed) == split_of(decomposed) and normalise_sentence(composed) == normalise_sentence(decomposed)


def test_same_request_gives_the_same_sentences_in_another_process():
    code = "from csm_nb.text.sentences import make_sentences as m; print('|'.join(m('sv', 40, 7) + m('sv', 9, 7, 'test')))"
    result = subprocess.run([sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True, encoding="utf8",
                            check=True, env={"PYTHONHASHSEED": "11"}, cwd=SENTENCES_DIR.parents[2])
    assert result.stdout.strip().split("|") == make_sentences("sv", 40, 7) + make_sentences("sv", 9, 7, "test")


def test_seeds_give_different_sentences_and_counts_what_was_asked():
    assert set(make_sentences("da", 200, 1)) != set(make_sentences("da", 200, 2))
    for count in (0, 1, 17):
        assert len(set(make_sentences("da", count, 3))) == count


@pytest.mark.parametrize("split", SPLITS)
def test_asking_for_too_many_says_how_many_there_are(split):
    there_are = len(all_sentences("pl", split))
    assert len(set(make_sentences("pl", there_are, split=split))) == there_are
    for count in (there_are + 1, -1):
        with pytest.raises(ValueError, match=f"there are {there_are}"):
            make_sentences("pl", count, split=split)


def test_unknown_language_and_split_are_refused():
    with pytest.raises(ValueError, match="en, no, sv"):
        make_sentences("xx", 1)
    with pytest.raises(ValueError, match="validation, test"):
        make_sentences("da", 1, split="held_out")


@pytest.mark.parametrize(("code", "words"), [
    ("no", "jeg ikke hva kjolen skjorta sjokolade kjøtt"), ("sv", "jag inte vad sjön stjärnor skjorta köper"),
    ("da", "jeg ikke hvad hund manden brød hus æg kød"),
])  # fmt: skip
def test_words_that_tell_the_language_are_frequent(code, words):
    counts = Counter(word for s in make_sentences(code, 3000) for word in normalise_sentence(s).split())
    assert min(counts[word] for word in words.split()) >= 10


def test_a_slot_that_is_misspelt_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("csm_nb.text.sentences.SENTENCES_DIR", tmp_path)
    (tmp_path / "da.yaml").write_text('letters: "ab"\nslots: {a: "x, y"}\ntemplates: ["{b} er her."]\n')
    with pytest.raises(ValueError, match=r"da\.yaml.*'a', 'b'"):
        read_templates("da")


def test_prompts_are_as_many_as_there_are_and_say_when_that_is_fewer():
    prompts, said = draw_prompts("fr", 40, 3)
    assert prompts == make_sentences("fr", 40, 3) + make_sentences("fr", 6, 3, "validation")
    assert said == "sentences of French: 40 for train, 6 for validation"
    there = count_sentences("fr"), VALIDATION_CLIPS
    assert count_sentences("fr", "validation") > there[1]  # more than a training looks at is not spoken
    prompts, said = draw_prompts("fr", 50_000)  # of the profile csm-1b
    assert len(prompts) == len(set(prompts)) == sum(there) < 50_000
    assert f"{there[0]} for train (50000 were asked for, the templates make no more)" in said
