"""Codes that were made before: found again by the codec and by the bytes of the audio, whatever text or name a clip has now."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
