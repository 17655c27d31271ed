"""Codes that were made before: found again by codec and bytes of audio, read from data sets of codes alone, and written as one.

python -m csm_nb.corpora.codes data/tokens/<fingerprint> OUT [--licence CC0]
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData

from csm_nb.cards import name_licence
from csm_nb.codec.mimi import frame_rate
from csm_nb.corpora.layouts import describe_broken
from csm_nb.manifest import CorpusError
from csm_nb.paths import resolve_path
from csm_nb.provenance import hash_files, read_json, replace_file

FILE_CLIPS = 50_000  # of one file of a data set: .25 GB at 6 s and 32 codebooks
# As codes are published on the hub (shangeth/librispeech-mimi-codes), and the language
PUBLISHED = pa.schema([
    ("id", pa.string()), ("text", pa.string()), ("speaker_id", pa.string()), ("language", pa.string()),
    ("codes", pa.list_(pa.list_(pa.int16()))), ("n_frames", pa.int32()), ("k_codebooks", pa.int32()),
])  # fmt: skip
ABOUT = "tokens.json"  # in a folder of tokens: its codec, rows and shards


def hash_codec(codec) -> str:
    """Return a hash of all of a codec's weights: what the codes of a clip depend on beside its audio."""
    digest = hashlib.sha256()
    for name, value in codec.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def find_codes(hashes, codec: str, place: Path) -> dict[str, tuple[Path, int]]:
    """Return {hash of audio: (shard, row)} of the clips among `hashes` that any folder of tokens in `place` has codes of.

    Only folders of the codec with the hash `codec` count; a shard that can not be read has none.
    """
    wanted, found = set(filter(None, hashes)), {}
    for about in sorted(place.glob(f"*/{ABOUT}")):
        try:
            same = json.loads(about.read_text(encoding="utf-8")).get("codec") == codec
        except ValueError:
            continue
        for shard in sorted(about.parent.glob("part-*.parquet")) if same else []:
            if not wanted:
                return found
            try:
                column = pq.read_table(shard, columns=["audio"])["audio"].to_pylist()
            except (pa.ArrowException, OSError):
                continue
            for row, name in enumerate(column):
                if name in wanted:
                    wanted.discard(name)
                    found[name] = (shard, row)
    return found


def read_codes(places: list[tuple[Path, int]]) -> list[tuple[np.ndarray, float] | None]:
    """Return (codes as uint16 frames x codebooks, seconds) of rows of shards, None for one that can not be read any more."""
    clips, rows = {}, {}
    for shard, row in places:
        rows.setdefault(shard, []).append(row)
    for shard, numbers in rows.items():  # one in memory at a time
        try:
            table = pq.read_table(shard, columns=["codes", "duration"])
        except (pa.ArrowException, OSError):
            continue
        for number in numbers:
            codes, seconds = (column[number] for column in table.columns)
            clips[shard, number] = codes.values.flatten().to_numpy().reshape(len(codes), -1), seconds.as_py()
    return [clips.get(place) for place in places]


def hash_clips(rows) -> list[str | None]:
    """Return a hash of each row's audio, of codes alone of their file and place in it; None for a file that is not there."""
    hashes = hash_files(Path(row["audio_path"]) for row in rows)
    return [f"{content}-{row['codes_row']}" if content and "codes_row" in row else content
            for row, content in zip(rows, hashes, strict=True)]


def check_given(rows, codec, mark: str) -> None:
    """Raise CorpusError where rows of codes alone (layouts.read_parquet) do not fit a codec with the hash `mark`.

    That is another number of codebooks, another size of a codebook or another codec, where their data set states it. One that
    states none is taken, and said so by check_clips.
    """
    wanted = {"codebooks": codec.config.num_quantizers, "codebook_size": codec.config.codebook_size, "codec": mark}
    for row in rows:
        for key, value in wanted.items() if "codes_row" in row else ():
            if row[key] != value and (row[key] or key == "codebooks"):
                raise CorpusError(f"{row['audio_path']}: its codes have {key} {row[key]}; the codec of the base model has "
                                  f"{value}. Take a base model of that codec, or audio, which is encoded anew")


def read_given(rows, hashes, codec) -> tuple[dict[str, tuple[np.ndarray, float]], dict[str, str]]:
    """Return ({hash: (codes as uint16 frames x codebooks, seconds)}, {hash: fault}) of the rows that are codes alone.

    A row group is read once. Raises CorpusError for codes beyond the codec's codebooks: they are of another codec.
    """
    places, clips, faults = {}, {}, {}
    for row, audio in zip(rows, hashes, strict=True):
        if "codes_row" in row and audio:
            places.setdefault(row["audio_path"], {})[row["codes_row"]] = audio, row
    for path, wanted in places.items():
        for number, codes in _read_column(path, sorted(wanted)):
            audio, row = wanted[number]
            if isinstance(codes, str) or [*map(len, codes)] != [row["frames"]] * row["codebooks"]:
                found = codes if isinstance(codes, str) else f"{len(codes)} codebooks of {len(codes[0]) if codes else 0} codes"
                faults[audio] = f"{path}, row {number}: {found}; stated are {row['codebooks']} of {row['frames']}"
                continue
            codes = np.array(codes, np.int64).T
            if codes.min() < 0 or codes.max() >= codec.config.codebook_size:
                raise CorpusError(f"{path}, row {number}: codes from {codes.min()} to {codes.max()}; the codec of the base model "
                                  f"has 0 to {codec.config.codebook_size - 1}: they are of another codec")
            clips[audio] = codes.astype(np.uint16), len(codes) / frame_rate(codec)
    return clips, faults


def _read_column(path, numbers):
    """Yield (number, codes) of rows (ascending) of a Parquet file, what is wrong instead of codes in a broken row group."""
    file, first = pq.ParquetFile(path), 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        wanted = [number for number in numbers if first <= number < first + count]
        try:
            column = file.read_row_group(group, columns=["codes"]).column(0) if wanted else None
        except (pa.ArrowException, OSError) as error:
            yield from ((number, describe_broken(f"row group {group}", error)) for number in wanted)
        else:
            yield from ((number, column[number - first].as_py() or []) for number in wanted)
        first += count


def write_codes(folder, out, licence: str = "not stated") -> Path:
    """Write a folder of tokens (tokens.write_tokens) as a data set of codes alone, with a card, and return `out`.

    It is what `datasets` and the hub read, and load_corpus: data/train-*.parquet of PUBLISHED, codes codebooks x frames. The
    file's metadata states codec, frame rate and codebook size. Raises CorpusError for a folder that is no whole one.
    """
    folder, out = resolve_path(folder), resolve_path(out)
    about, shards = read_json(folder / ABOUT), sorted(folder.glob("part-*.parquet"))
    if not about or len(shards) != about["shards"]:
        raise CorpusError(f"{folder}: {len(shards)} of {about.get('shards', 'an unknown number of')} shards of tokens; give a "
                          "whole folder below data/tokens")
    counts = [pq.read_metadata(shard).num_rows for shard in shards]
    named = {key: str(about[key]) for key in ("codec", "frame_rate", "codebook_size")}
    schema, number, files = PUBLISHED.with_metadata(named), 0, max(1, -(-sum(counts) // FILE_CLIPS))
    (out / "data").mkdir(parents=True, exist_ok=True)
    batches = (batch for shard in shards for batch in pq.ParquetFile(shard).iter_batches(1024))
    seconds, left = 0.0, []
    for at in range(files):
        with replace_file(out / "data" / f"train-{at:05d}-of-{files:05d}.parquet") as part:
            with pq.ParquetWriter(part, schema) as writer:
                while number < min((at + 1) * FILE_CLIPS, sum(counts)):
                    left = left or next(batches).to_pylist()
                    take, left = left[: (at + 1) * FILE_CLIPS - number], left[(at + 1) * FILE_CLIPS - number :]
                    writer.write_table(pa.Table.from_pylist([_publish(row, number + i) for i, row in enumerate(take)], schema))
                    number += len(take)
                    seconds += sum(row["duration"] for row in take)
    _write_card(out, about, licence, number, seconds)
    return out


def _publish(row, number):
    codes = np.array(row["codes"], np.int16).T
    return {"id": f"{number:08d}", "text": row["text"], "speaker_id": row["speaker_id"], "language": row["language"],
            "codes": codes.tolist(), "n_frames": codes.shape[1], "k_codebooks": codes.shape[0]}


def _write_card(out, about, licence, clips, seconds):
    data = DatasetCardData(**name_licence(licence), task_categories=["text-to-speech"])
    DatasetCard(f"""---
{data.to_yaml()}
---
# {out.name}

Speech as codes of a neural codec, without its audio: {clips} clips, {seconds / 3600:.2f} h, {about["num_codebooks"]}
codebooks of {about["codebook_size"]} codes, {about["frame_rate"]:g} frames per second. Licence of the data: {licence}.

| column | content |
| --- | --- |
| `id`, `text`, `speaker_id`, `language` | the place in the corpus, what is said, a number for each voice, a code |
| `codes` | int16, codebooks x frames |
| `n_frames`, `k_codebooks` | the shape of `codes` |

The codec, by a hash of its weights as csm-nb takes it: `{about["codec"]}` (also in the files' metadata).
""").save(out / "README.md")


def main(words=None) -> int:
    """Write a folder of tokens as a data set of codes; return 0, or 1 and say why not."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", help="data/tokens/<fingerprint>")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--licence", default="not stated", help="of the data, for the card")
    options = parser.parse_args(words)
    try:
        print(f"{write_codes(options.folder, options.out, options.licence)}: written")
    except (CorpusError, OSError, pa.ArrowException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
