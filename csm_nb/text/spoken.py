"""A text as it is read out: numbers, dates, times, amounts of money, units and abbreviations in words."""

import re
from datetime import date
from functools import cache
from pathlib import Path

import yaml
from babel import Locale
from babel.dates import format_date, get_month_names
from babel.plural import to_python
from babel.units import format_unit
from num2words import num2words

from csm_nb.clean import read_text
from csm_nb.languages import get_language
from csm_nb.text.numbers import WORDS, spell_number, spell_numbers, spell_ordinal

# Signs of units and their names in the Unicode CLDR (by Babel), which has each in the plural that a number asks for. What is
# also a word of a language is not among its units: min, ha.
UNITS = {
    "km": "length-kilometer", "m": "length-meter", "cm": "length-centimeter", "mm": "length-millimeter", "kg": "mass-kilogram",
    "g": "mass-gram", "mg": "mass-milligram", "l": "volume-liter", "dl": "volume-deciliter", "cl": "volume-centiliter",
    "ml": "volume-milliliter", "°C": "temperature-celsius", "°F": "temperature-fahrenheit", "°": "angle-degree",
    "km²": "area-square-kilometer", "m²": "area-square-meter", "m³": "volume-cubic-meter", "km/h": "speed-kilometer-per-hour",
    "km/t": "speed-kilometer-per-hour", "km/u": "speed-kilometer-per-hour", "m/s": "speed-meter-per-second",
    "h": "duration-hour", "kWh": "energy-kilowatt-hour", "kW": "power-kilowatt", "W": "power-watt", "MW": "power-megawatt",
    "Hz": "frequency-hertz", "kHz": "frequency-kilohertz", "MHz": "frequency-megahertz", "GHz": "frequency-gigahertz",
    "kB": "digital-kilobyte", "MB": "digital-megabyte", "GB": "digital-gigabyte", "TB": "digital-terabyte",
    "‰": "concentr-permille",
}  # fmt: skip
CODES = {"EUR": "€", "USD": "$", "GBP": "£", "PLN": "zł"}  # ISO 4217
DAY_SIGNS = {"sv": ":e", "en": "th"}  # behind the day of a date: read as an ordinal, which these two write without a sign
FIRST_SIGNS = {"fr": "er", "it": "º"}  # behind the first of a month
YEARS = "in|since|until|till|from|by|during|of|before|after|year|between|and|to"  # before a year, in English
CENTURY = 69  # two digits from this on are a year of the 20th century, as in POSIX (strptime, %y)
_CAPITAL = r"[^\W\d_a-zß-öø-ÿœąćęłńśźż]"
LOCALES = {"no": "nb"}  # what the CLDR calls a language, where it is another code


def read_out(text: str, language: str) -> str:
    """Return `text` as `language` reads it: "kl. 14:30" is "klokken fjorten tretti". Case and punctuation stay.

    In words are abbreviations (spoken.yaml), dates in figures, times of day, amounts of money, units behind a number, and all
    numbers (numbers.spell_numbers). Dates and units are worded by the Unicode CLDR. Text without any of these stays as it is.
    """
    code = get_language(language).code
    text = _expand_short(text, code)
    if any(map(str.isdecimal, text)):
        for read in (_read_dates, _read_times, _read_money, _read_units):
            text = read(text, code)
    return spell_numbers(text, code)


def read_rows(rows) -> list[dict]:
    """Return `rows` with each text as its language reads it out; `written` is how it stood, only where that differs."""
    said = ((row, read_out(row["text"], row["language"])) for row in rows)
    return [row if text == row["text"] else row | {"text": text, "written": row["text"]} for row, text in said]


@cache
def _read_table():
    return yaml.safe_load(read_text(Path(__file__).with_suffix(".yaml")))


def _list_signs(code):
    """Return (the decimal sign, the signs that may group thousands) of a language."""
    return (".", "[,' \u00a0\u202f]") if code == "en" else (",", "[.' \u00a0\u202f]")


def _match_number(code):
    """Return the pattern of a number in digits: its thousands grouped as the language does, its decimals."""
    comma, groups = _list_signs(code)
    return rf"(?<![\w.,:/])(?:\d{{1,3}}(?:{groups}\d{{3}})+(?!\d)|\d{{1,15}})(?:{re.escape(comma)}\d{{1,9}})?(?![\d:])"


def _read_value(number, code):
    """Return the value of a number as _match_number finds it: an int, or a float where it has decimals."""
    comma, groups = _list_signs(code)
    whole, _, decimals = re.sub(groups, "", number).partition(comma)
    return float(f"{whole}.{decimals}") if decimals else int(whole)


def _count(number, value, code):
    """Return a number before a noun: Spanish and German shorten the 1 at its end ("veintiún euros"), others stay digits."""
    if code in ("es", "de") and isinstance(value, int) and value % 10 == 1 and value % 100 != 11:
        return re.sub("uno$", "un", re.sub("veintiuno$", "veintiún", re.sub("eins$", "ein", spell_number(value, code))))
    return number


# Abbreviations


@cache
def list_short(code):
    """Return (pattern, {abbreviation without spaces: (said, may end a sentence)}) of a language."""
    table, patterns, said = _read_table()[code], [], {}
    for group, behind in (("short", ""), ("last", ""), ("titles", rf"(?=\s+{_CAPITAL})"), ("counts", r"(?=\s?\d)")):
        for short in table[group]:
            pattern = re.escape(short).replace(r"\.", r"\.\s?").removesuffix(r"\s?").replace(r"\s?\ ", r"\s?")
            pattern = f"[{short[0].upper()}{short[0]}]{pattern[len(re.escape(short[0])):]}" if short[0].isalpha() else pattern
            patterns.append((len(short), pattern + behind + r"(?!\w)" * (not behind)))
            said[short.replace(" ", "")] = table[group][short], group == "last"
    longest = "|".join(pattern for _, pattern in sorted(patterns, reverse=True))
    return re.compile(rf"(?<![\w.])(?:{longest})"), said


def _expand_short(text, code):
    pattern, said = list_short(code)

    def expand(match):
        found = re.sub(r"\s", "", match[0])
        short = found if found in said else found[0].lower() + found[1:]
        if short not in said:
            short = found[0].upper() + found[1:]
        words, last = said[short]
        before = text[: match.start()].rstrip()
        if found[0].isupper() and (short[0].islower() or not before or before[-1] in ".!?"):
            words = words[0].upper() + words[1:]
        ends = re.match(r"[\"')]*$" + rf"|\s+{_CAPITAL}" * last, text[match.end() :])
        return words + "." * bool(found.endswith(".") and ends)

    text = pattern.sub(expand, text)
    for sign, word in _read_table()[code]["signs"].items():
        if sign in text:
            text = re.sub(rf"\s?{re.escape(sign)}\s?", f" {word} ", text).strip()
    return text


# Dates and times


@cache
def list_months(code: str) -> tuple[str, ...]:
    """Return the names of the months as `code` writes them within a date, by the Unicode CLDR."""
    return tuple(get_month_names("wide", locale=LOCALES.get(code, code)).values())


def _read_dates(text, code):
    """Write dates in figures as the language's long form has them, with the signs by which spell_numbers reads ordinals."""
    months = "|".join(list_months(code))
    text = re.sub(r"(?<![\d.,/-])(\d{4})-(\d\d)-(\d\d)(?![\d-])", lambda m: _write_date(m, code, "ymd"), text)
    order = "mdy" if code == "en" else "dmy"
    for signs, year in ((r"\.\s?", r"\d{4}|\d\d"), ("/", r"\d{4}|\d\d"), ("-", r"\d{4}")):
        text = re.sub(rf"(?<![\d.,/-])(\d\d?){signs}(\d\d?){signs}({year})(?![\d/-]|[.,]\d)",
                      lambda m: _write_date(m, code, order), text)
    if code == "en":
        text = re.sub(rf"\b(?:(the) )?(\d\d?) (?=(?:{months})\b)", lambda m: f"the {m[2]}th of ", text)
        text = re.sub(rf"\b({months}) (\d\d?)(?![\d:]|st|nd|rd|th|[.,]\d)", r"\1 \2th", text)
        text = re.sub(rf"(?:\dth,|\b(?:{months}|(?i:{YEARS}))) (?P<year>\d{{4}})(?!\d|[.,]\d)",
                      lambda m: m[0][:-4] + _spell_year(int(m["year"])), text)
    if code == "sv":
        text = re.sub(rf"\b(\d\d?)(?= (?:{months})\b)", r"\1:e", text)
    if code in FIRST_SIGNS:
        text = re.sub(rf"(?<!\d)1(?= (?:{months})\b)", f"1{FIRST_SIGNS[code]}", text)
    if code == "pl":
        text = re.sub(rf"(?P<month>{'|'.join(list_months(code))})\s(?P<year>\d{{4}})(?!\d)(?P<word>\s(?:r\.|roku\b))?|"
                      r"(?P<at>\b[Ww]e?\s)?(?<![\d.,])(?P<alone>\d{4})\s(?:r\.|roku\b)", _spell_polish_year, text)
    return text


def _write_date(match, code, order):
    day, month, year = (int(match[order.index(part) + 1]) for part in "dmy")
    if order == "mdy" and month > 12:
        day, month = month, day
    if len(match[order.index("y") + 1]) == 2:
        year += 1900 if year >= CENTURY else 2000
    try:
        when = date(year, month, day)
    except ValueError:  # no date
        return match[0]
    return format_date(when, "long", locale=LOCALES.get(code, code))


def _spell_year(year):
    """Return an English year: in two numbers where it is read so."""
    hundreds, rest = divmod(year, 100)
    if not (1100 <= year < 2000 or 2010 <= year < 2100) or not rest:
        return spell_number(year, "en")
    return f"{spell_number(hundreds, 'en')} {'oh ' if rest < 10 else ''}{spell_number(rest, 'en')}"


def _spell_polish_year(match):
    """Return a Polish year as the ordinal that it is: genitive behind a month, locative behind w."""
    year, at = int(match["year"] or match["alone"]), match["at"] or ""
    ends = ("ym", "im") if at else ("ego", "iego")
    said = " ".join(re.sub("i$", ends[1], re.sub("y$", ends[0], word)) for word in
                    num2words(year, lang="pl", to="ordinal").split())
    month = f"{match['month']} " if match["month"] else ""
    stop = "." * bool(match[0].endswith("r.") and match.end() == len(match.string))
    return f"{at}{month}{said} roku{stop}"


def _read_times(text, code):
    clock = _read_table()[code]["clock"]
    before, after = clock["before"], clock["after"]
    hour = r"(?P<hour>[01]?\d|2[0-4])"
    sign = r"[:.h]|\sh\s" if code == "fr" else "[:.]"
    at = rf"(?P<at>\b(?i:{before})\s)?" if before else "(?P<at>)"
    behind = rf"(?P<after>\s?(?:{after})\b)?" if after else "(?P<after>)"

    def read(match):
        if match["sign"] == "." and not match["at"] and not match["after"]:
            return match[0]
        minute = int(match["minute"])
        half = code == "en" and re.match(r"\s?[ap]\.?m\b", match.string[match.end() :], re.I)
        said = _say_time(int(match["hour"]), minute, code, clock, (match["at"] or "").strip(), bool(half))
        return (match["at"] or "") + said

    text = re.sub(rf"{at}(?<![\d:.,]){hour}(?P<sign>{sign})(?P<minute>[0-5]\d)(?![\d:%]|[.,]\d){behind}", read, text)
    if code in ("de", "fr", "nl"):
        text = re.sub(rf"(?<![\d:.,-]){hour}\s?(?:{after})(?!\w)",
                      lambda m: _say_time(int(m["hour"]), 0, code, clock, "", False), text)
    return text


def _say_time(hour, minute, code, clock, at, half):
    """Return a time of day in words; `at` is the word before it, `half` whether am or pm follows."""
    said = clock.get("one") if hour == 1 else {("fr", 21): "vingt et une", ("es", 21): "veintiuna"}.get((code, hour))
    said = said or (_say_polish_hour(hour, at) if code == "pl" else spell_number(hour, code))
    zero = clock.get("zero", "") if minute < 10 else ""
    if minute == 0 and code == "en" and (half or hour > 12):
        return said if half else f"{said} hundred"
    form = clock["parted"] if minute else clock["whole"]
    if code == "fr" and hour < 2:
        form = form.replace("heures", "heure")
    if code == "sv" and zero and minute:  # "fjorton noll fem", but "fjorton och trettio"
        form = form.replace(" och", "")
    return form.format(hour=said, minute=f"{zero} {spell_number(minute, code)}".strip())


def _say_polish_hour(hour, at):
    """Return a Polish hour as the feminine ordinal that it is, oblique behind a word such as "o"."""
    oblique = at and at != "godzina"
    said = spell_ordinal(hour, "pl") if hour else "zerowy"
    for masculine, straight, bent in (("gi", "ga", "giej"), ("ci", "cia", "ciej"), ("y", "a", "ej")):
        said = re.sub(rf"{masculine}\b", bent if oblique else straight, said)
    return said


# Money and units


@cache
def _find_plural(code):
    """Return a function that gives the CLDR's plural category of a number: "one", "few", "many", "other"."""
    return to_python(Locale.parse(LOCALES.get(code, code)).plural_form)


def _pick_form(forms, value, code):
    """Return the noun of a sum: forms are [with one, several], or [with one, 2 to 4, 5 and more, a fraction]."""
    if len(forms) == 2:
        return forms[1]
    return forms[{"few": 1, "many": 2}.get(_find_plural(code)(value), 3 if isinstance(value, float) else 2)]


def _say_sum(number, forms, code):
    value = _read_value(number, code)
    return forms[0] if value == 1 else f"{_count(number, value, code)} {_pick_form(forms, value, code)}"


def _read_money(text, code):
    table, words = _read_table()[code], WORDS[code]
    money = table["money"]
    if code in ("no", "sv", "da"):
        text = re.sub(rf"({_match_number(code)})(?:,|:)-(?:\s?kr\b)?", r"\1 kr", text)
    text = re.sub(rf"({_match_number(code)}),-(?!\w)", r"\1", text)
    signs = "|".join(map(re.escape, [*money, *(name for name, sign in CODES.items() if sign in money)]))
    scales = "|".join([*words.millions, "mill?iard(?:er?|en|s|i|ów|y)?", "miljard(?:er)?", "billion"])
    amount = rf"(?P<number>{_match_number(code)})(?:\s(?P<scale>(?i:{scales}))\b)?"
    stop = r"(?:\.(?=\s+[a-zæøåäö]))?" if "kr" in money else ""

    def read(match):
        sign, number = CODES.get(match["sign"], match["sign"]), match["number"]
        half = len(money[sign]) // 2
        forms, cents = money[sign][:half], money[sign][half:]
        if match["scale"]:
            many = table["of"] + _pick_form(forms, 10**6, code)
            many = many.replace("de e", "d'e") if code == "fr" else many
            return f"{number} {match['scale']} {many}"
        whole, _, part = number.rpartition(_list_signs(code)[0])
        if len(part) != 2 or not whole:
            return _say_sum(number, forms, code)
        if part == "00":
            return _say_sum(whole, forms, code)
        between, named = table["cents"]
        alone = not _read_value(whole, code)  # "0,50 €"
        said = _say_sum(str(int(part)), cents, code) if named or alone else spell_number(int(part), code)
        return said if alone else _say_sum(whole, forms, code) + between + said

    text = re.sub(rf"(?<!\w)(?P<sign>{signs})\s?{amount}", read, text)
    return re.sub(rf"{amount}\s?(?P<sign>{signs})(?!\w){stop}", read, text)


def _read_units(text, code):
    one = _read_table()[code]["one"]
    units = "|".join(map(re.escape, sorted(UNITS, key=len, reverse=True)))

    def read(match):
        value = _read_value(match["number"], code)
        noun = format_unit(value, UNITS[match["unit"]], "long", locale=LOCALES.get(code, code))
        noun = re.sub(r"^[\d.,\s\u00a0\u202f]+", "", noun)
        other = len(one) > 1 and re.fullmatch(one[2], noun)
        number = one[bool(other)] if value == 1 else _count(match["number"], value, code)
        return f"{WORDS[code].minus} " * bool(match["minus"]) + f"{number} {noun}"

    return re.sub(rf"(?P<minus>(?<!\w)[-−])?(?P<number>{_match_number(code)})\s?(?P<unit>{units})(?![\w'/²³])", read, text)
