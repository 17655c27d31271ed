"""Numbers in words, and one form for each: "27", "tjuesju" and "sju og tyve" are the same number, said or written."""

import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache, lru_cache

from num2words import num2words

from csm_nb.languages import get_language

LONGEST = 9  # digits; longer numbers (of a telephone, say) are read digit by digit, and so are those that begin with 0
WINDOW = 10  # words that one number may take: "neuf cent quatre vingt dix neuf mille ..."


@dataclass(frozen=True)
class Words:
    """What a language says besides the cardinals of num2words.

    `others` are further words for a number below 100, from which compounds follow. `hundreds` maps the words for hundreds
    to how many they are, `ones` are the words that may stand before a single hundred or thousand. `joiner` may stand
    before what follows hundreds and thousands, `between` between ten and unit; `units_first` is the word between a unit
    and the ten behind it ("sju og tyve"). `pairs`: years are also two numbers ("nineteen eighty-four"). `ordinal` is the
    pattern behind a number in digits that makes it an ordinal.
    """

    thousands: tuple
    millions: tuple
    hundreds: dict
    others: dict = field(default_factory=dict)
    ones: tuple = ("",)
    joiner: str = ""
    between: str = ""
    units_first: str = ""
    point: str = "komma"
    percent: str = "procent"
    minus: str = "minus"
    pairs: bool = False
    ordinal: str = ""


_MONTHS = {
    "de": "Januar|Februar|März|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember",
    "pl": "stycznia|lutego|marca|kwietnia|maja|czerwca|lipca|sierpnia|września|października|listopada|grudnia",
}
_BEFORE_A_WORD = r"\.(?=\s+[a-zæøåäöü])"  # "17. mai"; a capital begins the next sentence
WORDS = {
    "en": Words(("thousand",), ("million",), {"hundred": 1}, ones=("one", "a"), joiner="and", point="point",
                percent="percent", pairs=True, ordinal=r"(?:st|nd|rd|th)\b"),
    "no": Words(("tusen",), ("million", "millioner"), {"hundre": 1, "hundrede": 1},
                {1: ("en", "ett", "et", "ei"), 7: ("syv",), 20: ("tyve",), 30: ("tredve",)}, ("", "en", "ett", "et"), "og",
                units_first="og", percent="prosent", pairs=True, ordinal=_BEFORE_A_WORD),
    "sv": Words(("tusen",), ("miljon", "miljoner"), {"hundra": 1},
                {1: ("en", "et"), 20: ("tjuge", "tju"), 30: ("tretti",), 40: ("fyrti", "förti"), 50: ("femti",), 60: ("sexti",),
                 70: ("sjutti",), 80: ("åtti",), 90: ("nitti",)}, ("", "ett", "et"), "och", ordinal=r":(?:[ae]|de|te)\b"),
    "da": Words(("tusinde", "tusind"), ("million", "millioner"), {"hundrede": 1, "hundred": 1},
                {1: ("en", "én", "ét"), 30: ("tredve",), 40: ("fyrretyve",), 50: ("halvtredsindstyve",),
                 60: ("tresindstyve",), 70: ("halvfjerdsindstyve",), 80: ("firsindstyve",), 90: ("halvfemsindstyve",)},
                ("", "et", "en"), "og", units_first="og", ordinal=_BEFORE_A_WORD),
    "de": Words(("tausend",), ("million", "millionen"), {"hundert": 1},
                {1: ("ein", "eine", "einen", "einem", "einer"), 2: ("zwo",), 30: ("dreissig",)}, ("", "ein", "eine"), "und",
                units_first="und", point="Komma", percent="Prozent",
                ordinal=rf"\.(?=\s+(?:[a-zäöü]|{_MONTHS['de']}|Jahrhundert|Klasse|Mal|Platz|Stock|Tag))"),
    "fr": Words(("mille", "mil"), ("million", "millions"), {"cents": 1, "cent": 1},
                {1: ("une",), 70: ("septante",), 80: ("huitante", "octante"), 90: ("nonante",)}, between="et",
                point="virgule", percent="pour cent", minus="moins", ordinal=r"(?:ers?|[èe]?res?|i?[èe]mes?|es?|nde?s?)\b"),
    "es": Words(("mil",), ("millón", "millones"),
                {"cien": 1, "ciento": 1, "doscientos": 2, "trescientos": 3, "cuatrocientos": 4, "quinientos": 5,
                 "seiscientos": 6, "setecientos": 7, "ochocientos": 8, "novecientos": 9, "doscientas": 2, "trescientas": 3,
                 "cuatrocientas": 4, "quinientas": 5, "seiscientas": 6, "setecientas": 7, "ochocientas": 8,
                 "novecientas": 9},
                {1: ("un", "una"), 21: ("veintiún", "veintiuna")}, between="y", point="coma", percent="por ciento",
                minus="menos", ordinal=r"\.?[ºª°]"),
    "nl": Words(("duizend",), ("miljoen",), {"honderd": 1}, {1: ("een",)}, ("", "een"), "en", units_first="en",
                minus="min", ordinal=r"(?:ste|de|e)\b"),
    "it": Words(("mille", "mila"), ("milione", "milioni"), {"cento": 1, "cent": 1}, {1: ("un", "una")}, joiner="e",
                point="virgola", percent="per cento", minus="meno", ordinal=r"[ºª°]"),
    "pl": Words(("tysiące", "tysięcy", "tysiąc"), ("milion", "miliony", "milionów"),
                {"sto": 1, "dwieście": 2, "trzysta": 3, "czterysta": 4, "pięćset": 5, "sześćset": 6, "siedemset": 7,
                 "osiemset": 8, "dziewięćset": 9},
                {1: ("jedna", "jedno"), 2: ("dwie",)}, point="przecinek",
                ordinal=rf"\.?(?=\s+(?:{_MONTHS['pl']}))|{_BEFORE_A_WORD}"),
}  # fmt: skip


# Numbers to words


def spell_number(number: int, language: str) -> str:
    """Return a whole number in words as `language` says it; 1100 to 1999 in hundreds where years are said so.

    num2words has most of them; hundreds and thousands of Norwegian, Swedish and Danish, which it gets wrong ("etttusen",
    "ettusinde og ethundrede"), are put together here. Raises ValueError for an unknown language.
    """
    words = WORDS[get_language(language).code]
    if number < 0:
        return f"{words.minus} {spell_number(-number, language)}"
    if language in ("en", "no", "sv", "da", "de", "nl") and 1100 <= number < 2000:
        return _spell_hundreds(number, language)
    if language in ("no", "sv", "da"):
        return _compose(number, language)
    text = num2words(number, lang=language).replace(",", "")
    if language == "nl" and number > 1:
        return text.replace("één", "een")
    if language == "es":  # an adjective before mil
        return text.replace("veintiuno mil", "veintiún mil").replace("uno mil", "un mil")
    return text.replace("dicotto", "diciotto") if language == "it" else text


def _spell_small(number, language):
    text = num2words(number, lang=language)
    return text.replace("syv", "sju") if language == "no" else text


def _spell_hundreds(number, language):
    """Spell hundreds, up to 19 of them, and what is left: Scandinavian and Germanic."""
    many, rest = divmod(number, 100)
    hundred = {"en": "hundred", "no": "hundre", "sv": "hundra", "da": "hundrede", "de": "hundert", "nl": "honderd"}[language]
    joined = language in ("sv", "de", "nl")
    count = "" if many == 1 else _spell_small(many, language)
    head = count + hundred if joined else f"{count} {hundred}".strip()
    if not rest:
        return head
    return head + _spell_small(rest, language).replace("één", "een") if joined else (
        f"{head} {WORDS[language].joiner} {_spell_small(rest, language)}")


def _compose(number, language):
    thousand, million, milliard = {
        "no": ("tusen", ("en million", "millioner"), ("en milliard", "milliarder")),
        "sv": ("tusen", ("en miljon", "miljoner"), ("en miljard", "miljarder")),
        "da": ("tusind", ("en million", "millioner"), ("en milliard", "milliarder")),
    }[language]
    for size, (one, several) in ((10**9, milliard), (10**6, million)):
        if number >= size:
            many, rest = divmod(number, size)
            head = one if many == 1 else f"{_compose(many, language)} {several}"
            return f"{head} {_compose(rest, language)}" if rest else head
    if number < 100:
        return _spell_small(number, language)
    if number < 1000:
        return _spell_hundreds(number, language)
    many, rest = divmod(number, 1000)
    count = "" if many == 1 else _compose(many, language)
    if language == "sv":
        count = count.removesuffix("t") if count.endswith("tt") else count  # three t become two: tjugoettusen
        return count + thousand + (f" {_compose(rest, language)}" if rest else "")
    joiner = f" {WORDS[language].joiner} " if rest < 100 else " "
    return f"{count} {thousand}".strip() + (joiner + _compose(rest, language) if rest else "")


_DANISH_TENS = {20: "tyvende", 30: "tredivte", 40: "fyrretyvende", 50: "halvtredsindstyvende", 60: "tresindstyvende",
                70: "halvfjerdsindstyvende", 80: "firsindstyvende", 90: "halvfemsindstyvende"}  # fmt: skip
_ORDINALS = {"no": {"syvende": "sjuende", "trettførste": "trettende"}, "sv": {"tjugode": "tjugonde"},
             "es": {"décimoprimero": "undécimo", "décimosegundo": "duodécimo", "quadra": "cuadra"}}


def spell_ordinal(number: int, language: str) -> str:
    """Return an ordinal below 100 in words, masculine where there is a choice, mended where num2words errs.

    Of a number above it is the cardinal.
    """
    if not 0 < number < 100:
        return spell_number(number, language)
    if language == "da" and number >= 20:
        ten, unit = number // 10 * 10, number % 10
        return (("en" if unit == 1 else num2words(unit, lang="da")) + "og" if unit else "") + _DANISH_TENS[ten]
    text = num2words(number, lang=language, to="ordinal")
    for wrong, right in _ORDINALS.get(language, {}).items():
        text = text.replace(wrong, right)
    return text


def spell_numbers(text: str, language: str) -> str:
    """Return `text` with every number in digits written in words: whole, decimal, ordinal, negative, percent, years, times.

    Points, commas, spaces and apostrophes that group thousands are told from decimal signs as the language writes them.
    Digits inside a word are taken out of it ("B2" is "B to").
    """
    words, comma = WORDS[get_language(language).code], "." if language == "en" else ","
    groups = "[,' \u00a0\u202f\u2009]" if language == "en" else "[.' \u00a0\u202f\u2009]"
    pattern = rf"""(?P<minus>(?<![\w.,%])[-−](?=\d))?
        (?P<whole>(?<!\d)\d{{1,3}}(?P<group>{groups})\d{{3}}(?:(?P=group)\d{{3}})*(?!\d)|\d+)
        (?:(?:{re.escape(comma)}(?P<decimals>\d+)(?!\d))|(?P<ordinal>{words.ordinal}))?
        (?P<percent>[ \u00a0\u202f]?%)?"""

    def spell(match):
        digits = re.sub(r"\D", "", match["whole"])
        ordinal = match["ordinal"] is not None and len(digits) <= 2
        said = _inflect(int(digits), match, language) if ordinal else _read_digits(digits, language)
        if match["decimals"]:
            said += f" {words.point} {_read_decimals(match['decimals'], language)}"
        before = f"{words.minus} " if match["minus"] else ""
        after = f" {words.percent}" if match["percent"] else ""
        inside = [part[:1].isalpha() for part in (match.string[: match.start()][::-1], match.string[match.end() :])]
        return " " * inside[0] + before + said + after + " " * inside[1]

    return re.sub(pattern, spell, text, flags=re.VERBOSE)


def _read_digits(digits, language):
    if len(digits) > LONGEST or (len(digits) > 1 and digits[0] == "0"):
        return " ".join(spell_number(int(digit), language) for digit in digits)
    return spell_number(int(digits), language)


def _read_decimals(digits, language):
    if len(digits) > 2 or digits[0] == "0" or language in ("en", "de"):
        return " ".join(spell_number(int(digit), language) for digit in digits)
    return spell_number(int(digits), language)


def _inflect(number, match, language):
    """Return an ordinal in the form that its suffix or the words around it ask for."""
    said, suffix = spell_ordinal(number, language), match["ordinal"]
    if language == "de" and re.search(r"\b(?:am|beim|bis|dem|den|des|im|seit|vom|zum)\s+$", match.string[: match.start()], re.I):
        return said + "n"
    if language == "fr" and number == 1 and suffix.rstrip("s") in ("re", "ère", "ere"):
        return "première"
    if suffix.endswith("ª"):
        return said[:-1] + "a"
    if language == "pl" and re.match(rf"\s+(?:{_MONTHS['pl']})", match.string[match.end() :]):  # "17 maja": of the seventeenth
        return " ".join(re.sub("y$", "ego", re.sub("i$", "iego", word)) for word in said.split())
    return said


# Words to one form


def unify_numbers(text: str, language: str) -> str:
    """Return lowercase words with every number in words in one form, whatever was said or written for it.

    A form is read as a whole number, which is then spelled by spell_number; a lone one stays as it is, since it is also
    the article. What is no number is left alone.
    """
    words, out, place = text.split(), [], 0
    while place < len(words):
        for end in range(min(len(words), place + WINDOW), place, -1):
            number = read_number("".join(words[place:end]), language)
            if number is not None and not (number == 1 and end == place + 1):
                out.append(spell_number(number, language).lower().replace("-", " "))
                place = end
                break
        else:
            out.append(words[place])
            place += 1
    return " ".join(out)


@lru_cache(maxsize=4096)
def read_number(words: str, language: str) -> int | None:
    """Return the whole number below 10^9 that `words` say, written without spaces and hyphens; None for anything else."""
    return _read(_fold(words), get_language(language).code)


def _fold(text):
    """Return lowercase letters alone, without accents: "veintiséis" and "veintiseis" are one."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text.lower()) if letter.isalpha())


@cache
def _list_small(language):
    """Return {form: number} of 0 to 99."""
    words, forms = WORDS[language], {}
    for number in range(100):
        forms[number] = {_fold(_spell_small(number, language)), *map(_fold, words.others.get(number, ()))}
        ten, unit = number // 10 * 10, number % 10
        if number > 20 and unit:
            for first in forms[ten]:
                for second in forms[unit]:
                    forms[number] |= {first + second, first + words.between + second}
                    if words.units_first:
                        forms[number].add(second + words.units_first + first)
    if language == "en":
        forms[0].add("nought")
    return {form: number for number in reversed(range(100)) for form in forms[number]}


def _read(text, language):
    words = WORDS[language]
    for million in words.millions:
        head, found, rest = text.partition(_fold(million))
        if found:
            many = 1 if head in (*words.ones, "un", "en", "eine", "een") else _read_thousands(head, language)
            rest = _read_rest(rest, language, _read_thousands)
            if many and rest is not None:
                return many * 10**6 + rest
    return _read_thousands(text, language)


def _read_thousands(text, language):
    words = WORDS[language]
    number = _read_hundreds(text, language)
    if number is not None:
        return number
    for thousand in words.thousands:
        head, found, rest = text.partition(_fold(thousand))
        if found:
            many = 1 if head in words.ones else _read_hundreds(head, language)
            rest = _read_rest(rest, language, _read_hundreds)
            if many and many < 1000 and rest is not None and rest < 1000:
                return many * 1000 + rest
    return None


def _read_hundreds(text, language):
    """Read up to 999, and to 1999 in hundreds or as two numbers."""
    words, small = WORDS[language], _list_small(language)
    if text in small:
        return small[text]
    for hundred, count in words.hundreds.items():
        head, found, rest = text.partition(_fold(hundred))
        if not found:
            continue
        many = count if head in words.ones else small.get(head, 0) if count == 1 else 0
        rest = _read_rest(rest, language, _read_small)
        if 0 < many < 20 and rest is not None:
            return many * 100 + rest
    if words.pairs:
        for end in range(3, len(text) - 2):
            first, second = small.get(text[:end], 0), small.get(text[end:], 0)
            if 11 <= first <= 20 and second >= 10:
                return first * 100 + second
            if language == "en" and 11 <= first <= 20 and text[end:].startswith("o"):
                unit = small.get(text[end:].removeprefix("oh"), small.get(text[end + 1 :], 0))
                if 0 < unit < 10:
                    return first * 100 + unit
    return None


def _read_small(text, language):
    """Read up to 99; Italian drops a vowel before otto and ottanta: centotto."""
    small = _list_small(language)
    return small.get(text, small.get("o" + text) if language == "it" else None)


def _read_rest(text, language, read):
    """Return what follows a hundred or a thousand, after its joiner; 0 for nothing, None where it is no number."""
    if not text:
        return 0
    number = read(text, language)
    joiner = WORDS[language].joiner
    return read(text.removeprefix(joiner), language) if number is None and joiner and text.startswith(joiner) else number
