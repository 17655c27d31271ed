"""Manifest rows to codec tokens: a folder of Parquet shards that training reads, named by what it holds, made once."""

import contextlib
import errno
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from filelock import Timeout

from csm_nb.audio import AudioError, read_audio
from csm_nb.claims import hold
from csm_nb.codec.mimi import encode, frame_rate
from csm_nb.corpora.codes import ABOUT, check_given, find_codes, hash_clips, hash_codec, read_codes, read_given
from csm_nb.corpora.workers import run_jobs
from csm_nb.device import one_thread
from csm_nb.processes import count_cores
from csm_nb.provenance import hash_value, read_json, replace_file, write_json

SHARD_CLIPS = 64  # that a killed writer loses at most
MOST_SHARDS = 1000  # a longer corpus has larger shards
GROUP_CLIPS = 1024  # rows of a row group: 50 h in one group take 1.3 GB to map, in these .2 GB and a third of the time
WINDOW_CLIPS = 128  # of a shard that are in memory as samples at once: 60 MB of clips of 5 s
SET_ASIDE = "set_aside.jsonl"  # in a folder of tokens: the rows that do not read, with their reason
_SCHEMA = pa.schema([
    ("text", pa.string()), ("codes", pa.list_(pa.list_(pa.uint16()))), ("speaker_id", pa.string()),
    ("language", pa.string()), ("duration", pa.float64()),
])
_AUDIO = pa.field("audio", pa.string())  # of a shard: the hash of the clip's bytes


class TokensError(ValueError):
    """Tokens that are missing, broken or none, or do not fit the codec; names the file and what to do."""


def write_tokens(rows, codec, data, workers: str = "local") -> dict:
    """Keep `rows` as codec tokens below `data` and return {"path", "clips", "set_aside", "encoded", "found"}.

    `path` is data/tokens/<fingerprint>, of the codec and, in order, each row's text, audio (its bytes), speaker and language:
    the same corpus has the same folder. It holds shards, part-00000.parquet and so on, with the columns text, codes (frames x
    codebooks, uint16), speaker_id, language, duration (s) and audio (a hash). Each is written whole or not at all; several
    processes, also of several machines on one disk, write one corpus together, and whoever they are (`workers` is local or
    ray, see workers.run_jobs), and however often they were killed, on a CPU its bytes are the same. A clip whose audio this
    codec has encoded before, for whichever corpus and text, is not encoded again: `encoded` and `found` say how many. A clip
    that does not read is set aside with its reason, also in set_aside.jsonl. Raises TokensError, before anything is encoded,
    for a row that can not be kept (no text), and where the disk is full: the shards that are there stay.
    """
    rows, place = list(rows), Path(data) / "tokens"
    _check_rows(rows)
    hashes, mark = hash_clips(rows), hash_codec(codec)
    check_given(rows, codec, mark)
    named = [[row["text"], audio, str(row["speaker_id"]), row["language"]] for row, audio in zip(rows, hashes, strict=True)]
    folder = place / hash_value([mark, named])
    try:
        return {"path": folder} | _fill_folder(folder, rows, hashes, codec, mark, workers)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there, all_of = len(list(folder.glob("part-*.parquet"))), read_json(folder / ABOUT).get("shards", "all")
        raise TokensError(f"{folder}: no room left on the disk ({error}); {there} of {all_of} shards are there, and stay. Make "
                          "room and run again: it goes on with the others") from error


def _fill_folder(folder, rows, hashes, codec, mark, workers):
    """Write the shards that are not there, clean up after killed writers, and return what write_tokens does without `path`."""
    folder.mkdir(parents=True, exist_ok=True)
    size = max(SHARD_CLIPS, -(-len(rows) // MOST_SHARDS))
    about = read_json(folder / ABOUT)
    if not about:
        about = _describe(codec, mark, rows, size)
        write_json(folder / ABOUT, about)
    parts = {f"part-{number:05d}.parquet": slice(number * about["shard clips"], (number + 1) * about["shard clips"])
             for number in range(about["shards"])}
    counts = {"encoded": 0, "found": 0}
    for wait in (False, True):  # first what nobody else is at work on, then what is left
        missing = [name for name in parts if not _is_whole(folder / name)]
        if not missing:
            break
        known = find_codes([audio for name in missing for audio in hashes[parts[name]]], mark, folder.parent)
        clips = sum(len(hashes[parts[name]]) for name in missing) - len(known)
        random.Random(os.getpid()).shuffle(missing)  # each writer in an order of its own: a shard that is held costs a wait
        jobs = ((folder / name, rows[parts[name]], hashes[parts[name]],
                 {audio: known[audio] for audio in hashes[parts[name]] if audio in known}, wait) for name in missing)
        for done in run_jobs(_make_shard, codec, jobs, clips, workers):
            counts = {key: counts[key] + done[key] for key in counts}
    set_aside = [row for name in parts for row in json.loads(pq.read_schema(folder / name).metadata[b"set_aside"])]
    if set_aside:
        with replace_file(folder / SET_ASIDE) as part:
            part.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in set_aside), encoding="utf-8")
    for left in (*folder.glob(".part-*.part"), *folder.glob(".part-*.lease")):  # all is there: nobody is at work any more
        left.unlink(missing_ok=True)
    return {"clips": len(rows) - len(set_aside), "set_aside": set_aside} | counts


def _describe(codec, mark, rows, size):
    return {"codec": mark, "frame_rate": frame_rate(codec), "num_codebooks": codec.config.num_quantizers,
            "codebook_size": codec.config.codebook_size, "rows": len(rows), "shard clips": size,
            "shards": max(1, -(-len(rows) // size))}


def _is_whole(path):
    try:
        return b"set_aside" in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):  # not there, or broken: it is made again
        return False


def _make_shard(codec, job):
    """Write a shard unless somebody else does or did, and return how many of its clips were encoded and how many were found.

    `job` is its path, rows, hashes of their audio, where codes of these are, and whether to wait for whoever holds it.
    """
    path, rows, hashes, known, wait = job
    with contextlib.suppress(Timeout), hold(path, wait):
        if not _is_whole(path):
            with one_thread() if codec.device.type == "cpu" else contextlib.nullcontext():  # resampling adds up as well
                return _write_shard(rows, hashes, known, codec, path)
    return {"encoded": 0, "found": 0}


def _write_shard(rows, hashes, known, codec, path):
    clips = {audio: clip for audio, clip in zip(known, read_codes(list(known.values())), strict=True) if clip}
    given, faults = read_given(rows, hashes, codec)
    clips |= given
    found = len(clips)
    new = {audio: row["audio_path"] for row, audio in zip(rows, hashes, strict=True)
           if audio and audio not in clips and "codes_row" not in row}
    for start in range(0, len(new), WINDOW_CLIPS):
        batch = list(new)[start : start + WINDOW_CLIPS]
        read = zip(batch, _read_clips([new[audio] for audio in batch], codec), strict=True)
        wavs = {audio: wav for audio, wav in read if wav is not None}
        seconds = [len(wav) / codec.config.sampling_rate for wav in wavs.values()]
        if wavs:
            clips |= zip(wavs, zip(encode(codec, list(wavs.values())), seconds, strict=True), strict=True)
    kept = [(row, audio) for row, audio in zip(rows, hashes, strict=True) if audio in clips]
    left = [(row, audio) for row, audio in zip(rows, hashes, strict=True) if audio not in clips]
    set_aside = [row | {"reason": faults.get(audio) or _find_reason(row, codec)} for row, audio in left]
    table = pa.Table.from_arrays([
        pa.array([row["text"] for row, _ in kept], pa.string()), _list_codes([clips[audio][0] for _, audio in kept]),
        pa.array([str(row["speaker_id"]) for row, _ in kept], pa.string()),
        pa.array([row["language"] for row, _ in kept], pa.string()),
        pa.array([clips[audio][1] for _, audio in kept], pa.float64()), pa.array([audio for _, audio in kept], pa.string()),
    ], schema=_SCHEMA.append(_AUDIO))  # fmt: skip
    _write_table(table.replace_schema_metadata({"set_aside": json.dumps(set_aside, ensure_ascii=False, default=str)}), path)
    return {"encoded": len(clips) - found, "found": found}


def _read_clips(files, codec):
    """Return the samples of each file, None for one that does not read.

    A GPU encodes faster than one core decodes, and is fed by a thread per core; libsndfile and torch let go of the GIL.
    """
    def read(file):
        try:
            return read_audio(file, codec.config.sampling_rate)
        except AudioError:
            return None

    if codec.device.type == "cpu":
        return list(map(read, files))
    with ThreadPoolExecutor(count_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(read, files))


def _find_reason(row, codec):
    try:
        read_audio(row["audio_path"], codec.config.sampling_rate)
    except AudioError as error:
        return str(error)
    return f"{row['audio_path']}: it came while others were encoded; run again"  # its bytes were asked for before


def _list_codes(codes):
    """Return matrices (frames, codebooks) as one column, without a Python number for each code."""
    frames = np.array([len(code) for code in codes], np.int64)
    widths = np.repeat([code.shape[1] for code in codes], frames).astype(np.int64)
    values = pa.array(np.concatenate([code.ravel() for code in codes]) if codes else np.zeros(0, np.uint16), pa.uint16())
    inner = pa.ListArray.from_arrays(pa.array(np.append(0, widths.cumsum()), pa.int32()), values)
    return pa.ListArray.from_arrays(pa.array(np.append(0, frames.cumsum()), pa.int32()), inner)


def _check_rows(rows):
    """Refuse what Parquet will not take before an hour of encoding, not after it."""
    for row in rows:
        for name in ("text", "language"):
            if not isinstance(row[name], str) or any("\ud800" <= character <= "\udfff" for character in row[name]):
                raise TokensError(f"{row['audio_path']} has {row[name]!r:.60} as {name}; allowed is a text of whole characters, "
                                  "which manifest.read_manifest makes of what can be converted")


def _write_table(table, path):
    with replace_file(path) as part:
        pq.write_table(table, part, row_group_size=GROUP_CLIPS)


def read_tokens(path, codec=None) -> datasets.Dataset:
    """Return the rows of a folder of tokens (write_tokens), or of one Parquet file, read from disk as they are asked for.

    rows[0] is a dict of text, codes (frames x codebooks, uint16), speaker_id, language, duration; 50 h of speech take no
    memory. The first call writes an Arrow copy to a hidden folder inside or beside it (.5 s for 50 h), later ones map it; what
    changed is copied anew. With `codec`, the codes must be of as many codebooks of that size at that frame rate. Raises
    TokensError.
    """
    path = Path(path)
    files = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    if not path.exists():
        raise TokensError(f"{path}: no such tokens; write_tokens makes them")
    about = read_json(path / ABOUT) if path.is_dir() else {}
    if path.is_dir() and len(files) != about.get("shards"):
        raise TokensError(f"{path} has {len(files)} of {about.get('shards', 'an unknown number of')} shards; run again: "
                          "write_tokens makes those that are missing")
    for file in files:
        try:
            metadata = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise _say_broken(file, error) from error
        _check_columns(file, metadata)
        about = about or {key.decode(errors="replace"): value.decode(errors="replace")
                          for key, value in (metadata.metadata or {}).items()}
    _check_codec(path, about, codec)
    _check_any(path, files)
    cache = path / ".cache" if path.is_dir() else path.with_name(f".{path.name}.cache")
    try:
        with _quiet_datasets():
            rows = datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=str(cache), columns=_SCHEMA.names)
    except (pa.ArrowException, OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise _say_broken(_find_broken(files) or path, error) from error
    return rows.with_transform(_as_arrays)


def _say_broken(file, error):
    reason = " ".join(str(error.__cause__ or error).split())
    return TokensError(f"{file} can not be read ({reason}); if it is broken, delete it and run again: write_tokens makes the "
                       "clips in it anew")


def _find_broken(files):
    for file in files:
        try:
            pq.read_table(file)
        except (pa.ArrowException, OSError):
            return file
    return None


def _check_columns(file, metadata):
    columns = metadata.schema.to_arrow_schema().names
    missing = [name for name in _SCHEMA.names if name not in columns]
    if missing:
        raise TokensError(f"{file} lacks the columns {', '.join(missing)}; found are {', '.join(columns)}. Give tokens that "
                          "write_tokens made, or delete these to make them again")


def _check_codec(path, about, codec):
    if codec is None:
        return
    wanted = {"frame_rate": frame_rate(codec), "num_codebooks": codec.config.num_quantizers,
              "codebook_size": codec.config.codebook_size}
    wrong = {key: (about.get(key), value) for key, value in wanted.items() if str(about.get(key)) != str(value)}
    if wrong:
        raise TokensError(f"{path} was made by another codec (found, wanted): {wrong}; delete it to encode again")


def _check_any(path, files):
    if any(pq.read_metadata(file).num_rows for file in files):
        return
    set_aside = [row for file in files for row in json.loads((pq.read_schema(file).metadata or {}).get(b"set_aside", b"[]"))]
    reason = f", the first for this: {set_aside[0]['reason']}" if set_aside else ""
    raise TokensError(f"{path} holds no clip; {len(set_aside)} were set aside{reason}. Give a corpus with clips that read")


def read_column(rows, name: str, absent: str | None = None) -> list[str]:
    """Return one column of token rows, a list of dicts or a Dataset, as a list of strings; `absent` where it may be missing."""
    if absent is not None and name not in (rows[0] if isinstance(rows, list) and rows else rows.column_names):
        return [absent] * len(rows)
    column = [row[name] for row in rows] if isinstance(rows, list) else rows.with_format("arrow")[name][:].to_pylist()
    return [str(value) for value in column]


def count_frames(rows) -> list[int]:
    """Return the number of frames of each token row, without reading a code."""
    if isinstance(rows, list):
        return [len(row["codes"]) for row in rows]
    return pc.list_value_length(rows.with_format("arrow")["codes"][:]).to_pylist()  # from offsets: no code is read


def _as_arrays(batch):  # datasets' own numpy format makes int64 of codes and takes four times as long
    return batch | {"codes": [np.array(code, dtype=np.uint16) for code in batch["codes"]]} if "codes" in batch else batch


@contextlib.contextmanager
def _quiet_datasets():
    level, shown = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
