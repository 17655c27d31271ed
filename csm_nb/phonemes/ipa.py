"""Text to IPA: a pronunciation lexicon first, espeak-ng for the words that it does not have.

espeak-ng writes no stød and no tonal accent, which is what a lexicon is for: with one, `hund` and `hun` differ.
"""

import csv
import functools
import io
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import espeakng_loader
from phonemizer.backend import EspeakBackend
from phonemizer.backend.espeak.wrapper import EspeakWrapper
from phonemizer.logger import get_logger

from csm_nb.clean import clean_text, read_text
from csm_nb.languages import get_language
from csm_nb.phonemes.espeak_ng import show_data

# NoFAbet, the alphabet of NB Uttale, in IPA: after the public-domain inventory of Sprakbanken/convert_nofabet
# (phonetic_inventory.py), with ɡ for g, iː for ɪː and no ties.
NOFABET = dict(
    pair.split(":", 1)
    for pair in (
        "B:b D:d F:f G:ɡ H:h J:j K:k KJ:ç L:l M:m N:n NG:ŋ P:p R:r RD:ɖ RL:ɭ RN:ɳ RS:ʂ RT:ʈ S:s SJ:ʃ T:t V:v W:w "
        "AA:ɑː AE:æː AEH:æ AH:ɑ AX:ə EE:eː EH:ɛ IH:ɪ II:iː OA:oː OAH:ɔ OE:øː OEH:œ OH:ʊ OO:uː UH:ʉ UU:ʉː YH:ʏ YY:yː "
        "AEJ:æɪ AEW:æʉ AJ:ɑɪ OEJ:œʏ OJ:ɔʏ OAJ:ɔʏ OU:oʊ LX:l̩ MX:m̩ NX:n̩ RLX:ɭ̩ RNX:ɳ̩ RX:r̩ SX:s̩"
    ).split()
)
ACCENTS = {"": "", "0": "", "1": "¹", "2": "²", "3": "ˌ"}  # unstressed, accent 1, accent 2, secondary stress
COLUMNS = (("token", "transcription"), ("wordform", "nofabet_transcription"))  # NB Uttale's new words, its full lexica
NOT_SPEECH = {"spn", "sil", "sp", "nsn"}  # phones of MFA dictionaries
_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_NUMBER = re.compile(r"\d*\.?\d+")
# What espeak-ng's phoneme names leak into its IPA: hyphens in French, ? and ʔ in Danish (where ʔ is no stød), Greek ε.
_LEAKS = str.maketrans("ε", "ɛ", "-?_^!|'")


def _nofabet_to_ipa(phones: str) -> str:
    ipa = []
    for phone in phones.replace("_", " ").replace("$", " ").split():
        name, accent = (phone[:-1], phone[-1]) if phone[-1].isdigit() else (phone, "")
        if name not in NOFABET or accent not in ACCENTS:
            raise ValueError(f"{phone!r} is not NoFAbet; its phones are {' '.join(NOFABET)}, vowels followed by 0 to 3")
        ipa.append(ACCENTS[accent] + NOFABET[name])
    return "".join(ipa)


def _read_csv(path: Path, text: str):
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = [pair for pair in COLUMNS if set(pair) <= set(reader.fieldnames or ())]
    if not columns:
        wanted = " or ".join(map(str, COLUMNS))
        raise ValueError(f"{path}: columns {reader.fieldnames} found; a NB Uttale CSV has {wanted}")
    word, phones = columns[0]
    try:
        for row in reader:
            yield row[word] or "", _nofabet_to_ipa(row[phones] or "")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _read_phones(path: Path, text: str):
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        fields = line.strip().split("\t") if "\t" in line else line.split(maxsplit=1)
        # an MFA dictionary with probabilities has them between the word and its phones
        if len(fields) < 2 or not all(_NUMBER.fullmatch(field) for field in fields[1:-1]):
            raise ValueError(
                f"{path}, line {number}: {line.strip()[:60]!r} is not a word and its phones; a lexicon is WikiPron "
                "TSV (word, tab, IPA phones), a Montreal Forced Aligner dictionary or a NB Uttale CSV"
            )
        phones = fields[-1].split()
        if not NOT_SPEECH.intersection(phones):
            yield fields[0], "".join(phones)


def read_lexicon(path) -> dict[str, str]:
    """Return {lowercase word: IPA} from a pronunciation lexicon, to be given to `to_ipa`.

    Three formats are told apart by their first line: WikiPron TSV, a Montreal Forced Aligner dictionary (with or
    without probabilities), NB Uttale CSV in NoFAbet. Stød (ˀ) and the tone contours of the Swedish dictionary stay; the
    accents of NoFAbet become ¹ and ² before the vowel, its secondary stress ˌ. Of several pronunciations the first is
    kept, and a word written in lowercase goes before the same word with a capital. Raises ValueError naming the file
    and line for anything else, FileNotFoundError for no file.
    """
    path = Path(path)
    text = read_text(path)
    first = text.partition("\n")[0]
    rows = list((_read_csv if "\t" not in first and "," in first else _read_phones)(path, text))
    rows = [(clean_text(word), unicodedata.normalize("NFC", ipa)) for word, ipa in rows if word and ipa]
    if not rows:
        raise ValueError(f"{path} has no pronunciations in it")
    lexicon: dict[str, str] = {}
    for word, ipa in sorted(rows, key=lambda row: row[0] != row[0].lower()):
        lexicon.setdefault(word.lower(), ipa)
    return lexicon


@functools.cache
def load_backend(voice: str) -> EspeakBackend:
    """Return phonemizer's backend of one of espeak-ng's voices, with the data that espeakng_loader brings."""
    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path("")  # it would resolve the short path that espeak-ng needs
    os.environ.pop("PHONEMIZER_ESPEAK_DATA_PATH", None)
    show_data()
    return EspeakBackend(voice, with_stress=True, language_switch="remove-flags", logger=get_logger("quiet"))


def _ask_espeak(words: list[str], language: str) -> Iterator[str]:
    """Return IPA of single words by espeak-ng, in one call, mended where its phonemes are known to be wrong."""
    spoken = load_backend(get_language(language).espeak).phonemize(words, strip=True) if words else []
    for word, ipa in zip(words, spoken, strict=True):
        ipa = unicodedata.normalize("NFC", ipa).translate(_LEAKS).replace(" ", "")
        if language == "da":
            ipa = ipa.replace("ʔ", "")
        if language == "no":
            ipa = ipa.replace("x", "ç")  # kj
        if not ipa:
            raise ValueError(f"espeak-ng says nothing for the word {word!r} in {language}")
        yield ipa


def to_ipa(texts: list[str], language: str, lexicon: dict[str, str] | None = None) -> list[str]:
    """Return the texts with every word in IPA: by `lexicon` (see `read_lexicon`), by espeak-ng where it has no entry.

    Word for word, so nothing is linked or reduced across words (no French liaison); spaces and punctuation are those of
    clean_text, case does not count. espeak-ng marks stress with ˈ and ˌ before the vowel; it never writes stød or tonal
    accent, so the glottal stops in its Danish are taken out. All words unknown to the lexicon go to it in one call.
    Raises ValueError for an unknown language or a word that espeak-ng can not say, TypeError for a bare string.
    """
    if isinstance(texts, str):
        raise TypeError("to_ipa takes a list of texts; put the one text into a list")
    get_language(language)
    texts = [clean_text(text) for text in texts]
    known = dict(lexicon or {})
    words = dict.fromkeys(word.lower() for text in texts for word in _WORD.findall(text))
    unknown = [word for word in words if word not in known]
    known.update(zip(unknown, _ask_espeak(unknown, language), strict=True))
    return [_WORD.sub(lambda match: known[match[0].lower()], text) for text in texts]
