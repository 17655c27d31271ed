"""Clips that are no files yet: segments of longer recordings and the audio in Parquet, written once, named by their bytes."""

import hashlib
from pathlib import Path

import soundfile

from csm_nb import paths
from csm_nb.audio import AudioError
from csm_nb.corpora.layouts import describe_broken, read_parquet_audio
from csm_nb.manifest import SUFFIXES
from csm_nb.provenance import hash_files, replace_file


def cut_clips(rows) -> list[dict]:
    """Return `rows` with every audio_path a file of its own, those that are none yet written below data/clips.

    A row with `start` or `end` (s) of a longer recording becomes a WAV of its samples, its `windows` counted from there; a row
    of Parquet (layouts.read_parquet) the bytes as they are, or the file that it names below its own folder. Files are named by
    the bytes they came from, so that nothing is written twice and nothing stale is read. A row that can not be cut keeps its
    reason as `text_fault`, for check_clips to set aside.
    """
    return _cut_segments(_cut_parquet(list(rows)))


def measure_seconds(row) -> float:
    """Return the length of a clip in seconds by its file's header, of codes alone by their number.

    Raises soundfile.LibsndfileError or OSError for a file that can not be read.
    """
    return row["duration"] if "codes_row" in row else soundfile.info(row["audio_path"]).duration


def _cut_segments(rows):
    at = [number for number, row in enumerate(rows) if (row.get("start") or row.get("end")) and not row.get("text_fault")]
    hashes = hash_files(Path(rows[number]["audio_path"]) for number in at)
    for number, content in zip(at, hashes, strict=True):
        row = rows[number]
        if content is None:  # a missing recording: check_clips says so
            continue
        try:
            rows[number] = _cut_segment(row, content)
        except (AudioError, soundfile.SoundFileError, OSError) as error:
            rows[number] = row | {"text": "", "text_fault": str(error)}
    return rows


def _cut_segment(row, content):
    info = soundfile.info(row["audio_path"])
    start, end = row.get("start") or 0.0, row.get("end") or info.duration
    if start == 0 and abs(end - info.duration) < 0.01:  # the whole file, said in other words
        return row
    if not start < end <= info.duration + 0.1:
        raise AudioError(f"from {start:g} to {end:g} s of a recording of {info.duration:.2f} s")
    first, last = round(start * info.samplerate), round(end * info.samplerate)
    path = _place() / f"{content}-{first}-{last}.wav"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        wav, rate = soundfile.read(row["audio_path"], start=first, stop=min(last, info.frames), dtype="float32", always_2d=True)
        with replace_file(path) as part:
            soundfile.write(part, wav, rate, format="WAV", subtype="FLOAT" if info.subtype in ("FLOAT", "DOUBLE") else "PCM_16")
    kept = {key: value for key, value in row.items() if key not in ("start", "end", "duration")}
    if row.get("windows"):
        kept["windows"] = [[one - start, other - start, flag] for one, other, flag in row["windows"]
                           if start <= one < other <= end]
    return kept | {"audio_path": str(path), "cut_from": [Path(row["audio_path"]).name, start, end]}


def _cut_parquet(rows):
    places = {}
    for number, row in enumerate(rows):
        if "parquet_row" in row:
            places.setdefault((row["audio_path"], row["parquet_column"]), []).append(number)
    for (path, column), numbers in places.items():
        numbers.sort(key=lambda number: rows[number]["parquet_row"])
        for first in range(0, len(numbers), 256):  # clips are held in memory only so many at a time
            some = numbers[first : first + 256]
            audio = read_parquet_audio(Path(path), column, [rows[number]["parquet_row"] for number in some])
            for number, (content, name) in zip(some, audio, strict=True):
                rows[number] = _write_clip(rows[number], Path(path), content, name)
    return rows


def _write_clip(row, source, content, name):
    row = {key: value for key, value in row.items() if not key.startswith("parquet_")}
    if isinstance(content, Exception):
        return row | {"text": "", "text_fault": describe_broken(name, content)}
    if content is None:
        beside = (source.parent / name).resolve() if name else None
        if beside is None or not beside.is_relative_to(source.parent.resolve()):
            return row | {"text": "", "text_fault": f"{source.name} holds no bytes of it, and {name or 'nothing'!r} is no file "
                                                    "below its folder"}
        return row | {"audio_path": str(beside)}
    suffix = Path(name).suffix.lower()
    path = _place() / f"{hashlib.sha256(content).hexdigest()[:24]}{suffix if suffix in SUFFIXES else '.wav'}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as part:
            part.write_bytes(content)
    return row | {"audio_path": str(path)}


def _place():
    return paths.ROOT / "data" / "clips"
