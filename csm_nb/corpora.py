"""Corpora: a manifest.jsonl or a folder of clips to rows, and the clips that can not be used set aside with the reason."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from csm_nb.audio import SAMPLE_RATE, AudioError, read_audio
from csm_nb.clean import EncodingError, clean_text, compose, find_file, read_lines, read_text
from csm_nb.judge import read_label
from csm_nb.languages import LANGUAGES, get_language
from csm_nb.params import resolve_path

REQUIRED = ("text", "audio_path", "speaker_id", "language")
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
TELEPHONE = 8000  # Hz; a sample rate up to which sounds are missing, not only brilliance
CLIPPING, CLIPPED_SHARE = 0.5, 0.005  # a clip is clipped where more of its samples than this lie at its peak
SILENCE = 1e-3  # peak below which a clip counts as silent (-60 dBFS)


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
    rows, faults = [], []
    for number, (line, fault) in enumerate(lines, 1):
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
        row["audio_path"] = str(find_file(path.parent / row["audio_path"]).resolve())
        rows.append(row | {"text": "", "text_fault": fault} if fault else row)
    if faults:
        more = f"; and {len(faults) - 3} lines more" if len(faults) > 3 else ""
        raise CorpusError(f"{path}: {'; '.join(faults[:3])}{more}")
    return rows


def _convert_row(row):
    """A manifest's line by SCHEMA; ValueError with the fields that are missing or of another kind."""
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


def load_corpus(source, language: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """Return the rows of `language` in a manifest, or all clips of a folder: at most `limit`, drawn by `seed`.

    A folder's clips take their text from a .txt of the same name beside them, else none, and the folder they lie in as
    speaker; a text that can not be decoded leaves its clip for check_clips to set aside (`text_fault`). Raises CorpusError when
    there is nothing of the language, naming what there is.
    """
    source, code = resolve_path(source), get_language(language).code
    if source.is_dir() and (source / "manifest.jsonl").is_file():
        source = source / "manifest.jsonl"
    rows = _read_folder(source, code) if source.is_dir() else read_manifest(source)
    chosen = [row for row in rows if row["language"] == code]
    if not chosen:
        found = ", ".join(sorted({str(row["language"]) for row in rows})) or "no clip at all"
        allowed = f"in a manifest `language` is one of {', '.join(LANGUAGES)}"
        if not rows and source.is_dir():
            kinds = Counter(path.suffix.lower() for path in source.rglob("*") if path.is_file() and path.suffix)
            among = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(5)) or "no files"
            allowed = f"among {among}; clips are {' '.join(SUFFIXES)} (others: ffmpeg -i clip.m4a clip.wav)"
        raise CorpusError(f"{source}: nothing of language {code!r}; found: {found}; {allowed}")
    if limit is None or limit >= len(chosen):
        return chosen
    return [chosen[i] for i in sorted(np.random.default_rng(seed).permutation(len(chosen))[:limit])]


def _read_folder(folder, language):
    files, rows = sorted(folder.rglob("*")), []
    texts = {compose(str(path.with_suffix(""))): path for path in files if path.suffix.lower() == ".txt"}
    for path in (path for path in files if path.suffix.lower() in SUFFIXES):
        row = {"text": "", "audio_path": str(path.resolve()), "speaker_id": compose(path.parent.name), "language": language}
        if beside := texts.get(compose(str(path.with_suffix("")))):
            try:
                row["text"] = clean_text(read_text(beside))
            except (EncodingError, OSError) as error:
                row["text_fault"] = str(error)
        rows.append(row)
    return rows


def check_clips(rows, min_seconds: float = 0.3, max_seconds: float = 30.0, need_text: bool = True,
                need_one: bool = True) -> tuple[list, list]:
    """Return (good, set_aside): rows with their true `duration` in seconds, and rows with the `reason` against them.

    Reasons are missing or unreadable files, a text that can not be decoded, no text or none with a letter or digit in it
    (with `need_text`), silence, too short and too long. One bad clip stops nothing. Raises CorpusError, with the first reasons,
    when no clip is good (and `need_one`).
    """
    good, set_aside = [], []
    for row in rows:
        reason, duration = _find_fault(row, min_seconds, max_seconds, need_text)
        (set_aside.append(row | {"reason": reason}) if reason else good.append(row | {"duration": duration}))
    if need_one and not good:
        reasons = "; ".join(f"{Path(row['audio_path']).name}: {row['reason']}" for row in set_aside[:3])
        raise CorpusError(f"none of {len(set_aside)} clips can be used: {reasons or 'the corpus is empty'}")
    return good, set_aside


def check_enough(rows, min_seconds: float = 0.3, max_seconds: float = 30.0) -> None:
    """Raise CorpusError where no clip could be held out of `rows`: only one can be used, or all say the same in one voice.

    Only the files' headers are read, and no more of them than it takes, so that it can be asked before anything starts.
    """
    first, reasons = None, []
    for row in rows:
        reason = row.get("text_fault") or ("" if any(map(str.isalnum, row["text"])) else "no text")
        try:
            seconds = 0.0 if reason else soundfile.info(row["audio_path"]).duration
            if not reason and not min_seconds <= seconds <= max_seconds:
                reason = f"{seconds:.2f} s long; allowed are {min_seconds:g} to {max_seconds:g} s"
        except (soundfile.LibsndfileError, OSError) as error:
            reason = str(error)
        if reason:
            reasons.append(f"{Path(row['audio_path']).name}: {reason}")
            continue
        said = row["text"].lower(), row["speaker_id"]
        if first not in (None, said):
            return
        first = said
    what = "none can be used" if first is None else f"those that can be used all say {first[0]!r:.60} in one voice"
    raise CorpusError(f"of the {len(rows)} clips that are drawn {what}, and one has to be held out that says something else, "
                      f"or in another voice{': ' * bool(reasons)}{'; '.join(reasons[:3])}")


def list_remarks(rows, set_aside) -> pd.DataFrame:
    """Return what a reader has to know of clips (check_clips): audio_path, used or not, and the reason or remark.

    Remarks on clips that are used: a sample rate that leaves nothing above 4 kHz, several channels, a level that was clipped.
    """
    bad = [{"audio_path": row["audio_path"], "used": False, "reason": row["reason"]} for row in set_aside]
    odd = [{"audio_path": row["audio_path"], "used": True, "reason": "; ".join(found)} for row in rows
           if (found := _find_flaws(row["audio_path"]))]
    return pd.DataFrame(bad + odd, columns=["audio_path", "used", "reason"])


def _find_flaws(path):
    info, wav, flaws = soundfile.info(path), read_audio(path), []
    if info.samplerate <= TELEPHONE:
        flaws.append(f"{info.samplerate} Hz: nothing above {info.samplerate / 2000:g} kHz")
    if info.channels > 1:
        flaws.append(f"{info.channels} channels, averaged")
    share = np.mean(np.abs(wav) >= 0.99 * max(np.abs(wav).max(), CLIPPING))
    if share > CLIPPED_SHARE:
        flaws.append(f"clipped: {share:.1%} of its samples at full scale")
    return flaws


def _find_fault(row, min_seconds, max_seconds, need_text):
    if row.get("text_fault"):
        return row["text_fault"], 0.0
    if need_text and not any(map(str.isalnum, row["text"])):
        return f"nothing to say in its text {row['text']!r}" if row["text"].strip() else "no text", 0.0
    try:
        wav = read_audio(row["audio_path"])
    except (AudioError, OSError) as error:
        return str(error).removeprefix(f"{row['audio_path']}: "), 0.0
    seconds = len(wav) / SAMPLE_RATE
    if np.abs(wav).max() < SILENCE:
        return "silent", seconds
    if not min_seconds <= seconds <= max_seconds:
        return f"{seconds:.2f} s long; allowed are {min_seconds:g} to {max_seconds:g} s", seconds
    return "", round(seconds, 3)
