"""What is kept is listed with its size and users, and only what nobody needs goes, after a question."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from csm_nb.claims import hold
from csm_nb.corpora.listed import place_stream
from csm_nb.provenance import write_json
from csm_nb.runs.kept import clean, find_free, list_kept


def make_kept(tmp_path):
    """Runs and data of three folders: one that a run uses, one of no run, and one of no run with a longer name."""
    places = [tmp_path / "data" / name for name in ("tokens/used", "tokens/left", "trainings/old")]
    for place in places:
        place.mkdir(parents=True)
        (place / "a").write_bytes(bytes(2_000_000))
    (tmp_path / "runs" / "da" / "01" / "abc").mkdir(parents=True)
    write_json(tmp_path / "runs" / "da" / "01" / "abc" / "run.json", {"used": {"tokens": [str(places[0])]}})
    return tmp_path / "runs", places


def test_what_is_kept_is_listed_with_its_size_and_the_runs_that_use_it(tmp_path):
    runs, places = make_kept(tmp_path)
    kept = list_kept(runs).set_index("place")
    assert list(kept["used by"]) == ["no run", "da/01/abc", "no run"] and list(kept.MB) == [2.0] * 3
    assert list(kept.kind) == ["tokens", "tokens", "trainings"] and not kept.held.any()
    assert list_kept(tmp_path / "none" / "runs").empty


def test_streams_and_clips_are_of_the_runs_whose_corpus_they_are(tmp_path):
    data, runs = tmp_path / "data", tmp_path / "runs"
    streams = [data / "streams" / place_stream({"id": name}, "da", 3).name for name in ("me/mine", "me/other")]
    for place in (*streams, data / "clips"):
        place.mkdir(parents=True)
        (place / "a").write_bytes(bytes(1_000_000))
    assert find_free(list_kept(runs)).place.tolist() == [str(place) for place in (*sorted(streams), data / "clips")]
    (runs / "no/03/abc").mkdir(parents=True)
    params = {"corpus": f"me/mine:1, {tmp_path}", "language": "no", "also": ["da"], "seed": 3}
    write_json(runs / "no/03/abc/run.json", {"params": params})
    assert find_free(list_kept(runs)).place.tolist() == [str(streams[1])]
    with hold(runs / "no/03/abc"):
        assert find_free(list_kept(runs), everything=True).place.tolist() == [str(streams[1])]


def test_only_what_no_run_uses_and_nobody_works_in_goes(tmp_path):
    runs, (used, left, old) = make_kept(tmp_path)
    with hold(old):
        assert list_kept(runs).set_index("place").held[str(old)]
        assert clean(find_free(list_kept(runs), everything=False)) == [left]
    assert used.is_dir() and old.is_dir() and not left.exists()
    assert set(clean(find_free(list_kept(runs), everything=True))) == {used, old}


@pytest.mark.parametrize("kind", ["tokens", "spoken", "heard"])
def test_a_folder_in_which_a_shard_or_a_batch_is_being_made_stays(kind, tmp_path):
    place = tmp_path / "data" / kind / "abc"
    place.mkdir(parents=True)
    with hold(place / "part-00000.parquet"):
        assert clean(list_kept(tmp_path / "runs")) == [] and list_kept(tmp_path / "runs").held.all()
    assert clean(find_free(list_kept(tmp_path / "runs"))) == [place]


def test_without_a_terminal_it_says_what_would_go_and_removes_nothing(tmp_path):
    runs, places = make_kept(tmp_path)
    command = [sys.executable, "-m", "csm_nb.runs.kept", "--runs", str(runs), "--clean"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "4 MB in 2 folders would go; nothing was removed" in done.stdout
    assert all(place.is_dir() for place in places)
