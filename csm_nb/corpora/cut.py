"""Clips that are no files yet: segments of recordings, audio in Parquet, here or on the hub; each is written once."""

import errno
import fnmatch
import hashlib
import io
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from huggingface_hub import HfApi, HfFileSystem

from csm_nb import paths
from csm_nb.audio import AudioError
from csm_nb.claims import hold
from csm_nb.corpora.layouts import choose_train, describe_broken, find_columns, list_columns, make_row, read_parquet_audio
from csm_nb.corpora.listed import place_stream
from csm_nb.hub import HUB_ERRORS
from csm_nb.manifest import SUFFIXES, CorpusError
from csm_nb.paths import show_path
from csm_nb.provenance import hash_files, read_json, replace_file, write_json

CONVERTED = "refs/convert/parquet"  # the hub's revision of a data set as Parquet, where it has made one
SPREAD = 8  # files of the hub whose row groups are drawn from at a time


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
        except (AudioError, soundfile.SoundFileError) as error:
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
        wav, rate = soundfile.read(row["audio_path"], start=first, stop=min(last, info.frames), dtype="float32", always_2d=True)
        content = io.BytesIO()  # libsndfile does not say that a disk is full
        soundfile.write(content, wav, rate, format="WAV", subtype="FLOAT" if info.subtype in ("FLOAT", "DOUBLE") else "PCM_16")
        _write_bytes(path, content.getvalue())
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
        _write_bytes(path, content)
    return row | {"audio_path": str(path)}


def _write_bytes(path, content):
    """Write a clip. Raises CorpusError for a disk that takes no more: no clip is to blame, and the others stay."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as part:
            part.write_bytes(content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        there = sum(1 for _ in path.parent.glob("*")) if path.parent.is_dir() else 0
        raise CorpusError(f"{path}: not written ({error.strerror}); the {there} clips in {show_path(path.parent)} stay, and are "
                          "not cut again. Make room, or draw fewer clips (corpus_clips)") from error


def _place():
    return paths.ROOT / "data" / "clips"


def stream_clips(entry: dict, language: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """Return the first `limit` rows (None: all) of a data set of the hub in an order drawn by `seed`, each with its clip's file.

    `entry` is that of params/, or {"id": owner/name}; its Parquet is read, of its revision, or as the hub converted it. In
    random order are its files, SPREAD of them at a time, and among these their row groups; the rows of a group stay together,
    so that no audio is fetched that is not kept. The order does not depend on `limit`: what was fetched is kept in a folder
    (listed.place_stream) and not fetched again, for more clips or after a break. Raises CorpusError where there is no network
    or it goes away half way, with how many clips there are and what to do.
    """
    place = place_stream(entry, language, seed)
    with hold(place):
        rows, about = _read_stream(place)
        try:
            if not about:
                about = _describe_stream(entry, seed)
            if not about["ended"] and (limit is None or len(rows) < limit):
                _fetch_groups(entry, language, limit, seed, place, rows, about)
        except (*HUB_ERRORS, pa.ArrowException) as error:
            if isinstance(error, CorpusError):
                raise
            wanted = f" of {limit}" if limit is not None else ""
            fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise CorpusError(f"{entry['id']}: the stream broke off ({fault}); {len(rows)}{wanted} clips are in "
                              f"{show_path(place)} and stay. Run again to go on from there, or set corpus_clips to as many as "
                              "there are") from error
    show_left_out(about.get("left out", {}), len(rows))
    return rows[:limit]


def show_left_out(left_out: dict[str, int], kept: int) -> None:
    """Print how many rows each filter leaves out."""
    for condition, count in left_out.items():
        print(f"the filter {condition} leaves out {count} of {kept + sum(left_out.values())} rows", flush=True)


def _read_stream(place):
    """Return (rows, what is kept of a stream): of the row groups that were fetched whole."""
    about, manifest = read_json(place / "stream.json"), place / "manifest.jsonl"
    if not about or not manifest.is_file():
        return [], about
    with open(manifest, encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, about["rows"])]
    if all(row.get("text_fault") or Path(row["audio_path"]).is_file() for row in rows):
        return rows, about
    return [], about | {"groups": 0, "rows": 0, "left out": {}, "ended": False}  # data/clips was cleared


def _describe_stream(entry, seed):
    """Return what a stream is of: commit and Parquet files, in the order they are read, and the licence by its card."""
    info = HfApi().dataset_info(entry["id"], revision=entry.get("revision"), timeout=10)
    files = _choose_files(info, entry)
    if not files and "revision" not in entry:
        info = HfApi().dataset_info(entry["id"], revision=CONVERTED, timeout=10)
        files = _choose_files(info, entry)
    if not files:
        found = sorted({Path(file.rfilename).parts[0] for file in info.siblings})
        of = f" of config {entry['config']}" if "config" in entry else ""
        raise CorpusError(f"{entry['id']}: no Parquet{of} on the hub; at the top of it are {', '.join(found[:20]) or 'no files'}")
    random.Random(seed).shuffle(files)
    licence = (info.card_data or {}).get("license") or "not stated"
    return {"id": entry["id"], "commit": info.sha, "files": files, "licence": licence, "groups": 0, "rows": 0, "ended": False}


def _choose_files(info, entry):
    """Return the Parquet files of a data set that are for training: of its config by its card, else by the folder."""
    files, config = sorted(file.rfilename for file in info.siblings if file.rfilename.endswith(".parquet")), entry.get("config")
    configs = {one.get("config_name"): one for one in (info.card_data or {}).get("configs") or []}
    folders = sorted({Path(file).parts[0] for file in files if len(Path(file).parts) > 2})  # <config>/<split>/0000.parquet
    if not config and (len(configs) > 1 and "default" not in configs or len(folders) > 1 and not configs):
        raise CorpusError(f"{entry['id']} has several configurations ({', '.join(map(str, configs or folders))}); name one as "
                          "`config` in an entry of params/<language>.yaml, and give the entry's name")
    given = configs.get(config or "default", {}).get("data_files") or []
    given = [{"split": "train", "path": given}] if isinstance(given, str) else given
    splits = {one["split"]: one["path"] if isinstance(one["path"], list) else [one["path"]] for one in given}
    if patterns := splits.get("train") or sum(splits.values(), []):
        return [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)]
    if config:
        files = [file for file in files if config in Path(file).parts[:-1]]
    return [path.as_posix() for path in choose_train([Path(file) for file in files])]


def _fetch_groups(entry, language, limit, seed, place, rows, about):
    """Append to `rows` and to the folder, row group by row group, until there are `limit`."""
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "manifest.jsonl", "w", encoding="utf-8") as file:  # without what a killed process left half
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_json(place / "stream.json", about)
    fs, at, left_out = HfFileSystem(), 0, Counter(about.get("left out", {}))
    for first in range(0, len(about["files"]), SPREAD):
        # no cache: pyarrow knows which bytes it needs, and what comes after a row group belongs to another
        opened = [fs.open(f"datasets/{entry['id']}@{about['commit']}/{name}", cache_type="none")
                  for name in about["files"][first : first + SPREAD]]
        tables = [pq.ParquetFile(file, pre_buffer=True) for file in opened]
        groups = [(table, number) for table in tables for number in range(table.num_row_groups)]
        random.Random(f"{seed} {first}").shuffle(groups)
        for table, number in groups:
            at += 1
            if at <= about["groups"]:
                continue
            if limit is not None and len(rows) >= limit:
                return
            fresh = _fetch_group(table, number, entry, language, left_out)
            with open(place / "manifest.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh)
            rows += fresh
            about |= {"groups": at, "rows": len(rows), "left out": dict(left_out)}
            write_json(place / "stream.json", about)
            print(f"{entry['id']}: {len(rows)} clips fetched", flush=True)
    write_json(place / "stream.json", about | {"ended": True})


def _fetch_group(table, number, entry, language, left_out):
    read = find_columns(entry["id"], table.schema_arrow.names, entry)
    if "audio" not in read:
        raise CorpusError(f"{entry['id']}: holds codes and no audio, which is not streamed; fetch it into data/corpora/")
    audio, rows = read["audio"][0], []
    for batch in table.iter_batches(64, row_groups=[number], columns=[*list_columns(read), audio]):
        for cells in batch.to_pylist():
            row = make_row(cells, read, entry["id"], entry["id"].split("/")[-1], language, left_out)
            if row is not None:
                cell = cells[audio] if isinstance(cells[audio], dict) else {}
                row = _write_clip(row, Path(entry["id"]), cell.get("bytes"), cell.get("path") or "")
                rows.append(row | {"of_corpus": entry["id"]})
    return rows
