"""Whether two folders of runs found the same, to the last digit: `python bench/compare_runs.py runs-before runs-after`.

For each language and stage the newest complete run of either folder is taken, whatever its hash, and its metrics.json (the
verdict is in it) is compared value by value. Prints every value that differs, is missing, or is new; exits with 1 where one
differs or is missing, or where a stage was completed in the first folder only.

    python bench/compare_runs.py runs-before runs-after --ignore because next    # values that were meant to change
"""

import argparse
import json
import os
import sys
from pathlib import Path


def find_metrics(runs) -> dict[str, dict]:
    """Return {"da/02_synthetic": metrics} of the newest complete run of each language and stage below `runs`."""
    newest = {}
    for done in sorted(Path(runs).glob("*/*/*/done.json"), key=os.path.getmtime):
        language, stage = done.parts[-4:-2]
        newest[f"{language}/{stage}"] = json.loads(done.with_name("metrics.json").read_text(encoding="utf-8"))
    return dict(sorted(newest.items()))


def list_values(value, name="") -> dict[str, str]:
    """Return {"ceiling.cer[0]": "0.2621"} of all that a metrics.json holds, each value as JSON writes it: all its digits."""
    if isinstance(value, dict):
        inside = [(f"{name}.{key}" if name else key, item) for key, item in value.items()]
    elif isinstance(value, list):
        inside = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    else:
        inside = []
    if not inside:
        return {name: json.dumps(value, ensure_ascii=False)}
    return {key: text for name, item in inside for key, text in list_values(item, name).items()}


def compare_metrics(before: dict, after: dict, ignored=()) -> list[tuple[str, str, str, str]]:
    """Return (kind, name, before, after) for each value that is not the same; kind is "differs", "missing" or "new".

    `ignored` are names of values at the top of metrics.json that are not looked at.
    """
    old, new = (list_values({key: value for key, value in side.items() if key not in ignored}) for side in (before, after))
    found = [("differs" if name in new else "missing", name, text, new.get(name, "")) for name, text in old.items()
             if new.get(name) != text]
    return found + [("new", name, "", text) for name, text in new.items() if name not in old]


def main(arguments=None) -> int:
    """Print what differs; return 0 if nothing does, 1 if something does, 2 where there is nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--ignore", nargs="+", default=[], metavar="NAME", help="values of metrics.json to leave out")
    options = parser.parse_args(arguments)
    before, after = find_metrics(options.before), find_metrics(options.after)
    if not before:
        print(f"{options.before}: no complete run; expected <language>/<stage>/<hash>/done.json below it", file=sys.stderr)
        return 2
    bad = 0
    for name, metrics in before.items():
        if name not in after:
            print(f"{name}: not complete in {options.after}")
            bad += 1
            continue
        found = compare_metrics(metrics, after[name], options.ignore)
        for kind, value, old, new in found:
            print(f"{name}: {value} {kind}: {' -> '.join(filter(None, (old, new)))}")
        bad += any(kind != "new" for kind, *_ in found)
    same = len(before) - bad
    print(f"{same} of {len(before)} runs are the same to the last digit; {len(after.keys() - before.keys())} are new")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
