"""How long a text is when read out, and whose letters and words it is made of."""

import pytest

from csm_nb.languages import LANGUAGES
from csm_nb.text.common import COMMON, find_language
from csm_nb.text.letters import count_fewest, count_letters, list_foreign
from csm_nb.text.sentences import SPLITS, count_sentences, make_sentences

# Of general sense, in words that any speaker has: none of them is among the sentences of the workbook.
SAID = {
    "en": "They have not seen him since he left for the city with his mother.",
    "no": "Jeg har ikke sett ham siden han dro til byen med moren sin, og nå vet jeg ikke hva jeg skal si.",
    "sv": "Jag har inte sett honom sedan han åkte till staden och nu vet jag inte vad jag ska säga.",
    "da": "Jeg har ikke set ham siden han tog af sted, og nu ved jeg ikke hvad jeg skal sige til dig om noget.",
    "de": "Ich habe ihn nicht mehr gesehen, seit er mit seiner Mutter in die Stadt gefahren ist.",
    "fr": "Je ne sais pas où il est allé avec sa mère, mais nous avons tout vu dans la ville.",
    "es": "No sé adónde fue con su madre, pero lo hemos visto todo en la ciudad y era muy tarde.",
    "nl": "Ik heb hem niet meer gezien sinds hij met zijn moeder naar de stad is gegaan.",
    "it": "Non so dove sia andato con sua madre, ma della città ho visto anche questo e più di quello.",
    "pl": "Nie wiem, gdzie on jest, ale już go nie było, gdy przyszła jego matka i ja z nią.",
}


def test_plain_words_count_their_letters():
    for text in ("The cat is here.", "Where are you?", "Jeg vet ikke. Å nei!", "I am here"):
        assert count_letters(text) == len(text)


def test_the_fewest_letters_are_those_of_the_words_that_a_number_is_read_as():
    assert count_fewest("Kl. 7!", "no") == len("klsju") and count_fewest("Åh, nej ...", "da") == 5
    assert count_fewest("1000", "en") == len("onethousand") < count_letters("1000")


@pytest.mark.parametrize(("text", "language", "foreign"), [
    ("Собака", "da", "Собака"), ("Müller und Łódź", "da", ""), ("ʃəˈvʊ", "fr", ""), ("1ª µm", "es", ""), ("α og β", "no", "αβ"),
    ("Hej", "da", ""), ("你好", "en", "你好"), ("e\u0301", "pl", ""),
])  # fmt: skip
def test_letters_of_another_script_are_foreign_and_those_with_other_accents_are_not(text, language, foreign):
    assert "".join(list_foreign(text, language)) == foreign


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_text_is_found_under_every_label_but_its_own(language):
    assert find_language(SAID[language], language) == ("", [])
    for label in set(LANGUAGES) - {language}:
        assert find_language(SAID[language], label)[0] == language or {label, language} == {"no", "da"}, label


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_sentence_of_the_workbook_is_taken_for_another_language(language):
    texts = [text for split in SPLITS for text in make_sentences(language, min(1000, count_sentences(language, split)), 0, split)]
    texts += LANGUAGES[language].probes
    longer = [" ".join(texts[i : i + 4]) for i in range(len(texts))] + [f"{text} {text} {text} {text}" for text in texts]
    assert [text for text in (*texts, *longer) if find_language(text, language)[0]] == []


def test_a_title_or_a_quotation_makes_no_text_one_of_another_language():
    assert find_language("Han leste «The Lord of the Rings» og «The Art of War».", "no") == ("", [])
    assert find_language("of the and", "no")[0] == "en" and find_language("The Lord", "no") == ("", [])


def test_every_language_of_the_table_has_its_common_words():
    assert set(COMMON) == set(LANGUAGES) and all(60 <= len(set(words.split())) <= 150 for words in COMMON.values())
