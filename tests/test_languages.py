"""The table of languages agrees with the tools whose names it lists."""

import re

import pytest
from transformers.models.whisper.tokenization_whisper import LANGUAGES as WHISPER_LANGUAGES

from csm_nb.languages import LANGUAGES, get_language
from csm_nb.phonemes.ipa import load_backend

NEIGHBOURS = ("no", "sv", "da")


def test_every_code_leads_to_its_own_row():
    assert list(LANGUAGES) == ["en", "no", "sv", "da", "de", "fr", "es", "nl", "it", "pl"]
    assert all(get_language(code).code == code for code in LANGUAGES)


@pytest.mark.parametrize("code", ["xx", "", "nb", None, False, "DA"])
def test_unknown_code_is_refused_with_the_codes_there_are(code):
    with pytest.raises(ValueError, match=r"en, no, sv, da, .* pl"):
        get_language(code)


def test_yaml_s_false_for_no_is_explained():
    with pytest.raises(ValueError, match='write "no"'):
        get_language(False)


def test_whisper_and_espeak_have_every_language():
    assert {language.whisper for language in LANGUAGES.values()} <= set(WHISPER_LANGUAGES.values())
    for language in LANGUAGES.values():
        assert language.espeak in load_backend(language.espeak).supported_languages()


def test_no_label_counts_as_two_languages():
    labels = [label for language in LANGUAGES.values() for label in language.mms_lid]
    assert len(labels) == len(set(labels)) and all(re.fullmatch("[a-z]{3}", label) for label in labels)
    assert set(get_language("no").mms_lid) == {"nob", "nno"}
    assert all(language.iso3 in language.mms_lid for language in LANGUAGES.values())


def test_traits_name_what_is_measured():
    traits = {code: language.traits for code, language in LANGUAGES.items() if language.traits}
    assert traits == {"no": ("pitch_accent",), "sv": ("pitch_accent",), "da": ("stod",)}


def test_a_probe_belongs_to_one_language():
    probes = [probe for language in LANGUAGES.values() for probe in language.probes]
    assert len(probes) == len(set(probes)) == 8 * len(LANGUAGES)
    assert all(2 <= len(probe.split()) <= 7 for probe in probes)


def test_scandinavian_probes_differ_in_words_and_not_only_in_marks():
    words = {code: [set(re.findall(r"\w+", p.lower())) for p in get_language(code).probes] for code in NEIGHBOURS}
    for one in NEIGHBOURS:
        for other in set(NEIGHBOURS) - {one}:
            # the probes correspond line by line; in each a neighbour says at least one word otherwise
            assert all(a - b and b - a for a, b in zip(words[one], words[other], strict=True)), (one, other)
