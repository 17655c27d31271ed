"""A number is the same number in digits and in words, in every language and in each of the ways that it is said."""

import pytest

from csm_nb.languages import LANGUAGES
from csm_nb.text.numbers import WORDS, read_number, spell_number, spell_numbers, spell_ordinal, unify_numbers

CODES = list(LANGUAGES)


def test_every_language_has_its_numbers():
    assert set(WORDS) == set(LANGUAGES)


@pytest.mark.parametrize("language", CODES)
def test_every_number_is_read_back_as_itself(language):
    numbers = [*range(1300), *range(1800, 2100), 10_000, 21_000, 21_101, 123_456, 999_999, 1_000_000, 2_000_001, 3_450_000]
    assert [number for number in numbers if read_number(spell_number(number, language), language) != number] == []


@pytest.mark.parametrize(("language", "forms"), [
    ("no", ("27", "tjuesju", "tjuesyv", "sju og tyve", "syv og tyve", "sjuogtyve")),
    ("no", ("1984", "nitten hundre og åttifire", "nittenhundreogåttifire", "nitten åttifire")),
    ("no", ("101", "hundre og en", "ett hundre og ett", "et hundre og en")),
    ("sv", ("27", "tjugosju", "tjugo sju", "tjusju")), ("sv", ("1 250", "ettusen tvåhundrafemtio", "tusen tvåhundrafemti")),
    ("da", ("55", "femoghalvtreds", "fem og halvtreds", "femoghalvtredsindstyve")), ("da", ("92", "tooghalvfems")),
    ("de", ("27", "siebenundzwanzig", "sieben und zwanzig")),
    ("de", ("2.026", "zweitausendsechsundzwanzig", "zwei tausend sechsundzwanzig")),
    ("fr", ("97", "quatre-vingt-dix-sept", "nonante-sept", "quatre vingt dix sept")),
    ("fr", ("71", "soixante et onze", "soixante-et-onze")),
    ("es", ("22", "veintidós", "veintidos")), ("es", ("31", "treinta y uno", "treinta y un")),
    ("nl", ("23", "drieëntwintig", "drieentwintig")), ("nl", ("1905", "negentienhonderdvijf", "negentien honderd vijf")),
    ("it", ("28", "ventotto")), ("it", ("108", "centotto")), ("it", ("118", "centodiciotto", "cento diciotto")),
    ("pl", ("22", "dwadzieścia dwa", "dwadzieścia dwie")),
    ("en", ("1905", "nineteen hundred and five", "nineteen oh five", "nineteen-oh-five")),
    ("en", ("1,250", "1250", "twelve hundred fifty", "one thousand two hundred and fifty", "a thousand two hundred fifty")),
])  # fmt: skip
def test_the_ways_to_say_a_number_have_one_form(language, forms):
    assert len({unify_numbers(spell_numbers(form, language).lower().replace("-", " "), language) for form in forms}) == 1


@pytest.mark.parametrize(("language", "text"), [
    ("no", "to tre menn og hundre og så gikk han med ei bok"), ("en", "one or two of a kind"), ("es", "una y otra vez"),
    ("fr", "neuf et demi"), ("it", "sei brava e bella"), ("da", "en mand og et barn"), ("nl", "een man en een vrouw"),
])  # fmt: skip
def test_what_is_no_number_and_the_article_are_left_alone(language, text):
    assert unify_numbers(text, language) == text


@pytest.mark.parametrize(("language", "text", "said"), [
    ("no", "17. mai kom 3,5 kg. Hun er 27. Han er 3.", "syttende mai kom tre komma fem kg. Hun er tjuesju. Han er tre."),
    ("no", "-3 grader, 5 % av B2", "minus tre grader, fem prosent av B to"),
    ("no", "007 og 22334455667", "null null sju og to to tre tre fire fire fem fem seks seks sju"),
    ("no", "13. mai og 7. juni", "trettende mai og sjuende juni"),
    ("sv", "Den 20:e, 1:a plats, 1000 kr", "Den tjugonde, första plats, tusen kr"),
    ("da", "Den 30. december, 1.905,5", "Den tredivte december, nitten hundrede og fem komma fem"),
    ("da", "50. gang, 101 dage", "halvtredsindstyvende gang, hundrede og et dage"),
    ("de", "Am 17. Mai, das 3. Mal. Er ist 27. Sie", "Am siebzehnten Mai, das dritte Mal. Er ist siebenundzwanzig. Sie"),
    ("fr", "le 1er mai, la 1re et la 1ère fois, au 21e siècle",
     "le premier mai, la première et la première fois, au vingt et unième siècle"),
    ("es", "3,5 y la 2ª vez de 21000", "tres coma cinco y la segunda vez de veintiún mil"),
    ("nl", "De 1e van 1.000.000 en 101", "De eerste van een miljoen en honderdeen"),
    ("it", "Il 1º maggio, la 2ª", "Il primo maggio, la seconda"),
    ("pl", "17 maja 3,14", "siedemnastego maja trzy przecinek czternaście"),
    ("en", "On May 21st 1,905 of 2.50 in 10-12",
     "On May twenty-first nineteen hundred and five of two point five zero in ten-twelve"),
])  # fmt: skip
def test_numbers_in_a_text_are_written_as_the_language_says_them(language, text, said):
    assert spell_numbers(text, language) == said


@pytest.mark.parametrize("language", CODES)
def test_ordinals_of_a_month_are_all_different_words(language):
    said = [spell_ordinal(day, language) for day in range(1, 32)]
    assert len(set(said)) == 31 and not any(character.isdigit() for word in said for character in word)


@pytest.mark.parametrize("language", CODES)
@pytest.mark.parametrize("text", ["", "%", "1.", "1.2.3", "12:30", "1 234 567 890 123", "3,", ",5", "0", "00", "a1b2c3", "½ ² ٣",
                                  "1-2-3 -4", "9" * 400 + "th", "7" * 400 + ". mai"])
def test_any_text_comes_through_without_digits(language, text):
    said = unify_numbers(spell_numbers(text, language), language)
    assert not any(character.isdecimal() for character in said)
