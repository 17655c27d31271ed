"""What was made is found again, by every process, also after one was killed or a file broke."""

import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pytest
import torch
from conftest import ROOT

from csm_nb.keep import Keep, make_once
from csm_nb.provenance import hash_tensors
from csm_nb.runs.kept import list_kept

SCHEMA = pa.schema([("value", pa.string())])


def ask(data, keys, made, batch_size=2):
    """The values of `keys`, with what had to be made for them added to `made`, a list per batch."""
    def make(places):
        made.append([keys[place] for place in places])
        return [{"value": keys[place].upper()} for place in places]

    keep = Keep(data)
    rows = make_once(keep, "spoken", {"by": "test"}, keys, make, SCHEMA, batch_size)
    assert [row["value"] for row in rows] == [key.upper() for key in keys]
    return keep


def test_what_is_missing_is_made_in_order_and_in_batches_and_equal_keys_once(tmp_path):
    made = []
    assert ask(tmp_path, ["c", "a", "c", "b"], made).describe() == "4 utterances: 3 spoken, 1 found"
    assert made == [["c", "a"], ["b"]]
    assert ask(tmp_path, ["b", "d", "a"], made).describe() == "3 utterances: 1 spoken, 2 found" and made[2:] == [["d"]]
    keep = ask(tmp_path, ["d", "c"], made)
    assert (keep.made, keep.found, len(made)) == ({"spoken": 0}, {"spoken": 2}, 3)
    (folder,) = (tmp_path / "spoken").glob("*/")
    assert keep.places == {"spoken": [folder]}
    assert {path.name.split("-")[0] for path in folder.iterdir()} == {"made", "part"}  # no claim, no half a file


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data.replace(b"A", b"X")],
                         ids=["half", "empty", "another byte"])
def test_a_file_that_broke_is_named_and_what_it_held_is_made_again(damage, tmp_path, capsys):
    made = []
    ask(tmp_path, ["a", "b"], made)
    (part,) = tmp_path.rglob("part-*.parquet")
    part.write_bytes(damage(part.read_bytes()))
    ask(tmp_path, ["a", "b"], made)
    assert f"{part} can not be read" in capsys.readouterr().out and len(made) == 2
    ask(tmp_path, ["a", "b"], made)
    assert capsys.readouterr().out == "" and len(made) == 2


def test_what_fails_half_way_keeps_the_batches_before_it(tmp_path):
    def make(places):
        if 2 in places:
            raise RuntimeError("out of memory")
        return [{"value": "x"} for _ in places]

    with pytest.raises(RuntimeError, match="out of memory"):
        make_once(Keep(tmp_path), "spoken", {"by": "test"}, ["a", "b", "c"], make, SCHEMA, 2)
    (folder,) = (tmp_path / "spoken").glob("*/")
    assert len([*folder.glob("part-*.parquet")]) == 1 and not [*folder.glob("*.work.json"), *folder.glob(".*.lease")]


WORK = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_keep import Keep, SCHEMA, make_once
keys = [f"k{{i:02}}" for i in range(12)]
def make(places):  # nobody gets far before all have begun, however slow the machine
    print(",".join(keys[place] for place in places), flush=True)
    Path(sys.argv[1], f"{{os.getpid()}}.began").touch()
    while len([*Path(sys.argv[1]).glob("*.began")]) < int(sys.argv[3]):
        time.sleep(0.01)
    time.sleep(float(sys.argv[2]))
    return [{{"value": keys[place].upper()}} for place in places]
keep = Keep(Path(sys.argv[1]))
rows = make_once(keep, "spoken", {{"by": "test"}}, keys, make, SCHEMA, 2)
assert [row["value"] for row in rows] == [key.upper() for key in keys]
"""


def start(data, seconds, count=1):
    """A process that makes twelve rows by and by, as soon as `count` of them have begun."""
    command = [sys.executable, "-c", WORK.format(tests=str(ROOT / "tests")), str(data), str(seconds), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)


def test_processes_at_once_share_the_work_and_make_nothing_twice(tmp_path):
    processes = [start(tmp_path, 0.3, 2) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    made = [key for lines in said for line in lines if line.startswith("k") for key in line.split(",")]
    assert sorted(made) == [f"k{i:02}" for i in range(12)]
    assert all(lines for lines in said)


def test_a_killed_process_loses_the_batch_that_it_is_at_and_no_more(tmp_path):
    first = start(tmp_path, 1)
    lines = [first.stdout.readline().strip() for _ in range(3)]
    (folder,) = (tmp_path / "spoken").glob("*/")
    (tmp_path / "data").symlink_to(tmp_path)
    assert list_kept(tmp_path / "runs").held.tolist() == [True]  # nobody cleans it meanwhile
    first.send_signal(signal.SIGKILL)
    first.stdout.close()
    first.wait()
    assert len([*folder.glob("*.work.json")]) == 1 and list_kept(tmp_path / "runs").held.tolist() == [False]
    made, began = [], time.monotonic()
    ask(tmp_path, [f"k{i:02}" for i in range(12)], made)
    assert made[0] == lines[2].split(",") and len(made) == 4 and time.monotonic() - began < 20
    assert not [*folder.glob("*.work.json")]


def test_a_tensor_is_hashed_by_what_it_holds_now():
    value = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    first = hash_tensors({"a": value})
    assert first == hash_tensors({"a": value}) == hash_tensors({"a": value.detach().clone()})
    with torch.no_grad():
        value[1, 2] += 1
    changed = hash_tensors({"a": value})
    value.grad = torch.ones_like(value)
    torch.optim.SGD([value], 0.1).step()
    plain = value.detach()
    hashes = [first, changed, hash_tensors({"a": value}), hash_tensors({"b": value}), hash_tensors({"a": plain.bfloat16()}),
              hash_tensors({"a": plain.reshape(3, 2)})]
    assert len(set(hashes)) == 6


def test_a_tensor_that_was_not_written_to_is_read_once(monkeypatch):
    value = torch.nn.Parameter(torch.zeros(3))
    before, reads = hash_tensors({"a": value}), []
    monkeypatch.setattr(torch.nn.Parameter, "detach", reads.append, raising=False)
    assert hash_tensors({"a": value}) == before and reads == []
