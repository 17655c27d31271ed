"""What is kept below data/, which runs use it, and what may go: `python -m csm_nb.runs.kept [--clean] [--all] [--runs runs]`."""

import argparse
import shutil
import sys
import time
from pathlib import Path

import pandas as pd

from csm_nb.claims import is_held
from csm_nb.paths import resolve_path, show_path
from csm_nb.provenance import read_json

KINDS = ("tokens", "trainings", "spoken", "heard")


def list_kept(runs="runs") -> pd.DataFrame:
    """Return what lies in data/ beside the folder `runs`: kind, place, MB, days since it was written, used by, held.

    `used by` names the runs whose run.json says so; `held` is true while a process works in it.
    """
    runs = resolve_path(runs)
    users = {}
    for record in sorted(runs.glob("**/run.json")):
        for places in read_json(record).get("used", {}).values():
            for place in places:
                users.setdefault(resolve_path(place), []).append(record.parent.relative_to(runs).as_posix())
    rows = []
    for place in (path for kind in KINDS for path in sorted((runs.parent / "data" / kind).glob("*/"))):
        files = [file.stat() for file in place.rglob("*") if file.is_file()]
        rows.append({
            "kind": place.parent.name, "place": show_path(place), "MB": sum(file.st_size for file in files) / 1e6,
            "days": (time.time() - max((file.st_mtime for file in files), default=time.time())) / 86400,
            "used by": ", ".join(users.get(place, [])) or "no run", "held": _is_at_work(place),
        })  # fmt: skip
    return pd.DataFrame(rows, columns=["kind", "place", "MB", "days", "used by", "held"])


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
