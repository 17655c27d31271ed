"""Corpora: a manifest.jsonl or a folder of clips to rows, and the clips that can not be used set aside with the reason."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from csm_nb.audio import SAMPLE_RATE, AudioError, read_audio
from csm_nb.languages import get_language
from csm_nb.params import resolve_path

REQUIRED = ("text", "audio_path", "speaker_id", "language")
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
TELEPHONE = 8000  # Hz; a sample rate up to which sounds are missing, not only brilliance
CLIPPING, CLIPPED_SHARE = 0.5, 0.005  # a clip is clipped where more of its samples than this lie at its peak
SILENCE = 1e-3  # peak below which a clip counts as silent (-60 dBFS)


class CorpusError(ValueError):
    """A manifest or folder that can not be read as a corpus; names the file, the line and what is allowed."""


def read_manifest(path) -> list[dict]:
    """Return the rows of a manifest.jsonl, audio_path made absolute (relative ones start at the manifest's folder).

    Every field is kept. Raises CorpusError for a missing file, a line that is no JSON object, or a field that is missing or
    null (a null text is a clip without one, for check_clips to set aside).
    """
    path = resolve_path(path)
    if not path.is_file():
        raise CorpusError(f"{path}: no such manifest")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{path}: line {number} is no JSON ({error})") from error
        row = row if isinstance(row, dict) else {}
        lacking = [field for field in REQUIRED if field not in row or row[field] is None and field != "text"]
        if lacking:
            raise CorpusError(f"{path}: line {number} lacks {', '.join(lacking)}; found are {', '.join(row) or 'no fields'}, and "
                              f"every line needs {', '.join(REQUIRED)}")
        if not isinstance(row["audio_path"], str):
            raise CorpusError(f"{path}: line {number} has {row['audio_path']!r} as audio_path; allowed is the path of a file")
        rows.append(row | {"audio_path": str((path.parent / row["audio_path"]).resolve())})
    return rows


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
    speaker. Raises CorpusError when there is nothing of the language, naming what there is.
    """
    source, code = resolve_path(source), get_language(language).code
    if source.is_dir() and (source / "manifest.jsonl").is_file():
        source = source / "manifest.jsonl"
    rows = _read_folder(source, code) if source.is_dir() else read_manifest(source)
    chosen = [row for row in rows if row["language"] == code]
    if not chosen:
        found = ", ".join(sorted({str(row["language"]) for row in rows})) or "no clip at all"
        raise CorpusError(f"{source}: nothing of language {code!r}; found: {found}")
    if limit is None or limit >= len(chosen):
        return chosen
    return [chosen[i] for i in sorted(np.random.default_rng(seed).permutation(len(chosen))[:limit])]


def _read_folder(folder, language):
    rows = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        beside = path.with_suffix(".txt")
        text = beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""
        rows.append({"text": text, "audio_path": str(path.resolve()), "speaker_id": path.parent.name, "language": language})
    return rows


def check_clips(rows, min_seconds: float = 0.3, max_seconds: float = 30.0, need_text: bool = True,
                need_one: bool = True) -> tuple[list, list]:
    """Return (good, set_aside): rows with their true `duration` in seconds, and rows with the `reason` against them.

    Reasons are missing or unreadable files, no text (with `need_text`), silence, too short and too long. One bad clip
    stops nothing. Raises CorpusError, with the first reasons, when no clip is good (and `need_one`).
    """
    good, set_aside = [], []
    for row in rows:
        reason, duration = _find_fault(row, min_seconds, max_seconds, need_text)
        (set_aside.append(row | {"reason": reason}) if reason else good.append(row | {"duration": duration}))
    if need_one and not good:
        reasons = "; ".join(f"{Path(row['audio_path']).name}: {row['reason']}" for row in set_aside[:3])
        raise CorpusError(f"none of {len(set_aside)} clips can be used: {reasons or 'the corpus is empty'}")
    return good, set_aside


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
    if need_text and not str(row.get("text") or "").strip():
        return "no text", 0.0
    try:
        wav = read_audio(row["audio_path"])
    except AudioError as error:
        return str(error).removeprefix(f"{row['audio_path']}: "), 0.0
    seconds = len(wav) / SAMPLE_RATE
    if np.abs(wav).max() < SILENCE:
        return "silent", seconds
    if not min_seconds <= seconds <= max_seconds:
        return f"{seconds:.2f} s long; allowed are {min_seconds:g} to {max_seconds:g} s", seconds
    return "", round(seconds, 3)
