"""What was made once is found again: rows below data/, kept by what they were made of and written batch by batch."""

import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csm_nb.claims import MOMENT, claim, hold, is_held, name_holder
from csm_nb.paths import show_path
from csm_nb.provenance import hash_value, read_json, replace_file, write_json

RECORD = "made-of.json"  # in a folder of what is kept: what its name is a hash of
WORK = ".work.json"  # ending of a file that says which keys a living process is making
LOOK = 0.2  # s; from one look at what another process makes to the next
NOUNS = {"spoken": "utterances", "heard": "clips for a judge"}


@dataclass
class Keep:
    """Where a run keeps what it makes, and the account of it: `data` is run.data, the rest is filled in by who makes something.

    By kind ("spoken", "heard"): `places` are the folders that were used, `made` and `found` how many were made and found.
    """

    data: Path
    places: dict[str, list[Path]] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the account in words: "224 utterances: 80 spoken, 144 found; 448 clips for a judge: 160 heard, 288 found"."""
        counts = [(kind, self.made[kind], self.found[kind]) for kind in NOUNS if kind in self.places]
        return "; ".join(f"{made + found} {NOUNS[kind]}: {made} {kind}, {found} found" for kind, made, found in counts)

    def note(self, kind: str, folder: Path, made: int, found: int) -> None:
        """Add to the account what was made, and what was found, in a folder."""
        self.places[kind] = list(dict.fromkeys([*self.places.get(kind, []), folder]))
        self.made[kind] = self.made.get(kind, 0) + made
        self.found[kind] = self.found.get(kind, 0) + found


def make_once(keep: Keep, kind: str, made_of: dict, keys: list[str], make, schema: pa.Schema, batch_size: int = 32) -> list[dict]:
    """Return the row of each of `keys`, found in <keep.data>/<kind>/<hash of made_of>/, or made by `make` and kept there.

    `make` is given up to `batch_size` places in `keys`, and returns a dict by `schema` for each. What is missing is made in
    the order of the keys, equal keys once. Each batch is a Parquet file, written whole or not at all: a killed process
    loses the batch that it is at. Several processes, also of several machines on one disk, share the work: what one is at,
    the others leave to it and wait for at the end. A file that can not be read is named, removed and made again.
    """
    folder = Path(keep.data) / kind / hash_value(made_of)
    places = {key: place for place, key in reversed([*enumerate(keys)])}
    rows, read, made, waited = {}, set(), 0, 0.0
    _read_parts(folder, places, rows, read)
    while missing := [key for key in places if key not in rows]:
        missing.sort(key=places.get)
        with hold(folder):  # for a moment: to choose what nobody else is at
            _read_parts(folder, places, rows, read)
            busy, holder = _list_work(folder)
            chosen = [key for key in missing if key not in rows and key not in busy][:batch_size]
            if chosen:
                mark = uuid.uuid4().hex[:12]
                lease = claim(folder / mark, 0)
                lease.acquire()
                if not (folder / RECORD).is_file():
                    write_json(folder / RECORD, made_of)
                write_json(folder / f"{mark}{WORK}", {"keys": chosen})
        if chosen:
            try:
                new = make([places[key] for key in chosen])
                _write_part(folder / f"part-{mark}.parquet", chosen, new, schema)
            finally:
                (folder / f"{mark}{WORK}").unlink(missing_ok=True)
                lease.release()
            made += len(chosen)
            _read_parts(folder, places, rows, read)
        elif any(key not in rows for key in missing):
            if waited <= MOMENT < waited + LOOK:  # once, and not where it is soon over
                print(f"{holder} is at work in {show_path(folder)}: waiting for what it leaves", flush=True)
            waited += LOOK
            time.sleep(LOOK)
    keep.note(kind, folder, made, len(keys) - made)
    return [rows[key] for key in keys]


def _list_work(folder):
    """Return the keys that living processes are making, and one of them in words; what a killed one left is removed."""
    keys, holder = set(), ""
    for file in folder.glob(f"*{WORK}"):
        place = folder / file.name.removesuffix(WORK)
        if is_held(place):
            keys |= set(read_json(file).get("keys", []))
            holder = name_holder(place)
        else:
            file.unlink(missing_ok=True)
    return keys, holder


def _read_parts(folder, wanted, rows, read):
    """Add to `rows` what the files of a folder hold of the keys `wanted`; `read` are those that were read before."""
    wanted = pa.array([key for key in wanted if key not in rows], pa.string())
    for part in sorted(set(folder.glob("part-*.parquet")) - read):
        try:
            table = pq.read_table(part, page_checksum_verification=True)
            found = table.filter(pc.is_in(table["key"], wanted)).to_pylist()
        except FileNotFoundError:  # cleaned meanwhile
            continue
        except (pa.ArrowException, OSError, KeyError) as error:
            print(f"{show_path(part)} can not be read ({' '.join(str(error).split())[:100]}): what it held is made again",
                  flush=True)
            with suppress(OSError):
                part.unlink()
            continue
        read.add(part)
        rows.update((row["key"], row) for row in found)


def _write_part(path, keys, rows, schema):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([{"key": key, **row} for key, row in zip(keys, rows, strict=True)],
                                 pa.schema([("key", pa.string()), *schema]))
    with replace_file(path) as part:
        pq.write_table(table, part, write_page_checksum=True)
