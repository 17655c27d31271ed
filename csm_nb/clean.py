"""Text as people have it, at the door: encodings of files, one Unicode form, typographic signs, names of files."""

import codecs
import os
import re
import unicodedata
from pathlib import Path

# Longer marks first: UTF-32's begins with UTF-16's.
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))

# What a text is written with from here on. A sign that changes how a text looks and not how it is read becomes the one that
# every keyboard and tokenizer has. Signs that are read as words (€, %, °, ½, ²) are none of these: they stay, and are listed
# where the tokenizer does not have them (self_check.list_unknown). Square brackets become round ones because "[3]" is how CSM's
# prompt names a speaker. Spaces of any kind become single plain ones, and characters without a form of their own (soft
# hyphen, zero-width and direction marks) go.
_SIGNS = {
    "'": "’‘‚‛′ʼʻ´`‹›",
    '"': "“”„‟″«»",
    "-": "‐‑‒–−",
    " - ": "—―",
    "...": "…",
    "(": "[", ")": "]",
}
_LETTERS = "ﬀﬁﬂﬃﬄﬅﬆĳĲŉſ"  # ligatures and compatibility forms, which NFC keeps apart from their letters
_WIDE = "".join(map(chr, range(0xFF01, 0xFF5F)))
SIGNS = str.maketrans(
    {sign: plain for plain, signs in _SIGNS.items() for sign in signs}
    | {sign: unicodedata.normalize("NFKC", sign).replace("ʼ", "'").translate(str.maketrans("[]`", "()'"))
       for sign in _LETTERS + _WIDE}
)


class EncodingError(ValueError):
    """A text file that can not be decoded without doubt; names the file, the line and what to do."""


def clean_text(text: str) -> str:
    """Return `text` as it is trained and spoken: composed Unicode (NFC), plain signs (SIGNS), single spaces, none at the ends.

    The same text typed on another keyboard is the same text. It is called wherever text enters, and by load.encode_text, so
    that training and speaking can not differ; a second call changes nothing.
    """
    text = unicodedata.normalize("NFC", text)
    if text.isascii():
        return " ".join(text.translate(SIGNS).split())
    for character in set(text):
        if unicodedata.category(character) == "Cf":
            text = text.replace(character, "")
    return " ".join(unicodedata.normalize("NFC", text).translate(SIGNS).split())


def compose(name: str) -> str:
    """Return a name (of a file, a speaker) in composed Unicode, to be compared by."""
    return unicodedata.normalize("NFC", name)


def read_text(path) -> str:
    """Return the content of a user's text file: UTF-8, with a byte order mark or without, or UTF-16 or UTF-32 with one.

    Line ends become newlines. Nothing is guessed: anything else (Latin-1, half a character at the end) raises EncodingError,
    with the line and the command that converts it.
    """
    lines = read_lines(path)
    if fault := next((fault for _, fault in lines if fault), ""):
        raise EncodingError(fault)
    return "\n".join(line for line, _ in lines)


def read_lines(path) -> list[tuple[str, str]]:
    """Return (line, what is wrong with its encoding, or "") for each line of a text file; see read_text.

    A line that can not be decoded comes with U+FFFD where bytes were not understood, so that what it is about can be told.
    """
    data = Path(path).read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    if encoding in ("utf-8", "utf-8-sig"):  # line by line: one in another encoding leaves the others as they are
        data = data.removeprefix(codecs.BOM_UTF8)
        return [_decode(line, path, number) for number, line in enumerate(re.split(rb"\r\n|\r|\n", data), 1)]
    try:  # not by str.splitlines, which parts at U+0085 and U+2028 too: JSON may hold them
        return [(line, "") for line in re.split(r"\r\n|\r|\n", data.decode(encoding))]
    except UnicodeDecodeError as error:
        raise EncodingError(f"{path}: begins as {encoding.upper()} and is broken at byte {error.start} ({error.reason}); "
                            "save it as UTF-8") from None


def _decode(line, path, number):
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"0x{line[error.start]:02x} at byte {error.start + 1}"
        return line.decode("utf-8", errors="replace"), (
            f"{path}, line {number}: not UTF-8 ({found}: {error.reason}); allowed is UTF-8, or UTF-16 with its byte order "
            f"mark. Save it as UTF-8; if it is from Windows or Latin-1: iconv -f WINDOWS-1252 -t UTF-8 {Path(path).name}"
        )
    if "\0" in text:
        return text, (f"{path}, line {number}: holds NUL bytes, as UTF-16 without its byte order mark does; save it as UTF-8")
    return text, ""


def find_file(path) -> Path:
    """Return `path` as it is spelled on the disk: as it is, or with letters composed or decomposed there.

    macOS and its archives decompose names (å in two characters), everything else composes them, and a manifest is of one
    kind while the disk is of the other. A path that is in neither form comes back unchanged.
    """
    path = Path(path)
    if str(path).isascii() or os.path.lexists(path):
        return path
    found = Path(path.anchor) if path.anchor else Path(".")
    for part in path.parts[bool(path.anchor):]:
        forms = dict.fromkeys((part, compose(part), unicodedata.normalize("NFD", part)))
        name = next((form for form in forms if os.path.lexists(found / form)), None)
        if name is None and not part.isascii() and found.is_dir():  # both forms in one name
            name = next((other for other in os.listdir(found) if compose(other) == compose(part)), None)
        if name is None:
            return path
        found /= name
    return found
