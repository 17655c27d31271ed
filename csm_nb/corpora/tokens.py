"""Manifest rows to codec tokens: a Parquet file that training reads, made once, going on after a kill."""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csm_nb.audio import AudioError, read_audio
from csm_nb.codec.mimi import encode, frame_rate
from csm_nb.provenance import replace_file

PART_CLIPS = 64
GROUP_CLIPS = 1024  # rows of a row group: 50 h in one group take 1.3 GB to map, in these .2 GB and a third of the time
_SCHEMA = pa.schema([
    ("text", pa.string()), ("codes", pa.list_(pa.list_(pa.uint16()))), ("speaker_id", pa.string()),
    ("language", pa.string()), ("duration", pa.float64()),
])


class TokensError(ValueError):
    """A token file that is missing, broken or empty, or does not fit the codec; names the file and what to do."""


def write_tokens(rows, codec, out_path) -> dict:
    """Encode `rows` into a Parquet file and return {"path", "clips", "set_aside"}.

    Columns: text, codes (frames x codebooks, uint16), speaker_id, language, duration in seconds; frame rate, codebooks
    and a fingerprint of codec and rows in the schema's metadata. Finished parts of 64 clips survive a kill and are not
    encoded again; a file of the same codec and rows is left as it is. A clip that fails to read is set aside.
    Raises TokensError, before anything is encoded, for a row that the file can not hold (a text that is none).
    """
    out_path, rows = Path(out_path), list(rows)
    _check_rows(rows)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    mark = _fingerprint(rows, codec)
    parts = out_path.with_name(f"{out_path.name}.{mark[:12]}.parts")
    if _read_mark(out_path) != mark:
        parts.mkdir(exist_ok=True)
        for start in range(0, len(rows), PART_CLIPS):
            part = parts / f"{start:08d}.parquet"
            if not part.exists():
                _write_part(rows[start : start + PART_CLIPS], codec, part)
        tables = [pq.read_table(part) for part in sorted(parts.glob("*.parquet"))]
        metadata = {"frame_rate": str(frame_rate(codec)), "num_codebooks": str(codec.config.num_quantizers),
                    "codebook_size": str(codec.config.codebook_size), "fingerprint": mark}
        set_aside = [row for table in tables for row in json.loads(table.schema.metadata[b"set_aside"])]
        metadata["set_aside"] = json.dumps(set_aside, ensure_ascii=False)
        whole = pa.concat_tables([table.replace_schema_metadata(None) for table in tables]).replace_schema_metadata(metadata)
        _write_table(whole, out_path)
        shutil.rmtree(_cache_folder(out_path), ignore_errors=True)  # of the file that was here before
        shutil.rmtree(parts)
    clips, set_aside = pq.read_metadata(out_path).num_rows, pq.read_schema(out_path).metadata[b"set_aside"]
    return {"path": out_path, "clips": clips, "set_aside": json.loads(set_aside)}


def _read_mark(path):
    try:
        return (pq.read_schema(path).metadata or {}).get(b"fingerprint", b"").decode()
    except (pa.ArrowException, OSError):  # not there, or broken: it is made again
        return ""


def _write_part(rows, codec, path):
    kept, wavs, set_aside = [], [], []
    for row in rows:
        try:
            wavs.append(read_audio(row["audio_path"], codec.config.sampling_rate))
            kept.append(row)
        except AudioError as error:
            set_aside.append(row | {"reason": str(error)})
    codes = encode(codec, wavs)
    columns = {name: [row[name] for row in kept] for name in ("text", "language")}
    columns["speaker_id"] = [str(row["speaker_id"]) for row in kept]
    columns["codes"] = [code.tolist() for code in codes]
    columns["duration"] = [len(wav) / codec.config.sampling_rate for wav in wavs]
    table = pa.table({name: columns[name] for name in _SCHEMA.names}, schema=_SCHEMA)
    _write_table(table.replace_schema_metadata({"set_aside": json.dumps(set_aside, ensure_ascii=False)}), path)


def _check_rows(rows):
    """What Parquet will not take is known before an hour of encoding, not after it."""
    for row in rows:
        for name in ("text", "language"):
            if not isinstance(row[name], str) or any("\ud800" <= character <= "\udfff" for character in row[name]):
                raise TokensError(f"{row['audio_path']} has {row[name]!r:.60} as {name}; allowed is a text of whole characters, "
                                  "which manifest.read_manifest makes of what can be converted")


def _write_table(table, path):
    with replace_file(path) as part:
        pq.write_table(table, part, row_group_size=GROUP_CLIPS)


def _fingerprint(rows, codec):
    digest = hashlib.sha256()
    for name, value in codec.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    for row in rows:
        digest.update(json.dumps([row["text"], str(row["audio_path"]), str(row["speaker_id"])]).encode())
    return digest.hexdigest()


def read_tokens(path, codec=None) -> datasets.Dataset:
    """Return the rows of a token file, read from disk as they are asked for: 50 h of speech take no memory.

    rows[0] is a dict of text, codes (frames x codebooks, uint16), speaker_id, language, duration. The first call writes an
    Arrow copy to a hidden folder beside the file (.5 s for 50 h), later ones map it; a file that changed is copied anew.
    With `codec`, the file must be of as many codebooks of that size at that frame rate. Raises TokensError.
    """
    path = Path(path)
    if not path.is_file():
        raise TokensError(f"{path}: no such token file; write_tokens makes it")
    try:
        _check_file(path, pq.read_metadata(path), codec)
        with _quiet_datasets():
            rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(_cache_folder(path)))
    except (pa.ArrowException, OSError, datasets.exceptions.DatasetGenerationError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise TokensError(f"{path} can not be read ({reason}); if it is broken, delete it and run again: "
                          "write_tokens encodes the clips anew") from error
    return rows.with_transform(_as_arrays)


def read_column(rows, name: str) -> list[str]:
    """One column of token rows, a list of dicts or a Dataset, as a list of strings."""
    column = [row[name] for row in rows] if isinstance(rows, list) else rows.with_format("arrow")[name][:].to_pylist()
    return [str(value) for value in column]


def count_frames(rows) -> list[int]:
    """The frames of each token row, without reading a code."""
    if isinstance(rows, list):
        return [len(row["codes"]) for row in rows]
    return pc.list_value_length(rows.with_format("arrow")["codes"][:]).to_pylist()  # from offsets: no code is read


def _check_file(path, metadata, codec):
    columns = metadata.schema.to_arrow_schema().names
    missing = [name for name in _SCHEMA.names if name not in columns]
    if missing:
        raise TokensError(f"{path} lacks the columns {', '.join(missing)}; found are {', '.join(columns)}. Give a file that "
                          "write_tokens made, or delete this one to encode again")
    found = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in (metadata.metadata or {}).items()}
    if codec is not None:
        wanted = {"frame_rate": str(frame_rate(codec)), "num_codebooks": str(codec.config.num_quantizers),
                  "codebook_size": str(codec.config.codebook_size)}
        wrong = {key: (found.get(key), value) for key, value in wanted.items() if found.get(key) != value}
        if wrong:
            raise TokensError(f"{path} was made by another codec (found, wanted): {wrong}; delete it to encode again")
    if metadata.num_rows == 0:
        set_aside = json.loads(found.get("set_aside", "[]"))
        reason = f", the first for this: {set_aside[0]['reason']}" if set_aside else ""
        raise TokensError(f"{path} holds no clip; {len(set_aside)} were set aside{reason}. Give a corpus with clips that read")


def _cache_folder(path):
    return path.with_name(f".{path.name}.cache")


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
