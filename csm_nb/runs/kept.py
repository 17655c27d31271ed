"""What is kept below data/, which runs use it, and what may go: `python -m csm_nb.runs.kept [--clean] [--all] [--runs runs]`."""

import argparse
import itertools
import shutil
import sys
import time
from pathlib import Path

import pandas as pd

from csm_nb.claims import is_held
from csm_nb.corpora import listed
from csm_nb.paths import resolve_path, show_path
from csm_nb.provenance import read_json

KINDS = ("tokens", "trainings", "spoken", "heard", "streams", "clips")


def list_kept(runs="runs") -> pd.DataFrame:
    """Return what lies in data/ beside the folder `runs`: kind, place, MB, days since it was written, used by, held.

    `used by` names the runs whose run.json says so; `held` is true while a process works in it. All clips are one place: of
    runs with a corpus, which read it again when they are run again.
    """
    runs, users, working = resolve_path(runs), {}, set()
    data = runs.parent / "data"
    for record in sorted(runs.glob("**/run.json")):
        about, name = read_json(record), record.parent.relative_to(runs).as_posix()
        drawn = _list_drawn(about.get("params", {}), data)
        for place in [*map(resolve_path, itertools.chain(*about.get("used", {}).values())), *drawn]:
            users.setdefault(place, []).append(name)
        working |= set(drawn) if is_held(record.parent) else set()
    rows = []
    for place in (path for kind in KINDS for path in ([data / kind] if kind == "clips" else sorted((data / kind).glob("*/")))):
        if not place.is_dir():
            continue
        files = [file.stat() for file in place.rglob("*") if file.is_file()]
        rows.append({
            "kind": place.parent.name, "place": show_path(place), "MB": sum(file.st_size for file in files) / 1e6,
            "days": (time.time() - max((file.st_mtime for file in files), default=time.time())) / 86400,
            "used by": ", ".join(users.get(place, [])) or "no run", "held": _is_at_work(place) or place in working,
        })  # fmt: skip
    return pd.DataFrame(rows, columns=["kind", "place", "MB", "days", "used by", "held"])


def _list_drawn(params, data):
    """Return where the clips of a run's corpus are, and the streams (listed.place_stream) that they are from."""
    if not params.get("corpus"):
        return []
    wanted = itertools.product([params["language"], *params.get("also", [])], listed.split_corpora(params["corpus"]))
    remote = [(listed.find_remote(code, name), code) for code, (name, _) in wanted]
    return [data / "clips"] + [data / "streams" / listed.place_stream(entry, code, params["seed"]).name
                               for entry, code in remote if entry]


def _is_at_work(place):
    """Return whether a process holds a folder, or something in it: a shard that it writes, a batch that it speaks."""
    markers = place.glob(".*.lease")
    return is_held(place) or any(is_held(place / marker.name[1:].removesuffix(".lease")) for marker in markers)


def find_free(kept: pd.DataFrame, everything: bool = False) -> pd.DataFrame:
    """Return the rows of what no run uses, with `everything` of all, but for what a process works in."""
    return kept[~kept.held & (everything | (kept["used by"] == "no run"))]


def clean(free: pd.DataFrame) -> list[Path]:
    """Remove the places of `free` (find_free) and return them; what a process has begun to work in meanwhile stays."""
    places = [place for place in map(resolve_path, free.place) if not _is_at_work(place)]
    for place in places:
        shutil.rmtree(place)
    return places


def main() -> int:
    """List what is kept; with --clean say what would go, ask, and remove it."""
    parser = argparse.ArgumentParser("python -m csm_nb.runs.kept", description=__doc__.partition(":")[0])
    parser.add_argument("--runs", default="runs", help="the folder of runs that data/ lies beside (default: runs)")
    parser.add_argument("--clean", action="store_true", help="remove what no run uses, after a question")
    parser.add_argument("--all", action="store_true", help="with --clean: what runs use as well; they stay, and make it again")
    options = parser.parse_args()
    kept = list_kept(options.runs)
    print(kept.round(1).to_string(index=False) if len(kept) else f"nothing is kept beside {options.runs}")
    free = find_free(kept, options.all)
    if not options.clean or free.empty:
        print(f"{kept.MB.sum():.0f} MB, of which {free.MB.sum():.0f} MB would go (make clean-data; ALL=1: also what runs use)")
        return 0
    if not sys.stdin.isatty():
        print(f"{free.MB.sum():.0f} MB in {len(free)} folders would go; nothing was removed: there is no terminal to ask at")
        return 1
    if input(f"Remove {len(free)} folders, {free.MB.sum():.0f} MB? [y/N] ").strip().lower() not in ("y", "yes"):
        print("nothing was removed")
        return 1
    print(f"removed {len(clean(free))} folders")
    return 0


if __name__ == "__main__":
    sys.exit(main())
