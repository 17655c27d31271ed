"""A manifest of clips: read, checked and converted once, and written."""

import json
import math
import os
from pathlib import Path

from csm_nb.clean import EncodingError, clean_text, find_file, read_lines
from csm_nb.languages import read_label
from csm_nb.paths import resolve_path

REQUIRED = ("text", "audio_path", "speaker_id", "language")
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


class CorpusError(ValueError):
    """A manifest or folder that can not be read as a corpus; names the file, the line and what is allowed."""


def read_manifest(path) -> list[dict]:
    """Return the rows of a manifest.jsonl, checked and converted by SCHEMA, audio_path absolute and as the disk spells it.

    Relative paths start at the manifest's folder; fields that are not in SCHEMA are kept as they are. A null text, and an
    encoding that is not understood (`text_fault` says of which line), is a clip without a text, for check_clips to set aside.
    Raises CorpusError for a missing file, and once for all lines that are no JSON object, lack a field, or hold a value of
    another kind: file, line, field, what was found and what is allowed.
    """
    path = resolve_path(path)
    if not path.is_file():
        raise CorpusError(f"{path}: no such manifest")
    try:
        lines = read_lines(path)
    except (EncodingError, OSError) as error:
        raise CorpusError(str(error)) from error
    rows, faults, folders = [], [], {}
    lines.reverse()
    for number in range(1, len(lines) + 1):
        line, fault = lines.pop()  # it goes as its row comes: both of a million lines would take half as much again
        if not line.strip():
            continue
        try:
            row = _convert_row(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            faults.append(fault or f"line {number} is no JSON ({error}); a manifest holds one object per line")
            continue
        except ValueError as error:
            faults.append(f"line {number} {error}")
            continue
        row["audio_path"] = _resolve_audio(os.path.join(path.parent, row["audio_path"]), folders)
        rows.append(row | {"text": "", "text_fault": fault} if fault else row)
    if faults:
        more = f"; and {len(faults) - 3} lines more" if len(faults) > 3 else ""
        raise CorpusError(f"{path}: {'; '.join(faults[:3])}{more}")
    return rows


def _resolve_audio(path, folders):
    """Return the absolute path of a file as the disk spells it; `folders` keeps what folders are, of which files share few."""
    folder, name = os.path.split(path)
    if not name.isascii() or name in ("", ".", "..") or os.path.islink(path):
        return str(find_file(path).resolve())
    if folder not in folders:
        folders[folder] = str(find_file(folder).resolve())
    return os.path.join(folders[folder], name)


def _convert_row(row):
    """Convert a manifest's line by SCHEMA; raise ValueError with the fields that are missing or of another kind."""
    row = row if isinstance(row, dict) else {}
    row = {field: None if value != value else value for field, value in row.items()}  # NaN is how pandas writes a gap
    lacking = [field for field in REQUIRED if field not in row or row[field] is None and field != "text"]
    if lacking:
        raise ValueError(f"lacks {', '.join(lacking)}; found are {', '.join(row) or 'no fields'}, and every line needs "
                         f"{', '.join(REQUIRED)}")
    for field, (convert, allowed) in SCHEMA.items():
        if row.get(field) is None:
            continue
        try:
            row[field] = convert(row[field])
        except (TypeError, ValueError, LookupError, OverflowError):
            raise ValueError(f"has {row[field]!r:.60} as {field}; allowed is {allowed}") from None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a character ({error.object[error.start]!r}), which no file can be written with") from None
    return row | {"text": row["text"] or ""}


def _to_text(value):
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    number = _to_number(value)  # 1905, and 1905.0, which is what pandas makes of it in a column with a gap
    return str(int(number)) if number.is_integer() else str(value)


def _to_name(value):
    name = _to_text(value)
    if not name:
        raise ValueError
    return name


def _to_code(value):
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    known = read_label(value)  # DA, dan, da-DK, Danish
    return value.strip() if known == "other" else known


def _to_path(value):
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError
    return value


def _to_number(value):
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _to_seconds(value):
    if isinstance(value, str) and not value.strip():  # a gap in a table that was made into JSON
        return None
    if (seconds := _to_number(value)) < 0:
        raise ValueError
    return seconds


def _to_flag(value):
    if isinstance(value, str):
        value = {"": None, "0": False, "1": True, "false": False, "true": True}[value.strip().lower()]
    elif isinstance(value, bool | int | float) and value in (0, 1):
        value = bool(value)
    elif value is not None:
        raise ValueError
    return value


def _to_windows(value):
    windows = [[_to_seconds(start), _to_seconds(end), _to_flag(stod)] for start, end, stod in value]
    if any(None in (start, end, stod) or start >= end for start, end, stod in windows):
        raise ValueError
    return windows


# What a manifest's fields are converted to, and what is said of a value that can not be; null (and NaN) is no value.
SCHEMA = {
    "text": (_to_text, "a text, or a number to be read as its digits"),
    "audio_path": (_to_path, "the path of a file, as text"),
    "speaker_id": (_to_name, "a name or a number"),
    "language": (_to_code, "the code of a language, such as 'da'"),
    "duration": (_to_seconds, "seconds, such as 1.2"),
    "start": (_to_seconds, "seconds, such as 1.2"),
    "end": (_to_seconds, "seconds, such as 1.2"),
    "stod": (_to_flag, "1 or 0, or true or false, or null"),
    "windows": (_to_windows, "a list of [start, end, 1 or 0], in seconds"),
}


def write_manifest(rows, path) -> Path:
    """Write rows as manifest.jsonl, audio paths below its folder relative to it, and return its path."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            audio = Path(row["audio_path"]).resolve()
            audio = audio.relative_to(path.parent) if audio.is_relative_to(path.parent) else audio
            file.write(json.dumps(row | {"audio_path": str(audio)}, ensure_ascii=False) + "\n")
    return path
