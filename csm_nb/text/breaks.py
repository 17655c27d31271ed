"""Where a text may be cut: at its sentences, and long ones within."""

import re

from csm_nb.languages import get_language
from csm_nb.text.spoken import list_months, list_short

_END = re.compile(r"[.!?…]+[\"'»«”“’)\]]*(?:\u00a0»)?(?=\s|$)|\n\s*\n")
_INITIAL = re.compile(r"(?:^|[\s(])[^\W\d_]\.$")  # "J. S. Bach"
_ORDINAL = re.compile(r"(?:^|\s)\d{1,4}\.$")  # "17. mai", and before a name "Karl 12."
INNER = (r"(?<=[;:])\s", r"(?<=,)\s|\s(?=[–—]\s)", r"\s")  # where a long sentence is cut: the first that helps


def split_sentences(text: str, language: str, longest: int = 300) -> list[str]:
    """Return the sentences of `text` in order, together all of its words; none has more than `longest` characters.

    A full stop ends none after an abbreviation of the language (text.spoken), an initial, or a number that a small letter or
    a month follows. A longer sentence is cut at its semicolons, else its commas, else between words, else anywhere.
    """
    code, found, start = get_language(language).code, [], 0
    text = re.sub(r"\s»(?=\s|$)", "\u00a0»", text) if code == "fr" else text  # it closes; elsewhere it may open
    short = [match.span() for match in list_short(code)[0].finditer(text)]
    said = list_short(code)[1]
    for match in _END.finditer(text):
        behind, head = text[match.end() :].lstrip(), text[: match.start() + 1]
        lower = behind[:1].islower() or re.split(r"\W", behind, maxsplit=1)[0].lower() in map(str.lower, list_months(code))
        span = next((text[first:last] for first, last in short if first <= match.start() < last), "")
        closing = said.get(re.sub(r"\s", "", span), ("", False))[1] and not lower
        stop = match[0][:1] == "." and len(match[0]) == 1
        if stop and (span and not closing or _INITIAL.search(head) or _ORDINAL.search(head) and (lower or not behind)):
            if behind:
                continue
        if lower and match[0][0] in ".…":
            continue
        found.append(text[start : match.end()])
        start = match.end()
    found.append(text[start:])
    whole = [re.sub(r"\s+", " ", one).strip() for one in found]
    return [part for one in whole if one for part in _cut(one, longest)]


def _cut(sentence, longest):
    if len(sentence) <= longest:
        return [sentence]
    for place in INNER:
        parts, joined = re.split(place, sentence), []
        for part in parts:
            if joined and len(joined[-1]) + 1 + len(part) <= longest:
                joined[-1] += f" {part}"
            else:
                joined.append(part)
        if len(joined) > 1:
            return [piece for part in joined for piece in _cut(part, longest)]
    return [sentence[first : first + longest] for first in range(0, len(sentence), longest)]
