"""Sentences to train and test with: templates over hand-written words, split so that tests never see training text.

csm_nb/text/sentences/<code>.yaml holds `letters` (the lowercase alphabet of the language, spaces and apostrophe included
where it has them), `slots` (name: words or phrases in their ready forms, separated by commas) and `templates`. A new
language is a new file there and a row in `csm_nb.languages`.
"""

import functools
import hashlib
import itertools
import re
import unicodedata
from pathlib import Path

import numpy as np
import yaml

from csm_nb.clean import clean_text, read_text
from csm_nb.languages import LANGUAGES, get_language

SENTENCES_DIR = Path(__file__).parent / "sentences"
MIN_WORDS, MAX_WORDS = 2, 6
MIN_CHARACTERS, MAX_CHARACTERS = 10, 40
SPLITS = ("train", "validation", "test")
HELD_OUT = 10  # one sentence in ten: half of them for validation, half for tests
VALIDATION_CLIPS = 128  # that a training looks at: about 15 minutes of speech; more only makes every evaluation slower
_NOT_A_WORD = re.compile(r"[\W\d_]+")


def normalise_sentence(sentence: str) -> str:
    """Return words only, lowercase, composed Unicode: what makes two sentences the same for the split."""
    return _NOT_A_WORD.sub(" ", unicodedata.normalize("NFC", sentence).lower()).strip()


def split_of(sentence: str) -> str:
    """Return "train", "validation" or "test" (one in twenty each of the last two), by a hash of the sentence's words alone.

    So it depends on no count, seed or list, and case or punctuation can not carry a sentence across. Validation is what a
    training looks at, its loss and the choice of a checkpoint; test is what 00, 04 and 05 judge by, and nothing is chosen on it.
    """
    digest = hashlib.blake2b(normalise_sentence(sentence).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    return "train" if number % HELD_OUT else ("validation", "test")[number // HELD_OUT % 2]


def read_templates(language: str) -> tuple[str, dict[str, list[str]], list[str]]:
    """Return (letters, slots, templates) of sentences/<language>.yaml, checked: every slot named exists and is used."""
    path = SENTENCES_DIR / f"{get_language(language).code}.yaml"
    data = yaml.safe_load(read_text(path))
    slots = {name: [clean_text(item) for item in words.split(",")] for name, words in data["slots"].items()}
    templates = [clean_text(template) for template in data["templates"]]
    named = {name for template in templates for name in re.findall(r"{(\w+)}", template)}
    if named != set(slots):
        raise ValueError(f"{path}: slots {sorted(named ^ set(slots))} are either used and not defined or not used")
    return data["letters"], slots, templates


def spell_alphabet(language: str) -> str:
    """Return the letters of `language`, small and capital: what a tokenizer has to know for it."""
    letters = read_templates(language)[0].strip()
    return f"{letters} {letters.upper()}"


@functools.cache
def _sentences_by_template(language: str) -> dict[str, list[list[str]]]:
    _, slots, templates = read_templates(language)
    seen = {normalise_sentence(probe) for other in LANGUAGES.values() for probe in other.probes}
    lists = {split: [[] for _ in templates] for split in SPLITS}
    for number, template in enumerate(templates):
        names = re.findall(r"{(\w+)}", template)
        frame = re.sub(r"{\w+}", "{}", template)
        for words in itertools.product(*(slots[name] for name in names)):
            text = frame.format(*words)
            start = 1 if text[0] in "¿¡" else 0
            text = text[:start] + text[start].upper() + text[start + 1 :]
            count = sum(any(map(str.isalpha, part)) for part in text.split())
            fits = MIN_WORDS <= count <= MAX_WORDS and MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS
            if fits and (key := normalise_sentence(text)) not in seen:
                seen.add(key)
                lists[split_of(key)][number].append(text)
    return lists


def make_sentences(language: str, count: int, seed: int = 0, split: str = "train") -> list[str]:
    """Return `count` distinct sentences of `language`, the same for the same arguments.

    They are drawn from the templates in turn, so that a template with many combinations does not crowd out the rest.
    2 to 6 words, 10 to 40 characters, numbers as words. No probe sentence of any language is among them. Raises
    ValueError for an unknown language or split, and for a count beyond what the templates make (it says how many).
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
    lists = _sentences_by_template(get_language(language).code)[split]
    total = sum(map(len, lists))
    if not 0 <= count <= total:
        raise ValueError(
            f"{count} {split} sentences of {language!r} asked for, there are {total}: ask for 0 to {total}, "
            f"or add templates or words to {SENTENCES_DIR.name}/{language}.yaml"
        )
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(texts)) for texts in lists]
    longest = max(map(len, lists))
    turns = ((texts, order[turn]) for turn in range(longest)
             for texts, order in zip(lists, orders, strict=True) if turn < len(texts))
    drawn = [texts[i] for texts, i in itertools.islice(turns, count)]
    return [drawn[i] for i in rng.permutation(count)]


def count_sentences(language: str, split: str = "train") -> int:
    """Return how many sentences of a split the templates of `language` make: the most that make_sentences gives."""
    return sum(map(len, _sentences_by_template(get_language(language).code)[split]))


def draw_prompts(language: str, clips: int, seed: int = 0) -> tuple[list[str], str]:
    """Return (sentences, what they are in words): `clips` to train on, then those for validation.

    For validation a tenth as many are added, and two, 128 at most. Where the templates make fewer, it is all that there are,
    and the words say so: a profile asks every language for as many.
    """
    sentences, said = [], []
    for split, count in (("train", clips), ("validation", min(clips // HELD_OUT + 2, VALIDATION_CLIPS))):
        there = count_sentences(language, split)
        sentences += make_sentences(language, min(count, there), seed, split)
        note = f" ({count} were asked for, the templates make no more)" if count > there else ""
        said.append(f"{min(count, there)} for {split}{note}")
    return sentences, f"sentences of {get_language(language).name}: {', '.join(said)}"
